"""Latents and text embeddings of models with public weights, computed once: afterwards VAE and text encoders can leave memory.

Buckets. A picture goes to the size of nearest ratio among multiples of 64 whose area is at most resolution^2 (as in SDXL's list at
1024), is scaled until it covers that size, and its middle is cut out. SDXL takes as input what happened:

    time_ids = (original height, width, top and left of the cut in the scaled picture, height and width of the bucket)

Rows of prompts alone are in the bucket "drawn" if they got latents from the consistency model, else in "prompts", which has none.

Storage. A folder with

    manifest.json        the key (what the cache was made of), and the number of shards, null as long as there may be more
    00000.safetensors    shard k is made of rows [64 k, 64 k + 64) of the source alone. Tensors HxW/latents (n, C, H/8, W/8) float16
                         and HxW/NAME (n, ..) for each tensor of cond: bfloat16, but time_ids float32. The metadata has the
                         number of rows in each bucket, and those that were skipped, with the reason
    null.safetensors     cond of the caption ""
    prompts-DIGEST.safetensors    cond of the prompts of a run's pictures (models/encoders.py)

Since a shard depends on its own rows alone, a killed build goes on at any shard, processes share the shards, and a damaged one is
made again. Files are written as those of a run are (run/files.py), shards also know the key; all are read through at every start.
`Trajectories`, which are also made once, are kept in the same way.

Key: B batch, C, h, w latent shape, H, W pixels, n rows, E points of time.
"""

import bisect
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import tdpt
from data import scenes, sources
from run import files
from run.common import UserError, process_count, process_index, step_generator, wait_for_all

STEP = 64  # pixels; sizes are multiples
BATCH = 8  # pictures and captions that an encoder sees at once


def buckets(resolution: int) -> list[tuple[int, int]]:
    """Sizes (H, W), multiples of 64, of area at most resolution^2 and ratio at most 4. UserError if it is no multiple of 64."""
    if resolution < STEP or resolution % STEP:
        raise UserError(f"--resolution {resolution} must be a multiple of {STEP}, such as 1024")
    sizes = set()
    for long in range(resolution, 2 * resolution + 1, STEP):
        short = resolution**2 // long // STEP * STEP
        if long <= 4 * short:
            sizes |= {(long, short), (short, long)}
    return sorted(sizes)


