"""Packed INT4 storage and the W4A4 linear and convolution: eager, torch.compile, and by hand for CPUs and GPUs.

    x'  = x * inv_smooth                                  (optional smoothing; inv_smooth = 1 / lambda is what is stored)
    z   = (x' - shift) R                                  (optional; R rotates blocks of channels, quant.rotate)
    X   = m_x q_x   int8,  s_x float32                    dynamic, groups of group_x      (quant.py: z ~= s_x m_x q_x)
        = q_x in 8 bits where group_x is quant.EIGHT_BITS: the product is the same one
    y   = s_x s_w (X W^T)  + bias + (x' A^T) B^T          W = m_w q_w int8;  X W^T is one int8 GEMM, int32, exact

The low-rank branch A (r, K), B (O, r) sees x' as it is. What a shift takes from the output is a constant, which is in the bias
(layers.py); convolutions have none, since their padding would not be 0. Casts, in order: x to float32; x', z and its quantization
in float32; the branch in x.dtype (its GEMMs accumulate in float32); int32 -> float32 (rounds once, above 2^24); scaling, bias and
the sum in float32; y in x.dtype. int32 cannot overflow up to Kp = 131,071.

Storage of a weight (O, Kp), 4 + 4/group bits a value and one byte per row:

    codes_OP  uint8 (O, Kp/2)   byte j = u[j] | u[j + Kp/2] << 4,  u = q + 8 in 0..15: low nibbles are the first half of the
                                row, high nibbles the second, so both unpack to contiguous runs
    mult_P    uint8 (ceil(O G / 2),)   byte j = n[2j] | n[2j+1] << 4,  n = m - 1 in 0..15, row after row without gaps
    scale_O   float32 in memory, where every call multiplies by it; it has 8 significant bits (quant.round_scale), and
              pack_scales makes them the one byte that a checkpoint stores: 5 bits of exponent, 3 of mantissa

Unpacking works on four codes at once: bytes are viewed as int32 lanes; since m u <= 240 no lane carries into the next,

    lane = u * m + (128 - 8 m) = m q + 128  in 0..240,      m q = lane XOR 0x80  as int8

Convolutions: pixels are quantized once (one float scale per sample, multipliers per pixel and group along channels), then
im2col copies int8 codes; spatial padding is the code 0. K is tap-major, channel fastest, as in quant.py.

The branch may have any rank: 1, 2, 3, .. up to min(O, K); A and B that are None, or empty, are no branch.

The eager function is the documentation and the oracle. BACKENDS has two others that compute the same:

    compile   torch.compile of that function with dynamic sizes: equal to it bit for bit on a CPU. On CUDA, Inductor may
              contract the multiply-add at the end; the int32 sums are exact.
    native    kernels written by hand: backends/cpu.cpp for x86 CPUs (AVX512-VNNI or AVX2) with a C++ compiler, backends/gpu.py
              (Triton) for NVIDIA GPUs. Codes, int32 sums and scaling are equal bit for bit (GPUs contract the multiply-add at
              the end); the branch is summed in another order, which is always the same one, whatever the batch and the
              threads. (bfloat16 outputs below 2^-126 are zero where the CPU has units for bfloat16.)

Left out on purpose: quantized outputs.
Dimension key: see quant.py; P packed bytes of a row.          W4A4 [A]; branch on unquantized input as in SVDQuant [R]; layout [O]
"""

import functools
import math
import timeit
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import quant
from backends import cpu, gpu
from backends.cpu import CPU
from quant import SCALE_SHIFT, ZERO, GridWeight, activation_int8, dequantize_activation, quantize_activation, quantize_weight

SCALE_BIAS = (127 - 26) << (23 - SCALE_SHIFT)  # code 0 is quant.SCALE_MIN = 2^-26
EXACT = 1024  # columns whose products sum exactly in float32
VNNI = CPU.get("avx512_vnni", False)
NIBBLES, ONES, SIGNS = 0x0F0F0F0F, 0x01010101, 0x80808080 - 2**32  # four byte lanes of an int32

REGISTER, READING = 16, 16  # ranks that a branch computes at a time; what having one takes beside them, in ranks

# ------------------------------------------------------------------------------------------------ what a branch costs


def branch_time(shape: tuple[int, int], r: int | None, rows: int) -> float:
    """Of a branch of rank r beside a layer (O, K), for so many rows, in multiply-adds: a price of qra.py, under which parameters
    have no bound. It is about proportional to the time on a CPU with AVX512-VNNI (docs/speed.md, how time grows), where ranks are
    computed a register at a time. Layers in 16 bits are not on offer: inf."""
    return math.inf if r is None else rows * sum(shape) * (READING + math.ceil(r / REGISTER) * REGISTER) * (r > 0)


