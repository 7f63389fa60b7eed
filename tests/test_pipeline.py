"""models/pipeline.py and sample.py on public models in miniature: run folders, loading and saving, LoRAs, model card."""

import copy
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import huggingface_hub
import miniature
import pytest
import torch
from diffusers.quantizers import auto
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import kernels
import quant
import sample
import scores
import tdpt
import train
from backends import attention
from data import sources
from layers import W4A4Conv2d, W4A16Linear, packed_class, packed_layers
from models import checkpoint, pipeline
from models.denoiser import float_layers, from_blueprint
from models.family import FAMILIES
from run import files
from run.common import UserError

SDXL = pytest.param("sdxl", marks=pytest.mark.slow)  # FLUX has fewer layers
STEPS = {"sdxl": {"guidance_scale": 1.0}, "flux": {"guidance_scale": 3.5}}
PROMPT = "a large red house on the left"


def write_run(folder: Path, name: str, base: Path) -> Path:
    """What train.py would leave: layers rounded to nearest, random A, B of ranks 0 to 5, each third layer smoothed, each ninth one
    kept in 16 bits, of the others half rotated, and centred where they are linear; each fifth W4A4 layer with activations in 8
    bits."""
    gen = torch.Generator().manual_seed(0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    net, table = denoiser_of(pipe), {}
    plan = {"model": name, "base": str(base), "class": type(net).__name__, "scheduler": dict(pipe.scheduler.config)}
    plan |= {"latent": [4, 8, 8] if name == "sdxl" else [16, 8, 8], "config": dict(net.config)}
    plan["config"].pop("_name_or_path")
    for i, (key, layer) in enumerate(float_layers(net).items()):
        if (kind := FAMILIES[name].precision(key)) == "16bit":
            continue
        w_OK = quant.flatten_conv(layer.weight[..., None, None] if layer.weight.dim() == 2 else layer.weight).detach()
        (O, K), taps, rank = w_OK.shape, layer.weight[0, 0].numel(), (2, 3, 0, 5)[i % 4]
        if i % 9 == 8:
            table[key] = {"kind": "16bit", "shape": [O, K], "rank": 0}
            continue
        lam = torch.rand(K // taps, generator=gen) + 0.5 if i % 3 == 0 else None
        rotated = kind == "w4a4" and i % 3 == 1 and K // taps % quant.TURN == 0
        shift = torch.randn(K, generator=gen) if rotated and isinstance(layer, torch.nn.Linear) else None
        w_OK = w_OK if lam is None else w_OK * lam.repeat(taps)
        gw = quant.quantize_weight(quant.rotate_taps(w_OK, taps) if rotated else w_OK, 64, taps)
        A, B = torch.randn(rank, K, generator=gen) / K**0.5, 0.1 * torch.randn(O, rank, generator=gen)
        group_x = quant.EIGHT_BITS if i % 5 == 0 and kind == "w4a4" else 16
        net.set_submodule(key, packed_class(kind, layer).from_float(layer, gw, A, B, lam, group_x, rotated, shift))
        table[key] = {"kind": kind, "shape": [O, K], "rank": rank, "smooth": lam is not None, "group_w": 64, "group_x": group_x}
        table[key] |= {"rotated": rotated, "centred": shift is not None} if rotated else {}  # older tables know neither
    denoiser = from_blueprint(plan)
    denoiser.net = net
    folder.mkdir()
    config = dataclasses.asdict(train.Config()) | {"backend": "eager"}
    files.write_json(folder / "config.json", {"format": files.FORMAT, "config": config})
    checkpoint.save_start(folder, denoiser, table)
    for _, layer in packed_layers(net):
        if layer.rank:
            layer.lora_B.data.mul_(1.5)  # training
    checkpoint.save_checkpoint(folder, denoiser, table, merged=False)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Miniature pipelines on disk: sdxl (eps), sdxl-v (v prediction, zero terminal SNR), flux."""
    root = tmp_path_factory.mktemp("bases")
    miniature.save("sdxl", root / "sdxl")
    miniature.save("flux", root / "flux")
    pipe = miniature.sdxl("v_prediction")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    pipe.save_pretrained(root / "sdxl-v")
    return {name: root / name for name in ("sdxl", "sdxl-v", "flux")}


@pytest.fixture(scope="session")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: write_run(root / name, name.partition("-")[0], base) for name, base in bases.items()}


def denoiser_of(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def factors(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """A, B as they are trained, or as 8-bit ones stand for."""
    return layer.factors() if hasattr(layer, "factors") else (layer.lora_A, layer.lora_B)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path, **kwargs):
    return quiet(pipeline.load_pipeline(folder, **({"dtype": torch.float32} | kwargs)))


def start(pipe, seed: int = 0) -> torch.Tensor:
    """The noise of one picture, as the pipeline holds it."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn((1, 4, 8, 8) if hasattr(pipe, "unet") else (1, 16, 64), generator=gen)


def latents(pipe, steps: int = 2, prompt: str = PROMPT) -> torch.Tensor:
    guidance = STEPS["sdxl" if hasattr(pipe, "unet") else "flux"]
    x_T = start(pipe).to(denoiser_of(pipe).dtype)
    return pipe(prompt, num_inference_steps=steps, latents=x_T, output_type="latent", height=64, width=64, **guidance).images


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines of run folders


@pytest.mark.parametrize("steps", (1, 2, 4))
@pytest.mark.parametrize("name", (SDXL, pytest.param("sdxl-v", marks=pytest.mark.slow), "flux"))
@torch.no_grad()
def test_the_pipelines_steps_are_the_jumps_of_tdpt_sample(runs, name, steps):
    """Catches another spacing of timesteps, a last step that stops before clean data, clipping, a shift by the picture's size,
    a prediction type or zero-SNR schedule that is lost. Predictions are recorded, so that no rounding of activations hides it."""
    pipe = load(runs[name])
    path = from_blueprint(files.read_config(runs[name])["network"]).path
    assert path.prediction == {"sdxl": "epsilon", "sdxl-v": "v_prediction", "flux": "flow"}[name]
    times, predictions = [], []

    def record(net, args, kwargs, output):
        t = kwargs["timestep"] if name == "flux" else args[1]
        times.append(t.reshape(1).clone())
        predictions.append(output[0].clone())

    denoiser_of(pipe).register_forward_hook(record, with_kwargs=True)
    end = latents(pipe, steps)
    torch.testing.assert_close(torch.cat(times), path.timestep(path.grid(steps)[:-1]), rtol=1e-6, atol=0)
    replay = iter(predictions)
    expected = tdpt.sample(lambda x, t, s, cond: next(replay), path, start(pipe), {}, steps)
    assert (end - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_the_pipeline_draws_what_tdpt_sample_draws(runs, name):
    """Catches a prompt, size or guidance that reaches the network otherwise than in training. 1%: rounding flips single codes."""
    pipe, net = load(runs[name]), denoiser_of(load(runs[name]))
    path = from_blueprint(files.read_config(runs[name])["network"]).path
    if name == "sdxl":
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}

        def model(x, t, s, cond):
            return net(x, path.timestep(t), tokens, added_cond_kwargs=added, return_dict=False)[0]
    else:
        tokens, pooled, text_ids = pipe.encode_prompt(PROMPT, None)
        _, ids = pipe.prepare_latents(1, 16, 64, 64, torch.float32, "cpu", None)

        def model(x, t, s, cond):
            time, guidance = path.timestep(t), torch.tensor([3.5])
            return net(x, tokens, pooled, time, ids, text_ids, guidance, return_dict=False)[0]

    for steps in (1, 2, 4):
        expected = tdpt.sample(model, path, start(pipe), {}, steps)
        assert (latents(pipe, steps) - expected).norm() < 0.01 * expected.norm()


def test_a_pipeline_draws_pictures_in_bfloat16(runs):
    """Catches a component in another dtype than the latents, and scales or factors that were cast with the 16-bit layers."""
    for name in ("sdxl", "flux"):
        pipe = load(runs[name], dtype=torch.bfloat16)
        net = denoiser_of(pipe)
        layer = next(layer for _, layer in packed_layers(net) if layer.inv_smooth is not None)
        assert torch.bfloat16 not in (layer.scale_O.dtype, layer.inv_smooth.dtype)
        assert net.dtype == pipe.vae.dtype == torch.bfloat16
        picture = pipe(PROMPT, num_inference_steps=1, **STEPS[name]).images[0]  # the size is that of the run
        assert picture.size == (64, 64) and len(set(picture.get_flattened_data())) > 100


@pytest.mark.slow
def test_compiled_pipelines_draw_the_same_and_feel_an_adapter(runs, monkeypatch):
    """Catches a denoiser that torch.compile cannot take, and an adapter that compiled code does not see, or keeps."""
    compile, traced = torch.nn.Module.compile, {"backend": "eager"}  # Inductor takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **mode: compile(net, **traced))
    pipe, eager, blocks = load(runs["flux"], compile=True), load(runs["flux"]), load(runs["flux"])
    blocks.transformer.compile_repeated_blocks()
    assert pipe.transformer._compiled_call_impl is not None
    compiled, plain = latents(pipe, 1), latents(eager, 1)
    assert (compiled - plain).norm() < 0.01 * plain.norm()
    eager.load_lora_weights(style("flux"))
    styled = latents(eager, 1)
    assert (styled - plain).norm() > 0.05 * plain.norm()
    for each in (pipe, blocks):
        each.load_lora_weights(style("flux"))
        assert (latents(each, 1) - styled).norm() < 0.01 * plain.norm()
        each.unload_lora_weights()
        assert (latents(each, 1) - plain).norm() < 0.01 * plain.norm()


def test_a_run_of_a_gpu_takes_the_kernels_of_a_cpu(runs, tmp_path):
    """Catches a CPU that compiles every layer for minutes because the run was made where that is the fast way."""
    about = files.read_config(runs["flux"])
    for stored, used in (("compile", "native"), ("eager", "eager"), ("native", "native")):
        (folder := tmp_path / stored).mkdir()
        files.write_json(folder / "config.json", about | {"config": about["config"] | {"backend": stored}})
        run = files.run_digest(folder)
        files.write_tensors(folder / "model.safetensors", *files.read_verified(runs["flux"] / "model.safetensors", ""), run)
        layers = [layer for _, layer in packed_layers(load(folder).transformer)]
        assert {layer.backend for layer in layers} == {used}


@pytest.mark.slow
@torch.no_grad()
def test_lcm_and_tcd_schedulers_go_through_the_timesteps_of_training(runs):
    """Catches 759 and 259 where training had 749 and 249, and steps of TCD without noise that are not ours."""
    pipe = load(runs["sdxl"])
    ours = pipe.scheduler
    for steps in (1, 2, 4, 8):
        pipe.scheduler = ours
        expected, timesteps = latents(pipe, steps), ours.timesteps
        pipe.scheduler = diffusers.LCMScheduler.from_config(ours.config)
        pipe.scheduler.set_timesteps(steps)
        assert torch.equal(pipe.scheduler.timesteps, timesteps)
        pipe.scheduler = diffusers.TCDScheduler.from_config(ours.config)
        options = dict(guidance_scale=1.0, eta=0.0, height=64, width=64)
        found = pipe(PROMPT, num_inference_steps=steps, latents=start(pipe), output_type="latent", **options).images
        assert torch.equal(pipe.scheduler.timesteps, timesteps)
        assert (found - expected).norm() < 0.01 * expected.norm()  # it ends at the first noise level, ours at none


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' own saving and loading


@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_saved_pipelines_come_back_bit_for_bit(runs, tmp_path, name):
    """Catches a stored form that loses bits, torch_dtype cast onto packed tensors, a table without a field, a lost scheduler,
    activations of other bits."""
    rows = [row for row in files.read_config(runs[name])["layers"].values() if row["kind"] != "16bit"]
    assert quant.number_format(row["group_x"] for row in rows if row["kind"] == "w4a4") == "W4A4/8"
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load(runs[name], dtype=dtype)
        pipeline.save_pipeline(pipe, tmp_path / str(dtype))
        again = load(tmp_path / str(dtype), dtype=dtype)
        assert isinstance(again, type(pipe)) and same_tensors(denoiser_of(pipe), denoiser_of(again))
        assert [layer.group_x for _, layer in packed_layers(denoiser_of(again))] == [row["group_x"] for row in rows]
        backends = {layer.backend for _, layer in packed_layers(denoiser_of(again))}
        assert backends == {"eager"}  # as the run's
        before = latents(pipe)
        assert (latents(again) - before).norm() < 0.01 * before.norm()  # mapped files are aligned otherwise: BLAS sums otherwise


def test_networks_come_back_from_shards_too(runs, tmp_path):
    """Catches packed tensors rounded to torch_dtype on the way, and a quantizer that expects all tensors in one file."""
    net = load(runs["flux"]).transformer
    next(layer for _, layer in packed_layers(net) if layer.inv_smooth is not None).inv_smooth.mul_(1 / 3)
    net.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_tensors(net, diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32))
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    packed = [dict(packed_layers(n)) for n in (net, again)]
    assert packed[0].keys() == packed[1].keys() and all(same_tensors(layer, packed[1][k]) for k, layer in packed[0].items())
    assert again.x_embedder.weight.dtype == torch.bfloat16 and "cmquant" in repr(again.config["quantization_config"])


def test_a_saved_network_is_no_larger_than_the_run_folders_file(runs, tmp_path):
    """Catches scales or factors that are stored wider than in the run folder."""
    for name in ("sdxl", "flux"):
        denoiser_of(load(runs[name], dtype=torch.bfloat16)).save_pretrained(tmp_path / name)
        saved, run = (
            load_file(f) for f in (tmp_path / name / "diffusion_pytorch_model.safetensors", runs[name] / "model.safetensors")
        )
        assert {f"net.{k}": v.nbytes for k, v in saved.items()} == {k: v.nbytes for k, v in run.items()}


def test_without_our_import_diffusers_names_the_method(runs, tmp_path, monkeypatch):
    """Catches a config that diffusers would take for another method's, or load as a network of random floats."""
    load(runs["flux"]).transformer.save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "cmquant")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "cmquant")
    with pytest.raises(ValueError, match="cmquant"):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)


