"""Properties of the layers that carry a split.

Oracles: the deployed kernel for the forward, a float64 straight-through surrogate written here for the backward.
"""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

import hessian
import hgs_lora
import kernels
import quant
from layers import (
    W4A4Conv2d,
    W4A4Linear,
    W4A16Linear,
    anchor_state,
    anchored,
    dequantize_lora,
    load_anchor_state,
    merged_layer,
    mix_lora,
    number_format,
    packed_layers,
    quantize_lora,
    replace_layer,
    set_backend,
    store_8bit,
)


def make_layer(
    kind: str, seed: int = 0, rank: int = 3, smooth: bool = True, bias: bool = True, I: int = 20, O: int = 12, group_x: int = 8
):
    """(float layer, its packed twin with a trained-looking branch, an input batch). A rotated linear layer is centred too."""
    rotated = "rotated" in kind
    I = 32 if rotated else I
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Conv2d(I, O, 3, stride=2, padding=1, bias=bias) if "conv" in kind else nn.Linear(I, O, bias=bias)
    x = torch.randn(*((2, I, 7, 6) if "conv" in kind else (2, 5, I)), generator=generator)
    x.select(1 if "conv" in kind else 2, 0).mul_(15)
    w = layer.weight.detach()
    w_OK, taps = (quant.flatten_conv(w), 9) if "conv" in kind else (w, 1)
    lam = torch.rand(I, generator=generator) + 0.5 if smooth else None
    w_OK = w_OK * lam.repeat(taps) if smooth else w_OK
    w_OK = quant.rotate_taps(w_OK, taps) if rotated else w_OK
    shift = torch.randn(I, generator=generator) if kind == "rotated" else None
    gw, A, B = hgs_lora.decompose(w_OK, torch.eye(len(w_OK[0])), rank, group=16, taps=taps, rounding="rtn", iters=2)
    cls = W4A4Conv2d if "conv" in kind else W4A16Linear if kind == "w4a16" else W4A4Linear
    return layer, cls.from_float(layer, gw, A, B, lam, group_x, rotated, shift), x


def deployed(kind: str, layer, x):
    """The kernel, called as a deployment would call it."""
    branch = (layer.lora_A, layer.lora_B) if layer.rank else (None, None)
    with torch.no_grad():
        if "conv" in kind:
            args = (layer.inv_smooth, layer.group_x, (3, 3), (2, 2), (1, 1), layer.rotated)
            return kernels.w4a4_conv2d(x, layer.packed, layer.bias, *branch, *args)
        if kind != "w4a16":
            args = (layer.inv_smooth, layer.group_x, layer.shift, layer.rotated)
            return kernels.w4a4_linear(x, layer.packed, layer.bias, *branch, *args)
        x = x if layer.inv_smooth is None else (x.float() * layer.inv_smooth).to(x.dtype)
        return kernels.w4a16_linear(x, layer.packed, layer.bias, *branch)


KINDS = ["linear", "conv", "w4a16", "rotated", "rotated conv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rank,smooth,bias,group_x", [(3, True, True, 8), (0, False, True, 8), (3, False, False, 8), (3, True, True, quant.EIGHT_BITS)]
)
def test_training_layer_equals_the_packed_layer_bit_for_bit(kind, dtype, rank, smooth, bias, group_x):
    """Catches: fake quantization in training, autocast inside the layer, a branch on another input, another dtype."""
    _, layer, x = make_layer(kind, rank=rank, smooth=smooth, bias=bias, group_x=group_x)
    x = x.to(dtype)
    expected = deployed(kind, layer, x)
    trained = layer.train()(x.clone().requires_grad_())
    assert trained.requires_grad and trained.dtype == expected.dtype == dtype and torch.equal(trained, expected)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.clone().requires_grad_()), expected)


