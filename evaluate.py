"""Quality of a run. On the procedural scenes: Frechet distance, prompt accuracy, PSNR to the full-precision consistency model.

    python evaluate.py --checkpoint runs/tiny --steps 4 --n 2048 --seed 1234 --json q.json
    python evaluate.py --checkpoint runs/sdxl --prompts FILE --n 1024 --real FOLDER          models with public weights
    python evaluate.py report runs/tiny                  runs/tiny/report.html: what is known of a run, on one page (run/report.py)

    Frechet    |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) in 128 features of a small classifier, against 4,096 rendered scenes of
               other seeds (train.py's last lines: 2,048). No relation to Inception FID: compare rows of one table only.
    accuracy   share of pictures whose every attribute (shape, colour, size, pattern of every object, at its place, and the
               background) is read back by that classifier as the prompt has it.
    psnr       mean over pictures of 10 log10(4 / MSE) dB, values in [-1, 1], to the fp CM's picture from the same noise.

The row "real" scores newly rendered scenes of the same prompts: the ceiling of accuracy and, at this n, the floor of Frechet.
Differences to the fp CM have paired 95% intervals (scores.py). Scores are kept in CHECKPOINT/evaluation.

Models with public weights draw numbered pictures of one list of prompts, picture i of every model from the noise of seed + i:

    base       the 16-bit base by 25 steps of its own scheduler, guided
    cm         the 16-bit consistency model, by --steps; of a run with --cm none that is the base, and there is no other row of it
    ours       the run, by --steps

A picture that is there is not drawn again. Folders of pictures by other tools are further rows (--pictures). The metrics are those
of scores.py.

Key: B pictures, P = 5 places, 4 attributes of an object.
"""

import argparse
import contextlib
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import scores
from data import scenes, sources
from layers import PackedLayer, number_format, packed_layers
from models import checkpoint, pipeline, pretrained
from models.card import read_run
from models.denoiser import FAST, Denoiser, as_cm, draw, draw_latents, float_layers, guided_teacher
from models.family import FAMILIES
from run import files, report
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


