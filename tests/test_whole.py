"""Bases that draw in few steps themselves (--cm none), and quantization alone in Python (train.quantize): miniatures in the formats
of SDXL-Turbo and FLUX.1-schnell, and of SDXL, FLUX and Stable Diffusion 1.5."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import miniature
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file
from test_pipeline import code_of, latents, quiet, same_tensors, style
from test_real import PROMPTS, QUICK, shared_simulations  # noqa: F401  (the last is a fixture)
from test_train import kill_at, losses, refuse, same_files

import evaluate
import sample
import tdpt
import train
from layers import packed_layers
from models import card, encoders, pipeline, plan, pretrained, quantizer
from models.denoiser import float_layers, lora_layers
from models.family import FAMILIES
from run import files
from run.common import UserError

ROOT = Path(__file__).parent.parent
WHOLE = {"flux-schnell": "flux", "sdxl-turbo": "sdxl"}
EACH = ["flux-schnell", pytest.param("sdxl-turbo", marks=pytest.mark.slow)]
ALONE = re.sub(r" --(rollout|sampling-steps) \S+", "", QUICK)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: miniature.save(name, folder / name) for name in (*WHOLE, *miniature.PUBLIC)}


@pytest.fixture(scope="module")
def whole(bases, tmp_path_factory) -> dict[str, str]:
    """Flags that name a base which draws in few steps, and prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    about = f"--cm none --resolution 64 --data {prompts}"
    return {name: f"--model {model} --teacher {bases[name]} {about}" for name, model in WHOLE.items()}


