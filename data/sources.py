"""Where a user's own captioned pictures come from.

The embedded models keep theirs in memory, at 32x32 or 64x64 pixels: `source(SPEC, side)` is a `Folder`, or, without SPEC, the
procedural scenes. Both have batch(n, gen) -> pictures (n, 3, side, side) in [-1, 1] with n captions, and captions(n, gen).

Models with public weights read pictures of any size, once, into a cache (data/cache.py). `captioned(SPEC)` finds out what
--data names:

    FOLDER             pictures with metadata.jsonl (lines {"file_name": .., "text": ..}) or NAME.txt beside NAME.png; sub-folders
                       too, linked ones once, but none that is hidden
    FOLDER, "X-*.tar"  WebDataset shards: KEY.jpg with KEY.txt, or KEY.json that has "caption" or "text", adjacent. KEY is the path
                       up to the last dot
    OWNER/NAME[@REV]   a dataset of the Hugging Face hub, streamed; also a folder that `datasets` saved or can read, or a .parquet
    prompts, FILE.txt  captions alone, ours (assets/prompts.txt) or one a line: the consistency model draws the latents

Folders and shards have readers of our own, since nothing may be lost silently in a night of encoding. The imagefolder reader of
`datasets` ignores NAME.txt and ends at the first absent picture or bad line; its webdataset reader refuses shards whose samples
differ in their kinds of files; it and the library webdataset take a shard that was cut in a header for a whole one.

Whatever is found is a row: a picture without a caption, or a caption without a picture, is a row that says why it is skipped, so
that the closing line (`report`) accounts for everything. Captions are UTF-8, or UTF-16 with its mark; others are skipped, since
letters that were replaced would be trained on.

Left out on purpose: filters for size and content, captioning, brace expansion of shard names.
"""

import codecs
import contextlib
import glob
import io
import json
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import huggingface_hub
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data import scenes
from run import files
from run.common import UserError

PICTURES = (  # what Pillow does not open (some need a plugin) is named among what is skipped
    ".png", ".jpg", ".jpeg", ".webp", ".jfif", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".heic", ".heif", ".jxl",
)  # fmt: skip
CAPTIONS = (".txt", ".json")  # in shards
ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")  # which nobody here unpacks
OF_OTHERS = ("__MACOSX", "@eaDir")  # folders of copies and small pictures that a Mac and a NAS leave, beside hidden ones
NO_CAPTION, NO_PICTURE, NOT_UTF8 = "no caption", "no picture", "its caption is not UTF-8"
NOT_ADJACENT = "its parts are not adjacent: pack the shard with --sort=name"
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


def psnr_B(a: Tensor, b: Tensor) -> Tensor:
    """(B,) PSNR in dB of pictures in [-1, 1]; identical pictures count 100 dB."""
    mse = (a - b).square().flatten(1).mean(1).clamp_min(4e-10)
    return 10 * torch.log10(4 / mse)


def psnr(a: Tensor, b: Tensor) -> float:
    """The mean of psnr_B."""
    return psnr_B(a, b).mean().item()


def reasons(skipped: list[str]) -> str:
    """How many rows were skipped for each reason, the most frequent first."""
    known = (NO_CAPTION, NO_PICTURE, NOT_UTF8, NOT_ADJACENT)
    count = Counter(next((why for why in known if line.endswith(why)), "cannot be read") for line in skipped)
    return ", ".join(f"{why} ({n})" for why, n in count.most_common())


