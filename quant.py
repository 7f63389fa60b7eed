"""The two-level INT4 grid of CMQuant: weights, activations and the two ways of rounding.

    x[t, k] ~= s[t] * m[t, g(k)] * q[t, k]         q in {-8..7},  m in {1..16},  s float32 > 0       [O]

q is the 4-bit code of a value, m the multiplier of its group of neighbours along the reduction axis, and s the scale of its
row. Since |m q| <= 128, m*q is an exact int8 in [-128, 112], and the product of two quantized operands is one int8 GEMM with
int32 accumulation and one float scale per row of each side, with no rescaling per group (kernels.py):

    Y[t, o] = s_x[t] * s_w[o] * sum_k (m q)_x[t, k] * (m q)_w[o, k]

Zero is the code 0 and there is no zero point; only packed storage adds ZERO to a code (kernels.py). The grid reaches one code
further down than up. Counting the half step that rounding forgives, a group spans [-8.5, 7.5] steps, so the smallest step
that moves none of its values by more than half a step is

    b_g = max(max_k x / 7.5, max_k -x / 8.5),     s = max_g b_g / 16,     m_g = ceil(b_g / s)          |x - x^| <= s m / 2

Activations use exactly this rule. It is dynamic: one pass over the row finds b, a second one rounds. Their groups are small,
8 values in train.py, because activations are never stored. Compared with b = absmax / 7.5 the rule lowers the error of Gaussian
groups of 16 by 5%. Trying a second multiplier for every group would lower it by 1.5% more and double the cost, and clipping
the tails helps only groups of 64 (1.4% with steps of 0.94 b): neither is done. Because nothing is clipped, a
straight-through gradient needs no mask (layers.py).

Activations in 8 bits (EIGHT_BITS in place of a group size) follow the same rule with one group, one multiplier and more codes:

    x[t, k] ~= s[t] * q[t, k],    q in {-128..127},    s = max(max_k x / 127.5, max_k -x / 128.5)

so q itself is the int8 operand and the product stays the same one. For convolutions s is the sample's, as above.

Weights have groups of 64 by default and try every m in 1..16 for the least squared error, weighted by diag H where there is a
Hessian H. With that search the exact row scale hardly matters: trying several scales gained 0.2% and was dropped. Rounding
the scale up to a float of 8 bits (5 of exponent, 3 of mantissa: 2^-26 .. 60) costs less than 0.1%, so the scale of a weight's
row is one byte of storage.

Rounding is `rtn` (to nearest) or `gptq`, which takes the columns in order and pushes each one's rounding error into the
columns that follow, with the multipliers of a group chosen from the updated columns when the group begins, weighted by
1 / U_kk^2 (GPTQ, 2210.17323 [R]):

    E_k = (w_k - w^_k) / U_kk,    w_j -= E_k U_kj  (j > k),    U upper triangular with U^T U = H^-1,    H = E[x x^T]

Dimension key (whole project): B batch, T tokens (rows), I input channels, O output channels, K flattened reduction axis
(linear: K = I; conv: K = kh*kw*I, tap-major, channel fastest), G groups, g values of a group, r LoRA rank, N H W C as usual.
Channels are padded with zeros to a multiple of `group` inside each tap, so a group never straddles taps:
Kp = taps * ceil(I/group) * group. Padded codes are 0, and a group of zeros has m = 1. Rows are independent of each other.

Inf or NaN: weights raise ValueError; an activation row (a sample, for convolutions) that holds one gets s = NaN, hence a NaN
output, never silently a number. Activation scales have a floor of 1e-30; smaller rows become zeros.
Left out on purpose: zero points, FP4, static activation scales, GPTQ's column reordering.
The grid, its search and the choice of groups are ours [O]; W4A4 is the paper's [A].
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import gptq_gpu

QMIN, QMAX, MMAX, ZERO = -8, 7, 16, 8  # smallest and largest code, largest multiplier; packed codes are q + ZERO
TINY = 1e-30  # the smallest scale
SCALE_MIN, SCALE_MAX = 2.0**-26, 1.875 * 2.0**5  # of a weight's row
SCALE_SHIFT = 20  # low bits of a float32 that are zero in such a scale: 3 of its 23 bits of mantissa are left
GROUPS = (8, 16, 32, 64, 128)  # group sizes
GROUP_W, GROUP_X = 64, 8  # what a network is packed with by default: of weights, and of activations in 4 bits
MULTIPLIER = torch.uint8  # dtype that holds a weight's multiplier
TURN = 16  # channels that `rotate` mixes, a power of four
EIGHT_BITS = 0  # in place of a group size of activations: codes of 8 bits without multipliers
BLOCK = 128  # GPTQ updates the columns inside a block one by one, and everything to the right of it once per block

# ------------------------------------------------------------------------------------------------ reference math


def check_group(group: int) -> None:
    """ValueError unless group is a power of two in 8..128."""
    if group not in GROUPS:
        raise ValueError(f"group size must be a power of two from 8 to 128, got {group}")


def number_format(groups_x: Iterable[int]) -> str:
    """W4A4; W4A8 where all of the layers' group_x are EIGHT_BITS; W4A4/8 where some are."""
    eight = {group == EIGHT_BITS for group in groups_x}
    if True not in eight:
        return "W4A4"
    return "W4A4/8" if False in eight else "W4A8"


