"""Model families: what tiny, tiny-flux, sdxl and flux are, and which of their layers may go to 4 bits.

Layer policy (`precision`): first and last layers and the MLPs that embed time and pooled text stay 16 bit; what runs once a step
and not once a token (FLUX's AdaLN modulations, SDXL's `time_emb_proj`), and FLUX's `context_embedder`, is W4A16; every other
Linear and Conv2d is W4A4.
"""

import math
import re

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from models import tiny
from tdpt import FlowPath, VPPath

TINY, REAL = ("tiny", "tiny-flux"), ("sdxl", "flux")
MODELS = TINY + REAL


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL base 1.0, 2.567 B parameters (its unet/config.json)."""
    return UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, cross_attention_dim=2048,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def flux_transformer() -> FluxTransformer2DModel:
    """FLUX.1 [dev], 11.90 B parameters (its transformer/config.json)."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


NETWORK_CLASSES = {"sdxl": UNet2DConditionModel, "flux": FluxTransformer2DModel}
NETWORKS = {"tiny": tiny.tiny_unet, "tiny-flux": tiny.tiny_flux, "sdxl": sdxl_unet, "flux": flux_transformer}


def noise_path(name: str, scheduler: dict, latent: tuple[int, int, int]):
    """The path of a base's scheduler config; {} stands for that of the official base. ValueError for a schedule that has no path
    here: betas that are not scaled_linear, eps-prediction at zero signal-to-noise ratio."""
    if name == "tiny":
        return VPPath.from_betas("v_prediction", zero_terminal_snr=True)
    if name == "tiny-flux":
        return FlowPath()
    if name == "sdxl":
        if (schedule := scheduler.get("beta_schedule", "scaled_linear")) != "scaled_linear":
            raise ValueError(f"beta_schedule {schedule} is not supported, scaled_linear is")
        if "sigma_data" in scheduler or scheduler.get("trained_betas") is not None:
            raise ValueError("EDM's sigmas and trained_betas are not supported, scaled_linear betas are")
        betas = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
        kind, steps = scheduler.get("prediction_type", "epsilon"), scheduler.get("num_train_timesteps", 1000)
        return VPPath.from_betas(kind, bool(scheduler.get("rescale_betas_zero_snr", False)), betas, steps)
    if scheduler and not scheduler.get("use_dynamic_shifting", False):
        return FlowPath(scheduler.get("shift", 1.0))  # the class's own defaults
    low, high = (scheduler.get(f"{k}_image_seq_len", n) for k, n in (("base", 256), ("max", 4096)))
    mu, top = (scheduler.get(f"{k}_shift", shift) for k, shift in (("base", 0.5), ("max", 1.15)))
    return FlowPath(math.exp(mu + (top - mu) * (latent[1] * latent[2] / 4 - low) / (high - low)))  # linear in the number of tokens


def precision(name: str) -> str:
    """Which of 16bit, w4a16, w4a4 the Linear or Conv2d `name` of a UNet2DConditionModel or FluxTransformer2DModel becomes."""
    first, last = name.split(".")[0], name.split(".")[-1]
    if first in ("conv_in", "conv_out", "x_embedder", "proj_out"):
        return "16bit"  # what touches pixels: at most 0.4% of the parameters, much of the error
    if first in ("time_embedding", "add_embedding", "time_text_embed"):
        return "16bit"
    if first == "context_embedder":
        return "w4a16"  # FLUX's text, once for each step
    if last == "time_emb_proj" or re.search(r"(^|\.)(norm1|norm1_context|norm|norm_out)\.linear$", name):
        return "w4a16"  # modulations: many parameters, one token, no compute
    return "w4a4"


BASES = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "flux": "black-forest-labs/FLUX.1-dev"}
PART = {"sdxl": "unet", "flux": "transformer"}  # subfolder of the denoiser
CM_EXAMPLES = {
    "sdxl": "latent-consistency/lcm-lora-sdxl",
    "flux": "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors --cm-scale 0.125 --sampling-steps 8",
}
FACTOR = 8  # pixels to a latent


def pipeline_class(name: str):
    from transformers.utils import logging  # these imports take seconds, and only SDXL and FLUX need them

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # of image processors that want torchvision, which no part of ours calls
    from diffusers import FluxPipeline, StableDiffusionXLPipeline

    logging.set_verbosity(before)  # a text encoder whose file lacks weights must be heard of
    return {"sdxl": StableDiffusionXLPipeline, "flux": FluxPipeline}[name]


SHAPES = {  # latent (C, H, W) and caption tokens
    "tiny": ((12, 16, 16), 24), "tiny-flux": ((12, 16, 16), 24), "sdxl": ((4, 128, 128), 77), "flux": ((16, 128, 128), 512),
}  # fmt: skip


def meta_network(name: str) -> nn.Module:
    """A network of models.NETWORKS in bfloat16, without memory."""
    with torch.device("meta"):
        net = NETWORKS[name]()
    return nn.Module.to(net, torch.bfloat16)  # diffusers' own .to warns about layers that it has none of