# ------------------------------------------------------------------------------------------------ layout


def pack_codes(codes_OK: Tensor) -> Tensor:
    """int8 codes in -8..7, (O, Kp), Kp even -> uint8 (O, Kp/2)."""
    low, high = (codes_OK + ZERO).to(torch.uint8).chunk(2, dim=1)
    return low | high << 4


def unpack_codes(codes_OP: Tensor) -> Tensor:
    """Inverse of pack_codes."""
    return torch.cat([codes_OP & 0xF, codes_OP >> 4], dim=1).to(torch.int8) - ZERO


def pack_multipliers(mult_OG: Tensor) -> Tensor:
    """uint8 in 1..16, (O, G) -> uint8 (ceil(O G / 2),)."""
    n = F.pad(mult_OG.flatten() - 1, (0, mult_OG.numel() % 2))
    return n[0::2] | n[1::2] << 4


def unpack_multipliers(mult_P: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of pack_multipliers: (rows, groups)."""
    n = torch.stack([mult_P & 0xF, mult_P >> 4], dim=1).flatten()
    return n[: rows * groups].view(rows, groups) + 1


def pack_scales(scale_O: Tensor) -> Tensor:
    """float32 scales of quant.round_scale -> uint8, for storage. ValueError for any other number."""
    code_O = (scale_O.view(torch.int32) >> SCALE_SHIFT) - SCALE_BIAS
    if ((code_O < 0) | (code_O > 255)).any() or not torch.equal(unpack_scales(code_O), scale_O):
        raise ValueError("a scale is not one of quant.round_scale's 8-bit floats")
    return code_O.to(torch.uint8)


def unpack_scales(code_O: Tensor) -> Tensor:
    """Inverse of pack_scales."""
    return ((code_O.to(torch.int32) + SCALE_BIAS) << SCALE_SHIFT).view(torch.float32)


class PackedWeight(NamedTuple):
    """A quant.GridWeight as it is stored: tensors of the layout above, channels without padding, taps (1: linear), group size."""

    codes_OP: Tensor
    mult_P: Tensor
    scale_O: Tensor
    channels: int
    taps: int
    group: int


def pack(gw: GridWeight) -> PackedWeight:
    """The storage of a weight; its scales stay float32."""
    return PackedWeight(pack_codes(gw.codes_OK), pack_multipliers(gw.mult_OG), gw.scale_O, gw.channels, gw.taps, gw.group)


def unpack(pw: PackedWeight) -> GridWeight:
    """Inverse of pack, bit for bit."""
    mult_OG = unpack_multipliers(pw.mult_P, len(pw.scale_O), 2 * pw.codes_OP.shape[1] // pw.group)
    return GridWeight(unpack_codes(pw.codes_OP), mult_OG, pw.scale_O, pw.channels, pw.taps, pw.group)


def dequantize(pw: PackedWeight) -> Tensor:
    """float32 (O, K), padding removed."""
    return quant.dequantize(unpack(pw))


def weight_int8(pw: PackedWeight) -> Tensor:
    """m*q int8 (O, Kp), equal to unpack(pw).int8(), four codes at a time."""
    u = pw.codes_OP.view(torch.int32)
    u = torch.cat([u & NIBBLES, u >> 4 & NIBBLES], dim=1)
    m = unpack_multipliers(pw.mult_P, len(u), u.shape[1] * 4 // pw.group).to(torch.int32)[..., None]
    lanes = u.unflatten(1, (-1, pw.group // 4)) * m + (128 - ZERO * m) * ONES ^ SIGNS
    return lanes.flatten(1).view(torch.int8)


# ------------------------------------------------------------------------------------------------ eager kernels


@torch.library.custom_op("cmquant::int8_matmul_in_float", mutates_args=())
def int8_matmul_in_float(X_TK: Tensor, W_OK: Tensor) -> Tensor:
    """X W^T by float32 GEMMs, exact: 1,024 products of at most 2^14 stay within 2^24. For CPUs without VNNI, whose _int_mm
    takes 30 times as long. (A custom op, so that torch.compile sees no loop over K.)"""
    acc_TO = torch.zeros(len(X_TK), len(W_OK), dtype=torch.int32, device=X_TK.device)
    for X, W in zip(X_TK.split(EXACT, 1), W_OK.split(EXACT, 1), strict=True):
        acc_TO += (X.float() @ W.float().t()).to(torch.int32)
    return acc_TO


@int8_matmul_in_float.register_fake
def _(X_TK: Tensor, W_OK: Tensor) -> Tensor:
    return X_TK.new_empty(X_TK.shape[0], W_OK.shape[0], dtype=torch.int32)


def int8_matmul(X_TK: Tensor, W_OK: Tensor) -> Tensor:
    """X W^T, int8 (T, K) x (O, K) -> int32 (T, O), exact."""
    if not X_TK.is_cuda:
        return torch._int_mm(X_TK, W_OK.t()) if VNNI else int8_matmul_in_float(X_TK, W_OK)
    # cuBLAS wants T > 16, O a multiple of 8 and contiguous rows: diffusers makes a transposed view of one picture's tokens
    X_TK, T, O = X_TK.contiguous(), X_TK.shape[0], W_OK.shape[0]
    if T <= 16 or O % 8:
        X_TK, W_OK = F.pad(X_TK, (0, 0, 0, max(0, 17 - T))), F.pad(W_OK, (0, 0, 0, -O % 8))
    return torch._int_mm(X_TK, W_OK.t())[:T, :O]


def _has_branch(lora_A_rK: Tensor | None) -> bool:
    return lora_A_rK is not None and len(lora_A_rK) > 0


def _fit(X: Tensor, width: int) -> Tensor:
    """Cut or zero-pad the channels of X to the weight's padding (group_x and the weight's group may differ, 8 bits have none)."""
    return X if X.shape[-1] == width else F.pad(X, (0, width - X.shape[-1]))


def _smooth(x: Tensor, inv_smooth_I: Tensor | None) -> Tensor:
    return x.float() if inv_smooth_I is None else x.float() * inv_smooth_I


def _grid_input(x1: Tensor, shift_I: Tensor | None, rotated: bool) -> Tensor:
    """z of x', what is quantized; channels are the last axis."""
    z = x1 if shift_I is None else x1 - shift_I
    return quant.rotate(z) if rotated else z


