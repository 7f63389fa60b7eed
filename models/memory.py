"""What a packed network holds, and what is alive while a network runs, from shapes alone: nothing here allocates a weight.

Packed network.  Every layer is built on the meta device as the deployed layer itself (layers.PackedLayer, lora_bits=8), and the
sizes of its tensors are added up; a checkpoint holds the same tensors, byte for byte:

    codes      4 bits a weight, channels padded to a multiple of the group
    scales     multipliers, 4 bits a group; a byte a row; two bytes a channel for each of inv_smooth and shift
    LoRA       A, B int8, two float32 a rank
    16 bit     layers that keep their weight, biases, norms

    memory_ratio = all of that / 2 bytes for every parameter of the network that it replaces

Activations are not fitted to anything: the real modules run forward and backward on fake tensors (FakeTensorMode: shapes and
lifetimes, no numbers) under a mode that follows which storages are alive. The layer's int8 weights, float32 copies in its backward,
im2col and the recomputation of gradient checkpointing are in it because they happen. From two samples on the operations are the
same and their sizes affine in the batch, so the curves of 2 and 3 samples give all others exactly (one alone skips some copies).

Kernels are planned as the eager ones, which hold more than those that run; attention never holds the scores of all tokens (flash).
Not in it: the CUDA context and the allocator's fragments (24GB is 24e9 bytes, a 24 GB card has 25.8e9), and workspaces inside of an
operation. Activations are checked against resident memory on a CPU, the statistics of SDXL on an H200 (docs/real-models.md).
"""

import math
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import hessian
import hgs_lora
from layers import PackedLayer, packed_class, packed_layers, replace_layer
from models.denoiser import add_lora, float_layers, lora_layers, transformer_blocks
from models.family import Family, family_of_network

STATES = 5  # latents of a rollout that are kept, four phases

# ---------------------------------------------------------------------------------------------------------------------
# The packed network


class Row(NamedTuple):
    """A layer, and in the last row all parameters outside of layers. Sizes in bytes."""

    name: str
    kind: str  # w4a4, w4a16, 16bit
    shape: tuple[int, ...]
    bf16: int  # of the layer that it replaces
    other: int  # 16-bit weight, bias
    rank: int = 0
    codes: int = 0
    scales: int = 0
    lora: int = 0

    @property
    def bytes(self) -> int:
        return self.codes + self.scales + self.lora + self.other


def layer_table(family: Family, net: nn.Module, rank=16, lora_bits: int = 8, group_w: int = 64, **about_x: bool) -> list[Row]:
    """One Row for every Linear and Conv2d of a diffusers network (best on the meta device), one for the rest.

    rank: of every quantized layer, at most its smaller side, or {layer: rank}; 0: merged. lora_bits=16: 16-bit factors in the
    file. about_x: those of packed_twin_of."""
    rows = []
    for name, layer in float_layers(net).items():
        kind, bias = family.precision(name), 0 if layer.bias is None else 2 * layer.bias.numel()
        bf16 = 2 * layer.weight.numel() + bias
        row = Row(name, kind, tuple(layer.weight.shape), bf16, other=bf16)
        if kind != "16bit":
            its_rank = rank[name] if isinstance(rank, dict) else rank
            packed = packed_twin_of(kind, layer.to("meta"), its_rank, group_w, lora_bits=8, **about_x)
            size = Counter({key: tensor.nbytes for key, tensor in packed.state_dict().items()})
            lora = (size["lora_A"] + size["lora_B"]) * lora_bits // 8 + (size["lora_scale"] if lora_bits == 8 else 0)
            scales = size["mult_P"] + size["scale_O"] + (size["inv_smooth"] + size["shift"]) // 2  # in a file they are bfloat16
            bias = 0 if packed.bias is None else 2 * packed.bias.numel()
            row = row._replace(other=bias, rank=packed.rank, codes=size["codes_OP"], scales=scales, lora=lora)
        rows.append(row)
    rest = 2 * sum(t.numel() for t in net.state_dict().values()) - sum(row.bf16 for row in rows)
    return [*rows, Row("norms and other parameters", "16bit", (), rest, rest)]


