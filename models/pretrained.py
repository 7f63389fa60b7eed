"""Public weights: a denoiser of diffusers, its consistency LoRA, and the loaders of its pipeline's other parts.

    base     a hub id, a folder in diffusers' layout, or one .safetensors file (as authors or user interfaces write them;
             `components`, a hub id or folder, then has the configs and tokenizers: default the official base)
    cm       a LoRA that turns the base into a few-step consistency model (TCD, LCM, PCM, Hyper-SD ..), in any format that diffusers
             reads (its own, PEFT's, kohya's): a hub id, one of its files (OWNER/NAME/FILE.safetensors), a folder or a file. It
             becomes denoiser.LoRA wrappers, so that one network is teacher and consistency model.
    A file without text encoders or VAE, as FLUX is published, takes those of `components` or of the official base.

    network = load_network("sdxl", base)            bfloat16, no second copy at any time
    add_cm(network, "latent-consistency/lcm-lora-sdxl")

`weights="random"` builds the full-size network, or that of a folder's config, without any weights: for rehearsals. The embedded
models' teacher and consistency LoRA are files in assets/.

Everything that fails for a reason the user can mend (no such model, gated, no network, another architecture, a damaged file)
is a UserError whose sentence names the command that helps.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard

from models.denoiser import Denoiser, LoRA, add_lora, is_plain_lora, lora_layers, random_denoiser, transformer_blocks
from models.family import FACTOR, FAMILIES, Family, family_of, family_of_network
from models.outliers import add_outliers
from run import files
from run.common import UserError

OF_LIBRARIES = (SafetensorError, SingleFileComponentError)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a public base


@contextlib.contextmanager
def loading_errors(what: str, base: str):
    """Errors of diffusers, transformers and the hub -> UserError with the command that mends it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{what} of {base} needs a package: {str(error).strip().splitlines()[0]}") from None
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, *OF_LIBRARIES) as error:
        chain, local = [error], Path(base).exists()
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        text = " ".join(map(str, chain))
        if any(isinstance(e, hub.GatedRepoError) for e in chain) or "gated repo" in text:
            says = f"{base} is gated: accept its licence at https://huggingface.co/{base} and run `hf auth login`, then again"
        elif any(isinstance(e, SafetensorError) for e in chain) or ("safetensors" in text and "header" in text):
            again = f"copy {base} again" if local else f"run `hf download {base} --force-download`"
            says = f"{what} of {base} is truncated or damaged: {again}"
        elif local or not isinstance(error, OSError):
            first = str(error).strip().split("\n")[0][:200]
            says = f"{what} could not be read from {base} ({first}): give the folder that `hf download` made"
        elif os.path.isabs(base) or base.startswith((".", "~")) or base.count("/") != 1:
            says = f"{base} does not exist: give a hub id such as {FAMILIES['sdxl'].base}, a folder or a file"
        else:
            says = (
                f"{what} of {base} is not on this machine and could not be fetched: run `hf download {base}` where there is a"
                " network (and check the name), or give a local folder"
            )
        raise UserError(says) from None


def is_file(base: str) -> bool:
    return base.endswith((".safetensors", ".sft"))


def check_architecture(family: Family, config: dict, base: str) -> None:
    """UserError for the configuration of a network (with _class_name) that is of another family, or of none."""
    found = family_of(config)
    if found is not family:
        hint = f"give --model {found.name}" if found else "choose another --teacher or --model"
        raise UserError(f"{base} is no {family.name.upper()} model: {hint}")


def network_config(family: Family, base: str) -> dict:
    """Of the denoiser in a folder or hub id. UserError if there is none, or one of another family."""
    if Path(base).is_dir() and not (Path(base) / family.part).is_dir():
        raise UserError(f"{base} has no {family.part} folder: it is no {family.name}, choose another --teacher or --model")
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
    if weights == "random" and not base:
        net, scheduler = random_weights(family.build, dtype, device), {}
    else:
        base = base or family.base
        net, scheduler = load_file(family, base, components, dtype) if is_file(base) else load_folder(family, base, weights, dtype)
    side = latent_side(family, net, resolution)
    try:
        denoiser = Denoiser(family, net, scheduler, (family.latent[0], side, side), base)
    except ValueError as error:
        raise UserError(f"the noise schedule of {base} cannot be used: {error}") from None
    return denoiser.eval().requires_grad_(False)


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
    check_whole("the denoiser", net, base)
    return net, load_scheduler(base)


