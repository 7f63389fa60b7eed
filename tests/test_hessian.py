"""Properties of the streamed statistics. Oracles: float64 sums over all rows at once, and the convolution itself."""

import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import hessian
import quant


def rows(kind: str, T: int, I: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, I, generator=generator)
    if kind == "outlier":
        x[:, 0] *= 100
    return {"constant": torch.full_like(x, 0.3), "zero": torch.zeros_like(x), "offset": x + 50.0, "tiny": x * 1e-12}.get(kind, x)


class Block(nn.Module):
    """q, k, v read one tensor; `out` reads another; `again` reads a copy with equal values."""

    def __init__(self, I: int = 16):
        super().__init__()
        for name in ("q", "k", "v", "out", "again"):
            setattr(self, name, nn.Linear(I, I))
        self.conv = nn.Conv2d(I, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(I, 8, 3, padding=1)
        self.down = nn.Conv2d(I, 8, 3, stride=2, padding=1)

    def forward(self, x_TI):
        y = self.out(self.q(x_TI) + self.k(input=x_TI) + self.v(x_TI))
        self.again(x_TI.clone())
        image = x_TI.mT.reshape(1, x_TI.shape[1], 4, -1)
        return y, self.conv(image), self.conv2(image), self.down(image)


LAYERS = ["q", "k", "v", "out", "again", "conv", "conv2", "down"]


def collect(model, names, run, **options) -> dict[str, hessian.Stats]:
    """All passes in one dict."""
    return {k: stats for part in hessian.collect_passes(model, names, run, **options) for k, stats in part.items()}


def collect_outputs(model, names, run, **options) -> dict[str, torch.Tensor]:
    return {k: G_OO for part in hessian.collect_output_passes(model, names, run, **options) for k, G_OO in part.items()}


def calibrate(model, batches, names, **options):
    def run(set_bin):
        for i, x in enumerate(batches):
            set_bin(i % options.get("bins", 4))
            model(x)

    return collect(model, names, run, **options)


@given(
    kind=st.sampled_from(["normal", "constant", "zero", "outlier", "offset", "tiny"]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    I=st.integers(1, 24),
    seed=st.integers(0, 2**16),
)
def test_streamed_hessian_is_the_float64_mean_over_all_rows_however_they_are_cut(kind, sizes, I, seed):
    """Catches: mean of batch means, a missing division by the count, x x^T summed over the wrong axis."""
    model = nn.ModuleDict({"layer": nn.Linear(I, 3)})
    model.forward = model["layer"].forward
    x = rows(kind, sum(sizes), I, seed)
    stats = calibrate(model["layer"], x.split(sizes), [""])[""]
    reference = x.double().mT @ x.double() / len(x)
    assert stats.count == len(x)
    assert (stats.H_KK - reference).norm() <= 1e-5 * reference.norm()
    assert torch.equal(stats.absmax_BinI.amax(0), x.abs().amax(0))


@given(
    I=st.integers(1, 5),
    O=st.integers(1, 4),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 2**16),
)
def test_unfolded_rows_times_flattened_weight_are_the_convolution(I, O, size, kernel, stride, padding, seed):
    """Catches: channel-major taps, kh and kw swapped, padding or stride applied to the wrong axis, missing zero padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, I, *size, generator=generator, dtype=torch.float64)
    w = torch.randn(O, I, *kernel, generator=generator, dtype=torch.float64)
    rows_TK = hessian.unfold(x, kernel, stride, padding)
    y = nn.functional.conv2d(x, w, stride=stride, padding=padding)
    flat = w.permute(0, 2, 3, 1).reshape(O, -1)
    assert torch.allclose((rows_TK @ flat.mT).reshape(2, *y.shape[2:], O).permute(0, 3, 1, 2), y, atol=1e-12)
    torch_order = nn.functional.unfold(x, kernel, padding=padding, stride=stride)  # N (I taps) L
    assert torch.equal(rows_TK, torch_order.unflatten(1, (I, -1)).permute(0, 3, 2, 1).reshape(rows_TK.shape))


def test_unfold_honours_dilation():
    """Catches: dilation ignored."""
    x, w = torch.randn(1, 3, 9, 9), torch.randn(2, 3, 3, 3)
    y = nn.functional.conv2d(x, w, padding=2, dilation=2)
    rows_TK = hessian.unfold(x, (3, 3), (1, 1), (2, 2), (2, 2))
    assert torch.allclose((rows_TK @ w.permute(0, 2, 3, 1).reshape(2, -1).mT).mT.reshape(y.shape), y, atol=1e-5)


def test_conv_blocks_do_not_change_its_hessian(monkeypatch):
    """Catches: a block counted twice or dropped, images per block rounded down to zero, strips that are not mirrored."""
    conv, x = nn.Conv2d(6, 4, 3, stride=2, padding=1), torch.randn(5, 6, 8, 8)
    whole = calibrate(conv, [x], [""])[""]
    monkeypatch.setitem(hessian.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(hessian, "STRIP", dict.fromkeys(hessian.STRIP, 20))
    blocks = calibrate(conv, [x], [""])[""]
    reference = hessian.unfold(x.double(), (3, 3), (2, 2), (1, 1))
    assert whole.count == blocks.count == len(reference) == 5 * 16
    assert torch.allclose(whole.H_KK, blocks.H_KK, atol=1e-6)
    assert torch.allclose(whole.H_KK.double(), reference.mT @ reference / len(reference), atol=1e-6)
    assert whole.absmax_BinI.shape == (4, 6) and torch.equal(whole.absmax_BinI.amax(0), x.abs().amax((0, 2, 3)))


def test_layers_fed_by_one_tensor_share_one_hessian_and_others_do_not():
    """Catches: sharing by value or by shape (`again` sees equal numbers), a conv sharing with another window."""
    stats = calibrate(Block(), [torch.randn(16, 16), torch.randn(16, 16)], LAYERS)
    assert stats["q"] is stats["k"] and stats["k"] is stats["v"]
    assert stats["q"].layers == ["q", "k", "v"]
    assert stats["conv"] is stats["conv2"] and stats["conv"] is not stats["down"]
    assert stats["out"] is not stats["q"] and stats["again"] is not stats["q"]
    assert torch.equal(stats["again"].H_KK, stats["q"].H_KK)
    assert stats["q"].count == 32, "rows of a shared input are counted once, not once per layer"


def test_a_tensor_changed_in_place_between_two_layers_is_not_shared():
    """Catches: identity without the version counter."""

    class InPlace(Block):
        def forward(self, x):
            self.q(x)
            x.mul_(2.0)
            self.k(x)

    stats = calibrate(InPlace(), [torch.ones(4, 16)], ["q", "k"])
    assert stats["q"] is not stats["k"] and torch.equal(stats["k"].H_KK, 4 * stats["q"].H_KK)


def test_layers_that_stop_sharing_their_input_raise():
    """Catches: trusting the first call for ever, which would give `k` the Hessian of `q` silently."""

    class Drift(Block):
        calls = 0

        def forward(self, x):
            self.q(x)
            self.k(x if self.calls == 0 else x + 1)
            self.calls += 1

    with pytest.raises(ValueError, match="'q' and 'k' shared their input"):
        calibrate(Drift(), [torch.ones(4, 16)] * 2, ["q", "k"])


@given(K=st.integers(1, 40), strip=st.integers(1, 50), other=st.integers(1, 50), seed=st.integers(0, 99))
def test_strips_add_up_to_the_moments_of_all_columns(K, strip, other, seed):
    """Catches: a strip that is left out or counted twice, a triangle that is mirrored from the wrong side, or in the wide strips of
    another device."""
    x = rows("normal", 30, K, seed)
    total = torch.zeros(K, K, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian, "STRIP", {"cpu": strip, "cuda": other})
        for part in x.split(10):
            hessian.add_moments(total, part)
        assert not total[0, strip:].any(), "above the diagonal nothing is computed"
        hessian.mirror(total)
    exact = x.double().mT @ x.double()
    assert (total - exact).norm() <= 1e-6 * exact.norm() and torch.equal(total.tril(-strip).mT, total.triu(strip))


@given(K=st.integers(1, 48), seed=st.integers(0, 99))
def test_a_diagonal_is_damped_as_its_hessian(K, seed):
    """Catches: another damping."""
    x = rows("normal", 20, K, seed).double()
    H = x.mT @ x
    assert torch.allclose(hessian.damp(H).diagonal(), hessian.damp(H.diagonal()), rtol=1e-12)


def test_diagonals_are_those_of_the_hessians_and_need_one_pass():
    """Catches: a diagonal of sums in place of squares, windows of another stride, a budget that counts K^2."""
    torch.manual_seed(0)
    model, batches = Block(), [torch.randn(16, 16) for _ in range(3)]
    whole, alone = (calibrate(model, batches, LAYERS, group_x=8, diagonals=only) for only in (False, True))
    for name in LAYERS:
        torch.testing.assert_close(alone[name].H_KK, whole[name].H_KK.diagonal(), rtol=1e-5, atol=1e-7)
        assert torch.equal(alone[name].noise_I, whole[name].noise_I) and alone[name].count == whole[name].count
    passes = list(hessian.collect_passes(model, LAYERS, lambda set_bin: model(batches[0]), 8 * 500, diagonals=True))
    assert len(passes) == 1


@pytest.mark.parametrize("budget_of", [0.5, 1, 2, 100])
def test_several_passes_equal_one_pass_and_respect_the_budget(budget_of):
    """Catches: a layer lost or counted in two passes, totals of a pass above the budget, two in main memory at a time."""
    torch.manual_seed(0)
    model, batches = Block(), [torch.randn(16, 16) for _ in range(4)]
    one = calibrate(model, batches, LAYERS)
    largest = 8 * 144 * 144
    calls = []

    def run(set_bin):
        calls.append(1)
        for i, x in enumerate(batches):
            set_bin(i)
            model(x)

    parts = list(hessian.collect_passes(model, LAYERS, run, budget_bytes=largest * budget_of))
    for part in parts:
        sizes = [8 * len(s.H_KK) ** 2 for s in set(part.values())]
        assert sum(size for size in sizes if size <= largest * budget_of) <= largest * budget_of
        assert sum(size > largest * budget_of for size in sizes) <= 1
    assert len(calls) == len(parts) and len(parts) == {0.5: 2, 1: 3, 2: 2, 100: 1}[budget_of]
    assert sorted(name for part in parts for name in part) == sorted(LAYERS)
    for part in parts:
        for name, stats in part.items():
            assert torch.equal(stats.H_KK, one[name].H_KK) and torch.equal(stats.absmax_BinI, one[name].absmax_BinI)
            assert stats.count == one[name].count
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks must be removed"


def test_absmax_is_kept_per_timestep_bin_and_channel():
    """Catches: bins ignored, signed maximum, empty bins counted as zeros in v_x."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -3.0]])
    x = torch.tensor([[1.0, -5.0], [0.5, 2.0]])
    stats = calibrate(layer, [x, 2 * x], [""], bins=3)[""]
    assert stats.absmax_BinI.tolist() == [[1.0, 5.0], [2.0, 10.0], [0.0, 0.0]]
    assert stats.calls_Bin.tolist() == [1, 1, 0]
    v_x, v_w = hessian.variation(stats, layer.weight)
    values = torch.tensor([1.0, 5.0, 2.0, 10.0])
    assert v_x == pytest.approx(float(values.std(correction=0) / values.mean()))
    assert v_w == pytest.approx(0.5)  # absmax per input channel 1 and 3: sd 1, mean 2


def test_variation_of_a_conv_weight_is_over_input_channels():
    """Catches: output channels taken for input channels."""
    weight = torch.ones(3, 2, 3, 3)
    weight[:, 1] = 3.0
    stats = calibrate(nn.Conv2d(2, 3, 3), [torch.ones(1, 2, 4, 4)], [""])[""]
    assert hessian.variation(stats, weight) == pytest.approx((0.0, 0.5))
    assert hessian.variation(stats, torch.zeros(3, 2, 3, 3)) == (0.0, 0.0)


@given(I=st.integers(1, 12), T=st.integers(1, 12), kind=st.sampled_from(["normal", "zero", "constant", "tiny"]))
def test_damped_hessian_has_a_cholesky_factor_even_when_rows_are_few_or_zero(I, T, kind):
    """Catches: no damping, damping by an absolute constant that a tiny input drowns in."""
    x = rows(kind, T, I, 0).double()
    H = x.mT @ x / T
    damped = hessian.damp(H, 0.01)
    torch.linalg.cholesky(damped)
    expected = 0.01 * H.diagonal().mean() if kind != "zero" else 1.0
    assert torch.allclose((damped - H).diagonal(), torch.full((I,), float(expected), dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["out", "conv"])
def test_inf_or_nan_input_raises_and_names_the_layer(bad, name):
    """Catches: silent statistics from broken inputs, max() that skips -inf."""
    model = Block()
    getattr(model, {"out": "v", "conv": "v"}[name]).bias.data[0] = bad
    x = torch.randn(16, 16)
    if name == "conv":
        x[3, 2] = bad
    with pytest.raises(ValueError, match=f"'{name}'.*inf or nan"):
        calibrate(model, [x], [name])


def test_overflowing_moments_raise_and_name_the_layer():
    """Catches: inf in H accepted because the input itself is finite."""
    with pytest.raises(ValueError, match="overflow"):
        calibrate(nn.Linear(2, 2), [torch.full((1, 2), 1e30)], [""])


def test_bad_requests_are_one_clear_sentence():
    """Catches: a KeyError from inside, an uncalled layer with H = 0 / 0, a budget silently exceeded."""
    model, x = Block(), [torch.randn(16, 16)]
    with pytest.raises(ValueError, match="'nope' is not in the model"):
        calibrate(model, x, ["nope"])
    with pytest.raises(ValueError, match="Block, not a Linear or Conv2d"):
        calibrate(model, x, [""])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' was never called"):
        calibrate(model, x, ["q", "unused"])
    with pytest.raises(ValueError, match="timestep bin 4"):
        collect(model, ["q"], lambda set_bin: set_bin(4))
    model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="'grouped'"):
        calibrate(model, x, ["grouped"])


def test_low_precision_inputs_are_accumulated_in_float32_or_better():
    """Catches: x^T x in bfloat16."""
    x = torch.randn(512, 8).bfloat16()
    layer = nn.Linear(8, 8).bfloat16()
    H = calibrate(layer, [x], [""])[""].H_KK
    assert H.dtype == torch.float32
    assert torch.allclose(H.double(), x.double().mT @ x.double() / 512, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the output side: gradients, and the noise of rounding


class Chain(nn.Module):
    """conv (stride 2) -> SiLU -> 1x1 conv -> linear over channels; and a layer that nothing reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 4, 1), nn.Linear(4, 6)
        self.unread = nn.Linear(4, 4)

    def forward(self, x):
        h = self.mix(torch.nn.functional.silu(self.conv(x))).permute(0, 2, 3, 1)
        self.unread(h)
        return self.head(h)


def backward_run(model, x, draws):
    def run():
        generator = torch.Generator().manual_seed(0)
        for _ in range(draws):
            y = model(x)
            (torch.randn(y.shape, generator=generator) * y).sum().backward()
        return draws * len(x)

    return run


def test_output_moments_are_those_of_the_jacobian():
    """Catches: a mean over rows in place of their sum, channels mistaken for positions, parameters' gradients left behind."""
    torch.manual_seed(0)
    model, x = Chain().requires_grad_(False), torch.randn(2, 3, 6, 6)
    names = ["conv", "mix", "head"]
    found = collect_outputs(model, names, backward_run(model, x.repeat(100, 1, 1, 1), 30))
    reached = {}
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: reached.update({n: y})) for n in names]
    f = model(x.requires_grad_()).flatten()
    for handle in handles:
        handle.remove()
    for name in names:
        total = 0
        for i in range(len(f)):  # sum over outputs of the outer products of exact gradients
            (g,) = torch.autograd.grad(f[i], reached[name], retain_graph=True)
            g = (g.permute(0, 2, 3, 1) if name != "head" else g).reshape(-1, g.shape[-1 if name == "head" else 1]).double()
            total = total + g.mT @ g
        exact = total / len(x)
        assert (found[name].double() - exact).norm() < 0.05 * exact.norm(), name
    assert all(p.grad is None for p in model.parameters())


