"""Where a user's own captioned pictures come from.

The tiny models read theirs live, 32x32 (`Folder`, which has the functions of scenes.Scenes: batch(n, gen) -> pictures
(n, 3, 32, 32) in [-1, 1] and n captions, and captions(n, gen)).

SDXL and FLUX read pictures of any size, once, into a cache (cache.py). `captioned(SPEC)` finds out what --data names:

    FOLDER             pictures with metadata.jsonl (lines {"file_name": .., "text": ..}) or NAME.txt beside NAME.png; sub-folders
    FOLDER, "X-*.tar"  WebDataset shards: KEY.jpg with KEY.txt, or KEY.json that has "caption" or "text", adjacent
    OWNER/NAME[@REV]   a dataset of the Hugging Face hub, streamed; also a folder that `datasets` saved or can read, or a .parquet
    prompts, FILE.txt  captions alone, ours (assets/prompts.txt) or one a line: the consistency model draws the latents

Left out on purpose: filters for size and content, captioning, brace expansion of shard names.
"""

import glob
import hashlib
import io
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data import scenes
from run import files
from run.common import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (  # what PIL raises; the last three for EXIF that is none
    OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError, TypeError, AttributeError, LookupError,
)  # fmt: skip


def rgb(picture: Image.Image) -> Image.Image:
    """Upright, in RGB; reads the pixels. ValueError for 16 and 32 bits a pixel, which convert would clip at 255."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"mode {picture.mode} is no picture of 8 bits: convert it")
    return ImageOps.exif_transpose(picture).convert("RGB")


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """The RGB picture of a file. Raises one of UNREADABLE."""
    with Image.open(file) as picture:
        return rgb(picture)


def report_skipped(skipped: list[str]) -> None:
    """Names the first pictures that could not be read, and counts them."""
    for line in skipped[:5]:
        print(f"skipped unreadable picture {line}".encode(errors="replace").decode())  # names that are no UTF-8
    if len(skipped) > 5:
        print(f"skipped {len(skipped)} unreadable pictures in all")


def captioned_files(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder and its sub-folders, with captions that are not blank. UserError: a bad line, no captions at all.

    Side files are looked at where no metadata.jsonl names a picture."""
    pairs = []
    for table in sorted(folder.rglob("metadata.jsonl")):
        for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pairs.append((table.parent / row["file_name"], row["text"]))
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f'{table} line {number}: every line must be {{"file_name": .., "text": ..}}') from None
    for file in sorted(folder.rglob("*")) if not pairs else ():
        if file.suffix.lower() in PICTURES and file.with_suffix(".txt").is_file():
            pairs.append((file, file.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").strip()))
    pairs = [(file, text) for file, text in pairs if isinstance(text, str) and text.strip()]
    if not pairs:
        raise UserError(f"{folder} has no captions: add metadata.jsonl (file_name, text) or NAME.txt beside each picture")
    return pairs


class Folder:
    """Captioned pictures of a folder (`captioned_files`) for the tiny models.

    Pictures are centre-cropped to a square, resized to 32x32 and kept in memory. One that cannot be read is named, counted and
    left out. UserError: no such folder, no captions, no readable picture.
    """

    def __init__(self, path: str):
        folder, self.skipped = Path(path), []
        if not folder.is_dir():
            raise UserError(f"--data {path} is not a folder: give a folder of pictures with metadata.jsonl or .txt captions")
        pictures, self.texts = [], []
        for file, text in captioned_files(folder):
            try:
                pictures.append(self._square(open_picture(file)))
            except UNREADABLE as error:
                self.skipped.append(f"{file.name}: {error}")
            else:
                self.texts.append(text)
        report_skipped(self.skipped)
        if not pictures:
            raise UserError(f"no picture in {path} could be read ({len(self.skipped)} tried): check the files")
        self.pictures = torch.stack(pictures)

    @staticmethod
    def _square(picture: Image.Image) -> torch.Tensor:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((scenes.SIDE, scenes.SIDE), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1

    def batch(self, n: int, gen: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """n pictures, drawn with replacement, and their captions."""
        pick = torch.randint(len(self.texts), (n,), generator=gen)
        return self.pictures[pick], [self.texts[i] for i in pick]

    def captions(self, n: int, gen: torch.Generator) -> list[str]:
        return self.batch(n, gen)[1]


def source(path: str = "") -> scenes.Scenes | Folder:
    """--data of the tiny models: the procedural scenes, or a folder."""
    return Folder(path) if path else scenes.Scenes()


class LiveExamples:
    """Examples of a tiny model, drawn and encoded when they are asked for; cache.Cache has the same three functions.

    Every rank draws the whole batch of n from `gen` and keeps `mine` of it. cond: dict of tensors, batch first.
    """

    def __init__(self, source: scenes.Scenes | Folder, network):
        self.source, self.network = source, network

    def latents(self, n: int, gen: torch.Generator, mine: slice = slice(None)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents (m, C, H, W) float32 of pictures, and their captions' cond."""
        pictures, captions = self.source.batch(n, gen)
        return self.network.encode_pictures(pictures)[mine], self.network.encode(captions[mine])

    def conditions(self, n: int, gen: torch.Generator, mine: slice = slice(None)) -> dict[str, torch.Tensor]:
        """cond of captions alone."""
        return self.network.encode(self.source.captions(n, gen)[mine])

    def null(self) -> dict[str, torch.Tensor]:
        """cond of the unconditional branch, batch 1."""
        return self.network.encode([scenes.UNCONDITIONAL])


@dataclass(frozen=True)
class Source:
    """What --data names. rows() -> iterator of (key, caption, open), every time from the beginning and in the same order.

    open() is the RGB picture or raises one of UNREADABLE, and must be called before the next row is asked for; it is None for a
    prompt alone. So rows that are not needed cost no decoding. `fingerprint` changes when the data do.
    """

    spec: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, str, Callable | None]]]

    def __iter__(self) -> Iterator[tuple[str, str, Image.Image | None]]:
        """(key, caption, RGB picture or None); unreadable pictures are left out, and named and counted at the end."""
        skipped = []
        for key, caption, opened in self.rows():
            try:
                picture = None if opened is None else opened()
            except UNREADABLE as error:
                skipped.append(f"{key}: {error}")
            else:
                yield key, caption, picture
        report_skipped(skipped)


def captioned(spec: str = "") -> Source:
    """The source that --data names (module docstring); "" is our prompts. UserError: there is nothing of the kind."""
    path = Path(spec)
    if spec in ("", "prompts"):
        return _prompts("prompts", files.ASSETS / "prompts.txt")
    if path.suffix == ".txt":
        return _prompts(spec, path)
    if (path.suffix == ".tar" or glob.has_magic(spec)) and not path.is_dir():
        return _tars(spec, [path] if path.is_file() else sorted(map(Path, glob.glob(spec, recursive=True))))
    if path.is_dir():
        if tars := sorted(path.rglob("*.tar")):
            return _tars(spec, tars)
        saved = ("state.json", "dataset_dict.json", "metadata.csv", "*.parquet", "*/metadata.csv", "*/*.parquet")
        return _hub(spec) if any(any(path.glob(name)) for name in saved) else _folder(spec)
    if (path.suffix == ".parquet" and path.is_file()) or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", spec):
        return _hub(spec)
    raise UserError(
        f"--data {spec} is no folder, .tar shards, .txt file of prompts or Hugging Face dataset OWNER/NAME: check the path"
    )


def _hash(parts) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def _stat(file: Path, folder: Path) -> list:
    """Name inside the folder, size and time of the last change."""
    about = file.stat() if file.exists() else None
    return [os.path.relpath(file, folder), about and about.st_size, about and about.st_mtime_ns]


def _broken(why: str):
    raise OSError(why)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. UserError: no such file, not text, no line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): give a UTF-8 file with a prompt in every line") from None
    if not lines:
        raise UserError(f"{path} holds no prompt: write one in every line")
    return lines


def _prompts(spec: str, path: Path) -> Source:
    lines = read_prompts(path)
    return Source(spec, _hash(lines), lambda: ((str(i), line, None) for i, line in enumerate(lines)))


def _folder(spec: str) -> Source:
    folder, pairs = Path(spec), captioned_files(Path(spec))

    def rows():
        for file, text in pairs:
            yield os.path.relpath(file, folder), text, partial(open_picture, file)

    return Source(spec, _hash([*_stat(file, folder), text] for file, text in pairs), rows)


def _tars(spec: str, tars: list[Path]) -> Source:
    """WebDataset shards. A key is a member's path up to the first dot of its name."""
    if not tars or not all(tar.is_file() for tar in tars):
        raise UserError(f"--data {spec} matches no .tar file: check the path (no brace expansion, quote a glob)")

    def key_of(member: tarfile.TarInfo) -> str:
        folder, name = os.path.split(member.name)
        return os.path.join(folder, name.split(".")[0])

    def members(tar: tarfile.TarFile):
        for member in tar:
            tar.members = []  # tarfile would keep the headers of all
            if member.isfile():
                yield member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a cut or broken header for the end
            raise tarfile.ReadError("no end of archive")

    def row(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]):
        picture, caption = next((parts[e] for e in PICTURES if e in parts), None), None
        try:
            if ".txt" in parts:
                caption = tar.extractfile(parts[".txt"]).read().decode(errors="replace").strip()
            elif ".json" in parts:
                about = json.loads(tar.extractfile(parts[".json"]).read())
                caption = about.get("caption") or about.get("text")
        except (ValueError, AttributeError):
            pass  # a .json that is none: the picture has no caption
        if not isinstance(caption, str) or not caption or picture is None:
            return key, "", partial(_broken, "no caption" if picture else "no picture")
        return key, caption, lambda: open_picture(io.BytesIO(tar.extractfile(picture).read()))

    def rows():
        for path in tars:
            try:
                with tarfile.open(path, "r:") as tar:
                    for key, group in groupby(members(tar), key_of):
                        yield row(tar, f"{path.name}/{key}", {os.path.splitext(m.name)[1].lower(): m for m in group})
            except (tarfile.TarError, OSError) as error:
                yield path.name, "", partial(_broken, f"the rest of the shard is damaged ({error})")

    return Source(spec, _hash(_stat(tar, tars[0].parent) for tar in tars), rows)


