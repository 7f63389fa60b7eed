"""The INT4 grid against its equations. Each docstring names the mutation that its test would catch."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import quant

KINDS = ("normal", "constant", "zero", "outlier channel", "offset", "denormal", "negative")
kinds, seeds, rows = st.sampled_from(KINDS), st.integers(0, 2**16), st.integers(1, 9)
groups, widths = st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 150)
GAUSSIAN = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))


def draw(kind, *shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier channel":
        x[..., seed % shape[-1]] *= 100
    elif kind == "negative":
        x = -x.abs()
    elif kind in ("constant", "zero", "denormal"):
        x = torch.full(shape, {"constant": 0.7, "zero": 0.0, "denormal": 1e-40}[kind])
    elif kind == "offset":
        x = x + 50
    return x


def hessian(K, seed=0, damp=0.01):
    """Second moments of inputs with correlated channels of very different size."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * K, K, generator=gen, dtype=torch.float64)
    x = x @ (torch.eye(K) + torch.randn(K, K, generator=gen) / K**0.5).double() * torch.rand(K, generator=gen).double().add(0.1)
    H = x.t() @ x / len(x)
    return H + damp * H.diagonal().mean() * torch.eye(K)


def h_error(w, gw, H):
    e = (w - quant.dequantize(gw)).double()
    return ((e @ H) * e).sum(1)


def steps(mult, scale, group):
    """Distance of two codes at every element."""
    scale = scale.reshape(scale.shape + (1,) * (mult.dim() - scale.dim()))
    return (mult.float() * scale).repeat_interleave(group, -1)


# ------------------------------------------------------------------------------------------------ weights


@given(kinds, rows, widths, groups, st.integers(1, 3), st.booleans(), seeds)
@example("constant", 1, 1, 8, 1, True, 0)
def test_codes_multipliers_and_their_products_stay_in_range(kind, O, I, group, taps, search, seed):
    """Catches m up to 17, codes clamped to -8..8, a product that wraps around int8."""
    gw = quant.quantize_weight(draw(kind, O, I * taps, seed=seed), group, taps, search=search)
    product = gw.mult_OG.long().repeat_interleave(group, 1) * gw.codes_OK.long()
    assert gw.codes_OK.min() >= -8 and gw.codes_OK.max() <= 7 and gw.mult_OG.min() >= 1 and gw.mult_OG.max() <= 16
    assert torch.equal(gw.int8().long(), product)


@given(kinds, rows, widths, groups, seeds)
def test_no_weight_moves_by_more_than_half_a_step_without_search(kind, O, I, group, seed):
    """Catches floor in place of ceil for m, swapped 7.5 and 8.5, a scale rounded down to its 8 bits."""
    w = draw(kind, O, I, seed=seed)
    gw = quant.quantize_weight(w, group, search=False)
    half = steps(gw.mult_OG, gw.scale_O, group)[:, :I] / 2
    assert ((w - quant.dequantize(gw)).abs() <= half * (1 + 1e-5)).all()


@given(kinds, rows, st.sampled_from([8, 24, 40]), seeds)
def test_searched_multiplier_is_at_least_as_good_as_every_other(kind, O, I, seed):
    """Catches a search that skips m = 1 or 16, keeps the worst, or compares errors of different groups."""
    w = draw(kind, O, I, seed=seed).clamp_min(-3)
    gw = quant.quantize_weight(w, 8)
    v_OGg = w.double().unflatten(1, (-1, 8)) / gw.scale_O[:, None, None].double()

    def error(m_OG):
        m = m_OG[..., None]
        return (v_OGg - m * (v_OGg / m).round().clamp(-8, 7)).square().sum(-1)

    found = error(gw.mult_OG.double())
    for m in range(1, 17):
        other = error(torch.full(gw.mult_OG.shape, m, dtype=torch.float64))
        assert (found <= other * (1 + 1e-4) + 1e-9).all(), m


