"""Scores of pictures that models drew for the same prompts: METRICS (for models with public weights), intervals, and the table.

    fid          Frechet distance to real pictures, in the 2048 features of Inception as torch-fidelity has it (TensorFlow's weights
                 of 2015 and TensorFlow's resizing): standard FID
    fid_cm       the same to the pictures of the 16-bit consistency model
    clip         100 max(cos, 0) of picture and prompt in CLIP, as torchmetrics defines the CLIP score
    pickscore    exp(logit_scale) cos in PickScore's CLIP
    imagereward  hpsv2    as their packages define them; HPS is of version 2.1, without autocast
    lpips, psnr, ssim     to the consistency model's picture of the same number; AlexNet; dB; window of 11 pixels, reflected borders
    ic           picture complexity by ICNet (IC9600): a TorchScript file that maps (1, 3, 512, 512) to a score or to a tuple that
                 begins with it; pictures are resized as IC9600 does, by PIL and bilinearly, and normalised as for ImageNet

`fid` and `fid_cm` are of a set of pictures; every other metric is the mean over pictures. What a metric needs, a package or
weights, is asked for when it is loaded; a metric that cannot run is a UserError with the command that helps.

Intervals are paired bootstraps over prompts: a resample takes n prompts with replacement, the same for every row, and for `fid`
also as many real pictures as there are. They are the value +- 1.96 standard deviations of the resamples, so that the distance which
pictures that occur twice in a resample add to FID does not move them. Rows are compared with `cm`, the scenes of evaluate.py with
`fp`; metrics to the pictures of that model have the interval of the value itself.

Key: N, M pictures of a set, D features, B pictures of a batch, H, W pixels.
"""

import argparse
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError

import huggingface_hub
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from data import sources
from data.sources import psnr, psnr_B  # noqa: F401  (of pictures that were drawn; exports are measured by it too)
from models import pretrained
from run import files
from run.common import UserError

RESAMPLES, RESAMPLES_OF_FID = 1000, 50  # a Frechet distance in 2048 features takes half a second
PACKAGES = {"torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity", "torchvision", "image-reward", "hpsv2"}

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), R (min(N, D), D) with R^T R the covariance), float64."""
    x_ND = x_ND.double()
    mean_D = x_ND.mean(0)
    return mean_D, torch.linalg.qr((x_ND - mean_D) / (len(x_ND) - 1) ** 0.5, mode="r").R


def frechet(a_ND: Tensor, b_MD: Tensor) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) of two sets of feature vectors, in float64. With S = R^T R, the eigenvalues of S S'
    are the squared singular values of R R'^T, which has as few rows and columns as there are pictures."""
    (mean_a, R_a), (mean_b, R_b) = _moments(a_ND), _moments(b_MD)
    traces = R_a.square().sum() + R_b.square().sum()
    return ((mean_a - mean_b).square().sum() + traces - 2 * torch.linalg.svdvals(R_a @ R_b.T).sum()).item()


def interval(statistic: Callable[..., float], sizes: tuple[int, ...], resamples: int, seed: int) -> list[float]:
    """[value, low, high]: `statistic` of all rows, and its 95% interval, value +- 1.96 sd of the resamples. It takes the indices of
    the rows that are looked at, int64, one tensor for each of the `sizes`."""
    gen = torch.Generator().manual_seed(seed)
    value = statistic(*map(torch.arange, sizes))
    found = torch.tensor([statistic(*(torch.randint(n, (n,), generator=gen) for n in sizes)) for _ in range(resamples)]).double()
    half = 1.96 * found.std().item()
    return [value, value - half, value + half]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. `load(options)` -> (score, what it is), where score(picture, prompt, cm's picture or None) is a number, or a tensor (D,)

Score = Callable[[Image.Image, str, Image.Image | None], float | Tensor]


@contextlib.contextmanager
def needs(install: str, fetch: str):
    """Errors of a package that is absent and of weights that cannot be read -> UserError with what to do."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"run `pip install {install}` ({_first_line(error)})") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
        raise UserError(f"its weights cannot be read ({_first_line(error)}): {fetch}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _pixels(picture: Image.Image, device="cpu") -> Tensor:
    """(1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device)


def _sha256(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return f"sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()}"


def load_inception(options: argparse.Namespace) -> tuple[Score, str]:
    """Features (2048,) float32, of a picture of any size."""
    with needs("torch-fidelity torchvision", ""):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    file = options.inception or str(Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name))
    fetch = f"run `curl -L --create-dirs -o {file} {URL_INCEPTION_V3}`"
    with needs("torch-fidelity torchvision", fetch):
        torch.load(file, "cpu", weights_only=True)  # torch-fidelity would also load what runs code
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file).to(options.device)
    return lambda picture, *_: network(_pixels(picture, options.device))[0][0], _sha256(file)


