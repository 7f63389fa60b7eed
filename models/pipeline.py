"""Checkpoints that travel: packed networks of public models in diffusers' pipelines, and LoRAs in and out of them.

    from models import pipeline
    pipe = pipeline.load_pipeline("runs/sdxl")            from a run folder, or from a folder that save_pretrained wrote
    image = pipe("a house by a river", num_inference_steps=4, guidance_scale=1.0).images[0]

    python -m models.pipeline --checkpoint runs/sdxl --export diffusers --out FOLDER     a pipeline folder with a model card
    python -m models.pipeline --checkpoint runs/sdxl --export 16bit --out FOLDER         the same with plain layers, Q + B A
    python -m models.pipeline --checkpoint runs/sdxl --export sdnq --out FOLDER          the same in SDNQ's int4 with SVD
    python -m models.pipeline --checkpoint runs/flux --export nunchaku --out FOLDER      the same in diffusers' nunchaku_lite
    python -m models.pipeline --checkpoint runs/sdxl --export lora --out lora.safetensors      the branch A, B for stock diffusers
    python -m models.pipeline --checkpoint runs/sdxl --export update --out lora.safetensors    what training changed (export_lora)
    python -m models.pipeline --checkpoint runs/sdxl --export card                       README.md beside the weights

diffusers.  Packed networks are saved and loaded as those of any quantization method of diffusers (models/quantizer.py).

Scheduler.  The pipeline's steps are the jumps of tdpt.sample on path.grid(steps), the last one to clean data:

    UNets  DDIMScheduler, trailing spacing, set_alpha_to_one, eta 0: its timesteps are grid - 1. It finds the time to arrive at
           by subtracting 1000 // steps, so steps must divide 1000: 1, 2, 4, 5, 8.
    FLUX   FlowMatchEulerDiscreteScheduler with the path's shift, not that of the picture's size.

SDXL and Stable Diffusion take guidance_scale=1.0 (no second call: guidance is distilled into the network), FLUX what it was
trained with (--guidance, 3.5 by default: an input of the network). States are rounded to the pipeline's dtype between steps; in
float32 they are tdpt.sample's.

Left out on purpose: device_map and offloading of single layers, pipelines for inpainting and image-to-image (from_pipe gives them).
"""

import argparse
import contextlib
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import nn

import quant
from backends import attention
from data import sources
from layers import PackedLayer, W4A4Conv2d, packed_layers, set_backend
from models import checkpoint, exports, headers, pretrained
from models.card import few_step_call, method_of, public_name, read_run, write_card, write_export_card
from models.denoiser import FAST, Denoiser, fuse, start_noise
from models.family import FAMILIES, family_of_network
from models.quantizer import CMQuantConfig, CMQuantQuantizer, as_packed, quantization_config, register
from models.standalone import class_name, without_code, write_code
from run import files
from run.common import UserError, check_device, run_script


def denoiser_of(pipe) -> nn.Module:
    """The denoiser of a pipeline of any family, or None."""
    parts = (getattr(pipe, family.part, None) for family in FAMILIES.values() if family.part)
    return next((net for net in parts if net is not None), None)


def load_denoiser(folder: Path, dtype: torch.dtype) -> Denoiser:
    """The packed denoiser of a run folder, on the CPU, its 16-bit layers in `dtype`. UserError if the run is none, or damaged."""
    about = read_run(folder)
    denoiser, _ = checkpoint.load_checkpoint(folder)
    as_few_step(denoiser.to(dtype), about["layers"], about["config"])
    return denoiser


def as_few_step(denoiser: Denoiser, table: dict[str, dict], config: dict) -> None:
    """The packed network, which did not come by from_pretrained, becomes one that save_pretrained can write. config: that of the
    run, train.Config as a dict."""
    net, steps = denoiser.net, files.most_steps(config)
    how = {"whole": config.get("cm") == pretrained.WHOLE, "method": method_of(config)}
    about = denoiser.base, config.get("backend", "native"), denoiser.latent, denoiser.guidance, steps
    quantization = CMQuantConfig(table, *about, **how)
    net.hf_quantizer, net.quantization_method = CMQuantQuantizer(quantization), quantization.quant_method
    as_packed(net)
    net.register_to_config(quantization_config=quantization)


