"""CMQuant: distil a teacher into a few-step consistency model while quantizing it to 4-bit weights and activations.

    python train.py                                        tiny, W4A4, runs/tiny: statistics, ranks, LoRA, distillation, checkpoint
    python train.py --recipe paper                         the paper's TDPT alone
    python train.py --init zero --ranks uniform --rounding rtn --rollout 0 --targets self,self --lr 2e-4     a baseline, QLoRA style
    python train.py --bits 16                              the full-precision consistency model, a LoRA on the teacher
    python train.py --stage teacher                        the teacher, from nothing
    python train.py --model sdxl --cm LORA                 the same for SDXL or FLUX, from public weights (pretrained.py)
    python train.py --model flux --weights random --dry-run         every choice, table of layers, planned memory; needs no weights

Rerunning a command resumes it: everything random in step k is a function of (seed, k), so a killed run ends with the same numbers.
`torchrun --nproc-per-node 2 train.py ..` splits batch and calibration; statistics and LoRA gradients travel.
A run folder holds what checkpoint.py lists; model.safetensors is the deployed checkpoint, samples/ has its pictures.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
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
from data.cache import Trajectories
from layers import as_anchor, set_backend
from models import checkpoint, encoders, pipeline, plan, pretrained, teacher
from models.denoiser import FAST, Denoiser, as_cm, as_teacher, fuse
from models.family import FAMILIES
from run import files
from run.common import UserError, join_processes, peak_memory, process_count, process_index, run_script, step_generator
from run.state import TrainingState, stoppable


@dataclass(frozen=True)
class Config:
    """Every choice of a run. "Paper" figures are those of published few-step recipes where CMQuant's own are unknown."""

    model: str = "tiny"  # tiny (SDXL's UNet class), tiny-flux (FLUX's transformer class), sdxl, flux
    stage: str = "student"  # student: distil; teacher: train the teacher from nothing
    bits: int = 4  # 4: W4A4 student; 16: the full-precision consistency model
    recipe: str = "cmquant"  # cmquant: TDPT mixed with rollouts; paper: TDPT alone, (anchor, fp) targets
    out: str = ""  # run folder; default runs/MODEL, runs/MODEL-cm or runs/MODEL-teacher
    data: str = ""  # captioned pictures: see data.py; default: procedural scenes (tiny), our own list of prompts (sdxl, flux)
    cache: str = ""  # folder of the latents and text embeddings of sdxl and flux; default OUT/cache
    teacher: str = ""  # weights, or where --stage teacher starts; default assets/MODEL.safetensors; sdxl, flux: see pretrained.py
    components: str = ""  # if the teacher is one file: hub id or folder of its configs and tokenizers
    weights: str = ""  # random: the full-size network with random weights, to rehearse
    cm: str = ""  # consistency LoRA; tiny: default assets/MODEL-cm.safetensors; sdxl, flux: one that diffusers reads, self: make it
    cm_scale: float = 1.0  # strength of --cm (sdxl, flux), as fuse_lora(lora_scale=..) in the LoRA's own example
    resolution: int = 0  # pixels of sdxl and flux; 0: the base's own (1024)
    seed: int = 0  # of everything random
    steps: int = 40  # updates; 0 packs and measures the initialisation; on tiny more than 40 change little (README)
    batch: int = 32  # pictures in an update, over all ranks
    micro: int = 0  # pictures at a time on a rank; 0: all of its share
    checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    memory_limit: str = ""  # such as 24GB: choose micro, checkpointing and where the teacher is so that a GPU of that size will do
    offload: bool = False  # the teacher waits in main memory, its blocks come to the GPU as they are needed
    shard_teacher: bool = False  # torchrun: every rank keeps a part of the teacher (FSDP2)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda where there is a GPU
    optimizer: str = "adamw"  # adamw; muon: for the matrices inside blocks, what is left by AdamW
    lr: float = 2e-5  # on A, B (LCM-LoRA: 1e-4); cosine to zero
    warmup: int = 10  # updates
    clip: float = 1.0  # gradient norm
    dtype: str = str(FAST).removeprefix("torch.")  # what networks compute in; default: bfloat16 if the CPU has units for it
    # number format
    group_w: int = 64  # weights that share a multiplier
    group_x: int = 16  # activations that share a multiplier
    smooth: float = 0.0  # SmoothQuant exponent a; 0: off
    rounding: str = "gptq"  # gptq or rtn
    # start
    init: str = "hgs"  # zero, pissa, principal, loftq, svdquant, qera, hgs
    hessian: str = "kron"  # of hgs and ranks; kron: inputs, gradients at outputs, rounding noise; input: inputs alone (QERA, CLoQ)
    iters: int = 8  # alternations of hgs and loftq
    ranks: str = "qra"  # uniform, variation, spectrum, qra, shuffled
    rank: int = 16  # average LoRA rank at equal parameters
    rank_granule: int = 0  # ranks are rank_least + a multiple of this; 0: max(1, rank / 4)
    rank_least: int = -1  # least rank of a layer, 0: it may have no branch; -1: rank / 4
    rank_most: int = 0  # largest rank of a layer; 0: max(64, 4 rank)
    calibration: int = 64  # captions for Hessians and variation
    gradient_captions: int = 0  # of these, for G, whose passes take four times as long; 0: all
    hessian_mb: int = 4096  # bound of what statistics and factors hold at a time; 0 (sdxl, flux): what memory there is
    # objective
    rollout: float = 0.75  # share of updates that are on-policy rollouts, the others are TDPT
    trajectory: str = "fp"  # rollouts follow the fp consistency model or the cached guided teacher
    on_policy: bool = True  # rollouts start each phase from the student's own state, not from the reference's
    cached: int = 2048  # teacher trajectories in the cache (trajectory = teacher)
    phases: str = "1,2,4"  # numbers of jumps of a rollout; one that stands twice counts twice, in the calibration too
    jitter: float = 0.0  # share of rollouts whose inner edges are random grid points
    edges: int = 4  # K, phases of TDPT
    grid: int = 48  # N, solver points (LCM: 50)
    split: float = 0.5  # T' as a share of the grid: at and above it targets[0]
    targets: str = "anchor,fp"  # early,late: each of anchor, fp, self, teacher
    guidance: float = 1.5  # w of the teacher: u + w (c - u)
    huber: float = 1e-3  # c
    # deployment
    deploy: str = "branch"  # branch: LoRA beside the packed weight; merged: Q(Q + BA), strict W4A4
    lora_bits: int = 16  # of A and B in the checkpoint; 8 for sdxl and flux, where LoRA is a small share of a layer
    eval_n: int = 256  # pictures of the closing quality line
    save_every: int = 20  # updates between two resumable states
    backend: str = "native"  # native: kernels.cpp, kernels_triton.py or eager; compile: torch.compile; eager
    export: str = ""  # lora: also write the LoRA alone in diffusers' format, for the 16-bit base
    dry_run: bool = False  # print the configuration (sdxl, flux: and the table of layers, memory) and stop

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


