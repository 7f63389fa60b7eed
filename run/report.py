"""One page about a run, report.html: pictures, scores with intervals, losses by objective, layers, configuration. It needs no other
file, shows what the run folder has, and says which command adds what is missing.

    config.json, report.json, seconds.json, metrics.jsonl    from train.py, which also draws its losses, in losses.png
    evaluation*/scores*.json    from evaluate.py; for models with public weights also its numbered pictures

The text of the page is the template assets/report.html.
"""

import base64
import contextlib
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

import quant
from run import files
from run.common import UserError

COLUMNS = ("name", "kind", "inputs", "outputs", "rank", "bits of inputs", "error, %", "time, %")  # of the table of layers
WORDS = ("name", "kind")  # columns that are no numbers
SHOWN, SIDE = 8, 384  # pictures of a row, and their largest side in pixels
BITS = {"w4a4": "4", "w4a16": "16", "16bit": "16"}  # of a layer's inputs
FIGURES = {  # of report.json: what the page says
    "mb": ("network, MB", "{:.2f}"),
    "mb_bf16": ("the same in bf16, MB", "{:.2f}"),
    "memory_ratio": ("memory ratio", "{:.3f}"),
    "bits_per_weight": ("bits per weight of the packed layers, without branches", "{:.3f}"),
    "w4a4_parameters": ("parameters in W4A4 layers", "{:.1%}"),
    "w4a4_products": ("products of linear and convolution layers in W4A4", "{:.1%}"),
    "w4a8_parameters": ("parameters in W4A8 layers", "{:.1%}"),
    "w4a8_products": ("products of linear and convolution layers in W4A8", "{:.1%}"),
    "branch_parameters": ("parameters that branches add", "{:.2%}"),
    "layers_without_branch": ("packed layers without a branch", "{:.0%}"),
    "latent_snr_to_fp": ("signal to error of latents to the 16-bit model, dB", "{:.2f}"),
}


