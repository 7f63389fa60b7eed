"""Model families: one record for each kind of model, and nowhere else a question which kind it is.

A `Family` says what is particular about its members: the denoiser's class, how its inputs are built from latents and captions, its
noise path, which of its layers may go to 4 bits, how guidance enters, which diffusers pipeline it belongs to and how that pipeline
encodes captions. A new family is a new record in FAMILIES, its official architecture in assets/architectures (as diffusers'
config.json has it, without what is the default of the class), and its miniature in the tests.

    tiny, tiny-flux      trained here (assets/), on procedural scenes, with a text encoder of their own (tiny.py)
    small                tiny twice as wide, on scenes of 64x64 pixels; its weights do not ship
    sdxl, sd15, flux     public weights in diffusers' formats (models/pretrained.py); sd15 includes Stable Diffusion 2.x and
                         SD-Turbo, which are the same classes at another width of the text

Conditioning `cond` is a dict of tensors with leading batch dimension B: tokens (B, L, D); pooled (B, D) where the network reads a
pooled embedding; time_ids (B, 6) where it takes sizes (SDXL): original height and width, top and left of the crop, height and
width of the picture, in pixels.

Layers (`precision`): what touches latents, and the MLPs that embed time and pooled text, keep 16 bits: at most 0.4% of the
parameters and much of the error. Layers that run once a step and not once a token (FLUX's AdaLN modulations, the UNets'
time_emb_proj, FLUX's context_embedder) have 4-bit weights and unquantized activations, W4A16. Every other Linear and Conv2d is
W4A4.

Key: B batch, C, H, W latent shape, L caption tokens, D text width.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from models import outliers, tiny
from run import files
from tdpt import FlowPath, VPPath

FACTOR = 8  # pixels to a latent of every public family


@dataclass(frozen=True)
class Family:
    """What is particular about one kind of model. Functions that take `config` read the configuration of a diffusers network."""

    name: str  # --model
    network: type[nn.Module]  # diffusers' class of the denoiser
    is_one: Callable[[dict], bool]  # whether a configuration of class `network` belongs to this family
    latent: tuple[int, int, int]  # (C, H, W) of a picture of the official size
    tokens: int  # of a caption, at most
    cond_shapes: Callable[[dict, int], dict[str, tuple[int, ...]]]  # (config, tokens) -> shapes of cond without the batch
    inputs: Callable[..., dict]  # (config, x, timestep, cond, scalar) -> keyword arguments of the network's forward
    path: Callable[[dict, tuple[int, int, int]], VPPath | FlowPath]  # (scheduler's configuration, latent) -> noise path
    precision: Callable[[str], str]  # name of a layer -> 16bit, w4a16 or w4a4
    classifier_free: bool  # guidance u + w (c - u) by a second call; False: guidance is an input of the network
    scalar: Callable[..., Tensor | None] = lambda t, s, guidance: None  # the network's scalar input beside time, if it has one
    output: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y  # (network's answer, x) -> prediction (B, C, H, W)
    most_grid_points: float = 1000  # of a solver grid on the path
    preset: dict = field(default_factory=dict)  # defaults of train.Config for this family
    student: dict = field(default_factory=dict)  # and for its 4-bit students
    # families that are trained here
    embedded: bool = False  # weights in assets/, scenes as data, whose closing report is judged by the classifier of scenes
    text: Callable[[], nn.Module] | None = None  # the text encoder inside of the denoiser
    prepare: Callable[[nn.Module], None] = lambda net: None  # what a new network needs beside its configuration
    transfers: Callable[[nn.Module, nn.Module], Iterator] | None = None  # (network, text encoder) -> see outliers.py
    # public families
    base: str = ""  # hub id of the official base
    part: str = ""  # the denoiser's name in a pipeline and in its folder
    pipeline_name: str = ""  # of the class in diffusers
    encode: Callable[..., dict] | None = None  # (pipeline, captions, device, tokens at most) -> cond without time_ids
    call_options: Callable[[dict], dict] = lambda config: {}  # further arguments of the pipeline's calls, by the network's config
    text_options: dict = field(default_factory=dict)  # of from_pretrained, where text encoders alone are wanted
    takes_sizes: bool = False  # cond has time_ids
    guidance_input: Callable[[dict], float | None] = lambda config: None  # default of a network that has guidance as an input
    compare_guidance: float = 0.0  # of the base's own 25 steps in pictures that compare
    pack: Callable[..., Tensor] = lambda pipe, noise: noise  # (pipeline, noise (1, C, H, W)) -> latents as the pipeline takes them
    unlike: Callable[[dict], str] = lambda config: ""  # what a configuration has that is not computed here; "": nothing
    in_file: str = ""  # what_file_holds of a single file of this family
    check_shapes: Callable[[dict], str] = lambda shapes: ""  # what a single file without --components lacks; "": nothing
    scale_latents: Callable[..., Tensor] = lambda config, z: (
        z * config.scaling_factor
    )  # (VAE's configuration, latents), as its pipeline
    few_step_scheduler: Callable | None = None  # (base's scheduler configuration, path) -> scheduler whose steps are path.jump
    cm_example: str = ""  # a consistency LoRA, with the flags that it needs
    licences: dict[str, tuple[dict, str]] = field(default_factory=dict)  # part of a base's name -> its entries in a card, sentence

    def build(self) -> nn.Module:
        """The official architecture with random weights."""
        net = self.network.from_config(json.loads((files.ASSETS / "architectures" / f"{self.name}.json").read_text()))
        self.prepare(net)
        return net

    def few_step_guidance(self, guidance: float | None) -> float:
        """guidance_scale of a call: 1 where guidance is distilled into the network, else what the network was given."""
        return 1.0 if self.classifier_free else 3.5 if guidance is None else guidance

    def text_tokens(self, config) -> int:
        """The most tokens of a caption for a network of this configuration."""
        return self.call_options(config).get("max_sequence_length", self.tokens)

    def pipeline(self):
        """diffusers' pipeline class."""
        import diffusers  # its pipelines take seconds to import, and only public families need them
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_error()  # of image processors that want torchvision, which no part of ours calls
        cls = getattr(diffusers, self.pipeline_name)
        logging.set_verbosity(before)  # a text encoder whose file lacks weights must be heard of
        return cls

    @property
    def side(self) -> int:
        """Pixels along a side of an embedded model's pictures."""
        return self.latent[1] * tiny.patch(self.latent[0])

    def build_meta(self) -> nn.Module:
        """The official network in bfloat16, without memory."""
        with torch.device("meta"):
            net = self.build()
        return nn.Module.to(net, torch.bfloat16)  # diffusers' own .to warns about layers that it has none of


