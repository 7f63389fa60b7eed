"""The layers that carry W ~ Q + B A: W4A4Linear, W4A4Conv2d, W4A16Linear, for training and for deployment.

Forward, in training too, is the deployed kernel itself (kernels.py):

    y = q(z) q(W R)^T + bias + (x' A^T) B^T,       x' = x * inv_smooth,  z = (x' - c) R,       output in x.dtype

R rotates blocks of channels (quant.rotate; without `rotated` it is the identity), and c is the mean input during calibration
(`shift`; 0 where there is none). What c contributes, (W - B A) c with the B A of the beginning, is a constant: it is part of the
bias, and never rounded to 4 bits.

Backward, with g = dL/dy and W^ = q(W R) R: straight-through on q(z), and gradients to x, A, B and nothing else,

    dA = (g B)^T x'      dB = g^T (x' A^T)      dx = inv_smooth * (g (W^ + B A))

W^ is dequantized again from the packed codes; W^ + B A (float32) is rounded to the dtype of g; all products run in x's dtype, as
those of a float layer. The range of the activation quantizer reaches to the largest value, so nothing is clipped and no gradient is
masked. The anchor [R] is the same packed base with the initial A0, B0: `anchored(model)`.

Deployment: the branch in 16 bits; no branch, Q(Q + BA), by `merged_layer`; or the branch in 8 bits with two scales for each rank,

    A_rk ~= a_r qA_rk,  a_r = max_k |A_rk| / 127        B_or ~= b_r qB_or,  b_r = max_o |B_or| / 127        q int8

by which an entry moves by at most half a step and a component of BA by at most a_r b_r (127 + 1/4). One scale a_r b_r would do for
the product; two keep A and B themselves, balanced and in float16's range. Before that the components are mixed, which no other part
of the layer can notice: with BA = U S V^T and a fixed orthogonal matrix M (r x r),

    B <- U S^1/2 M,  A <- M^T S^1/2 V^T         BA is the same; its rounding error falls from sum_r S_r^2 to (sum_r S_r)^2 / r

times the squared relative step, and entries become Gaussian, with smaller largest ones. On `tiny`, whose branches are half of its
layers, 8 bits cost 4 dB without mixing and 2 dB with it; on Gaussian layers of 192 x 256, rank 16, they add less than 2% to the
4-bit error.

A layer of rank 0 has no branch: lora_A and lora_B are None, and nothing in it is trained.

To other libraries a packed layer is the nn.Linear or nn.Conv2d that it replaces, with a `weight` that is dequantized when it is
read (W^ + B A for x itself) and that cannot be changed. So PEFT puts its adapters around packed layers as around float ones. The
`bias` is the kernel's: in a centred layer it does not belong to that weight.
Dimension key: quant.py (O, I, K, r, T, N H W C); P packed bytes of a row. A is (r, K), B is (O, r).
Left out on purpose: training of grid, bias or scales, higher derivatives.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import kernels
import quant

# ---------------------------------------------------------------- the branch in 8 bits


def quantize_lora(A_rK: Tensor, B_Or: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(qA_rK int8, qB_Or int8, scale_2r float32): a_r and b_r of the module docstring, 0 for a factor of zeros.

    ValueError for inf or NaN."""
    A_rK, B_Or = A_rK.detach().float(), B_Or.detach().float()
    if not (torch.isfinite(A_rK).all() and torch.isfinite(B_Or).all()):
        raise ValueError("LoRA factors contain inf or NaN")
    scale_2r = torch.stack([torch.linalg.vector_norm(A_rK, torch.inf, 1), torch.linalg.vector_norm(B_Or, torch.inf, 0)]) / 127
    a_r, b_r = torch.where(scale_2r > 0, scale_2r, 1.0)
    return (A_rK / a_r[:, None]).round_().to(torch.int8), (B_Or / b_r).round_().to(torch.int8), scale_2r


def dequantize_lora(qA_rK: Tensor, qB_Or: Tensor, scale_2r: Tensor) -> tuple[Tensor, Tensor]:
    """(A_rK, B_Or), float32."""
    return qA_rK * scale_2r[0][:, None], qB_Or * scale_2r[1]


