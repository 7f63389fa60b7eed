"""Packed storage and kernels against three oracles: bit-exact unpacking, float64 sums of integers, and float64 products of
the dequantized operands within a tolerance derived from dtype and size. Docstrings name the mutation that a test catches."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
import quant
from backends import cpu

seeds = st.integers(0, 2**16)
groups = st.sampled_from([8, 16, 32, 64, 128])
groups_x = st.sampled_from([quant.EIGHT_BITS, 8, 16, 32, 64, 128])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ranks = st.sampled_from([None, 0, 1, 2, 3, 5, 17])  # None: no factors
EAGER = (kernels.w4a4_linear, kernels.w4a4_conv2d)
backends = pytest.mark.parametrize("backend", ["eager", "native"])
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def gen(seed):
    return torch.Generator().manual_seed(seed)


def grid_weight(O, I, group=64, taps=1, seed=0):
    """Every code and multiplier, not only those that the search would find."""
    g = gen(seed)
    Kp = taps * -(-I // group) * group
    codes = torch.randint(-8, 8, (O, Kp), generator=g, dtype=torch.int8)
    codes.view(O, taps, -1)[:, :, I:] = 0
    mult = torch.randint(1, 17, (O, Kp // group), generator=g, dtype=torch.uint8)
    scale = quant.round_scale(torch.rand(O, generator=g) / Kp**0.5 / 40)
    return quant.GridWeight(codes, mult, scale, I, taps, group)


def on(backend):
    """(linear, conv2d) of a backend; the test is skipped where backends/cpu.cpp cannot be built."""
    if backend == "native" and not cpu.is_available():
        pytest.skip("backends/cpu.cpp needs an x86 CPU with AVX2 and a C++ compiler")
    return [kernels.BACKENDS[backend](fn) for fn in EAGER]


def operands(O, I, taps=1, rank=4, seed=0):
    """bias, A, B, inv_smooth; A and B are None where rank is."""
    g = gen(seed + 1)
    A = torch.randn(rank or 0, taps * I, generator=g) / (taps * I) ** 0.5
    bias, B, inv_smooth = torch.randn(O, generator=g), torch.randn(O, rank or 0, generator=g) / 2, torch.rand(I, generator=g) + 0.5
    return bias, *((None, None) if rank is None else (A, B)), inv_smooth


def tolerance(main, branch, terms, dtype):
    """Rounding of y = (int32 -> float, * s_x, * s_w, + bias, + branch) in float32 and of the branch and y in dtype.

    main = |s_x s_w acc| + |bias|, branch = |x'| |A|^T |B|^T (magnitudes, so they bound every partial sum), terms = the
    length of the branch's sums. x', A, B, x' A^T and the branch itself are rounded to dtype, y once more."""
    u, ud = UNIT[torch.float32], UNIT[dtype]
    return 1.1 * (6 * u * (main + branch) + (5 * ud + terms * u) * branch + ud * (main + branch)) + 1e-7


# ------------------------------------------------------------------------------------------------ layout


def test_unpack_inverts_pack_for_every_pair_of_codes():
    """Catches a lost bit, sign extension, nibbles that overwrite each other."""
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    codes = torch.cat([low, high], 1).to(torch.int8)
    assert torch.equal(kernels.unpack_codes(kernels.pack_codes(codes)), codes)


def test_bytes_hold_the_first_half_of_a_row_in_their_low_nibbles():
    """Catches swapped nibbles, neighbours in one byte, a zero point of the other sign: packing and unpacking alike."""
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, -1, -8]], dtype=torch.int8)
    assert kernels.pack_codes(codes).tolist() == [[0x90, 0xA1, 0x78, 0x0F]]
    assert kernels.pack_multipliers(torch.tensor([[1, 2, 16], [3, 4, 5]], dtype=torch.uint8)).tolist() == [0x10, 0x2F, 0x43]
    assert kernels.pack_scales(torch.tensor([2.0**-26, 1.125, 60.0])).tolist() == [0, 26 * 8 + 1, 255]


@given(st.integers(1, 9), st.integers(1, 150), groups, st.integers(1, 4), seeds)
@example(1, 1, 8, 1, 0)
@example(3, 64, 64, 3, 0)
def test_unpack_inverts_pack_for_every_shape(O, I, group, taps, seed):
    """Catches an odd number of groups (half a group in each nibble half, half a byte of multipliers)."""
    gw = grid_weight(O, I, group, taps, seed)
    pw = kernels.pack(gw)
    back = kernels.unpack(pw)
    assert torch.equal(back.codes_OK, gw.codes_OK) and torch.equal(back.mult_OG, gw.mult_OG)
    assert torch.equal(back.scale_O, gw.scale_O) and (back.channels, back.taps, back.group) == (I, taps, group)
    assert torch.equal(kernels.weight_int8(pw), gw.int8())
    assert torch.equal(kernels.dequantize(pw), quant.dequantize(gw))
    G = gw.mult_OG.shape[1]
    assert pw.codes_OP.nbytes == O * G * group // 2 and pw.mult_P.nbytes == -(-O * G // 2)


