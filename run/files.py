"""Files of a run: written so that a kill at any moment loses nothing, with their own checksum. No pickle is ever loaded.

    config.json          format version, every field of Config, versions; after training also the table of layers
    start.safetensors    the packed student before training, with its anchor A0, B0
    trajectories/        the teacher's, if rollouts follow them; cache/: latents and embeddings of real models (data/cache.py)
    state.safetensors    what resuming needs (run/state.py); state-previous.safetensors is the one before
    metrics.jsonl        a line per update
    model.safetensors    the deployed checkpoint (models/checkpoint.py)
    pipeline/            the same with all that diffusers needs to draw (--export diffusers)
    unfinished/          the checkpoint of what was saved last, where sample.py was asked for pictures of an unfinished run
    samples/*.png        pictures
    losses.png           the curves of metrics.jsonl
    report.json          the closing lines' numbers; seconds.json: what the layers took in drawing their pictures
    evaluation*/         scores of evaluate.py, with intervals, and the pictures of models with public weights
    report.html          the page about the run (run/report.py)

Every file is written under a temporary name, synced and renamed.

Checksums. Near its beginning a file has the word `sha256` and 64 hexadecimal digits: SHA-256 of the whole file, with zeros in
their place. In a safetensors file they are the first words of the metadata, in a JSON file those of the object. Nothing lies
beside the file, so no kill comes between it and its checksum. Any bit that flips is noticed, in the header and the digits too; so
is a file that was cut or has grown. A checksum is no signature: it notices accidents, not somebody who computes it anew.

Damage. Safetensors files also carry their name and the run they belong to (a digest of its configuration), so a good file of
another run or role is noticed too. What train.py can make again it makes again, and says so: the start (the state knows the
checksum of the one it was trained from, and refuses any other), cached trajectories, config.json, and at its end the model.
Instead of a damaged state it takes the previous one. Where that is damaged too, and in sample.py and evaluate.py, a UserError
names the file.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from run.common import UserError, process_index, wait_for_all

ASSETS = Path(__file__).parents[1] / "assets"
EMPTY = "0" * 64  # what a writer leaves for `seal`
MARK = re.compile(rb"sha256\W{1,8}([0-9a-f]{64})")
HEAD, CHUNK = 1 << 16, 1 << 24  # bytes


def _digest(path: Path) -> tuple[re.Match | None, str]:
    """(where the digits stand, SHA-256 of the file with zeros there)."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        if not (found := MARK.search(head)):
            return None, ""
        digest = hashlib.sha256(head[: found.start(1)] + EMPTY.encode() + head[found.end(1) :])
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return found, digest.hexdigest()


def seal(path: Path) -> None:
    """Write the checksum of a complete file over the zeros that its writer left."""
    found, digest = _digest(path)
    if not found or found[1] != EMPTY.encode():
        raise ValueError(f"{path} has no place for a checksum")
    with open(path, "r+b") as file:
        file.seek(found.start(1))
        file.write(digest.encode())


