"""SDXL and FLUX from public weights: the denoiser, its consistency LoRA, text encoders and VAE, each loaded when it is needed.

    base     a hub id, a folder in diffusers' layout, or one .safetensors file (SDXL, FLUX as their authors or user interfaces
             write them; `components`, a hub id or folder, then has the configs and tokenizers: default the official base)
    cm       a LoRA that turns the base into a few-step consistency model (TCD, LCM, PCM, Hyper-SD ..), in any format that diffusers
             reads (its own, PEFT's, kohya's): a hub id, one of its files (OWNER/NAME/FILE.safetensors), a folder or a file. It
             becomes models.LoRA wrappers, so that one network is teacher and consistency model.
    A file without text encoders or VAE, as FLUX is published, takes those of `components` or of the official base.

    network = load_network("sdxl", base)            bfloat16, no second copy at any time
    add_cm(network, "latent-consistency/lcm-lora-sdxl")
    text = Text("sdxl", base);  cond = text(captions);  del text
    vae = VAE("sdxl", base);    x0 = vae.encode(pictures);  pictures = vae.decode(x0)

`weights="random"` builds the full-size network, or that of a folder's config, without any weights: for rehearsals.

Everything that fails for a reason the user can mend (no such model, gated, no network, another architecture, a damaged file)
is a UserError whose sentence names the command that helps.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard

import tdpt
from data import sources
from data.cache import Cache
from models import family
from models.denoiser import (
    Denoiser,
    LoRA,
    add_lora,
    as_cm,
    is_plain_lora,
    load_tiny_cm,
    lora_layers,
    trainable_tiny_cm,
    transformer_blocks,
    wrap,
)
from run import files
from run.common import UserError, process_count, process_index

OF_LIBRARIES = (SafetensorError, SingleFileComponentError)


@contextlib.contextmanager
def loading_errors(what: str, base: str):
    """Errors of diffusers, transformers and the hub -> UserError with the command that mends it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, *OF_LIBRARIES) as error:
        if isinstance(error, ImportError):
            raise UserError(f"{what} of {base} needs a package: {str(error).strip().splitlines()[0]}") from None
        chain, e = [], error
        while e is not None:
            chain.append(e)
            e = e.__cause__ or e.__context__
        text = " ".join(str(e) for e in chain)
        local = Path(base).exists()
        if any(isinstance(e, hub.GatedRepoError) for e in chain) or "gated repo" in text:
            raise UserError(
                f"{base} is gated: accept its licence at https://huggingface.co/{base} and run `hf auth login`, then again"
            ) from None
        if any(isinstance(e, SafetensorError) for e in chain) or ("safetensors" in text and "header" in text):
            again = f"copy {base} again" if local else f"run `hf download {base} --force-download`"
            raise UserError(f"{what} of {base} is truncated or damaged: {again}") from None
        if local or not isinstance(error, OSError):
            first = str(error).strip().split("\n")[0][:200]
            raise UserError(f"{what} could not be read from {base} ({first}): give the folder that `hf download` made") from None
        if os.path.isabs(base) or base.startswith((".", "~")) or base.count("/") != 1:
            raise UserError(f"{base} does not exist: give a hub id such as {family.BASES['sdxl']}, a folder or a file") from None
        raise UserError(
            f"{what} of {base} is not on this machine and could not be fetched: run `hf download {base}` where there is a network"
            " (and check the name), or give a local folder"
        ) from None


def is_file(base: str) -> bool:
    return base.endswith((".safetensors", ".sft"))


def check_folder(name: str, base: str) -> None:
    """UserError for a folder without the denoiser's."""
    if Path(base).is_dir() and not (Path(base) / family.PART[name]).is_dir():
        raise UserError(f"{base} has no {family.PART[name]} folder: it is no {name}, choose another --teacher or --model")


def check_architecture(name: str, net: nn.Module | dict, base: str) -> None:
    """UserError if a network, or its config, is no SDXL UNet or FLUX transformer."""
    config = net if isinstance(net, dict) else dict(net.config) | {"_class_name": type(net).__name__}
    is_sdxl = config.get("addition_embed_type") == "text_time" and config.get("in_channels") == 4
    is_flux = config.get("_class_name") == "FluxTransformer2DModel" and config.get("in_channels", 64) == 64
    if not {"sdxl": is_sdxl, "flux": is_flux}[name]:
        raise UserError(f"{base} is no {name.upper()} model: choose another --teacher or --model")