class Judge:
    """n prompts and noises (function of seed), the classifier, features of rendered scenes of `side` pixels: the same questions for
    any model. real: these features, where they were made before."""

    def __init__(self, n: int, seed: int, reference: int = 4096, side: int = scenes.SIDE, real: torch.Tensor | None = None):
        self.classifier, self.seed, self.side = load_classifier(), seed, side
        self.scene = scenes.random_scenes(n, step_generator(seed, 0))
        self.captions = [scenes.caption_of(self.scene, i) for i in range(n)]
        self.real = real_pictures(self.classifier, reference, side)[1] if real is None else real

    def rendered(self) -> dict[str, float]:
        """Scores of the renderer itself on the same prompts: the row "real"."""
        return self.score(scenes.render(self.scene, step_generator(self.seed, 1), self.side))

    def draw(self, name: str, model, denoiser: Denoiser, steps: int) -> torch.Tensor:
        return draw(model, denoiser, self.captions, steps, 1_000_000 * self.seed, bar=f"{name}, {steps} steps")

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (n, 128), whether everything was right (n,) float)."""
        features = torch.cat([self.classifier(part) for part in pictures.split(256)])
        return features, all_right(self.classifier, features, self.scene).float()

    def score(self, pictures: torch.Tensor, fp: torch.Tensor | None = None) -> dict[str, float]:
        features, right = self.read(pictures)
        row = {"frechet": scores.frechet(self.real, features), "prompt_accuracy": right.mean().item()}
        return row if fp is None else row | {"psnr_to_fp": scores.psnr(pictures, fp)}

    def versus(self, pictures: torch.Tensor, fp: torch.Tensor) -> dict[str, list[float]]:
        """{metric: [value, low, high]}: what `pictures` have more than `fp`, and their PSNR to it, with paired 95% intervals."""
        (features, right), (features_fp, right_fp), psnr = self.read(pictures), self.read(fp), scores.psnr_B(pictures, fp)
        statistics = {
            "frechet": lambda i, j: scores.frechet(self.real[j], features[i]) - scores.frechet(self.real[j], features_fp[i]),
            "prompt_accuracy": lambda i, j: (right[i] - right_fp[i]).mean().item(),
            "psnr_to_fp": lambda i, j: psnr[i].mean().item(),
        }
        sizes, resamples = (len(pictures), len(self.real)), {"frechet": scores.RESAMPLES_OF_FID}
        return {
            name: scores.interval(statistic, sizes, resamples.get(name, scores.RESAMPLES), self.seed)
            for name, statistic in statistics.items()
        }


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


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def watched(net: nn.Module) -> Iterator[tuple[Counter, Counter]]:
    """Inside, ({layer: rows (tokens or pixels) that went through it}, {layer: seconds that it took}) of every packed, Linear and
    Conv2d layer of `net`."""
    layers, rows, seconds = dict(packed_layers(net)) | float_layers(net), Counter(), Counter()

    def before(name: str) -> Callable:
        return lambda layer, args: seconds.update({name: -now(args[0].device)})

    def after(name: str, outputs: int) -> Callable:
        def hook(layer, args, y):
            seconds.update({name: now(y.device)})
            rows.update({name: y.numel() // outputs})

        return hook

    outputs = {name: layer.out if isinstance(layer, PackedLayer) else len(layer.weight) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after(name, outputs[name])) for name, layer in layers.items()]
    try:
        yield rows, seconds
    finally:
        for handle in handles:
            handle.remove()


def write_report(out: Path, student: Denoiser, seen: tuple[Counter, Counter], steps: int, n: int, scored: dict, said: str) -> float:
    """Size and composition of a checkpoint and its scores, printed (the scores as `said`) and in report.json; the seconds of its
    layers, which differ from run to run, in seconds.json -> packed size / that in bf16. seen: what `watched` counted."""
    rows, seconds = seen
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
        file.write_text(json.dumps({"steps": steps, "n": n, **s, **scored}, indent=1))
    with files.atomic(out / "seconds.json") as file:
        file.write_text(json.dumps(seconds, indent=1))
    return ratio


def closing_report(out: Path, network: Denoiser, config: dict) -> None:
    """What train.py prints last, and writes to report.json: drawn from the checkpoint on disk, as sample.py would."""
    student, _ = checkpoint.load_checkpoint(out)
    name = number_format(student).lower()
    if config["data"]:  # the classifier knows nothing of the user's pictures: what is left is the distance to the fp model
        captions = sources.source(config["data"], network.family.side).captions(config["eval_n"], step_generator(4321, 0))
        fp = draw(as_cm(network), network, captions, 4, 4321)
        with watched(student.net) as seen:
            psnr_to_fp = scores.psnr(fp, draw(student, student, captions, 4, 4321))
        scored = {name: {"psnr_to_fp": psnr_to_fp}}
        said = f"{len(captions)} of the folder's captions: {psnr_to_fp:.2f} dB to the fp model"
    else:
        judge = Judge(config["eval_n"], 4321, reference=2048, side=network.family.side)
        fp = judge.draw("fp", as_cm(network), network, 4)
        with watched(student.net) as seen:
            drawn = judge.draw(name, student, student, 4)
        scored = {"fp": judge.score(fp), name: judge.score(drawn, fp)}
        said = f"{config['eval_n']} pictures\n{table(scored)}"
    write_report(out, student, seen, 4, config["eval_n"], scored, f"4 steps, {said}")


@torch.no_grad()
def latent_report(out: Path, network: Denoiser, config: dict, examples, leader: bool) -> None:
    """closing_report for models with public weights, whose quality no classifier of ours can judge: how far the checkpoint on disk
    is from the fp consistency model in latents, signal over error in dB, from the same noises and captions, in the most of
    --sampling-steps.
    Every process of a torchrun calls it (the teacher may be sharded), the leader loads the checkpoint and prints."""
    n, gen, steps = config["eval_n"], step_generator(config["seed"], 0, stream=5), files.most_steps(config)
    cond, x_T = examples.conditions(n, gen, slice(None)), torch.randn(n, *network.latent, generator=gen)

    def draw(model, denoiser, first: int = n) -> torch.Tensor:
        some = x_T[:first], {k: v[:first] for k, v in cond.items()}
        return draw_latents(model, denoiser, *some, steps, config["micro"], config["device"])

    fp = draw(as_cm(network), network)
    if not leader:
        return
    student, _ = checkpoint.load_checkpoint(out)
    draw(student.to(config["device"]), student, first=1)  # what kernels compile at their first call is no layer's time
    with watched(student.net) as seen:
        drawn = draw(student, student)
    snr = 10 * torch.log10(fp.var() / (drawn - fp).square().mean().clamp_min(1e-12)).item()
    said = f"{steps} steps, {n} captions: latents {snr:.2f} dB to the fp model"
    print(f"memory_ratio: {write_report(out, student, seen, steps, n, {'latent_snr_to_fp': snr}, said):.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Models with public weights

MODELS = ("base", "cm", "ours")


def drawing(name: str, args: argparse.Namespace, about: dict, of_prompts: str) -> dict:
    """All that the pictures of a model (of MODELS) depend on, for JSON: local weights by a digest, those of the hub by their names.
    about: the run's config.json; of_prompts: a digest of their list."""
    run, config, network = Path(args.checkpoint), about["config"], about["network"]
    family, of_base = FAMILIES[config["model"]], [args.base or network["base"], pipeline.components_of(run)]
    weights = {"base": of_base, "cm": [*of_base, pipeline.cm_of(run)], "ours": of_base}[name]
    digests = [files.fingerprint(path) if Path(path).exists() else path for path in weights]
    digests += {"base": [], "cm": [config["cm_scale"]], "ours": [files.recorded_checksum(run / "model.safetensors")]}[name]
    return {
        "seed": args.seed,
        "steps": 25 if name == "base" else args.steps,
        "guidance scale": family.compare_guidance if name == "base" else family.few_step_guidance(network.get("guidance")),
        "size of latents": network["latent"],
        "list of prompts": of_prompts,
        "kind of device": args.device,
        "weights of the model": digests,
    }


