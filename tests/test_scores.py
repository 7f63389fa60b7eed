"""scores.py and the part of evaluate.py that scores models with public weights, on stand-ins of the real classes."""

import argparse
import importlib.util
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import diffusers
import huggingface_hub
import miniature
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_real import finished, real, shared_simulations  # noqa: F401  (fixtures)
from test_report import pictures_of_page

import evaluate
import scores
from data import sources
from models import pipeline
from models.denoiser import start_noise
from models.family import FAMILIES
from run import files
from run.common import UserError

PROMPTS = ["a small red house", "a large green tree on the left, " * 40, "a cat"]
OPTIONS = dict(device="cpu", seed=0, metrics="", real="", inception="", clip="", pickscore="", icnet="")


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**OPTIONS | given)


def picture(seed: int, side: int = 64) -> Image.Image:
    """Noise with some structure."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def folder_of(folder: Path, pictures: list[Image.Image]) -> Path:
    folder.mkdir()
    for i, each in enumerate(pictures):
        each.save(folder / f"{i:05}.png")
    return folder


def bytes_of(*pictures: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(each) for each in pictures])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def torch_fidelity():
    """Its Inception's module, or None where it is not installed. It needs torchvision when it is imported, and torchmetrics then
    does too; nothing of that is called here, so that an empty stand-in will do."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return None
    with pytest.MonkeyPatch.context() as patch:
        absent = importlib.util.find_spec("torchvision") is None
        for name in (" datasets models transforms transforms.functional".split(" ")) if absent else ():
            stand_in = types.ModuleType(f"torchvision.{name}".rstrip("."))
            stand_in.__spec__ = importlib.machinery.ModuleSpec(stand_in.__name__, None)
            stand_in.__getattr__ = lambda key: type(key, (), {})
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
            if name:
                parent, _, child = stand_in.__name__.rpartition(".")
                setattr(sys.modules[parent], child, stand_in)
        importlib.import_module("torchmetrics.image.lpip")
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


# ------------------------------------------------------------------------------------------------ formulas


def by_eigenvalues(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frechet distance with a symmetric root: tr (S S')^1/2 = tr (S^1/2 S' S^1/2)^1/2."""
    S, T = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(S)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ T @ root).clip(0)).sum()
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    return apart + np.trace(S) + np.trace(T) - 2 * cross


@pytest.mark.parametrize("n, m, d", [(200, 300, 16), (5, 9, 16), (40, 7, 16), (2, 2, 3)])
def test_frechet_distance_is_that_of_the_formula_and_of_torchmetrics(n, m, d):
    """Catches covariances over N, uncentred features, and sets with fewer pictures than features."""
    gen = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, d, generator=gen), 1 + 2 * torch.randn(m, d, generator=gen) @ torch.randn(d, d, generator=gen)
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = torch.nn.Identity()
    network.num_features = d
    theirs = FrechetInceptionDistance(network)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    assert scores.frechet(a, b) == pytest.approx(by_eigenvalues(a, b), rel=1e-5)
    assert scores.frechet(a, b) == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert scores.frechet(a, a) == pytest.approx(0, abs=1e-9 * scores.frechet(a, b))


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Catches variances for standard deviations: N(0, 1) against N(1, 4) in d dimensions is d (1 + 1)."""
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(40_000, 128, generator=gen), 1 + 2 * torch.randn(40_000, 128, generator=gen)
    assert abs(scores.frechet(a, b) - 2 * 128) < 6


def test_psnr_is_ten_log_of_peak_over_error():
    """Catches a wrong peak: a uniform error of 0.02 on values in [-1, 1] is 40 dB."""
    assert abs(scores.psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.02)) - 40.0) < 1e-4