class Clip:
    """A CLIP of transformers and its preprocessing by PIL. clip(picture, prompt) -> cosine. spec: MODEL or MODEL,PROCESSOR, each a
    hub id or folder. UserError for what is not there, or not whole."""

    def __init__(self, name: str, spec: str, device: str):
        source, _, processor = spec.partition(",")
        with pretrained.loading_errors(f"the model of {name}", source):
            model, about = pretrained.from_pretrained(CLIPModel, source, output_loading_info=True)
        if absent := sorted(about["missing_keys"]):
            raise UserError(f"{source} lacks {absent[0]} and {len(absent) - 1} more tensors of a CLIP: choose another")
        with pretrained.loading_errors(f"the processor of {name}", processor or source):
            self.processor = CLIPProcessor.from_pretrained(processor or source, backend="pil")
        self.model, self.longest = model.float().eval().to(device), model.config.text_config.max_position_embeddings
        cached = None if Path(source).exists() else huggingface_hub.try_to_load_from_cache(source, "config.json")
        self.about = f"{source} {Path(cached).parent.name if cached else files.fingerprint(source)}"  # the revision, or a digest
        self.scale = model.logit_scale.exp().item()

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        options = dict(return_tensors="pt", padding=True, truncation=True, max_length=self.longest)
        found = self.model(**self.processor(text=[prompt], images=picture, **options).to(self.model.device))
        return (found.image_embeds * found.text_embeds).sum().item()


def load_clip(options: argparse.Namespace) -> tuple[Score, str]:
    clip = Clip("the CLIP score", options.clip, options.device)
    return lambda picture, prompt, _: 100 * max(clip(picture, prompt), 0.0), clip.about


def load_pickscore(options: argparse.Namespace) -> tuple[Score, str]:
    clip = Clip("PickScore", options.pickscore, options.device)
    return lambda picture, prompt, _: clip.scale * clip(picture, prompt), clip.about


def load_imagereward(options: argparse.Namespace) -> tuple[Score, str]:
    with needs("image-reward", "run `hf download THUDM/ImageReward --local-dir ~/.cache/ImageReward`"):
        import ImageReward

        model = ImageReward.load("ImageReward-v1.0", device=options.device)
    return lambda picture, prompt, _: model.score(prompt, picture), "ImageReward-v1.0"


def load_hpsv2(options: argparse.Namespace) -> tuple[Score, str]:
    """The package reads its gigabytes of weights again at every call, so that it is called once, and its network from then on.
    The package itself keeps it no longer: it would stay beside the models that draw."""
    with needs("hpsv2", "run `hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"):
        from hpsv2 import img_score

        img_score.score(Image.new("RGB", (224, 224)), "", hps_version="v2.1")
    network, preprocess = (img_score.model_dict.pop(key) for key in ("model", "preprocess_val"))
    img_score.model_dict.clear()
    tokenize, device = img_score.get_tokenizer("ViT-H-14"), next(network.parameters()).device

    def score(picture: Image.Image, prompt: str, _) -> float:
        found = network(preprocess(picture)[None].to(device), tokenize([prompt]).to(device))
        return (found["image_features"] * found["text_features"]).sum().item()

    return score, "HPS v2.1"


