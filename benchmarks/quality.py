"""Quality on tiny at 1, 2 and 4 steps per recipe and training seed, all W4A4 rows after the same number of updates.

    python benchmarks/quality.py [--seeds 3] [--n 2048] [--jobs 2] [--out runs/quality]

Finished parts are not run again. Writes benchmarks/quality.md: mean +- sd over training seeds.
Teacher and fp rows have one set of weights and no spread.
"""

import json
import statistics

from jobs import MACHINE, each, name_of, parser, write_table

ZERO = "--init zero --ranks uniform --rounding rtn --lr 2e-4"  # a start that is far off needs larger steps than ours
RECIPES = {
    "zero init, self targets (QLoRA style)": f"{ZERO} --rollout 0 --targets self,self",
    "zero init, default objective": ZERO,
    "`--recipe paper`": "--recipe paper",
    "CMQuant start, rollouts alone": "--rollout 1",
    "CMQuant (default)": "",
    "CMQuant start, no training": "--steps 0",
}
ONCE = {"real": "real pictures", "teacher": "teacher, guided, 25 steps"}  # whatever --steps is
OTHERS = ONCE | {"teacher_same_steps": "teacher, guided", "fp": "fp CM"}


def main() -> None:
    cli = parser(__doc__, "runs/quality", 2048)
    cli.add_argument("--seeds", type=int, default=3)
    args = cli.parse_args()

    def measure(run, call) -> dict[int, dict]:
        """Train one student, score it in 1, 2 and 4 steps."""
        label, seed = run
        flags = RECIPES[label]
        out, rows = args.out / f"{name_of(flags)}-{seed}", {}
        if not (out / "report.json").exists():
            call("train.py", "--seed", str(seed), "--out", str(out), "--eval-n", "256", *flags.split())
        for steps in (1, 2, 4):
            file = out / f"n{args.n}-{steps}.json"
            if not file.exists():
                skip = [] if seed == 0 and flags == "" else ["--skip-teacher"]  # the teacher once
                where = ("--checkpoint", str(out), "--steps", str(steps))
                call("evaluate.py", *where, "--n", str(args.n), "--json", str(file), *skip)
            rows[steps] = json.loads(file.read_text())
        print(label, "seed", seed, [round(rows[steps]["w4a4"]["frechet"], 2) for steps in rows], flush=True)
        return rows

    runs, scores = [(label, seed) for seed in range(args.seeds) for label in RECIPES], {}
    for (label, _), by_steps in zip(runs, each(measure, runs, args.jobs), strict=True):
        for steps, rows in by_steps.items():
            scores.setdefault((label, steps), []).append(rows["w4a4"])
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