def report(spec: str, used: int, skipped: list[str]) -> None:
    """Prints the first five rows that were skipped, and the closing line: what was found, used and skipped, and why."""
    for line in skipped[:5]:
        print(f"skipped {line}".encode(errors="replace").decode())  # names that are no UTF-8
    why = f": {reasons(skipped)}" if skipped else ""
    print(f"{spec or 'prompts'}: {used + len(skipped)} pictures or captions found, {used} used, {len(skipped)} skipped{why}")


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a part of a relative path is hidden or a folder OF_OTHERS."""
    return any(part.startswith(".") or part in OF_OTHERS for part in path.parts)


def files_below(folder: str | Path) -> list[Path]:
    """The files in a folder and its sub-folders, sorted; linked folders are followed once. None that is_hidden. UserError for a
    sub-folder that cannot be listed."""

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): change its permissions, or move it away")

    found, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        found += [Path(parent, name) for name in names if not is_hidden(Path(name))]
    return sorted(found)


def pictures_below(folder: str | Path) -> list[Path]:
    return [file for file in files_below(folder) if file.suffix.lower() in PICTURES]


def decode(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with its mark; the mark goes. UnicodeError for any other."""
    text = content.decode("utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    if "\0" in text:
        raise UnicodeError("null characters: UTF-16 without its mark, or UTF-32")
    return text


def caption_of(value) -> tuple[str, str]:
    """(caption, "") or ("", why there is none) of a file, of bytes, or of what a table has; of a list, the first."""
    value = value[0] if isinstance(value, list) and value else value
    try:
        value = value.read_bytes() if isinstance(value, Path) else value
        value = decode(value).strip() if isinstance(value, bytes) else value
    except UnicodeError:
        return "", NOT_UTF8
    except OSError as error:
        return "", f"its caption cannot be read ({error.strerror})"
    return (value, "") if isinstance(value, str) and value.strip() else ("", NO_CAPTION)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of pictures


def _rows_of_table(table: Path) -> Iterator[tuple[Path, str, str]]:
    """(picture, caption, why there is none) of each line of a metadata.jsonl, whose file names are relative to it."""
    content = table.read_bytes()
    with contextlib.suppress(UnicodeError):  # else line by line
        content = decode(content).encode()
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        text = line.decode(errors="replace")
        try:
            row = json.loads(text)
            picture, (caption, why) = table.parent / row["file_name"], caption_of(row["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{table} line {number}: every line must be {{"file_name": .., "text": ..}}') from None
        yield (picture, caption, why) if text.encode() == line else (picture, "", NOT_UTF8)


def _rows_of_folder(found: list[Path]) -> Iterator[tuple[Path, str, str]]:
    """(picture, or the caption's file where there is none; caption; why it is skipped) for all pictures and captions among files:
    those of every metadata.jsonl, then the other pictures, each with what the NAME.txt beside it says."""
    named = set()
    for table in (file for file in found if file.name == "metadata.jsonl"):
        for row in _rows_of_table(table):
            named.add(os.path.normpath(row[0]))
            yield row
    texts = {file.with_suffix(""): file for file in found if file.suffix.lower() == ".txt"}
    pictures = [file for file in found if file.suffix.lower() in PICTURES]
    for picture in pictures:
        if os.path.normpath(picture) not in named:
            text = texts.get(picture.with_suffix(""))
            yield picture, *caption_of(text)
    for name in {picture.with_suffix("") for picture in pictures}:
        texts.pop(name, None)
    yield from ((text, "", NO_PICTURE) for text in texts.values())


class Folder:
    """Captioned pictures of a folder for the embedded models.

    Pictures are cut to the square in their middle, scaled to `side` pixels and kept in memory. Those that cannot be read are left
    out; they are named and counted. UserError: no such folder, no captions, no readable picture."""

    def __init__(self, path: str, side: int = scenes.SIDE):
        if not Path(path).is_dir():
            raise UserError(f"--data {path} is not a folder: give a folder of pictures with metadata.jsonl or .txt captions")
        found = [(text, self._square(picture, side)) for _, text, picture in captioned(path) if picture is not None]
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
    next row is asked for. So rows that nobody needs cost no decoding. A row that cannot be used has the caption "", and open()
    raises the reason. `fingerprint` changes when the data do, or the rules by which they are read."""

    spec: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, str, Callable | None]]]

    def __iter__(self) -> Iterator[tuple[str, str, Image.Image | None]]:
        """(key, caption, RGB picture or None). Rows that cannot be read are left out, and named and counted at the end."""
        used, skipped = 0, []
        for key, caption, opened in self.rows():
            try:
                picture = None if opened is None else opened()
            except UNREADABLE as error:
                skipped.append(f"{key}: {error}")
            else:
                used += 1
                yield key, caption, picture
        report(self.spec, used, skipped)


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
        found = files_below(path)
        if tars := _of_one_kind(path, found).get("tar"):
            return _tars(spec, tars)
        marks = (mark.relative_to(path) for name in OF_DATASETS for mark in path.glob(name))
        return _hub(spec) if not all(map(is_hidden, marks)) else _folder(spec, found)
    if (path.suffix == ".parquet" and path.is_file()) or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", spec):
        return _hub(spec)
    kinds = "folder, .tar shards, .txt file of prompts or Hugging Face dataset OWNER/NAME"
    raise UserError(f"{spec} is no {kinds}: check the path")


def _of_one_kind(folder: Path, found: list[Path]) -> dict[str, list[Path]]:
    """Kind -> files, of `found` below a folder: shards, tables and pictures. UserError for two kinds, of which one would be left
    out, and for an archive, which would be."""
    kinds = {}
    if packed := next((file for file in found if file.suffix.lower() in ARCHIVES), None):
        raise UserError(f"{packed} is not read: unpack it, or move it out of {folder}")
    for kind, suffixes in {"tar": (".tar",), "parquet": (".parquet",), "picture": PICTURES}.items():
        kinds |= {kind: files} if (files := [file for file in found if file.suffix.lower() in suffixes]) else {}
    if len(kinds) > 1:
        one, other = (files[0].relative_to(folder) for files in list(kinds.values())[:2])
        raise UserError(f"{folder} holds both {one} and {other}, and only one kind is read: give a folder for each")
    return kinds


def _stat(file: Path, folder: Path) -> list:
    """Name inside the folder, size and time of the last change."""
    about = file.stat() if file.exists() else None
    return [os.path.relpath(file, folder), about and about.st_size, about and about.st_mtime_ns]


def _unreadable(why: str):
    """What stands for `open` in a row that cannot be used."""

    def opened():
        raise OSError(why)

    return opened


def _row(key: str, caption: str, why: str, opened: Callable | None) -> tuple[str, str, Callable | None]:
    """A row, or, where there is a reason why not, one that is skipped."""
    return (key, "", _unreadable(why)) if why else (key, caption, opened)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank; a line ends at \\n alone. UserError: no such file, not text, no line."""
    try:
        lines = [line.strip() for line in decode(path.read_bytes()).split("\n") if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): give a UTF-8 file with a prompt in every line") from None
    if not lines:
        raise UserError(f"{path} holds no prompt: write one in every line")
    return lines


SAMPLE_PROMPTS = read_prompts(files.ASSETS / "sample-scenes.txt")
PIPELINE_PROMPTS = read_prompts(files.ASSETS / "sample-pictures.txt")  # of pictures as public models know them


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


def _folder(spec: str, below: list[Path]) -> Source:
    """The pictures and captions of a folder and its sub-folders, whose files are `below`. UserError for a line that is no pair, or
    if there are no captions."""
    folder = Path(spec)
    found = list(_rows_of_folder(below))
    if not any(caption for _, caption, _ in found):
        why = f" that can be used ({reasons([why for *_, why in found])})" if found else ""
        raise UserError(
            f"{folder} has no captions{why}: give metadata.jsonl (file_name, text) or NAME.txt beside each picture, in UTF-8"
        )
    fingerprint = files.digest_of([[*_stat(file, folder), text or why] for file, text, why in found])
    rows = lambda: (_row(os.path.relpath(f, folder), text, why, partial(open_picture, f)) for f, text, why in found)  # noqa: E731
    return Source(spec, fingerprint, rows)


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset shards


def _tars(spec: str, tars: list[Path]) -> Source:
    if not tars or not all(tar.is_file() for tar in tars):
        raise UserError(f"{spec} matches no .tar file: check the path (no brace expansion, quote a glob)")

    def rows():
        for path in tars:
            halves = {}  # key -> why the pictures without a caption, or captions without a picture, that have it are skipped
            try:
                with tarfile.open(path, "r:") as tar:
                    for name, parts in _samples(tar):
                        key, has_picture = f"{path.name}/{name}", not parts.keys().isdisjoint(PICTURES)
                        has_caption = not parts.keys().isdisjoint(CAPTIONS)
                        if has_picture and has_caption:
                            yield _row_of_tar(tar, key, parts)
                        elif has_picture or has_caption:
                            lacks = NO_CAPTION if has_picture else NO_PICTURE
                            halves[key] = lacks if halves.get(key, lacks) == lacks else NOT_ADJACENT
            except (tarfile.TarError, OSError) as error:
                yield path.name, "", _unreadable(f"the rest of the shard is damaged ({error})")
            yield from (_row(key, "", why, None) for key, why in halves.items())

    return Source(spec, files.digest_of(["keys to the last dot", *(_stat(tar, tars[0].parent) for tar in tars)]), rows)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a shard that are not hidden, without keeping their headers. ReadError if the shard has no end: tarfile takes a
    header that is cut or broken for the end."""
    for member in tar:
        tar.members = []
        if member.isfile() and not is_hidden(PurePosixPath(member.name)):
            yield member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of archive")


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {suffix: file}) of adjacent files whose paths are the same up to the last dot. A suffix that comes twice begins a new
    sample."""
    last, parts = "", {}
    for member in _members(tar):
        key, suffix = os.path.splitext(member.name)
        if parts and (key != last or suffix.lower() in parts):
            yield last, parts
            parts = {}
        last, parts = key, parts | {suffix.lower(): member}
    if parts:
        yield last, parts


def _row_of_tar(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> tuple[str, str, Callable]:
    """The row of a sample whose files are `parts`, by suffix."""
    picture = next(parts[suffix] for suffix in PICTURES if suffix in parts)
    caption = tar.extractfile(parts.get(".txt") or parts[".json"]).read()
    if ".txt" not in parts:
        try:
            about = json.loads(caption)
            caption = about.get("caption") or about.get("text")
        except UnicodeError:
            pass  # which caption_of says
        except (ValueError, AttributeError):
            caption = None  # the .json is none, or no table
    return _row(key, *caption_of(caption), lambda: open_picture(io.BytesIO(tar.extractfile(picture).read())))


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that the library `datasets` reads

OF_DATASETS = ("state.json", "dataset_dict.json", "metadata.csv", "*.parquet", "*/metadata.csv", "*/*.parquet")  # marks of a folder


def _hub(spec: str) -> Source:
    """A dataset of the hub, one that `datasets` saved, or one in a layout that it knows. Split train, or the first.

    The caption is the column text, caption or prompt; the picture is the first column that has any: as pictures of the library, or
    as bytes, alone or in a struct {bytes, path}; of a list, the first. UserError: no library, no such dataset or column."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {spec} is read by another library: `pip install datasets`") from None
    table, mark = _open_dataset(datasets, spec)
    columns = table.features or next(iter(table), {})
    text = next((c for c in ("text", "caption", "prompt") if c in columns), None)
    if text is None:
        others = ", ".join(columns)
        raise UserError(f"--data {spec} has no column text, caption or prompt but {others}: rename the captions' column")
    for column, kind in columns.items():  # pictures are decoded when they are asked for
        if isinstance(kind, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            table = table.cast_column(column, type(kind)(datasets.Image(decode=False)))
    with _stream_errors(spec):
        image = _column_of_pictures(datasets, table, columns)
    if image is None:
        print(f"--data {spec} has no column of pictures but {', '.join(columns)}: its captions alone are used")

    def rows():
        with _stream_errors(spec):
            for i, values in enumerate(table):
                picture = _encoded(values[image]) if image else None
                caption, why = (values[text], NO_PICTURE) if image and not picture else caption_of(values[text])
                opened = picture and (lambda p=picture: rgb(datasets.Image().decode_example(p)))
                yield _row(str(i), caption, why, opened)

    return Source(spec, files.digest_of(["columns of bytes", *mark]), rows)


@contextlib.contextmanager
def _stream_errors(spec: str):
    """Errors of a table that is read row by row -> UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--data {spec} broke off ({error}): run the same command again to go on") from None
    except UnicodeError as error:
        raise UserError(f"--data {spec} has a table that is not UTF-8 ({error}): save it as UTF-8") from None


def _encoded(value) -> dict | None:
    """A picture as the library's Image holds it, {bytes, path}: of that, of bytes, or of the first in a list. None: no picture."""
    value = value[0] if isinstance(value, list) and value else value
    value = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    return value if isinstance(value, dict) and (value.get("bytes") or value.get("path")) else None


def _column_of_pictures(datasets, table, columns) -> str | None:
    """The first column of the library's pictures, or of lists of them; else the first of bytes that Pillow reads in a first row."""
    kinds = {column: getattr(kind, "feature", kind) for column, kind in columns.items()}  # of lists what is in them
    if found := [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]:
        return found[0]
    of_bytes = [c for c, kind in kinds.items() if isinstance(kind, dict) and "bytes" in kind]
    of_bytes += [c for c, kind in kinds.items() if "binary" in str(getattr(kind, "dtype", ""))]
    for values in islice(table, 20) if of_bytes else ():
        for column in of_bytes:
            with contextlib.suppress(*UNREADABLE):
                datasets.Image().decode_example(_encoded(values[column]))
                return column
    return None


def _open_dataset(datasets, spec: str):
    """(table of one split, what the fingerprint is made of: a folder's files, or the commit on the hub). UserError if it cannot be
    opened."""
    path = Path(spec)
    try:
        if path.is_dir():
            mark = [_stat(file, path) for file in files_below(path)]
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
        if path.exists():
            raise UserError(f"--data {spec} cannot be read by the library datasets ({why}): check its files") from None
        raise UserError(
            f"--data {spec} is not here and cannot be had from the Hugging Face hub ({why}): check the name and the network, "
            "accept its terms and `hf auth login` if it is gated, or give a folder"
        ) from None
    if isinstance(table, dict):
        table = table["train" if "train" in table else next(iter(table))]
    return table, mark