def test_psnr_and_ssim_of_pictures_are_the_direct_formulas():
    """Catches pictures that are compared on another scale than the constants are for, and a window without weights."""
    a, b = picture(0), picture(1)
    x, y = (bytes_of(each).double() for each in (a, b))
    score, _ = scores.load_psnr(options())
    assert score(a, "", b) == pytest.approx(10 * math.log10(255**2 / (x - y).square().mean().item()), rel=1e-5)
    line = torch.exp(-(torch.arange(-5.0, 6) ** 2) / (2 * 1.5**2)).double()
    window = (line[:, None] * line / line.sum() ** 2).flatten()
    reflected = (torch.nn.functional.pad(each, (5, 5, 5, 5), mode="reflect")[0] for each in (x, y))
    u, v = (each.unfold(1, 11, 1).unfold(2, 11, 1).flatten(3) for each in reflected)  # (3, 64, 64, 121)
    mean_u, mean_v = u @ window, v @ window
    var_u, var_v, cov = u * u @ window - mean_u**2, v * v @ window - mean_v**2, u * v @ window - mean_u * mean_v
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_u * mean_v + c) * (2 * cov + d) / ((mean_u**2 + mean_v**2 + c) * (var_u + var_v + d))
    score, _ = scores.load_ssim(options())
    assert float(score(a, "", b)) == pytest.approx(ssim.mean().item(), rel=1e-4) and float(score(a, "", a)) == pytest.approx(1)