def w4a4_linear(
    x: Tensor,
    pw: PackedWeight,
    bias: Tensor | None = None,
    lora_A_rI: Tensor | None = None,
    lora_B_Or: Tensor | None = None,
    inv_smooth_I: Tensor | None = None,
    group_x: int = 16,
    shift_I: Tensor | None = None,
    rotated: bool = False,
) -> Tensor:
    """x (..., I) float32 / bf16 / fp16 -> (..., O) in x.dtype. bias, A, B float of any dtype; group_x a group size or EIGHT_BITS. A
    row with NaN or inf gives NaN."""
    x_TI = x.flatten(0, -2) if x.dim() > 1 else x[None]
    x1_TI = _smooth(x_TI, inv_smooth_I)
    X_TK, s_T = activation_int8(_grid_input(x1_TI, shift_I, rotated), group_x)
    W_OK = weight_int8(pw)
    acc_TO = int8_matmul(_fit(X_TK, W_OK.shape[1]), W_OK)
    low_Tr = x1_TI.to(x.dtype) @ lora_A_rI.to(x.dtype).t() if _has_branch(lora_A_rI) else None
    y_TO = _epilogue(acc_TO, s_T, pw.scale_O, bias, low_Tr, lora_B_Or, x.dtype)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def _epilogue(acc_TO, s_T, scale_O, bias, low_Tr, lora_B_Or, dtype) -> Tensor:
    """s_x s_w acc + bias + low B^T in float32, then in dtype; in place, because fresh memory costs more than the arithmetic."""
    y_TO = acc_TO * s_T[:, None]  # int32 * float32 -> float32
    y_TO.mul_(scale_O)
    if bias is not None:
        y_TO.add_(bias)
    if low_Tr is not None:
        y_TO.add_(low_Tr @ lora_B_Or.to(dtype).t())
    return y_TO.to(dtype)


