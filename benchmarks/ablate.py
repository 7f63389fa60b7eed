"""Which part of the method brings what: grids of rows, each row one command of train.py, on both small models, as they are and with
outlier channels (--outliers), at SDXL's share of parameters in branches.

    python -m benchmarks.ablate components [baselines ..] [--models tiny tiny-flux] [--seeds 3] [--jobs 2] [--only LABEL ..]

What is scored is kept in benchmarks/ablate.safetensors and not done again, a run that was killed goes on, and the group's table in
docs/tables is written anew after every cell; so a grid of hours may be made in parts. A cell of the table has

    PSNR to the 16-bit consistency model's pictures, dB; in brackets the Frechet distance as a multiple of that model's (both mean
    +- sd of the training seeds); after a semicolon the paired difference in PSNR to the first row, with the 95% interval of 1,000
    bootstrap samples of the prompts.

A row of your own is one more line in GROUPS. What no flag does is a function in VARIANTS, named in the flags as @name: it patches
the code before the run, in the run's own process.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import evaluate
import quant
import scores
import tdpt
import train
from benchmarks.jobs import MACHINE, SVDQUANT, each, name_of, parser
from benchmarks.tables import ROOT, markdown, write_table
from models import checkpoint, pretrained
from models.denoiser import FAST, Denoiser, as_cm, start_noise
from run import files

SEED, STEPS, EDGES = 1234, 4, 256  # of the evaluation; EDGES: pictures whose states are compared at the edges of the phases
STORE = ROOT / "benchmarks" / "ablate.safetensors"
BARE = "--smooth 0 --no-rotate --no-centre"  # activations as they are
NO_BRANCH = "--rank 0 --rank-least 0 --init zero"


@dataclass(frozen=True)
class Group:
    """Rows of one table."""

    rows: dict[str, str]  # label: flags of train.py; the first is what the others are compared with
    updates: tuple[int, ...] = (40,)  # --steps, each a row of its own
    testbeds: tuple[str, ...] = ("", "--outliers")
    seeds: int = 3


SELF, ZERO, UNIFORM = "--rollout 0 --targets self,self", "--init zero --rounding rtn", "--ranks uniform"
PAPER = "--recipe paper"  # TDPT alone
QLORA = f"{ZERO} {UNIFORM} {BARE}"
GROUPS = {
    "components": Group({  # of the paper, each on or off; off is a target of its own, a start from zero, uniform ranks
        "TDPT + HGS + QRA": PAPER,
        "HGS + QRA": SELF,
        "TDPT + QRA": f"{PAPER} {ZERO}",
        "TDPT + HGS": f"{PAPER} {UNIFORM}",
        "TDPT": f"{PAPER} {ZERO} {UNIFORM}",
        "HGS": f"{SELF} {UNIFORM}",
        "QRA": f"{SELF} {ZERO}",
        "none": f"{SELF} {ZERO} {UNIFORM}",
        "rollouts + HGS + QRA (default)": "",
        "rollouts": f"{ZERO} {UNIFORM}",
    }),
    "starts": Group({  # before any training
        "CMQuant (default)": "",
        "nearest": f"{NO_BRANCH} --rounding rtn {BARE}",
        "nearest, our activations": f"{NO_BRANCH} --rounding rtn",
        "GPTQ": f"{NO_BRANCH} --rounding gptq {BARE}",
        "SVDQuant style": SVDQUANT,
        "ConvRot style: rotation, nearest": f"{NO_BRANCH} --rounding rtn --smooth 0 --rotate --no-centre",
        "QuaRTZ style: multipliers 1, 2, 4, 8, 16, nearest": f"@powers --backend eager {NO_BRANCH} --rounding rtn {BARE}",
        "Q-Sched style: nearest, coefficients of the sampler fitted": f"@qsched {NO_BRANCH} --rounding rtn {BARE}",
        "CMQuant, coefficients of the sampler fitted": "@qsched",
    }, updates=(0,)),
    "baselines": Group({  # the same bits and updates
        "CMQuant (default)": "",
        **{f"{name}, {what}": f"{flags} {objective}"
           for what, objective in (("self targets", SELF), ("our objective", ""))
           for name, flags in {
               "QLoRA": QLORA,
               "PiSSA": f"--init pissa --rounding rtn {UNIFORM} {BARE}",
               "LoftQ": f"--init loftq --rounding rtn {UNIFORM} {BARE}",
               "QERA": f"--init qera --rounding rtn {UNIFORM} {BARE}",
               "SVDQuant": SVDQUANT,
               "QALoRA style: merged and rounded again": f"{QLORA} --deploy merged",
               "LoraQ style: branch in 8 bits": f"{QLORA} --rank 4 --lora-bits 8",
           }.items()},
    }),
    "targets": Group({  # (early, late), without rollouts
        "(anchor, fp)": PAPER,
        **{f"({pair.replace(',', ', ')})": f"--rollout 0 --targets {pair}"
           for pair in ("fp,fp", "self,self", "teacher,teacher", "fp,anchor", "anchor,anchor")},
        "rollouts alone": "--rollout 1",
        "three quarters rollouts (default)": "",
        "rollouts from the fp states": "--rollout 1 --no-on-policy",
    }),
    "schedule": Group({
        "T' = 0.5 (paper's targets)": PAPER,
        **{f"T' = {split}": f"{PAPER} --split {split}" for split in (0, 0.25, 0.75, 1)},
        **{f"{phases} phases": f"{PAPER} --tdpt-phases {phases}" for phases in (1, 2, 8)},
    }, seeds=1),
    "split": Group({
        "CMQuant (default)": "",
        "rounding to nearest": "--rounding rtn",
        **{f"{iters} alternations": f"--iters {iters}" for iters in (0, 1, 4, 16)},
        **{f"{n} calibration captions": f"--calibration {n}" for n in (8, 16, 32, 128)},
        "Hessian of the inputs alone": "--hessian input",
        "merged": "--deploy merged",
    }, updates=(0,), seeds=1),
}  # fmt: skip


# ---------------------------------------------------------------- what no flag does


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


VARIANTS: dict[str, Callable] = {"@powers": powers_of_two}  # @qsched is of the sampler: see `score`


# ---------------------------------------------------------------- one run, in a process of its own


def reference(denoiser: Denoiser, judge: evaluate.Judge, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(noises, cond, edges) of at most EDGES pictures, for the judge's captions or, with another seed, for others."""
    captions = judge.captions if seed == SEED else evaluate.Judge(EDGES, seed, reference=256, side=judge.side).captions
    captions = captions[:EDGES]
    return start_noise(len(captions), denoiser.latent, 2_000_000 * seed), denoiser.encode(captions), denoiser.path.grid(STEPS)


