"""train.py, models/checkpoint.py, sample.py, evaluate.py end to end on the tiny architecture with random weights.

Quality is not judged here (README has it); that nothing is lost, and that what is drawn is what was trained, is.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image
from test_report import pictures_of_page

import evaluate
import hgs_lora
import kernels
import quant
import sample
import student
import tdpt
import train
from data import scenes, sources
from evaluate import real_pictures
from layers import packed_layers
from models import checkpoint
from models.denoiser import add_lora, as_cm, draw, fuse, lora_layers, random_denoiser, start_noise
from models.pretrained import load_embedded_cm
from run import files, report
from run.common import UserError, step_generator
from student import build

ROOT = Path(__file__).parent.parent
PAIR = sources.SAMPLE_PROMPTS[:2]
QUICK = (
    "--steps 4 --batch 4 --calibration 4 --init zero --rounding rtn --ranks uniform --rank 8 --lr 2e-4"
    " --save-every 1 --grid 8 --eval-n 8"
)


def random_weights(folder: Path, model: str) -> str:
    """Flags that name a random teacher and a random consistency LoRA."""
    torch.manual_seed(0)
    teacher = random_denoiser(model)
    files.write_tensors(folder / "teacher.safetensors", {k: v.half() for k, v in teacher.state_dict().items()}, {})
    add_lora(teacher, 4)
    lora = {k: v.half() for k, v in teacher.net.state_dict().items() if "lora_" in k}
    files.write_tensors(
        folder / "cm.safetensors", {k: torch.randn_like(v) * 0.05 if k.endswith("B") else v for k, v in lora.items()}, {}
    )
    return f"--model {model} --teacher {folder}/teacher.safetensors --cm {folder}/cm.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_initialisation():
    """Runs that begin with the same student share its statistics and packing, most of their time."""
    build, built = student.build, {}
    later = {"rollout", "targets", "split", "tdpt_phases", "steps", "lr", "out"} | train.MAY_CHANGE - {"hessian_mb"}

    def shared(cfg, *args):
        key = str({k: v for k, v in vars(cfg).items() if k not in later})
        if key not in built:
            built[key] = build(cfg, *args)
        return copy.deepcopy(built[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "build", shared)
        yield


@pytest.fixture
def without_report(monkeypatch):
    """Runs end with their checkpoint: no pictures, no scores."""
    monkeypatch.setattr(evaluate, "closing_report", lambda *args: None)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    return random_weights(tmp_path_factory.mktemp("weights"), "tiny")


def run(weights: str, out: Path, flags: str = "") -> None:
    train.main(f"{QUICK} {weights} --out {out} {flags}".split())


@pytest.fixture(scope="module", autouse=True)
def short_reports():
    """Reports draw two prompts, the teacher in 4 steps, and compare with 256 rendered scenes instead of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SAMPLE_PROMPTS", PAIR)
        patch.setattr(sample, "draw", lambda model, net, prompts, steps, *seed: draw(model, net, prompts, min(steps, 4), *seed))
        patch.setattr(evaluate, "real_pictures", lambda reader, n=256, *side: real_pictures(reader, min(n, 256), *side))
        yield


@pytest.fixture(scope="module")
def finished(weights, short_reports, one_initialisation, tmp_path_factory) -> Path:
    """A run that nothing disturbed: both objectives, all kinds of layers."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "closing_report", lambda *args: None)
        run(weights, out)
    return out


def refuse(argv: list[str], capsys, says: str, script=train) -> None:
    """The script ends with exit code 2 and one sentence."""
    try:
        script.main(argv)
    except SystemExit as stop:  # argparse
        assert stop.code == 2
        message = capsys.readouterr().err
    except UserError as error:  # the script's last lines print it and exit with 2
        message = str(error)
    else:
        pytest.fail(f"{argv} was accepted")
    assert re.search(says, message), message
    assert "Traceback" not in message


# ------------------------------------------------------------------------------------------------ nothing is lost


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def same_losses(a: Path, b: Path) -> None:
    """Of the updates that both have made, where sums ran in another order. At 4 bits that flips single codes, and a flipped code
    moves a loss of these random networks by up to some percent; a share or pictures that are not the update's move it by tens."""
    pairs = list(zip(losses(a), losses(b), strict=False))
    assert pairs and all(step == other and abs(x - y) < 0.1 * abs(y) for (step, x), (other, y) in pairs), pairs


def same_files(a: Path, b: Path, *names: str) -> None:
    for name in names:
        left, right = (files.read_tensors(folder / name, "")[0] for folder in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left), name


def kill_at(step: int, patch) -> None:
    """From here on, training dies before update `step` is made."""
    rate = train.learning_rate

    def killed(peak, now, *more):
        if now == step:
            raise KeyboardInterrupt
        return rate(peak, now, *more)

    patch.setattr(train, "learning_rate", killed)


@pytest.mark.slow  # test_real.py kills FLUX's miniature
def test_resume_equals_uninterrupted_bit_for_bit(weights, finished, without_report, tmp_path, monkeypatch):
    """Catches randomness outside of (seed, step), a moment that is not saved, an anchor that is taken again from moved LoRA."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(2, patch)
        run(weights, tmp_path / "r")
    assert not (tmp_path / "r" / "model.safetensors").exists()
    run(weights, tmp_path / "r")
    same_files(finished, tmp_path / "r", "start.safetensors", "state.safetensors", "model.safetensors")
    assert losses(tmp_path / "r") == losses(finished)


ROLLOUTS, TDPT = "--rollout 1 --sampling-steps 1", "--rollout 0"


@pytest.fixture(scope="module")
def undisturbed(weights, one_initialisation, tmp_path_factory) -> dict[str, Path]:
    """Runs of either objective in micro-batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "closing_report", lambda *args: None)
        for name, objective in (("rollouts", ROLLOUTS), ("tdpt", TDPT)):
            run(weights, folder / name, f"--micro 2 --steps 3 --save-every 20 {objective}")
    return {ROLLOUTS: folder / "rollouts", TDPT: folder / "tdpt"}


