"""What files of weights are, by the names, shapes and dtypes in their headers: before a tensor is read, and before a library drops
or bends what it does not know.

    base    quantized weights are codes that a loader without their quantizer casts to floats without a word, so a base that has any
            is refused. Plain 8-bit floats are rounded weights, and are read.
    LoRA    B A and alpha are read. Magnitudes (DoRA), Hadamard and Kronecker products (LoHa, LoKr), Tucker cores and full
            differences are refused: diffusers filters some of them out, and what is left is another LoRA.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from safetensors import safe_open

from run.common import UserError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
OF_CODES = {  # last parts of names, of codes and of what stands beside them
    "scale_weight", "weight_scale", "weight_scale_2", "scale_input", "input_scale", "scaled_fp8", "comfy_quant", "qweight",
    "wscales", "_data", "_scale", "quant_map", "absmax",
}  # fmt: skip
PLAIN_LORA = re.compile(r"lora(_linear_layer|\d)?[._](down|up|A|B)(\.\w+)?\.(weight|bias)$|alpha$")
OTHER_LORA = {
    ".dora_scale": "DoRA", ".lora_magnitude": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr", ".lora_mid": "Tucker", ".oft_": "OFT",
}  # fmt: skip
OF_TEXT_ENCODER = re.compile(r"lora_te\d?(?=_)|text_encoders\.\w+|text_encoder(_\d)?|te\d?(?=\.)")
LORA_NAME = "pytorch_lora_weights.safetensors"  # as diffusers writes it


class Header(NamedTuple):
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]


def read_headers(file: str | Path) -> dict[str, Header]:
    """Of every tensor of a safetensors file, by its name. SafetensorError: it is none, or damaged."""
    with safe_open(file, "pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}
        return {key: Header(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Bases


def check_unquantized(headers: dict[str, Header], base: str) -> None:
    """UserError if weights are codes, or have scales of their own beside them."""
    for key, (dtype, shape) in headers.items():
        stem, _, last = key.rpartition(".")
        scaled = last in OF_CODES or ".absmax" in key or (last == "scale" and f"{stem}.weight" in headers)
        if scaled or (len(shape) > 1 and dtype not in (*FLOATS, "I64")):  # I64: positions of older text encoders
            raise UserError(f"{base} is quantized ({key}: {dtype}): give the base in 16 bits (or plain fp8)")


def check_config_unquantized(config: dict, base: str) -> None:
    """UserError for the configuration of a part of a pipeline that was saved with a quantizer."""
    if about := config.get("quantization_config"):
        unknown = "by an unknown method"  # not a dictionary: of a network in memory, or a name alone
        method = about.get("quant_method", unknown) if isinstance(about, dict) else getattr(about, "quant_method", about)
        raise UserError(f"{base} is quantized ({method}): give the base in 16 bits")


def check_folder_unquantized(base: str, known: str, part: str = "") -> None:
    """UserError if a part of a pipeline says that it was saved with a quantizer, or the weights of `part` are codes. base: a
    folder, or a hub id of which the file `known` was fetched before."""
    folder = Path(base)
    if not folder.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(base, known) if base.count("/") == 1 else None
        if not isinstance(cached, str):
            return
        folder = Path(cached.removesuffix(known))
    for config in sorted(folder.glob("*/config.json")):
        about = json.loads(config.read_text(encoding="utf-8"))
        check_config_unquantized(about if isinstance(about, dict) else {}, f"{config.parent.name} of {base}")
    for file in sorted((folder / part).glob("*.safetensors")) if part else ():
        check_unquantized(read_headers(file), str(file))


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs


def is_lora(keys) -> bool:
    return any("lora" in key or any(mark in key for mark in OTHER_LORA) for key in keys)


def check_plain_lora(keys, file: str) -> None:
    """UserError for a LoRA of another kind than B A, and for what is no LoRA."""
    if not is_lora(keys):
        raise UserError(f"{file} holds no LoRA: choose another")
    if other := next((key for key in keys if not PLAIN_LORA.search(key)), None):
        kind = next((kind for mark, kind in OTHER_LORA.items() if mark in other), "a tensor of another kind")
        raise UserError(f"{file} is more than B A at {other} ({kind}, which is not read): choose a plain LoRA")


def text_encoders_of(keys) -> set[str]:
    """Which text encoders a LoRA has parts for, as its format names them."""
    return {found[0] for key in keys if (found := OF_TEXT_ENCODER.match(key))}


def choose_lora(where: str, names: list[str]) -> str:
    """The file of a folder or hub id: diffusers' own, or the only one. UserError for none or several."""
    names = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if len(names) == 1 or LORA_NAME in names:
        return LORA_NAME if LORA_NAME in names else names[0]
    if not names:
        raise UserError(f"{where} has no .safetensors file of a LoRA: name another folder, or a file")
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise UserError(f"{where} has several files ({some}): name one, as {where.rstrip('/')}/{names[0]}")


def find_lora(lora: str) -> Path:
    """The file of a LoRA: of a file, a folder, a hub id or OWNER/NAME/FILE, from the hub or its cache. UserError if there is none,
    OSError as the hub raises it."""
    path = Path(lora)
    if path.is_dir():
        return path / choose_lora(lora, [file.name for file in path.iterdir()])
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{lora} is no .safetensors file, and no other is read: convert it, or choose another LoRA")
    if path.is_file():
        return path
    owner, _, rest = lora.partition("/")
    name, _, file = rest.partition("/")
    if lora.startswith(("/", ".", "~")) or not name or (not file and name.endswith(".safetensors")):
        raise UserError(f"{lora} does not exist: give a LoRA's .safetensors file, its folder, or a hub id")
    repository = f"{owner}/{name}"
    if not file:
        try:
            names = [entry.rfilename for entry in huggingface_hub.model_info(repository).siblings]
        except Exception:  # without network, or without rights, which have no common class: what was fetched before
            cached = huggingface_hub.snapshot_download(repository, local_files_only=True)
            names = [entry.name for entry in Path(cached).iterdir()]
        file = choose_lora(lora, names)
    return Path(huggingface_hub.hf_hub_download(repository, file))
