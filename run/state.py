"""Resuming: the state of a training after some update, and the signals that end a run without losing one.

State. state.safetensors has the trained parameters, the optimizers' moments after some step, averages of the parameters where a
training keeps any, and the lines of metrics.jsonl up to there: all that resuming needs, since everything random is a function of
(seed, step). metrics.jsonl is written anew from it when a run goes on, so no line is lost, halved or twice. What an update took
(MEASURED) differs between two equal runs, so it stands in metrics.jsonl alone, and equal runs leave equal states.

Signals. SIGTERM or Ctrl-C during training: the current micro-batch ends, on all processes. If it was the last of its update, the
update is made, else it is given up (with --shard-teacher it is always finished). Then the state is saved and the process ends
with code 0 (SIGTERM) or 130 (Ctrl-C). At any other time, or at the second signal, it ends at once. The same command goes on.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from run import files
from run.common import UserError, process_index

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
MEASURED = ("seconds", "pictures_per_second", "peak_memory_gb")  # of a line of metrics.jsonl
stop = SimpleNamespace(asked=0, wait=False, saved="")  # signal that came, whether an update is to be finished, what was saved


class Stopped(BaseException):
    """Leaves main after a signal; `stoppable` turns it into a sentence and an exit code."""


def stoppable(main):
    """Decorator of main(argv): SIGTERM and SIGINT end it with a sentence and their code of EXIT_CODES."""

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


class MicroBatches:
    """Iterates over the micro-batches of one update. A signal ends the iteration and the update is given up (`given_up`): one
    update of FLUX may take longer than a scheduler waits.

    finish: go on to the end all the same; processes that share a teacher wait for each other's calls."""

    def __init__(self, parts: tuple[Tensor, ...], finish: bool = False):
        self.parts, self.finish, self.given_up = parts, finish, False

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.parts:
            if stop.asked and not self.finish:
                self.given_up = True
                return
            yield part


def read_rows(metrics: Path) -> dict[int, dict]:
    """The lines of a metrics.jsonl by their step, without those that cannot be read."""
    rows = []
    for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return {row["step"]: row for row in rows if isinstance(row, dict) and "step" in row}


def reproducible(row: dict) -> dict:
    """A line of metrics.jsonl without what its update took."""
    return {k: v for k, v in row.items() if k not in MEASURED}


def lines_of(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def newest(out: Path) -> tuple[dict[str, Tensor], dict, str]:
    """Tensors, info and file name of the newest good state of a run; ({}, {"step": 0}, "") where there is none at all. A damaged
    one is named. UserError if none is good."""
    run, damage = files.run_digest(out), []
    found = [path for path in (out / "state.safetensors", out / "state-previous.safetensors") if path.exists()]
    for path in found:
        try:
            tensors, info = files.read_verified(path, "", run)
        except UserError as error:
            damage.append(str(error).removesuffix(": "))
        else:
            if info.get("start", "") != files.recorded_checksum(out / "start.safetensors"):
                advice = "restore it, or delete the folder to begin again"
                raise UserError(f"{out / 'start.safetensors'} is not what the state was trained from: {advice}")
            if damage and process_index() == 0:
                print(f"{damage[0]}: going on from {path.name}, {info['step']} updates")
            return tensors, info, path.name
    if damage:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{damage[0]}, and no other state is good: delete {names} to begin again from the start")
    return {}, {"step": 0}, ""


def parameters_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters among the tensors of a state, by their names."""
    return {k.removeprefix("p."): tensor for k, tensor in tensors.items() if k.startswith("p.")}


class TrainingState:
    """What a training of `steps` updates resumes from: params, the moments that `optimizers` keep of them, averages of some of
    them (both dictionaries of tensors by name), and the lines of metrics.jsonl."""

    MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

    def __init__(self, out: Path, params: dict[str, Tensor], optimizers: list, averages: dict[str, Tensor], steps: int):
        self.out, self.path, self.previous = out, out / "state.safetensors", out / "state-previous.safetensors"
        self.start, self.metrics, self.run = out / "start.safetensors", out / "metrics.jsonl", files.run_digest(out)
        self.params, self.averages, self.steps = params, averages, steps
        owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self.optimizer_of = {k: owner[id(p)] for k, p in params.items()}
        self.rows: list[dict] = []  # of metrics.jsonl
        self.good = False  # whether the newest state is

    def log(self, row: dict) -> None:
        """Add a line to metrics.jsonl. UserError if the disk is full."""
        line = json.dumps(row) + "\n"
        self.rows.append(row)
        try:
            with open(self.metrics, "a") as file:
                if os.write(file.fileno(), line.encode()) < len(line):  # no buffer that is written again when the file is closed
                    raise OSError("disk full")
        except OSError as error:
            where = f"cannot write {self.metrics} ({error})"
            raise UserError(f"{where}: free some space and run the same command again to resume") from None

    def save(self, step: int, stopping: bool = False) -> None:
        """Write the state after `step` updates; a good one that is there becomes the previous one.

        If `stopping`, or if a signal came and no further update is to be made, this ends the process."""
        if process_index() == 0:
            moments = {
                f"{key}.{k}": value
                for k, optimizer in self.optimizer_of.items()
                for key, value in optimizer.state[self.params[k]].items()
                if key in self.MOMENTS
            }
            tensors = {f"p.{k}": p for k, p in self.params.items()} | moments
            tensors |= {f"ema.{k}": average for k, average in self.averages.items()}
            lines = lines_of(map(reproducible, self.rows))
            tensors["metrics.jsonl"] = torch.tensor(list(lines.encode()), dtype=torch.uint8)
            if self.good:
                with files.atomic(self.previous) as file:  # a link, so that the first name stays until the new state takes it
                    try:
                        os.link(self.path, file)
                    except OSError:  # the file system has none
                        shutil.copyfile(self.path, file)
            files.write_tensors(self.path, tensors, {"step": step, "start": files.recorded_checksum(self.start)}, self.run)
            self.good = True
        stop.wait = step < self.steps
        if stopping or (stop.asked and not stop.wait):
            stop.asked, stop.saved = stop.asked or signal.SIGTERM, f" after update {step}, which is saved"
            raise Stopped

    def load(self) -> int:
        """Fill parameters, moments and averages from the newest good state -> updates done; 0 where there is no state.

        From here to the last save, a signal waits for the end of a micro-batch or update. UserError if no state is good."""
        tensors, info, name = newest(self.out)
        if tensors:
            self.good = name == self.path.name
            trained = parameters_of(tensors)
            for k, p in self.params.items():
                p.data.copy_(trained[k])
                moments = {key: tensors[f"{key}.{k}"].to(p.device, copy=True) for key in self.MOMENTS if f"{key}.{k}" in tensors}
                if moments:  # none if the first update was given up
                    self.optimizer_of[k].state[p] = {"step": torch.tensor(float(info["step"])), **moments}
            for k, average in self.averages.items():
                average.copy_(tensors[f"ema.{k}"])
            there = read_rows(self.metrics)
            for line in bytes(tensors["metrics.jsonl"].tolist()).decode().splitlines():
                row = json.loads(line)
                measured = there.get(row["step"], {})
                self.rows.append(measured if measured.items() >= row.items() else row)
        if process_index() == 0:
            with files.atomic(self.metrics) as file:
                file.write_text(lines_of(self.rows))
        stop.wait = info["step"] < self.steps
        return info["step"]