def test_output_moments_do_not_depend_on_the_budget(monkeypatch):
    """Catches a layer lost between passes, and strips that are not mirrored."""
    torch.manual_seed(0)
    model, x, names = Chain().requires_grad_(False), torch.randn(2, 3, 6, 6), ["conv", "mix", "head"]
    at_once = collect_outputs(model, names, backward_run(model, x, 2))
    in_turn = collect_outputs(model, names, backward_run(model, x, 2), budget_bytes=8 * 36)
    assert list(in_turn) == names and all(torch.equal(at_once[n], in_turn[n]) for n in names)
    monkeypatch.setattr(hessian, "STRIP", dict.fromkeys(hessian.STRIP, 3))
    in_strips = collect_outputs(model, names, backward_run(model, x, 2))
    assert all(torch.allclose(at_once[n], in_strips[n], rtol=1e-4, atol=1e-6) for n in names)


@pytest.mark.parametrize("budget", [8 * 36, 8 * 27**2, 1 << 20])
@pytest.mark.parametrize("gradients", [True, False])
def test_slices_are_the_statistics_of_all_layers(budget, gradients):
    """Catches a layer lost or doubled between slices, statistics of another layer, and a slice that outlives the next one."""
    torch.manual_seed(0)
    model, x, calls = Chain().requires_grad_(False), torch.randn(2, 3, 6, 6), []
    names = ["mix", "head"] if budget < 8 * 27**2 else ["mix", "head", "conv"]  # `conv` has 27 columns

    def forward(set_bin):
        calls.append(1)
        model(x)

    backward = backward_run(model, x, 2) if gradients else None
    H = collect(model, names, forward)
    G = collect_outputs(model, names, backward) if gradients else dict.fromkeys(names)
    fits, found, before = budget == 1 << 20, {}, {}
    calls.clear()
    for part in hessian.slices(model, names, forward, backward, budget):
        assert not before and not found.keys() & part.keys()
        found |= part
        before = part
    assert list(found) == names if fits else sorted(found) == sorted(names)
    for name, (stats, G_OO) in found.items():
        assert torch.equal(stats.H_KK, H[name].H_KK)
        assert G_OO is None if G[name] is None else torch.equal(G_OO, G[name])
    assert len(calls) == (1 if fits else 2)


