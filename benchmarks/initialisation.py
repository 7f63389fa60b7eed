"""The start before any training, per method: PSNR of 4-step W4A4 pictures to the 16-bit consistency model's.

    python benchmarks/initialisation.py [--out runs/initialisation] [--n 256]        about a minute a row on two cores

Each row is one run of `train.py --steps 0`; finished rows are not run again. Writes benchmarks/initialisation.md.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PLAIN = "--ranks uniform --rounding rtn"
ROWS = [  # name, flags
    ("zero (QLoRA)", f"--init zero {PLAIN}"),
    ("PiSSA", f"--init pissa {PLAIN}"),
    ("LoftQ", f"--init loftq {PLAIN}"),
    ("QERA", f"--init qera {PLAIN}"),
    ("SVDQuant style: smoothed, SVD", f"--init svdquant --smooth 0.5 {PLAIN}"),
    ("SVDQuant style, unsmoothed", f"--init svdquant {PLAIN}"),
    ("principal part, no alternation", f"--init principal {PLAIN}"),
    ("HGS, Hessian of the inputs alone", f"--hessian input {PLAIN}"),
    ("HGS, Kronecker Hessian", PLAIN),
    ("  + GPTQ", "--ranks uniform"),
    ("  + QRA ranks = default", ""),
    ("default, Hessian of the inputs alone", "--hessian input"),
    ("default with smoothing", "--smooth 0.5"),
    ("default, activation groups of 8", "--group-x 8"),
    ("default, merged Q(Q + BA)", "--deploy merged"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="runs/initialisation")
    parser.add_argument("--n", type=int, default=256)
    args = parser.parse_args()
    lines = ["| start | flags of `train.py --steps 0` | PSNR to fp, dB | Frechet | LoRA, MB |", "|---|---|---|---|---|"]
    for name, flags in ROWS:
        out = Path(args.out) / ("-".join(flags.replace("--", "").split()) or "default")
        if not (out / "report.json").exists():
            job = [sys.executable, "train.py", "--steps", "0", "--eval-n", str(args.n), "--out", str(out.resolve()), *flags.split()]
            subprocess.run(job, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        r = json.loads((out / "report.json").read_text())
        w = r["w4a4"]
        lines.append(f"| {name} | `{flags or '(none)'}` | {w['psnr_to_fp']:.2f} | {w['frechet']:.1f} | {r['mb_lora']:.2f} |")
        print(lines[-1], flush=True)
    machine = f"{platform.machine()} CPU, torch {torch.__version__}"
    lines.append(f"\n{args.n} pictures, 4 steps, seed 0; fp Frechet {r['fp']['frechet']:.1f}; {machine}")
    (ROOT / "benchmarks" / "initialisation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