MEANINGS = {  # metrics of the small models
    "frechet": "distance between the features of these pictures and of real ones; lower is better",
    "prompt_accuracy": "share of pictures in which a classifier reads everything that the prompt says; higher is better",
    "psnr_to_fp": "PSNR in dB to the 16-bit consistency model's picture from the same noise; higher is closer",
}


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows, a model a row, a prompt a column."""

    caption: str
    prompts: list[str]
    rows: dict[str, list[Image.Image]]


def _data(picture: Image.Image) -> str:
    """A picture as the text of a link, at most SIDE pixels wide and high."""
    picture, file = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_scores(run: Path) -> dict[Path, dict]:
    """What evaluate.py found about the run's present weights, by its files. UserError for a damaged one."""
    found, weights = {}, files.recorded_checksum(run / "model.safetensors")
    for path in sorted(run.glob("evaluation*/scores*.json")):
        try:
            scored = json.loads(path.read_text())
            scored["scores"], scored["versus"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be read: delete it, and run evaluate.py again") from None
        if scored.get("weights") == weights:
            found[path] = scored
        else:
            print(f"{path} is of other weights of this run, and is left out: run evaluate.py again")
    return found


def score_table(found: dict) -> dict:
    """Rows of text for one scores.json: values, and below those of a compared row the difference with its interval."""
    metrics = list(dict.fromkeys(name for row in found["scores"].values() for name in row if name != "steps"))
    rows = []
    for name, values in found["scores"].items():
        steps = f", {values['steps']} steps" if "steps" in values else ""
        rows.append((name + steps, [f"{values[metric]:.3f}" if metric in values else "" for metric in metrics]))
        if versus := found["versus"].get(name, {}):
            cells = []
            for metric in metrics:
                value, low, high = versus.get(metric, (0.0, 0.0, 0.0))
                shown = "" if metric in found["to_reference"] else f"{value:+.3f} "
                cells.append(f"{shown}[{low:.3f}, {high:.3f}]" if metric in versus else "")
            rows.append((f"difference to {found['reference']}, 95% interval", cells))
    about = (
        f"{found['n']} prompts, {found['steps']} steps, seed {found['seed']}. {found['reference']} is the 16-bit consistency model."
    )
    if found["to_reference"]:
        about += f" Compared with its pictures: {', '.join(found['to_reference'])}."
    about = " ".join([about, *(f"{metric}: {MEANINGS[metric]}." for metric in metrics if metric in MEANINGS)])
    return {"about": about, "metrics": metrics, "rows": rows}


def of_closing_lines(closing: dict) -> dict:
    """The scores of report.json in the form of evaluate.py's, without intervals; the closing lines' seed is always this one."""
    rows = {name: row for name, row in closing.items() if isinstance(row, dict)}
    about = {"n": closing["n"], "steps": closing["steps"], "seed": 4321}
    return about | {"reference": "fp", "to_reference": [], "scores": rows, "versus": {}}


def objective_of(row: dict) -> str:
    """What the loss of an update is of: "tdpt", "rollout, 4 jumps", whose loss is another than that of one jump."""
    return row.get("objective", "loss") + (f", {row['jumps']} jumps" if row.get("jumps", 1) > 1 else "")


def curves_by_objective(metrics: list[dict]) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """{objective: (updates, losses, running means of the losses)}; the mean is over a tenth of the objective's updates."""
    found = {}
    for objective in sorted({objective_of(row) for row in metrics}):
        rows = [row for row in metrics if objective_of(row) == objective]
        losses, width = [row["loss"] for row in rows], max(1, len(rows) // 10)
        means = [sum(losses[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(losses))]
        found[objective] = [row["step"] for row in rows], losses, means
    return found


def draw_curves(metrics: list[dict], file, **options) -> None:
    """The losses of some updates as a picture, to a file or path; options: of matplotlib's savefig."""
    from matplotlib import rc_context  # takes half a second
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cmquant"}):
        figure = Figure((9, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for k, (objective, (steps, losses, means)) in enumerate(curves_by_objective(metrics).items()):
            axes.plot(steps, losses, "o", color=f"C{k}", alpha=0.4, markersize=2.5)
            axes.plot(steps, means, color=f"C{k}", label=objective)
        axes.set(xlabel="update", ylabel="loss", yscale="log" if min(row["loss"] for row in metrics) > 0 else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, **options)


def curves_of_page(metrics: list[dict]) -> str:
    """The losses as an SVG picture, whose text and axes have the colour of the page; "" without updates."""
    if not metrics:
        return ""
    file, unsaid = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    draw_curves(metrics, file, format="svg", transparent=True, metadata=unsaid)
    return file.getvalue()[file.getvalue().index("<svg") :].replace("#000000", "currentColor")


def summary_writer() -> type:
    """TensorBoard's class. UserError without its package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--report-to tensorboard needs one more package: pip install tensorboard") from None
    return SummaryWriter


class Board:
    """What is to be seen of a training while it goes on: OUT/losses.png, drawn anew now and then, and, if that is asked for,
    TensorBoard's files in OUT/tensorboard, where lines that an earlier process wrote of updates from `step` on are hidden.

    UserError without TensorBoard's package, or where its files cannot be written."""

    SECONDS = 30  # between two pictures of the losses

    def __init__(self, out: Path, step: int, tensorboard: bool):
        self.path, self.drawn, self.writer = out / "losses.png", time.monotonic(), None
        if tensorboard:
            with self.writing():
                self.writer = summary_writer()(out / "tensorboard", purge_step=step)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            where = f"cannot write {self.path.parent / 'tensorboard'} ({error.strerror})"
            raise UserError(f"{where}: free some space, or leave out --report-to, and run the same command again") from None

    def add(self, rows: list[dict]) -> None:
        """All lines of metrics.jsonl, of which the last one is new: scalars, the loss by its objective."""
        if self.writer:
            row = rows[-1]
            scalars = {name: value for name, value in row.items() if name not in ("step", "objective", "jumps", "loss")}
            with self.writing():
                for name, value in (scalars | {f"loss/{objective_of(row)}": row["loss"]}).items():
                    self.writer.add_scalar(name, value, row["step"])
        if time.monotonic() - self.drawn > self.SECONDS:
            self.draw(rows)

    def add_pictures(self, sheet: Image.Image, step: int) -> None:
        if self.writer:
            with self.writing():
                self.writer.add_image("pictures", np.asarray(sheet), step, dataformats="HWC")

    def draw(self, rows: list[dict]) -> None:
        """The losses, and TensorBoard's files as far as they have come."""
        if self.writer:
            with self.writing():
                self.writer.flush()
        if rows:
            with files.atomic(self.path) as file:
                draw_curves(rows, file, format="png", dpi=150)
        self.drawn = time.monotonic()


def layer_rows(layers: dict[str, dict], seconds: dict[str, float]) -> list[list[str]]:
    """COLUMNS of each layer; layers: the table of config.json."""
    total, rows = sum(seconds.values()), []
    for name in dict.fromkeys([*layers, *seconds]):
        layer = layers.get(name, {"kind": "16bit", "shape": ("", ""), "rank": 0})
        bits = "8" if layer["kind"] == "w4a4" and layer["group_x"] == quant.EIGHT_BITS else BITS[layer["kind"]]
        error = f"{100 * layer['error']:.4f}" if "error" in layer else ""
        time = f"{100 * seconds[name] / total:.2f}" if name in seconds else ""
        rows.append([name, layer["kind"], *map(str, reversed(layer["shape"])), str(layer["rank"]), bits, error, time])
    return rows


def page(run: Path, scores: list[dict], sheets: list[Sheet], notes: list[str]) -> str:
    """The page as HTML. scores: what read_scores found; sheets: pictures; notes: sentences before them. UserError for an unfinished
    or damaged run."""
    about = files.read_finished(run)
    try:
        closing = json.loads((run / "report.json").read_text())
        seconds = json.loads((run / "seconds.json").read_text()) if (run / "seconds.json").exists() else {}  # of older runs
        closing["memory_ratio"] = closing["mb"] / closing["mb_bf16"]
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} lacks a file or has a damaged one ({error}): run its train.py command again") from None
    config = about["config"]
    tables = [table for table in map(score_table, scores or [of_closing_lines(closing)]) if table["rows"]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((files.ASSETS / "report.html").read_text())
    largest = max((max(picture.size) for sheet in sheets for row in sheet.rows.values() for picture in row), default=0)
    return template.render(
        title=f"{config['model']}: {run.resolve().name}",
        about=f"{len(metrics)} updates, seed {config['seed']}, torch {about['torch']}, commit {about['commit'] or 'unknown'}.",
        figures=[(name, form.format(closing[key])) for key, (name, form) in FIGURES.items() if key in closing],
        notes=notes,
        sheets=[
            {"caption": s.caption, "prompts": s.prompts, "rows": {name: list(map(_data, row)) for name, row in s.rows.items()}}
            for s in sheets
        ],
        pixelated=largest <= 96,
        scores=tables,
        evaluate="" if scores else f"python evaluate.py --checkpoint {run}",
        curves=curves_of_page(metrics),
        columns=[(name, name not in WORDS) for name in COLUMNS],
        layers=layer_rows(about["layers"], seconds),
        timed=bool(seconds),
        config=list(config.items()),
    )
