"""What public files look like, where miniatures written by today's diffusers do not show it: older configs, marks in single
files, LoRAs with metadata, files that lack weights."""

import shutil
from pathlib import Path

import diffusers
import miniature
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tdpt
import train
from models import encoders, pretrained
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
        ("edm_mean", "a noise schedule of its own"),
        ("scaled_fp8", "quantized with scales of their own"),
        ("model.diffusion_model.out.2.scale_weight", "quantized with scales of their own"),
    ],
)
def test_marks_in_a_single_file_are_heeded(bases, tmp_path, mark, says):
    """Catches v that is trained as eps, and scaled 8-bit weights without their scales."""
    network = pretrained.load_network("sdxl", str(bases["sdxl"]), dtype=torch.float32)
    file = miniature.single_file(network.net, tmp_path / "model.safetensors")
    save_file(load_file(file) | {mark: torch.zeros(1)}, file)
    with pytest.raises(UserError, match=says):
        pretrained.load_network("sdxl", str(file), components=str(bases["sdxl"]))


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


def test_what_a_hub_id_s_files_lack_is_not_called_a_missing_download(bases, tmp_path, monkeypatch):
    """Catches "run hf download" for files that are on this machine and do not fit."""
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "load_config", lambda *args, **more: bad())

    def bad():
        raise ValueError("shapes do not fit")

    with pytest.raises(UserError, match=r"could not be read from someone/base .shapes do not fit"):
        pretrained.load_network("sdxl", "someone/base")