RECIPES = {"cmquant": {}, "paper": {"rollout": 0.0}}  # change this to try yours
STAGES = {
    "teacher": {"steps": 5000, "batch": 64, "lr": 1e-3, "warmup": 200, "save_every": 200, "eval_n": 1024},
    "cm": {"steps": 1800, "rank": 48, "lr": 1e-3, "rollout": 1.0, "trajectory": "teacher", "phases": "1,2,2,4,4,4",
           "jitter": 0.1, "cached": 4096, "eval_n": 1024},
}  # fmt: skip
REAL = {
    "steps": 500, "batch": 16, "micro": 1, "checkpointing": True, "lr": 1e-5, "lora_bits": 8, "eval_n": 16, "dtype": "bfloat16",
    "data": "prompts", "calibration": 32, "hessian_mb": 0, "cached": 512,
}  # fmt: skip
REAL_CM = {"lr": 1e-4, "steps": 1000}  # --bits 16; LCM-LoRA's figures
CHOICES = {
    "model": tuple(FAMILIES), "stage": ("student", "teacher"), "hessian": ("kron", "input"), "recipe": tuple(RECIPES),
    "rounding": tuple(quant.ROUNDINGS), "init": tuple(hgs_lora.METHODS), "ranks": tuple(qra.METHODS), "bits": (4, 16),
    "trajectory": ("fp", "teacher"), "deploy": ("branch", "merged"), "group_w": quant.GROUPS, "group_x": quant.GROUPS,
    "dtype": ("bfloat16", "float32"), "optimizer": ("adamw", "muon"), "backend": tuple(kernels.BACKENDS),
    "weights": ("", "random"), "export": ("", "lora"), "lora_bits": (8, 16),
}  # fmt: skip