def to_be_packed(pipe, resolution: int = 0) -> Denoiser:
    """The denoiser of a diffusers pipeline in memory, to be packed in place; resolution: of its pictures, 0: their own. UserError
    for a pipeline of no family, and for what cannot be packed as it is: another kind of layers, hooks, compiled code, float16."""
    net = denoiser_of(pipe)
    if hasattr(net, "_orig_mod") or getattr(net, "_compiled_call_impl", None):
        raise UserError("the network is compiled: quantize it first, and compile it after that")
    if net is None or (family := family_of_network(net)) is None or family.embedded:
        known = " or ".join(family.pipeline_name for family in FAMILIES.values() if family.pipeline_name)
        raise UserError(f"{type(pipe).__name__} is of no family here, or its network is not: give a {known}")
    if any(packed_layers(net)):
        raise UserError("the pipeline is packed already: give the one in 16 bits that it was made from")
    if getattr(net, "peft_config", None):
        raise UserError("adapters cannot be packed: call the pipeline's fuse_lora() and unload_lora_weights(), then quantize")
    if getattr(net, "encoder_hid_proj", None) is not None:
        raise UserError("an IP-Adapter cannot be packed: call the pipeline's unload_ip_adapter(), quantize, and load it again")
    if hasattr(net, "_hf_hook") or any(hasattr(module, "_diffusers_hook") for module in net.modules()):
        hooks = "the network has hooks (offloading, casting by layer, caches)"
        raise UserError(f"{hooks}: load the pipeline without them, and call to(device) of one that has room for it")
    if any(getattr(module, "fused_projections", False) for module in net.modules()):
        raise UserError("its projections are fused: call the network's unfuse_qkv_projections(), then quantize")
    if missing := [name for name in pipe.components if name.startswith("text_encoder") and pipe.components[name] is None]:
        raise UserError(f"the pipeline has no {missing[0]}, by which the prompts are to be read: load it whole")
    if net.dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"statistics in {net.dtype} would overflow: call the pipeline's to(torch.bfloat16), then quantize")
    base = pretrained.local_path(str(pipe.name_or_path or ""))
    pretrained.check_architecture(family, dict(net.config) | {"_class_name": type(net).__name__}, base or "the pipeline")
    scheduler = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    return pretrained.as_denoiser(family, net, scheduler, base, resolution)


def around(pipe, denoiser: Denoiser, table: dict[str, dict], config: dict):
    """`pipe` with its denoiser packed in place, as load_pipeline makes one of a run folder. config: train.Config as a dict."""
    as_few_step(denoiser, table, config)
    pipe.register_modules(scheduler=denoiser.family.few_step_scheduler(denoiser.scheduler, denoiser.path))
    draw_at_size_of_training(pipe)
    return pipe


def draw_at_size_of_training(pipe) -> None:
    """A call of `pipe` that names no size draws pictures of the size that its network was trained for."""
    net = denoiser_of(pipe)
    pipe.default_sample_size = max(few_step_config(net).latent[1:])
    if "sample_size" in net.config:  # StableDiffusionPipeline reads it there, and of what kind it is when it is made
        net.register_to_config(sample_size=pipe.default_sample_size)
        pipe._is_unet_config_sample_size_int = True


def few_step_config(net: nn.Module) -> CMQuantConfig:
    """The quantization_config of a network that train.py made. UserError for another."""
    config = quantization_config(net) if getattr(net, "hf_quantizer", None) else None
    if getattr(config, "steps", None) is None:
        raise UserError("the network was not trained for few steps, or is no longer packed: use diffusers' own methods for it")
    return config