def test_the_diagonal_of_the_hessian_weights_the_search():
    """Catches a search that ignores diag H, or weights it by 1 / diag H."""
    w, K = GAUSSIAN[:, :256], 256
    H = torch.diag(torch.rand(K, generator=torch.Generator().manual_seed(1)).double() ** 4 + 1e-4)
    assert h_error(w, quant.quantize_weight(w, H_KK=H), H).sum() < 0.97 * h_error(w, quant.quantize_weight(w), H).sum()


@given(rows, widths, groups, st.integers(1, 4), seeds)
@example(2, 12, 64, 4, 0)
def test_channels_are_padded_inside_each_tap_and_padding_is_the_code_zero(O, I, group, taps, seed):
    """Catches padding the flattened row (groups would straddle taps), a fallback to one group per row, m = 0 in padding."""
    w = draw("normal", O, taps * I, seed=seed)
    gw = quant.quantize_weight(w, group, taps)
    Ip = -(-I // group) * group
    assert gw.codes_OK.shape == (O, taps * Ip) and gw.mult_OG.shape == (O, taps * Ip // group)
    assert (gw.codes_OK.unflatten(1, (taps, Ip))[:, :, I:] == 0).all()
    by_tap = [quant.round_rtn(t.unflatten(1, (-1, group)), gw.scale_O, m, True, None)[0] for t, m in zip(
        quant.pad_taps(w, group, taps).chunk(taps, 1), gw.mult_OG.float().chunk(taps, 1), strict=True)]  # fmt: skip
    assert torch.equal(torch.cat([t.flatten(1) for t in by_tap], 1), gw.codes_OK.float())
    assert quant.dequantize(gw).shape == w.shape
    assert quant.quantize_weight(torch.zeros(O, taps * I), group, taps).mult_OG.eq(1).all()


@given(kinds, rows, widths, seeds)
def test_rows_are_independent_and_zero_rows_stay_zero(kind, O, I, seed):
    """Catches one scale for the whole tensor, division by a zero scale."""
    w = draw(kind, O, I, seed=seed)
    w[0] = 0
    whole, last = quant.quantize_weight(w), quant.quantize_weight(w[-1:])
    assert not quant.dequantize(whole)[0].any()
    assert torch.equal(whole.int8()[-1:], last.int8()) and torch.equal(whole.scale_O[-1:], last.scale_O)


@given(st.floats(1e-7, 50))
def test_scales_round_up_to_8_bits(s):
    """Catches rounding down or to nearest (values would clip), or keeping other than 3 mantissa bits."""
    s = torch.tensor([s])
    r = quant.round_scale(s)
    mantissa = torch.frexp(r)[0] * 16
    assert s <= r < s * 1.125 * (1 + 1e-6) and mantissa == mantissa.round() and torch.equal(quant.round_scale(r), r)


@pytest.mark.parametrize("O,I,kh,kw", [(3, 5, 3, 3), (2, 4, 1, 3), (1, 1, 2, 1)])
def test_conv_weights_flatten_tap_major_channel_fastest(O, I, kh, kw):
    """Catches channel-major order, swapped kh and kw."""
    w = torch.arange(O * I * kh * kw).view(O, I, kh, kw)
    flat = quant.flatten_conv(w)
    for o, c, i, j in ((0, 0, 0, 0), (O - 1, I - 1, kh - 1, kw - 1), (O - 1, I // 2, kh // 2, kw - 1)):
        assert flat[o, (i * kw + j) * I + c] == w[o, c, i, j]
    assert torch.equal(quant.unflatten_conv(flat, (kh, kw)), w)


def test_searched_grid_beats_a_float_scale_per_group():
    """The claim that the module's docstring makes for Gaussian rows. Catches a search that is not one."""
    error = {
        "per row": GAUSSIAN - quant.absmax_grid(GAUSSIAN),
        "group float": GAUSSIAN - quant.absmax_grid(GAUSSIAN, 64),
        "searched": GAUSSIAN - quant.dequantize(quant.quantize_weight(GAUSSIAN)),
    }
    error = {k: float(e.norm() / GAUSSIAN.norm()) for k, e in error.items()}
    assert error["searched"] < 0.098 < error["group float"] < 0.115 < error["per row"]


# ------------------------------------------------------------------------------------------------ GPTQ


@pytest.mark.parametrize("K,group,taps", [(40, 8, 1), (72, 16, 2), (130, 64, 1)])
def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse(K, group, taps):
    """Catches the transposed factor, the factor of H itself, a reversal left out, padding that couples."""
    H = hessian(K)
    Hp, U = quant.inverse_factor(H, group, taps)
    real = quant.pad_taps(torch.ones(1, K), group, taps)[0].bool()
    assert torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    assert torch.allclose(U[real][:, real], torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(U[~real], torch.eye(len(U))[~real]) and torch.equal(Hp[~real], torch.eye(len(U))[~real])


def reference_gptq(w, gw0, H, group):
    """Column by column with the inverse of what is left of H, float64: Frantar's update without any Cholesky factor."""
    w, K = w.double().clone(), w.shape[1]
    scale, codes = gw0.scale_O.double(), torch.empty(w.shape)
    inverse = [torch.linalg.inv(H[k:, k:]) for k in range(K)]
    weight = torch.stack([1 / i[0, 0] for i in inverse])
    for k in range(K):
        if k % group == 0:
            m = quant.choose_multipliers(w[:, None, k : k + group], scale, weight[k : k + group])[:, 0]
        codes[:, k] = (w[:, k] / (scale * m)).round().clamp(-8, 7)
        e = (w[:, k] - codes[:, k] * scale * m) / inverse[k][0, 0]
        w[:, k:] -= e[:, None] * inverse[k][0]
    return codes


@pytest.mark.parametrize("K,group", [(48, 8), (192, 32)])
def test_gptq_equals_the_update_with_explicit_inverses(K, group):
    """Catches the transposed factor, a wrong block boundary, stale columns in a group's search, a wrong sign."""
    w, H = GAUSSIAN[:48, :K], hessian(K)
    gw = quant.quantize_weight(w, group, 1, H, "gptq")
    same = (gw.codes_OK == reference_gptq(w, gw, H, group)).all(1).float().mean()
    assert same >= 0.9  # a tie that float32 breaks differently changes the rest of its row


def test_gptq_of_one_row_is_that_of_the_row_among_others():
    """Catches a transposed view in place of a copy, which a single row is: its errors are then compared on other weights."""
    w, H = draw("normal", 8, 192, seed=1), hessian(192, 3)
    together = quant.dequantize(quant.quantize_weight(w, 64, 1, H, "gptq"))
    alone = torch.cat([quant.dequantize(quant.quantize_weight(row[None], 64, 1, H, "gptq")) for row in w])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("O,K,group,taps", [(64, 128, 64, 1), (32, 300, 64, 1), (24, 9 * 40, 32, 9), (16, 7, 8, 1)])
def test_gptq_is_never_worse_than_nearest_in_the_h_norm(O, K, group, taps, search):
    """Row by row. Catches the transposed factor and error feedback of the wrong sign (it would fall back to nearest)."""
    w, H = GAUSSIAN.flatten()[: O * K].view(O, K), hessian(K, 3)
    rtn, gptq = (h_error(w, quant.quantize_weight(w, group, taps, H, r, search), H) for r in ("rtn", "gptq"))
    assert (gptq <= rtn * (1 + 1e-4)).all()
    assert gptq.sum() < 0.85 * rtn.sum()


def test_rows_that_a_rounding_makes_worse_fall_back_to_nearest(monkeypatch):
    """Catches a comparison the wrong way round, or one for the whole matrix instead of each row."""
    w, H = GAUSSIAN[:8, :64], hessian(64)
    rtn, gptq = (quant.quantize_weight(w, 64, 1, H, r, factor=quant.inverse_factor(H)) for r in ("rtn", "gptq"))

    def half_bad(*args):
        q, m = quant.round_gptq(*args)
        return torch.cat([q[:4], torch.full_like(q[4:], 7)]), m

    monkeypatch.setitem(quant.ROUNDINGS, "gptq", half_bad)
    mixed = quant.quantize_weight(w, 64, 1, H, "gptq")
    assert torch.equal(mixed.int8(), torch.cat([gptq.int8()[:4], rtn.int8()[4:]]))


def test_dead_columns_are_rounded_to_nearest_and_disturb_nobody():
    """Catches inf/NaN from a zero diagonal, dead weights set to zero, feedback from or into dead columns."""
    K = 64
    alive = torch.arange(K) % 3 > 0
    w = GAUSSIAN[:16, :K] * torch.where(alive, 1.0, 0.1)  # small, so that they decide no multiplier
    H = hessian(K) * alive[:, None] * alive
    gw = quant.quantize_weight(w, 64, 1, H, "gptq")
    step = steps(gw.mult_OG, gw.scale_O, 64)
    assert torch.equal(gw.codes_OK[:, ~alive].float(), (w / step).round().clamp(-8, 7)[:, ~alive])
    moved = w.clone()
    moved[:, ~alive] += 0.4 * step[:, ~alive]
    factor = quant.inverse_factor(H)
    fixed = [quant.round_gptq(x[:, None], gw.scale_O, gw.mult_OG.float(), False, factor[1])[0] for x in (w, moved)]
    assert torch.equal(fixed[0].flatten(1)[:, alive], fixed[1].flatten(1)[:, alive])


def test_a_factor_computed_once_gives_the_same_weights():
    """Catches a factor argument that is ignored or mixed up with H."""
    w, H = GAUSSIAN[:16, : 9 * 20], hessian(180)
    a = quant.quantize_weight(w, 32, 9, H, "gptq")
    b = quant.quantize_weight(w, 32, 9, None, "gptq", factor=quant.inverse_factor(H, 32, 9))
    assert torch.equal(a.int8(), b.int8()) and torch.equal(a.scale_O, b.scale_O)


@pytest.mark.parametrize("group", [0, 4, 7, 24, 63, 96, 256, -8, 16.5])
def test_group_sizes_other_than_8_to_128_powers_of_two_are_refused(group):
    """Catches a range check without the power of two."""
    with pytest.raises(ValueError, match="power of two from 8 to 128"):
        quant.quantize_weight(torch.ones(2, 64), group)


def test_bad_weights_and_hessians_are_refused():
    """Catches NaN that silently becomes a code, a broadcast Hessian, an undamped singular one."""
    w = torch.ones(2, 16)
    singular = torch.ones(16, 16)
    for bad, match in (
        (dict(w_OK=w.clone().fill_(torch.nan)), "inf or NaN"),
        (dict(w_OK=w * torch.inf), "inf or NaN"),
        (dict(w_OK=w * 1e5), "do not fit"),
        (dict(w_OK=w, taps=3), "do not divide"),
        (dict(w_OK=w, rounding="gptq"), "needs H_KK"),
        (dict(w_OK=w, rounding="floor"), "rtn, gptq"),
        (dict(w_OK=w, H_KK=torch.eye(8)), "16 x 16"),
        (dict(w_OK=w, H_KK=singular, rounding="gptq"), "damp it"),
        (dict(w_OK=w, H_KK=singular * torch.nan, rounding="gptq"), "damp it"),
    ):
        with pytest.raises(ValueError, match=match):
            quant.quantize_weight(**bad)


# ------------------------------------------------------------------------------------------------ activations


@given(kinds, rows, widths, groups, seeds)
@example("negative", 1, 1, 8, 0)
def test_no_activation_moves_by_more_than_half_a_step(kind, T, I, group, seed):
    """Catches floor for ceil, swapped 7.5 and 8.5, absmax of the wrong axis, m above 16. A quantizer that clipped would need a
    mask in the straight-through gradient of layers.py, which has none."""
    x = draw(kind, T, I, seed=seed)
    codes, mult, scale = quant.quantize_activation(x, group)
    assert codes.min() >= -8 and codes.max() <= 7 and mult.min() >= 1 and mult.max() <= 16
    assert (mult.long().repeat_interleave(group, 1) * codes.long()).abs().max() <= 128
    half = steps(mult, scale, group)[:, :I] / 2
    assert ((x - quant.dequantize_activation(codes, mult, scale, I)).abs() <= half * (1 + 1e-5)).all()
    assert not codes[:, I:].any()


@given(kinds, rows, widths, st.booleans(), seeds)
@example("negative", 1, 1, False, 0)
def test_no_activation_of_8_bits_moves_by_more_than_half_of_the_smallest_step(kind, T, I, per_sample, seed):
    """Catches a symmetric grid, a scale over the batch or for each pixel, codes of other than 8 bits, a multiplier."""
    x = draw(kind, T, 2, 3, I, seed=seed) if per_sample else draw(kind, T, I, seed=seed)
    codes, mult, scale = quant.quantize_activation(x, quant.EIGHT_BITS, per_sample)
    x_Tn, codes_Tn = x.flatten(1).double(), codes.flatten(1).double()
    assert codes.shape == x.shape and codes.dtype == torch.int8 and (mult == 1).all() and mult.shape == (*x.shape[:-1], 1)
    exact = torch.maximum(x_Tn.amax(1) / 127.5, -x_Tn.amin(1) / 128.5)
    assert torch.allclose(scale.double(), exact.clamp_min(1e-30), rtol=1e-6)
    assert ((x_Tn - codes_Tn * scale[:, None]).abs() <= scale[:, None] / 2 * (1 + 1e-4)).all()
    assert torch.equal(quant.dequantize_activation(codes, mult, scale, I).flatten(1), codes.flatten(1) * scale[:, None])


@given(rows, st.sampled_from([16, 48]), seeds)
def test_the_step_is_the_smallest_that_clips_nothing(T, I, seed):
    """Catches symmetric 7.5, a largest multiplier below 16: the grid reaches 8.5 steps down and 7.5 up."""
    x = draw("negative", T, I, seed=seed)
    for sign, reach in ((1, 8.5), (-1, 7.5)):
        _, mult, scale = quant.quantize_activation(sign * x, 16)
        assert torch.allclose(scale * 16, x.abs().amax(1) / reach, rtol=1e-5) and (mult.amax(1) == 16).all()


@given(kinds, st.integers(1, 3), st.integers(1, 4), widths, groups, seeds)
def test_per_sample_grid_bounds_every_pixel_and_mixes_no_samples(kind, N, side, C, group, seed):
    """Catches a scale over the batch, multipliers shared between pixels, a scale per pixel."""
    x = draw(kind, N, side, side + 1, C, seed=seed)
    codes, mult, scale = quant.quantize_activation(x, group, per_sample=True)
    assert scale.shape == (N,) and mult.shape[:3] == x.shape[:3]
    half = steps(mult, scale, group)[..., :C] / 2
    assert ((x - quant.dequantize_activation(codes, mult, scale, C)).abs() <= half * (1 + 1e-5)).all()
    alone = quant.quantize_activation(x[-1:], group, per_sample=True)
    assert all(torch.equal(a[-1:], b) for a, b in zip((codes, mult, scale), alone, strict=True))


@given(kinds, rows, widths, groups, st.booleans(), seeds)
def test_int8_activations_are_multiplier_times_code(kind, T, I, group, per_sample, seed):
    """Catches a kernel path that rounds otherwise than the documented grid."""
    x = draw(kind, 2, T, 3, I, seed=seed)
    codes, mult, scale = quant.quantize_activation(x, group, per_sample)
    X, s = quant.activation_int8(x, group, per_sample)
    assert torch.equal(X.long(), mult.long().repeat_interleave(group, -1) * codes.long()) and torch.equal(s, scale)


@given(rows, widths, seeds)
def test_dtype_and_strides_do_not_change_the_codes(T, I, seed):
    """Catches arithmetic in bf16, a view that assumes contiguous memory."""
    x = draw("normal", T, I, seed=seed).bfloat16()
    wide = torch.zeros(I, 2 * T, dtype=torch.bfloat16)
    wide[:, ::2] = x.t()
    results = [quant.activation_int8(v) for v in (x, x.float(), wide[:, ::2].t(), x.double())]
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_make_their_own_scale_nan_and_no_other(bad):
    """Catches inf that becomes a large number, NaN that becomes a code, poison in other rows."""
    x = GAUSSIAN[:4, :40].clone()
    x[2, 17] = bad
    for per_sample, shaped in ((False, x), (True, x[:, None, None])):
        assert quant.quantize_activation(shaped, 16, per_sample)[2].isnan().tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ smoothing, baselines


@given(widths, st.sampled_from([0.0, 0.25, 0.5, 1.0]), seeds)
def test_smoothing_is_the_formula_and_one_for_dead_channels(I, alpha, seed):
    """Catches swapped exponents, factors that are no powers of two, zero or infinite ones for channels that never fire."""
    x, w = draw("normal", I, seed=seed).abs(), draw("normal", I, seed=seed + 1).abs()
    lam = quant.smoothing_factors(x, w, alpha)
    exponent = (x**alpha / w ** (1 - alpha)).log2()
    assert torch.equal(lam.log2().round().exp2(), lam) and lam.dtype == torch.float32
    assert ((lam.log2() - exponent).abs() <= 0.5001).all()
    dead = torch.zeros(I)
    assert all((quant.smoothing_factors(*args, alpha) == 1).all() for args in ((dead, w), (x, dead), (dead, dead)))


@given(kinds, rows, widths, groups, seeds)
def test_the_grid_for_comparison_is_plain_absmax(kind, O, I, group, seed):
    """Catches scales of absmax / 8 or / 7.5, groups that straddle rows, padding that leaks."""
    w = draw(kind, O, I, seed=seed)
    scale = w.abs().amax(1, keepdim=True).div(7).clamp_min(quant.TINY)
    deq = quant.absmax_grid(w)
    assert ((w - deq).abs() <= scale / 2 * (1 + 1e-5)).all() and ((deq / scale).round() * scale == deq).all()
    by_group = torch.cat([quant.absmax_grid(part) for part in w.split(group, 1)], 1)
    assert torch.equal(quant.absmax_grid(w, group), by_group)


# ------------------------------------------------------------------------------------------------ rotation


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_rotation_is_the_hadamard_matrix_of_each_block_and_its_own_inverse(T, blocks, seed):
    """Catches: a block that reaches into its neighbour, a matrix that is not orthogonal or not symmetric, a lost root."""
    x = torch.randn(T, 16 * blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), H)
    expected = (x.view(T, blocks, 16) @ H / 4).view(T, -1)
    assert torch.allclose(quant.rotate(x), expected, atol=1e-12) and torch.allclose(quant.rotate(quant.rotate(x)), x, atol=1e-12)
    w = torch.cat([x, 2 * x], 1)
    assert torch.allclose(quant.rotate_taps(w, 2), torch.cat([expected, 2 * expected], 1), atol=1e-12)


def test_rotation_keeps_what_an_outlier_would_round_away():
    """Catches a rotation that leaves its group: with one channel of 30 times the others in each, the error halves."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= 30
    error = {}
    for name, z in (("plain", x), ("rotated", quant.rotate(x))):
        back = quant.dequantize_activation(*quant.quantize_activation(z), 64)
        error[name] = ((quant.rotate(back) if name == "rotated" else back) - x).norm()
    assert error["rotated"] < 0.5 * error["plain"]


def test_rotation_refuses_a_width_without_whole_blocks():
    with pytest.raises(ValueError, match="24 channels do not divide into blocks of 16"):
        quant.rotate(torch.zeros(2, 24))
