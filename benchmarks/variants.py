"""What no flag of train.py does: the @names of benchmarks/ablate.py. A variant is a function that patches the code before a run, in
the run's own process, so that it holds for statistics, training and the pictures that are scored. Formats that the kernels do not
have are simulated: the eager kernels compute in float32 with values on the format's grid.
"""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import kernels
import quant
import student
import tdpt
from backends import attention
from layers import PackedLayer
from models import checkpoint
from models.denoiser import Denoiser
from models.family import FAMILIES


def eager_everywhere() -> None:
    """Every backend is the eager one: the kernels in C++ and Triton round activations themselves and read codes of 4 bits."""
    kernels.BACKENDS = dict.fromkeys(kernels.BACKENDS, kernels.BACKENDS["eager"])


def powers_of_two() -> None:
    """Multipliers of activations are 1, 2, 4, 8, 16, so that a group drops leading zeros of an 8-bit code (QuaRTZ, 2509.26436)."""
    exact = quant.quantize_activation

    def quantize(x: Tensor, group: int = 16, per_sample: bool = False):
        codes, m_G, scale = exact(x, group, per_sample)
        if group == quant.EIGHT_BITS:
            return codes, m_G, scale
        m_G = torch.exp2(m_G.float().log2().ceil())
        step_G = m_G * scale.reshape(scale.shape + (1,) * (m_G.dim() - scale.dim()))
        padded = torch.nn.functional.pad(x.float(), (0, codes.shape[-1] - x.shape[-1])).unflatten(-1, (m_G.shape[-1], -1))
        codes = (padded / step_G[..., None]).round_().clamp_(quant.QMIN, quant.QMAX).to(torch.int8).flatten(-2)
        return codes, m_G.to(torch.uint8), scale

    quant.quantize_activation = quantize
    eager_everywhere()


