"""Quality on the procedural scenes: Frechet distance, prompt accuracy, PSNR to the full-precision consistency model.

    python evaluate.py --checkpoint runs/tiny --steps 4 --n 2048 --seed 1234 --json q.json

    Frechet    |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) in 128 features of a small classifier, torchmetrics' implementation,
               against 4,096 rendered scenes of other seeds (train.py's last lines: 2,048). No relation to Inception FID: compare
               rows of one table only.
    accuracy   share of pictures whose every attribute (shape, colour, size, pattern of every object, at its place, and the
               background) is read back by that classifier as the prompt has it.
    psnr       mean over pictures of 10 log10(4 / MSE) dB, values in [-1, 1], to the fp CM's picture from the same noise.

The row "real" scores newly rendered scenes of the same prompts: the ceiling of accuracy and, at this n, the floor of Frechet.

Key: B pictures, P = 5 places, 4 attributes of an object.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

import tdpt
from data import scenes, sources
from layers import PackedLayer, number_format, packed_layers
from models import checkpoint, pretrained
from models.denoiser import FAST, Denoiser, as_cm, draw, float_layers, guided_teacher
from models.family import FAMILIES
from run import files
from run.common import UserError, run_script, step_generator

REFERENCE_SEED = 777_000  # of the rendered scenes that Frechet distances are measured to


class SceneClassifier(nn.Module):
    """Classifier of scenes, which it sees at 32x32 pixels.
    forward: pictures (B, 3, H, H) in [-1, 1] -> features (B, 128); heads: features -> logits."""

    GROUPS = (len(scenes.SHAPES) + 1, len(scenes.COLORS), len(scenes.SIZES), len(scenes.PATTERNS))  # shape 0: nothing there
    num_features = 128

    def __init__(self):
        super().__init__()

        def conv(i, o, stride):
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        convs = (conv(3, 32, 1), conv(32, 64, 2), conv(64, 64, 1), conv(64, 128, 2), conv(128, 128, 1), conv(128, 32, 1))
        self.trunk = nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 64, self.num_features), nn.SiLU())
        self.objects = nn.Linear(self.num_features, len(scenes.PLACES) * sum(self.GROUPS))
        self.background = nn.Linear(self.num_features, len(scenes.BACKGROUNDS))
        self.texture = nn.Linear(self.num_features, len(scenes.TEXTURES))

    def forward(self, pictures):
        return self.trunk(F.adaptive_avg_pool2d(pictures, scenes.SIDE))

    def heads(self, features):
        """Logits: background, texture (B, 1, 3), and by place shape, color, size, pattern (B, P, n)."""
        at_place = self.objects(features).view(len(features), len(scenes.PLACES), -1)
        return self.background(features)[:, None], self.texture(features)[:, None], *at_place.split(self.GROUPS, -1)


def truth(scene: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What `heads` should find, int64: background, texture (B, 1), and by place (B, P) shape + 1 (0 nothing), color, size, pattern;
    -1 where nothing has no attribute."""
    n = len(scene["count"])
    at = torch.full((n, len(scenes.PLACES), 4), -1)
    at[:, :, 0] = 0
    for slot in range(2):
        b = (slot < scene["count"]).nonzero().squeeze(1)
        seen = [scene[key][b, slot] for key in ("shape", "color", "size", "pattern")]
        at[b, scene["place"][b, slot]] = torch.stack([seen[0] + 1, *seen[1:]], 1)
    return scene["background"][:, None], scene["texture"][:, None], *at.unbind(2)


def all_right(classifier: SceneClassifier, features: torch.Tensor, scene: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) bool: every attribute of the scene is read back."""
    pairs = zip(classifier.heads(features), truth(scene), strict=True)
    return torch.cat([(logits.argmax(-1) == at) | (at == -1) for logits, at in pairs], 1).all(1)


def load_classifier(path: Path = files.ASSETS / "classifier.safetensors") -> SceneClassifier:
    tensors, _ = files.read_tensors(path, "make it with `python -m benchmarks.classifier`")
    classifier = SceneClassifier()
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def real_pictures(classifier: SceneClassifier, n: int = 4096, side: int = scenes.SIDE) -> tuple[float, torch.Tensor]:
    """(prompt accuracy, features) of n rendered scenes of `side` pixels."""
    parts, right = [], []
    for k in range(0, n, 256):
        gen = step_generator(REFERENCE_SEED, k)
        scene = scenes.random_scenes(min(256, n - k), gen)
        parts.append(classifier(scenes.render(scene, gen, side)))
        right.append(all_right(classifier, parts[-1], scene))
    return torch.cat(right).float().mean().item(), torch.cat(parts)


def frechet(real: torch.Tensor, features: torch.Tensor) -> float:
    """Frechet distance of two sets of feature vectors (n, 128), by torchmetrics in float64."""
    network = nn.Identity()  # pictures -> features
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(network, sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures in [-1, 1]; identical pictures count 100 dB."""
    mse = (a - b).square().flatten(1).mean(1).clamp_min(4e-10)
    return (10 * torch.log10(4 / mse)).mean().item()


