"""The quantization method "cmquant" of diffusers: loads and saves packed networks, and packs others without data.

    config = CMQuantConfig()  # or CMQuantConfig(bits_x=8)
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", quantization_config=config)

That rounds weights to nearest after they are loaded, so the 16-bit network has to fit: no statistics, no branches, no distillation.
It is the quick way to try the format and its kernels; what train.py makes is better.

Importing this file adds it to the two mappings of diffusers.quantizers.auto. From then on `save_pretrained` of a packed network and
`from_pretrained` of network or pipeline are diffusers' own; without the import from_pretrained says "Unknown quantization type, got
cmquant". config.json carries the table of layers, from which packed layers take the place of float ones before weights are read.
Stored:

    scale_O            kernels.pack_scales: one byte (in memory float32, or with LoRA in 8 bits that byte)
    everything else    as it is.  torch_dtype casts the 16-bit layers alone; a round trip is equal bit for bit.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

import kernels
import quant
from layers import (
    PackedLayer,
    on_meta,
    packed_class,
    packed_layers,
    place_packed,
    plain_config,
    refuse_change,
    replace_layer,
    set_backend,
)


class Method(str, Enum):  # noqa: UP042  (diffusers asks for .value, JSON for a str)
    CMQUANT = "cmquant"


class CMQuantConfig(QuantizationConfigMixin):
    """layers: the table of layers of a checkpoint, none for a network that is to be packed; base: the pipeline that was quantized;
    backend: of the kernels; latent: the shape of the pictures' latents in training; guidance: what the network was given as its
    guidance, if it has that input; steps: the largest number that it was trained for, None if it was not; bits_x: of activations, 4
    or 8, where a network is packed; whole: whether the base itself draws in few steps (--cm none); method: what a card
    says of the training."""

    def __init__(
        self,
        layers: dict | None = None,
        base="",
        backend="native",
        latent=(0, 128, 128),
        guidance=None,
        steps=4,
        bits_x=4,
        whole=False,
        method="",
        quant_method=Method.CMQUANT,
    ):
        """ValueError for other bits."""
        if bits_x not in (4, 8):
            raise ValueError(f"activations have 4 or 8 bits, not {bits_x}")
        self.quant_method, self.layers, self.base, self.backend = Method(quant_method), layers or {}, base, backend
        self.latent, self.guidance, self.steps = list(latent), guidance, steps
        self.whole, self.method = whole, method
        if not layers:
            self.bits_x = bits_x

    to_diff_dict = QuantizationConfigMixin.to_dict  # what repr prints


class CMQuantQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a network with a CMQuantConfig."""

    is_serializable, is_trainable, is_compileable = True, True, True  # what is trained are adapters

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized and self.quantization_config.layers:
            raise ValueError("a table of layers belongs to a checkpoint: give a network in 16 bits CMQuantConfig() without one")
        if not self.pre_quantized:
            try:
                import models.family  # noqa: F401  (which a pipeline folder's own code lacks)
            except ImportError:
                raise ValueError("a network is packed only where CMQuant's repository is on the Python path") from None

    def _process_model_before_weight_loading(self, model, **kwargs):
        place_packed(model, self.quantization_config.layers)

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedLayer)

    def check_quantized_param_shape(self, param_name, current_param, loaded_param):
        raise ValueError(
            f"{param_name} has shape {tuple(loaded_param.shape)}, its table of layers says {tuple(current_param.shape)}"
        )

    def create_quantized_param(self, model, param_value, param_name, target_device, state_dict, *args, **kwargs):
        """The tensor as it was saved: `param_value` was already cast to torch_dtype."""
        module, _, name = param_name.rpartition(".")
        layer, tensor = model.get_submodule(module), state_dict[param_name].to(target_device)
        if name == "scale_O" and layer.scale_O.is_floating_point():
            tensor = kernels.unpack_scales(tensor)
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name in layer._parameters else tensor)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if absent := [k for k, v in model.state_dict().items() if v.is_meta]:
            raise ValueError(f"the weights lack {absent[0]} and {len(absent) - 1} more tensors: copy the whole folder again")
        if not self.quantization_config.layers:
            self.quantization_config.layers = pack_nearest(model, self.quantization_config.bits_x)
            self.quantization_config.steps = None
        set_backend(model, self.quantization_config.backend)
        as_packed(model)

    def _dequantize(self, model):
        """Q + B A in plain layers, with which any tool works; activations are not rounded there."""
        float_net = on_meta(model)
        for name, layer in list(packed_layers(model)):
            plain = float_net.get_submodule(name.removesuffix(".base_layer")).train(layer.training)  # PEFT's name
            layer.dequantize(plain)
            replace_layer(model, name, plain)
        model._internal_dict = FrozenDict(plain_config(model))
        for method in METHODS:
            delattr(model, method.__name__)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        floats = {k: v for k, v in state_dict.items() if k.endswith(".scale_O") and v.is_floating_point()}
        return state_dict | {k: kernels.pack_scales(v) for k, v in floats.items()}, {}