def parse(argv: list[str]) -> Config:
    """Defaults < stage < model < recipe < command line. Unknown flags and abbreviations are refused with exit code 2."""
    parser = argparse.ArgumentParser(
        "train.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        flag, about = "--" + f.name.replace("_", "-"), {"help": f"{comments[f.name]} [{f.default}]", "default": argparse.SUPPRESS}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "choices": CHOICES.get(f.name)}
        parser.add_argument(flag, **about, **kind)
    given = vars(parser.parse_args(argv))
    stage = "teacher" if given.get("stage") == "teacher" else "cm" if given.get("bits") == 16 else "student"
    folder = {"out": f"runs/{given.get('model', 'tiny')}" + {"teacher": "-teacher", "cm": "-cm", "student": ""}[stage]}
    scale = (
        {}
        if FAMILIES[given.get("model", "tiny")].embedded
        else REAL | FAMILIES[given["model"]].preset | (REAL_CM if stage == "cm" else {})
    )
    return Config(**(folder | STAGES.get(stage, {}) | scale | RECIPES[given.get("recipe", "cmquant")] | given))


def check(cfg: Config) -> None:
    """UserError for a configuration that cannot run, before anything costly."""
    for name in ("batch", "rank", "calibration", "edges", "grid", "eval_n", "save_every", "cached"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(cfg, name)}")
    real, shard, phases = not FAMILIES[cfg.model].embedded, cfg.shard_teacher, cfg.phases.split(",")
    known = {"fp", "self", "teacher", "anchor" if cfg.bits == 4 or cfg.rollout == 1 else "fp"}
    points = cfg.grid // 2 if cfg.trajectory == "teacher" else cfg.grid  # cached trajectories keep every second point
    for wrong, message in (
        (cfg.device not in ("cpu", "cuda"), f"--device {cfg.device} is neither cpu nor cuda: CUDA_VISIBLE_DEVICES chooses the GPU"),
        (cfg.device == "cuda" and not (torch.cuda.is_available() or cfg.dry_run), "torch finds no CUDA device: give --device cpu"),
        (cfg.batch % process_count(), f"--batch {cfg.batch} does not divide among {process_count()} ranks"),
        (cfg.calibration < process_count(), f"--calibration {cfg.calibration} leaves some of {process_count()} ranks without a caption: give more"),
        (not all(0 <= x <= 1 for x in (cfg.rollout, cfg.jitter, cfg.split)), "--rollout, --jitter and --split must be from 0 to 1"),
        (not cfg.lr >= 0 or min(cfg.seed, cfg.steps, cfg.iters, cfg.micro, cfg.gradient_captions) < 0,
         "--lr, --seed, --steps, --iters, --micro and --gradient-captions must be at least 0"),
        (cfg.grid > 1000 and FAMILIES[cfg.model].path({}, FAMILIES[cfg.model].latent).start == 1000, f"--grid {cfg.grid} is more than a noise schedule's 1000: choose fewer"),
        (cfg.edges > cfg.grid, f"--edges {cfg.edges} is more than the {cfg.grid} points of --grid: choose fewer"),
        (not all(k.isdigit() and 1 <= int(k) <= points for k in phases),
         f"--phases {cfg.phases} must be numbers from 1 to {points}, such as 1,2,4 (or raise --grid)"),
        (set(cfg.targets.split(",")) - known or cfg.targets.count(",") != 1,
         f"--targets {cfg.targets} must be EARLY,LATE, each of anchor (4 bits only), fp, self, teacher"),
        (cfg.stage == "teacher" and real, "--stage teacher trains tiny and tiny-flux: sdxl and flux have public teachers"),
        (not real and cfg.eval_n < 2, "--eval-n must be at least 2: a Frechet distance needs a covariance"),
        (not real and any((cfg.weights, cfg.resolution, cfg.components, cfg.cache, cfg.memory_limit, cfg.cm_scale != 1)),
         "--weights, --resolution, --components, --cache, --memory-limit and --cm-scale are for sdxl and flux: leave them out"),
        (cfg.cm == "self" and not cfg.steps,
         "--cm self trains for --steps updates too: train it with --bits 16, then give its .safetensors by --cm"),
        (cfg.export and (not real or cfg.deploy == "merged"), "--export lora needs sdxl or flux and --deploy branch"),
        (cfg.bits == 16 and (shard or cfg.offload), "--offload and --shard-teacher are for 4-bit students: leave them out"),
        (shard and cfg.trajectory == "teacher",
         "--shard-teacher and --trajectory teacher do not go together: draw the trajectories with --offload"),
        (shard and not (cfg.dry_run or dist.is_initialized() or "RANK" in os.environ),
         "--shard-teacher shares the teacher among processes: start them with `torchrun --nproc-per-node 8 train.py ..`"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Stage "student", 16 or 4 bits


def rollout_start(cfg: Config, gen: torch.Generator, network: Denoiser, examples, cache):
    """This rank's share of a rollout: cond, the edges of its K jumps, and x_T, or the cached states at the edges."""
    mine, phases = slice(process_index(), None, process_count()), cfg.phases.split(",")
    K = int(phases[torch.randint(len(phases), (1,), generator=gen)])
    times = network.path.grid(cfg.grid) if cache is None else cache.times
    inner = 1 + torch.randperm(len(times) - 2, generator=gen)[: K - 1].sort().values
    random_edges = times[torch.tensor([0, *inner.tolist(), len(times) - 1])]
    edges = random_edges if torch.rand(1, generator=gen) < cfg.jitter else tdpt.phase_edges(times, K)
    if cache is not None:
        pick = torch.randint(len(cache.states[0]), (cfg.batch,), generator=gen)[mine]
        return {k: v[pick] for k, v in cache.cond.items()}, edges, None, tdpt.states_at(cache.states[:, pick].float(), times, edges)
    cond = examples.conditions(cfg.batch, gen, mine)
    return cond, edges, torch.randn(cfg.batch, *network.latent, generator=gen)[mine], None


def distil(cfg: Config, out: Path, learner, params: dict[str, torch.Tensor], network: Denoiser, examples, anchor=None):
    """4. TDPT mixed with on-policy rollouts, on `params`. `network` is the teacher and the fp consistency model, by switch."""
    path, mine, cache = network.path, slice(process_index(), None, process_count()), None
    null = examples.null() if network.family.classifier_free else {}  # FLUX has its guidance as an input, [schnell] none
    null.pop("time_ids", None)  # sizes and crops are the picture's own without a caption too
    guide = tdpt.guided(as_teacher(network), cfg.guidance if null else 1.0, to(null, cfg.device))
    fp, grid, targets = as_cm(network), path.grid(cfg.grid, cfg.device), cfg.targets.split(",")
    edges = tdpt.phase_edges(grid, cfg.edges)
    if cfg.rollout and cfg.trajectory == "teacher":
        times, folder = path.grid(cfg.grid // 2), out / "trajectories"
        cache = Trajectories(folder, guide, network, examples, cfg.cached, times, cfg.seed, cfg.micro, cfg.device)
    state = TrainingState(out, params, cfg)
    start, _ = state.load()
    parts = torch.arange(cfg.batch // process_count()).split(cfg.micro or cfg.batch)
    with open(out / "metrics.jsonl", "a") as log:
        for step in (
            bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="distil", disable=process_index() > 0)
        ):
            gen, loss = step_generator(cfg.seed, step), 0.0
            if torch.rand(1, generator=gen) < cfg.rollout:
                # on-policy rollout: K jumps of the student, each from its own last state to where the reference arrives
                cond, jumps, x_T, states = rollout_start(cfg, gen, network, examples, cache)
                for rows in state.unless_stopped(parts):
                    cond_r, jumps_r, share = (
                        to(cond, cfg.device, rows),
                        jumps.to(cfg.device),
                        len(rows) * process_count() / cfg.batch,
                    )
                    if x_T is None:
                        reference = states[:, rows].to(cfg.device)
                    else:
                        reference = tdpt.rollout_states(fp, path, x_T[rows].to(cfg.device), cond_r, jumps_r)
                    for loss_k in tdpt.rollout_phases(learner, path, reference, cond_r, jumps_r, cfg.on_policy, cfg.huber):
                        (loss_k * share / (len(jumps) - 1)).backward()
                        loss += loss_k.item() * share / (len(jumps) - 1)
            else:
                # TDPT: x_t on the path, x_u by one solver step, the stage's target jumps on to the end of the phase
                x0, cond = examples.latents(cfg.batch, gen, mine)
                noise = torch.randn(cfg.batch, *x0.shape[1:], generator=gen)[mine]
                idx = torch.randint(cfg.grid, (cfg.batch,), generator=gen)[mine]
                for rows in state.unless_stopped(parts):
                    batch = (to(cond, cfg.device, rows) if v is cond else v[rows].to(cfg.device) for v in (x0, cond, noise, idx))
                    phases, share = (
                        (grid, edges, cfg.split, targets, cfg.huber, cfg.shard_teacher),
                        len(rows) * process_count() / cfg.batch,
                    )
                    loss_r, _ = tdpt.tdpt_loss(learner, anchor, fp, guide, path, *batch, *phases)
                    (loss_r * share).backward()
                    loss += loss_r.item() * share
            state.update(step, loss, log)
            bar.set_postfix_str(f"loss {loss:.4f}")
            if state.due(done := step + (not state.given_up)):
                state.save(done)


def to(cond: dict[str, torch.Tensor], device: str, rows=slice(None)) -> dict[str, torch.Tensor]:
    return {k: v[rows].to(device) for k, v in cond.items()}


def train_student(cfg: Config, out: Path) -> None:
    if not checkpoint.has_start(out):  # 1. - 3. statistics, ranks, split: student.py
        network = pretrained.open_cm(cfg, torch.float32 if FAMILIES[cfg.model].embedded else cfg.torch_dtype)
        examples = encoders.examples_of(cfg, out, network)  # text encoders and VAE go before the network is on the device
        network, mine = network.to(cfg.device), slice(process_index(), None, process_count())
        gen = step_generator(cfg.seed, 0, stream=1)
        cond = to(examples.conditions(cfg.calibration, gen, mine), cfg.device)
        x_T = torch.randn(cfg.calibration, *network.latent, generator=gen)[mine].to(cfg.device)
        if cfg.checkpointing:
            network.net.enable_gradient_checkpointing()
        built = student.build(cfg, fuse(network), cond, x_T)
        if process_index() == 0:
            checkpoint.save_start(out, *built)
        del network, built
    if process_count() > 1:
        dist.barrier()
    packed, table = checkpoint.load_start(out)
    packed.to(cfg.device, cfg.torch_dtype)
    set_backend(packed, cfg.backend)
    params = {k: p.requires_grad_() for k, p in packed.named_parameters() if "lora_" in k}
    if cfg.checkpointing:
        packed.net.train().enable_gradient_checkpointing()
    network = pretrained.open_cm(cfg, cfg.torch_dtype).to(cfg.torch_dtype)  # its LoRA too
    examples = encoders.examples_of(cfg, out, network)
    pretrained.place(network, cfg.device, cfg.offload, cfg.shard_teacher)
    distil(cfg, out, packed, params, network, examples, as_anchor(packed))
    if process_index() == 0:  # 5. pack, reload, draw, measure
        checkpoint.save_checkpoint(out, packed, table, cfg.deploy == "merged", cfg.lora_bits)
    if not FAMILIES[cfg.model].embedded:
        evaluate.latent_report(out, network, dataclasses.asdict(cfg), examples, leader=process_index() == 0)
        if process_index() == 0:
            pipeline.finish(out, cfg.export)
    elif process_index() == 0:
        network, config = network.to("cpu", FAST), dataclasses.asdict(cfg)
        sample.closing_pictures(out, network, config)
        evaluate.closing_report(out, network, config)


def ship(cfg, path: Path, tensors: dict[str, torch.Tensor], network: Denoiser, cm: bool) -> None:
    """16-bit weights that other runs start from, as float16, with the command and the scores that go with them."""
    halves = {k: v.half() for k, v in tensors.items()}  # before the network that holds them is cast
    scores = evaluate.network_report(network.eval().to("cpu", FAST), dataclasses.asdict(cfg), cm)
    command, what = " ".join(["python train.py", *sys.argv[1:]]), {"seed": cfg.seed, "steps": cfg.steps, "batch": cfg.batch}
    files.write_tensors(path, halves, {"command": command, "scores": scores} | what)
    print(f"weights: {path}")


def train_cm(cfg: Config, out: Path) -> None:
    """The same objective at 16 bits: the LoRA of the full-precision consistency model, MODEL-cm.safetensors."""
    network = pretrained.open_trainable_cm(cfg, cfg.torch_dtype)
    examples = encoders.examples_of(cfg, out, network)
    params = {k: p.requires_grad_() for k, p in network.to(cfg.device).named_parameters() if "lora_" in k}
    if cfg.checkpointing:
        network.net.train().enable_gradient_checkpointing()
    distil(cfg, out, as_cm(network), params, network, examples)
    path = out / f"{cfg.model}-cm.safetensors"
    if process_index() == 0 and FAMILIES[cfg.model].embedded:
        ship(cfg, path, {k.removeprefix("net."): p for k, p in params.items()}, network, cm=True)
    elif process_index() == 0:
        pretrained.save_cm(path, network)


@stoppable
def main(argv: list[str]) -> None:
    cfg = parse(argv)
    check(cfg)
    print("\n".join(f"{k:12} {v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.dry_run:
        return plan.dry_run(cfg) if not FAMILIES[cfg.model].embedded else None
    join_processes(cfg.device)
    began, out = time.time(), Path(cfg.out)
    if cfg.cm == "self":  # the consistency model first, in a folder of its own
        path = out / "cm" / f"{cfg.model}-cm.safetensors"
        first = "--bits 16 --rollout 1 --trajectory teacher --targets fp,fp --no-offload --no-shard-teacher".split()
        cached = ["--cache", f"{Path(cfg.cache)}-cm"] if cfg.cache else []
        first = [*argv, *first, "--cm", "", "--export", "", "--out", str(out / "cm"), *cached]
        if path.exists():
            weights = files.fingerprint(cfg.teacher, cfg.components)
            files.refuse_another(out / "cm", dataclasses.asdict(parse(first)) | {"out": "", "files of teacher and cm": weights})
        else:
            main(first)
        cfg = dataclasses.replace(cfg, cm=str(path), cm_scale=1.0)
    weights = files.fingerprint(cfg.teacher, cfg.cm, cfg.components)
    files.open_run(out, dataclasses.asdict(cfg) | {"out": "", "files of teacher and cm": weights}, leader=process_index() == 0)
    cfg = cfg if FAMILIES[cfg.model].embedded else plan.planned(cfg)
    if cfg.stage == "teacher":
        network = teacher.train(cfg, out, sources.source(cfg.data))
        if process_index() == 0:
            ship(cfg, out / f"{cfg.model}.safetensors", network.state_dict(), network, cm=False)
    else:
        (train_cm if cfg.bits == 16 else train_student)(cfg, out)
    if process_count() > 1:
        dist.barrier()  # a rank that leaves early would break the others' last exchange
    print(f"{time.time() - began:.0f} seconds, peak memory {peak_memory(cfg.device) / 1e9:.2f} GB")


if __name__ == "__main__":
    run_script("train.py", main)
