"""CMQuant: distil a teacher into a few-step consistency model while quantizing it to 4-bit weights and activations.

    python train.py                                        tiny, W4A4, runs/tiny: statistics, ranks, LoRA, distillation, checkpoint
    python train.py --recipe paper                         the paper's TDPT alone
    python train.py --init zero --targets self,self --rollout 0     QLoRA-style start, self-consistency: the baseline
    python train.py --bits 16                              the full-precision consistency model, a LoRA on the teacher
    python train.py --stage teacher                        the teacher, from nothing
    python train.py --dry-run                              print the configuration and stop

Rerunning a command resumes it: everything random in step k is a function of (seed, k), so a killed run ends with the same numbers.
`torchrun --nproc-per-node 2 train.py ..` splits the global batch; only LoRA gradients travel.

A run folder holds what checkpoint.py lists; model.safetensors is the deployed checkpoint, samples/ has its pictures.
"""

import argparse
import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import data
import evaluate
import hessian
import hgs_lora
import kernels
import models
import qra
import quant
import tdpt
from checkpoint import rank, world
from models import UserError


@dataclass(frozen=True)
class Config:
    """Every choice of a run. "Paper" figures are those of published few-step recipes where CMQuant's own are unknown."""

    model: str = "tiny"  # tiny (SDXL's UNet class) or tiny-flux (FLUX's transformer class)
    stage: str = "student"  # student: distil; teacher: train the teacher from nothing
    bits: int = 4  # 4: W4A4 student; 16: the full-precision consistency model
    recipe: str = "cmquant"  # cmquant: TDPT mixed with rollouts; paper: TDPT alone, (anchor, fp) targets
    out: str = ""  # run folder; default runs/MODEL, runs/MODEL-cm or runs/MODEL-teacher
    data: str = ""  # folder of captioned pictures; default: procedural scenes
    teacher: str = ""  # teacher weights; default assets/MODEL.safetensors; for --stage teacher: where to start from
    cm: str = ""  # consistency LoRA of the teacher; default assets/MODEL-cm.safetensors; with --bits 16: where to start from
    seed: int = 0
    steps: int = 40  # updates; 0 packs and measures the initialisation; on tiny more than 40 change little (README)
    batch: int = 32  # pictures in an update, over all ranks
    optimizer: str = "adamw"  # adamw; muon: for the matrices inside blocks, what is left by AdamW
    lr: float = 2e-5  # on A, B (LCM-LoRA: 1e-4); cosine to zero
    warmup: int = 10  # updates
    clip: float = 1.0  # gradient norm
    dtype: str = str(models.FAST).removeprefix("torch.")  # what networks compute in; default: bfloat16 if the CPU has units for it
    # number format
    group_w: int = 64  # weights that share a multiplier
    group_x: int = 16  # activations that share a multiplier
    smooth: float = 0.0  # SmoothQuant exponent a; 0: off
    rounding: str = "gptq"  # gptq or rtn
    # start
    init: str = "hgs"  # zero, pissa, principal, loftq, svdquant, qera, hgs
    hessian: str = "kron"  # of hgs and the ranks; kron: inputs and gradients at the outputs, input: inputs alone (QERA, CLoQ)
    iters: int = 8  # alternations of hgs and loftq
    ranks: str = "qra"  # uniform, variation, spectrum, qra, shuffled
    rank: int = 16  # average rank at equal parameters
    calibration: int = 64  # captions for Hessians and variation
    hessian_mb: int = 2048  # budget of the float64 sums of one calibration pass
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
    eval_n: int = 256  # pictures of the closing quality line
    save_every: int = 20  # updates between two resumable states
    backend: str = "native"  # of the kernels; native: kernels.cpp, or eager where it cannot be built; compile: torch.compile
    dry_run: bool = False  # print the configuration and stop