@pytest.mark.slow
@pytest.mark.parametrize("objective, call, done", [(ROLLOUTS, 2, 1), (TDPT, 2, 1), (TDPT, 0, 0)])
def test_a_signal_between_micro_batches_gives_the_update_up(
    weights, undisturbed, without_report, tmp_path, monkeypatch, capsys, objective, call, done
):
    """Catches an update of minutes that a scheduler does not wait for, one that is made of half of its pictures, and moments of a
    state without any update."""
    flags, huber, calls = f"--micro 2 --steps 3 --save-every 20 {objective}", tdpt.pseudo_huber, []

    def hit(*args):
        calls.append(0)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return huber(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(tdpt, "pseudo_huber", hit)
        run(weights, tmp_path / "r", flags)
    assert stop.value.code == 0 and len(calls) == call + 1 and len(losses(tmp_path / "r")) == done
    assert f"stopped by SIGTERM after update {done}, which is saved" in capsys.readouterr().out
    run(weights, tmp_path / "r", flags)
    same_files(undisturbed[objective], tmp_path / "r", "state.safetensors", "model.safetensors")
    assert losses(tmp_path / "r") == losses(undisturbed[objective])


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(weights, short_reports, one_initialisation, tmp_path_factory) -> Path:
    """The run `finished` with pictures every 3 updates, which died before update 3, as `killed` beside it has it, and went on."""
    out, prompts = tmp_path_factory.mktemp("runs") / "watched", tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PAIR))
    flags = f"--validation-prompts {prompts} --validate-every 3"
    flags += " --report-to tensorboard" if importlib.util.find_spec("tensorboard") else ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "closing_report", lambda *args: None)
        with patch.context() as killed, pytest.raises(KeyboardInterrupt):
            kill_at(3, killed)
            run(weights, out, flags)
        shutil.copytree(out, out.with_name("killed"))
        run(weights, out, flags)
    return out


@pytest.mark.slow
def test_pictures_of_a_training_change_no_number_and_are_those_of_both_models(finished, watched):
    """Catches pictures that use up randomness or leave a switch of the network behind, rows of other noises, prompts or models,
    and an update whose pictures are left out: the first, each --validate-every, the last."""
    same_files(finished, watched, "start.safetensors", "state.safetensors", "model.safetensors")
    sheets = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (watched / "samples").glob("update-*.png")}
    assert sorted(sheets) == ["update-00000", "update-00003", "update-00004"]
    config = files.read_config(watched)["config"]
    network = load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(evaluate.FAST)
    start = checkpoint.load_start(watched)[0].to(evaluate.FAST)
    fp, first = (draw(model, network, PAIR, 4, config["seed"]) for model in (as_cm(network), start))
    expected = np.asarray(sample.grid({"a": fp, "b": first})).astype(int)
    left = 96  # of the pictures; the rows' names differ
    assert expected.shape == sheets["update-00000"].shape
    apart = {name: np.abs(sheet - expected)[:, left:].mean(1) for name, sheet in sheets.items()}
    half = len(expected) // 2
    assert apart["update-00000"].max() == 0
    for name in ("update-00003", "update-00004"):
        assert apart[name][:half].max() == 0 < apart[name][half:].max(), name


@pytest.mark.slow
def test_a_line_of_metrics_says_what_its_loss_is_of_and_what_the_update_took(finished, watched):
    """Catches jumps that are micro-batches, seconds of an earlier process that are lost when a run goes on, and a picture of the
    losses that was not drawn."""
    rows = rows_of(watched)
    assert {row["objective"]: row["jumps"] for row in rows}.items() <= {("tdpt", 1), *(("rollout", K) for K in (1, 2, 4))}
    assert all(row["pictures_per_second"] == pytest.approx(4 / row["seconds"]) and row["peak_memory_gb"] > 0.1 for row in rows)
    first = rows_of(watched.with_name("killed"))
    assert len(first) == 3 and rows[:3] == first
    assert Image.open(watched / "losses.png").width > 1000


@pytest.mark.slow
def test_an_unfinished_run_can_be_looked_at(finished, watched, tmp_path, capsys):
    """Catches pictures of the start, or of another update than the one that was saved last; of a finished run's last state, the
    checkpoint is the finished one."""
    whole = shutil.copytree(finished, tmp_path / "whole")
    packed, updates = checkpoint.pack_unfinished(whole)
    assert updates == 4
    same_files(finished, packed, "model.safetensors")
    shutil.copytree(watched.with_name("killed"), tmp_path / "r")
    sample.main(["--checkpoint", f"{tmp_path}/r", "--out", f"{tmp_path}/grid.png", "--prompt", PAIR[0]])
    assert f"{tmp_path}/r has not ended: this is its student after 3 updates" in capsys.readouterr().out
    ours, theirs = (files.read_tensors(folder / "model.safetensors", "")[0] for folder in (tmp_path / "r" / "unfinished", finished))
    state = files.read_tensors(tmp_path / "r" / "state.safetensors", "")[0]
    lora = [k for k in ours if k.endswith("lora_B")]
    assert all(torch.equal(ours[k], state[f"p.{k}"].bfloat16()) for k in lora)
    assert not all(torch.equal(ours[k], theirs[k]) for k in lora)
    student, _ = checkpoint.load_checkpoint(tmp_path / "r" / "unfinished")
    expected = sample.grid({"": draw(student, student, PAIR[:1], 4, 0)})
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(expected))


