"""QRA: Quantization-aware Rank Adaptation, a LoRA rank for each layer under one budget.

[A] The rank of a layer follows the degree of variation in its activations and weights; the total number of LoRA
parameters does not change. [R] The criteria are activation dynamics and spectral cues. [O] The rule below.

    choice      r_l = least, least + granule, .. up to `most` or min(O, K), where 0 is no branch; or None, which leaves the layer in
                16 bits, where the price says what that costs
    price       price_l(r) of a choice: `parameters`, r (O_l + K_l) and no 16 bits [A]; or `bits`, what is stored; or one's own,
                such as time (kernels.branch_time), which may jump (K = kh kw I for a convolution)
    budget      sum_l price_l(r_l) <= sum_l price_l(rank), and it is never exceeded
    gain        gain_l,i = g_l sigma_l,i^2 / E_l                     of the i-th rank, i = 1, 2, ..
                g_l      = (v_x v_w)^beta                            variation of activations and of weights
                sigma_l  = singular values of R W C^1/2, what the grid costs the picture (hgs_lora.grid_cost), and E_l = 1;
                           or of the residual (W - Q) L alone, H = L L^T = E[x x^T], and E_l = ||W_l L_l||_F^2, the
                           layer's output energy
                16 bits win back all that the grid costs, as one rank with all of the spectrum would: sigma = ||R W C^1/2||_F
    allocation  the most gain that the budget buys: `greedy`, then `exchange`

With gradients (R^T R = G, their second moments) the gains of all layers are in the picture's units. Without them sigma^2 / E is the
share of the layer's output that a rank wins back; without E a layer with large outputs would take all, which is worse than uniform.
v_x is the coefficient of variation of the per-channel absolute maximum over channels and timesteps, v_w the same for
weights (hessian.py measures them).

Spectra descend, so `greedy` takes ranks in the order of their gain per price; where 16 bits win more per price than a further
rank, a layer takes them and gives its ranks back. What does not fit is skipped, which is why greedy may miss the optimum, and
`exchange` finds it. With rate = the gain per price of the first step that did not fit, each choice has a loss, and by Lagrange

    loss_l,r  = max_s (gain_l,s - rate price_l,s) - (gain_l,r - rate price_l,r)  >= 0
    objective = U - sum_l loss_l,r_l - rate (budget - spent),      U = sum_l max_s (gain_l,s - rate price_l,s) + rate budget

so that an allocation which beats greedy's has losses below gap = U - greedy's objective. Few choices of few layers do; their
combinations are searched, without those that another one beats in both price and gain. What is found is the optimum, which does not
fall when the budget grows (on a network of hundreds of layers it may stay below it, by less than one in ten thousand in trials).

Ties (equal gain per price) go to the layer of lower rank, then to the name that sorts first; the order of the
dicts never matters, so permuting layers permutes ranks. Everything is float64 and runs on the CPU.

Dimension key: O, K a layer's matrix, r rank. Left out on purpose: ranks that change during training (AdaLoRA).
"""

import heapq
import itertools
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
# and, where layers may stay in 16 bits,
#     whole      the root of the sum of all sigma_r^2, those beyond the spectrum's end too


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


def gains_of_16_bits(method, statistics, shapes, beta, seed):
    """{layer: gain}: that of a first rank with sigma = whole. ValueError for a method that does not weigh spectra."""
    if "spectrum" not in METHODS[method].reads:
        weigh = ", ".join(name for name, rule in METHODS.items() if "spectrum" in rule.reads)
        raise ValueError(f"{method} does not weigh what the grid costs, so it cannot leave layers in 16 bits: choose {weigh}")
    statistics = {name: known | {"spectrum": [known["whole"]]} for name, known in statistics.items()}
    return {name: gain for name, (gain, *_) in METHODS[method].gains(shapes, statistics, beta, seed).items()}


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


# ------------------------------------------------------------------ prices: siblings, of a layer (O, K) at rank r, or None: 16 bits


