"""Which part of the method brings what: grids of rows, each row one command of train.py, on both small models, as they are and with
outlier channels (--outliers), at SDXL's share of parameters in branches.

    python -m benchmarks.ablate components [baselines ..] [--models tiny tiny-flux] [--seeds 3] [--jobs 2] [--only LABEL ..]
    python -m benchmarks.ablate plot        docs/plots/edges.svg, the error at each edge of the phases, from rows that are stored

What is scored is kept in benchmarks/ablate.safetensors and not done again, a run that was killed goes on, and the group's table in
docs/tables has all that the store has and is written anew after every new cell; so a grid of hours may be made in parts, one at a
time. A cell that fails is named, left out and tried again by the next call. What was made by other code is not made again: for
that give another --out and another --store. Networks are in float32 (CMQUANT_DTYPE), so that rows of all CPUs go
together. A cell of the table has

    PSNR to the 16-bit consistency model's pictures, dB; in brackets the Frechet distance as a multiple of that model's, and prompt
    accuracy (means +- sd of the training seeds); after a semicolon the paired difference in PSNR to the first row, with its 95%
    interval over prompts and seeds. With one seed the interval leaves out what the seed changes.

A row of your own is one more line in GROUPS. What no flag does is a function of benchmarks/variants.py, named in the flags as
@name. Rows that begin with the same student share its statistics and split, and rows of one seed what teacher and 16-bit model
answer, together most of their time.
"""

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import evaluate
import scores
import tdpt
import train
from benchmarks import variants
from benchmarks.jobs import MACHINE, SVDQUANT, each, name_of, parser
from benchmarks.tables import ROOT, markdown, spread, write_table
from data import scenes, sources
from models import checkpoint, pretrained, tiny
from models.denoiser import FAST, Denoiser, as_cm, as_teacher, lora_layers, start_noise
from models.family import FAMILIES
from run import files
from run.common import UserError, run_script, step_generator

