"""CMQuant: distil a teacher into a few-step consistency model while quantizing it to 4-bit weights and activations.

    python train.py                                        tiny, W4A4, runs/tiny: statistics, ranks, LoRA, distillation, checkpoint
    python train.py --recipe paper                         the paper's TDPT alone
    python train.py --init zero --ranks uniform --rounding rtn --rollout 0 --targets self,self --lr 2e-4     a baseline, QLoRA style
    python train.py --bits 16                              the full-precision consistency model, a LoRA on the teacher
    python train.py --stage teacher                        the teacher, from nothing
    python train.py --model sdxl --cm LORA                 the same for SDXL, from public weights (models/pretrained.py)
    python train.py --model flux --teacher black-forest-labs/FLUX.1-schnell --cm none    a base that draws in few steps itself
    python train.py --model flux --weights random --dry-run         every choice, table of layers, planned memory; needs no weights

The steps of the method: 1. statistics, 2. ranks, 3. W ~ Q + B A (all three in student.py), 4. distillation of A and B (`fit` is the
loop, `tdpt_losses` and `rollout_losses` are what it minimises), 5. the deployed checkpoint, its pictures and scores.

Rerunning a command resumes it: everything random in step k is a function of (seed, k), so a killed run ends with the same numbers.
`torchrun --nproc-per-node 2 train.py ..` splits batch and calibration; statistics and LoRA gradients travel.
run/files.py lists what a run folder holds; model.safetensors is the deployed checkpoint, samples/ has its pictures.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import evaluate
import hgs_lora
import kernels
import qra
import quant
import sample
import student
import tdpt
from data import sources
from data.cache import Cache, Trajectories
from layers import as_anchor, number_format, packed_layers, set_backend
from models import checkpoint, encoders, pipeline, plan, pretrained, teacher
from models.denoiser import FAST, Denoiser, as_cm, as_teacher, fuse, random_denoiser
from models.family import FAMILIES
from run import common, files, report
from run.common import UserError, average_over_processes, local_rows, process_count, process_index, run_script, step_generator
from run.state import MicroBatches, TrainingState, stop, stoppable

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def option(default, help: str, choices=None, **about):
    """A field of Config and its flag. `about` may say type: reads the flag, where the field's own type does not; least: smallest
    value; share: from 0 to 1; public: only for models with public weights; may_change: a run that has begun may go on with another
    value, since it only says how much is held at a time, written, or drawn at the end; before: what runs did that are older than
    the field."""
    return field(default=default, metadata={"help": help, "choices": choices, **about})


def fractions(text: str) -> str:
    """Numbers with commas between them, written in one way: "0.50,.3" -> "0.5,0.3"."""
    return ",".join(str(float(number)) for number in text.split(","))


def number(text: str) -> int | float:
    """A whole number where it is one: 2, 0.7. ValueError, as by float, for what is not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Config:
    """Every choice of a run. "Paper" figures are those of published few-step recipes where CMQuant's own are unknown."""

    model: str = option("tiny", "a family of models/family.py", tuple(FAMILIES))
    stage: str = option("student", "student: distil; teacher: train the teacher from nothing", ("student", "teacher"))
    bits: int = option(4, "4: W4A4 student; 16: the full-precision consistency model", (4, 16))
    recipe: str = option("cmquant", "cmquant: TDPT mixed with rollouts; paper: TDPT alone, (anchor, fp) targets")
    out: str = option("", "run folder; default runs/MODEL, runs/MODEL-cm or runs/MODEL-teacher")
    data: str = option("", "captioned pictures, see data/sources.py; default scenes, or our own list of prompts for public models")
    cache: str = option("", "folder of the latents and text embeddings; default OUT/cache", public=True)
    teacher: str = option("", "weights, or where --stage teacher starts; default: what ships, small's own run, the official base")
    components: str = option("", "if the teacher is one file: hub id or folder of its configs and tokenizers", public=True)
    weights: str = option("", "random: the full-size network with random weights, to rehearse", ("", "random"), public=True)
    cm: str = option("", "consistency LoRA; default: what ships, small's own run; public models: diffusers' format, self or none")
    cm_scale: float = option(1.0, "strength of --cm, as fuse_lora(lora_scale=..) in the LoRA's own example", public=True)
    outliers: bool = option(False, "embedded models: the same function with outlier channels, see models/outliers.py")
    resolution: int = option(0, "pixels; 0: the base's own", public=True)
    seed: int = option(0, "seed of everything random", least=0)
    steps: int = option(40, "updates; 0 packs and measures the initialisation", least=0)
    batch: int = option(32, "pictures in an update, over all processes", least=1)
    micro: int = option(0, "pictures at a time in a process; 0: all of its share", least=0, may_change=True)
    checkpointing: bool = option(False, "compute activations again in the backward pass, to keep fewer", may_change=True)
    memory_limit: str = option("", "24GB: choose --micro, --checkpointing, --offload for such a GPU", public=True, may_change=True)
    offload: bool = option(False, "the teacher waits in main memory, its blocks come to the GPU when needed", may_change=True)
    shard_teacher: bool = option(False, "torchrun: every process keeps a part of the teacher (FSDP2)", may_change=True)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda; default cuda where there is a GPU")
    optimizer: str = option("adamw", "adamw; muon: for the matrices inside blocks, AdamW for the rest", ("adamw", "muon"))
    lr: float = option(2e-5, "peak learning rate of A and B (LCM-LoRA: 1e-4), cosine to zero", least=0)
    warmup: int = option(10, "updates until the learning rate is reached")
    clip: float = option(1.0, "largest norm of the gradient")
    dtype: str = option(str(FAST).removeprefix("torch."), "of networks; default what the CPU is fast in", ("bfloat16", "float32"))
    # number format
    group_w: int = option(quant.GROUP_W, "weights that share a multiplier", quant.GROUPS)
    bits_x: int = option(4, "of activations; 8: by the same int8 product, and closer to 16 bits", (4, 8))
    inputs_8bit: int = option(0, "inputs of W4A4 layers that have 8 bits: those whose rounding costs the picture most", least=0)
    group_x: int = option(quant.GROUP_X, "activations that share a multiplier (4 bits)", quant.GROUPS)
    smooth: str = option("0.0,0.25,0.5,0.75", "SmoothQuant's a; each input takes the best; 0: off", share=True, type=fractions)
    rotate: bool = option(True, "activations are rotated in blocks of 16 channels before they are rounded", before=False)
    centre: bool = option(False, "the mean input of linear layers is not rounded: its share of the output is a bias", before=False)
    rounding: str = option("gptq", "how weights are rounded, see quant.py", quant.ROUNDINGS)
    # initialisation
    init: str = option("hgs", "how W ~ Q + B A is found, see hgs_lora.py", hgs_lora.METHODS)
    hessian: str = option("kron", "kron: of inputs, gradients and rounding noise; input: of inputs (QERA, CLoQ)", ("kron", "input"))
    iters: int = option(8, "alternations of hgs and loftq", least=0)
    ranks: str = option("qra", "how ranks are given to layers, see qra.py", qra.METHODS)
    rank: float = option(16, "average LoRA rank at equal parameters; 4-bit students: may be a fraction", type=number, least=0)
    rank_granule: int = option(1, "ranks are --rank-least and multiples of this more", least=1, before=0)
    rank_least: int = option(0, "least rank of a layer; 0: a layer may have no branch", least=0, before=-1)
    rank_most: int = option(0, "largest rank of a layer; 0: four times --rank, at least 64", least=0)
    keep_16bit: bool = option(False, "a layer may stay in 16 bits, at the price in stored bits; off: all are W4A4, as in the paper")
    calibration: int = option(64, "captions for Hessians and variation", least=1)
    gradient_captions: int = option(0, "of these, for gradients, whose passes take four times as long; 0: all", least=0)
    hessian_mb: int = option(4096, "bound of statistics and factors; 0 (public models): what memory there is", may_change=True)
    # objective
    rollout: float = option(0.75, "share of updates that are on-policy rollouts, the others are TDPT", share=True)
    trajectory: str = option("fp", "rollouts follow the fp consistency model or the cached guided teacher", ("fp", "teacher"))
    on_policy: bool = option(True, "rollouts start each phase from the student's own state, not from the reference's")
    cached: int = option(2048, "teacher trajectories in the cache (--trajectory teacher)", least=1)
    sampling_steps: str = option("1,2,4", "numbers of steps to learn; one that stands twice counts twice, in calibration too")
    jitter: float = option(0.0, "share of rollouts whose inner edges are random grid points", share=True)
    tdpt_phases: int = option(4, "K, phases of TDPT", least=1)
    grid: int = option(48, "N, solver points (LCM: 50)", least=1)
    targets: str = option("anchor,fp", "a network for each stage of TDPT, early to late: anchor, fp, self, teacher")
    split: str = option("0.5", "T' between stages, as shares of the grid from clean data to noise", share=True, type=fractions)
    guidance: float = option(1.5, "w of the teacher: u + w (c - u)")
    huber: float = option(1e-3, "c of the pseudo-Huber loss")
    # deployment
    deploy: str = option("branch", "branch: LoRA beside the packed weight; merged: Q(Q + BA), strict W4A4", ("branch", "merged"))
    lora_bits: int = option(16, "of A and B in the checkpoint; 8: for public models, where LoRA is a small share", (8, 16))
    eval_n: int = option(256, "pictures of the closing quality line", least=1, may_change=True)
    save_every: int = option(20, "updates between two resumable states", least=1, may_change=True)
    backend: str = option("native", "native: backends/, or eager; compile: torch.compile; eager", kernels.BACKENDS)
    validation_prompts: str = option(
        "", "file with a prompt in each line, for the pictures of a run; default eight of our own", may_change=True
    )
    validate_every: int = option(0, "updates between two sheets of pictures, 16-bit and trained; 0: none", least=0, may_change=True)
    report_to: str = option("", "tensorboard: losses and pictures go to OUT/tensorboard too", ("", "tensorboard"), may_change=True)
    export: str = option(
        "",
        "also write diffusers: OUT/pipeline, which loads without this code; lora: the LoRA alone",
        ("", "diffusers", "lora"),
        may_change=True,
    )
    dry_run: bool = option(False, "print the configuration (public models: and table of layers, memory) and stop")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def exponents(self) -> list[float]:
        """Of --smooth; 0 is an input that is not smoothed."""
        return [float(a) for a in self.smooth.split(",")]

    @property
    def embedded(self) -> bool:
        """Whether the model is one of ours, whose weights lie in assets/."""
        return FAMILIES[self.model].embedded