def drawn(name: str, args: argparse.Namespace, about: dict, prompts: list[str], of_prompts: str) -> list[Path]:
    """The files of the pictures that a model draws for the prompts. Those that are there stay; UserError if they are of another
    configuration, which config.json beside them keeps."""
    run, config = args.checkpoint, drawing(name, args, about, of_prompts)
    out = Path(args.out or f"{run}/evaluation") / name
    if (out / "config.json").exists():
        files.refuse_another(out, config)
    else:
        files.write_json(out / "config.json", {"format": files.FORMAT, "config": config})
    files.remove_leftovers(out)
    paths = [out / f"{i:05}.png" for i in range(len(prompts))]
    if absent := [i for i, path in enumerate(paths) if not path.exists()]:
        gc.collect()  # the model before this one
        open_model = pipeline.load_pipeline if name == "ours" else partial(pipeline.load_16bit, cm=name == "cm")
        pipe = open_model(run, device=args.device, base=args.base)
        pipe.safety_checker = None  # it blackens pictures, and the row would answer for that
        for i in tqdm(absent, name):
            how = config["steps"], args.seed + i, config["guidance scale"]
            (picture,) = pipeline.draw_with_pipeline(pipe, [prompts[i]], *how)
            with files.atomic(paths[i]) as file:
                Image.fromarray(sources.to_bytes(picture[None])[0]).save(file, "PNG")
    return paths


def chosen_models(args: argparse.Namespace, config: dict) -> list[str]:
    """Of MODELS those that --models names; by default all that the run has. UserError for another."""
    if unknown := sorted({*args.models.split(",")} - {*MODELS, ""}):
        raise UserError(f"--models {unknown[0]} is none of ours: choose from {','.join(MODELS)}")
    if not args.models and config["weights"] == "random":
        print("the run was made from random weights: rows base and cm are left out")
        return ["ours"]
    known = [name for name in MODELS if name != "base" or config["cm"] != pretrained.WHOLE]
    if "base" in args.models.split(",") and "base" not in known:
        raise UserError("the run's base draws in few steps itself (--cm none) and is the row cm: give --models cm,ours")
    return [name for name in known if name in (args.models or ",".join(known)).split(",")]


def was_trained_on(config: dict, source: sources.Source) -> bool:
    """Whether a run's --data is this very source, as far as this machine can tell."""
    data = config["data"] or "prompts"
    with contextlib.suppress(UserError):
        return data == source.spec or (Path(data).exists() and sources.captioned(data).fingerprint == source.fingerprint)
    return False


