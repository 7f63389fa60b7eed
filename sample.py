"""Draw pictures with a packed consistency model, in 1, 2, 4 or 8 steps.

    python sample.py --checkpoint runs/tiny --prompt "a large red ring on the left, gray background" --steps 4 --out grid.png
    python sample.py --checkpoint runs/tiny --compare          rows: guided teacher (25 steps), fp consistency model, 4 bit
    python sample.py --checkpoint runs/sdxl --prompt "a house by a river" --seed 3          models with public weights
    python sample.py --checkpoint runs/sdxl --compare          rows: the 16-bit base where it fits into memory, in 25 steps (of a
                                                               run with --cm none in as many as the checkpoint), 4 bit

If the run is unfinished, the pictures are of its student after the update that was saved last, whose checkpoint is put into
RUN/unfinished.

Picture i of a call starts from the noise of seed + i, whatever the number of prompts, so a picture can be drawn again alone.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import sources
from layers import number_format, packed_layers
from models import checkpoint, encoders, pipeline, pretrained
from models.denoiser import FAST, Denoiser, as_cm, draw, draw_latents, guided_teacher, start_noise
from models.family import family_of_network
from run import files
from run.common import UserError, free_memory, process_index, run_script
from run.state import MicroBatches


def grid(rows: dict[str, torch.Tensor], scale: int = 4) -> Image.Image:
    """A row of pictures (n, 3, H, W) in [-1, 1] per entry, enlarged without smoothing, the entry's name at its left ("": none)."""
    height, width = (scale * n for n in next(iter(rows.values())).shape[2:])
    gap, left = 4, 96 if any(rows) else 0
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (left + columns * (width + gap), len(rows) * (height + gap)), "white")
    for r, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).multiline_text((6, r * (height + gap) + height // 2 - 12), name, fill="black")
        for c, picture in enumerate(sources.to_bytes(pictures)):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + c * (width + gap), r * (height + gap)))
    return sheet


def compare(student: Denoiser, network: Denoiser, prompts: list[str], steps: int, seed: int, guidance: float) -> Image.Image:
    """The rows that --compare draws, from the same noise."""
    rows = {
        "teacher\n25 steps": draw(guided_teacher(network, guidance), network, prompts, 25, seed),
        f"16-bit CM\n{steps} steps": draw(as_cm(network), network, prompts, steps, seed),
        f"{number_format(student)} CM\n{steps} steps": draw(student, student, prompts, steps, seed),
    }
    return grid(rows)


class Validation:
    """Pictures of a training, from the same noises and prompts (encoders.prompts_of): a row by a reference, one by what is trained.

    cond: of the prompts. reference: a function (x, t, s, cond) on the path of `network`, called `name`, which draws in `steps`
    steps, once. What is trained draws in the most of --sampling-steps. cfg: train.Config."""

    def __init__(self, cfg, out: Path, network: Denoiser, cond: dict[str, torch.Tensor], name: str, reference, steps: int):
        self.cfg, self.out, self.network, self.cond, self.steps = cfg, out, network, cond, files.most_steps(vars(cfg))
        self.name, self.reference = f"{name}\n{steps} steps", lambda: self.latents(reference, steps)
        self.wanted = None  # latents that the reference drew

    def latents(self, model, steps: int) -> torch.Tensor | None:
        """Of all prompts, a micro-batch at a time; None if a signal came."""
        n, drawn = len(self.cond["tokens"]), []
        x_T = start_noise(n, self.network.latent, self.cfg.seed)
        parts = MicroBatches(torch.arange(n).split(self.cfg.micro or n), finish=self.cfg.shard_teacher)
        for rows in parts:
            cond = {name: tensor[rows] for name, tensor in self.cond.items()}
            drawn.append(draw_latents(model, self.network, x_T[rows], cond, steps, device=self.cfg.device))
        return None if parts.given_up else torch.cat(drawn)

    def draw_reference(self) -> None:
        """Its latents, unless they are there: in the first process, and in all that share the reference (--shard-teacher)."""
        if self.wanted is None and (process_index() == 0 or self.cfg.shard_teacher):
            self.wanted = self.reference()

    def __call__(self, name: str, model, file: str) -> Image.Image | None:
        """Writes OUT/samples/FILE. Every process of a torchrun calls it; the first one draws with `model`, and gets the sheet. A
        signal ends it without one."""
        self.draw_reference()
        if process_index() or self.wanted is None or (drawn := self.latents(model, self.steps)) is None:
            return None
        parts = MicroBatches(torch.cat([self.wanted, drawn]).split(1))
        pictures = encoders.decode(self.cfg, self.network, parts)
        if parts.given_up:
            return None
        above, below = torch.cat(pictures).chunk(2)
        sheet = grid({self.name: above, f"{name}\n{self.steps} steps": below}, scale=4 if self.cfg.embedded else 1)
        with files.atomic(self.out / "samples" / file) as path:
            sheet.save(path, "PNG")
        return sheet