PUBLIC = {name for name, family in FAMILIES.items() if not family.embedded}  # families with public weights
MAY_CHANGE = {f.name for f in dataclasses.fields(Config) if "may_change" in f.metadata}
MOST_PROMPTS = 64  # of a sheet of pictures
OF_STUDENTS = {  # what teachers and 16-bit models do not read
    "outliers", "group_w", "bits_x", "inputs_8bit", "group_x", "smooth", "rotate", "centre", "rounding", "init", "hessian", "iters",
    "ranks", "rank_granule", "rank_least", "rank_most", "keep_16bit",
}  # fmt: skip

PRESETS = (  # (where it applies, what it sets); a later row wins, the command line wins over all. Change this to try yours.
    ({"stage": {"teacher"}}, {"steps": 5000, "batch": 64, "lr": 1e-3, "warmup": 200, "save_every": 200, "eval_n": 1024}),
    ({"stage": {"student"}, "bits": {16}},
     {"steps": 1800, "rank": 48, "lr": 1e-3, "rollout": 1.0, "trajectory": "teacher", "sampling_steps": "1,2,2,4,4,4",
      "jitter": 0.1, "cached": 4096, "eval_n": 1024}),
    ({"model": PUBLIC},
     {"steps": 500, "batch": 16, "micro": 1, "checkpointing": True, "lr": 1e-5, "lora_bits": 8, "eval_n": 16,
      "dtype": "bfloat16", "data": "prompts", "calibration": 32, "hessian_mb": 0, "cached": 512}),
    ({"model": PUBLIC, "stage": {"student"}, "bits": {16}}, {"lr": 1e-4, "steps": 1000}),  # LCM-LoRA's figures
    *(({"model": {name}, "stage": {"student"}}, family.preset) for name, family in FAMILIES.items()),
    *(({"model": {name}, "stage": {"student"}, "bits": {4}}, family.student) for name, family in FAMILIES.items()),
    ({"cm": {pretrained.WHOLE}}, {"rollout": 1.0, "sampling_steps": "4"}),  # there is no teacher, and most are made for four steps
    ({"recipe": {"cmquant"}}, {}),  # the defaults; a recipe needs a row to be known
    ({"recipe": {"paper"}}, {"rollout": 0.0}),
)  # fmt: skip


