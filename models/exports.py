"""Packed networks in the formats of two other libraries, which have fast kernels for consumer GPUs.

    sdnq        SDNQ's int4 with SVD, linear layers and convolutions    `sdnq` in diffusers, needs the package sdnq
    nunchaku    SVDQuant's W4A4 and AWQ's W4A16, linear layers          `nunchaku_lite` in diffusers, needs the package kernels

The weight is ours in both, W^ = s m q with one number s m for each group of 64. s has 4 significant bits and m at most 4, so s m is
exact in bfloat16 and the codes q carry over as they are: dequantized weights are equal bit for bit. What is left to decide is the
input (layers.py: z = (x / l - c) R), which neither format changes as freely as ours does:

                 ours                        sdnq                      nunchaku
    y =          W^ q(z) + B A x / l + b     (W^ + up down) x + b      W^ q(x / smooth) + up down x + b
    q rounds     4 or 8 bits, --group-x      nothing, but W + up down  4 bits, groups of 64: step max|x| / 7, codes -8..7
    R            blocks of 16                refused                   refused
    l            a factor for each channel   refused                   smooth_factor, a power of two
    c            taken from x / l            put back: b loses W^ c, and nunchaku rounds inputs that have c in them
    8-bit x      EIGHT_BITS                  nothing is rounded        refused
    ranks        of each layer               of each layer             one for all: zeros up to a multiple of 16
    A, B         bfloat16, or 8 bits         bfloat16                  bfloat16
    W4A16        4 bits                      as every layer            AWQ, 4 bits; with a branch, or smoothed: 16 bits

Refused is a UserError before anything is drawn or written. Storage, where e is the fastest axis of each index, and the even one of
two neighbours is the low half of a byte:

    sdnq      weight    uint8 (O K / 2,)        q + 8 in the order of the float weight
              scale     (O, G, 1, kh, kw)       of a linear layer (O, G, 1); without the second axis where G = 1
              svd_up    (O, r),  svd_down (r, I kh kw)
    nunchaku  qweight   int8 (O, I / 2)         q in 4 bits;  o = a b h i (8 2 8), i = k v j e (2 4 8):    a k b i j h v e
              wscales   (I / 64, O)             also smooth_factor and bias; o = a b h j e (8 2 4 2):      a g b j h e
              proj_up   (O, r)                  o = x h i (2 8), r = y v j e (2 4 2):                      x y i j h v e
              proj_down (I, r)                  r = x h i, i = y v j e:                                    y x i j h v e
       AWQ    qweight   int32 (O / 4, I / 2)    q + 8;  o = a b (4), i = k v n j e (2 4 4 2):              a k b v j e n
              wscales   (I / 64, O),  wzeros = -8 wscales, in plain order

nunchaku's order is that of the registers of the GPU's matrix instruction. The layers below are the formats' tensors under their
names there, and compute in plain PyTorch what they stand for, so that pictures can be drawn with them; nunchaku's kernels sum
groups in 16 bits where these sum in float32.

Left out on purpose: NVFP4, SDNQ's own matrix product in 8 bits, which would round the weights again.       formats [R]; mapping [O]
Dimension key: quant.py; r is a rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
import quant
from layers import PackedLayer, W4A4Conv2d, W4A16Linear, on_meta, packed_layers, replace_layer
from run.common import UserError

GROUP, TILE, RANKS = 64, 128, 16  # nunchaku's: weights that share a scale, multiples of channels, multiple of ranks
AWQ_ROWS = 4  # of an AWQ weight that lie together

# ------------------------------------------------------------------------------------------------ layout


def to_nibbles(u: Tensor) -> Tensor:
    """uint8 in 0..15, any shape with an even number of elements -> uint8 (half of them,)."""
    even, odd = u.reshape(-1, 2).unbind(1)
    return even | odd << 4


def from_nibbles(packed: Tensor) -> Tensor:
    """Inverse of to_nibbles, flat."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten()


