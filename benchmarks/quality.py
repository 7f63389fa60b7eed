"""Quality on tiny at 1, 2 and 4 steps per recipe and training seed, all W4A4 rows after the same number of updates.

    python benchmarks/quality.py [--seeds 3] [--n 2048] [--jobs 2] [--out runs/quality]

Finished parts are not run again. Writes benchmarks/quality.md: mean +- sd over training seeds.
Teacher and fp rows have one set of weights and no spread.
"""

import json
import statistics
from pathlib import Path

from jobs import MACHINE, each, name_of, parser, write_table

ZERO = "--init zero --ranks uniform --rounding rtn --lr 2e-4"  # a start that is far off needs larger steps than ours
RECIPES = {
    "CMQuant (default)": "",
    "zero init, self targets (QLoRA style)": f"{ZERO} --rollout 0 --targets self,self",
    "zero init, default objective": ZERO,
    "`--recipe paper`": "--recipe paper",
    "CMQuant start, no training": "--steps 0",
    "CMQuant start, rollouts alone": "--rollout 1",
}
ONCE = {"real": "real pictures", "teacher": "teacher, guided, 25 steps"}  # whatever --steps is
OTHERS = ONCE | {"teacher_same_steps": "teacher, guided", "fp": "fp CM"}


def main() -> None:
    cli = parser(__doc__, "runs/quality", 2048)
    cli.add_argument("--seeds", type=int, default=3)
    args = cli.parse_args()
    runs = [(label, seed) for label in RECIPES for seed in range(args.seeds)]
    first = runs[0]

    def folder(run) -> Path:
        return args.out / f"{name_of(RECIPES[run[0]])}-{run[1]}"

    def train(run, call) -> None:
        if not (folder(run) / "report.json").exists():
            flags = ("--seed", str(run[1]), "--out", str(folder(run)), "--eval-n", "256")
            call("train.py", *flags, *RECIPES[run[0]].split())
            print("trained", *run, flush=True)

    def measure(what, call) -> dict:
        """Scores of one checkpoint at one number of steps. The first one draws the teacher's and the fp model's pictures."""
        run, steps = what
        file = folder(run) / f"n{args.n}-{steps}.json"
        if not file.exists():
            flags = ("--checkpoint", str(folder(run)), "--steps", str(steps), "--n", str(args.n), "--json", str(file))
            keep = ("--fp-pictures", str(args.out / f"fp-{args.n}-{steps}.safetensors"))
            call("evaluate.py", *flags, *keep, "--teacher", "none" if run != first else "both" if steps == 4 else "same")
        rows = json.loads(file.read_text())
        print(*run, f"{steps} steps", round(rows["w4a4"]["frechet"], 2), flush=True)
        return rows

    scores = {}
    list(each(train, runs, args.jobs))
    for some in ([first], runs[1:]):
        todo = [(run, steps) for run in some for steps in (4, 2, 1)]
        for (run, steps), rows in zip(todo, each(measure, todo, args.jobs), strict=True):
            scores.setdefault((run[0], steps), []).append(rows["w4a4"])
            for key in OTHERS.keys() & rows.keys():
                scores[OTHERS[key], steps] = [rows[key]]

    def cell(rows: list[dict], key: str, digits: int) -> str:
        values = [row[key] for row in rows if key in row]
        if not values:
            return "-"
        spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = ["| | steps | Frechet | prompt accuracy | PSNR to fp, dB | seeds |", "|---|---|---|---|---|---|"]
    for label in (*OTHERS.values(), *RECIPES):
        for steps in (4,) if label in ONCE.values() else (1, 2, 4):
            rows = scores[label, steps]
            cells = (cell(rows, "frechet", 1), cell(rows, "prompt_accuracy", 3), cell(rows, "psnr_to_fp", 2))
            lines.append(f"| {label} | {rows[0].get('steps', '')} | {' | '.join(cells)} | {len(rows)} |")
    write_table("quality.md", [*lines, f"\n{args.n} pictures, evaluation seed 1234; {MACHINE}"])


if __name__ == "__main__":
    main()
