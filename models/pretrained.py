"""Public weights: a denoiser of diffusers, its consistency LoRA, and the loaders of its pipeline's other parts.

    base     a hub id, a folder in diffusers' layout, or one .safetensors file (as authors or user interfaces write them;
             `components`, a hub id or folder, then has the configs and tokenizers: default the official base)
    cm       a LoRA that turns the base into a few-step consistency model (TCD, LCM, PCM, Hyper-SD ..), in any format that diffusers
             reads (its own, PEFT's, kohya's): a hub id, one of its files (OWNER/NAME/FILE.safetensors), a folder or a file. It
             becomes denoiser.LoRA wrappers, so that one network is teacher and consistency model. `none` stands for a base that
             is a consistency model itself (SDXL-Turbo, FLUX.1-schnell): it has no LoRA, and there is no teacher.
    A file without text encoders or VAE, as FLUX is published, takes those of `components` or of the official base.

    network = load_network("sdxl", base)            bfloat16, no second copy at any time
    add_cm(network, "latent-consistency/lcm-lora-sdxl")

`weights="random"` builds the full-size network, or that of a folder's config, without any weights: for rehearsals. The embedded
models' teacher and consistency LoRA are files in assets/.

Everything that fails for a reason the user can mend (no such model, gated, no network, another architecture, a damaged file)
is a UserError whose sentence names the command that helps.
"""

import contextlib
import inspect
import os
import tempfile
import textwrap
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import fully_shard

from data.cache import buckets
from layers import on_meta
from models import headers
from models.denoiser import Denoiser, LoRA, add_lora, is_plain_lora, lora_layers, random_denoiser, transformer_blocks
from models.family import FACTOR, FAMILIES, Family, family_of, family_of_network, what_file_holds
from models.outliers import add_outliers
from run import files
from run.common import UserError, check_device

WHOLE = "none"  # --cm of a base that draws in few steps itself
OF_LIBRARIES = (SafetensorError, SingleFileComponentError)
VARIANTS = ("fp16", "bf16", "fp32", "non_ema")  # in the names of files


# ---------------------------------------------------------------------------------------------------------------------
# Reading a public base


def refuse_gated(repository: str, chain: list[BaseException]) -> None:
    """UserError if an error, or one that it came from, says that the repository of a base or a LoRA is gated."""
    if any(isinstance(error, hub.GatedRepoError) or "gated repo" in str(error) for error in chain):
        owner_and_name = "/".join(repository.split("/")[:2])
        accept = f"accept its licence at https://huggingface.co/{owner_and_name} and run `hf auth login`, then again"
        raise UserError(f"{repository} is gated: {accept}") from None


def chain_of(error: BaseException) -> list[BaseException]:
    """The error, and those that it came from."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return chain


@contextlib.contextmanager
def loading_errors(what: str, base: str):
    """Errors of diffusers, transformers and the hub -> UserError with the command that mends it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        headers.check_folder_unquantized(base, "model_index.json")  # a part needs its quantizer
        raise UserError(f"{what} of {base} needs a package: {str(error).strip().splitlines()[0]}") from None
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, *OF_LIBRARIES) as error:
        chain, local = chain_of(error), Path(base).exists()
        refuse_gated(base, chain)
        text = " ".join(map(str, chain))
        if any(isinstance(e, SafetensorError) for e in chain) or ("safetensors" in text and "header" in text):
            again = f"copy {base} again" if local else f"run `hf download {base} --force-download`"
            says = f"{what} of {base} is truncated or damaged: {again}"
        elif local or not isinstance(error, OSError):
            first = str(error).strip().split("\n")[0][:200]
            advice = "--components, the hub id or folder of its base" if is_file(base) else "the folder that `hf download` made"
            says = f"{what} could not be read from {base} ({first}): give {advice}"
        elif os.path.isabs(base) or base.startswith((".", "~")) or base.count("/") != 1:
            says = f"{base} does not exist: give a hub id such as {FAMILIES['sdxl'].base}, a folder or a file"
        else:
            says = (
                f"{what} of {base} is not on this machine and could not be fetched: run `hf download {base}` where there is a"
                " network (and check the name), or give a local folder"
            )
        raise UserError(says) from None


