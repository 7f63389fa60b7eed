"""Checkpoints that travel: packed networks of public models in diffusers' pipelines, and LoRAs in and out of them.

    from models import pipeline
    pipe = pipeline.load_pipeline("runs/sdxl")            from a run folder, or from a folder that save_pretrained wrote
    image = pipe("a house by a river", num_inference_steps=4, guidance_scale=1.0).images[0]

    python -m models.pipeline --checkpoint runs/sdxl --export diffusers --out FOLDER     a pipeline folder with a model card
    python -m models.pipeline --checkpoint runs/sdxl --export lora --out lora.safetensors      the branch A, B for stock diffusers
    python -m models.pipeline --checkpoint runs/sdxl --export update --out lora.safetensors    what training changed (export_lora)
    python -m models.pipeline --checkpoint runs/sdxl --export card                       README.md beside the weights

diffusers.  Importing this file adds the quantization method "cmquant" to the two mappings of diffusers.quantizers.auto. From
then on `save_pretrained` of a packed network and `from_pretrained` of network or pipeline are diffusers' own; without the
import from_pretrained says "Unknown quantization type, got cmquant". config.json carries the table of layers, from which
packed layers take the place of float ones before weights are read. Stored:

    scale_O            kernels.pack_scales: one byte (in memory float32, or with LoRA in 8 bits that byte)
    everything else    as it is.  torch_dtype casts the 16-bit layers alone; a round trip is equal bit for bit.

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
import itertools
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import delete_adapter_layers
from torch import nn
from torch.nn import functional as F

import kernels
import quant
from layers import PackedLayer, W4A4Conv2d, packed_layers, set_backend
from models import checkpoint, pretrained
from models.card import read_run, write_card
from models.denoiser import FAST, Denoiser, fuse, start_noise
from models.family import FAMILIES, family_of_network
from run import files
from run.common import UserError, check_device, run_script


class Method(str, Enum):  # noqa: UP042  (diffusers asks for .value, JSON for a str)
    CMQUANT = "cmquant"


class CMQuantConfig(QuantizationConfigMixin):
    """layers: the table of layers of a checkpoint; base: the pipeline that was quantized; backend: of the kernels; latent: the
    shape of the pictures' latents in training; guidance: what the network was given as its guidance, if it has that input; steps:
    the largest number that it was trained for."""

    def __init__(
        self, layers: dict, base="", backend="native", latent=(0, 128, 128), guidance=None, steps=4, quant_method=Method.CMQUANT
    ):
        self.quant_method, self.layers, self.base, self.backend = Method(quant_method), layers, base, backend
        self.latent, self.guidance, self.steps = list(latent), guidance, steps

    to_diff_dict = QuantizationConfigMixin.to_dict  # what repr prints


class CMQuantQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a network with a CMQuantConfig."""

    is_serializable, is_trainable, is_compileable = True, False, True

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError("CMQuant does not quantize while loading: make a checkpoint with train.py and load that")

    def _process_model_before_weight_loading(self, model, **kwargs):
        checkpoint.place_packed(model, self.quantization_config.layers)

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedLayer)

    def check_quantized_param_shape(self, param_name, current_param, loaded_param):
        raise ValueError(
            f"{param_name} has shape {tuple(loaded_param.shape)}, its table of layers says {tuple(current_param.shape)}"
        )

    def create_quantized_param(self, model, param_value, param_name, target_device, state_dict, *args, **kwargs):
        """The tensor as it was saved: `param_value` was already cast to torch_dtype."""
        module, _, name = param_name.rpartition(".")
        layer, tensor = model.get_submodule(module), state_dict[param_name].to(target_device)
        if name == "scale_O" and layer.scale_O.is_floating_point():
            tensor = kernels.unpack_scales(tensor)
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name in layer._parameters else tensor)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if absent := [k for k, v in model.state_dict().items() if v.is_meta]:
            raise ValueError(f"the weights lack {absent[0]} and {len(absent) - 1} more tensors: copy the whole folder again")
        set_backend(model, self.quantization_config.backend)

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        floats = {k: v for k, v in state_dict.items() if k.endswith(".scale_O") and v.is_floating_point()}
        return state_dict | {k: kernels.pack_scales(v) for k, v in floats.items()}, {}


auto.AUTO_QUANTIZER_MAPPING[Method.CMQUANT.value] = CMQuantQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.CMQUANT.value] = CMQuantConfig


def quantization_config(net: nn.Module) -> CMQuantConfig:
    return net.hf_quantizer.quantization_config


def denoiser_of(pipe) -> nn.Module:
    """The denoiser of a pipeline of any family, or None."""
    parts = (getattr(pipe, family.part, None) for family in FAMILIES.values() if family.part)
    return next((net for net in parts if net is not None), None)