def closing_pictures(out: Path, network: Denoiser, config: dict) -> None:
    """What train.py leaves in OUT/samples: pictures of the checkpoint on disk, alone and beside those of the 16-bit `network`."""
    (student, _), prompts = checkpoint.load_checkpoint(out), encoders.prompts_of(config)
    drawn = {
        "4-steps.png": grid({"": draw(student, student, prompts, 4, config["seed"])}),
        "compare.png": compare(student, network, prompts, 4, config["seed"], config["guidance"]),
    }
    for name, image in drawn.items():
        with files.atomic(out / "samples" / name) as file:
            image.save(file, "PNG")
    print(f"pictures: {out / 'samples'}")


# ---------------------------------------------------------------------------------------------------------------------
# Public models, by diffusers' pipelines


def base_of(pipe, base: str, components: str = ""):
    """The 16-bit pipeline that `pipe` was quantized from, or None where memory lacks room for its denoiser. The scheduler is the
    base's own, or that of `pipe` where the base draws in few steps itself."""
    net = pipeline.denoiser_of(pipe)
    family = family_of_network(net)
    packed = dict(packed_layers(net))
    values = sum(layer.out * layer.taps * layer.channels for layer in packed.values())
    values += sum(t.numel() for key, t in net.state_dict().items() if key.rpartition(".")[0] not in packed)
    free = torch.cuda.mem_get_info(net.device)[0] if net.device.type == "cuda" else free_memory()
    if values * net.dtype.itemsize > 0.8 * free:
        return None
    its_own = {family.part} if pipeline.quantization_config(net).whole else {family.part, "scheduler"}
    shared = {k: v for k, v in pipe.components.items() if k not in its_own}
    twin = pipeline.read_base(family.pipeline(), base, components, torch_dtype=net.dtype, **shared).to(net.device)
    twin.default_sample_size = pipe.default_sample_size
    return twin


def main_pipeline(args: argparse.Namespace, prompts: list[str]) -> Image.Image:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = pipeline.load_pipeline(args.checkpoint, device, base=args.base)
    rows = {}
    if args.compare:
        config, family = pipeline.quantization_config(pipeline.denoiser_of(pipe)), family_of_network(pipeline.denoiser_of(pipe))
        steps, guidance = 25, family.compare_guidance
        if config.whole:
            steps, guidance = args.steps, family.few_step_guidance(config.guidance)
        twin = base_of(pipe, args.base or config.base, pipeline.components_of(Path(args.checkpoint)))
        if twin is None:
            print("the 16-bit base does not fit beside the packed model: its row is left out")
        else:
            rows[f"16-bit base\n{steps} steps"] = pipeline.draw_with_pipeline(twin, prompts, steps, args.seed, guidance)
            del twin
    name = f"{number_format(pipeline.denoiser_of(pipe))}\n{args.steps} steps" if rows else ""
    rows[name] = pipeline.draw_with_pipeline(pipe, prompts, args.steps, args.seed)
    return grid(rows, scale=1)


def main_embedded(args: argparse.Namespace, prompts: list[str]) -> Image.Image:
    student, about = checkpoint.load_checkpoint(args.checkpoint)
    config = about["config"]
    if not args.compare:
        return grid({"": draw(student, student, prompts, args.steps, args.seed)})
    network = pretrained.load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(FAST)
    return compare(student, network, prompts, args.steps, args.seed, config["guidance"])


def unfinished(folder: Path) -> Path:
    """The folder itself, or of a student's run that has not ended the checkpoint of what it saved last."""
    if (
        (folder / "model_index.json").is_file()
        or not (folder / "start.safetensors").is_file()
        or "layers" in files.read_config(folder)
    ):
        return folder
    packed, updates = checkpoint.pack_unfinished(folder)
    print(f"{folder} has not ended: this is its student after {updates} updates, packed into {packed}")
    return packed


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/tiny", help="folder that train.py or save_pretrained wrote")
    parser.add_argument("--prompt", action="append", help="caption; repeat for several (default: eight of our own, or of --data)")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4, 8), default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="grid.png")
    parser.add_argument("--compare", action="store_true", help="teacher, fp consistency model and the checkpoint in rows")
    parser.add_argument("--base", default="", help="public models: another copy of the base (hub id, folder or single file)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix.lower() not in Image.registered_extensions() or not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"cannot write {args.out}: give --out a .png name in a folder that exists")  # before anything is drawn
    folder = unfinished(Path(args.checkpoint))
    args.checkpoint = str(folder)
    real = (folder / "model_index.json").is_file() or isinstance(files.read_config(folder).get("network"), dict)
    prompts = args.prompt or (sources.PIPELINE_PROMPTS if real else sources.sample_prompts(files.read_config(folder)["config"]))
    image = (main_pipeline if real else main_embedded)(args, prompts)
    try:
        image.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out} ({error}): give --out a .png name in a folder that exists") from None
    print(f"{len(prompts)} prompts, {args.steps} steps, seed {args.seed}: {Path(args.out)}")


if __name__ == "__main__":
    run_script("sample.py", main)