def parameters(shape, r):
    """r (O + K), those of A (r, K) and B (O, r) [A]. 16 bits are not on offer: their price is inf."""
    return math.inf if r is None else r * sum(shape)


def bits(shape, r, lora_bits=16, group=64):
    """What is stored beyond the layer in 4 bits without a branch: A and B, in 8 bits with two float32 a rank; or 16 bits a weight
    in place of codes, multipliers and a byte of scale for each row (padding of channels to whole groups is not counted)."""
    O, K = shape
    return 16 * O * K - (4 + 4 / group) * O * K - 8 * O if r is None else r * (lora_bits * (O + K) + (64 if lora_bits == 8 else 0))


def of_each(price, shapes) -> dict[str, Callable]:
    """{layer: price}, as it is or of one price for all."""
    return price if isinstance(price, dict) else dict.fromkeys(shapes, price)


def total(ranks, shapes, price=parameters):
    """What an allocation costs."""
    prices = of_each(price, shapes)
    return sum(prices[name](shapes[name], r) for name, r in ranks.items())


# ----------------------------------------------------------------------------------------------------------- allocation

CLOSE, STATES = 1000, 1 << 14  # of choices and of states that `exchange` searches: a second for SDXL


class Choice(NamedTuple):
    rank: int | None  # None: 16 bits
    price: float
    gain: float  # of all its ranks
    step: float = 0.0  # beyond the choice before it


def choices(gains, whole, shape, price, granule, least, most) -> list[Choice]:
    """Of one layer: its ranks, ascending, then 16 bits if they are on offer. Ranks beyond the end of a curve win nothing more. Of
    ranks at one price there is the largest."""
    ranks = [*range(least, min(most, *shape) + 1, granule)]
    ranks = [r for r, more in zip(ranks, [*ranks[1:], None], strict=True) if more is None or price(shape, more) > price(shape, r)]
    made = [Choice(r, price(shape, r), sum(gains[:r]), sum(gains[before:r])) for before, r in itertools.pairwise([0, *ranks])]
    return [*made, Choice(None, price(shape, None), whole)] if math.isfinite(price(shape, None)) else made


def greedy(options: dict[str, list[Choice]], budget: float, at: dict[str, int]) -> tuple[dict[str, int], float]:
    """From the choices `at` (indices) up by the largest gain per price, as long as it fits -> (indices, rate of the step that did
    not fit first, 0 if all did).

    A step is the next granule of ranks, or to 16 bits for what they cost beyond the ranks that the layer gives back. A step that
    does not fit once never fits."""
    at, left = dict(at), budget - sum(options[name][i].price for name, i in at.items())
    heap, rate = [], 0.0

    def offer(name, room):
        here, steps = options[name][at[name]], []
        for j, there in enumerate(options[name][at[name] + 1 :], at[name] + 1):
            cost, gain = there.price - here.price, there.gain - here.gain if there.rank is None else there.step
            if cost <= room and (gain > 0 if there.rank is None else j == at[name] + 1):
                steps.append((-gain / cost if cost > 0 else -math.inf, at[name], name, j, cost))  # ties: rank, then name
        if steps:
            heapq.heappush(heap, min(steps))

    for name in options:
        offer(name, math.inf)
    while heap:
        negative, _, name, j, cost = heapq.heappop(heap)
        if cost <= left:
            at[name], left = j, left - cost
            offer(name, math.inf)
        else:
            rate = rate or -negative
            offer(name, left)
    return at, rate