def ratio(rows: list[Row]) -> float:
    """Bytes of the packed network / bytes of the network in bfloat16."""
    return sum(row.bytes for row in rows) / sum(row.bf16 for row in rows)


def format_table(rows: list[Row], lora_bits: int = 8) -> str:
    """Layers of one kind, shape and rank in a line, then the totals."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.shape, row.rank), []).append(row)
    lines = [f"{'count':>5s} {'kind':6s}{'shape':>20s}{'rank':>6s}{'MB':>10s}  layers"]
    for (kind, shape, rank), layers in sorted(groups.items(), key=lambda group: -sum(row.bytes for row in group[1])):
        tails = dict.fromkeys(".".join(p for p in row.name.split(".")[-3:] if not p.isdigit()) for row in layers)
        names = ", ".join(list(tails)[:3]) + (", .." if len(tails) > 3 else "")
        size = sum(row.bytes for row in layers) / 1e6
        lines.append(f"{len(layers):5d} {kind:6s}{' x '.join(map(str, shape)):>20s}{rank or '-':>6}{size:10.2f}  {names}")
    counts = Counter(row.kind for row in rows if row.shape)
    bf16 = sum(row.bf16 for row in rows)
    lines.append(f"\n{', '.join(f'{counts[kind]} {kind}' for kind in ('w4a4', 'w4a16', '16bit'))}; ")
    lines[-1] += f"{bf16 / 2e9:.3f} B parameters, {bf16 / 1e6:,.1f} MB in bfloat16"
    totals = {
        "quantized weights": sum(row.codes for row in rows),
        "their scales": sum(row.scales for row in rows),
        f"LoRA, {lora_bits} bits": sum(row.lora for row in rows),
        "16-bit layers, biases, norms": sum(row.other for row in rows),
        "packed network": sum(row.bytes for row in rows),
    }
    return "\n".join([*lines, *(f"{what:30s}{size / 1e6:12,.1f} MB {size / bf16:8.2%}" for what, size in totals.items())])


# ---------------------------------------------------------------------------------------------------------------------
# What is alive while a network runs


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class AliveStorages(TorchDispatchMode):
    """Inside: bytes of the storages that operations made and that are still alive, after each operation (`curve`). Tensors that
    exist before, and their gradients, are no news. Works on real tensors as on fake ones."""

    def __init__(self, existing: list[torch.Tensor]):
        super().__init__()
        self.now, self.curve = 0, [0]
        known = (t.untyped_storage() for t in (*existing, *(t.grad for t in existing)) if t is not None)
        self.known = {id(storage): storage for storage in known}

    def _freed(self, key: int, size: int, _) -> None:
        self.now -= size
        del self.known[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # half of what a fake tensor asks
            return out
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if id(storage) not in self.known:
                key, size = id(storage), storage.nbytes()
                self.known[key] = weakref.ref(storage, partial(self._freed, key, size))
                self.now += size
        self.curve.append(self.now)
        return out

    def repeat(self, layer: PackedLayer, name: str, seen: dict):
        """layer.run or layer.grads (`name`), simulated once for like layers and inputs, as most operations of a network are theirs:
        after that the curve is repeated, and what comes out is empty."""
        fn, geometry = getattr(type(layer), name), [getattr(layer, key, None) for key in ("kernel_size", "stride", "padding")]

        def simulated(*args):
            shapes = [(t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in (*layer.buffers(), *args)]
            key, before, begin = str((name, layer, geometry, shapes)), self.now, len(self.curve)
            if key in seen:
                curve, empty = seen[key]
                self.curve += [before + more for more in curve]
                return tree_map_only(partial, lambda make: make(), empty)
            out = fn(layer, *args)
            empty = tree_map_only(torch.Tensor, lambda t: partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype), out)
            seen[key] = [now - before for now in self.curve[begin:]], empty
            return out

        return simulated


def example_inputs(net: nn.Module, latent: tuple[int, int, int], tokens: int, batch: int, dtype: torch.dtype) -> dict:
    """Keyword arguments of one call of a denoiser of any family, zeros."""
    family, t = family_of_network(net), torch.ones(batch)
    shapes = family.cond_shapes(net.config, tokens)
    cond = {k: torch.zeros(batch, *shape, dtype=dtype) for k, shape in shapes.items()}
    if family.takes_sizes:
        cond["time_ids"] = torch.zeros(batch, 6, dtype=dtype)
    scalar = family.scalar(t, t, family.guidance_input(net.config))
    return family.inputs(net.config, torch.zeros(batch, *latent, dtype=dtype), t, cond, scalar)


def step(net: nn.Module, given: dict, gradients: bool, seen: dict | None = None) -> list[int]:
    """The curve of one forward (and backward) of `net`: real if its tensors are real, simulated if they are fake, and then
    packed layers once a shape where a dict `seen` is given. Gradients of parameters are there before."""
    for p in net.parameters() if gradients else ():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    existing = [t for t in (*tensors_of(net), *tree_leaves(given)) if isinstance(t, torch.Tensor)]
    with AliveStorages(existing) as live, torch.set_grad_enabled(gradients):
        for _, layer in packed_layers(net) if seen is not None else ():
            layer.run, layer.grads = (live.repeat(layer, name, seen) for name in ("run", "grads"))
        y = net(**given, return_dict=False)[0]
        if gradients and y.requires_grad:  # it does not where no layer has a branch
            y.float().square().mean().backward()
    return live.curve


def packed_twin_of(
    kind: str, layer: nn.Module, rank: int, group_w: int, lora_bits: int = 16, smooth: bool = False, centre: bool = False
) -> PackedLayer:
    """Of a float layer, its rank at most its smaller side. smooth, centre: where student.py does that, in W4A4 layers."""
    rank, w4a4 = min(rank, len(layer.weight), layer.weight[0].numel()), kind == "w4a4"
    about_x = {"smooth": smooth and w4a4, "centred": centre and w4a4 and isinstance(layer, nn.Linear)}
    return packed_class(kind, layer)(layer, rank, group_w, lora_bits=lora_bits, **about_x)


def packed_twin(family: Family, net: nn.Module, rank: int, group_w: int = 64, under: str = "", **about_x: bool) -> nn.Module:
    """`net` (meta), its layers, or those of the module `under`, replaced in place by packed ones in training form: A and B require
    gradients, nothing else. about_x: those of packed_twin_of."""
    for name, layer in float_layers(net).items():
        if (kind := family.precision(name)) != "16bit" and name.startswith(under):
            replace_layer(net, name, packed_twin_of(kind, layer, rank, group_w, **about_x))
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    return net


class Footprint:
    """Sizes in bytes of what training a network needs, and its activations; costs seconds for each kind of activations.

    build() -> the float network on the meta device, called twice. cm_rank: of the consistency LoRA on the teacher, 0 for none.
    trains: student, or cm: that LoRA. gradients: whether the start collects G (hessian.py) as well as H. about_x: those of
    packed_twin_of."""

    def __init__(
        self, build, latent, tokens: int, rank: int = 16, cm_rank: int = 64, dtype=torch.bfloat16, group_w: int = 64,
        trains: str = "student", gradients: bool = True, **about_x: bool,
    ):  # fmt: skip
        self.shapes, self.trains = (tuple(latent), tokens), trains
        self.dtype, self.curves, self.seen = dtype, {}, {}
        teacher = nn.Module.to(build(), dtype)
        self.family = family_of_network(teacher)
        student = packed_twin(self.family, nn.Module.to(build(), dtype), rank, group_w, **about_x)
        self.mode = FakeTensorMode()
        with self.mode:
            self.student, self.teacher = (net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)) for net in (student, teacher))
            self.teacher.requires_grad_(False)
            if cm_rank:
                add_lora(SimpleNamespace(net=self.teacher), cm_rank)
                for lora in lora_layers(SimpleNamespace(net=self.teacher)).values() if trains == "student" else ():
                    lora.lora_A, lora.lora_B = (nn.Parameter(p.detach().to(dtype)) for p in (lora.lora_A, lora.lora_B))
            for net in (self.student, self.teacher):
                net.train()
            per_sample = [t for t in tree_leaves(example_inputs(teacher, *self.shapes, 1, dtype)) if t is not None]
        self.layers = [(layer.out, layer.taps * layer.channels) for _, layer in packed_layers(self.student)]
        self.least = hessian.least_bytes(self.layers, gradients)
        self.widest = max(K for _, K in self.layers)
        self.roomy = max(self.least, 16 * self.widest**2)  # no H needs main memory
        self.sums = 8 * sum(K * K for _, K in self.layers), 8 * sum(O * O for O, _ in self.layers) * gradients  # of all H, all G
        # a budget for all layers at once, in whole MiB, as --hessian-mb gives it
        self.most = max(self.roomy, -(-2 * max(self.sums) >> 20) << 20)
        trained = self.student if trains == "student" else self.teacher
        self.factors = sum(p.nbytes for p in trained.parameters() if p.requires_grad)
        self.packed = sum(t.nbytes for t in tensors_of(self.student) if not t.requires_grad)
        self.network = sum(t.nbytes for t in tensors_of(self.teacher))
        # what a run writes: two states and one more at a time; the start with its anchor and the model, or the consistency LoRA
        self.files = 9 * self.factors + (2 * self.packed + 2 * self.factors if trains == "student" else self.factors)
        sizes = [sum(t.nbytes for t in tensors_of(block)) for block in transformer_blocks(self.teacher)]
        self.gathered = 2 * max(sizes, default=0) + self.network - sum(sizes)
        self.sample = sum(t.nbytes for t in per_sample) + STATES * 4 * math.prod(latent)

    def held(self, statistics: int) -> int:
        """What a budget for statistics and factors comes to: all of it, unless there is room for all layers at once. Then, in
        float64 and float32: all H; H and G; H, G and the factors of a layer, which get half of the budget."""
        (H, G), half = self.sums, statistics // 2
        if max(H, G) > half:
            return statistics
        factors = max((n for n in (hgs_lora.factor_bytes(*layer) for layer in self.layers) if n <= half), default=0)
        return min(statistics, max(H, H // 2 + G, H // 2 + G // 2 + factors))

    def in_main_memory(self, statistics: int) -> int:
        """H of the widest layer in float32, where half of the budget is too small for its float64 sum (hessian.py)."""
        return 4 * self.widest**2 if 8 * self.widest**2 > statistics // 2 else 0

    def budget(self, room: int) -> int:
        """The largest one that comes to no more than `room`."""
        return self.most if self.held(self.most) <= room else room

    def activations(self, what: str, batch: int) -> int:
        """The most that is alive beside weights and inputs: what = "teacher" (forward), "trained" or "checkpointed" (forward and
        backward of what is trained)."""
        if what not in self.curves:
            net = self.student if what != "teacher" and self.trains == "student" else self.teacher
            with self.mode:
                if what != "teacher":
                    (net.enable_gradient_checkpointing if what == "checkpointed" else net.disable_gradient_checkpointing)()
                inputs = (example_inputs(net, *self.shapes, n, self.dtype) for n in (2, 3))
                pair = [step(net, given, what != "teacher", self.seen) for given in inputs]
            two, three = map(torch.tensor, pair)  # int64, the same operations
            self.curves[what] = (3 * two - 2 * three, three - two)
        fixed, each = self.curves[what]
        return int((fixed + batch * each).max())
