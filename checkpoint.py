"""Run folders and checkpoints: safetensors and JSON, written so that a kill at any moment loses nothing.

    config.json          format version, every field of Config, versions; after training also the table of layers
    start.safetensors    the packed student before training, with its anchor A0, B0
    trajectories/        the teacher's, if rollouts follow them; cache/: latents and embeddings of SDXL and FLUX (cache.py)
    state.safetensors    LoRA parameters and Adam moments after some step, and the lines of metrics.jsonl up to there: all that
                         resuming needs; state-previous.safetensors is the one before
    metrics.jsonl        a line per update; written anew from the state when a run goes on, so no line is lost, halved or twice
    model.safetensors    the deployed checkpoint: packed codes uint8, multipliers two to a byte, scales one byte, LoRA (bfloat16,
                         or int8 with two scales a rank), the 16-bit layers and the text encoder bfloat16
    samples/*.png

Every file is written under a temporary name, synced and renamed. No pickle is ever loaded.

Damage. config.json and all safetensors files carry their own checksum (integrity.py), the latter also their name and the run
they belong to (a digest of its configuration): a flipped bit, a cut file and a good file of another run or role are noticed
when the file is read. What train.py can make again it makes again, and says so: the start (the state knows the checksum of the
one it was trained from, and refuses any other), cached trajectories, config.json, and at its end the model. Instead of a
damaged state it takes the previous one. Where that is damaged too, and in sample.py and evaluate.py, a UserError names the file.

Signals. SIGTERM or Ctrl-C during training: the current micro-batch ends, on all ranks. If it was the last of its update, the
update is made, else it is given up (with --shard-teacher it is always finished). Then the state is saved and the process ends
with code 0 (SIGTERM) or 130 (Ctrl-C). At any other time, or at the second signal, it ends at once. The same command goes on.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import data
import hgs_lora
import integrity
import kernels
import models
import tdpt
from models import UserError

FORMAT = 3
# how much is held at a time, written, or drawn at the end: a run may go on with others
MAY_CHANGE = {"micro", "memory_limit", "checkpointing", "offload", "shard_teacher", "hessian_mb", "save_every", "eval_n", "export"}
KINDS = {"w4a16": hgs_lora.W4A16Linear, "w4a4": hgs_lora.W4A4Linear, "w4a4conv": hgs_lora.W4A4Conv2d}
LEFT = re.compile(r".*\.\d+\.tmp|\.tmp\w{6}|probe\.tmp")  # by a killed run; the second are safetensors' own
CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # exit codes

# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Stopped(BaseException):
    """Leaves main after a signal; `stoppable` turns it into a sentence and an exit code."""


stop = SimpleNamespace(asked=0, wait=False, saved="")  # signal that came, whether an update is to be finished, what was saved


def stoppable(main):
    """Decorator of main(argv): SIGTERM and SIGINT end it with a sentence and their code of CODES."""

    def handler(number, frame):
        again, stop.asked = stop.asked, number
        if again or not stop.wait:
            raise Stopped

    @functools.wraps(main)
    def wrapped(argv):
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
            return main(argv)
        old = {number: signal.signal(number, handler) for number in CODES}
        try:
            return main(argv)
        except UserError:
            raise
        except BaseException:
            with contextlib.suppress(Stopped):
                rank()  # a signal that came while a collective operation failed is handled at this call
            if not stop.asked:
                raise
            if rank() == 0:
                print(f"stopped by {signal.Signals(stop.asked).name}{stop.saved}: the same command goes on from there", flush=True)
            sys.exit(CODES[stop.asked])
        finally:
            for number, former in old.items():
                signal.signal(number, former)
            stop.asked, stop.wait, stop.saved = 0, False, ""

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Files


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


def second_name(path: Path, name: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def write(path: Path, tensors: dict[str, torch.Tensor], info: dict, run: str = "") -> None:
    """A safetensors file; `info` (JSON), checksum, name and `run` go into its metadata. Equal contents are equal bytes."""
    about = {"sha256": integrity.EMPTY, "file": path.name, "run": run}
    with atomic(path) as file:
        # one entry of metadata: several would stand in an order that differs between two writers
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file, {"info": json.dumps(about | info)})
        integrity.seal(file)


def verify(path: Path, hint: str, run: str | None = None) -> dict:
    """Info of a file that `write` wrote, all of which was compared with its checksum.

    UserError if it is missing or damaged, or, where `run` is given, if it is another run's or has another name; `hint` says
    what to do."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: {hint}")
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
        if not integrity.check(path):
            raise ValueError("it has no checksum")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): {hint}") from None
    name, its = info.pop("file", ""), info.pop("run", "")
    if run is not None and (name, its) != (path.name.replace("-previous", ""), run):
        raise UserError(f"{path} was swapped (it is {name} of {'this' if its == run else 'another'} run): {hint}")
    return {k: v for k, v in info.items() if k != "sha256"}


