"""The start before any training, per method and budget: PSNR of 4-step pictures to the 16-bit consistency model's.

    python -m benchmarks.initialisation [--models tiny tiny-flux] [--n 256] [--jobs 2]     one to two minutes a cell on two cores

Each cell is one run of `train.py --steps 0`; finished ones are not run again. docs/tables/initialisation.md is written anew after
every cell: for each model, as it is and with outlier channels (`--outliers`), PSNR in dB and in brackets the Frechet distance as a
multiple of the 16-bit model's.
"""

import json

from benchmarks.jobs import MACHINE, SVDQUANT, each, name_of, parser
from benchmarks.tables import markdown, write_table

BARE = "--smooth 0 --no-rotate --no-centre --group-x 16"  # activations as they are, in groups of 16
PLAIN = f"--ranks uniform --rounding rtn {BARE}"
ROWS = {  # name: flags
    "default": "",
    "not smoothed": "--smooth 0",
    "one exponent for all": "--smooth 0.5",
    "not rotated": "--no-rotate",
    "groups of 16": "--group-x 16",
    "centred": "--centre",
    "not centred": "--no-centre",
    "16 inputs in 8 bits": "--inputs-8bit 16",
    "all inputs in 8 bits (W4A8)": "--bits-x 8",
    "SVDQuant style: smoothed, SVD": f"{SVDQUANT} --group-x 16",
    "uniform ranks": "--ranks uniform",
    "ranks by the spectrum alone": "--ranks spectrum",
    "layers may stay in 16 bits": "--keep-16bit",
    "Hessian of the inputs alone": "--hessian input",
    "no branch at all": "--rank 0 --rank-least 0",
    "0.7 ranks": "--rank 0.7 --rank-least 0",
    "4 ranks": "--rank 4",
    "16 ranks": "--rank 16",
    "merged Q(Q + BA)": "--deploy merged",
    "W4A8, uniform ranks": "--bits-x 8 --ranks uniform",
    "zero (QLoRA), activations as they are": f"--init zero {PLAIN}",
    "PiSSA": f"--init pissa {PLAIN}",
    "LoftQ": f"--init loftq {PLAIN}",
    "QERA": f"--init qera {PLAIN}",
    "HGS, Hessian of the inputs alone": f"--hessian input {PLAIN}",
    "HGS, Kronecker Hessian": PLAIN,
    "  + GPTQ": f"--ranks uniform {BARE}",
    "  + QRA ranks": BARE,
}
TESTBEDS = {"": "", ", outliers": "--outliers"}


def main() -> None:
    cli = parser(__doc__, "runs/initialisation", 256)
    cli.add_argument("--models", nargs="+", default=["tiny", "tiny-flux"])
    cli.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), help="rows")
    args = cli.parse_args()
    columns = [(model, testbed) for model in args.models for testbed in TESTBEDS]

    def report_of(row: str, column: tuple[str, str]):
        """The run's folder and what its report says, {} before it is there."""
        model, testbed = column
        out = args.out / model / name_of(f"{TESTBEDS[testbed]} {ROWS[row]}")
        return out, json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}

    def measure(cell, call):
        (row, (model, testbed)), (out, report) = cell, report_of(*cell)
        if not report:
            flags = ("--model", model, "--steps", "0", "--eval-n", str(args.n), "--out", str(out))
            call("train.py", *flags, *f"{TESTBEDS[testbed]} {ROWS[row]}".split())
        return cell

    def shown(row: str, column: tuple[str, str]) -> str:
        report = report_of(row, column)[1]
        if not report:
            return "-"
        ours = next(report[name] for name in ("w4a4", "w4a8", "w4a4/8") if name in report)
        return f"{ours['psnr_to_fp']:.2f} ({ours['frechet'] / report['fp']['frechet']:.3f})"

    for cell in each(measure, [(row, column) for row in args.only for column in columns], args.jobs):
        print(*cell, shown(*cell), flush=True)
        rows = [[row, f"`{flags or '(none)'}`", *(shown(row, column) for column in columns)] for row, flags in ROWS.items()]
        rows = [row for row in rows if {*row[2:]} != {"-"}]
        lines = markdown(["start", "flags of `train.py --steps 0`", *("".join(column) for column in columns)], *rows)
        note = f"\n{args.n} pictures, 4 steps, seed 0; {MACHINE}"
        write_table("initialisation", [*lines, note], show=False)


if __name__ == "__main__":
    main()