SEED, STEPS, FITTED = 1234, 4, 256  # of the evaluation; FITTED: pictures by which coefficients of a sampler are fitted
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5% quantile, by training seeds
MOST_SEEDS = max(STUDENT_T)  # that tables and the plot look for
STORE = ROOT / "benchmarks" / "ablate.safetensors"
PLOT = ROOT / "docs" / "plots" / "edges.svg"
CODE = (".", "backends", "benchmarks", "data", "models", "run")  # folders; not what else lies there, as a venv
OF_TRAINING = {  # fields of Config that the packed student before training does not depend on
    "recipe", "out", "steps", "batch", "optimizer", "lr", "warmup", "clip", "rollout", "trajectory", "on_policy", "cached",
    "jitter", "tdpt_phases", "targets", "split", "huber", "deploy",
} | train.MAY_CHANGE - {"hessian_mb", "micro"}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Rows of one table."""

    rows: dict[str, str]  # label: flags of train.py; the first is what the others are compared with
    updates: tuple[int, ...] = (40,)  # --steps, each a row of its own
    testbeds: tuple[str, ...] = ("", "--outliers")
    seeds: int = 3


PAPER, SELF = "--recipe paper", "--rollout 0 --targets self,self"  # TDPT alone; its opposite, targets of the student itself
ZERO, UNIFORM = "--init zero", "--ranks uniform"
NEAREST = f"{ZERO} {UNIFORM} --rounding rtn"
FROM_TEACHER = "@from-teacher --trajectory teacher --cached 512 --targets teacher,teacher --sampling-steps 4"
NO_BRANCH, AS_THEY_ARE = f"--rank 0 --rank-least 0 {ZERO} {UNIFORM}", "--smooth 0 --no-rotate --no-centre"  # activations
GROUPS = {
    "components": Group({  # of the paper, each on or off: off is a target of its own, a start from zero (GPTQ stays), uniform ranks
        "TDPT + HGS + QRA": PAPER,
        "HGS + QRA": SELF,
        "TDPT + QRA": f"{PAPER} {ZERO}",
        "TDPT + HGS": f"{PAPER} {UNIFORM}",
        "TDPT": f"{PAPER} {ZERO} {UNIFORM}",
        "HGS": f"{SELF} {UNIFORM}",
        "QRA": f"{SELF} {ZERO}",
        "none": f"{SELF} {ZERO} {UNIFORM}",
        "none, rounded to nearest": f"{SELF} {NEAREST}",
        "TDPT and rollouts + HGS + QRA (default)": "",
        "TDPT and rollouts": f"{ZERO} {UNIFORM}",
    }),
    "starts": Group({  # before any training
        "CMQuant (default)": "",
        "nearest, activations as they are": f"{NO_BRANCH} --rounding rtn {AS_THEY_ARE}",
        "nearest": f"{NO_BRANCH} --rounding rtn",
        "GPTQ": NO_BRANCH,
        "SVDQuant style": SVDQUANT,
        "ConvRot style: rotation alone, nearest": f"{NO_BRANCH} --rounding rtn --smooth 0 --rotate --no-centre",
        "QuaRTZ style: multipliers 1, 2, 4, 8, 16, nearest": f"@powers {NO_BRANCH} --rounding rtn {AS_THEY_ARE}",
        "Q-Sched style: nearest, coefficients of the sampler fitted": f"@qsched {NO_BRANCH} --rounding rtn {AS_THEY_ARE}",
        "CMQuant, coefficients of the sampler fitted": "@qsched",
    }, updates=(0,)),
    "baselines": Group({  # the same parameters and updates, in our number format, activations changed as ours are
        "CMQuant (default)": "",
        **{f"{name}, {what}": f"{flags} {objective}".strip()
           for what, objective in (("self targets", SELF), ("our objective", ""))
           for name, flags in {
               "QLoRA": NEAREST,
               "PiSSA": f"{NEAREST} --init pissa",
               "LoftQ": f"{NEAREST} --init loftq",
               "QERA": f"{NEAREST} --init qera",
               "SVDQuant": SVDQUANT,
               "QLoRA, merged and rounded again": f"{NEAREST} --deploy merged",
               "LoraQ style: QLoRA with twice the ranks in 8 bits": f"{NEAREST} --rank 4 --lora-bits 8",
           }.items()},
        "QLoRA, self targets, rate 2e-4": f"{NEAREST} {SELF} --lr 2e-4",
        "QLoRA, our objective, rate 1e-3": f"{NEAREST} --lr 1e-3",
    }),
    "targets": Group({  # (early, late), without rollouts
        "(anchor, fp)": PAPER,
        **{f"({pair.replace(',', ', ')})": f"--rollout 0 --targets {pair}"
           for pair in ("fp,fp", "self,self", "teacher,teacher", "fp,anchor", "anchor,anchor")},
        "rollouts alone": "--rollout 1",
        "three quarters rollouts (default)": "",
        "rollouts from the fp states": "--rollout 1 --no-on-policy",
        "straight from the teacher": FROM_TEACHER,  # its pictures become the teacher's: the distance says more of it than the PSNR
        "straight from the teacher, rate 1e-3": f"{FROM_TEACHER} --lr 1e-3",
    }),
    "formats": Group({
        "W4A4 (default)": "",
        "W4A4, activations in groups of 16": "--group-x 16",
        "W4A8": "--bits-x 8",
        "W4A16": "@a16 --bits-x 8",
        "W8A8": "@w8 --bits-x 8",
        "weights with a float scale for each group of 64": "@float-scales",
        "weights with one scale for each row": "@row-scales",
        "modulations W4A4": "@modulations-w4a4",  # else W4A16
        "modulations W8A16": "@modulations-w8a16",
        "modulations in 16 bits": "@modulations-16bit",
        "attention in 8 bits": "@attention-8bit",
    }, updates=(0, 40), testbeds=("",), seeds=1),
    "rates": Group({  # defaults: 2e-5 on tiny, 3e-4 on tiny-flux
        "default": "",
        **{f"rate {lr}": f"--lr {lr}" for lr in ("6e-5", "1e-4")},
        "0.7 ranks": "--rank 0.7",
        **{f"0.7 ranks, rate {lr}": f"--rank 0.7 --lr {lr}" for lr in ("6e-5", "1e-4")},
    }, testbeds=("",)),
    "schedule": Group({
        "T' = 0.5 (paper's targets)": PAPER,
        "T' = 0: anchor alone": f"{PAPER} --split 0",
        "T' = 0.25": f"{PAPER} --split 0.25",
        "T' = 0.75": f"{PAPER} --split 0.75",
        "T' = 1: fp alone but for the first point": f"{PAPER} --split 1",
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


def from_teacher() -> None:
    """What is quantized is the teacher, without the consistency model's LoRA. Like the teacher, the student does not see the time
    that a jump goes to: the layer that would read it is untrained, and is neither quantized nor trained here. So the student can
    learn one number of steps."""

    def untold(denoiser: Denoiser) -> Denoiser:
        denoiser.knows_destination = False
        return denoiser

    def without_lora(denoiser: Denoiser) -> Denoiser:
        for name, lora in lora_layers(denoiser).items():
            denoiser.net.set_submodule(name, lora.layer)
        return untold(denoiser)

    packed = checkpoint._packed_model
    train.fuse, checkpoint._packed_model = without_lora, lambda *about: untold(packed(*about))


VARIANTS = variants.VARIANTS | {"@from-teacher": from_teacher}  # this one changes what train.py itself does

# ---------------------------------------------------------------- one run, in a process of its own


def questions(denoiser: Denoiser, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(noises, cond, edges) of n pictures, those that a Judge of this seed asks for."""
    scene = scenes.random_scenes(n, step_generator(seed, 0))
    captions = [scenes.caption_of(scene, i) for i in range(n)]
    return start_noise(n, denoiser.latent, 1_000_000 * seed), denoiser.encode(captions), denoiser.path.grid(STEPS)