def load_pipeline(
    folder: str | Path,
    device="cpu",
    compile: bool | str = False,
    dtype: torch.dtype | None = None,
    base: str = "",
    attention_8bit=False,
):
    """The family's pipeline (StableDiffusionXLPipeline, FluxPipeline ..) with the packed denoiser and a scheduler for few steps.

    folder: a run folder of train.py, whose other components come from the base that it names (`base`: another copy of it, a
    hub id, folder or single file), or a pipeline folder of save_pretrained. dtype: of everything that is not packed; default
    bfloat16, on CPUs without units for it float32. compile: torch.compile of the denoiser (minutes, at the first call), in the mode
    that is named, if one is: "reduce-overhead" makes CUDA graphs. Layers that a run compiled one by one use the C++ kernel on
    a CPU. attention_8bit: of the denoiser, on a CPU (backends/attention.py). UserError with what to do."""
    check_device(device)
    folder, on_cpu = Path(folder), torch.device(device).type == "cpu"
    dtype = dtype or (FAST if on_cpu else torch.bfloat16)
    if attention_8bit and not on_cpu:
        raise UserError("attention in 8 bits is for CPUs: on a GPU choose a backend by the denoiser's set_attention_backend")
    register()
    if (folder / "model_index.json").is_file():
        pipe = read_base(without_code(folder), str(folder), torch_dtype=dtype)
        net = denoiser_of(pipe)
        if net is None or not any(packed_layers(net)):
            raise UserError(
                f"{folder} holds no packed pipeline: quantize it with `python train.py --model MODEL --teacher {folder} --cm LORA`"
            )
    else:
        denoiser = load_denoiser(folder, dtype)
        net = denoiser.net
        pipe = _few_step_pipeline(denoiser, base or denoiser.base, components_of(folder), dtype)
    draw_at_size_of_training(pipe)
    pipe.to(device)
    if on_cpu and few_step_config(net).backend == "compile":
        set_backend(net, "native")
    if attention_8bit:
        attention.in_8_bits(net)
    if compile:
        net.compile(mode=compile if isinstance(compile, str) else None)
    return pipe


def _few_step_pipeline(denoiser: Denoiser, base: str, components: str, dtype: torch.dtype):
    """The family's pipeline with this denoiser and a scheduler for few steps, and all the rest of `base`."""
    family = denoiser.family
    ours = {family.part: denoiser.net, "scheduler": family.few_step_scheduler(denoiser.scheduler, denoiser.path)}
    if not pretrained.is_file(base):
        return read_base(family.pipeline(), base, torch_dtype=dtype, **ours)
    pipe = pretrained.load_text_pipeline(family, base, components, dtype)
    pipe.register_modules(vae=pretrained.load_vae(family, base, components).to(dtype), **ours)
    return pipe


def load_16bit(folder: str | Path, cm: bool, device="cpu", base: str = ""):
    """A pipeline in 16 bits (float32 on CPUs without units for bfloat16) that the student of a run folder is measured against: its
    base as it is or, if `cm`, its consistency model: --cm fused into the base, with the student's scheduler for few steps.
    base: another copy of the base. On a GPU that has no room for all of it the layers wait in main memory, which is slow. UserError
    if the run was made from random weights, or its base or LoRA is not there."""
    check_device(device)
    folder, dtype = Path(folder), FAST if torch.device(device).type == "cpu" else torch.bfloat16
    about = read_run(folder)
    config, family = about["config"], FAMILIES[about["network"]["model"]]
    if config["weights"] == "random":
        raise UserError(f"{folder} was made from random weights and has no 16-bit models to draw with: give --models ours")
    base, components = base or about["network"]["base"], components_of(folder)
    if cm:
        asked = config | {"teacher": base, "cm": cm_of(folder), "device": "cpu"}
        network = fuse(pretrained.open_cm(argparse.Namespace(**asked), dtype))
        pipe = _few_step_pipeline(network, base, components, dtype)
    else:
        pipe = read_base(family.pipeline(), base, components, torch_dtype=dtype)
    pipe.default_sample_size = max(about["network"]["latent"][1:])
    return placed(pipe, torch.device(device))