def local_path(base: str) -> str:
    """A base as a run keeps its name: a path that exists here begins with / or ., so that it is never taken for a hub id."""
    return f"./{base}" if base and Path(base).exists() and not base.startswith(("/", ".")) else base


def is_file(base: str) -> bool:
    return base.endswith((".safetensors", ".sft"))


def check_architecture(family: Family, config: dict, base: str) -> None:
    """UserError for the configuration of a network (with _class_name) that is quantized, of another family, or of none."""
    headers.check_config_unquantized(config, base)
    found = family_of(config)
    if found is not family:
        hint = f"give --model {found.name}" if found else "choose another --teacher or --model"
        raise UserError(f"{base} is no {family.name.upper()} model: {hint}")
    if problem := family.unlike(config):
        raise UserError(f"{base} {problem}")


def network_config(family: Family, base: str) -> dict:
    """Of the denoiser in a folder or hub id. UserError if there is none, or one that is quantized or of another family."""
    if Path(base).is_file():
        read = "a folder or a .safetensors file of the model in 16 bits"
        raise UserError(f"{base} is a {Path(base).suffix or 'nameless'} file, which is not read: give a hub id, {read}")
    if Path(base).is_dir() and not (Path(base) / family.part).is_dir():
        raise UserError(f"{base} has no {family.part} folder: it is no {family.name}, choose another --teacher or --model")
    headers.check_folder_unquantized(base, f"{family.part}/config.json", family.part)
    config = family.network.load_config(base, subfolder=family.part)
    check_architecture(family, config, base)
    return config


def load_network(
    name: str, base: str = "", weights: str = "", components: str = "", resolution: int = 0, dtype=torch.bfloat16, device="cpu"
) -> Denoiser:
    """The denoiser of a public family in `dtype` on the CPU, without gradients, without text encoders. resolution: of pictures, in
    pixels; 0: the base's own. weights "random": only configs are read, of a folder, or for base "" none at all; then they are
    drawn on `device` (a CPU takes two minutes for FLUX's, and draws others) and stay there."""
    family = FAMILIES[name]
    check_device(device)
    if weights == "random" and not base:
        net, scheduler = random_weights(family.build, dtype, device), {}
    else:
        base = base or family.base
        net, scheduler = load_file(family, base, components, dtype) if is_file(base) else load_folder(family, base, weights, dtype)
    return as_denoiser(family, net, scheduler, local_path(base), resolution).eval().requires_grad_(False)


def as_denoiser(family: Family, net: nn.Module, scheduler: dict, base: str, resolution: int = 0) -> Denoiser:
    """A network of diffusers with the noise path of its scheduler's configuration. UserError for one that has no path here."""
    side = latent_side(family, net, resolution)
    try:
        return Denoiser(family, net, scheduler, (family.latent[0], side, side), base)
    except ValueError as error:
        raise UserError(f"the noise schedule of {base} cannot be used: {error}") from None