@torch.no_grad()
def score_fp(model: str, out: Path, n: int) -> None:
    """OUT/MODEL/fp.safetensors: pictures of the 16-bit consistency model, and its states at the edges of phases for two seeds."""
    weights = train.presets(train.Config(model=model))
    network = pretrained.load_embedded_cm(model, weights.get("teacher", ""), weights.get("cm", "")).to(FAST)
    judge, cm = evaluate.Judge(n, SEED, side=network.family.side), as_cm(network)
    found = {"pictures": judge.draw("fp", cm, network, STEPS)}
    for seed in (SEED, SEED + 1):
        x_T, cond, edges = reference(network, judge, seed)
        found[f"states-{seed}"] = tdpt.rollout_states(cm, network.path, x_T, cond, edges)
    files.write_tensors(out / model / "fp.safetensors", found, judge.score(found["pictures"]))


@torch.no_grad()
def score(folder: Path, model: str, n: int, variants: list[str]) -> None:
    """FOLDER/scores.safetensors of a finished run: PSNR of each picture in hundredths of a dB, and whether it shows its caption;
    beside them the means, the Frechet distance as a multiple of the 16-bit model's, and the relative error of the state at each
    edge of the phases."""
    fp, about_fp = files.read_tensors(folder.parent / "fp.safetensors", "delete the folder")
    student, _ = checkpoint.load_checkpoint(folder)
    judge, drawing = evaluate.Judge(n, SEED, side=student.family.side), student
    if "@qsched" in variants:
        _, cond, edges = reference(student, judge, SEED + 1)
        drawing = fitted(student, student.path, fp[f"states-{SEED + 1}"], cond, edges)
    pictures = judge.draw("ours", drawing, student, STEPS)
    x_T, cond, edges = reference(student, judge, SEED)
    states, z = tdpt.rollout_states(drawing, student.path, x_T, cond, edges), fp[f"states-{SEED}"]
    errors = ((states - z).square().flatten(1).sum(1) / z.square().flatten(1).sum(1)).sqrt().tolist()
    features = torch.cat([judge.classifier(part) for part in pictures.split(256)])
    right = evaluate.all_right(judge.classifier, features, judge.scene)
    psnr = torch.tensor([scores.psnr(a[None], b[None]) for a, b in zip(pictures, fp["pictures"], strict=True)])
    about = {"frechet": scores.frechet(judge.real, features) / about_fp["frechet"], "accuracy": right.float().mean().item()}
    about |= {"psnr": psnr.mean().item(), "edges": errors, "dtype": str(FAST).removeprefix("torch."), "n": n}
    files.write_tensors(folder / "scores.safetensors", {"psnr": (100 * psnr).round().short(), "right": right}, about)


