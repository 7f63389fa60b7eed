"""Quality on tiny at 1, 2 and 4 steps per recipe and training seed: recipes after 120 updates, but where a label says otherwise.

    python -m benchmarks.quality [--seeds 3] [--n 2048] [--jobs 2] [--out runs/quality]

Finished parts are not run again. docs/tables/quality.md (mean +- sd over training seeds) is written anew after every
part, so it is worth reading before the end. Teacher and fp rows have one set of weights and no spread.
"""

import json
import statistics
from pathlib import Path

from benchmarks.jobs import MACHINE, each, name_of, parser
from benchmarks.tables import write_table

ZERO = "--init zero --ranks uniform --rounding rtn --lr 2e-4"  # a start that is far off needs larger steps than ours
UPDATES = "--steps 120"  # the same for all that are compared
RECIPES = {
    "CMQuant": UPDATES,
    "CMQuant, 40 updates (default)": "",
    "CMQuant, no updates": "--steps 0",
    "CMQuant, rollouts alone": f"--rollout 1 {UPDATES}",
    "`--recipe paper`": f"--recipe paper {UPDATES}",
    "zero init, default objective": f"{ZERO} {UPDATES}",
    "zero init, self targets (QLoRA style)": f"{ZERO} --rollout 0 --targets self,self {UPDATES}",
}
TEACHER = "teacher, guided"


def rows_of(file: Path) -> dict[str, dict]:
    """evaluate.py's scores; {} before they are there."""
    return json.loads(file.read_text()) if file.exists() else {}


def table(out: Path, n: int, seeds: int) -> list[str]:
    """Markdown of all that is scored in `out`. Rows that have no training seed come from the first checkpoint's files."""

    def cell(rows: list[dict], key: str, digits: int) -> str:
        values = [row[key] for row in rows if key in row]
        spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"

    scored = {
        (label, steps): [rows_of(out / f"{name_of(flags)}-{seed}" / f"n{n}-{steps}.json") for seed in range(seeds)]
        for label, flags in RECIPES.items()
        for steps in (1, 2, 4)
    }
    first = {steps: scored[next(iter(RECIPES)), steps][0] for steps in (1, 2, 4)}
    lines = [("real pictures", [first[4].get("real")]), (TEACHER, [rows_of(out / f"teacher-{n}.json").get("teacher")])]
    for label, key in ((TEACHER, "teacher_same_steps"), ("fp CM", "fp")):
        lines += [(label, [first[steps].get(key)]) for steps in (1, 2, 4)]
    lines += [(label, [rows.get("w4a4", rows.get("w4a8")) for rows in all_rows]) for (label, _), all_rows in scored.items()]
    text = ["| | steps | Frechet | prompt accuracy | PSNR to fp, dB | seeds |", "|---|---|---|---|---|---|"]
    for label, found in lines:
        if rows := [row for row in found if row]:
            cells = (cell(rows, "frechet", 1), cell(rows, "prompt_accuracy", 3), cell(rows, "psnr_to_fp", 2))
            text.append(f"| {label} | {rows[0].get('steps', '')} | {' | '.join(cells)} | {len(rows)} |")
    return text


def main() -> None:
    cli = parser(__doc__, "runs/quality", 2048)
    cli.add_argument("--seeds", type=int, default=3)
    args = cli.parse_args()
    runs = [(label, seed) for label in RECIPES for seed in range(args.seeds)]

    def work(run, call) -> tuple[str, int]:
        """Trains and scores; the first run also scores what all have in common."""
        (label, seed), first = run, run == runs[0]
        folder = args.out / f"{name_of(RECIPES[label])}-{seed}"
        if not (folder / "report.json").exists():
            call("train.py", "--seed", str(seed), "--out", str(folder), "--eval-n", "64", *RECIPES[label].split())
        scores = [(steps, "same" if first else "none", folder / f"n{args.n}-{steps}.json") for steps in (4, 2, 1)]
        scores += [(4, "both", args.out / f"teacher-{args.n}.json")] if first else []
        for steps, teacher, file in scores:
            if not file.exists():
                flags = ("--checkpoint", str(folder), "--steps", str(steps), "--n", str(args.n), "--json", str(file))
                call("evaluate.py", *flags, "--teacher", teacher)
        return run

    for done in each(work, runs, args.jobs):
        print(*done, flush=True)
        dtype = rows_of(args.out / f"{name_of(RECIPES[runs[0][0]])}-0" / "config.json")["config"]["dtype"]
        note = f"\n{args.n} pictures, evaluation seed 1234; networks in {dtype}; {MACHINE}"
        write_table("quality", [*table(args.out, args.n, args.seeds), note])


if __name__ == "__main__":
    main()
