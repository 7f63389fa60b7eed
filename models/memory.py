"""What a packed network holds and what its training will need, from shapes alone: nothing here allocates a weight.

    python -m models.memory --model sdxl                      the table of layers, the planned peak of training, the memory ratio
    python -m models.memory --model flux --limit 48GB         .. and how training fits: micro-batch, checkpointing, teacher

Packed network.  Every layer is built on the meta device as the deployed layer itself (layers.PackedLayer, lora_bits=8), and the
sizes of its tensors are added up; a checkpoint holds the same tensors, byte for byte:

    codes      4 bits a weight, channels padded to a multiple of the group
    scales     multipliers, 4 bits a group; a byte a row
    LoRA       A, B int8, two float32 a rank
    16 bit     layers that keep their weight, biases, norms

    memory_ratio = all of that / 2 bytes for every parameter of the network that it replaces

Training.  Planned peak = what stays + the most that is alive besides, in the worst of four moments:

    start      the 16-bit network, what statistics and factors come to (--hessian-mb, Footprint.held; student.py), activations of
               calibration: 4 micro-batches forward, or one forward and backward; packed layers wait in main memory
    train      student, A and B float32, their gradients, Adam's moments, the anchor A0 B0, inputs of the rank's batch
               + teacher (resident), teacher / world (sharded) or nothing (offloaded)
               + activations of the student, forward and backward of one micro-batch
    teach      the same, and of the teacher two blocks and what lies outside of blocks where it is not resident
               + activations of its forward; a guided UNet runs both halves of its batch at once
    update     the same as train without activations, + a copy of A and B (AdamW's square root), + one to average over ranks

Activations are not fitted to anything: the real modules run forward and backward on fake tensors (FakeTensorMode: shapes and
lifetimes, no numbers) under a mode that follows which storages are alive. The layer's int8 weights, float32 copies in its backward,
im2col and the recomputation of gradient checkpointing are in it because they happen. From two samples on the operations are the
same and their sizes affine in the batch, so the curves of 2 and 3 samples give all others exactly (one alone skips some copies).

Not planned: the cache, which text encoders and VAE make before (SDXL 1.6 + 0.3 GB, FLUX 9.8 + 0.3, and 2.7 for a picture of 1024
pixels inside the VAE), beside the 16-bit network only where that draws latents, a micro-batch at a time.

Training a consistency LoRA (trains="cm") holds the 16-bit network, which is the teacher too, in place of student and teacher.

Kernels are planned as the eager ones, which hold more than those that run; attention never holds the scores of all tokens (flash).
Not in it: the CUDA context and the allocator's fragments (24GB is 24e9 bytes, a 24 GB card has 25.8e9), and workspaces inside of an
operation. Activations are checked against resident memory on the CPU, the start of SDXL on an H200 (README).
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hessian
import hgs_lora
import qra
from data.cache import buckets
from layers import packed_class, packed_layers, replace_layer
from models import checkpoint, family, pretrained
from models.denoiser import add_lora, float_layers, lora_layers, transformer_blocks
from run.common import UserError, free_memory, process_count, process_index, run_script

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
STATISTICS = 8 << 30  # bytes of statistics and factors where neither --hessian-mb nor a limit says how many
STATES = 5  # latents of a rollout that are kept, four phases


def parse_bytes(text: str) -> int:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2^30. UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] not in UNITS:
        raise UserError(f"{text!r} is no amount of memory: write it as 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


class Row(NamedTuple):
    """A layer, and in the last row all parameters outside of layers. Sizes in bytes."""

    name: str
    kind: str  # w4a4, w4a16, 16bit
    shape: tuple[int, ...]
    rank: int
    codes: int
    scales: int
    lora: int
    other: int  # 16-bit weight, bias
    bf16: int  # of the layer that it replaces

    @property
    def bytes(self) -> int:
        return self.codes + self.scales + self.lora + self.other


def layer_table(net: nn.Module, rank: int | dict[str, int] = 16, lora_bits: int = 8, group_w: int = 64, merged=False) -> list[Row]:
    """One Row for every Linear and Conv2d of a diffusers network (best on the meta device), one for the rest.

    rank: of every quantized layer, at most its smaller side, or a rank for each name. lora_bits=16: 16-bit factors in the file."""
    rows = []
    for name, layer in float_layers(net).items():
        kind, shape = family.precision(name), tuple(layer.weight.shape)
        bias, weight = 0 if layer.bias is None else 2 * layer.bias.numel(), layer.weight.numel()
        if kind == "16bit":
            rows.append(Row(name, kind, shape, 0, 0, 0, 0, 2 * weight + bias, 2 * weight + bias))
            continue
        r = 0 if merged else rank[name] if isinstance(rank, dict) else min(rank, shape[0], weight // shape[0])
        packed = packed_class(kind, layer)(layer.to("meta"), r, group_w, lora_bits=8)
        factors = [t for t in (packed.lora_A, packed.lora_B) if t is not None]
        lora = sum(t.numel() for t in factors) * lora_bits // 8 + (packed.lora_scale.nbytes if r and lora_bits == 8 else 0)
        scales = packed.mult_P.nbytes + packed.scale_O.nbytes
        rows.append(Row(name, kind, shape, r, packed.codes_OP.nbytes, scales, lora, bias, 2 * weight + bias))
    everything = 2 * sum(t.numel() for t in net.state_dict().values())
    rest = everything - sum(row.bf16 for row in rows)
    return [*rows, Row("norms and other parameters", "16bit", (), 0, 0, 0, 0, rest, rest)]


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
    counts = ", ".join(f"{sum(row.kind == kind and row.shape != () for row in rows)} {kind}" for kind in ("w4a4", "w4a16", "16bit"))
    bf16 = sum(row.bf16 for row in rows)
    totals = {
        "quantized weights": "codes",
        "their scales": "scales",
        f"LoRA, {lora_bits} bits": "lora",
        "16-bit layers, biases, norms": "other",
    }
    sums = {what: sum(getattr(row, field) for row in rows) for what, field in totals.items()}
    lines.append(f"\n{counts}; {bf16 / 2e9:.3f} B parameters, {bf16 / 1e6:,.1f} MB in bfloat16")
    for what, size in (sums | {"packed network": sum(sums.values())}).items():
        lines.append(f"{what:30s}{size / 1e6:12,.1f} MB {size / bf16:8.2%}")
    return "\n".join(lines)


class AliveStorages(TorchDispatchMode):
    """Inside: bytes of the storages that operations made and that are still alive, after each operation (`curve`).

    existing: modules whose tensors and gradients are no news. Works on real tensors as on fake ones."""

    def __init__(self, *existing: nn.Module):
        super().__init__()
        self.now, self.curve, self.known = 0, [0], {}
        for module in existing:
            gradients = (p.grad for p in module.parameters() if p.grad is not None)
            for t in (*module.parameters(), *module.buffers(), *gradients):
                self.known[id(t.untyped_storage())] = t.untyped_storage()

    def _freed(self, key: int, size: int, _) -> None:
        self.now -= size
        del self.known[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # half of what a fake tensor asks
            return out
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if id(storage) not in self.known:
                    key, size = id(storage), storage.nbytes()
                    self.known[key] = weakref.ref(storage, functools.partial(self._freed, key, size))
                    self.now += size
        self.curve.append(self.now)
        return out


def inputs(net: nn.Module, latent: tuple[int, int, int], tokens: int, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call of an SDXL-class UNet or a FLUX transformer, zeros."""
    cfg, (C, H, W) = net.config, latent
    if hasattr(net, "transformer_blocks"):
        image = (H // 2) * (W // 2)
        shapes = {"hidden_states": (batch, image, 4 * C), "encoder_hidden_states": (batch, tokens, cfg.joint_attention_dim)}
        given = {k: torch.zeros(v, dtype=dtype) for k, v in shapes.items()}
        given |= {"pooled_projections": torch.zeros(batch, cfg.pooled_projection_dim, dtype=dtype), "timestep": torch.ones(batch)}
        given |= {"img_ids": torch.zeros(image, 3, dtype=dtype), "txt_ids": torch.zeros(tokens, 3, dtype=dtype)}
        return given | ({"guidance": torch.ones(batch)} if cfg.guidance_embeds else {})
    pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(batch, pooled, dtype=dtype), "time_ids": torch.zeros(batch, 6, dtype=dtype)}
    told = torch.zeros(batch, cfg.time_cond_proj_dim, dtype=dtype) if cfg.time_cond_proj_dim else None
    text = torch.zeros(batch, tokens, cfg.cross_attention_dim, dtype=dtype)
    x = torch.zeros(batch, C, H, W, dtype=dtype)
    return {
        "sample": x,
        "timestep": torch.ones(batch),
        "encoder_hidden_states": text,
        "added_cond_kwargs": added,
        "timestep_cond": told,
    }