def run(folder: Path, model: str, n: int, flags: list[str]) -> None:
    """Trains and scores one cell; nothing that is there already is made again."""
    variants = [flag for flag in flags if flag.startswith("@")]
    for name in variants:
        VARIANTS.get(name, lambda: None)()
    if not (folder / "report.json").exists():
        train.main([flag for flag in flags if flag not in variants] + ["--out", str(folder), "--eval-n", "2"])
    score(folder, model, n, variants)


# ---------------------------------------------------------------- the store and its tables


def key_of(model: str, testbed: str, flags: str, updates: int, seed: int) -> str:
    return " ".join([*f"--model {model} {testbed} {flags}".split(), f"--steps {updates}", f"--seed {seed}"])


def keep(path: Path, key: str, folder: Path) -> None:
    """Adds what `score` wrote to the store."""
    tensors, about = files.read_tensors(path, "") if path.exists() else ({}, {"rows": {}})
    one, about_one = files.read_tensors(folder / "scores.safetensors", "delete the folder")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    row = {k: about_one[k] for k in ("frechet", "accuracy", "psnr", "edges", "dtype", "n")} | {"commit": commit}
    tensors |= {f"{key}/{name}": tensor for name, tensor in one.items()}
    files.write_tensors(path, tensors, {"rows": about["rows"] | {key: row}})


def interval(difference: Tensor) -> list[float]:
    """[mean, low, high] of paired differences (seeds, n), with the 95% interval of bootstraps over the prompts."""
    each_prompt = difference.mean(0)
    return scores.interval(lambda i: each_prompt[i].mean().item(), (len(each_prompt),), scores.RESAMPLES, seed=0)


def spread(values: list[float], digits: int) -> str:
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.{digits}f}" + (f" +- {values.std():.{digits}f}" if len(values) > 1 else "")