def draw_states(model, path, x_T: Tensor, cond: dict[str, Tensor], edges: Tensor) -> Tensor:
    """tdpt.rollout_states (STEPS + 1, n, ...), 64 pictures at a time."""
    parts = sources.in_parts(x_T, cond, 64, "cpu")
    return torch.cat([tdpt.rollout_states(model, path, *part, edges) for part in parts], 1)


@torch.no_grad()
def score_fp(model: str, out: Path, n: int) -> None:
    """OUT/MODEL/fp-N.safetensors: states of the 16-bit consistency model at the edges of phases, for the pictures that are scored
    and for FITTED of another seed; features of real pictures."""
    network = pretrained.load_embedded_cm(model).to(FAST)
    judge = evaluate.Judge(n, SEED, side=network.family.side)
    sets = {"states": questions(network, n, SEED), "to fit": questions(network, min(n, FITTED), SEED + 1)}
    found = {name: draw_states(as_cm(network), network.path, *asked) for name, asked in sets.items()}
    row = judge.score(tiny.to_pictures(found["states"][-1]))
    files.write_tensors(out / model / f"fp-{n}.safetensors", found | {"real": judge.real}, row)


@torch.no_grad()
def score(folder: Path, n: int, names: list[str]) -> None:
    """FOLDER/scores-N.safetensors of a finished run: PSNR of each picture in hundredths of a dB; beside it the mean, prompt
    accuracy, the Frechet distance as a multiple of the 16-bit model's, and the relative error of the state at each edge of the
    phases."""
    fp, about_fp = files.read_tensors(folder.parent / f"fp-{n}.safetensors", "delete the folder")
    packed, about = checkpoint.load_checkpoint(folder)
    judge, drawing = evaluate.Judge(n, SEED, side=packed.family.side, real=fp["real"]), packed
    if variants.OF_SAMPLER & {*names}:
        _, cond, edges = questions(packed, fp["to fit"].shape[1], SEED + 1)
        drawing = variants.fitted(packed, packed.path, fp["to fit"], cond, edges)
    states, z = draw_states(drawing, packed.path, *questions(packed, n, SEED)), fp["states"]
    pictures, wanted = tiny.to_pictures(states[-1]), tiny.to_pictures(z[-1])
    errors = ((states - z).square().flatten(1).sum(1) / z.square().flatten(1).sum(1)).sqrt().tolist()
    found = judge.score(pictures)
    psnr = scores.psnr_B(pictures, wanted)
    row = {"psnr": psnr.mean().item(), "x fp": found["frechet"] / about_fp["frechet"], "accuracy": found["prompt_accuracy"]}
    row |= {"edge errors": errors, "n": n, "commit": about["commit"]}
    files.write_tensors(folder / f"scores-{n}.safetensors", {"psnr": (100 * psnr).round().short()}, row)