def load_network(
    name: str, base: str = "", weights: str = "", components: str = "", resolution: int = 0, dtype=torch.bfloat16, device="cpu"
) -> Denoiser:
    """The denoiser in `dtype` on the CPU, without gradients, without text encoders. weights "random": only configs are read, of a
    folder, or for base "" none at all; then they are drawn on `device` (a CPU takes two minutes for FLUX's, and draws others) and
    stay there. resolution: of pictures, in pixels; 0: the base's own."""
    if weights == "random" and not base:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # no float32 copy
        try:
            with torch.device(device):
                net, scheduler = family.NETWORKS[name](), {}
        finally:
            torch.set_default_dtype(before)
    else:
        base = base or family.BASES[name]
        cls = family.NETWORK_CLASSES[name]
        with loading_errors("the denoiser", base):
            if is_file(base):
                if not Path(base).is_file():
                    raise UserError(f"{base} does not exist: give a hub id, a folder or a .safetensors file")
                with tempfile.TemporaryDirectory() as folder:
                    config = components or official_config(name, Path(folder))
                    predicts_v = check_file(name, base, components)
                    net = cls.from_single_file(base, config=config, subfolder=family.PART[name], torch_dtype=dtype)
            else:
                check_folder(name, base)
                config = cls.load_config(base, subfolder=family.PART[name])
                check_architecture(name, config, base)
                if weights == "random":
                    torch.manual_seed(0)
                    net = cls.from_config(config).to(dtype)
                else:
                    net = from_pretrained(cls, base, subfolder=family.PART[name], torch_dtype=dtype)
        check_architecture(name, net, base)
        check_whole("the denoiser", net, base)
        scheduler = load_scheduler(base if not is_file(base) else components or family.BASES[name])
        if is_file(base) and predicts_v and scheduler.get("prediction_type") != "v_prediction":
            raise UserError(f"{base} predicts v: give --components whose scheduler says so")
    side = latent_side(net, resolution)
    channels = net.config.in_channels if name == "sdxl" else net.config.in_channels // 4
    try:
        denoiser = wrap(name, net, None, scheduler, (channels, side, side))
    except ValueError as error:
        raise UserError(f"the noise schedule of {base} cannot be used: {error}") from None
    denoiser.base = base
    return denoiser.eval().requires_grad_(False)


def check_whole(what: str, net: nn.Module, base: str) -> None:
    """UserError if tensors of a network were not in its files."""
    if absent := [k for k, v in net.state_dict().items() if v.is_meta]:
        raise UserError(f"{what} of {base} lacks {absent[0]} and {len(absent) - 1} more tensors: get the whole of it")


def check_file(name: str, base: str, components: str) -> bool:
    """Whether the marks in a single file say that it predicts v. UserError for weights with scales beside them, for EDM's noise
    schedules, and for a FLUX without guidance whose config was not given."""
    with safe_open(base, "pt") as file:
        keys = set(file.keys())
    if any(key.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) or ".absmax" in key for key in keys):
        raise UserError(f"the weights in {base} are quantized with scales of their own: give the file in 16 bits (or plain fp8)")
    if marks := keys & {"edm_mean", "edm_vpred.sigma_max"}:
        raise UserError(f"{base} has a noise schedule of its own ({min(marks)}): choose another --teacher")
    if name == "flux" and not components and not any("guidance" in key for key in keys):
        raise UserError(f"{base} has no input for guidance: give --components black-forest-labs/FLUX.1-schnell, or its own base")
    return "v_pred" in keys


def latent_side(net: nn.Module, resolution: int) -> int:
    """Of square pictures of `resolution` pixels; 0: of the base's own."""
    return resolution // family.FACTOR or int(getattr(net.config, "sample_size", 0) or 128)


def official_config(name: str, folder: Path) -> str:
    """A folder with the official architecture's config, which from_single_file would else ask the hub for."""
    config = {k: v for k, v in skeleton(name).config.items() if not k.startswith("_")}
    (folder / family.PART[name]).mkdir()
    about = config | {"_class_name": family.NETWORK_CLASSES[name].__name__}
    (folder / family.PART[name] / "config.json").write_text(json.dumps(about))
    return str(folder)