def test_four_lane_unpacking_is_exact_for_every_code_and_multiplier():
    """Catches a carry between lanes, +8m in place of -8m, a missing XOR."""
    codes, mult = torch.meshgrid(torch.arange(-8, 8), torch.arange(1, 17), indexing="ij")
    for lane in range(8):  # the code under test among seven others, in either half
        q = torch.where(torch.arange(8) == lane, codes.reshape(-1, 1), -codes.reshape(-1, 1).clamp(-7, 7))
        gw = quant.GridWeight(q.to(torch.int8), mult.reshape(-1, 1).to(torch.uint8), torch.ones(256), 8, 1, 8)
        assert torch.equal(kernels.weight_int8(kernels.pack(gw)).long(), q * mult.reshape(-1, 1))


def test_unpack_inverts_pack_for_every_scale():
    """Catches a wrong exponent bias or a sign bit in the byte; other floats are refused, never rounded."""
    codes = torch.arange(256, dtype=torch.uint8)
    scales = kernels.unpack_scales(codes)
    assert torch.equal(kernels.pack_scales(scales), codes) and torch.equal(quant.round_scale(scales), scales)
    for bad in (0.1, 0.0, -1.0, 2.0**-27, 64.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="8-bit"):
            kernels.pack_scales(torch.tensor([bad]))


@pytest.mark.parametrize("K", [64, 1280])
def test_packed_weights_take_at_most_4_1_bits_from_640_columns_on(K):
    """Catches float32 scales or byte multipliers in the checkpoint: 4 + 4/64 + 8/K bits."""
    pw = kernels.pack(grid_weight(16, K))
    bits = 8 * sum(t.nbytes for t in (pw.codes_OP, pw.mult_P, kernels.pack_scales(pw.scale_O))) / (16 * K)
    assert bits == 4 + 4 / 64 + 8 / K


# ------------------------------------------------------------------------------------------------ linear


products = pytest.mark.parametrize("product", [kernels.int8_matmul, kernels.int8_matmul_in_float])  # one machine runs both


@products
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 80), seeds)
@example(17, 8, 64, 0)
def test_int32_sums_equal_the_float64_oracle_exactly(product, T, O, K8, seed):
    """Catches a saturating or float32 accumulator, a transposed operand."""
    X, W = (torch.randint(-128, 113, (n, 8 * K8), generator=gen(seed + n), dtype=torch.int8) for n in (T, O))
    Y = product(X, W)
    assert Y.dtype == torch.int32 and torch.equal(Y.double(), X.double() @ W.double().t())


@products
@pytest.mark.parametrize("a,b", [(-128, 112), (-127, 111)])
def test_int32_sums_are_exact_at_the_extremes(product, a, b):
    """Catches int16 or float32 partial sums: 15360 products of -127 * -127 are 2^27.9 and odd numbers on the way."""
    X = torch.full((17, 15361), a, dtype=torch.int8)
    X[1] = b
    assert product(X, X[:8])[:2, :2].tolist() == [[15361 * a * a, 15361 * a * b], [15361 * a * b, 15361 * b * b]]


