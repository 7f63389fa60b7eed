"""Quality on tiny at 1, 2 and 4 steps per recipe and training seed, all W4A4 rows after the same number of updates.

    python benchmarks/quality.py [--seeds 3] [--n 2048] [--jobs 2] [--out runs/quality]

Finished parts are not run again. Writes benchmarks/quality.md: mean +- sd over training seeds.
Teacher and fp rows have one set of weights and no spread.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ZERO = "--init zero --ranks uniform --rounding rtn"
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


def measure(base: Path, n: int, threads: int, seed: int, flags: str) -> dict[int, dict]:
    """Train one student, score it in 1, 2 and 4 steps; what is finished already is only read."""

    def call(script: str, *argv: str) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, script, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{script} {' '.join(argv)} failed:\n{done.stderr[-2000:]}")

    out, rows = base / f"{'-'.join(flags.replace('--', '').replace(',', '-').split()) or 'default'}-{seed}", {}
    if not (out / "report.json").exists():
        call("train.py", "--seed", str(seed), "--out", str(out), "--eval-n", "256", *flags.split())
    for steps in (1, 2, 4):
        file = out / f"n{n}-{steps}.json"
        if not file.exists():
            skip = [] if seed == 0 and flags == "" else ["--skip-teacher"]  # the teacher once
            call("evaluate.py", "--checkpoint", str(out), "--steps", str(steps), "--n", str(n), "--json", str(file), *skip)
        rows[steps] = json.loads(file.read_text())
    print(flags or "(default)", "seed", seed, [round(rows[steps]["w4a4"]["frechet"], 2) for steps in (1, 2, 4)], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each gets its share of the cores")
    args = parser.parse_args()
    threads, scores = max(1, (os.cpu_count() or 1) // args.jobs), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [
            (name, pool.submit(measure, Path(args.out).resolve(), args.n, threads, seed, flags))
            for seed in range(args.seeds)
            for name, flags in RECIPES.items()
        ]
        for name, run in runs:
            for steps, rows in run.result().items():
                scores.setdefault((name, steps), []).append(rows["w4a4"])
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
    lines.append(f"\n{args.n} pictures, evaluation seed 1234; {platform.machine()} CPU, torch {torch.__version__}")
    (ROOT / "benchmarks" / "quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