def table(group: Group, models: list[str], store: Path) -> list[str]:
    """Markdown of all that the store has of a group."""
    tensors, about = files.read_tensors(store, "") if store.exists() else ({}, {"rows": {}})
    columns, (first, *_) = [(model, testbed) for model in models for testbed in group.testbeds], group.rows.values()

    def cell(column: tuple[str, str], flags: str, updates: int) -> str:
        keys = {seed: key_of(*column, flags, updates, seed) for seed in range(group.seeds)}
        found = {seed: about["rows"][key] for seed, key in keys.items() if key in about["rows"]}
        if not found:
            return "-"
        psnr, ratios = ([row[name] for row in found.values()] for name in ("psnr", "frechet"))
        text = f"{spread(psnr, 2)} ({spread(ratios, 3)})"
        others = {seed: key_of(*column, first, updates, seed) for seed in found}
        same = all(about["rows"].get(key, {}).get("dtype") == found[seed]["dtype"] for seed, key in others.items())
        if flags == first or not same:
            return text
        pairs = [(tensors[f"{keys[seed]}/psnr"], tensors[f"{others[seed]}/psnr"]) for seed in found]
        mean, low, high = interval(torch.stack([(ours.double() - theirs.double()) / 100 for ours, theirs in pairs]))
        return f"{text}; {mean:+.2f} [{low:+.2f}, {high:+.2f}]"

    lines = []
    for updates in group.updates:
        for label, flags in group.rows.items():
            cells = [cell(column, flags, updates) for column in columns]
            if {*cells} != {"-"}:
                lines.append([label, f"`{flags or '(none)'}`", updates, *cells])
    head = ["", "flags", "updates", *(f"{model}{', outliers' * bool(testbed)}" for model, testbed in columns)]
    counts = {row["n"] for row in about["rows"].values()}
    return [*markdown(head, *lines), f"\n{'/'.join(map(str, counts))} pictures, {STEPS} steps, evaluation seed {SEED}; {MACHINE}"]


def main() -> None:
    if "--run" in sys.argv:  # a cell's own process
        _, folder, model, n, *flags = sys.argv[1:]
        return score_fp(model, Path(folder), int(n)) if not flags else run(Path(folder), model, int(n), flags)
    cli = parser(__doc__, "runs/ablate", 1024)
    cli.add_argument("groups", nargs="+", choices=list(GROUPS), help="tables")
    cli.add_argument("--models", nargs="+", default=["tiny", "tiny-flux"])
    cli.add_argument("--seeds", type=int, default=0, help="training seeds; 0: as many as the group asks for")
    cli.add_argument("--updates", type=int, nargs="+", help="--steps of the runs; default those of the group")
    cli.add_argument("--only", nargs="+", help="rows")
    cli.add_argument("--store", type=Path, default=STORE, help="file of the scores")
    args = cli.parse_args()
    here = ("-m", "benchmarks.ablate", "--run")

    def fp(model: str, call) -> None:
        (args.out / model).mkdir(parents=True, exist_ok=True)
        if not (args.out / model / "fp.safetensors").exists():
            call(*here, str(args.out), model, str(args.n))

    def work(cell: tuple, call) -> tuple[str, Path]:
        model, testbed, flags, updates, seed = cell
        key = key_of(*cell)
        folder = args.out / model / name_of(f"{testbed} {flags} --steps {updates} --seed {seed}").replace("@", "")
        if key not in done and not (folder / "scores.safetensors").exists():
            call(*here, str(folder), model, str(args.n), *key.split())
        return key, folder

    list(each(fp, args.models, args.jobs))
    for name in args.groups:
        group = GROUPS[name]
        group = Group(group.rows, tuple(args.updates or group.updates), group.testbeds, args.seeds or group.seeds)
        done = files.read_tensors(args.store, "")[1]["rows"] if args.store.exists() else {}
        rows = [flags for label, flags in group.rows.items() if label in (args.only or group.rows)]
        seeds, places = range(group.seeds), [(model, testbed) for model in args.models for testbed in group.testbeds]
        cells = [(*place, flags, k, seed) for seed in seeds for flags in rows for k in group.updates for place in places]
        for key, folder in each(work, cells, args.jobs):
            if key not in done:
                keep(args.store, key, folder)
                print(key, flush=True)
                write_table(f"ablate-{name}", table(group, args.models, args.store), show=False)


if __name__ == "__main__":
    main()