def main_public(args: argparse.Namespace) -> None:
    """Draws, scores, prints and writes what the module docstring says."""
    about, source = read_run(Path(args.checkpoint)), sources.captioned(args.prompts)
    args.steps, args.device = args.steps or files.most_steps(about["config"]), "cuda" if torch.cuda.is_available() else "cpu"
    if args.n is not None and args.n < 2:
        raise UserError(f"--n {args.n} is too few to compare: use 2 or more, and 2,049 for FID")
    prompts = list(islice((caption for _, caption, _ in source.rows() if caption), args.n or 1024))
    if len(prompts) < (args.n or 2):
        needed = f"where {args.n or 2} are needed: give a smaller --n, or more prompts"
        raise UserError(f"{source.spec} has {len(prompts)} prompts {needed}")
    if seen := was_trained_on(about["config"], source):
        print("the run was trained on these prompts: by --prompts it can be scored on others")
    models, pairs = chosen_models(args, about["config"]), [pair.partition("=")[::2] for pair in args.pictures]
    rows = [*models, "", "real", *(name for name, _ in pairs)]
    if doubled := [name for name, _ in pairs if rows.count(name) > 1]:
        raise UserError(f"--pictures {doubled[0]}=FOLDER cannot be the name of another row: give --pictures NAME=FOLDER")
    others = {name: scores.numbered(folder, len(prompts)) for name, folder in pairs}
    names = scores.runnable(args, "cm" in {*models, *others})  # what cannot run is known before anything is drawn
    ours = {name: drawn(name, args, about, prompts, source.fingerprint) for name in reversed(models)}  # the run's faults at once
    found = scores.report({name: ours[name] for name in models} | others, prompts, names, args)
    found |= {"checkpoint": args.checkpoint, "steps": args.steps, "prompts": source.fingerprint, "trained on them": seen}
    found |= {"first_prompts": prompts[: report.SHOWN]}
    print(f"{len(prompts)} prompts, {args.steps} steps, seed {args.seed}\n{scores.table(found)}")
    write_scores(found, args, Path(args.out or f"{args.checkpoint}/evaluation") / "scores.json")


# ---------------------------------------------------------------------------------------------------------------------
# The command