def presets(cfg: Config) -> dict:
    """What PRESETS set where a command names no more of `cfg` than what they look at."""
    suffix = "-teacher" if cfg.stage == "teacher" else "-cm" if cfg.bits == 16 else ""
    values = {"out": f"runs/{cfg.model}{suffix}"}
    for where, more in PRESETS:
        if all(getattr(cfg, name) in wanted for name, wanted in where.items()):
            values |= more
    return values


def configured(given: dict) -> Config:
    """Defaults < PRESETS < what is given, whose rank takes away bounds of a preset that contradict it or leave one rank alone."""
    cfg = Config(**(presets(Config(**given)) | given))
    contradicted = {"rank_least": cfg.rank_least >= cfg.rank, "rank_most": 0 < cfg.rank_most <= cfg.rank}
    return dataclasses.replace(cfg, **{k: 0 for k, wrong in contradicted.items() if wrong and k not in given})


def parse(argv: list[str]) -> Config:
    """The configuration of a command line. Unknown flags and abbreviations are refused with exit code 2."""
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("train.py", allow_abbrev=False, description=__doc__, formatter_class=layout)
    for f in dataclasses.fields(Config):
        public = "public models: " if "public" in f.metadata else ""
        about = {"help": f"{public}{f.metadata['help']} [{f.default}]", "default": argparse.SUPPRESS}
        if f.type is bool:
            about["action"] = argparse.BooleanOptionalAction
        else:
            about |= {"type": f.metadata.get("type", f.type), "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **about)
    return configured(vars(parser.parse_args(argv)))


def require(right: bool, message: str) -> None:
    if not right:
        raise UserError(message)


def validate(cfg: Config) -> None:
    """UserError for a configuration that cannot run, before anything costly."""
    for f in dataclasses.fields(Config):
        flag, value = f"--{f.name.replace('_', '-')}", getattr(cfg, f.name)
        if "least" in f.metadata:
            require(value >= f.metadata["least"], f"{flag} must be at least {f.metadata['least']}, got {value}")
        if "share" in f.metadata:
            require(all(0 <= float(part) <= 1 for part in str(value).split(",")), f"{flag} must be from 0 to 1, got {value}")
        if "public" in f.metadata and cfg.embedded:
            require(value == f.default, f"{flag} is for models with public weights: leave it out")
    require(cfg.rank > 0 or not cfg.steps, "--rank 0 leaves nothing to train: add --steps 0")
    whole = f"--ranks uniform gives each layer {int(cfg.rank)} of --rank {cfg.rank}: give a whole number"
    require(cfg.ranks != "uniform" or cfg.rank == int(cfg.rank), whole)
    require(cfg.rank_least <= cfg.rank, f"--rank-least {cfg.rank_least} must be at most --rank {cfg.rank}: add --rank-least 0")
    most = f"--rank-most {cfg.rank_most} must be at least --rank {cfg.rank}: add --rank-most 0"
    require(not 0 < cfg.rank_most < cfg.rank, most)
    weighs = f"--ranks {cfg.ranks} does not weigh what the grid costs: with --keep-16bit choose spectrum, qra or shuffled"
    require(not cfg.keep_16bit or "spectrum" in qra.METHODS[cfg.ranks].reads, weighs)
    require(not cfg.keep_16bit or cfg.deploy == "branch", "--deploy merged is strict W4A4: leave out --keep-16bit")
    require(not (cfg.inputs_8bit and cfg.bits_x == 8), "--bits-x 8 gives all inputs 8 bits: leave out --inputs-8bit")
    gradients = "--inputs-8bit weighs by gradients: use it with --hessian kron and --init hgs"
    require(student.reads_gradients(cfg) or not cfg.inputs_8bit, gradients)
    n = process_count()
    require(cfg.batch % n == 0, f"--batch {cfg.batch} does not divide among {n} processes")
    require(cfg.calibration >= n, f"--calibration {cfg.calibration} leaves some of {n} processes without a caption: give more")
    require(cfg.bits == 4 or (cfg.rank == int(cfg.rank) >= 1), f"--bits 16 trains a LoRA of --rank 1, 2, .., not of {cfg.rank}")
    validate_objective(cfg)
    validate_pictures(cfg)
    gpus = f"--device {cfg.device} is neither cpu nor cuda: CUDA_VISIBLE_DEVICES chooses the GPU"
    require(cfg.device in ("cpu", "cuda"), gpus)
    require(cfg.device == "cpu" or cfg.dry_run or torch.cuda.is_available(), "torch finds no CUDA device: give --device cpu")
    require(not cfg.embedded or cfg.eval_n >= 2, "--eval-n must be at least 2: a Frechet distance needs a covariance")
    students = "--outliers is for 4-bit students of the models in assets/: leave it out"
    require(not cfg.outliers or (cfg.embedded and cfg.bits == 4 and cfg.stage == "student"), students)
    require(cfg.bits == 4 or not cfg.export, "--export is for 4-bit students: leave it out")
    require(not cfg.embedded or not cfg.export, f"--export {cfg.export} needs a model with public weights: leave it out")
    public = f"--stage teacher trains the models of assets/: {cfg.model} has a public teacher"
    require(cfg.embedded or cfg.stage == "student", public)
    require(cfg.export != "lora" or cfg.deploy == "branch", "--export lora needs --deploy branch")
    nothing = "--weights random has no text encoders and VAE to export: leave out --export diffusers"
    require(cfg.export != "diffusers" or encoders.has_encoders(cfg), nothing)
    own = "--cm self trains for --steps updates too: train it with --bits 16, then give its .safetensors by --cm"
    require(cfg.cm != "self" or cfg.steps > 0, own)
    if cfg.cm == pretrained.WHOLE:
        validate_whole(cfg)
    shared = cfg.shard_teacher or cfg.offload
    require(cfg.bits == 4 or not shared, "--offload and --shard-teacher are for 4-bit students: leave them out")
    if cfg.shard_teacher:
        offload = "--shard-teacher and --trajectory teacher do not go together: draw the trajectories with --offload"
        require(cfg.trajectory == "fp", offload)
        torchrun = "--shard-teacher shares the teacher among processes: start them with `torchrun --nproc-per-node 8 train.py ..`"
        require(cfg.dry_run or dist.is_initialized() or "RANK" in os.environ, torchrun)


def validate_pictures(cfg: Config) -> None:
    asked = bool(cfg.validate_every or cfg.validation_prompts)
    students = "--validate-every and --validation-prompts are not for --stage teacher: leave them out"
    require(not asked or cfg.stage == "student", students)
    nothing = "--weights random without --teacher has no VAE: leave out --validate-every and --validation-prompts"
    require(not asked or encoders.has_encoders(cfg), nothing)
    closing = "--bits 16 draws no closing pictures: add --validate-every, or leave out --validation-prompts"
    require(cfg.bits == 4 or cfg.validate_every or not cfg.validation_prompts, closing)
    if cfg.validation_prompts:
        found = len(sources.read_prompts(Path(cfg.validation_prompts)))
        many = f"{cfg.validation_prompts} holds {found} prompts: give at most {MOST_PROMPTS}, a column each"
        require(found <= MOST_PROMPTS, many)
    if cfg.report_to:
        report.summary_writer()


def validate_whole(cfg: Config) -> None:
    """Of --cm none: the base is the consistency model, and no teacher is there whose steps from x_t to x_u TDPT could take."""
    require(not cfg.embedded, "--cm none is for models with public weights: leave it out")
    trained = "--cm none says that the base draws in few steps: leave out --bits 16, which trains a LoRA for that"
    require(cfg.bits == 4, trained)
    require(cfg.cm_scale == 1, "--cm none has no LoRA that --cm-scale could weaken: leave it out")
    alone = "--cm none leaves no teacher for TDPT: train on rollouts alone, --rollout 1 --trajectory fp"
    require(cfg.rollout == 1 and cfg.trajectory == "fp", alone)
    require("teacher" not in cfg.targets.split(","), "--cm none leaves no teacher for --targets: leave them out")


def validate_objective(cfg: Config) -> None:
    recipes = [name for where, _ in PRESETS for name in where.get("recipe", ())]
    require(cfg.recipe in recipes, f"--recipe {cfg.recipe} is not in PRESETS: choose from {', '.join(recipes)}")
    most = FAMILIES[cfg.model].most_grid_points
    require(cfg.grid <= most, f"--grid {cfg.grid} is more than a noise schedule's {most}: choose fewer")
    points = cfg.grid // 2 if cfg.trajectory == "teacher" else cfg.grid  # cached trajectories keep every second point
    numbers = f"--sampling-steps {cfg.sampling_steps} must be numbers from 1 to {points}, such as 1,2,4 (or raise --grid)"
    require(all(K.isdigit() and 1 <= int(K) <= points for K in cfg.sampling_steps.split(",")), numbers)
    phases = f"--tdpt-phases {cfg.tdpt_phases} is more than the {cfg.grid} points of --grid: choose fewer"
    require(cfg.tdpt_phases <= cfg.grid, phases)
    targets, split = cfg.targets.split(","), cfg.split.split(",")
    known = TARGETS.keys() - ({"anchor"} if cfg.bits == 16 and cfg.rollout < 1 else set())  # rollouts alone have no targets
    names = f"--targets {cfg.targets} must name a network for each stage: {', '.join(TARGETS)} (anchor: 4 bits only)"
    require(known.issuperset(targets), names)
    stages = f"--targets {cfg.targets} makes {len(targets)} stages: --split must have {len(targets) - 1} points, each once"
    require(len(set(split)) == len(split) == len(targets) - 1, stages)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, of students, consistency models and teachers


def optimizers_of(cfg: Config, params: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """AdamW; with --optimizer muon, Muon (Jordan et al. 2024) on the matrices inside the network's blocks and AdamW on embeddings,
    convolutions, norms, biases and the layers at both ends. Muon's step, scaled to AdamW's size (Liu et al. 2025), is taken 5
    times as long: after 200 updates of tiny-flux the validation loss was .441 with 10 times as long ones, .470 with equal ones,
    .533 with AdamW."""
    inner = {k: p for k, p in params.items() if cfg.optimizer == "muon" and p.dim() == 2 and "block" in k}
    rest = [p for k, p in params.items() if k not in inner]
    optimizers = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01))
    if inner:
        optimizers.append(torch.optim.Muon(inner.values(), lr=5 * cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(peak: float, step: int, warmup: int, steps: int) -> float:
    """Of update `step`, counted from 0: a linear warm-up to `peak`, times a cosine from 1 to 0 over all steps."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * (0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(
    cfg: Config,
    out: Path,
    params: dict[str, Tensor],
    objective: Callable,
    averages: dict[str, Tensor] | None = None,
    show: Callable[[int], Image.Image | None] | None = None,
) -> None:
    """--steps updates of the parameters theta, in place; a run that was killed or stopped goes on from its last saved state.

    objective(gen, micro_batches) -> generator of losses, which add up to the mean of the loss L over this process' rows of the
    batch; gen is the update's generator, the same in all processes, micro_batches iterates over those rows, a few at a time.
    The generator's name, OBJECTIVE_losses, is in the line of metrics.
    averages: exponential averages of some of the parameters, by their names, to be kept up in place.
    show(update) draws pictures, before the first update, after every --validate-every and after the last one.
    UserError for a loss or gradient that is no number; the state that was saved last stays."""
    optimizers = optimizers_of(cfg, params)
    state = TrainingState(out, params, optimizers, averages or {}, cfg.steps)
    begin = state.load()
    board = report.Board(out, begin, bool(cfg.report_to)) if process_index() == 0 else None

    def show_pictures(step: int) -> None:
        if show and cfg.validate_every and (step % cfg.validate_every == 0 or step == cfg.steps):
            sheet = show(step)  # in all processes; the first one gets it, if no signal comes
            if board and sheet:
                board.add_pictures(sheet, step)

    parts = torch.arange(cfg.batch // process_count()).split(cfg.micro or cfg.batch)
    bar = tqdm(range(begin, cfg.steps), cfg.stage, initial=begin, total=cfg.steps, disable=process_index() > 0)
    for step in bar:
        show_pictures(step)
        began = time.perf_counter()

        # 1. g = grad L(theta), a micro-batch at a time; a signal ends this early
        loss, calls, micro_batches = 0.0, 0, MicroBatches(parts, finish=cfg.shard_teacher)
        losses = objective(step_generator(cfg.seed, step), micro_batches)
        for loss_part in losses:
            loss_part.backward()
            loss += loss_part.item()
            calls += 1

        # 2. the mean of g over the processes; whether one of them was stopped travels along, so that all stop at the same update
        for p in params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a layer that this update did not use
        grads = [p.grad for p in params.values()]
        loss, stopping, given_up = average_over_processes(grads, loss, bool(stop.asked), micro_batches.given_up)
        if given_up:
            state.save(step, stopping=True)  # ends the process

        # 3. |g| <= clip
        norm = torch.nn.utils.clip_grad_norm_(params.values(), cfg.clip).item()
        if not math.isfinite(loss + norm):
            kept = f"{state.path} keeps an earlier step" if state.path.exists() else "nothing was saved yet"
            what = f"step {step}: loss {loss}, gradient norm {norm}"
            raise UserError(f"{what}: look at the data, or lower --lr and change --out ({kept})")

        # 4. theta <- AdamW(theta, g, lr_k)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(optimizer.defaults["lr"], step, cfg.warmup, cfg.steps)
            optimizer.step()
            optimizer.zero_grad()

        # 5. mean theta <- d mean theta + (1 - d) theta
        if averages:
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averages.values()), [params[k].detach() for k in averages], 1 - decay)

        # 6. a line of metrics, and everything that resuming needs
        bar.set_postfix_str(f"loss {loss:.4f}")
        if process_index() == 0:
            row = {"step": step, "loss": loss, "norm": norm, "lr": learning_rate(cfg.lr, step, cfg.warmup, cfg.steps)}
            row |= {"objective": losses.__name__.removesuffix("_losses"), "jumps": calls // len(parts)}
            seconds, peak = time.perf_counter() - began, common.peak_memory(cfg.device) / 1e9
            row |= {"seconds": seconds, "pictures_per_second": cfg.batch / seconds, "peak_memory_gb": peak}
            state.log(row)
            board.add(state.rows)
        if stopping or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            state.save(step + 1, bool(stopping))
    show_pictures(cfg.steps)
    if board:
        board.draw(state.rows)


# ---------------------------------------------------------------------------------------------------------------------
# What a student learns from


@dataclass
class Roles:
    """Who takes part in a distillation. Networks are functions (x_t, t, s, cond) -> prediction."""

    student: Callable  # the consistency model that is trained
    params: dict[str, Tensor]  # what is trained of it
    network: Denoiser  # teacher and full-precision consistency model at 16 bits, by switch
    guided: Callable  # the teacher under guidance
    examples: sources.LiveExamples | Cache  # captions, and latents of pictures
    trajectories: Trajectories | None = None  # of the guided teacher, if rollouts follow them
    averages: dict[str, Tensor] = field(default_factory=dict)  # exponential averages of params, which a target may start
    validation: sample.Validation | None = None  # draws pictures of the reference beside those of the student


TARGETS = {  # names that --targets may give to a stage, and the network that each stands for. Change this to try yours.
    "anchor": lambda roles: as_anchor(roles.student),  # packed, with the A and B that the training began with [R]
    "fp": lambda roles: as_cm(roles.network),  # the full-precision consistency model
    "self": lambda roles: roles.student,
    "teacher": lambda roles: roles.guided,
}


def tdpt_losses(cfg: Config, networks: dict, schedule: tdpt.Schedule, examples, gen, micro_batches) -> Iterator[Tensor]:
    """TDPT: x_t on the path, x_u by one solver step, the stage's target jumps on to the end of the phase."""
    x0, cond = examples.latents(cfg.batch, gen, local_rows())
    noise = torch.randn(cfg.batch, *x0.shape[1:], generator=gen)[local_rows()]
    idx = torch.randint(cfg.grid, (cfg.batch,), generator=gen)[local_rows()]
    for rows in micro_batches:
        cond_r = to(cond, cfg.device, rows)
        x0_r, noise_r, idx_r = (whole[rows].to(cfg.device) for whole in (x0, noise, idx))
        loss_B = tdpt.tdpt_loss(networks, schedule, x0_r, cond_r, noise_r, idx_r, cfg.huber, always=cfg.shard_teacher)
        yield loss_B.mean() * (len(rows) * process_count() / cfg.batch)


def rollout_losses(cfg: Config, roles: Roles, gen: torch.Generator, micro_batches) -> Iterator[Tensor]:
    """On-policy rollout [O]: K jumps of the student, each from its own last state to where the reference arrives.

    The reference is the teacher's cached trajectory, or else what the fp consistency model draws from the same noise."""
    path, cached, choices = roles.network.path, roles.trajectories, cfg.sampling_steps.split(",")
    K = int(choices[torch.randint(len(choices), (1,), generator=gen)])
    times = cached.times if cached else path.grid(cfg.grid)
    inner = 1 + torch.randperm(len(times) - 2, generator=gen)[: K - 1].sort().values
    edges = tdpt.phase_edges(times, K)
    if torch.rand(1, generator=gen) < cfg.jitter:
        edges = times[torch.tensor([0, *inner.tolist(), len(times) - 1])]
    if cached:
        pick = torch.randint(len(cached.states[0]), (cfg.batch,), generator=gen)[local_rows()]
        cond, states = to(cached.cond, "cpu", pick), tdpt.states_at(cached.states[:, pick].float(), times, edges)
    else:  # the first state alone is known yet
        cond = roles.examples.conditions(cfg.batch, gen, local_rows())
        states = torch.randn(cfg.batch, *roles.network.latent, generator=gen)[None, local_rows()]
    edges = edges.to(cfg.device)
    for rows in micro_batches:
        cond_r, share = to(cond, cfg.device, rows), len(rows) * process_count() / cfg.batch
        states_r = states[:, rows].to(cfg.device)
        if not cached:
            states_r = tdpt.rollout_states(as_cm(roles.network), path, states_r[0], cond_r, edges)
        for loss_k in tdpt.rollout_phases(roles.student, path, states_r, cond_r, edges, cfg.on_policy, cfg.huber):
            yield loss_k * share / K


def to(cond: dict[str, Tensor], device: str, rows=slice(None)) -> dict[str, Tensor]:
    return {k: v[rows].to(device) for k, v in cond.items()}


def distil(cfg: Config, out: Path, learner: Denoiser, network: Denoiser) -> Roles:
    """4. TDPT mixed with on-policy rollouts, on A and B of the learner: a packed student, or `network` itself as the consistency
    model. Returns who took part."""
    examples = encoders.examples_of(cfg, out, network)
    pretrained.place(network, cfg.device, cfg.offload, cfg.shard_teacher)
    params = {k: p.requires_grad_() for k, p in learner.named_parameters() if "lora_" in k}
    if cfg.checkpointing:
        learner.net.train().enable_gradient_checkpointing()
    null = examples.null() if network.family.classifier_free else {}  # else guidance is an input of the network, or there is none
    null.pop("time_ids", None)  # sizes and crops are the picture's own without a caption too
    guided = tdpt.guided(as_teacher(network), cfg.guidance if null else 1.0, to(null, cfg.device))
    roles = Roles(as_cm(network) if learner is network else learner, params, network, guided, examples)
    if (of_prompts := encoders.conditions_of_prompts(cfg, out, network)) is not None:
        reference = ("teacher", guided, 25) if learner is network else ("16-bit CM", as_cm(network), files.most_steps(vars(cfg)))
        roles.validation = sample.Validation(cfg, out, network, of_prompts, *reference)
    if cfg.rollout and cfg.trajectory == "teacher":
        times, folder = network.path.grid(cfg.grid // 2), out / "trajectories"
        roles.trajectories = Trajectories(folder, guided, network, examples, cfg.cached, times, cfg.seed, cfg.micro, cfg.device)
    grid, targets = network.path.grid(cfg.grid, cfg.device), tuple(cfg.targets.split(","))
    split = tuple(map(float, cfg.split.split(",")))
    schedule = tdpt.Schedule(network.path, grid, tdpt.phase_edges(grid, cfg.tdpt_phases), targets, split)
    networks = {name: TARGETS[name](roles) for name in ("self", "teacher", *targets)}

    def objective(gen: torch.Generator, micro_batches: MicroBatches) -> Iterator[Tensor]:
        if torch.rand(1, generator=gen) < cfg.rollout:
            return rollout_losses(cfg, roles, gen, micro_batches)
        return tdpt_losses(cfg, networks, schedule, examples, gen, micro_batches)

    def show(step: int) -> Image.Image | None:
        name = "16-bit CM" if learner is network else number_format(learner)
        return roles.validation(f"{name}\nupdate {step}", roles.student, f"update-{step:05}.png")

    fit(cfg, out, params, objective, roles.averages, show if roles.validation else None)
    return roles


# ---------------------------------------------------------------------------------------------------------------------
# The three things that can be trained


def initialised(cfg: Config, network: Denoiser, examples) -> tuple[Denoiser, dict]:
    """Steps 1. - 3. on a network that is on --device, in place: the packed student, and the table of its layers."""
    gen = step_generator(cfg.seed, 0, stream=1)
    cond = to(examples.conditions(cfg.calibration, gen, local_rows()), cfg.device)
    x_T = torch.randn(cfg.calibration, *network.latent, generator=gen)[local_rows()].to(cfg.device)
    if cfg.checkpointing:
        network.net.enable_gradient_checkpointing()
    return student.build(cfg, fuse(network), cond, x_T)


def initialise_student(cfg: Config, out: Path) -> None:
    """1. - 3. Statistics, ranks and W ~ Q + B A (student.py), written to start.safetensors."""
    network = pretrained.open_cm(cfg, torch.float32 if cfg.embedded else cfg.torch_dtype)
    examples = encoders.examples_of(cfg, out, network)  # text encoders and VAE go before the network is on the device
    packed, table = initialised(cfg, network.to(cfg.device), examples)
    if process_index() == 0:
        checkpoint.save_start(out, packed, table)


def closing_sheet(cfg: Config, out: Path, validation: sample.Validation) -> None:
    """OUT/samples/compare.png of a model with public weights: the checkpoint on disk beside the 16-bit consistency model. Where the
    VAE or memory is missing, a line says so: the run is trained, and goes on to its end."""
    try:
        validation.draw_reference()  # by all processes, before one of them may fail
        if process_index() == 0:
            student = checkpoint.load_checkpoint(out)[0].to(cfg.device)
            validation(number_format(student), student, "compare.png")
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"no pictures: {error}")


def train_student(cfg: Config, out: Path) -> None:
    """The W4A4 student of a consistency model."""
    if not checkpoint.has_start(out):
        initialise_student(cfg, out)
    elif process_index() == 0:
        print(f"{out}/start.safetensors is there: statistics, ranks and split are not made again")
    common.wait_for_all()
    packed, table = checkpoint.load_start(out)
    if cfg.steps and not any(layer.rank for _, layer in packed_layers(packed.net)):
        raise UserError(f"no layer got a branch, so there is nothing to train: raise --rank {cfg.rank}, or add --steps 0")
    packed.to(cfg.device, cfg.torch_dtype)
    set_backend(packed, cfg.backend)

    # 4. distillation
    network = pretrained.open_cm(cfg, cfg.torch_dtype).to(cfg.torch_dtype)  # its LoRA too
    roles = distil(cfg, out, packed, network)

    # 5. pack, reload, draw, measure
    leader, config = process_index() == 0, dataclasses.asdict(cfg)
    if leader:
        checkpoint.save_checkpoint(out, packed, table, cfg.deploy == "merged", cfg.lora_bits)
        shutil.rmtree(out / "unfinished", ignore_errors=True)  # what sample.py made of an earlier update
    if not cfg.embedded:
        evaluate.latent_report(out, network, config, roles.examples, leader)
        if roles.validation:
            closing_sheet(cfg, out, roles.validation)
    elif leader:
        sample.closing_pictures(out, network.to("cpu", FAST), config)
        evaluate.closing_report(out, network, config)
    if leader and not cfg.embedded:
        pipeline.write_card(out)
    if leader and cfg.export == "lora":
        pipeline.export_lora(out, out / "lora.safetensors")
    if leader and cfg.export == "diffusers":
        pipeline.export_diffusers(out, out / "pipeline")


def train_cm(cfg: Config, out: Path) -> None:
    """The same objective at 16 bits: the LoRA of the full-precision consistency model, MODEL-cm.safetensors."""
    network = pretrained.open_trainable_cm(cfg, cfg.torch_dtype)
    distil(cfg, out, network, network)
    path = out / f"{cfg.model}-cm.safetensors"
    if process_index() == 0 and cfg.embedded:
        save_weights(cfg, path, {k: p for k, p in network.net.named_parameters() if "lora_" in k}, network, cm=True)
    elif process_index() == 0:
        pretrained.save_cm(path, network)


def train_teacher(cfg: Config, out: Path) -> None:
    """An embedded teacher, MODEL.safetensors: the exponential average of its weights."""
    pictures = sources.source(cfg.data, FAMILIES[cfg.model].side)
    torch.manual_seed(cfg.seed)
    network = pretrained.load_teacher(cfg.model, cfg.teacher) if cfg.teacher else random_denoiser(cfg.model)
    params = dict(network.requires_grad_().to(cfg.device).named_parameters())
    averages = {k: p.detach().clone() for k, p in params.items()}
    fit(cfg, out, params, lambda gen, parts: teacher.diffusion_losses(cfg, network, pictures, gen, parts), averages)
    network.load_state_dict({k: average.half() for k, average in averages.items()})
    if process_index() == 0:
        save_weights(cfg, out / f"{cfg.model}.safetensors", network.state_dict(), network, cm=False)


def save_weights(cfg: Config, path: Path, tensors: dict[str, Tensor], network: Denoiser, cm: bool) -> None:
    """16-bit weights that other runs start from, as float16, with the command and the scores that go with them."""
    halves = {k: v.half() for k, v in tensors.items()}  # before the network that holds them is cast
    scores = evaluate.network_report(network.eval().to("cpu", FAST), dataclasses.asdict(cfg), cm)
    about = {"command": " ".join(["python train.py", *sys.argv[1:]]), "scores": scores}
    files.write_tensors(path, halves, about | {"seed": cfg.seed, "steps": cfg.steps, "batch": cfg.batch})
    print(f"weights: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Quantization alone, in Python

OF_QUANTIZE = OF_STUDENTS - {"outliers"} | {  # fields of Config that are options of `quantize`
    "seed", "resolution", "rank", "calibration", "gradient_captions", "hessian_mb", "micro", "checkpointing", "sampling_steps",
    "guidance", "lora_bits", "backend",
}  # fmt: skip


def quantize(pipe, prompts: list[str], **options):
    """Steps 1. - 3. on a diffusers pipeline in memory, which is changed in place and returned: its denoiser becomes the packed one
    that `--cm none --steps 0` makes of the same weights and captions, its scheduler that of a run's pipeline.

    pipe: of a family with public weights, in bfloat16 or float32, on one device. prompts: captions for the statistics. options:
    fields of Config by their names, of those in OF_QUANTIZE. UserError for what cannot be quantized, and for another option."""
    alone = "quantize() works in one process: call it where no RANK is set, and save the pipeline for the others"
    require(process_count() == 1, alone)
    given = read_options(options)
    network = pipeline.to_be_packed(pipe, given.get("resolution", 0))
    device, dtype = network.net.device, str(network.dtype).removeprefix("torch.")
    about = {"model": network.family.name, "cm": pretrained.WHOLE, "steps": 0, "device": device.type, "dtype": dtype}
    cfg = configured(about | given)
    validate(cfg)
    network.guidance = None if network.guidance is None else cfg.guidance
    examples = encoders.captions_of(pipe, network, prompts)
    cfg = plan.planned_in_memory(cfg, network)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # "cuda" is this one
        packed, table = initialised(cfg, network.eval().requires_grad_(False), examples)
    packed.net.disable_gradient_checkpointing()
    table = checkpoint.deploy(packed, table, cfg.lora_bits)
    set_backend(packed.to(device), cfg.backend)
    return pipeline.around(pipe, packed, table, dataclasses.asdict(cfg))


def read_options(options: dict) -> dict:
    """Options of `quantize` as their flags would be read. UserError for another name or value."""
    fields, found = {f.name: f for f in dataclasses.fields(Config) if f.name in OF_QUANTIZE}, {}
    for name, value in options.items():
        require(name in fields, f"quantize() has no option {name}: choose from {', '.join(sorted(fields))}")
        read, choices = fields[name].metadata.get("type", fields[name].type), fields[name].metadata["choices"]
        try:
            found[name] = {"True": True, "False": False}[str(value)] if read is bool else read(str(value))
        except (ValueError, KeyError):
            raise UserError(f"quantize(.., {name}={value!r}) cannot be read: {name} is a {fields[name].type.__name__}") from None
        wrong = f"quantize(.., {name}={value!r}) must be one of {', '.join(map(str, choices or ()))}"
        require(not choices or found[name] in choices, wrong)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command


def defaults(cfg: Config) -> dict:
    """What a run has in the fields that its config.json lacks, since they are younger than it; not what depends on the machine."""
    before = {f.name: f.metadata["before"] for f in dataclasses.fields(Config) if "before" in f.metadata}
    return {k: v for k, v in (dataclasses.asdict(Config(**presets(cfg))) | before).items() if k not in ("device", "dtype")}


def may_change(cfg: Config) -> set[str]:
    """Fields in which a run that has begun may go on with another value."""
    return MAY_CHANGE | (OF_STUDENTS if cfg.bits == 16 or cfg.stage == "teacher" else set())


def stored(cfg: Config) -> dict:
    """What config.json keeps of a configuration, with a fingerprint of the files that the run starts from. A folder may move."""
    weights = files.fingerprint(cfg.teacher, cfg.cm, cfg.components)
    return dataclasses.asdict(cfg) | {"out": "", "files of teacher and cm": weights}


def train_own_cm(argv: list[str], cfg: Config) -> Config:
    """--cm self: train the consistency model first, in a folder of its own -> the configuration that names its LoRA."""
    out = Path(cfg.out) / "cm"
    path = out / f"{cfg.model}-cm.safetensors"
    targets = ",".join("fp" for _ in cfg.targets.split(","))  # not that rollouts alone would ask for any
    flags = f"--bits 16 --rollout 1 --trajectory teacher --targets {targets} --no-offload --no-shard-teacher".split()
    if cfg.cache:
        flags += ["--cache", f"{Path(cfg.cache)}-cm"]
    argv = [*argv, *flags, "--cm", "", "--export", "", "--out", str(out)]
    if path.exists():
        of_cm = parse(argv)
        files.refuse_another(out, stored(of_cm), may_change(of_cm), defaults(of_cm))
    else:
        main(argv)
    return dataclasses.replace(cfg, cm=str(path), cm_scale=1.0)


@stoppable
def main(argv: list[str]) -> None:
    cfg = parse(argv)
    validate(cfg)
    print("\n".join(f"{k:14} {v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.dry_run:
        return None if cfg.embedded else plan.dry_run(cfg)
    common.join_processes(cfg.device)
    began, out = time.time(), Path(cfg.out)
    if cfg.cm == "self":
        cfg = train_own_cm(argv, cfg)
    files.open_run(out, stored(cfg), leader=process_index() == 0, may_change=may_change(cfg), defaults=defaults(cfg))
    if not cfg.embedded:
        cfg = plan.planned(cfg)
    train = train_teacher if cfg.stage == "teacher" else train_cm if cfg.bits == 16 else train_student
    train(cfg, out)
    common.wait_for_all()  # a process that leaves early would break the others' last exchange
    print(f"{time.time() - began:.0f} seconds, peak memory {common.peak_memory(cfg.device) / 1e9:.2f} GB")


if __name__ == "__main__":
    run_script("train.py", main)