def family_of(config: dict) -> Family | None:
    """The family of a network's configuration (with its _class_name), or None."""
    relatives = (family for family in FAMILIES.values() if family.network.__name__ == config.get("_class_name"))
    return next((family for family in relatives if family.is_one(config)), None)


def family_of_network(net: nn.Module) -> Family | None:
    """The family of a diffusers network, or None."""
    return family_of(dict(net.config) | {"_class_name": type(net).__name__})


# ---------------------------------------------------------------------------------------------------------------------
# UNets: Stable Diffusion, SDXL


def unet_inputs(config, x: Tensor, timestep: Tensor, cond: dict[str, Tensor], scalar: Tensor | None) -> dict:
    """Arguments of UNet2DConditionModel.forward. `scalar` is embedded as timestep_cond."""
    given = {"sample": x, "timestep": timestep, "encoder_hidden_states": cond["tokens"]}
    if scalar is not None:
        given["timestep_cond"] = get_timestep_embedding(scalar, config.time_cond_proj_dim).to(x)
    if config.addition_embed_type == "text_time":
        sizes = cond.get("time_ids")
        if sizes is None:  # an embedded model, whose pictures have one size
            side = x.shape[-1] * tiny.patch(x.shape[1])
            sizes = timestep.new_tensor([[side, side, 0, 0, side, side]]).expand(len(x), 6)
        given["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": sizes}
    return given