@pytest.fixture(scope="module")
def finished(whole, shared_simulations, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """Runs that nothing disturbed, each made when it is first asked for."""

    class Runs(dict):
        def __missing__(self, name):
            self[name] = tmp_path_factory.mktemp("runs") / name
            train.main(f"{ALONE} {whole[name]} --steps 2 --out {self[name]}".split())
            return self[name]

    return Runs()


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_it_trains_on_rollouts_alone_and_resumes(whole, finished, tmp_path, monkeypatch, capsys, name):
    """Catches a LoRA that is looked for, a teacher that is asked with guidance, a default that no such base was made for, and a run
    that does not go on as it began."""
    out = finished[name]

    def asked(*args):
        raise AssertionError("there is no teacher")

    monkeypatch.setattr(tdpt, "guided", lambda teacher, w, null: asked)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(1, patch)
        train.main(f"{ALONE} {whole[name]} --steps 2 --out {tmp_path}/r".split())
    train.main(f"{ALONE} {whole[name]} --steps 2 --out {tmp_path}/r".split())
    same_files(out, tmp_path / "r", "start.safetensors", "state.safetensors", "model.safetensors")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses(out) == losses(tmp_path / "r") and [row["objective"] for row in rows] == ["rollout"] * 2
    assert files.read_config(out)["config"]["sampling_steps"] == "4"
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and report["latent_snr_to_fp"] > 10  # to the base itself
    start, end = load_file(out / "start.safetensors"), load_file(out / "state.safetensors")
    assert any(not torch.equal(tensor, end[f"p.{key}"]) for key, tensor in start.items() if f"p.{key}" in end)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_the_reference_is_the_base_as_it_is(whole, bases, finished, name):
    """Catches a reference with a LoRA or another schedule, and 512 tokens where such a network was trained with 256."""
    cfg = train.parse(f"{ALONE} {whole[name]}".split())
    network, family = pretrained.open_cm(cfg, torch.float32), FAMILIES[cfg.model]
    net = family.network.from_pretrained(bases[name], subfolder=family.part)
    assert not lora_layers(network) and same_tensors(network.net, net)
    timesteps = network.path.timestep(network.path.grid(4)[:-1])
    trained = [1.0, 0.75, 0.5, 0.25] if cfg.model == "flux" else [999, 749, 499, 249]
    assert timesteps.tolist() == trained and network.guidance is None
    cond = load_file(finished[name] / "cache" / "null.safetensors")
    assert cond["null/tokens"].shape[1] == (256 if cfg.model == "flux" else 77)
    pipe = pipeline.load_16bit(finished[name], cm=True)
    assert dict(pipe.scheduler.config) == dict(pipeline.load_pipeline(finished[name]).scheduler.config)
    assert same_tensors(pipeline.denoiser_of(pipe), net.to(pipeline.FAST))


@pytest.mark.slow
@torch.no_grad()
def test_a_pipeline_draws_with_the_tokens_of_training(finished):
    """Catches captions that are padded to 512 tokens where training had 256."""
    pipe, seen = quiet(pipeline.load_pipeline(finished["flux-schnell"], dtype=torch.float32)), []
    pipe.transformer.register_forward_pre_hook(lambda net, args, given: seen.append(given), with_kwargs=True)
    pipeline.draw_with_pipeline(pipe, PROMPTS[:1], 1)
    text = encoders.Text("flux", str(pipe.transformer.config["quantization_config"].base), dtype=torch.float32, tokens=256)
    torch.testing.assert_close(seen[0]["encoder_hidden_states"], text(PROMPTS[:1])["tokens"], rtol=1e-4, atol=1e-5)
    assert seen[0]["encoder_hidden_states"].shape[1] == 256 and seen[0]["guidance"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_it_is_sampled_compared_exported_and_read_again(bases, finished, tmp_path, monkeypatch, name):
    """Catches a base that is drawn in 25 guided steps beside it, a card without the options of a call, and an export that has
    forgotten what it was made of."""
    folder, drawn, prompt = finished[name], [], PROMPTS[0]
    draw = pipeline.draw_with_pipeline
    monkeypatch.setattr(pipeline, "draw_with_pipeline", lambda *args: drawn.append(args) or draw(*args))
    monkeypatch.setattr(pipeline, "FAST", torch.float32)
    out = tmp_path / "grid.png"
    compare = ["--prompt", prompt, "--steps", "2", "--compare", "--out", str(out)]
    sample.main(["--checkpoint", str(folder), *compare])
    (twin, _, steps, *_), (pipe, *_) = drawn
    assert steps == 2 and twin.scheduler is pipe.scheduler and not any(packed_layers(pipeline.denoiser_of(twin)))
    pipeline.main(["--checkpoint", str(folder), "--export", "diffusers", "--out", str(tmp_path / "saved")])
    sample.main(["--checkpoint", str(tmp_path / "saved"), *compare, "--base", str(bases[name])])
    assert drawn[2][2] == 2 and pipeline.quantization_config(pipeline.denoiser_of(drawn[3][0])).whole
    monkeypatch.chdir(tmp_path)
    for where in (folder, tmp_path / "saved"):
        text = (where / "README.md").read_text()
        assert ("guidance_scale=" in text) == (name == "sdxl-turbo"), "FLUX.1-schnell has no such input"
        assert ("max_sequence_length=256" in text) == (name == "flux-schnell" and where is folder) and "Distilled while" in text
    (tmp_path / name).symlink_to(folder)
    exec(code_of(folder / "README.md"), said := {})
    assert said["image"].size == (64, 64)
    code = (tmp_path / "saved" / "pipeline.py").read_text()
    assert ('| {"max_sequence_length": 256}' in code) == (name == "flux-schnell")


def test_the_base_is_one_row_of_an_evaluation():
    """Catches a row of a few-step base that is drawn in 25 guided steps."""
    config = {"weights": "", "cm": "none"}
    assert evaluate.chosen_models(argparse.Namespace(models=""), config) == ["cm", "ours"]
    assert evaluate.chosen_models(argparse.Namespace(models="ours"), config) == ["ours"]
    with pytest.raises(UserError, match="is the row cm: give --models cm,ours"):
        evaluate.chosen_models(argparse.Namespace(models="base,ours"), config)
    assert evaluate.chosen_models(argparse.Namespace(models=""), {"weights": "", "cm": "lora"}) == ["base", "cm", "ours"]


def test_its_plan_has_no_lora_and_captions_of_its_own_length(whole):
    """Catches a plan for a LoRA of rank 64 on every layer, and for 512 tokens."""
    fp = plan.footprint_of(train.parse(f"{ALONE} {whole['flux-schnell']}".split()))
    assert fp.network == 4 * sum(p.numel() for p in miniature.flux_schnell().transformer.parameters())
    assert fp.shapes[1] == 256


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--rollout 0.5", "--cm none leaves no teacher for TDPT: train on rollouts alone, --rollout 1 --trajectory fp"),
        ("--recipe paper", "--cm none leaves no teacher for TDPT"),
        ("--trajectory teacher", "--cm none leaves no teacher for TDPT"),
        ("--targets teacher,fp", "--cm none leaves no teacher for --targets: leave them out"),
        ("--bits 16", "--cm none says that the base draws in few steps: leave out --bits 16"),
        ("--cm-scale 0.5", "--cm none has no LoRA that --cm-scale could weaken"),
        ("--model tiny", "--cm none is for models with public weights: leave it out"),
    ],
)
def test_what_asks_for_a_teacher_is_refused(capsys, flags, says):
    """Catches solver steps of a model that was distilled to need none, and flags without effect."""
    model = [] if "--model" in flags else ["--model", "flux"]
    refuse([*model, "--cm", "none", *flags.split()], capsys, says)


