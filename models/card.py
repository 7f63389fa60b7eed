"""The model card: README.md of a run folder, or of a pipeline folder that save_pretrained wrote.

    card.write_for_run(folder, about, steps)        about: its config.json
    card.write_for_pipeline(folder)

The front matter, which the Hugging Face hub reads, is huggingface_hub's ModelCardData. The numbers come from the headers of the
files of weights and from report.json, so that a card says nothing that is not in its folder.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCardData

from models.family import FAMILIES, family_of
from run import files
from run.common import UserError

CARD = """---
{front}
---

# {title}

A few-step consistency model with 4-bit weights and 4-bit activations, made with CMQuant from {base}.

- **Method.** Distilled while it was quantized (TDPT: targets by stage of the trajectory); the LoRA beside the packed
  weights starts from a Hessian-guided split of each weight (HGS-LoRA) with ranks by layer (QRA). Pictures in 1 to {steps} steps.
- **Base and licence.** {base}. Its licence holds for these weights too: {licence}.
- **Number format.** Two-level INT4: weight = scale[row] * multiplier[row, group] * code, codes -8..7, multipliers 1..16, {groups};
  activations the same way, at run time. {kinds}, the first and last ones 16 bit. Computed as one int8 product with int32 sums.
- **Memory.** {mb:.1f} MB of the {network} on disk, {ratio:.1%} of its {twin_mb:.1f} MB in bfloat16.
{metrics}
## Use

With CMQuant's files on the Python path:

```python
{imports}

pipe = {load}
image = pipe("a large red house", {arguments}).images[0]
image.save("picture.png")
```

The first call on a CPU compiles the kernels (20 seconds).
"""


def write_for_run(folder: Path, about: dict, steps: int) -> Path:
    """README.md of a run folder whose config.json is `about`; steps: the most that it was trained for."""
    network, report = about["network"], folder / "report.json"
    family = FAMILIES[network["model"]]
    return _write(
        folder,
        base=network["base"],
        network=network["class"],
        layers=about["layers"],
        weights=[folder / "model.safetensors"],
        steps=steps,
        imports="from models import pipeline",
        load=f'pipeline.load_pipeline("{folder.name}")',
        arguments=f"num_inference_steps={steps}, guidance_scale={family.few_step_guidance(network.get('guidance'))}",
        metrics=_metrics(json.loads(report.read_text())) if report.is_file() else "",
    )


def write_for_pipeline(folder: Path) -> Path:
    """README.md of a folder that save_pretrained wrote. UserError if none of its networks is packed."""
    config = next((path for path in folder.glob("*/config.json") if '"quant_method": "cmquant"' in path.read_text()), None)
    if config is None:
        raise UserError(
            f"{folder} holds no packed network: quantize it with `python train.py --model MODEL --teacher {folder} --cm LORA`"
        )
    about = json.loads(config.read_text())
    family, packed = family_of(about), about["quantization_config"]
    steps, (height, width) = packed.get("steps", 4), (8 * side for side in packed["latent"][1:])  # not the base's own size
    size, guidance = f"height={height}, width={width}", family.few_step_guidance(packed.get("guidance"))
    return _write(
        folder,
        base=packed["base"],
        network=about["_class_name"],
        layers=packed["layers"],
        weights=sorted(config.parent.glob("*.safetensors")),
        steps=steps,
        imports="import torch\nfrom diffusers import DiffusionPipeline\n\nimport models.pipeline  # registers cmquant",
        load=f'DiffusionPipeline.from_pretrained("{folder.name}", torch_dtype=torch.bfloat16)',
        arguments=f"num_inference_steps={steps}, {size}, guidance_scale={guidance}",
        metrics="",
    )


def _write(folder: Path, base: str, network: str, layers: dict[str, dict], weights: list[Path], **texts) -> Path:
    """Fills in CARD. base: hub id or path of what was quantized; network: its class; layers: the table of layers of the checkpoint;
    weights: the network's files; texts: entries of CARD that are written as they are."""
    known = (entry for family in FAMILIES.values() for entry in family.licences.items())
    licence, in_words = next((licence for name, licence in known if name in base), ({"license": "other"}, f"see {base}"))
    origin = {"base_model": base, "base_model_relation": "quantized"} if is_hub_id(base) else {}
    tags = ["cmquant", "consistency-model", "w4a4", "quantized"]
    front = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **licence, **origin)
    size, twin = _sizes(weights, layers)
    groups = sorted({(row["group_w"], row["group_x"]) for row in layers.values()})
    kinds = Counter(row["kind"] for row in layers.values())
    text = CARD.format(
        front=front.to_yaml(),
        title=f"{Path(base).name}, W4A4 in few steps",
        base=base,
        licence=in_words,
        groups=" and ".join(f"groups of {w} (weights), {x} (activations)" for w, x in groups),
        kinds=", ".join(f"{n} layers {kind.upper()}" for kind, n in sorted(kinds.items())),
        network=network,
        mb=size / 1e6,
        twin_mb=twin / 1e6,
        ratio=size / twin,
        **texts,
    )
    with files.atomic(folder / "README.md") as file:
        file.write_text(text)
    return folder / "README.md"


def is_hub_id(base: str) -> bool:
    """Whether `base` is OWNER/NAME and not a local path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()


def _sizes(weights: list[Path], layers: dict[str, dict]) -> tuple[int, int]:
    """(bytes of the tensors in `weights`, bytes in bfloat16 of the network that was quantized), from the files' headers."""
    size, twin = 0, sum(2 * math.prod(row["shape"]) for row in layers.values())
    for path in weights:
        with open(path, "rb") as file:  # safetensors: eight bytes for the header's length, the header in JSON, the tensors
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for key, tensor in header.items():
            start, end = tensor["data_offsets"]
            size += end - start
            layer, _, name = key.removeprefix("net.").rpartition(".")
            if layer not in layers or name == "bias":
                twin += 2 * math.prod(tensor["shape"])
    return size, twin


def _metrics(report: dict) -> str:
    """report.json for the card: its numbers as a list, its rows of scores as a table."""
    text = f"\n## Metrics\n\nMeasured by CMQuant's evaluate.py on {report['n']} pictures of {report['steps']} steps.\n\n"
    text += "".join(f"- {name}: {value:.3f}\n" for name, value in report.items() if isinstance(value, float))
    if rows := {name: row for name, row in report.items() if isinstance(row, dict)}:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        for name, row in rows.items():
            lines.append([name, *(f"{row[c]:.3f}" if isinstance(row.get(c), float) else "" for c in columns)])
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text