def placed(pipe, device: torch.device):
    """`pipe` on the device. On a GPU with too little room diffusers brings each layer there when it is called."""
    if device.type == "cuda":
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        size, room = (
            sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers())),
            torch.cuda.mem_get_info(device)[0],
        )
        if size > 0.8 * room:  # the rest is for activations
            print(f"{size / 1e9:.1f} GB of weights do not fit beside activations in {room / 1e9:.1f} GB: they come layer by layer")
            pipe.enable_sequential_cpu_offload(device=device)
            return pipe
    return pipe.to(device)


def draw_with_pipeline(pipe, prompts: list[str], steps: int, seed: int = 0, guidance: float | None = None) -> torch.Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] by a diffusers pipeline, one at a time; picture i starts from the noise of seed + i.
    guidance: default that of a consistency model."""
    net, side = denoiser_of(pipe), pipe.default_sample_size
    family = family_of_network(net)
    if guidance is None:
        guidance = family.few_step_guidance(quantization_config(net).guidance)
    shape = (family.latent[0], side, side)
    size = {"height": side * pipe.vae_scale_factor, "width": side * pipe.vae_scale_factor} | family.call_options(net.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i, prompt in enumerate(prompts):
        noise = start_noise(1, shape, seed + i)  # on the CPU in float32: the same one for every device and dtype
        noise = family.pack(pipe, noise).to(pipe._execution_device, pipe.vae.dtype)
        picture = pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, latents=noise, **size).images[0]
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures)


def cm_of(folder: Path) -> str:
    """--cm of a run folder; of --cm self the file that the run made, wherever the folder is now."""
    config = files.read_config(folder)["config"]
    own = folder / "cm" / f"{config['model']}-cm.safetensors"
    return str(own) if own.is_file() else config["cm"]


def components_of(folder: Path) -> str:
    """--components of a run folder; "" where there were none."""
    return "" if (folder / "model_index.json").is_file() else files.read_config(folder)["config"].get("components", "")


def _stem(name: str) -> str:
    """What the pipelines of one family begin with: StableDiffusionXL of StableDiffusionXLInpaintPipeline."""
    stems = [family.pipeline_name.removesuffix("Pipeline") for family in FAMILIES.values() if family.pipeline_name]
    return max((stem for stem in stems if name.startswith(stem)), key=len, default=name)


def read_base(cls, base: str, components: str = "", **kwargs):
    """cls.from_pretrained, or from_single_file with the configs of `components`, of a pipeline. UserError if that fails or it is of
    another class."""
    if not base:
        raise UserError(
            "the run was made from random weights, not from a base: name a folder with its text encoders and VAE by --base"
        )
    with pretrained.loading_errors("the pipeline", base):
        if pretrained.is_file(base):
            return cls.from_single_file(base, **({"config": components} if components else {}), **kwargs)
        found = class_name(cls.load_config(base))
        if cls is not diffusers.DiffusionPipeline and _stem(found) != _stem(cls.__name__):
            raise UserError(f"{base} is a {found}, not a {cls.__name__}: name the one that was quantized by --base")
        return pretrained.from_pretrained(cls, base, **kwargs)


def as_lora(layer: PackedLayer, A_rK: torch.Tensor, B_Or: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of `layer` as a LoRA of the float layer's geometry, float32: (r, I), (O, r) or (r, I, kh, kw), (O, r, 1, 1).

    Ours read x' = x * inv_smooth; this A reads x."""
    A_rK, B_Or = layer.for_input(A_rK.detach().float()), B_Or.detach().float()
    if not isinstance(layer, W4A4Conv2d):
        return A_rK, B_Or
    return quant.unflatten_conv(A_rK, layer.kernel_size), B_Or[:, :, None, None]


