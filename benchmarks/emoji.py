"""Real pictures for the small models: some 3,700 captioned emoji of 64 pixels, as a folder that train.py --data reads.

    npm pack emoji-datasource-google                                                   74 MB; any 16.x
    python -m benchmarks.emoji --package emoji-datasource-google-16.0.0.tgz --out runs/emoji
    python train.py --stage teacher --data runs/emoji --out runs/emoji-teacher         hours on two cores

The pictures are Google's Noto emoji (Apache-2.0), their names Unicode's, the package by Cal Henderson (MIT). They are set on white.
A caption is the name in lower case, of a variation in skin tone with that tone: "waving hand sign, medium-dark skin tone".
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from run.common import UserError, run_script

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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--package", required=True, type=Path, help="the .tgz that npm pack wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the pictures and metadata.jsonl")
    args = parser.parse_args(argv)
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