def test_bad_requests_for_output_moments_are_one_clear_sentence():
    """Catches a silent zero for a layer whose output nobody reads, and inf that would reach the Cholesky factor."""
    model, x = Chain().requires_grad_(False), torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"'unread' was never called .* not measured"):
        collect_outputs(model, ["head", "unread"], backward_run(model, x, 1))
    with pytest.raises(ValueError, match="'nowhere' is not in the model"):
        collect_outputs(model, ["nowhere"], backward_run(model, x, 1))
    with pytest.raises(ValueError, match="'head' alone needs 288 bytes for its G, the budget is 8"):
        collect_outputs(model, ["head"], backward_run(model, x, 1), budget_bytes=8)
    model.head.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'conv'.*inf or nan"):
        collect_outputs(model, ["conv"], backward_run(model, x, 1))


@pytest.mark.parametrize("group_x", [8, quant.EIGHT_BITS])
@pytest.mark.parametrize("name", ["q", "conv", "down"])
def test_rounding_noise_is_what_the_activation_grid_loses(name, group_x):
    """Catches: rows of a strided or overlapping convolution counted for pixels, noise of another group size, or none in 8 bits."""
    torch.manual_seed(0)
    model, batches = Block(), [torch.randn(16, 16), 3 * torch.randn(16, 16)]
    stats = calibrate(model, batches, [name], group_x=group_x)[name]
    total = 0
    for x in batches:
        if name == "q":
            grid = quant.quantize_activation(x, group_x)
        else:
            x = x.mT.reshape(1, 16, 4, -1).permute(0, 2, 3, 1).contiguous()
            grid = quant.quantize_activation(x, group_x, per_sample=True)
        total = total + (x - quant.dequantize_activation(*grid, 16)).square().reshape(-1, 16).double().sum(0) / 32
    assert torch.allclose(stats.noise_I.double(), total, rtol=1e-5) and stats.noise_I.min() > 0
    assert not calibrate(model, batches, [name])[name].noise_I.any()


