"""What public files look like, where miniatures written by today's diffusers do not show it: older configs, marks in single
files, LoRAs with metadata, files that lack weights."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import miniature
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tdpt
import train
from models import encoders, headers, pipeline, pretrained
from models.denoiser import lora_layers
from models.family import FAMILIES, family_of_network
from run.common import UserError

FLUX_DEV = {  # transformer/config.json of FLUX.1-dev, written by diffusers 0.30
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,
    "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: miniature.save(name, folder / name) for name in miniature.PUBLIC}


def thinned(file: Path, lacks: str) -> None:
    """A safetensors file loses the tensors whose names hold `lacks`."""
    tensors = load_file(file)
    assert any(lacks in key for key in tensors)
    save_file({k: v for k, v in tensors.items() if lacks not in k}, file, metadata={"format": "pt"})


def changed(base: Path, copy: Path, file: str, **entries) -> Path:
    """A copy of a base with other entries in one of its configurations."""
    shutil.copytree(base, copy, dirs_exist_ok=True)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | entries))
    return copy


def test_flux_is_known_by_its_class():
    """Catches a key that only newer configs have, and relatives of FLUX (or FLUX with more input channels) that pass for it."""
    pretrained.check_architecture(FAMILIES["flux"], FLUX_DEV, "dev")
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel.from_config(FLUX_DEV | {"num_layers": 1})
    assert family_of_network(net) is FAMILIES["flux"]
    for other in ({"_class_name": "ChromaTransformer2DModel", "axes_dims_rope": (16, 56, 56)}, {"in_channels": 384}):
        with pytest.raises(UserError, match="is no FLUX model"):
            pretrained.check_architecture(FAMILIES["flux"], FLUX_DEV | other, "other")


def test_each_architecture_is_of_exactly_one_family():
    """Catches a record whose rule also claims the members of another, or not its own; Stable Diffusion 2.x is sd15's."""
    for family in FAMILIES.values():
        config = dict(family.build_meta().config)
        assert [f.name for f in FAMILIES.values() if f.network is family.network and f.is_one(config)] == [family.name]
    sd2 = dict(FAMILIES["sd15"].build_meta().config, cross_attention_dim=1024, use_linear_projection=True, sample_size=96)
    assert FAMILIES["sd15"].is_one(sd2)


@pytest.mark.parametrize("scheduler", ({"sigma_data": 0.5, "sigma_max": 80.0}, {"trained_betas": [0.1] * 1000}))
def test_a_schedule_without_a_path_is_refused(scheduler):
    """Catches Playground's EDM schedule, or betas from a list, that are taken for scaled_linear ones."""
    with pytest.raises(ValueError, match="not supported"):
        FAMILIES["sdxl"].path(scheduler, (4, 128, 128))


def test_what_a_flow_schedule_does_not_say_is_its_class_s_default():
    """Catches a fixed shift that becomes one by the number of tokens."""
    default = diffusers.FlowMatchEulerDiscreteScheduler().config
    assert FAMILIES["flux"].path({"num_train_timesteps": 1000}, (16, 128, 128)).shift == default.shift == 1.0
    assert not default.use_dynamic_shifting
    assert FAMILIES["flux"].path({}, (16, 128, 128)).shift == pytest.approx(2.718281828**1.15)  # FLUX.1-dev's


@pytest.mark.parametrize(
    "mark, says",
    [
        ("v_pred", "predicts v: give --components whose scheduler says so"),
        ("ztsnr", r"ends at zero signal-to-noise ratio: give --components whose scheduler says so .rescale_betas_zero_snr"),
        ("edm_mean", "a noise schedule of its own"),
        ("scaled_fp8", r"is quantized \(scaled_fp8: F32\): give the base in 16 bits"),
        ("model.diffusion_model.out.2.scale_weight", "is quantized"),
    ],
)
def test_marks_in_a_single_file_are_heeded(bases, tmp_path, mark, says):
    """Catches v that is trained as eps, and scaled 8-bit weights without their scales."""
    network = pretrained.load_network("sdxl", str(bases["sdxl"]), dtype=torch.float32)
    file = miniature.single_file(network.net, tmp_path / "model.safetensors")
    save_file(load_file(file) | {mark: torch.zeros(1)}, file)
    with pytest.raises(UserError, match=says):
        pretrained.load_network("sdxl", str(file), components=str(bases["sdxl"]))
    if mark == "ztsnr":
        asked = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        components = changed(bases["sdxl"], tmp_path / "components", "scheduler/scheduler_config.json", **asked)
        path = pretrained.load_network("sdxl", str(file), components=str(components)).path
        assert path.alpha_sigma(torch.tensor([1000]))[0] == 0