def fitted(model: Callable, path: tdpt.Path, states: Tensor, cond: dict[str, Tensor], edges: Tensor) -> Callable:
    """The few-step model whose jump y = a x + b p has the coefficients that take its own states nearest to those of the 16-bit
    model, `states` (K + 1, B, ...), by least squares over B pictures, step by step (Q-Sched, 2509.01624, fits them to another
    loss)."""
    factors, x = {}, states[0]
    for k, (t, s) in enumerate(itertools.pairwise(edges)):
        t_B, s_B = t.expand(len(x)), s.expand(len(x))
        (a, b), p = path.coefficients(t_B[:1], s_B[:1]), model(x, t_B, s_B, cond)
        parts = torch.stack([(a.item() * x).flatten(), (b.item() * p).flatten()], 1).double()
        u, v = torch.linalg.lstsq(parts, states[k + 1].flatten()[:, None].double()).solution.flatten().tolist()
        factors[float(t)] = (u - 1) * a.item() / b.item(), v
        x = path.jump(x, factors[float(t)][0] * x + v * p, t_B, s_B)

    def call(x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
        of_x, of_p = factors[float(t[0])]
        return of_x * x + of_p * model(x, t, s, cond)

    return call


def multiply_in_float() -> None:
    """The eager kernels take operands m q that are no int8, as float32. Their sums are in float32."""
    eager_everywhere()
    im2col = kernels.im2col
    kernels.int8_matmul = lambda X_TK, W_OK: X_TK.float() @ W_OK.float().t()
    kernels.im2col = lambda X_NHWC, *geometry: im2col(X_NHWC, *geometry).view(X_NHWC.dtype)  # it copies four bytes at a time


def keep_products() -> None:
    """Packed layers hold the product m q of each weight, any float32 number, in the place of m and q. Checkpoints keep these bytes
    as they are, so that the size which a run reports is that of float32."""
    init = PackedLayer.__init__

    def with_room(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.codes_OP = self.codes_OP.new_empty(self.out, 8 * self.codes_OP.shape[1])  # 4 bytes a weight in place of half a byte

    def pack(gw: quant.GridWeight) -> kernels.PackedWeight:
        unused = kernels.pack_multipliers(torch.ones_like(gw.mult_OG, dtype=torch.uint8))
        return kernels.PackedWeight(gw.int8().view(torch.uint8), unused, gw.scale_O, gw.channels, gw.taps, gw.group)

    def dequantize(pw: kernels.PackedWeight) -> Tensor:
        w_OK = kernels.weight_int8(pw) * pw.scale_O[:, None]
        return w_OK.unflatten(1, (pw.taps, -1))[..., : pw.channels].flatten(1)

    PackedLayer.__init__, kernels.pack, kernels.dequantize = with_room, pack, dequantize
    quant.GridWeight.int8 = lambda gw: gw.codes_OK * gw.mult_OG.float().repeat_interleave(gw.group, dim=1)
    kernels.weight_int8 = lambda pw: pw.codes_OP.view(torch.float32)
    multiply_in_float()


def activations_in_16_bits() -> None:
    """Activations are not rounded: x, with multipliers and scales of 1, takes the place of its codes. (Simulated: float32.)"""

    def quantize(x: Tensor, group: int = 16, per_sample: bool = False):
        scale = torch.ones(x.shape[:1] if per_sample else x.shape[:-1], device=x.device)
        return x.float(), torch.ones_like(x[..., :1], dtype=torch.uint8), scale

    quant.quantize_activation = quantize
    multiply_in_float()


def weights_in_8_bits() -> None:
    """Weights have codes in -128..127 and a scale for each row, rounded up as ours, and no multipliers; W4A16 layers become W8A16.
    Their products are those of int8, so what is simulated is the storage."""
    bound = quant.step_bound
    quant.QMIN, quant.QMAX, quant.MMAX = -128, 127, 1
    quant.step_bound = lambda x_Gg, qmin=-128, qmax=127: bound(x_Gg, qmin, qmax)
    keep_products()


def float_scales() -> None:
    """Each group of weights has a float step in place of m s, with 11 bits as float16: the best of 1/16 .. 16/16 of the step that
    clips none of its values, where ours is the best of such shares of the row's. GPTQ and codes are the same. (Simulated.)"""
    best = quant.choose_multipliers

    def choose(w_OGg: Tensor, scale_O: Tensor, weight_Gg: Tensor | None = None, search: bool = True) -> Tensor:
        own_OG = (quant.step_bound(w_OGg / scale_O[:, None, None]) / quant.MMAX).clamp_min(2.0**-14)
        share_OG = best(w_OGg / (own_OG * scale_O[:, None])[..., None], torch.ones_like(scale_O), weight_Gg, search)
        return (share_OG * own_OG).half().float()

    quant.choose_multipliers, quant.MULTIPLIER = choose, torch.float16
    quant.gptq_gpu.is_available = lambda: False  # it chooses by itself
    keep_products()


def row_scales() -> None:
    """All groups of a row of weights have one multiplier, so that the row has one step: the best of 1/16 .. 16/16 of the one that
    clips none of its values, found before GPTQ begins."""
    best, last = quant.choose_multipliers, [None, None]

    def choose(w_OGg: Tensor, scale_O: Tensor, weight_Gg: Tensor | None = None, search: bool = True) -> Tensor:
        if scale_O is not last[0]:  # else it is GPTQ that asks, for one group after the other
            weight_K = None if weight_Gg is None else weight_Gg.reshape(1, -1)
            last[:] = scale_O, best(w_OGg.flatten(1)[:, None], scale_O, weight_K, search)
        return last[1].expand(-1, w_OGg.shape[1])

    quant.choose_multipliers = choose
    quant.gptq_gpu.is_available = lambda: False  # it chooses by itself


def modulations(kind: str) -> None:
    """Modulations (FLUX's AdaLN, the UNets' time_emb_proj), W4A16 by the families' rules, are of another kind. The text projection,
    which is W4A16 too, stays so. Layers that are not packed have no branch: all branches together are as much smaller."""
    for name, family in FAMILIES.items():

        def precision(layer: str, rule: Callable = family.precision) -> str:
            return kind if rule(layer) == "w4a16" and layer != "context_embedder" else rule(layer)

        FAMILIES[name] = dataclasses.replace(family, precision=precision)


def modulations_w8a16() -> None:
    """Modulations have 8-bit weights, rounded to nearest with a scale for each row, and no branch. (Simulated: they are 16-bit
    layers with rounded weights, which a checkpoint keeps in bfloat16, as a kernel would multiply them.)"""
    modulations("w8a16")
    listed = student.layers_to_quantize

    def others(cfg, base: Denoiser) -> list[student.Layer]:
        layers = listed(cfg, base)
        for weight in (layer.module.weight for layer in layers if layer.kind == "w8a16"):
            step_O1 = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(quant.TINY)
            weight.copy_((weight / step_O1).round() * step_O1)
        return [layer for layer in layers if layer.kind != "w8a16"]

    student.layers_to_quantize = others


def attention_8bit() -> None:
    """The student's attention is that of backends/attention.py, in training too, also where it has fewer keys than are worth it."""
    attention.FEWEST_KEYS, packed = 1, checkpoint._packed_model

    def with_ours(*about) -> Denoiser:
        denoiser = packed(*about)
        if isinstance(denoiser.net, UNet2DConditionModel):
            denoiser.net.set_attn_processor(AttnProcessor2_0())  # those of tiny do not ask torch for attention
        attention.in_8_bits(denoiser.net)
        return denoiser

    checkpoint._packed_model = with_ours


OF_SAMPLER = {"@qsched"}  # these patch nothing: benchmarks/ablate.py draws with `fitted` where it scores
VARIANTS: dict[str, Callable] = {
    "@qsched": lambda: None,
    "@powers": powers_of_two,
    "@a16": activations_in_16_bits,
    "@w8": weights_in_8_bits,
    "@float-scales": float_scales,
    "@row-scales": row_scales,
    "@modulations-w4a4": lambda: modulations("w4a4"),
    "@modulations-w8a16": modulations_w8a16,
    "@modulations-16bit": lambda: modulations("16bit"),
    "@attention-8bit": attention_8bit,
}