def random_weights(build, dtype: torch.dtype, device) -> nn.Module:
    """A network of random weights, drawn in `dtype`: no float32 copy."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build()
    finally:
        torch.set_default_dtype(before)


def load_folder(family: Family, base: str, weights: str, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """(network, configuration of the scheduler) of a folder or hub id."""
    with loading_errors("the denoiser", base):
        config = network_config(family, base)
        if weights == "random":
            torch.manual_seed(0)
            net = family.network.from_config(config).to(dtype)
        else:
            net = from_pretrained(family.network, base, subfolder=family.part, torch_dtype=dtype)
        if not Path(base).is_dir():  # the hub's files came only now
            headers.check_folder_unquantized(base, f"{family.part}/config.json", family.part)
    check_whole("the denoiser", net, base)
    return net, load_scheduler(base)


def load_file(family: Family, base: str, components: str, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """(network, configuration of the scheduler) of a single file; the latter from `components` or the official base."""
    if not Path(base).is_file():
        raise UserError(f"{base} does not exist: give a hub id, a folder or a .safetensors file")
    with loading_errors("the denoiser", base), tempfile.TemporaryDirectory() as folder:
        asked = check_file(family, base, components)
        family.build_meta().save_config(Path(folder) / family.part)  # which from_single_file would else ask the hub for
        net = family.network.from_single_file(base, config=components or folder, subfolder=family.part, torch_dtype=dtype)
    check_architecture(family, dict(net.config) | {"_class_name": type(net).__name__}, base)
    check_whole("the denoiser", net, base)
    scheduler = load_scheduler(components or family.base)
    for mark, (setting, value, says) in MARKS.items():
        if mark in asked and scheduler.get(setting) != value:
            raise UserError(f"{base} {says}: give --components whose scheduler says so ({setting}: {value})")
    return net, scheduler


def check_whole(what: str, net: nn.Module, base: str) -> None:
    """UserError if tensors of a network were not in its files."""
    if absent := [k for k, v in net.state_dict().items() if v.is_meta]:
        raise UserError(f"{what} of {base} lacks {absent[0]} and {len(absent) - 1} more tensors: get the whole of it")


MARKS = {  # in a single file -> setting of a scheduler, the value that it asks for, and what it says of the model
    "v_pred": ("prediction_type", "v_prediction", "predicts v"),
    "ztsnr": ("rescale_betas_zero_snr", True, "ends at zero signal-to-noise ratio"),
}


def check_file(family: Family, base: str, components: str) -> set[str]:
    """Which of MARKS a single file has. UserError for one that is quantized, a LoRA, of another family or of none, has EDM's noise
    schedule, or lacks what only `components` could say."""
    found = headers.read_headers(base)
    headers.check_unquantized(found, base)
    if headers.is_lora(found):
        raise UserError(f"{base} is a LoRA: give it as --cm, and the model that it was made for as --teacher")
    if marks := found.keys() & {"edm_mean", "edm_vpred.sigma_max"}:
        raise UserError(f"{base} has a noise schedule of its own ({min(marks)}): choose another --teacher")
    shapes = {key: header.shape for key, header in found.items()}
    if (holds := what_file_holds(shapes)) != family.in_file:
        other = next((one.name for one in FAMILIES.values() if holds and one.in_file == holds), None)
        hint = f"give --model {other}" if other else f"give a .safetensors file of {family.in_file}, a folder or a hub id"
        raise UserError(f"{base} holds {holds or 'no network that is known here'}: {hint}")
    if not components and (problem := family.check_shapes(shapes)):
        raise UserError(f"{base} {problem}")
    return found.keys() & MARKS.keys()


def latent_side(family: Family, net: nn.Module, resolution: int) -> int:
    """Of square pictures of `resolution` pixels; 0: of the base's own. UserError if these are not square, or `resolution` is a size
    that no training has."""
    if resolution:
        buckets(resolution)
    size = getattr(net.config, "sample_size", 0) or family.latent[1]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not resolution and height != width:
        raise UserError(f"the base draws pictures of {FACTOR * height} x {FACTOR * width} pixels: give --resolution of square ones")
    return resolution // FACTOR or int(height)


def skeleton(name: str, base: str = "") -> nn.Module:
    """The float network on the meta device: of a folder's or hub id's config, or the official one ("")."""
    family = FAMILIES[name]
    if not base:
        return family.build_meta()
    with loading_errors("the denoiser's config", base), torch.device("meta"):
        return family.network.from_config(network_config(family, base))


def from_pretrained(cls, base: str, **options):
    """cls.from_pretrained of a folder or hub id, safetensors only; one of VARIANTS where there is no other."""
    try:
        return cls.from_pretrained(base, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        for variant in VARIANTS:
            with contextlib.suppress(OSError, ValueError):
                return cls.from_pretrained(base, use_safetensors=True, variant=variant, **options)
        raise error


def load_scheduler(base: str) -> dict:
    """The configuration of a base's scheduler. What it does not say is the default of its class, as in its pipeline. UserError for
    a class that diffusers does not have."""
    with loading_errors("the scheduler's config", base):
        config = DDIMScheduler.load_config(base, subfolder="scheduler")
    name = config.get("_class_name", "")
    if not (name.endswith("Scheduler") and hasattr(diffusers, name)):
        raise UserError(f"diffusers does not have the scheduler of {base} ({name or 'of no class'}): choose another --teacher")
    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    return defaults | {k: v for k, v in config.items() if not k.startswith("_")}


def load_component(cls, what: str, family: Family, base: str, components: str, **options):
    """cls of `base`; if that is a file of the denoiser alone, of `components` or the official base."""
    base = base or family.base
    if is_file(base):
        with loading_errors(what, base), contextlib.suppress(SingleFileComponentError):
            return cls.from_single_file(base, config=components or family.base, **options)
        base = components or family.base
    with loading_errors(what, base):
        return from_pretrained(cls, base, **options)


def load_text_pipeline(family: Family, base: str, components: str = "", dtype=torch.bfloat16):
    """The family's pipeline with text encoders and tokenizers alone."""
    options = {family.part: None, "vae": None, "torch_dtype": dtype} | family.text_options
    return load_component(family.pipeline(), "the text encoders", family, base, components, **options)