@backends
@given(
    st.integers(0, 20), st.integers(1, 40), st.integers(1, 150), groups, groups_x, dtypes,
    st.booleans(), ranks, st.booleans(), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@example(5, 8, 100, 64, 128, torch.float32, True, 4, True, False, False, 0)
@example(5, 8, 100, 128, 8, torch.float32, True, 1, True, True, True, 0)
@example(9, 20, 70, 64, 16, torch.bfloat16, False, 3, True, True, False, 0)
@example(9, 20, 75, 8, quant.EIGHT_BITS, torch.float32, True, 3, True, False, False, 0)
@example(9, 20, 75, 8, quant.EIGHT_BITS, torch.float32, True, 3, False, True, True, 0)
def test_linear_equals_the_product_of_its_dequantized_operands(
    backend, T, O, I, group, group_x, dtype, bias, rank, smooth, rotated, centred, seed
):
    """Catches swapped scales, a branch on the quantized, unsmoothed or centred input, bias added before scaling, smoothing by
    lambda in place of 1 / lambda, misaligned groups when two group sizes differ, a rank that is not padded, a shift after the
    rotation."""
    I = -(-I // quant.TURN) * quant.TURN if rotated else I
    shift = torch.randn(I, generator=gen(seed + 2)) if centred else None
    gw = grid_weight(O, I, group, seed=seed)
    x = torch.randn(T, I, generator=gen(seed)).to(dtype)
    b, A, B, inv = operands(O, I, rank=rank, seed=seed)
    b, inv = b if bias else None, inv if smooth else None
    linear, _ = on(backend)
    y = linear(x, kernels.pack(gw), b, A, B, inv, group_x, shift, rotated)
    assert y.dtype == dtype and y.shape == (T, O)

    x1 = x.float() * inv if smooth else x.float()
    z = x1 - shift if centred else x1
    z = quant.rotate(z) if rotated else z
    x_hat = quant.dequantize_activation(*quant.quantize_activation(z, group_x), I).double()
    main = x_hat @ quant.dequantize(gw).double().t()
    b = b.double() if bias else torch.zeros(O).double()
    branch, size = (
        f(x1.double()) @ f(A.double()).t() @ f(B.double()).t() if rank else torch.zeros(()) for f in (torch.clone, torch.abs)
    )
    # an int8 matrix's sums are exact, so main's rounding is relative to the sum itself, not to its terms; x_hat and w_hat
    # above are products of two and three floats, 3 roundings of every term
    spread = (x_hat.abs() @ quant.dequantize(gw).double().abs().t()) * 4 * 2.0**-24
    tol = tolerance(main.abs() + b.abs(), size, I + 4, dtype) + spread
    assert ((y.double() - (main + b + branch)).abs() <= tol).all()


@backends
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 40), dtypes, seeds)
def test_leading_dimensions_and_strides_do_not_matter(backend, N, T, I, dtype, seed):
    """Catches a view of non-contiguous memory, leading dimensions that get mixed, a crash on zero tokens."""
    linear, _ = on(backend)
    pw, ops = kernels.pack(grid_weight(24, I, 8, seed=seed)), operands(24, I, seed=seed)
    x = torch.randn(I, T, N, generator=gen(seed)).to(dtype).permute(2, 1, 0)
    y = linear(x, pw, *ops)
    assert y.shape == (N, T, 24)
    flat = linear(x.contiguous().view(N * T, I), pw, *ops)
    assert torch.allclose(
        y.flatten(0, 1).float(), flat.float(), rtol=4 * UNIT[dtype], atol=1e-3 if dtype != torch.float32 else 1e-5
    )
    main_only = [linear(v, pw, ops[0]) for v in (x, x.contiguous())]
    assert torch.equal(*main_only)
    if T:
        assert torch.equal(linear(x[0, 0], pw, ops[0]), main_only[0][0, 0])


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group_x", [16, quant.EIGHT_BITS])
def test_bad_inputs_make_their_row_or_sample_nan_and_no_other(backend, bad, group_x):
    """Catches inf that turns into a large finite row, poison that spreads over the batch."""
    linear, conv2d = on(backend)
    x = torch.randn(4, 40, 3, 3, generator=gen(0))
    x[2, 7, 1, 1] = bad
    y = conv2d(x, kernels.pack(grid_weight(8, 40, 16, 9)), None, None, None, None, group_x)
    assert y.isnan().flatten(1).all(1).tolist() == [False, False, True, False] and y.isfinite().flatten(1).any(1).tolist()[3]
    y = linear(x[..., 1, 1], kernels.pack(grid_weight(8, 40, 16)), None, None, None, None, group_x)
    assert y.isnan().all(1).tolist() == [False, False, True, False] and not y[3].isnan().any()


@backends
def test_zero_inputs_give_the_bias(backend):
    """Catches 0 * inf from a zero scale, a zero point left in the sums."""
    b = torch.randn(24, generator=gen(0))
    x = torch.zeros(5, 40)
    assert torch.equal(on(backend)[0](x, kernels.pack(grid_weight(24, 40, 16)), b), b.expand(5, 24))


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 100), dtypes, ranks, seeds)
def test_w4a16_equals_the_product_with_the_dequantized_weight(T, O, I, dtype, rank, seed):
    """Catches quantized activations where there should be none, a weight that is not rounded to the input's dtype."""
    gw = grid_weight(O, I, 16, seed=seed)
    b, A, B, _ = operands(O, I, rank=rank, seed=seed)
    x = torch.randn(T, I, generator=gen(seed)).to(dtype)
    y = kernels.w4a16_linear(x, kernels.pack(gw), b, A, B)
    w = quant.dequantize(gw).double()
    ref, size = x.double() @ w.t() + b, x.double().abs() @ w.t().abs() + b.abs()
    if rank:
        ref, size = (
            ref + x.double() @ A.double().t() @ B.double().t(),
            size + x.double().abs() @ A.double().t().abs() @ B.double().t().abs(),
        )
    assert y.dtype == dtype and ((y.double() - ref).abs() <= (6 * UNIT[dtype] + (I + 8) * UNIT[torch.float32]) * size + 1e-7).all()


