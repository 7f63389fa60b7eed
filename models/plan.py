"""How a run fits into memory: the planned peak of its training, the choice for a limit, and what is checked before it begins.

Planned peak = what stays + the most that is alive besides (models/memory.py), in the worst of four moments:

    start      the 16-bit network, what statistics and factors come to (--hessian-mb, Footprint.held; student.py), activations of
               calibration: 4 micro-batches forward, or one forward and backward; packed layers wait in main memory
    train      student, A and B float32, their gradients, Adam's moments, the anchor A0 B0, inputs of the process's batch
               + teacher (resident), teacher / processes (sharded) or nothing (offloaded)
               + activations of the student, forward and backward of one micro-batch
    teach      the same, and of the teacher two blocks and what lies outside of blocks where it is not resident
               + activations of its forward; classifier-free guidance runs both halves of its batch at once
    update     the same as train without activations, + a copy of A and B (AdamW's square root), + one to average over processes

Training a consistency LoRA (--bits 16) holds the 16-bit network, which is the teacher too, in place of student and teacher.

Not planned: the cache, which text encoders and VAE make before (SDXL 1.6 + 0.3 GB, FLUX 9.8 + 0.3, and 2.7 for a picture of 1024
pixels inside the VAE), beside the 16-bit network only where that draws latents, a micro-batch at a time.
"""

import dataclasses
import itertools
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import hessian
import hgs_lora
import qra
from layers import on_meta
from models import checkpoint, pretrained
from models.denoiser import Denoiser
from models.family import FAMILIES
from models.memory import Footprint, format_table, layer_table, ratio
from run.common import UserError, free_memory, process_count, process_index

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
STATISTICS = 8 << 30  # bytes of statistics and factors where neither --hessian-mb nor a limit says how many


