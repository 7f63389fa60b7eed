"""A pipeline folder that diffusers loads without this repository:

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)

model_index.json names the class in FOLDER/pipeline.py (its template is in assets). diffusers imports that file and copies
those that it imports by `from .name import`. They lie beside it, and are the repository's own with three changes: they import each
other relatively, the C++ source is a string, and names and the namespace of operators have a digest of all sources in them, so
that folders of several versions can be loaded by one process.
"""

import json
import re
from pathlib import Path

import diffusers

from backends import cpu
from models.family import Family
from run import files
from run.common import UserError

ROOT = files.ASSETS.parent
PARTS = ("backends/gptq_gpu.py", "backends/cpu.py", "backends/gpu.py", "quant.py", "kernels.py", "layers.py", "models/quantizer.py")


def standalone_files() -> dict[str, str]:
    """{name: text} of the modules that running needs, without pipeline.py."""
    texts = {Path(part).stem: (ROOT / part).read_text() for part in PARTS} | {"source": cpu.source()}
    digest = files.digest_of(texts)[:8]
    prefix, own = f"cmquant_{digest}_", "|".join(Path(part).stem for part in PARTS)

    def relative(text: str) -> str:
        text = re.sub(rf"^import ({own})$", rf"from . import {prefix}\1 as \1", text, flags=re.MULTILINE)
        text = re.sub(rf"^from (?:backends\.|models\.)?({own}) import", rf"from .{prefix}\1 import", text, flags=re.MULTILINE)
        for line in re.findall(r"^from backends import .+$", text, re.MULTILINE):
            names = line.removeprefix("from backends import ").split(", ")
            text = text.replace(line, "from . import " + ", ".join(f"{prefix}{name} as {name}" for name in names))
        return re.sub(r"\bcmquant(?=::|\.w4a4|, m\))", f"cmquant_{digest}", text)  # operators

    code = {name: relative(text) for name, text in texts.items()}
    code["source"] = f'CPP = r"""{code["source"]}"""\n'
    first = "\nimport torch\n"  # of the imports that are not Python's own
    code["cpu"] = code["cpu"].replace(first, f"{first}\nfrom .{prefix}source import CPP\n", 1)
    code["cpu"] = re.sub(r"return .+attention\.cpp.+", "return CPP", code["cpu"])
    return {f"{prefix}{name}": text for name, text in code.items()}


def write_code(folder: Path, family: Family, packed, config: dict) -> None:
    """pipeline.py and what it imports, into a folder of save_pretrained. packed: how its network was packed, a CMQuantConfig;
    config: the network's own."""
    index, code = json.loads((folder / "model_index.json").read_text()), standalone_files()
    text = (files.ASSETS / "pipeline.py.template").read_text()
    for word, meaning in {
        "CLASS": index["_class_name"],
        "STEPS": str(packed.steps),
        "SIZE": ", ".join(map(str, packed.latent[1:])),
        "GUIDANCE": str(family.few_step_guidance(packed.guidance)),
        "MORE": json.dumps(family.call_options(config)),
        "PREFIX": next(iter(code)).removesuffix("gptq_gpu"),
        "QUANTIZER": next(module for module in code if module.endswith("_quantizer")),
        "IMPORTS": "\n".join(f"from .{module} import __doc__ as _  # noqa: F401" for module in code),
    }.items():
        text = text.replace(word, meaning)
    for module, body in {**code, "pipeline": text}.items():
        with files.atomic(folder / f"{module}.py") as file:
            file.write_text(body)
    with files.atomic(folder / "model_index.json") as file:
        file.write_text(json.dumps(index | {"_class_name": ["pipeline", index["_class_name"]]}, indent=2) + "\n")


def class_name(index: dict) -> str:
    """Of the pipeline class that a model_index.json names; a folder with code of its own names the file before it."""
    name = index["_class_name"]
    return name if isinstance(name, str) else name[1]


def without_code(folder: Path) -> type[diffusers.DiffusionPipeline]:
    """The pipeline class of a folder, diffusers' own where the folder brings code, which is then not run."""
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] == (name := class_name(index)):
        return diffusers.DiffusionPipeline
    if (parent := getattr(diffusers, name, None)) is None:
        raise UserError(f"{folder} has a pipeline class of its own, {name}, which is not run here: load it with diffusers")

    def load_config(cls, *args, **kwargs):
        found = parent.load_config(*args, **kwargs)
        return found | {"_class_name": name}

    return type(name, (parent,), {"load_config": classmethod(load_config)})
