"""Draw pictures with a packed consistency model, in 1, 2, 4 or 8 steps.

    python sample.py --checkpoint runs/tiny --prompt "a large red ring on the left, gray background" --steps 4 --out grid.png
    python sample.py --checkpoint runs/tiny --compare          rows: guided teacher (25 steps), fp consistency model, 4 bit

Picture i of a call starts from the noise of seed + i, whatever the number of prompts, so a picture can be drawn again alone.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import checkpoint
import data
import models
import tdpt
from models import UserError

PROMPTS = (
    "a large red ring on the left, gray background",
    "a small blue square on the left and a large striped yellow circle on the right, black background",
    "a large dotted green circle on the top and a small white triangle on the bottom, wavy tan background",
    "a large purple cross on the center, wavy gray background",
    "a large striped red square on the right and a large blue triangle on the left, grainy gray background",
    "a small yellow ring on the top, grainy tan background",
    "a large white circle on the bottom and a small red cross on the top, gray background",
    "a large striped green triangle on the center, black background",
)


def start_noise(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """(n, *shape) ~ N(0, 1); row i depends on seed + i alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])


@torch.no_grad()
def draw(model, denoiser: models.Denoiser, captions: list[str], steps: int, seed: int = 0, batch: int = 64) -> torch.Tensor:
    """Pictures (n, 3, 32, 32) in [-1, 1] by `steps` jumps of `model`, a function of (x, t, s, cond) on denoiser's path."""
    pictures = []
    for i in range(0, len(captions), batch):
        part = captions[i : i + batch]
        x_T = start_noise(len(part), denoiser.latent, seed + i)
        pictures.append(models.to_pictures(tdpt.sample(model, denoiser.path, x_T, denoiser.encode(part), steps)))
    return torch.cat(pictures)


def guided_teacher(network: models.Denoiser, guidance: float):
    """The teacher inside `network` under classifier-free guidance."""
    return tdpt.guided(models.as_teacher(network), guidance, network.encode([data.UNCONDITIONAL]))


def grid(rows: dict[str, torch.Tensor], scale: int = 4) -> Image.Image:
    """One row of pictures per entry, enlarged without smoothing, the entry's name at its left ("" : no names)."""
    side, gap, left = models.SIDE * scale, 4, 96 if any(rows) else 0
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (left + columns * (side + gap), len(rows) * (side + gap)), "white")
    for r, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).multiline_text((6, r * (side + gap) + side // 2 - 12), name, fill="black")
        for c, picture in enumerate(((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + c * (side + gap), r * (side + gap)))
    return sheet


def compare(student: models.Denoiser, network: models.Denoiser, prompts, steps: int, seed: int, guidance: float) -> Image.Image:
    """The rows that --compare draws, from the same noise."""
    prompts = list(prompts)
    rows = {
        "teacher\n25 steps": draw(guided_teacher(network, guidance), network, prompts, 25, seed),
        f"16-bit CM\n{steps} steps": draw(models.as_cm(network), network, prompts, steps, seed),
        f"W4A4 CM\n{steps} steps": draw(student, student, prompts, steps, seed),
    }
    return grid(rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "sample.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/tiny", help="folder that train.py wrote")
    parser.add_argument("--prompt", action="append", help="caption; repeat for several (default: eight of our own)")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4, 8), default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="grid.png")
    parser.add_argument("--compare", action="store_true", help="teacher, fp consistency model and the checkpoint in rows")
    args = parser.parse_args(argv)
    student, about = checkpoint.load_checkpoint(args.checkpoint)
    config, prompts = about["config"], args.prompt or PROMPTS
    if args.compare:
        network = models.load_cm(config["model"], config["teacher"], config["cm"]).to(models.FAST)
        image = compare(student, network, prompts, args.steps, args.seed, config["guidance"])
    else:
        image = grid({"": draw(student, student, list(prompts), args.steps, args.seed)})
    try:
        image.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out} ({error}): give --out a .png name in a folder that exists") from None
    print(f"{len(prompts)} prompts, {args.steps} steps, seed {args.seed}: {Path(args.out)}")


if __name__ == "__main__":
    models.run_script("sample.py", main)