# ------------------------------------------------------------------------------------------------ convolution

geometries = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)),
)


@backends
@given(
    geometries, st.integers(0, 3), st.integers(1, 12), st.integers(1, 70), groups, groups_x, dtypes, ranks, st.booleans(),
    st.booleans(), seeds,
)  # fmt: skip
@example(((3, 3), (1, 1), (1, 1)), 2, 8, 64, 64, 16, torch.float32, 4, True, True, 0)
@example(((3, 3), (2, 2), (1, 1)), 2, 8, 12, 64, 16, torch.bfloat16, 3, False, False, 0)
@example(((1, 1), (2, 2), (0, 0)), 2, 8, 64, 64, 16, torch.float32, 1, True, False, 0)
@example(((3, 1), (1, 2), (0, 2)), 1, 8, 65, 8, 128, torch.float16, 5, True, True, 0)
@example(((3, 3), (2, 2), (1, 1)), 2, 8, 65, 16, quant.EIGHT_BITS, torch.float32, 3, True, False, 0)
@example(((3, 3), (2, 2), (1, 1)), 2, 8, 65, 16, quant.EIGHT_BITS, torch.float32, 3, True, True, 0)
def test_conv_equals_the_convolution_of_its_dequantized_operands(
    backend, geometry, N, O, I, group, group_x, dtype, rank, smooth, rotated, seed
):
    """Catches taps or kernel axes in another order than the weight's, padding by something else than zero, swapped strides,
    a scale of another sample, a branch on the quantized input."""
    kernel_size, stride, padding = geometry
    taps, I = kernel_size[0] * kernel_size[1], -(-I // quant.TURN) * quant.TURN if rotated else I
    gw = grid_weight(O, I, group, taps, seed)
    x = torch.randn(N, I, 5, 4, generator=gen(seed)).to(dtype)
    b, A, B, inv = operands(O, I, taps, rank, seed)
    inv = inv if smooth else None
    _, conv2d = on(backend)
    y = conv2d(x, kernels.pack(gw), b, A, B, inv, group_x, *geometry, rotated)

    x1 = x.permute(0, 2, 3, 1).float() * (inv if smooth else 1)
    z = quant.rotate(x1) if rotated else x1
    x_hat = quant.dequantize_activation(*quant.quantize_activation(z, group_x, per_sample=True), I).double()

    def conv(x_NHWC, w_OK):
        w = quant.unflatten_conv(w_OK.double(), kernel_size)
        return F.conv2d(x_NHWC.double().permute(0, 3, 1, 2), w, None, stride, padding).permute(0, 2, 3, 1)

    w_hat, b = quant.dequantize(gw), b.double()
    main, spread = conv(x_hat, w_hat), conv(x_hat.abs(), w_hat.abs()) * 4 * 2.0**-24
    branch, size = (conv(f(x1), f(A)) @ f(B).double().t() if rank else torch.zeros(()) for f in (torch.clone, torch.abs))
    tol = tolerance(main.abs() + b.abs(), size, I * taps + 4, dtype) + spread
    assert y.dtype == dtype and y.permute(0, 2, 3, 1).shape == main.shape
    assert ((y.permute(0, 2, 3, 1).double() - (main + b + branch)).abs() <= tol).all()


@backends
def test_rank_0_is_no_branch(backend):
    """Catches a convolution without outputs, which torch refuses, or a branch of padding."""
    linear, conv2d = on(backend)
    b, A, B, inv = operands(24, 40, 9, rank=0)
    x, pw = torch.randn(2, 40, 5, 5, generator=gen(0)), kernels.pack(grid_weight(24, 40, 16, 9))
    assert torch.equal(conv2d(x, pw, b, A, B, inv), conv2d(x, pw, b, None, None, inv))
    pw, A = kernels.pack(grid_weight(24, 40, 16)), A[:, :40]
    assert torch.equal(linear(x.flatten(2).mT, pw, b, A, B, inv), linear(x.flatten(2).mT, pw, b, None, None, inv))
    assert torch.equal(kernels.w4a16_linear(x.flatten(2).mT, pw, b, A, B), kernels.w4a16_linear(x.flatten(2).mT, pw, b))


ROWS = [((16, 1), (3, 3), (1, 1)), ((1, 32), (1, 3), (0, 1)), ((9, 3), (3, 3), (0, 0))]


@backends
@pytest.mark.parametrize("side, kernel_size, padding", ROWS)
def test_windows_that_lie_in_one_row_are_read_as_they_lie(backend, side, kernel_size, padding):
    """Catches windows that are a view with overlapping rows, which torch's int8 product misreads on CPUs with VNNI."""
    assert kernels.im2col(torch.zeros(1, *side, 64, dtype=torch.int8), kernel_size, (1, 1), padding).is_contiguous()
    I, O, taps = 64, 16, kernel_size[0] * kernel_size[1]
    gw, x = grid_weight(O, I, 64, taps, 0), torch.randn(1, I, *side, generator=gen(0))
    y = on(backend)[1](x, kernels.pack(gw), None, None, None, None, 16, kernel_size, (1, 1), padding)
    x_hat = quant.dequantize_activation(*quant.quantize_activation(x.permute(0, 2, 3, 1), 16, per_sample=True), I)
    x_hat, w_hat = x_hat.permute(0, 3, 1, 2).double(), quant.unflatten_conv(quant.dequantize(gw).double(), kernel_size)
    expected = F.conv2d(x_hat, w_hat, None, 1, padding)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("channels", (48, 60, 80, 4096))
def test_kernels_by_hand_refuse_an_input_of_another_width(channels):
    """Catches reads beyond the factors of the branch: garbage, NaN, or a segmentation fault."""
    pw, (_, A, B, _) = kernels.pack(grid_weight(32, 64, 64, 9, 0)), operands(32, 64, 9, seed=0)
    with pytest.raises(ValueError, match=f"x has {channels} channels, its weight 64"):
        kernels.native_conv2d(torch.zeros(1, channels, 4, 4), pw, None, A, B)
    pw, (_, A, B, _) = kernels.pack(grid_weight(32, 64, 64, 1, 0)), operands(32, 64, 1, seed=0)
    with pytest.raises(ValueError, match=f"x has {channels} channels, its weight 64"):
        kernels.native_linear(torch.zeros(3, channels), pw, None, A, B)


@backends
def test_a_width_without_whole_blocks_is_not_rotated(backend):
    """Catches a kernel by hand that rotates beyond its row: other rows' memory."""
    with pytest.raises(ValueError, match="40 channels do not divide into blocks of 16"):
        on(backend)[0](torch.zeros(3, 40), kernels.pack(grid_weight(8, 40, 8)), *[None] * 4, 16, None, True)


@backends
def test_conv_samples_do_not_depend_on_their_batch_or_memory_format(backend):
    """Catches a scale over the batch; the training batch and the deployed one must give the same picture."""
    _, conv2d = on(backend)
    x = torch.randn(4, 40, 6, 6, generator=gen(0))
    pw, b = kernels.pack(grid_weight(24, 40, 16, 9)), torch.randn(24, generator=gen(1))
    whole = conv2d(x, pw, b)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole, conv2d(x.contiguous(memory_format=torch.channels_last), pw, b))
    assert torch.equal(whole[2:3], conv2d(x[2:3], pw, b))


