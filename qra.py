"""QRA: Quantization-aware Rank Adaptation, a LoRA rank for each layer under one parameter budget.

[A] The rank of a layer follows the degree of variation in its activations and weights; the total number of LoRA
parameters does not change. [R] The criteria are activation dynamics and spectral cues. [O] The rule below.

One more rank of layer l costs O_l + K_l parameters (A is r x K, B is O x r; K = kh kw I for a convolution).

    budget      sum_l r_l (O_l + K_l) <= rank * sum_l (O_l + K_l)    never exceeded;  r_min <= r_l <= r_max, in granules
    gain        gain_l,i = g_l sigma_l,i^2 / E_l                     of the i-th rank, i = 1, 2, ..
                g_l      = (v_x v_w)^beta                            variation of activations and of weights
                sigma_l  = singular values of R W C^1/2, what the grid costs the picture (hgs_lora.grid_cost), and E_l = 1;
                           or of the residual (W - Q) L alone, H = L L^T = E[x x^T], and E_l = ||W_l L_l||_F^2, the
                           layer's output energy
    allocation  start at r_min, then take the granule of the largest gain per parameter that still fits, until none does

With gradients (R) all layers are in the picture's units. Without, sigma^2 / E is the share of the layer's output that a rank
wins back; without E a layer with large outputs takes all: worse than uniform. Spectra descend, so greedy is optimal when
all costs are equal, and otherwise loses at most the gain of the first granule that did not fit. v_x is the coefficient of
variation of the per-channel absolute maximum over channels and timesteps, v_w the same for weights (hessian.py measures them).

Ties (equal gain per parameter) go to the layer of lower rank, then to the name that sorts first; the order of the
dicts never matters, so permuting layers permutes ranks. Everything is float64 and runs on the CPU.

Dimension key: O, K a layer's matrix, r rank. Left out on purpose: ranks that change during training (AdaLoRA), exact
knapsack (greedy is within one granule of it), a budget in bytes (parameters and bytes are proportional in LoRA).
"""

import heapq
import math
import random

import torch

# ---------------------------------------------------------------- gains: siblings, the i-th value is the gain of rank i


def _variation_factor(name, v_x, v_w, beta):
    """g = (v_x v_w)^beta."""
    product = float(v_x[name]) * float(v_w[name])
    if not (math.isfinite(product) and product >= 0):
        raise ValueError(f"layer {name}: the variation v_x v_w = {product} must be finite and not negative")
    return product**beta


def gains_variation(shapes, spectra, energy, v_x, v_w, beta, seed):
    """g (O + K) / i: statistics only [A]. Per parameter that is g / i, which fills ranks in proportion to g."""
    return {
        name: [_variation_factor(name, v_x, v_w, beta) * (O + K) / i for i in range(1, min(O, K) + 1)]
        for name, (O, K) in shapes.items()
    }


def gains_spectrum(shapes, spectra, energy, v_x, v_w, beta, seed):
    """sigma_i^2 / E: the share of the layer's output energy that rank i wins back. A dead layer (E = 0) gains 0."""
    gains = {}
    for name in shapes:
        sigma_r = torch.as_tensor(spectra[name]).detach().to("cpu", torch.float64)
        share_r, total = sigma_r.square().sort(descending=True).values, float(energy[name])
        if not (math.isfinite(total) and total >= 0 and bool(share_r.isfinite().all())):
            raise ValueError(f"layer {name}: spectrum and energy must be finite and the energy not negative")
        gains[name] = (share_r / total if total > 0 else torch.zeros_like(share_r)).tolist()
    return gains


def gains_qra(shapes, spectra, energy, v_x, v_w, beta, seed):
    """g sigma_i^2 / E: variation times spectrum."""
    gains = gains_spectrum(shapes, spectra, energy, v_x, v_w, beta, seed)
    return {name: [_variation_factor(name, v_x, v_w, beta) * gain for gain in gains[name]] for name in shapes}


def gains_shuffled(shapes, spectra, energy, v_x, v_w, beta, seed):
    """Control: qra's curves dealt to the wrong layers. Same budget, same spread of ranks, no information."""
    gains, names = gains_qra(shapes, spectra, energy, v_x, v_w, beta, seed), sorted(shapes)
    dealt = random.Random(seed).sample(names, len(names))
    return {name: gains[other] for name, other in zip(names, dealt, strict=True)}


METHODS = {"variation": gains_variation, "spectrum": gains_spectrum, "qra": gains_qra, "shuffled": gains_shuffled}
# change METHODS to try yours: any function of this signature; "uniform" needs no gains


# ----------------------------------------------------------------------------------------------------------- allocation


def parameters(ranks, shapes):
    """LoRA parameters: sum_l r_l (O_l + K_l)."""
    return sum(ranks[name] * (O + K) for name, (O, K) in shapes.items())


def objective(ranks, gains):
    """sum_l sum_{i <= r_l} gain_l,i: what an allocation wins back. Ranks beyond the end of a curve win nothing."""
    return sum(sum(gains[name][: ranks[name]]) for name in ranks)