@dataclass
class GridWeight:
    """A weight on the grid: codes_OK int8 in -8..7 (O, Kp), mult_OG uint8 in 1..16 (O, Kp/group), scale_O float32 (O,)
    with 3 bits of mantissa (round_scale)."""

    codes_OK: Tensor
    mult_OG: Tensor
    scale_O: Tensor
    channels: int  # I, without padding
    taps: int  # kh*kw, 1 for a linear layer
    group: int

    def int8(self) -> Tensor:
        """m*q, exact, int8 (O, Kp)."""
        m_OK = self.mult_OG.to(torch.int16).repeat_interleave(self.group, dim=1)
        return (m_OK * self.codes_OK).to(torch.int8)  # -128..112


def dequantize(gw: GridWeight) -> Tensor:
    """float32 (O, K), padding removed."""
    w_OK = gw.int8().float() * gw.scale_O[:, None]
    return w_OK.unflatten(1, (gw.taps, -1))[..., : gw.channels].flatten(1)


def pad_taps(w_OK: Tensor, group: int, taps: int) -> Tensor:
    """(O, taps*I) -> (O, taps*ceil(I/group)*group): zeros behind each tap's channels."""
    channels, rest = divmod(w_OK.shape[1], taps)
    if rest:
        raise ValueError(f"{w_OK.shape[1]} columns do not divide into {taps} taps")
    return F.pad(w_OK.unflatten(1, (taps, channels)), (0, -channels % group)).flatten(1)


def flatten_conv(w_OIhw: Tensor) -> Tensor:
    """(O, I, kh, kw) -> (O, K): tap-major, channel fastest."""
    return w_OIhw.permute(0, 2, 3, 1).flatten(1)


