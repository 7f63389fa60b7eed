"""models/: tokens, layer policy on the real SDXL and FLUX shapes, the 16-bit LoRA, and files."""

import copy
import re

import miniature
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from data import scenes
from models import tiny
from models.denoiser import Denoiser, add_lora, as_cm, as_teacher, float_layers, fuse, lora_layers, random_denoiser
from models.family import FAMILIES
from models.pretrained import load_teacher
from run.common import UserError, run_script, step_generator

SDXL = dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), layers_per_block=2, use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(5, 10, 20),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def small(name: str, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return random_denoiser(name).eval().requires_grad_(False)


def ask(model, denoiser, seed: int = 1, s: float = 0.5):
    gen = torch.Generator().manual_seed(seed)
    x, edges = torch.randn(2, *denoiser.latent, generator=gen), denoiser.path.grid(4)
    with torch.no_grad():
        return model(x, edges[1].expand(2), edges[1 + int(2 * s)].expand(2), denoiser.encode(["a red ring", "blue"]))


def test_words_of_the_scenes_have_buckets_of_their_own():
    """Catches a bucket count or hash under which two words of the vocabulary would be one word."""
    kinds = scenes.SHAPES, scenes.COLORS, scenes.SIZES, scenes.PATTERNS, scenes.PLACES, scenes.BACKGROUNDS, scenes.TEXTURES
    buckets = [tiny.tokenize([word])[0, 0, 0].item() for kind in kinds for word in kind]
    assert len(set(buckets)) == len(buckets) and 0 not in buckets


def test_clause_tells_two_objects_apart():
    """Catches a tokenizer that forgets clauses: both captions have the same words."""
    a, b = tiny.tokenize(["a red ring on the left and a blue square", "a blue ring on the left and a red square"])
    assert not torch.equal(a, b)
    assert a[:3, 1].tolist() == [0, 0, 0] and a[3:5, 1].tolist() == [1, 1]


def test_policy_on_sdxl_leaves_only_edges_and_embeddings_at_16_bit():
    """743 linears and 51 convolutions of the real SDXL UNet; catches a rule written for the tiny model's names only."""
    with torch.device("meta"):
        net = UNet2DConditionModel(**SDXL)
    layers = float_layers(net)
    kinds = {name: FAMILIES["sdxl"].precision(name) for name in layers}
    assert sum(isinstance(layer, torch.nn.Linear) for layer in layers.values()) == 743
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers.values()) == 51
    embeddings = {f"{which}_embedding.linear_{i}" for which in ("time", "add") for i in (1, 2)}
    assert {n for n, k in kinds.items() if k == "16bit"} == {"conv_in", "conv_out"} | embeddings
    assert all(name.endswith("time_emb_proj") for name, kind in kinds.items() if kind == "w4a16")
    assert sum(kind == "w4a16" for kind in kinds.values()) == 17


def test_policy_on_flux_makes_every_modulation_w4a16():
    """The real FLUX: 3.25 B of 11.90 B parameters are modulations; catches a modulation that slipped to W4A4 or 16 bit."""
    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True)
    layers = float_layers(net)
    count = {"16bit": 0, "w4a16": 0, "w4a4": 0}
    for name, layer in layers.items():
        count[FAMILIES["flux"].precision(name)] += layer.weight.numel()
    assert abs(count["w4a16"] / 1e9 - 3.25) < 0.03
    assert count["16bit"] / sum(count.values()) < 0.01
    edges = {n.split(".")[0] for n in layers if FAMILIES["flux"].precision(n) == "16bit"}
    assert edges == {"x_embedder", "time_text_embed", "proj_out"}


@pytest.mark.parametrize("name", miniature.EMBEDDED)
def test_lora_off_is_the_teacher_and_fused_is_lora_on(name):
    """Catches a switch that leaves part of the network on, and a fused weight that is not W + B A."""
    plain = small(name)
    network = copy.deepcopy(plain)
    add_lora(network, 4)
    for layer in lora_layers(network).values():
        layer.lora_B.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    teacher, cm = ask(as_teacher(network), network), ask(as_cm(network), network)
    assert torch.equal(teacher, ask(as_teacher(plain), plain))
    assert (cm - teacher).abs().max() > 1e-3
    fused = fuse(network)
    torch.testing.assert_close(ask(fused, fused), cm, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", miniature.EMBEDDED)
def test_only_the_consistency_model_depends_on_the_destination(name):
    """Catches a teacher that sees s, and a consistency model that does not."""
    network = small(name)
    add_lora(network, 4)
    for layer in lora_layers(network).values():
        layer.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    for model, depends in ((as_teacher(network), False), (as_cm(network), True)):
        assert torch.equal(ask(model, network, s=0.5), ask(model, network, s=1.0)) != depends


@pytest.mark.parametrize("name", miniature.EMBEDDED)
def test_pictures_survive_the_latents(name):
    """Catches a wrong scale or shuffle order, and latents that are not of the shape that the network was built for."""
    family = FAMILIES[name]
    x = torch.rand(3, 3, family.side, family.side) * 2 - 1
    latents = tiny.to_latents(x, family.latent[0])
    assert latents.shape[1:] == family.latent
    torch.testing.assert_close(tiny.to_pictures(latents), x)


def test_missing_truncated_and_foreign_teacher_are_one_sentence(tmp_path):
    """Catches a traceback where the user needs the command that mends it."""
    with pytest.raises(UserError, match=r"does not exist: make it with `python train.py --model tiny --stage teacher`"):
        load_teacher("tiny", str(tmp_path / "none.safetensors"))
    path = tmp_path / "teacher.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with pytest.raises(UserError, match="holds no tiny teacher"):
        load_teacher("tiny", str(path))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_teacher("tiny", str(path))


def test_no_two_captions_of_different_scenes_encode_alike():
    """Catches an encoding that loses an attribute: distinct captions have distinct bags of (word, clause)."""
    gen = step_generator(5, 0)
    scene = scenes.random_scenes(400, gen)
    captions = {scenes.caption_of(scene, i) for i in range(400)}
    bags = {tuple(sorted(map(tuple, ids.tolist()))) for ids in tiny.tokenize(sorted(captions))}
    assert len(bags) == len(captions)
    assert all(re.fullmatch(r"[a-z ,]+", caption) for caption in captions)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_full_memory_is_one_sentence(capsys, monkeypatch, error):
    """Catches a traceback of CUDA or of the CPU's allocator, and an exit code that a scheduler takes for success."""

    def main(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and "--memory-limit" in said


def test_other_errors_keep_their_traceback(monkeypatch):
    """Catches a defect of ours that is called full memory."""

    def main(argv):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_script("train.py", main)