def step(net: nn.Module, given: dict, gradients: bool) -> list[int]:
    """The curve of one forward (and backward) of `net`: real if its tensors are real, simulated if they are fake. Gradients of
    parameters are there before."""
    for p in net.parameters() if gradients else ():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with AliveStorages(net) as live, torch.set_grad_enabled(gradients):
        y = net(**given, return_dict=False)[0]
        if gradients:
            y.float().square().mean().backward()
    return live.curve


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, once each."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def packed_twin(net: nn.Module, rank: int, group_w: int = 64, under: str = "") -> nn.Module:
    """`net` (meta), its layers, or those of the module `under`, replaced in place by packed ones in training form: A and B require
    gradients, nothing else."""
    for name, layer in float_layers(net).items():
        if (kind := family.precision(name)) != "16bit" and name.startswith(under):
            r = min(rank, len(layer.weight), layer.weight[0].numel())
            replace_layer(net, name, packed_class(kind, layer)(layer, r, group_w))
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    return net


class Footprint:
    """Sizes in bytes of what training a network needs, and its activations; costs seconds for each kind of activations.

    build() -> the float network on the meta device, called twice. cm_rank: of the consistency LoRA on the teacher, 0 for none.
    trains: student, or cm: that LoRA. gradients: whether the start collects G (hessian.py) as well as H."""

    def __init__(
        self, build, latent, tokens: int, rank: int = 16, cm_rank: int = 64, dtype=torch.bfloat16, group_w: int = 64,
        trains: str = "student", gradients: bool = True,
    ):  # fmt: skip
        self.shapes, self.trains = (tuple(latent), tokens), trains
        self.dtype, self.rank, self.curves = dtype, rank, {}
        student, teacher = packed_twin(nn.Module.to(build(), dtype), rank, group_w), nn.Module.to(build(), dtype)
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
            per_sample = [t for t in tree_leaves(inputs(teacher, *self.shapes, 1, dtype)) if t is not None]
        self.layers = [(layer.out, layer.taps * layer.channels) for _, layer in packed_layers(self.student)]
        self.least = hessian.least_bytes(self.layers, gradients)
        self.sums = 8 * sum(K * K for _, K in self.layers), 8 * sum(O * O for O, _ in self.layers) * gradients  # of all H, all G
        self.most = max(self.least, -(-2 * max(self.sums) >> 20) << 20)  # .. of all; --hessian-mb has to say it
        self.guided = not hasattr(teacher, "transformer_blocks")  # FLUX embeds its guidance
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
                pair = []
                for n in (2, 3):
                    pair.append(step(net, inputs(net, *self.shapes, n, self.dtype), gradients=what != "teacher"))
            two, three = map(torch.tensor, pair)  # int64, the same operations
            self.curves[what] = (3 * two - 2 * three, three - two)
        fixed, each = self.curves[what]
        return int((fixed + batch * each).max())


