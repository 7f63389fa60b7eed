"""SDXL and FLUX end to end, miniatures in real formats: train, kill, resume, sample, export, reload; two processes; refusals."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import kill_at, losses, refuse, same_files, same_losses

import sample
import tdpt
import train
from data import sources
from models import checkpoint, encoders, pipeline, plan, pretrained
from models.denoiser import lora_layers, start_noise
from models.family import FAMILIES
from run import files
from run.common import UserError

ROOT = Path(__file__).parent.parent
PROMPTS = [f"a {size} {color} {thing} on the {side}" for size in ("large", "small") for color in ("red", "green")
           for thing in ("house", "tree") for side in ("left", "right")]  # fmt: skip
BASES = [*miniature.PUBLIC, "sdxl-v"]  # the last one predicts v
EACH_BASE = [name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in BASES]  # FLUX has fewest layers
EACH_FAMILY = EACH_BASE[: len(miniature.PUBLIC)]
QUICK = (
    "--steps 3 --batch 4 --micro 2 --calibration 4 --init zero --rounding rtn --ranks uniform --rank 4 --lr 1e-3 --warmup 1"
    " --save-every 1 --grid 8 --sampling-steps 1,2 --rollout 0.5 --eval-n 2 --dtype float32"
)


@pytest.fixture(scope="module", autouse=True)
def shared_simulations():
    """Runs of one architecture and rank share what memory.Footprint simulates, most of their time."""
    curves, footprint_of = defaultdict(dict), plan.footprint_of

    def shared(cfg, *network):
        footprint = footprint_of(cfg, *network)
        alike = (getattr(cfg, name) for name in "model resolution bits rank dtype group_w".split())
        footprint.curves = curves[*alike, cfg.cm == pretrained.WHOLE, footprint.shapes]
        return footprint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "footprint_of", shared)
        yield


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> dict[str, str]:
    """Flags that name a miniature base, its consistency LoRA in diffusers' format, and prompts."""
    folder, flags = tmp_path_factory.mktemp("bases"), {}
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name in BASES:
        model, base, cm = name.split("-")[0], miniature.save(name, folder / name), folder / f"{name}-cm.safetensors"
        network = pretrained.load_network(model, str(base), resolution=64, dtype=torch.float32)
        pretrained.random_cm(network)
        pretrained.save_cm(cm, network)
        flags[name] = f"--model {model} --teacher {base} --cm {cm} --resolution 64 --data {folder}/prompts.txt"
    return flags


def run(real: dict[str, str], name: str, out: Path, flags: str = "") -> None:
    train.main(f"{QUICK} {real[name]} --out {out} {flags}".split())