def code() -> str:
    """A digest of all code that a packed student may depend on."""
    found = (path for folder in CODE for path in sorted((ROOT / folder).glob("*.*")) if path.suffix in (".py", ".cpp"))
    return files.digest_of([path.read_text() for path in found])


def share_starts(starts: Path, names: list[str]) -> None:
    """train.py takes the packed student before training from the folder `starts` where a run of this very code, with the same files
    of teacher and consistency model, has made it, and leaves its own there."""
    initialise = train.initialise_student

    def shared(cfg: train.Config, out: Path) -> None:
        about = {k: v for k, v in train.stored(cfg).items() if k not in OF_TRAINING}
        about |= {"variants": sorted({*names} - variants.OF_SAMPLER), "code": code(), "torch": torch.__version__}
        path = starts / files.digest_of(about) / "start.safetensors"
        if not path.exists():
            initialise(cfg, out)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_tensors(path, *files.read_tensors(out / path.name, ""))
        files.write_tensors(out / path.name, *files.read_tensors(path, "delete it"), files.run_digest(out))

    train.initialise_student = shared


def share_answers(answers: Path) -> None:
    """train.py takes what the frozen networks answer, much of its time, from the folder `answers` where they were asked the same
    before: in runs of one seed they are, as their captions, noises and points in time do not depend on the student."""

    def remembered(role: Callable) -> Callable:
        def of(network: Denoiser) -> Callable:
            def answer(x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
                asked = hashlib.sha256(role.__name__.encode())
                for tensor in (x, t, s, *(cond[name] for name in sorted(cond))):
                    asked.update(tensor.contiguous().view(torch.uint8).numpy())
                path = answers / f"{asked.hexdigest()}.safetensors"
                if not path.exists():
                    answers.mkdir(parents=True, exist_ok=True)
                    files.write_tensors(path, {"answer": role(network)(x, t, s, cond)}, {})
                return files.read_tensors(path, "delete it")[0]["answer"]

            return answer

        return of

    train.as_cm, train.as_teacher = remembered(as_cm), remembered(as_teacher)


def finished(folder: Path) -> bool:
    try:
        return bool(files.read_finished(folder))
    except UserError:
        return False


def run(folder: Path, n: int, flags: list[str]) -> None:
    """Trains and scores one cell; nothing that is there already is made again. What serves resuming alone is deleted. The pictures
    and scores with which train.py ends are left out."""
    names = [flag for flag in flags if flag.startswith("@")]
    for name in names:
        VARIANTS[name]()
    share_starts(folder.parent / "starts", names)
    share_answers(folder.parent / f"answers{'-outliers' * ('--outliers' in flags)}")
    train.sample.closing_pictures = train.evaluate.closing_report = lambda *about: None
    if not finished(folder):
        train.main([flag for flag in flags if flag not in names] + ["--out", str(folder)])
    score(folder, n, names)
    for path in folder.glob("sta*.safetensors"):
        path.unlink()
    shutil.rmtree(folder / "trajectories", ignore_errors=True)


# ---------------------------------------------------------------- the store and its tables


def key_of(model: str, testbed: str, flags: str, updates: int, seed: int) -> str:
    return " ".join([*f"--model {model} {testbed} {flags}".split(), f"--steps {updates}", f"--seed {seed}"])


def read_store(path: Path) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """({key: PSNR of each picture}, {key: what `score` wrote beside it})."""
    tensors, about = files.read_tensors(path, "delete it, or take it from the repository") if path.exists() else ({}, {"rows": {}})
    return tensors, about["rows"]


def keep(path: Path, key: str, scored: Path) -> None:
    """Adds what `score` wrote to the store. UserError if that has another number of pictures."""
    (tensors, rows), (one, about) = read_store(path), files.read_tensors(scored, "delete it")
    row = {name: about[name] for name in ("psnr", "x fp", "accuracy", "edge errors", "n", "commit")}
    if other := {kept["n"] for kept in rows.values()} - {row["n"]}:
        raise UserError(f"{path} has rows of {min(other)} pictures: give --n {min(other)}, or another --store")
    files.write_tensors(path, tensors | {key: one["psnr"]}, {"rows": rows | {key: row}})


def interval(difference: Tensor) -> list[float]:
    """[mean, low, high] of paired differences (seeds, n), float64. The half width of the 95% interval is sqrt(p^2 + s^2): p by
    bootstraps over prompts, s = t sd / sqrt(seeds) with Student's t, as bootstraps of two or three seeds would be too narrow."""
    of_prompts, of_seeds = difference.mean(0), difference.mean(1)
    mean, low, _ = scores.interval(lambda i: of_prompts[i].mean().item(), (len(of_prompts),), scores.RESAMPLES, seed=0)
    seeds = len(of_seeds)
    s = STUDENT_T[seeds] * of_seeds.std().item() / seeds**0.5 if seeds > 1 else 0.0
    half = math.hypot(mean - low, s)
    return [mean, mean - half, mean + half]


def table(group: Group, store: Path) -> list[str]:
    """Markdown of all that the store has of a group."""
    tensors, rows = read_store(store)
    columns = [(name, testbed) for name, family in FAMILIES.items() if family.embedded for testbed in group.testbeds]
    seeds, (first, *_) = range(MOST_SEEDS), group.rows.values()

    def found(column: tuple[str, str], flags: str, updates: int) -> dict[int, str]:
        """{seed: key} of a cell's runs."""
        keys = {seed: key_of(*column, flags, updates, seed) for seed in seeds}
        return {seed: key for seed, key in keys.items() if key in rows}

    def cell(column: tuple[str, str], flags: str, updates: int) -> str:
        ours, theirs = found(column, flags, updates), found(column, first, updates)
        if not ours:
            return "-"
        psnr, ratios, right = ([rows[key][name] for key in ours.values()] for name in ("psnr", "x fp", "accuracy"))
        text = f"{spread(psnr, 2)} ({spread(ratios, 3)}, {spread(right, 3)})"
        if flags == first or not (both := [seed for seed in ours if seed in theirs]):
            return text
        pairs = [tensors[ours[seed]].double() - tensors[theirs[seed]].double() for seed in both]
        mean, low, high = interval(torch.stack(pairs) / 100)
        return f"{text}; {mean:+.2f} [{low:+.2f}, {high:+.2f}]"

    updates = sorted({int(key.split(" --steps ")[1].split()[0]) for key in rows})
    lines = [[label, f"`{flags or '(none)'}`", k, *(cell(column, flags, k) for column in columns)]
             for k in updates for label, flags in group.rows.items()]  # fmt: skip
    lines = [line for line in lines if {*line[3:]} != {"-"}]
    kept = [i for i in range(len(columns)) if any(line[3 + i] != "-" for line in lines)]
    head = ["", "flags", "updates", *(f"{model}{', outliers' * bool(testbed)}" for model, testbed in columns)]
    lines = [line[:3] + [line[3 + i] for i in kept] for line in (head, *lines)]
    n = next(iter(rows.values()))["n"]
    return [*markdown(*lines), f"\n{n} pictures, {STEPS} steps, evaluation seed {SEED}; networks in float32; {MACHINE}"]


# ---------------------------------------------------------------- the error at the edges of the phases

DRAWN = {  # label of a row of components: its name and colour in the plot
    "TDPT + HGS + QRA": ("TDPT", "C0"),
    "HGS + QRA": ("without TDPT: targets of the student itself", "C1"),
    "TDPT and rollouts + HGS + QRA (default)": ("TDPT and rollouts (default)", "C2"),
}
DRAWN_UPDATES = {0: "dotted", 40: "dashed", 200: "solid"}  # updates: style of the line


def edge_errors(rows: dict[str, dict]) -> dict[str, dict[tuple[str, int], list[float]]]:
    """{model: {(label of DRAWN, updates): relative error of the state at each edge of the phases, from noise to picture}}, means of
    the training seeds. UserError if a store has none of them."""
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for model, label, updates in itertools.product(FAMILIES, DRAWN, DRAWN_UPDATES):
        keys = (key_of(model, "", GROUPS["components"].rows[label], updates, seed) for seed in range(MOST_SEEDS))
        if runs := [rows[key]["edge errors"] for key in keys if key in rows]:
            found.setdefault(model, {})[label, updates] = [sum(at_edge) / len(runs) for at_edge in zip(*runs, strict=True)]
    if not found:
        labels = " ".join(f'"{label}"' for label in DRAWN)
        command = f"python -m benchmarks.ablate components --updates {' '.join(map(str, DRAWN_UPDATES))} --only {labels}"
        raise UserError(f"the store has no rows to draw: make them with `{command}`")
    return found


def plot(store: Path, file: Path = PLOT) -> None:
    """The figure of edge_errors as an SVG: a panel for each model, a colour for each row, a style for each number of updates; all
    rows begin with one student. Equal errors give equal bytes."""
    found = edge_errors(read_store(store)[1])
    with rc_context({"svg.hashsalt": "edges", "svg.fonttype": "none"}):
        figure = Figure((5 * len(found), 4), layout="constrained")
        lines = {}
        for axes, (model, curves) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            for (label, updates), errors in curves.items():
                name, colour = DRAWN[label] if updates else ("before training", "black")
                name = f"{name}, {updates} updates" if updates else name
                style = dict(color=colour, linestyle=DRAWN_UPDATES[updates], marker=".")
                (lines[name],) = axes.plot(range(len(errors)), errors, **style)
            axes.set(title=model, xlabel=f"edge of the phases: 0 is noise, {STEPS} the picture", xticks=range(STEPS + 1))
            axes.set(ylabel="relative error of the state", ylim=(0, None))
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, fontsize="small")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, metadata={"Date": None})