def surrogate(kind: str, layer, x, A, B):
    """float64 straight-through surrogate: the quantizer of activations replaced by the identity."""
    w = kernels.dequantize(layer.packed).double()
    w = quant.rotate_taps(w, layer.taps) if layer.rotated else w
    inv = torch.ones(layer.channels).double() if layer.inv_smooth is None else layer.inv_smooth.double()
    weight = w + B @ A if layer.rank else w
    bias = None if layer.bias is None else layer.bias.double()
    if "conv" not in kind:
        return F.linear(x * inv, weight, bias)
    return F.conv2d(x * inv[:, None, None], weight.reshape(layer.out, 3, 3, -1).permute(0, 3, 1, 2), bias, 2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,smooth,group_x", [(3, True, 8), (3, False, 8), (0, True, 8), (3, True, quant.EIGHT_BITS)])
def test_gradients_equal_finite_differences_of_the_straight_through_surrogate(kind, rank, smooth, group_x):
    """Catches: smoothing forgotten or applied once in dx, A and B swapped, a tap order, a missing branch in dx."""
    _, layer, x = make_layer(kind, rank=rank, smooth=smooth, group_x=group_x)
    generator = torch.Generator().manual_seed(9)
    x.requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=generator)
    y.backward(weights)
    point = {"x": x} | ({"A": layer.lora_A, "B": layer.lora_B} if rank else {})
    base = {k: v.detach().double() for k, v in point.items()}

    def loss(moved):
        return float((surrogate(kind, layer, moved["x"], moved.get("A"), moved.get("B")) * weights).sum())

    for name, leaf in point.items():
        h = 1e-4  # the surrogate is linear in each argument: no truncation error
        for i in torch.randperm(leaf.numel(), generator=generator)[:40].tolist():
            step = torch.zeros(leaf.numel(), dtype=torch.float64)
            step[i] = h
            step = step.view(leaf.shape)
            slope = (loss(base | {name: base[name] + step}) - loss(base | {name: base[name] - step})) / (2 * h)
            assert abs(slope - leaf.grad.flatten()[i].item()) <= 1e-4 * leaf.grad.abs().max().item(), (name, i)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_follow_the_float32_ones(kind):
    """Catches: LoRA gradients accumulated or returned in bfloat16, dx in float32."""
    _, layer, x = make_layer(kind)
    x16 = x.bfloat16()
    grads = []
    for value in (x16.float(), x16):
        value = value.clone().requires_grad_()
        layer.zero_grad()
        y = layer(value)
        y.backward(torch.ones_like(y))
        assert value.grad.dtype == value.dtype and layer.lora_A.grad.dtype == torch.float32
        grads.append([value.grad.float(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for exact, rounded in zip(*grads, strict=True):
        assert (exact - rounded).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_lora_and_the_input_receive_gradients(kind):
    """Catches: a bias or scale that trains, work for a gradient that nobody asked for."""
    _, layer, x = make_layer(kind)
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    layer(x).sum().backward()  # the input needs no gradient
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_through_safetensors_restores_the_layer_bit_for_bit(kind):
    """Catches: state outside of buffers (scale, smoothing), non-contiguous tensors, an anchor in the deployed checkpoint."""
    layer, packed, x = make_layer(kind)
    state = packed.state_dict()
    centred = {"shift"} if kind == "rotated" else set()
    assert set(state) == {"codes_OP", "mult_P", "scale_O", "inv_smooth", "bias", "lora_A", "lora_B"} | centred
    assert state["codes_OP"].dtype == state["mult_P"].dtype == torch.uint8
    twin = type(packed)(layer, rank=3, group=16, group_x=8, smooth=True, rotated=packed.rotated, centred=bool(centred))
    twin.load_state_dict(load(save(state)))
    assert torch.equal(twin(x), packed(x))


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_moves_the_layer_but_keeps_its_numbers(kind):
    """Catches: model.to(bfloat16) rounding scales, smoothing or LoRA."""
    _, layer, x = make_layer(kind)
    before, expected = copy.deepcopy(layer.state_dict()), layer(x.bfloat16())
    nn.Sequential(layer).to(torch.bfloat16)
    assert all(torch.equal(v, layer.state_dict()[k]) and v.dtype == layer.state_dict()[k].dtype for k, v in before.items())
    assert torch.equal(layer(x.bfloat16()), expected)
    assert copy.deepcopy(layer).to("meta").scale_O.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_anchor_equals_the_initial_layer_after_the_student_moved(kind):
    """Catches: an anchor that aliases the parameters, a flag that stays on, gradients into the student through the anchor."""
    _, layer, x = make_layer(kind)
    model = nn.Sequential(layer)
    initial = model(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moved = model(x).detach()
    assert not torch.equal(moved, initial)
    with anchored(model):
        assert torch.equal(model(x), initial) and not model(x).requires_grad
        with anchored(model):
            pass
        assert torch.equal(model(x), initial)
    assert torch.equal(model(x), moved)
    with pytest.raises(KeyError), anchored(model):
        raise KeyError
    assert torch.equal(model(x), moved)


def test_anchor_state_round_trips_and_its_absence_is_named():
    """Catches: resuming with the moved A, B as anchor, a deployed model silently its own anchor."""
    _, layer, x = make_layer("linear")
    model = nn.ModuleDict({"a": layer, "plain": nn.Linear(2, 2), "flat": make_layer("linear", rank=0)[1]})
    with anchored(model):
        initial = layer(x)
    state = load(save(anchor_state(model)))
    assert set(state) == {"a.anchor_A", "a.anchor_B"}
    layer.set_anchor()
    layer.anchor_A.zero_()
    load_anchor_state(model, state)
    with anchored(model):
        assert torch.equal(layer(x), initial)
    with pytest.raises(ValueError, match="does not fit layer 'a'"):
        load_anchor_state(model, {})
    layer.anchor_A = None
    with pytest.raises(ValueError, match="layer 'a' has no anchor"), anchored(model):
        pass


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_merged_layer_is_the_requantized_sum_without_a_branch(kind):
    """Catches: A B for B A, merging into the float weight, a branch that survives, the original changed."""
    _, layer, x = make_layer(kind, rank=3)
    before = layer(x).detach()
    merged = merged_layer(layer)
    target = kernels.dequantize(layer.packed) + layer.lora_B.detach() @ layer.lora_A.detach()
    expected = quant.quantize_weight(target, layer.group, layer.taps)
    assert torch.equal(kernels.dequantize(merged.packed), quant.dequantize(expected))
    assert merged.rank == 0 and merged.lora_A is None and not list(merged.parameters())
    assert set(merged.state_dict()) == {"codes_OP", "mult_P", "scale_O", "inv_smooth", "bias"}
    assert torch.equal(layer(x), before)
    x64 = x.double()
    exact = surrogate(kind, layer, x64, layer.lora_A.detach().double(), layer.lora_B.detach().double())
    branch_error, merged_error = ((y.double() - exact).norm() / exact.norm() for y in (before, merged(x)))
    assert branch_error < merged_error < 0.3, "merging costs rounding error, but remains the same function"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora_bits", [16, 8])
def test_a_layer_of_rank_0_has_no_branch_and_is_merged_as_it_is(kind, lora_bits):
    """Catches: empty factors that are stored or trained, and Q rounded a second time."""
    _, layer, x = make_layer(kind, rank=0)
    if lora_bits == 8:
        layer.store_8bit()
    assert not list(layer.parameters()) and not [key for key in layer.state_dict() if "lora" in key]
    assert not anchor_state(nn.Sequential(layer))
    merged = merged_layer(layer)
    assert merged is not layer and torch.equal(merged(x), layer(x))
    with anchored(layer):
        assert torch.equal(merged(x), layer(x))


FACTORS = st.sampled_from(["normal", "outlier", "zero", "constant", "tiny", "zero component"])


def draw(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    m = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        m[:, :1] *= 20
    return {"zero": m * 0, "constant": torch.full_like(m, 0.1), "tiny": m * 1e-12}.get(kind, m)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), FACTORS, st.integers(0, 999))
@example(O=3, K=5, rank=0, kind="normal", seed=0)
@example(O=1, K=1, rank=2, kind="zero component", seed=0)
def test_lora_in_8_bits_moves_no_entry_by_more_than_half_a_step(O, K, rank, kind, seed):
    """Catches: one scale for all ranks, scales of the other axis, codes that wrap at 128, NaN from a component of zeros."""
    A, B = draw(rank, K, kind, seed) * 3e-3, draw(O, rank, kind, seed + 7)
    if rank and kind == "zero component":
        A[0], B[:, -1] = 0, 0
    qA, qB, scale = quantize_lora(A, B)
    assert qA.dtype == qB.dtype == torch.int8 and scale.dtype == torch.float32
    assert (qA.shape, qB.shape, scale.shape) == ((rank, K), (O, rank), (2, rank))
    A8, B8 = dequantize_lora(qA, qB, scale)
    assert A8.shape == A.shape and B8.shape == B.shape and A8.dtype == B8.dtype == torch.float32
    a_r, b_r = scale.double()
    slack = 1 + 1e-5  # float32 division by the scale
    assert ((A8 - A).abs() <= a_r[:, None] / 2 * slack).all() and ((B8 - B).abs() <= b_r / 2 * slack).all()
    if rank:
        assert torch.allclose(a_r, A.double().abs().amax(1) / 127) and torch.allclose(b_r, B.double().abs().amax(0) / 127)
        assert qA.abs().max() <= 127 and qB.abs().max() <= 127
        moved = (B8.double()[:, :, None] * A8.double() - B.double()[:, :, None] * A.double()).abs()
        assert (moved <= (a_r * b_r * 127.25 * slack)[None, :, None]).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), FACTORS, st.integers(0, 999))
@example(O=1, K=2, rank=3, kind="normal", seed=0)
def test_mixing_keeps_the_product_and_the_shapes(O, K, rank, kind, seed):
    """Catches: a rotation on one side only, components lost where the rank is larger than the layer."""
    A, B = draw(rank, K, kind, seed), draw(O, rank, kind, seed + 7)
    mixed_A, mixed_B = mix_lora(A, B)
    assert (mixed_A.shape, mixed_B.shape) == (A.shape, B.shape) and mixed_A.dtype == mixed_B.dtype == torch.float32
    product = B.double() @ A.double()
    assert (mixed_B.double() @ mixed_A.double() - product).norm() <= 1e-5 * product.norm() + 1e-30


def test_mixing_lowers_the_error_of_8_bits_where_components_are_unequal():
    """Catches: an identity for a rotation, strong components left in one row."""
    torch.manual_seed(0)
    strength = torch.logspace(0, -2, 16)
    A, B = strength[:, None].sqrt() * torch.randn(16, 300), torch.randn(200, 16) * strength.sqrt()

    def error(A1, B1):
        A8, B8 = dequantize_lora(*quantize_lora(A1, B1))
        return (B8 @ A8 - B @ A).norm()

    expected = strength.sum() / (16**0.5 * strength.norm())  # of the module docstring
    assert error(*mix_lora(A, B)) < 1.2 * expected * error(A, B)


def test_lora_that_is_no_number_is_refused_in_8_bits():
    """Catches: int8 codes of NaN, which are ordinary numbers."""
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="LoRA factors contain inf or NaN"):
            quantize_lora(A * bad, B)
        with pytest.raises(ValueError, match="LoRA factors contain inf or NaN"):
            quantize_lora(A, B * bad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,smooth,bias", [(3, True, True), (0, False, False)])
def test_deployed_form_is_the_kernel_with_factors_in_8_bits(kind, rank, smooth, bias):
    """Catches: scales of weights that change in their byte, factors in another dtype than x, a Parameter that stays behind."""
    layer, packed, x = make_layer(kind, rank=rank, smooth=smooth, bias=bias)
    stored = copy.deepcopy(packed)
    stored.store_8bit()
    stored.store_8bit()  # once is enough
    reference = copy.deepcopy(packed).requires_grad_(False)
    if rank:
        A8, B8 = dequantize_lora(*quantize_lora(*mix_lora(packed.lora_A, packed.lora_B)))
        reference.lora_A.data, reference.lora_B.data = A8, B8
        assert not torch.equal(A8, packed.lora_A)
    for dtype in (torch.float32, torch.bfloat16):
        for model in (stored, copy.deepcopy(stored).to(torch.bfloat16)):  # casts nothing
            assert torch.equal(model(x.to(dtype)), deployed(kind, reference, x.to(dtype)))
    assert not list(stored.parameters())
    state = stored.state_dict()
    lora = {"lora_A", "lora_B", "lora_scale"} if rank else set()
    optional = ({"inv_smooth"} if smooth else set()) | ({"bias"} if bias else set())
    optional |= {"shift", "bias"} if kind == "rotated" else set()
    assert set(state) == {"codes_OP", "mult_P", "scale_O"} | lora | optional
    assert state["scale_O"].dtype == torch.uint8 and all(state[k].dtype == torch.int8 for k in lora - {"lora_scale"})
    twin = type(stored)(layer, rank, 16, 8, smooth, 8, stored.rotated, kind == "rotated")
    twin.load_state_dict(load(save(state)))
    assert torch.equal(twin(x), stored(x))
    on_meta = type(stored)(copy.deepcopy(layer).to("meta"), rank, 16, 8, smooth, 8, stored.rotated, kind == "rotated").state_dict()
    assert {k: (v.shape, v.dtype) for k, v in on_meta.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_deployed_form_has_a_gradient_for_its_input_alone(kind):
    """Catches: a backward without the branch, with int8 factors, or one that asks for their gradients."""
    _, packed, x = make_layer(kind)
    stored = copy.deepcopy(packed)
    store_8bit(nn.Sequential(stored))
    packed.lora_A.data, packed.lora_B.data = stored.factors()
    for layer in (packed, stored):
        assert not layer(x).requires_grad or layer is packed
    grads = []
    for layer in (packed.requires_grad_(False), stored):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_deployed_form_merges_and_anchors_like_the_layer_with_its_factors(kind):
    """Catches: a merge of int8 codes as if they were numbers, a float scale in a merged deployed layer, an anchor in int8."""
    _, packed, x = make_layer(kind)
    stored = copy.deepcopy(packed)
    stored.store_8bit()
    packed.lora_A.data, packed.lora_B.data = stored.factors()
    merged, expected = merged_layer(stored), merged_layer(packed)
    assert torch.equal(merged(x), expected(x)) and merged.lora_A is None and merged.lora_scale is None
    assert merged.scale_O.dtype == torch.uint8 and torch.equal(kernels.unpack_scales(merged.scale_O), expected.scale_O)
    with pytest.raises(ValueError, match="has no anchor"), anchored(stored):
        pass
    packed.set_anchor()
    load_anchor_state(stored, anchor_state(packed))
    with anchored(stored):
        assert torch.equal(stored(x), packed(x))
    stored.set_anchor()
    assert stored.anchor_A.dtype == torch.float32 and torch.equal(stored.anchor_A, packed.anchor_A)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_8_bits_of_lora_add_less_than_2_percent_to_the_error_of_4_bits(rank, smooth):
    """Catches: a scale for all ranks (weak components lost), 7 bits, a scale that is rounded. Rank 64 carries most of this W."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 192), torch.randn(512, 256)
    lam = torch.rand(256) + 0.5 if smooth else None
    w, x1 = (layer.weight.detach(), x) if lam is None else (layer.weight.detach() * lam, x / lam)
    gw, A, B = hgs_lora.decompose(w, x1.mT @ x1 / len(x), rank)
    packed = W4A4Linear.from_float(layer, gw, A, B, lam)
    with torch.no_grad():
        four = packed(x)
        packed.store_8bit()
        eight, exact = packed(x), layer(x)
    assert not torch.equal(eight, four)
    assert (eight - exact).norm() < 1.02 * (four - exact).norm()


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5])
def test_native_backend_runs_the_deployed_form_at_any_rank(rank):
    """Catches: bytes of scales or int8 factors handed to C++, ranks that do not fill its registers."""
    for kind in KINDS:
        _, layer, x = make_layer(kind, rank=rank)
        layer.store_8bit()
        eager = layer(x)
        set_backend(layer, "native")
        assert torch.allclose(layer(x), eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rotated", "rotated conv"])
def test_a_rotated_and_centred_layer_computes_the_layer_that_it_was_made_of(kind, bias, rank):
    """Catches: a constant W c of the rotated, smoothed or quantized weight, of the branch too, a branch that is not turned back."""
    torch.manual_seed(1)
    x = torch.randn(64, 32, 6, 6) if "conv" in kind else torch.randn(512, 32) + 20 * torch.randn(32)
    layer = nn.Conv2d(32, 24, 3, padding=1, bias=bias) if "conv" in kind else nn.Linear(32, 24, bias=bias)
    lam = torch.rand(32) + 0.5
    w_OK, taps = (quant.flatten_conv(layer.weight), 9) if "conv" in kind else (layer.weight, 1)
    w_OK = quant.rotate_taps((w_OK * lam.repeat(taps)).detach(), taps)
    gw, A, B = hgs_lora.decompose(w_OK, torch.eye(len(w_OK[0])), rank, group=16, taps=taps)
    cls, shift = (W4A4Conv2d, None) if "conv" in kind else (W4A4Linear, x.mean(0) / lam)
    packed = cls.from_float(layer, gw, A, B, lam, 8, True, shift)
    with torch.no_grad():
        exact = layer(x)
        for made in (packed, merged_layer(packed)):
            assert (made(x) - exact).norm() < 0.2 * (exact - exact.mean(0)).norm()
        w_hat = quant.rotate_taps(quant.dequantize(gw), taps) + (packed.lora_B @ packed.lora_A if rank else 0)
        assert torch.allclose(packed.merged_weight(*packed.factors()), w_hat, atol=1e-5)


def test_replace_finds_nested_and_numbered_modules_and_names_a_missing_one():
    """Catches: setattr with dots in the name, a typo that adds a new module."""
    model = nn.Sequential(nn.ModuleDict({"to_q": nn.Linear(20, 12)}), nn.Linear(12, 2))
    _, layer, _ = make_layer("linear")
    replace_layer(model, "0.to_q", layer)
    assert model[0]["to_q"] is layer and [name for name, _ in packed_layers(model)] == ["0.to_q"]
    with pytest.raises(ValueError, match=r"'0\.to_k' is not in the model"):
        replace_layer(model, "0.to_k", layer)
    assert "to_k" not in model[0]


def test_constructors_refuse_what_the_kernels_cannot_do():
    """Catches: silent drop of dilation or groups, a rank above the layer, a grid weight of another layer."""
    for conv in (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3, padding="same")):
        with pytest.raises(ValueError, match="W4A4Conv2d needs"):
            W4A4Conv2d(conv, 2, 8)
    with pytest.raises(ValueError, match="rank 5"):
        W4A4Linear(nn.Linear(8, 4), 5, 8)
    with pytest.raises(ValueError, match="group size"):
        W4A4Linear(nn.Linear(8, 4), 2, 8, group_x=12)
    with pytest.raises(ValueError, match="8 or 16 bits, not 4"):
        W4A4Linear(nn.Linear(8, 4), 2, 8, lora_bits=4)
    with pytest.raises(ValueError, match="8 channels and 1 taps"):
        W4A4Linear.from_float(nn.Linear(16, 4), quant.quantize_weight(torch.randn(4, 8), 8))


def test_set_backend_selects_the_kernel_in_training_and_inference(monkeypatch):
    """Catches: a switch that reaches only one of the two paths, or not every layer."""
    used = []

    def other(fn):
        def call(*args):
            used.append(fn.__name__)
            return fn(*args)

        return call

    monkeypatch.setitem(kernels.BACKENDS, "other", other)
    for kind in KINDS:
        _, layer, x = make_layer(kind)
        eager = layer(x)
        set_backend(nn.Sequential(layer), "other")
        assert torch.equal(layer(x), eager)
        with torch.no_grad():
            layer(x)
        set_backend(layer, "eager")
        layer(x)
    kernels_of_kinds = ("w4a4_linear", "w4a4_conv2d", "w4a16_linear", "w4a4_linear", "w4a4_conv2d")
    assert used == [kernel for kernel in kernels_of_kinds for _ in range(2)]


@pytest.mark.slow
def test_compiled_layer_equals_eager_bit_for_bit():
    """Catches: a kernel call that torch.compile cannot trace through the layer, or evaluates differently."""
    _, layer, x = make_layer("linear")
    eager = layer(x)
    set_backend(layer, "compile")
    assert torch.equal(layer(x), eager)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_hgs_layer_is_closer_to_the_float_layer_than_zero_init(kind):
    """Catches: any slip between decompose and forward (smoothing not folded, branch on the wrong input)."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1) if kind == "conv" else nn.Linear(64, 64)
    x = torch.randn(8, 32, 8, 8) if kind == "conv" else torch.randn(256, 64) @ torch.randn(64, 64)
    x[:, :2] *= 20
    (stats,) = next(hessian.collect_passes(layer, [""], lambda set_bin: layer(x))).values()
    w_OK, taps = (quant.flatten_conv(layer.weight), 9) if kind == "conv" else (layer.weight, 1)
    cls, error = (W4A4Conv2d if kind == "conv" else W4A4Linear), {}
    for method in ("zero", "hgs"):
        for alpha in (None, 0.5):
            lam, w, H = None, w_OK.detach(), stats.H_KK
            if alpha:
                lam = quant.smoothing_factors(stats.absmax_BinI.amax(0), w.unflatten(1, (taps, -1)).abs().amax((0, 1)), alpha)
                w, H = w * lam.repeat(taps), H / lam.repeat(taps) / lam.repeat(taps)[:, None]
            gw, A, B = hgs_lora.decompose(w, H, 8, method, group=32, taps=taps)
            packed = cls.from_float(layer, gw, A, B, lam)
            with torch.no_grad():
                error[method, alpha] = float((packed(x) - layer(x)).norm() / layer(x).norm())
    assert error["hgs", None] < 0.85 * error["zero", None] and error["hgs", 0.5] < 0.7 * error["zero", 0.5], error


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_activations_in_8_bits_leave_the_error_of_the_weight(kind):
    """Catches a layer that keeps 4 bits, a deployed or merged form that goes back to them, a name that does not say so."""
    layer, eight, x = make_layer(kind, group_x=quant.EIGHT_BITS, smooth=False, I=64)
    _, four, _ = make_layer(kind, group_x=16, smooth=False, I=64)
    exact = F.conv2d(x, unflat(eight), layer.bias, 2, 1) if kind == "conv" else F.linear(x, unflat(eight), layer.bias)
    errors = [(packed(x) - exact).norm() / exact.norm() for packed in (eight, four)]
    assert errors[0] < 0.5 * errors[1]
    merged = merged_layer(eight)
    assert merged.group_x == quant.EIGHT_BITS and "8-bit activations" in repr(merged) and "group_x=16" in repr(four)
    sixteen = make_layer("w4a16", group_x=16, smooth=False, I=64)[1]  # rounds no activations
    named = {"W4A8": [merged, eight, sixteen], "W4A4": [four, sixteen], "W4A4/8": [four, merged]}
    assert {name: number_format(nn.Sequential(*mixed)) for name, mixed in named.items()} == {name: name for name in named}


def unflat(packed):
    """W^ + B A in the float layer's shape."""
    w_OK = packed.merged_weight(*packed.factors()).detach()
    return quant.unflatten_conv(w_OK, (3, 3)) if packed.taps == 9 else w_OK