@pytest.mark.parametrize(
    "base, licence",
    [
        ("stabilityai/sdxl-turbo", "license_name: sai-nc-community"),
        ("stabilityai/sd-turbo", "license_link: https://huggingface.co/stabilityai/sd-turbo/blob/main/LICENSE.md"),
        ("ByteDance/SDXL-Lightning", "license: openrail++"),
        ("black-forest-labs/FLUX.1-schnell", "license: apache-2.0"),
    ],
)
def test_the_card_has_the_licence_of_a_few_step_base(base, licence):
    """Catches the licence of the model that such a base was distilled from."""
    assert licence in card._front(base, [], "quantized")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Quantization alone


OPTIONS = {"calibration": 4, "rank": 4, "resolution": 64, "iters": 2}


def in_memory(base: Path, dtype=torch.float32):
    """A pipeline whose text encoders are in float32, as train.py has them on a CPU."""
    part = "unet" if (base / "unet").is_dir() else "transformer"
    return quiet(diffusers.DiffusionPipeline.from_pretrained(base, torch_dtype={"default": torch.float32, part: dtype}))


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("flux", "float32"), ("flux-schnell", "bfloat16"), ("sdxl-turbo", "float32")])
def test_quantize_is_steps_0_in_memory(bases, whole, tmp_path, name, dtype):
    """Catches other captions, noises, sizes or guidance than the command has, and layers in another form than a file gives back."""
    flags = whole["flux-schnell"].replace(str(bases["flux-schnell"]), str(bases["flux"])) if name == "flux" else whole[name]
    more = f"--steps 0 --calibration 4 --rank 4 --iters 2 --eval-n 2 --dtype {dtype} --guidance 5 --out {tmp_path}/r"
    train.main(f"{flags} {more}".split())
    pipe = in_memory(bases[name], getattr(torch, dtype))
    assert train.quantize(pipe, PROMPTS, guidance=5, **OPTIONS) is pipe
    theirs = pipeline.load_pipeline(tmp_path / "r", dtype=getattr(torch, dtype))
    nets = [pipeline.denoiser_of(p) for p in (pipe, theirs)]
    ours, loaded = (dict(packed_layers(net)) for net in nets)
    assert ours.keys() == loaded.keys() and any(layer.rank for layer in ours.values())
    for key, layer in ours.items():
        left, right = layer.state_dict(), loaded[key].state_dict()
        assert left.keys() == right.keys() and layer.backend == loaded[key].backend and layer.anchor_A is None, key
        assert all(torch.equal(left[k], v) and left[k].dtype == v.dtype for k, v in right.items() if k != "bias"), key
    if dtype == "bfloat16":  # in which a file has the other layers
        assert same_tensors(*nets)
    configs = [json.loads(json.dumps(vars(pipeline.quantization_config(net)))) for net in nets]
    assert configs[0] == configs[1] and configs[0]["whole"] and configs[0]["method"].startswith("Quantized, and not")
    assert dict(pipe.scheduler.config) == dict(theirs.scheduler.config) and pipe.default_sample_size == 8
    assert not any(p.requires_grad for p in nets[0].parameters()) and not nets[0].is_gradient_checkpointing