class Plan(NamedTuple):
    peak_memory: int  # bytes
    moment: str  # start, train, teach or update
    parts: dict[str, int]  # bytes at that moment
    micro_batch: int
    checkpointing: bool
    teacher: str
    statistics: int  # bytes

    @property
    def how(self) -> str:
        checkpointing = "with" if self.checkpointing else "without"
        return f"micro-batch {self.micro_batch} {checkpointing} gradient checkpointing, teacher {self.teacher}"

    def __str__(self) -> str:
        lines = [f"planned peak of training {self.peak / 1e9:.2f} GB ({self.how}), reached in `{self.moment}`:"]
        return "\n".join([*lines, *(f"  {what:32s}{size / 1e9:8.3f} GB" for what, size in self.parts.items() if size)])


def start_of(fp: Footprint, micro_batch: int, checkpointing: bool) -> dict[str, int]:
    """What is alive in the start beside statistics and factors."""
    backward = fp.activations("checkpointed" if checkpointing else "trained", micro_batch)
    return {"16-bit network": fp.network, "activations": max(fp.activations("teacher", 4 * micro_batch), backward)}


def main_memory(fp: Footprint, plan: Plan, factors: int, on_cpu: bool) -> int:
    """Bytes of main memory that the start needs: packed layers with A, B and anchor, and the `factors` of the layer that has the
    largest, if they do not fit beside the statistics. on_cpu: the rest of the start is there too."""
    waiting = fp.packed + 2 * fp.factors
    if on_cpu:
        rest = sum(start_of(fp, plan.micro_batch, plan.checkpointing).values())
        return waiting + rest + max(fp.held(plan.statistics), plan.statistics // 4 + factors)
    return waiting + (factors if factors > plan.statistics // 2 else 0)


def widest_factors(fp: Footprint, rounding: str) -> int:
    """Bytes of the factors of the layer whose split holds most."""
    return max(hgs_lora.factor_bytes(*shape, rounding) for shape in fp.layers)


TEACHERS = {"resident": "resident", "shard": "sharded", "offload": "offloaded"}


def plan(
    fp: Footprint, batch: int, micro_batch: int, checkpointing: bool, teacher: str = "resident", world: int = 1, statistics: int = 0
) -> Plan:
    """The planned peak of one rank, by the equations of the module docstring. batch: over all ranks; teacher: of TEACHERS, where
    a student is trained; statistics: bytes for them in the start, 0: training alone, from a start that is there."""
    a_b, samples = fp.factors, batch // world
    stays = {"their gradients": a_b, "Adam's moments": 2 * a_b, "inputs and states": samples * fp.sample}
    if fp.trains == "student":
        stays = {"packed student": fp.packed, "A, B (float32)": a_b, "anchor A0, B0": a_b} | stays
    between = {"resident": fp.network, "shard": -(-fp.network // world), "offload": 0}[teacher]
    during = {"resident": fp.network, "shard": between + fp.gathered, "offload": fp.gathered}[teacher]
    student = fp.activations("checkpointed" if checkpointing else "trained", micro_batch)
    taught = fp.activations("teacher", micro_batch * (2 if fp.guided else 1))
    moments = {
        "train": stays | {"teacher and its LoRA": between, "activations": student},
        "teach": stays | {"teacher and its LoRA": during, "activations": taught},
        "update": stays | {"teacher and its LoRA": between, "copies of A, B": a_b * (2 if world > 1 else 1)},
    }
    if statistics:
        moments["start"] = start_of(fp, micro_batch, checkpointing) | {"statistics and factors": fp.held(statistics)}
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Plan(sum(moments[worst].values()), worst, moments[worst], micro_batch, checkpointing, TEACHERS[teacher], statistics)


def choose(limit: int, fp: Footprint, batch: int, world: int = 1, teacher: str = "resident", statistics: int | None = 0) -> Plan:
    """Without and with gradient checkpointing, what fits `limit` bytes at micro-batch 1, then the largest power of two as
    micro-batch that fits. teacher "resident": or offloaded, if a student's does not fit otherwise; "offload", "shard": that.
    statistics: as in `plan`; None: what the limit leaves in the start. UserError if nothing fits."""
    least = fp.least if statistics is None else statistics
    samples = batch // world
    micro = [n for n in (2**k for k in range(samples.bit_length())) if samples % n == 0]
    teachers = ["resident", "offload"] if teacher == "resident" and fp.trains == "student" else [teacher]
    for teacher in teachers:
        for checkpointing in (False, True):
            best = plan(fp, batch, 1, checkpointing, teacher, world, least)
            if best.peak > limit:
                continue
            for n in micro[1:]:
                larger = plan(fp, batch, n, checkpointing, teacher, world, least)
                best = larger if larger.peak <= limit else best
            if statistics is None:
                rest = sum(start_of(fp, best.micro_batch, checkpointing).values())
                best = plan(fp, batch, best.micro_batch, checkpointing, teacher, world, fp.budget(limit - rest))
            return best
    less = "--shard-teacher on several GPUs" if fp.trains == "student" else "a ready --cm"
    raise UserError(
        f"training needs {best.peak / 1e9:.2f} GB ({best.how}) and the limit is {limit / 1e9:.2f} GB: use a GPU with more memory, "
        f"{less}, a smaller --batch or a lower --rank"
    )


def print_plan(
    model: str, rank: int = 16, batch: int = 8, limit: str = "", world: int = 1, teacher: str = "resident", micro_batch: int = 1,
    checkpointing: bool = False, group_w: int = 64, build=None, shapes=None, fp: Footprint | None = None, statistics: int = 0,
    lora_bits: int = 8, merged: bool = False, training: bool = True, rounding: str = "gptq", on_cpu: bool = False,
) -> None:  # fmt: skip
    """Print the table of layers, the planned peak of training, what it needs of main memory and disk, and, last, `memory_ratio:
    0.xxx`, of the merged network if `merged`.

    limit: such as 24GB; "" plans what micro_batch, checkpointing and teacher say. build: () -> network on the meta device and
    shapes: (latent, tokens), where the network is not the one of models.NETWORKS; fp: its Footprint. training=False: no plan.
    statistics: bytes, 0: what the limit leaves, or STATISTICS.
    UserError, after the table, if training does not fit the limit."""
    build, shapes = build or (lambda: family.meta_network(model)), shapes or family.SHAPES[model]
    rows, without = (layer_table(build(), rank, lora_bits, group_w, merged) for merged in (False, True))
    print(f"{model}, rank {rank}, groups of {group_w}\n\n{format_table(rows, lora_bits)}")
    print(f"{'merged, without a branch':30s}{'':15s} {ratio(without):8.2%}\n")
    if training:
        fp = fp or Footprint(build, *shapes, rank, group_w=group_w)
        statistics = 0 if fp.trains == "cm" else statistics or (None if limit else min(STATISTICS, fp.most))
        if limit:
            made = choose(parse_bytes(limit), fp, batch, world, teacher, statistics)
        else:
            made = plan(fp, batch, micro_batch, checkpointing, teacher, world, statistics)
        print(made)
        if made.statistics:
            print(f"  main memory for the start       {main_memory(fp, made, widest_factors(fp, rounding), on_cpu) / 1e9:8.3f} GB")
        print(f"  disk, without the cache         {fp.files / 1e9:8.3f} GB\n")
    print(f"memory_ratio: {ratio(without if merged else rows):.3f}")


def sizes(cfg) -> tuple:
    """For memory.py: (build, (latent, tokens)), pictures of --resolution, and the micro-batch without --memory-limit."""
    latent, tokens = family.SHAPES[cfg.model]
    if cfg.resolution:
        buckets(cfg.resolution)  # UserError
    base = cfg.components if pretrained.is_file(cfg.teacher) else cfg.teacher
    side = pretrained.latent_side(pretrained.skeleton(cfg.model, base), cfg.resolution)
    return (
        lambda: pretrained.skeleton(cfg.model, base),
        ((latent[0], side, side), tokens),
        cfg.micro or cfg.batch // process_count(),
    )


def teacher_of(cfg) -> str:
    """Where the teacher is in training: one of memory.TEACHERS."""
    return "shard" if cfg.shard_teacher and process_count() > 1 else "offload" if cfg.offload else "resident"


def footprint(cfg, build, shapes) -> Footprint:
    """Of the 4-bit student, or of the consistency model that --bits 16 trains."""
    ranks = {"cm_rank": cfg.rank, "trains": "cm"} if cfg.bits == 16 else {"rank": cfg.rank}
    gradients = hgs_lora.wants_gradients(cfg.hessian, cfg.init, qra.METHODS[cfg.ranks].reads)
    return Footprint(build, *shapes, **ranks, dtype=cfg.torch_dtype, group_w=cfg.group_w, gradients=gradients)


def statistics_bytes(cfg, fp: Footprint) -> int | None:
    """Bytes of --hessian-mb, at least what the widest layer needs; None: as there is room."""
    return 0 if cfg.bits == 16 else max(cfg.hessian_mb << 20, fp.least) if cfg.hessian_mb else None


def dry_run(cfg) -> None:
    """The table of layers, the planned peak, and last the memory ratio."""
    build, shapes, micro = sizes(cfg)
    fp = footprint(cfg, build, shapes)
    print_plan(
        cfg.model, cfg.rank, cfg.batch, cfg.memory_limit, process_count(), teacher_of(cfg), micro, cfg.checkpointing,
        cfg.group_w, build, shapes, fp, statistics_bytes(cfg, fp) or 0, cfg.lora_bits, cfg.deploy == "merged",
        rounding=cfg.rounding, on_cpu=cfg.device == "cpu",
    )  # fmt: skip


def planned(cfg):
    """cfg with micro, checkpointing, offload and hessian_mb as --memory-limit asks for (without one, hessian_mb is what 90% of
    the GPU's free memory leave, on a CPU 8 GiB, and never less than the widest layer needs); prints the planned peak, but for runs
    that go on without a limit: most of a minute would tell them what they know. UserError if nothing fits."""
    build, shapes, micro = sizes(cfg)
    goes_on = (Path(cfg.out) / "state.safetensors").exists() if cfg.bits == 16 else checkpoint.has_start(Path(cfg.out))
    fp, teacher, world = footprint(cfg, build, shapes), teacher_of(cfg), process_count()
    cfg, statistics = dataclasses.replace(cfg, micro=micro), statistics_bytes(cfg, fp)
    if cfg.memory_limit:  # chosen with the start in mind even where there is one, so that a run goes on as it began
        plan = choose(parse_bytes(cfg.memory_limit), fp, cfg.batch, world, teacher, statistics)
        choice = {"micro": plan.micro_batch, "checkpointing": plan.checkpointing, "offload": plan.teacher == "offloaded"}
        cfg, statistics, micro = dataclasses.replace(cfg, **choice), plan.statistics, plan.micro_batch
        teacher = teacher_of(cfg)
    elif statistics is None and not goes_on:
        rest = sum(start_of(fp, micro, cfg.checkpointing).values())
        room = int(0.9 * torch.cuda.mem_get_info()[0]) - rest if cfg.device == "cuda" else STATISTICS
        fewest = torch.tensor(-room, device=cfg.device)
        hessian.exchange(fewest, op="max")  # processes that sliced differently would add up different matrices
        room = -int(fewest)
        statistics = max(fp.budget(room), fp.least)
    statistics = 0 if goes_on else statistics
    cfg = dataclasses.replace(cfg, hessian_mb=max(statistics >> 20, -(-fp.least >> 20)))
    drawn = 2 * cfg.cached * (cfg.grid // 2 + 1) * math.prod(shapes[0])  # float16
    written = fp.files + (drawn if cfg.rollout and cfg.trajectory == "teacher" else 0)
    there = sum(file.stat().st_size for file in (*Path(cfg.out).glob("*.safetensors"), *Path(cfg.out).glob("trajectories/*")))
    need, free = written - there, shutil.disk_usage(cfg.out).free
    if free < need:
        raise UserError(f"--out {cfg.out} has {free / 1e9:.1f} GB free, the run writes {need / 1e9:.1f} GB: choose another --out")
    if goes_on and not cfg.memory_limit:
        return cfg
    plan = plan(fp, cfg.batch, micro, cfg.checkpointing, teacher, world, statistics)
    if process_index() == 0:
        print(plan)
    if plan.statistics:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine
        need = processes * main_memory(fp, plan, widest_factors(fp, cfg.rounding), cfg.device == "cpu")
        there = free_memory()
        if process_index() == 0:
            print(f"  main memory for the start       {need / 1e9:8.3f} GB")
        if need > there:
            raise UserError(
                f"the start needs {need / 1e9:.1f} GB of main memory and {there / 1e9:.1f} GB are there: use a machine with more, "
                "or --rounding rtn, which needs less"
            )
    return cfg


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.memory", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(family.SHAPES), default="tiny-flux")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", default="", help="such as 24GB")
    parser.add_argument("--world", type=int, default=1, help="GPUs that share the batch")
    parser.add_argument("--shard", action="store_true", help="share the teacher among them")
    args = parser.parse_args(argv)
    if min(args.rank, args.batch, args.world) < 1 or args.batch % args.world:
        raise UserError("--rank, --batch and --world must be at least 1, and --batch must divide among --world")
    print_plan(args.model, args.rank, args.batch, args.limit, args.world, "shard" if args.shard else "resident")


if __name__ == "__main__":
    run_script("models.memory", main)