@pytest.mark.slow
def test_tensorboard_has_each_update_once(watched):
    """Catches updates of a killed process that are shown twice, a loss without its objective, and pictures that are left out."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, rows = EventAccumulator(str(watched / "tensorboard")), rows_of(watched)
    board.Reload()
    assert [event.step for event in board.Scalars("norm")] == [0, 1, 2, 3]
    assert [event.value for event in board.Scalars("norm")] == pytest.approx([row["norm"] for row in rows])
    shown = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"] if tag.startswith("loss/")}
    assert {event.step: tag for tag, events in shown.items() for event in events} == {
        row["step"]: f"loss/{report.objective_of(row)}" for row in rows
    }
    assert [event.step for event in board.Images("pictures")] == [0, 3, 4]


@pytest.mark.parametrize("flags, says", [
    ("--report-to tensorboard", "needs one more package: pip install tensorboard"),
    ("--validation-prompts nowhere.txt", "nowhere.txt cannot be read as text"),
    ("--validation-prompts assets/prompts.txt", "holds 459 prompts: give at most 64"),
    ("--bits 16 --validation-prompts assets/sample-scenes.txt", "--bits 16 draws no closing pictures: add --validate-every"),
    ("--model sdxl --bits 16 --export lora", "--export is for 4-bit students"),
    ("--stage teacher --validate-every 2", "not for --stage teacher"),
    ("--model sdxl --weights random --cm self --validate-every 2", "no VAE: leave out --validate-every"),
    ("--model flux --weights random --cm self --export diffusers", "no text encoders and VAE to export"),
])  # fmt: skip
def test_pictures_and_reports_that_cannot_be_are_refused_first(capsys, monkeypatch, flags, says):
    """Catches an hour of statistics before a missing file or package."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    refuse(flags.split(), capsys, says)


@pytest.mark.parametrize("model", miniature.EMBEDDED)
def test_muon_takes_the_matrices_inside_blocks_and_leaves_the_rest_to_adamw(model):
    """Catches a parameter that no optimizer has, one that two have, and convolutions or embeddings under Muon."""
    params = dict(random_denoiser(model).named_parameters())
    optimizers = train.optimizers_of(train.parse(["--optimizer", "muon"]), params)
    held = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    assert len(held) == len({id(p) for p in held}) == len(params)
    matrices = optimizers[1].param_groups[0]["params"]
    assert isinstance(optimizers[1], torch.optim.Muon) and len(matrices) > 30 and all(p.dim() == 2 for p in matrices)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    """Catches a first update at rate zero, a cosine over the rest of the updates alone, and a warm-up of nothing that divides by
    zero. The values are LambdaLR's, but for the order of the products."""
    assert train.learning_rate(2e-5, 0, 10, 40) == pytest.approx(2e-6)
    assert train.learning_rate(2e-5, 20, 10, 40) == pytest.approx(1e-5) and train.learning_rate(1.0, 0, 0, 40) == 1.0
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 10) * 0.5 * (1 + math.cos(math.pi * k / 40)))
    for k in range(40):
        assert train.learning_rate(0.3, k, 10, 40) == pytest.approx(schedule.get_last_lr()[0], rel=1e-14)
        optimizer.step()
        schedule.step()


def average(roles):
    """The student with an exponential average of its LoRA: what a user may write to have one more target."""
    roles.averages |= {k: p.detach().clone() for k, p in roles.params.items()}
    return lambda *args: torch.func.functional_call(roles.student, roles.averages, args)


@pytest.mark.slow
def test_a_target_of_ones_own_is_a_row_and_stages_are_as_many_as_there_are_targets(weights, without_report, tmp_path, monkeypatch):
    """Catches names that are asked for where the table should be, a stage that is never reached, and an average that a resumed run
    begins anew."""
    flags = "--rollout 0 --targets anchor,ema,fp --split 0.9,0.1 --tdpt-phases 1 --steps 2"
    with pytest.raises(UserError, match="--targets anchor,ema,fp must name a network for each stage"):
        run(weights, tmp_path / "r", flags)
    asked = []

    def counted(roles):
        network = average(roles)
        return lambda x, *args: asked.append(len(x)) or network(x, *args)

    monkeypatch.setitem(train.TARGETS, "ema", counted)
    run(weights, tmp_path / "whole", flags)
    assert asked
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(1, patch)
        run(weights, tmp_path / "r", flags)
    run(weights, tmp_path / "r", flags)
    same_files(tmp_path / "whole", tmp_path / "r", "state.safetensors", "model.safetensors")
    state, _ = files.read_tensors(tmp_path / "r" / "state.safetensors", "")
    moved = [not torch.equal(state[k], state[k.replace("ema.", "p.", 1)]) for k in state if k.startswith("ema.")]
    assert len(moved) == sum(k.startswith("p.") for k in state) and sum(moved) > len(moved) / 2


def test_lora_moved_and_nothing_else(finished):
    """Catches an optimizer that trains the base, and one that trains nothing."""
    start, _ = files.read_tensors(finished / "start.safetensors", "")
    state, _ = files.read_tensors(finished / "state.safetensors", "")
    end, _ = files.read_tensors(finished / "model.safetensors", "")
    for key, tensor in end.items():
        if "lora_" not in key:
            same = kernels.pack_scales(start[key]) if key.endswith("scale_O") else start[key].to(tensor.dtype)
            assert torch.equal(tensor, same), key
    moved = [not torch.equal(state[f"p.{k}"], start[k]) for k in end if "lora_B" in k]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.slow
def test_tiny_flux_goes_the_whole_way(without_report, tmp_path):
    """Catches a trainer for UNets only: flow path, W4A16 modulations, HGS, smoothing, packed checkpoint, pictures."""
    run(
        random_weights(tmp_path, "tiny-flux"),
        tmp_path / "r",
        "--init hgs --ranks qra --iters 1 --smooth 0.25 --steps 1",
    )
    student, about = checkpoint.load_checkpoint(tmp_path / "r")
    kinds = [row["kind"] for row in about["layers"].values()]
    assert kinds.count("w4a16") == 2 * 2 + 4 + 2 and kinds.count("w4a4") == len(kinds) - 10
    assert draw(student, student, list(PAIR), 1).std() > 0


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (48, 48), (80 * i, 10, 200)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"my picture number {i}")
    return tmp_path / "pictures"