def load_vae(family: Family, base: str, components: str = "") -> AutoencoderKL:
    """The VAE in float32: SDXL's overflows in float16."""
    vae = load_component(AutoencoderKL, "the VAE", family, base, components, subfolder="vae")
    check_whole("the VAE", vae, base or family.base)
    made = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if made != (family.latent[0], FACTOR):
        latents = f"latents of {made[0]} channels, {made[1]} times smaller than pictures"
        raise UserError(f"the VAE of {base or family.base} makes {latents}: choose a base whose VAE is that of {family.name}")
    return vae.float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The consistency LoRA


def weightless(net: nn.Module) -> nn.Module:
    """The float network of `net`'s configuration, each weight a view of one zero on the CPU: no memory, yet not meta."""
    twin = on_meta(net)
    for layer in twin.modules():
        for key, p in layer._parameters.items():
            layer._parameters[key] = None if p is None else nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return twin


@contextlib.contextmanager
def lora_errors(lora: str, onto: str):
    """Errors of diffusers, PEFT and the hub for a LoRA -> UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise UserError(f"{lora} is truncated or damaged ({error}): copy it again") from None
    except (OSError, hub.HFValidationError) as error:
        if Path(lora).exists():
            raise UserError(f"{lora} cannot be read ({error}): change its permissions, or copy it again") from None
        refuse_gated(lora, chain_of(error))
        fetch = f"`hf download {lora.replace('/', ' ', 2).replace(' ', '/', 1)}`"  # OWNER/NAME FILE
        raise UserError(f"{lora} is neither here nor to be had from the hub: check the name, or run {fetch}") from None
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        why = textwrap.shorten(str(error), 200, placeholder=" ..")
        raise UserError(f"{lora} does not fit {onto} ({why}): choose a LoRA that was made for it") from error


def read_lora(net: nn.Module, lora: str | dict) -> tuple[dict, dict, set[str]]:
    """(state, the arguments of diffusers' loaders that go with it, the text encoders that it has parts for) of a LoRA for the
    pipeline of the denoiser `net`. UserError if it is more than B A: diffusers leaves out some of what it does not know."""
    options = {"use_safetensors": True, "return_alphas": True, "return_lora_metadata": True, "unet_config": net.config}
    file = lora if isinstance(lora, dict) else headers.find_lora(lora)
    keys = list(lora if isinstance(lora, dict) else headers.read_headers(file))
    headers.check_plain_lora(keys, "the LoRA" if isinstance(lora, dict) else lora)
    state, alphas, metadata = family_of_network(net).pipeline().lora_state_dict(file, **options)
    return state, {"network_alphas": alphas, "metadata": metadata}, headers.text_encoders_of(keys)


def lora_factors(net: nn.Module, state: dict, about: dict, file: str) -> dict[str, tuple[nn.Module, torch.Tensor, float]]:
    """Layer of the denoiser `net` -> (PEFT's layer A with the geometry of that layer, weight of B, scale), from read_lora's answer.
    diffusers and PEFT find names, ranks and scales on a twin. Prints how many of its layers `net` does not have. UserError if
    `file` is more than B A (DoRA, biases), or less."""
    twin, factors, part = weightless(net), {}, family_of_network(net).part
    asked = sum(key.startswith(f"{part}.") and key.endswith("weight") for key in state) // 2
    twin.load_lora_adapter(state, part, adapter_name="lora", low_cpu_mem_usage=True, **about)
    for name, layer in twin.named_modules():
        if "lora" in getattr(layer, "lora_A", {}):
            if not is_plain_lora(layer, "lora"):
                raise UserError(f"{file} is more than B A at {name} (DoRA, or a bias): choose a plain LoRA")
            A, B = layer.lora_A["lora"], layer.lora_B["lora"].weight.data
            if A.weight.is_meta or B.is_meta:
                raise UserError(f"{file} lacks A or B of {name}: copy it again, or choose another LoRA")
            factors[name] = A, B, layer.scaling["lora"]
    if 0 < len(factors) < asked:
        print(f"{file}: {asked - len(factors)} of its {asked} layers are not in this {part}, and are left out")
    return factors


def add_cm(denoiser: Denoiser, cm: str, strength: float = 1.0) -> None:
    """Wraps the layers that the LoRA file, folder or hub id `cm` has factors for (`strength`, scale and alpha inside B). UserError
    as above, if none of its layers is in the network, or if it is more than B A."""
    net, part = denoiser.net, denoiser.family.part
    with lora_errors(cm, denoiser.base or denoiser.family.name):
        state, about, texts = read_lora(net, cm)
        if not any(k.startswith(part) for k in state):
            raise UserError(f"{cm} has no LoRA for a {part}: choose another --cm")
        factors = lora_factors(net, state, about, cm)
    if texts:
        print(f"{cm}: its parts for text encoders ({', '.join(sorted(texts))}) are left out, the {part}'s alone are read")
    if not factors:
        raise UserError(f"{cm} fits no layer of {denoiser.base or denoiser.family.name}: choose another --cm or --teacher")
    for name, (A, B, scale) in factors.items():
        layer = net.get_submodule(name)
        A, B = A.weight.to(layer.weight.dtype), B.to(layer.weight.dtype)  # as PEFT holds them
        net.set_submodule(name, LoRA.of(layer, A.float(), B.float() * scale * strength))
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
        key, B = f"{denoiser.family.part}.{name}", layer.lora_B.detach()
        tensors[f"{key}.lora_A.weight"] = layer.lora_A.detach().half()
        tensors[f"{key}.lora_B.weight"] = (B if layer.lora_A.dim() == 2 else B[:, :, None, None]).half()
    files.write_tensors(path, tensors, {})
    print(f"weights: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The embedded models: assets/


def load_teacher(name: str, path: str = "") -> Denoiser:
    """The teacher of assets/ (of a family whose weights do not ship: where its training leaves them), or of `path`, in float32.
    UserError if the file is missing, damaged or of another model."""
    denoiser = random_denoiser(name)
    path = Path(path or FAMILIES[name].preset.get("teacher", files.ASSETS / f"{name}.safetensors"))
    tensors, _ = files.read_tensors(path, f"make it with `python train.py --model {name} --stage teacher`")
    try:
        denoiser.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError:
        raise UserError(f"{path} holds no {name} teacher: choose another --teacher or --model") from None
    return denoiser.eval().requires_grad_(False)


def load_embedded_cm(name: str, teacher: str = "", cm: str = "") -> Denoiser:
    """Teacher with its consistency LoRA (of assets/, as load_teacher, or `cm`), switchable by as_teacher / as_cm."""
    denoiser = load_teacher(name, teacher)
    path = Path(cm or FAMILIES[name].student.get("cm", files.ASSETS / f"{name}-cm.safetensors"))
    tensors, _ = files.read_tensors(path, f"make it with `python train.py --model {name} --bits 16`")
    try:
        add_lora(denoiser, max((v.shape[1] for k, v in tensors.items() if k.endswith("lora_B")), default=1))
        if tensors.keys() != {k for k in denoiser.net.state_dict() if "lora_" in k}:
            raise RuntimeError("layers are missing")
        denoiser.net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    except RuntimeError:
        raise UserError(f"{path} holds no consistency LoRA of {name}: choose another --cm or --model") from None
    return denoiser.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# What a run asks for. cfg: train.Config


def open_cm(cfg, dtype: torch.dtype) -> Denoiser:
    """The teacher with its switchable consistency LoRA, or a base that is a consistency model without one, on the CPU (random
    weights: where they are drawn)."""
    if FAMILIES[cfg.model].embedded:
        denoiser = load_embedded_cm(cfg.model, cfg.teacher, cfg.cm)
        if cfg.outliers:
            add_outliers(denoiser)
        return denoiser.to(dtype)
    denoiser = _open_network(cfg, dtype)
    if cfg.cm == WHOLE:
        return denoiser
    if cfg.cm:
        add_cm(denoiser, cfg.cm, cfg.cm_scale)
    elif cfg.weights == "random":
        random_cm(denoiser)
    else:
        example = FAMILIES[cfg.model].cm_example
        others = "--cm self to train one first, or --cm none if the base draws in few steps itself"
        raise UserError(f"--cm is missing: name a consistency LoRA, such as {example}, {others}")
    return denoiser


def open_trainable_cm(cfg, dtype: torch.dtype) -> Denoiser:
    """The base in `dtype` with a float32 consistency LoRA to train: that of --cm, or a new one of --rank on every layer."""
    if FAMILIES[cfg.model].embedded:
        denoiser = load_embedded_cm(cfg.model, cfg.teacher, cfg.cm) if cfg.cm else load_teacher(cfg.model, cfg.teacher)
    else:
        denoiser = _open_network(cfg, dtype)
        if cfg.cm:
            add_cm(denoiser, cfg.cm, cfg.cm_scale)
    if not cfg.cm:
        add_lora(denoiser, cfg.rank, cfg.seed)
    for key, p in denoiser.named_parameters():
        p.data = p.data if "lora_" in key else p.data.to(dtype)
    return denoiser.requires_grad_(False)


def _open_network(cfg, dtype: torch.dtype) -> Denoiser:
    """A public base without a LoRA, its input for guidance set to --guidance where it has one."""
    denoiser = load_network(cfg.model, cfg.teacher, cfg.weights, cfg.components, cfg.resolution, dtype, cfg.device)
    denoiser.guidance = None if denoiser.guidance is None else cfg.guidance
    return denoiser


def place(network: Denoiser, device: str, offload: bool, shard: bool) -> None:
    """Where a frozen network's weights are: on the device; in main memory, coming layer by layer (`offload`); or a part on
    every process of the torchrun (`shard`, FSDP2), blocks gathered when they are used."""
    if shard:
        for block in transformer_blocks(network.net):
            fully_shard(block)
        fully_shard(network.net)
    elif offload and device != "cpu":
        apply_group_offloading(network.to("cpu").net, torch.device(device), offload_type="leaf_level", use_stream=True)
    else:
        network.to(device)
