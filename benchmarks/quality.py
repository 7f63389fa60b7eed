"""Quality at SDXL's share of parameters in branches, 1, 2 and 4 steps, the embedded models, several training seeds.

    python -m benchmarks.quality [--models tiny tiny-flux] [--seeds 3] [--n 2048] [--jobs 2] [--only LABEL ..] [--teacher]
    python -m benchmarks.quality --models small         once its weights are made

Finished parts are not run again. Each model's table, docs/tables/quality-MODEL.md (mean +- sd over training seeds), is written
anew after every part, so it is worth reading before the end. "x fp" is the Frechet distance as a multiple of the 16-bit consistency
model's at as many steps. Seeds after the first are scored at 4 steps only. --teacher adds the guided teacher's rows, which take
the longest.
"""

import json
from functools import partial
from pathlib import Path

import torch

import evaluate
import train
from benchmarks.jobs import MACHINE, SVDQUANT, each, name_of, parser
from benchmarks.tables import markdown, spread, write_table
from models import checkpoint, pretrained
from models.denoiser import FAST, as_cm, guided_teacher
from models.family import FAMILIES
from run import files
from run.common import run_script

START = "--steps 0"
ROWS = {  # label: flags of train.py, whose default is 2 ranks on average, the share of parameters that 16 are of SDXL
    "CMQuant (default)": "",
    "CMQuant, no updates": START,
    "outlier channels": "--outliers",
    "SVDQuant style, no updates": f"{SVDQUANT} {START}",
    "outlier channels, SVDQuant style, no updates": f"--outliers {SVDQUANT} {START}",
    "W4A8 (`--bits-x 8`)": "--bits-x 8",
    "W4A8 (`--bits-x 8`), no updates": f"--bits-x 8 {START}",
    "16 inputs in 8 bits, no updates": f"--inputs-8bit 16 {START}",
    "0.7 ranks": "--rank 0.7 --rank-least 0",
    "0.7 ranks, no updates": f"--rank 0.7 --rank-least 0 {START}",
    "uniform ranks": "--ranks uniform",
    "uniform ranks, no updates": f"--ranks uniform {START}",
    "ranks by the spectrum alone, no updates": f"--ranks spectrum {START}",
    "`--recipe paper`": "--recipe paper",
    "`--lr 1e-4`": "--lr 1e-4",
}
STEPS, SEED = (4, 2, 1), 1234  # SEED: of the evaluation