def from_pretrained(cls, base: str, **options):
    """cls.from_pretrained of a folder or hub id, safetensors only; variant fp16 where there is no other."""
    try:
        return cls.from_pretrained(base, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            return cls.from_pretrained(base, use_safetensors=True, variant="fp16", **options)
        raise error


def load_scheduler(base: str) -> dict:
    with loading_errors("the scheduler's config", base):
        config = DDIMScheduler.load_config(base, subfolder="scheduler")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def add_cm(denoiser: Denoiser, cm: str, strength: float = 1.0) -> None:
    """Wraps the layers that the LoRA file, folder or hub id `cm` has factors for (`strength`, scale and alpha inside B). UserError
    as above, if none of its layers is in the network, or if it is more than B A (DoRA, biases)."""
    from peft.tuners.lora import LoraLayer  # slow

    pipeline, part = family.pipeline_class(denoiser.name), family.PART[denoiser.name]
    where, options = cm, {"use_safetensors": True, "return_lora_metadata": True}
    options |= {"unet_config": denoiser.net.config} if denoiser.name == "sdxl" else {"return_alphas": True}
    if not Path(cm).exists() and cm.count("/") > 1 and not cm.startswith(("/", ".")):  # a file of a hub id
        owner, repository, options["weight_name"] = cm.split("/", 2)
        where = f"{owner}/{repository}"
    with loading_errors("the consistency LoRA", where):
        state, alphas, about = pipeline.lora_state_dict(where, **options)
        if not any(k.startswith(part) for k in state):
            raise UserError(f"{cm} has no LoRA for a {part}: choose another --cm")
        getattr(pipeline, f"load_lora_into_{part}")(state, alphas, denoiser.net, adapter_name="cm", metadata=about)
    found = {k: v for k, v in denoiser.net.named_modules() if isinstance(v, LoraLayer)}
    if not found:
        raise UserError(f"{cm} fits no layer of {denoiser.base or denoiser.name}: choose another --cm or --teacher")
    if other := next((k for k, v in found.items() if not is_plain_lora(v, "cm")), None):
        raise UserError(f"{cm} is more than B A at {other} (DoRA, or a bias): choose a plain LoRA as --cm")
    for name, layer in found.items():
        A, B, scale = layer.lora_A["cm"].weight, layer.lora_B["cm"].weight, layer.scaling["cm"]
        denoiser.net.set_submodule(name, LoRA.of(layer.get_base_layer(), A.float(), B.float() * scale * strength))
    denoiser.net.peft_config, denoiser.net._hf_peft_config_loaded = {}, False
    denoiser.requires_grad_(False)


def random_cm(denoiser: Denoiser, rank: int = 4) -> None:
    """A small random LoRA on every layer, for rehearsals."""
    add_lora(denoiser, rank)
    gen = torch.Generator().manual_seed(1)
    for layer in lora_layers(denoiser).values():
        layer.lora_B.data = 1e-2 * torch.randn(layer.lora_B.shape, generator=gen)
    denoiser.requires_grad_(False)


def save_cm(path: Path, denoiser: Denoiser) -> None:
    """The network's LoRA in diffusers' format, as any pipeline's load_lora_weights reads it; prints where."""
    tensors = {}
    for name, layer in lora_layers(denoiser).items():
        B = layer.lora_B.detach()
        tensors[f"{family.PART[denoiser.name]}.{name}.lora_A.weight"] = layer.lora_A.detach().half()
        tensors[f"{family.PART[denoiser.name]}.{name}.lora_B.weight"] = (
            B if layer.lora_A.dim() == 2 else B[:, :, None, None]
        ).half()
    files.write_tensors(path, tensors, {})
    print(f"weights: {path}")


def load_cm(name: str, base: str, cm: str, strength: float = 1.0, weights: str = "", **options) -> Denoiser:
    """load_network with its consistency LoRA, switchable by models.as_teacher / as_cm."""
    denoiser = load_network(name, base, weights, **options)
    if cm:
        add_cm(denoiser, cm, strength)
    elif weights == "random":
        random_cm(denoiser)
    else:
        raise UserError(
            f"--cm is missing: name a consistency LoRA, such as {family.CM_EXAMPLES[name]}, or --cm self to train one first"
        )
    return denoiser


def fingerprint(*paths: str) -> str:
    """Digest of local files and folders of weights: names, sizes and the ends of every safetensors file. Hub ids say nothing.
    UserError for a file of ours that does not fit its checksum."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        try:
            if path.is_file():
                files.checksum(path)
        except ValueError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): copy it again, or delete it to train it again") from None
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []:
            with open(file, "rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                ends = [opened.read(1 << 20) for at in (0, max(0, size - (1 << 20))) if opened.seek(at) >= 0]
            digest.update(f"{file.relative_to(path.parent)} {size} ".encode() + b"".join(ends))
    return digest.hexdigest()[:16]


def component(cls, what: str, name: str, base: str, components: str, **options):
    """cls of `base`; if that is a file of the denoiser alone, of `components` or the official base."""
    base = base or family.BASES[name]
    if is_file(base):
        with loading_errors(what, base), contextlib.suppress(SingleFileComponentError):
            return cls.from_single_file(base, config=components or family.BASES[name], **options)
        base = components or family.BASES[name]
    with loading_errors(what, base):
        return from_pretrained(cls, base, **options)


def square(side: int, n: int) -> torch.Tensor:
    """time_ids (n, 6) of whole square pictures."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(n, 1)


class Text:
    """text(captions) -> cond on the CPU: SDXL tokens (B, 77, 2048), pooled (B, 1280), time_ids; FLUX tokens (B, L, 4096), pooled
    (B, 768). The empty caption is what the pipeline itself takes for the unconditional one (SDXL base: zeros)."""

    def __init__(self, name: str, base: str, components: str = "", resolution: int = 1024, device="cpu", dtype=torch.bfloat16):
        self.name, self.resolution, self.device = name, resolution, device
        options = {family.PART[name]: None, "vae": None, "torch_dtype": dtype}
        self.pipeline = component(family.pipeline_class(name), "the text encoders", name, base, components, **options)
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        if self.name == "flux":
            longest = min(512, self.pipeline.tokenizer_2.model_max_length)
            tokens, pooled, _ = self.pipeline.encode_prompt(captions, None, max_sequence_length=longest, device=self.device)
            return {"tokens": tokens.cpu(), "pooled": pooled.cpu()}
        tokens, _, pooled, _ = self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False, device=self.device)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not caption for caption in captions], device=tokens.device)
            tokens, pooled = tokens.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"tokens": tokens.cpu(), "pooled": pooled.cpu(), "time_ids": square(self.resolution, len(captions))}


