"""Latents and text embeddings of SDXL and FLUX, computed once: afterwards VAE and text encoders can leave memory.

    cache = Cache.build(folder, data.captioned(spec), encode_pictures, encode_captions, key, resolution=1024)
    x0, cond = cache.latents(n, gen, mine)          one bucket a batch; cond = cache.conditions(n, gen, mine); cache.null()

Buckets. A picture goes to the size of nearest ratio among multiples of 64 whose area is at most resolution^2 (as in SDXL's list at
1024), is scaled until it covers that size, and its middle is cut out. SDXL is told what happened:

    time_ids = (original height, width, top and left of the cut in the scaled picture, height and width of the bucket)

Storage. A folder with

    manifest.json        the key (what the cache was made of), and the number of shards, null as long as there may be more
    00000.safetensors    shard k is made of rows [64 k, 64 k + 64) of the source alone: a killed build goes on at any shard, ranks
                         share them, and a damaged one is made again. Tensors HxW/latents (n, C, H/8, W/8) float16, HxW/NAME
                         (n, ..) for each tensor of cond: bfloat16, but time_ids float32; the metadata has the number of rows
                         in each bucket and the unreadable pictures
    null.safetensors     cond of the caption ""

Files are written as those of a run are (checkpoint.py): under another name, synced, renamed, with their checksum inside; shards
also know their name and key. All of them are read through at every start. Rows of prompts alone are in the bucket "drawn" if
`draw` gave them latents, else in "prompts", which has none.

Key: B batch, C, h, w latent shape, H, W pixels.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import tdpt
from data import scenes, sources
from run import files
from run.common import UserError, process_count, process_index, step_generator

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


def _manifest(folder: Path) -> dict | None:
    """{"key", "shards"}; None where there is none. UserError: damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        if not files.checksum(path):
            raise ValueError
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: restore it, or delete the folder to make the cache again") from None


