"""Run folders and checkpoints: safetensors and JSON, written so that a kill at any moment loses nothing.

    config.json          format version, every field of Config, versions; after training also the table of layers
    start.safetensors    the packed student before training, with its anchor A0, B0
    state.safetensors    LoRA parameters and Adam moments after some step: all that resuming needs
    metrics.jsonl        a line per update
    model.safetensors    the deployed checkpoint: packed codes uint8, multipliers two to a byte, scales one byte, LoRA, the
                         16-bit layers and the text encoder bfloat16
    samples/*.png

Every file is written under a temporary name, synced and renamed. No pickle is ever loaded.
"""

import contextlib
import json
import math
import os
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
import hgs_lora
import kernels
import models
import tdpt
from models import UserError, read_tensors

FORMAT = 2
KINDS = {"w4a16": hgs_lora.W4A16Linear, "w4a4": hgs_lora.W4A4Linear, "w4a4conv": hgs_lora.W4A4Conv2d}


@contextlib.contextmanager
def atomic(path: Path):
    """Inside, write the file that is handed out; afterwards it is synced and becomes `path`. UserError if the disk is full."""
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error}): free some space and run the same command again to resume") from None


def write(path: Path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """A safetensors file; `info` (JSON) goes into its metadata."""
    with atomic(path) as file:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file, {"info": json.dumps(info)})


def open_run(out: Path, config: dict, leader: bool) -> None:
    """Make sure that `out` can be written before anything costly, and that it is no other configuration's. UserError if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if leader:
            with open(out / "probe.tmp", "wb") as probe:
                probe.write(bytes(64 << 20))  # room for a state
            (out / "probe.tmp").unlink()
    except OSError as error:
        (out / "probe.tmp").unlink(missing_ok=True)
        raise UserError(f"cannot write to the run folder {out} ({error.strerror}): choose another --out or free 64 MB") from None
    if any((out / f"{name}.safetensors").exists() for name in ("start", "state", "model")):
        old = read_config(out)["config"]
        if changed := sorted(k for k in config if old.get(k) != config[k]):
            raise UserError(f"{out} holds a run with another {', '.join(changed)}: choose another --out, or delete the folder")
    elif leader:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        write_config(out, {"format": FORMAT, "config": config, "torch": torch.__version__, "commit": commit})


def write_config(out: Path, about: dict) -> None:
    with atomic(out / "config.json") as file:
        file.write_text(json.dumps(about, indent=1))


def read_config(folder: Path) -> dict:
    """config.json. UserError if it is missing, damaged or of another format version."""
    try:
        about = json.loads((folder / "config.json").read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {about['format']}, this code reads {FORMAT}: use the version that wrote it"
            )
        return about | {"config": dict(about["config"])}
    except FileNotFoundError:
        raise UserError(f"{folder} holds no checkpoint: train one with `python train.py --out {folder}`") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{folder}/config.json is damaged: restore it, or delete the folder and train again") from None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


class State:
    """Trainable parameters, their optimizers and moments, by name. cfg: optimizer, lr, warmup, steps, clip.

    muon: Muon (Jordan et al. 2024) on the matrices inside the network's blocks, AdamW on embeddings, convolutions, norms,
    biases and the layers at both ends. Muon's step, scaled to AdamW's size (Liu et al. 2025), is taken 5 times as long: after
    200 updates of tiny-flux the validation loss was .441 with 10 times as long ones, .470 with equal ones, .533 with AdamW."""

    MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

    def __init__(self, out: Path, params: dict[str, torch.Tensor], cfg):
        self.path, self.params, self.cfg = out / "state.safetensors", params, cfg
        inner = {k: p for k, p in params.items() if cfg.optimizer == "muon" and p.dim() == 2 and "block" in k}
        rest = [p for k, p in params.items() if k not in inner]
        self.optimizers = [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01)] if rest else []
        if inner:
            muon = torch.optim.Muon(inner.values(), lr=5 * cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        self.optimizer_of = {k: self.optimizers[-1 if k in inner else 0] for k in params}

    def update(self, step: int, loss: float, log) -> None:
        """Average gradients and loss over ranks (one all-reduce), clip, AdamW with warm-up and cosine, one line in metrics.jsonl.

        A loss or gradient that is no number stops the run (UserError); the last saved state stays."""
        params = list(self.params.values())
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a layer that this update did not use
        if world() > 1:
            flat = torch.cat([p.grad.flatten() for p in params] + [params[0].new_tensor([loss])])
            dist.all_reduce(flat)
            *grads, mean = flat.div_(world()).split([p.numel() for p in params] + [1])
            loss = mean.item()
            for p, g in zip(params, grads, strict=True):
                p.grad.copy_(g.view_as(p))
        warm, decay = min(1.0, (step + 1) / max(1, self.cfg.warmup)), 0.5 * (1 + math.cos(math.pi * step / self.cfg.steps))
        norm = torch.nn.utils.clip_grad_norm_(params, self.cfg.clip).item()
        if not math.isfinite(loss + norm):
            kept = f"{self.path} keeps an earlier step" if self.path.exists() else "nothing was saved yet"
            raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: look at the data or lower --lr ({kept})")
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * warm * decay
            optimizer.step()
            optimizer.zero_grad()
        if rank() == 0:
            print(json.dumps({"step": step, "loss": loss, "norm": norm, "lr": self.cfg.lr * warm * decay}), file=log, flush=True)

    def save(self, step: int, extra: dict[str, torch.Tensor] | None = None) -> None:
        if rank() == 0:
            moments = {
                f"{key}.{k}": value
                for k, optimizer in self.optimizer_of.items()
                for key, value in optimizer.state[self.params[k]].items()
                if key in self.MOMENTS
            }
            write(self.path, {f"p.{k}": p for k, p in self.params.items()} | moments | (extra or {}), {"step": step})

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates done, every tensor of the file); (0, {}) where there is no file."""
        if not self.path.exists():
            return 0, {}
        tensors, info = read_tensors(self.path, "delete it to begin again")
        for k, p in self.params.items():
            p.data.copy_(tensors[f"p.{k}"])
            moments = {key: tensors[f"{key}.{k}"].clone() for key in self.MOMENTS if f"{key}.{k}" in tensors}
            self.optimizer_of[k].state[p] = {"step": torch.tensor(float(info["step"])), **moments}
        return info["step"], tensors