def load_file(family: Family, base: str, components: str, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """(network, configuration of the scheduler) of a single file; the latter from `components` or the official base."""
    if not Path(base).is_file():
        raise UserError(f"{base} does not exist: give a hub id, a folder or a .safetensors file")
    with loading_errors("the denoiser", base), tempfile.TemporaryDirectory() as folder:
        predicts_v = check_file(family, base, components)
        family.build_meta().save_config(Path(folder) / family.part)  # which from_single_file would else ask the hub for
        net = family.network.from_single_file(base, config=components or folder, subfolder=family.part, torch_dtype=dtype)
    check_architecture(family, dict(net.config) | {"_class_name": type(net).__name__}, base)
    check_whole("the denoiser", net, base)
    scheduler = load_scheduler(components or family.base)
    if predicts_v and scheduler.get("prediction_type") != "v_prediction":
        raise UserError(f"{base} predicts v: give --components whose scheduler says so")
    return net, scheduler


def check_whole(what: str, net: nn.Module, base: str) -> None:
    """UserError if tensors of a network were not in its files."""
    if absent := [k for k, v in net.state_dict().items() if v.is_meta]:
        raise UserError(f"{what} of {base} lacks {absent[0]} and {len(absent) - 1} more tensors: get the whole of it")


def check_file(family: Family, base: str, components: str) -> bool:
    """Whether the marks in a single file say that it predicts v. UserError for weights with scales beside them, for EDM's noise
    schedules, and for a file that lacks what only `components` could say."""
    with safe_open(base, "pt") as file:
        keys = set(file.keys())
    if any(key.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) or ".absmax" in key for key in keys):
        raise UserError(f"the weights in {base} are quantized with scales of their own: give the file in 16 bits (or plain fp8)")
    if marks := keys & {"edm_mean", "edm_vpred.sigma_max"}:
        raise UserError(f"{base} has a noise schedule of its own ({min(marks)}): choose another --teacher")
    if not components and (problem := family.check_keys(keys)):
        raise UserError(f"{base} {problem}")
    return "v_pred" in keys


def latent_side(family: Family, net: nn.Module, resolution: int) -> int:
    """Of square pictures of `resolution` pixels; 0: of the base's own."""
    return resolution // FACTOR or int(getattr(net.config, "sample_size", 0) or family.latent[1])


def skeleton(name: str, base: str = "") -> nn.Module:
    """The float network on the meta device: of a folder's or hub id's config, or the official one ("")."""
    family = FAMILIES[name]
    if not base:
        return family.build_meta()
    with loading_errors("the denoiser's config", base), torch.device("meta"):
        return family.network.from_config(network_config(family, base))


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
    return vae.float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The consistency LoRA


def weightless(net: nn.Module) -> nn.Module:
    """The float network of `net`'s configuration, each weight a view of one zero on the CPU: no memory, yet not meta."""
    with torch.device("meta"):
        twin = type(net).from_config(net.config)
    for layer in twin.modules():
        for key, p in layer._parameters.items():
            layer._parameters[key] = None if p is None else nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return twin


def read_lora(net: nn.Module, file: str | dict, **options) -> tuple[dict, dict]:
    """(state, the arguments of diffusers' loaders that go with it) of a LoRA for the pipeline of the denoiser `net`."""
    options |= {"use_safetensors": True, "return_alphas": True, "return_lora_metadata": True, "unet_config": net.config}
    state, alphas, metadata = family_of_network(net).pipeline().lora_state_dict(file, **options)
    return state, {"network_alphas": alphas, "metadata": metadata}


def lora_factors(net: nn.Module, state: dict, about: dict, file: str) -> dict[str, tuple[nn.Module, torch.Tensor, float]]:
    """Layer of the denoiser `net` -> (PEFT's layer A with the geometry of that layer, weight of B, scale), from read_lora's answer.
    diffusers and PEFT find names, ranks and scales on a twin. UserError if `file` is more than B A (DoRA, biases), or less."""
    twin, factors = weightless(net), {}
    twin.load_lora_adapter(state, family_of_network(net).part, adapter_name="lora", low_cpu_mem_usage=True, **about)
    for name, layer in twin.named_modules():
        if "lora" in getattr(layer, "lora_A", {}):
            if not is_plain_lora(layer, "lora"):
                raise UserError(f"{file} is more than B A at {name} (DoRA, or a bias): choose a plain LoRA")
            A, B = layer.lora_A["lora"], layer.lora_B["lora"].weight.data
            if A.weight.is_meta or B.is_meta:
                raise UserError(f"{file} lacks A or B of {name}: copy it again, or choose another LoRA")
            factors[name] = A, B, layer.scaling["lora"]
    return factors


def add_cm(denoiser: Denoiser, cm: str, strength: float = 1.0) -> None:
    """Wraps the layers that the LoRA file, folder or hub id `cm` has factors for (`strength`, scale and alpha inside B). UserError
    as above, if none of its layers is in the network, or if it is more than B A."""
    net, part, where, options = denoiser.net, denoiser.family.part, cm, {}
    if not Path(cm).exists() and cm.count("/") > 1 and not cm.startswith(("/", ".")):  # a file of a hub id
        owner, repository, options["weight_name"] = cm.split("/", 2)
        where = f"{owner}/{repository}"
    with loading_errors("the consistency LoRA", where):
        state, about = read_lora(net, where, **options)
        if not any(k.startswith(part) for k in state):
            raise UserError(f"{cm} has no LoRA for a {part}: choose another --cm")
        factors = lora_factors(net, state, about, cm)
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
    """The teacher with its switchable consistency LoRA, on the CPU (random weights: where they are drawn)."""
    if FAMILIES[cfg.model].embedded:
        denoiser = load_embedded_cm(cfg.model, cfg.teacher, cfg.cm)
        if cfg.outliers:
            add_outliers(denoiser)
        return denoiser.to(dtype)
    denoiser = _open_network(cfg, dtype)
    if cfg.cm:
        add_cm(denoiser, cfg.cm, cfg.cm_scale)
    elif cfg.weights == "random":
        random_cm(denoiser)
    else:
        example = FAMILIES[cfg.model].cm_example
        raise UserError(f"--cm is missing: name a consistency LoRA, such as {example}, or --cm self to train one first")
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