def codes_order(t_OI: Tensor) -> Tensor:
    """(O, I), multiples of 128 and 64 -> its elements as nunchaku has codes, flat."""
    O, I = t_OI.shape
    return t_OI.reshape(O // TILE, 8, 2, 8, I // GROUP, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7).flatten()


def scale_order(t_OG: Tensor) -> Tensor:
    """(O, G), O a multiple of 128 -> its elements as nunchaku has scales, flat."""
    O, G = t_OG.shape
    return t_OG.reshape(O // TILE, 8, 2, 4, 2, G).permute(0, 5, 1, 3, 2, 4).flatten()


def factor_order(t_OI: Tensor, down: bool) -> Tensor:
    """B (O, r), or A (r, I) where `down`, multiples of 16 -> its elements as nunchaku has factors, flat."""
    (O, I), tiles = t_OI.shape, (3, 0) if down else (0, 3)
    return t_OI.reshape(O // RANKS, 2, 8, I // RANKS, 2, 4, 2).permute(*tiles, 2, 5, 1, 4, 6).flatten()


def awq_order(t_OI: Tensor) -> Tensor:
    """(O, I), multiples of 4 and 64 -> its elements as AWQ has codes, flat."""
    O, I = t_OI.shape
    return t_OI.reshape(O // AWQ_ROWS, AWQ_ROWS, I // GROUP, 2, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4).flatten()


def in_plain_order(order: Callable[[Tensor], Tensor], stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this shape whose elements `order` put into `stored`."""
    places = order(torch.arange(stored.numel(), device=stored.device).view(shape))
    plain = torch.empty_like(stored.flatten())
    plain[places] = stored.flatten()
    return plain.view(shape)


def codes_and_steps(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """(q int8, s m float32) of each weight, padding removed, (O, taps, I) both."""
    gw = kernels.unpack(layer.packed)
    step_OK = (gw.scale_O[:, None] * gw.mult_OG).repeat_interleave(gw.group, 1)
    return tuple(t_OK.unflatten(1, (gw.taps, -1))[..., : gw.channels] for t_OK in (gw.codes_OK, step_OK))


def factors_for_input(layer: PackedLayer) -> tuple[Tensor, Tensor] | None:
    """(A (r, taps, I), B (O, r)) that read x itself, bfloat16; None without a branch."""
    A_rK, B_Or = layer.factors()
    return None if A_rK is None else (layer.for_input(A_rK.detach()).bfloat16().unflatten(1, (layer.taps, -1)), B_Or.bfloat16())


# ------------------------------------------------------------------------------------------------ layers of the formats


class ExportedLayer(nn.Module):
    """A packed layer in another format: the tensors that a file of it has, as buffers, and `forward`, which reads them."""

    def __init__(self, layer: PackedLayer, **tensors: Tensor):
        super().__init__()
        bias_O = layer.float_bias()
        for name, tensor in (tensors | {"bias": None if bias_O is None else bias_O.bfloat16()}).items():
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        self.weight_shape = tuple(layer.weight_shape)


class SDNQLayer(ExportedLayer):
    """int4 with SVD; x as the float layer's."""

    def __init__(self, layer: PackedLayer):
        codes_OtI, step_OtI = codes_and_steps(layer)
        group, kernel_size = sdnq_group(layer), tuple(layer.weight_shape[2:])
        scale_OGt = step_OtI[..., ::group].movedim(1, 2)
        one_group = () if scale_OGt.shape[1] == 1 else (1,)
        weight = to_nibbles((codes_OtI + quant.ZERO).to(torch.uint8).movedim(1, 2))
        scale = scale_OGt.reshape(*scale_OGt.shape[:2], *one_group, *kernel_size).bfloat16()
        A_rtI, B_Or = factors_for_input(layer) or (None, None)
        svd = {} if A_rtI is None else {"svd_up": B_Or, "svd_down": A_rtI.movedim(1, 2).flatten(1)}
        super().__init__(layer, weight=weight, scale=scale, **svd)
        is_conv = isinstance(layer, W4A4Conv2d)
        self.product = partial(F.conv2d, stride=layer.stride, padding=layer.padding) if is_conv else F.linear

    def dequantized(self) -> Tensor:
        """W^ + B A for x itself, float32."""
        O, _, *kernel_size = self.weight_shape
        scale = self.scale.float().view(O, self.scale.shape[1], 1, *kernel_size)
        q = (from_nibbles(self.weight).to(torch.int8) - quant.ZERO).view(O, self.scale.shape[1], -1, *kernel_size)
        w_OIhw = (q * scale).view(self.weight_shape)
        return w_OIhw + (self.svd_up.float() @ self.svd_down.float()).view_as(w_OIhw) if hasattr(self, "svd_up") else w_OIhw

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.dequantized().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class SVDQLayer(ExportedLayer):
    """nunchaku's W4A4 with a branch of `rank`, whose last ones are zeros: x (.., I) -> (.., O)."""

    def __init__(self, layer: PackedLayer, rank: int):
        (O, I), (codes_OtI, step_OtI) = layer.weight_shape, codes_and_steps(layer)
        A_rI, B_Or = (torch.zeros(size, dtype=torch.bfloat16, device=step_OtI.device) for size in ((rank, I), (O, rank)))
        if layer.rank:
            A_rtI, B = factors_for_input(layer)
            A_rI[: layer.rank], B_Or[:, : layer.rank] = A_rtI[:, 0], B
        smooth_I = torch.ones_like(step_OtI[0, 0]) if layer.inv_smooth is None else 1 / layer.inv_smooth.float()
        super().__init__(
            layer,
            qweight=to_nibbles(codes_order((codes_OtI[:, 0] & 0xF).to(torch.uint8))).view(torch.int8).view(O, I // 2),
            wscales=scale_order(step_OtI[:, 0, ::GROUP]).bfloat16().view(I // GROUP, O),
            smooth_factor=scale_order(smooth_I[:, None]).bfloat16(),
            proj_down=factor_order(A_rI, down=True).view(I, rank),
            proj_up=factor_order(B_Or, down=False).view(O, rank),
        )
        self.bias = None if self.bias is None else scale_order(self.bias[:, None])

    def dequantized(self) -> Tensor:
        """W^ (O, I) of x / smooth, float32."""
        O, I = self.weight_shape
        u_OI = in_plain_order(codes_order, from_nibbles(self.qweight.view(torch.uint8)), (O, I))
        step_OG = in_plain_order(scale_order, self.wscales, (O, I // GROUP)).float()
        return ((u_OI ^ 8).to(torch.int8) - 8) * step_OG.repeat_interleave(GROUP, 1)

    def forward(self, x: Tensor) -> Tensor:
        (O, I), rank = self.weight_shape, self.proj_up.shape[1]
        smooth_I = in_plain_order(scale_order, self.smooth_factor, (I, 1))[:, 0].float()
        A_rI = in_plain_order(partial(factor_order, down=True), self.proj_down, (rank, I)).float()
        B_Or = in_plain_order(partial(factor_order, down=False), self.proj_up, (O, rank)).float()
        y = F.linear(round_activations(x.float() / smooth_I), self.dequantized()) + F.linear(F.linear(x.float(), A_rI), B_Or)
        return (y if self.bias is None else y + in_plain_order(scale_order, self.bias, (O, 1))[:, 0].float()).to(x.dtype)


class AWQLayer(ExportedLayer):
    """AWQ's W4A16: x (.., I) -> (.., O)."""

    def __init__(self, layer: PackedLayer):
        (O, I), (codes_OtI, step_OtI) = layer.weight_shape, codes_and_steps(layer)
        u_OI, wscales = (codes_OtI[:, 0] + quant.ZERO).to(torch.uint8), step_OtI[:, 0, ::GROUP].t().bfloat16()
        qweight = to_nibbles(awq_order(u_OI)).view(torch.int32).view(O // AWQ_ROWS, I // 2)
        super().__init__(layer, qweight=qweight, wscales=wscales, wzeros=-quant.ZERO * wscales)

    def dequantized(self) -> Tensor:
        """W^ (O, I), float32."""
        u_OI = in_plain_order(awq_order, from_nibbles(self.qweight.view(torch.uint8)), self.weight_shape)
        scale_OI, zero_OI = (t.float().t().repeat_interleave(GROUP, 1) for t in (self.wscales, self.wzeros))
        return u_OI * scale_OI + zero_OI

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def round_activations(x: Tensor) -> Tensor:
    """As nunchaku rounds x (.., I), float32: step = max|x| / 7 of each 64 channels, codes -8..7; the step itself in bfloat16."""
    x_Gg = x.unflatten(-1, (-1, GROUP))
    step_G = x_Gg.abs().amax(-1, keepdim=True).clamp_min(quant.TINY) / quant.QMAX
    return ((x_Gg / step_G).round().clamp(quant.QMIN, quant.QMAX) * step_G.bfloat16().float()).flatten(-2)


# ------------------------------------------------------------------------------------------------ whole networks


def sdnq_group(layer: PackedLayer) -> int:
    """Weights that share a scale: ours, or fewer where the channels do not divide, since SDNQ pads nothing."""
    return math.gcd(layer.channels, layer.group)


@dataclass
class Exported:
    """A packed network in another format. layers: those that take the place of packed ones, by name; the others become plain.
    config: the quantization_config that loads them; about: what a card says of them (card.EXPORTS)."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def as_16bit(net: nn.Module) -> Exported:
    """Plain layers alone."""
    return Exported()


def as_sdnq(net: nn.Module) -> Exported:
    """Of a packed network of diffusers. UserError for inputs that the format does not change."""
    packed = dict(packed_layers(net))
    refuse(net, "sdnq", packed, {"--smooth 0": lambda layer: layer.inv_smooth is not None})
    plain = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d) and name not in packed]
    own = {f"{name}.weight": {} for name in packed}  # what is not in the rest of the configuration
    for name, layer in packed.items():
        if (group := sdnq_group(layer)) != GROUP:
            own[f"{name}.weight"]["group_size"] = group
        if layer.rank:
            own[f"{name}.weight"] |= {"use_svd": True, "svd_rank": layer.rank}
    config = {"quant_method": "sdnq", "weights_dtype": "int4", "group_size": GROUP, "use_svd": False, "quant_conv": True}
    config |= {"dequantize_fp32": True, "add_skip_keys": False, "modules_to_not_convert": [f"{name}.weight" for name in plain]}
    config["modules_quant_config"] = {name: settings for name, settings in own.items() if settings}
    return Exported({name: SDNQLayer(layer) for name, layer in packed.items()}, config)


def as_nunchaku(net: nn.Module) -> Exported:
    """Of a packed network of diffusers. UserError for inputs, sizes and groups that the format lacks, and for convolutions."""
    packed = dict(packed_layers(net))
    w4a16 = {name: layer for name, layer in packed.items() if isinstance(layer, W4A16Linear)}
    svdq = {name: layer for name, layer in packed.items() if name not in w4a16}
    if name := next((name for name, layer in svdq.items() if not fits_tiles(layer)), ""):
        raise UserError(f"nunchaku has linear layers alone, of multiples of {TILE} channels, unlike {name}: choose --export sdnq")
    lacks = {
        "--smooth 0": lambda layer: layer.inv_smooth is not None and not is_power_of_two(layer.inv_smooth),
        f"--group-w {GROUP}": lambda layer: layer.group != GROUP,
        "--bits-x 4 --inputs-8bit 0": lambda layer: layer.group_x == quant.EIGHT_BITS,
    }
    refuse(net, "nunchaku", svdq, lacks)
    rank = math.ceil(max([1, *(layer.rank for layer in svdq.values())]) / RANKS) * RANKS
    awq = {name: layer for name, layer in w4a16.items() if fits_awq(layer)}
    layers = {name: SVDQLayer(layer, rank) for name, layer in svdq.items()} | {name: AWQLayer(layer) for name, layer in awq.items()}
    kind = {"precision": "int4", "group_size": GROUP}
    config = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
    config |= {"svdq_w4a4": kind | {"rank": rank, "targets": [*svdq]}} if svdq else {}
    config |= {"awq_w4a16": kind | {"targets": [*awq]}} if awq else {}
    groups = " and ".join(str(group) for group in sorted({layer.group_x for layer in svdq.values()}))
    counts = f"{len(svdq)} layers are W4A4 of rank {rank}, {len(awq)} W4A16 (AWQ), {len(w4a16) - len(awq)} in plain 16 bits."
    return Exported(layers, config, {"layers": counts, "activations": f"groups of {groups}"})


FORMATS = {"16bit": as_16bit, "sdnq": as_sdnq, "nunchaku": as_nunchaku}  # --export: f(packed network) -> Exported


def replace(net: nn.Module, exported: Exported) -> None:
    """In place: the network of which save_pretrained writes the other format."""
    for name, layer in exported.layers.items():
        replace_layer(net, name, layer)
    net.dequantize()  # what is still packed, and the network's methods
    if exported.config:
        net.register_to_config(quantization_config=exported.config)


def refuse(net: nn.Module, kind: str, packed: dict[str, PackedLayer], lacks: dict[str, Callable[[PackedLayer], bool]]) -> None:
    """UserError that counts the layers with what a format lacks, and names all flags of a training without it.

    lacks: flag -> whether a layer was made without it. Rotation is added to it, and means whose share no bias could take."""
    plain = on_meta(net)
    lacks = {"--no-rotate": lambda layer: layer.rotated} | lacks
    found = {flag: [name for name, layer in packed.items() if is_so(layer)] for flag, is_so in lacks.items()}
    found["--no-centre"] = [
        name for name, layer in packed.items() if layer.shift is not None and plain.get_submodule(name).bias is None
    ]
    if flags := [flag for flag, names in found.items() if names]:
        refused = list(dict.fromkeys(name for names in found.values() for name in names))
        count, flags = f"{len(refused)} layers as they are, {refused[0]} first", " ".join(flags)
        raise UserError(f"{kind} cannot hold {count}: train with {flags}")


def is_power_of_two(t: Tensor) -> bool:
    return bool((torch.frexp(t.float())[0] == 0.5).all())


def fits_tiles(layer: PackedLayer) -> bool:
    return not isinstance(layer, W4A4Conv2d) and not any(size % TILE for size in layer.weight_shape)


def fits_awq(layer: PackedLayer) -> bool:
    """Whether AWQ holds the layer exactly: it knows no branch and no changed inputs."""
    changed = layer.rank or layer.rotated or layer.inv_smooth is not None or layer.shift is not None
    return not changed and layer.group == GROUP and layer.channels % GROUP == 0 and layer.out % AWQ_ROWS == 0