def test_saved_networks_that_lack_or_bend_a_tensor_are_refused(runs, bases, tmp_path):
    """Catches layers left on meta, and codes of another shape taken as they are."""
    load(runs["flux"]).transformer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("codes_OP"))
    save_file({k: v for k, v in tensors.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=key):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    save_file(tensors | {key: tensors[key][:, ::2].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=key):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", (SDXL, "flux"))
@pytest.mark.parametrize("bits_x", (4, 8))
@torch.no_grad()
def test_a_network_in_16_bits_is_packed_as_it_is_loaded(bases, tmp_path, name, bits_x):
    """Catches layers that stay in 16 bits, weights off the grid, a config that does not bring them back, and an export that would
    call an undistilled network a few-step one."""
    part, cls = FAMILIES[name].part, FAMILIES[name].network
    plain = cls.from_pretrained(bases[name], subfolder=part)
    config = pipeline.CMQuantConfig(bits_x=bits_x, backend="eager")
    net = cls.from_pretrained(bases[name], subfolder=part, quantization_config=config)
    layers = dict(packed_layers(net))
    kinds = {key: FAMILIES[name].precision(key) for key in float_layers(plain)}
    assert layers.keys() == {key for key, kind in kinds.items() if kind != "16bit"} and any(
        layer.rotated for layer in layers.values()
    )
    assert quant.number_format(layer.group_x for layer in layers.values()) == f"W4A{bits_x}"
    for key, layer in layers.items():
        weight = plain.get_submodule(key).weight
        assert 0 < (layer.weight - weight).norm() < 0.15 * weight.norm()
    assert net.num_parameters() == plain.num_parameters()
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(bases[name], **{part: net}))
    assert latents(pipe, 1).isfinite().all()
    with pytest.raises(UserError, match="not trained for few steps"):
        pipeline.save_pipeline(pipe, tmp_path / "export")
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match="not trained for few steps"):
        pipeline.load_pipeline(tmp_path / "pipe")
    with pytest.raises(UserError, match="it gets no card"):
        pipeline.write_card(tmp_path / "pipe")
    net.save_pretrained(tmp_path / "saved")
    assert same_tensors(cls.from_pretrained(tmp_path / "saved"), net)
    with pytest.raises(ValueError, match=r"CMQuantConfig\(\) without one"):
        cls.from_pretrained(bases[name], subfolder=part, quantization_config=pipeline.CMQuantConfig({"a": {}}))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA out


