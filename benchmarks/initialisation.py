"""The start before any training, per method and budget: PSNR of 4-step W4A4 pictures to the 16-bit consistency model's.

    python -m benchmarks.initialisation [--models tiny tiny-flux] [--n 256] [--jobs 2]         one to two minutes a row on two cores

Each cell is one run of `train.py --steps 0`; finished ones are not run again. Writes docs/tables/initialisation.md: for each model
PSNR in dB and, in brackets, the Frechet distance as a multiple of the 16-bit model's.
"""

import json

from benchmarks.jobs import MACHINE, each, name_of, parser
from benchmarks.tables import markdown, write_table

PLAIN = "--ranks uniform --rounding rtn"
ROWS = [  # name, flags
    ("zero (QLoRA)", f"--init zero {PLAIN}"),
    ("PiSSA", f"--init pissa {PLAIN}"),
    ("LoftQ", f"--init loftq {PLAIN}"),
    ("QERA", f"--init qera {PLAIN}"),
    ("SVDQuant style: smoothed, SVD", f"--init svdquant --smooth 0.5 --no-rotate {PLAIN}"),
    ("principal part, no alternation", f"--init principal {PLAIN}"),
    ("HGS, Hessian of the inputs alone", f"--hessian input {PLAIN}"),
    ("HGS, Kronecker Hessian", PLAIN),
    ("  + GPTQ", "--ranks uniform"),
    ("  + QRA ranks", "--no-centre"),
    ("default", ""),
    ("default, activations not rotated", "--no-rotate"),
    ("default, neither rotated nor centred", "--no-rotate --no-centre"),
    ("default, both rotated and centred", "--centre"),
    ("default, activation groups of 8", "--group-x 8"),
    ("default, Hessian of the inputs alone", "--hessian input"),
    ("default, merged Q(Q + BA)", "--deploy merged"),
    ("1% of the parameters", "--rank 1"),
    ("4% of the parameters", "--rank 4"),
    ("16 ranks", "--rank 16"),
]


def main() -> None:
    cli = parser(__doc__, "runs/initialisation", 256)
    cli.add_argument("--models", nargs="+", default=["tiny", "tiny-flux"])
    args = cli.parse_args()
    cells = [(model, flags) for _, flags in ROWS for model in args.models]

    def measure(cell, call) -> dict:
        model, flags = cell
        out = args.out / model / name_of(flags)
        if not (out / "report.json").exists():
            call("train.py", "--model", model, "--steps", "0", "--eval-n", str(args.n), "--out", str(out), *flags.split())
        report = json.loads((out / "report.json").read_text())
        print(*cell, report["w4a4"], flush=True)
        return report

    reports = dict(zip(cells, each(measure, cells, args.jobs), strict=True))

    def shown(report: dict) -> str:
        return f"{report['w4a4']['psnr_to_fp']:.2f} ({report['w4a4']['frechet'] / report['fp']['frechet']:.3f})"

    rows = [[name, f"`{flags or '(none)'}`", *(shown(reports[model, flags]) for model in args.models)] for name, flags in ROWS]
    lines = markdown(["start", "flags of `train.py --steps 0`", *args.models], *rows)
    fp = ", ".join(f"{model} {reports[model, '']['fp']['frechet']:.1f}" for model in args.models)
    lines.append(f"\n{args.n} pictures, 4 steps, seed 0; Frechet distance of the 16-bit model: {fp}; {MACHINE}")
    write_table("initialisation", lines)


if __name__ == "__main__":
    main()
