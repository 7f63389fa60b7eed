"""Nothing is lost: damage, kills, signals, full disks and NaN against small runs. benchmarks/faults.py is the long version."""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import hessian
import sample
import train
from data import scenes, sources
from data.cache import Trajectories
from models import checkpoint, teacher
from models.denoiser import random_denoiser
from run import files, report
from run.common import UserError
from run.state import EXIT_CODES, MEASURED, TrainingState

ROOT = Path(__file__).parent.parent
TEACHER = "--stage teacher --steps 6 --batch 2 --lr 1e-3 --warmup 1 --save-every 2"


# ------------------------------------------------------------------------------------------------ small runs


def config(out: Path, flags: str = TEACHER):
    return train.parse(f"{flags} --out {out}".split())


def opened(out: Path, flags: str = TEACHER, **more):
    """A run folder as train.main leaves it before the first update, and its Config."""
    cfg = config(out, flags)
    files.open_run(out, dict(vars(cfg)) | {"out": ""} | more, leader=True)
    return cfg


def theta() -> dict[str, torch.nn.Parameter]:
    return {"a": torch.nn.Parameter(torch.arange(40.0)), "block": torch.nn.Parameter(torch.ones(3, 2))}


def objective_of(params: dict[str, torch.nn.Parameter]):
    """An objective for train.fit, another in every update."""

    def objective(gen, micro_batches):
        scale = 5 * torch.rand((), generator=gen)
        for _ in micro_batches:
            yield sum((scale * p - 3).square().mean() for p in params.values())

    return objective


def small_state(out: Path, cfg) -> TrainingState:
    params = theta()
    return TrainingState(out, params, train.optimizers_of(cfg, params), {}, cfg.steps)


class Killed(BaseException):
    pass


def go(out: Path, cfg, end: int = 6) -> dict[str, torch.Tensor]:
    """The training in `out` goes on until it dies before update `end`; parameters and an average, as they were then."""
    params, rate = theta(), train.learning_rate
    averages = {"block": params["block"].detach().clone()}

    def killed(peak, step, *more):
        if step == end:
            raise Killed
        return rate(peak, step, *more)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(train, "learning_rate", killed)
        train.fit(cfg, out, params, objective_of(params), averages)
    return params | {"average": averages["block"]}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[k], right[k]) for k in left.keys() | right.keys())


def whole_teacher_run(out: Path, patch) -> None:
    patch.setattr(train, "save_weights", lambda *args, **more: None)
    train.main(f"{TEACHER} --out {out}".split())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "r"
    with pytest.MonkeyPatch.context() as patch:
        whole_teacher_run(out, patch)
    return out


def reproducible(metrics: str) -> list[dict]:
    """The lines of a metrics.jsonl without what updates took."""
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in metrics.splitlines()]