def unet_cond_shapes(config, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes = {"tokens": (tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        shapes["pooled"] = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
    return shapes


def unet_unlike(config: dict) -> str:
    """What stands against a UNet that looks like Stable Diffusion's or SDXL's, and what to do; "": nothing."""
    if config.get("time_cond_proj_dim"):
        return "has an input for guidance (time_cond_proj_dim), as LCM's whole UNets do: give its base, and its LoRA as --cm"
    if kind := config.get("encoder_hid_dim_type"):
        return f"projects its text before it reads it ({kind}), as Kolors does: choose another --teacher"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        return "has an input for classes (class_embed_type), as upscalers do: choose another --teacher"
    pooled = config.get("projection_class_embeddings_input_dim") or 0
    if pooled and pooled - 5 * config["addition_time_embed_dim"] == config["cross_attention_dim"]:  # one text encoder, five numbers
        return "is SDXL's refiner, which only finishes pictures: give the base"
    return ""


def unet_width_of_text(shapes: dict[str, tuple[int, ...]]) -> str:
    """Stable Diffusion 2.x, whose architecture is not the official one of sd15."""
    widths = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
    return "" if widths <= {768} else f"reads text of width {max(widths)}: give --components, the hub id or folder of its base"


def unet_precision(name: str) -> str:
    first, last = name.split(".")[0], name.split(".")[-1]
    if first in ("conv_in", "conv_out", "time_embedding", "add_embedding"):
        return "16bit"
    return "w4a16" if last == "time_emb_proj" else "w4a4"


OFFICIAL_SCHEDULE = {  # of SDXL and Stable Diffusion
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def vp_path(scheduler: dict, latent: tuple[int, int, int]) -> VPPath:
    """Of a scheduler's configuration; {} stands for the official base's. ValueError for a schedule that has no path here: flow
    matching, betas that are not scaled_linear, eps-prediction at zero signal-to-noise ratio."""
    asked = OFFICIAL_SCHEDULE | scheduler
    if "shift" in scheduler or asked.get("use_flow_sigmas"):
        raise ValueError("flow matching is not supported, scaled_linear betas are")
    if (schedule := asked["beta_schedule"]) != "scaled_linear":
        raise ValueError(f"beta_schedule {schedule} is not supported, scaled_linear is")
    if "sigma_data" in scheduler or scheduler.get("trained_betas") is not None:
        raise ValueError("EDM's sigmas and trained_betas are not supported, scaled_linear betas are")
    betas, zero_snr = (asked["beta_start"], asked["beta_end"]), bool(asked["rescale_betas_zero_snr"])
    return VPPath.from_betas(asked["prediction_type"], zero_snr, betas, asked["num_train_timesteps"])


def ddim_scheduler(scheduler: dict, path: VPPath) -> DDIMScheduler:
    schedule = {k: scheduler.get(k, official) for k, official in OFFICIAL_SCHEDULE.items()}
    found = DDIMScheduler(**schedule, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    found.register_to_config(original_inference_steps=len(found.alphas_cumprod))  # by which LCM's and TCD's find these timesteps
    return found


def encode_sdxl(pipe, captions: list[str], device, tokens: int) -> dict[str, Tensor]:
    """tokens (B, 77, 2048), pooled (B, 1280). The empty caption is zeros where the base says so, as in its pipeline."""
    tokens_BLD, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=device)
    if pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([not caption for caption in captions], device=pooled.device)
        tokens_BLD, pooled = tokens_BLD.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    return {"tokens": tokens_BLD, "pooled": pooled}


def scale_sdxl(config, z: Tensor) -> Tensor:
    """Latents as SDXL's pipeline scales them back before it decodes: by mean and standard deviation where the VAE has them."""
    if config.latents_mean and config.latents_std:
        mean, std = (z.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (config.latents_mean, config.latents_std))
        z = (z - mean) / std
    return z * config.scaling_factor


def encode_sd15(pipe, captions: list[str], device, tokens: int) -> dict[str, Tensor]:
    """tokens (B, 77, 768), of Stable Diffusion 2.x (B, 77, 1024). The empty caption is encoded like any other."""
    tokens_BLD, _ = pipe.encode_prompt(captions, device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"tokens": tokens_BLD}


# ---------------------------------------------------------------------------------------------------------------------
# FLUX


def flux_inputs(config, x: Tensor, timestep: Tensor, cond: dict[str, Tensor], scalar: Tensor | None) -> dict:
    """Arguments of FluxTransformer2DModel.forward: latents as 2x2 patches, one token each, and positions. `scalar`: guidance."""
    patches = F.pixel_unshuffle(x, 2)  # (B, 4 C, H / 2, W / 2)
    ids = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (1, *patches.shape[2:]))).to(x)
    return {
        "hidden_states": patches.flatten(2).mT.contiguous(),
        "encoder_hidden_states": cond["tokens"],
        "pooled_projections": cond["pooled"],
        "timestep": timestep,
        "img_ids": ids,
        "txt_ids": ids.new_zeros(cond["tokens"].shape[1], 3),
        "guidance": scalar,
    }


def flux_output(y: Tensor, x: Tensor) -> Tensor:
    """Patches (B, H W / 4, 4 C) -> (B, C, H, W)."""
    B, C, H, W = x.shape
    return y.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def flux_precision(name: str) -> str:
    first = name.split(".")[0]
    if first in ("x_embedder", "proj_out", "time_text_embed"):
        return "16bit"
    modulation = re.search(r"(^|\.)(norm1|norm1_context|norm|norm_out)\.linear$", name)
    return "w4a16" if modulation or first == "context_embedder" else "w4a4"


def flux_path(scheduler: dict, latent: tuple[int, int, int]) -> FlowPath:
    """Of a scheduler's configuration; {} stands for the official base's, whose shift grows with the number of tokens. ValueError
    for betas."""
    if "beta_schedule" in scheduler:  # of a scheduler for both kinds
        if not scheduler.get("use_flow_sigmas"):
            raise ValueError("betas are not supported, flow matching is")
        return FlowPath(scheduler.get("flow_shift", 1.0))
    if scheduler and not scheduler.get("use_dynamic_shifting", False):
        return FlowPath(scheduler.get("shift", 1.0))  # the class's own defaults
    low, high = (scheduler.get(f"{k}_image_seq_len", n) for k, n in (("base", 256), ("max", 4096)))
    mu, top = (scheduler.get(f"{k}_shift", shift) for k, shift in (("base", 0.5), ("max", 1.15)))
    mu += (top - mu) * (latent[1] * latent[2] / 4 - low) / (high - low)
    return FlowPath(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))


def encode_flux(pipe, captions: list[str], device, tokens: int) -> dict[str, Tensor]:
    """tokens (B, L, 4096), pooled (B, 768)."""
    longest = min(tokens, pipe.tokenizer_2.model_max_length)
    tokens_BLD, pooled, _ = pipe.encode_prompt(captions, None, max_sequence_length=longest, device=device)
    return {"tokens": tokens_BLD, "pooled": pooled}


def flux_file_lacks(shapes: dict[str, tuple[int, ...]]) -> str:
    if any("guidance" in key for key in shapes):
        return ""
    return "has no input for guidance: give --components black-forest-labs/FLUX.1-schnell, or its own base"


def scale_flux(config, z: Tensor) -> Tensor:
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


# ---------------------------------------------------------------------------------------------------------------------
# Single files


def what_file_holds(shapes: dict[str, tuple[int, ...]]) -> str:
    """Which network a single file holds, by names (its authors' or diffusers') and shapes; "": none that is known here."""
    prefix = "model.diffusion_model."
    for first, pooled in ((f"{prefix}input_blocks.0.0.weight", f"{prefix}label_emb.0.0.weight"),
                          ("conv_in.weight", "add_embedding.linear_1.weight")):  # fmt: skip
        if first not in shapes:
            continue
        if shapes[first][1] != 4:
            return f"a UNet of {shapes[first][1]} input channels"
        if any("cond_proj" in key or key.startswith("encoder_hid_proj") for key in shapes):
            return "a UNet with further inputs (LCM's, or Kolors)"
        if pooled in shapes:
            return "SDXL's refiner" if shapes[pooled][1] == 2560 else "SDXL"
        return "Stable Diffusion"
    if "input_blocks.0.0.weight" in shapes:
        return f"a UNet whose names lack {prefix}"
    if any("distilled_guidance_layer" in key for key in shapes):
        return "Chroma"
    names = ("img_in.weight", f"{prefix}img_in.weight", "x_embedder.weight")
    if first := next((shapes[name] for name in names if name in shapes), None):
        return "FLUX" if first[1] == 64 else f"a transformer of {first[1]} input channels"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The records

UNET = dict(
    network=UNet2DConditionModel,
    cond_shapes=unet_cond_shapes,
    inputs=unet_inputs,
    precision=unet_precision,
    classifier_free=True,
)
STABLE_DIFFUSION = UNET | dict(
    tokens=77,
    path=vp_path,
    part="unet",
    few_step_scheduler=ddim_scheduler,
    preset={"guidance": 7.5},
    unlike=unet_unlike,
)
FLUX = dict(
    network=FluxTransformer2DModel,
    most_grid_points=math.inf,
    cond_shapes=lambda config, tokens: {"tokens": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)},
    inputs=flux_inputs,
    output=flux_output,
    precision=flux_precision,
)
EMBEDDED = dict(tokens=tiny.TOKENS, embedded=True, text=tiny.TinyText)
EMBEDDED_UNET = (
    UNET
    | EMBEDDED
    | dict(
        prepare=tiny.prepare_unet,
        scalar=lambda t, s, guidance: s,  # timestep_cond, made for the guidance scale, carries the time that a jump goes to
        path=lambda scheduler, latent: VPPath.from_betas("v_prediction", zero_terminal_snr=True),
        transfers=outliers.unet_transfers,
    )
)
SDXL_LICENCE = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md"
SD_LICENCE = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
DEV_LICENCE = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
OPENRAIL_PP = ({"license": "openrail++"}, f"CreativeML Open RAIL++-M License ({SDXL_LICENCE})")