def _hub(spec: str) -> Source:
    """A dataset that the `datasets` library reads: of the hub, saved by it, or in a layout it knows. Split train, or the first.

    Caption: column text, caption or prompt; a list's first. UserError: no library, no such dataset, no such column."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {spec} is read by another library: `pip install datasets`") from None
    name, _, revision = spec.partition("@")
    path, mark = Path(spec), None
    try:
        if path.is_dir():
            mark = [_stat(file, path) for file in sorted(path.rglob("*")) if file.is_file()]
            saved = any((path / part).exists() for part in ("state.json", "dataset_dict.json"))
            table = datasets.load_from_disk(spec) if saved else datasets.load_dataset(spec, streaming=True)
        elif path.is_file():
            mark, table = [_stat(path, path.parent)], datasets.load_dataset("parquet", data_files=spec, streaming=True)
        else:
            from huggingface_hub import dataset_info

            mark = [dataset_info(name, revision=revision or None).sha]
            table = datasets.load_dataset(name, revision=mark[0], streaming=True)
    except Exception as error:  # without network, without rights, for a wrong name: the libraries' errors have no common class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data {spec} is not here and cannot be had from the Hugging Face hub ({why}): check the name and the network, "
            "accept its terms and `hf auth login` if it is gated, or give a folder"
        ) from None
    if isinstance(table, dict):
        table = table["train" if "train" in table else next(iter(table))]
    columns = table.features or next(iter(table), {})
    text = next((c for c in ("text", "caption", "prompt") if c in columns), None)
    image = next((c for c, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    if text is None:
        raise UserError(
            f"--data {spec} has no column text, caption or prompt but {', '.join(columns)}: rename the captions' column"
        )
    if image is not None:
        table = table.cast_column(image, datasets.Image(decode=False))

    def rows():
        try:
            for i, values in enumerate(table):
                caption = values[text][0] if isinstance(values[text], list) and values[text] else values[text]
                picture = values[image] if image else None
                if not isinstance(caption, str) or not caption.strip() or (image and picture is None):
                    yield str(i), "", partial(_broken, "no caption" if picture else "no picture")
                else:
                    yield str(i), caption, picture and (lambda p=picture: rgb(datasets.Image().decode_example(p)))
        except OSError as error:
            raise UserError(f"--data {spec} broke off ({error}): run the same command again to go on") from None

    return Source(spec, _hash(mark), rows)
