"""Where a user's own captioned pictures come from.

The embedded models keep theirs in memory, at 32x32 or 64x64 pixels: `source(SPEC, side)` is a `Folder`, or, without SPEC, the
procedural scenes. Both have batch(n, gen) -> pictures (n, 3, side, side) in [-1, 1] with n captions, and captions(n, gen).

Models with public weights read pictures of any size, once, into a cache (data/cache.py). `captioned(SPEC)` finds out what
--data names:

    FOLDER             pictures with metadata.jsonl (lines {"file_name": .., "text": ..}) or NAME.txt beside NAME.png; sub-folders
    FOLDER, "X-*.tar"  WebDataset shards: KEY.jpg with KEY.txt, or KEY.json that has "caption" or "text", adjacent
    OWNER/NAME[@REV]   a dataset of the Hugging Face hub, streamed; also a folder that `datasets` saved or can read, or a .parquet
    prompts, FILE.txt  captions alone, ours (assets/prompts.txt) or one a line: the consistency model draws the latents

Folders and shards have readers of our own, since nothing may be lost silently in a night of encoding. The imagefolder reader of
`datasets` ignores NAME.txt and ends at the first absent picture or bad line; its webdataset reader refuses shards whose samples
differ in their kinds of files; it and the library webdataset take a shard that was cut in a header for a whole one.

Left out on purpose: filters for size and content, captioning, brace expansion of shard names.
"""

import glob
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

import huggingface_hub
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data import scenes
from run import files
from run.common import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (  # what PIL raises; the last three for EXIF that is none
    OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError, TypeError, AttributeError, LookupError,
)  # fmt: skip


def rgb(picture: Image.Image) -> Image.Image:
    """The picture upright and in RGB, its pixels read. ValueError for 16 and 32 bits a pixel, which convert would clip at 255."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"mode {picture.mode} is no picture of 8 bits: convert it")
    return ImageOps.exif_transpose(picture).convert("RGB")


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """The RGB picture of a file. Raises one of UNREADABLE."""
    with Image.open(file) as picture:
        return rgb(picture)


def to_bytes(pictures: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 of pictures (B, 3, H, W) in [-1, 1]."""
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def report_skipped(skipped: list[str]) -> None:
    """Prints the first five pictures that could not be read, and how many there were."""
    for line in skipped[:5]:
        print(f"skipped unreadable picture {line}".encode(errors="replace").decode())  # names that are no UTF-8
    if len(skipped) > 5:
        print(f"skipped {len(skipped)} unreadable pictures in all")


# ---------------------------------------------------------------------------------------------------------------------
# Folders of pictures


def _captions_of_tables(folder: Path) -> list[tuple[Path, str]]:
    """The pairs of every metadata.jsonl, whose file names are relative to it."""
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
    return pairs


def _captions_beside(folder: Path) -> list[tuple[Path, str]]:
    """Every picture that has a NAME.txt beside it, with what that says."""
    pictures = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
    beside = [(file, file.with_suffix(".txt")) for file in pictures]
    return [(file, text.read_text(encoding="utf-8-sig", errors="replace").strip()) for file, text in beside if text.is_file()]