@pytest.mark.parametrize("update", (False, True), ids=("branch", "update"))
@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_the_exported_lora_is_w_plus_ba_in_stock_diffusers(runs, bases, tmp_path, name, update):
    """Catches a forgotten or inverted smoothing, tap-major A taken as it is, ranks or scales that PEFT infers otherwise, a
    branch on a layer of rank 0; an update with the initial factors added instead of subtracted."""
    file = tmp_path / "lora.safetensors"
    table = files.read_config(runs[name])["layers"]
    assert pipeline.export_lora(runs[name], file, update) == sum(row["rank"] > 0 for row in table.values()) < len(table)
    ours = dict(packed_layers(denoiser_of(load(runs[name]))))
    start = dict(packed_layers(checkpoint.load_start(runs[name])[0].net))
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(bases[name]))
    before = latents(pipe)
    pipe.load_lora_weights(file)
    assert (latents(pipe) - before).norm() > 0.003 * before.norm()
    gen, seen = torch.Generator().manual_seed(1), set()
    for key, layer in ours.items():
        stock = denoiser_of(pipe).get_submodule(key)
        if not layer.rank:
            assert not hasattr(stock, "base_layer"), f"{key} has no branch"
            continue
        assert stock.r["default_0"] == table[key]["rank"] * (1 + update)
        kind = (type(layer), getattr(layer, "kernel_size", None), layer.inv_smooth is not None)
        if kind in seen:
            continue
        seen.add(kind)
        x1 = x = torch.randn(2, layer.channels, *((6, 6) if isinstance(layer, W4A4Conv2d) else ()), generator=gen)
        if layer.inv_smooth is not None:
            x1 = x * layer.inv_smooth.view(-1, *(1,) * (x.ndim - 2))
        ba_OK = layer.merged_weight(*factors(layer)) - layer.merged_weight(None, None)
        if update:
            ba_OK = ba_OK - start[key].anchor_B @ start[key].anchor_A
        if x.ndim == 2:
            by_hand = x1 @ ba_OK.mT
        else:
            ba_OIhw = quant.unflatten_conv(ba_OK, layer.kernel_size)
            by_hand = F.conv2d(x1, ba_OIhw, None, layer.stride, layer.padding)
        added = stock(x) - stock.base_layer(x)
        assert (added - by_hand).norm() < 1e-4 * by_hand.norm(), kind
    assert len(seen) >= (6 if name == "sdxl" else 3)


