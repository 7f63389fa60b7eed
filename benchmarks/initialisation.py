"""The start before any training, per method: PSNR of 4-step W4A4 pictures to the 16-bit consistency model's.

    python -m benchmarks.initialisation [--out runs/initialisation] [--n 256] [--jobs 2]        about a minute a row on two cores

Each row is one run of `train.py --steps 0`; finished rows are not run again. Writes docs/tables/initialisation.md.
"""

import json

from benchmarks.jobs import MACHINE, each, name_of, parser
from benchmarks.tables import write_table

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
    args = parser(__doc__, "runs/initialisation", 256).parse_args()

    def measure(row, call) -> dict:
        name, flags = row
        out = args.out / name_of(flags)
        if not (out / "report.json").exists():
            call("train.py", "--steps", "0", "--eval-n", str(args.n), "--out", str(out), *flags.split())
        report = json.loads((out / "report.json").read_text())
        report["student"] = report.get("w4a8") or report["w4a4"]
        print(name, report["student"], flush=True)
        return report

    lines = ["| start | flags of `train.py --steps 0` | PSNR to fp, dB | Frechet | LoRA, MB |", "|---|---|---|---|---|"]
    for (name, flags), r in zip(ROWS, each(measure, ROWS, args.jobs), strict=True):
        w = r["student"]
        lines.append(f"| {name} | `{flags or '(none)'}` | {w['psnr_to_fp']:.2f} | {w['frechet']:.1f} | {r['mb_lora']:.2f} |")
    lines.append(f"\n{args.n} pictures, 4 steps, seed 0; fp Frechet {r['fp']['frechet']:.1f}; {MACHINE}")
    write_table("initialisation", lines)


if __name__ == "__main__":
    main()
