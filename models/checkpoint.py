"""Packed students on disk: the start of a training with its anchor, and the deployed checkpoint.

start.safetensors    the packed student before training, its anchor A0, B0 under anchor/
model.safetensors    packed codes uint8, multipliers two to a byte, scales one byte, LoRA (bfloat16, or int8 with two scales a
                     rank), inv_smooth and shift (bfloat16, float32 where that would lose something), the 16-bit layers and the
                     text encoder bfloat16; config.json has the table of layers, also of those that stay in 16 bits
"""

from collections import Counter
from pathlib import Path

import torch

import kernels
import quant
from layers import (
    W4A16Linear,
    anchor_state,
    load_anchor_state,
    merged_layer,
    packed_layers,
    place_packed,
    replace_layer,
    set_backend,
    store_8bit,
)
from models.denoiser import FAST, Denoiser, blueprint, float_layers, from_blueprint, random_denoiser
from run import files
from run.common import UserError
from run.state import newest, parameters_of


def _packed_model(name: str | dict, table: dict[str, dict], tensors: dict[str, torch.Tensor], where: Path) -> Denoiser:
    """The architecture (name of an embedded one, or denoiser.blueprint's answer), packed where `table` says so, with `tensors`."""
    student = random_denoiser(name) if isinstance(name, str) else from_blueprint(name)
    try:
        place_packed(student.net, table)
        state = student.state_dict()
        tensors = {k: v.to(state[k].dtype) if isinstance(name, str) else v for k, v in tensors.items() if k in state}
        student.load_state_dict(tensors, assign=not isinstance(name, str))
    except (RuntimeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{where} does not fit its table of layers: restore both files, or train again") from None
    student.knows_destination = True
    return student.eval().requires_grad_(False)


def network_of(student: Denoiser) -> str | dict:
    """What _packed_model builds the architecture from."""
    return student.family.name if student.family.embedded else blueprint(student)


def save_start(out: Path, student: Denoiser, table: dict) -> None:
    """The initialised student and its anchor, so that a killed run does not calibrate again."""
    anchors = {f"anchor/{k}": v for k, v in anchor_state(student).items()}
    about = {"layers": table, "network": network_of(student)}
    files.write_tensors(out / "start.safetensors", student.state_dict() | anchors, about, files.run_digest(out))


def has_start(out: Path) -> bool:
    """Whether there is a good start. A damaged one is named; it is to be made again."""
    return files.is_good(out / "start.safetensors", files.run_digest(out), "it is made again")


def load_start(out: Path) -> tuple[Denoiser, dict]:
    """Inverse of save_start. UserError for a missing or damaged file."""
    path = out / "start.safetensors"
    tensors, info = files.read_verified(path, "run the same command again, it will be made again", files.run_digest(out))
    student = _packed_model(info["network"], info["layers"], tensors, path)
    load_anchor_state(student, {k.removeprefix("anchor/"): v for k, v in tensors.items() if k.startswith("anchor/")})
    return student, info["layers"]


def stored(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a state_dict as model.safetensors has it."""
    if key.endswith(".scale_O") and tensor.dtype == torch.float32:
        return kernels.pack_scales(tensor)
    if tensor.dtype != torch.float32 or key.endswith(".lora_scale"):
        return tensor
    if key.endswith((".inv_smooth", ".shift")) and not torch.equal(tensor, tensor.bfloat16().float()):
        return tensor
    return tensor.bfloat16()


def deploy(student: Denoiser, table: dict, lora_bits: int) -> dict:
    """The student takes the form in which it would be read from a checkpoint, without a file: packed layers without anchors, of
    which nothing is trained. Returns its table of layers."""
    if lora_bits == 8:
        store_8bit(student.net)
    for _, layer in packed_layers(student.net):
        kept = {k: v if k in ("scale_O", "bias") else stored(f".{k}", v) for k, v in layer.state_dict().items()}
        layer.load_state_dict(kept, assign=True)
        layer.anchor_A = layer.anchor_B = None
    student.requires_grad_(False)
    return {name: row | {"lora": lora_bits} for name, row in table.items()}


def save_checkpoint(out: Path, student: Denoiser, table: dict, merged: bool, lora_bits: int = 16) -> None:
    """model.safetensors and the table of layers in config.json. merged: Q(Q + BA) in place of the branch, rounded to nearest.
    `student` takes its deployed form, with lora_bits 8 that of LoRA in 8 bits and scales of a byte."""
    if merged:
        for name, layer in list(packed_layers(student.net)):
            replace_layer(student.net, name, merged_layer(layer))
            table[name] = table[name] | {"rank": 0}
    table = deploy(student, table, lora_bits)
    tensors = {k: stored(k, v) for k, v in student.state_dict().items()}
    files.write_tensors(out / "model.safetensors", tensors, {"format": files.FORMAT}, files.run_digest(out))
    files.write_json(out / "config.json", files.read_config(out) | {"layers": table, "network": network_of(student)})


def pack_unfinished(run: Path) -> tuple[Path, int]:
    """RUN/unfinished, a run folder with the checkpoint that a student's run would leave if the update that it saved last were its
    last one, and the number of updates. UserError for a run without a start, or with damaged files."""
    packed, table = load_start(run)
    tensors, info, _ = newest(run)
    params, about, folder = dict(packed.named_parameters()), files.read_config(run), run / "unfinished"
    for name, trained in parameters_of(tensors).items():
        params[name].data.copy_(trained)
    files.write_json(folder / "config.json", about)
    save_checkpoint(folder, packed, table, about["config"]["deploy"] == "merged", about["config"]["lora_bits"])
    return folder, info["step"]


def load_checkpoint(folder: str | Path) -> tuple[Denoiser, dict]:
    """(the packed student, config.json). Embedded ones in denoiser.FAST, others in their run's dtype. UserError for a missing,
    unfinished, truncated or foreign checkpoint."""
    folder = Path(folder)
    about = files.read_finished(folder)
    hint = "the run is unfinished or damaged, run its train.py command again"
    tensors, _ = files.read_verified(folder / "model.safetensors", hint, files.run_digest(folder))
    floats = {f"net.{name}.scale_O" for name, row in about["layers"].items() if row.get("lora", 16) == 16}
    tensors = {k: kernels.unpack_scales(v) if k in floats else v for k, v in tensors.items()}
    student = _packed_model(about["network"], about["layers"], tensors, folder / "model.safetensors")
    backend = about["config"].get("backend", "native")  # older folders name none
    set_backend(student, "native" if backend == "compile" and student.family.embedded else backend)  # for the CPU
    return student.to(FAST if student.family.embedded else getattr(torch, about["config"]["dtype"])), about


def packed_size(student: Denoiser) -> dict[str, float]:
    """Bits per weight of the quantized layers without LoRA, megabytes of the packed network and of its bf16 twin."""
    packed, sizes = dict(packed_layers(student.net)), Counter()
    for key, tensor in student.net.state_dict().items():
        layer, _, name = key.rpartition(".")
        sizes[name if layer in packed and name != "bias" else "rest"] += stored(key, tensor).nbytes
    values = sum(layer.out * layer.taps * layer.channels for layer in packed.values())
    codes, lora = sizes["codes_OP"] + sizes["mult_P"] + sizes["scale_O"], sizes["lora_A"] + sizes["lora_B"] + sizes["lora_scale"]
    mb, mb_bf16 = sizes.total() / 1e6, (2 * values + sizes["rest"]) / 1e6
    return {"bits_per_weight": 8 * codes / max(1, values), "mb": mb, "mb_bf16": mb_bf16, "mb_lora": lora / 1e6}


def composition(student: Denoiser, rows: dict[str, int]) -> dict[str, float]:
    """Shares of a packed network: parameters, and multiply-accumulates of its Linear and Conv2d layers, that run in W4A4 (and in
    W4A8); parameters of branches, over those of the network without them; packed layers without a branch.

    rows {layer: rows (tokens or pixels) that went through it}: see evaluate.watched."""
    packed, sizes, products = dict(packed_layers(student.net)), Counter(), Counter()
    for name, layer in packed.items():
        kind = "w4a16" if isinstance(layer, W4A16Linear) else quant.number_format([layer.group_x]).lower()
        O, K, r = layer.out, layer.taps * layer.channels, layer.rank
        sizes += Counter({kind: O * K, "branch": r * (O + K)})
        products += Counter({kind: rows[name] * O * K, "branch": rows[name] * r * (O + K)})
    for name, layer in float_layers(student.net).items():
        products["16bit"] += rows[name] * layer.weight.numel()
    state = student.net.state_dict()
    sizes["16bit"] = sum(t.numel() for k, t in state.items() if k.rpartition(".")[0] not in packed or k.endswith(".bias"))
    network = sizes.total() - sizes["branch"]
    both = [name for name in ("w4a4", "w4a8") if sizes[name] or name == quant.number_format([]).lower()]
    return {
        **{f"{name}_parameters": sizes[name] / network for name in both},
        **{f"{name}_products": products[name] / products.total() for name in both},
        "branch_parameters": sizes["branch"] / network,
        "layers_without_branch": sum(not layer.rank for layer in packed.values()) / max(1, len(packed)),
    }