def load_lpips(options: argparse.Namespace) -> tuple[Score, str]:
    with needs("torchvision", "run the command once where there is a network, so that torchvision fetches AlexNet"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity("alex").to(options.device)
    return lambda a, _, b: network(*(_pixels(x, options.device) / 127.5 - 1 for x in (a, b))).item(), "AlexNet of torchvision"


def load_psnr(options: argparse.Namespace) -> tuple[Score, str]:
    return lambda a, _, b: psnr(*(_pixels(x) / 127.5 - 1 for x in (a, b))), ""


def load_ssim(options: argparse.Namespace) -> tuple[Score, str]:
    with needs("torchmetrics torchvision", ""):  # with torch-fidelity it imports torchvision too
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    return lambda a, _, b: ssim(*(_pixels(x).float() for x in (a, b)), data_range=255.0), ""


def load_icnet(options: argparse.Namespace) -> tuple[Score, str]:
    file, device = options.icnet, options.device
    if not file:
        raise UserError("give ICNet as a TorchScript file by --icnet FILE, see docs/real-models.md")
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def score(picture: Image.Image, *_) -> float:
        x = _pixels(picture.resize((512, 512), Image.Resampling.BILINEAR), device) / 255
        found = network((x - mean) / std)
        return (found if isinstance(found, Tensor) else found[0]).item()

    with needs("torch", "give a TorchScript file that maps (1, 3, 512, 512) to a score, see docs/real-models.md"):
        network = torch.jit.load(file, device).eval()
        score(Image.new("RGB", (8, 8)))
    return score, _sha256(file)


@dataclass(frozen=True)
class Metric:
    load: Callable[[argparse.Namespace], tuple[Score, str]]
    to_cm: bool = False  # compares with pictures of the 16-bit consistency model
    frechet: bool = False  # of a set of pictures, whose features `load` gives


METRICS = {  # a new metric is a row
    "fid": Metric(load_inception, frechet=True),
    "fid_cm": Metric(load_inception, frechet=True, to_cm=True),
    "clip": Metric(load_clip),
    "pickscore": Metric(load_pickscore),
    "imagereward": Metric(load_imagereward),
    "hpsv2": Metric(load_hpsv2),
    "lpips": Metric(load_lpips, to_cm=True),
    "psnr": Metric(load_psnr, to_cm=True),
    "ssim": Metric(load_ssim, to_cm=True),
    "ic": Metric(load_icnet),
}

# ---------------------------------------------------------------------------------------------------------------------
# Rows of pictures


def pictures_of(folder: str) -> list[Path]:
    """The files of pictures in a folder and its sub-folders; none for ""."""
    return sources.pictures_below(folder) if folder else []


def numbered(folder: str, n: int) -> list[Path]:
    """The pictures 0 to n - 1 of a folder, whose names are numbers. UserError if it has others, more or fewer."""
    found = {int(file.stem): file for file in pictures_of(folder) if file.stem.isdecimal()}
    if found.keys() != set(range(n)):
        raise UserError(f"{folder} has {len(found)} numbered pictures where {n} are compared: give 00000.png to {n - 1:05}.png")
    return [found[i] for i in range(n)]


def runnable(options: argparse.Namespace, with_cm: bool) -> list[str]:
    """The metrics that --metrics names, or all that can run; the others are printed, each with what it needs. UserError for one
    that is named and cannot run."""
    asked, able = [name for name in options.metrics.split(",") if name], []
    if unknown := sorted({*asked} - METRICS.keys()):
        raise UserError(f"--metrics {unknown[0]} is none of ours: choose from {', '.join(METRICS)}")
    for name in asked or METRICS:
        metric = METRICS[name]
        try:
            if metric.to_cm and not with_cm:
                raise UserError("it compares with the 16-bit consistency model: let --models have cm")
            if metric.frechet and not metric.to_cm and len(pictures_of(options.real)) < 2:
                raise UserError("give a folder of real pictures by --real FOLDER, thousands if you can and two at least")
            metric.load(options)
            able.append(name)
        except UserError as error:
            if asked:
                raise UserError(f"{name} cannot run: {error}") from None
            print(f"without {name}: {error}")
    return able


def opened(path: Path) -> Image.Image:
    """The RGB picture of a file that was drawn. UserError if it cannot be read."""
    try:
        return sources.open_picture(path)
    except sources.UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): delete it, and draw it again") from None


