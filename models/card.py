"""The model card: README.md of a run folder, or of a pipeline folder that save_pretrained wrote.

The front matter, which the Hugging Face hub reads, is huggingface_hub's ModelCardData. The numbers come from the
files of weights and from report.json, so that a card says nothing that is not in its folder.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCardData
from safetensors.torch import load_file

import quant
from models.family import FACTOR, FAMILIES, Family, family_of
from run import files
from run.common import UserError


def method_of(config: dict) -> str:
    """What a card says of a training. config: train.Config as a dict; older runs lack some of it."""
    rollout, init, ranks = config.get("rollout", 0.75), config.get("init", "hgs"), config.get("ranks", "qra")
    parts = ["TDPT: targets by stage of the trajectory"] * (rollout < 1) + ["rollouts: from its own states"] * (rollout > 0)
    trained = "Quantized, and not trained after that"
    if config.get("steps", 1):
        trained = f"Distilled while it was quantized ({'; '.join(parts)})"
    split = "a Hessian-guided split of each weight (HGS-LoRA)" if init == "hgs" else f"the split `{init}`"
    of_layers = "ranks by layer (QRA)" if ranks == "qra" else f"the ranks `{ranks}`"
    return f"{trained}; the LoRA beside the packed weights starts from {split} with {of_layers}"


def guidance_scale(family: Family, config: dict, guidance: float | None) -> dict[str, float]:
    """guidance_scale of a few-step call, by its name. config: of the network; guidance: what that was given. Empty where the
    network has no such input and makes no second call (FLUX.1-schnell)."""
    asks = family.classifier_free or family.guidance_input(config) is not None
    return {"guidance_scale": family.few_step_guidance(guidance)} if asks else {}


def few_step_call(family: Family, config: dict, steps: int, guidance: float | None, **size: int) -> str:
    """The arguments after the prompt in a call of a few-step pipeline; config, guidance: see guidance_scale."""
    given = {"num_inference_steps": steps} | guidance_scale(family, config, guidance) | size
    return "".join(f", {name}={value}" for name, value in (given | family.call_options(config)).items())


def of_training(family: Family, config: dict, guidance: float | None) -> str:
    """guidance_scale in a card's sentence about the training, with the comma after it."""
    return "".join(f"`{name}={value}`, " for name, value in guidance_scale(family, config, guidance).items())


def read_run(folder: Path) -> dict:
    """config.json of a finished run on a model with public weights. UserError for any other."""
    about = files.read_finished(folder)
    if not isinstance(about.get("network"), dict):
        raise UserError(f"{folder} holds a tiny model, no pipeline's: draw with `python sample.py --checkpoint {folder}`")
    return about


def of_run(folder: Path) -> tuple:
    """(files of weights, class of the network, its base, layers and steps, how to use it) of a run folder.
    UserError if it is none of a pipeline."""
    about = read_run(folder)
    network = about["network"]
    packed, family = network | {"layers": about["layers"]}, FAMILIES[network["model"]]
    packed |= {"steps": files.most_steps(about["config"]), "method": method_of(about["config"])}
    use = {
        "how": "With CMQuant's files on the Python path:",
        "imports": "from models import pipeline",
        "load": f'pipeline.load_pipeline("{folder.name}")',
        "call": few_step_call(family, network["config"], packed["steps"], network.get("guidance")),
        "guidance": of_training(family, network["config"], network.get("guidance")),
    }
    return [folder / "model.safetensors"], network["class"], packed, use


def of_pipeline(folder: Path) -> tuple:
    """The same of a folder that save_pretrained wrote. UserError if none of its networks is packed."""
    config = next((path for path in folder.glob("*/config.json") if '"quant_method": "cmquant"' in path.read_text()), None)
    if config is None:
        raise UserError(
            f"{folder} holds no packed network: quantize it with `python train.py --model MODEL --teacher {folder} --cm LORA`"
        )
    about = json.loads(config.read_text())
    packed = about["quantization_config"]
    if packed.get("steps", 4) is None:
        raise UserError(f"{folder} was packed as it was loaded, not trained for few steps: it gets no card")
    family = family_of(about)
    use = {
        "how": "With diffusers alone; `trust_remote_code` lets it run the Python files of this folder, which are CMQuant's:",
        "imports": "import torch\nfrom diffusers import DiffusionPipeline",
        "load": f'DiffusionPipeline.from_pretrained("{folder.name}", torch_dtype=torch.bfloat16, trust_remote_code=True)',
        "call": "",  # pipeline.py knows
        "guidance": of_training(family, about, packed.get("guidance")),
    }
    return sorted(config.parent.glob("*.safetensors")), about["_class_name"], packed, use


def public_name(base: str) -> str:
    """A hub id as it is; of a folder or file of this machine the name alone."""
    return base if is_hub_id(base) else Path(base).name


