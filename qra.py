"""QRA: Quantization-aware Rank Adaptation, a LoRA rank for each layer under one parameter budget.

[A] The rank of a layer follows the degree of variation in its activations and weights; the total number of LoRA
parameters does not change. [R] The criteria are activation dynamics and spectral cues. [O] The rule below.

One more rank of layer l costs O_l + K_l parameters (A is r x K, B is O x r; K = kh kw I for a convolution).

    budget      sum_l r_l (O_l + K_l) <= rank * sum_l (O_l + K_l), and it is never exceeded
    bounds      least <= r_l <= most, in steps of a granule; a layer of rank 0 has no branch
    gain        gain_l,i = g_l sigma_l,i^2 / E_l                     of the i-th rank, i = 1, 2, ..
                g_l      = (v_x v_w)^beta                            variation of activations and of weights
                sigma_l  = singular values of R W C^1/2, what the grid costs the picture (hgs_lora.grid_cost), and E_l = 1;
                           or of the residual (W - Q) L alone, H = L L^T = E[x x^T], and E_l = ||W_l L_l||_F^2, the
                           layer's output energy
    allocation  start at `least`, then take the granule of the largest gain per parameter that still fits, until none does

With gradients (R^T R = G, their second moments) the gains of all layers are in the picture's units. Without them sigma^2 / E is the
share of the layer's output that a rank wins back; without E a layer with large outputs would take all, which is worse than uniform.
Spectra descend, so greedy is optimal when all costs are equal, and otherwise loses at most the gain of the first granule that did
not fit. v_x is the coefficient of variation of the per-channel absolute maximum over channels and timesteps, v_w the same for
weights (hessian.py measures them).

Granule, least and largest rank scale with the average rank (`bounds`): a quarter of it, a quarter of it, and four times as much or
64, whichever is larger. The smaller the budget, the more it pays to leave layers without a branch: at an average rank of 2 only
steps of 1 from 0 leave room for a choice at all.

Ties (equal gain per parameter) go to the layer of lower rank, then to the name that sorts first; the order of the
dicts never matters, so permuting layers permutes ranks. Everything is float64 and runs on the CPU.

Dimension key: O, K a layer's matrix, r rank. Left out on purpose: ranks that change during training (AdaLoRA), exact
knapsack (greedy is within one granule of it), a budget in bytes (parameters and bytes are proportional in LoRA).
"""

import heapq
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

# ---------------------------------------------------------------- gains: siblings, the i-th value is the gain of rank i

# shapes {layer: (O, K)}; statistics {layer: {name: value}}, of which a rule gets those that its row of METHODS names:
#     spectrum   sigma_r, descending, a sequence or tensor; ranks beyond its end gain 0
#     energy     E
#     variation  (v_x, v_w)


def _variation_factor(name, statistics, beta):
    """g = (v_x v_w)^beta."""
    product = math.prod(map(float, statistics[name]["variation"]))
    if not (math.isfinite(product) and product >= 0):
        raise ValueError(f"layer {name}: the variation v_x v_w = {product} must be finite and not negative")
    return product**beta


def gains_variation(shapes, statistics, beta, seed):
    """g (O + K) / i: variation only [A]. Per parameter that is g / i, which fills ranks in proportion to g."""
    return {
        name: [_variation_factor(name, statistics, beta) * (O + K) / i for i in range(1, min(O, K) + 1)]
        for name, (O, K) in shapes.items()
    }


def gains_spectrum(shapes, statistics, beta, seed):
    """sigma_i^2 / E: the share of the layer's output energy that rank i wins back. A dead layer (E = 0) gains 0."""
    gains = {}
    for name in shapes:
        sigma_r = torch.as_tensor(statistics[name]["spectrum"]).detach().to("cpu", torch.float64)
        share_r, total = sigma_r.square().sort(descending=True).values, float(statistics[name]["energy"])
        if not (math.isfinite(total) and total >= 0 and bool(share_r.isfinite().all())):
            raise ValueError(f"layer {name}: spectrum and energy must be finite and the energy not negative")
        gains[name] = (share_r / total if total > 0 else torch.zeros_like(share_r)).tolist()
    return gains


def gains_qra(shapes, statistics, beta, seed):
    """g sigma_i^2 / E: variation times spectrum."""
    gains = gains_spectrum(shapes, statistics, beta, seed)
    return {name: [_variation_factor(name, statistics, beta) * gain for gain in gains[name]] for name in shapes}


def gains_shuffled(shapes, statistics, beta, seed):
    """Control: qra's curves dealt to the wrong layers. Same budget, same spread of ranks, no information."""
    gains, names = gains_qra(shapes, statistics, beta, seed), sorted(shapes)
    dealt = random.Random(seed).sample(names, len(names))
    return {name: gains[other] for name, other in zip(names, dealt, strict=True)}