def test_the_exported_lora_loads_onto_a_bfloat16_base(runs, bases, tmp_path):
    """Catches factors in two dtypes, which PEFT cannot multiply."""
    pipeline.export_lora(runs["sdxl"], tmp_path / "lora.safetensors")
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(bases["sdxl"], torch_dtype=torch.bfloat16))
    before = latents(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert not torch.equal(latents(pipe), before)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA in

STYLED = {
    "sdxl": (
        "conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.proj_in",
    ),
    "flux": (
        "x_embedder", "transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.proj_out",
    ),
}  # fmt: skip


TEXT_KEY = "encoder.layers.0.self_attn.q_proj"


def text_layer(pipe) -> torch.nn.Module:
    """A layer of the first text encoder, whose class is flat in newer versions of transformers."""
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder).get_submodule(TEXT_KEY)


def style(name: str, texts: bool = False) -> dict[str, torch.Tensor]:
    """Somebody's LoRA: PEFT's keys, ranks 3 and 5."""
    gen, part = torch.Generator().manual_seed(2), {"sdxl": "unet", "flux": "transformer"}[name]
    pipe = miniature.PIPELINES[name]()
    layers = {f"{part}.{key}": denoiser_of(pipe).get_submodule(key) for key in STYLED[name]}
    if texts:
        layers[f"text_encoder.text_model.{TEXT_KEY}"] = text_layer(pipe)
    state = {}
    for i, (key, layer) in enumerate(layers.items()):
        (O, *shape), rank = layer.weight.shape, 3 + i % 2 * 2
        state[f"{key}.lora_A.weight"] = torch.randn(rank, *shape, generator=gen) / layer.weight[0].numel() ** 0.5
        state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(O, rank, *(1 for _ in shape[1:]), generator=gen)
    return state


def set_styles(pipe, file: Path, **scales: float) -> None:
    for adapter in scales:
        if adapter not in getattr(denoiser_of(pipe), "peft_config", {}):
            pipe.load_lora_weights(file, adapter_name=adapter)
    pipe.set_adapters([*scales], [*scales.values()])


@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_adapters_of_peft_add_their_branches_and_can_be_taken_away(runs, tmp_path, name):
    """Catches a branch that reads the smoothed input, a lost scale or stride, several adapters that do not add up, packed tensors
    that change, an adapter fused into what cannot hold it, and one that is saved as the network's own."""
    pipe, file, part = load(runs[name]), tmp_path / "style.safetensors", "unet" if name == "sdxl" else "transformer"
    net, state, before = denoiser_of(pipe), style(name, texts=True), latents(pipe)
    tensors, text = {k: v.clone() for k, v in net.state_dict().items()}, text_layer(pipe)
    save_file(state, file)
    set_styles(pipe, file, first=0.5)
    calls = {}
    for key in STYLED[name]:
        net.get_submodule(key).register_forward_hook(lambda layer, args, y, key=key: calls.update({key: (args[0], y)}))
    styled = latents(pipe)
    assert (styled - before).norm() > 0.05 * before.norm() and calls.keys() == set(STYLED[name])
    for key, (x, y) in calls.items():
        layer, A, B = net.get_submodule(key).base_layer, *(state[f"{part}.{key}.lora_{ab}.weight"] for ab in "AB")
        if A.ndim == 2:
            added = x @ A.mT @ B.mT
        else:
            added = F.conv2d(x, torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A), None, layer.stride, layer.padding)
        assert (y - layer(x) - 0.5 * added).norm() < 1e-4 * added.norm(), key
    with pytest.raises(UserError, match="adapters are not saved with a pipeline: call its unload_lora_weights"):
        pipeline.save_pipeline(pipe, tmp_path / "saved")
    for safe in (False, True):
        with pytest.raises(RuntimeError, match=r"packed weights cannot be changed: .* dequantize\(\)"):
            pipe.fuse_lora(safe_fusing=safe)
    assert torch.equal(latents(pipe), styled)
    set_styles(pipe, file, first=0.5, second=-0.25)
    assert not torch.equal(latents(pipe), styled)
    layer, A, B = text_layer(pipe), *(state[f"text_encoder.text_model.{TEXT_KEY}.lora_{ab}.weight"] for ab in "AB")
    x = torch.randn(3, A.shape[1], generator=torch.Generator().manual_seed(4))
    assert (layer(x) - text(x) - (0.5 - 0.25) * x @ A.mT @ B.mT).norm() < 1e-4 * layer(x).norm()
    set_styles(pipe, file, first=0.5)
    assert torch.equal(latents(pipe), styled)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)
    assert all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())


@torch.no_grad()
def test_kohya_keys_and_alphas_and_text_encoders_are_understood(runs):
    """Catches alpha / rank left out, and a LoRA of the text encoders that is dropped."""
    pipe = load(runs["sdxl"])
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, gen = pipe.unet.get_submodule(key), torch.Generator().manual_seed(3)
    A, B = torch.randn(4, layer.channels, generator=gen), torch.randn(layer.out, 4, generator=gen)
    A_text, B_text = torch.randn(4, 32, generator=gen), torch.randn(32, 4, generator=gen)
    kohya = {}
    for name, down, up in ((f"lora_unet_{key}", A, B), ("lora_te1_text_model.encoder.layers.0.self_attn.out_proj", A_text, B_text)):
        name = name.replace(".", "_")
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    x, tokens = torch.randn(5, layer.channels, generator=gen), pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0]
    pipe.load_lora_weights(kohya)
    added = x @ A.mT @ B.mT / 4
    assert (pipe.unet.get_submodule(key)(x) - layer(x) - added).norm() < 1e-4 * added.norm()
    assert not torch.equal(pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0], tokens)
    pipe.unload_lora_weights()
    assert pipe.unet.get_submodule(key) is layer
    assert torch.equal(pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0], tokens)


