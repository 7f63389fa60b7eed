"""Quality on tiny at 1, 2 and 4 steps per recipe and training seed, all W4A4 rows after the same number of updates.

    python benchmarks/quality.py [--seeds 3] [--n 2048] [--out runs/quality]

Hours on two cores; finished parts are not run again. Writes benchmarks/quality.md: mean +- sd over training seeds.
Teacher and fp rows have one set of weights and no spread.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ZERO = "--init zero --ranks uniform --rounding rtn"
RECIPES = {
    "zero init, self targets (QLoRA style)": f"{ZERO} --rollout 0 --targets self,self",
    "zero init, default objective": ZERO,
    "`--recipe paper`": "--recipe paper",
    "CMQuant (default)": "",
    "CMQuant start, no training": "--steps 0",
}

OTHERS = {"teacher": "teacher, guided, 25 steps", "teacher_same_steps": "teacher, guided", "fp": "fp CM"}


def call(script: str, *flags: str) -> None:
    subprocess.run([sys.executable, script, *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    base, scores = Path(args.out).resolve(), {}
    for seed in range(args.seeds):
        for name, flags in RECIPES.items():
            out = base / f"{'-'.join(flags.replace('--', '').replace(',', '-').split()) or 'default'}-{seed}"
            if not (out / "report.json").exists():
                call("train.py", "--seed", str(seed), "--out", str(out), "--eval-n", "256", *flags.split())
            for steps in (1, 2, 4):
                file = out / f"n{args.n}-{steps}.json"
                if not file.exists():
                    skip = [] if seed == 0 and flags == "" else ["--skip-teacher"]  # the teacher once
                    where = ("--checkpoint", str(out), "--steps", str(steps))
                    call("evaluate.py", *where, "--n", str(args.n), "--json", str(file), *skip)
                rows = json.loads(file.read_text())
                scores.setdefault((name, steps), []).append(rows["w4a4"])
                for key, label in OTHERS.items():
                    if key in rows:
                        scores[label, steps] = [rows[key]]
            print(name, seed, [round(scores[name, steps][-1]["frechet"], 2) for steps in (1, 2, 4)], flush=True)

    def cell(rows: list[dict], key: str, digits: int) -> str:
        values = [row[key] for row in rows if key in row]
        if not values:
            return "-"
        spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = ["| | steps | Frechet | prompt accuracy | PSNR to fp, dB | seeds |", "|---|---|---|---|---|---|"]
    for label in ("teacher, guided, 25 steps", "teacher, guided", "fp CM", *RECIPES):
        for steps in (1, 2, 4) if label != "teacher, guided, 25 steps" else (4,):
            if rows := scores.get((label, steps)):
                cells = (cell(rows, "frechet", 1), cell(rows, "prompt_accuracy", 3), cell(rows, "psnr_to_fp", 2))
                shown = 25 if "25" in label else steps
                lines.append(f"| {label} | {shown} | {' | '.join(cells)} | {len(rows)} |")
    lines.append(f"\n{args.n} pictures, evaluation seed 1234; {platform.machine()} CPU, torch {torch.__version__}")
    (ROOT / "benchmarks" / "quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