class VAE:
    """encode: pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), the posterior's mean, scaled as the denoiser expects
    them; decode: the inverse, clamped. float32: SDXL's VAE overflows in float16. One picture at a time: at 1024 pixels its first
    layers hold 2.7 GB for each."""

    def __init__(self, name: str, base: str, components: str = "", device="cpu"):
        vae = component(AutoencoderKL, "the VAE", name, base, components, subfolder="vae")
        check_whole("the VAE", vae, base or family.BASES[name])
        self.vae, self.device = vae.float().to(device).eval().requires_grad_(False), device
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
        config, self.side, self.sdxl = denoiser.net.config, resolution, denoiser.name == "sdxl"
        if self.sdxl:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            self.shapes = {"tokens": (77, config.cross_attention_dim), "pooled": (pooled,)}
        else:
            self.shapes = {"tokens": (512, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        rows = []
        for caption in captions:
            gen = torch.Generator().manual_seed(zlib.crc32(caption.encode()))
            rows.append({k: torch.randn(shape, generator=gen) for k, shape in self.shapes.items()})
        cond = {k: torch.stack([row[k] for row in rows]) for k in self.shapes}
        return cond | ({"time_ids": square(self.side, len(captions))} if self.sdxl else {})


def open_cm(cfg, dtype: torch.dtype) -> Denoiser:
    """The teacher with its switchable consistency LoRA, on the CPU (random weights: where they are drawn)."""
    if cfg.model in family.TINY:
        return load_tiny_cm(cfg.model, cfg.teacher, cfg.cm).to(dtype)
    where = {"components": cfg.components, "resolution": cfg.resolution, "dtype": dtype, "device": cfg.device}
    network = load_cm(cfg.model, cfg.teacher, cfg.cm, cfg.cm_scale, cfg.weights, **where)
    network.guidance = None if network.guidance is None else cfg.guidance
    return network


def examples_of(cfg, out: Path, network: Denoiser):
    """What is trained on: examples.latents(n, gen, mine), .conditions(n, gen, mine), .null(); data.Live or cache.Cache."""
    if cfg.model in family.TINY:
        return sources.LiveExamples(sources.source(cfg.data), network)
    return cached_examples(cfg, Path(cfg.cache) if cfg.cache else out / "cache", network)


def cached_examples(cfg, folder: Path, network: Denoiser) -> Cache:
    """The cache of --data: text encoders and VAE are loaded if something is missing in it, and leave memory with this call.
    Captions without pictures get latents that the consistency model inside `network` draws, in the most of --sampling-steps, if TDPT
    asks for any; only then `network`, which is given on the CPU, goes to the device."""
    source, resolution, parts = sources.captioned(cfg.data), family.FACTOR * network.latent[1], {}
    random, steps = cfg.weights == "random" and not cfg.teacher, cfg.most_steps
    dtype = network.dtype if cfg.device == "cuda" else torch.float32

    def text(captions):
        if "text" not in parts:
            options = (cfg.model, cfg.teacher, cfg.components, resolution, cfg.device, dtype)
            parts["text"] = RandomText(network, resolution) if random else Text(*options)
        return parts["text"](captions)

    def pictures(x):
        if random:
            raise UserError("--weights random without --teacher has no VAE: give --data prompts")
        if "vae" not in parts:
            parts["vae"] = VAE(cfg.model, cfg.teacher, cfg.components, cfg.device)
        return parts["vae"].encode(x)

    def draw(cond, latent, gen):
        network.to(cfg.device)
        x_T, parts = torch.randn(len(cond["tokens"]), *latent, generator=gen), []
        for rows in torch.arange(len(x_T)).split(cfg.micro or len(x_T)):
            cond_r = {k: v[rows].to(cfg.device) for k, v in cond.items()}
            parts.append(tdpt.sample(as_cm(network), network.path, x_T[rows].to(cfg.device), cond_r, steps))
        return torch.cat(parts)

    if (first := next(iter(source.rows()), None)) is None:
        raise UserError(f"--data {cfg.data} has no captions: look at what it names")
    alone = first[2] is None
    base, components, cm = (Path(name).name if Path(name).exists() else name for name in (cfg.teacher, cfg.components, cfg.cm))
    key = {
        "model": cfg.model,
        "base": base or cfg.weights or family.BASES[cfg.model],
        "components": components,
    }  # local ones may move
    key["files of the base"] = fingerprint(cfg.teacher, cfg.components)
    if draws := alone and cfg.rollout < 1:
        key |= {"consistency model": cm, "its scale": cfg.cm_scale, "its steps": steps}
        key |= {"files of the consistency model": fingerprint(cfg.cm)}
    return Cache.build(
        folder, source, pictures, text, key, resolution, draw=draw if draws else None, latent=network.latent,
        rank=process_index(), world=process_count(),
    )  # fmt: skip


def trainable_cm(cfg, dtype: torch.dtype) -> Denoiser:
    """The base in `dtype` with a float32 consistency LoRA to train: that of --cm, or a new one of --rank on every layer."""
    if cfg.model in family.TINY:
        return trainable_tiny_cm(cfg.model, cfg.teacher, cfg.cm, cfg.rank, cfg.seed, dtype)
    denoiser = load_network(cfg.model, cfg.teacher, cfg.weights, cfg.components, cfg.resolution, dtype, cfg.device)
    if cfg.cm:
        add_cm(denoiser, cfg.cm, cfg.cm_scale)
    else:
        add_lora(denoiser, cfg.rank, cfg.seed)
    denoiser.guidance = None if denoiser.guidance is None else cfg.guidance
    return denoiser.requires_grad_(False)


def skeleton(name: str, base: str = "") -> nn.Module:
    """The float network on the meta device: of a folder's or hub id's config, or the official one ("")."""
    if not base:
        return family.meta_network(name)
    with loading_errors("the denoiser's config", base), torch.device("meta"):
        check_folder(name, base)
        cls = family.NETWORK_CLASSES[name]
        config = cls.load_config(base, subfolder=family.PART[name])
        check_architecture(name, config, base)
        return cls.from_config(config)


def place(network: Denoiser, device: str, offload: bool, shard: bool) -> Denoiser:
    """Where a frozen network's weights are: on the device; in main memory, coming layer by layer (`offload`); or a part on
    every process of the torchrun (`shard`, FSDP2), blocks gathered when they are used."""
    if shard:
        for block in transformer_blocks(network.net):
            fully_shard(block)
        fully_shard(network.net)
    elif offload and device != "cpu":
        apply_group_offloading(
            network.to("cpu").net,
            torch.device(device),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=True,
        )
    else:
        network.to(device)
    return network