@pytest.mark.parametrize("name", (SDXL, "flux"))
def test_an_adapter_trains_on_the_packed_network(runs, name):
    """Catches our own branch that is trained with it, gradients that stop at a packed layer, and those of other weights than the
    layer has."""
    net, gen = denoiser_of(load(runs[name])), torch.Generator().manual_seed(5)
    key = STYLED[name][-1] if name == "flux" else "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    net.requires_grad_(False)
    net.add_adapter(LoraConfig(r=4, target_modules=[key]), "mine")
    assert {k for k, p in net.named_parameters() if p.requires_grad} == {f"{key}.lora_{ab}.mine.weight" for ab in "AB"}
    layer = net.get_submodule(key)
    A, B, x = layer.lora_A["mine"].weight, layer.lora_B["mine"].weight, torch.randn(6, layer.in_features, generator=gen)
    torch.nn.init.normal_(B.data, generator=gen)
    x.requires_grad_()
    g = torch.randn(6, layer.out_features, generator=gen)
    layer(x).backward(g)
    scale = layer.scaling["mine"]
    for found, wanted in (
        (A.grad, scale * (g @ B).mT @ x), (B.grad, scale * g.mT @ (x @ A.mT)),
        (x.grad, g @ (layer.base_layer.float_weight() + scale * B @ A)),
    ):  # fmt: skip
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines around it


PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.linear_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 127))  # the lower half


def ask(pipe, **more) -> torch.Tensor:
    """The picture of a call in two steps, from a seed."""
    given = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    given |= STEPS["sdxl" if hasattr(pipe, "unet") else "flux"] | {"generator": torch.Generator().manual_seed(0)}
    return quiet(pipe)(**given | more).images.float()


def in_another_dtype(pipe) -> torch.Tensor:
    return ask(pipe.to(torch.bfloat16))


def in_slices(pipe) -> torch.Tensor:
    pipe.vae.enable_slicing()
    return ask(pipe, num_images_per_prompt=2)[:1]


def image_to_image(pipe) -> torch.Tensor:
    around = diffusers.AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=torch.float32)
    return ask(around, image=PICTURE, strength=0.5)


def inpainted(pipe) -> torch.Tensor:
    return ask(diffusers.AutoPipelineForInpainting.from_pipe(pipe), image=PICTURE, mask_image=MASK, strength=0.5)


def guided_by_attention(pipe) -> torch.Tensor:
    """Not with FLUX: a second call, some of whose attention is left out."""
    return ask(diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True), pag_scale=2.0)


def controlled(pipe) -> torch.Tensor:
    """With a ControlNet, which is a copy of some of the base's layers in 16 bits, and whose own answers are not zero here."""
    if hasattr(pipe, "unet"):
        control = diffusers.ControlNetModel.from_unet(miniature.sdxl().unet)
        ends, cls, image = [*control.controlnet_down_blocks, control.controlnet_mid_block], "StableDiffusionXLControlNet", "image"
    else:
        net = miniature.flux().transformer
        shape = net.config.attention_head_dim, net.config.num_attention_heads
        control = diffusers.FluxControlNetModel.from_transformer(net, 1, 1, *shape)
        ends, cls, image = [*control.controlnet_blocks, *control.controlnet_single_blocks], "FluxControlNet", "control_image"
    for end in ends:
        torch.nn.init.normal_(end.weight, std=0.3, generator=torch.Generator().manual_seed(7))
    return ask(getattr(diffusers, f"{cls}Pipeline").from_pipe(pipe, controlnet=control), **{image: PICTURE})


def with_a_word(pipe) -> torch.Tensor:
    """Textual inversion, of each text encoder that knows it."""
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))[: 1 + hasattr(pipe, "unet")]:
        text = getattr(pipe, encoder)
        known = {"text_encoder": text, "tokenizer": getattr(pipe, tokenizer)}
        word = torch.randn(1, text.config.hidden_size, generator=torch.Generator().manual_seed(8))
        pipe.load_textual_inversion({"<mine>": 10 * word}, token="<mine>", **known)
    return ask(pipe, prompt="<mine> <mine> <mine> <mine>")


def ip_adapter(net: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Somebody's IP-Adapter of the first kind: four tokens of a picture, and their keys and values for each attention to text."""
    gen, unet = torch.Generator().manual_seed(9), hasattr(net, "down_blocks")
    width = net.config.cross_attention_dim if unet else net.config.joint_attention_dim
    tokens = {"proj.weight": torch.randn(4 * width, 32, generator=gen), "proj.bias": torch.zeros(4 * width)}
    projections = {}
    for i, name in enumerate(
        name for name in net.attn_processors if name.endswith("attn2.processor" if unet else "attn.processor")
    ):
        inner = net.get_submodule(name.removesuffix("processor") + "to_q").out_features
        for side in ("to_k_ip", "to_v_ip") if unet or not name.startswith("single") else ():
            key = f"{2 * i + 1 if unet else i}.{side}"
            projections[f"{key}.weight"] = 2 * torch.randn(inner, width, generator=gen) / width**0.5
            projections |= {} if unet else {f"{key}.bias": torch.zeros(inner)}
    return {"image_proj": tokens | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}, "ip_adapter": projections}


def like_a_picture(pipe) -> torch.Tensor:
    """IP-Adapter."""
    folder = "image_encoder_folder" if hasattr(pipe, "unet") else "image_encoder_pretrained_model_name_or_path"
    pipe.load_ip_adapter(ip_adapter(denoiser_of(pipe)), subfolder=None, weight_name=None, **{folder: None})
    embedding = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(10))]
    black = {} if hasattr(pipe, "unet") else {"negative_ip_adapter_image_embeds": embedding}  # else FLUX's asks an encoder for it
    return ask(pipe, ip_adapter_image_embeds=embedding, **black)