def w4a4_conv2d(
    x_NCHW: Tensor,
    pw: PackedWeight,
    bias: Tensor | None = None,
    lora_A_rK: Tensor | None = None,
    lora_B_Or: Tensor | None = None,
    inv_smooth_I: Tensor | None = None,
    group_x: int = 16,
    kernel_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    rotated: bool = False,
) -> Tensor:
    """(N, I, H, W) -> (N, O, H', W') in x.dtype and channels-last memory. lora_A is a convolution that is flattened like W. A
    sample with NaN or inf gives NaN."""
    x1_NHWC = _smooth(x_NCHW.permute(0, 2, 3, 1).contiguous(), inv_smooth_I)  # no copy of channels-last memory
    X_NHWC, s_N = activation_int8(_grid_input(x1_NHWC, None, rotated), group_x, per_sample=True)
    W_OK = weight_int8(pw)
    X_NHWC = _fit(X_NHWC, W_OK.shape[1] // pw.taps)
    X_NHWK = im2col(X_NHWC, kernel_size, stride, padding)
    acc_TO = int8_matmul(X_NHWK.flatten(0, 2), W_OK)
    s_T = s_N.repeat_interleave(X_NHWK.shape[1] * X_NHWK.shape[2])
    low_Tr = None
    if _has_branch(lora_A_rK):
        A_rIhw = lora_A_rK.to(x_NCHW.dtype).unflatten(1, (*kernel_size, -1)).permute(0, 3, 1, 2)
        low = F.conv2d(x1_NHWC.to(x_NCHW.dtype).permute(0, 3, 1, 2), A_rIhw, None, stride, padding)
        low_Tr = low.permute(0, 2, 3, 1).flatten(0, 2)
    y_TO = _epilogue(acc_TO, s_T, pw.scale_O, bias, low_Tr, lora_B_Or, x_NCHW.dtype)
    return y_TO.view(*X_NHWK.shape[:3], y_TO.shape[1]).permute(0, 3, 1, 2)


def im2col(X_NHWC: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """int8 (N, H, W, C), C a multiple of 8 -> windows (N, H', W', kh*kw*C), tap-major, zero padding."""
    if kernel_size == (1, 1) and padding == (0, 0):
        return X_NHWC[:, :: stride[0], :: stride[1]]
    X = X_NHWC.view(torch.int32)  # four codes at once; the view also stops Inductor from quantizing inside of the gather
    X = F.pad(X, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = X.unfold(1, kernel_size[0], stride[0]).unfold(2, kernel_size[1], stride[1])  # N, H', W', C, kh, kw
    windows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
    return windows.contiguous().view(torch.int8)  # windows that lie in one row are a view: _int_mm misreads rows that overlap


def w4a16_linear(
    x: Tensor, pw: PackedWeight, bias: Tensor | None = None, lora_A_rI: Tensor | None = None, lora_B_Or: Tensor | None = None
) -> Tensor:
    """4-bit weights, unquantized activations: for modulation layers, which have many parameters and little to compute.
    x (..., I) -> (..., O) in x.dtype."""
    y = F.linear(x, dequantize(pw).to(x.dtype), None if bias is None else bias.to(x.dtype))
    if _has_branch(lora_A_rI):
        y = y + F.linear(F.linear(x, lora_A_rI.to(x.dtype)), lora_B_Or.to(x.dtype))
    return y


# ------------------------------------------------------------------------------------------------ backends


@functools.cache
def compiled(fn: Callable) -> Callable:
    """torch.compile of fn, cached per function. Without a working C++ compiler: fn itself, after one warning.

    Linear kernels get one graph for layers of all sizes (sizes of tensors are dynamic; ints, such as the group, are constants).
    The convolution gets one graph for each geometry and rank, for any batch: with symbolic channels im2col compiles to integer
    divisions for every element, which is 12 times slower."""
    from torch._inductor.exc import InductorError, InvalidCxxCompiler  # slow import, needed here only

    is_conv = fn is w4a4_conv2d
    fast, broken = torch.compile(fn, dynamic=not is_conv), False

    @functools.wraps(fn)
    def call(x: Tensor, *args, **kwargs) -> Tensor:
        nonlocal broken
        if not broken:
            if is_conv:
                torch._dynamo.maybe_mark_dynamic(x, 0)
            try:
                with (
                    torch._dynamo.config.patch(specialize_int=True, recompile_limit=256),
                    torch.fx.experimental._config.patch(use_duck_shape=False),
                ):
                    return fast(x, *args, **kwargs)
            except (InductorError, InvalidCxxCompiler) as e:
                if not isinstance(getattr(e, "inner_exception", e), InvalidCxxCompiler):
                    raise
                broken = True
                warnings.warn(f"no C++ compiler: {fn.__name__} runs uncompiled", stacklevel=2)
        return fn(x, *args, **kwargs)

    return call


def native_linear(
    x, pw, bias=None, lora_A_rI=None, lora_B_Or=None, inv_smooth_I=None, group_x=16, shift_I=None, rotated=False, w4a4=cpu.w4a4
) -> Tensor:
    """w4a4_linear as native_conv2d, where each row is a picture of one pixel."""
    pixels, geometry = x.reshape(math.prod(x.shape[:-1]), x.shape[-1], 1, 1), ((1, 1), (1, 1), (0, 0))
    operands = (bias, lora_A_rI, lora_B_Or, inv_smooth_I, group_x)
    y = native_conv2d(pixels, pw, *operands, *geometry, rotated, shift_I, w4a4, per_sample=False)
    return y.view(*x.shape[:-1], y.shape[1])


def native_conv2d(
    x_NCHW, pw, bias=None, lora_A_rK=None, lora_B_Or=None, inv_smooth_I=None, group_x=16,
    kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), rotated=False, shift_I=None, w4a4=cpu.w4a4, per_sample=True,
) -> Tensor:  # fmt: skip
    """w4a4_conv2d by w4a4, a kernel of backends/. ValueError for a wrong number of channels, or one that cannot be rotated."""
    if x_NCHW.shape[1] != pw.channels:  # kernels by hand would read beyond the factors of the branch
        raise ValueError(f"x has {x_NCHW.shape[1]} channels, its weight {pw.channels}")
    if rotated and pw.channels % quant.TURN:  # and would write beyond a row
        raise ValueError(f"{pw.channels} channels do not divide into blocks of {quant.TURN}")
    operands = (pw.codes_OP, pw.mult_P, pw.scale_O, bias, lora_A_rK, lora_B_Or, inv_smooth_I, shift_I)
    numbers = (pw.group, group_x, rotated, per_sample, kernel_size, stride, padding)
    return w4a4(x_NCHW.permute(0, 2, 3, 1), *operands, *numbers).permute(0, 3, 1, 2)


@torch.compiler.assume_constant_result  # or torch.compile would trace through functools.cache into the build
def _has_native(device: str) -> bool:
    return cpu.is_available() if device == "cpu" else gpu.is_available()


def native(fn: Callable) -> Callable:
    """fn's twin that is written by hand for the device of x: C++ on a CPU, Triton on a GPU; fn itself where there is none. A GPU's
    w4a16_linear is compiled, because the eager one would write W in float32."""
    twin = {w4a4_linear: native_linear, w4a4_conv2d: native_conv2d}.get(fn)

    def call(x: Tensor, *args) -> Tensor:
        if x.device.type == "cpu" and twin and _has_native("cpu"):
            return twin(x, *args, w4a4=cpu.w4a4)
        if x.is_cuda and _has_native("cuda"):
            return twin(x, *args, w4a4=gpu.w4a4) if twin else compiled_once(fn)(x, *args)
        return fn(x, *args)

    return call


def compiled_once(fn: Callable) -> Callable:
    """compiled(fn); fn itself inside of a model that is being compiled as a whole."""
    return fn if torch.compiler.is_compiling() else compiled(fn)


BACKENDS = {"eager": lambda fn: fn, "compile": compiled_once, "native": native}  # an eager kernel -> the one that runs

# ------------------------------------------------------------------------------------------------ demo


def main() -> None:
    """Linear layers with a branch of rank 16 and Gaussian operands: storage, error and time of the eager kernel."""
    gen = torch.Generator().manual_seed(0)
    print(f"{'layer':28s}{'bits/weight':>12s}{'vs dequantized':>16s}{'vs float':>10s}{'float ms':>10s}{'W4A4 ms':>9s}")
    for T, I, O in ((2048, 128, 128), (256, 1024, 1024)):
        x, w, bias = (torch.randn(*shape, generator=gen) for shape in ((T, I), (O, I), (O,)))
        A, B = torch.randn(16, I, generator=gen) / I**0.5, torch.randn(O, 16, generator=gen) * 0.1
        pw = pack(quantize_weight(w))
        W_OK, (X_TK, _) = weight_int8(pw), activation_int8(x)
        assert torch.equal(int8_matmul(X_TK, W_OK).double(), X_TK.double() @ W_OK.t().double()), "int32 sums are exact"
        bits = 8 * sum(t.nbytes for t in (pw.codes_OP, pw.mult_P, pack_scales(pw.scale_O))) / w.numel()
        kernels = functools.partial(F.linear, x, w, bias), functools.partial(w4a4_linear, x, pw, bias, A, B)
        milliseconds = [1e3 * min(timeit.repeat(kernel, number=1, repeat=9)) for kernel in kernels]
        x_hat, y = dequantize_activation(*quantize_activation(x), I), kernels[1]()
        branch = x.double() @ A.t().double() @ B.t().double() + bias
        references = [a.double() @ b.double().t() + branch for a, b in ((x_hat, dequantize(pw)), (x, w))]
        kernel_error, error = (float((y - reference).norm() / reference.norm()) for reference in references)
        row = f"{bits:12.3f}{kernel_error:16.1e}{error:10.3f}" + "{:10.2f}{:9.2f}".format(*milliseconds)
        print(f"{f'linear {T} x {I} -> {O}':28s}{row}")
    print("invariant holds: the int32 sums equal the float64 products of the codes")


if __name__ == "__main__":
    main()