def recorded_checksum(path: Path) -> str:
    """The checksum that the file carries, unchecked; "" if it carries none or does not exist."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        found = MARK.search(file.read(HEAD))
    return found[1].decode() if found else ""


def checksum(path: Path) -> str:
    """The checksum of an intact file; "" if it carries none. ValueError if the file is not what was written."""
    found, digest = _digest(path)
    if found and found[1] != digest.encode():
        raise ValueError("its content does not fit its checksum")
    return digest


FORMAT = 4
READABLE = (3, FORMAT)  # formats that read_config understands
RENAMED = {"phases": "sampling_steps", "edges": "tdpt_phases"}  # fields of the configuration: name in format 3, name today
LEFTOVER = re.compile(r".*\.\d+\.tmp|\.tmp\w{6}|probe\.tmp")  # by a killed run; the second are safetensors' own


@contextlib.contextmanager
def atomic(path: Path):
    """Inside, write the file that is handed out; afterwards it is synced and becomes `path`. UserError if the disk is full."""
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")  # two runs may make the same cache at a time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name outlives a power cut too
        os.close(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}): free some space and run the same command again to resume") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], info: dict, run: str = "") -> None:
    """A safetensors file; `info` (JSON), checksum, name and `run` go into its metadata. Equal contents are equal bytes."""
    about = {"sha256": EMPTY, "file": path.name, "run": run}
    with atomic(path) as file:
        # one entry of metadata: several would stand in an order that differs between two writers
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file, {"info": json.dumps(about | info)})
        seal(file)


def verify(path: Path, hint: str, run: str | None = None, sealed: bool = True) -> dict:
    """Info of a safetensors file, all of which was compared with its checksum; it may have none if not `sealed`.

    UserError if it is missing or damaged, or, where `run` is given, if it is another run's or has another name; `hint` says
    what to do."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: {hint}")
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
        if not checksum(path) and sealed:
            raise ValueError("it has no checksum")
        if not isinstance(info, dict):
            raise ValueError("what its metadata says as info is not ours")
    except (SafetensorError, OSError, ValueError) as error:
        damage = "damaged" if sealed else "not a safetensors file"
        raise UserError(f"{path} is truncated or {damage} ({error}): {hint}") from None
    name, its = info.pop("file", ""), info.pop("run", "")
    if run is not None and (name, its) != (path.name.replace("-previous", ""), run):
        raise UserError(f"{path} was swapped (it is {name} of {'this' if its == run else 'another'} run): {hint}")
    return {k: v for k, v in info.items() if k != "sha256"}


def read_verified(path: Path, hint: str, run: str | None = None, sealed: bool = True) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and info of a verified file; if a training replaces it meanwhile, of the new one."""

    def version() -> tuple | None:
        about = path.stat() if path.exists() else None
        return about and (about.st_ino, about.st_mtime_ns)

    before, info = version(), verify(path, hint, run, sealed)
    tensors = load_file(path)
    return (tensors, info) if version() == before else read_verified(path, hint, run, sealed)


def read_tensors(path: Path, hint: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The same of a file that may be somebody else's, without checksum."""
    return read_verified(path, hint, sealed=False)


def is_good(path: Path, run: str, otherwise: str) -> bool:
    """Whether a file is there and good. One that is there and is not is named, with what happens otherwise."""
    try:
        return path.exists() and verify(path, otherwise, run) is not None
    except UserError as error:
        print(error)
        return False


def remove_leftovers(folder: Path, seconds: float = 0) -> None:
    """Deletes what killed runs left half-written in a folder of ours, if it is older than that."""
    for file in folder.glob("*"):
        if LEFTOVER.fullmatch(file.name) and file.is_file() and time.time() - file.stat().st_mtime >= seconds:
            file.unlink(missing_ok=True)


def fingerprint(*paths: str) -> str:
    """Digest of local files and folders of weights: names, sizes and the ends of every safetensors file. Hub ids say nothing.
    UserError for a file of ours that does not fit its checksum."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        try:
            if path.is_file():
                checksum(path)
        except ValueError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): copy it again, or delete it to train it again") from None
        for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):  # none in what is a hub id
            with open(file, "rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                ends = [opened.read(1 << 20) for at in (0, max(0, size - (1 << 20))) if opened.seek(at) >= 0]
            digest.update(f"{file.relative_to(path.parent)} {size} ".encode() + b"".join(ends))
    return digest.hexdigest()[:16]


def flag(field: str, value) -> str:
    """A field of train.Config as the command line has it."""
    name = field.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}"


def refuse_another(out: Path, config: dict, may_change: Set[str] = frozenset(), defaults: dict | None = None) -> None:
    """UserError if the run in `out` cannot go on as `config`, in fields other than those of may_change. DamagedConfig as
    read_config. A field that the run does not know, since it is of an older version, had its value in `defaults` there."""
    old = (defaults or {}) | read_config(out)["config"]
    quarters = {"rank_granule": (0, lambda: max(1, old["rank"] // 4)), "rank_least": (-1, lambda: old["rank"] // 4)}
    old |= {k: quarter() for k, (sign, quarter) in quarters.items() if old.get(k) == sign}  # which stood for them once
    asked = {k for k in config.keys() & old.keys() - may_change if str(old[k]) != str(config[k])}  # --split 0.5 was a number once
    moved = {k for k in ("teacher", "cm", "components") if config.get(k) and Path(config[k]).exists()}  # "files of .." has these
    if changed := sorted(asked - moved):
        began = " ".join(flag(k, old[k]) for k in changed if k.isidentifier())
        go_on = f", or go on with {began}" if began else ""
        raise UserError(f"{out} holds a run with another {', '.join(changed)}: choose another --out, or delete the folder{go_on}")


def open_run(out: Path, config: dict, leader: bool, **known) -> None:
    """Make sure that `out` can be written before anything costly, and that it is no other configuration's, by refuse_another with
    the arguments `known`. UserError if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if leader:
            for name in ("", "trajectories", "cache", "samples") if (out / "config.json").exists() else ():
                remove_leftovers(out / name)
            with tempfile.TemporaryFile(dir=out) as probe:
                probe.write(bytes(64 << 20))  # room for a state
    except OSError as error:
        raise UserError(f"cannot write to the run folder {out} ({error.strerror}): choose another --out or free 64 MB") from None
    begun = any((out / f"{name}.safetensors").exists() for name in ("start", "state", "state-previous", "model"))
    if begun:
        try:
            refuse_another(out, config, **known)
        except DamagedConfig:  # all of it can be had again; if it was another configuration's, the other files know
            begun = False
            if leader:
                print(f"{out}/config.json is missing or damaged: it is written again")
    if not begun and leader:
        git, commit = ["git", "rev-parse", "--short", "HEAD"], ""
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip()
        write_json(out / "config.json", {"format": FORMAT, "config": config, "torch": torch.__version__, "commit": commit})
    wait_for_all()  # from here on every process finds a good config.json
    if not (out / "config.json").is_file():
        where = f"process {process_index()} does not see {out.absolute()}"
        raise UserError(f"{where}: give --out (and --cache) on a disk that all machines share")