def same(a: Path, b: Path) -> None:
    """Every file, byte for byte, but for what updates took."""
    left, right = ({str(f.relative_to(d)): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in (a, b))
    assert left.keys() == right.keys()
    assert reproducible(left.pop("metrics.jsonl", b"").decode()) == reproducible(right.pop("metrics.jsonl", b"").decode())
    assert [k for k in left if left[k] != right[k]] == []


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ checksums


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    opened(folder)
    files.write_tensors(
        folder / "x.safetensors", {"a": torch.arange(50.0), "b": torch.ones(3)}, {"step": 7}, files.run_digest(folder)
    )
    return folder


@settings(max_examples=300)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_tensor_file_is_noticed(sealed, place, bit):
    """Catches a checksum of the tensors alone, or one that leaves out its own digits or the header."""
    path = sealed / "flipped" / "x.safetensors"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(sealed / "x.safetensors", path)
    assert files.read_verified(path, "", files.run_digest(sealed))[1] == {"step": 7}
    flip(path, place % path.stat().st_size, bit)
    with pytest.raises(UserError, match=r"x.safetensors is truncated or damaged .*: do that"):
        files.read_verified(path, "do that", files.run_digest(sealed))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_configuration_is_noticed(sealed, place, bit):
    """Catches a learning rate that changed on disk."""
    folder = sealed / "config"
    folder.mkdir(exist_ok=True)
    shutil.copy(sealed / "config.json", folder)
    size, of_format = (folder / "config.json").stat().st_size, (folder / "config.json").read_bytes().index(b'"format"')
    flip(folder / "config.json", place % size, bit)
    # the version is read first, so that other versions' folders are told so
    inside = of_format <= place % size < of_format + 14
    with pytest.raises(UserError, match="config.json is damaged|checkpoint format" if inside else "config.json is damaged"):
        files.read_config(folder)


@settings(max_examples=30)
@given(place=st.integers(files.HEAD - 9, 5 * files.HEAD - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_behind_the_head_is_noticed(sealed, place, bit):
    """Catches a large file of which the beginning alone is checked, or a piece between two reads is not."""
    path = sealed / "large"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", files.HEAD + 1)
        path.write_bytes(f'{{"sha256": "{files.EMPTY}"}}'.encode().ljust(5 * files.HEAD))
        files.seal(path)
        assert files.checksum(path) == files.recorded_checksum(path)
        flip(path, place, bit)
        with pytest.raises(ValueError, match="does not fit"):
            files.checksum(path)


@given(size=st.integers(0, 10**6))
def test_cut_and_grown_files_are_noticed(sealed, size):
    """Catches a truncated file that is still a valid one."""
    path, whole = sealed / "cut" / "x.safetensors", (sealed / "x.safetensors").read_bytes()
    path.parent.mkdir(exist_ok=True)
    for content in (whole[: size % len(whole)], whole + bytes(1 + size % 9)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="truncated or damaged"):
            files.read_verified(path, "")


def test_files_of_another_run_or_role_are_swapped(sealed, tmp_path):
    """Catches good tensors in the wrong place: the shapes fit, the numbers are another run's."""
    opened(tmp_path / "other", TEACHER + " --seed 1")
    run, other = files.run_digest(sealed), files.run_digest(tmp_path / "other")
    assert run != other
    with pytest.raises(UserError, match=r"x.safetensors was swapped .it is x.safetensors of another run"):
        files.read_verified(sealed / "x.safetensors", "", other)
    shutil.copy(sealed / "x.safetensors", tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=r"state.safetensors was swapped .it is x.safetensors of this run"):
        files.read_verified(tmp_path / "state.safetensors", "", run)


def test_a_run_file_without_checksum_is_damaged(sealed, tmp_path):
    """Catches a checksum that is only looked at if the file has one: a flipped bit in its name would switch it off."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((sealed / "x.safetensors").read_bytes().replace(b"sha256", b"sha257", 1))
    with pytest.raises(UserError, match="no checksum"):
        files.read_verified(path, "")


def test_equal_contents_are_equal_bytes(tmp_path):
    """Catches metadata in an order of chance: the checksum of a start that is made again could not be compared."""
    for name in "abcd":
        (tmp_path / name).mkdir()
        files.write_tensors(tmp_path / name / "x.safetensors", {"t": torch.ones(2)}, {"layers": {"l": 1}, "steps": 3})
        same(tmp_path / "a", tmp_path / name)


# ------------------------------------------------------------------------------------------------ two generations of state


def test_a_kill_between_any_two_file_operations_leaves_a_good_newest_state(tmp_path):
    """Catches a moment at which no state has its name, or a previous one that replaces the newest."""

    def dying(call, counter: list[int]):
        def wrapped(*args, **more):
            counter[0] -= 1
            if counter[0] < 0:  # dead: not even the cleaning up of `finally` happens
                raise Killed
            return call(*args, **more)

        return wrapped

    begun, whole = tmp_path / "begun", tmp_path / "whole"
    cfg = opened(begun)
    go(begun, cfg, 4)  # saves 2 and 4
    shutil.copytree(begun, whole)
    expected, steps = go(whole, cfg), []
    for at in range(100):
        out, counter = tmp_path / str(at), [at]
        shutil.copytree(begun, out)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "link", "fsync", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name), counter))
            go(out, cfg)
        state = small_state(out, cfg)
        steps.append(state.load())
        assert state.good
        files.verify(state.previous, "", state.run)
        assert equal(go(out, cfg), expected)
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
        if counter[0] >= 0:
            break
    assert len(steps) > 6 and steps == sorted(steps) and set(steps) == {4, 6}


@pytest.mark.parametrize("how", ["flip", "cut", "swap", "missing"])
def test_a_damaged_newest_state_is_named_and_the_previous_one_goes_on(tmp_path, capsys, how):
    """Catches a refusal where there is a good state, and a damaged one that becomes the previous one with the next save."""
    out = tmp_path / "r"
    cfg = opened(out)
    go(out, cfg, 4)
    newest, previous = out / "state.safetensors", out / "state-previous.safetensors"
    end = tmp_path / "end"
    shutil.copytree(out, end)
    expected = go(end, cfg)
    if how == "flip":
        flip(newest, newest.stat().st_size - 5)
    elif how == "cut":
        newest.write_bytes(newest.read_bytes()[:-7])
    elif how == "swap":
        opened(tmp_path / "other", TEACHER + " --seed 1")
        files.write_tensors(
            newest, files.read_tensors(newest, "")[0], {"step": 4, "start": ""}, files.run_digest(tmp_path / "other")
        )
    else:
        newest.unlink()
    capsys.readouterr()
    state = small_state(out, cfg)
    assert state.load() == 2
    printed = capsys.readouterr().out.strip()
    assert (
        printed == ""
        if how == "missing"
        else re.fullmatch(r".*/state.safetensors (is|was) .*going on from state-prev.*2 updates", printed)
    )
    go(out, cfg, 4)
    files.verify(previous, "", state.run)
    assert equal(go(out, cfg), expected)
    here, there = (reproducible((folder / "metrics.jsonl").read_text()) for folder in (out, end))
    assert here == there and len(here) == 6


def test_an_update_counts_its_jumps_and_not_its_micro_batches(tmp_path):
    """Catches a count of backward passes, and one that goes on from update to update."""
    cfg = opened(tmp_path, f"{TEACHER} --micro 1")
    assert cfg.batch > 1
    params = theta()

    def rollout_losses(gen, micro_batches):
        for _ in micro_batches:
            for _ in range(3):
                yield sum(p.square().mean() for p in params.values())

    train.fit(cfg, tmp_path, params, rollout_losses)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(row["objective"], row["jumps"]) for row in rows} == {("rollout", 3)} and len(rows) == cfg.steps


def test_a_file_that_is_replaced_while_it_is_read_is_the_new_one(tmp_path, monkeypatch):
    """Catches the tensors of one update with the number of another, where sample.py reads beside a training."""
    path, load = tmp_path / "x.safetensors", files.load_file
    files.write_tensors(path, {"a": torch.zeros(3)}, {"step": 1})

    def late(file):
        if files.verify(path, "")["step"] == 1:
            files.write_tensors(path, {"a": torch.ones(3)}, {"step": 2})
        return load(file)

    monkeypatch.setattr(files, "load_file", late)
    tensors, info = files.read_verified(path, "")
    assert info["step"] == 2 and tensors["a"].tolist() == [1, 1, 1]


def test_tensorboard_that_cannot_write_is_one_sentence(tmp_path):
    """Catches a traceback, which a full disk gives in TensorBoard's own words."""
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*tensorboard .*: free some space, or leave out --report-to"):
        report.Board(tmp_path, 0, tensorboard=True)
    board = report.Board(tmp_path, 0, tensorboard=False)
    board.writer = SimpleNamespace(add_scalar=lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        board.add([{"step": 0, "loss": 1.0}])


def test_two_damaged_states_are_a_refusal_that_says_what_to_delete(tmp_path):
    """Catches a run that silently begins again, or goes on from garbage."""
    cfg = opened(tmp_path)
    go(tmp_path, cfg, 4)
    for name in ("state", "state-previous"):
        flip(tmp_path / f"{name}.safetensors", 300)
    with pytest.raises(UserError, match=r"delete state.safetensors and state-previous.safetensors to begin again"):
        small_state(tmp_path, cfg).load()


@pytest.mark.parametrize("left", ["", '{"step": 0, "lo', '{"step": 9}\n' * 12, "\x00" * 50])
def test_metrics_have_each_update_once_whatever_a_kill_left(tmp_path, left):
    """Catches half lines, lines of updates that are made again, a log that was damaged or lost, and seconds that are lost although
    their line is whole."""
    cfg = opened(tmp_path)
    go(tmp_path, cfg, 4)
    good = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "w") as log:
        log.write(good[: len(good) // 3] + left)
    assert small_state(tmp_path, cfg).load() == 4
    found = (tmp_path / "metrics.jsonl").read_text()
    assert reproducible(found) == reproducible(good)
    assert found.splitlines()[0] == good.splitlines()[0] and found.splitlines()[3] != good.splitlines()[3]
    go(tmp_path, cfg)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(6))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_trainings_end_with_the_same_bytes(tmp_path, optimizer):
    """Catches a moment, a momentum, an average or a line that is not saved, or is given to another parameter."""
    flags = f"{TEACHER} --optimizer {optimizer}"
    expected = go(tmp_path / "whole", opened(tmp_path / "whole", flags))
    cfg = opened(tmp_path / "r", flags)
    for end in (3, 5, 6):
        found = go(tmp_path / "r", cfg, end)
    assert equal(found, expected)
    same(tmp_path / "whole", tmp_path / "r")
    state, _ = files.read_tensors(tmp_path / "r" / "state.safetensors", "")
    assert ("momentum_buffer.block" in state) == (optimizer == "muon") and "exp_avg.a" in state


# ------------------------------------------------------------------------------------------------ what is made again


def test_a_start_other_than_the_one_that_was_trained_from_is_refused(tmp_path, capsys):
    """Catches LoRA of one start on the packed weights of another (made again on another machine, or by other code)."""
    cfg, start = opened(tmp_path), tmp_path / "start.safetensors"
    run = files.run_digest(tmp_path)
    files.write_tensors(start, {"codes": torch.arange(9)}, {"layers": {}}, run)
    go(tmp_path, cfg, 2)
    flip(start, start.stat().st_size - 9)
    assert not checkpoint.has_start(tmp_path)
    assert re.fullmatch(r".*start.safetensors is truncated or damaged .*: it is made again", capsys.readouterr().out.strip())
    files.write_tensors(start, {"codes": torch.arange(9)}, {"layers": {}}, run)
    assert checkpoint.has_start(tmp_path) and small_state(tmp_path, cfg).load() == 2
    files.write_tensors(start, {"codes": torch.arange(9) + 1}, {"layers": {}}, run)
    with pytest.raises(UserError, match=r"start.safetensors is not what the state was trained from: restore it, or delete"):
        small_state(tmp_path, cfg).load()


def draw(out: Path, solver, monkeypatch, n: int = 5) -> Trajectories:
    network = random_denoiser("tiny")
    network.encode = lambda captions: {"length": torch.tensor([len(caption) for caption in captions])}
    monkeypatch.setattr(Trajectories, "SHARD", 2)
    examples = sources.LiveExamples(scenes.Scenes(), network)
    return Trajectories(out / "cache", solver, network, examples, n, network.path.grid(4), seed=0, micro=0, device="cpu")


def test_damaged_shards_of_the_cache_are_drawn_again_and_no_others(tmp_path, monkeypatch, capsys):
    """Catches a cache that trains on garbage, and one that is drawn anew as a whole."""
    drawn = []

    def teacher(x, t, s, cond):
        drawn.append(len(x))
        return x * t.view(-1, 1, 1, 1) / 1000

    opened(tmp_path)
    first = draw(tmp_path, teacher, monkeypatch)
    before = {f.name: f.read_bytes() for f in (tmp_path / "cache").iterdir()}
    assert len(before) == 3 and first.states.shape[1] == len(first.cond["length"]) == 5
    shards = sorted((tmp_path / "cache").iterdir())
    flip(shards[0], shards[0].stat().st_size - 3)
    shutil.copy(shards[1], shards[2])  # a good shard, of other captions
    drawn.clear()
    again = draw(tmp_path, teacher, monkeypatch)
    assert set(drawn) == {2, 1} and torch.equal(again.states, first.states)
    assert {f.name: f.read_bytes() for f in (tmp_path / "cache").iterdir()} == before
    said = capsys.readouterr().out
    assert (
        "000000.safetensors is truncated or damaged" in said
        and "000004.safetensors was swapped" in said
        and "cache/000002" not in said
    )
    with pytest.raises(UserError, match="are no numbers"):
        draw(tmp_path, lambda x, t, s, cond: x / 0, monkeypatch, 7)
    assert not (tmp_path / "cache" / "000006.safetensors").exists()


def test_trajectories_of_other_captions_are_drawn_again(tmp_path, monkeypatch, capsys):
    """Catches --data that changed under cached trajectories: their states would be trained with other captions."""
    drawn = []

    def teacher(x, t, s, cond):
        drawn.append(len(x))
        return x * 0

    opened(tmp_path)
    draw(tmp_path, teacher, monkeypatch)
    conditions = sources.LiveExamples.conditions

    def other(self, n, gen, mine):
        return {k: v + (n == 1) for k, v in conditions(self, n, gen, mine).items()}  # in the last shard

    monkeypatch.setattr(sources.LiveExamples, "conditions", other)
    drawn.clear()
    draw(tmp_path, teacher, monkeypatch)
    assert set(drawn) == {1} and "000004.safetensors was swapped" in capsys.readouterr().out


def test_a_run_touches_no_file_that_is_not_its_own(tmp_path):
    """Catches --out . that deletes a user's .tmp files, and --out FILE that is a traceback."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / ".tmp_notes").mkdir()
    for name in ("results.tmp", "thesis/results.tmp", "thesis/.tmp_draft"):
        (tmp_path / name).write_text("mine")
    opened(tmp_path)
    opened(tmp_path)  # now it is a run folder
    assert all((tmp_path / name).exists() for name in (".tmp_notes", "results.tmp", "thesis/results.tmp", "thesis/.tmp_draft"))
    with pytest.raises(UserError, match="cannot write to the run folder"):
        opened(tmp_path / "thesis" / "results.tmp")


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    """Catches a commit that config.json cannot do without: slim containers, a zip of the code."""
    monkeypatch.setenv("PATH", str(tmp_path))
    opened(tmp_path / "r")
    assert json.loads((tmp_path / "r" / "config.json").read_text())["commit"] == ""


def test_a_damaged_configuration_is_written_again_and_a_wrong_one_is_found_out(tmp_path, capsys):
    """Catches a run that mixes two configurations because config.json, which would have told, is gone."""
    cfg = opened(tmp_path)
    go(tmp_path, cfg, 2)
    before = (tmp_path / "config.json").read_bytes()
    for damage in (before[:50], before.replace(b"0.001", b"0.003"), b""):
        (tmp_path / "config.json").write_bytes(damage)
        opened(tmp_path)
        assert (tmp_path / "config.json").read_bytes() == before
        assert "config.json is missing or damaged: it is written again" in capsys.readouterr().out
    (tmp_path / "config.json").unlink()
    other = opened(tmp_path, TEACHER + " --lr 2e-3")
    with pytest.raises(UserError, match=r"state.safetensors was swapped .*another run.*delete state.safetensors"):
        small_state(tmp_path, other).load()


def test_what_killed_writers_leave_is_removed(tmp_path):
    """Catches a disk that fills up with the halves of killed runs: safetensors has temporary names of its own."""
    opened(tmp_path)
    (tmp_path / "cache").mkdir()
    for name in ("state.123.tmp", ".tmpAb3dE9", "cache/000000.77.tmp", "cache/.tmpXXXXXX", "probe.tmp"):
        (tmp_path / name).write_bytes(b"half")
    opened(tmp_path)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["config.json"]


# ------------------------------------------------------------------------------------------------ signals


def signal_at(step: int, number: int, patch, times: int = 1) -> None:
    """While the loss of update `step` is computed, this process gets the signal."""
    losses, calls = teacher.diffusion_losses, itertools.count()

    @functools.wraps(losses)  # metrics name an objective by its generator
    def hit(*args):
        hits = times if next(calls) == step else 0
        for loss in losses(*args):
            for _ in range(hits):
                os.kill(os.getpid(), number)
            yield loss

    patch.setattr(teacher, "diffusion_losses", hit)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_the_update_and_the_run_goes_on_to_the_same_end(undisturbed, tmp_path, monkeypatch, capsys, number, code):
    """Catches a state saved in the middle of an update, EMA that lags one behind, and an exit code that requeues nothing."""
    handlers = [signal.getsignal(n) for n in EXIT_CODES]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_at(2, number, patch)
        whole_teacher_run(tmp_path / "r", patch)
    assert stop.value.code == code and [signal.getsignal(n) for n in EXIT_CODES] == handlers
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"stopped by {signal.Signals(number).name} after update 3, which is saved: the same command goes on from there"
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 3
    whole_teacher_run(tmp_path / "r", monkeypatch)
    same(undisturbed, tmp_path / "r")


@pytest.mark.slow
def test_a_second_signal_does_not_wait(undisturbed, tmp_path, monkeypatch, capsys):
    """Catches a process that cannot be stopped while an update hangs."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_at(2, signal.SIGINT, patch, times=2)
        whole_teacher_run(tmp_path / "r", patch)
    assert stop.value.code == 130 and capsys.readouterr().out.strip().endswith(
        "stopped by SIGINT: the same command goes on from there"
    )
    assert files.read_tensors(tmp_path / "r" / "state.safetensors", "")[1]["step"] == 2
    whole_teacher_run(tmp_path / "r", monkeypatch)
    same(undisturbed, tmp_path / "r")


@pytest.mark.parametrize("where", ["calibration", "closing report"])
def test_a_signal_outside_of_training_ends_the_run_at_once_with_code_0(tmp_path, monkeypatch, capsys, where):
    """Catches SIGTERM that waits for an update that does not come, before the first one and after the last."""

    def hit(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    flags = TEACHER.replace("--steps 6", "--steps 1") if where == "closing report" else "--calibration 1"
    monkeypatch.setattr(*((train, "save_weights", hit) if where == "closing report" else (hessian, "collect_passes", hit)))
    with pytest.raises(SystemExit) as stop:
        train.main(f"{flags} --out {tmp_path}/r".split())
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == "stopped by SIGTERM: the same command goes on from there"


PROCESSES = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import torch.distributed as dist
import test_faults, train
from run import common, files, state

def attempt(out, disturbed):
    cfg = test_faults.config(out)
    files.open_run(out, dict(vars(cfg)) | {{"out": ""}}, leader=common.process_index() == 0)
    params = test_faults.theta()
    losses = test_faults.objective_of(params)
    updates = iter(range(6))
    alone = lambda at: common.process_index() == 1 and next(updates) == at  # of the updates of this attempt
    train.fit(cfg, out, params, lambda gen, parts: disturbed(losses(gen, parts), alone))

def terminated_during_its_loss(losses, alone):
    hit = alone(2)
    for loss in losses:
        if hit:
            os.kill(os.getpid(), signal.SIGTERM)
        yield loss

def terminated_before_a_micro_batch(losses, alone):
    if alone(0):
        os.kill(os.getpid(), signal.SIGTERM)
    yield from losses

def poisoned(losses, alone):
    factor = float("nan") if alone(1) else 1.0
    yield from (loss * factor for loss in losses)

dist.init_process_group("gloo", init_method="file://{folder}/meet", rank=int(os.environ["RANK"]), world_size=2)
for disturbed in (terminated_during_its_loss, terminated_before_a_micro_batch):
    try:
        state.stoppable(lambda argv: attempt(Path("{folder}/r"), disturbed))([])
    except SystemExit as stop:
        print("exit code", stop.code)
common.run_script("train.py", lambda argv: attempt(Path("{folder}/r"), poisoned))
"""


@pytest.mark.slow
def test_a_signal_or_nan_in_one_process_stops_all_at_the_same_update(tmp_path):
    """Catches a process that leaves the others waiting in the next exchange, and NaN that only its own process sees."""
    (tmp_path / "processes.py").write_text(PROCESSES.format(root=str(ROOT), folder=str(tmp_path)))
    env, job = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, [sys.executable, str(tmp_path / "processes.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(job, env=env | {"RANK": str(index)}, **pipes) for index in (0, 1)]
    printed = [process.communicate(timeout=100) for process in processes]
    stopped = "stopped by SIGTERM after update 3, which is saved: the same command goes on from there\n"
    for process, before, (out, err) in zip(processes, (stopped, ""), printed, strict=True):
        assert out == 2 * (before + "exit code 0\n"), err
        assert process.returncode == 2 and re.search(r"step 4: loss nan, gradient norm nan: look at the data", err), err
    assert files.read_tensors(tmp_path / "r" / "state.safetensors", "")[1]["step"] == 4
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 4


# ------------------------------------------------------------------------------------------------ NaN, full disks


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_the_run_and_the_same_command_goes_on_to_the_same_end(tmp_path, monkeypatch, what):
    """Catches NaN that reaches Adam's moments, an average, a state or the log."""
    cfg, expected = opened(tmp_path / "r"), go(tmp_path / "whole", opened(tmp_path / "whole"))
    average, calls = train.average_over_processes, itertools.count()

    def poisoned(grads, loss, *flags):
        if next(calls) == 3:
            if what == "gradient":
                grads[0].view(-1)[0] = float("inf")
            else:
                loss = float("nan")
        return average(grads, loss, *flags)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"step 3: .*state.safetensors keeps an earlier step"),
    ):
        patch.setattr(train, "average_over_processes", poisoned)
        go(tmp_path / "r", cfg)
    assert equal(go(tmp_path / "r", cfg), expected)
    same(tmp_path / "whole", tmp_path / "r")


def no_space(*args, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", ["the log", "half a line", "state", "previous state", "configuration", "pictures", "report"])
def test_a_full_disk_is_one_sentence_for_every_writer_and_loses_nothing(tmp_path, monkeypatch, writer):
    """Catches a traceback, a buffer that is written again when the file closes, and a good file that is gone."""
    cfg = opened(tmp_path)
    go(tmp_path, cfg, 2)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*free some space and run the same"):
        if writer == "half a line":
            write = os.write
            patch.setattr(os, "write", lambda file, text: write(file, text[:9]))
        elif writer == "the log":
            patch.setattr(os, "write", no_space)
        elif writer == "previous state":
            patch.setattr(os, "link", no_space)
            patch.setattr(shutil, "copyfile", no_space)
        elif writer == "state":
            patch.setattr(files, "save_file", no_space)
        else:
            patch.setattr(Path, "write_text", no_space)
        if writer == "configuration":
            files.write_json(tmp_path / "config.json", files.read_config(tmp_path))
        elif writer in ("pictures", "report"):
            if writer == "pictures":
                patch.setattr(os, "fsync", no_space)
            closing_report(tmp_path, patch)
        else:
            go(tmp_path, cfg, 4)
    files.read_config(tmp_path)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "report.json").exists()
    state = small_state(tmp_path, cfg)
    assert state.load() == 2 and state.good
    go(tmp_path, cfg, 4)


def closing_report(out: Path, patch) -> None:
    """evaluate.closing_report without networks."""

    class Judge:
        def __init__(self, *args, **more):
            pass

        def draw(self, *args):
            return None

        def score(self, *args):
            return {"frechet": 0.0, "prompt_accuracy": 0.0}

    sheet = sample.grid({"": torch.zeros(1, 3, 32, 32)})
    patch.setattr(evaluate, "Judge", Judge)
    patch.setattr(checkpoint, "load_checkpoint", lambda out: (random_denoiser("tiny"), {}))
    patch.setattr(sample, "draw", lambda *args: torch.zeros(1, 3, 32, 32))
    patch.setattr(sample, "compare", lambda *args: sheet)
    patch.setattr(checkpoint, "packed_size", lambda *args: dict.fromkeys(("bits_per_weight", "mb", "mb_bf16", "mb_lora"), 1.0))
    shares = ("w4a4_parameters", "w4a4_products", "branch_parameters", "layers_without_branch")
    patch.setattr(checkpoint, "composition", lambda *args: dict.fromkeys(shares, 1.0))
    config = {"seed": 0, "guidance": 1.0, "eval_n": 4, "data": "", "model": "tiny", "validation_prompts": ""}
    sample.closing_pictures(out, random_denoiser("tiny"), config)
    evaluate.closing_report(out, random_denoiser("tiny"), config)


# ------------------------------------------------------------------------------------------------ promises about the code


def test_nothing_unpickles():
    """Catches torch.load and its relatives: a file of somebody else's must not run code."""
    for file in (
        *ROOT.glob("*.py"),
        *(f for folder in ("models", "data", "run", "backends", "benchmarks") for f in (ROOT / folder).glob("*.py")),
    ):
        code = file.read_text().replace("from pickle import UnpicklingError\n", "")
        assert not re.search(r"\btorch\.(load|save)\((?!.*weights_only=True)|\bpickle\b(?! is| anywhere)|np\.load\(", code), file


def test_a_checksum_says_when_there_is_no_place_for_it(tmp_path):
    """Catches a writer that forgets the zeros: its files would never be checked."""
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ValueError, match="no place"):
        files.seal(tmp_path / "x")
    assert (
        files.checksum(tmp_path / "x")
        == files.recorded_checksum(tmp_path / "x")
        == files.recorded_checksum(tmp_path / "none")
        == ""
    )