def mix_lora(A_rK: Tensor, B_Or: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, float32, whose components are equally strong (module docstring). Any shapes, rank 0 too."""
    A, B, r = A_rK.detach().double(), B_Or.detach().double(), len(A_rK)
    (basis_K, tri_A), (basis_O, tri_B) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    U, S, Vt = torch.linalg.svd(tri_B @ tri_A.mT, full_matrices=False)
    mix_rr = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(r), dtype=torch.float64))[0].to(A)
    mix_rr = mix_rr[: len(S)]  # fewer components than ranks: the others are zero
    return (mix_rr.mT @ (S.sqrt()[:, None] * (Vt @ basis_K.mT))).float(), (basis_O @ U * S.sqrt() @ mix_rr).float()


# ---------------------------------------------------------------- what the three layers share


class _StraightThrough(torch.autograd.Function):
    """Forward: layer.run, the deployed kernel. Backward: the equations of the module docstring, by layer.grads."""

    @staticmethod
    def forward(ctx, x, A_rK, B_Or, layer):
        ctx.layer = layer  # its packed buffers are frozen: the layer itself is the saved weight
        ctx.save_for_backward(x, A_rK, B_Or)
        return layer.run(x, A_rK, B_Or)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return *ctx.layer.grads(g, *ctx.saved_tensors, ctx.needs_input_grad[:3]), None


class PackedLayer(nn.Module):
    """Q + B A. A subclass defines run(x, A, B), the kernel, and grads(g, x, A, B, needs), its straight-through gradients.

    Buffers: codes_OP, mult_P uint8; scale_O float32, or the byte of kernels.pack_scales, which is the same number exactly (deployed
    form); inv_smooth (I,) if smoothed and shift (I,) if centred, float32, or bfloat16 from a file where that is the same; bias (O,)
    in the float layer's dtype, if that has one or the layer is centred.

    lora_A (r, K), lora_B (O, r) are float32 Parameters, and None at rank 0. In the deployed form (store_8bit, or lora_bits=8) they
    are int8 buffers with lora_scale (2, r) float32 beside them, and only x has a gradient. state_dict() is what safetensors saves.
    anchor_A, anchor_B are not part of it, since a deployed checkpoint has no use for them: see anchor_state.

    .to(dtype), .half() and the like move a layer but cast nothing: bfloat16 scales would change the weights, and bfloat16 A and B
    would not take small updates. The layer computes in the dtype of its input; `dtype` is what a float layer would have now."""

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        group: int = 64,
        group_x: int = 16,
        smooth: bool = False,
        lora_bits: int = 16,
        rotated: bool = False,
        centred: bool = False,
    ):
        """Geometry and device of the float `layer`, contents uninitialised until load_state_dict or from_float.
        group_x: activations that share a multiplier, or quant.EIGHT_BITS: they have 8 bits and none.
        lora_bits: 16 to train (factors are float32, and 16 bits in a file), 8 for the deployed form."""
        if lora_bits not in (8, 16):
            raise ValueError(f"LoRA factors are kept in 8 or 16 bits, not {lora_bits}")
        (O, I), K, taps = layer.weight.shape[:2], layer.weight[0].numel(), layer.weight[0, 0].numel()
        if not 0 <= rank <= min(O, K):
            raise ValueError(f"rank {rank} is outside 0..{min(O, K)} of a {O} x {K} layer")
        quant.check_group(group)
        if group_x != quant.EIGHT_BITS:
            quant.check_group(group_x)
        nn.Module.__init__(self)  # not that of the float layer, which would make a weight
        self.channels, self.out, self.taps, self.group, self.group_x, self.rank = I, O, taps, group, group_x, rank
        self.rotated, self.backend, self.use_anchor, self.dtype = rotated, "eager", False, layer.weight.dtype
        padded, deployed, empty = taps * -(-I // group) * group, lora_bits == 8, partial(torch.empty, device=layer.weight.device)
        self.register_buffer("codes_OP", empty(O, padded // 2, dtype=torch.uint8))
        self.register_buffer("mult_P", empty(-(-O * padded // group // 2), dtype=torch.uint8))
        self.register_buffer("scale_O", empty(O, dtype=torch.uint8 if deployed else torch.float32))
        self.register_buffer("inv_smooth", empty(I) if smooth else None)
        self.register_buffer("shift", empty(I) if centred else None)
        has_bias = centred or layer.bias is not None
        self.register_buffer("bias", empty(O, dtype=layer.weight.dtype) if has_bias else None)
        for name, shape in (("lora_A", (rank, K)), ("lora_B", (O, rank))):
            if rank and deployed:
                self.register_buffer(name, empty(shape, dtype=torch.int8))
            else:
                self.register_parameter(name, nn.Parameter(empty(shape)) if rank else None)
        self.register_buffer("lora_scale", empty(2, rank) if rank and deployed else None)
        self.register_buffer("anchor_A", None, persistent=False)
        self.register_buffer("anchor_B", None, persistent=False)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        gw: quant.GridWeight,
        A_rK: Tensor | None = None,
        B_Or: Tensor | None = None,
        smooth_I: Tensor | None = None,
        group_x: int = 16,
        rotated: bool = False,
        shift_I: Tensor | None = None,
    ):
        """The packed twin of `layer`: grid weight and factors from `decompose`, of W * smooth_I if it is smoothed, of W R if it is
        rotated. shift_I: c, the mean of x', for a linear layer. These may be on another device than the layer."""
        rank, smooth, centred = 0 if A_rK is None else len(A_rK), smooth_I is not None, shift_I is not None
        new = cls(layer, rank, gw.group, group_x, smooth, rotated=rotated, centred=centred)
        if (gw.channels, gw.taps, len(gw.scale_O)) != (new.channels, new.taps, new.out):
            raise ValueError(f"a grid weight with {gw.channels} channels and {gw.taps} taps is not one of {layer}")
        if rotated and A_rK is not None:
            A_rK = quant.rotate_taps(A_rK, gw.taps)
        bias = layer.bias
        if shift_I is not None:
            constant_O = layer.weight.to(shift_I) @ (shift_I if smooth_I is None else shift_I * smooth_I.to(shift_I))
            constant_O = constant_O if A_rK is None else constant_O - (B_Or @ (A_rK @ shift_I.to(A_rK))).to(shift_I)
            bias = constant_O if bias is None else bias.to(shift_I) + constant_O
        known = kernels.pack(gw)._asdict() | {"bias": bias, "lora_A": A_rK, "lora_B": B_Or, "shift": shift_I}
        known["inv_smooth"] = None if smooth_I is None else 1.0 / smooth_I
        new.load_state_dict({key: known[key] for key in new.state_dict()})
        new.set_anchor()
        return new.train(layer.training)

    def _apply(self, fn, recurse=True):
        def move_only(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes_OP.device)).dtype
        return super()._apply(move_only, recurse)

    @property
    def weight(self) -> "DequantizedWeight":
        """What the float layer calls so: (O, I), or (O, I, kh, kw) of a convolution, in `dtype`."""
        return DequantizedWeight(self)

    def for_input(self, w_OK: Tensor) -> Tensor:
        """What reads the smoothed x' as rows that read x itself, float32: W^ + B A, or A alone."""
        return w_OK if self.inv_smooth is None else w_OK * self.inv_smooth.float().repeat(self.taps)

    def float_weight(self) -> Tensor:
        """W^ + B A (O, K) for x itself, float32."""
        return self.for_input(self.merged_weight(*self.factors()))

    def float_bias(self) -> Tensor | None:
        """What is added to float_weight() x, in `dtype`; None without a bias. A plain layer computes Q x of x itself, so that c
        must not be there twice."""
        if self.bias is None:
            return None
        twice = 0 if self.shift is None else self.merged_weight(None, None) @ self.shift.float()
        return (self.bias.float() - twice).to(self.dtype)

    def dequantize(self, plain: nn.Module) -> None:
        """`plain`, a float layer of this geometry, gets weight and bias in `dtype`. Its outputs are then this layer's but for the
        rounding of activations, and but for (W - Q - B A) c where this layer is centred and `plain` has no bias."""
        tensors = {"weight": self.weight.values()}
        if plain.bias is not None:
            tensors["bias"] = self.float_bias()
        plain.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)

    @property
    def packed(self) -> kernels.PackedWeight:
        scale_O = kernels.unpack_scales(self.scale_O) if self.scale_O.dtype == torch.uint8 else self.scale_O
        return kernels.PackedWeight(self.codes_OP, self.mult_P, scale_O, self.channels, self.taps, self.group)

    def _kernel(self, kernel: Callable) -> Callable:
        return kernels.BACKENDS[self.backend](kernel)

    def _smoothed(self, x: Tensor) -> Tensor:
        """x' in x's dtype, the product in float32; channels are the last axis."""
        return x if self.inv_smooth is None else (x.float() * self.inv_smooth).to(x.dtype)

    def change_of_input(self) -> tuple[Tensor | None, Tensor | None]:
        """(inv_smooth, shift) as kernels take them: float32, also where they came from a file, which has them in bfloat16."""
        return tuple(None if t is None else t.float() for t in (self.inv_smooth, self.shift))

    def forward(self, x: Tensor) -> Tensor:
        A, B = (self.anchor_A, self.anchor_B) if self.use_anchor else self.factors()
        with torch.autocast(x.device.type, enabled=False):  # autocast would make the training forward another function
            if torch.is_grad_enabled() and (x.requires_grad or (A is not None and A.requires_grad)):
                return _StraightThrough.apply(x, A, B, self)
            return self.run(x, A, B)

    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """(A, B), the Parameters themselves, or their float32 values in the deployed form; None where there is no branch."""
        if self.lora_scale is None:
            return self.lora_A, self.lora_B
        return dequantize_lora(self.lora_A, self.lora_B, self.lora_scale)

    def merged_weight(self, A_rK: Tensor | None, B_Or: Tensor | None) -> Tensor:
        """W^ + B A (O, K) in float32, W^ alone where there is no branch."""
        w_OK = kernels.dequantize(self.packed)
        w_OK = quant.rotate_taps(w_OK, self.taps) if self.rotated else w_OK
        return w_OK if A_rK is None else torch.addmm(w_OK, B_Or.float(), A_rK.float())

    def set_anchor(self) -> None:
        """The current A, B become A0, B0."""
        if self.rank:
            self.anchor_A, self.anchor_B = (factor.detach().clone() for factor in self.factors())

    def store_8bit(self) -> None:
        """In place, and once: the deployed form, without an anchor."""
        if self.scale_O.dtype == torch.uint8:
            return
        self.scale_O = kernels.pack_scales(self.scale_O)
        if self.rank:
            *factors, self.lora_scale = quantize_lora(*mix_lora(self.lora_A, self.lora_B))
            del self.lora_A, self.lora_B  # a Parameter cannot be int8
            for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
                self.register_buffer(name, factor)
            self.anchor_A = self.anchor_B = None

    def extra_repr(self) -> str:
        activations = "8-bit activations" if self.group_x == quant.EIGHT_BITS else f"group_x={self.group_x}"
        return f"{self.channels}, {self.out}, rank={self.rank}, group={self.group}, {activations}, rotated={self.rotated}"