@torch.no_grad()
def measure(metric: Metric, rows: dict[str, list[Path]], prompts: list[str], options) -> tuple[dict[str, Tensor], str]:
    """({row: scores (N,), or of a set of pictures their features (N, D), float64}, what the metric is)."""
    (score, about), found = metric.load(options), {}
    for name, paths in rows.items():
        values = []
        for i, path in enumerate(tqdm(paths, name, leave=False)):
            picture, prompt, twin = opened(path), "" if metric.frechet else prompts[i], None
            if metric.to_cm and not metric.frechet and (twin := opened(rows["cm"][i])).size != picture.size:
                raise UserError(f"{path} has {picture.size} pixels and cm's picture {twin.size}: draw both in one size")
            values.append(torch.as_tensor(score(picture, prompt, twin), dtype=torch.float64, device="cpu"))
        found[name] = torch.stack(values)
    return found, about


def aggregate(metric: Metric, values: dict[str, Tensor], row: str, i: Tensor, j: Tensor) -> float:
    """The metric of the pictures i of a row, for `fid` to the real pictures j; `values` are what `measure` found."""
    if metric.frechet:
        return frechet(values[row][i], values["cm"][i] if metric.to_cm else values["real"][j])
    return values[row][i].mean().item()


def versus_cm(metric: Metric, values: dict[str, Tensor], row: str, i: Tensor, j: Tensor) -> float:
    """What a row has more than the consistency model; a metric to that model's pictures as it is."""
    return aggregate(metric, values, row, i, j) - (0 if metric.to_cm else aggregate(metric, values, "cm", i, j))


def report(rows: dict[str, list[Path]], prompts: list[str], names: list[str], options: argparse.Namespace) -> dict:
    """{"scores": {row: {metric: value}}, "versus": {row: {metric: [value, low, high]}}, "metrics": {metric: what it is}, ..}, for
    JSON. versus compares with the `reference`, cm; metrics in `to_reference` compare by themselves. rows: {name: N pictures}.
    Without a row "cm" versus is empty."""
    n, real = len(prompts), pictures_of(options.real) if "fid" in names else []
    if any(METRICS[name].frechet for name in names) and min(n, len(real) or n) <= 2048:
        print("FID of 2,048 pictures or fewer lies too high, as its covariances lack rank: compare it inside of a table alone")
    measured, scores, versus, about = {}, {row: {} for row in rows}, {row: {} for row in rows if row != "cm" and "cm" in rows}, {}
    for name in names:
        metric, sizes = METRICS[name], (n, max(1, len(real)))
        if metric.load not in measured:
            measured[metric.load] = measure(metric, rows | ({"real": real} if metric.frechet and real else {}), prompts, options)
        values, about[name] = measured[metric.load]
        for row in rows:
            scores[row][name] = aggregate(metric, values, row, *map(torch.arange, sizes))
        for row in versus:
            resamples = RESAMPLES_OF_FID if metric.frechet else RESAMPLES
            versus[row][name] = interval(partial(versus_cm, metric, values, row), sizes, resamples, options.seed)
    installed = {d.metadata["Name"] for d in metadata.distributions()} & PACKAGES
    versions = {name: metadata.version(name) for name in sorted(installed)}
    found = {"n": n, "seed": options.seed, "reference": "cm", "to_reference": [name for name in names if METRICS[name].to_cm]}
    return found | {"scores": scores, "versus": versus, "metrics": about, "versions": versions}


def compared(found: dict) -> list[str]:
    """Lines of text: what rows have more than the reference, with intervals."""
    lines = ["\nwith 95% intervals over prompts"] if found["versus"] else []
    for row, values in found["versus"].items():
        for name, (value, low, high) in values.items():
            what = f"{row} {'to' if name in found['to_reference'] else '-'} {found['reference']}"
            lines.append(f"{what:24}{name:16}{value:>10.3f}  [{low:.3f}, {high:.3f}]")
    return lines


def table(found: dict) -> str:
    """A report as text: rows and metrics, then what `compared` says."""
    names, rows = list(found["metrics"]), found["scores"]
    lines = [f"{'':14}" + "".join(f"{name:>12}" for name in names)]
    lines += [f"{row:14}" + "".join(f"{values[name]:>12.3f}" for name in names) for row, values in rows.items()]
    return "\n".join(lines + compared(found))
