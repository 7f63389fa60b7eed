"""Attention in 8 bits for x86 CPUs, where it takes more of a packed network's time than the products around it do.

    o = softmax(scale q k^T + mask) v           q (B, H, T, D), k and v (B, H, S, D), softmax over S

    k' = (k - mean_S k) / lambda,  q' = q lambda     lambda_d = sqrt(rms_S k_d): both share outlier channels. The mean adds the same
                              to every logit of a row, which softmax does not see
    l  = s_q s_k q_q q_k      of codes -qmax..qmax of q' and k', one scale for each query and key; sums are exact int32
    p  = 2^(l - m_b)          for a block b of KEYS keys, m_b its largest logit (base 2), in codes 0..pmax: each has all of them
    o  = mean_S v + sum_b w_b s_v (q_p q_v) / sum_b w_b (sum q_p),     w_b = 2^(m_b - m), m the largest m_b; v - mean_S v in codes,
                              a scale for each channel of a block. The weights are codes over a sum of codes: they add up to one

qmax, pmax are 127, 255 with AVX512-VNNI, and 63, 127 with AVX2, whose unit adds pairs of products in int16. No T x S matrix is
made: attention.cpp lets 48 queries of a head meet one block of keys after the other. The result depends neither on the batch nor on
threads. A row that is masked everywhere, and heads with what is no number, are NaN, as softmax makes them.

`attention` is the kernel, with the gradients of torch's own attention at the same q, k, v (straight-through); `eager` says the same
in PyTorch, and is what the tests compare with. `in_8_bits(net)` makes a network of diffusers use it: whatever its processors hand
to torch's scaled_dot_product_attention is answered by the kernel, where that is the faster one (`fits`).

Dimensions: B batch, H heads, T queries, S keys, D channels of a head.   k without its mean: SageAttention [R]; lambda: as in
SmoothQuant [R]; blocks of p [O]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backends import cpu

KEYS = 64  # of a block, in attention.cpp too
FEWEST_KEYS = 256  # with fewer, as in attention to a caption, torch's own is as fast
QMAX, PMAX = (127, 255) if cpu.CPU.get("avx512_vnni") else (63, 127)


def _codes(x: Tensor, axis: int, most: int) -> tuple[Tensor, Tensor]:
    """(codes, scale) of x, by the largest magnitude along an axis."""
    scale = (x.abs().amax(axis, keepdim=True) / most).clamp_min(1e-30)
    return (x / scale).round(), scale


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, qmax: int = QMAX, pmax: int = PMAX) -> Tensor:
    """(B, H, T, D) in q's dtype, by the equations above. mask: added to the logits, broadcast to (B, H, T, S)."""
    S, dtype, blocks = k.shape[2], q.dtype, math.ceil(k.shape[2] / KEYS)
    q, k, v = (t.float() for t in (q, k, v))
    k, mean_v = k - k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    rms = k.square().mean(2, keepdim=True).sqrt()
    smooth = torch.where(rms > 0, rms, 1).sqrt()
    (q_q, s_q), (q_k, s_k) = _codes(q * smooth, -1, qmax), _codes(k / smooth, -1, qmax)
    l_TS = q_q @ q_k.mT * s_k.mT * (s_q * scale * math.log2(math.e))
    l_TS = l_TS if mask is None else l_TS + math.log2(math.e) * mask
    l_TbK = F.pad(l_TS, (0, blocks * KEYS - S), value=-math.inf).unflatten(-1, (blocks, KEYS))
    m_Tb = l_TbK.amax(-1).clamp_min(-1e30)
    q_p = (pmax * torch.exp2(l_TbK - m_Tb[..., None])).round()
    v_bKD = F.pad(v - mean_v, (0, 0, 0, blocks * KEYS - S)).unflatten(2, (blocks, KEYS))
    q_v, s_v = _codes(v_bKD, -2, qmax)
    w_Tb = torch.exp2(m_Tb - m_Tb.amax(-1, keepdim=True))
    sums_bTD = q_p.transpose(2, 3) @ q_v * s_v * w_Tb.mT[..., None]
    total_T = (w_Tb * q_p.sum(-1)).sum(-1)
    return (mean_v + sums_bTD.sum(2) / total_T[..., None]).to(dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return _attention(q, k, v, mask, scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in inputs]
            o = F.scaled_dot_product_attention(*inputs, attn_mask=None if mask is None else mask.to(grad.dtype), scale=ctx.scale)
            return *torch.autograd.grad(o, inputs, grad), None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if not cpu.is_available():
        return eager(q, k, v, mask, scale)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return torch.ops.cmquant.attention(q, k, v, mask, scale).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, H, T, D) of q (B, H, T, D), k and v (B, H, S, D), in their dtype: float32, bfloat16 or float16. mask: float, added to the
    logits, or bool, True for keys that are seen; broadcast to (B, H, T, S). scale: default 1 / sqrt(D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _StraightThrough.apply(q, k, v, mask, scale)
    return _attention(q, k, v, mask, scale)


def fits(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> bool:
    """Whether the kernel can answer a call of scaled_dot_product_attention, and is worth it."""
    same = q.dim() == 4 and q.shape[:2] == k.shape[:2] and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    plain = not (dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.requires_grad))
    return same and plain and q.device.type == "cpu" and k.shape[2] >= FEWEST_KEYS and cpu.is_available()


class _In8Bits(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            long = {"query": "q", "key": "k", "value": "v"}
            given = dict(zip(names, args, strict=False)) | {long.get(name, name): value for name, value in kwargs.items()}
            if fits(**given):
                return attention(given["q"], given["k"], given["v"], given.get("attn_mask"), given.get("scale"))
        return func(*args, **kwargs)


def in_8_bits(net: nn.Module) -> None:
    """From now on the network's attention is that of this file, where it fits."""
    forward = net.forward

    def with_ours(*args, **kwargs):
        with _In8Bits():
            return forward(*args, **kwargs)

    net.forward = with_ours