@pytest.mark.parametrize("model", [pytest.param("tiny", marks=pytest.mark.slow), "tiny-flux"])
def test_teacher_then_consistency_lora_are_files_that_the_next_stage_loads(pictures, tmp_path, model):
    """Catches a stage whose output no other stage can read, and a LoRA that is rounded with the network it was scored in."""
    flags = f"--model {model} --data {pictures} --batch 4"
    train.main(f"{flags} --stage teacher --steps 2 --out {tmp_path}/t".split())
    teacher = f"--teacher {tmp_path}/t/{model}.safetensors"
    train.main(f"{flags} {teacher} --bits 16 --steps 2 --cached 4 --grid 8 --out {tmp_path}/c".split())
    network = load_embedded_cm(model, f"{tmp_path}/t/{model}.safetensors", f"{tmp_path}/c/{model}-cm.safetensors")
    state, _ = files.read_tensors(tmp_path / "c" / "state.safetensors", "")
    for name, layer in lora_layers(network).items():
        assert torch.equal(layer.lora_A, state[f"p.net.{name}.lora_A"].half().float())
    _, info = files.read_tensors(tmp_path / "c" / f"{model}-cm.safetensors", "")
    assert (info["steps"], info["batch"], info["seed"]) == (2, 4, 0)
    goes_on = f"--bits 16 --cm {tmp_path}/c/{model}-cm.safetensors --lr 0 --steps 1 --cached 4 --grid 8"
    train.main(f"{flags} {teacher} {goes_on} --out {tmp_path}/d".split())
    begun, ended = (files.read_tensors(tmp_path / d / f"{model}-cm.safetensors", "")[0] for d in "cd")
    assert all(torch.equal(begun[k], ended[k]) for k in begun) and len(begun) == len(ended)


@pytest.mark.slow
def test_a_model_whose_weights_do_not_ship_is_made_by_three_commands(tmp_path, monkeypatch):
    """Catches a stage that does not find what the stage before it wrote, a sentence without the command that makes what is missing,
    a folder that then refuses the very command, and scores of pictures of another size than the model's."""
    monkeypatch.chdir(tmp_path)
    student = "--model small --steps 1 --batch 2 --calibration 2 --init zero --ranks uniform --rounding rtn --eval-n 2".split()
    with pytest.raises(UserError, match=r"make it with `python train\.py --model small --stage teacher`"):
        train.main(student)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "network_report", lambda *args: {})  # its rows are among those of the next stage
        train.main("--model small --stage teacher --steps 1 --batch 2 --eval-n 2".split())
    with pytest.raises(UserError, match=r"make it with `python train\.py --model small --bits 16`"):
        train.main(student)
    train.main("--model small --bits 16 --steps 1 --batch 2 --trajectory fp --eval-n 2".split())
    train.main(student)
    report = json.loads(Path("runs/small/report.json").read_text())
    assert report["fp"]["frechet"] > 0 and report["w4a4"]["psnr_to_fp"] > 10
    assert 0.017 < report["branch_parameters"] < 0.023  # SDXL's share
    assert Image.open("runs/small/samples/4-steps.png").height > 4 * 64


def test_scores_of_16_bit_weights_are_those_of_what_they_draw(monkeypatch):
    """Catches rows that score something else: pictures of the very prompts are read as right, others are not."""

    def real(judge, name, model, denoiser, steps):
        return scenes.render(scenes.random_scenes(128, step_generator(4321, 0 if name == "fp" else 1)), step_generator(5, 0))

    monkeypatch.setattr(evaluate.Judge, "draw", real)
    rows = evaluate.network_report(random_denoiser("tiny"), {"data": "", "eval_n": 128, "guidance": 3.0}, cm=True)
    assert list(rows) == [
        "real",
        "teacher, guided, 25 steps",
        "teacher, guided, 4 steps",
        "fp, 4 steps",
        "fp, 2 steps",
        "fp, 1 steps",
    ]
    assert rows["fp, 4 steps"]["prompt_accuracy"] > 0.95 and rows["teacher, guided, 4 steps"]["prompt_accuracy"] < 0.05