def greedy(gains, shapes, budget, granule, r_min, r_max):
    """Ranks {name: r}: from r_min up in granules by the largest gain per parameter, as long as it fits the budget.

    A layer stops at r_max or min(O, K), rounded down to r_min + a multiple of the granule. A granule too large for what
    is left is skipped and smaller layers go on: costs are constant per layer, so what does not fit once never fits.
    """
    ranks = dict.fromkeys(shapes, r_min)
    left = budget - parameters(ranks, shapes)
    heap = []

    def offer(name):
        r = ranks[name]
        if r + granule <= min(r_max, *shapes[name]):
            cost = granule * sum(shapes[name])
            heapq.heappush(heap, (-sum(gains[name][r : r + granule]) / cost, r, name, cost))  # ties: rank, then name

    for name in shapes:
        offer(name)
    while heap:
        _, _, name, cost = heapq.heappop(heap)
        if cost <= left:
            ranks[name] += granule
            left -= cost
            offer(name)
    return ranks


def allocate(
    shapes, spectra=None, energy=None, v_x=None, v_w=None,
    method="qra", rank=16, granule=4, r_min=4, r_max=64, beta=0.5, seed=0,
):  # fmt: skip
    """Ranks {name: r} for layers {name: (O, K)} with at most the parameters of a uniform `rank`.

    spectra {name: sigma_r} (any length; ranks beyond it gain 0), energy {name: ||W L||_F^2}, v_x and v_w {name: float};
    a method reads only what its gains use (uniform: nothing; variation: v_x, v_w; spectrum: spectra, energy).
    ValueError, one sentence: unknown method, rank larger than a layer, bounds out of order, statistics not finite.
    """
    if method != "uniform" and method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {['uniform', *METHODS]}")
    if granule < 1 or not 0 <= r_min <= rank <= r_max:
        raise ValueError(f"need 0 <= r_min <= rank <= r_max, granule >= 1; got {r_min}, {rank}, {r_max} and {granule}")
    for name, (O, K) in shapes.items():
        if rank > min(O, K):
            raise ValueError(f"rank {rank} is larger than layer {name} ({O} x {K})")
    if method == "uniform":
        return dict.fromkeys(shapes, rank)
    gains = METHODS[method](shapes, spectra, energy, v_x, v_w, beta, seed)
    return greedy(gains, shapes, parameters(dict.fromkeys(shapes, rank), shapes), granule, r_min, r_max)


# ----------------------------------------------------------------------------------------------------------------- demo


def main():
    """Six layers with power-law spectra sigma_i^2 ~ i^-decay: what each method gives them, and what is won back."""
    layers = {  # name: (O, K), decay, relative residual, scale of the weights, v_x, v_w
        "attn.q   flat spectrum": ((640, 640), 0.3, 0.02, 1.0, 0.5, 0.4),
        "attn.out steep": ((640, 640), 1.5, 0.02, 1.0, 0.5, 0.4),
        "ff.in    large weights": ((5120, 640), 0.8, 0.02, 10.0, 0.5, 0.4),
        "ff.out   outlier inputs": ((640, 2560), 0.8, 0.10, 1.0, 3.0, 0.4),
        "conv     3x3": ((320, 2880), 0.8, 0.03, 1.0, 1.0, 0.8),
        "mod.kv   insensitive": ((640, 2048), 0.8, 0.001, 1.0, 0.2, 0.3),
    }
    shapes, spectra, energy, v_x, v_w = {}, {}, {}, {}, {}
    for name, (shape, decay, residual, scale, x, w) in layers.items():
        sigma2_r = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
        shapes[name], energy[name], v_x[name], v_w[name] = shape, scale**2, x, w
        spectra[name] = (scale**2 * residual * sigma2_r / sigma2_r.sum()).sqrt()
    unnormalised = dict.fromkeys(energy, 1.0)
    table = {m: allocate(shapes, spectra, energy, v_x, v_w, m) for m in ("uniform", *METHODS)}
    table["no norm"] = allocate(shapes, spectra, unnormalised, v_x, v_w, "spectrum")
    print(f"{'ranks, budget of uniform 16':26s}" + "".join(f"{m:>11s}" for m in table))
    for name in shapes:
        print(f"{name:26s}" + "".join(f"{ranks[name]:11d}" for ranks in table.values()))
    budget, spent = parameters(table["uniform"], shapes), {m: parameters(r, shapes) for m, r in table.items()}
    print(f"{'share of the budget':26s}" + "".join(f"{v / budget:11.1%}" for v in spent.values()))
    for m in ("spectrum", "qra"):
        gains = METHODS[m](shapes, spectra, energy, v_x, v_w, 0.5, 0)
        total = sum(map(sum, gains.values()))
        print(f"{f'won back ({m} gain)':26s}" + "".join(f"{objective(r, gains) / total:11.1%}" for r in table.values()))
    assert max(spent.values()) == budget, "no method may use more parameters than the uniform rank"


if __name__ == "__main__":
    main()