class Rule(NamedTuple):
    gains: Callable | None  # (shapes, statistics, beta, seed) -> {layer: gains}; None: every layer gets the average rank
    reads: tuple[str, ...]  # names of the statistics that it needs; what measures them here is student.STATISTICS


METHODS = {
    "uniform": Rule(None, ()),
    "variation": Rule(gains_variation, ("variation",)),
    "spectrum": Rule(gains_spectrum, ("spectrum", "energy")),
    "qra": Rule(gains_qra, ("spectrum", "energy", "variation")),
    "shuffled": Rule(gains_shuffled, ("spectrum", "energy", "variation")),
}  # change this to try yours


# ----------------------------------------------------------------------------------------------------------- allocation


def parameters(ranks, shapes):
    """LoRA parameters: sum_l r_l (O_l + K_l)."""
    return sum(ranks[name] * (O + K) for name, (O, K) in shapes.items())


def objective(ranks, gains):
    """sum_l sum_{i <= r_l} gain_l,i: what an allocation wins back. Ranks beyond the end of a curve win nothing."""
    return sum(sum(gains[name][: ranks[name]]) for name in ranks)


def greedy(gains, shapes, budget, granule, least, most):
    """Ranks {name: r}: from `least` up in granules by the largest gain per parameter, as long as it fits the budget.

    A layer stops at `most` or min(O, K), rounded down to least + a multiple of the granule. A granule too large for what
    is left is skipped and smaller layers go on: costs are constant per layer, so what does not fit once never fits.
    """
    ranks = dict.fromkeys(shapes, least)
    left = budget - parameters(ranks, shapes)
    heap = []

    def offer(name):
        r = ranks[name]
        if r + granule <= min(most, *shapes[name]):
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


class Bounds(NamedTuple):
    granule: int
    least: int
    most: int


def bounds(rank, granule=0, least=-1, most=0):
    """Granule, least and largest rank around the average `rank`, where granule 0 stands for max(1, rank // 4), least -1 for
    rank // 4, and most 0 for max(64, 4 rank).

    ValueError, one sentence: a negative granule, bounds out of order."""
    granule, least, most = granule or max(1, rank // 4), rank // 4 if least == -1 else least, most or max(64, 4 * rank)
    if granule < 1 or not 0 <= least <= rank <= most:
        raise ValueError(f"need 0 <= least <= rank <= most, granule >= 1; got {least}, {rank}, {most} and {granule}")
    return Bounds(granule, least, most)


def allocate(shapes, statistics=None, method="qra", rank=16, granule=0, least=-1, most=0, beta=0.5, seed=0):
    """Ranks {name: r} for layers {name: (O, K)} with at most the parameters of a uniform `rank`.

    statistics {name: {statistic: value}} with at least what METHODS[method].reads names. granule, least, most: see `bounds`; ranks
    are least + a multiple of the granule, and `uniform` does not look at them.
    ValueError, one sentence: unknown method, rank larger than a layer, bounds out of order, statistics not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {list(METHODS)}")
    limits = bounds(rank, granule, least, most)
    for name, (O, K) in shapes.items():
        if rank > min(O, K):
            raise ValueError(f"rank {rank} is larger than layer {name} ({O} x {K})")
    uniform = dict.fromkeys(shapes, rank)
    if METHODS[method].gains is None:
        return uniform
    gains = METHODS[method].gains(shapes, statistics, beta, seed)
    return greedy(gains, shapes, parameters(uniform, shapes), *limits)


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
    shapes, statistics = {}, {}
    for name, (shape, decay, residual, scale, *variation) in layers.items():
        sigma2_r = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
        spectrum = (scale**2 * residual * sigma2_r / sigma2_r.sum()).sqrt()
        shapes[name], statistics[name] = shape, {"spectrum": spectrum, "energy": scale**2, "variation": variation}
    gains = gains_qra(shapes, statistics, 0.5, 0)
    for rank in (16, 2):
        table = {method: allocate(shapes, statistics, method, rank) for method in METHODS}
        budget, total = parameters(table["uniform"], shapes), sum(map(sum, gains.values()))
        print(f"{f'ranks, budget of uniform {rank}':28s}" + "".join(f"{method:>11s}" for method in table))
        for name in shapes:
            print(f"{name:28s}" + "".join(f"{ranks[name]:11d}" for ranks in table.values()))
        print(f"{'share of the budget':28s}" + "".join(f"{parameters(r, shapes) / budget:11.1%}" for r in table.values()))
        print(f"{'won back (qra gain)':28s}" + "".join(f"{objective(r, gains) / total:11.1%}" for r in table.values()) + "\n")
        assert all(parameters(ranks, shapes) <= budget for ranks in table.values()), "no method exceeds the budget"
        assert objective(table["qra"], gains) >= objective(table["uniform"], gains), "qra wins back more than uniform"


if __name__ == "__main__":
    main()