def scores_of(file: Path) -> dict[str, dict]:
    """What `write` wrote; {} before it is there."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(path: Path, rows: dict) -> None:
    with files.atomic(path) as file:
        file.write_text(json.dumps(rows))


@torch.no_grad()
def score_fp(model: str, n: int, out: Path) -> None:
    """fp.json, scores of rendered pictures and of the 16-bit consistency model, and fp-STEPS.safetensors, its pictures."""
    judge, network = evaluate.Judge(n, SEED, side=FAMILIES[model].side), pretrained.load_embedded_cm(model).to(FAST)
    rows = {"real pictures": {"": judge.rendered()}, "fp CM": {}}
    for steps in STEPS:
        pictures = judge.draw("fp", as_cm(network), network, steps)
        files.write_tensors(out / f"fp-{steps}.safetensors", {"pictures": pictures}, {})
        rows["fp CM"][steps] = judge.score(pictures)
    write(out / "fp.json", rows)


@torch.no_grad()
def score_teacher(model: str, n: int, out: Path) -> None:
    """teacher.json, scores of the guided teacher."""
    judge, network = evaluate.Judge(n, SEED, side=FAMILIES[model].side), pretrained.load_embedded_cm(model).to(FAST)
    teacher = guided_teacher(network, 1.5)
    rows = {steps: judge.score(judge.draw("teacher", teacher, network, steps)) for steps in (25, *STEPS)}
    write(out / "teacher.json", {"teacher, guided": rows})


@torch.no_grad()
def score_run(folder: Path, model: str, n: int, out: Path) -> None:
    """scores-N.json of a finished run."""
    judge, (student, _), rows = evaluate.Judge(n, SEED, side=FAMILIES[model].side), checkpoint.load_checkpoint(folder), {}
    for steps in STEPS if folder.name.endswith("-0") else STEPS[:1]:
        fp = files.read_tensors(out / f"fp-{steps}.safetensors", "delete the folder")[0]["pictures"]
        rows[steps] = judge.score(judge.draw("ours", student, student, steps), fp)
    write(folder / f"scores-{n}.json", rows)


def table(model: str, n: int, seeds: int, out: Path) -> list[str]:
    """Markdown of all that is scored."""
    lines, reference = [], scores_of(out / model / "teacher.json") | scores_of(out / model / "fp.json")
    found = [(label, steps, [row]) for label, by_steps in reference.items() for steps, row in by_steps.items()]
    for label, flags in ROWS.items():
        scored = [scores_of(out / model / f"{name_of(flags)}-{seed}" / f"scores-{n}.json") for seed in range(seeds)]
        found += [(label, steps, [row[steps] for row in scored if steps in row]) for steps in map(str, STEPS)]
    for label, steps, rows in found:
        if rows:
            ratios = [row["frechet"] / reference["fp CM"][steps]["frechet"] for row in rows if steps in reference["fp CM"]]
            psnr = [row["psnr_to_fp"] for row in rows if "psnr_to_fp" in row]
            frechet, right = ([row[key] for row in rows] for key in ("frechet", "prompt_accuracy"))
            shown = spread(frechet, 1), spread(ratios, 3), spread(right, 3), spread(psnr, 2)
            lines.append([model, label, steps, *shown, len(rows)])
    note = f"{model}: {n} pictures, evaluation seed {SEED}; networks in {str(FAST).removeprefix('torch.')}; {MACHINE}"
    head = ["model", "", "steps", "Frechet", "x fp", "prompt accuracy", "PSNR to fp, dB", "seeds"]
    return [*markdown(head, *lines), "", note]


def main(argv: list[str]) -> None:
    cli = parser(__doc__, "runs/quality", 2048)
    cli.add_argument("--models", nargs="+", default=["tiny", "tiny-flux"])
    cli.add_argument("--seeds", type=int, default=3)
    cli.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), help="rows")
    cli.add_argument("--teacher", action="store_true", help="rows of the guided teacher too")
    cli.add_argument("--score", nargs=2, metavar=("WHAT", "MODEL"), help="score fp, teacher or a run's folder, and stop")
    args = cli.parse_args(argv)
    if args.score:
        what, model = args.score
        score = {"fp": score_fp, "teacher": score_teacher}.get(what, partial(score_run, Path(what)))
        return score(model, args.n, args.out / model)
    scoring = ("-m", "benchmarks.quality", "--n", str(args.n), "--out", str(args.out), "--score")

    def reference(part: tuple[str, str], call) -> None:
        what, model = part
        if not (args.out / model / f"{what}.json").exists():
            call(*scoring, what, model)

    def work(run: tuple[str, str, int], call) -> tuple[str, str, int]:
        """Trains and scores."""
        model, label, seed = run
        folder = args.out / model / f"{name_of(ROWS[label])}-{seed}"
        flags = ["--model", model, "--seed", str(seed), "--out", str(folder), "--eval-n", "64", *ROWS[label].split()]
        if not (folder / "report.json").exists():
            call("train.py", *flags)
        files.refuse_another(folder, train.stored(train.parse(flags)), train.MAY_CHANGE)  # of other defaults
        if not (folder / f"scores-{args.n}.json").exists():
            call(*scoring, str(folder), model)
        return run

    for model in args.models:
        (args.out / model).mkdir(parents=True, exist_ok=True)
    list(each(reference, [(what, model) for what in ("fp", "teacher")[: 1 + args.teacher] for model in args.models], args.jobs))
    runs = [(model, label, seed) for seed in range(args.seeds) for label in args.only for model in args.models]
    for run in each(work, runs, args.jobs):
        print(*run, flush=True)
        write_table(f"quality-{run[0]}", table(run[0], args.n, args.seeds, args.out), show=False)  # too much of a screen


if __name__ == "__main__":
    run_script("benchmarks.quality", main)
