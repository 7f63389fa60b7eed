"""kernels.w4a4_linear and kernels.w4a4_conv2d for NVIDIA GPUs (written for Hopper), in Triton: two launches for a linear layer,
three for a convolution, whatever its rank, smoothing and bias.

    1 prepare   programs of three roles, which need nothing of each other and run side by side:
                  low     low = x' A^T (parts, T, RP), by tiles of 32 rows and, if these are few, by parts of K, which 3 adds up;
                          RP is the rank padded with zeros to a power of two, at least 32 (0 without a branch)
                  unpack  W = m_w q_w, int8 (O, taps C)
                  rows    linear: X = m_x q_x, int8 (T, C), and s_x float32 (T);  convolution: bounds of each sample's parts
    2 pixels    convolution only: s_x from its sample's bounds, X int8 (N, H, W, C)
    3 product   y = s_x s_w (X W^T) + bias + low B^T in one pass over tiles of y; a convolution's windows are gathered from X
                as they are read (im2col's matrix never exists). product_hopper for Hopper in bf16 and fp16 with strides of 1
                and RP up to 256; product for everything else

C is the channels padded to a multiple of 64, so that a K-block of 64 or 128 lies in one tap and no load over K needs a mask. X is 0
there, W is whatever the memory held. Equations, layouts, NaN and inf: kernels.py, quant.py.

Casts, in order: x to float32; x' and its quantization in float32 without contraction, so codes and scales equal
quant.activation_int8's bit for bit; x' and A to x.dtype, low summed in float32 over chunks of K, which are added in order, then
to x.dtype; int32 sums exact; then all in float32: (acc s_x) s_w + bias, onto which the tensor cores add low B^T (B in x.dtype);
y in x.dtype, once. kernels.py also rounds low B^T to x.dtype before it adds it. float32 inputs are not rounded to tf32.
A row's result does not depend on the rows beside it; a tile's size changes neither the order nor the kind of any sum.

The order of quantization, for x >= 0 and x < 0 alike: b = max(x / 7.5, -x / 8.5) >= 0, and the bits of floats >= 0 are ordered as
integers are, with inf above all numbers and NaN above inf. Maxima are taken of these integers: none loses a NaN.

Activations in 8 bits (group_x 0, EIGHT below) are one group a row, with 127.5 and 128.5 and the multiplier 1; launch 3 is the same.

Left out on purpose: unpacking inside of the product, a cache of unpacked weights, tiles chosen by trying (the two of TILES were
within 5% of the best of ten on an H200, but for 320 outputs, and every other one has to be compiled for each rank).
Kernels that are launched take every number by itself, because Triton compiles anew for the numbers inside of a tuple, whatever
do_not_specialize says; functions inside of them take the eight of WINDOWS as one tuple.
Dimension key: kernels.py; RP padded rank.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    async_load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # its name before Triton 3.8
except ImportError:  # a CPU build of torch
    triton = None

jit, gluon_jit = (triton.jit, gluon.jit) if triton else [lambda fn=None, **_: fn or (lambda fn: fn)] * 2
WINDOWS = ["H", "W", "Ho", "Wo", "stride_y", "stride_x", "pad_y", "pad_x"]  # what code need not be compiled for
LOW_ROWS, UNPACK_BYTES, ROW_ELEMENTS = 32, 4096, 4096  # of one program
PARTS, CHUNK, FEW = 512, 8, 128  # programs for a sample's bound; K-blocks of a partial sum of low; its tiles that are few
TILES = (128, 128, 4, 3), (64, 128, 4, 4)  # rows, columns, warps, stages; the second where the first leave processors idle
FLOAT32 = (64, 64, 4, 3)  # the branch by FMAs


@functools.cache
def is_available() -> bool:
    """Whether there is Triton and an NVIDIA GPU with int8 tensor cores. False after one warning."""
    if triton and torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0):
        return True
    warnings.warn("no Triton, or no NVIDIA GPU since Ampere: eager kernels run, --backend compile may be faster", stacklevel=2)
    return False


# ------------------------------------------------------------------------------------------------ quantization


@jit
def _bound(x, EIGHT: tl.constexpr):
    """Bits of max(x / 7.5, -x / 8.5)."""
    up, down = (1 / 127.5, -1 / 128.5) if EIGHT else (1 / 7.5, -1 / 8.5)
    return tl.where(x > 0, x * up, x * down).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _scale(bits, EIGHT: tl.constexpr):
    """s = b / 16 (8 bits: b), at least 1e-30; NaN for inf and NaN."""
    s = bits.to(tl.float32, bitcast=True) * (1.0 if EIGHT else 0.0625)
    return tl.where(s < float("inf"), tl.maximum(s, 1e-30), float("nan"))


@jit
def _codes(x_TGg, bits_TG, s_T, EIGHT: tl.constexpr):
    """m q, int8: m = ceil(b / s), q = round(x / (s m)) to even, by adding 1.5 * 2^23 (not to be fused with the product)."""
    m = tl.ceil(tl.div_rn(bits_TG.to(tl.float32, bitcast=True), s_T[:, None]))
    m = tl.minimum(tl.maximum(m, 1.0), 16.0)
    step = tl.div_rn(1.0, s_T[:, None] * m)
    q = (x_TGg * step[:, :, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    qmin, qmax = (-128, 127) if EIGHT else (-8, 7)
    return (tl.minimum(tl.maximum(q, qmin), qmax) * m.to(tl.int32)[:, :, None]).to(tl.int8)


@jit
def _load(x, inv_smooth, t, c, ok, I):
    """x' of rows t and channels c, float32."""
    ok = ok & (c < I)
    v = tl.load(x + t.to(tl.int64) * I + c, mask=ok, other=0).to(tl.float32)
    return v if inv_smooth is None else v * tl.load(inv_smooth + c, mask=c < I, other=0)


