"""QRA: the budget holds, the order of layers does not matter, greedy is what brute force finds."""

import functools
import itertools
import math
import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
import qra

METHODS = tuple(qra.METHODS)


def make_layers(shapes, seed, kind="normal"):
    """Statistics for layers of the given shapes; kind: normal, equal (nothing but ties), zero, steep or denormal."""
    generator = torch.Generator().manual_seed(seed)
    stats = {}
    for name, (O, K) in shapes.items():
        sigma_r = torch.rand(min(O, K), generator=generator, dtype=torch.float64).sort(descending=True).values
        sigma_r *= {"normal": 1, "equal": 0, "zero": 0, "steep": 1, "denormal": 1e-310}[kind]
        sigma_r += 1.0 if kind == "equal" else 0.0
        sigma_r *= torch.arange(1, min(O, K) + 1).double() ** (-4 if kind == "steep" else 0)
        v = torch.ones(2) if kind == "equal" else 3 * torch.rand(2, generator=generator)
        energy = float(sigma_r.square().sum()) * (1 if kind == "equal" else 1.5)
        whole = float(sigma_r.norm()) * (1 + float(torch.rand(1, generator=generator)))
        stats[name] = {"spectrum": sigma_r, "energy": energy, "variation": v.tolist(), "whole": whole}
    return stats


def cost(ranks, shapes):
    """Counted from the shapes of A (r, K) and B (O, r): a wrong count in qra.py must not agree with itself."""
    return sum(torch.empty(r, shapes[n][1]).numel() + torch.empty(shapes[n][0], r).numel() for n, r in ranks.items())