def is_hub_id(base: str) -> bool:
    """Whether a run's base is of the hub: a path begins with / or . (pretrained.local_path), also if nothing is there any more."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def write_card(folder: str | Path, base_model: str = "") -> Path:
    """README.md of a run folder or of a pipeline folder of save_pretrained. base_model: hub id of the base, where that was a copy.
    UserError if the folder holds no packed network."""
    folder = Path(folder)
    weights, network, packed, use = (of_pipeline if (folder / "model_index.json").is_file() else of_run)(folder)
    base, layers, report = base_model or public_name(packed["base"]), packed["layers"], folder / "report.json"
    number_format = quant.number_format(row["group_x"] for row in layers.values() if row["kind"] == "w4a4")
    front, licence = _front(base, [number_format.lower().replace("/", "-"), "quantized"], "quantized")
    size, twin = _sizes(weights, layers)
    groups = sorted({(row["group_w"], row["group_x"]) for row in layers.values() if row["kind"] == "w4a4"})
    kinds = Counter(_kind(row) for row in layers.values())
    template = (files.ASSETS / "card.md").read_text()
    text = template.format(
        front=front,
        title=f"{Path(base).name}, {number_format} in few steps",
        bits_x=number_format.partition("A")[2],
        base=base,
        licence=licence,
        groups=" and ".join(_groups(*pair) for pair in groups),
        kinds=", ".join(f"{n} layers {kind}" for kind, n in sorted(kinds.items())),
        network=network,
        mb=size / 1e6,
        twin_mb=twin / 1e6,
        ratio=size / twin,
        method=packed.get("method") or method_of({}),
        steps=packed.get("steps", 4),
        height=FACTOR * packed["latent"][1],
        width=FACTOR * packed["latent"][2],
        metrics=_metrics(json.loads(report.read_text())) if report.is_file() else "",
        **use,
    )
    return _write(folder, text)


def write_export_card(folder: Path, kind: str, network: str, base: str, call: str, psnr: float, n: int, **about: str) -> Path:
    """README.md of a folder whose network is in another format, 16bit, sdnq or nunchaku. psnr: of n of its pictures to those of the
    packed network, dB; call: the arguments of a few-step call; about: what the template of the format names beside these."""
    tag, relation = ("16-bit", "finetune") if kind == "16bit" else (kind, "quantized")
    front, licence = _front(base, [tag], relation)
    known = {"front": front, "licence": licence, "name": Path(base).name, "folder": folder.name, "network": network, "base": base}
    text = (files.ASSETS / f"card-{kind}.md").read_text()
    return _write(folder, text.format(**known, call=call, psnr=psnr, n=n, **about))


def _front(base: str, tags: list[str], relation: str) -> tuple[str, str]:
    """(front matter, the licence of the base in words). relation: to the base, in the words of the hub."""
    known = (entry for each in FAMILIES.values() for entry in each.licences.items())
    licence, in_words = next((licence for name, licence in known if name in base), ({"license": "other"}, f"see {base}"))
    origin = {"base_model": base, "base_model_relation": relation} if is_hub_id(base) else {}
    tags = ["cmquant", "consistency-model", *tags]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **licence, **origin).to_yaml(), in_words


def _write(folder: Path, text: str) -> Path:
    with files.atomic(folder / "README.md") as file:
        file.write_text(text)
    return folder / "README.md"


def _kind(row: dict) -> str:
    return {"w4a4": quant.number_format([row.get("group_x")]), "w4a16": "W4A16", "16bit": "16 bit"}[row["kind"]]


def _groups(group_w: int, group_x: int) -> str:
    if group_x == quant.EIGHT_BITS:
        return f"groups of {group_w} (weights), activations in 8 bits with one scale for each token or picture"
    return f"groups of {group_w} (weights), {group_x} (activations)"


def _sizes(weights: list[Path], layers: dict[str, dict]) -> tuple[int, int]:
    """(bytes of the tensors in `weights`, bytes in bfloat16 of the network that was quantized)."""
    size, twin = 0, sum(2 * math.prod(row["shape"]) for row in layers.values())
    for path in weights:
        for key, tensor in load_file(path).items():  # mapped into memory, not read
            layer, _, name = key.removeprefix("net.").rpartition(".")
            size += tensor.nbytes
            twin += 2 * tensor.numel() if layer not in layers or name == "bias" else 0
    return size, twin


def _metrics(report: dict) -> str:
    """report.json for the card: its numbers as a list, its rows of scores as a table."""
    text = f"\n## Metrics\n\nMeasured by CMQuant's evaluate.py on {report['n']} pictures of {report['steps']} steps.\n\n"
    text += "".join(f"- {name}: {value:.3f}\n" for name, value in report.items() if isinstance(value, float))
    if rows := {name: row for name, row in report.items() if isinstance(row, dict)}:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [
            [name, *(f"{row[c]:.3f}" if isinstance(row.get(c), float) else "" for c in columns)] for name, row in rows.items()
        ]
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text