def nearest_size(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size of nearest ratio: 3:2 is as far from 1:1 as 2:3."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def fit(picture: Image.Image, sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
    """(pixels (3, H, W) uint8 of the nearest size, time_ids) of an RGB picture.

    The cut is scaled, not the picture: a picture of 1 x 10,000 pixels would have to grow to 512 x 5 million."""
    w, h = picture.size
    H, W = nearest_size(h, w, sizes)
    scale = max(H / h, W / w)
    top, left = int(h * scale - H) // 2, int(w * scale - W) // 2
    box = (left / scale, top / scale, min(w, (left + W) / scale), min(h, (top + H) / scale))
    cut = picture.resize((W, H), Image.Resampling.LANCZOS, box)
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(H, W, 3).permute(2, 0, 1)
    return pixels.contiguous(), [h, w, top, left, H, W]


@dataclass
class CacheBuilder:
    """What a cache is made of. open_or_make() makes what is missing or damaged, and opens it; every process must call it."""

    folder: Path
    source: sources.Source
    encode_pictures: Callable[[Tensor], Tensor]  # (B, 3, H, W) float32 in [-1, 1] on the CPU -> latents (B, C, h, w); B <= 8
    encode_captions: Callable[[list[str]], dict[str, Tensor]]  # captions -> cond; the pictures' time_ids replace those in it
    key: dict  # JSON: whatever the encoders depend on
    resolution: int  # pixels
    draw: Callable[[dict, torch.Generator], Tensor] | None = None  # latents of prompts alone, from cond; None: they have none
    shard: int = 64  # rows of the source in a shard

    @torch.no_grad()
    def open_or_make(self) -> "Cache":
        """UserError: a cache of another key, a damaged manifest, a full disk, encoders that overflow, most rows skipped."""
        self.sizes, leader = buckets(self.resolution), process_index() == 0
        if leader:
            self._begin()
        wait_for_all()
        key, shards = self._manifest_of_this_key()  # the number of shards is None until all have been made
        self.run = files.digest_of(key)
        if leader:
            self._make_null(was_there=shards is not None)
        made = self._make_shards(shards)
        wait_for_all()
        if leader and shards is None:
            if missing := [f"{k:05d}" for k in range(made) if not shard_file(self.folder, k).exists()]:
                lacks = f"{self.folder} still lacks {', '.join(missing[:5])}"
                raise UserError(f"{lacks}: run the same command again on all processes")
            files.write_json(self.folder / "manifest.json", {"key": key, "shards": made})
        wait_for_all()
        cache = Cache(self.folder)
        if leader and shards is None:
            sources.report(self.source.spec, int(cache.ends[-1]), cache.skipped)
        return cache

    def _full_key(self) -> dict:
        """`key` with what the cache depends on besides, as JSON gives it back."""
        given = {"resolution": self.resolution, "shard": self.shard, "drawn latents": self.draw is not None}
        given |= {"data": self.source.spec, "fingerprint of the data": self.source.fingerprint}
        return json.loads(json.dumps(self.key | given))

    def _begin(self) -> None:
        """The manifest of a new cache; from an old one what killed builds left half-written goes."""
        if read_manifest(self.folder) is not None:
            files.remove_leftovers(self.folder, 3600)  # younger ones may be another run's that fills the same cache
            return
        if self.folder.is_dir() and any(file.suffix != ".tmp" for file in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and no cache: choose another --cache, or delete the folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the cache folder {self.folder} ({error.strerror}): choose another --cache") from None
        files.write_json(self.folder / "manifest.json", {"key": self._full_key(), "shards": None})

    def _manifest_of_this_key(self) -> tuple[dict, int | None]:
        """Key and number of shards in the manifest. UserError if the key differs from ours."""
        if (manifest := read_manifest(self.folder)) is None:
            where = f"process {process_index()} does not see {self.folder.absolute()}"
            raise UserError(f"{where}: give --cache on a disk that all machines share")
        ours, its = self._full_key(), manifest["key"]
        older = {k for k in ours if k.startswith("files of ") and k not in its}  # versions that did not write these
        if changed := sorted(k for k in (ours.keys() | its.keys()) - older if ours.get(k) != its.get(k)):
            differs = f"{self.folder} was made with another {', '.join(changed)}"
            raise UserError(f"{differs}: delete the folder or choose another --cache")
        return its, manifest["shards"]

    def _make_null(self, was_there: bool) -> None:
        """The file of the caption "", unless it is there and whole."""
        if not self._is_whole(path := self.folder / "null.safetensors", was_there):
            cond = self.encode_captions([scenes.UNCONDITIONAL])
            tensors = {f"null/{name}": stored(name, tensor, ("",)) for name, tensor in cond.items()}
            files.write_tensors(path, tensors, {"rows": {}, "skipped": []}, self.run)

    def _make_shards(self, shards: int | None) -> int:
        """Makes the shards of this process that are missing or damaged. shards: how many there are, if all have been made before;
        if these are whole, the source is not asked. Returns how many shards the rows fill that were asked for."""
        of_this_process = range(process_index(), sys.maxsize if shards is None else shards, process_count())
        wanted = (k for k in of_this_process if not self._is_whole(shard_file(self.folder, k), was_there=shards is not None))
        k, next_wanted = -1, next(wanted, None)
        if next_wanted is None:
            return 0
        groups = groupby(enumerate(self.source.rows()), lambda row: row[0] // self.shard)
        for k, group in tqdm(groups, "cache", unit="shard", disable=process_index() > 0):
            if k == next_wanted:
                self._make_shard(k, (row for _, row in group))
                if (next_wanted := next(wanted, None)) is None:
                    break
        return k + 1

    def _is_whole(self, path: Path, was_there: bool) -> bool:
        if was_there and not path.exists():
            print(f"{path} is gone: it is made again")
        return files.is_good(path, self.run, "it is made again")

    def _make_shard(self, k: int, rows: Iterator) -> None:
        """Reads and encodes the rows of shard k, at most 8 of one bucket at a time, and writes the file."""
        groups, skipped = defaultdict(list), []  # bucket -> (key, caption, pixels, time_ids) of each row; what is skipped, and why
        for key, caption, opened in rows:
            bucket, pixels, ids = "drawn" if self.draw else "prompts", None, None
            if opened is not None:
                try:
                    pixels, ids = fit(opened(), self.sizes)
                except sources.UNREADABLE as error:
                    skipped.append(f"{key}: {error}")
                    continue
                bucket = f"{ids[4]}x{ids[5]}"
            caption = caption.encode(errors="replace").decode()  # halves of surrogate pairs, which tokenizers refuse
            groups[bucket].append((key, caption, pixels, ids))

        parts, gen = defaultdict(list), step_generator(0, k, stream=4)
        for bucket, group in sorted(groups.items()):
            for i in range(0, len(group), BATCH):
                for name, tensor in self._encode(bucket, group[i : i + BATCH], gen).items():
                    parts[f"{bucket}/{name}"].append(tensor)
        tensors = {name: torch.cat(part) for name, part in parts.items()}
        info = {"rows": {bucket: len(group) for bucket, group in sorted(groups.items())}, "skipped": skipped}
        files.write_tensors(shard_file(self.folder, k), tensors, info, self.run)

    def _encode(self, bucket: str, group: list[tuple], gen: torch.Generator) -> dict[str, Tensor]:
        """cond and, but for "prompts", latents of some rows of a bucket, as they are stored."""
        keys, captions, pixels, ids = zip(*group, strict=True)
        tensors = dict(self.encode_captions(list(captions)))
        if bucket == "drawn":
            tensors["latents"] = self.draw(tensors, gen)
        elif bucket != "prompts":
            if "time_ids" in tensors:
                tensors["time_ids"] = torch.tensor(ids)
            tensors["latents"] = self.encode_pictures(torch.stack(pixels).float() / 127.5 - 1)
        return {name: stored(name, tensor, keys) for name, tensor in tensors.items()}


def read_manifest(folder: Path) -> dict | None:
    """{"key", "shards"} of a cache; None where there is none. UserError: it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        if not files.checksum(path):
            raise ValueError
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: restore it, or delete the folder to make the cache again") from None


def shard_file(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.safetensors"


def stored(name: str, tensor: Tensor, keys: tuple[str, ...]) -> Tensor:
    """A tensor as it is kept: latents in float16, time_ids in float32, the others in bfloat16. `keys` name the rows. UserError for
    what 16 bits do not hold, such as the NaN of a VAE that overflowed."""
    tensor = tensor.detach().cpu()
    if name == "time_ids":
        return tensor.float()  # bfloat16 would round sizes above 256
    tensor = tensor.half() if name == "latents" else tensor.bfloat16()
    finite = tensor.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        advice = "load VAE and text encoders in bfloat16 or float32, or remove it"
        raise UserError(f"the {name} of {keys[finite.index(False)]!r} are not finite: {advice}")
    return tensor.contiguous()


class Cache:
    """Examples (sources.LiveExamples) of a finished cache, read row by row from memory-mapped files. cond is on the CPU.

    Rows are counted by buckets in the order of their names, inside of a bucket by shards. Attributes: pieces, (bucket, shard) of
    each part of a shard, in this order; ends, the number of rows up to the end of each; last, that of each bucket; skipped."""

    def __init__(self, folder: Path):
        """UserError: no cache, an unfinished one, no row in it, or fewer than were skipped."""
        self.folder = folder
        about, counts, self.skipped = read_manifest(folder), {}, []
        if about is None or about["shards"] is None:
            raise UserError(f"{folder} holds no finished cache: run the command that makes it again")
        for name in (shard_file(folder, k).stem for k in range(about["shards"])):
            with self._open(name) as file:
                info = json.loads(file.metadata()["info"])
            self.skipped += info["skipped"]
            counts |= {(bucket, name): n for bucket, n in info["rows"].items()}
        used, found = sum(counts.values()), sum(counts.values()) + len(self.skipped)
        if used < len(self.skipped) or not used:
            lost = f"{used} of {found} pictures and captions of --data could be used ({sources.reasons(self.skipped)})"
            first = f", such as {self.skipped[0]}" if self.skipped else ""
            raise UserError(f"only {lost}{first}: mend them or leave them out, and delete {folder}")
        self.pieces = sorted(counts, key=lambda piece: piece[0])
        self.ends = torch.tensor([counts[piece] for piece in self.pieces]).cumsum(0)
        self.last = {bucket: end for (bucket, _), end in zip(self.pieces, self.ends.tolist(), strict=True)}
        self._null = self._read("null", "null", 0)

    def _open(self, name: str):
        """A shard's file. UserError: it is gone."""
        path = self.folder / f"{name}.safetensors"
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read any more ({error}): run the same command again, it is made again") from None

    def _read(self, name: str, bucket: str, row: int, latents: bool = False) -> dict[str, Tensor]:
        """Row `row` of a bucket in shard `name`: cond and, if asked for, latents, batch 1. UserError: the file is gone."""
        with self._open(name) as file:
            found = {key.split("/", 1)[1]: key for key in file.keys() if key.startswith(f"{bucket}/")}
            return {k: file.get_slice(key)[row : row + 1] for k, key in sorted(found.items()) if latents or k != "latents"}

    def _gather(self, rows: Tensor, latents: bool = False) -> dict[str, Tensor]:
        """Rows (m,) of the cache -> stacked tensors."""
        found = []
        for row, i in zip(rows.tolist(), torch.searchsorted(self.ends, rows.contiguous(), right=True).tolist(), strict=True):
            bucket, name = self.pieces[i]
            found.append(self._read(name, bucket, row - (int(self.ends[i - 1]) if i else 0), latents))
        return {k: torch.cat([tensors[k] for tensors in found]) for k in found[0]}

    def latents(self, n, gen, local_rows=slice(None)):
        """All of one bucket, which is drawn by its size. UserError: there are prompts alone."""
        ends = [0, *(end for bucket, end in self.last.items() if bucket != "prompts")]
        if len(ends) == 1:
            raise UserError(f"{self.folder} was made of prompts alone: give --data with pictures, or train on rollouts alone")
        bucket = bisect.bisect_right(ends, int(torch.randint(ends[-1], (1,), generator=gen)))
        first, end = ends[bucket - 1 : bucket + 1]
        cond = self._gather(first + torch.randint(end - first, (n,), generator=gen)[local_rows], latents=True)
        return cond.pop("latents").float(), cond

    def conditions(self, n, gen, local_rows=slice(None)):
        """Of captions of any bucket, with the time_ids of null(): those of a whole square picture, as for drawing one."""
        rows = torch.randint(int(self.ends[-1]), (n,), generator=gen)[local_rows]
        return self._gather(rows) | {k: v.expand(len(rows), -1) for k, v in self._null.items() if k == "time_ids"}

    def null(self):
        return dict(self._null)


def in_batches(captions: list[str], encode: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """cond of captions, as many at a time as an encoder sees at once."""
    parts = [encode(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Captions:
    """Captions without pictures, in memory: what a `Cache` that was made of these prompts alone gives. encode: as its builder's."""

    def __init__(self, captions: list[str], encode: Callable[[list[str]], dict[str, Tensor]]):
        cond = in_batches(captions, encode)
        self.cond = {name: stored(name, tensor, tuple(captions)) for name, tensor in cond.items()}

    def conditions(self, n: int, gen: torch.Generator, local_rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of n captions that are drawn, of which one may come several times."""
        rows = torch.randint(len(self.cond["tokens"]), (n,), generator=gen)[local_rows]
        return {name: tensor[rows] for name, tensor in self.cond.items()}


class Trajectories:
    """The guided teacher's own solutions of n captions, drawn once: targets for rollouts that follow the teacher.

    Attributes: times (E,), points of time from noise to clean data; states (E, n, C, H, W) float16, the solutions at these times;
    cond, that of the captions.

    They are kept in `folder`, a shard of 128 captions a file, which the processes share out. A killed run goes on with the shards
    that are missing; one that is damaged, or of other captions, is drawn again. UserError if a state is not finite."""

    SHARD = 128  # captions

    def __init__(self, folder: Path, teacher, network, examples, n: int, times, seed: int, micro: int, device):
        """teacher: the guided one, as tdpt.rollout_states takes it. network says path and latent shape. micro: captions that are
        drawn at a time on `device`; 0: a shard."""
        self.times = times
        digest, conds, runs = files.run_digest(folder.parent), [], {}
        for i, first in enumerate(tqdm(range(0, n, self.SHARD), desc="teacher trajectories")):
            gen, path, end = step_generator(seed, first, stream=3), folder / f"{first:06d}.safetensors", min(first + self.SHARD, n)
            cond = examples.conditions(end - first, gen, slice(None))
            conds.append(cond)
            content = b"".join(cond[name].detach().cpu().contiguous().view(torch.uint8).numpy() for name in sorted(cond))
            runs[path] = f"{digest} {hashlib.sha256(content).hexdigest()[:16]}"
            if i % process_count() == process_index() and not files.is_good(path, runs[path], "it is drawn again"):
                x_T = torch.randn(end - first, *network.latent, generator=gen)
                parts = sources.in_parts(x_T, cond, micro, device)
                drawn = [tdpt.rollout_states(teacher, network.path, *part, times.to(device)).half().cpu() for part in parts]
                states = torch.cat(drawn, 1)
                if not states.isfinite().all():
                    raise UserError(f"the teacher's trajectories {first} to {end} are no numbers: look at --teacher or --guidance")
                files.write_tensors(path, {"states": states}, {}, runs[path])
        wait_for_all()
        hint = "run the same command again, it will be drawn again"
        self.states = torch.cat([files.read_verified(path, hint, run)[0]["states"] for path, run in runs.items()], 1)
        self.cond = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