AROUND = {  # what people do with a pipeline, and how much it moves a picture
    in_another_dtype: 0.0,
    in_slices: 0.0,
    image_to_image: 0.2,
    inpainted: 0.2,
    controlled: 0.1,
    with_a_word: 0.02,
    like_a_picture: 0.1,
    guided_by_attention: 0.02,  # not with FLUX
}
FAMILIES_AROUND = [(do, name) for do in AROUND for name in ("flux", "sdxl")]
FAMILIES_AROUND.remove((guided_by_attention, "flux"))


@pytest.mark.parametrize("do, name", FAMILIES_AROUND, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_what_draws_with_a_16_bit_pipeline_draws_with_a_packed_one(runs, name, do):
    """Catches a packed network that stands in the way or is left out of what is done, and packed tensors that are cast or lost. The
    same weights in plain layers say what has to be drawn, but for rounded activations."""
    pipe, plain = load(runs[name]), load(runs[name])
    before, net = ask(load(runs[name])), denoiser_of(pipe)
    layers = {key: copy.deepcopy(layer.state_dict()) for key, layer in packed_layers(net)}
    denoiser_of(plain).dequantize()
    picture, expected = do(pipe), do(plain)
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
    spread = (expected - expected.mean()).norm()
    assert (picture - expected).norm() < 0.4 * spread and (expected - before).norm() >= AROUND[do] * spread
    assert layers.keys() == dict(packed_layers(net)).keys()
    for key, layer in packed_layers(net):
        assert all(torch.equal(layer.state_dict()[k], v) and layer.state_dict()[k].dtype == v.dtype for k, v in layers[key].items())


@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_an_ip_adapter_goes_as_it_came_and_is_not_saved(runs, tmp_path, name):
    """Catches projections of pictures in a folder that reads none, and ones that stay."""
    pipe = load(runs[name])
    before = ask(pipe)
    assert not torch.equal(like_a_picture(pipe), before)
    with pytest.raises(UserError, match=r"an IP-Adapter is not saved with a pipeline: call its unload_ip_adapter\(\), then save"):
        pipeline.save_pipeline(pipe, tmp_path / "saved")
    pipe.unload_ip_adapter()
    assert torch.equal(ask(pipe), before)
    pipeline.save_pipeline(pipe, tmp_path / "saved")


@torch.no_grad()
def test_a_copy_is_a_network_of_its_own(runs):
    """Catches a state_dict that is the first one's, what cannot be pickled, and networks that are not freed."""
    net = load(runs["flux"]).transformer
    twin = copy.deepcopy(net)
    assert same_tensors(twin, net) and type(twin) is diffusers.FluxTransformer2DModel
    next(layer for _, layer in packed_layers(twin)).codes_OP.zero_()
    assert not same_tensors(twin, net) and same_tensors(pickle.loads(pickle.dumps(twin)), twin)
    known = weakref.ref(twin)
    method = twin.state_dict
    del twin
    assert known() is None
    with pytest.raises(RuntimeError, match="network of state_dict is gone: keep its pipeline in a variable"):
        method()


def test_what_would_be_silently_wrong_on_packed_layers_is_refused(runs):
    """Catches fused projections whose bias is that of centred inputs, and DoRA, which takes it for the plain layer's."""
    net = load(runs["flux"]).transformer
    with pytest.raises(RuntimeError, match="packed weights cannot be changed"):
        net.fuse_qkv_projections()
    centred = next(key for key, layer in packed_layers(net) if layer.shift is not None)
    other = next(key for key, layer in packed_layers(net) if layer.shift is None and not isinstance(layer, W4A16Linear))
    with pytest.raises(RuntimeError, match=f"{re.escape(centred)} is centred, which DoRA does not know"):
        net.add_adapter(LoraConfig(r=2, target_modules=[centred], use_dora=True), "wrong")
    assert centred in dict(packed_layers(net))
    net.add_adapter(LoraConfig(r=2, target_modules=[other], use_dora=True, init_lora_weights=False), "right")
    layer, x = net.get_submodule(other), torch.randn(5, net.get_submodule(other).in_features)
    A, B = (getattr(layer, f"lora_{ab}")["right"].weight for ab in "AB")
    layer.lora_magnitude_vector["right"].weight.data.mul_(2)
    expected = 2 * x @ (layer.base_layer.float_weight() + layer.scaling["right"] * B @ A).mT + layer.base_layer.bias
    assert (layer(x) - expected).norm() < 0.1 * expected.norm()  # activations are rounded


@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_a_dequantized_network_is_a_plain_one(runs, tmp_path, name):
    """Catches a weight for the smoothed or rotated input, a bias that has the mean input twice, a quantization_config left behind,
    a count of parameters without packed ones."""
    pipe, plain = load(runs[name]), denoiser_of(miniature.PIPELINES[name]())
    net, before = denoiser_of(pipe), latents(pipe)
    branches = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in packed_layers(net) if layer.rank)
    biases = [layer.bias for key, layer in packed_layers(net) if plain.get_submodule(key).bias is None]
    of_centring = sum(len(bias) for bias in biases if bias is not None)
    assert net.num_parameters() == plain.num_parameters() + branches + of_centring
    inputs = {}
    for key, layer in packed_layers(net):
        layer.register_forward_hook(lambda layer, args, y, key=key: inputs.update({key: (layer, args[0], y)}))
    latents(pipe, 1)
    net.dequantize()
    for key, (layer, x, y) in inputs.items():
        if layer.bias is None or plain.get_submodule(key).bias is not None:
            rounding = 1e-5 if isinstance(layer, W4A16Linear) else 0.03 if layer.group_x == quant.EIGHT_BITS else 0.3
            assert (net.get_submodule(key)(x) - y).norm() < rounding * y.norm(), key
    assert not [*packed_layers(net)] and net.num_parameters() == plain.num_parameters()
    pipe.save_pretrained(tmp_path / "plain")
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "plain"))
    assert "quantization_config" not in (tmp_path / "plain" / FAMILIES[name].part / "config.json").read_text()
    assert same_tensors(denoiser_of(again), net) and denoiser_of(again).state_dict().keys() == plain.state_dict().keys()
    assert (latents(pipe) - before).norm() < 0.3 * before.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Model card, sample.py, what users do wrong