class Judge:
    """n prompts and noises (function of seed), the classifier, features of rendered scenes of `side` pixels: the same questions for
    any model."""

    def __init__(self, n: int, seed: int, reference: int = 4096, side: int = scenes.SIDE):
        self.classifier, self.seed, self.side = load_classifier(), seed, side
        self.scene = scenes.random_scenes(n, step_generator(seed, 0))
        self.captions = [scenes.caption_of(self.scene, i) for i in range(n)]
        _, self.real = real_pictures(self.classifier, reference, side)

    def rendered(self) -> dict[str, float]:
        """Scores of the renderer itself on the same prompts: the row "real"."""
        return self.score(scenes.render(self.scene, step_generator(self.seed, 1), self.side))

    def draw(self, name: str, model, denoiser: Denoiser, steps: int) -> torch.Tensor:
        return draw(model, denoiser, self.captions, steps, 1_000_000 * self.seed, bar=f"{name}, {steps} steps")

    def score(self, pictures: torch.Tensor, fp: torch.Tensor | None = None) -> dict[str, float]:
        features = torch.cat([self.classifier(part) for part in pictures.split(256)])
        right = all_right(self.classifier, features, self.scene).float().mean().item()
        row = {"frechet": frechet(self.real, features), "prompt_accuracy": right}
        return row if fp is None else row | {"psnr_to_fp": psnr(pictures, fp)}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':26}{'frechet':>10}{'accuracy':>10}{'psnr to fp':>12}"]
    for name, row in rows.items():
        last = f"{row['psnr_to_fp']:>9.2f} dB" if "psnr_to_fp" in row else f"{'-':>12}"
        lines.append(f"{name:26}{row['frechet']:>10.2f}{row['prompt_accuracy']:>10.3f}{last}")
    return "\n".join(lines)


def network_report(network: Denoiser, config: dict, cm: bool) -> dict[str, dict[str, float]]:
    """Scores of 16-bit weights at the end of their training, printed: the guided teacher and, if `cm`, the consistency model."""
    if config["data"]:
        return {}  # the classifier knows nothing of the user's pictures
    judge = Judge(config["eval_n"], 4321, side=network.family.side)
    teacher = ("teacher, guided", guided_teacher(network, config["guidance"]))
    runs = [(*teacher, 25), (*teacher, 4)] + [("fp", as_cm(network), steps) for steps in (4, 2, 1) if cm]
    rows = {"real": judge.rendered()}
    rows |= {f"{name}, {steps} steps": judge.score(judge.draw(name, model, network, steps)) for name, model, steps in runs}
    print(f"{config['eval_n']} pictures\n{table(rows)}")
    return rows