def export_lora(folder: str | Path, out: str | Path, update: bool = False) -> int:
    """Writes the branch of a run folder as a LoRA in diffusers' format (PEFT's keys), bfloat16 if that loses nothing, else
    float32. Returns the number of layers; each layer's rank is inferred on load. UserError for a checkpoint without branch.

    `pipe.load_lora_weights(out)` of stock diffusers adds it to the 16-bit base W. What that is good for:

    branch   A, B as deployed. The deployed network is Q + B A with Q = round(W - B0 A0): the initial B0 A0 is the principal part
             of W that was kept off the grid, so W + B A has it twice and draws no better pictures. It is the deployed network,
             but for the rounding of activations, on a base whose weights are Q (PackedLayer.merged_weight without a branch, by
             inv_smooth) and whose biases are the packed layers'; with
             --init zero, where B0 = 0, it is the update. Else: to read ranks and directions with PEFT's tools, to compare runs.
    update   B A - B0 A0, what training changed (at twice the rank, with the A0, B0 of start.safetensors): meant for the 16-bit
             consistency model, that is the base with the --cm LoRA. Part of it repairs rounding that the base does not have."""
    folder = Path(folder)
    denoiser, start, layers = load_denoiser(folder, torch.float32), {}, {}
    if update:
        start = dict(packed_layers(checkpoint.load_start(folder)[0].net))
    family = denoiser.family
    for name, layer in packed_layers(denoiser.net):
        if layer.rank:
            A_rK, B_Or = layer.factors()
            if update:
                A_rK = torch.cat([A_rK, start[name].anchor_A])
                B_Or = torch.cat([B_Or, -start[name].anchor_B], 1)
            A, B = as_lora(layer, A_rK, B_Or)
            layers |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    if not layers:
        raise UserError(f"{folder} was deployed merged and has no LoRA: train with --deploy branch")
    if all(torch.equal(t.bfloat16().float(), t) for t in layers.values()):
        layers = {k: t.bfloat16() for k, t in layers.items()}  # one dtype for all: PEFT multiplies B by A
    with files.atomic(Path(out)) as file:
        family.pipeline().save_lora_weights(file.parent, **{f"{family.part}_lora_layers": layers}, weight_name=file.name)
    return len(layers) // 2


def add_style_lora(pipe, lora: str | Path | dict, name: str = "style") -> None:
    """pipe.load_lora_weights(lora, adapter_name=name), but a UserError for a LoRA of which diffusers would leave out a part with a
    warning (DoRA, LoHa, biases), or all, and a line about parts for text encoders that are left out.

    lora: any format that diffusers converts (PEFT's, kohya's, its own older ones; safetensors only), file, folder, hub id or state
    dict. Then pipe.set_adapters([names], [strengths]) says which act, and pipe.unload_lora_weights() takes all away."""
    net, shown = denoiser_of(pipe), "the LoRA" if isinstance(lora, dict) else str(lora)
    with pretrained.lora_errors(shown, "this model"):
        lora = dict(lora) if isinstance(lora, dict) else headers.find_lora(shown)
        state, about, given = pretrained.read_lora(net, lora)
        prefix = f"{family_of_network(net).part}."
        factors = pretrained.lora_factors(net, state, about, shown) if any(key.startswith(prefix) for key in state) else {}
        if not factors and not given:
            raise UserError(f"{shown} holds no LoRA for {type(net).__name__}: choose a LoRA that was made for it")
        pipe.load_lora_weights(lora, adapter_name=name)
    texts = [getattr(pipe, part, None) for part in ("text_encoder", "text_encoder_2")]
    read = sum(name in (getattr(text, "peft_config", None) or {}) for text in texts)
    if read < len(given):
        print(f"{shown}: of its parts for text encoders ({', '.join(sorted(given))}) {len(given) - read} are left out")