RECIPES = {"cmquant": {}, "paper": {"rollout": 0.0}}  # change this to try yours
STAGES = {
    "teacher": {"steps": 5000, "batch": 64, "lr": 1e-3, "warmup": 200, "save_every": 200, "eval_n": 1024},
    "cm": {"steps": 1800, "rank": 48, "lr": 1e-3, "rollout": 1.0, "trajectory": "teacher", "phases": "1,2,2,4,4,4",
           "jitter": 0.1, "cached": 4096, "eval_n": 1024},
}  # fmt: skip
CHOICES = {
    "model": models.MODELS, "stage": ("student", "teacher"), "hessian": ("kron", "input"), "recipe": tuple(RECIPES),
    "rounding": tuple(quant.ROUNDINGS), "init": tuple(hgs_lora.METHODS), "ranks": ("uniform", *qra.METHODS), "bits": (4, 16),
    "trajectory": ("fp", "teacher"), "deploy": ("branch", "merged"), "group_w": quant.GROUPS, "group_x": quant.GROUPS,
    "dtype": ("bfloat16", "float32"), "optimizer": ("adamw", "muon"), "backend": tuple(kernels.BACKENDS),
}  # fmt: skip


def parse(argv: list[str]) -> Config:
    """Defaults < stage < recipe < command line. Unknown flags and abbreviations are refused with exit code 2."""
    parser = argparse.ArgumentParser(
        "train.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=f.type, choices=CHOICES.get(f.name), default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    stage = "teacher" if given.get("stage") == "teacher" else "cm" if given.get("bits") == 16 else "student"
    folder = {"out": f"runs/{given.get('model', 'tiny')}" + {"teacher": "-teacher", "cm": "-cm", "student": ""}[stage]}
    return Config(**(folder | STAGES.get(stage, {}) | RECIPES[given.get("recipe", "cmquant")] | given))


def check(cfg: Config) -> None:
    """UserError for a configuration that cannot run, before anything costly."""
    for name in ("batch", "rank", "calibration", "edges", "grid", "eval_n", "save_every", "cached"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(cfg, name)}")
    if cfg.batch % world():
        raise UserError(f"--batch {cfg.batch} does not divide among {world()} ranks")
    unknown = set(cfg.targets.split(",")) - {"fp", "self", "teacher", "anchor" if cfg.bits == 4 or cfg.rollout == 1 else "fp"}
    if unknown or cfg.targets.count(",") != 1:
        raise UserError(f"--targets {cfg.targets} must be EARLY,LATE, each of anchor (4 bits only), fp, self, teacher")
    points = cfg.grid // 2 if cfg.trajectory == "teacher" else cfg.grid  # cached trajectories keep every second point
    if not all(k.isdigit() and 1 <= int(k) <= points for k in cfg.phases.split(",")):
        raise UserError(f"--phases {cfg.phases} must be numbers from 1 to {points}, such as 1,2,4 (or raise --grid)")
    if cfg.edges > cfg.grid:
        raise UserError(f"--edges {cfg.edges} is more than the {cfg.grid} points of --grid: choose fewer")


# ---------------------------------------------------------------------------------------------------------------------
# Stage "teacher"


def train_teacher(cfg: Config, out: Path, pictures) -> None:
    """Plain diffusion training: squared error at stratified times, 10% of captions dropped, EMA 0.999 -> MODEL.safetensors."""
    torch.manual_seed(cfg.seed)
    model = models.load_teacher(cfg.model, cfg.teacher).requires_grad_() if cfg.teacher else models.build(cfg.model)
    params = dict(model.named_parameters())
    state = checkpoint.State(out, params, cfg)
    start, saved = state.load()
    ema = {k: saved[f"ema.{k}"] if saved else p.detach().clone() for k, p in params.items()}
    times, mine = model.path.grid(1000), slice(rank(), None, world())
    with open(out / "metrics.jsonl", "a") as log:
        for step in (bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="teacher")):
            gen = data.step_generator(cfg.seed, step)
            x, captions = pictures.batch(cfg.batch, gen)
            drop = torch.rand(cfg.batch, generator=gen) < 0.1
            cond = model.encode([data.UNCONDITIONAL if d else c for d, c in zip(drop, captions, strict=True)][mine])
            strata = (torch.arange(cfg.batch) + torch.rand(cfg.batch, generator=gen)) / cfg.batch  # one t in every B-th of [0, 1)
            x0, t = models.to_latents(x)[mine], times[(1000 * strata).long()][mine]
            eps = torch.randn(cfg.batch, *model.latent, generator=gen)[mine]
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                pred = model(model.path.add_noise(x0, eps, t), t, t, cond)
            loss = (pred.float() - model.path.prediction_of(x0, eps, t)).square().mean()
            loss.backward()
            state.update(step, loss.item(), log)
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
            bar.set_postfix_str(f"loss {loss.item():.4f}")
            if state.due(step + 1):
                state.save(step + 1, {f"ema.{k}": v for k, v in ema.items()})
    if rank() == 0:
        model.load_state_dict({k: v.half() for k, v in ema.items()})
        ship(cfg, out / f"{cfg.model}.safetensors", model.state_dict(), model, cm=False)


