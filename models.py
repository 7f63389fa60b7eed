"""Denoisers: tiny (SDXL's UNet class) and tiny-flux (FLUX's transformer class), both diffusers' own classes, and the networks of
SDXL and FLUX themselves, whose public weights pretrained.py loads.

Every model is a `Denoiser`: the network, its text encoder, its noise path, and the rule which layer may go to 4 bits.

    pred = denoiser(x_t, t, s, cond)        x_t (B, C, H, W), t and s (B,) path times, cond = denoiser.encode(captions)

`s` is the time that the jump goes to. A consistency model that serves 1, 2 and 4 steps must know how far it is asked to jump
(from pure noise the answer of one step is a picture, the first answer of four is a blurrier one): Consistency Trajectory
Models tell it. [O] Both classes have an input for a scalar beside time, made for the guidance scale: `timestep_cond` in
UNet2DConditionModel, `guidance` in FluxTransformer2DModel. Ours carries s there. A teacher is never told (`told` False), nor is
SDXL (its UNet has no such input) or FLUX (its guidance input carries the guidance): stock pipelines can run those.

Layer policy (`precision`): first and last layers and the MLPs that embed time and pooled text stay 16 bit; what runs once a step
and not once a token (FLUX's AdaLN modulations, SDXL's `time_emb_proj`), and FLUX's `context_embedder`, is W4A16; every other
Linear and Conv2d is W4A4.

`cond` has tokens (B, L, D) and pooled (B, D); SDXL's also time_ids (B, 6): original height and width, top and left of the crop,
height and width of the picture, in pixels.

Key: B batch, C, H, W latent shape, L caption tokens, D text width.
"""

import json
import math
import re
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import get_timestep_embedding
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

import integrity
from kernels import CPU
from tdpt import FlowPath, VPPath

ASSETS = Path(__file__).parent / "assets"
TINY, REAL = ("tiny", "tiny-flux"), ("sdxl", "flux")
MODELS = TINY + REAL
TOKENS, WIDTH, BUCKETS = 24, 128, 1024  # of the text encoder
SIDE = 32  # pixels
TIME_IDS = [[SIDE, SIDE, 0, 0, SIDE, SIDE]]
LATENT = (12, 16, 16)  # 32x32 pictures, pixel-unshuffled
LATENT_SCALE = 2.0  # procedural pictures have a standard deviation near 0.5
FAST = torch.bfloat16 if CPU.get("avx512_bf16") or CPU.get("amx_bf16") else torch.float32  # elsewhere bfloat16 is emulated, slowly


# ---------------------------------------------------------------------------------------------------------------------
# Text. The tiny models train their text encoder with the teacher; afterwards it is frozen.


def tokenize(captions: list[str]) -> torch.Tensor:
    """Captions -> (B, L, 2) int64: [word bucket, clause]; bucket 0 is padding.

    Words are hashed, so any caption can be encoded without a vocabulary file (crc32: the same on every machine). "and" and
    "," start a new clause: with the clause beside the word, order inside a clause need not be learned. Filler words are dropped.
    """
    ids = torch.zeros(len(captions), TOKENS, 2, dtype=torch.int64)
    for b, caption in enumerate(captions):
        clause, n = 0, 0
        for word in re.findall(r"[^\W_]+|,", caption.lower()):
            if word in ("and", ","):
                clause = min(clause + 1, 3)
            elif word not in ("a", "an", "the", "on", "at", "in", "of", "background") and n < TOKENS:
                ids[b, n] = torch.tensor([1 + zlib.crc32(word.encode()) % (BUCKETS - 1), clause])
                n += 1
    return ids


class TinyText(nn.Module):
    """One transformer layer over (word + clause) embeddings: tokens (B, L, D) and pooled (B, D)."""

    def __init__(self):
        super().__init__()
        self.word, self.clause = nn.Embedding(BUCKETS, WIDTH), nn.Embedding(4, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids_BL2):
        h_BLD = self.norm(self.layer(self.word(ids_BL2[..., 0]) + self.clause(ids_BL2[..., 1])))
        return h_BLD, h_BLD.mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def tiny_unet() -> UNet2DConditionModel:
    """SDXL's architecture, 6.9 M parameters: conv level first, cross-attention below, text_time conditioning."""
    net = UNet2DConditionModel(
        sample_size=16, in_channels=12, out_channels=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128), layers_per_block=1, attention_head_dim=(1, 2, 2),  # heads, as in SDXL's config
        transformer_layers_per_block=1, use_linear_projection=True, cross_attention_dim=WIDTH,
        addition_embed_type="text_time", addition_time_embed_dim=16, projection_class_embeddings_input_dim=6 * 16 + WIDTH,
        time_cond_proj_dim=64,
    )  # fmt: skip
    net.set_attn_processor(AttnProcessor())  # at 64 tokens the plain product beats the CPU's flash attention
    return net


