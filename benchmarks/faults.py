"""Faults against a run on tiny: does the same command go on to the same end, or refuse in one sentence?

    python -m benchmarks.faults [--n 60] [--seed 0] [--jobs 2] [--out runs/faults]

20 kills (SIGKILL, uniform over the life of a run from its first line to its last), 20 flipped bits and 10 truncations (of a
random file that train.py or sample.py reads, half in a folder that a kill left, half in a finished one), 5 full disks (the size
of files is limited at a random moment, RLIMIT_FSIZE), 5 that are no numbers (NaN or inf in a random update). After each, the
same command is given again. Verdicts:

    continued   exit code 0, and every file of the run folder equals the undisturbed run's byte for byte: losses, state,
                checkpoint, pictures, scores (not state-previous.safetensors, a spare that is read where the newest is damaged)
    refused     exit code 2 and one sentence; for a damaged file, one with its name
    BROKEN      anything else: a traceback, another exit code
    SILENT      exit code 0 with other bytes

A damaged finished folder is also given to sample.py first, which has to draw the undisturbed run's picture or refuse. A NaN has
to stop the run that meets it. --begin, --n: that part of the 60 in an order that is drawn from --seed.

Runs are children of this process, forked with everything imported and nothing computed: a fresh interpreter for each would
triple the time. Random weights, 6 updates, one thread, few pictures at the end; half of the runs follow a cache of teacher
trajectories, in shards of 8.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import evaluate
import sample
import train
from backends import cpu
from benchmarks.jobs import parser
from benchmarks.tables import markdown
from data import sources
from data.cache import Trajectories
from layers import packed_layers
from models import checkpoint, tiny
from models.denoiser import add_lora, random_denoiser
from run import files
from run.common import run_script
from run.state import read_rows, reproducible

QUICK = (
    "--model tiny --steps 6 --batch 2 --calibration 2 --init zero --rounding rtn --ranks uniform --rank 8 --lr 2e-4 --warmup 1"
    " --save-every 2 --grid 8 --sampling-steps 1,2 --eval-n 8 --rollout 0.5"
)
RUNS = {"fp": QUICK, "cache": f"{QUICK} --trajectory teacher --cached 20"}
KINDS = {"kill": 20, "bit flip": 20, "truncation": 10, "disk full": 5, "NaN": 5}


def run(script, argv: list[str], moment=0.0, action=None, before=None) -> tuple[int, str, float]:
    """(exit code, what it printed, seconds) of script.main(argv) in a forked child.

    moment: seconds after which action(pid) is done to the child; before: called in the child."""
    reader, writer = os.pipe()
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(writer, stream)
        os.close(reader)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv, code = [f"{script.__name__}.py", *argv], 1
        try:
            torch.set_num_threads(1)
            if before:
                before()
            run_script(sys.argv[0], script.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    text = b""
    while True:
        wait = None if action is None else max(0.0, began + moment - time.monotonic())
        if select.select([reader], [], [], wait)[0]:
            if not (part := os.read(reader, 1 << 16)):
                break
            text += part
        else:
            action(pid)
            action = None
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, text.decode(errors="replace"), time.monotonic() - began


def contents(out: Path) -> dict[str, object]:
    """What the files of a run folder hold."""
    others = ("state-previous.safetensors", "seconds.json")
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in others]
    held = {str(file.relative_to(out)): file.read_bytes() for file in files}
    with contextlib.suppress(KeyError, ValueError):
        about = json.loads(held["config.json"])  # may be written by another commit of the code
        held["config.json"] = {k: v for k, v in about.items() if k not in ("sha256", "commit")}
    held["metrics.jsonl"] = [reproducible(row) for row in read_rows(out / "metrics.jsonl").values()]
    return held


def sentence(printed: str) -> str:
    """The refusal at the end of what was printed; "" if there is none, or more than a sentence."""
    last = printed.replace("\r", "\n").strip().splitlines()[-1:]
    one = last and "Traceback" not in printed and last[0].startswith(("train.py: ", "sample.py: "))
    return last[0].split(": ", 1)[1] if one else ""


def judge(code: int, printed: str, out: Path, good: dict[str, object], name: str = "") -> tuple[str, str]:
    """(verdict, why) of the last run. name: of the damaged file."""
    if code == 2 and sentence(printed) and name in sentence(printed):
        return "refused", sentence(printed)
    if code:
        return "BROKEN", f"exit code {code}: {printed[-400:]}"
    now = contents(out)
    if changed := sorted(k for k in good.keys() | now.keys() if good.get(k) != now.get(k)):
        return "SILENT", f"other bytes in {', '.join(changed)}"
    return "continued", ""


# ---------------------------------------------------------------------------------------------------------------------
# Faults: (rng, command, its folder, the undisturbed run's folder, its seconds) -> (what was done, (verdict, why)), or None for what
# the same command comes to when it is given again


def kill(rng: random.Random, argv: list[str], out: Path, good: Path, seconds: float):
    moment, code = rng.uniform(0, seconds), 0
    while code == 0:  # the run was faster than the undisturbed one and had ended
        shutil.rmtree(out, ignore_errors=True)
        code, _, took = run(train, argv, moment, lambda pid: os.kill(pid, signal.SIGKILL))
        moment = moment if code else rng.uniform(0, took)
    there = [file.name for file in out.rglob("*.safetensors")] if out.exists() else []
    return f"after {moment:.1f} s of {seconds:.1f} s, exit code {code}, {len(there)} files of tensors there", None


def stopped(what: str, code: int, printed: str):
    """A run that met a fault has to go on to its end or to refuse in one sentence."""
    bad = code and not (code == 2 and sentence(printed))
    return f"{what}: {sentence(printed) or f'exit code {code}'}", ("BROKEN", printed[-400:]) if bad else None


def full(rng: random.Random, argv: list[str], out: Path, good: Path, seconds: float):
    moment, limit = rng.uniform(0, 0.9 * seconds), rng.choice([1, 100, 1 << 16, 1 << 22])
    code, printed, _ = run(train, argv, moment, lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit)))
    return stopped(f"files end at {limit} bytes after {moment:.1f} s of {seconds:.1f} s", code, printed)


def poison(kind: str, step: int, at: int) -> None:
    """In the child: from here on, update `step` meets a number that is none."""
    average, load, calls = train.average_over_processes, checkpoint.load_start, Counter()

    def poisoned(grads, loss, *flags):
        if calls["updates"] == step and kind == "loss":
            loss = float("nan")
        if calls["updates"] == step and kind in ("gradient nan", "gradient inf"):
            grads[at % len(grads)].view(-1)[at % 7] = float(kind[-3:])
        calls["updates"] += 1
        return average(grads, loss, *flags)

    def hook(layer, args, output):
        if calls["updates"] == step and kind == "activation" and layer.training is False and not calls["once"]:
            calls["once"] = 1
            output = output.clone()
            output[tuple(at % n for n in output.shape)] = float("nan")
        return output

    def load_start(*args):
        student, table = load(*args)
        packed = [layer for _, layer in packed_layers(student.net)]
        packed[at % len(packed)].register_forward_hook(hook)
        return student, table

    def spoilt(function):
        return lambda *args: function(*args) * (float("nan") if calls["updates"] == step else 1)

    train.average_over_processes, checkpoint.load_start = poisoned, load_start
    if kind == "data":
        tiny.to_latents, train.tdpt.rollout_states = spoilt(tiny.to_latents), spoilt(train.tdpt.rollout_states)


def nan(rng: random.Random, argv: list[str], out: Path, good: Path, seconds: float):
    kind, step = rng.choice(["loss", "gradient nan", "gradient inf", "data", "activation"]), rng.randrange(6)
    at = rng.randrange(1 << 20)
    code, printed, _ = run(train, argv, before=lambda: poison(kind, step, at))
    return stopped(f"{kind}, update {step}", code, printed)


def damage(rng: random.Random, argv: list[str], out: Path, good: Path, seconds: float, cut: bool):
    finished = rng.random() < 0.5
    shutil.copytree(good if finished else good.with_name(f"{good.name}-killed"), out)
    unread = ("state-previous.safetensors", "report.json", "seconds.json", "4-steps.png", "compare.png", "losses.png")
    file = rng.choice(sorted(file for file in out.rglob("*") if file.is_file() and file.name not in unread))
    data = bytearray(file.read_bytes())
    if cut:
        place = rng.randrange(len(data))
        data = data[:place]
    else:
        place = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))  # headers are at the beginning
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    what = f"{file.relative_to(out)}, byte {place}, of a {'finished' if finished else 'killed'} run"
    if finished:
        flags = ["--checkpoint", str(out), "--steps", "1", "--prompt", sources.SAMPLE_PROMPTS[0], "--out"]
        code, printed, _ = run(sample, [*flags, f"{out}.png"])
        drawn = Path(f"{out}.png")
        if not (code == 2 and file.name in sentence(printed)):
            if code:
                return what, ("BROKEN", f"sample.py, exit code {code}: {printed[-400:]}")
            if drawn.read_bytes() != Path(f"{good}.png").read_bytes():
                return what, ("SILENT", "sample.py drew another picture")
            drawn.unlink()
    code, printed, _ = run(train, argv)
    lines = [line[line.index(str(out)) :] for line in printed.replace("\r", "\n").splitlines() if str(out) in line]
    said = [line for line in lines if file.name in line and ("damaged" in line or "swapped" in line)]
    return f"{what}: {said[0] if said else 'made again anyway'}", judge(code, printed, out, contents(good), file.name)


FLIP, TRUNCATE = functools.partial(damage, cut=False), functools.partial(damage, cut=True)
FAULTS = {"kill": kill, "bit flip": FLIP, "truncation": TRUNCATE, "disk full": full, "NaN": nan}

# ---------------------------------------------------------------------------------------------------------------------


def random_weights(folder: Path) -> None:
    """A teacher and a consistency LoRA of random numbers."""
    torch.manual_seed(0)
    teacher = random_denoiser("tiny")
    files.write_tensors(folder / "teacher.safetensors", {k: v.half() for k, v in teacher.state_dict().items()}, {})
    add_lora(teacher, 4)
    lora = {k: v.half() for k, v in teacher.net.state_dict().items() if "lora_" in k}
    lora = {k: torch.randn_like(v) * 0.05 if k.endswith("B") else v for k, v in lora.items()}
    files.write_tensors(folder / "cm.safetensors", lora, {})


def command(folder: Path, flags: str, out: Path) -> list[str]:
    return [*flags.split(), "--teacher", f"{folder}/teacher.safetensors", "--cm", f"{folder}/cm.safetensors", "--out", str(out)]


def undisturbed(task) -> float:
    """The run that all are compared with, its picture, and what a kill after four of six updates leaves; its seconds."""
    folder, name, flags = task
    good = folder / name

    def die_at_four():
        rate, die = train.learning_rate, lambda: os.kill(os.getpid(), signal.SIGKILL)
        train.learning_rate = lambda peak, step, *more: die() if step == 4 else rate(peak, step, *more)

    code, printed, seconds = run(train, command(folder, flags, good))
    if code:
        sys.exit(printed)
    run(train, command(folder, flags, folder / f"{name}-killed"), before=die_at_four)
    flags = ["--checkpoint", str(good), "--steps", "1", "--prompt", sources.SAMPLE_PROMPTS[0], "--out", f"{good}.png"]
    code, printed, _ = run(sample, flags)
    if code:
        sys.exit(printed)
    return seconds


def fault(task) -> tuple[int, str, str, str, str, str]:
    """One fault in a folder of its own, which is kept if the verdict is bad."""
    folder, seed, number, kind, name, seconds = task
    out = folder / f"{number:02d}"
    shutil.rmtree(out, ignore_errors=True)
    rng, argv = random.Random(f"{seed} {number}"), command(folder, RUNS[name], out)
    what, judged = FAULTS[kind](rng, argv, out, folder / name, seconds)
    verdict, why = judged or judge(*run(train, argv)[:2], out, contents(folder / name))
    if verdict in ("continued", "refused"):
        shutil.rmtree(out, ignore_errors=True)
    return number, kind, name, verdict, why, what


def main() -> None:
    cli = parser(__doc__, "runs/faults", 60, "how many of the 60")
    cli.add_argument("--begin", type=int, default=0, help="the first of them")
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    began, folder = time.monotonic(), args.out
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cpu.is_available()  # built before anything is killed
    # inherited by every run
    sources.SAMPLE_PROMPTS, Trajectories.SHARD = sources.SAMPLE_PROMPTS[:2], 8
    real_pictures, draw = evaluate.real_pictures, sample.draw
    evaluate.real_pictures = lambda classifier, n, *side: real_pictures(classifier, min(n, 64), *side)
    sample.draw = evaluate.draw = lambda model, denoiser, texts, steps, seed, **bar: draw(
        model, denoiser, texts, min(steps, 4), seed, **bar
    )
    plan = [(kind, list(RUNS)[k % 2]) for kind, count in KINDS.items() for k in range(count)]
    random.Random(args.seed).shuffle(plan)
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        pool.apply(random_weights, (folder,))
        seconds = dict(zip(RUNS, pool.map(undisturbed, [(folder, name, RUNS[name]) for name in RUNS], 1), strict=True))
        print(f"undisturbed runs: {', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())}", flush=True)
        tasks = [(folder, args.seed, k, kind, name, seconds[name]) for k, (kind, name) in enumerate(plan)][args.begin :][: args.n]
        verdicts, done = Counter(), Counter()
        for number, kind, name, verdict, why, what in pool.imap_unordered(fault, tasks):
            verdicts[kind, verdict] += 1
            done[verdict] += 1
            print(f"{number:2d} {kind:10} {name:5} {verdict:9} {what}{'. ' if why else ''}{why}", flush=True)
    columns = ("continued", "refused", "BROKEN", "SILENT")
    print(f"\n{time.monotonic() - began:.0f} s\n")
    print("\n".join(markdown(["fault", *columns], *([kind, *(verdicts[kind, v] for v in columns)] for kind in KINDS))))
    print(f"faults: {done['continued'] + done['refused']} of {done.total()} correct, {done['SILENT']} silent")
    sys.exit(0 if done["continued"] + done["refused"] == done.total() else 1)


if __name__ == "__main__":
    main()