def read(path: Path, hint: str, run: str | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and info of a verified file."""
    info = verify(path, hint, run)
    return load_file(path), info


def usable(path: Path, run: str, otherwise: str) -> bool:
    """Whether a file is there and good. One that is there and is not is named, with what happens otherwise."""
    try:
        return path.exists() and verify(path, otherwise, run) is not None
    except UserError as error:
        print(error)
        return False


def remove_left(folder: Path, seconds: float = 0) -> None:
    """Deletes what killed runs left half-written in a folder of ours, if it is older than that."""
    for file in folder.glob("*"):
        if LEFT.fullmatch(file.name) and file.is_file() and time.time() - file.stat().st_mtime >= seconds:
            file.unlink(missing_ok=True)


def refuse_another(out: Path, config: dict) -> None:
    """UserError if the run in `out` cannot go on as `config`; Damaged as read_config."""
    old = read_config(out)["config"]
    asked = {k for k in config if k not in MAY_CHANGE and old.get(k, config[k]) != config[k]}  # older versions know fewer
    moved = {k for k in ("teacher", "cm", "components") if config.get(k) and Path(config[k]).exists()}  # "files of .." has these
    if changed := sorted(asked - moved):
        raise UserError(f"{out} holds a run with another {', '.join(changed)}: choose another --out, or delete the folder")


def open_run(out: Path, config: dict, leader: bool) -> None:
    """Make sure that `out` can be written before anything costly, and that it is no other configuration's. UserError if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if leader:
            for name in ("", "trajectories", "cache", "samples") if (out / "config.json").exists() else ():
                remove_left(out / name)
            with open(out / "probe.tmp", "wb") as probe:
                probe.write(bytes(64 << 20))  # room for a state
            (out / "probe.tmp").unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            (out / "probe.tmp").unlink()
        raise UserError(f"cannot write to the run folder {out} ({error.strerror}): choose another --out or free 64 MB") from None
    known = False
    if any((out / f"{name}.safetensors").exists() for name in ("start", "state", "state-previous", "model")):
        try:
            refuse_another(out, config)
            known = True
        except Damaged:  # all of it can be had again; if it was another configuration's, the other files know
            if leader:
                print(f"{out}/config.json is missing or damaged: it is written again")
    if not known and leader:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = ""
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        write_config(out, {"format": FORMAT, "config": config, "torch": torch.__version__, "commit": commit})
    if dist.is_initialized():
        dist.barrier()  # from here on every rank finds a good config.json
        if not (out / "config.json").is_file():
            where = f"process {rank()} does not see {out.absolute()}"
            raise UserError(f"{where}: give --out (and --cache) on a disk that all machines share")


class Damaged(UserError):
    """config.json is missing or not what was written."""


def write_json(path: Path, about: dict) -> None:
    """A JSON file with its checksum as first entry."""
    with atomic(path) as file:
        file.write_text(json.dumps({"sha256": integrity.EMPTY} | about | {"sha256": integrity.EMPTY}, indent=1))
        integrity.seal(file)


def write_config(out: Path, about: dict) -> None:
    write_json(out / "config.json", about)


def read_config(folder: Path) -> dict:
    """config.json. UserError if it is of another format version, Damaged if it is missing or damaged."""
    try:
        about = json.loads((folder / "config.json").read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {about['format']}, this code reads {FORMAT}: use the version that wrote it"
            )
        if not integrity.check(folder / "config.json"):
            raise ValueError
        return about | {"config": dict(about["config"])}
    except NotADirectoryError:
        raise UserError(f"{folder} is a file: give the folder that train.py wrote") from None
    except FileNotFoundError:
        raise Damaged(f"{folder} holds no checkpoint: train one with `python train.py --out {folder}`") from None
    except UserError:  # is a ValueError too
        raise
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{folder}/config.json is damaged: restore it, or run its train.py command again") from None


def run_of(folder: Path) -> str:
    """What the files of a run folder have in common: a digest of its configuration; "" where there is no config.json."""
    if not (folder / "config.json").exists():
        return ""
    return hashlib.sha256(json.dumps(read_config(folder)["config"], sort_keys=True).encode()).hexdigest()[:16]


def join(device: str) -> None:
    """Become a rank of the torchrun that started this process, if one did; each has a GPU of its own."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        hours = datetime.timedelta(hours=3)  # between two exchanges one rank may calibrate FLUX
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=hours)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


class State:
    """Trainable parameters, their optimizers and moments, by name. cfg: optimizer, lr, warmup, steps, clip, shard_teacher.

    muon: Muon (Jordan et al. 2024) on the matrices inside the network's blocks, AdamW on embeddings, convolutions, norms,
    biases and the layers at both ends. Muon's step, scaled to AdamW's size (Liu et al. 2025), is taken 5 times as long: after
    200 updates of tiny-flux the validation loss was .441 with 10 times as long ones, .470 with equal ones, .533 with AdamW."""

    MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

    def __init__(self, out: Path, params: dict[str, torch.Tensor], cfg):
        self.path, self.previous = out / "state.safetensors", out / "state-previous.safetensors"
        self.start, self.params, self.cfg, self.run = out / "start.safetensors", params, cfg, run_of(out)
        self.lines, self.good, self.stopping = "", False, False  # of metrics.jsonl; whether the newest state is; whether to stop
        self.given_up = False  # whether the update is not to be made, since a signal came before its gradients were complete
        inner = {k: p for k, p in params.items() if cfg.optimizer == "muon" and p.dim() == 2 and "block" in k}
        rest = [p for k, p in params.items() if k not in inner]
        self.optimizers = [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01)] if rest else []
        if inner:
            muon = torch.optim.Muon(inner.values(), lr=5 * cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        self.optimizer_of = {k: self.optimizers[-1 if k in inner else 0] for k in params}

    def unless_stopped(self, parts):
        """The micro-batches; a signal ends them and the update is given up: one of FLUX may take longer than a scheduler waits.
        Ranks that share a teacher make all calls, which the others wait for."""
        for part in parts:
            self.given_up = self.given_up or bool(stop.asked and not self.cfg.shard_teacher)
            if self.given_up:
                return
            yield part

    def update(self, step: int, loss: float, log) -> None:
        """Average gradients and loss over ranks (one all-reduce), clip, AdamW with warm-up and cosine, one line in metrics.jsonl.

        A loss or gradient that is no number stops the run (UserError); the last saved state stays. A signal on any rank goes
        round with the loss, so all ranks stop after the same update, or before it if one of them gave it up."""
        params = list(self.params.values())
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a layer that this update did not use
        self.stopping = bool(stop.asked)
        if world() > 1:
            flat = torch.cat([p.grad.flatten() for p in params] + [params[0].new_tensor([loss, self.stopping, self.given_up])])
            dist.all_reduce(flat)
            *grads, mean = flat.div_(world()).split([p.numel() for p in params] + [3])
            loss, self.stopping, self.given_up = mean[0].item(), bool(mean[1] > 0), bool(mean[2] > 0)
            for p, g in zip(params, grads, strict=True):
                p.grad.copy_(g.view_as(p))
        if self.given_up:
            return
        warm, decay = min(1.0, (step + 1) / max(1, self.cfg.warmup)), 0.5 * (1 + math.cos(math.pi * step / self.cfg.steps))
        norm = torch.nn.utils.clip_grad_norm_(params, self.cfg.clip).item()
        if not math.isfinite(loss + norm):
            kept = f"{self.path} keeps an earlier step" if self.path.exists() else "nothing was saved yet"
            what = f"step {step}: loss {loss}, gradient norm {norm}"
            raise UserError(f"{what}: look at the data, or lower --lr and change --out ({kept})")
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * warm * decay
            optimizer.step()
            optimizer.zero_grad()
        if rank() == 0:
            line = json.dumps({"step": step, "loss": loss, "norm": norm, "lr": self.cfg.lr * warm * decay}) + "\n"
            self.lines += line
            try:
                written = os.write(log.fileno(), line.encode())  # no buffer that is written again when the file is closed
                error = "disk full" if written < len(line) else ""
            except OSError as full:
                error = full
            if error:
                raise UserError(f"cannot write {log.name} ({error}): free some space and run the same command again to resume")

    def due(self, step: int) -> bool:
        """Whether the state after `step` updates is to be saved."""
        return self.stopping or step % self.cfg.save_every == 0 or step == self.cfg.steps

    def save(self, step: int, extra: dict[str, torch.Tensor] | None = None) -> None:
        """Write the state; a good one that is there becomes the previous one. If a signal came, this ends the process."""
        if rank() == 0:
            moments = {
                f"{key}.{k}": value
                for k, optimizer in self.optimizer_of.items()
                for key, value in optimizer.state[self.params[k]].items()
                if key in self.MOMENTS
            }
            metrics = {"metrics.jsonl": torch.tensor(list(self.lines.encode()), dtype=torch.uint8)}
            tensors = {f"p.{k}": p for k, p in self.params.items()} | moments | metrics | (extra or {})
            if self.good:
                with atomic(self.previous) as file:
                    second_name(self.path, file)  # the first one stays until the new state takes it
            write(self.path, tensors, {"step": step, "start": integrity.recorded(self.start)}, self.run)
            self.good = True
        stop.wait = step < self.cfg.steps
        if self.stopping or (stop.asked and not stop.wait):
            stop.asked, stop.saved = stop.asked or signal.SIGTERM, f" after update {step}, which is saved"
            raise Stopped

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates done, every tensor of the file); (0, {}) where there is no file.

        From here to the last save, a signal waits for the end of a micro-batch or update. UserError if no state is good."""
        tensors, info = self._newest()
        if info.get("start", "") != (integrity.recorded(self.start) if tensors else ""):
            raise UserError(f"{self.start} is not what the state was trained from: restore it, or delete the folder to begin again")
        for k, p in self.params.items() if tensors else ():
            p.data.copy_(tensors[f"p.{k}"])
            moments = {key: tensors[f"{key}.{k}"].to(p.device, copy=True) for key in self.MOMENTS if f"{key}.{k}" in tensors}
            if moments:  # none if the first update was given up
                self.optimizer_of[k].state[p] = {"step": torch.tensor(float(info["step"])), **moments}
        if rank() == 0:
            self.lines = bytes(tensors["metrics.jsonl"].tolist()).decode() if tensors else ""
            with atomic(self.path.with_name("metrics.jsonl")) as file:
                file.write_text(self.lines)
        stop.wait = info["step"] < self.cfg.steps
        return info["step"], tensors

    def _newest(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and info of the newest good state; ({}, {"step": 0}) where there is none at all."""
        found, damage = [path for path in (self.path, self.previous) if path.exists()], []
        for path in found:
            try:
                tensors, info = read(path, "", self.run)
            except UserError as error:
                damage.append(str(error).removesuffix(": "))
            else:
                self.good = path == self.path
                if damage and rank() == 0:
                    print(f"{damage[0]}: going on from {path.name}, {info['step']} updates")
                return tensors, info
        if damage:
            names = " and ".join(path.name for path in found)
            raise UserError(f"{damage[0]}, and no other state is good: delete {names} to begin again from the start")
        return {}, {"step": 0}


class Trajectories:
    """The guided teacher's own solutions of n captions, drawn once: states (E, n, C, H, W) fp16 at `times` (E,), and cond.

    Kept in `folder` as shards, which the ranks share out; a killed run goes on with those that are missing. Damaged ones
    are drawn again. `network` says path and latents; `micro` captions are drawn at a time (0: a shard), on `device`. UserError
    if a state is no number."""

    SHARD = 128  # captions

    def __init__(self, folder: Path, teacher, network: models.Denoiser, examples, n: int, times, seed: int, micro: int, device):
        self.times, states, conds, runs, run = times, [], [], [], run_of(folder.parent)

        def shard(k: int) -> Path:
            return folder / f"{k:06d}.safetensors"

        for i, k in enumerate(tqdm(range(0, n, self.SHARD), desc="teacher trajectories")):
            gen, size = data.step_generator(seed, k, stream=3), min(self.SHARD, n - k)
            conds.append(examples.conditions(size, gen, slice(None)))
            captions = b"".join(conds[-1][name].detach().cpu().contiguous().view(torch.uint8).numpy() for name in sorted(conds[-1]))
            runs.append(f"{run} {hashlib.sha256(captions).hexdigest()[:16]}")  # other data are other trajectories
            if i % world() == rank() and not usable(shard(k), runs[i], "it is drawn again"):
                x_T, parts = torch.randn(size, *network.latent, generator=gen), []
                for rows in torch.arange(size).split(micro or size):
                    cond = {name: v[rows].to(device) for name, v in conds[-1].items()}
                    x, at = x_T[rows].to(device), times.to(device)
                    parts.append(tdpt.rollout_states(teacher, network.path, x, cond, at).half().cpu())
                drawn = torch.cat(parts, 1)
                if not drawn.isfinite().all():
                    raise UserError(f"the teacher's trajectories {k} to {k + size} are no numbers: look at --teacher or --guidance")
                write(shard(k), {"states": drawn}, {}, runs[i])
        if dist.is_initialized():
            dist.barrier()
        for k, run in zip(range(0, n, self.SHARD), runs, strict=True):
            states.append(read(shard(k), "run the same command again, it will be drawn again", run)[0]["states"])
        self.states, self.cond = torch.cat(states, 1), {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Packed students


def packed_class(kind: str, layer: nn.Module):
    return KINDS["w4a4conv" if kind == "w4a4" and isinstance(layer, nn.Conv2d) else kind]


def place_packed(net: nn.Module, table: dict[str, dict]) -> None:
    """Packed layers, contents uninitialised, where `table` says so. ValueError or AttributeError if it is not this network's."""
    for name, row in table.items():
        layer, shape = net.get_submodule(name), (row["rank"], row["group_w"], row["group_x"], row["smooth"], row.get("lora", 16))
        net.set_submodule(name, packed_class(row["kind"], layer)(layer, *shape))


def _packed_model(name: str | dict, table: dict[str, dict], tensors: dict[str, torch.Tensor], where: Path) -> models.Denoiser:
    """The architecture (name of a tiny one, or models.blueprint) with packed layers where `table` says so, and `tensors` loaded."""
    student = models.build(name) if isinstance(name, str) else models.from_blueprint(name)
    try:
        place_packed(student.net, table)
        state = student.state_dict()
        tensors = {k: v.to(state[k].dtype) if isinstance(name, str) else v for k, v in tensors.items() if k in state}
        student.load_state_dict(tensors, assign=not isinstance(name, str))
    except (RuntimeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{where} does not fit its table of layers: restore both files, or train again") from None
    student.told = True
    return student.eval().requires_grad_(False)


def network_of(student: models.Denoiser) -> str | dict:
    """What _packed_model builds the architecture from."""
    return student.name if student.name in models.TINY else models.blueprint(student)


def save_start(out: Path, student: models.Denoiser, table: dict) -> None:
    """The initialised student and its anchor, so that a killed run does not calibrate again."""
    anchors = {f"anchor/{k}": v for k, v in hgs_lora.anchor_state(student).items()}
    about = {"layers": table, "network": network_of(student)}
    write(out / "start.safetensors", student.state_dict() | anchors, about, run_of(out))


def has_start(out: Path) -> bool:
    """Whether there is a good start. A damaged one is named; it is to be made again."""
    return usable(out / "start.safetensors", run_of(out), "it is made again")


def load_start(out: Path) -> tuple[models.Denoiser, dict]:
    """Inverse of save_start. UserError for a missing or damaged file."""
    path = out / "start.safetensors"
    tensors, info = read(path, "run the same command again, it will be made again", run_of(out))
    student = _packed_model(info["network"], info["layers"], tensors, path)
    hgs_lora.load_anchor_state(student, {k.removeprefix("anchor/"): v for k, v in tensors.items() if k.startswith("anchor/")})
    return student, info["layers"]


def save_checkpoint(out: Path, student: models.Denoiser, table: dict, merged: bool, lora_bits: int = 16) -> None:
    """model.safetensors and the table of layers in config.json. merged: Q(Q + BA) in place of the branch, rounded to nearest.
    lora_bits 8: `student` takes its deployed form, LoRA in 8 bits and scales of a byte."""
    table = {name: row | {"lora": lora_bits} for name, row in table.items()}
    if merged:
        for name, layer in list(hgs_lora.packed_layers(student.net)):
            hgs_lora.replace(student.net, name, hgs_lora.merge(layer))
            table[name]["rank"] = 0
    if lora_bits == 8:
        hgs_lora.store_8bit(student.net)

    def stored(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key.endswith(".scale_O") and tensor.dtype == torch.float32:
            return kernels.pack_scales(tensor)
        narrow = tensor.dtype == torch.float32 and not key.endswith((".inv_smooth", ".lora_scale"))
        return tensor.bfloat16() if narrow else tensor

    write(out / "model.safetensors", {k: stored(k, v) for k, v in student.state_dict().items()}, {"format": FORMAT}, run_of(out))
    write_config(out, read_config(out) | {"layers": table, "network": network_of(student)})


def load_checkpoint(folder: str | Path) -> tuple[models.Denoiser, dict]:
    """(the packed student, config.json). Tiny ones in models.FAST, others in their run's dtype. UserError for a missing,
    unfinished, truncated or foreign checkpoint."""
    folder = Path(folder)
    about = read_config(folder)
    if about["config"].get("bits") == 16 or about["config"].get("stage") == "teacher":
        raise UserError(f"{folder} holds 16-bit weights, no packed student: give them to train.py by --cm or --teacher")
    hint = "the run is unfinished or damaged, run its train.py command again"
    tensors, _ = read(folder / "model.safetensors", hint, run_of(folder))
    if "layers" not in about:
        raise UserError(f"{folder} is an unfinished run: run its train.py command again")
    floats = {f"net.{name}.scale_O" for name, row in about["layers"].items() if row.get("lora", 16) == 16}
    tensors = {k: kernels.unpack_scales(v) if k in floats else v for k, v in tensors.items()}
    student = _packed_model(about["network"], about["layers"], tensors, folder / "model.safetensors")
    backend = about["config"].get("backend", "native")  # older folders name none
    hgs_lora.set_backend(student, "native" if backend == "compile" and student.name in models.TINY else backend)  # for the CPU
    return student.to(models.FAST if student.name in models.TINY else getattr(torch, about["config"]["dtype"])), about


def size(student: models.Denoiser) -> dict[str, float]:
    """Bits per weight of the quantized layers without LoRA, megabytes of the packed network and of its bf16 twin."""
    packed = [layer for _, layer in hgs_lora.packed_layers(student.net)]
    values = sum(layer.out * layer.taps * layer.channels for layer in packed)
    code_bytes = sum(layer.codes_OP.nbytes + layer.mult_P.nbytes + layer.scale_O.numel() for layer in packed)
    factors = [t for layer in packed for t in (layer.lora_A, layer.lora_B) if t is not None]
    lora = sum(t.numel() * (1 if t.dtype == torch.int8 else 2) for t in factors)
    lora += sum(layer.lora_scale.nbytes for layer in packed if layer.lora_scale is not None)
    inside = {id(t) for layer in packed for t in layer.state_dict(keep_vars=True).values()}
    rest = sum(t.numel() for t in student.net.state_dict(keep_vars=True).values() if id(t) not in inside)
    rest += sum(layer.bias.numel() for layer in packed if layer.bias is not None)
    smooth = sum(layer.inv_smooth.nbytes for layer in packed if layer.inv_smooth is not None)
    mb = (code_bytes + smooth + lora + 2 * rest) / 1e6
    return {"bits_per_weight": 8 * code_bytes / values, "mb": mb, "mb_bf16": 2 * (values + rest) / 1e6, "mb_lora": lora / 1e6}
