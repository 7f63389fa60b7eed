"""Resuming: the state of a training after some update, and the signals that end a run without losing one.

State. state.safetensors has the trained parameters, the optimizers' moments after some step, and the lines of metrics.jsonl up to
there: all that resuming needs, since everything random is a function of (seed, step). metrics.jsonl is written anew from it when
a run goes on, so no line is lost, halved or twice.

Signals. SIGTERM or Ctrl-C during training: the current micro-batch ends, on all processes. If it was the last of its update, the
update is made, else it is given up (with --shard-teacher it is always finished). Then the state is saved and the process ends
with code 0 (SIGTERM) or 130 (Ctrl-C). At any other time, or at the second signal, it ends at once. The same command goes on.
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from run import files
from run.common import UserError, process_count, process_index

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # exit codes


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
        old = {number: signal.signal(number, handler) for number in EXIT_CODES}
        try:
            return main(argv)
        except UserError:
            raise
        except BaseException:
            with contextlib.suppress(Stopped):
                process_index()  # a signal that came while a collective operation failed is handled at this call
            if not stop.asked:
                raise
            if process_index() == 0:
                print(f"stopped by {signal.Signals(stop.asked).name}{stop.saved}: the same command goes on from there", flush=True)
            sys.exit(EXIT_CODES[stop.asked])
        finally:
            for number, former in old.items():
                signal.signal(number, former)
            stop.asked, stop.wait, stop.saved = 0, False, ""

    return wrapped


class TrainingState:
    """Trainable parameters, their optimizers and moments, by name. cfg: optimizer, lr, warmup, steps, clip, shard_teacher.

    muon: Muon (Jordan et al. 2024) on the matrices inside the network's blocks, AdamW on embeddings, convolutions, norms,
    biases and the layers at both ends. Muon's step, scaled to AdamW's size (Liu et al. 2025), is taken 5 times as long: after
    200 updates of tiny-flux the validation loss was .441 with 10 times as long ones, .470 with equal ones, .533 with AdamW."""

    MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

    def __init__(self, out: Path, params: dict[str, torch.Tensor], cfg):
        self.path, self.previous = out / "state.safetensors", out / "state-previous.safetensors"
        self.start, self.params, self.cfg, self.run = out / "start.safetensors", params, cfg, files.run_digest(out)
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
        if process_count() > 1:
            flat = torch.cat([p.grad.flatten() for p in params] + [params[0].new_tensor([loss, self.stopping, self.given_up])])
            dist.all_reduce(flat)
            *grads, mean = flat.div_(process_count()).split([p.numel() for p in params] + [3])
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
        if process_index() == 0:
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
        if process_index() == 0:
            moments = {
                f"{key}.{k}": value
                for k, optimizer in self.optimizer_of.items()
                for key, value in optimizer.state[self.params[k]].items()
                if key in self.MOMENTS
            }
            metrics = {"metrics.jsonl": torch.tensor(list(self.lines.encode()), dtype=torch.uint8)}
            tensors = {f"p.{k}": p for k, p in self.params.items()} | moments | metrics | (extra or {})
            if self.good:
                with files.atomic(self.previous) as file:
                    files.link_or_copy(self.path, file)  # the first one stays until the new state takes it
            files.write_tensors(self.path, tensors, {"step": step, "start": files.recorded_checksum(self.start)}, self.run)
            self.good = True
        stop.wait = step < self.cfg.steps
        if self.stopping or (stop.asked and not stop.wait):
            stop.asked, stop.saved = stop.asked or signal.SIGTERM, f" after update {step}, which is saved"
            raise Stopped

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates done, every tensor of the file); (0, {}) where there is no file.

        From here to the last save, a signal waits for the end of a micro-batch or update. UserError if no state is good."""
        tensors, info = self._newest()
        if info.get("start", "") != (files.recorded_checksum(self.start) if tensors else ""):
            raise UserError(f"{self.start} is not what the state was trained from: restore it, or delete the folder to begin again")
        for k, p in self.params.items() if tensors else ():
            p.data.copy_(tensors[f"p.{k}"])
            moments = {key: tensors[f"{key}.{k}"].to(p.device, copy=True) for key in self.MOMENTS if f"{key}.{k}" in tensors}
            if moments:  # none if the first update was given up
                self.optimizer_of[k].state[p] = {"step": torch.tensor(float(info["step"])), **moments}
        if process_index() == 0:
            self.lines = bytes(tensors["metrics.jsonl"].tolist()).decode() if tensors else ""
            with files.atomic(self.path.with_name("metrics.jsonl")) as file:
                file.write_text(self.lines)
        stop.wait = info["step"] < self.cfg.steps
        return info["step"], tensors

    def _newest(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and info of the newest good state; ({}, {"step": 0}) where there is none at all."""
        found, damage = [path for path in (self.path, self.previous) if path.exists()], []
        for path in found:
            try:
                tensors, info = files.read_verified(path, "", self.run)
            except UserError as error:
                damage.append(str(error).removesuffix(": "))
            else:
                self.good = path == self.path
                if damage and process_index() == 0:
                    print(f"{damage[0]}: going on from {path.name}, {info['step']} updates")
                return tensors, info
        if damage:
            names = " and ".join(path.name for path in found)
            raise UserError(f"{damage[0]}, and no other state is good: delete {names} to begin again from the start")
        return {}, {"step": 0}