def unflatten_conv(w_OK: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of flatten_conv."""
    return w_OK.unflatten(1, (*kernel_size, -1)).permute(0, 3, 1, 2)


def step_bound(x_Gg: Tensor, qmin: int = QMIN, qmax: int = QMAX) -> Tensor:
    """b: (..., G, group) -> (..., G), the smallest step at which no value moves by more than half a step."""
    x_gG = x_Gg.movedim(-1, 0).contiguous()  # eager reductions over a short last axis take 3 times as long
    return torch.maximum(x_gG.amax(0) * (1 / (qmax + 0.5)), x_gG.amin(0) * (1 / (qmin - 0.5)))


# --------------------------------------------------------------------------------------------------- weights


def choose_multipliers(w_OGg: Tensor, scale_O: Tensor, weight_Gg: Tensor | None = None, search: bool = True) -> Tensor:
    """m (O, G), float: the one of 1..16 with the least squared error, weighted by weight_Gg (G, group) if it is given; the
    smaller of two that are equal. search=False: the activations' rule, m = ceil(b / s)."""
    v = w_OGg / scale_O[:, None, None]
    if not search:
        return step_bound(v).ceil_().clamp_(1, MMAX)
    best_OG, m_OG = torch.full_like(v[..., 0], torch.inf), torch.ones_like(v[..., 0])
    for m in range(1, MMAX + 1):
        q = (v * (1 / m)).round_().clamp_(QMIN, QMAX)
        e = torch.sub(v, q, alpha=m).square_()
        e_OG = e.sum(-1) if weight_Gg is None else e.mul_(weight_Gg).sum(-1)
        m_OG.masked_fill_(e_OG < best_OG, m)
        best_OG = torch.minimum(e_OG, best_OG)
    return m_OG


def round_scale(scale_O: Tensor) -> Tensor:
    """Up to the next float with 3 bits of mantissa, at least SCALE_MIN. ValueError above SCALE_MAX."""
    bits = scale_O.clamp_min(SCALE_MIN).view(torch.int32) + (1 << SCALE_SHIFT) - 1
    scale_O = (bits >> SCALE_SHIFT << SCALE_SHIFT).view(torch.float32)
    if (scale_O > SCALE_MAX).any():
        raise ValueError(f"weights above {SCALE_MAX * MMAX * (QMAX + 0.5):.0f} in magnitude do not fit the grid")
    return scale_O


def round_rtn(w_OGg: Tensor, scale_O: Tensor, m_OG: Tensor, search: bool, U_KK: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest code for the multipliers that were chosen: (q (O, G, group), m (O, G)), float."""
    return (w_OGg / (m_OG * scale_O[:, None])[..., None]).round_().clamp_(QMIN, QMAX), m_OG


def round_gptq(w_OGg: Tensor, scale_O: Tensor, m_OG: Tensor, search: bool, U_KK: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ with the row scale fixed and the multipliers of a group chosen again when its first column is reached. Arguments and
    result as round_rtn's; U_KK upper triangular with U^T U = H^-1 (inverse_factor)."""
    if search and w_OGg.is_cuda and gptq_gpu.is_available():  # one launch per block of columns instead of some 7 per column
        return gptq_gpu.round_gptq(w_OGg, scale_O, U_KK, QMIN, QMAX, MMAX, BLOCK)
    O, G, g = w_OGg.shape
    w_KO = w_OGg.flatten(1).t().clone(memory_format=torch.contiguous_format)  # a column of W is a contiguous row here
    q_KO, m_OG = torch.empty_like(w_KO), m_OG.clone()
    diag_K = U_KK.diagonal()
    weight_K, inv_K = 1 / diag_K.square(), (1 / diag_K).tolist()
    for k0 in range(0, G * g, BLOCK):
        k1 = min(k0 + BLOCK, G * g)
        err_KO = torch.empty_like(w_KO[k0:k1])
        for k in range(k0, k1):
            if k % g == 0:
                m_O = choose_multipliers(w_KO[k : k + g].t()[:, None], scale_O, weight_K[k : k + g], search)[:, 0]
                m_OG[:, k // g] = m_O
                step_O = scale_O * m_O
            torch.div(w_KO[k], step_O, out=q_KO[k]).round_().clamp_(QMIN, QMAX)
            e_O = torch.addcmul(w_KO[k], q_KO[k], step_O, value=-1, out=err_KO[k - k0]).mul_(inv_K[k])
            w_KO[k + 1 : k1].addr_(U_KK[k, k + 1 : k1], e_O, alpha=-1)
        w_KO[k1:].addmm_(U_KK[k0:k1, k1:].t(), err_KO, alpha=-1)
    return q_KO.t().reshape(O, G, g), m_OG


# name: f(w_OGg padded float32, not to be changed in place; scale_O; m_OG of the nearest rounding, 1..16; search; U_KK) -> codes
# (O, G, group) in QMIN..QMAX and multipliers (O, G), float. Change this to try yours: rows where it loses to rtn become rtn's.
ROUNDINGS = {"rtn": round_rtn, "gptq": round_gptq}


def inverse_factor(H_KK: Tensor, group: int = 64, taps: int = 1) -> tuple[Tensor, Tensor]:
    """H (K, K) -> (H (Kp, Kp), U (Kp, Kp) upper triangular with U^T U = H^-1), both float32 and padded; computed in float64.

    Factorize H = V V^T with V upper triangular, which is a Cholesky factorization from the last column to the first; then
    U = V^-1. Columns that never fire (H_kk = 0: dead channels, padding) are decoupled from the others and get H_kk = 1, so
    that they are rounded to nearest and change no other column. Raises ValueError if H is not positive definite then."""
    H = pad_taps(pad_taps(H_KK.double(), group, taps).t(), group, taps)
    dead_K = H.diagonal() == 0
    H = H.masked_fill(dead_K[:, None] | dead_K, 0) + torch.diag(dead_K.double())
    H_single, H = H.float(), H.flip(0, 1)  # H keeps its name through the steps, so that at most three such matrices are alive
    H, info = torch.linalg.cholesky_ex(H)
    if info != 0 or not H.isfinite().all():
        raise ValueError("the Hessian is not positive definite; damp it (e.g. + 0.01 * mean(diag) on the diagonal)")
    H = H.flip(0, 1)  # V
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return H_single, torch.linalg.solve_triangular(H, eye, upper=True).float()


def quantize_weight(
    w_OK: Tensor,
    group: int = 64,
    taps: int = 1,
    H_KK: Tensor | None = None,
    rounding: str = "rtn",
    search: bool = True,
    factor: tuple[Tensor, Tensor] | None = None,
) -> GridWeight:
    """Weights (O, K), any float dtype -> the grid. One signature for every rounding.

    taps       kernel positions of a convolution's flattened weight, 1 for a linear layer
    H_KK       second moments of the layer's input (K, K), damped by the caller. `rtn` weights its search by diag H if H is
               given; every other rounding needs H, or:
    factor     inverse_factor(H_KK, group, taps), so that one factorization serves several calls
    search     False: s and m by the activations' rule

    Every rounding but `rtn` keeps, row by row, the better of its result and rtn's by the error sum_o e_o H e_o^T, e = W - W^.
    Raises ValueError for a group size, a shape, NaN/inf or a Hessian that cannot be used."""
    check_group(group)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if not torch.isfinite(w_OK).all():
        raise ValueError("weights contain inf or NaN")
    K = w_OK.shape[1]
    if H_KK is not None and H_KK.shape != (K, K):
        raise ValueError(f"the Hessian must be {K} x {K} for this weight, got {tuple(H_KK.shape)}")
    if rounding != "rtn" and factor is None:
        if H_KK is None:
            raise ValueError(f"{rounding} rounding needs H_KK, the second moments of the layer's input")
        factor = inverse_factor(H_KK, group, taps)

    w_OGg = pad_taps(w_OK.detach().float(), group, taps).unflatten(1, (-1, group))
    diag_K = factor[0].diagonal() if factor else None
    if diag_K is None and H_KK is not None:
        diag_K = pad_taps(H_KK.diagonal().float()[None], group, taps)[0]
    weight_Gg = None if diag_K is None else diag_K.reshape(-1, group)
    scale_O = round_scale(step_bound(w_OGg).amax(1) * (1 / MMAX))
    m_OG = choose_multipliers(w_OGg, scale_O, weight_Gg, search)
    U_KK = factor[1] if factor else None

    q, m = ROUNDINGS[rounding](w_OGg, scale_O, m_OG, search, U_KK)
    if rounding != "rtn":  # rows where it lost to rtn go back to it
        q0, m0 = round_rtn(w_OGg, scale_O, m_OG, search, U_KK)
        lost_O = _h_error(w_OGg, q, m, scale_O, factor[0]) > _h_error(w_OGg, q0, m0, scale_O, factor[0])
        q, m = torch.where(lost_O[:, None, None], q0, q), torch.where(lost_O[:, None], m0, m)
    return GridWeight(q.to(torch.int8).flatten(1), m.to(MULTIPLIER), scale_O, K // taps, taps, group)


def _h_error(w_OGg: Tensor, q_OGg: Tensor, m_OG: Tensor, scale_O: Tensor, H_KK: Tensor) -> Tensor:
    """e H e^T of every row (O,), e = W - W^."""
    e_OK = (w_OGg - q_OGg * (m_OG * scale_O[:, None])[..., None]).flatten(1)
    return ((e_OK @ H_KK) * e_OK).sum(1)


# ------------------------------------------------------------------------------------------------ activations


def quantize_activation(x: Tensor, group: int = 16, per_sample: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(..., T, I), any float dtype -> codes (..., T, Kp) int8, mult (..., T, G) uint8, scale (..., T) float32, per token.
    group EIGHT_BITS: codes of 8 bits; Kp is I, G is 1 and the multiplier 1.

    per_sample is the grid for convolutions: multipliers per pixel and group, but one scale per sample, because a window mixes
    pixels and one GEMM can apply one scale per row only. (N, H, W, C) -> codes (N, H, W, Cp), mult (N, H, W, G), scale (N,)."""
    qmin, qmax, most = (QMIN, QMAX, MMAX) if group != EIGHT_BITS else (-128, 127, 1)
    x, group = x.float(), group or x.shape[-1]  # bf16 / fp16 inputs are quantized in float32
    if x.shape[-1] % group:
        x = F.pad(x, (0, -x.shape[-1] % group))
    x_Gg = x.unflatten(-1, (-1, group))
    b_G = step_bound(x_Gg, qmin, qmax)
    s = b_G.amax((-3, -2, -1) if per_sample else -1, keepdim=True) * (1 / most)
    s = torch.where(s < torch.inf, s, torch.nan).clamp_min(TINY)  # inf becomes nan, nan stays
    m_G = (b_G / s).ceil().clamp(1, most)
    q = (x_Gg * (1 / (s * m_G))[..., None]).round_().clamp_(qmin, qmax)
    return q.to(torch.int8).flatten(-2), m_G.to(torch.uint8), s.flatten() if per_sample else s.squeeze(-1)


def activation_int8(x: Tensor, group: int = 16, per_sample: bool = False) -> tuple[Tensor, Tensor]:
    """What the kernels multiply: m*q int8 (..., Kp), and the scale, for the same arguments."""
    codes, mult, scale = quantize_activation(x, group, per_sample)
    return (codes.unflatten(-1, (mult.shape[-1], -1)) * mult.to(torch.int8)[..., None]).flatten(-2), scale


def dequantize_activation(codes: Tensor, mult: Tensor, scale: Tensor, channels: int) -> Tensor:
    """float32 (..., I), padding removed."""
    step_G = mult.float() * scale.reshape(scale.shape + (1,) * (mult.dim() - scale.dim()))
    return (codes.unflatten(-1, (mult.shape[-1], -1)) * step_G[..., None]).flatten(-2)[..., :channels]


def rotate(x: Tensor) -> Tensor:
    """x R for x (.., I), I a multiple of TURN: R is block-diagonal, its blocks the Hadamard matrix of TURN channels over its root,
    symmetric and orthogonal, hence its own inverse, W x = (W R) (R x).   (QuaRot, 2404.00456 [R]; in blocks: [O])

    Each channel of a block becomes a sum of all of them, +-1/4 of each, so that one large channel does not make the step of its
    group so large that the others vanish. Sums and differences of pairs, log2(TURN) times, in the order that every backend has, so
    that they are equal bit for bit. ValueError if I is no multiple."""
    if x.shape[-1] % TURN:
        raise ValueError(f"{x.shape[-1]} channels do not divide into blocks of {TURN}")
    half = TURN // 2
    while half:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half //= 2
    return x * TURN**-0.5


def rotate_taps(w_OK: Tensor, taps: int) -> Tensor:
    """`rotate` of each tap's channels, for what is flattened like a weight: (O, taps*I)."""
    return rotate(w_OK.unflatten(1, (taps, -1))).flatten(1)


def smoothing_factors(xmax_I: Tensor, wmax_I: Tensor, alpha: float) -> Tensor:
    """lambda_I ~ max|x|^a / max|w|^(1-a), float32 (SmoothQuant, 2211.10438 [R]), from the largest magnitudes of each input
    channel: the layer then quantizes x / lambda and W * lambda. They are rounded to powers of two, so that both are exact in every
    dtype and two bytes hold a factor. A factor that would be zero or not finite is 1."""
    lam = xmax_I.float().pow(alpha) / wmax_I.float().pow(1 - alpha)
    fine = torch.isfinite(lam) & (lam > TINY) & (xmax_I > 0) & (wmax_I > 0)
    return torch.where(fine, lam, 1.0).log2().round().clamp(-24, 24).exp2()


# ------------------------------------------------------------------------------------------------ demo


def absmax_grid(w_OK: Tensor, group: int | None = None) -> Tensor:
    """The usual grid, for comparison: codes -7..7, a float scale per row or per group of a row. Dequantized, float32 (O, K)."""
    (O, K), width = w_OK.shape, group or w_OK.shape[1]
    rows = pad_taps(w_OK.float(), width, 1).reshape(-1, width)
    scale = (rows.abs().amax(1, keepdim=True) / QMAX).clamp_min(TINY)
    return ((rows / scale).round() * scale).reshape(O, -1)[:, :K]


def main() -> None:
    gen = torch.Generator().manual_seed(0)
    gaussian = torch.randn(256, 1024, generator=gen)
    heavy = gaussian * torch.randn(256, 1024, generator=gen).abs().sqrt()
    outlier = torch.where(torch.arange(1024) % 64 == 0, 20, 1) * gaussian  # a 20x channel in every group of 64
    grids = {
        "one float scale per row": absmax_grid,
        "float scale per group of 64": lambda x: absmax_grid(x, 64),
        "two-level, 64, no search": lambda x: dequantize(quantize_weight(x, search=False)),
        "two-level, 64, searched  (weights)": lambda x: dequantize(quantize_weight(x)),
        "two-level, 16, dynamic": lambda x: dequantize_activation(*quantize_activation(x, 16), 1024),
        "two-level, 8, dynamic    (activations)": lambda x: dequantize_activation(*quantize_activation(x, 8), 1024),
        "8 bits, one scale, dynamic": lambda x: dequantize_activation(*quantize_activation(x, EIGHT_BITS), 1024),
    }
    print(f"{'relative error':42s}{'Gaussian':>14s}{'heavy tail':>14s}{'20x outliers':>14s}")
    for name, grid in grids.items():
        print(f"{name:42s}" + "".join(f"{(grid(x) - x).norm() / x.norm():14.4f}" for x in (gaussian, heavy, outlier)))
    codes, mult, scale = quantize_activation(outlier, 16)
    half_step = (mult.float() * scale[:, None]).repeat_interleave(16, 1) * 0.5
    assert ((outlier - dequantize_activation(codes, mult, scale, 1024)).abs() <= half_step * 1.0001).all()
    print("\ninvariant holds: no activation moves by more than half a step of its group")


if __name__ == "__main__":
    main()