class DequantizedWeight(Tensor):
    """The weight of a packed layer as other libraries read it: shape, dtype and device cost nothing, an operation gets the values,
    and one that would change them is a RuntimeError."""

    @staticmethod
    def __new__(cls, layer: PackedLayer):
        return Tensor._make_wrapper_subclass(cls, layer.weight_shape, dtype=layer.dtype, device=layer.codes_OP.device)

    def __init__(self, layer: PackedLayer):
        self.layer = layer

    def values(self) -> Tensor:
        """The same as a plain tensor."""
        w_OK, (_, _, *kernel_size) = self.layer.float_weight(), self.shape
        return (quant.unflatten_conv(w_OK, kernel_size) if kernel_size else w_OK).to(self.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.values()})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.data.__set__:
            refuse_change()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:  # weight.data
            return cls(args[0].layer)
        if function._schema.is_mutable:
            refuse_change()
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs or {}))
        return function(*args, **kwargs)


def refuse_change() -> None:
    raise RuntimeError("packed weights cannot be changed: keep the LoRA as an adapter, or call dequantize() of the network first")


# ---------------------------------------------------------------- the three layers


class W4A4Linear(PackedLayer, nn.Linear):
    """x (.., I) -> (.., O); activations are quantized for each token."""

    def __init__(self, layer: nn.Linear, rank: int, *grid, **options):
        super().__init__(layer, rank, *grid, **options)
        self.in_features, self.out_features, self.weight_shape = self.channels, self.out, (self.out, self.channels)

    def run(self, x: Tensor, A_rI: Tensor | None, B_Or: Tensor | None) -> Tensor:
        kernel, (inv_smooth_I, shift_I) = self._kernel(kernels.w4a4_linear), self.change_of_input()
        return kernel(x, self.packed, self.bias, A_rI, B_Or, inv_smooth_I, self.group_x, shift_I, self.rotated)

    def grads(self, g, x, A_rI, B_Or, needs):
        """(dx, dA, dB), None where not needed. Products in x's dtype, as those of a float layer's backward."""
        g_TO, x1_TI = g.reshape(-1, self.out), self._smoothed(x.reshape(-1, self.channels))
        dx = dA = dB = None
        if needs[1]:
            dA = ((g_TO @ B_Or.to(x.dtype)).mT @ x1_TI).to(A_rI.dtype)
        if needs[2]:
            dB = (g_TO.mT @ (x1_TI @ A_rI.to(x.dtype).mT)).to(B_Or.dtype)
        if needs[0]:
            dx = self._smoothed(g_TO @ self.merged_weight(A_rI, B_Or).to(g.dtype)).reshape(x.shape)
        return dx, dA, dB