def code_of(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("name", (SDXL, "flux"))
def test_the_card_of_a_run_has_code_that_draws(runs, tmp_path, monkeypatch, name):
    """Catches a card whose code does not run, and pictures of the base's own size."""
    (tmp_path / "run").symlink_to(runs[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "_has_native", lambda device: False)
    exec(code_of(pipeline.write_card("run")), said := {})
    assert said["image"].size == (64, 64) and Path("picture.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", (SDXL, "flux"))
@torch.no_grad()
def test_an_exported_folder_draws_without_this_repository(runs, tmp_path, name):
    """Catches a module that the folder lacks, one that imports ours, other pictures, and a bare call with fifty steps, guidance or
    the base's own size."""
    pipe = load(runs[name], dtype=torch.bfloat16)
    pipeline.save_pipeline(pipe, tmp_path / "saved")
    guidance, steps = STEPS[name]["guidance_scale"], 4
    torch.save(start(pipe).bfloat16(), tmp_path / "noise.pt")
    code = (
        code_of(tmp_path / "saved" / "README.md")
        + f"""
import sys
pipe.set_progress_bar_config(disable=True)
noise = torch.load("noise.pt", weights_only=True)
asked = dict(num_inference_steps={steps}, guidance_scale={guidance}, height=64, width=64)
draw = lambda **more: pipe({PROMPT!r}, latents=noise, output_type="latent", **more).images
torch.save([draw(), draw(**asked), draw(num_inference_steps=2)], "drawn.pt")
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", torch_dtype=torch.bfloat16, trust_remote_code=True)
assert type(again).__module__ == type(pipe).__module__
again.{FAMILIES[name].part}.dequantize()
assert again({PROMPT!r}).images[0].size == (64, 64)
ours = [name for name in ("quant", "kernels", "layers", "models", "run", "hessian") if name in sys.modules]
assert not ours, ours
"""
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    bare, asked, two = torch.load(tmp_path / "drawn.pt", weights_only=True)
    assert torch.equal(bare, asked) and not torch.equal(two, bare)
    expected = latents(pipe, steps)
    assert (asked - expected).norm() < 0.02 * expected.norm()  # mapped files are aligned otherwise: BLAS sums otherwise
    assert (tmp_path / "picture.png").exists()
    again = load(tmp_path / "saved", dtype=torch.bfloat16)  # by our own code
    assert same_tensors(denoiser_of(again), denoiser_of(pipe))


def test_the_card_names_base_licence_format_and_metrics(runs, tmp_path):
    """Catches a licence of another base, and numbers that are not those of the files."""
    for base, licence in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "license: openrail++"),
        ("black-forest-labs/FLUX.1-dev", "license_name: flux-1-dev-non-commercial-license"),
        ("someone/else", "license: other"),
    ):
        folder = tmp_path / base.replace("/", "-")
        folder.mkdir()
        about = files.read_config(runs["sdxl"])
        about["network"]["base"] = base
        files.write_json(folder / "config.json", about)
        (folder / "model.safetensors").symlink_to(runs["sdxl"] / "model.safetensors")
        (folder / "report.json").write_text(json.dumps({"steps": 4, "n": 256, "snr": 24.5, "w4a4": {"psnr": 31.25}}))
        text = pipeline.write_card(folder).read_text()
        front = text.split("---\n")[1]
        assert (
            licence in front
            and f"base_model: {base}\n" in front
            and "library_name: diffusers\n" in front
            and "- cmquant\n" in front
        )
        assert "- snr: 24.500\n" in text and "| w4a4 | 31.250 |" in text and "groups of 64 (weights), 16 (activations)" in text
        assert "W4A4/8 in few steps" in text and "- w4a4-8\n" in front and "and 4/8-bit activations" in text
        assert "activations in 8 bits" in text and "layers 16 bit, " in text
        assert " layers W4A4, " in text and " layers W4A8" in text
        assert base.startswith("someone") == ("see someone/else" in text)
        size = sum(v.nbytes for v in load_file(folder / "model.safetensors").values())
        floats = 2 * sum(p.numel() for p in miniature.sdxl().unet.parameters())
        assert f"{size / 1e6:.1f} MB" in text and f"{size / floats:.1%} of its {floats / 1e6:.1f} MB" in text


@pytest.mark.parametrize("name", (SDXL, "flux"))
def test_sample_draws_picture_i_from_the_noise_of_seed_plus_i(runs, tmp_path, name, monkeypatch):
    """Catches noise that depends on the batch, and a base row that is drawn with the few-step scheduler."""
    pipe = load(runs[name])
    two = pipeline.draw_with_pipeline(pipe, [PROMPT, "a cat"], 2, seed=5)
    assert two.shape == (2, 3, 64, 64) and torch.equal(two[1:], pipeline.draw_with_pipeline(pipe, ["a cat"], 2, seed=6))
    twin = sample.base_of(pipe, str(files.read_config(runs[name])["network"]["base"]))
    assert not any(packed_layers(denoiser_of(twin))) and twin.vae is pipe.vae
    assert twin.scheduler.config.get("use_dynamic_shifting", False) == (name == "flux")
    assert type(twin.scheduler).__name__ == ("EulerDiscreteScheduler" if name == "sdxl" else "FlowMatchEulerDiscreteScheduler")
    monkeypatch.setattr(sources, "PIPELINE_PROMPTS", [PROMPT])
    sample.main(["--checkpoint", str(runs[name]), "--steps", "1", "--compare", "--out", str(tmp_path / "grid.png")])
    assert sample.Image.open(tmp_path / "grid.png").size == (96 + 68, 2 * 68)


def test_commands_export_lora_pipeline_and_card(runs, bases, tmp_path):
    """Catches an option that is not wired to its function, scores that an export loses, and paths of this machine in it."""
    run = str(runs["sdxl"])
    pipeline.main(["--checkpoint", run, "--export", "lora", "--out", str(tmp_path / "lora.safetensors")])
    run = shutil.copytree(run, tmp_path / "run")
    (run / "report.json").write_text(json.dumps({"steps": 4, "n": 256, "snr": 24.5}))
    command = ["--checkpoint", str(run), "--export", "diffusers", "--out", str(tmp_path / "saved"), "--base-model", "someone/base"]
    pipeline.main(command)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "base_model: someone/base\n" in card and "- snr: 24.500\n" in card
    texts = [path.read_text() for path in (tmp_path / "saved").rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert not any(str(path) in text for text in texts for path in (bases["sdxl"], tmp_path))
    assert all(k.startswith("unet.") for k in load_file(tmp_path / "lora.safetensors"))
    assert (tmp_path / "saved" / "README.md").is_file() and (tmp_path / "saved" / "model_index.json").is_file()
    with pytest.raises(UserError, match="--out names: add it"):
        pipeline.main(["--checkpoint", str(run), "--export", "lora"])


@pytest.mark.parametrize("name", ("sdxl", "flux"))
def test_attention_in_8_bits_draws_near_what_torch_s_own_does(runs, name, monkeypatch):
    """Catches an option that reaches another network, or none, and one that a GPU would ignore."""
    if not attention.cpu.is_available():
        pytest.skip("there is no C++ kernel")
    monkeypatch.setattr(attention, "FEWEST_KEYS", 1)
    plain, ours = (pipeline.draw_with_pipeline(load(runs[name], attention_8bit=on), ["a red house"], 2) for on in (False, True))
    assert 20 < sources.psnr(ours, plain) < 100
    monkeypatch.setattr(pipeline, "check_device", lambda device: None)
    with pytest.raises(UserError, match="is for CPUs: on a GPU choose a backend"):
        load(runs[name], device="cuda", attention_8bit=True)


@pytest.mark.parametrize("name", ("sdxl", "flux"))
def test_a_pipeline_that_does_not_fit_on_the_gpu_comes_layer_by_layer(name, monkeypatch, capsys):
    """Catches a pipeline of 34 GB that ends in an error of memory on a GPU of 24, and one that is slow where it fits."""
    pipe, device = getattr(miniature, name)(), torch.device("cuda", 0)
    monkeypatch.setattr(type(pipe), "to", lambda pipe, device: "on the device")
    monkeypatch.setattr(type(pipe), "enable_sequential_cpu_offload", lambda pipe, device: hooked.append(device))
    text = (pipe.text_encoder, pipe.text_encoder_2)
    size = sum(t.nbytes for part in (pipeline.denoiser_of(pipe), pipe.vae, *text) for t in part.state_dict().values())
    for room, offloaded in ((2 * size, False), (size, True)):
        hooked = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, room=room: (room, 10 * size))
        assert pipeline.placed(pipe, device) == (pipe if offloaded else "on the device") and hooked == [device] * offloaded
        assert ("they come layer by layer" in capsys.readouterr().out) == offloaded
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    assert pipeline.placed(pipe, torch.device("cpu")) == "on the device"


@pytest.mark.slow
def test_the_16_bit_export_is_stock_diffusers_and_says_how_far_it_is(runs, tmp_path, capsys, monkeypatch):
    """Catches a folder that needs our code, and a distance that is not that of the pictures."""
    monkeypatch.setattr(kernels, "_has_native", lambda device: False)
    folder, prompts = tmp_path / "plain", sources.SAMPLE_PROMPTS[:2]
    pipeline.main(["--checkpoint", str(runs["flux"]), "--export", "16bit", "--out", str(folder)])
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16))
    assert not [*packed_layers(again.transformer)] and not [*folder.glob("*.py")]
    packed = pipeline.draw_with_pipeline(load(runs["flux"], dtype=torch.bfloat16), prompts, 4)
    again.default_sample_size = 8
    plain = pipeline.draw_with_pipeline(again, prompts, 4, guidance=3.5)
    distance = scores.psnr(plain, packed)
    assert 10 < distance < 90 and f"are\n  {distance:.1f} dB (PSNR)" in (folder / "README.md").read_text()
    assert f"{distance:.1f} dB from those of the packed one" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    exec(code_of(folder / "README.md"), said := {})
    assert said["image"].size == (64, 64)