def tiny_flux() -> FluxTransformer2DModel:
    """FLUX's architecture, 5.2 M parameters: 2 double and 4 single blocks, 3 heads of 64, RoPE, guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT[0], num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=3,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


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


class Denoiser(nn.Module):
    """A network on path times.  forward(x_t (B,C,H,W), t (B,), s (B,), cond) -> prediction (B,C,H,W), in x_t's dtype.

    Attributes: name, net (diffusers module), text, path (tdpt), told (whether s is passed on), latent (C, H, W); of real models
    also base (hub id or path) and scheduler (the base's scheduler config), and guidance, which FLUX is given as an input.
    """

    def __init__(self, name: str, net: nn.Module, text: nn.Module | None, path, latent: tuple[int, int, int] = LATENT):
        super().__init__()
        self.name, self.net, self.text, self.path, self.latent = name, net, text, path, tuple(latent)
        self.base, self.scheduler = "", {}
        self.guidance = 3.5 if name == "flux" and net.config.guidance_embeds else None
        self._told = False

    @property
    def told(self) -> bool:
        return self._told and self.name in TINY

    @told.setter
    def told(self, told: bool) -> None:
        self._told = told

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def dtype(self):
        """What the network computes in; LoRA factors keep float32 in any network."""
        return next(p.dtype for name, p in self.net.named_parameters() if "lora_" not in name)

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Conditioning of B captions: {"tokens": (B, L, D), "pooled": (B, D)}; "" is the unconditional one."""
        tokens, pooled = self.text(tokenize(captions).to(self.text.word.weight.device))
        return {"tokens": tokens, "pooled": pooled}

    def forward(self, x, t, s, cond):
        dtype = self.dtype
        cond = {k: v if k == "time_ids" else v.to(dtype) for k, v in cond.items()}  # bfloat16 would round sizes above 256
        y = self._call(x.to(dtype), t, s if self.told else None, cond)
        return y.to(x.dtype)


class UNetDenoiser(Denoiser):
    def _call(self, x, t, s, cond):
        told = None if s is None else get_timestep_embedding(s, 64).to(x)
        sizes = cond["time_ids"] if "time_ids" in cond else t.new_tensor(TIME_IDS).expand(len(x), 6)
        added = {"text_embeds": cond["pooled"], "time_ids": sizes}
        timestep = self.path.timestep(t)
        return self.net(x, timestep, cond["tokens"], timestep_cond=told, added_cond_kwargs=added, return_dict=False)[0]


class FluxDenoiser(Denoiser):
    def _call(self, x, t, s, cond):
        B, C, H, W = x.shape
        tokens = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)
        row, column = torch.meshgrid(*(torch.arange(n // 2, device=x.device) for n in (H, W)), indexing="ij")
        ids = torch.stack([torch.zeros_like(row), row, column], -1).view(-1, 3).to(x)
        guidance = torch.zeros_like(t) if s is None else s
        if self.name == "flux":
            guidance = None if self.guidance is None else torch.full_like(t, self.guidance)
        y = self.net(
            tokens, cond["tokens"], cond["pooled"], timestep=self.path.timestep(t), img_ids=ids,
            txt_ids=ids.new_zeros(cond["tokens"].shape[1], 3), guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
        return y.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


NETWORK_CLASSES = {"sdxl": UNet2DConditionModel, "flux": FluxTransformer2DModel}
NETWORKS = {"tiny": tiny_unet, "tiny-flux": tiny_flux, "sdxl": sdxl_unet, "flux": flux_transformer}


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


def wrap(name: str, net: nn.Module, text: nn.Module | None = None, scheduler: dict | None = None, latent=None) -> Denoiser:
    """The denoiser of a network of NETWORKS. Latents of sdxl and flux are those of 1024 x 1024 pixels unless `latent` says else."""
    latent = latent or {"sdxl": (4, 128, 128), "flux": (16, 128, 128)}.get(name, LATENT)
    cls = UNetDenoiser if isinstance(net, UNet2DConditionModel) else FluxDenoiser
    denoiser = cls(name, net, text, noise_path(name, scheduler or {}, latent), latent)
    denoiser.scheduler = scheduler or {}
    return denoiser


def blueprint(denoiser: Denoiser) -> dict:
    """What a checkpoint must say of a real model so that from_blueprint can build it without the base's files. JSON."""
    net = denoiser.net
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    about = {"model": denoiser.name, "base": denoiser.base, "class": type(net).__name__, "config": config}
    about |= {"scheduler": denoiser.scheduler, "latent": denoiser.latent, "guidance": denoiser.guidance}
    return json.loads(json.dumps(about))


def from_blueprint(about: dict, device: str = "meta") -> Denoiser:
    """Inverse of blueprint, with weights uninitialised on "meta" and random elsewhere."""
    with torch.device(device):
        net = NETWORK_CLASSES[about["model"]].from_config(about["config"])
    denoiser = wrap(about["model"], net, None, about["scheduler"], tuple(about["latent"]))
    denoiser.base, denoiser.guidance = about["base"], about.get("guidance", denoiser.guidance)
    return denoiser


def build(name: str) -> Denoiser:
    """A tiny architecture with random weights. ValueError for an unknown name."""
    if name not in TINY:
        raise ValueError(f"unknown tiny model {name!r}: choose from {', '.join(TINY)}")
    denoiser = wrap(name, NETWORKS[name](), TinyText())
    if name == "tiny":
        nn.init.zeros_(denoiser.net.time_embedding.cond_proj.weight)  # so that a CM starts from the teacher's function
    return denoiser


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def to_latents(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 32, 32) in [-1, 1] -> (B, 12, 16, 16), about unit variance."""
    return F.pixel_unshuffle(pictures, 2) * LATENT_SCALE


def to_pictures(latents: torch.Tensor) -> torch.Tensor:
    """(B, 12, 16, 16) -> (B, 3, 32, 32), clamped to [-1, 1]."""
    return F.pixel_shuffle(latents.float() / LATENT_SCALE, 2).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Layers: which may become 4 bit, and the 16-bit LoRA that turns a teacher into its consistency model


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


def float_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of `net` by name."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


class LoRA(nn.Module):
    """y = layer(x) + B A x while `on`, layer(x) while off: teacher and consistency model in the memory of one network.

    A (r, I, kh, kw) is a convolution of the layer's geometry, B (O, r) acts per pixel; for a Linear they are (r, I) and (O, r).
    A ~ N(0, 1/I), B = 0, float32; the product is formed in x's dtype.
    """

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, A: torch.Tensor, B: torch.Tensor) -> "LoRA":
        """With given factors, in their own dtype; B may be a 1x1 convolution."""
        new = cls(layer, 1, torch.Generator())
        new.lora_A, new.lora_B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().flatten(1).clone())
        return new

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, gen: torch.Generator):
        super().__init__()
        O, *shape = layer.weight.shape
        rank = min(rank, O, layer.weight[0].numel())
        self.layer, self.on = layer, True
        self.lora_A = nn.Parameter(torch.randn(rank, *shape, generator=gen) / layer.weight[0].numel() ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(O, rank))

    def forward(self, x):
        y = self.layer(x)
        if not self.on:
            return y
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if isinstance(self.layer, nn.Linear):
            return y + F.linear(F.linear(x, A), B)
        return y + F.conv2d(F.conv2d(x, A, None, self.layer.stride, self.layer.padding), B[:, :, None, None])

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The plain layer with weight W + B A (the sum in float32)."""
        delta = (self.lora_B.float() @ self.lora_A.float().flatten(1)).view(self.layer.weight.shape)
        self.layer.weight.copy_(self.layer.weight.float() + delta)
        return self.layer


def is_plain_lora(layer: nn.Module, name: str) -> bool:
    """Whether the adapter `name` of a layer that PEFT wrapped is scale * B A alone, without DoRA's magnitudes or a bias."""
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def add_lora(denoiser: Denoiser, rank: int, seed: int = 0) -> None:
    """Wraps every Linear and Conv2d of the network."""
    gen = torch.Generator().manual_seed(seed)
    for name, layer in float_layers(denoiser.net).items():
        denoiser.net.set_submodule(name, LoRA(layer, rank, gen))


def loras(denoiser: Denoiser) -> dict[str, LoRA]:
    return {name: layer for name, layer in denoiser.net.named_modules() if isinstance(layer, LoRA)}


def as_teacher(denoiser: Denoiser):
    """The teacher's function: LoRA off, destination not told. Four roles share one network, so the switch is set per call."""

    def call(x, t, s, cond):
        _switch(denoiser, False)
        return denoiser(x, t, s, cond)

    return call


def as_cm(denoiser: Denoiser):
    """The full-precision consistency model's function: LoRA on, destination told."""

    def call(x, t, s, cond):
        _switch(denoiser, True)
        return denoiser(x, t, s, cond)

    return call


def _switch(denoiser: Denoiser, cm: bool) -> None:
    denoiser.told = cm
    for layer in loras(denoiser).values():
        layer.on = cm


def fuse(denoiser: Denoiser) -> Denoiser:
    """W + B A everywhere, in place: the consistency model as a plain network, and the base that is quantized."""
    for name, layer in loras(denoiser).items():
        denoiser.net.set_submodule(name, layer.fused())
    denoiser.told = True
    return denoiser


# ---------------------------------------------------------------------------------------------------------------------
# Files. safetensors only; metadata["info"] is the JSON of the command, seed and metrics that made the file.


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says how."""


def run_script(name: str, main) -> None:
    """main(command line); a UserError becomes its sentence on stderr and exit code 2, and so does memory that is full."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        advice = "nothing that was saved is lost, ask for less at a time (train.py: --memory-limit, --micro)"
        print(f"{name}: memory is full ({str(error).split('. ')[0]}): {advice}", file=sys.stderr)
        sys.exit(2)


def read_tensors(path: Path, hint: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and info of a safetensors file. UserError if it is missing or damaged; `hint` says what to do."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: {hint}")
    try:
        integrity.check(path)
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
        return load_file(path), info
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): {hint}") from None


def load_teacher(name: str, path: str = "") -> Denoiser:
    """The teacher of assets/, or of `path`, in float32. UserError if the file is missing, damaged or of another model."""
    denoiser = build(name)
    path = Path(path) if path else ASSETS / f"{name}.safetensors"
    tensors, _ = read_tensors(path, f"make it with `python train.py --model {name} --stage teacher`")
    try:
        denoiser.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError:
        raise UserError(f"{path} holds no {name} teacher: choose another --teacher or --model") from None
    return denoiser.eval().requires_grad_(False)


def load_cm(name: str, teacher: str = "", cm: str = "") -> Denoiser:
    """Teacher with its consistency LoRA (assets/NAME-cm.safetensors or `cm`), switchable by as_teacher / as_cm."""
    denoiser = load_teacher(name, teacher)
    path = Path(cm) if cm else ASSETS / f"{name}-cm.safetensors"
    tensors, _ = read_tensors(path, f"make it with `python train.py --model {name} --bits 16`")
    try:
        add_lora(denoiser, max((v.shape[1] for k, v in tensors.items() if k.endswith("lora_B")), default=1))
        if missing := denoiser.net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False).unexpected_keys:
            raise RuntimeError(missing)
        if tensors.keys() != {k for k in denoiser.net.state_dict() if "lora_" in k}:
            raise RuntimeError("layers are missing")
    except RuntimeError:
        raise UserError(f"{path} holds no consistency LoRA of {name}: choose another --cm or --model") from None
    return denoiser.eval().requires_grad_(False)


def trainable_cm(name: str, teacher: str, cm: str, rank: int, seed: int, dtype: torch.dtype) -> Denoiser:
    """Teacher in `dtype` with a float32 consistency LoRA to train: that of `cm`, or ("") a new one. UserError as above."""
    if cm:
        denoiser = load_cm(name, teacher, cm)
    else:
        add_lora(denoiser := load_teacher(name, teacher), rank, seed)
    for key, p in denoiser.named_parameters():
        p.data = p.data if "lora_" in key else p.data.to(dtype)
    return denoiser