def load_denoiser(folder: Path, dtype: torch.dtype) -> Denoiser:
    """The packed denoiser of a run folder, on the CPU, its 16-bit layers in `dtype`. UserError if the run is none, or damaged."""
    about = read_run(folder)
    denoiser, _ = checkpoint.load_checkpoint(folder)
    denoiser.to(dtype)
    backend, steps = about["config"].get("backend", "native"), files.most_steps(about["config"])
    config = CMQuantConfig(about["layers"], about["network"]["base"], backend, denoiser.latent, denoiser.guidance, steps)
    net = denoiser.net  # did not come by from_pretrained, and becomes one that save_pretrained can write
    net.hf_quantizer, net.is_quantized, net.quantization_method = CMQuantQuantizer(config), True, config.quant_method
    net.register_to_config(quantization_config=config)
    return denoiser


def load_pipeline(folder: str | Path, device="cpu", compile: bool | str = False, dtype: torch.dtype | None = None, base: str = ""):
    """The family's pipeline (StableDiffusionXLPipeline, FluxPipeline ..) with the packed denoiser and a scheduler for few steps.

    folder: a run folder of train.py, whose other components come from the base that it names (`base`: another copy of it, a
    hub id, folder or single file), or a pipeline folder of save_pretrained. dtype: of everything that is not packed; default
    bfloat16, on CPUs without units for it float32. compile: torch.compile of the denoiser (minutes, at the first call), in the mode
    that is named, if one is: "reduce-overhead" makes CUDA graphs. Layers that a run compiled one by one use the C++ kernel on
    a CPU. UserError with what to do."""
    check_device(device)
    folder, on_cpu = Path(folder), torch.device(device).type == "cpu"
    dtype = dtype or (FAST if on_cpu else torch.bfloat16)
    if (folder / "model_index.json").is_file():
        pipe = read_base(diffusers.DiffusionPipeline, str(folder), torch_dtype=dtype)
        net = denoiser_of(pipe)
        if net is None or not any(packed_layers(net)):
            raise UserError(
                f"{folder} holds no packed pipeline: quantize it with `python train.py --model MODEL --teacher {folder} --cm LORA`"
            )
    else:
        denoiser = load_denoiser(folder, dtype)
        net = denoiser.net
        pipe = _few_step_pipeline(denoiser, base or denoiser.base, components_of(folder), dtype)
    config = quantization_config(net)
    pipe.default_sample_size = max(config.latent[1:])  # where a call names no size
    if "sample_size" in net.config:  # StableDiffusionPipeline reads it there, and of what kind it is when it is made
        net.register_to_config(sample_size=pipe.default_sample_size)
        pipe._is_unet_config_sample_size_int = True
    pipe.to(device)
    if on_cpu and config.backend == "compile":
        set_backend(net, "native")
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
    base: another copy of the base. UserError if the run was made from random weights, or its base or LoRA is not there."""
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
    return pipe.to(device)


def draw_with_pipeline(pipe, prompts: list[str], steps: int, seed: int = 0, guidance: float | None = None) -> torch.Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] by a diffusers pipeline, one at a time; picture i starts from the noise of seed + i.
    guidance: default that of a consistency model."""
    net, side = denoiser_of(pipe), pipe.default_sample_size
    family = family_of_network(net)
    if guidance is None:
        guidance = family.few_step_guidance(quantization_config(net).guidance)
    shape = (family.latent[0], side, side)
    size = {"height": side * pipe.vae_scale_factor, "width": side * pipe.vae_scale_factor}
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i, prompt in enumerate(prompts):
        noise = start_noise(1, shape, seed + i)  # on the CPU in float32: the same one for every device and dtype
        noise = family.pack(pipe, noise).to(pipe.vae.device, pipe.vae.dtype)
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
        found = cls.load_config(base)["_class_name"]
        if cls is not diffusers.DiffusionPipeline and _stem(found) != _stem(cls.__name__):
            raise UserError(f"{base} is a {found}, not a {cls.__name__}: name the one that was quantized by --base")
        return pretrained.from_pretrained(cls, base, **kwargs)