@pytest.mark.parametrize("name", ["flux", pytest.param("sdxl", marks=pytest.mark.slow), "sd15"])
@torch.no_grad()
def test_a_quantized_pipeline_is_one_of_a_run(bases, tmp_path, name):
    """Catches a pipeline that cannot be saved, read again, given a LoRA or quantized a second time, and a card that says it was
    trained."""
    pipe = in_memory(bases[name])
    train.quantize(pipe, PROMPTS, **OPTIONS, init="zero", ranks="uniform", rounding="rtn", hessian="input")
    call = dict(num_inference_steps=2, guidance_scale=FAMILIES[name].few_step_guidance(3.5), output_type="pt")
    picture = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **call).images
    assert picture.shape == (1, 3, 64, 64) and picture.std() > 0
    if name != "sd15":
        plain, after = in_memory(bases[name]), latents(pipe)
        plain.scheduler = pipe.scheduler
        before = latents(plain)
        assert 0 < (after - before).norm() < 0.5 * before.norm()
        pipe.load_lora_weights(style(name))
        assert not torch.equal(latents(pipe), after)
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), after)
    pipeline.save_pipeline(pipe, tmp_path / "saved", base_model="someone/base")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "Quantized, and not trained after that" in text and "base_model: someone/base" in text
    again = pipeline.load_pipeline(tmp_path / "saved", dtype=torch.float32)
    assert same_tensors(pipeline.denoiser_of(again), pipeline.denoiser_of(pipe))
    with pytest.raises(UserError, match="packed already: give the one in 16 bits"):
        train.quantize(pipe, PROMPTS)


def test_a_fused_consistency_lora_is_quantized_with_its_base(bases):
    """Catches adapters that are left beside packed layers, or lost, and the sentence that does not help."""
    pipe = in_memory(bases["flux"])
    pipe.load_lora_weights(style("flux"))
    with pytest.raises(UserError, match=r"call the pipeline's fuse_lora\(\) and unload_lora_weights\(\), then quantize"):
        train.quantize(pipe, PROMPTS)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = {name: layer.weight.detach().clone() for name, layer in float_layers(pipe.transformer).items()}
    train.quantize(pipe, PROMPTS, **OPTIONS, init="zero", ranks="uniform", rounding="rtn", hessian="input", smooth=0)
    for name, layer in packed_layers(pipe.transformer):
        assert (layer.weight - fused[name]).norm() < 0.15 * fused[name].norm()