class Folder:
    """Captioned pictures of a folder for the embedded models.

    Pictures are cut to the square in their middle, scaled to `side` pixels and kept in memory. Those that cannot be read are left
    out; they are named and counted. UserError: no such folder, no captions, no readable picture."""

    def __init__(self, path: str, side: int = scenes.SIDE):
        if not Path(path).is_dir():
            raise UserError(f"--data {path} is not a folder: give a folder of pictures with metadata.jsonl or .txt captions")
        found = [(text, self._square(picture, side)) for _, text, picture in _folder(path)]
        if not found:
            raise UserError(f"no picture in {path} could be read: check the files")
        self.texts, self.pictures = [text for text, _ in found], torch.stack([picture for _, picture in found])

    @staticmethod
    def _square(picture: Image.Image, side: int) -> Tensor:
        whole = min(picture.size)
        left, top = (picture.width - whole) // 2, (picture.height - whole) // 2
        picture = picture.crop((left, top, left + whole, top + whole)).resize((side, side), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1

    def batch(self, n: int, gen: torch.Generator) -> tuple[Tensor, list[str]]:
        """n pictures, drawn with replacement, and their captions."""
        pick = torch.randint(len(self.texts), (n,), generator=gen)
        return self.pictures[pick], [self.texts[i] for i in pick]

    def captions(self, n: int, gen: torch.Generator) -> list[str]:
        return self.batch(n, gen)[1]


def source(path: str = "", side: int = scenes.SIDE) -> scenes.Scenes | Folder:
    """--data of the embedded models, whose pictures have `side` pixels: the procedural scenes, or a folder."""
    return Folder(path, side) if path else scenes.Scenes(side)


class LiveExamples:
    """What training asks of its data, for an embedded model: drawn and encoded by `network` when it is asked for. The other
    models have a `cache.Cache`.

    Every process draws the whole batch of n from `gen` and keeps `local_rows` of it, so that several processes see together what
    one sees alone. cond is a dict of tensors, batch first."""

    def __init__(self, source: scenes.Scenes | Folder, network):
        self.source, self.network = source, network

    def latents(self, n: int, gen: torch.Generator, local_rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (m, C, H, W) float32 of pictures, and cond of their captions."""
        pictures, captions = self.source.batch(n, gen)
        return self.network.encode_pictures(pictures)[local_rows], self.network.encode(captions[local_rows])

    def conditions(self, n: int, gen: torch.Generator, local_rows: slice = slice(None)) -> dict[str, Tensor]:
        """cond of captions alone."""
        return self.network.encode(self.source.captions(n, gen)[local_rows])

    def null(self) -> dict[str, Tensor]:
        """cond of the unconditional branch, batch 1."""
        return self.network.encode([scenes.UNCONDITIONAL])


def in_parts(x: Tensor, cond: dict[str, Tensor], size: int, device) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """x and cond, at most `size` rows at a time (0: all), on `device`."""
    for rows in torch.arange(len(x)).split(size or len(x)):
        yield x[rows].to(device), {name: tensor[rows].to(device) for name, tensor in cond.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Sources for the cache


@dataclass(frozen=True)
class Source:
    """What --data names. rows() is an iterator of (key, caption, open), each time from the beginning and in the same order.

    open() returns the RGB picture or raises one of UNREADABLE; for a prompt alone, open is None. It must be called before the
    next row is asked for. So rows that nobody needs cost no decoding. `fingerprint` changes when the data do."""

    spec: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, str, Callable | None]]]

    def __iter__(self) -> Iterator[tuple[str, str, Image.Image | None]]:
        """(key, caption, RGB picture or None). Unreadable pictures are left out, and named and counted at the end."""
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
        return _hub(spec) if any(any(path.glob(name)) for name in OF_DATASETS) else _folder(spec)
    if (path.suffix == ".parquet" and path.is_file()) or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", spec):
        return _hub(spec)
    kinds = "folder, .tar shards, .txt file of prompts or Hugging Face dataset OWNER/NAME"
    raise UserError(f"{spec} is no {kinds}: check the path")


def _stat(file: Path, folder: Path) -> list:
    """Name inside the folder, size and time of the last change."""
    about = file.stat() if file.exists() else None
    return [os.path.relpath(file, folder), about and about.st_size, about and about.st_mtime_ns]


def _unreadable(why: str):
    """What stands for `open` where there is no picture to open."""

    def opened():
        raise OSError(why)

    return opened


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. UserError: no such file, not text, no line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): give a UTF-8 file with a prompt in every line") from None
    if not lines:
        raise UserError(f"{path} holds no prompt: write one in every line")
    return lines


SAMPLE_PROMPTS = read_prompts(files.ASSETS / "sample-scenes.txt")


def sample_prompts(config: dict) -> list[str]:
    """What an embedded model's run draws where a command names no prompts: scenes, or captions from all over the folder of pictures
    that it was trained on, where that is still there."""
    if not (config["data"] and Path(config["data"]).is_dir()):
        return SAMPLE_PROMPTS
    captions = [caption for _, caption, _ in captioned(config["data"]).rows() if caption]
    return captions[:: -(-len(captions) // len(SAMPLE_PROMPTS))]


def _prompts(spec: str, path: Path) -> Source:
    lines = read_prompts(path)
    return Source(spec, files.digest_of(lines), lambda: ((str(i), line, None) for i, line in enumerate(lines)))


def _folder(spec: str) -> Source:
    """The pictures of a folder and its sub-folders whose captions are not blank. NAME.txt files are looked at where no
    metadata.jsonl names a picture. UserError for a line that is no pair, and for no captions at all."""
    folder = Path(spec)
    pairs = _captions_of_tables(folder) or _captions_beside(folder)
    pairs = [(file, text) for file, text in pairs if isinstance(text, str) and text.strip()]
    if not pairs:
        raise UserError(f"{folder} has no captions: add metadata.jsonl (file_name, text) or NAME.txt beside each picture")
    fingerprint = files.digest_of([[*_stat(file, folder), text] for file, text in pairs])
    return Source(spec, fingerprint, lambda: ((os.path.relpath(f, folder), text, partial(open_picture, f)) for f, text in pairs))


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset shards


def _tars(spec: str, tars: list[Path]) -> Source:
    if not tars or not all(tar.is_file() for tar in tars):
        raise UserError(f"{spec} matches no .tar file: check the path (no brace expansion, quote a glob)")

    def rows():
        for path in tars:
            try:
                with tarfile.open(path, "r:") as tar:
                    for key, group in groupby(_members(tar), _key_of):
                        yield _row_of_tar(tar, f"{path.name}/{key}", {os.path.splitext(m.name)[1].lower(): m for m in group})
            except (tarfile.TarError, OSError) as error:
                yield path.name, "", _unreadable(f"the rest of the shard is damaged ({error})")

    return Source(spec, files.digest_of([_stat(tar, tars[0].parent) for tar in tars]), rows)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a shard, without keeping their headers. ReadError if the shard has no end: tarfile takes a header that is cut or
    broken for the end."""
    for member in tar:
        tar.members = []
        if member.isfile():
            yield member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of archive")


def _key_of(member: tarfile.TarInfo) -> str:
    """What the files of a sample share: the path up to the first dot of the name."""
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.split(".")[0])


def _row_of_tar(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> tuple[str, str, Callable]:
    """The row of a sample whose files are `parts`, by suffix."""
    picture, caption = next((parts[suffix] for suffix in PICTURES if suffix in parts), None), None
    try:
        if ".txt" in parts:
            caption = tar.extractfile(parts[".txt"]).read().decode(errors="replace").strip()
        elif ".json" in parts:
            about = json.loads(tar.extractfile(parts[".json"]).read())
            caption = about.get("caption") or about.get("text")
    except (ValueError, AttributeError):
        pass  # the .json is none, or no table: the picture has no caption
    if picture is None:
        return key, "", _unreadable("no picture")
    if not isinstance(caption, str) or not caption:
        return key, "", _unreadable("no caption")
    return key, caption, lambda: open_picture(io.BytesIO(tar.extractfile(picture).read()))


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that the library `datasets` reads

OF_DATASETS = ("state.json", "dataset_dict.json", "metadata.csv", "*.parquet", "*/metadata.csv", "*/*.parquet")  # marks of a folder


def _hub(spec: str) -> Source:
    """A dataset of the hub, one that `datasets` saved, or one in a layout that it knows. Split train, or the first.

    The caption is the column text, caption or prompt; of a list, the first. UserError: no library, no such dataset or column."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {spec} is read by another library: `pip install datasets`") from None
    table, mark = _open_dataset(datasets, spec)
    columns = table.features or next(iter(table), {})
    text = next((c for c in ("text", "caption", "prompt") if c in columns), None)
    image = next((c for c, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    if text is None:
        others = ", ".join(columns)
        raise UserError(f"--data {spec} has no column text, caption or prompt but {others}: rename the captions' column")
    if image is not None:
        table = table.cast_column(image, datasets.Image(decode=False))

    def rows():
        try:
            for i, values in enumerate(table):
                caption = values[text][0] if isinstance(values[text], list) and values[text] else values[text]
                picture = values[image] if image else None
                if image and picture is None:
                    yield str(i), "", _unreadable("no picture")
                elif not isinstance(caption, str) or not caption.strip():
                    yield str(i), "", _unreadable("no caption")
                else:
                    yield str(i), caption, picture and (lambda p=picture: rgb(datasets.Image().decode_example(p)))
        except OSError as error:
            raise UserError(f"--data {spec} broke off ({error}): run the same command again to go on") from None

    return Source(spec, files.digest_of(mark), rows)


def _open_dataset(datasets, spec: str):
    """(table of one split, what the fingerprint is made of: a folder's files, or the commit on the hub). UserError if it cannot be
    opened."""
    path = Path(spec)
    try:
        if path.is_dir():
            mark = [_stat(file, path) for file in sorted(path.rglob("*")) if file.is_file()]
            saved = any((path / part).exists() for part in ("state.json", "dataset_dict.json"))
            table = datasets.load_from_disk(spec) if saved else datasets.load_dataset(spec, streaming=True)
        elif path.is_file():
            mark, table = [_stat(path, path.parent)], datasets.load_dataset("parquet", data_files=spec, streaming=True)
        else:
            name, _, revision = spec.partition("@")
            mark = [huggingface_hub.dataset_info(name, revision=revision or None).sha]
            table = datasets.load_dataset(name, revision=mark[0], streaming=True)
    except Exception as error:  # without network, without rights, for a wrong name: the libraries' errors have no common class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data {spec} is not here and cannot be had from the Hugging Face hub ({why}): check the name and the network, "
            "accept its terms and `hf auth login` if it is gated, or give a folder"
        ) from None
    if isinstance(table, dict):
        table = table["train" if "train" in table else next(iter(table))]
    return table, mark