class W4A16Linear(W4A4Linear):
    """4-bit weight, activations as they are: for layers that run once a step. The straight-through gradient is exact here."""

    def run(self, x: Tensor, A_rI: Tensor | None, B_Or: Tensor | None) -> Tensor:
        return self._kernel(kernels.w4a16_linear)(self._smoothed(x), self.packed, self.bias, A_rI, B_Or)


class W4A4Conv2d(PackedLayer, nn.Conv2d):
    """x (N, I, H, W) -> (N, O, H', W'); activations have a scale for each sample and multipliers for each pixel and group."""

    def __new__(cls, layer=None, *args, **kwargs):
        """PEFT makes the A and B of an adapter by type(layer)(channels, rank, ..): these are plain convolutions."""
        return nn.Conv2d(layer, *args, **kwargs) if isinstance(layer, int) else super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, rank: int, *grid, **options):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if not plain or isinstance(layer.padding, str):
            raise ValueError("W4A4Conv2d needs an ungrouped, undilated convolution with explicit zero padding")
        super().__init__(layer, rank, *grid, **options)
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups, self.padding_mode = (1, 1), 1, "zeros"
        self.in_channels, self.out_channels = self.channels, self.out
        self.weight_shape = (self.out, self.channels, *self.kernel_size)

    def run(self, x: Tensor, A_rK: Tensor | None, B_Or: Tensor | None) -> Tensor:
        kernel, geometry = self._kernel(kernels.w4a4_conv2d), (self.kernel_size, self.stride, self.padding)
        y = kernel(x, self.packed, self.bias, A_rK, B_Or, self.change_of_input()[0], self.group_x, *geometry, self.rotated)
        # as nn.Conv2d: the layout of x. On a CPU a small channels-last GroupNorm takes 10 times as long
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    def grads(self, g, x, A_rK, B_Or, needs):
        """(dx, dA, dB), None where not needed, in x's dtype. The branch is conv(A), then a 1x1 convolution B."""
        strides, taps = dict(stride=self.stride, padding=self.padding), self.kernel_size
        x1 = self._smoothed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        dx = dA = dB = None
        if needs[1]:
            low = F.conv2d(g, B_Or.to(x.dtype).mT[:, :, None, None])
            dA = quant.flatten_conv(nn.grad.conv2d_weight(x1, (self.rank, self.channels, *taps), low, **strides)).to(A_rK.dtype)
        if needs[2]:
            low = F.conv2d(x1, quant.unflatten_conv(A_rK.to(x.dtype), taps), **strides)
            dB = (g.transpose(0, 1).flatten(1) @ low.transpose(0, 1).flatten(1).mT).to(B_Or.dtype)
        if needs[0]:
            w_OIhw = quant.unflatten_conv(self.merged_weight(A_rK, B_Or), taps).to(g.dtype)
            dx = nn.grad.conv2d_input(x.shape, w_OIhw, g, **strides)
            dx = self._smoothed(dx.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return dx, dA, dB


def packed_class(kind: str, layer: nn.Module) -> type[PackedLayer]:
    """The class that replaces the float `layer`; kind: w4a4 or w4a16 (family.precision), a KeyError for any other."""
    if kind == "w4a4" and isinstance(layer, nn.Conv2d):
        return W4A4Conv2d
    return {"w4a4": W4A4Linear, "w4a16": W4A16Linear}[kind]


# ---------------------------------------------------------------- whole models


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """(name, layer) of every packed layer of `model`."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def number_format(model: nn.Module) -> str:
    """W4A4, W4A8 or W4A4/8 (quant.number_format), of the layers that round activations."""
    return quant.number_format(layer.group_x for _, layer in packed_layers(model) if not isinstance(layer, W4A16Linear))


def plain_config(net: nn.Module) -> dict:
    """The configuration of the float network that a network of diffusers was, or is."""
    return {k: v for k, v in net.config.items() if k != "quantization_config"}


def on_meta(net: nn.Module) -> nn.Module:
    """That float network on the meta device."""
    with torch.device("meta"):
        return type(net).from_config(plain_config(net))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the module `name` ("mid.attn.to_q") is. ValueError if there is no such module."""
    if name not in dict(model.named_modules()):
        raise ValueError(f"layer {name!r} is not in the model")
    model.set_submodule(name, layer)


def place_packed(net: nn.Module, table: dict[str, dict]) -> None:
    """Packed layers, contents uninitialised, where `table` says so; those of the kind 16bit stay as they are. ValueError or
    AttributeError if it is not this network's."""
    for name, row in table.items():
        if row["kind"] == "16bit":
            continue
        layer, shape = net.get_submodule(name), (row["rank"], row["group_w"], row["group_x"], row["smooth"], row.get("lora", 16))
        younger = {key: row.get(key, False) for key in ("rotated", "centred")}  # than some folders
        net.set_submodule(name, packed_class(row["kind"], layer)(layer, *shape, **younger))


def set_backend(model: nn.Module, backend: str) -> None:
    """Run every layer through one of kernels.BACKENDS."""
    for _, layer in packed_layers(model):
        layer.backend = backend


def store_8bit(model: nn.Module) -> None:
    """The deployed form of every layer, in place: scales of a byte, LoRA int8."""
    for _, layer in packed_layers(model):
        layer.store_8bit()


@contextmanager
def anchored(model: nn.Module):
    """Inside, every layer uses its initial A0, B0: the frozen low-bit copy of the consistency model [R]."""
    layers = list(packed_layers(model))
    for name, layer in layers:
        if layer.rank and layer.anchor_A is None:
            raise ValueError(f"layer {name!r} has no anchor (a deployed checkpoint carries none)")
    before = [layer.use_anchor for _, layer in layers]
    try:
        for _, layer in layers:
            layer.use_anchor = True
        yield model
    finally:
        for (_, layer), flag in zip(layers, before, strict=True):
            layer.use_anchor = flag


def as_anchor(student: nn.Module) -> Callable:
    """A function of the student's arguments that returns what its anchor predicts."""
    return anchored(student)(lambda *args: student(*args))  # a context manager is a decorator too, which is entered at each call


def anchor_state(model: nn.Module) -> dict[str, Tensor]:
    """{"name.anchor_A": .., "name.anchor_B": ..}: what resuming needs beside state_dict()."""
    state = {f"{name}.{key}": getattr(layer, key) for name, layer in packed_layers(model) for key in ("anchor_A", "anchor_B")}
    return {key: anchor for key, anchor in state.items() if anchor is not None}


def load_anchor_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of anchor_state. ValueError naming the first layer that is missing in `state` or has another shape."""
    for name, layer in packed_layers(model):
        for key, like in (("anchor_A", layer.lora_A), ("anchor_B", layer.lora_B)):
            if like is not None:
                tensor = state.get(f"{name}.{key}")
                if tensor is None or tensor.shape != like.shape:
                    raise ValueError(f"the anchor state does not fit layer {name!r}")
                setattr(layer, key, tensor.detach().to(like.device, torch.float32, copy=True))


def merged_layer(layer: PackedLayer) -> PackedLayer:
    """Strict W4A4: a new layer with Q(Q + BA), rounded to nearest, and no branch. At rank 0 that is Q, as it is."""
    merged = copy.deepcopy(layer)
    if not layer.rank:
        return merged
    merged.rank, merged.lora_A, merged.lora_B, merged.lora_scale, merged.anchor_A, merged.anchor_B = 0, *[None] * 5
    A_rK, B_Or = (factor.detach() for factor in layer.factors())
    w_OK = layer.merged_weight(A_rK, B_Or)
    w_OK = quant.rotate_taps(w_OK, layer.taps) if layer.rotated else w_OK
    pw = kernels.pack(quant.quantize_weight(w_OK, layer.group, layer.taps))
    scale_O = kernels.pack_scales(pw.scale_O) if layer.scale_O.dtype == torch.uint8 else pw.scale_O
    merged.load_state_dict(dict(codes_OP=pw.codes_OP, mult_P=pw.mult_P, scale_O=scale_O), strict=False)
    if layer.shift is not None:
        merged.bias += B_Or.float() @ (A_rK.float() @ layer.shift.float())  # of c, which the branch no longer sees
    return merged