def parse_bytes(text: str) -> int:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2^30. UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] not in UNITS:
        raise UserError(f"{text!r} is no amount of memory: write it as 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


class Plan(NamedTuple):
    moment: str  # of the peak: start, train, teach or update
    parts: dict[str, int]  # bytes at that moment
    micro_batch: int
    checkpointing: bool
    teacher: str  # resident, sharded or offloaded
    statistics: int  # bytes

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def how(self) -> str:
        less = f"{'with' if self.checkpointing else 'without'} gradient checkpointing"
        return f"micro-batch {self.micro_batch} {less}, teacher {self.teacher}, reached in `{self.moment}`"

    def __str__(self) -> str:
        lines = [f"planned peak of training {self.peak / 1e9:.2f} GB ({self.how}):"]
        return "\n".join([*lines, *(f"  {what:32s}{size / 1e9:8.3f} GB" for what, size in self.parts.items() if size)])


def start_of(fp: Footprint, micro_batch: int, checkpointing: bool) -> dict[str, int]:
    """What is alive in the start beside statistics and factors."""
    backward = fp.activations("checkpointed" if checkpointing else "trained", micro_batch)
    return {"16-bit network": fp.network, "activations": max(fp.activations("teacher", 4 * micro_batch), backward)}


def main_memory(fp: Footprint, plan: Plan, factors: int, on_cpu: bool) -> int:
    """Bytes of main memory that the start needs: packed layers with A, B and anchor, and the `factors` of the layer that has the
    largest, with its H, if they do not fit beside the statistics. on_cpu: the rest of the start is there too."""
    waiting, widest = fp.packed + 2 * fp.factors, factors + fp.in_main_memory(plan.statistics)
    if on_cpu:
        rest = sum(start_of(fp, plan.micro_batch, plan.checkpointing).values())
        return waiting + rest + max(fp.held(plan.statistics), plan.statistics // 4 + widest)
    return waiting + (widest if factors > plan.statistics // 2 else 0)


def plan(
    fp: Footprint, batch: int, micro_batch: int, checkpointing: bool, teacher: str = "resident", world: int = 1, statistics: int = 0
) -> Plan:
    """The planned peak of one rank, by the equations of the module docstring. batch: over all ranks; teacher: where it is while
    a student is trained; statistics: bytes for them in the start, 0: training alone, from a start that is there."""
    a_b = fp.factors
    stays = {"their gradients": a_b, "Adam's moments": 2 * a_b, "inputs and states": batch // world * fp.sample}
    if fp.trains == "student":
        stays = {"packed student": fp.packed, "A, B (float32)": a_b, "anchor A0, B0": a_b} | stays
    between = {"resident": fp.network, "sharded": -(-fp.network // world), "offloaded": 0}[teacher]
    during = between if teacher == "resident" else between + fp.gathered
    student = fp.activations("checkpointed" if checkpointing else "trained", micro_batch)
    taught = fp.activations("teacher", micro_batch * (2 if fp.family.classifier_free else 1))
    moments = {
        "train": stays | {"teacher and its LoRA": between, "activations": student},
        "teach": stays | {"teacher and its LoRA": during, "activations": taught},
        "update": stays | {"teacher and its LoRA": between, "copies of A, B": a_b * (2 if world > 1 else 1)},
    }
    if statistics:
        moments["start"] = start_of(fp, micro_batch, checkpointing) | {"statistics and factors": fp.held(statistics)}
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Plan(worst, moments[worst], micro_batch, checkpointing, teacher, statistics)


def choose(limit: int, fp: Footprint, batch: int, world: int = 1, teacher: str = "resident", statistics=(0,)) -> Plan:
    """The first plan that fits `limit` bytes: with the first amount of `statistics` that any plan has room for, without gradient
    checkpointing before with it, and the largest power of two that fits as micro-batch. teacher "resident": if a student's does
    not fit at all, offloaded; others as they are. UserError if nothing fits."""
    samples = batch // world
    micro = [n for n in (2**k for k in reversed(range(samples.bit_length()))) if samples % n == 0]
    teachers = ["resident", "offloaded"] if teacher == "resident" and fp.trains == "student" else [teacher]
    for some, teacher, checkpointing, n in itertools.product(statistics, teachers, (False, True), micro):
        made = plan(fp, batch, n, checkpointing, teacher, world, some)
        if made.peak <= limit:
            return made
    less = "--shard-teacher on several GPUs" if fp.trains == "student" else "a ready --cm"
    less = "--device cpu" if made.moment == "start" else less
    raise UserError(
        f"training needs {made.peak / 1e9:.2f} GB ({made.how}) and the limit is {limit / 1e9:.2f} GB: use a GPU with more memory, "
        f"{less}, a smaller --batch or a lower --rank"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run asks for. cfg: train.Config


def skeleton_of(cfg) -> torch.nn.Module:
    """The run's float network on the meta device."""
    return pretrained.skeleton(cfg.model, cfg.components if pretrained.is_file(cfg.teacher) else cfg.teacher)


def about_inputs(cfg) -> dict[str, bool]:
    """What layers keep of their inputs, as memory.packed_twin_of takes it."""
    return {"smooth": any(cfg.exponents), "centre": cfg.centre}


def footprint_of(cfg, network: Denoiser | None = None) -> Footprint:
    """Of the 4-bit student, or of the consistency model that --bits 16 trains, for pictures of --resolution. network: the one that
    is packed, where it is in memory."""
    family, build = FAMILIES[cfg.model], partial(on_meta, network.net) if network else partial(skeleton_of, cfg)
    net = build()
    side = pretrained.latent_side(family, net, cfg.resolution)
    about = {"cm_rank": cfg.rank, "trains": "cm"} if cfg.bits == 16 else {"rank": math.ceil(cfg.rank)}
    about |= {"cm_rank": 0} if cfg.cm == pretrained.WHOLE else {}
    about |= about_inputs(cfg)
    about["gradients"] = hgs_lora.wants_gradients(cfg.hessian, cfg.init, qra.METHODS[cfg.ranks].reads)
    latent = (family.latent[0], side, side)
    tokens, about_w = family.text_tokens(net.config), {"dtype": cfg.torch_dtype, "group_w": cfg.group_w}
    return Footprint(build, latent, tokens, **about_w, **about)


def teacher_of(cfg) -> str:
    """Where the teacher is in training."""
    return "sharded" if cfg.shard_teacher and process_count() > 1 else "offloaded" if cfg.offload else "resident"


def micro_of(cfg) -> int:
    return cfg.micro or cfg.batch // process_count()


def choices(cfg, fp: Footprint, goes_on: bool = False) -> tuple:
    """(cfg with micro, checkpointing and offload as --memory-limit asks for, and hessian_mb as there is room, but never less than
    the widest layer needs; its plan, without the start for a run that `goes_on`). Statistics fill the limit, and only
    what cannot fit waits in main memory; without a limit they fill 90% of the GPU's free memory, and STATISTICS bytes on a CPU and
    for a dry run. UserError if nothing fits."""
    cfg, given = dataclasses.replace(cfg, micro=micro_of(cfg)), cfg.hessian_mb << 20
    if cfg.memory_limit:  # chosen with the start in mind even where there is one, so that a run goes on as it began
        limit, some = parse_bytes(cfg.memory_limit), [given] if given else [fp.roomy >> halvings for halvings in range(6)]
        some = [0] if cfg.bits == 16 else [max(bytes, fp.least) for bytes in some]
        made = choose(limit, fp, cfg.batch, process_count(), teacher_of(cfg), some)
        found = {"micro": made.micro_batch, "checkpointing": made.checkpointing, "offload": made.teacher == "offloaded"}
        cfg = dataclasses.replace(cfg, **found)
    statistics = 0
    if cfg.bits == 4 and not goes_on:
        if not given:
            rest = sum(start_of(fp, cfg.micro, cfg.checkpointing).values())
            given = fp.budget(limit - rest if cfg.memory_limit else room_on_device(cfg, rest))
        statistics = max(given, fp.least)
    cfg = dataclasses.replace(cfg, hessian_mb=max(statistics >> 20, -(-fp.least >> 20)))
    return cfg, plan(fp, cfg.batch, cfg.micro, cfg.checkpointing, teacher_of(cfg), process_count(), statistics)


def room_on_device(cfg, rest: int) -> int:
    """Bytes for statistics beside `rest`, the least of all processes: those that sliced differently would add up different
    matrices."""
    if cfg.dry_run:
        return STATISTICS
    room = int(0.9 * torch.cuda.mem_get_info()[0]) - rest if cfg.device == "cuda" else STATISTICS
    fewest = torch.tensor(-room, device=cfg.device)
    hessian.exchange(fewest, op="max")
    return -int(fewest)


def dry_run(cfg) -> None:
    """Prints the table of layers, the planned peak (of one of WORLD_SIZE processes), main memory and disk that are needed, and last
    the memory ratio. UserError, after the table, if training does not fit --memory-limit."""
    family, net = FAMILIES[cfg.model], skeleton_of(cfg)
    table = partial(layer_table, family, net, lora_bits=cfg.lora_bits, group_w=cfg.group_w, **about_inputs(cfg))
    rows, merged = table(math.ceil(cfg.rank)), table(0)
    paid = " (layers that the run leaves in 16 bits are paid with ranks)" if cfg.keep_16bit else ""
    print(f"{cfg.model}, rank {math.ceil(cfg.rank)}{paid}, groups of {cfg.group_w}\n\n{format_table(rows, cfg.lora_bits)}")
    print(f"{'merged, without a branch':30s}{'':15s} {ratio(merged):8.2%}\n")
    fp = footprint_of(cfg)
    cfg, made = choices(cfg, fp)
    print(made)
    if made.statistics:
        print_main_memory(cfg, fp, made)
    print(f"  disk, without the cache         {fp.files / 1e9:8.3f} GB\n")
    print(f"memory_ratio: {ratio(merged if cfg.deploy == 'merged' else rows):.3f}")


def planned_in_memory(cfg, network: Denoiser):
    """cfg with --hessian-mb as there is room beside a network that is on its device, where it is packed."""
    fp, cfg = footprint_of(cfg, network), dataclasses.replace(cfg, micro=micro_of(cfg))
    rest = 0 if cfg.device == "cpu" else start_of(fp, cfg.micro, cfg.checkpointing)["activations"]
    statistics = max(cfg.hessian_mb << 20 or fp.budget(room_on_device(cfg, rest)), fp.least)
    return dataclasses.replace(cfg, hessian_mb=-(-statistics >> 20))


def planned(cfg):
    """cfg with the `choices` of a run, whose planned peak is printed; a run that goes on without a limit printed it when it began,
    and planning takes up to a minute. UserError if memory or disk have too little room."""
    out = Path(cfg.out)
    goes_on = (out / "state.safetensors").exists() if cfg.bits == 16 else checkpoint.has_start(out)
    fp = footprint_of(cfg)
    check_disk(cfg, fp)
    if goes_on and not cfg.memory_limit:
        return dataclasses.replace(cfg, micro=micro_of(cfg))
    cfg, made = choices(cfg, fp, goes_on)
    if process_index() == 0:
        print(made)
    if made.statistics and (need := print_main_memory(cfg, fp, made)) > (there := free_memory()):
        raise UserError(
            f"the start needs {need / 1e9:.1f} GB of main memory and {there / 1e9:.1f} GB are there: use a machine with more, "
            "or --rounding rtn, which needs less"
        )
    return cfg


def print_main_memory(cfg, fp: Footprint, made: Plan) -> int:
    """Prints and returns what the processes of this machine need of main memory for the start."""
    widest = max(hgs_lora.factor_bytes(*shape, cfg.rounding) for shape in fp.layers)
    need = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * main_memory(fp, made, widest, cfg.device == "cpu")
    if process_index() == 0:
        print(f"  main memory for the start       {need / 1e9:8.3f} GB")
    return need


def check_disk(cfg, fp: Footprint) -> None:
    """UserError if the run folder's disk has no room for what the run still writes."""
    latent, _ = fp.shapes
    drawn = 2 * cfg.cached * (cfg.grid // 2 + 1) * math.prod(latent)  # trajectories, float16
    written = fp.files + (drawn if cfg.rollout and cfg.trajectory == "teacher" else 0)
    there = sum(file.stat().st_size for file in (*Path(cfg.out).glob("*.safetensors"), *Path(cfg.out).glob("trajectories/*")))
    need, free = written - there, shutil.disk_usage(cfg.out).free
    if free < need:
        raise UserError(f"--out {cfg.out} has {free / 1e9:.1f} GB free, the run writes {need / 1e9:.1f} GB: choose another --out")