# ------------------------------------------------------------------------------------------------ backends/cpu.cpp


@given(
    geometries, st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), groups, groups_x, dtypes, st.booleans(),
    st.sampled_from([1e-42, 1e-38, 1e-3, 1, 1e4, 1e30]), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@example(((3, 3), (1, 1), (1, 1)), 1, 8, 120, 8, 8, torch.float32, False, 1, True, True, 0)
@example(((3, 3), (1, 1), (1, 1)), 1, 70, 120, 8, 16, torch.float32, False, 1e-42, False, False, 0)
@example(((3, 3), (1, 1), (1, 1)), 1, 70, 120, 8, 16, torch.bfloat16, True, 1e30, True, False, 0)
@example(((3, 3), (1, 1), (1, 1)), 2, 70, 120, 8, quant.EIGHT_BITS, torch.float32, True, 1, True, True, 0)
@example(((2, 3), (2, 1), (0, 2)), 1, 8, 33, 64, quant.EIGHT_BITS, torch.float16, False, 1e-42, False, False, 0)
def test_native_codes_sums_and_scaling_equal_eager_bit_for_bit(
    geometry, N, O, I, group, group_x, dtype, smooth, size, rotated, centred, seed
):
    """Catches rounding half away from zero, a contracted multiply-add, a group across the middle of a packed row, a column
    beyond the last full panel, sums without the offset of the codes, a rotation that adds in another order."""
    linear, conv2d = on("native")
    I = -(-I // quant.TURN) * quant.TURN if rotated else I
    shift = torch.randn(I, generator=gen(seed + 2)) * size if centred else None
    b, _, _, inv = operands(O, I, seed=seed)
    x = (torch.randn(N, I, 5, 4, generator=gen(seed)) * size).to(dtype)
    ops = (b, None, None, inv if smooth else None, group_x)
    pw = kernels.pack(grid_weight(O, I, group, seed=seed))
    tokens = x.flatten(2).mT
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # float16 has no 1e30: rows of NaN
    same(linear(tokens, pw, *ops, shift, rotated), kernels.w4a4_linear(tokens, pw, *ops, shift, rotated))
    pw = kernels.pack(grid_weight(O, I, group, geometry[0][0] * geometry[0][1], seed))
    same(conv2d(x, pw, *ops, *geometry, rotated), kernels.w4a4_conv2d(x, pw, *ops, *geometry, rotated))


@pytest.mark.parametrize("group_x", [8, 32, 128, quant.EIGHT_BITS])
def test_native_sums_are_exact_at_the_extremes(group_x):
    """Catches byte products that saturate at int16, a chunk whose sums do not fit it. Rows of x quantize to the
    smallest code, the largest or both."""
    linear, _ = on("native")
    I = 1024
    x = torch.stack([-torch.ones(I), torch.ones(I), torch.ones(I).where(torch.arange(I) % 2 == 0, torch.tensor(-1.0))])
    codes = torch.tensor([-8, 7])[:, None].expand(2, I).to(torch.int8)
    gw = quant.GridWeight(codes, torch.full((2, I // 64), 16, dtype=torch.uint8), torch.ones(2), I, 1, 64)
    pw = kernels.pack(gw)
    q, m, _ = quant.quantize_activation(x, group_x)
    smallest, largest, most = (-128, 127, 1) if group_x == quant.EIGHT_BITS else (-8, 7, 16)
    assert q[0].unique().tolist() == [smallest] and q[1].unique().tolist() == [largest] and (m == most).all()
    assert torch.equal(linear(x, pw, None, None, None, None, group_x), kernels.w4a4_linear(x, pw, None, None, None, None, group_x))


@pytest.mark.parametrize("dtype", UNIT)
def test_native_results_do_not_depend_on_batch_or_threads(dtype):
    """Catches a sum whose order follows the split of the work, tiles that read or write their neighbours' rows."""
    linear, conv2d = on("native")
    threads = torch.get_num_threads()
    x, picture = torch.randn(61, 200, generator=gen(0)).to(dtype), torch.randn(5, 40, 7, 6, generator=gen(1)).to(dtype)
    pw, ops = kernels.pack(grid_weight(150, 200)), operands(150, 200, rank=20)
    conv_pw, conv_ops = kernels.pack(grid_weight(150, 40, 16, 9)), operands(150, 40, 9, rank=20)
    whole, drawn = linear(x, pw, *ops), conv2d(picture, conv_pw, *conv_ops)
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            assert torch.equal(linear(x, pw, *ops), whole) and torch.equal(conv2d(picture, conv_pw, *conv_ops), drawn)
            for rows in (slice(0, 1), slice(3, 30), slice(59, 61)):
                assert torch.equal(linear(x[rows], pw, *ops), whole[rows])
            assert torch.equal(conv2d(picture[2:4], conv_pw, *conv_ops), drawn[2:4])
    finally:
        torch.set_num_threads(threads)


def test_native_threads_may_have_no_rows():
    """Catches a division by the number of a thread's tiles: two tiles of six rows, one panel of columns, three threads."""
    linear, _ = on("native")
    threads = torch.get_num_threads()
    x, pw = torch.randn(12, 64, generator=gen(0)), kernels.pack(grid_weight(8, 64))
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x, pw), kernels.w4a4_linear(x, pw))
    finally:
        torch.set_num_threads(threads)


def test_native_results_do_not_depend_on_earlier_calls():
    """Catches scratch memory that is read before it is written: the padding of an odd rank, of channels, of a picture's border."""
    linear, conv2d = on("native")
    x, picture = torch.randn(9, 36, generator=gen(0)).bfloat16(), torch.randn(1, 36, 5, 5, generator=gen(1)).bfloat16()
    pw, ops = kernels.pack(grid_weight(70, 36)), operands(70, 36, rank=3)
    conv_pw, conv_ops = kernels.pack(grid_weight(70, 36, 64, 9)), operands(70, 36, 9, rank=3)
    first = linear(x, pw, *ops[:3]), conv2d(picture, conv_pw, *conv_ops)
    big = torch.full((90, 128), torch.nan).bfloat16()
    poison = torch.full((16, 128), torch.nan), torch.full((200, 16), torch.nan)
    assert linear(big, kernels.pack(grid_weight(200, 128)), None, *poison).isnan().all()
    assert torch.equal(linear(x, pw, *ops[:3]), first[0]) and torch.equal(conv2d(picture, conv_pw, *conv_ops), first[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend,field,copies", [("native", "VmHWM", 1), ("compile", "VmRSS", 7)])
def test_packed_weights_stay_packed(backend, field, copies):
    """Catches a cache of unpacked weights: over 48 calls of 16 layers memory grows by at most one int8 copy of the largest, and the
    C++ kernel's peak too. (torch.compile has several copies while a call runs, which the allocator may keep; not one a layer.)"""
    if backend == "native":
        on(backend)
    program = """
import re, sys, torch, kernels
def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
O = K = 2048
weights = [
    kernels.PackedWeight(torch.randint(0, 256, (O, K // 2), dtype=torch.uint8), torch.randint(0, 256, (O * K // 128,),
    dtype=torch.uint8), torch.full((O,), 2.0**-11), K, 1, 64) for _ in range(16)
]
f, x = kernels.BACKENDS[sys.argv[1]](kernels.w4a4_linear), torch.randn(8, K)
for i in range(20):
    f(x, weights[i % 2])  # compiles, and lets the allocator keep what it keeps
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
for i in range(48):
    f(x, weights[i % 16])
print((resident(sys.argv[2]) - before) / (O * K))
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    done = subprocess.run(
        [sys.executable, "-c", program, backend, field],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) <= copies


@pytest.mark.parametrize("lacks", ["compiler", "source", "setuptools", "quotation mark"])
def test_without_a_cpp_compiler_native_is_eager_after_one_warning(monkeypatch, tmp_path, lacks):
    """Catches a crash on machines without a compiler, an unwritable cache, a warning for every layer."""
    on("native")
    cpu.is_available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.setenv("CXX", {"compiler": "no-such-compiler", "quotation mark": "'c++"}.get(lacks, "c++"))
        if lacks == "source":
            patch.setattr(cpu, "source", (tmp_path / "cpu.cpp").read_text)
        elif lacks == "setuptools":  # which torch's module for extensions imports
            patch.setitem(sys.modules, "torch.utils.cpp_extension", None)
            patch.delattr(torch.utils, "cpp_extension", raising=False)
        pw, x = kernels.pack(grid_weight(64, 64)), torch.randn(20, 64)
        with pytest.warns(UserWarning, match="eager kernels run") as seen:
            for _ in range(2):
                assert torch.equal(kernels.native(kernels.w4a4_linear)(x, pw), kernels.w4a4_linear(x, pw))
    assert len(seen) == 1
    cpu.is_available.cache_clear()
    assert cpu.is_available() and not list(tmp_path.glob("cmquant/*.so"))


def test_native_runs_inside_of_a_compiled_function():
    """Catches an operator without a shape rule, or with a wrong one."""
    linear, _ = on("native")
    pw, ops = kernels.pack(grid_weight(64, 64)), operands(64, 64)
    fast = torch.compile(lambda x: linear(x.relu(), pw, *ops) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 64)
    assert torch.equal(fast(x), linear(x.relu(), pw, *ops) + 1)


# ------------------------------------------------------------------------------------------------ torch.compile


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_linear_equals_eager_bit_for_bit_with_one_graph_for_all_sizes():
    """Catches a function whose bits depend on fusion (x / c by reciprocal, fused multiply-add), recompilation per layer or rank."""
    fast, before = kernels.compiled(kernels.w4a4_linear), graphs()
    assert fast is kernels.compiled(kernels.w4a4_linear)
    shapes = ((64, 128, 256, 4), (100, 96, 256, 5), (33, 64, 192, 2), (256, 320, 1024, 3), (7, 48, 320, 7), (64, 64, 512, 16))
    for seed, (T, O, I, rank) in enumerate(shapes):
        pw, ops = kernels.pack(grid_weight(O, I, seed=seed)), operands(O, I, rank=rank, seed=seed)
        x = torch.randn(T, I, generator=gen(seed)) * 3
        x[0], x[1] = 0, torch.nan
        assert torch.equal(fast(x, pw, *ops).nan_to_num(7), kernels.w4a4_linear(x, pw, *ops).nan_to_num(7))
    assert graphs() - before == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 0, 1, 3])
def test_compiled_linear_equals_eager_in_bfloat16(rank):
    """Catches casts that a compiler removes (bf16 and back), an epilogue in bf16, a rank that cannot be compiled."""
    fast = kernels.compiled(kernels.w4a4_linear)
    for T in (64, 50):
        pw, ops = kernels.pack(grid_weight(96, 256, seed=T)), operands(96, 256, rank=rank, seed=T)[:3]
        x = (torch.randn(2, T, 256, generator=gen(T)) * 3).bfloat16()
        assert torch.equal(fast(x, pw, *ops), kernels.w4a4_linear(x, pw, *ops))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_conv_equals_eager_bit_for_bit_with_one_graph_for_batches(dtype):
    """Catches the same for convolutions; another batch size must not compile again."""
    fast, before = kernels.compiled(kernels.w4a4_conv2d), graphs()
    pw, ops = kernels.pack(grid_weight(32, 64, 64, 9)), operands(32, 64, 9)
    for N in (2, 5, 3):
        x = torch.randn(N, 64, 8, 8, generator=gen(N)).to(dtype).contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast(x, pw, *ops), kernels.w4a4_conv2d(x, pw, *ops))
    assert graphs() - before == 1


def test_without_a_cpp_compiler_the_eager_function_runs_after_one_warning(monkeypatch):
    """Catches a crash on machines without g++, a warning for every call, errors of other kinds that are swallowed."""
    from torch._inductor.exc import InvalidCxxCompiler

    error = InvalidCxxCompiler()

    def compile_that_fails(fn, dynamic):
        def call(*args):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile_that_fails)
    fast = kernels.compiled.__wrapped__(kernels.w4a4_linear)
    x, pw = torch.randn(3, 40), kernels.pack(grid_weight(8, 40, 16))
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as seen:
        assert all(torch.equal(fast(x, pw), kernels.w4a4_linear(x, pw)) for _ in range(2))
    assert len(seen) == 1
    error, fast = RuntimeError("other"), kernels.compiled.__wrapped__(kernels.w4a4_linear)
    with pytest.raises(RuntimeError, match="other"):
        fast(x, pw)


@pytest.mark.gpu
def test_cuda_sums_equal_the_cpu_sums():
    """Catches the padding that CUDA's _int_mm needs for few rows and odd widths."""
    for T, O in ((1, 8), (16, 12), (17, 12), (100, 64)):
        X, W = (torch.randint(-128, 113, (n, 64), generator=gen(n), dtype=torch.int8) for n in (T, O))
        assert torch.equal(kernels.int8_matmul(X.cuda(), W.cuda()).cpu(), kernels.int8_matmul(X, W))


@pytest.mark.gpu
def test_cuda_takes_a_transposed_first_operand():
    """Catches the view that diffusers makes of one picture's tokens, an order that cuBLAS does not know."""
    X, W = (torch.randint(-128, 113, (n, 64), generator=gen(n), dtype=torch.int8) for n in (100, 64))
    assert torch.equal(kernels.int8_matmul(X.cuda().t().contiguous().t(), W.cuda()).cpu(), kernels.int8_matmul(X, W))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "compile", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_layers_equal_the_cpu_s(backend, dtype, monkeypatch):
    """Catches an operand that stays on the CPU, other codes, and a compiled layer that is another one. A rounding of x that falls
    on the other side moves a code, so that few values may differ by more than the last bits. (cuDNN rounds a float32
    convolution, the branch, to tf32 unless it is told not to.)"""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    linear, conv = (kernels.BACKENDS[backend](fn) for fn in EAGER)
    ops = operands(64, 96)
    pw, x = kernels.pack(grid_weight(64, 96)), torch.randn(2, 50, 96, generator=gen(1)).to(dtype)
    taps = operands(32, 64, 9)
    pc, z = kernels.pack(grid_weight(32, 64, 64, 9)), torch.randn(2, 64, 8, 8, generator=gen(2)).to(dtype)

    pairs = [(linear, kernels.w4a4_linear, x, pw, ops), (conv, kernels.w4a4_conv2d, z, pc, taps)]
    for on_gpu, on_cpu, x, packed, rest in pairs:
        cuda = type(packed)(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in packed))
        ours, theirs = on_gpu(x.cuda(), cuda, *(t.cuda() for t in rest)).cpu().float(), on_cpu(x, packed, *rest).float()
        close = (ours - theirs).abs() <= 8 * UNIT[dtype] * theirs.abs().max()
        assert close.float().mean() > 0.98 and (ours - theirs).square().mean() < 1e-4 * theirs.square().mean()