def test_intervals_are_those_of_known_cases():
    """Catches quantiles of the wrong tail, resamples that differ between rows, and a value that is not inside of its interval."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    value, low, high = scores.interval(lambda i: x[i].mean().item(), (400,), 2000, 0)
    half = 1.96 * x.std(correction=0).item() / 20
    assert value == pytest.approx(x.mean().item())
    assert low == pytest.approx(value - half, abs=0.1 * half) and high == pytest.approx(value + half, abs=0.1 * half)
    assert scores.interval(lambda i: (x + 3 - x)[i].mean().item(), (400,), 50, 0) == pytest.approx([3, 3, 3])
    assert scores.interval(lambda i: x[i].mean().item(), (400,), 2000, 0) == [value, low, high]
    value, low, high = scores.interval(lambda i, j: len(i.unique()) + 0.1 * len(j.unique()), (400, 9), 200, 0)
    assert value == pytest.approx(400.9) and low < value < high  # a resample has 253 different ones


# ------------------------------------------------------------------------------------------------ metric models


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of random weights as save_pretrained writes it, for pictures of 32 pixels."""
    folder, tokenizer = tmp_path_factory.mktemp("metrics") / "clip", miniature.clip_tokenizer()
    torch.manual_seed(0)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    both = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    config = transformers.CLIPConfig(
        text_config=both | ends | {"vocab_size": len(tokenizer)}, vision_config=both | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_are_cosines_by_hand(clip, tmp_path):
    """Catches an embedding that is not normalised, pictures that are normalised otherwise, prompts that are cut elsewhere, a scale
    without its exponential, and a processor that is not that of --pickscore."""
    model, tokenizer = transformers.CLIPModel.from_pretrained(clip).eval(), miniature.clip_tokenizer()
    wide = picture(3).resize((96, 64))
    small = np.array(wide.resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor((small - mean) / std).permute(2, 0, 1)[None].float()
    cosines = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= 77 else [*ids[:76], tokenizer.eos_token_id]
        with torch.no_grad():
            u = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double()
            v = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0].double()
        cosines.append((u @ v / u.norm() / v.norm()).item())
    with torch.no_grad():
        found, about = scores.load_clip(options(clip=str(clip)))
        assert [found(wide, p, None) for p in PROMPTS] == pytest.approx([100 * max(c, 0) for c in cosines], abs=1e-3)
        assert about == f"{clip} {files.fingerprint(str(clip))}"
        for file in ("model.safetensors", "config.json"):
            (tmp_path / file).write_bytes((clip / file).read_bytes())
        found, _ = scores.load_pickscore(options(pickscore=f"{tmp_path},{clip}"))
        scale = math.exp(model.logit_scale.item())
        assert [found(wide, p, None) for p in PROMPTS] == pytest.approx([scale * c for c in cosines], abs=1e-3)


@pytest.fixture(scope="module")
def inception(torch_fidelity, tmp_path_factory) -> Path:
    """Random weights in torch-fidelity's form."""
    if torch_fidelity is None:
        pytest.skip("torch-fidelity is not installed")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity, "load_state_dict_from_url", lambda *args, **more: {})
        patch.setattr(torch_fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = torch_fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    file = tmp_path_factory.mktemp("metrics") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


def test_fid_is_the_frechet_distance_in_features_of_inception(torch_fidelity, inception, tmp_path, capsys):
    """Catches features of another layer, FID to the run's own pictures, a row "real" that is scored as a model, and torchmetrics'
    resizing, which is not TensorFlow's."""
    network = torch_fidelity.FeatureExtractorInceptionV3("hand", ["2048"], feature_extractor_weights_path=str(inception))
    sets = {"real": [picture(i, 40) for i in range(4)], "cm": [picture(i) for i in range(10, 13)]}
    sets["ours"] = [picture(i) for i in range(20, 23)]
    rows = {name: scores.pictures_of(str(folder_of(tmp_path / name, pictures))) for name, pictures in sets.items()}
    where = options(real=str(tmp_path / "real"), inception=str(inception), metrics="fid,fid_cm")
    assert scores.runnable(where, with_cm=True) == ["fid", "fid_cm"]
    found = scores.report({name: rows[name] for name in ("cm", "ours")} | {"same": rows["cm"]}, PROMPTS, ["fid", "fid_cm"], where)
    by_hand = {name: network(bytes_of(*pictures))[0] for name, pictures in sets.items()}
    for row in ("cm", "ours"):
        assert found["scores"][row]["fid"] == pytest.approx(by_eigenvalues(by_hand[row], by_hand["real"]), rel=1e-3)
    value = by_eigenvalues(by_hand["ours"], by_hand["cm"])
    assert found["scores"]["ours"]["fid_cm"] == pytest.approx(value, rel=1e-3) and found["scores"]["cm"]["fid_cm"] < 1e-9
    value, low, high = found["versus"]["ours"]["fid"]
    assert value == found["scores"]["ours"]["fid"] - found["scores"]["cm"]["fid"] and low < high
    assert found["versus"]["same"]["fid"] == [0, 0, 0] and "cm" not in found["versus"]
    assert found["metrics"]["fid"].startswith("sha256 ") and "lies too high" in capsys.readouterr().out


def test_inception_is_not_fetched_and_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    """Catches a download that nobody asked for, and a pickle that is loaded with all that it calls, as torch-fidelity would, for
    which a module of the same names stands here."""
    package, extractor = (types.ModuleType(f"torch_fidelity{part}") for part in ("", ".feature_extractor_inceptionv3"))
    extractor.URL_INCEPTION_V3 = "https://example.org/weights-inception-2015-12-05-6726825d.pth"
    extractor.FeatureExtractorInceptionV3 = lambda name, features, feature_extractor_weights_path: torch.load(
        feature_extractor_weights_path, weights_only=False
    )
    for module in (package, extractor):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"run `curl -L --create-dirs -o \S+weights-inception-2015-12-05-6726825d.pth https"):
        scores.load_inception(options())
    torch.save({"conv": Code()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="weights cannot be read"):
        scores.load_inception(options(inception=str(tmp_path / "code.pth")))


class Code:
    """A pickle that is run when it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_icnet_sees_pictures_as_ic9600_prepares_them(tmp_path, as_tuple):
    """Catches values in [-1, 1], another size, and the map that ICNet gives beside its score."""

    class Net(torch.nn.Module):
        def forward(self, x):
            score = torch.sigmoid((x[:, 0] - 2 * x[:, 1, :1, :1]).mean((1, 2)))
            return (score, x[:, 0]) if as_tuple else score

    torch.jit.trace(Net(), torch.zeros(1, 3, 512, 512)).save(tmp_path / "icnet.pt")
    score, about = scores.load_icnet(options(icnet=str(tmp_path / "icnet.pt")))
    x = np.array(picture(5, 600).resize((512, 512), Image.Resampling.BILINEAR)) / 255
    red, green = (x[:, :, 0] - 0.485) / 0.229, (x[0, 0, 1] - 0.456) / 0.224
    assert score(picture(5, 600), "", None) == pytest.approx(1 / (1 + np.exp(2 * green - red.mean())), abs=1e-5)
    assert about.startswith("sha256 ")
    with pytest.raises(UserError, match="give a TorchScript file that maps"):
        scores.load_icnet(options(icnet=str(tmp_path / "none.pt")))


def test_lpips_is_the_distance_by_hand(monkeypatch):
    """Catches pictures in [0, 1]. AlexNet has random weights, the weights of LPIPS' own layers are torchmetrics'."""
    lpips = importlib.import_module("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    layers = torch.nn.Sequential(
        conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2), conv(192, 384, 3, padding=1),
        relu(), conv(384, 256, 3, padding=1), relu(), conv(256, 256, 3, padding=1), relu(), pool(3, 2),
    )  # fmt: skip
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *args: layers)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    score, _ = scores.load_lpips(options())
    a, b = picture(6), picture(7)
    heads = torch.load(Path(lpips.__file__).parent / "lpips_models" / "alex.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, total, level = ((bytes_of(a, b) / 127.5 - 1) - shift[:, None, None]) / scale[:, None, None], 0.0, 0
    for layer in layers[:12]:
        x = layer(x)
        if isinstance(layer, relu):
            u, v = (each / each.norm(dim=0) for each in x)
            total += ((u - v).square() * heads[f"lin{level}.model.1.weight"][0]).sum(0).mean().item()
            level += 1
    assert score(a, "", b) == pytest.approx(total, rel=1e-3) and total > 0


def test_packages_are_asked_for_prompt_and_picture_as_they_want_them(monkeypatch):
    """Catches arguments in the other order, another version of HPS, and weights that are read for every picture."""
    calls, ImageReward, hpsv2 = [], types.ModuleType("ImageReward"), types.ModuleType("hpsv2")
    reward = types.SimpleNamespace(score=lambda prompt, image: len(prompt) + image.width)
    ImageReward.load = lambda name, device: calls.append((name, device)) or reward
    hpsv2.img_score = types.ModuleType("hpsv2.img_score")
    hpsv2.img_score.model_dict = {}

    class Network(torch.nn.Linear):
        def forward(self, image, text):
            return {"image_features": image.mean((2, 3)), "text_features": text}

    def score(image, prompt, hps_version):
        calls.append(hps_version)
        hpsv2.img_score.model_dict |= {"model": Network(1, 1), "preprocess_val": lambda p: bytes_of(p)[0] / 255.0}

    hpsv2.img_score.score, hpsv2.img_score.get_tokenizer = (
        score,
        lambda name: lambda texts: torch.tensor([[len(texts[0]), 0.0, 1.0]]),
    )
    for module in (ImageReward, hpsv2, hpsv2.img_score):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found, _ = scores.load_imagereward(options())
    assert found(picture(1), "four", None) == 68
    found, _ = scores.load_hpsv2(options())
    means = bytes_of(picture(1)).float().mean((2, 3))[0] / 255
    for prompt in ("four", "a prompt"):
        assert found(picture(1), prompt, None) == pytest.approx((means[0] * len(prompt) + means[2]).item(), rel=1e-5)
    assert calls == [("ImageReward-v1.0", "cpu"), "v2.1"] and not hpsv2.img_score.model_dict  # nothing stays on the GPU


def test_what_cannot_run_says_what_to_do(clip, tmp_path, monkeypatch, capsys):
    """Catches a traceback, a metric that is left out without a word, and one that is asked for and left out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("ImageReward", "hpsv2", "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    folder_of(tmp_path / "real", [picture(0), picture(1)])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((clip / "config.json").read_bytes())
    transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(clip)).vision_model.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "config.json").write_bytes((clip / "config.json").read_bytes())
    needs = {
        "fid": "give a folder of real pictures by --real FOLDER",
        "clip": f"{tmp_path}/half lacks .* tensors of a CLIP",
        "pickscore": "run `hf download nobody/nothing`",
        "imagereward": "run `pip install image-reward`",
        "hpsv2": "run `pip install hpsv2`",
        "lpips": "run `pip install torchvision`",
        "ic": "give ICNet as a TorchScript file by --icnet FILE",
    }
    where = dict(clip=str(tmp_path / "half"), pickscore="nobody/nothing")
    assert scores.runnable(options(**where), with_cm=True) == ["psnr", "ssim"]
    said = capsys.readouterr().out
    for name, sentence in (needs | {"fid_cm": "run `pip install torch-fidelity torchvision`"}).items():
        assert re.search(f"^without {name}: .*{sentence}", said, re.MULTILINE), said
        with pytest.raises(UserError, match=f"{name} cannot run: .*{sentence}"):
            scores.runnable(options(**where, metrics=f"psnr,{name}"), with_cm=True)
    with pytest.raises(UserError, match="--metrics fidd is none of ours: choose from fid, "):
        scores.runnable(options(metrics="psnr,fidd"), with_cm=True)
    with pytest.raises(UserError, match="psnr cannot run: it compares with the 16-bit consistency model: let --models have cm"):
        scores.runnable(options(metrics="psnr"), with_cm=False)


