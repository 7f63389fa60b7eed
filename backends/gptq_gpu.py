"""GPTQ's rounding on a GPU: one Triton kernel per block of 128 columns instead of some 7 launches per column.

Rows of W are independent given U (U^T U = H^-1), so a program takes BO rows through a whole block (quant.py has the method
and the grid, codes q in qmin..qmax, multipliers m in 1..mmax, s the scale of a row):

    at a group's first column   m = argmin_m sum_k (v_k - m q_k)^2 / U_kk^2,   v = w / s,   q = clamp(rint(v / m))
    at each column k            q = clamp(rint(w_k / (s m))),   E_k = (w_k - s m q) / U_kk,   w_j -= E_k U_kj   (j > k)

and the columns right of the block follow with one matmul, W -= U[block, right]^T E, in float32. For K columns in G groups the
number of launches falls from about 7 K + 100 G to 3 K / 128.

Layout: one warp per program, its tile of W as [16, 8, BO] with column k = 8 c + i, four lanes to a row. i lives in a thread's
registers and is unrolled, so picking column k costs one select per register of c and two shuffles. Columns up to k are done:
they still get updates, which nobody reads, because that saves a mask. Of u only the entries right of the diagonal and inside of
the n columns are used.
Sums run in another order than in eager mode and a GPU contracts products and sums, so a code (and then those to its right) can
differ where two choices are within a few units of float32 of each other. Left out: rounding without the search over m.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do without it
    triton = None

I8 = 8  # columns that a thread keeps side by side: the smallest group
jit = triton.jit(do_not_specialize=["O"]) if triton else lambda fn: fn
BO, WARPS = 8, 1  # rows per program: 4 lanes of a warp share a row


def is_available() -> bool:
    """Whether Triton is installed and there is a CUDA device or Triton's interpreter (TRITON_INTERPRET=1)."""
    return triton is not None and (torch.cuda.is_available() or triton.knobs.runtime.interpret)


@jit
def gptq_block(
    w_ptr, m_ptr, err_ptr, u_ptr, inv_ptr, weight_ptr, scale_ptr, O,
    n: tl.constexpr, g: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, MMAX: tl.constexpr,
    BLOCK: tl.constexpr, I8: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """w (n, O): columns of W in, their codes out; m (n / g, O), err (BLOCK, O) out; u (BLOCK, BLOCK)."""
    RINT: tl.constexpr = 12582912.0  # 1.5 * 2^23: x + RINT - RINT rounds |x| < 2^22 half to even
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    i, c = tl.arange(0, I8), tl.arange(0, BLOCK // I8)
    k_ci = c[:, None] * I8 + i
    inside = o < O
    scale = tl.load(scale_ptr + o, mask=inside, other=1.0)
    w = tl.load(w_ptr + k_ci[:, :, None] * O + o, mask=(k_ci < n)[:, :, None] & inside, other=0.0)
    weight_ci = tl.load(weight_ptr + k_ci, mask=k_ci < n, other=0.0)
    for k0 in range(0, n, g):
        v = tl.div_rn(w, scale[None, None, :])
        weight = tl.where((k_ci >= k0) & (k_ci < k0 + g), weight_ci, 0.0)[:, :, None]
        best, m = tl.full([BO], float("inf"), tl.float32), tl.full([BO], 1.0, tl.float32)
        for t in range(1, MMAX + 1):
            x = tl.minimum(tl.maximum(v * tl.div_rn(1.0, t * 1.0), QMIN), QMAX)
            x = v - (x + RINT - RINT) * t
            e = tl.sum(tl.sum(x * x * weight, 1), 0)
            m = tl.where(e < best, t * 1.0, m)
            best = tl.minimum(best, e)
        tl.store(m_ptr + k0 // g * O + o, m, mask=inside)
        step = scale * m
        for ck in range(k0 // I8, (k0 + g) // I8):
            for ik in tl.static_range(I8):
                k = ck * I8 + ik
                u, inv = tl.load(u_ptr + k * BLOCK + k_ci), tl.load(inv_ptr + k)  # early: not in the chain that follows
                bits = tl.sum(tl.where((i == ik)[None, :, None], w.to(tl.int32, bitcast=True), 0), 1)  # a register each
                w_k = tl.sum(tl.where((c == ck)[:, None], bits, 0), 0).to(tl.float32, bitcast=True)
                q = tl.minimum(tl.maximum(tl.div_rn(w_k, step), QMIN), QMAX) + RINT - RINT
                err = (w_k - q * step) * inv
                tl.store(w_ptr + k * O + o, q, mask=inside)
                tl.store(err_ptr + k * O + o, err, mask=inside)
                w -= u[:, :, None] * err


def round_gptq(w_OGg: Tensor, scale_O: Tensor, U_KK: Tensor, qmin: int, qmax: int, mmax: int, block: int) -> tuple[Tensor, Tensor]:
    """What quant.round_gptq returns, (q (O, G, g), m (O, G)) float32, for arguments as there. `block`: a power of two, at least g;
    the columns between two updates of everything to the right."""
    O, G, g = w_OGg.shape
    w_KO = w_OGg.flatten(1).t().clone(memory_format=torch.contiguous_format)  # becomes the codes, block by block
    m_GO, err_KO = w_KO.new_empty(G, O), w_KO.new_empty(block, O)
    diag_K, u_KK = U_KK.diagonal(), w_KO.new_zeros(block, block)
    weight_K, inv_K = 1 / diag_K.square(), 1 / diag_K
    with torch.cuda.device_of(w_KO):
        for k0 in range(0, G * g, block):
            k1 = min(k0 + block, G * g)
            n = k1 - k0
            u_KK[:n, :n] = U_KK[k0:k1, k0:k1]
            gptq_block[(triton.cdiv(O, BO),)](
                w_KO[k0:], m_GO[k0 // g :], err_KO, u_KK, inv_K[k0:], weight_K[k0:], scale_O.contiguous(), O, n, g,
                qmin, qmax, mmax, block, I8, BO, num_warps=WARPS,
            )  # fmt: skip
            if k1 < G * g:
                w_KO[k1:].addmm_(U_KK[k0:k1, k1:].t(), err_KO, alpha=-1)
    return w_KO.t().reshape(O, G, g), m_GO.t().contiguous()
