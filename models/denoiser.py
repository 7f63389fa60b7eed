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
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from kernels import CPU
from models import family, tiny
from run import files
from run.common import UserError

FAST = torch.bfloat16 if CPU.get("avx512_bf16") or CPU.get("amx_bf16") else torch.float32  # elsewhere bfloat16 is emulated, slowly


class Denoiser(nn.Module):
    """A network on path times.  forward(x_t (B,C,H,W), t (B,), s (B,), cond) -> prediction (B,C,H,W), in x_t's dtype.

    Attributes: name, net (diffusers module), text, path (tdpt), told (whether s is passed on), latent (C, H, W); of real models
    also base (hub id or path) and scheduler (the base's scheduler config), and guidance, which FLUX is given as an input.
    """

    def __init__(self, name: str, net: nn.Module, text: nn.Module | None, path, latent: tuple[int, int, int] = tiny.LATENT):
        super().__init__()
        self.name, self.net, self.text, self.path, self.latent = name, net, text, path, tuple(latent)
        self.base, self.scheduler = "", {}
        self.guidance = 3.5 if name == "flux" and net.config.guidance_embeds else None
        self._told = False

    @property
    def told(self) -> bool:
        return self._told and self.name in family.TINY

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
        tokens, pooled = self.text(tiny.tokenize(captions).to(self.text.word.weight.device))
        return {"tokens": tokens, "pooled": pooled}

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, 12, 16, 16) of the tiny models' pictures (B, 3, 32, 32) in [-1, 1]."""
        return tiny.to_latents(pictures)

    def forward(self, x, t, s, cond):
        dtype = self.dtype
        cond = {k: v if k == "time_ids" else v.to(dtype) for k, v in cond.items()}  # bfloat16 would round sizes above 256
        y = self._call(x.to(dtype), t, s if self.told else None, cond)
        return y.to(x.dtype)


class UNetDenoiser(Denoiser):
    def _call(self, x, t, s, cond):
        told = None if s is None else get_timestep_embedding(s, 64).to(x)
        sizes = cond["time_ids"] if "time_ids" in cond else t.new_tensor(tiny.TIME_IDS).expand(len(x), 6)
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


def wrap(name: str, net: nn.Module, text: nn.Module | None = None, scheduler: dict | None = None, latent=None) -> Denoiser:
    """The denoiser of a network of NETWORKS. Latents of sdxl and flux are those of 1024 x 1024 pixels unless `latent` says else."""
    latent = latent or {"sdxl": (4, 128, 128), "flux": (16, 128, 128)}.get(name, tiny.LATENT)
    cls = UNetDenoiser if isinstance(net, UNet2DConditionModel) else FluxDenoiser
    denoiser = cls(name, net, text, family.noise_path(name, scheduler or {}, latent), latent)
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
        net = family.NETWORK_CLASSES[about["model"]].from_config(about["config"])
    denoiser = wrap(about["model"], net, None, about["scheduler"], tuple(about["latent"]))
    denoiser.base, denoiser.guidance = about["base"], about.get("guidance", denoiser.guidance)
    return denoiser


def random_tiny(name: str) -> Denoiser:
    """A tiny architecture with random weights. ValueError for an unknown name."""
    if name not in family.TINY:
        raise ValueError(f"unknown tiny model {name!r}: choose from {', '.join(family.TINY)}")
    denoiser = wrap(name, family.NETWORKS[name](), tiny.TinyText())
    if name == "tiny":
        nn.init.zeros_(denoiser.net.time_embedding.cond_proj.weight)  # so that a CM starts from the teacher's function
    return denoiser


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


def lora_layers(denoiser: Denoiser) -> dict[str, LoRA]:
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
    for layer in lora_layers(denoiser).values():
        layer.on = cm


def fuse(denoiser: Denoiser) -> Denoiser:
    """W + B A everywhere, in place: the consistency model as a plain network, and the base that is quantized."""
    for name, layer in lora_layers(denoiser).items():
        denoiser.net.set_submodule(name, layer.fused())
    denoiser.told = True
    return denoiser


def load_teacher(name: str, path: str = "") -> Denoiser:
    """The teacher of assets/, or of `path`, in float32. UserError if the file is missing, damaged or of another model."""
    denoiser = random_tiny(name)
    path = Path(path) if path else files.ASSETS / f"{name}.safetensors"
    tensors, _ = files.read_tensors(path, f"make it with `python train.py --model {name} --stage teacher`")
    try:
        denoiser.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError:
        raise UserError(f"{path} holds no {name} teacher: choose another --teacher or --model") from None
    return denoiser.eval().requires_grad_(False)


def load_tiny_cm(name: str, teacher: str = "", cm: str = "") -> Denoiser:
    """Teacher with its consistency LoRA (assets/NAME-cm.safetensors or `cm`), switchable by as_teacher / as_cm."""
    denoiser = load_teacher(name, teacher)
    path = Path(cm) if cm else files.ASSETS / f"{name}-cm.safetensors"
    tensors, _ = files.read_tensors(path, f"make it with `python train.py --model {name} --bits 16`")
    try:
        add_lora(denoiser, max((v.shape[1] for k, v in tensors.items() if k.endswith("lora_B")), default=1))
        if missing := denoiser.net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False).unexpected_keys:
            raise RuntimeError(missing)
        if tensors.keys() != {k for k in denoiser.net.state_dict() if "lora_" in k}:
            raise RuntimeError("layers are missing")
    except RuntimeError:
        raise UserError(f"{path} holds no consistency LoRA of {name}: choose another --cm or --model") from None
    return denoiser.eval().requires_grad_(False)


def trainable_tiny_cm(name: str, teacher: str, cm: str, rank: int, seed: int, dtype: torch.dtype) -> Denoiser:
    """Teacher in `dtype` with a float32 consistency LoRA to train: that of `cm`, or ("") a new one. UserError as above."""
    if cm:
        denoiser = load_tiny_cm(name, teacher, cm)
    else:
        add_lora(denoiser := load_teacher(name, teacher), rank, seed)
    for key, p in denoiser.named_parameters():
        p.data = p.data if "lora_" in key else p.data.to(dtype)
    return denoiser


def transformer_blocks(net: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what a sharded teacher gathers one at a time."""
    return [module for module in net.modules() if type(module).__name__.endswith("TransformerBlock")]