@contextlib.contextmanager
def counted_rows(net: nn.Module) -> Iterator[Counter]:
    """Inside, {layer: rows (tokens or pixels) that went through it} of every packed, Linear and Conv2d layer of `net`."""
    layers, rows = dict(packed_layers(net)) | float_layers(net), Counter()

    def hook(name: str, outputs: int) -> Callable:
        return lambda layer, args, y: rows.update({name: y.numel() // outputs})

    outputs = {name: layer.out if isinstance(layer, PackedLayer) else len(layer.weight) for name, layer in layers.items()}
    handles = [layer.register_forward_hook(hook(name, outputs[name])) for name, layer in layers.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def write_report(out: Path, student: Denoiser, rows: Counter, steps: int, n: int, scores: dict, said: str) -> float:
    """Size and composition (with `rows` of its layers) of a checkpoint and its scores, printed (the scores as `said`) and in
    report.json -> packed size / that in bf16."""
    s = checkpoint.packed_size(student) | checkpoint.composition(student, rows)
    ratio, kinds = s["mb"] / s["mb_bf16"], [kind for kind in ("w4a4", "w4a8") if s.get(f"{kind}_parameters")]
    print(f"checkpoint {out}: {s['bits_per_weight']:.3f} bits per weight in the quantized layers, before LoRA")
    print(f"network {s['mb']:.2f} MB, of it LoRA {s['mb_lora']:.2f} MB; bf16 {s['mb_bf16']:.2f} MB: memory_ratio {ratio:.3f}")
    for kind in kinds:
        shares = f"{s[f'{kind}_parameters']:.1%} of the parameters, {s[f'{kind}_products']:.1%} of the products"
        print(f"{kind.upper()}: {shares} of linear and convolution layers")
    without = f"{s['layers_without_branch']:.0%} of the packed layers have none"
    print(f"branches add {s['branch_parameters']:.2%} to the parameters; {without}")
    print(said)
    with files.atomic(out / "report.json") as file:
        file.write_text(json.dumps({"steps": steps, "n": n, **s, **scores}, indent=1))
    return ratio


def closing_report(out: Path, network: Denoiser, config: dict) -> None:
    """What train.py prints last, and writes to report.json: drawn from the checkpoint on disk, as sample.py would."""
    student, _ = checkpoint.load_checkpoint(out)
    name = number_format(student).lower()
    if config["data"]:  # the classifier knows nothing of the user's pictures: what is left is the distance to the fp model
        captions = sources.source(config["data"], network.family.side).captions(config["eval_n"], step_generator(4321, 0))
        fp = draw(as_cm(network), network, captions, 4, 4321)
        with counted_rows(student.net) as rows:
            psnr_to_fp = psnr(fp, draw(student, student, captions, 4, 4321))
        scores = {name: {"psnr_to_fp": psnr_to_fp}}
        said = f"{len(captions)} of the folder's captions: {psnr_to_fp:.2f} dB to the fp model"
    else:
        judge = Judge(config["eval_n"], 4321, reference=2048, side=network.family.side)
        fp = judge.draw("fp", as_cm(network), network, 4)
        with counted_rows(student.net) as rows:
            drawn = judge.draw(name, student, student, 4)
        scores = {"fp": judge.score(fp), name: judge.score(drawn, fp)}
        said = f"{config['eval_n']} pictures\n{table(scores)}"
    write_report(out, student, rows, 4, config["eval_n"], scores, f"4 steps, {said}")


@torch.no_grad()
def latent_report(out: Path, network: Denoiser, config: dict, examples, leader: bool) -> None:
    """closing_report for models with public weights, whose quality no classifier of ours can judge: how far the checkpoint on disk
    is from the fp consistency model in latents, signal over error in dB, from the same noises and captions, in the most of
    --sampling-steps.
    Every process of a torchrun calls it (the teacher may be sharded), the leader loads the checkpoint and prints."""
    n, gen, steps = config["eval_n"], step_generator(config["seed"], 0, stream=5), files.most_steps(config)
    cond, x_T = examples.conditions(n, gen, slice(None)), torch.randn(n, *network.latent, generator=gen)

    def draw(model, denoiser) -> torch.Tensor:
        parts = sources.in_parts(x_T, cond, config["micro"], config["device"])
        return torch.cat([tdpt.sample(model, denoiser.path, *part, steps).float().cpu() for part in parts])

    fp = draw(as_cm(network), network)
    if not leader:
        return
    student, _ = checkpoint.load_checkpoint(out)
    with counted_rows(student.net) as rows:
        drawn = draw(student.to(config["device"]), student)
    snr = 10 * torch.log10(fp.var() / (drawn - fp).square().mean().clamp_min(1e-12)).item()
    said = f"{steps} steps, {n} captions: latents {snr:.2f} dB to the fp model"
    print(f"memory_ratio: {write_report(out, student, rows, steps, n, {'latent_snr_to_fp': snr}, said):.3f}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/tiny", help="folder that train.py wrote")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4, 8), default=4)
    parser.add_argument("--n", type=int, default=2048, help="pictures, at least 256")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", default="", help="write the scores there")
    which = "rows of the guided teacher: 25 steps and --steps, --steps alone, none"
    parser.add_argument("--teacher", choices=("both", "same", "none"), default="both", help=which)
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0, got {args.seed}")
    if args.n < 256:
        raise UserError(f"--n {args.n} is too few for the covariance of {SceneClassifier.num_features} features: use 256 or more")
    if not FAMILIES[model := files.read_config(Path(args.checkpoint))["config"]["model"]].embedded:
        advice = f"see {args.checkpoint}/report.json, draw with sample.py"
        raise UserError(f"the classifier knows nothing of {model}'s pictures: {advice}")
    student, about = checkpoint.load_checkpoint(args.checkpoint)
    config = about["config"]
    network = pretrained.load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(FAST)
    judge = Judge(args.n, args.seed, side=network.family.side)
    rows = {"real": judge.rendered()}
    teacher = guided_teacher(network, config["guidance"])
    if args.teacher == "both":
        rows["teacher"] = judge.score(judge.draw("teacher", teacher, network, 25)) | {"steps": 25}
    if args.teacher != "none":
        rows["teacher_same_steps"] = judge.score(judge.draw("teacher", teacher, network, args.steps)) | {"steps": args.steps}
    fp = judge.draw("fp", as_cm(network), network, args.steps)
    rows["fp"] = judge.score(fp) | {"steps": args.steps}
    name = number_format(student).lower()
    rows[name] = judge.score(judge.draw(name, student, student, args.steps), fp) | {"steps": args.steps}
    print(f"{args.n} pictures, seed {args.seed}\n{table(rows)}")
    if args.json:
        with files.atomic(Path(args.json)) as file:
            file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_script("evaluate.py", main)