def show(name: str, store: Path) -> None:
    """A group's table: into docs/, or to the screen where the store is a trial's."""
    if store == STORE:
        write_table(f"ablate-{name}", table(GROUPS[name], store), show=False)
    else:
        print("\n".join(table(GROUPS[name], store)))


def main(argv: list[str]) -> None:
    if argv[:1] == ["--run"]:  # a cell's own process
        _, folder, n, *flags = argv
        return run(Path(folder), int(n), flags) if len(flags) > 1 else score_fp(*flags, Path(folder), int(n))
    cli = parser(__doc__, "runs/ablate", 512)
    cli.add_argument("groups", nargs="+", choices=[*GROUPS, "plot"], help="tables; plot: the figure of what is stored")
    cli.add_argument("--models", nargs="+", default=["tiny", "tiny-flux"])
    cli.add_argument(
        "--seeds", type=int, default=0, choices=range(MOST_SEEDS + 1), help="training seeds; 0: as many as the group asks for"
    )
    cli.add_argument("--updates", type=int, nargs="+", help="--steps of the runs; default those of the group")
    cli.add_argument("--only", nargs="+", choices=[label for group in GROUPS.values() for label in group.rows], help="rows")
    where = "file of the scores; for another than the default the table is printed, and docs/ stay as they are"
    cli.add_argument("--store", type=Path, default=STORE, help=where)
    args = cli.parse_args(argv)
    here = ("-m", "benchmarks.ablate", "--run")

    def fp(model: str, call) -> None:
        (args.out / model).mkdir(parents=True, exist_ok=True)
        if not (args.out / model / f"fp-{args.n}.safetensors").exists():
            call(*here, str(args.out), str(args.n), model)

    def work(cell: tuple, call) -> tuple[str, Path]:
        key = key_of(*cell)
        folder = args.out / cell[0] / name_of(key).replace("@", "")
        scored = folder / f"scores-{args.n}.safetensors"
        if key not in done and not scored.exists():
            try:
                call(*here, str(folder), str(args.n), *key.split())
            except SystemExit as error:
                print(error)
        return key, scored

    os.environ["CMQUANT_DTYPE"] = "float32"  # of the runs
    groups = [name for name in args.groups if name != "plot"]
    if groups:
        list(each(fp, args.models, args.jobs))
    for name in groups:
        group, (_, done) = GROUPS[name], read_store(args.store)
        rows = [flags for label, flags in group.rows.items() if label in (args.only or group.rows)]
        places = [(model, testbed) for model in args.models for testbed in group.testbeds]
        seeds, updates = range(args.seeds or group.seeds), args.updates or group.updates
        cells = [(*place, flags, k, seed) for seed in seeds for flags in rows for k in updates for place in places]
        for key, scored in each(work, cells, args.jobs):
            if scored.exists() and key not in done:
                keep(args.store, key, scored)
                print(key, flush=True)
                show(name, args.store)
        if args.store.exists():  # where nothing was new too
            show(name, args.store)
    if groups != args.groups:
        plot(args.store, PLOT if args.store == STORE else args.store.with_suffix(".svg"))


if __name__ == "__main__":
    run_script("benchmarks.ablate", main)