def test_statistics_of_what_a_layer_makes_of_its_input():
    """Catches: H or noise of the input itself, channels of a convolution on another axis, layers of one input that share a Hessian
    although only one of them changes it."""
    torch.manual_seed(0)
    model, batches = Block(), [torch.randn(16, 16) + 2, 3 * torch.randn(16, 16)]
    c = torch.randn(16)
    inputs = dict.fromkeys(("q", "v", "conv"), lambda x: quant.rotate(x - c))
    made = calibrate(model, batches, LAYERS, group_x=8, inputs=inputs)
    plain = calibrate(model, [quant.rotate(x - c) for x in batches], LAYERS, group_x=8)
    for name in ("q", "conv"):
        assert torch.allclose(made[name].H_KK, plain[name].H_KK, rtol=1e-5, atol=1e-5)
        assert torch.allclose(made[name].noise_I, plain[name].noise_I, rtol=1e-5)
    as_they_are = calibrate(model, batches, LAYERS)
    assert all(torch.equal(made[name].H_KK, as_they_are[name].H_KK) for name in ("k", "conv2", "down"))
    assert made["q"] is made["v"] and made["k"] is not made["q"] and made["conv2"] is not made["conv"]


def test_ranges_are_those_of_all_rows_and_name_who_reads_the_same_input():
    """Catches: a mean of means of unequal batches, a keyword argument that is not seen, extremes of the last batch, a convolution's
    channels on another axis, layers that are taken to share an input, or not."""
    torch.manual_seed(0)
    model, batches = Block(), [torch.randn(16, 16) - 3, torch.randn(8, 16) + 5, torch.zeros(4, 16)]
    found = hessian.ranges(model, ["q", "k", "v", "again", "conv", "down"], lambda set_bin: [model(x) for x in batches])
    x_TI = torch.cat(batches)
    for name, seen in found.items():
        assert torch.allclose(seen.mean_I, x_TI.mean(0), atol=1e-6), name
        assert torch.equal(seen.low_I, x_TI.amin(0)) and torch.equal(seen.high_I, x_TI.amax(0))
    assert {name: seen.first for name, seen in found.items()} == {
        "q": "q", "k": "q", "v": "q", "again": "again", "conv": "conv", "down": "conv"
    }  # fmt: skip

    with pytest.raises(ValueError, match="'head' was never called"):
        hessian.ranges(Chain(), ["head"], lambda set_bin: None)