@jit
def _pairs(v, N: tl.constexpr, HALF: tl.constexpr):
    """(N, 2 HALF): values HALF apart become their sum and their difference."""
    a, b = tl.split(tl.permute(tl.reshape(v, [N, 2, HALF]), [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [N, 2 * HALF])


@jit
def _grid_input(x, inv_smooth, shift, t, c, ok, I, ROTATED: tl.constexpr):
    """z of rows t and channels c, float32, in the shape that these broadcast to, channels last; 0 where there is none. Sums as in
    quant.rotate."""
    v = _load(x, inv_smooth, t, c, ok, I)
    if shift is not None:
        v = tl.where(ok, v - tl.load(shift + c, mask=c < I, other=0), 0.0)
    if ROTATED:
        N: tl.constexpr = v.numel // 16
        z = tl.reshape(_pairs(tl.reshape(v, [N, 16]), N, 8), [2 * N, 8])
        z = tl.reshape(_pairs(z, 2 * N, 4), [4 * N, 4])
        z = tl.reshape(_pairs(z, 4 * N, 2), [8 * N, 2])
        v = tl.reshape(_pairs(z, 8 * N, 1), v.shape) * 0.25
    return v


@jit
def _rows(x, inv_smooth, shift, X, s, first, t_end, I, C, partial, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
          PARTS: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """Quantizes rows first .. first + ROWS. Their scales are their own, or that of the sample whose bounds are `partial`."""
    EIGHT: tl.constexpr = GROUP == 0
    WIDTH: tl.constexpr = BLOCK if EIGHT else GROUP  # of a group
    t = first + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK // WIDTH)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    t3 = t[:, None, None]
    v = _grid_input(x, inv_smooth, shift, t3, c, t3 < t_end, I, ROTATED)
    bits = tl.max(_bound(v, EIGHT), 2)
    if PARTS:
        s_T = tl.zeros([ROWS], tl.float32) + _scale(tl.max(tl.load(partial + tl.arange(0, PARTS)), 0), EIGHT)
    else:
        s_T = _scale(tl.max(bits, 1), EIGHT)
    tl.store(X + t3.to(tl.int64) * C + c, _codes(v, bits, s_T, EIGHT), mask=(t3 < t_end) & (c < C))
    tl.store(s + t, s_T, mask=t < t_end)


@jit
def _part(x, inv_smooth, shift, partial, first, t_end, step, I, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
          ROTATED: tl.constexpr):  # fmt: skip
    """Bits of the bound of pixels first .. first + step of a sample that ends at t_end."""
    c = tl.arange(0, BLOCK)[None, :]
    bits = tl.zeros([ROWS, BLOCK], tl.int32)
    for i in range(0, step, ROWS):
        t = i + tl.arange(0, ROWS)[:, None]
        ok = (t < step) & (first + t < t_end)
        bits = tl.maximum(bits, _bound(_grid_input(x, inv_smooth, shift, first + t, c, ok, I, ROTATED), GROUP == 0))
    tl.store(partial, tl.max(tl.max(bits, 1), 0))


# ------------------------------------------------------------------------------------------------ weight, branch


@jit
def _unpack(codes, mult, W, first, O, G, Cp, C, taps, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Half-groups first .. first + BLOCK, of HALF bytes each; a row has G. Byte j holds u[j] and u[j + G HALF]."""
    f = first + tl.arange(0, BLOCK)
    row, ok = f // G, f < O * G
    lane = tl.arange(0, HALF // 4)[None, :]
    u = tl.load(codes.to(tl.pointer_type(tl.int32)) + f[:, None] * (HALF // 4) + lane, mask=ok[:, None], other=0)
    for high in tl.static_range(2):
        half = f % G + high * G
        n = row * G + half // 2
        m = (tl.load(mult + n // 2, mask=ok, other=0).to(tl.int32) >> n % 2 * 4 & 15) + 1
        v = (u >> high * 4 & 0x0F0F0F0F) * m[:, None] + ((128 - 8 * m) * 0x01010101)[:, None] ^ -0x7F7F7F80
        k = half * HALF
        to = (row * taps + k // Cp) * C + k % Cp
        tl.store(W.to(tl.pointer_type(tl.int32)) + (to // 4)[:, None] + lane, v, mask=ok[:, None])


@jit
def _window(t, windows):
    """Sample and first row and column of the window of output pixel t."""
    _, _, Ho, Wo, stride_y, stride_x, pad_y, pad_x = windows
    pixel = t % (Ho * Wo)
    return t // (Ho * Wo), pixel // Wo * stride_y - pad_y, pixel % Wo * stride_x - pad_x


@jit
def _low(x, inv_smooth, A, low, first, part, T, I, rank, parts, windows, KW: tl.constexpr, TAPS: tl.constexpr, RP: tl.constexpr,
         ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """low (parts, T, RP) float32: K in chunks of CHUNK blocks, one for each part, or added here one by one if there is one part."""
    H, W = windows[0], windows[1]
    t, r = first + tl.arange(0, ROWS), tl.arange(0, RP)
    n, y, z = _window(t, windows)
    total = tl.zeros([ROWS, RP], tl.float32)
    acc = tl.zeros([ROWS, RP], tl.float32)
    blocks = tl.cdiv(I, BLOCK)
    last = tl.where(parts > 1, tl.minimum(part * CHUNK + CHUNK, TAPS * blocks), TAPS * blocks)
    for i in tl.range(part * CHUNK, last, num_stages=3 if RP <= 256 else 1):  # A's blocks of several stages are too large then
        tap, c = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        yt, zt = y + tap // KW, z + tap % KW
        ok = (t < T) & (yt >= 0) & (yt < H) & (zt >= 0) & (zt < W)
        pixel = ((n * H + yt) * W + zt)[:, None]
        if inv_smooth is None:  # nothing between load and product, so that loads of later blocks are under way
            v = tl.load(x + pixel.to(tl.int64) * I + c, mask=ok[:, None] & (c < I), other=0)
        else:
            v = _load(x, inv_smooth, pixel, c, ok[:, None], I).to(x.dtype.element_ty)
        a = tl.load(A + (r[:, None] * TAPS + tap) * I + c, mask=(r[:, None] < rank) & (c < I), other=0).to(x.dtype.element_ty)
        acc = tl.dot(v, a.T, acc, input_precision="ieee")
        if i % CHUNK == CHUNK - 1:
            total += acc
            acc = tl.zeros([ROWS, RP], tl.float32)
    tl.store(low + (part * T + t)[:, None] * RP + r[None, :], total + acc, mask=t[:, None] < T)


@jit(do_not_specialize=["T", "M", "O", "G", "rank", "parts", "lows", "unpacks", *WINDOWS])
def prepare(x, inv_smooth, shift, codes, mult, A, X, s, W8, low, partial, T, M, I, O, G, Cp, C, rank, parts, H, W, Ho, Wo, stride_y,
            stride_x, pad_y, pad_x, lows, unpacks, KW: tl.constexpr, TAPS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
            BLOCK: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, LOW_ROWS: tl.constexpr, LOW_BLOCK: tl.constexpr,
            CHUNK: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """Programs 0 .. lows - 1: low; the next `unpacks`: unpack; others: rows."""
    pid = tl.program_id(0)
    if pid < lows:
        if RP:
            tiles = lows // parts
            windows = (H, W, Ho, Wo, stride_y, stride_x, pad_y, pad_x)
            _low(x, inv_smooth, A, low, pid % tiles * LOW_ROWS, pid // tiles, M, I, rank, parts, windows, KW, TAPS, RP, LOW_ROWS,
                 LOW_BLOCK, CHUNK)  # fmt: skip
    elif pid < lows + unpacks:
        _unpack(codes, mult, W8, (pid - lows) * HALVES, O, G, Cp, C, TAPS, HALF, HALVES)
    else:
        pid -= lows + unpacks
        if PARTS:
            sample, part = pid // PARTS, pid % PARTS
            step = tl.cdiv(H * W, PARTS)
            first = sample * H * W
            _part(x, inv_smooth, shift, partial + pid, first + part * step, first + H * W, step, I, BLOCK, GROUP, ROWS, ROTATED)
        else:
            _rows(x, inv_smooth, shift, X, s, pid * ROWS, T, I, C, partial, BLOCK, GROUP, ROWS, 0, ROTATED)


@jit(do_not_specialize=["HW"])
def pixels(x, inv_smooth, shift, X, s, partial, I, C, HW, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
           PARTS: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """Rows of a convolution's x, with the scale of their sample."""
    n = tl.program_id(1)
    first = n * HW + tl.program_id(0) * ROWS
    _rows(x, inv_smooth, shift, X, s, first, n * HW + HW, I, C, partial + n * PARTS, BLOCK, GROUP, ROWS, PARTS, ROTATED)


# ------------------------------------------------------------------------------------------------ product


@jit
def _tile(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Tiles in columns of 8: what runs at one time shares its operands in the L2 cache."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + pid % (8 * tiles_n) % height, pid % (8 * tiles_n) // height


@jit
def _finish(acc, m0, n0, s, scale, bias, low, B, Y, M, N, rank, parts, per_scale, pixels_in, RP: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    """y = (acc s_x) s_w + bias + low B^T. s has a value for each row of X; a sample's are all the same."""
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    s_x = tl.load(s + m // per_scale * pixels_in, mask=m < M, other=0)
    y = acc.to(tl.float32) * s_x[:, None] * tl.load(scale + n, mask=n < N, other=0)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    for i in tl.static_range(0, RP, 64):
        r = i + tl.arange(0, min(RP, 64))
        a = tl.zeros([BM, min(RP, 64)], tl.float32)
        for part in range(parts):
            a += tl.load(low + (part * M + m)[:, None] * RP + r[None, :], mask=m[:, None] < M, other=0)
        b = tl.load(B + n[:, None] * rank + r[None, :], mask=(n[:, None] < N) & (r[None, :] < rank), other=0)
        y = tl.dot(a.to(Y.dtype.element_ty), b.to(Y.dtype.element_ty).T, y, input_precision="ieee")
    to = Y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, y.to(Y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@jit(do_not_specialize=["M", *WINDOWS])
def product(X, W8, s, scale, bias, low, B, Y, M, N, C, rank, parts, H, W, Ho, Wo, stride_y, stride_x, pad_y, pad_x,
            KW: tl.constexpr, TAPS: tl.constexpr, INSIDE: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y, a tile of BM x BN at a time. INSIDE: no window reaches over an edge."""
    tile_m, tile_n = _tile(M, N, BM, BN)
    k = tl.arange(0, BK)[None, :]
    windows = (H, W, Ho, Wo, stride_y, stride_x, pad_y, pad_x)
    n, y, z = _window((tile_m * BM + tl.arange(0, BM)) % M, windows)
    row = (n * H + y) * W + z
    w = W8 + ((tile_n * BN + tl.arange(0, BN)) % N)[:, None] * (TAPS * C) + k
    acc = tl.zeros([BM, BN], tl.int32)
    blocks = C // BK
    for i in tl.range(0, TAPS * blocks, num_stages=STAGES):
        tap, c = i // blocks, i % blocks * BK
        dy, dz = tap // KW, tap % KW
        from_x = X + (row + dy * W + dz).to(tl.int64)[:, None] * C + c + k
        if INSIDE:
            x = tl.load(from_x)
        else:
            ok = (y + dy >= 0) & (y + dy < H) & (z + dz >= 0) & (z + dz < W)
            x = tl.load(from_x, mask=ok[:, None], other=0)
        acc = tl.dot(x, tl.load(w + i * BK).T, acc, out_dtype=tl.int32)
    _finish(acc, tile_m * BM, tile_n * BN, s, scale, bias, low, B, Y, M, N, rank, parts, Ho * Wo, H * W, RP, BM, BN)


@gluon_jit
def _fetch(X, W8, XS, WS, full, n, y, z, n0, i, blocks, KW: gl.constexpr, TAPS: gl.constexpr, BYTES: gl.constexpr,
           BK: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Begins to copy K-block i, if there is one, to its stage of shared memory."""
    stage, there = i % STAGES, i < TAPS * blocks
    tap = i // blocks
    bar = full.index(stage)
    hopper.mbarrier.expect(bar, BYTES, pred=there)
    async_load(X, [n, y + tap // KW, z + tap % KW, i % blocks * BK], bar, XS.index(stage), pred=there)
    async_load(W8, [n0, i * BK], bar, WS.index(stage), pred=there)


@gluon_jit
def _sums(X, W8, n, y, z, pad_y, pad_x, n0, C, KW: gl.constexpr, TAPS: gl.constexpr, BW: gl.constexpr, BM: gl.constexpr,
          BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """int32 sums of a tile of outputs from y, z of sample n. A product is issued before the one ahead of it has ended."""
    XS = gl.allocate_shared_memory(gl.int8, [STAGES, 1, BM // BW, BW, BK], X.layout)
    WS = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], W8.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
    bytes: gl.constexpr = (BM + BN) * BK
    blocks = C // BK
    for i in gl.static_range(STAGES - 1):
        _fetch(X, W8, XS, WS, full, n, y - pad_y, z - pad_x, n0, i, blocks, KW, TAPS, bytes, BK, STAGES)
    acc = gl.zeros([BM, BN], gl.int32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, min(BN, 128), 32]))
    for i in range(TAPS * blocks):
        hopper.mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
        x, w = XS.index(i % STAGES).reshape([BM, BK]), WS.index(i % STAGES).permute((1, 0))
        acc = hopper.warpgroup_mma(x, w, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))  # the product before has read its buffer
        _fetch(X, W8, XS, WS, full, n, y - pad_y, z - pad_x, n0, i + STAGES - 1, blocks, KW, TAPS, bytes, BK, STAGES)
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    for i in gl.static_range(STAGES):
        hopper.mbarrier.invalidate(full.index(i))
    return acc


@gluon_jit
def _pixels(row, n, y, z, Ho, Wo, BW: gl.constexpr):
    """Row of Y for a row of the tile, and whether there is one."""
    y, z = y + row // BW, z + row % BW
    return (n * Ho + y) * Wo + z, (y < Ho) & (z < Wo)


@gluon_jit
def _add_branch(out, low, B, n, y, z, n0, M, N, rank, parts, Ho, Wo, BW: gl.constexpr, RP: gl.constexpr, BM: gl.constexpr,
                BN: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """out + low B^T."""
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // RP, RP // 8], [WARPS, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, RP], DTYPE)
    r = gl.arange(0, RP, gl.SliceLayout(0, lines))[None, :]
    m, ok = _pixels(gl.arange(0, BM, gl.SliceLayout(1, lines)), n, y, z, Ho, Wo, BW)
    o = n0 + gl.arange(0, BN, gl.SliceLayout(1, lines))[:, None]
    a = gl.zeros([BM, RP], gl.float32, lines)
    for part in range(parts):
        a += gl.load(low + (part * M + m)[:, None] * RP + r, mask=ok[:, None], other=0)
    b = gl.load(B + o * rank + r, mask=(o < N) & (r < rank), other=0).to(DTYPE)
    AS = gl.allocate_shared_memory(DTYPE, [BM, RP], shared, a.to(DTYPE))
    BS = gl.allocate_shared_memory(DTYPE, [BN, RP], shared, b)
    hopper.fence_async_shared()
    return hopper.warpgroup_mma(AS, BS.permute((1, 0)), out)


@gluon_jit(do_not_specialize=["M", "C", "tiles_m", "per_scale", "pixels_in", *WINDOWS])
def product_hopper(X, W8, s, scale, bias, low, B, Y, M, N, C, rank, parts, tiles_m, Ho, Wo, pad_y, pad_x, per_scale, pixels_in,
                   KW: gl.constexpr, TAPS: gl.constexpr, BW: gl.constexpr, RP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                   BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """product with strides of 1, in Gluon: operands come by TMA, and a product is issued before the one ahead of it has ended,
    which Triton's compiler does for floating-point sums only. X (N, H, W, C), of which a tile reads BM / BW x BW pixels, zeros
    outside; a linear layer's is one picture of one line. W8 (O, TAPS C). RP is at most 256."""
    pid, tiles_n = gl.program_id(0), gl.cdiv(N, BN)
    first = pid // (8 * tiles_n) * 8
    tile = first + pid % (8 * tiles_n) % gl.minimum(tiles_m - first, 8)
    n0 = pid % (8 * tiles_n) // gl.minimum(tiles_m - first, 8) * BN
    across = gl.cdiv(Wo, BW)
    tiles = across * gl.cdiv(Ho, BM // BW)
    n, y, z = tile // tiles, tile % tiles // across * (BM // BW), tile % tiles % across * BW
    acc = _sums(X, W8, n, y, z, pad_y, pad_x, n0, C, KW, TAPS, BW, BM, BN, BK, STAGES, WARPS)

    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, min(BN, 128), 16])
    m, ok = _pixels(gl.arange(0, BM, gl.SliceLayout(1, sums)), n, y, z, Ho, Wo, BW)
    o = n0 + gl.arange(0, BN, gl.SliceLayout(0, sums))
    out = gl.convert_layout(acc, sums, assert_trivial=True).to(gl.float32)
    out *= gl.load(s + m // per_scale * pixels_in, mask=ok, other=0)[:, None]
    out *= gl.load(scale + o, mask=o < N, other=0)[None, :]
    if bias is not None:
        out += gl.load(bias + o, mask=o < N, other=0).to(gl.float32)[None, :]
    if RP:
        out = _add_branch(out, low, B, n, y, z, n0, M, N, rank, parts, Ho, Wo, BW, RP, BM, BN, WARPS, Y.dtype.element_ty)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [WARPS, 1], [1, 0])
    m, ok = _pixels(gl.arange(0, BM, gl.SliceLayout(1, wide)), n, y, z, Ho, Wo, BW)
    o = n0 + gl.arange(0, BN, gl.SliceLayout(0, wide))[None, :]
    out = gl.convert_layout(out.to(Y.dtype.element_ty), wide)
    gl.store(Y + m.to(gl.int64)[:, None] * N + o, out, mask=ok[:, None] & (o < N))


# ------------------------------------------------------------------------------------------------ layers


def _blocks(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv takes microseconds


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _layouts(bk: int) -> list:
    return [gl.NVMMASharedLayout(swizzle_byte_width=bk, element_bitwidth=8, rank=rank) for rank in (4, 2)]


@functools.cache
def _tile_width(bm: int, ho: int, wo: int) -> int:
    """Of the rectangles of bm pixels those that cover a picture of ho x wo with the fewest tiles; the widest of them."""
    return min((bm >> i for i in range(5)), key=lambda bw: _blocks(ho, bm // bw) * _blocks(wo, bw))


@functools.cache
def _gpu(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper, and its processors."""
    about = torch.cuda.get_device_properties(device)
    return about.major == 9, about.multi_processor_count


class Sizes:
    """Of one call. A linear layer's rows are N pictures of one pixel."""

    def __init__(self, x_NHWC, y_NHWO, codes_OP, A_rK, group: int, group_x: int, rotated: bool, per_sample: bool, *geometry):
        (self.N, self.H, self.W, self.I), (_, self.Ho, self.Wo, self.O) = x_NHWC.shape, y_NHWO.shape
        self.T, self.M = self.N * self.H * self.W, self.N * self.Ho * self.Wo  # rows of x and of y
        self.group, self.group_x, self.rotated, self.per_sample = group, group_x, rotated, per_sample
        self.kernel, self.stride, self.padding = kernel, stride, padding = geometry
        self.taps = kernel[0] * kernel[1]
        self.windows = (self.H, self.W, self.Ho, self.Wo, *stride, *padding)  # WINDOWS
        self.Cp = 2 * codes_OP.shape[1] // self.taps  # channels of a tap of the packed weight
        self.C = _blocks(self.Cp, 64) * 64  # of X and W8
        self.rank = 0 if A_rK is None else len(A_rK)
        self.RP = max(32, _power(self.rank)) if self.rank else 0
        self.low_block = 128 if self.RP <= 64 else 32  # of K, for low
        few = _blocks(self.M, LOW_ROWS) <= FEW  # then low is the same sums by more programs
        self.parts = _blocks(self.taps * _blocks(self.I, self.low_block), CHUNK) if few else 1


def _prepare(x, codes, mult, A, inv_smooth, shift, size: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launches 1 and 2: X int8 (T, C), W8 int8 (O, taps C), s float32 (T,), low float32 (parts, M, RP)."""
    X, W8 = (x.new_empty(n * size.C, dtype=torch.int8) for n in (size.T, size.O * size.taps))
    s = x.new_empty(size.T, dtype=torch.float32)
    low = x.new_empty(size.parts * size.M * size.RP, dtype=torch.float32) if size.RP else None
    partial = x.new_empty(size.N * PARTS, dtype=torch.int32) if size.per_sample else None

    block = _power(max(size.C, size.group_x))
    rows, half = max(1, ROW_ELEMENTS // block), size.group // 2
    halves, row_groups = UNPACK_BYTES // half, size.Cp * size.taps // size.group
    lows = _blocks(size.M, LOW_ROWS) * size.parts if size.RP else 0
    unpacks, others = _blocks(size.O * row_groups, halves), size.N * PARTS if size.per_sample else _blocks(size.T, rows)
    options = dict(GROUP=size.group_x, ROTATED=size.rotated, BLOCK=block, ROWS=rows)
    options |= dict(num_warps=8 if block > 4096 else 4, enable_fp_fusion=False)
    prepare[(lows + unpacks + others,)](
        x, inv_smooth, shift, codes, mult, A, X, s, W8, low, partial, size.T, size.M, size.I, size.O, row_groups, size.Cp, size.C,
        size.rank, size.parts, *size.windows, lows, unpacks, KW=size.kernel[1], TAPS=size.taps, HALF=half, RP=size.RP,
        LOW_ROWS=LOW_ROWS, LOW_BLOCK=size.low_block, CHUNK=CHUNK, PARTS=PARTS if size.per_sample else 0, HALVES=halves, **options,
    )  # fmt: skip
    if size.per_sample:
        HW = size.H * size.W
        pixels[(_blocks(HW, rows), size.N)](x, inv_smooth, shift, X, s, partial, size.I, size.C, HW, PARTS=PARTS, **options)
    return X, W8, s, low


def _multiply(X, W8, s, low, scale, bias, B, y, size: Sizes) -> None:
    """Launch 3, into y."""
    operands = (s, scale, bias, low, B, y, size.M, size.O, size.C, size.rank, size.parts)
    hopper_gpu, processors = _gpu(y.device) if y.is_cuda else (False, 1)
    tile = FLOAT32 if y.dtype == torch.float32 else TILES[_blocks(size.M, 128) * _blocks(size.O, 128) <= processors]
    bm, bn, warps, stages = tile
    bk = 128 if size.C % 128 == 0 else 64
    options = dict(KW=size.kernel[1], TAPS=size.taps, RP=size.RP, BM=bm, BN=bn, BK=bk, STAGES=stages, num_warps=warps)
    if hopper_gpu and tile is not FLOAT32 and max(size.stride) == 1 and size.RP <= 256:
        n, h, w, ho, wo = (size.N, size.H, size.W, size.Ho, size.Wo) if size.per_sample else (1, 1, size.T, 1, size.T)
        bw = _tile_width(bm, ho, wo)
        tiles_m = n * _blocks(ho, bm // bw) * _blocks(wo, bw)
        pixel, row = _layouts(bk)
        from_x = TensorDescriptor(X, [n, h, w, size.C], [h * w * size.C, w * size.C, size.C, 1], [1, bm // bw, bw, bk], pixel)
        from_w = TensorDescriptor(W8, [size.O, size.taps * size.C], [size.taps * size.C, 1], [bn, bk], row)
        product_hopper[(tiles_m * _blocks(size.O, bn),)](
            from_x, from_w, *operands, tiles_m, ho, wo, *size.padding, size.Ho * size.Wo, size.H * size.W,
            BW=bw, WARPS=warps, **options,
        )  # fmt: skip
    else:
        inside = size.padding[0] == size.padding[1] == 0
        product[(_blocks(size.M, bm) * _blocks(size.O, bn),)](X, W8, *operands, *size.windows, INSIDE=inside, **options)


def _empty(x_NHWC: Tensor, codes_OP: Tensor, *others) -> Tensor:
    """Memory for what w4a4 returns; the last three of its arguments are kernel, stride and padding."""
    size = [(n + 2 * pad - kernel) // stride + 1 for n, kernel, stride, pad in zip(x_NHWC.shape[1:3], *others[-3:], strict=True)]
    return x_NHWC.new_empty(x_NHWC.shape[0], *size, codes_OP.shape[0])


def _run(
    x_NHWC: Tensor, codes_OP: Tensor, mult_P: Tensor, scale_O: Tensor, bias: Tensor | None, A_rK: Tensor | None,
    B_Or: Tensor | None, inv_smooth_I: Tensor | None, shift_I: Tensor | None, group: int, group_x: int, rotated: bool,
    per_sample: bool, kernel: list[int], stride: list[int], padding: list[int],
) -> Tensor:  # fmt: skip
    """(N, H', W', O); operands contiguous."""
    y = _empty(x_NHWC, codes_OP, kernel, stride, padding)
    if y.numel() > 0:
        size = Sizes(x_NHWC, y, codes_OP, A_rK, group, group_x, rotated, per_sample, kernel, stride, padding)
        with torch.cuda.device_of(x_NHWC):
            X, W8, s, low = _prepare(x_NHWC, codes_OP, mult_P, A_rK, inv_smooth_I, shift_I, size)
            _multiply(X, W8, s, low, scale_O, bias, B_Or, y, size)
    return y


traced_run = torch.library.custom_op("cmquant::w4a4_triton", _run, mutates_args=())
traced_run.register_fake(_empty)


def w4a4(x_NHWC: Tensor, *operands) -> Tensor:
    """(N, H, W, I) -> (N, H', W', O) in x's dtype; arguments as backends/cpu.py's function of the same name. It is an operator
    where a graph is being traced; elsewhere it does without the dispatcher, which takes longer than a launch."""
    operands = [v.detach().contiguous() if isinstance(v, Tensor) else v for v in operands]
    return (traced_run if torch.compiler.is_compiling() else _run)(x_NHWC.contiguous(), *operands)