def turbo_licence(name: str) -> tuple[dict, str]:
    """Of Stability AI's Turbo models, for a card."""
    link = f"https://huggingface.co/stabilityai/{name}/blob/main/LICENSE.md"
    entries = {"license": "other", "license_name": "sai-nc-community", "license_link": link}
    return entries, f"Stability AI Non-Commercial Research Community License ({link})"


TINY = Family(  # 6.9 M parameters
    name="tiny",
    latent=tiny.LATENT,
    is_one=lambda config: config.get("in_channels") == tiny.LATENT[0],
    student={"rank": 2},  # the share of parameters that 16 ranks are of SDXL
    **EMBEDDED_UNET,
)
SMALL = Family(  # 26.8 M parameters: tiny at twice the width, on pictures of twice the size
    name="small",
    latent=tiny.SMALL_LATENT,
    is_one=lambda config: config.get("in_channels") == tiny.SMALL_LATENT[0],
    preset={"teacher": "runs/small-teacher/small.safetensors"},  # what the stages before it leave: weights do not ship
    student={"rank": 4, "cm": "runs/small-cm/small-cm.safetensors"},
    **EMBEDDED_UNET,
)
TINY_FLUX = Family(  # 5.2 M parameters
    name="tiny-flux",
    latent=tiny.LATENT,
    is_one=lambda config: config.get("in_channels") == 4 * tiny.LATENT[0],
    scalar=lambda t, s, guidance: torch.zeros_like(t) if s is None else s,  # the input for guidance carries it here
    path=lambda scheduler, latent: FlowPath(),
    transfers=outliers.flux_transfers,
    classifier_free=True,
    student={"rank": 2, "rank_least": 1, "rank_most": 4, "lr": 3e-4, "centre": True},  # each layer has something to train
    **FLUX,
    **EMBEDDED,
)
SDXL = Family(  # SDXL base 1.0, 2.567 B parameters
    name="sdxl",
    is_one=lambda config: config.get("addition_embed_type") == "text_time" and config.get("in_channels") == 4,
    latent=(4, 128, 128),
    base="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline_name="StableDiffusionXLPipeline",
    encode=encode_sdxl,
    scale_latents=scale_sdxl,
    in_file="SDXL",
    takes_sizes=True,
    compare_guidance=5.0,
    cm_example="latent-consistency/lcm-lora-sdxl",
    student={"rank": 15},  # 16 without the two bytes a channel that smoothing takes
    licences={
        "stable-diffusion-xl": OPENRAIL_PP,
        "SDXL-Lightning": OPENRAIL_PP,
        "sdxl_lightning": OPENRAIL_PP,  # the names of its files
        "sdxl-turbo": turbo_licence("sdxl-turbo"),
    },
    **STABLE_DIFFUSION,
)
SD15 = Family(  # Stable Diffusion 1.5, 0.860 B parameters
    name="sd15",
    is_one=lambda config: config.get("addition_embed_type") is None and config.get("in_channels") == 4,
    latent=(4, 64, 64),
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    pipeline_name="StableDiffusionPipeline",
    encode=encode_sd15,
    in_file="Stable Diffusion",
    check_shapes=unet_width_of_text,
    text_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    compare_guidance=7.5,
    cm_example="latent-consistency/lcm-lora-sdv1-5",
    licences={
        "stable-diffusion-v1": ({"license": "creativeml-openrail-m"}, f"CreativeML Open RAIL-M License ({SD_LICENCE})"),
        "sd-turbo": turbo_licence("sd-turbo"),
    },
    **STABLE_DIFFUSION,
)
FLUX_DEV = Family(  # FLUX.1 [dev], 11.90 B parameters
    name="flux",
    is_one=lambda config: config.get("in_channels", 64) == 64,
    latent=(16, 128, 128),
    tokens=512,
    scalar=lambda t, s, guidance: None if guidance is None else torch.full_like(t, guidance),
    path=flux_path,
    classifier_free=False,
    preset={"guidance": 3.5, "gradient_captions": 8, "centre": True},
    base="black-forest-labs/FLUX.1-dev",
    part="transformer",
    pipeline_name="FluxPipeline",
    encode=encode_flux,
    call_options=lambda config: {} if config.get("guidance_embeds") else {"max_sequence_length": 256},  # schnell was trained so
    guidance_input=lambda config: 3.5 if config.get("guidance_embeds") else None,  # schnell has no such input
    compare_guidance=3.5,
    pack=lambda pipe, noise: pipe._pack_latents(noise, *noise.shape),
    scale_latents=scale_flux,
    in_file="FLUX",
    check_shapes=flux_file_lacks,
    few_step_scheduler=lambda scheduler, path: FlowMatchEulerDiscreteScheduler(shift=path.shift),
    cm_example="ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors --cm-scale 0.125 --sampling-steps 8",
    licences={
        "FLUX.1-dev": (
            {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": DEV_LICENCE},
            f"FLUX.1 [dev] Non-Commercial License ({DEV_LICENCE})",
        ),
        "FLUX.1-schnell": ({"license": "apache-2.0"}, "Apache License 2.0"),
    },
    **FLUX,
)
FAMILIES = {family.name: family for family in (TINY, SMALL, TINY_FLUX, SDXL, SD15, FLUX_DEV)}