@pytest.mark.parametrize(
    "change, prompts, options, says",
    [
        (None, PROMPTS, {"teacher": "x"}, "has no option teacher: choose from backend, bits_x, calibration, "),
        (None, PROMPTS, {"out": "x"}, "has no option out"),
        (None, PROMPTS, {"rank": "many"}, r"quantize\(.., rank='many'\) cannot be read: rank is a float"),
        (None, PROMPTS, {"rotate": "no"}, "cannot be read: rotate is a bool"),
        (None, PROMPTS, {"init": "magic"}, r"init='magic'\) must be one of zero, "),
        (None, PROMPTS, {"calibration": 0}, "--calibration must be at least 1"),
        (None, PROMPTS, {"sampling_steps": 0}, "--sampling-steps 0 must be numbers"),
        (None, [], {}, "the prompts must be a list of some captions"),
        (None, "a house", {}, "the prompts must be a list of some captions"),
        (None, PROMPTS, {"resolution": 100}, "^--resolution 100 must be a multiple of 64"),
        (lambda pipe: pipe.to(torch.float16), PROMPTS, {}, r"in torch.float16 would overflow: call the pipeline's to\("),
        (lambda pipe: pipe.register_modules(transformer=None), PROMPTS, {}, "FluxPipeline is of no family here, or its network is"),
        (None, (prompt for prompt in PROMPTS), {}, "the prompts must be a list of some captions"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), PROMPTS, {}, "has hooks .*: load the pipeline without them"),
        (lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), PROMPTS, {}, "has hooks"),
        (lambda pipe: pipe.transformer.fuse_qkv_projections(), PROMPTS, {}, r"call the network's unfuse_qkv_projections\(\)"),
        (lambda pipe: pipe.transformer.compile(), PROMPTS, {}, "is compiled: quantize it first"),
        (lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer)), PROMPTS, {}, "is compiled: quan"),
        (lambda pipe: pipe.register_modules(text_encoder_2=None), PROMPTS, {}, "has no text_encoder_2, by which the prompts are"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_one_sentence(bases, change, prompts, options, says):
    """Catches a traceback, an option of training without effect, and a network that is changed before that is known."""
    pipe = in_memory(bases["flux"])
    if change:
        change(pipe)
    with pytest.raises(UserError, match=says) as caught:
        train.quantize(pipe, prompts, **options)
    assert "\n" not in str(caught.value) and (pipe.transformer is None or not any(packed_layers(pipe.transformer)))


def test_what_the_first_three_steps_read_is_an_option_of_quantize():
    """Catches an option that is renamed, and a field of theirs that is no option."""
    fields = {field.name for field in dataclasses.fields(train.Config)}
    assert fields >= train.OF_QUANTIZE
    read = set(re.findall(r"\bcfg\.(\w+)", (ROOT / "student.py").read_text())) & fields
    assert read <= train.OF_QUANTIZE | {"exponents"}


# ---------------------------------------------------------------------------------------------------------------------
# Small sentences


def test_a_local_base_is_never_taken_for_a_hub_id(bases, tmp_path, monkeypatch):
    """Catches a relative path that is moved away, and then stands in a card as a repository of the hub."""
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "flux").symlink_to(bases["flux"])
    monkeypatch.chdir(tmp_path)
    network = pretrained.load_network("flux", "copies/flux", dtype=torch.float32)
    (tmp_path / "copies" / "flux").unlink()
    assert not card.is_hub_id(network.base) and card.public_name(network.base) == "flux"
    assert card.is_hub_id("someone/base") and not card.is_hub_id("./base") and not card.is_hub_id("../base")
    with pytest.raises(UserError, match="copies/flux does not exist: give a hub id"):
        pipeline.read_base(diffusers.FluxPipeline, network.base)


@pytest.mark.parametrize(
    "errors, arguments, name",
    [
        (pretrained.loading_errors, ("the VAE", "owner/base"), "owner/base"),
        (pretrained.lora_errors, ("owner/lora/a.safetensors", "this model"), "owner/lora/a.safetensors"),
    ],
)
def test_a_gated_repository_is_named_with_its_page(errors, arguments, name):
    """Catches a page of the hub that is not the repository's."""
    page = "/".join(name.split("/")[:2])
    response = type("Response", (), {"headers": {}, "request": None})()
    with pytest.raises(UserError, match=f"{name} is gated: accept its licence at https://huggingface.co/{page} and run") as caught:
        with errors(*arguments):
            raise OSError("not found") from hub.GatedRepoError("gated", response=response)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_dtype_of_the_environment_is_a_sentence():
    """Catches a KeyError that names neither the variable nor what it may be."""
    env = os.environ | {"CMQUANT_DTYPE": "half"}
    done = subprocess.run([sys.executable, "-c", "import models.denoiser"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("CMQUANT_DTYPE=half is no dtype of networks here: set it to bfloat16 or float32, or unset it")


def test_groups_of_what_is_packed_without_data_are_the_defaults_of_a_run():
    """Catches group sizes that stand twice and differ."""
    net = miniature.flux().transformer
    cfg, rows = train.Config(), quantizer.pack_nearest(net, 4)
    assert {(row["group_w"], row["group_x"]) for row in rows.values()} == {(cfg.group_w, cfg.group_x)}
