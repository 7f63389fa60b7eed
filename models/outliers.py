"""Outlier channels for the embedded models: a trained network is rewritten so that its function stays as it is, but the inputs of
its layers have a few channels 20 to 100 times larger than the others, as the activations of large models have.

Let a producer P make a tensor x that linear layers R read, with nothing between them that is not linear in each channel. For any
diagonal matrix S = diag(s),

    R x = (R S^-1) (S P ..)            rows of P and of its bias times s, columns of R divided by s

A LoRA moves along (rows of B in P, columns of A in R), so teacher, consistency model and the base of the student are the same
functions as before. Scales are powers of two, which floating point multiplies by exactly: `tiny` answers bit for bit as before, and
`tiny-flux` up to the rounding of 1 + scale in its modulations.

    producer P                                               readers R
    LayerNorm's weight and bias                              to_q, to_k, to_v of its attention; the first layer of the MLP
    GroupNorm's weight and bias, of a UNet's transformer     proj_in
    FLUX's modulation, y = norm(x) (1 + scale) + shift       to_q, to_k, to_v, add_*_proj, proj_mlp, the first layer of the MLP
      1 + scale' = s (1 + scale), shift' = s shift
    to_v (in FLUX's joint attention with add_v_proj)         to_out (and to_add_out; or proj_out): softmax mixes tokens alone
    value half of GEGLU                                      the second layer of the MLP
    last norm of the text encoder                            what reads tokens or their mean: attn2.to_k, attn2.to_v,
                                                             context_embedder, the embedding of pooled text

The other layers keep their inputs: convolutions of residual blocks and the second layers of FLUX's MLPs read SiLU and GELU, which
are not homogeneous; proj_out, shortcuts, down- and upsamplers of the UNet read a residual stream that many layers write; the layers
that embed time, and those that read the embedding, have SiLU between them. `Family.transfers` names the function that lists the
transfers of a network.

The scales. SmoothQuant (arXiv 2211.10438) finds a few channels with values 100 times as large as the others, the same channels for
all tokens; LLM.int8() (2208.07339) finds less than 0.1% of all values in such channels; PTQ4DiT (2405.16005) finds salient channels
in diffusion transformers. We know of no published distribution for SDXL or FLUX, so ours is a choice [O]: 1% of the channels of a
tensor, rounded up, in places drawn by a seed, are multiplied by 32 or 64. At 128 or 192 channels that is 2, more than in a large
model, where most groups of 16 channels have none. A channel keeps what it was before the scale, so the ratio of its largest value
to that of the median channel scatters around the scale: half of the ratios are above 43 in `tiny` and above 56 in `tiny-flux`, and
79% and 99% of them lie between 20 and 100 (consistency model, three captions, one call).

What the rewriting cannot imitate: columns of R at outlier channels are as much smaller as the channels are larger, while a trained
network's need not be; and scales are the same for all tokens, while real models also have outlier tokens.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

SHARE, SCALES = 0.01, (32.0, 64.0)


class Producer(NamedTuple):
    """Rows [part * n, (part + 1) * n) of a layer that makes n channels; plus: the network adds this to them."""

    layer: nn.Module
    part: int = 0
    plus: float = 0.0


# (producers, readers) of tensors that share their scales; the readers are Linear or LoRA, and read them as their first inputs
Transfers = Iterator[tuple[list[Producer], list[nn.Module]]]


def unet_transfers(net: nn.Module, text: nn.Module) -> Transfers:
    """Of a UNet with transformers, whose projections are linear, and pooled text."""
    transformers = [module for module in net.modules() if isinstance(module, Transformer2DModel)]
    crosses = [block.attn2 for transformer in transformers for block in transformer.transformer_blocks]
    yield [Producer(text.norm)], [net.add_embedding.linear_1, *(layer for attn in crosses for layer in (attn.to_k, attn.to_v))]
    for transformer in transformers:
        yield [Producer(transformer.norm)], [transformer.proj_in]
        for block in transformer.transformer_blocks:
            first, second, mlp = block.attn1, block.attn2, block.ff.net
            yield [Producer(block.norm1)], [first.to_q, first.to_k, first.to_v]
            yield [Producer(block.norm2)], [second.to_q]
            yield [Producer(block.norm3)], [mlp[0].proj]
            yield [Producer(first.to_v)], [first.to_out[0]]
            yield [Producer(second.to_v)], [second.to_out[0]]
            yield [Producer(mlp[0].proj)], [mlp[2]]  # rows: value, then gate


def flux_transfers(net: nn.Module, text: nn.Module) -> Transfers:
    """Of FLUX's transformer."""

    def modulated(linear: nn.Module, part: int = 0) -> list[Producer]:  # rows: shift, scale, gate of each branch
        return [Producer(linear, part), Producer(linear, part + 1, plus=1.0)]

    yield [Producer(text.norm)], [net.context_embedder, net.time_text_embed.text_embedder.linear_1]
    for block in net.transformer_blocks:
        attn, norm, context = block.attn, block.norm1.linear, block.norm1_context.linear
        yield modulated(norm), [attn.to_q, attn.to_k, attn.to_v]
        yield modulated(context), [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        yield modulated(norm, part=3), [block.ff.net[0].proj]
        yield modulated(context, part=3), [block.ff_context.net[0].proj]
        yield [Producer(attn.to_v), Producer(attn.add_v_proj)], [attn.to_out[0], attn.to_add_out]
    for block in net.single_transformer_blocks:
        attn = block.attn
        yield modulated(block.norm.linear), [attn.to_q, attn.to_k, attn.to_v, block.proj_mlp]
        yield [Producer(attn.to_v)], [block.proj_out]  # reads attention, then GELU


def draw_scales(n: int, gen: torch.Generator) -> Tensor:
    """s (n,) float32: ones, but ceil(SHARE n) of SCALES."""
    scale, outliers = torch.ones(n), math.ceil(SHARE * n)
    drawn = torch.randint(len(SCALES), (outliers,), generator=gen)
    scale[torch.randperm(n, generator=gen)[:outliers]] = torch.tensor(SCALES)[drawn]
    return scale


def scale_outputs(producer: Producer, scale: Tensor) -> None:
    """y + plus -> s (y + plus) for the producer's rows y, in place."""
    layer, n = getattr(producer.layer, "layer", producer.layer), len(scale)
    rows = slice(producer.part * n, (producer.part + 1) * n)
    for p in (layer.weight, layer.bias, getattr(producer.layer, "lora_B", None)):
        if p is not None:
            p[rows] *= scale if p.dim() == 1 else scale[:, None]
    if producer.plus:
        layer.bias[rows] += producer.plus * (scale - 1)


def scale_inputs(reader: nn.Module, scale: Tensor) -> None:
    """R -> R S^-1 on the first inputs of a Linear or LoRA, in place."""
    for p in (getattr(reader, "layer", reader).weight, getattr(reader, "lora_A", None)):
        if p is not None:
            p[:, : len(scale)] /= scale


@torch.no_grad()
def add_outliers(denoiser: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Rewrites a Denoiser of an embedded model in place, with text encoder and LoRA -> {reader's name in denoiser.net: s (n,)}."""
    gen, names = torch.Generator().manual_seed(seed), {layer: name for name, layer in denoiser.net.named_modules()}
    scales = {}
    for producers, readers in denoiser.family.transfers(denoiser.net, denoiser.text):
        outputs = [len(getattr(producer.layer, "layer", producer.layer).weight) for producer in producers]
        inputs = [getattr(reader, "layer", reader).in_features for reader in readers]
        scale = draw_scales(min(outputs + inputs), gen)
        for producer in producers:
            scale_outputs(producer, scale)
        for reader in readers:
            scale_inputs(reader, scale)
            scales[names[reader]] = scale
    return scales