def pack_nearest(net: nn.Module, bits_x: int) -> dict[str, dict]:
    """Packs a network in place, one layer at a time, rounded to nearest, rotated where that can be, without branches: the table of
    layers. ValueError for a network of no family."""
    from models.denoiser import float_layers  # which a pipeline folder's own code lacks, as the next one
    from models.family import family_of_network

    if (family := family_of_network(net)) is None:
        raise ValueError(f"{type(net).__name__} of this configuration is of no family here: models/family.py lists them")
    table = {}
    for name, layer in float_layers(net).items():
        if (kind := family.precision(name)) == "16bit":
            continue
        w_OIhw = layer.weight.detach().float()
        w_OK, taps = quant.flatten_conv(w_OIhw if w_OIhw.dim() == 4 else w_OIhw[..., None, None]), w_OIhw[0, 0].numel()
        rotated = kind == "w4a4" and w_OIhw.shape[1] % quant.TURN == 0
        gw = quant.quantize_weight(quant.rotate_taps(w_OK, taps) if rotated else w_OK, quant.GROUP_W, taps)
        group_x = quant.EIGHT_BITS if bits_x == 8 else quant.GROUP_X
        replace_layer(net, name, packed_class(kind, layer).from_float(layer, gw, group_x=group_x, rotated=rotated))
        table[name] = {"kind": kind, "shape": [*w_OK.shape], "rank": 0, "smooth": False, "rotated": rotated}
        table[name] |= {"group_w": quant.GROUP_W, "group_x": group_x}
    return table


def register() -> None:
    """From now on diffusers' "cmquant" is this file's, not that of a pipeline folder whose own code was loaded (standalone.py)."""
    auto.AUTO_QUANTIZER_MAPPING[Method.CMQUANT.value] = CMQuantQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.CMQUANT.value] = CMQuantConfig


register()


class WithWeights(OrderedDict):
    """A state_dict of the packed network `net` that also answers for the `weight` of a packed layer, which it does not list: there
    diffusers looks the shapes of FLUX's layers up when it loads a LoRA."""

    net: nn.Module

    def __missing__(self, key: str) -> torch.Tensor:
        module, _, name = key.rpartition(".")
        try:
            layer = self.net.get_submodule(module)
        except AttributeError:
            raise KeyError(key) from None
        layer = getattr(layer, "base_layer", layer)  # inside of PEFT's
        if name != "weight" or not isinstance(layer, PackedLayer):
            raise KeyError(key)
        return layer.weight


def num_parameters(net: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Packed layers count as the float layers that they replace, beside their branches."""
    tensors = (tensor for _, layer in packed_layers(net) for tensor in (layer.weight, layer.bias) if tensor is not None)
    packed = 0 if only_trainable else sum(tensor.numel() for tensor in tensors)
    return type(net).num_parameters(net, only_trainable, exclude_embeddings) + packed


def state_dict(net: nn.Module, *args, **kwargs) -> WithWeights:
    found = WithWeights(type(net).state_dict(net, *args, **kwargs))
    found.net = net
    return found


def fuse_lora(net: nn.Module, *args, **kwargs) -> None:
    """RuntimeError, before 16-bit layers are fused."""
    refuse_change()


def fuse_qkv_projections(net: nn.Module) -> None:
    """RuntimeError: the fused layers would be float ones, and the bias of a centred layer is not that of its weight."""
    refuse_change()


def add_adapter(net: nn.Module, *args, **kwargs) -> None:
    type(net).add_adapter(net, *args, **kwargs)
    refuse_dora(net)


def load_lora_adapter(net: nn.Module, *args, **kwargs) -> None:
    type(net).load_lora_adapter(net, *args, **kwargs)
    refuse_dora(net)


def refuse_dora(net: nn.Module) -> None:
    """RuntimeError for an adapter with magnitudes on a centred layer: PEFT takes the layer's bias from its output for them."""
    for name, layer in net.named_modules():
        if any(getattr(layer, "use_dora", {}).values()) and getattr(layer.base_layer, "shift", None) is not None:
            net.unload_lora()
            raise RuntimeError(f"{name} is centred, which DoRA does not know: give a plain LoRA, or dequantize() the network")


METHODS = (num_parameters, state_dict, fuse_lora, fuse_qkv_projections, add_adapter, load_lora_adapter)


class Bound:
    """A method of one network, that does not keep it alive, and that is its copy's where the network is copied."""

    def __init__(self, function: Callable, net: nn.Module):
        self.function, self.net = function, weakref.ref(net)

    def __call__(self, *args, **kwargs):
        if (net := self.net()) is None:
            raise RuntimeError(f"the network of {self.function.__name__} is gone: keep its pipeline in a variable")
        return self.function(net, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "Bound":
        return Bound(self.function, memo[id(self.net())])

    def __reduce__(self):
        return Bound, (self.function, self.net())


def as_packed(net: nn.Module) -> None:
    """Puts METHODS, what diffusers asks of a network, before those of its class, which from_pipe wants as it is. Its .to(dtype)
    casts what is not packed, where diffusers refuses to cast a quantized network."""
    for method in METHODS:
        setattr(net, method.__name__, Bound(method, net))
    net.is_quantized = False


def quantization_config(net: nn.Module) -> CMQuantConfig:
    return net.hf_quantizer.quantization_config