def stored_bits(ranks, shapes):
    """Counted from tensors, as layers.PackedLayer has them, beyond a packed layer without a branch; groups of 64."""
    size = 0
    for name, (O, K) in shapes.items():
        packed = torch.empty(O, K // 2, dtype=torch.uint8).nbytes + torch.empty(O * K // 64 // 2, dtype=torch.uint8).nbytes + O
        r = ranks[name]
        if r is None:
            size += torch.empty(O, K, dtype=torch.bfloat16).nbytes - packed
        else:
            size += torch.empty(r, K, dtype=torch.bfloat16).nbytes + torch.empty(O, r, dtype=torch.bfloat16).nbytes
    return 8 * size


def jumps(shape, r):
    """A price with jumps, as time has them: a branch costs something as such, and ranks come in fours."""
    return 6 * shape[1] if r is None else (r > 0) * 3 * shape[0] + -(-r // 4) * sum(shape) / 2


PRICES = {
    "parameters": qra.parameters,
    "bits": qra.bits,
    "8 bits": functools.partial(qra.bits, lora_bits=8, group=32),
    "jumps": jumps,
}


dimension = st.integers(16, 96)
twins = st.lists(st.tuples(st.sampled_from([16, 64]), st.just(32)), min_size=2, max_size=6)  # costs that tie
shape_lists = st.lists(st.tuples(dimension, dimension), min_size=1, max_size=6)
kinds = st.sampled_from(["normal", "equal", "zero", "steep", "denormal"])


def named(shape_list):
    return {f"layer{i}": shape for i, shape in enumerate(shape_list)}


@given(
    shape_lists, kinds, st.integers(0, 99), st.sampled_from(METHODS), st.one_of(st.integers(0, 16), st.floats(0, 16)),
    st.integers(1, 5), st.data(),
)  # fmt: skip
@example([(16, 96), (96, 16), (96, 96)], "normal", 0, "uniform", 2.7, 4, None)
@example([(16, 96), (96, 16), (96, 96)], "normal", 0, "qra", 8, 4, None)
def test_rank_budget_is_never_exceeded_and_bounds_hold(shape_list, kind, seed, method, rank, granule, data):
    """Catches: costs that count O only or K only (cheap-looking layers overspend); a granule taken without asking; a fraction of a
    rank that is rounded up."""
    shapes, whole = named(shape_list), int(rank)
    least, most = (2, 64) if data is None else (data.draw(st.integers(0, whole)), data.draw(st.integers(whole + 1, 70)))
    bounds = {"rank": rank, "granule": granule, "least": least, "most": most}
    ranks = qra.allocate(shapes, make_layers(shapes, seed, kind), method, seed=seed, **bounds)
    assert ranks.keys() == shapes.keys()
    assert cost(ranks, shapes) <= rank * cost(dict.fromkeys(shapes, 1), shapes)
    assert all(least <= r <= min(most, *shapes[name]) for name, r in ranks.items())
    assert method == "uniform" or all((r - least) % granule == 0 for r in ranks.values())


@given(shape_lists, kinds, st.integers(0, 99), st.sampled_from(METHODS))
@example([(16, 96), (96, 16)], "normal", 0, "qra")
def test_what_is_left_of_the_budget_buys_no_further_granule(shape_list, kind, seed, method):
    """Catches: a budget that counts O only while costs count O + K (it stays unspent); stopping at the first misfit."""
    shapes = named(shape_list)
    ranks = qra.allocate(shapes, make_layers(shapes, seed, kind), method, rank=8, granule=4, least=4, most=64)
    left = cost(dict.fromkeys(shapes, 8), shapes) - cost(ranks, shapes)
    growing = [4 * (O + K) for n, (O, K) in shapes.items() if ranks[n] + 4 <= min(64, O, K)]
    assert method == "uniform" or not growing or left < min(growing)


@given(st.one_of(shape_lists, twins), kinds, st.integers(0, 99), st.sampled_from(METHODS), st.randoms(use_true_random=False))
def test_order_of_the_layers_does_not_matter_even_among_ties(shape_list, kind, seed, method, random):
    """Catches: ties broken by insertion order; a shuffle that permutes positions of the dict."""
    shapes = named(shape_list)
    stats = make_layers(shapes, seed, kind)
    order = random.sample(list(shapes), len(shapes))
    moved = {n: stats[n] for n in order}
    args = {"method": method, "rank": 8, "granule": 5, "least": 4, "seed": seed}  # 4 ranks a layer are left: some get none
    assert qra.allocate({n: shapes[n] for n in order}, moved, **args) == qra.allocate(shapes, stats, **args)


@given(
    shape_lists,
    st.integers(0, 99),
    st.sampled_from(["uniform", "variation", "spectrum", "qra"]),
    st.randoms(use_true_random=False),
)
def test_allocation_is_equivariant_under_renaming_of_layers(shape_list, seed, method, random):
    """Catches: names or positions that leak into gains (with gains that differ, only statistics may decide)."""
    shapes = named(shape_list)
    stats = make_layers(shapes, seed)
    new = dict(zip(shapes, random.sample(list(shapes), len(shapes)), strict=True))
    renamed = {new[n]: stats[n] for n in shapes}
    ranks = qra.allocate(shapes, stats, method, rank=8)
    again = qra.allocate({new[n]: s for n, s in shapes.items()}, renamed, method, rank=8)
    assert again == {new[n]: r for n, r in ranks.items()}


def test_each_layer_may_have_its_own_price_and_ranks_at_one_price_come_together():
    """Catches: the price of another layer, the fewer of two ranks that cost the same, a gain that is counted twice."""
    shapes = {"slow": (40, 60), "fast": (40, 60)}
    stats = {name: {"spectrum": [1.0] * 40, "energy": 1.0, "variation": (1.0, 1.0)} for name in shapes}
    price = {name: functools.partial(kernels.branch_time, rows=rows) for name, rows in (("slow", 1000), ("fast", 100))}
    assert qra.allocate(shapes, stats, rank=16, price=price) == {"slow": 0, "fast": 40}
    less = qra.allocate(shapes, stats, rank=15, most=15, price=price)
    assert less == {"slow": 15, "fast": 15} and qra.total(less, shapes, price) == 1100 * 100 * 32
    options = qra.choices([4.0, 3.0, 2.0, 1.0], None, (4, 4), lambda shape, r: math.inf if r is None else (r + 1) // 2, 1, 0, 4)
    assert [(c.rank, c.price, c.gain, c.step) for c in options] == [(0, 0, 0, 0), (2, 1, 7, 7), (4, 2, 10, 3)]


small = st.integers(6, 20)
small_lists = st.lists(st.tuples(small, small), min_size=1, max_size=4)
weighing = st.sampled_from(["spectrum", "qra", "shuffled"])
priced = st.sampled_from(list(PRICES))


def won(ranks, shapes, stats, method, seed=0):
    """What an allocation wins back, from the gains of ranks and of 16 bits."""
    gains = qra.METHODS[method].gains(shapes, stats, 0.5, seed)
    wholes = qra.gains_of_16_bits(method, stats, shapes, 0.5, seed) if method != "variation" else {}
    return sum(wholes[name] if r is None else sum(gains[name][:r]) for name, r in ranks.items())


def brute_force(shapes, stats, method, budget, limits, price):
    """The most that any allocation in the budget wins back."""
    granule, least, most = limits
    choices = [list(range(least, min(most, *shape) + 1, granule)) for shape in shapes.values()]
    choices = [[*c, None] if math.isfinite(price(s, None)) else c for c, s in zip(choices, shapes.values(), strict=True)]
    allocations = (dict(zip(shapes, ranks, strict=True)) for ranks in itertools.product(*choices))
    return max(won(ranks, shapes, stats, method) for ranks in allocations if qra.total(ranks, shapes, price) <= budget)


@given(small_lists, st.integers(0, 999), kinds, st.sampled_from(["variation", "spectrum", "qra", "shuffled"]), st.data())
@example([(6, 20), (20, 9), (13, 7), (8, 8)], 0, "normal", "qra", None)
def test_the_allocation_equals_brute_force(shape_list, seed, kind, method, data):
    """Catches: gain not divided by price, a gain read at the wrong rank, a layer in 16 bits that keeps paying for its ranks,
    no exchange, one that leaves out choices which could win."""
    draw = data.draw if data else lambda strategy: "jumps" if strategy is priced else (2, 2, 10)
    price = PRICES[draw(priced)] if method != "variation" else qra.parameters
    granule, least, most = draw(st.sampled_from([(2, 2, 10), (1, 0, 6), (3, 0, 9), (1, 0, 20)][: 4 if len(shape_list) < 4 else 3]))
    shapes, rank = named(shape_list), 3
    stats = make_layers(shapes, seed, kind)
    limits = dict(rank=rank, granule=granule, least=least, most=most)
    ranks = qra.allocate(shapes, stats, method, price=price, **limits)
    budget = qra.total(dict.fromkeys(shapes, rank), shapes, price)
    best = brute_force(shapes, stats, method, budget, (granule, least, most), price)
    assert qra.total(ranks, shapes, price) <= budget
    assert won(ranks, shapes, stats, method) == pytest.approx(best, rel=1e-9)


def test_greedy_alone_misses_what_the_exchange_finds():
    """Catches: an exchange that is never reached, or that does not give back the rank that greedy took first."""
    shapes, gains = {"a": (6, 6), "b": (10, 10)}, {"a": [1.3, 0.0], "b": [2.0, 0.0]}  # per parameter a's rank wins more
    options = {name: qra.choices(gains[name], None, shapes[name], qra.parameters, 1, 0, 2) for name in shapes}
    at, rate = qra.greedy(options, 20, {"a": 0, "b": 0})
    assert at == {"a": 1, "b": 0} and rate == 0.1
    assert qra.exchange(options, 20, at, rate) == {"a": 0, "b": 1}
    assert qra.exchange(options, 32, {"a": 1, "b": 1}, 0.0) == {"a": 1, "b": 1}


def test_greedy_gives_back_the_ranks_of_a_layer_that_goes_to_16_bits():
    """Catches: ranks that are paid for beside 16 bits, and 16 bits before a rank that wins more per price."""
    curve = [qra.Choice(r, 4.0 * r, gain, step) for r, gain, step in ((0, 0.0, 0.0), (1, 8.0, 8.0), (2, 8.4, 0.4))]
    options = {"a": [*curve, qra.Choice(None, 10.0, 12.0)], "b": [*curve[:2]]}
    assert qra.greedy(options, 4.0, {"a": 0, "b": 0})[0] == {"a": 1, "b": 0}
    assert qra.greedy(options, 14.0, {"a": 0, "b": 0}) == ({"a": 3, "b": 1}, 0.0)
    assert qra.greedy(options, 13.0, {"a": 0, "b": 0}) == ({"a": 2, "b": 1}, 4 / 6), "what does not fit is skipped"


@given(shape_lists, st.integers(0, 99), kinds, weighing, priced)
@example([(37, 80), (96, 16), (96, 96)], 3, "normal", "qra", "bits")
def test_more_budget_never_wins_less(shape_list, seed, kind, method, price):
    """Catches: a choice that greedy takes for it fits, and that keeps out better ones."""
    shapes = named(shape_list)
    stats = make_layers(shapes, seed, kind)
    gains = [
        won(qra.allocate(shapes, stats, method, rank, price=PRICES[price]), shapes, stats, method) for rank in (1, 2, 3, 5, 8, 13)
    ]
    assert all(more >= less * (1 - 1e-9) for less, more in itertools.pairwise(gains))


@given(shape_lists, kinds, st.integers(0, 99), weighing, st.integers(1, 16))
@example([(64, 640), (640, 64), (96, 96)], "normal", 0, "qra", 8)
def test_stored_bits_stay_within_those_of_uniform_ranks_and_16_bits_never_win_less(shape_list, kind, seed, method, rank):
    """Catches: 16 bits that are counted as free, or without what the packed form takes."""
    shapes = named([(64 * (O // 16), 64 * (K // 16)) for O, K in shape_list])
    stats = make_layers(shapes, seed, kind)
    kept = qra.allocate(shapes, stats, method, rank, price=qra.bits)
    assert stored_bits(kept, shapes) <= stored_bits(dict.fromkeys(shapes, rank), shapes)
    assert all(qra.total({n: r}, shapes, qra.bits) == stored_bits({n: r}, {n: shapes[n]}) for n, r in kept.items())
    strict = qra.allocate(shapes, stats, method, rank)
    assert None not in strict.values()
    assert won(kept, shapes, stats, method) >= won(strict, shapes, stats, method) * (1 - 1e-9)


@given(shape_lists, st.integers(0, 99), priced, st.randoms(use_true_random=False))
def test_allocation_with_any_price_is_equivariant(shape_list, seed, price, random):
    """Catches: an exchange that searches layers in the order of the dict or of their names, and so finds another allocation."""
    shapes = named(shape_list)
    stats = make_layers(shapes, seed)
    new = dict(zip(shapes, random.sample(list(shapes), len(shapes)), strict=True))
    ranks = qra.allocate(shapes, stats, "qra", 4, price=PRICES[price])
    again = qra.allocate({new[n]: s for n, s in shapes.items()}, {new[n]: stats[n] for n in shapes}, "qra", 4, price=PRICES[price])
    assert again == {new[n]: r for n, r in ranks.items()}


@pytest.mark.parametrize("price", [qra.parameters, qra.bits])
def test_more_layers_than_choices_are_searched(price):
    """Catches: layers of which no choice is left, as the loss of their best one is the rounding of a difference."""
    shapes = {f"layer{i}": [(320, 320), (640, 640), (1280, 320), (640, 2048), (5120, 640)][i % 5] for i in range(qra.CLOSE + 300)}
    stats = {}
    for i, name in enumerate(shapes):
        sigma_r = 3 ** (i * 0.618 % 2) * torch.arange(1, 65) ** -(0.2 + i * 0.414 % 1)
        stats[name] = {"spectrum": sigma_r, "energy": 1.0, "whole": 2 * float(sigma_r.norm())}
    ranks = qra.allocate(shapes, stats, "spectrum", rank=8, price=price)
    assert 0.999 < qra.total(ranks, shapes, price) / qra.total(dict.fromkeys(shapes, 8), shapes, price) <= 1


def test_a_layer_goes_to_16_bits_where_its_rank_would_cost_more():
    """Catches: 16 bits that win what the computed part of the spectrum does, and a dead layer that is kept in 16 bits."""
    shapes = named([(16, 64), (64, 64), (64, 64)])
    stats = make_layers(shapes, 0, "steep")
    flat = torch.ones(16)
    stats["layer0"] |= {"spectrum": flat, "energy": 1.0, "whole": 4.0, "variation": (1.0, 1.0)}  # 16 ranks take 20,480 bits
    stats["layer2"] |= {"spectrum": torch.zeros(64), "energy": 0.0, "whole": 0.0}
    ranks = qra.allocate(shapes, stats, rank=4, price=qra.bits)  # 16 bits of layer0 take 12,096
    assert ranks["layer0"] is None and ranks["layer1"] > 0 and ranks["layer2"] is not None
    stats["layer0"] |= {"whole": 400.0, "spectrum": torch.zeros(16)}  # all of it lies beyond what was computed
    assert qra.allocate(shapes, stats, rank=4, price=qra.bits)["layer0"] is None
    assert qra.gains_of_16_bits("spectrum", {"a": {"whole": 3.0, "energy": 2.0}}, {"a": (2, 2)}, 0.5, 0) == {"a": 4.5}


@pytest.mark.parametrize("price", [qra.parameters, qra.bits])
@pytest.mark.parametrize("tie", [False, True])
def test_hundreds_of_layers_are_allocated_in_seconds_even_where_all_gains_tie(price, tie):
    """Catches: a search whose states multiply with every layer, and one that loses what greedy has."""
    shapes = {f"layer{i}": [(320, 320), (640, 640), (1280, 320), (640, 2048), (5120, 640)][i % 5] for i in range(200)}
    stats = {}
    for i, name in enumerate(shapes):
        sigma_r = torch.ones(64) if tie else 3 ** (i * 0.618 % 2) * torch.arange(1, 65) ** -(0.2 + i * 0.414 % 1)
        stats[name] = {"spectrum": sigma_r, "energy": 1.0, "variation": (1.0, 1.0), "whole": 2 * float(sigma_r.norm())}
    began = time.process_time()
    ranks = qra.allocate(shapes, stats, rank=8, price=price)
    assert time.process_time() - began < 30
    budget = qra.total(dict.fromkeys(shapes, 8), shapes, price)
    assert 0.999 * budget < qra.total(ranks, shapes, price) <= budget
    gains, wholes = qra.gains_qra(shapes, stats, 0.5, 0), qra.gains_of_16_bits("qra", stats, shapes, 0.5, 0)
    options = {name: qra.choices(gains[name], wholes[name], shape, price, 1, 0, 64) for name, shape in shapes.items()}
    at, _ = qra.greedy(options, budget, dict.fromkeys(shapes, 0))
    assert won(ranks, shapes, stats, "qra") >= sum(options[name][i].gain for name, i in at.items()) * (1 - 1e-12)


@given(shape_lists, st.integers(0, 99), st.integers(-20, 20), st.sampled_from(["spectrum", "qra", "shuffled"]))
@example([(32, 32), (32, 32), (32, 32)], 0, 8, "spectrum")
def test_scaling_a_layer_leaves_the_ranks_as_they_are(shape_list, seed, exponent, method):
    """Catches: spectra that are not normalised by the layer's output energy (worse than uniform in trials)."""
    shapes = named(shape_list)
    stats = make_layers(shapes, seed)
    ranks = qra.allocate(shapes, stats, method, rank=8)
    stats["layer0"]["spectrum"] = stats["layer0"]["spectrum"] * 2.0**exponent  # as if W were larger
    stats["layer0"]["energy"] *= 4.0**exponent
    assert qra.allocate(shapes, stats, method, rank=8) == ranks


@pytest.mark.parametrize("method", ["variation", "qra"])
@pytest.mark.parametrize("which", [0, 1])  # v_x, v_w
def test_more_variation_never_takes_rank_away(method, which):
    """Catches: g inverted, or one of v_x, v_w left out."""
    shapes = named([(64, 64)] * 4)
    stats = make_layers(shapes, 3)
    ranks = []
    for factor in (0.01, 0.3, 1.0, 3.0, 100.0):
        changed = list(stats["layer1"]["variation"])
        changed[which] *= factor
        ranks.append(qra.allocate(shapes, stats | {"layer1": stats["layer1"] | {"variation": changed}}, method)["layer1"])
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_qra_gain_is_the_product_of_variation_and_normalised_spectrum(beta):
    """Catches: beta not used, sigma in place of sigma^2, energy in place of its square."""
    shapes, sigma_r = {"a": (3, 5)}, torch.tensor([3.0, 2.0, 1.0])
    gains = qra.gains_qra(shapes, {"a": {"spectrum": sigma_r, "energy": 28.0, "variation": (2.0, 8.0)}}, beta, 0)["a"]
    assert gains == pytest.approx([16**beta * s * s / 28 for s in (3, 2, 1)])


def test_variation_gain_of_rank_i_is_g_over_i_for_every_rank_of_the_layer():
    """Catches: a curve that begins at rank 2, and one that ends before or after min(O, K)."""
    gains = qra.gains_variation({"a": (3, 5)}, {"a": {"variation": (2.0, 8.0)}}, 0.5, 0)["a"]
    assert gains == pytest.approx([4 * 8 / i for i in (1, 2, 3)])


def test_a_spectrum_of_16_bits_is_squared_in_float64():
    """Catches: 1000 squared in float16, which is inf and would be refused, and squares that are rounded to 11 bits."""
    sigma_r = torch.tensor([1000.0, 33.0], dtype=torch.float16)
    gains = qra.gains_spectrum({"a": (2, 2)}, {"a": {"spectrum": sigma_r, "energy": 1.0}}, 0.5, 0)["a"]
    assert gains == [1e6, 1089.0]


def test_equal_variation_gives_uniform_ranks_whatever_the_shapes():
    """Catches: the variation method favouring small layers, which statistics alone give no reason for."""
    shapes = named([(64, 64), (64, 640), (320, 64), (128, 1152)])
    ranks = qra.allocate(shapes, {name: {"variation": (0.7, 0.2)} for name in shapes}, "variation")
    assert set(ranks.values()) == {16}


def test_variation_ranks_are_proportional_to_g():
    """Catches: gains of the statistics-only method that do not diminish with rank (one layer takes everything)."""
    shapes = named([(256, 256)] * 3)
    g = {"layer0": 1.0, "layer1": 2.0, "layer2": 3.0}
    stats = {n: {"variation": (x**2, 1.0)} for n, x in g.items()}  # g = (v_x v_w)^(1/2)
    ranks = qra.allocate(shapes, stats, "variation", rank=24, granule=1, least=1, most=256)
    assert [ranks[n] for n in shapes] == pytest.approx([12, 24, 36], abs=1)


def test_dead_layer_stays_at_the_smallest_rank():
    """Catches: 0 / 0 for a layer whose inputs are all zero (NaN gains sort anywhere)."""
    shapes = named([(64, 64)] * 3)
    stats = make_layers(shapes, 1)
    stats["layer2"] |= {"spectrum": torch.zeros(64), "energy": 0.0}
    assert qra.allocate(shapes, stats, least=4)["layer2"] == 4 and qra.allocate(shapes, stats, rank=2)["layer2"] == 0


def test_shuffled_deals_the_same_curves_to_other_layers_and_depends_on_its_seed_only():
    """Catches: a control that is the method itself, or that differs from run to run."""
    shapes = named([(64, 64)] * 6)
    stats = make_layers(shapes, 1, "steep")
    for n in shapes:
        stats[n]["energy"] *= 1 + int(n[-1])
    straight = qra.allocate(shapes, stats, "qra")
    dealt = [qra.allocate(shapes, stats, "shuffled", seed=seed) for seed in (0, 1, 2)]
    assert all(sorted(d.values()) == sorted(straight.values()) for d in dealt)  # equal shapes: the ranks are permuted
    assert any(d != straight for d in dealt) and dealt[0] != dealt[1]
    assert dealt[0] == qra.allocate(shapes, stats, "shuffled", seed=0)


@pytest.mark.parametrize("rank,most", [(1, 64), (2, 64), (16, 64), (17, 68), (300, 1200), (16.5, 66), (0.7, 64)])
def test_by_default_only_the_largest_rank_is_bounded(rank, most):
    """Catches: a least rank or a granule that leaves a small budget no choice, a largest one below the average."""
    assert qra.bounds(rank) == (1, 0, most) and qra.bounds(rank, 3, 0, rank) == (3, 0, rank)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_small_budget_goes_to_the_layers_that_gain_from_it(rank):
    """Catches: a least rank of 1, at which an average of 1 is always uniform."""
    shapes = named([(64, 64)] * 8)
    stats = make_layers(shapes, 0)
    for i, n in enumerate(shapes):
        stats[n]["energy"] *= 100.0**i
    ranks = qra.allocate(shapes, stats, rank=rank)
    assert sum(ranks.values()) == 8 * rank and ranks["layer0"] > 2 * rank and ranks["layer7"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_reads_what_its_row_names_and_nothing_else(method):
    """Catches: a statistic that is read without being declared, which student.py would not measure."""
    shapes = named([(64, 96), (96, 64)])
    stats = {name: {key: known[key] for key in qra.METHODS[method].reads} for name, known in make_layers(shapes, 0).items()}
    assert qra.allocate(shapes, stats, method) == qra.allocate(shapes, make_layers(shapes, 0), method)
    for left_out in qra.METHODS[method].reads:
        without = {name: {key: value for key, value in known.items() if key != left_out} for name, known in stats.items()}
        with pytest.raises(KeyError, match=left_out):
            qra.allocate(shapes, without, method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"rank": 65, "most": 99}, "rank 65 is larger than layer layer0"),
        ({"rank": 2, "least": 3}, "least <= rank <= most"),
        ({"rank": 65, "most": 64}, "least <= rank <= most"),
        ({"least": -2}, "0 <= least"),
        ({"granule": 0}, "granule >= 1"),
        ({"method": "variation", "price": qra.bits}, "variation does not weigh .* choose spectrum, qra, shuffled"),
        ({"method": "uniform", "price": qra.bits}, "uniform does not weigh"),
    ],
)
def test_bad_requests_are_one_clear_sentence(change, message):
    """Catches: silent caps."""
    shapes = named([(64, 96), (96, 64)])
    with pytest.raises(ValueError, match=message):
        qra.allocate(shapes, make_layers(shapes, 0), **change)


@pytest.mark.parametrize(
    ("layer", "statistic", "value", "message"),
    [
        ("layer0", "variation", (math.nan, 1.0), "layer layer0: the variation"),
        ("layer1", "energy", math.inf, "layer layer1: spectrum and energy"),
        ("layer1", "spectrum", [math.nan], "layer layer1: spectrum and energy"),
    ],
)
def test_statistics_that_are_no_numbers_are_one_clear_sentence(layer, statistic, value, message):
    """Catches: NaN statistics that become some rank, errors that do not name the layer."""
    shapes = named([(64, 96), (96, 64)])
    stats = make_layers(shapes, 0)
    stats[layer][statistic] = value
    with pytest.raises(ValueError, match=message):
        qra.allocate(shapes, stats)


def test_demo_asserts_its_invariant(capsys):
    """Catches: a demo that no longer runs."""
    qra.main()
    assert "16 bits" in capsys.readouterr().out