@pytest.fixture(scope="module")
def finished(real, shared_simulations, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing disturbed, each made when it is first asked for; TDPT and rollouts both."""

    class Runs(dict):
        def __missing__(self, name):
            self[name] = tmp_path_factory.mktemp("runs") / name
            run(real, name, self[name])
            return self[name]

    return Runs()


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_killed_runs_resume_bit_for_bit(real, finished, tmp_path, monkeypatch, name):
    """Catches a cache, a start or a state that is not what the undisturbed run had."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(2, patch)
        run(real, name, tmp_path / "r")
    run(real, name, tmp_path / "r")
    same_files(finished[name], tmp_path / "r", "start.safetensors", "state.safetensors", "model.safetensors")
    assert losses(tmp_path / "r") == losses(finished[name]) and len(losses(tmp_path / "r")) == 3


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_text_encoders_are_not_asked_again_and_micro_batches_change_nothing(real, finished, tmp_path, monkeypatch, name):
    """Catches encoders that are loaded although the cache is complete, and a micro-batch with a share that is not its own."""

    def asked(*args):
        raise AssertionError("the text encoders were loaded")

    monkeypatch.setattr(encoders, "Text", asked)
    cache = f"--cache {finished[name]}/cache"
    run(real, name, tmp_path / "whole", f"{cache} --micro 0 --steps 2")
    same_losses(tmp_path / "whole", finished[name])


@pytest.mark.parametrize("base", EACH_BASE)
def test_the_finished_run_is_a_pipeline_that_draws_what_was_trained(finished, base):
    """Catches a checkpoint that another program reads as another network, and v that is taken for noise on the way."""
    name = base.split("-")[0]
    student, about = checkpoint.load_checkpoint(finished[base])
    assert (about["network"]["scheduler"].get("prediction_type") == "v_prediction") == (base == "sdxl-v")
    pipe = pipeline.load_pipeline(finished[base], dtype=torch.float32)
    text = encoders.Text(name, about["network"]["base"], resolution=64, dtype=torch.float32)
    family, cond, apart = FAMILIES[name], text(PROMPTS[:1]), []
    pipe.set_progress_bar_config(disable=True)
    guidance = family.few_step_guidance(about["network"]["guidance"])
    assert guidance == (1.0 if family.classifier_free else about["config"]["guidance"])
    size = dict(height=64, width=64, num_inference_steps=2, guidance_scale=guidance, output_type="latent")
    for seed in range(3):
        x_T = torch.randn(1, *student.latent, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            ours = tdpt.sample(student.float(), student.path, x_T, cond, 2)
        more = {"max_sequence_length": 32} if name == "flux" else {}
        theirs = pipe(PROMPTS[0], **size, **more, latents=family.pack(pipe, x_T)).images
        theirs = theirs if name != "flux" else pipe._unpack_latents(theirs, 64, 64, pipe.vae_scale_factor)
        apart.append(((ours - theirs).abs().max() / ours.std()).item())
    # one may be far away: where a number lies between two codes, a millionth of it moves the picture by a third
    assert sorted(apart)[1] < 1e-4


def tiles(sheet: Path) -> list[torch.Tensor]:
    """The rows (n, 64, 64, 3) in 0 .. 255 of a sheet whose rows have names."""
    pixels, side = torch.from_numpy(np.array(Image.open(sheet))).float(), miniature.PIXELS
    rows = [pixels[top : top + side, 96:] for top in range(0, len(pixels), side + 4)]
    return [torch.stack([row[:, left : left + side] for left in range(0, row.shape[1], side + 4)]) for row in rows]


@pytest.mark.parametrize("base", EACH_BASE)
def test_a_finished_run_leaves_its_pictures_beside_those_of_the_16_bit_model(finished, base):
    """Catches latents that are decoded with another scale than the pipeline's, and rows of other noises, prompts or models."""
    above, below = tiles(finished[base] / "samples" / "compare.png")
    assert len(above) == len(below) == len(sources.PIPELINE_PROMPTS)
    family, more = FAMILIES[base.split("-")[0]], {"max_sequence_length": 32} if base == "flux" else {}
    for pictures, pipe in (
        (above, pipeline.load_16bit(finished[base], cm=True)),
        (below, pipeline.load_pipeline(finished[base], dtype=torch.float32)),
    ):
        pipe.to(torch.float32).set_progress_bar_config(disable=True)
        guidance = family.few_step_guidance(checkpoint.load_checkpoint(finished[base])[1]["network"]["guidance"])
        size, apart = dict(height=64, width=64, num_inference_steps=2, guidance_scale=guidance), []
        for i, prompt in enumerate(sources.PIPELINE_PROMPTS[:4]):
            noise = family.pack(pipe, start_noise(1, (family.latent[0], 8, 8), i))
            picture = np.array(pipe(prompt, **size, **more, latents=noise).images[0])
            apart.append((torch.from_numpy(picture).float() - pictures[i]).abs().mean().item())
        assert sorted(apart)[1] < 1, apart  # of 255; a code that flips moves a picture of 4 bits


def test_pictures_during_a_training_change_no_number(real, finished, tmp_path, capsys):
    """Catches text encoders or a VAE that stay, randomness that pictures use up, and prompts that are not the file's."""
    (tmp_path / "prompts.txt").write_text("a red cat\na green river\n")
    run(real, "flux", tmp_path / "r", f"--validation-prompts {tmp_path}/prompts.txt --validate-every 2")
    same_files(finished["flux"], tmp_path / "r", "start.safetensors", "state.safetensors", "model.safetensors")
    found = {path.stem: tiles(path) for path in (tmp_path / "r" / "samples").glob("*.png")}
    assert sorted(found) == ["compare", "update-00000", "update-00002", "update-00003"]
    assert all(len(row) == 2 for rows in found.values() for row in rows)
    assert all(torch.equal(rows[0], found["compare"][0]) for rows in found.values())
    assert not torch.equal(found["update-00000"][1], found["update-00003"][1])
    # what was trained in memory is what the checkpoint holds, but for LoRA in 8 bits
    assert (found["update-00003"][1] - found["compare"][1]).abs().mean() < 0.5 * (
        found["compare"][0] - found["compare"][1]
    ).abs().mean()


def test_pictures_that_cannot_be_drawn_end_no_run_that_is_trained(real, finished, tmp_path, monkeypatch, capsys):
    """Catches a base without VAE that is found out after hours, and costs the closing lines."""

    def none(*args):
        raise UserError("the VAE is not there")

    monkeypatch.setattr(encoders, "decode", none)
    run(real, "flux", tmp_path / "r", f"--cache {finished['flux']}/cache")
    assert re.search(r"no pictures: the VAE is not there\n.* seconds, peak memory", capsys.readouterr().out)
    same_files(finished["flux"], tmp_path / "r", "model.safetensors")


def test_a_gpu_without_room_for_the_vae_leaves_it_to_the_cpu(monkeypatch):
    """Catches a training that pictures end."""
    asked = []

    class OnGPU(encoders.VAE):
        def __init__(self, model, base, components, device):
            asked.append(device)

        def decode(self, latents):
            if asked[-1] == "cuda" and latents.sum() > 2:
                raise torch.OutOfMemoryError
            return latents + 1

    monkeypatch.setattr(encoders, "VAE", OnGPU)
    network, latents = SimpleNamespace(family=FAMILIES["sdxl"]), torch.arange(6.0).split(2)
    for flags, expected in ("", ["cuda", "cpu"]), ("--memory-limit 24GB", ["cpu"]):
        cfg = train.parse(f"--model sdxl --device cuda {flags}".split())
        asked.clear()
        assert torch.cat(encoders.decode(cfg, network, latents)).tolist() == [1, 2, 3, 4, 5, 6] and asked == expected


def test_text_encoders_that_are_gone_cost_a_run_its_pictures_alone(real, finished, tmp_path, monkeypatch, capsys):
    """Catches a run with a complete cache that needs them again for pictures that nobody asked for, and one that was asked to draw
    and does not."""

    def gone(*args):
        raise UserError("the text encoders are not there")

    monkeypatch.setattr(encoders, "Text", gone)
    out = shutil.copytree(finished["flux"], tmp_path / "r")
    next((out / "cache").glob("prompts-*.safetensors")).unlink()
    run(real, "flux", out)
    assert "the run will end without pictures: the text encoders are not there" in capsys.readouterr().out
    with pytest.raises(UserError, match="the text encoders are not there"):
        run(real, "flux", out, "--validate-every 2")


@pytest.mark.slow
def test_a_signal_ends_a_sheet_of_pictures(real, finished, tmp_path, monkeypatch):
    """Catches minutes of pictures that a scheduler does not wait for, and a half sheet."""
    latents = sample.draw_latents

    def hit(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return latents(*args, **more)

    flags = f"--validate-every 2 --cache {finished['flux']}/cache"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sample, "draw_latents", hit)
        run(real, "flux", tmp_path / "r", flags)
    assert stopped.value.code == 0 and not (tmp_path / "r" / "samples").exists()
    run(real, "flux", tmp_path / "r", flags)
    assert len(list((tmp_path / "r" / "samples").glob("*.png"))) == 4
    same_files(finished["flux"], tmp_path / "r", "state.safetensors", "model.safetensors")


@pytest.mark.parametrize("name, config", [
    ("sdxl", dict(scaling_factor=0.13, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0])),
    ("sdxl", dict(scaling_factor=0.13, latents_mean=None, latents_std=None)),
    ("flux", dict(scaling_factor=0.36, shift_factor=0.12)),
    ("sd15", dict(scaling_factor=0.18)),
])  # fmt: skip
def test_decoding_takes_back_what_encoding_scaled(name, config):
    """Catches a shift or a standard deviation that is left out."""
    vae, family = object.__new__(encoders.VAE), FAMILIES[name]
    vae.family, vae.device = family, "cpu"
    vae.vae = SimpleNamespace(config=SimpleNamespace(**config), decode=lambda z: SimpleNamespace(sample=z))
    z = torch.rand(2, family.latent[0], 3, 5) * 1.8 - 0.9
    torch.testing.assert_close(vae.decode(family.scale_latents(vae.vae.config, z)), z)


@pytest.mark.slow
def test_a_pipeline_of_a_single_file_draws_pictures_of_the_runs_size(finished, monkeypatch):
    """Catches Stable Diffusion's pipeline, which asks what kind of size its UNet has while there is no UNet yet."""

    def component(cls, what, family, base, components, **options):
        return pretrained.from_pretrained(cls, base, **options)

    runs = [finished[name] for name in ("sd15", "sdxl")]  # made before anything is patched
    monkeypatch.setattr(pretrained, "is_file", lambda base: True)
    monkeypatch.setattr(pretrained, "load_component", component)
    for run in runs:
        pipe = pipeline.load_pipeline(run, dtype=torch.float32)
        assert pipe("a cat", num_inference_steps=1, guidance_scale=1.0).images[0].size == (64, 64)


def test_a_finished_run_is_exported_when_it_is_asked_to(real, finished, tmp_path):
    """Catches --export diffusers that trains again, or leaves a folder without what stock diffusers needs."""
    out = shutil.copytree(finished["flux"], tmp_path / "r")
    run(real, "flux", out, "--export diffusers")
    names = {path.name for path in (out / "pipeline").iterdir()}
    assert {"model_index.json", "pipeline.py", "README.md", "transformer", "vae", "text_encoder_2"} <= names
    pipes = [pipeline.load_pipeline(folder, dtype=torch.bfloat16) for folder in (out, out / "pipeline")]
    ours, theirs = (pipe.transformer.state_dict() for pipe in pipes)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    same_files(finished["flux"], out, "state.safetensors", "model.safetensors")


@pytest.mark.slow
def test_sample_export_and_reload(real, finished, tmp_path):
    """Catches an exported LoRA that stock pipelines refuse, and a grid that sample.py does not write."""
    out = finished["sdxl"]
    sample.main(["--checkpoint", str(out), "--prompt", PROMPTS[0], "--steps", "2", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").stat().st_size > 1000
    pipeline.main(["--checkpoint", str(out), "--export", "lora", "--out", str(tmp_path / "lora.safetensors")])
    network = pretrained.load_network("sdxl", real["sdxl"].split()[3], resolution=64, dtype=torch.float32)
    pretrained.add_cm(network, str(tmp_path / "lora.safetensors"))
    assert len(lora_layers(network)) > 70


@pytest.mark.slow
def test_a_consistency_model_of_ones_own_comes_first(real, tmp_path, capsys):
    """Catches --cm self that trains nothing, or whose LoRA the next stage cannot read."""
    flags = real["flux"].split()
    flags[flags.index("--cm") + 1] = "self"
    extra = ["--cached", "4", "--steps", "1", "--checkpointing", "--offload", "--cache", str(tmp_path / "c"), "--export", "lora"]
    train.main([*QUICK.split(), *flags, *extra, "--out", str(tmp_path / "r")])
    assert (tmp_path / "r" / "cm" / "flux-cm.safetensors").exists() and (tmp_path / "r" / "model.safetensors").exists()
    of_the_cm, of_the_student = capsys.readouterr().out.split("planned peak")[1:]
    assert "teacher resident" in of_the_cm and "teacher offloaded" in of_the_student
    argv = [*QUICK.split(), *flags, *extra]
    refuse([*argv, "--out", str(tmp_path / "r"), "--seed", "5"], capsys, "r/cm holds a run with another seed")
    shutil.move(tmp_path / "r", tmp_path / "moved")  # and with it the file that --cm self means
    train.main([*argv, "--out", str(tmp_path / "moved")])


@pytest.mark.slow
def test_checkpointing_changes_no_loss_of_the_consistency_model(real, finished, tmp_path, monkeypatch):
    """Catches blocks that are computed again with the LoRA switched off, and a flag that is ignored."""
    flags, found, calls = f"--bits 16 --targets fp,fp --micro 1 --steps 2 --cached 4 --cache {finished['flux']}/cache", [], []
    once = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **more: calls.append(0) or once(*args, **more))
    for out, switch in (("kept", "--no-checkpointing"), ("again", "--checkpointing")):
        assert not calls
        run(real, "flux", tmp_path / out, f"{flags} {switch}")
        found.append(losses(tmp_path / out))
    assert calls
    for (_, a), (_, b) in zip(*found, strict=True):
        assert abs(a - b) < 1e-5 * abs(b)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_recomputed_activations_change_no_statistics(real, finished, tmp_path, name):
    """Catches gradients that are counted twice, or not at all, where checkpointing runs a layer's forward again."""
    flags = f"--cache {finished[name]}/cache --init hgs --iters 1 --ranks qra --steps 0"
    for out, switch in (("kept", "--no-checkpointing"), ("again", "--checkpointing")):
        run(real, name, tmp_path / out, f"{flags} {switch}")
    tables = [json.loads((tmp_path / out / "config.json").read_text())["layers"] for out in ("kept", "again")]
    assert tables[0] == tables[1] and len({row["rank"] for row in tables[0].values()}) > 1
    same_files(tmp_path / "kept", tmp_path / "again", "start.safetensors")


@pytest.mark.parametrize("name", miniature.PUBLIC)
def test_without_resolution_the_plan_is_for_pictures_of_the_base_s_own_size(real, name):
    """Catches a plan for 1024 pixels where the run has others."""
    flags = real[name].replace("--resolution 64", "").split()
    side = pretrained.load_network(name, flags[3]).latent[1]
    assert plan.footprint_of(train.parse(flags)).shapes[0][1:] == (side, side)


def test_too_little_main_memory_is_one_sentence(real, tmp_path, capsys, monkeypatch):
    """Catches a start that the system kills in its middle."""
    monkeypatch.setattr(plan, "free_memory", lambda: 10**7)
    argv = [*QUICK.split(), *real["flux"].split(), "--out", str(tmp_path / "r")]
    refuse(argv, capsys, "GB of main memory and 0.0 GB are there")


@pytest.mark.slow
def test_a_resumed_run_makes_the_choices_of_its_beginning(real, tmp_path, monkeypatch):
    """Catches another micro-batch, and with it other sums, once statistics need no room any more."""
    cfg, seen = train.parse(f"{QUICK} {real['sdxl']} --batch 64 --out {tmp_path} --memory-limit 150MB".split()), []
    for has_start in (False, True):
        monkeypatch.setattr(checkpoint, "has_start", lambda out, has_start=has_start: has_start)
        chosen = plan.planned(cfg)
        seen.append((chosen.micro, chosen.checkpointing, chosen.offload))
    alone = plan.choose(15 * 10**7, plan.footprint_of(cfg), cfg.batch)
    assert seen[0] == seen[1] and seen[0][0] < alone.micro_batch  # training alone has room for more
    monkeypatch.setattr(plan, "plan", None)  # takes long, and says nothing new where there is no limit
    assert plan.planned(dataclasses.replace(cfg, memory_limit="")).micro == plan.micro_of(cfg)


@pytest.mark.slow
def test_dry_run_prints_what_the_flags_make(real, capsys):
    """Catches flags that are printed and not looked at."""
    said = {}
    for flags in ("", "--lora-bits 16", "--deploy merged", "--bits 16 --targets fp,fp", "--offload", "--dtype float32"):
        train.main(f"{QUICK} --dtype bfloat16 --checkpointing {real['flux']} --dry-run {flags}".split())
        text = capsys.readouterr().out.split("dry_run")[1]
        said[flags] = float(re.search(r"memory_ratio: ([\d.]+)", text)[1]), re.search(r"teacher (\w+)", text)[1], text
    assert said["--deploy merged"][0] < said[""][0] < said["--lora-bits 16"][0] and "LoRA, 16 bits" in said["--lora-bits 16"][2]
    assert "packed student" not in said["--bits 16 --targets fp,fp"][2] and said["--offload"][1] == "offloaded"
    assert said["--dtype float32"][2] != said[""][2]


def test_weights_that_are_not_the_run_s_any_more_are_noticed(real, tmp_path, capsys):
    """Catches a cache and a start of a consistency model that was trained anew, and a flipped bit in one of our own."""
    flags, cm = real["flux"].split(), tmp_path / "cm.safetensors"
    tensors, info = files.read_verified(Path(flags[flags.index("--cm") + 1]), "")
    files.write_tensors(cm, tensors, info)
    flags[flags.index("--cm") + 1] = str(cm)
    argv = [*QUICK.split(), *flags, "--steps", "1", "--out", str(tmp_path / "r")]
    train.main(argv)
    files.write_tensors(cm, {k: 2 * v for k, v in tensors.items()}, info)
    refuse(argv, capsys, "holds a run with another files of teacher and cm")
    refuse([*argv[:-1], str(tmp_path / "s"), "--cache", f"{tmp_path}/r/cache"], capsys, "another files of the consistency model")
    whole = bytearray(cm.read_bytes())
    whole[-5] ^= 4
    cm.write_bytes(whole)
    refuse([*argv[:-1], str(tmp_path / "t")], capsys, "cm.safetensors is truncated or damaged")


@pytest.mark.slow
def test_a_file_of_the_denoiser_alone_takes_the_rest_of_components(real, tmp_path):
    """Catches a single file, as FLUX is published, that trains and then cannot be drawn with."""
    base = real["sdxl"].split()[3]
    file = miniature.single_file(pretrained.load_network("sdxl", base, dtype=torch.float32).net, tmp_path / "model.safetensors")
    argv = real["sdxl"].replace(f"--teacher {base}", f"--teacher {file} --components {base}").split()
    train.main([*QUICK.split(), *argv, "--steps", "1", "--out", str(tmp_path / "r")])
    alone, folder = (pipeline.load_pipeline(tmp_path / "r", dtype=torch.float32, base=b) for b in ("", base))
    draw = dict(num_inference_steps=1, guidance_scale=1.0, output_type="pt", height=64, width=64)
    pictures = [pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **draw).images for pipe in (alone, folder)]
    assert torch.equal(*pictures) and pictures[0].std() > 0
    sample.main(["--checkpoint", str(tmp_path / "r"), "--prompt", PROMPTS[0], "--compare", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_guidance_reaches_the_student_the_reference_and_the_card(real, finished, tmp_path):
    """Catches a student that is given 3.5 where its targets are given 5."""
    run(real, "flux", tmp_path / "r", f"--guidance 5 --steps 1 --cache {finished['flux']}/cache")
    assert checkpoint.load_checkpoint(tmp_path / "r")[0].guidance == checkpoint.load_start(tmp_path / "r")[0].guidance == 5
    assert "num_inference_steps=2, guidance_scale=5.0" in (tmp_path / "r" / "README.md").read_text()  # --sampling-steps 1,2
    assert pipeline.quantization_config(pipeline.load_pipeline(tmp_path / "r").transformer).guidance == 5
    assert checkpoint.load_checkpoint(finished["flux"])[0].guidance == 3.5


def test_one_file_is_read_like_its_folder(real, tmp_path):
    """Catches a single-file checkpoint that loads as another network."""
    base = real["sdxl"].split()[3]
    folder = pretrained.load_network("sdxl", base, dtype=torch.float32)
    file = miniature.single_file(folder.net, tmp_path / "model.safetensors")
    one = pretrained.load_network("sdxl", str(file), components=base, dtype=torch.float32)
    left, right = folder.net.state_dict(), one.net.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert one.scheduler == folder.scheduler


def test_pickles_are_never_read(real, tmp_path):
    """Catches diffusers' fallback to .bin files, which run what their author likes."""
    base = Path(real["sdxl"].split()[3])
    network = pretrained.load_network("sdxl", str(base), dtype=torch.float32)
    torch.save({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 128)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(UserError):
        pretrained.add_cm(network, str(tmp_path))
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        copy = shutil.copytree(base, tmp_path / part)
        weights = next((copy / part).glob("*.safetensors"))
        torch.save(load_file(weights), copy / part / f"{name}.bin")
        weights.unlink()
        with pytest.raises(UserError):
            {"unet": pretrained.load_network, "vae": encoders.VAE, "text_encoder": encoders.Text}[part]("sdxl", str(copy))


def test_kohya_loras_have_their_alpha(real, tmp_path):
    """Catches alpha / rank that is lost on the way, and keys of user interfaces that are not understood."""
    network, gen, tensors = pretrained.load_network("sdxl", real["sdxl"].split()[3], dtype=torch.float32), torch.Generator(), {}
    names = ["mid_block.attentions.0.proj_in", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    for name in names:
        O, I = network.net.get_submodule(name).weight.shape
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": torch.randn(4, I, generator=gen), f"{key}.alpha": torch.tensor(2.0)}
        tensors[f"{key}.lora_up.weight"] = torch.randn(O, 4, generator=gen)
    save_file(tensors, tmp_path / "kohya.safetensors")
    pretrained.add_cm(network, str(tmp_path / "kohya.safetensors"))
    assert sorted(lora_layers(network)) == sorted(names)
    for name, layer in lora_layers(network).items():
        key = "lora_unet_" + name.replace(".", "_")
        delta = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, delta)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *QUICK.split()]
TWO = dict(cwd=ROOT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_that_share_the_teacher_have_the_losses_of_one(real, finished, tmp_path):
    """Catches ranks that draw the same pictures, statistics that are not exchanged, gradients that are not averaged, a teacher
    whose parts are not gathered."""
    done = subprocess.run([*TORCHRUN, *real["sdxl"].split(), "--out", str(tmp_path / "r"), "--shard-teacher"], **TWO)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "r")) == 3
    same_losses(tmp_path / "r", finished["sdxl"])
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["latent_snr_to_fp"] > 10


@pytest.mark.parametrize(
    "change, says",
    [
        (("--teacher", "/nowhere/flux"), "does not exist: give a hub id"),
        (("--teacher", "SDXL"), "has no transformer folder: it is no flux"),
        (("--cm", "SDXLCM"), "has no LoRA for a transformer|fits no layer"),
        (("--cm", ""), "--cm is missing: name a consistency LoRA"),
        (("--data", "nowhere"), "check the path"),
        (("--teacher", "BROKEN"), "truncated or damaged"),
        (("--targets", "anchor"), "makes 1 stages: --split must have 0 points"),
        (("--resolution", "100"), "multiple of 64"),
        (("--resolution", "-64"), "multiple of 64"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(real, tmp_path, capsys, monkeypatch, change, says):
    """Catches a traceback, and weights of another architecture that are taken."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = dict(zip(real["flux"].split()[::2], real["flux"].split()[1::2], strict=True))
    other = dict(zip(real["sdxl"].split()[::2], real["sdxl"].split()[1::2], strict=True))
    if change[1] == "BROKEN":
        broken = miniature.save("flux", tmp_path / "broken")
        file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:100_000])
    value = {"SDXL": other["--teacher"], "SDXLCM": other["--cm"], "BROKEN": str(tmp_path / "broken")}.get(change[1], change[1])
    argv = [word for pair in (flags | {change[0]: value}).items() for word in pair]
    refuse([*QUICK.split(), *argv, "--out", str(tmp_path / "r")], capsys, says)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_the_same_command_goes_on(real, finished, tmp_path):
    """Catches ranks that wait for a dead one for ever, a state that only fits the whole life of a job, and two processes with other
    losses than one has."""
    flags = f"--steps 8 --cache {finished['flux']}/cache"
    command = [*TORCHRUN, *real["flux"].split(), *flags.split(), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], **TWO, check=True)
    run(real, "flux", tmp_path / "alone", flags)
    same_losses(tmp_path / "whole", tmp_path / "alone")
    (tmp_path / "r").mkdir()
    for name in ("config.json", "start.safetensors"):  # the same beginning
        shutil.copy(tmp_path / "whole" / name, tmp_path / "r")
    job, metrics = subprocess.Popen([*command, str(tmp_path / "r")], **TWO), tmp_path / "r" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert len(losses(tmp_path / "r")) < 8
    subprocess.run([*command, str(tmp_path / "r")], **TWO, check=True)
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")