def test_pictures_are_paired_by_their_numbers(tmp_path):
    """Catches 10.png before 2.png, a picture that is missing, one of another size and one that is damaged."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(11):
        picture(i).save(folder / f"{i}.png")
    (folder / "notes.txt").touch()
    assert [path.stem for path in scores.numbered(str(folder), 11)] == [str(i) for i in range(11)]
    for n in (10, 12):
        with pytest.raises(UserError, match=f"has 11 numbered pictures where {n} are compared"):
            scores.numbered(str(folder), n)
    rows = {name: scores.pictures_of(str(folder_of(tmp_path / name, [picture(1, side)]))) for name, side in (("cm", 64), ("b", 32))}
    with pytest.raises(UserError, match=r"pixels and cm's picture .*: draw both in one size"):
        scores.report(rows, ["a"], ["psnr"], options())
    rows["b"][0].write_bytes(rows["b"][0].read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be read .*: delete it, and draw it again"):
        scores.report(rows, ["a"], ["psnr"], options())


# ------------------------------------------------------------------------------------------------ the command

EACH_FAMILY = [name if name == "sd15" else pytest.param(name, marks=pytest.mark.slow) for name in miniature.PUBLIC]


def stock_pictures(name: str, base: str, cm: str) -> list[torch.Tensor]:
    """What diffusers alone draws from the noise of seed 7: (by the base, by its consistency model), (3, H, W) uint8."""
    family, drawn = FAMILIES[name], []
    for steps, guidance in ((25, family.compare_guidance), (2, family.few_step_guidance(3.5))):
        pipe = diffusers.DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if steps == 2:
            pipe.load_lora_weights(cm)
            pipe.fuse_lora()
            config = dict(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=0)
            pipe.scheduler = (
                diffusers.FlowMatchEulerDiscreteScheduler(shift=family.path(dict(pipe.scheduler.config), (16, 8, 8)).shift)
                if name == "flux"
                else diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **config)
            )
        x_T = family.pack(pipe, start_noise(1, (family.latent[0], 8, 8), 7))
        call = dict(num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, latents=x_T)
        drawn.append(bytes_of(*pipe(PROMPTS[0], **call).images)[0])
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_a_run_is_scored_beside_the_models_that_it_came_from(real, finished, clip, tmp_path, capsys, monkeypatch, name):  # noqa: F811
    """Catches a base with the scheduler or guidance of the other, a consistency model without its LoRA, noises that differ between
    rows, a drawing that was killed and begins anew or goes on otherwise, and numbers that are not those of the pictures."""
    flags = dict(zip(real[name].split()[::2], real[name].split()[1::2], strict=True))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    folder_of(tmp_path / "theirs", [picture(i) for i in range(3)])
    command = f"--checkpoint {finished[name]} --prompts {tmp_path}/prompts.txt --n 3 --steps 2 --seed 7 --clip {clip}"
    command = f"{command} --metrics clip,psnr,ssim --pictures theirs={tmp_path}/theirs".split()
    monkeypatch.setattr(pipeline, "FAST", torch.float32)  # in which diffusers' own sums and ours differ by nothing that is seen
    draw, drawn = pipeline.draw_with_pipeline, []

    def killed(*args):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(args[3])
        return draw(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "draw_with_pipeline", killed)
        evaluate.main([*command, "--out", str(tmp_path / "e")])
    assert drawn == [7, 8, 9, 7] and len(list((tmp_path / "e").rglob("*.png"))) == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*.png")}
    evaluate.main([*command, "--out", str(tmp_path / "e")])
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    said, found = capsys.readouterr().out, json.loads((tmp_path / "e" / "scores.json").read_text())
    assert list(found["scores"]) == ["base", "cm", "ours", "theirs"] and found["n"] == 3 and found["steps"] == 2
    ours = {row: [Image.open(path) for path in sorted((tmp_path / "e" / row).glob("*.png"))] for row in evaluate.MODELS}
    for row, picture_ in zip(("base", "cm"), stock_pictures(name, flags["--teacher"], flags["--cm"]), strict=True):
        assert (bytes_of(ours[row][0])[0].int() - picture_).abs().float().mean() < 0.01, row
    pipe = pipeline.load_pipeline(finished[name])
    again = draw(pipe, PROMPTS, 2, 7)
    assert torch.equal(((again + 1) * 127.5).round().byte(), bytes_of(*ours["ours"]))
    score, _ = scores.load_psnr(options())
    of_pairs = [score(a, "", b) for a, b in zip(ours["ours"], ours["cm"], strict=True)]
    assert found["scores"]["ours"]["psnr"] == pytest.approx(sum(of_pairs) / 3) and found["scores"]["cm"]["psnr"] == 100
    value, low, high = found["versus"]["theirs"]["clip"]
    assert value == pytest.approx(found["scores"]["theirs"]["clip"] - found["scores"]["cm"]["clip"]) and low <= value <= high
    assert f"{found['scores']['ours']['ssim']:.3f}" in said and "theirs - cm" in said and "ours to cm" in said
    monkeypatch.setattr(pipeline, "load_pipeline", None)  # all is drawn
    monkeypatch.setattr(pipeline, "load_16bit", None)
    evaluate.main([*command, "--out", str(tmp_path / "e"), "--json", str(tmp_path / "q.json")])
    assert json.loads((tmp_path / "q.json").read_text()) == found
    run = shutil.copytree(finished[name], tmp_path / "run")
    shutil.copytree(tmp_path / "e", run / "evaluation")
    evaluate.main(["report", str(run)])
    shown = pictures_of_page((run / "report.html").read_text())
    assert all(shown[f"{row}: {PROMPTS[i].strip()}"] == picture_.tobytes() for row in ours for i, picture_ in enumerate(ours[row]))
    assert len(shown) == 9


@pytest.mark.slow
def test_what_the_command_refuses_is_one_sentence(real, finished, clip, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Catches pictures of two configurations in one folder, prompts that are used twice, rows of one name, flags that are ignored,
    a run of random weights that is compared with a base, and all that is drawn before it is noticed."""
    run = finished["flux"]
    monkeypatch.setattr(pipeline, "draw_with_pipeline", lambda *args: torch.zeros(1, 3, 8, 8))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "others.txt").write_text("\n".join(PROMPTS[::-1]))
    folder_of(tmp_path / "two", [picture(0), picture(1)])
    first = f"--checkpoint {run} --models ours --metrics clip --clip {clip} --out {tmp_path}/e --seed 7 --n 2"
    first = f"{first} --prompts {tmp_path}/prompts.txt".split()
    evaluate.main(first)
    evaluate.main([*first, "--n", "3"])  # more pictures of the same
    assert len(list((tmp_path / "e" / "ours").glob("*.png"))) == 3
    about = files.read_config(run)
    for name, change in (("random", {"weights": "random"}), ("embedded", {"model": "tiny"})):
        files.write_json(tmp_path / name / "config.json", about | {"config": about["config"] | change})
    random = f"--checkpoint {tmp_path}/random --models cm"
    cases = {
        "e/ours holds a run with another seed: choose another --out, or delete the folder, or go on with --seed 7": "--seed 8",
        "another steps: .* or go on with --steps 2": "--steps 1",
        "holds a run with another list of prompts: choose another --out": f"--prompts {tmp_path}/others.txt",
        "prompts.txt has 3 prompts where 4 are needed: give a smaller --n": "--n 4",
        "--n 1 is too few to compare": "--n 1",
        "nowhere is no folder": "--prompts nowhere",
        "--models theirs is none of ours: choose from base,cm,ours": "--models theirs",
        "has 2 numbered pictures where 3 are compared": f"--n 3 --pictures a={tmp_path}/two",
        "--pictures ours=FOLDER cannot be the name of another row": f"--pictures ours={tmp_path}/two",
        "--pictures a=FOLDER cannot be the name of another row": f"--pictures a={tmp_path}/two --pictures a={tmp_path}/e/ours",
        "--teacher is for the models that ship: leave it out": "--teacher none",
        "ic cannot run: give ICNet": "--metrics ic --models base",
        "made from random weights and has no 16-bit models to draw with: give --models ours": random,
        "--prompts is for models with public weights: leave it out": f"--checkpoint {tmp_path}/embedded",
    }
    for sentence, flags in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            evaluate.main([*first, *flags.split()])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "e" / "base").exists()
    capsys.readouterr()
    assert evaluate.chosen_models(argparse.Namespace(models=""), {"weights": "random"}) == ["ours"]
    assert "rows base and cm are left out" in capsys.readouterr().out