def test_what_cannot_be_loaded_is_one_sentence_that_says_what_to_do(runs, bases, tmp_path, monkeypatch):
    """Catches tracebacks of diffusers and PEFT, pipelines with the wrong base's text encoders, and silent acceptance."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    broken, tiny, merged = tmp_path / "broken", tmp_path / "tiny", tmp_path / "merged"
    about = files.read_config(runs["flux"])
    real = tmp_path / "real"
    real.mkdir()
    files.write_json(real / "config.json", about | {"config": about["config"] | {"model": "flux"}})
    longer, none = ({k: row | {"rank": rank} for k, row in about["layers"].items()} for rank in (9, 0))
    for folder, change in ((broken, {"layers": longer}), (merged, {"layers": none}), (tiny, {"network": "tiny-flux"})):
        folder.mkdir()
        files.write_json(folder / "config.json", about | change)
        (folder / "model.safetensors").symlink_to(runs["flux"] / "model.safetensors")
    cases = {
        r"hf download black-forest-labs/FLUX\.1-dev": lambda: load(runs["flux"], base="black-forest-labs/FLUX.1-dev"),
        "is a StableDiffusionXLPipeline, not a FluxPipeline.*--base": lambda: load(runs["flux"], base=str(bases["sdxl"])),
        "/nowhere does not exist": lambda: load(runs["flux"], base="/nowhere"),
        r"no packed pipeline.*train\.py": lambda: load(bases["sdxl"]),
        r"tiny model.*sample\.py": lambda: load(tiny),
        r"does not fit its table": lambda: load(broken),
        "has no LoRA.*--deploy branch": lambda: pipeline.export_lora(merged, tmp_path / "x.safetensors"),
        "holds no checkpoint": lambda: pipeline.write_card(tmp_path / "none"),
        "holds no packed network": lambda: pipeline.write_card(bases["sdxl"]),
    }
    for sentence, call in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