def test_ranges_keep_one_row_of_each_sample_however_samples_are_cut_into_batches():
    """Catches rows of the first sample only, the same place in each, rows that are views of whole inputs."""
    model, x_NTI = nn.Sequential(nn.Linear(16, 4)), torch.arange(12 * 7).repeat_interleave(16).view(12, 7, 16).float()
    kept = [
        hessian.ranges(model, ["0"], lambda set_bin, n=n: [model(x) for x in x_NTI.split(n)], rows=True)["0"].rows_TI
        for n in (12, 5)
    ]
    assert torch.equal(*kept) and kept[0].shape == (12, 16) and kept[0].untyped_storage().nbytes() == 4 * 12 * 16
    sample, place = (kept[0][:, 0].long() // 7).tolist(), (kept[0][:, 0].long() % 7).tolist()
    assert sample == list(range(12)) and len(set(place)) >= 4
    for T in (77, 4608):  # captions; captions and pixels
        places = hessian.one_row_each(torch.arange(T).expand(64, T)[..., None], 0)[:, 0]
        assert len(places.unique()) > 48 and places.max() > 0.9 * T and len((places % 3).unique()) == 3
    image = nn.Sequential(nn.Conv2d(16, 4, 1))
    seen = hessian.ranges(image, ["0"], lambda set_bin: image(x_NTI.mT.unflatten(2, (7, 1))), rows=True)["0"]
    assert torch.equal(seen.rows_TI, kept[0])
    assert hessian.ranges(model, ["0"], lambda set_bin: model(x_NTI[:, 0]), rows=True)["0"].rows_TI.shape == (12, 16)


def _share(_, index: int, folder: str) -> None:
    """What one of two processes collects from its half of the samples."""
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", patience, world_size=2, rank=index)
    try:
        stats, G, seen = _statistics(slice(index, None, 2))
    finally:
        torch.distributed.destroy_process_group()
    save_file(
        {"H": stats.H_KK, "absmax": stats.absmax_BinI, "noise": stats.noise_I, "G": G} | seen, f"{folder}/{index}.safetensors"
    )


def _statistics(local_rows: slice) -> tuple[hessian.Stats, torch.Tensor, dict[str, torch.Tensor]]:
    gen = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(8, 5, 32, generator=gen)
    model[0].weight.data = torch.randn(16, 32, generator=gen)
    v = torch.randn(8, 5, 16, generator=gen)
    stats = collect(model, ["0"], lambda set_bin: model(x[local_rows]), group_x=16)["0"]

    def backward() -> int:
        (v[local_rows] * model(x[local_rows])).sum().backward()
        return len(x[local_rows])

    of_input = vars(hessian.ranges(model, ["0"], lambda set_bin: model(x[local_rows]))["0"])
    return stats, collect_outputs(model, ["0"], backward)["0"], {k: v for k, v in of_input.items() if k not in ("first", "rows_TI")}


def test_two_processes_share_their_statistics(tmp_path):
    """Catches sums, counts or maxima that stay in one process."""
    other = torch.multiprocessing.spawn(_share, (1, str(tmp_path)), nprocs=1, join=False)
    _share(0, 0, str(tmp_path))  # this process is the first of the two: one interpreter less to start
    while not other.join():
        pass
    stats, G, seen = _statistics(slice(None))
    for index in (0, 1):
        shared = load_file(tmp_path / f"{index}.safetensors")
        assert torch.equal(shared["absmax"], stats.absmax_BinI)
        for ours, alone in (
            (shared["H"], stats.H_KK),
            (shared["noise"], stats.noise_I),
            (shared["G"], G),
            *((shared[k], seen[k]) for k in seen),
        ):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_moments_are_those_of_float64(dtype):
    """Catches products that are rounded to 16 bits, and tf32."""
    x = torch.randn(5000, 256, device="cuda", dtype=dtype)
    exact = x.double().mT @ x.double()
    assert (hessian.moments(x, x) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.gpu
def test_a_hessian_larger_than_the_budget_is_summed_in_main_memory(monkeypatch):
    """Catches a sum that stays on the GPU, and one that is another there."""
    monkeypatch.setattr(hessian, "STRIP", dict.fromkeys(hessian.STRIP, 64))
    layer, x = nn.Linear(160, 8, device="cuda"), torch.randn(100, 160, device="cuda")
    here, there = (calibrate(layer, [x], [""], budget_bytes=size)[""].H_KK for size in (8 * 160**2, 8 * 160**2 - 1))
    assert here.is_cuda and there.device.type == "cpu" and torch.equal(here.cpu(), there)