def ship(cfg: Config, path: Path, tensors: dict[str, torch.Tensor], network: models.Denoiser, cm: bool) -> None:
    """16-bit weights that other runs start from, as float16, with the command and the scores that go with them."""
    halves = {k: v.half() for k, v in tensors.items()}  # before the network that holds them is cast
    scores = evaluate.network_report(network.eval().to(models.FAST), dataclasses.asdict(cfg), cm)
    command, what = " ".join(["python train.py", *sys.argv[1:]]), {"seed": cfg.seed, "steps": cfg.steps, "batch": cfg.batch}
    checkpoint.write(path, halves, {"command": command, "scores": scores} | what)
    print(f"weights: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Stage "student", 16 or 4 bits


@torch.no_grad()
def quantized_student(cfg: Config, base: models.Denoiser, pictures) -> tuple[models.Denoiser, dict[str, dict]]:
    """The fused consistency model (float32) -> its W4A4 twin with HGS-LoRA, in place, and the table of layers."""
    kinds = {name: models.precision(name) for name in models.float_layers(base.net)}
    layers = {name: layer for name, layer in models.float_layers(base.net).items() if kinds[name] != "16bit"}
    for name, layer in layers.items():
        if cfg.rank > min(layer.weight.flatten(1).shape):
            raise UserError(f"--rank {cfg.rank} is larger than layer {name} {tuple(layer.weight.shape)}: choose a smaller one")
    # 1. statistics: H = E[x x^T] and absmax of what each layer reads, G = E[g g^T] of the gradients that reach its output
    gen = data.step_generator(cfg.seed, 0, stream=1)
    cond, x_T = base.encode(pictures.captions(cfg.calibration, gen)), torch.randn(cfg.calibration, *base.latent, generator=gen)
    forward, backward = tdpt.calibration(base, base.path, x_T, cond, [int(K) for K in cfg.phases.split(",")])
    stats, G = hessian.collect(base.net, list(layers), forward, cfg.hessian_mb << 20, group_x=cfg.group_x), {}
    if cfg.hessian == "kron" and (cfg.init == "hgs" or cfg.ranks != "uniform"):
        G = hessian.collect_outputs(base.net, list(layers), backward, cfg.hessian_mb << 20)
    weights, whiteners, smoothings, cache = {}, {}, {}, {}
    for name, layer in layers.items():
        w_OK, lam = quant.flatten_conv(layer.weight[..., None, None] if layer.weight.dim() == 2 else layer.weight), None
        taps = layer.weight[0, 0].numel()
        key, H_KK = stats[name], stats[name].H_KK
        if cfg.smooth and kinds[name] == "w4a4":
            lam = quant.smoothing_factors(stats[name].xmax_I, w_OK.abs().unflatten(1, (taps, -1)).amax((0, 1)), cfg.smooth)
            w_OK, key, H_KK = w_OK * lam.repeat(taps), name, hessian.smooth(H_KK, lam)
        cache[key] = white = cache.get(key) or hgs_lora.Whitener(H_KK)  # q, k, v share theirs
        noise_K = (stats[name].noise_I / (1 if lam is None else lam**2)).repeat(taps) if kinds[name] == "w4a4" else None
        whiteners[name] = white.of_layer(G[name], noise_K) if G else white
        weights[name], smoothings[name] = w_OK, lam
    # 2. QRA: ranks from the whitened spectrum of what the grid costs and the variation of activations and weights
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    spectra, energy, v_x, v_w = {}, {}, {}, {}
    for name, w_OK in weights.items() if cfg.ranks != "uniform" else ():
        white, gw = whiteners[name], quant.quantize_weight(w_OK, cfg.group_w, layers[name].weight[0, 0].numel())
        if G:  # all layers in the picture's units
            spectra[name] = hgs_lora.whitened_spectrum(w_OK, hgs_lora.grid_cost(w_OK, white, gw).sqrt().diag(), white.R_OO)
            energy[name] = 1.0
        else:
            spectra[name] = hgs_lora.whitened_spectrum(w_OK - quant.dequantize(gw), white.L_KK)
            energy[name] = float((w_OK.double() @ white.L_KK).square().sum())
        v_x[name], v_w[name] = hessian.variation(stats[name], layers[name].weight)
    args = (shapes, spectra, energy, v_x, v_w, cfg.ranks, cfg.rank)
    ranks = qra.allocate(*args, r_min=min(4, cfg.rank), r_max=4 * cfg.rank, seed=cfg.seed)
    # 3. HGS-LoRA: W ~ Q + B A, then the packed layer takes the float layer's place
    table, gen = {}, data.step_generator(cfg.seed, 0, stream=2)
    for name, layer in tqdm(layers.items(), desc=f"split ({cfg.init}, {cfg.rounding})"):
        w_OK, white, taps = weights[name], whiteners[name], layer.weight[0, 0].numel()
        grid = (cfg.group_w, taps, cfg.rounding, cfg.iters)
        gw, A_rK, B_Or = hgs_lora.decompose(w_OK, white, ranks[name], cfg.init, *grid, generator=gen)
        packed = checkpoint.packed_class(kinds[name], layer).from_float(layer, gw, A_rK, B_Or, smoothings[name], cfg.group_x)
        hgs_lora.replace(base.net, name, packed)
        table[name] = {"kind": kinds[name], "shape": shapes[name], "rank": ranks[name], "smooth": smoothings[name] is not None}
        table[name] |= {"group_w": cfg.group_w, "group_x": cfg.group_x}
        table[name]["error"] = hgs_lora.relative_error(w_OK, white.L_KK, gw, A_rK, B_Or)
    return base, table


def rollout_reference(cfg: Config, gen: torch.Generator, network: models.Denoiser, fp, pictures, cache):
    """(states at the edges, cond, edges), this rank's share: K jumps from noise along the fp CM or a cached trajectory."""
    mine, phases = slice(rank(), None, world()), cfg.phases.split(",")
    K = int(phases[torch.randint(len(phases), (1,), generator=gen)])
    times = network.path.grid(cfg.grid) if cache is None else cache.times
    inner = 1 + torch.randperm(len(times) - 2, generator=gen)[: K - 1].sort().values
    random_edges = times[torch.tensor([0, *inner.tolist(), len(times) - 1])]
    edges = random_edges if torch.rand(1, generator=gen) < cfg.jitter else tdpt.phase_edges(times, K)
    if cache is not None:
        pick = torch.randint(len(cache.captions), (cfg.batch,), generator=gen)[mine]
        states = tdpt.states_at(cache.states[:, pick].float(), times, edges)
        return states, network.encode([cache.captions[i] for i in pick]), edges
    cond = network.encode(pictures.captions(cfg.batch, gen)[mine])
    x_T = torch.randn(cfg.batch, *network.latent, generator=gen)[mine]
    return tdpt.rollout_states(fp, network.path, x_T, cond, edges), cond, edges


def distil(cfg: Config, out: Path, student, params: dict[str, torch.Tensor], network: models.Denoiser, pictures, anchor=None):
    """4. TDPT mixed with on-policy rollouts, on `params`. `network` is the teacher and the fp consistency model, by switch."""
    path, mine, null = network.path, slice(rank(), None, world()), network.encode([data.UNCONDITIONAL])
    teacher, fp = tdpt.guided(models.as_teacher(network), cfg.guidance, null), models.as_cm(network)
    grid, targets, cache = path.grid(cfg.grid), cfg.targets.split(","), None
    edges = tdpt.phase_edges(grid, cfg.edges)
    if cfg.rollout and cfg.trajectory == "teacher":
        cache = checkpoint.Trajectories(out / "cache", teacher, network, pictures, cfg.cached, path.grid(cfg.grid // 2), cfg.seed)
    state = checkpoint.State(out, params, cfg)
    start, _ = state.load()
    with open(out / "metrics.jsonl", "a") as log:
        for step in (bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="distil")):
            gen = data.step_generator(cfg.seed, step)
            if torch.rand(1, generator=gen) < cfg.rollout:
                # on-policy rollout: K jumps of the student, each from its own last state to where the reference arrives
                states, cond, rollout_edges = rollout_reference(cfg, gen, network, fp, pictures, cache)
                loss, K = 0.0, len(rollout_edges) - 1
                for loss_k in tdpt.rollout_phases(student, path, states, cond, rollout_edges, cfg.on_policy, cfg.huber):
                    (loss_k / K).backward()
                    loss += loss_k.item() / K
            else:
                # TDPT: x_t on the path, x_u by one solver step, the stage's target jumps on to the end of the phase
                x, captions = pictures.batch(cfg.batch, gen)
                x0, cond = models.to_latents(x)[mine], network.encode(captions[mine])
                noise = torch.randn(cfg.batch, *network.latent, generator=gen)[mine]
                idx = torch.randint(cfg.grid, (cfg.batch,), generator=gen)[mine]
                networks, phases = (student, anchor, fp, teacher), (grid, edges, cfg.split, targets, cfg.huber)
                loss, _ = tdpt.tdpt_loss(*networks, path, x0, cond, noise, idx, *phases)
                loss.backward()
                loss = loss.item()
            state.update(step, loss, log)
            bar.set_postfix_str(f"loss {loss:.4f}")
            if state.due(step + 1):
                state.save(step + 1)


def train_student(cfg: Config, out: Path, pictures) -> None:
    network = models.load_cm(cfg.model, cfg.teacher, cfg.cm).to(getattr(torch, cfg.dtype))
    if rank() == 0 and not checkpoint.has_start(out):
        checkpoint.save_start(out, *quantized_student(cfg, models.fuse(models.load_cm(cfg.model, cfg.teacher, cfg.cm)), pictures))
    if world() > 1:
        dist.barrier()
    student, table = checkpoint.load_start(out, cfg.model)
    student.to(getattr(torch, cfg.dtype))
    hgs_lora.set_backend(student, cfg.backend)
    params = {k: p.requires_grad_() for k, p in student.named_parameters() if "lora_" in k}

    def anchor(*args):
        with hgs_lora.anchor(student):
            return student(*args)

    distil(cfg, out, student, params, network, pictures, anchor)
    if rank() == 0:  # 5. pack, reload, draw, measure
        checkpoint.save_checkpoint(out, student, table, merged=cfg.deploy == "merged")
        evaluate.closing_report(out, network.to(models.FAST), dataclasses.asdict(cfg))


def train_cm(cfg: Config, out: Path, pictures) -> None:
    """The same objective at 16 bits: the LoRA of the full-precision consistency model, MODEL-cm.safetensors."""
    student = models.trainable_cm(cfg.model, cfg.teacher, cfg.cm, cfg.rank, cfg.seed, getattr(torch, cfg.dtype))
    params = {k: p.requires_grad_() for k, p in student.named_parameters() if "lora_" in k}
    distil(cfg, out, models.as_cm(student), params, student, pictures)
    if rank() == 0:
        ship(cfg, out / f"{cfg.model}-cm.safetensors", {k.removeprefix("net."): p for k, p in params.items()}, student, cm=True)


@checkpoint.stoppable
def main(argv: list[str]) -> None:
    cfg = parse(argv)
    check(cfg)
    print("\n".join(f"{k:12} {v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.dry_run:
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    began, out = time.time(), Path(cfg.out)
    checkpoint.open_run(out, dataclasses.asdict(cfg) | {"out": ""}, leader=rank() == 0)
    stage = train_teacher if cfg.stage == "teacher" else train_cm if cfg.bits == 16 else train_student
    stage(cfg, out, data.source(cfg.data))
    if world() > 1:
        dist.barrier()  # a rank that leaves early would break the others' last exchange
    print(f"{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    models.run_script("train.py", main)