def _shard_file(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.safetensors"


def _whole(path: Path, run: str, was_there: bool) -> bool:
    """Whether a shard is there with the bytes that were written; says so if it was and is not any more."""
    if was_there and not path.exists():
        print(f"{path} is gone: it is made again")
    return files.is_good(path, run, "it is made again")


def _stored(name: str, tensor: torch.Tensor, keys: tuple[str, ...]) -> torch.Tensor:
    """As it is kept. UserError for what 16 bits do not hold, such as the NaN of a VAE that overflowed."""
    tensor = tensor.detach().cpu()
    if name == "time_ids":
        return tensor.float()  # bfloat16 would round sizes above 256
    tensor = tensor.half() if name == "latents" else tensor.bfloat16()
    for key, finite in zip(keys, tensor.flatten(1).isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise UserError(
                f"the {name} of {key!r} are not finite: load VAE and text encoders in bfloat16 or float32, or remove it"
            )
    return tensor.contiguous()


def _shard(k: int, rows, sizes, encode_pictures, encode_captions, draw, latent) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of shard k, and {"rows": {bucket: n}, "skipped": [unreadable picture]}."""
    groups, skipped = {}, []
    for key, caption, picture in rows:
        bucket, pixels, ids = "drawn" if draw else "prompts", None, None
        if picture is not None:
            try:
                pixels, ids = fit((picture() if callable(picture) else picture).convert("RGB"), sizes)
            except sources.UNREADABLE as error:
                skipped.append(f"{key}: {error}")
                continue
            bucket = f"{ids[4]}x{ids[5]}"
        caption = caption.encode(errors="replace").decode()  # halves of surrogate pairs, which tokenizers refuse
        groups.setdefault(bucket, []).append((key, caption, pixels, ids))
    parts, gen = {}, step_generator(0, k, stream=4)
    for bucket, group in sorted(groups.items()):
        for i in range(0, len(group), BATCH):
            keys, captions, pixels, ids = zip(*group[i : i + BATCH], strict=True)
            tensors = dict(encode_captions(list(captions)))
            if bucket == "drawn":
                tensors["latents"] = draw(tensors, latent, gen)
            elif bucket != "prompts":
                if "time_ids" in tensors:
                    tensors["time_ids"] = torch.tensor(ids)
                tensors["latents"] = encode_pictures(torch.stack(pixels).float() / 127.5 - 1)
            for name, tensor in tensors.items():
                parts.setdefault(f"{bucket}/{name}", []).append(_stored(name, tensor, keys))
    rows = {bucket: len(group) for bucket, group in sorted(groups.items())}
    return {name: torch.cat(part) for name, part in parts.items()}, {"rows": rows, "skipped": skipped}


class Cache:
    """Examples read from a finished cache, row by row from memory-mapped files; data.Live has the same three functions.

    Every rank draws the whole batch of n from `gen` and keeps `mine` of it. cond: dict of tensors on the CPU, batch first.
    """

    def __init__(self, folder: str | Path):
        """UserError: no cache, an unfinished one, or no row in it."""
        self.folder = Path(folder)
        about, shards = _manifest(self.folder), {}
        if about is None or about["shards"] is None:
            raise UserError(f"{folder} holds no finished cache: run the command that makes it again")
        for name in (f"{k:05d}" for k in range(about["shards"])):
            with self._open(name) as file:
                shards[name] = json.loads(file.metadata()["info"])
        self.skipped = [line for shard in shards.values() for line in shard["skipped"]]
        self.rows = {}  # bucket -> names of its shards, number of rows up to the end of each
        for bucket in sorted({bucket for shard in shards.values() for bucket in shard["rows"]}):
            names = [name for name, shard in shards.items() if bucket in shard["rows"]]
            self.rows[bucket] = names, torch.tensor([shards[name]["rows"][bucket] for name in names]).cumsum(0)
        if not self.rows:
            raise UserError(f"no picture of --data could be read ({len(self.skipped)} tried): check the files and delete {folder}")
        self._null = self._read("null", "null", 0)

    @staticmethod
    @torch.no_grad()
    def build(
        folder: str | Path,
        items: sources.Source | Iterable,
        encode_pictures: Callable[[torch.Tensor], torch.Tensor] | None,
        encode_captions: Callable[[list[str]], dict[str, torch.Tensor]],
        key: dict,
        resolution: int,
        shard: int = 64,
        draw: Callable | None = None,
        rank: int = 0,
        world: int = 1,
        latent: tuple[int, int, int] | None = None,
        wait: Callable[[], None] = dist.barrier,
    ) -> "Cache":
        """Makes what is missing or damaged, and opens the cache; every rank calls it with the same arguments.

        items            a data.Source, or (key, caption, picture) with an RGB PIL picture, a function that opens one, or None
        encode_pictures  (B, 3, H, W) float32 in [-1, 1] on the CPU -> latents (B, C, h, w); B is at most 8
        encode_captions  captions -> cond; its time_ids, if any, are replaced by those of the pictures
        key              JSON: whatever the encoders depend on; resolution, shard and the source are added here
        draw             (cond, latent, CPU generator) -> latents (B, C, h, w) for captions without picture; None: they have none
        latent           (C, h, w) of `draw`; None: asked of encode_pictures
        wait             returns when all ranks have come; called three times, and only with world > 1
        UserError: a cache of another key, a damaged manifest, a full disk, encoders that overflow, no readable picture.
        """
        folder, sizes = Path(folder), buckets(resolution)
        key = key | {"resolution": resolution, "shard": shard, "drawn latents": draw is not None}
        if isinstance(items, sources.Source):
            key |= {"data": items.spec, "fingerprint of the data": items.fingerprint}
        key = json.loads(json.dumps(key))
        manifest = folder / "manifest.json"
        if rank == 0 and _manifest(folder) is None:
            if folder.is_dir() and any(file.suffix != ".tmp" for file in folder.iterdir()):
                raise UserError(f"{folder} is not empty and no cache: choose another --cache, or delete the folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the cache folder {folder} ({error.strerror}): choose another --cache") from None
            files.write_json(manifest, {"key": key, "shards": None})
        elif rank == 0:
            files.remove_leftovers(folder, 3600)  # younger ones may be another run's that fills the same cache
        if world > 1:
            wait()
        if (about := _manifest(folder)) is None:
            raise UserError(f"process {rank} does not see {folder.absolute()}: give --cache on a disk that all machines share")
        asked = {k for k in key if k in about["key"] or not k.startswith("files of ")}  # which older versions did not write
        if changed := sorted(k for k in asked | about["key"].keys() if key.get(k) != about["key"].get(k)):
            raise UserError(f"{folder} was made with another {', '.join(changed)}: delete the folder or choose another --cache")
        run = hashlib.sha256(json.dumps(about["key"], sort_keys=True).encode()).hexdigest()[:16]
        n, complete = about["shards"] or 0, about["shards"] is not None
        if rank == 0 and not _whole(folder / "null.safetensors", run, complete):
            cond = {f"null/{k}": _stored(k, v, ("",)) for k, v in encode_captions([scenes.UNCONDITIONAL]).items()}
            files.write_tensors(folder / "null.safetensors", cond, {"rows": {}, "skipped": []}, run)
        damaged = [k for k in range(rank, n, world) if not _whole(_shard_file(folder, k), run, complete)]
        if not complete or damaged:
            if draw is not None and latent is None:
                latent = tuple(encode_pictures(torch.zeros(1, 3, resolution, resolution)).shape[1:])
            rows, k = enumerate(items.rows() if isinstance(items, sources.Source) else items), -1
            for k, part in tqdm(groupby(rows, lambda row: row[0] // shard), "cache", unit="shard", disable=rank > 0):
                path = _shard_file(folder, k)
                if k in damaged if complete else k % world == rank and not _whole(path, run, False):
                    made = _shard(k, (row for _, row in part), sizes, encode_pictures, encode_captions, draw, latent)
                    files.write_tensors(path, *made, run)
                if complete and k == damaged[-1]:
                    break
            n = n if complete else k + 1
        if world > 1:
            wait()
        if rank == 0 and not complete:
            if missing := [path.stem for path in (_shard_file(folder, k) for k in range(n)) if not path.exists()]:
                raise UserError(f"{folder} still lacks {', '.join(missing[:5])}: run the same command again on all ranks")
            files.write_json(manifest, {"key": about["key"], "shards": n})  # the one that the shards name
        if world > 1:
            wait()
        made = Cache(folder)
        if rank == 0 and not complete:
            sources.report_skipped(made.skipped)
        return made

    def _open(self, name: str):
        """A shard's file. UserError: it is gone."""
        path = self.folder / f"{name}.safetensors"
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read any more ({error}): run the same command again, it is made again") from None

    def _read(self, name: str, bucket: str, row: int, latents: bool = False) -> dict[str, torch.Tensor]:
        """Row `row` of a bucket in shard `name`: cond and, if asked for, latents, batch 1. UserError: the file is gone."""
        with self._open(name) as file:
            found = {key.split("/", 1)[1]: key for key in file.keys() if key.startswith(f"{bucket}/")}
            return {k: file.get_slice(key)[row : row + 1] for k, key in sorted(found.items()) if latents or k != "latents"}

    def _gather(self, rows: list[tuple[str, int]], latents: bool = False) -> dict[str, torch.Tensor]:
        """(bucket, row in the bucket) of each -> stacked tensors."""
        found = []
        for bucket, row in rows:
            names, ends = self.rows[bucket]
            i = int(torch.searchsorted(ends, row, right=True))
            found.append(self._read(names[i], bucket, row - (int(ends[i - 1]) if i else 0), latents))
        return {k: torch.cat([tensors[k] for tensors in found]) for k in found[0]}

    def _counts(self, drawable: bool) -> tuple[list[str], torch.Tensor]:
        """Buckets, all or those that have latents, and the number of rows up to the end of each."""
        names = [bucket for bucket in self.rows if not (drawable and bucket == "prompts")]
        return names, torch.tensor([int(self.rows[bucket][1][-1]) for bucket in names]).cumsum(0)

    def latents(self, n: int, gen: torch.Generator, mine: slice = slice(None)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents (m, C, h, w) float32 and cond of one bucket, which is drawn by its size. UserError: there are prompts alone."""
        names, ends = self._counts(drawable=True)
        if not names:
            raise UserError(f"{self.folder} was made of prompts alone: give --data with pictures, or train on rollouts alone")
        bucket = names[int(torch.searchsorted(ends, torch.randint(int(ends[-1]), (1,), generator=gen), right=True))]
        pick = torch.randint(int(self.rows[bucket][1][-1]), (n,), generator=gen)[mine]
        cond = self._gather([(bucket, row) for row in pick.tolist()], latents=True)
        return cond.pop("latents").float(), cond

    def conditions(self, n: int, gen: torch.Generator, mine: slice = slice(None)) -> dict[str, torch.Tensor]:
        """cond of captions of any bucket, with the time_ids of null(): those of a whole square picture, as for drawing one."""
        names, ends = self._counts(drawable=False)
        pick = torch.randint(int(ends[-1]), (n,), generator=gen)[mine]
        which = torch.searchsorted(ends, pick.contiguous(), right=True)
        starts = torch.cat([ends.new_zeros(1), ends])
        cond = self._gather([(names[b], row) for b, row in zip(which.tolist(), (pick - starts[which]).tolist(), strict=True)])
        return cond | {k: v.expand(len(pick), -1) for k, v in self._null.items() if k == "time_ids"}

    def null(self) -> dict[str, torch.Tensor]:
        """cond of the unconditional branch, batch 1."""
        return dict(self._null)


class Trajectories:
    """The guided teacher's own solutions of n captions, drawn once: states (E, n, C, H, W) fp16 at `times` (E,), and cond.

    Kept in `folder` as shards, which the ranks share out; a killed run goes on with those that are missing. Damaged ones
    are drawn again. `network` says path and latents; `micro` captions are drawn at a time (0: a shard), on `device`. UserError
    if a state is no number."""

    SHARD = 128  # captions

    def __init__(self, folder: Path, teacher, network, examples, n: int, times, seed: int, micro: int, device):
        self.times, states, conds, runs, run = times, [], [], [], files.run_digest(folder.parent)

        def shard(k: int) -> Path:
            return folder / f"{k:06d}.safetensors"

        for i, k in enumerate(tqdm(range(0, n, self.SHARD), desc="teacher trajectories")):
            gen, size = step_generator(seed, k, stream=3), min(self.SHARD, n - k)
            conds.append(examples.conditions(size, gen, slice(None)))
            captions = b"".join(conds[-1][name].detach().cpu().contiguous().view(torch.uint8).numpy() for name in sorted(conds[-1]))
            runs.append(f"{run} {hashlib.sha256(captions).hexdigest()[:16]}")  # other data are other trajectories
            if i % process_count() == process_index() and not files.is_good(shard(k), runs[i], "it is drawn again"):
                x_T, parts = torch.randn(size, *network.latent, generator=gen), []
                for rows in torch.arange(size).split(micro or size):
                    cond = {name: v[rows].to(device) for name, v in conds[-1].items()}
                    x, at = x_T[rows].to(device), times.to(device)
                    parts.append(tdpt.rollout_states(teacher, network.path, x, cond, at).half().cpu())
                drawn = torch.cat(parts, 1)
                if not drawn.isfinite().all():
                    raise UserError(f"the teacher's trajectories {k} to {k + size} are no numbers: look at --teacher or --guidance")
                files.write_tensors(shard(k), {"states": drawn}, {}, runs[i])
        if dist.is_initialized():
            dist.barrier()
        for k, run in zip(range(0, n, self.SHARD), runs, strict=True):
            states.append(files.read_verified(shard(k), "run the same command again, it will be drawn again", run)[0]["states"])
        self.states, self.cond = torch.cat(states, 1), {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
