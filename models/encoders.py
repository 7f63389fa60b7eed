"""Text encoders and VAE of public models, by the pipelines' own methods, and the examples that training reads.

text = Text("sdxl", base);  cond = text(captions);  del text
vae = VAE("sdxl", base);    x0 = vae.encode(pictures);  pictures = vae.decode(x0)
"""

import zlib
from pathlib import Path

import torch

import tdpt
from data import sources
from data.cache import Cache, CacheBuilder
from models.denoiser import Denoiser, as_cm
from models.family import FACTOR, FAMILIES
from models.pretrained import load_text_pipeline, load_vae
from run import files
from run.common import UserError


def square(side: int, n: int) -> torch.Tensor:
    """time_ids (n, 6) of whole square pictures."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(n, 1)


class Text:
    """text(captions) -> cond on the CPU (shapes: Family.encode), with time_ids where the family is told sizes. The empty caption is
    what the pipeline itself takes for the unconditional one."""

    def __init__(self, name: str, base: str, components: str = "", resolution: int = 1024, device="cpu", dtype=torch.bfloat16):
        self.family, self.resolution, self.device = FAMILIES[name], resolution, device
        self.pipeline = load_text_pipeline(self.family, base, components, dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        cond = {k: v.cpu() for k, v in self.family.encode(self.pipeline, captions, self.device).items()}
        return cond | ({"time_ids": square(self.resolution, len(captions))} if self.family.told_sizes else {})


class VAE:
    """encode: pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), the posterior's mean, scaled as the denoiser expects
    them; decode: the inverse, clamped. One picture at a time: at 1024 pixels its first layers hold 2.7 GB for each."""

    def __init__(self, name: str, base: str, components: str = "", device="cpu"):
        self.vae, self.device = load_vae(FAMILIES[name], base, components).to(device), device
        self.vae.enable_slicing()
        self.scale, self.shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return ((self.vae.encode(pictures.to(self.device)).latent_dist.mode() - self.shift) * self.scale).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents.float().to(self.device) / self.scale + self.shift).sample.clamp(-1, 1).cpu()


class RandomText:
    """Stands for text encoders where there are only random weights: cond is a function of the caption, of the right shape."""

    def __init__(self, denoiser: Denoiser, resolution: int):
        self.family, self.side = denoiser.family, resolution
        self.shapes = self.family.cond_shapes(denoiser.net.config, self.family.tokens)

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        rows = []
        for caption in captions:
            gen = torch.Generator().manual_seed(zlib.crc32(caption.encode()))
            rows.append({k: torch.randn(shape, generator=gen) for k, shape in self.shapes.items()})
        cond = {k: torch.stack([row[k] for row in rows]) for k in self.shapes}
        return cond | ({"time_ids": square(self.side, len(captions))} if self.family.told_sizes else {})


# ---------------------------------------------------------------------------------------------------------------------
# The examples that training reads. cfg: train.Config


def examples_of(cfg, out: Path, network: Denoiser) -> sources.LiveExamples | Cache:
    """What is trained on."""
    if network.family.embedded:
        return sources.LiveExamples(sources.source(cfg.data), network)
    return cached_examples(cfg, Path(cfg.cache) if cfg.cache else out / "cache", network)


class Encoders:
    """What fills a cache: text encoders and VAE, each loaded when it is first asked for, and the consistency model inside
    `network`, which draws the latents of captions without pictures."""

    def __init__(self, cfg, network: Denoiser):
        self.cfg, self.network, self._text, self._vae = cfg, network, None, None
        self.random = cfg.weights == "random" and not cfg.teacher
        self.resolution = FACTOR * network.latent[1]

    def text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        if self._text is None:
            cfg, dtype = self.cfg, self.network.dtype if self.cfg.device == "cuda" else torch.float32
            where = (cfg.model, cfg.teacher, cfg.components, self.resolution, cfg.device, dtype)
            self._text = RandomText(self.network, self.resolution) if self.random else Text(*where)
        return self._text(captions)

    def pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        if self.random:
            raise UserError("--weights random without --teacher has no VAE: give --data prompts")
        if self._vae is None:
            self._vae = VAE(self.cfg.model, self.cfg.teacher, self.cfg.components, self.cfg.device)
        return self._vae.encode(pictures)

    def draw(self, cond: dict[str, torch.Tensor], gen: torch.Generator) -> torch.Tensor:
        """Latents (B, C, h, w) in the most of --sampling-steps, a micro-batch at a time. Only now the network, which is given
        on the CPU, goes to the device."""
        network, device, steps = self.network.to(self.cfg.device), self.cfg.device, self.cfg.most_steps
        x_T, drawn = torch.randn(len(cond["tokens"]), *network.latent, generator=gen), []
        for rows in torch.arange(len(x_T)).split(self.cfg.micro or len(x_T)):
            cond_r = {k: v[rows].to(device) for k, v in cond.items()}
            drawn.append(tdpt.sample(as_cm(network), network.path, x_T[rows].to(device), cond_r, steps))
        return torch.cat(drawn)


def cached_examples(cfg, folder: Path, network: Denoiser) -> Cache:
    """The cache of --data. Encoders are loaded if something is missing in it, and leave memory with this call. Captions without
    pictures get latents if TDPT asks for any."""
    source, encoders = sources.captioned(cfg.data), Encoders(cfg, network)
    if (first := next(iter(source.rows()), None)) is None:
        raise UserError(f"--data {cfg.data} has no captions: look at what it names")
    draws = first[2] is None and cfg.rollout < 1
    key, draw = cache_key(cfg, draws), encoders.draw if draws else None
    return CacheBuilder(folder, source, encoders.pictures, encoders.text, key, encoders.resolution, draw).open_or_make()


def cache_key(cfg, draws: bool) -> dict:
    """What a cache depends on. Local weights are known by name and content: they may move."""
    base, components, cm = (Path(name).name if Path(name).exists() else name for name in (cfg.teacher, cfg.components, cfg.cm))
    key = {"model": cfg.model, "base": base or cfg.weights or FAMILIES[cfg.model].base, "components": components}
    key["files of the base"] = files.fingerprint(cfg.teacher, cfg.components)
    if draws:
        key |= {"consistency model": cm, "its scale": cfg.cm_scale, "its steps": cfg.most_steps}
        key |= {"files of the consistency model": files.fingerprint(cfg.cm)}
    return key