@pytest.mark.slow
def test_a_folder_of_pictures_trains_a_student(weights, pictures, tmp_path, capsys):
    """Catches a trainer that knows only its own scenes, and scores that mean nothing on other pictures."""
    run(weights, tmp_path / "r", f"--data {pictures} --steps 1 --eval-n 8")
    printed = capsys.readouterr().out
    assert "8 of the folder's captions" in printed and "accuracy" not in printed
    assert len(losses(tmp_path / "r")) == 1


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(weights, tmp_path, monkeypatch):
    """Catches processes that see the same pictures, a missing average and a loss scaled by their number. At 16 bits: half a
    batch goes through other float32 products than a whole one, and where that flips a 4-bit code there is no tolerance to state."""
    flags = f"{QUICK} {weights} --bits 16 --dtype float32 --steps 2 --rollout 0.5 --targets self,fp --cached 8 --eval-n 4".split()
    monkeypatch.setattr(evaluate, "network_report", lambda *args: {})
    train.main([*flags, "--out", str(tmp_path / "1")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29652"]
    job = [*launch, str(ROOT / "train.py"), *flags, "--out", str(tmp_path / "2")]
    subprocess.run(job, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    states = [files.read_tensors(tmp_path / name / "state.safetensors", "")[0] for name in "12"]
    assert [step for step, _ in one] == [step for step, _ in two] == [0, 1]
    assert all(abs(a - b) <= 1e-4 * a for (_, a), (_, b) in zip(one, two, strict=True)), (one, two)
    for key, tensor in states[0].items():
        if key.startswith("p."):
            assert (tensor - states[1][key]).norm() <= 1e-4 * tensor.norm(), key


# ------------------------------------------------------------------------------------------------ what was trained is drawn


@pytest.mark.slow
def test_pictures_of_a_new_process_equal_those_at_the_end_of_training(finished, tmp_path):
    """Catches a checkpoint that rounds what training did not, and noise that depends on the process."""
    job = [sys.executable, "sample.py", "--checkpoint", str(finished), "--out", str(tmp_path / "grid.png")]
    subprocess.run([*job, *(flag for prompt in PAIR for flag in ("--prompt", prompt))], cwd=ROOT, check=True)
    drawn, kept = (np.array(Image.open(p)) for p in (tmp_path / "grid.png", finished / "samples" / "4-steps.png"))
    assert drawn.shape == kept.shape and (drawn == kept).all()


def test_a_picture_depends_on_its_seed_and_not_on_its_place_in_the_batch(finished):
    """Catches noise drawn for a whole batch at once."""
    student, _ = checkpoint.load_checkpoint(finished)
    noise = start_noise(3, student.latent, 5)
    assert torch.equal(noise[2:], start_noise(1, student.latent, 7))
    both, alone = (
        draw(student, student, list(sources.SAMPLE_PROMPTS[:2]), 1, 3),
        draw(student, student, [sources.SAMPLE_PROMPTS[1]], 1, 4),
    )
    torch.testing.assert_close(both[1:], alone, atol=0.05, rtol=0)


def test_bits_per_weight_count_every_byte_of_the_packed_layers(finished):
    """Catches a size that forgets scales, multipliers or padding: recomputed here from the file."""
    student, about = checkpoint.load_checkpoint(finished)
    tensors, _ = files.read_tensors(finished / "model.safetensors", "")
    packed = sum(t.nbytes for k, t in tensors.items() if k.split(".")[-1].split("_")[0] in ("codes", "mult", "scale"))
    values = sum(np.prod(row["shape"]) for row in about["layers"].values())
    size = checkpoint.packed_size(student)
    assert abs(size["bits_per_weight"] - 8 * packed / values) < 1e-6
    network = sum(t.nbytes for k, t in tensors.items() if k.startswith("net."))
    assert abs(size["mb"] - network / 1e6) < 1e-3 * size["mb"]


def test_merged_deployment_has_no_branch_and_draws(weights, finished, tmp_path):
    """Catches a merge that drops the branch without adding it to the weight."""
    out = tmp_path / "merged"
    out.mkdir()
    student, table = checkpoint.load_start(finished)
    shutil.copy(finished / "config.json", out)
    checkpoint.save_checkpoint(out, student, table, merged=True)
    merged, about = checkpoint.load_checkpoint(out)
    assert all(row["rank"] == 0 for row in about["layers"].values())
    assert not any("lora_" in k for k in merged.state_dict())
    assert draw(merged, merged, [sources.SAMPLE_PROMPTS[0]], 2).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags,name", [("--bits-x 8", "w4a8"), ("--inputs-8bit 3 --hessian kron --ranks qra --init hgs --iters 1", "w4a4/8")]
)
def test_activations_in_8_bits_are_named_in_the_report_and_come_back(weights, tmp_path, monkeypatch, capsys, flags, name):
    """Catches a row that says w4a4, a checkpoint that is loaded with activations in 4 bits, closing lines without a format."""
    monkeypatch.setattr(evaluate, "load_classifier", lambda: evaluate.SceneClassifier().eval().requires_grad_(False))
    run(weights, tmp_path / "r", f"--steps 0 {flags}")
    rows, said = json.loads((tmp_path / "r" / "report.json").read_text()), capsys.readouterr().out
    assert "w4a4" not in rows and f"{name:26}{rows[name]['frechet']:>10.2f}" in said
    assert ("W4A4: " in said, "W4A8: " in said) == (name == "w4a4/8", True)
    student, about = checkpoint.load_checkpoint(tmp_path / "r")
    kinds = {
        (row["kind"], layer.group_x) for row, (_, layer) in zip(about["layers"].values(), packed_layers(student.net), strict=True)
    }
    assert kinds == {("w4a4", quant.EIGHT_BITS), ("w4a16", 8), *([("w4a4", 8)] if name == "w4a4/8" else [])}


@pytest.mark.slow
def test_evaluate_writes_the_rows_it_prints(finished, tmp_path, monkeypatch, capsys):
    """Catches a JSON without the promised fields, and a PSNR of something else than the fp model's pictures."""
    monkeypatch.setattr(evaluate, "load_classifier", lambda: evaluate.SceneClassifier().eval().requires_grad_(False))
    evaluate.main(
        ["--checkpoint", str(finished), "--steps", "1", "--n", "256", "--teacher", "none", "--json", str(tmp_path / "q.json")]
    )
    found = json.loads((tmp_path / "q.json").read_text())
    rows, said = found["scores"], capsys.readouterr().out
    assert set(rows["w4a4"]) == {"frechet", "prompt_accuracy", "psnr_to_fp", "steps"} and "psnr_to_fp" not in rows["fp"]
    assert f"{rows['w4a4']['frechet']:.2f}" in said
    for name in ("frechet", "prompt_accuracy"):
        value, low, high = found["versus"]["w4a4"][name]
        assert value == pytest.approx(rows["w4a4"][name] - rows["fp"][name], rel=1e-4, abs=1e-6) and low <= value <= high
        assert f"w4a4 - fp               {name:16}{value:>10.3f}  [{low:.3f}, {high:.3f}]" in said
    value, low, high = found["versus"]["w4a4"]["psnr_to_fp"]
    assert value == pytest.approx(rows["w4a4"]["psnr_to_fp"]) and low < value < high
    assert json.loads((finished / "evaluation" / "scores-1.json").read_text()) == found


@pytest.mark.slow
def test_the_page_about_a_run_has_its_pictures_scores_and_times(finished, tmp_path, monkeypatch):
    """Catches pictures of another model or noise, a page that changes the run, and layers whose time was not measured."""
    monkeypatch.setattr(
        evaluate, "draw", lambda model, net, prompts, steps, *seed, **bar: draw(model, net, prompts, min(steps, 4), *seed)
    )
    classifier = evaluate.SceneClassifier().eval().requires_grad_(False)  # one of random weights, the same for both reports
    monkeypatch.setattr(evaluate, "load_classifier", lambda: classifier)
    folder, reports = shutil.copytree(finished, tmp_path / "run"), []
    student, about = checkpoint.load_checkpoint(folder)
    config = about["config"]
    network = load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(evaluate.FAST)
    for _ in range(2):
        evaluate.closing_report(folder, network, config | {"eval_n": 4})
        reports = [*reports, (folder / "report.json").read_bytes()]
    assert reports[0] == reports[1]  # times are in a file of their own
    files_before = sorted(path for path in folder.rglob("*") if path.is_file())
    evaluate.main(["report", str(folder), "--out", str(tmp_path / "page.html")])
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == files_before
    page = (tmp_path / "page.html").read_text()
    prompts = sources.sample_prompts(config)
    expected = sources.to_bytes(draw(student, student, prompts, 2))
    shown = pictures_of_page(page)
    assert all(shown[f"W4A4 CM, 2 steps: {prompt}"] == each.tobytes() for prompt, each in zip(prompts, expected, strict=True))
    assert len(shown) == 7 * len(prompts) and "were not measured" not in page
    seconds = json.loads((folder / "seconds.json").read_text())
    assert set(seconds) > set(about["layers"]) and min(seconds.values()) > 0


def test_the_shipped_classifier_reads_real_pictures():
    """Catches a classifier that does not fit the pictures: more than 0.97 of scenes with every attribute right."""
    accuracy, features = real_pictures(evaluate.load_classifier(), 1024)
    assert accuracy > 0.97 and features.shape == (1024, 128)


# ------------------------------------------------------------------------------------------------ what a user can get wrong


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--stpes 3", "unrecognized arguments: --stpes"),
        ("--step 3", "unrecognized arguments: --step"),  # no abbreviations
        ("--model sdx", "invalid choice: 'sdx'"),
        ("--steps many", "invalid int value"),
        ("--group-w 48", "invalid choice: 48"),
        ("--group-x 4", "invalid choice: 4"),
        ("--bits-x 6", "invalid choice: 6"),
        ("--rank 100", "--rank 100 is larger than layer"),
        ("--hessian-mb 0", "--hessian-mb 0 has no room for layer .*: give at least"),
        ("--batch 0", "--batch must be at least 1"),
        ("--targets anchor", "--targets anchor makes 1 stages: --split must have 0 points"),
        ("--targets anchor,fp,fp", "--targets anchor,fp,fp makes 3 stages: --split must have 2 points"),
        ("--targets anchor,fp,fp --split .5,0.50", "--split must have 2 points, each once"),
        ("--targets anchor,fq", "must name a network for each stage: anchor, fp, self, teacher"),
        ("--bits 16 --rollout 0.5", "anchor: 4 bits only"),
        ("--recipe mine", "--recipe mine is not in PRESETS: choose from cmquant, paper"),
        ("--phases 1,2", "unrecognized arguments: --phases"),  # --sampling-steps today
        ("--edges 4", "unrecognized arguments: --edges"),  # --tdpt-phases today
        ("--sampling-steps 1,x", "--sampling-steps 1,x must be numbers"),
        ("--sampling-steps 1,40 --grid 48 --trajectory teacher", "--sampling-steps 1,40 must be numbers from 1 to 24"),
        ("--tdpt-phases 9 --grid 8", "--tdpt-phases 9 is more than the 8 points"),
        ("--rank-granule 0", "--rank-granule must be at least 1"),
        ("--rank-least -1", "--rank-least must be at least 0"),
        ("--rank-least 9", "--rank-least 9 must be at most --rank 8: add --rank-least 0"),
        ("--ranks uniform --rank 0.7", "--ranks uniform gives each layer 0 of --rank 0.7: give a whole number"),
        ("--inputs-8bit 3 --bits-x 8", "--bits-x 8 gives all inputs 8 bits: leave out --inputs-8bit"),
        ("--inputs-8bit 3 --hessian input", "--inputs-8bit weighs by gradients"),
        ("--smooth 0,2", "--smooth must be from 0 to 1"),
        ("--keep-16bit --ranks uniform", "--ranks uniform does not weigh what the grid costs"),
        ("--keep-16bit --ranks qra --deploy merged", "--deploy merged is strict W4A4: leave out --keep-16bit"),
        ("--rank-most 7", "--rank-most 7 must be at least --rank 8: add --rank-most 0"),
        ("--rank 0", "--rank 0 leaves nothing to train: add --steps 0"),
        ("--rank 1.5 --ranks qra --bits 16", "--bits 16 trains a LoRA of --rank 1, 2, .., not of 1.5"),
        ("--dtype half", "invalid choice: 'half'"),
        ("--teacher none.safetensors", "none.safetensors does not exist: make it with"),
        ("--data nowhere", "not a folder"),
        ("--out /proc/no/run", "cannot write to the run folder"),
        ("--device gpu", "--device gpu is neither cpu nor cuda"),
        ("--micro -1", "--micro must be at least 0"),
        ("--gradient-captions -1", "--gradient-captions must be at least 0"),
        ("--split 2", "--split must be from 0 to 1"),
        ("--split half", "invalid fractions value: 'half'"),
        ("--split nan", "--split must be from 0 to 1"),
        ("--rollout 1.5", "--rollout must be from 0 to 1"),
        ("--grid 1001", "more than a noise schedule.s 1000"),
        ("--stage teacher --model sdxl", "sdxl has a public teacher"),
        ("--export lora", "--export lora needs a model with public weights"),
        ("--model flux --export lora --deploy merged", "--export lora needs --deploy branch"),
        ("--bits 16 --offload --targets fp,fp", "leave them out"),
        ("--shard-teacher", "start them with `torchrun"),
        ("--lr -1", "--lr must be at least 0"),
        ("--lr nan", "--lr must be at least 0"),
        ("--seed -1", "--seed must be at least 0"),
        ("--cm self --steps 0", "--cm self trains for --steps updates too"),
        ("--eval-n 1", "--eval-n must be at least 2"),
        ("--weights random", "--weights is for models with public weights: leave it out"),
        ("--memory-limit 24GB", "--memory-limit is for models with public weights: leave it out"),
        ("--cm-scale 0.125", "--cm-scale is for models with public weights: leave it out"),
    ],
)
def test_bad_flags_are_one_sentence(weights, tmp_path, capsys, flags, says):
    """Catches a traceback, and a mistake that is noticed only after the work."""
    refuse(f"{QUICK} {weights} --out {tmp_path}/r {flags}".split(), capsys, says)


