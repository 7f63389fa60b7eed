"""Text encoders and VAE of public models, by the pipelines' own methods, and the examples that training reads.

text = Text("sdxl", base);  cond = text(captions);  del text
vae = VAE("sdxl", base);    x0 = vae.encode(pictures)
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from data import sources
from data.cache import Cache, CacheBuilder, Captions, buckets, in_batches
from models import tiny
from models.denoiser import Denoiser, as_cm, draw_latents
from models.family import FACTOR, FAMILIES, Family
from models.pretrained import load_text_pipeline, load_vae
from run import files
from run.common import UserError, check_device, process_index, wait_for_all


def square(side: int, n: int) -> torch.Tensor:
    """time_ids (n, 6) of whole square pictures."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(n, 1)


def with_sizes(family: Family, cond: dict[str, torch.Tensor], side: int) -> dict[str, torch.Tensor]:
    return cond | {"time_ids": square(side, len(cond["tokens"]))} if family.takes_sizes else cond


class Text:
    """text(captions) -> cond on the CPU (shapes: Family.encode), with time_ids where the family takes sizes. The empty caption is
    what the pipeline itself takes for the unconditional one. tokens: of a caption, at most; 0: the family's."""

    def __init__(self, name: str, base: str, components="", resolution=1024, device="cpu", dtype=torch.bfloat16, tokens=0):
        check_device(device)
        self.family, self.resolution, self.device = FAMILIES[name], resolution, device
        self.tokens = tokens or self.family.tokens
        self.pipeline = load_text_pipeline(self.family, base, components, dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return encode_captions(self.family, self.pipeline, captions, self.device, self.tokens, self.resolution)


@torch.no_grad()
def encode_captions(family: Family, pipe, captions: list[str], device, tokens: int, side: int) -> dict[str, torch.Tensor]:
    """What `Text` returns, by the text encoders of a pipeline that is there; side: of the pictures, in pixels."""
    cond = {k: v.cpu() for k, v in family.encode(pipe, captions, device, tokens).items()}
    return with_sizes(family, cond, side)


class VAE:
    """encode: pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), the posterior's mean, scaled as the denoiser expects
    them; decode: latents -> pictures. One picture at a time: at 1024 pixels its first layers hold 2.7 GB for each."""

    def __init__(self, name: str, base: str, components: str = "", device="cpu"):
        check_device(device)
        self.family, self.device = FAMILIES[name], device
        self.vae = load_vae(self.family, base, components).to(device)
        self.vae.enable_slicing()

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        z = self.vae.encode(pictures.to(self.device)).latent_dist.mode()
        return self.family.scale_latents(self.vae.config, z).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(1, latents.shape[1], 1, 1)
        shift, whole = (self.family.scale_latents(self.vae.config, zero + k) for k in (0, 1))  # scaled = shift + (whole - shift) z
        z = (latents.float().cpu() - shift) / (whole - shift)
        return self.vae.decode(z.to(self.device)).sample.clamp(-1, 1).cpu()

    def decode_if_room(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The same, or None where the GPU's memory is full."""
        try:
            return self.decode(latents)
        except torch.OutOfMemoryError:
            return None


def random_text(denoiser: Denoiser, resolution: int, captions: list[str]) -> dict[str, torch.Tensor]:
    """Stands for text encoders where there are only random weights: cond is a function of the caption, of the right shape."""
    family = denoiser.family
    generators = [torch.Generator().manual_seed(zlib.crc32(caption.encode())) for caption in captions]
    shapes = family.cond_shapes(denoiser.net.config, family.text_tokens(denoiser.net.config))
    cond = {k: torch.stack([torch.randn(shape, generator=gen) for gen in generators]) for k, shape in shapes.items()}
    return with_sizes(family, cond, resolution)


def captions_of(pipe, denoiser: Denoiser, captions: list[str]) -> Captions:
    """The captions, by the text encoders of the pipeline that the denoiser belongs to. UserError for none, or what is no list."""
    if not isinstance(captions, list | tuple) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError("the prompts must be a list of some captions: give those that are like what will be drawn")
    family, side = denoiser.family, FACTOR * denoiser.latent[1]
    buckets(side)  # UserError for a size that no training has
    how = {"device": denoiser.net.device, "tokens": family.text_tokens(denoiser.net.config), "side": side}
    return Captions(list(captions), lambda part: encode_captions(family, pipe, part, **how))


# ---------------------------------------------------------------------------------------------------------------------
# The examples that training reads. cfg: train.Config


def has_encoders(cfg) -> bool:
    """Whether there are text encoders and a VAE, so that a training can draw pictures. Random weights alone have none."""
    return cfg.weights != "random" or bool(cfg.teacher)


class Encoders:
    """What fills a cache: text encoders and VAE, each loaded when it is first asked for, and the consistency model inside
    `network`, which draws the latents of captions without pictures."""

    def __init__(self, cfg, network: Denoiser):
        self.cfg, self.network, self._text, self._vae = cfg, network, None, None
        self.random = not has_encoders(cfg)
        self.resolution = FACTOR * network.latent[1]

    def text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        cfg = self.cfg
        if self.random:
            return random_text(self.network, self.resolution, captions)
        if self._text is None:
            dtype = self.network.dtype if cfg.device == "cuda" else torch.float32
            tokens = self.network.family.text_tokens(self.network.net.config)
            self._text = Text(cfg.model, cfg.teacher, cfg.components, self.resolution, cfg.device, dtype, tokens)
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
        cfg, network = self.cfg, self.network.to(self.cfg.device)
        x_T = torch.randn(len(cond["tokens"]), *network.latent, generator=gen)
        return draw_latents(as_cm(network), network, x_T, cond, files.most_steps(vars(cfg)), cfg.micro, cfg.device)


def examples_of(cfg, out: Path, network: Denoiser) -> sources.LiveExamples | Cache:
    """What is trained on: for an embedded model pictures that are drawn when they are asked for, else the cache of --data. Encoders
    are loaded if something is missing in it, and leave memory with this call. Captions without pictures get latents if TDPT asks
    for any."""
    if network.family.embedded:
        return sources.LiveExamples(sources.source(cfg.data, network.family.side), network)
    source, encoders, folder = sources.captioned(cfg.data), Encoders(cfg, network), Path(cfg.cache or out / "cache")
    if (first := next((row for row in source.rows() if row[1]), None)) is None:
        raise UserError(f"--data {cfg.data} has no captions: look at what it names")
    draws = first[2] is None and cfg.rollout < 1
    key, draw = cache_key(cfg, network, draws), encoders.draw if draws else None
    cache = CacheBuilder(folder, source, encoders.pictures, encoders.text, key, encoders.resolution, draw).open_or_make()
    if process_index() == 0 and has_encoders(cfg):
        keep_prompts(cfg, file_of_prompts(cfg, out, network), encoders.text)
    wait_for_all()
    return cache


def keep_prompts(cfg, path: Path, text: Callable[[list[str]], dict[str, torch.Tensor]]) -> None:
    """Writes cond of prompts_of, unless it is there. Text encoders that are gone cost a run its pictures alone, unless it was asked
    for them."""
    try:
        if not files.is_good(path, "", "it is made again"):
            files.write_tensors(path, in_batches(prompts_of(vars(cfg)), text), {})
    except UserError as error:
        if cfg.validate_every or cfg.validation_prompts:
            raise
        print(f"the run will end without pictures: {error}")


def prompts_of(config: dict) -> list[str]:
    """What a training draws: --validation-prompts, or else eight of our own, or of an embedded model's --data. UserError for a
    file without prompts."""
    if config["validation_prompts"]:
        return sources.read_prompts(Path(config["validation_prompts"]))
    return sources.sample_prompts(config) if FAMILIES[config["model"]].embedded else sources.PIPELINE_PROMPTS


def file_of_prompts(cfg, out: Path, network: Denoiser) -> Path:
    """In the cache: cond of prompts_of, so that text encoders need not come back for the pictures of a run."""
    digest = files.digest_of([cache_key(cfg, network, draws=False), prompts_of(vars(cfg))])
    return Path(cfg.cache or out / "cache") / f"prompts-{digest}.safetensors"


def conditions_of_prompts(cfg, out: Path, network: Denoiser) -> dict[str, torch.Tensor] | None:
    """cond of prompts_of, which examples_of has kept for public models; None where it could not."""
    if network.family.embedded:
        return network.encode(prompts_of(vars(cfg)))
    path, again = file_of_prompts(cfg, out, network), "run the same command again, it will be made again"
    return files.read_verified(path, again, "")[0] if has_encoders(cfg) and path.exists() else None


def decode(cfg, network: Denoiser, latents: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures (b, 3, H, W) in [-1, 1] on the CPU of latents (b, C, h, w), some at a time. A public model's VAE is loaded, and
    leaves memory again; it stays on the CPU under a --memory-limit, and goes on there where the GPU has no room."""
    if network.family.embedded:
        return [tiny.to_pictures(some) for some in latents]
    own, pictures = (cfg.model, cfg.teacher, cfg.components), []
    vae = VAE(*own, "cpu" if cfg.memory_limit else cfg.device)
    for some in latents:
        if (found := vae.decode_if_room(some)) is None:
            vae = VAE(*own, "cpu")
            found = vae.decode(some)
        pictures.append(found)
    return pictures


def cache_key(cfg, network: Denoiser, draws: bool) -> dict:
    """What a cache depends on. Local weights are known by name and content: they may move."""
    base, components, cm = (Path(name).name if Path(name).exists() else name for name in (cfg.teacher, cfg.components, cfg.cm))
    key = {"model": cfg.model, "base": base or cfg.weights or FAMILIES[cfg.model].base, "components": components}
    key["files of the base"] = files.fingerprint(cfg.teacher, cfg.components)
    if (tokens := network.family.text_tokens(network.net.config)) != network.family.tokens:
        key["tokens of a caption"] = tokens
    if draws:
        key |= {"consistency model": cm, "its scale": cfg.cm_scale, "its steps": files.most_steps(vars(cfg))}
        key |= {"files of the consistency model": files.fingerprint(cfg.cm)}
    return key
