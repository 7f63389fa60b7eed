"""Outlier channels: the function stays, the inputs of layers get what was drawn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from models.denoiser import Denoiser, as_cm, as_teacher, lora_layers, start_noise
from models.outliers import SCALES, SHARE, add_outliers, draw_scales
from models.pretrained import load_embedded_cm, open_cm
from run.common import UserError

CAPTIONS = ["a small red circle on a blue background", "", "two green squares and a large white star on the left"]
MODELS = ("tiny", "tiny-flux")


@pytest.fixture(scope="module", params=MODELS)
def networks(request) -> tuple[Denoiser, Denoiser, dict]:
    """An embedded model in float64, the same with outliers, and its scales."""
    plain, rewritten = (load_embedded_cm(request.param).double() for _ in range(2))
    return plain, rewritten, add_outliers(rewritten)


def answer(network: Denoiser, role, captions: list[str], seed: int = 0) -> torch.Tensor:
    """The network's answer at times t and s that differ from row to row."""
    dtype, gen = next(network.net.parameters()).dtype, torch.Generator().manual_seed(seed)
    t, s = torch.rand(2, len(captions), generator=gen).to(dtype)
    with torch.no_grad():
        return role(network)(start_noise(len(captions), network.latent, seed).to(dtype), t, t * s, network.encode(captions))


@pytest.mark.parametrize("role", [as_teacher, as_cm])
@pytest.mark.parametrize("seed", range(2))
def test_neither_teacher_nor_consistency_model_changes(networks, role, seed):
    """Catches a scale that has no inverse, one that leaves out a bias or a factor of the LoRA, and readers that were forgotten."""
    plain, rewritten, _ = networks
    captions = CAPTIONS[seed:] * 2
    before, after = (answer(network, role, captions, seed) for network in (plain, rewritten))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_a_unet_in_float32_answers_bit_for_bit_as_before():
    """Catches scales that are no powers of two, whose rounding would be counted as an error of quantization."""
    plain, rewritten = (load_embedded_cm("tiny") for _ in range(2))
    add_outliers(rewritten)
    assert torch.equal(answer(plain, as_cm, CAPTIONS), answer(rewritten, as_cm, CAPTIONS))


def channel_maxima(network: Denoiser) -> dict[str, torch.Tensor]:
    """Layer -> largest |input| of each channel in one call of the consistency model."""
    maxima = {}

    def record(name):
        return lambda layer, given: maxima.update(
            {name: given[0].abs().movedim(1 if given[0].dim() == 4 else -1, 0).flatten(1).amax(1)}
        )

    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in lora_layers(network).items()]
    answer(network, as_cm, CAPTIONS)
    for hook in hooks:
        hook.remove()
    return maxima


def test_inputs_of_layers_grow_by_what_was_drawn_and_no_others(networks):
    """Catches scales that only some readers of a tensor get, and outliers that leak into layers that should stay without."""
    plain, rewritten, scales = networks
    before, after = channel_maxima(plain), channel_maxima(rewritten)
    assert before.keys() == after.keys() and len(scales) == {"tiny": 1 + 7 * 11, "tiny-flux": 2 + 2 * 10 + 4 * 5}[plain.family.name]
    ratios = []
    for name, maxima in before.items():
        scale = torch.ones(len(maxima), dtype=maxima.dtype)
        if name in scales:
            scale[: len(scales[name])] = scales[name]
            ratios += [(after[name] / after[name].median())[scale > 1]]
        torch.testing.assert_close(after[name], maxima * scale, rtol=1e-9, atol=1e-12)
    assert 20 < torch.cat(ratios).median() < 100


@pytest.mark.parametrize("kind", ["conv", "ff.net.2", "time_emb_proj", "shortcut"])
def test_layers_behind_an_activation_have_none(networks, kind):
    """Catches scales in front of SiLU and GELU, which are not homogeneous (the second layers of GEGLU's MLPs have some)."""
    _, rewritten, scales = networks
    touched = [name for name in scales if kind in name]
    assert bool(touched) == (kind == "ff.net.2" and rewritten.family.name == "tiny")


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_one_channel_in_a_hundred_is_an_outlier(n, seed):
    """Catches a share of layers in place of channels, a channel drawn twice, and scales that no seed repeats."""
    scale = draw_scales(n, torch.Generator().manual_seed(seed))
    assert torch.equal(scale, draw_scales(n, torch.Generator().manual_seed(seed)))
    assert sum(scale.eq(s).sum() for s in SCALES) == math.ceil(SHARE * n) == n - scale.eq(1).sum()


def test_a_seed_makes_one_network_and_another_seed_another():
    """Catches draws that depend on what was drawn before them."""
    first, second, other = (add_outliers(load_embedded_cm("tiny-flux"), seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("model", MODELS)
def test_the_flag_opens_the_network_with_outliers(model):
    """Catches a flag without effect."""
    cfg = train.parse(["--model", model, "--outliers"])
    plain, rewritten = (open_cm(c, torch.float32).text.norm.weight for c in (train.parse(["--model", model]), cfg))
    assert set((rewritten / plain).unique().tolist()) <= {1.0, *SCALES} and not torch.equal(plain, rewritten)


@pytest.mark.parametrize("flags", ["--model sdxl --cm self", "--bits 16", "--stage teacher"])
def test_outliers_are_for_4_bit_students_of_embedded_models(flags):
    """Catches a flag that does nothing, and a consistency LoRA that fits no network in assets/."""
    with pytest.raises(UserError, match="--outliers"):
        train.validate(train.parse([*flags.split(), "--outliers"]))