def exchange(options: dict[str, list[Choice]], budget: float, at: dict[str, int], rate: float) -> dict[str, int]:
    """The best choices (indices) that the budget buys, found from greedy's by the equations of the module docstring.

    A state S is a price and a gain of the layers so far. Of more than CLOSE choices those of least loss are searched, of more than
    STATES states as many, evenly spaced. That happens where layers that stay in 16 bits are a large part of the budget: for 740
    layers of SDXL's shapes with random spectra it ends 0.002% below U, greedy 0.17%."""
    most = {name: max(choice.gain - rate * choice.price for choice in options[name]) for name in sorted(options)}
    found = sum(options[name][i].gain for name, i in at.items())
    gap = sum(most.values()) + rate * budget - found
    if gap <= 1e-12 * found:
        return at
    loss = {
        name: [max(0.0, most[name] - (c.gain - rate * c.price)) for c in options[name]] for name in most
    }  # 0 of each layer's best
    losses = sorted(itertools.chain.from_iterable(loss.values()))
    gap_or_less = min(gap, losses[min(CLOSE, len(losses)) - 1])
    close = {name: [j for j, its in enumerate(loss[name]) if its <= gap_or_less] for name in most}
    cheapest = {name: min(options[name][j].price for j in close[name]) for name in most}
    room = budget - sum(cheapest.values())  # prices below are those beyond the cheapest
    price_S = gain_S = torch.zeros(1, dtype=torch.float64)
    bound, trail = 0.0, []
    for name, js in close.items():
        price_j, gain_j = torch.tensor([options[name][j][1:3] for j in js], dtype=torch.float64).mT
        price_j = price_j - cheapest[name]
        bound += most[name] + rate * cheapest[name]
        price_S, gain_S = (price_S[:, None] + price_j).flatten(), (gain_S[:, None] + gain_j).flatten()
        order = gain_S.argsort(descending=True, stable=True)
        order = order[price_S[order].argsort(stable=True)]  # by price, and the largest gain first
        price_S, gain_S = price_S[order], gain_S[order]
        beaten = gain_S <= torch.cat([gain_S.new_tensor([-math.inf]), gain_S.cummax(0).values[:-1]])
        alive = ~beaten & (price_S <= room) & (bound - gain_S + rate * price_S < gap)
        alive = alive.nonzero()[:, 0]
        alive = alive[:: len(alive) // STATES + 1]
        if not len(alive):
            return at
        price_S, gain_S = price_S[alive], gain_S[alive]
        trail.append((name, js, order[alive]))
    if gain_S.max() <= found * (1 + 1e-12):
        return at
    better, s = {}, int(gain_S.argmax())
    for name, js, came_from in reversed(trail):
        s, j = divmod(int(came_from[s]), len(js))
        better[name] = js[j]
    return better


def objective(ranks, gains, wholes=None):
    """sum_l sum_{i <= r_l} gain_l,i: what an allocation wins back, and all of wholes[l] where a layer stays in 16 bits. Ranks
    beyond the end of a curve win nothing."""
    return sum(wholes[name] if r is None else sum(gains[name][:r]) for name, r in ranks.items())


class Bounds(NamedTuple):
    granule: int
    least: int
    most: int


def bounds(rank, granule=1, least=0, most=0):
    """Granule, least and largest rank around the average `rank`, where most 0 stands for max(64, 4 rank): that many singular values
    of each layer are computed, and more cost minutes on a large network. rank may be a fraction.

    ValueError, one sentence: bounds out of order."""
    most = most or max(64, int(4 * rank))
    if granule < 1 or not 0 <= least <= rank <= most:
        raise ValueError(f"need 0 <= least <= rank <= most, granule >= 1; got {least}, {rank}, {most} and {granule}")
    return Bounds(granule, least, most)


def allocate(
    shapes, statistics=None, method="qra", rank=16, granule=1, least=0, most=0, beta=0.5, seed=0, price=parameters
) -> dict[str, int | None]:
    """Ranks {name: r} for layers {name: (O, K)}, at most at the price of a uniform `rank`; None for a layer that stays in 16 bits.
    `rank` may be a fraction, as a budget; the method `uniform` rounds it down.

    statistics {name: {statistic: value}} with at least what METHODS[method].reads names, and `whole` where the price of 16 bits is
    finite. granule, least, most: see `bounds`; ranks are least + a multiple of the granule, and `uniform` does not look at them.
    price(shape, r), or {name: price}: `parameters`, `bits` with its arguments bound, or one's own, such as a rank's milliseconds,
    which may jump.
    ValueError, one sentence: unknown method, one that cannot weigh 16 bits, rank larger than a layer, bounds out of order,
    statistics not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {list(METHODS)}")
    limits = bounds(rank, granule, least, most)
    for name, (O, K) in shapes.items():
        if rank > min(O, K):
            raise ValueError(f"rank {rank} is larger than layer {name} ({O} x {K})")
    wholes = dict.fromkeys(shapes)
    prices = of_each(price, shapes)
    if any(math.isfinite(prices[name](shape, None)) for name, shape in shapes.items()):
        wholes = gains_of_16_bits(method, statistics, shapes, beta, seed)
    if METHODS[method].gains is None:
        return dict.fromkeys(shapes, int(rank))
    gains = METHODS[method].gains(shapes, statistics, beta, seed)
    options = {name: choices(gains[name], wholes[name], shape, prices[name], *limits) for name, shape in shapes.items()}
    budget = total(dict.fromkeys(shapes, rank), shapes, price)
    at, rate = greedy(options, budget, dict.fromkeys(shapes, 0))
    at, _ = greedy(options, budget, exchange(options, budget, at, rate))  # what is left buys ranks that win nothing
    return {name: options[name][at[name]].rank for name in shapes}


# ----------------------------------------------------------------------------------------------------------------- demo


def main():
    """Seven layers with power-law spectra sigma_i^2 ~ i^-decay: what each method gives them, and what is won back. In the last
    column the budget is of stored bits, and layers may stay in 16 bits."""
    layers = {  # name: (O, K), decay, relative residual, scale of the weights, v_x, v_w
        "attn.q   flat spectrum": ((640, 640), 0.3, 0.02, 1.0, 0.5, 0.4),
        "attn.out steep": ((640, 640), 1.5, 0.02, 1.0, 0.5, 0.4),
        "ff.in    large weights": ((5120, 640), 0.8, 0.02, 10.0, 0.5, 0.4),
        "ff.out   outlier inputs": ((640, 2560), 0.8, 0.10, 1.0, 3.0, 0.4),
        "conv     3x3": ((320, 2880), 0.8, 0.03, 1.0, 1.0, 0.8),
        "mod.kv   insensitive": ((640, 2048), 0.8, 0.001, 1.0, 0.2, 0.3),
        "conv_out small": ((16, 640), 0.3, 0.10, 1.0, 2.0, 0.5),
    }
    shapes, statistics = {}, {}
    for name, (shape, decay, residual, scale, *variation) in layers.items():
        sigma2_r = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
        spectrum = (scale**2 * residual * sigma2_r / sigma2_r.sum()).sqrt()
        statistics[name] = {"spectrum": spectrum, "energy": scale**2, "variation": variation, "whole": float(spectrum.norm())}
        shapes[name] = shape
    gains, wholes = gains_qra(shapes, statistics, 0.5, 0), gains_of_16_bits("qra", statistics, shapes, 0.5, 0)
    for rank in (16, 2):
        table = {method: allocate(shapes, statistics, method, rank) for method in METHODS}
        table["or 16 bits"] = allocate(shapes, statistics, "qra", rank, price=bits)
        won = {name: objective(ranks, gains, wholes) for name, ranks in table.items()}
        spent = {name: total(r, shapes, bits) / total(table["uniform"], shapes, bits) for name, r in table.items()}
        print(f"{f'ranks, budget of uniform {rank}':28s}" + "".join(f"{method:>11s}" for method in table))
        for name in shapes:
            print(f"{name:28s}" + "".join(f"{'16 bits' if ranks[name] is None else ranks[name]:>11}" for ranks in table.values()))
        print(f"{'share of the budget':28s}" + "".join(f"{share:11.1%}" for share in spent.values()))
        print(f"{'won back (qra gain)':28s}" + "".join(f"{gain / sum(wholes.values()):11.1%}" for gain in won.values()) + "\n")
        assert max(spent.values()) <= 1, "no method exceeds the budget"
        assert won["or 16 bits"] >= won["qra"] == max(won[method] for method in METHODS), "qra wins back most, 16 bits more"


if __name__ == "__main__":
    main()