def save_pipeline(pipe, out: str | Path, base_model: str = "", report: Path | None = None) -> None:
    """save_pretrained, what loads the folder without this repository, and a card. base_model: hub id of the base, where that was a
    copy; report: report.json of the run, for the card. UserError while adapters or an IP-Adapter are on, which save_pretrained
    would take for the network's own."""
    out, net = Path(out), denoiser_of(pipe)
    if getattr(net, "peft_config", None):
        raise UserError("adapters are not saved with a pipeline: call its unload_lora_weights(), then save")
    if getattr(net, "encoder_hid_proj", None) is not None:
        raise UserError("an IP-Adapter is not saved with a pipeline: call its unload_ip_adapter(), then save")
    config = few_step_config(net)
    with writing(out):
        pipe.save_pretrained(out)
        forget_paths(out, base_model or public_name(config.base))
        write_code(out, family_of_network(net), config, net.config)
        if report and report.is_file():
            shutil.copy(report, out / "report.json")
        write_card(out)


def export_diffusers(folder: str | Path, out: str | Path, base: str = "", base_model: str = "") -> None:
    """save_pipeline of a run folder, in bfloat16; base: another copy of the base's other parts."""
    save_pipeline(load_pipeline(folder, dtype=torch.bfloat16, base=base), out, base_model, Path(folder, "report.json"))
    print(f"pipeline: {out}")


def export_pipeline(pipe, out: str | Path, kind: str = "16bit", base_model: str = "") -> float:
    """save_pretrained of a packed pipeline whose network is put into another format here (exports.FORMATS), and a card. Returns the
    PSNR in dB of its pictures to those of the packed one, which draws them first. UserError for what the format cannot hold."""
    out, net, prompts = Path(out), denoiser_of(pipe), sources.SAMPLE_PROMPTS[:2]
    config, family = few_step_config(net), family_of_network(net)
    guidance, base = family.few_step_guidance(config.guidance), base_model or public_name(config.base)
    exported = exports.FORMATS[kind](net)
    before = draw_with_pipeline(pipe, prompts, config.steps)
    exports.replace(net, exported)
    distance = sources.psnr(draw_with_pipeline(pipe, prompts, config.steps, guidance=guidance), before)
    height, width = (pipe.vae_scale_factor * side for side in config.latent[1:])
    call = few_step_call(family, net.config, config.steps, config.guidance, height=height, width=width)
    with writing(out):
        pipe.save_pretrained(out)
        forget_paths(out, base)
        write_export_card(out, kind, type(net).__name__, base, call, distance, len(prompts), **exported.about)
    return distance


def forget_paths(folder: Path, base: str) -> None:
    """No paths of this machine in the configurations of a pipeline folder: `base` for that of the base, and no `_name_or_path`."""
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        about = json.loads(file.read_text())
        about.pop("_name_or_path", None)
        if about.get("quantization_config", {}).get("quant_method") == "cmquant":
            about["quantization_config"]["base"] = base
        with files.atomic(file) as new:
            new.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def writing(out: str | Path):
    """UserError for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another --out, or free some space") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.pipeline", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote")
    parser.add_argument("--export", required=True, choices=("diffusers", *exports.FORMATS, "lora", "update", "card"))
    parser.add_argument("--out", help=".safetensors file (lora, update) or folder (the others)")
    parser.add_argument("--base", default="", help="another copy of the base pipeline: folder, hub id or single file")
    parser.add_argument("--base-model", default="", metavar="ID", help="hub id of the base for the card, where that was a copy")
    args = parser.parse_args(argv)
    if args.export != "card" and not args.out:
        raise UserError(f"--export {args.export} writes what --out names: add it")
    if args.export in ("lora", "update"):
        print(f"{export_lora(args.checkpoint, args.out, args.export == 'update')} layers: {args.out}")
    elif args.export == "diffusers":
        export_diffusers(args.checkpoint, args.out, args.base, args.base_model)
    elif args.export in exports.FORMATS:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = load_pipeline(args.checkpoint, device, dtype=torch.bfloat16, base=args.base)
        distance = export_pipeline(pipe, args.out, args.export, args.base_model)
        print(f"pipeline: {args.out}, its pictures {distance:.1f} dB from those of the packed one")
    else:
        print(f"model card: {write_card(args.checkpoint, args.base_model)}")


if __name__ == "__main__":
    run_script("models.pipeline", main)
