"""QRA: the budget holds, the order of layers does not matter, greedy is what brute force finds."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

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
        stats[name] = {"spectrum": sigma_r, "energy": energy, "variation": v.tolist()}
    return stats


def cost(ranks, shapes):
    """Counted from the shapes of A (r, K) and B (O, r): a wrong count in qra.py must not agree with itself."""
    return sum(torch.empty(r, shapes[n][1]).numel() + torch.empty(shapes[n][0], r).numel() for n, r in ranks.items())


dimension = st.integers(16, 96)
twins = st.lists(st.tuples(st.sampled_from([16, 64]), st.just(32)), min_size=2, max_size=6)  # costs that tie
shape_lists = st.lists(st.tuples(dimension, dimension), min_size=1, max_size=6)
kinds = st.sampled_from(["normal", "equal", "zero", "steep", "denormal"])


def named(shape_list):
    return {f"layer{i}": shape for i, shape in enumerate(shape_list)}


@given(shape_lists, kinds, st.integers(0, 99), st.sampled_from(METHODS), st.integers(0, 16), st.integers(1, 5), st.data())
@example([(16, 96), (96, 16), (96, 96)], "normal", 0, "qra", 8, 4, None)
def test_rank_budget_is_never_exceeded_and_bounds_hold(shape_list, kind, seed, method, rank, granule, data):
    """Catches: costs that count O only or K only (cheap-looking layers overspend); a granule taken without asking."""
    shapes = named(shape_list)
    least, most = (4, 64) if data is None else (data.draw(st.integers(0, rank)), data.draw(st.integers(max(1, rank), 70)))
    bounds = {"rank": rank, "granule": granule, "least": least, "most": most}
    ranks = qra.allocate(shapes, make_layers(shapes, seed, kind), method, seed=seed, **bounds)
    assert ranks.keys() == shapes.keys()
    assert cost(ranks, shapes) <= cost(dict.fromkeys(shapes, rank), shapes)
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


def brute_force(gains, shapes, budget, granule, least, most):
    """The best objective over every allocation in the budget."""
    choices = [range(least, min(most, *shape) + 1, granule) for shape in shapes.values()]
    allocations = (dict(zip(shapes, ranks, strict=True)) for ranks in itertools.product(*choices))
    return max(qra.objective(ranks, gains) for ranks in allocations if cost(ranks, shapes) <= budget)


def first_misfit(gains, shapes, budget, granule, least, most):
    """Gain of the first granule, in the order of gain per parameter, that no longer fits."""
    steps = []
    for name, (O, K) in shapes.items():
        for r in range(least, min(most, O, K) - granule + 1, granule):
            gain = sum(gains[name][r : r + granule])
            steps.append((-gain / (O + K), r, name, gain, granule * (O + K)))
    left = budget - cost(dict.fromkeys(shapes, least), shapes)
    for _, _, _, gain, price in sorted(steps):
        left -= price
        if left < 0:
            return gain
    return 0.0


small = st.integers(6, 20)


@given(
    st.lists(st.tuples(small, small), min_size=1, max_size=4),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from(["variation", "spectrum", "qra", "shuffled"]),
)
def test_greedy_equals_brute_force_up_to_the_last_granule(shape_list, seed, equal, method):
    """Catches: gain not divided by cost, smallest gain first, a gain read at the wrong rank. Equal costs: exactly."""
    shapes = named([shape_list[0]] * len(shape_list) if equal else shape_list)
    stats = make_layers(shapes, seed)
    gains = qra.METHODS[method].gains(shapes, stats, beta=0.5, seed=seed)
    budget = cost(dict.fromkeys(shapes, 4), shapes)
    args = (gains, shapes, budget, 2, 2, 10)
    best, found = brute_force(*args), qra.objective(qra.greedy(*args), gains)
    ranks = qra.allocate(shapes, stats, method, rank=4, granule=2, least=2, most=10, seed=seed)
    assert found == qra.objective(ranks, gains)
    assert found <= best + 1e-12
    assert found >= best - (0 if equal else first_misfit(*args)) - 1e-12


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
    assert qra.allocate(shapes, stats)["layer2"] == 4 and qra.allocate(shapes, stats, rank=2)["layer2"] == 0


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


@given(st.integers(1, 300))
@example(16)
@example(2)
def test_bounds_scale_with_the_average_rank(rank):
    """Catches: a least rank or a granule that leaves a small budget no choice, a largest one below the average."""
    granule, least, most = qra.bounds(rank)
    assert qra.bounds(16) == (4, 4, 64) and qra.bounds(2) == (1, 0, 64) and qra.bounds(2, 3, 1, 2) == (3, 1, 2)
    assert granule == max(1, rank // 4) and least == rank // 4 and most == max(64, 4 * rank)


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
        ({"granule": -1}, "granule >= 1"),
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
    assert "100.0%" in capsys.readouterr().out