def test_prompts_that_a_run_was_trained_on_are_named_as_such(tmp_path):
    """Catches a score on the captions of training that is shown like any other."""
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "same.txt").write_text("one\ntwo")
    (tmp_path / "b.txt").write_text("three\nfour")
    ours, own = sources.captioned(""), sources.captioned(str(tmp_path / "a.txt"))
    assert evaluate.was_trained_on({"data": "prompts"}, ours) and evaluate.was_trained_on({"data": str(tmp_path / "a.txt")}, own)
    assert evaluate.was_trained_on({"data": str(tmp_path / "same.txt")}, own)
    assert not evaluate.was_trained_on({"data": str(tmp_path / "b.txt")}, own)
    assert not evaluate.was_trained_on({"data": str(tmp_path / "gone.txt")}, own) and not evaluate.was_trained_on(
        {"data": "a/b"}, ours
    )


def test_a_consistency_lora_of_the_run_itself_is_found_where_the_run_is_now(tmp_path):
    """Catches --cm self of a folder that was moved."""
    files.write_json(
        tmp_path / "run" / "config.json", {"format": files.FORMAT, "config": {"model": "sd15", "cm": "gone.safetensors"}}
    )
    assert pipeline.cm_of(tmp_path / "run") == "gone.safetensors"
    (tmp_path / "run" / "cm").mkdir()
    (tmp_path / "run" / "cm" / "sd15-cm.safetensors").touch()
    assert pipeline.cm_of(tmp_path / "run") == str(tmp_path / "run" / "cm" / "sd15-cm.safetensors")