class DamagedConfig(UserError):
    """config.json is missing or not what was written."""


def write_json(path: Path, about: dict) -> None:
    """A JSON file with its checksum as first entry."""
    with atomic(path) as file:
        file.write_text(json.dumps({"sha256": EMPTY} | about | {"sha256": EMPTY}, indent=1))
        seal(file)


def read_config(folder: Path) -> dict:
    """config.json, as today's format has it.

    UserError if it is of another format version, DamagedConfig if it is missing or damaged."""
    try:
        about = json.loads((folder / "config.json").read_text())
        if about["format"] not in READABLE:
            formats = f"checkpoint format {about['format']}, this code reads {' and '.join(map(str, READABLE))}"
            raise UserError(f"{folder} has {formats}: use the version that wrote it")
        if not checksum(folder / "config.json"):
            raise ValueError
        return about | {"format": FORMAT, "config": {RENAMED.get(k, k): v for k, v in about["config"].items()}}
    except NotADirectoryError:
        raise UserError(f"{folder} is a file: give the folder that train.py wrote") from None
    except FileNotFoundError:
        raise DamagedConfig(f"{folder} holds no checkpoint: train one with `python train.py --out {folder}`") from None
    except UserError:  # is a ValueError too
        raise
    except (ValueError, KeyError, TypeError):
        raise DamagedConfig(f"{folder}/config.json is damaged: restore it, or run its train.py command again") from None


def read_finished(folder: Path) -> dict:
    """config.json of a finished student, with the table of its layers. UserError for another run."""
    about = read_config(folder)
    if about["config"].get("bits") == 16 or about["config"].get("stage") == "teacher":
        raise UserError(f"{folder} holds 16-bit weights, no packed student: give them to train.py by --cm or --teacher")
    if "layers" not in about:
        raise UserError(f"{folder} is an unfinished run: run its train.py command again")
    return about


def run_digest(folder: Path) -> str:
    """What the files of a run folder have in common: a digest of its configuration; "" where there is no config.json.

    It is made of the names in format 3, so that the files of older runs stay their own."""
    if not (folder / "config.json").exists():
        return ""
    first_names = {new: old for old, new in RENAMED.items()}
    return digest_of({first_names.get(k, k): v for k, v in read_config(folder)["config"].items()})


def digest_of(about) -> str:
    """16 hexadecimal digits that stand for something that JSON can hold."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def most_steps(config: dict) -> int:
    """The largest number of steps that a run's student learns to draw in: what pictures are drawn with unless a call says else."""
    return max(map(int, config["sampling_steps"].split(",")))