OF_PUBLIC = {  # flags for models with public weights: default, help
    "prompts": ("", "file of prompts, one a line, or whatever train.py --data reads (default: assets/prompts.txt)"),
    "models": ("", "which of base,cm,ours are drawn (default: all)"),
    "out": ("", "folder of the pictures (default: CHECKPOINT/evaluation)"),
    "base": ("", "another copy of the base: hub id, folder or single file"),
    "real": ("", "folder of real pictures, for fid"),
    "metrics": ("", f"which of {','.join(scores.METRICS)} (default: all that can run)"),
    "inception": ("", "weights of FID's Inception (default: torch-fidelity's cache)"),
    "clip": ("openai/clip-vit-large-patch14", "of the CLIP score: hub id or folder"),
    "pickscore": ("yuvalkirstain/PickScore_v1,laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "hub ids or folders: MODEL,PROCESSOR"),
    "icnet": ("", "ICNet as a TorchScript file, for ic"),
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, bool]:
    """(the flags, whether the checkpoint is of a model with public weights). UserError for a flag of the other kind of models."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/tiny", help="folder that train.py wrote")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4, 8), help="default: 4; public models: the most of --sampling-steps")
    parser.add_argument("--n", type=int, help="pictures (default: 2048, at least 256; public models: 1024 at most)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", default="", help="write the scores to this file too")
    which = "rows of the guided teacher: 25 steps and --steps, --steps alone, none [both]"
    parser.add_argument("--teacher", choices=("both", "same", "none"), help=which)
    group = parser.add_argument_group("models with public weights")
    for name, (default, about) in OF_PUBLIC.items():
        group.add_argument(f"--{name}", default=default, help=about)
    group.add_argument("--pictures", metavar="NAME=FOLDER", action="append", default=[], help="a row by another tool; repeatable")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0, got {args.seed}")
    public = not FAMILIES[files.read_config(Path(args.checkpoint))["config"]["model"]].embedded
    foreign = ["teacher"] if public else ["pictures", *OF_PUBLIC]
    if given := [name for name in foreign if getattr(args, name) != parser.get_default(name)]:
        raise UserError(f"--{given[0]} is for {'the models that ship' if public else 'models with public weights'}: leave it out")
    return args, public


def write_scores(found: dict, args: argparse.Namespace, path: Path) -> None:
    """To --json and to `path`, with a checksum of the weights, by which the page about the run knows its present ones."""
    found = found | {"weights": files.recorded_checksum(Path(args.checkpoint, "model.safetensors"))}
    for target in filter(None, (args.json, path)):
        with files.atomic(Path(target)) as file:
            file.write_text(json.dumps(found, indent=1))


def main(argv: list[str]) -> None:
    if argv[:1] == ["report"]:
        return main_report(argv[1:])
    args, public = parse(argv)
    (main_public if public else main_scenes)(args)


def main_scenes(args: argparse.Namespace) -> None:
    n, steps, which = 2048 if args.n is None else args.n, args.steps or 4, args.teacher or "both"
    if n < 256:
        raise UserError(f"--n {n} is too few for the covariance of {SceneClassifier.num_features} features: use 256 or more")
    student, about = checkpoint.load_checkpoint(args.checkpoint)
    config = about["config"]
    network = pretrained.load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(FAST)
    judge = Judge(n, args.seed, side=network.family.side)
    rows = {"real": judge.rendered()}
    teacher = guided_teacher(network, config["guidance"])
    if which == "both":
        rows["teacher"] = judge.score(judge.draw("teacher", teacher, network, 25)) | {"steps": 25}
    if which != "none":
        rows["teacher_same_steps"] = judge.score(judge.draw("teacher", teacher, network, steps)) | {"steps": steps}
    fp = judge.draw("fp", as_cm(network), network, steps)
    rows["fp"] = judge.score(fp) | {"steps": steps}
    name = number_format(student).lower()
    ours = judge.draw(name, student, student, steps)
    rows[name] = judge.score(ours, fp) | {"steps": steps}
    found = {"n": n, "seed": args.seed, "steps": steps, "reference": "fp", "to_reference": ["psnr_to_fp"]}
    found |= {"scores": rows, "versus": {name: judge.versus(ours, fp)}}
    print("\n".join([f"{n} pictures, seed {args.seed}", table(rows), *scores.compared(found)]))
    write_scores(found, args, Path(args.checkpoint, "evaluation", f"scores-{steps}.json"))


# ---------------------------------------------------------------------------------------------------------------------
# The page about a run


def drawn_for_report(run: Path) -> report.Sheet:
    """Pictures of an embedded model's run, from the same noises: its teacher, and the consistency models in 4, 2 and 1 steps."""
    student, about = checkpoint.load_checkpoint(run)
    config = about["config"]
    network = pretrained.load_embedded_cm(config["model"], config["teacher"], config["cm"]).to(FAST)
    prompts, name = sources.sample_prompts(config)[: report.SHOWN], f"{number_format(student)} CM"
    rows = {"teacher, 25 steps": draw(guided_teacher(network, config["guidance"]), network, prompts, 25)}
    for steps in (4, 2, 1):
        how = f"{steps} step{'s' * (steps > 1)}"
        rows[f"16-bit CM, {how}"] = draw(as_cm(network), network, prompts, steps)
        rows[f"{name}, {how}"] = draw(student, student, prompts, steps)
    pictures = {name: [Image.fromarray(picture) for picture in sources.to_bytes(drawn)] for name, drawn in rows.items()}
    return report.Sheet("The same noise in each column, seed 0.", prompts, pictures)


def sheets_of_evaluation(found: dict[Path, dict]) -> list[report.Sheet]:
    """The first pictures of the rows that were scored, by the files of their scores. UserError for one that cannot be read."""
    sheets = []
    for path, scored in found.items():
        prompts = scored["first_prompts"]
        paths = {row: sorted((path.parent / row).glob("*.png"))[: len(prompts)] for row in scored["scores"]}
        if rows := {row: [scores.opened(picture) for picture in pictures] for row, pictures in paths.items() if pictures}:
            base = ", of the base 25" if "base" in rows else ""
            caption = f"{path.parent.name}: {scored['steps']} steps{base}; seed {scored['seed']}, the same noise in each column."
            sheets.append(report.Sheet(caption, prompts, rows))
    return sheets


def main_report(argv: list[str]) -> None:
    usage = "One page about a run: pictures, scores, losses, layers, configuration."
    parser = argparse.ArgumentParser(prog="evaluate.py report", description=usage, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")
    args = parser.parse_args(argv)
    about, found, notes = files.read_finished(args.run), report.read_scores(args.run), []
    if FAMILIES[about["config"]["model"]].embedded:
        sheets = [drawn_for_report(args.run)]
    elif not (sheets := sheets_of_evaluation(found)):
        notes.append(f"Pictures are drawn by python evaluate.py --checkpoint {args.run}")
    text, out = report.page(args.run, list(found.values()), sheets, notes), args.out or args.run / "report.html"
    with files.atomic(out) as file:
        file.write_text(text)
    print(f"report: {out}")


if __name__ == "__main__":
    run_script("evaluate.py", main)