class Trajectories:
    """The guided teacher's own solutions of n captions, drawn once: states (E, n, C, H, W) fp16 at `times` (E,), the captions' cond.

    Kept in `folder` as shards of 128; a killed run goes on with the shard that is missing. `network` says path, device and latents;
    micro captions are drawn at a time (0: a shard)."""

    def __init__(self, folder: Path, teacher, network: models.Denoiser, examples, n: int, times, seed: int, micro: int):
        folder.mkdir(exist_ok=True)
        self.times, states, conds = times, [], []
        for k in tqdm(range(0, n, 128), desc="teacher trajectories"):
            gen, path, size = data.step_generator(seed, k, stream=3), folder / f"{k:06d}.safetensors", min(128, n - k)
            conds.append(examples.conditions(size, gen, slice(None)))
            if not path.exists():
                x_T, parts = torch.randn(size, *network.latent, generator=gen), []
                for rows in torch.arange(size).split(micro or size):
                    cond = {k: v[rows].to(network.device) for k, v in conds[-1].items()}
                    x = x_T[rows].to(network.device)
                    parts.append(tdpt.rollout_states(teacher, network.path, x, cond, times.to(network.device)).half().cpu())
                write(path, {"states": torch.cat(parts, 1)}, {})
            states.append(read_tensors(path, "delete it, it will be drawn again")[0]["states"])
        self.states, self.cond = torch.cat(states, 1), {k: torch.cat([cond[k] for cond in conds]) for k in conds[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Packed students


def packed_class(kind: str, layer: nn.Module):
    return KINDS["w4a4conv" if kind == "w4a4" and isinstance(layer, nn.Conv2d) else kind]


def _packed_model(name: str | dict, table: dict[str, dict], tensors: dict[str, torch.Tensor], where: Path) -> models.Denoiser:
    """The architecture (name of a tiny one, or models.blueprint) with packed layers where `table` says so, and `tensors` loaded."""
    student = models.build(name) if isinstance(name, str) else models.from_blueprint(name)
    layers = models.float_layers(student.net)
    try:
        for key, row in table.items():
            new = packed_class(row["kind"], layers[key])(layers[key], row["rank"], row["group_w"], row["group_x"], row["smooth"])
            hgs_lora.replace(student.net, key, new)
        state = student.state_dict()
        tensors = {k: v.to(state[k].dtype) if isinstance(name, str) else v for k, v in tensors.items() if k in state}
        student.load_state_dict(tensors, assign=not isinstance(name, str))
    except (RuntimeError, KeyError, ValueError):
        raise UserError(f"{where} does not fit its table of layers: restore both files, or train again") from None
    student.told = True
    return student.eval().requires_grad_(False)


def network_of(student: models.Denoiser) -> str | dict:
    """What _packed_model builds the architecture from."""
    return student.name if student.name in models.TINY else models.blueprint(student)


def save_start(out: Path, student: models.Denoiser, table: dict) -> None:
    """The initialised student and its anchor, so that a killed run does not calibrate again."""
    anchors = {f"anchor/{k}": v for k, v in hgs_lora.anchor_state(student).items()}
    write(out / "start.safetensors", student.state_dict() | anchors, {"layers": table, "network": network_of(student)})


def load_start(out: Path) -> tuple[models.Denoiser, dict]:
    """Inverse of save_start. UserError for a missing or damaged file."""
    path = out / "start.safetensors"
    tensors, info = read_tensors(path, "delete it to calibrate again")
    student = _packed_model(info["network"], info["layers"], tensors, path)
    hgs_lora.load_anchor_state(student, {k.removeprefix("anchor/"): v for k, v in tensors.items() if k.startswith("anchor/")})
    return student, info["layers"]


def save_checkpoint(out: Path, student: models.Denoiser, table: dict, merged: bool) -> None:
    """model.safetensors and the table of layers in config.json. merged: Q(Q + BA) in place of the branch, rounded to nearest."""
    table = {name: dict(row) for name, row in table.items()}
    if merged:
        for name, layer in list(hgs_lora.packed_layers(student.net)):
            hgs_lora.replace(student.net, name, hgs_lora.merge(layer))
            table[name]["rank"] = 0

    def stored(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key.endswith(".scale_O"):
            return kernels.pack_scales(tensor)
        return tensor.bfloat16() if tensor.dtype == torch.float32 and not key.endswith(".inv_smooth") else tensor

    write(out / "model.safetensors", {k: stored(k, v) for k, v in student.state_dict().items()}, {"format": FORMAT})
    write_config(out, read_config(out) | {"layers": table, "network": network_of(student)})


def load_checkpoint(folder: str | Path) -> tuple[models.Denoiser, dict]:
    """(the packed student in models.FAST, config.json). UserError for a missing, unfinished, truncated or foreign checkpoint."""
    folder = Path(folder)
    about = read_config(folder)
    tensors, _ = read_tensors(folder / "model.safetensors", "the run is unfinished or damaged, run its train.py command again")
    if "layers" not in about:
        raise UserError(f"{folder} is an unfinished run: run its train.py command again")
    tensors = {k: kernels.unpack_scales(v) if k.endswith(".scale_O") else v for k, v in tensors.items()}
    student = _packed_model(about["network"], about["layers"], tensors, folder / "model.safetensors")
    hgs_lora.set_backend(student, about["config"].get("backend", "native"))  # older folders name none
    return student.to(models.FAST), about


def size(student: models.Denoiser) -> dict[str, float]:
    """Bits per weight of the quantized layers without LoRA, megabytes of the packed network and of its bf16 twin."""
    packed = [layer for _, layer in hgs_lora.packed_layers(student.net)]
    values = sum(layer.out * layer.taps * layer.channels for layer in packed)
    code_bytes = sum(layer.codes_OP.nbytes + layer.mult_P.nbytes + layer.scale_O.numel() for layer in packed)
    lora = sum(p.numel() for layer in packed for p in (layer.lora_A, layer.lora_B) if p is not None)
    inside = {id(t) for layer in packed for t in layer.state_dict(keep_vars=True).values()}
    rest = sum(t.numel() for t in student.net.state_dict(keep_vars=True).values() if id(t) not in inside)
    rest += sum(layer.bias.numel() for layer in packed if layer.bias is not None)
    smooth = sum(layer.inv_smooth.nbytes for layer in packed if layer.inv_smooth is not None)
    mb = (code_bytes + smooth + 2 * (lora + rest)) / 1e6
    return {"bits_per_weight": 8 * code_bytes / values, "mb": mb, "mb_bf16": 2 * (values + rest) / 1e6, "mb_lora": 2 * lora / 1e6}