def as_lora(layer: PackedLayer, A_rK: torch.Tensor, B_Or: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of `layer` as a LoRA of the float layer's geometry, float32: (r, I), (O, r) or (r, I, kh, kw), (O, r, 1, 1).

    Ours read x' = x * inv_smooth; this A reads x."""
    A_rK, B_Or = A_rK.detach().float(), B_Or.detach().float()
    if layer.inv_smooth is not None:
        A_rK = A_rK * layer.inv_smooth.repeat(layer.taps)
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


_STYLES = itertools.count()  # names for PEFT, which keeps adapters apart by name


def add_style_lora(pipe_or_net, file: str | Path | dict, scale: float = 1.0) -> Callable[[], None]:
    """A LoRA on top of a packed pipeline or network: y + scale (alpha / r) B A x, beside our branch. Call the result to remove it.

    file: any format that diffusers converts (PEFT's, kohya's, its own older ones; safetensors only), hub id or state dict.
    No tensor of the network changes: the branch is a forward hook, on packed and on 16-bit layers, and several add up. A
    pipeline's text encoders get theirs by PEFT. Remove styles before save_pretrained. UserError if the file fits no layer."""
    pipe = pipe_or_net if isinstance(pipe_or_net, diffusers.DiffusionPipeline) else None
    net = pipe_or_net if pipe is None else denoiser_of(pipe)
    family, name, factors = family_of_network(net), f"style_{next(_STYLES)}", {}
    file, shown = (dict(file), "the LoRA") if isinstance(file, dict) else (str(file), str(file))
    with contextlib.ExitStack() as undo:
        undo.callback(_forget_compiled, net)
        with pretrained.lora_errors(shown, "this model"):
            state, about, given = pretrained.read_lora(net, file)
            parts = {key.partition(".")[0] for key in state}
            if family.part in parts:
                factors = pretrained.lora_factors(net, state, about, shown)
            texts = [p for p in ("text_encoder", "text_encoder_2") if p in parts and getattr(pipe, p, None) is not None]
            for prefix in texts:
                text = getattr(pipe, prefix)
                undo.callback(delete_adapter_layers, text, name)
                options = dict(text_encoder=text, prefix=prefix, adapter_name=name, low_cpu_mem_usage=True)
                family.pipeline().load_lora_into_text_encoder(state, **options, **about)
                _beside_others(text, name, scale)
        if len(given) > len(texts):
            print(f"{shown}: of its parts for text encoders ({', '.join(sorted(given))}) {len(given) - len(texts)} are left out")
        if not factors and not texts:
            raise UserError(f"{shown} holds no LoRA for {type(net).__name__}: choose a LoRA that was made for it")
        for key, (down, up, strength) in factors.items():
            hook = _branch_hook(down, scale * strength * up, net)
            undo.callback(net.get_submodule(key).register_forward_hook(hook).remove)
        _forget_compiled(net)
        return undo.pop_all().close


def _forget_compiled(net: nn.Module) -> None:
    """Compiled code does not look for hooks."""
    if net._compiled_call_impl is not None:
        torch.compiler.reset()


def _beside_others(text: nn.Module, name: str, scale: float) -> None:
    """The adapter `name` of a text encoder acts at `scale`, beside those that are on already."""
    for layer in text.modules():
        if name in getattr(layer, "lora_A", {}):
            layer.set_adapter([*layer.lora_A])
            layer.set_scale(name, scale)


def _branch_hook(down: nn.Module, up: torch.Tensor, net: nn.Module) -> Callable:
    """y + up(down(x)), a forward hook. down: PEFT's layer A, with the geometry of the layer; up: B times its scale."""
    A, B = (t.detach().to(net.device, net.dtype) for t in (down.weight, up))

    def style(layer, args, y):
        x = args[0]
        if isinstance(down, nn.Conv2d):
            return y + F.conv2d(F.conv2d(x, A.to(x), None, down.stride, down.padding), B.to(x))
        return y + F.linear(F.linear(x, A.to(x)), B.to(x))

    return style


def save_pipeline(pipe, out: str | Path) -> None:
    """save_pretrained and the card. UserError while a style LoRA is on, which is not saved."""
    net = denoiser_of(pipe)
    hooks = (hook for layer in net.modules() for hook in layer._forward_hooks.values())
    if any(getattr(hook, "__name__", "") == "style" for hook in hooks):
        raise UserError("styles are not saved with a pipeline: remove them (call what add_style_lora returned), then save")
    try:
        pipe.save_pretrained(out)
        write_card(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another --out, or free some space") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.pipeline", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote")
    parser.add_argument("--export", required=True, choices=("diffusers", "lora", "update", "card"))
    parser.add_argument("--out", help="folder (diffusers) or .safetensors file (lora, update)")
    parser.add_argument("--base", default="", help="another copy of the base pipeline: folder, hub id or single file")
    args = parser.parse_args(argv)
    if args.export != "card" and not args.out:
        raise UserError(f"--export {args.export} writes what --out names: add it")
    if args.export in ("lora", "update"):
        print(f"{export_lora(args.checkpoint, args.out, args.export == 'update')} layers: {args.out}")
    elif args.export == "diffusers":
        save_pipeline(load_pipeline(args.checkpoint, dtype=torch.bfloat16, base=args.base), args.out)
        print(f"pipeline: {args.out}")
    else:
        print(f"model card: {write_card(args.checkpoint)}")


if __name__ == "__main__":
    run_script("models.pipeline", main)