@pytest.mark.slow
def test_exit_code_is_2_and_stderr_one_line(tmp_path):
    """The same through the shell, for each script."""
    for job in (["train.py", "--data", "nowhere", "--out", str(tmp_path)], ["sample.py", "--checkpoint", "nowhere"]):
        done = subprocess.run([sys.executable, *job], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


DAMAGES = [
    ("truncate", "truncated"),
    ("remove", "unfinished or damaged"),
    ("format", "checkpoint format 99"),
    ("json", "config.json is damaged"),
    ("swap", "was swapped"),
]


@pytest.mark.parametrize("damage, says", DAMAGES)
def test_damaged_checkpoints_are_named(finished, tmp_path, capsys, damage, says):
    """Catches pictures drawn from a broken file."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    model, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncate":
        model.write_bytes(model.read_bytes()[:100_000])
    elif damage == "remove":
        model.unlink()
    elif damage == "format":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    elif damage == "json":
        config.write_text(config.read_text()[:100])
    elif damage == "swap":
        files.write_tensors(model, {"a": torch.zeros(3)}, {})
    refuse(["--checkpoint", str(folder), "--out", str(tmp_path / "x.png")], capsys, says, sample)
    assert not (tmp_path / "x.png").exists()


def test_a_run_folder_of_another_configuration_is_not_overwritten(weights, finished, capsys):
    """Catches a resumed run that mixes two configurations."""
    before = (finished / "state.safetensors").read_bytes()
    refuse(f"{QUICK} {weights} --out {finished} --lr 1e-3".split(), capsys, "another lr: choose another --out")
    assert (finished / "state.safetensors").read_bytes() == before


def test_what_holds_no_student_is_said_as_it_is(weights, tmp_path, monkeypatch, capsys):
    """Catches "unfinished" said of a finished 16-bit run, tracebacks for a file, and pictures drawn for a name that cannot be."""
    monkeypatch.setattr(evaluate, "network_report", lambda *args: {})
    run(weights, tmp_path / "cm", "--bits 16 --targets fp,fp --steps 1 --rollout 0")
    (tmp_path / "cm" / "model.safetensors").write_bytes(b"")
    for script in (sample, evaluate):
        refuse(["--checkpoint", f"{tmp_path}/cm"], capsys, "holds 16-bit weights, no packed student", script)
        refuse(["--checkpoint", f"{tmp_path}/cm/model.safetensors"], capsys, "is a file: give the folder", script)
    refuse(["--checkpoint", f"{tmp_path}/cm", "--seed", "-1"], capsys, "--seed must be at least 0", evaluate)
    for out in ("nowhere/grid.png", "grid", "grid.gold"):
        refuse(["--checkpoint", f"{tmp_path}/cm", "--out", f"{tmp_path}/{out}"], capsys, "cannot write .*give --out a .png", sample)


def test_what_may_change_is_said_by_the_fields_themselves(finished):
    """Catches a second list of names that a new field does not get into."""
    assert {"micro", "eval_n", "save_every", "hessian_mb"} <= train.MAY_CHANGE and "lr" not in train.MAY_CHANGE
    config = files.read_config(finished)["config"]
    files.refuse_another(finished, config | {"micro": 7}, train.MAY_CHANGE)
    with pytest.raises(UserError, match="another micro"):
        files.refuse_another(finished, config | {"micro": 7}, train.MAY_CHANGE - {"micro"})
    files.refuse_another(finished, config | {"a field of tomorrow": 7}, set())


def test_what_a_refusal_says_is_a_command_that_goes_on(tmp_path):
    """Catches 0 and 1 that are taken for booleans, values that a shell would split or drop, and runs that are refused for what they
    do not read."""
    cfg = train.parse("--smooth 0 --seed 0 --rollout 1 --no-rotate --rank 1 --rank-most 0 --split 0.25".split())
    old = train.stored(dataclasses.replace(cfg, data="", cm="a b.safetensors"))
    files.write_json(tmp_path / "config.json", {"format": files.FORMAT, "config": old})
    other = train.stored(train.parse("--smooth 0.5 --seed 1 --rollout 0 --rank 2 --rank-most 99 --data x --cm y".split()))
    with pytest.raises(UserError, match="or go on with ") as refusal:
        files.refuse_another(tmp_path, other, train.MAY_CHANGE)
    again = train.parse(shlex.split(str(refusal.value).partition("go on with ")[2]))
    files.refuse_another(
        tmp_path, train.stored(again) | {"files of teacher and cm": old["files of teacher and cm"]}, train.MAY_CHANGE
    )
    assert train.OF_STUDENTS < {f.name for f in dataclasses.fields(train.Config)}
    for flags, refused in (("--bits 16", False), ("--stage teacher", False), ("", True)):
        cfg = train.parse(flags.split())
        files.write_json(tmp_path / "config.json", {"format": files.FORMAT, "config": train.stored(cfg) | {"group_x": 128}})
        with pytest.raises(UserError, match="another group_x") if refused else contextlib.nullcontext():
            files.refuse_another(tmp_path, train.stored(cfg), train.may_change(cfg))


@pytest.mark.slow
def test_a_budget_that_gives_no_layer_a_branch_is_refused_before_training(weights, tmp_path):
    """Catches an optimizer without parameters and a loss without a gradient."""
    with pytest.raises(UserError, match=r"no layer got a branch, .*: raise --rank 0.0001, or add --steps 0"):
        run(weights, tmp_path / "r", "--ranks variation --rank 0.0001")


def as_format_3(folder: Path) -> dict:
    """Turn a run folder into what the version before this one would have left; its configuration."""
    about = files.read_config(folder)
    younger = {f.name for f in dataclasses.fields(train.Config) if "before" in f.metadata}
    known = {k: v for k, v in about["config"].items() if k not in younger}
    former = {new: old for old, new in files.RENAMED.items()}
    config = {former.get(k, k): v for k, v in known.items()} | {"split": 0.5}
    files.write_json(folder / "config.json", about | {"format": 3, "config": config})
    for name in ("start", "state"):  # the state names the checksum of its start
        tensors, info = files.read_tensors(folder / f"{name}.safetensors", "")
        about = {k: v for k, v in info.items() if k not in ("sha256", "file", "run")}
        if name == "state":
            about["start"] = files.recorded_checksum(folder / "start.safetensors")
        files.write_tensors(folder / f"{name}.safetensors", tensors, about, files.run_digest(folder))
    return config


def test_bounds_of_ranks_that_a_family_sets_give_way_to_a_rank_that_they_contradict():
    """Catches `--rank 16` or `--rank 0.7` refused for a flag that was not given, `--rank 4` that gives each layer 4 without being
    asked for uniform ranks, and bounds that were given and are ignored."""

    def bounds(flags: str) -> tuple[int, int]:
        cfg = train.parse(f"--model tiny-flux {flags}".split())
        return cfg.rank_least, cfg.rank_most

    assert bounds("") == bounds("--rank 3") == (1, 4)
    assert bounds("--rank 16") == (1, 0) and bounds("--rank 0.7") == (0, 4)
    assert bounds("--rank 4") == (1, 0) and bounds("--rank 1") == (0, 4)
    assert bounds("--rank 16 --rank-most 4 --rank-least 17") == (17, 4)  # which validate refuses


@pytest.mark.slow
def test_a_run_folder_of_the_format_before_goes_on_and_is_drawn_from(weights, finished, without_report, tmp_path):
    """Catches fields that were renamed or are new, and with them files that a run would take for another run's."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    for name in ("model.safetensors", "state-previous.safetensors", "metrics.jsonl"):
        (old / name).unlink()
    config = as_format_3(old)
    assert config["phases"] == "1,2,4" and config["edges"] == 4 and not {"sampling_steps", "rank_least", "rotate"} & config.keys()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    assert files.run_digest(old) == digest, "as the version before made it"
    assert files.read_config(old)["config"]["sampling_steps"] == "1,2,4" and files.most_steps(files.read_config(old)["config"]) == 4
    with pytest.raises(UserError, match=r"another rank_granule, rank_least, rotate: .*, or go on with ") as refusal:
        run(weights, old)
    as_before = str(refusal.value).partition("go on with ")[2]
    assert as_before == "--rank-granule 2 --rank-least 2 --no-rotate"  # that version had none of these flags
    run(weights, old, as_before)
    assert losses(old) == losses(finished) and files.run_digest(old) == digest
    same_files(finished, old, "state.safetensors", "model.safetensors")
    checkpoint.load_checkpoint(old)
    with pytest.raises(UserError, match="another sampling_steps: choose another --out"):
        run(weights, old, f"{as_before} --sampling-steps 1")


@pytest.mark.slow
def test_a_run_goes_on_with_less_at_a_time(weights, finished, without_report, tmp_path, monkeypatch):
    """Catches advice on full memory (--micro, --memory-limit) that a begun run then refuses, and with it its start and updates."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(2, patch)
        run(weights, tmp_path / "r")
    start = (tmp_path / "r" / "start.safetensors").read_bytes()
    run(weights, tmp_path / "r", "--micro 1 --checkpointing --hessian-mb 64 --save-every 3 --eval-n 8")
    assert (tmp_path / "r" / "start.safetensors").read_bytes() == start
    assert losses(tmp_path / "r")[:2] == losses(finished)[:2] and len(losses(tmp_path / "r")) == 4
    same_losses(tmp_path / "r", finished)


@pytest.mark.slow
def test_a_rounding_and_an_initialisation_of_ones_own_are_one_line_each(weights, tmp_path, monkeypatch):
    """Catches names that are asked for where the table should be: a new rounding without H, a new start that is denied G."""
    few = student.layers_to_quantize
    monkeypatch.setattr(student, "layers_to_quantize", lambda *args: few(*args)[::20])
    monkeypatch.setitem(quant.ROUNDINGS, "mine", quant.round_gptq)
    monkeypatch.setitem(hgs_lora.METHODS, "mine", hgs_lora.METHODS["hgs"])
    network = load_embedded_cm("tiny", *weights.split()[3::2])
    cond = sources.LiveExamples(sources.source(""), network).conditions(2, step_generator(0, 0), slice(None))
    x_T, base, built = torch.randn(2, *network.latent, generator=step_generator(1, 0)), fuse(network), []
    for names in ("--rounding gptq --init hgs", "--rounding mine --init mine"):
        cfg = train.parse(f"{QUICK} {weights} --sampling-steps 1 --iters 1 {names}".split())
        built.append(build(cfg, copy.deepcopy(base), cond, x_T)[0].state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


def test_nan_in_the_data_stops_the_run_and_keeps_the_last_state(weights, finished, tmp_path, monkeypatch, capsys):
    """Catches NaN that reaches the checkpoint."""
    out = tmp_path / "nan"
    shutil.copytree(finished, out)
    batch = scenes.Scenes.batch

    def broken(self, n, gen):
        pictures, captions = batch(self, n, gen)
        return pictures * float("nan"), captions

    for name in ("state.safetensors", "state-previous.safetensors", "model.safetensors", "metrics.jsonl"):
        (out / name).unlink()
    monkeypatch.setattr(scenes.Scenes, "batch", broken)
    refuse(f"{QUICK} {weights} --out {out}".split(), capsys, r"loss nan.*look at the data, or lower --lr and change --out")
    assert not (out / "model.safetensors").exists()


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    """Catches a half-written file under the final name, and a half-written temporary that stays."""
    path = tmp_path / "x.safetensors"
    files.write_tensors(path, {"a": torch.zeros(9)}, {})
    before = path.read_bytes()

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        files.write_tensors(path, {"a": torch.ones(9)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"] and path.read_bytes() == before


def test_dry_run_prints_every_field_and_touches_nothing(tmp_path, capsys):
    """Catches a dry run that creates folders."""
    train.main(["--dry-run", "--out", str(tmp_path / "r")])
    printed = capsys.readouterr().out
    assert all(f.name in printed for f in dataclasses.fields(train.Config)) and not (tmp_path / "r").exists()


def test_help_explains_every_flag(capsys):
    """Catches a field whose comment is not on its line, and so not in --help."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out.split("options:")[1])
    for f in dataclasses.fields(train.Config):
        assert re.search(rf"--{f.name.replace('_', '-')}\b.{{8,300}}? \[{re.escape(str(f.default))}\]", said), f.name


# ------------------------------------------------------------------------------------------------ promises about the code


def test_every_field_of_the_configuration_has_a_reader():
    """Catches a flag that is parsed and never read."""
    readers = [ROOT / f"{name}.py" for name in ("train", "student", "hgs_lora", "sample", "evaluate")]
    code = "".join(file.read_text() for file in (*readers, *(ROOT / "models").glob("*.py")))
    for f in dataclasses.fields(train.Config):
        assert re.search(rf"\b(cfg|self)\.{f.name}\b|config\[\"{f.name}\"\]|\"config\"\]\[\"{f.name}\"\]", code), f.name