TO_Q = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q."


def with_tensors(file: Path, tensors: dict[str, torch.Tensor], out: Path) -> Path:
    save_file({k: v.contiguous() for k, v in (load_file(file) | tensors).items()}, out, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def single(bases, tmp_path_factory) -> Path:
    unet = diffusers.UNet2DConditionModel.from_pretrained(bases["sdxl"] / "unet")
    return miniature.single_file(unet, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.mark.parametrize(
    "beside",
    [
        {"weight": torch.zeros(128, 128, dtype=torch.int8)},
        {"weight": torch.zeros(128, 64, dtype=torch.uint8), "weight.absmax": torch.zeros(64)},
        {"scale": torch.ones(128, 1)},
        {"comfy_quant": torch.zeros(8, dtype=torch.uint8)},
        {"qweight": torch.zeros(16, 128, dtype=torch.int32)},
        {"weight._data": torch.zeros(128, 128, dtype=torch.int8)},
    ],
    ids=lambda beside: " ".join(beside),
)
@pytest.mark.parametrize("kind", ["file", "folder", "hub id"])
def test_codes_are_no_weights(bases, single, tmp_path, monkeypatch, beside, kind):
    """Catches codes of a quantizer that are cast to floats, wherever the base is; nothing is loaded before that is known."""
    monkeypatch.setattr(pretrained, "check_whole", lambda *args: pytest.fail("it was loaded"))
    if kind == "file":
        base, options = with_tensors(single, {TO_Q + k: v for k, v in beside.items()}, tmp_path / "q.safetensors"), {}
    else:
        base, options = shutil.copytree(bases["sdxl"], tmp_path / "q"), {}
        file = base / "unet" / "diffusion_pytorch_model.safetensors"
        with_tensors(file, {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.{k}": v for k, v in beside.items()}, file)
    if kind == "hub id":  # in the cache
        folder, base = base, "someone/base"
        load = diffusers.UNet2DConditionModel.load_config
        monkeypatch.setattr(diffusers.UNet2DConditionModel, "load_config", lambda name, **more: load(folder, **more))
        monkeypatch.setattr(pretrained, "from_pretrained", lambda *args, **more: None)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(folder / file))
    with pytest.raises(UserError, match=r"is quantized \(\S*to_q.* give the base in 16 bits"):
        pretrained.load_network("sdxl", str(base), components=str(bases["sdxl"]), **options)


@pytest.mark.parametrize(
    "name, part, method",
    [
        ("sdxl", "unet", "sdnq"),
        ("sdxl", "unet", "cmquant"),
        ("flux", "transformer", "quanto"),
        ("flux", "text_encoder_2", "bitsandbytes"),
    ],
)
def test_a_base_that_a_quantizer_saved_is_refused_by_its_configuration(bases, tmp_path, monkeypatch, name, part, method):
    """Catches the advice to install the quantizer, and text encoders whose codes are found out after the network was loaded."""
    base = changed(bases[name], tmp_path / "q", f"{part}/config.json", quantization_config={"quant_method": method})
    monkeypatch.setattr(pretrained, "from_pretrained", lambda *args, **more: pytest.fail("it was read"))
    with pytest.raises(UserError, match=rf"{part} of \S+ is quantized \({method}\): give the base in 16 bits"):
        pretrained.load_network(name, str(base))


@pytest.mark.parametrize("config, method", [("fp8", "fp8"), ({"bits": 4}, "by an unknown method")])
def test_a_quantizer_that_says_less_is_refused_too(config, method):
    """Catches a traceback for the name alone, and codes that nobody named."""
    with pytest.raises(UserError, match=rf"base is quantized \({method}\): give the base in 16 bits"):
        headers.check_config_unquantized({"quantization_config": config}, "base")


def test_text_encoders_of_codes_need_no_quantizer_but_another_base(bases, tmp_path):
    """Catches the advice to install a quantizer, where `components` alone has its codes."""
    base = changed(bases["flux"], tmp_path / "q", "text_encoder_2/config.json", quantization_config={"quant_method": "sdnq"})
    with (
        pytest.raises(UserError, match=r"text_encoder_2 of \S+ is quantized \(sdnq\): give the base in 16 bits"),
        pretrained.loading_errors("the text encoders", str(base)),
    ):
        raise ImportError("`pip install sdnq`")


def test_plain_eight_bit_floats_are_read(bases, single, tmp_path):
    """Catches a check for codes that takes rounded floats for them."""
    key = TO_Q + "weight"
    file = with_tensors(single, {key: load_file(single)[key].to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    pretrained.load_network("sdxl", str(file), components=str(bases["sdxl"]))


def path_of(name: str, scheduler: dict, folder: Path):
    """The path of a base whose folder has this configuration of a scheduler."""
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return FAMILIES[name].path(pretrained.load_scheduler(str(folder)), FAMILIES[name].latent)


@pytest.mark.parametrize(
    "name, scheduler, says",
    [
        ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching is not supported"),
        ("sd15", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "flow matching is not supported"),
        ("sdxl", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "flow matching is not supported"),
        ("sdxl", {"_class_name": "DDPMScheduler"}, "beta_schedule linear is not supported"),
        ("sd15", {"_class_name": "EDMEulerScheduler"}, "EDM's sigmas|beta_schedule"),
        ("sdxl", {"_class_name": "MyScheduler"}, r"diffusers does not have the scheduler of \S+ \(MyScheduler\)"),
        ("flux", {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}, "betas are not supported"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(tmp_path, name, scheduler, says):
    """Catches flow matching that is taken for eps on SDXL's betas, and betas that are taken for FLUX's flow."""
    with pytest.raises(ValueError, match=says):
        path_of(name, scheduler, tmp_path)


def test_what_a_scheduler_does_not_say_is_its_class_s_default(tmp_path):
    """Catches SDXL's betas in a base whose scheduler has others by default."""
    path = path_of("sdxl", {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear"}, tmp_path)
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.sqrt()
    torch.testing.assert_close(path.alpha_sigma(torch.arange(1, 1001))[0].float(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler, shift",
    [
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}, 3.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15),
    ],
)
def test_a_flow_may_be_another_scheduler_s(tmp_path, scheduler, shift):
    """Catches a shift of 1 for schedulers of both kinds, and the exponential of a linear one."""
    assert path_of("flux", scheduler, tmp_path).shift == pytest.approx(shift)


GUIDED = "has an input for guidance .*: give its base, and its LoRA as --cm"
LOOK_ALIKES = {  # what the configurations of public networks differ in
    "refiner": ("sdxl", {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}, "is SDXL's refiner"),
    "LCM SDXL": ("sdxl", {"time_cond_proj_dim": 256}, GUIDED),
    "LCM Dreamshaper": ("sd15", {"time_cond_proj_dim": 256}, GUIDED),
    "Kolors": ("sdxl", {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "projects its text .*as Kolors does"),
    "IP-Adapter": ("sd15", {"encoder_hid_dim_type": "ip_image_proj"}, "projects its text"),
    "upscaler": ("sd15", {"num_class_embeds": 1000}, "has an input for classes"),
}


@pytest.mark.parametrize("which", LOOK_ALIKES)
def test_look_alikes_are_refused_by_name(which):
    """Catches further inputs that training does not fill and the pipeline does, and errors deep inside of a network."""
    name, entries, says = LOOK_ALIKES[which]
    config = dict(FAMILIES[name].build_meta().config) | {"_class_name": "UNet2DConditionModel"}
    pretrained.check_architecture(FAMILIES[name], config, "base")
    with pytest.raises(UserError, match=f"base {says}"):
        pretrained.check_architecture(FAMILIES[name], config | entries, "base")


def test_a_size_in_a_list_is_height_and_width(bases, tmp_path):
    """Catches a TypeError, and latents of the height alone."""
    square = changed(bases["sdxl"], tmp_path / "a", "unet/config.json", sample_size=[8, 8])
    assert pretrained.load_network("sdxl", str(square), dtype=torch.float32).latent == (4, 8, 8)
    wide = changed(bases["sdxl"], tmp_path / "b", "unet/config.json", sample_size=[8, 16])
    with pytest.raises(UserError, match=r"pictures of 64 x 128 pixels: give --resolution"):
        pretrained.load_network("sdxl", str(wide))
    assert pretrained.load_network("sdxl", str(wide), resolution=128, dtype=torch.float32).latent == (4, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("name", miniature.PUBLIC)
def test_latents_are_scaled_as_the_pipeline_scales_them_back(bases, tmp_path, monkeypatch, name):
    """Catches a VAE's mean and deviation that are left out, and a shift that this family's pipeline does not know."""
    channels = FAMILIES[name].latent[0]
    about = {
        "latents_mean": [0.1 * i for i in range(channels)],
        "latents_std": [1.0 + i for i in range(channels)],
        "shift_factor": 0.3,
    }
    base = changed(bases[name], tmp_path / "a", "vae/config.json", **about)
    pipe, seen, vae = diffusers.DiffusionPipeline.from_pretrained(base), [], encoders.VAE(name, str(base))
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILIES[name].pack(pipe, vae.encode(pictures))
    if name != "flux":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe.scheduler, "step", lambda noise, t, sample, **more: (sample,))
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **more: seen.append(z) or (pictures,))
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", num_inference_steps=1, latents=latents, guidance_scale=1.0, height=64, width=64, output_type="pt")
    torch.testing.assert_close(seen[0], vae.vae.encode(pictures).latent_dist.mode(), rtol=1e-4, atol=1e-5)


def test_a_vae_of_another_size_is_refused(bases, tmp_path):
    """Catches latents that are not 8 times smaller than pictures, which a UNet takes without a word."""
    base = shutil.copytree(bases["sdxl"], tmp_path / "a")
    channels = (16, 32, 32)
    small = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=channels,
        norm_num_groups=8, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    shutil.rmtree(base / "vae")
    small.save_pretrained(base / "vae")
    with pytest.raises(UserError, match="makes latents of 4 channels, 4 times smaller than pictures: choose a base"):
        encoders.VAE("sdxl", str(base))


UNET, LABELS = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"
FIRST, FLUX_FIRST = {UNET: (320, 4, 3, 3)}, {"img_in.weight": (3072, 64)}
OTHER_FILES = {  # what somebody may give as a base: --model, shapes of what tells it
    "SD 1.5": ("sdxl", FIRST, "holds Stable Diffusion: give --model sd15"),
    "SDXL": ("sd15", FIRST | {LABELS: (1280, 2816)}, "holds SDXL: give --model sdxl"),
    "refiner": ("sdxl", FIRST | {LABELS: (1536, 2560)}, "holds SDXL's refiner: give a .safetensors file of SDXL"),
    "inpainting": ("sdxl", {UNET: (320, 9, 3, 3)}, "holds a UNet of 9 input channels: give a .safetensors file of SDXL"),
    "no prefix": (
        "sdxl",
        {"input_blocks.0.0.weight": (320, 4, 3, 3)},
        "holds a UNet whose names lack model.diffusion_model.: give",
    ),
    "LCM": ("sdxl", {"conv_in.weight": (320, 4, 3, 3), "time_embedding.cond_proj.weight": (320, 256)}, "holds a UNet with further"),
    "FLUX": ("sdxl", FLUX_FIRST, "holds FLUX: give --model flux"),
    "FLUX Fill": ("flux", {"img_in.weight": (3072, 384)}, "holds a transformer of 384 input channels: give a .safetensors file"),
    "Chroma": ("flux", FLUX_FIRST | {"distilled_guidance_layer.in_proj.weight": (5120, 64)}, "holds Chroma: give a"),
    "VAE": ("sdxl", {"encoder.conv_in.weight": (128, 3, 3, 3)}, "holds no network that is known here: give a"),
    "SD 2": ("sd15", FIRST | {"x.attn2.to_k.weight": (320, 1024)}, "reads text of width 1024: give --components"),
    "LoRA": ("sdxl", {"lora_unet_mid_block.lora_down.weight": (4, 8)}, "is a LoRA: give it as --cm"),
    "LoHa": ("flux", {"lycoris_single_blocks_0.hada_w1_a": (8, 4)}, "is a LoRA: give it as --cm"),
}


@pytest.mark.parametrize("which", OTHER_FILES)
def test_a_file_is_called_what_it_is(tmp_path, which):
    """Catches a KeyError of diffusers that is taken for a missing download."""
    name, shapes, says = OTHER_FILES[which]
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}, file)
    with pytest.raises(UserError, match=f"model.safetensors {says}"):
        pretrained.load_network(name, str(file))


@pytest.mark.parametrize("suffix", [".gguf", ".ckpt", ".bin", ""])
def test_files_of_other_formats_are_named(tmp_path, suffix):
    """Catches a pickle or GGUF that is taken for a folder with a bad configuration."""
    (tmp_path / f"model{suffix}").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=rf"is a {suffix or 'nameless'} file, which is not read: give a hub id, a folder or a .saf"):
        pretrained.load_network("sdxl", f"{tmp_path}/model{suffix}")
    with pytest.raises(UserError, match="which is not read"):
        pretrained.skeleton("sdxl", f"{tmp_path}/model{suffix}")


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_weights_that_are_there_as_a_variant_alone_are_read(bases, tmp_path, variant):
    """Catches "no such file" for a folder whose only files are named for their precision."""
    base = shutil.copytree(bases["sdxl"], tmp_path / "a")
    for file in base.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    pretrained.load_network("sdxl", str(base), dtype=torch.float32)
    encoders.VAE("sdxl", str(base))
    assert encoders.Text("sdxl", str(base), dtype=torch.float32)(["a cat"])["tokens"].isfinite().all()


def test_a_flux_file_without_guidance_asks_for_its_config(tmp_path):
    """Catches FLUX.1-schnell's weights in FLUX.1-dev's architecture, whose guidance layers would stay on the meta device."""
    save_file({"img_in.weight": torch.zeros(8, 64)}, tmp_path / "schnell.safetensors")
    with pytest.raises(UserError, match="give --components black-forest-labs/FLUX"):
        pretrained.load_network("flux", f"{tmp_path}/schnell.safetensors")


@pytest.mark.slow
def test_schnell_s_teacher_has_no_classifier_free_guidance(bases, tmp_path, monkeypatch):
    """Catches a second teacher call with an empty caption, for a network that was distilled to need none."""
    stock = diffusers.FluxPipeline.from_pretrained(bases["flux"])
    stock.register_modules(
        transformer=diffusers.FluxTransformer2DModel.from_config(dict(stock.transformer.config) | {"guidance_embeds": False}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    )
    stock.save_pretrained(tmp_path / "schnell")
    network = pretrained.load_network("flux", f"{tmp_path}/schnell", resolution=64, dtype=torch.float32)
    assert network.guidance is None and network.path.shift == 1.0
    pretrained.random_cm(network)
    pretrained.save_cm(tmp_path / "cm.safetensors", network)
    (tmp_path / "prompts.txt").write_text("a red house\na blue cat\na tree\na river\n")
    weights, guided = [], tdpt.guided
    monkeypatch.setattr(tdpt, "guided", lambda teacher, w, null: weights.append((w, null)) or guided(teacher, w, null))
    flags = "--steps 1 --batch 2 --calibration 2 --init zero --rounding rtn --ranks uniform --rank 4 --grid 8 --rollout 0"
    flags += " --sampling-steps 1"
    flags += f" --eval-n 2 --dtype float32 --resolution 64 --data {tmp_path}/prompts.txt --out {tmp_path}/r --no-checkpointing"
    train.main(f"--model flux --teacher {tmp_path}/schnell --cm {tmp_path}/cm.safetensors {flags}".split())
    assert weights == [(1.0, {})]


@pytest.mark.parametrize("factor", "AB")
def test_a_lora_that_lacks_a_factor_is_refused(bases, tmp_path, factor):
    """Catches a layer of the consistency model that stays on the meta device."""
    network = pretrained.load_network("sdxl", str(bases["sdxl"]), dtype=torch.float32)
    pretrained.random_cm(network)
    pretrained.save_cm(tmp_path / "cm.safetensors", network)
    tensors = load_file(tmp_path / "cm.safetensors")
    lost = next(key for key in tensors if key.endswith(f"lora_{factor}.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "cm.safetensors")
    network = pretrained.load_network("sdxl", str(bases["sdxl"]), dtype=torch.float32)
    with pytest.raises(UserError, match=r"lacks A or B of add_embedding\.linear_1: copy it again"):
        pretrained.add_cm(network, str(tmp_path / "cm.safetensors"))


@pytest.mark.parametrize("part, lacks", [("unet", "mid_block.attentions"), ("vae", "decoder.mid_block")])
def test_files_that_lack_weights_are_refused(bases, tmp_path, part, lacks):
    """Catches layers that stay on the meta device until something far away copies them."""
    copy = shutil.copytree(bases["sdxl"], tmp_path / "copy")
    thinned(next((copy / part).glob("*.safetensors")), lacks)
    with pytest.raises(UserError, match=rf"lacks \S*{lacks}\S* and \d+ more tensors: get the whole of it"):
        {"unet": pretrained.load_network, "vae": encoders.VAE}[part]("sdxl", str(copy))


def test_a_text_encoder_that_lacks_weights_is_heard_of(bases, tmp_path, monkeypatch):
    """Catches a log level that hides for the rest of the process what transformers says of random weights."""
    from transformers.utils import logging

    said = []
    for level in ("warning", "error"):
        monkeypatch.setattr(logging.get_logger("transformers.modeling_utils"), level, lambda *a, **k: said.append(str(a)))
    copy = shutil.copytree(bases["sdxl"], tmp_path / "copy")
    thinned(next((copy / "text_encoder").glob("*.safetensors")), "layers.1.mlp")
    before = logging.get_verbosity()
    encoders.Text("sdxl", str(copy), dtype=torch.float32)
    assert logging.get_verbosity() == before <= logging.WARNING


def lora_of(name: str, base: Path, folder: Path, **config) -> Path:
    """A LoRA on some layers of a base as diffusers' training scripts write it: alpha and kind in the file's metadata."""
    stock = diffusers.DiffusionPipeline.from_pretrained(base)
    part = FAMILIES[name].part
    net = getattr(stock, part)
    torch.manual_seed(0)
    net.add_adapter(LoraConfig(r=8, target_modules=["to_q", "proj_in", "conv1"], init_lora_weights=False, **config))
    about = {f"{part}_lora_adapter_metadata": net.peft_config["default"].to_dict()}
    type(stock).save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(net)}, **about)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", miniature.PUBLIC)
@pytest.mark.parametrize("config", ({"lora_alpha": 2}, {"lora_alpha": 8, "use_rslora": True}))
def test_a_lora_is_as_strong_as_its_metadata_says(bases, tmp_path, name, config):
    """Catches an alpha that is not looked for where diffusers writes it now, and --cm-scale that is ignored."""
    file, part = lora_of(name, bases[name], tmp_path, **config), FAMILIES[name].part
    stock = diffusers.DiffusionPipeline.from_pretrained(bases[name])
    stock.load_lora_weights(file)
    for strength in (1.0, 0.125):
        network = pretrained.load_network(name, str(bases[name]), dtype=torch.float32)
        pretrained.add_cm(network, str(file), strength)
        assert len(lora_layers(network)) > 2
        for key, layer in lora_layers(network).items():
            theirs = getattr(stock, part).get_submodule(key)
            delta = strength * theirs.get_delta_weight(theirs.active_adapters[0])
            torch.testing.assert_close((layer.lora_B @ layer.lora_A.flatten(1)).view_as(delta), delta, rtol=1e-4, atol=1e-6)


def test_a_lora_that_is_more_than_two_factors_is_refused(bases, tmp_path):
    """Catches DoRA's magnitudes that are dropped without a word."""
    file = lora_of("sdxl", bases["sdxl"], tmp_path, lora_alpha=8, use_dora=True)
    network = pretrained.load_network("sdxl", str(bases["sdxl"]), dtype=torch.float32)
    with pytest.raises(UserError, match=r"is more than B A at .*choose a plain LoRA"):
        pretrained.add_cm(network, str(file))


ATTN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
FLUX_LAYER = "lora_unet_single_blocks_0_linear2"


def kohya(name: str, more: dict | None = None, width: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on one layer under kohya's names."""
    key, shapes = {"sdxl": (ATTN, (128, 128)), "flux": (FLUX_LAYER, (128, 640))}[name]
    out, into = (width, width) if width else shapes
    gen = torch.Generator().manual_seed(0)
    factors = {"lora_down.weight": torch.randn(4, into, generator=gen), "lora_up.weight": torch.randn(out, 4, generator=gen)}
    return {f"{key}.{k}": v for k, v in (factors | {"alpha": torch.tensor(2.0)} | (more or {})).items()}


def both(bases, name: str):
    """What reads a LoRA: as --cm, and as a style."""

    def as_cm(lora):
        network = pretrained.load_network(name, str(bases[name]), dtype=torch.float32)
        pretrained.add_cm(network, str(lora))
        return len(lora_layers(network))

    def as_style(lora):
        pipe = diffusers.DiffusionPipeline.from_pretrained(bases[name])
        pipeline.add_style_lora(pipe, lora)
        return sum("style" in getattr(layer, "lora_A", {}) for layer in getattr(pipe, FAMILIES[name].part).modules())

    return as_cm, as_style


@pytest.mark.parametrize(
    "more, kind",
    [
        ({"dora_scale": torch.ones(128, 1)}, "DoRA"),
        ({"lora_mid.weight": torch.ones(4, 4)}, "Tucker"),
        ({"hada_w1_a": torch.ones(128, 4)}, "LoHa"),
        ({"lokr_w1": torch.ones(8, 8)}, "LoKr"),
        ({"diff": torch.ones(128, 128)}, "a tensor of another kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_what_is_more_than_two_factors_is_refused_under_kohya_s_names_too(bases, tmp_path, name, more, kind):
    """Catches magnitudes that diffusers filters out with a warning: most of such a LoRA's change would be wrong."""
    save_file(kohya(name, more), tmp_path / "lora.safetensors")
    for read in both(bases, name):
        with pytest.raises(UserError, match=rf"is more than B A at \S+ \({kind}, which is not read\): choose a plain LoRA"):
            read(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="the LoRA is more than B A"):
        both(bases, name)[1](kohya(name, more))


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize(
    "layer", ["lora_te1_text_model_encoder_layers_0_self_attn_out_proj", "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
              "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"],
)  # fmt: skip
def test_parts_for_text_encoders_that_are_left_out_are_said_to_be(bases, tmp_path, capsys, name, layer):
    """Catches a half of a LoRA that is dropped without a word."""
    clip = {"sdxl": 32, "flux": 64}[name]  # width of the first text encoder
    if layer.startswith("text_encoder"):
        part = FAMILIES[name].part
        key = {"unet": "unet.mid_block.attentions.0.proj_in", "transformer": "transformer.x_embedder"}[part]
        width = {"unet": 128, "transformer": 64}[part]
        state = {f"{key}.lora_A.weight": torch.ones(4, width), f"{key}.lora_B.weight": torch.ones(128, 4)}
        state |= {f"{layer}.lora_A.weight": torch.ones(4, clip), f"{layer}.lora_B.weight": torch.ones(clip, 4)}
    elif "te2" in layer and name == "sdxl":
        pytest.skip("T5 is FLUX's")
    else:
        text = {f"{layer}.lora_down.weight": torch.ones(4, clip), f"{layer}.lora_up.weight": torch.ones(clip, 4)}
        state = kohya(name) | text | {f"{layer}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "lora.safetensors")
    as_cm, as_style = both(bases, name)
    assert as_cm(tmp_path / "lora.safetensors") == 1
    assert re.search("parts for text encoders .* are left out, the", capsys.readouterr().out)
    assert as_style(tmp_path / "lora.safetensors") == 1  # onto pipelines whose first text encoder is CLIP's
    assert ("1 are left out" in capsys.readouterr().out) == ("te2" in layer)


def test_layers_of_a_lora_that_the_network_lacks_are_counted(bases, tmp_path, capsys):
    """Catches a LoRA of a larger relative, of which a part fits."""
    other = {k.replace("mid_block", "down_blocks_7"): v for k, v in kohya("sdxl").items()}
    save_file(kohya("sdxl") | other, tmp_path / "lora.safetensors")
    for read in both(bases, "sdxl"):
        assert read(tmp_path / "lora.safetensors") == 1
        assert "1 of its 2 layers are not in this unet, and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("name, state", [("sdxl", kohya("flux")), ("flux", kohya("sdxl")), ("sdxl", kohya("sdxl", width=320)),
                                         ("flux", kohya("flux", width=3072))])  # fmt: skip
def test_a_lora_of_another_model_does_not_fit(bases, tmp_path, name, state):
    """Catches AssertionErrors and KeyErrors of converters, and advice to download what is there."""
    save_file(state, tmp_path / "lora.safetensors")
    for read in both(bases, name):
        with pytest.raises(UserError, match=r"lora.safetensors does not fit .*: choose a LoRA that was made for it"):
            read(tmp_path / "lora.safetensors")


@pytest.mark.slow
def test_a_lora_is_found_where_it_is_named(bases, tmp_path, monkeypatch):
    """Catches the first of several files, a file that is taken for a hub id, and a hub id that is not looked for in the cache."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for file in ("b.safetensors", "a.safetensors"):
        save_file(kohya("sdxl"), folder / file)
    snapshot = shutil.copytree(folder, tmp_path / "snapshot")
    shutil.copy(folder / "a.safetensors", snapshot / headers.LORA_NAME)

    def download(repository, file):
        if repository != "someone/lora" or not (snapshot / file).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: Path(download(name, headers.LORA_NAME)).parent)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora.bin").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:100])
    refused = {
        str(folder): r"loras has several files \(a.safetensors, b.safetensors\): name one, as \S+loras/a.safetensors",
        f"{tmp_path}/empty": "empty has no .safetensors file of a LoRA",
        f"{tmp_path}/lora.bin": "lora.bin is no .safetensors file, and no other is read",
        f"{tmp_path}/cut.safetensors": "cut.safetensors is truncated or damaged .*: copy it again",
        f"{tmp_path}/no.safetensors": "no.safetensors does not exist",
        "no.safetensors": "no.safetensors does not exist",
        "loras/no.safetensors": "loras/no.safetensors does not exist",
        "someone/other": "someone/other is neither here nor to be had .* run `hf download someone/other`",
        "someone/lora/c.safetensors": "c.safetensors is neither here .* run `hf download someone/lora c.safetensors`",
        f"{bases['sdxl']}/unet": "holds no LoRA: choose another",
    }
    for read in both(bases, "sdxl"):
        for lora, says in refused.items():
            with pytest.raises(UserError, match=says) as caught:
                read(lora)
            assert "hf download` made" not in str(caught.value)
        for lora in (folder / "b.safetensors", snapshot, "someone/lora", "someone/lora/a.safetensors"):
            assert read(lora) == 1


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu"])
def test_a_device_that_is_not_here_is_one_sentence(bases, tmp_path, device):
    """Catches an AssertionError of torch after minutes of loading."""
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    for use in (
        lambda: pipeline.load_pipeline(tmp_path, device=device),
        lambda: pipeline.load_16bit(tmp_path, cm=True, device=device),
        lambda: encoders.VAE("sdxl", str(bases["sdxl"]), device=device),
        lambda: encoders.Text("sdxl", str(bases["sdxl"]), device=device),
        lambda: pretrained.load_network("sdxl", weights="random", device=device),
    ):
        with pytest.raises(UserError, match=f"torch finds no device {device}: give device cpu"):
            use()


def test_what_a_hub_id_s_files_lack_is_not_called_a_missing_download(bases, tmp_path, monkeypatch):
    """Catches "run hf download" for files that are on this machine and do not fit."""
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "load_config", lambda *args, **more: bad())

    def bad():
        raise ValueError("shapes do not fit")

    with pytest.raises(UserError, match=r"could not be read from someone/base .shapes do not fit"):
        pretrained.load_network("sdxl", "someone/base")
