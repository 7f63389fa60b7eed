"""A denoiser: a network of diffusers on path times, and the consistency LoRA that makes one network the teacher and its student's
16-bit reference.

    pred = denoiser(x_t, t, s, cond)        x_t (B, C, H, W), t and s (B,) path times, cond: see family.py

`s` is the time that the jump goes to. A consistency model that serves 1, 2 and 4 steps must know how far it is asked to jump (from
pure noise the answer of one step is a picture, the first answer of four is a blurrier one): Consistency Trajectory Models tell it
[O]. The embedded models have an input for that scalar (`Family.scalar`); a teacher does not use it, and the public families, whose
networks stock pipelines must be able to run, have none.

Key: B batch, C, H, W latent shape, L caption tokens, D text width.
"""

import json
import os

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import tdpt
from data import scenes, sources
from kernels import CPU
from models import tiny
from models.family import FAMILIES, Family
from run.common import UserError

FAST_NAME = "bfloat16" if CPU.get("avx512_bf16") or CPU.get("amx_bf16") else "float32"  # elsewhere bfloat16 is emulated, slowly


def fast_dtype(name: str) -> torch.dtype:
    """Of networks on a CPU, by its name. UserError for another."""
    if name not in ("bfloat16", "float32"):
        raise UserError(f"CMQUANT_DTYPE={name} is no dtype of networks here: set it to bfloat16 or float32, or unset it")
    return getattr(torch, name)


FAST = fast_dtype(os.environ.get("CMQUANT_DTYPE", FAST_NAME))


class Denoiser(nn.Module):
    """A network on path times.  forward(x_t (B, C, H, W), t (B,), s (B,), cond) -> prediction (B, C, H, W), in x_t's dtype.

    family; net: the diffusers module; text: the text encoder of an embedded model, else None; path: the noise path (tdpt.py);
    latent: (C, H, W); base: hub id or path of a public model's pipeline; scheduler: the configuration of the base's scheduler, {}
    for the official one; guidance: the value of a network that has guidance as an input, else None; knows_destination: whether s
    is passed on to the network.
    """

    def __init__(self, family: Family, net: nn.Module, scheduler: dict | None = None, latent=None, base: str = ""):
        """ValueError for a scheduler's configuration that has no noise path here."""
        super().__init__()
        self.family, self.net, self.base = family, net, base
        self.text = family.text() if family.text else None
        self.scheduler, self.latent = scheduler or {}, tuple(latent or family.latent)
        self.path = family.path(self.scheduler, self.latent)
        self.guidance = family.guidance_input(net.config)
        self.knows_destination = False

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; LoRA factors keep float32 in any network."""
        return next(p.dtype for name, p in self.net.named_parameters() if "lora_" not in name)

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """cond of B captions, by the text encoder of an embedded model: tokens (B, L, D), pooled (B, D). "" is unconditional."""
        tokens, pooled = self.text(tiny.tokenize(captions).to(self.text.word.weight.device))
        return {"tokens": tokens, "pooled": pooled}

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) of an embedded model's pictures (B, 3, side, side) in [-1, 1]."""
        return tiny.to_latents(pictures, self.latent[0])

    def forward(self, x, t, s, cond):
        dtype = self.dtype
        cond = {k: v if k == "time_ids" else v.to(dtype) for k, v in cond.items()}  # bfloat16 would round sizes above 256
        scalar = self.family.scalar(t, s if self.knows_destination else None, self.guidance)
        given = self.family.inputs(self.net.config, x.to(dtype), self.path.timestep(t), cond, scalar)
        y = self.net(**given, return_dict=False)[0]
        return self.family.output(y, x).to(x.dtype)


def blueprint(denoiser: Denoiser) -> dict:
    """What a checkpoint must say of a public model so that from_blueprint can build it without the base's files. JSON."""
    net = denoiser.net
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    about = {"model": denoiser.family.name, "base": denoiser.base, "class": type(net).__name__, "config": config}
    about |= {"scheduler": denoiser.scheduler, "latent": denoiser.latent, "guidance": denoiser.guidance}
    return json.loads(json.dumps(about))


def from_blueprint(about: dict, device: str = "meta") -> Denoiser:
    """Inverse of blueprint, with weights uninitialised on "meta" and random elsewhere."""
    family = FAMILIES[about["model"]]
    with torch.device(device):
        net = family.network.from_config(about["config"])
    denoiser = Denoiser(family, net, about["scheduler"], about["latent"], about["base"])
    denoiser.guidance = about.get("guidance", denoiser.guidance)
    return denoiser


def random_denoiser(name: str) -> Denoiser:
    """The official architecture of a family with random weights."""
    return Denoiser(FAMILIES[name], FAMILIES[name].build())


def float_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of `net` by name, without packed ones, whose weight is no parameter."""
    layers = ((name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return {name: layer for name, layer in layers if "weight" in layer._parameters}


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
    """The teacher's function: LoRA off, s not passed on."""
    return _switched(denoiser, cm=False)


def as_cm(denoiser: Denoiser):
    """The full-precision consistency model's function: LoRA on, s passed on."""
    return _switched(denoiser, cm=True)


def _switched(denoiser: Denoiser, cm: bool):
    def call(x, t, s, cond):
        denoiser.knows_destination = cm  # four roles share one network, so the switch is set per call
        for layer in lora_layers(denoiser).values():
            layer.on = cm
        return denoiser(x, t, s, cond)

    return call


@torch.no_grad()
def fuse(denoiser: Denoiser) -> Denoiser:
    """W + B A everywhere, in place, added in float32: the consistency model as a plain network, and the base that is quantized."""
    for name, lora in lora_layers(denoiser).items():
        weight, delta = lora.layer.weight, lora.lora_B.float() @ lora.lora_A.float().flatten(1)
        weight.copy_(weight.float() + delta.view(weight.shape))
        denoiser.net.set_submodule(name, lora.layer)
    denoiser.knows_destination = True
    return denoiser


def transformer_blocks(net: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what a sharded teacher gathers one at a time."""
    return [module for module in net.modules() if type(module).__name__.endswith("TransformerBlock")]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def start_noise(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """(n, *shape) ~ N(0, 1); row i depends on seed + i alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])


@torch.no_grad()
def draw_latents(model, denoiser: Denoiser, x_T: torch.Tensor, cond: dict[str, torch.Tensor], steps: int, micro=0, device="cpu"):
    """Latents (n, C, H, W) float32 on the CPU, by `steps` jumps of `model` from noise x_T, `micro` pictures at a time (0: all)."""
    parts = sources.in_parts(x_T, cond, micro, device)
    return torch.cat([tdpt.sample(model, denoiser.path, *part, steps).float().cpu() for part in parts])


@torch.no_grad()
def draw(model, denoiser: Denoiser, captions: list[str], steps: int, seed: int = 0, bar: str = "") -> torch.Tensor:
    """Pictures (n, 3, side, side) in [-1, 1] by `steps` jumps of `model`, a function of (x, t, s, cond) on denoiser's path. bar:
    what its progress bar says; "": there is none."""
    pictures = []
    for i in tqdm(range(0, len(captions), 64), bar, leave=False, disable=not bar):
        part = captions[i : i + 64]
        x_T = start_noise(len(part), denoiser.latent, seed + i)
        pictures.append(tiny.to_pictures(tdpt.sample(model, denoiser.path, x_T, denoiser.encode(part), steps)))
    return torch.cat(pictures)


def guided_teacher(network: Denoiser, guidance: float):
    """The teacher inside `network` under classifier-free guidance."""
    return tdpt.guided(as_teacher(network), guidance, network.encode([scenes.UNCONDITIONAL]))
