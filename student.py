"""The W4A4 student of a consistency model, before training: statistics, ranks, split. Steps 1 to 3 of the method.

    1. H = E[x x^T] of what each layer reads, G = E[g g^T] of the gradients that reach its output       hessian.py
    2. a LoRA rank for each layer under one budget, or (--keep-16bit) no grid for it                   qra.py
    3. W ~ Q + B A                                                                                     hgs_lora.py

`build` is these three steps. `Calibration` makes them possible on a real model [O]: all H of SDXL take 60 GB in float64, all G
55, so layers are worked on in slices (hessian.slices), each with its own passes over the calibration captions. `--hessian-mb`
bounds what statistics and factors hold at a time:

    passes for H    1/2 its float64 sums, which end as float32: 1/4
    passes for G    1/4 H, 1/2 the float64 sums of G, which end as float32: 1/4
    split           1/4 H, 1/4 G, 1/2 the factors of one layer

A layer whose factors need more than that (hgs_lora.factor_bytes) is split on the CPU. Ranks weigh all layers against each other, so
the layers are gone through twice, for the ranks and for the splits, and with --inputs-8bit once more before that. Where one
slice holds them all, their statistics stay for the second time. Where not, the ranks get by with the diagonals of all H, from one
pass, and passes for G. The network itself is changed at the very end, since later slices are measured on it; until then the packed
layers wait in main memory. Before all that, some rows of each input are there too (--smooth).

Each process of a torchrun drives its own captions; sums and maxima are exchanged (hessian.py), every layer is split by one process
and sent to the others. Which process does what, and --micro, change the last bits of the sums, the draws behind G and which rows
smoothing is chosen by.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import hessian
import hgs_lora
import qra
import quant
import tdpt
from layers import packed_class, replace_layer
from models.denoiser import Denoiser, float_layers
from run.common import UserError, process_count, process_index, step_generator


@contextlib.contextmanager
def unusable_statistics():
    """What statistics and factors say of inf, nan and layers that nothing reaches -> UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise UserError(f"no student can be made ({error}): try --dtype float32, another --cm or other --data") from error


@unusable_statistics()
@torch.no_grad()
def build(cfg, base: Denoiser, cond: dict[str, Tensor], x_T: Tensor) -> tuple[Denoiser, dict[str, dict]]:
    """The consistency model as a plain network -> its packed twin with LoRA, in place, and the table of layers. Layers that stay in
    16 bits (--keep-16bit) are left as they are, and their rows of the table are of the kind 16bit.

    cond, x_T: this process' calibration captions, encoded, and their noises, on the network's device. cfg: train.Config.
    UserError for a rank or a budget that the layers have no room for, and for statistics of which nothing can be made."""
    layers = layers_to_quantize(cfg, base)
    calibration = Calibration(cfg, base, layers, cond, x_T)

    # 1. Statistics: H and G of each layer, and what the rule for ranks reads from them
    reads, statistics = rank_statistics(cfg), {}
    for layer in calibration.for_ranks() if reads else ():
        statistics[layer.name] = {name: STATISTICS[name](layer, cfg) for name in reads}

    # 2. Ranks: QRA
    shapes = {layer.name: layer.shape for layer in layers}
    about_ranks = dict(seed=cfg.seed, price=rank_price(cfg))
    ranks = qra.allocate(shapes, of_all_processes(statistics), cfg.ranks, cfg.rank, *rank_bounds(cfg), **about_ranks)

    # 3. Split: W ~ Q + B A, HGS-LoRA
    packed, table = {}, {}
    for layer in tqdm(calibration, f"split ({cfg.init}, {cfg.rounding})", total=len(layers), disable=process_index() > 0):
        rank, gen = ranks[layer.name], step_generator(cfg.seed, layer.index, stream=2)
        if rank is None:
            table[layer.name] = {"kind": "16bit", "shape": layer.shape, "rank": 0}
            continue
        grid = dict(group=cfg.group_w, taps=layer.taps, rounding=cfg.rounding)
        gw, A_rK, B_Or = hgs_lora.decompose(layer.w_OK, layer.white, rank, cfg.init, iters=cfg.iters, generator=gen, **grid)
        about_x = dict(smooth_I=layer.smooth_I, group_x=layer.group_x, rotated=layer.rotated, shift_I=layer.shift_I)
        packed[layer.name] = packed_class(layer.kind, layer.module).from_float(layer.module, gw, A_rK, B_Or, **about_x).cpu()
        error = hgs_lora.relative_error(layer.w_OK, layer.white.L_KK, gw, A_rK, B_Or)
        table[layer.name] = {"kind": layer.kind, "shape": layer.shape, "rank": rank, "smooth": layer.smooth_I is not None}
        table[layer.name] |= {"rotated": layer.rotated, "centred": layer.shift_I is not None}
        table[layer.name] |= {"group_w": cfg.group_w, "group_x": layer.group_x, "error": error}

    # The packed layers take the float layers' places
    for layer in layers:
        held = [packed.pop(layer.name, None), table.get(layer.name)]
        if process_count() > 1:
            dist.broadcast_object_list(held, src=layer.owner)  # fills `held` in place
        twin, table[layer.name] = held
        if twin is not None:
            replace_layer(base.net, layer.name, twin)
    return base, {layer.name: table[layer.name] for layer in layers}


def of_all_processes(values: dict) -> dict:
    """The entries that each process has, together."""
    if process_count() == 1:
        return values
    parts = [None] * process_count()
    dist.all_gather_object(parts, values)
    return {name: value for part in parts for name, value in part.items()}


# ---------------------------------------------------------------- layers and what is measured of them


@dataclass(eq=False)
class Layer:
    """A float layer that becomes a packed one. The last three fields are there while `Calibration` hands it out, and None else."""

    name: str
    module: nn.Module  # Linear or Conv2d
    kind: str  # w4a4 or w4a16 (Family.precision)
    index: int  # in the network's order
    group_x: int  # activations that share a multiplier, or quant.EIGHT_BITS; W4A16 rounds none
    rotated: bool = False  # --rotate, where its channels divide into blocks
    smooth_I: Tensor | None = None  # lambda of quant.smoothing_factors (--smooth); None: not smoothed
    shift_I: Tensor | None = None  # the mean of x / lambda (--centre)
    stats: hessian.Stats | None = None  # of what it quantizes, z of layers.py
    w_OK: Tensor | None = None  # float32, tap-major, times smooth_I, rotated
    white: hgs_lora.Whitener | None = None  # of z, with R and N where gradients are collected

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.weight.shape[0], self.module.weight[0].numel()

    @property
    def taps(self) -> int:
        return self.module.weight[0, 0].numel()

    @property
    def rounded_in(self) -> int | None:
        """group_x of what it rounds."""
        return self.group_x if self.kind == "w4a4" else None

    @property
    def owner(self) -> int:
        """The process that measures and splits it."""
        return self.index % process_count()

    def weight(self, device: torch.device | str) -> Tensor:
        """(W lambda) R, (O, K), float32: what multiplies z."""
        w_OIhw = self.module.weight[..., None, None] if self.module.weight.dim() == 2 else self.module.weight
        w_OK = quant.flatten_conv(w_OIhw).float().to(device)
        w_OK = w_OK if self.smooth_I is None else w_OK * self.smooth_I.to(device).repeat(self.taps)
        return quant.rotate_taps(w_OK, self.taps) if self.rotated else w_OK

    def grid_input(self, x: Tensor) -> Tensor:
        """z = (x / lambda - c) R of x (.., I), float32."""
        z = x.float() if self.smooth_I is None else x.float() * (1 / self.smooth_I)
        z = z if self.shift_I is None else z - self.shift_I
        return quant.rotate(z) if self.rotated else z

    def let_go(self) -> None:
        self.stats = self.w_OK = self.white = None


def layers_to_quantize(cfg, base: Denoiser) -> list[Layer]:
    """In the network's order. UserError if --rank is too large for one, or --hessian-mb too small."""
    known = ((name, module, base.family.precision(name)) for name, module in float_layers(base.net).items())
    packed = (about for about in known if about[2] != "16bit")
    layers = [Layer(*about, index, cfg.group_x) for index, about in enumerate(packed)]
    for layer in layers:
        if layer.kind == "w4a4" and cfg.bits_x == 8:
            layer.group_x = quant.EIGHT_BITS
        layer.rotated = cfg.rotate and layer.kind == "w4a4" and layer.module.weight.shape[1] % quant.TURN == 0
        if cfg.rank > min(layer.shape):
            shape = tuple(layer.module.weight.shape)
            raise UserError(f"--rank {cfg.rank} is larger than layer {layer.name} {shape}: choose a smaller one")
    least = [hessian.least_bytes([layer.shape], reads_gradients(cfg)) for layer in layers]
    widest = layers[least.index(max(least))]
    if cfg.hessian_mb << 20 < max(least):
        needed = f"give at least {-(-max(least) >> 20)}"
        raise UserError(f"--hessian-mb {cfg.hessian_mb} has no room for layer {widest.name} {widest.shape}: {needed}")
    return layers


def rank_bounds(cfg) -> qra.Bounds:
    return qra.bounds(cfg.rank, cfg.rank_granule, cfg.rank_least, cfg.rank_most)


def changed_by(layers: list[Layer], lambda_I: Tensor | None, shift_I: Tensor | None) -> list[Layer]:
    """The layers, in place, which now change their input by these."""
    for layer in layers:
        layer.smooth_I, layer.shift_I = lambda_I, shift_I
    return layers


def loss_on_grid(layers: list[Layer], x_TI: Tensor, cfg) -> float:
    """What rounding to nearest costs the layers that read x, as they change it now: the sum over them of

        (E ||W (z - q(z))||^2 + E ||(W - q(W)) z||^2) / E ||W z||^2

    over the rows of all processes. Each tap of a convolution is counted like an output of its own, and each of its pixels is
    rounded with a scale of its own; in the kernels a picture has one."""
    sums = []
    for layer in layers:
        w_OK = layer.weight(layer.module.weight.device)
        z_TI = layer.grid_input(x_TI.to(w_OK.device))
        grid_z = quant.quantize_activation(z_TI, layer.group_x)
        lost_TI = z_TI - quant.dequantize_activation(*grid_z, z_TI.shape[1])
        lost_OK = w_OK - quant.dequantize(quant.quantize_weight(w_OK, cfg.group_w, layer.taps))
        for inputs, weight in ((lost_TI, w_OK), (z_TI, lost_OK), (z_TI, w_OK)):
            by_tap = weight.unflatten(1, (layer.taps, -1)).movedim(1, 0).flatten(0, 1)
            sums.append((inputs @ by_tap.mT).square().sum(dtype=torch.float64))
    total = torch.stack(sums)
    hessian.exchange(total)
    z, w, energy = total.view(-1, 3).T
    return float(((z + w) / energy.clamp_min(quant.TINY)).sum())


def rank_price(cfg) -> Callable:
    """Of the ranks' budget: parameters, or stored bits where layers may stay in 16 bits."""
    return partial(qra.bits, lora_bits=cfg.lora_bits, group=cfg.group_w) if cfg.keep_16bit else qra.parameters


def rank_statistics(cfg) -> tuple[str, ...]:
    """Names of what the ranks read."""
    return (*qra.METHODS[cfg.ranks].reads, *(["whole"] if cfg.keep_16bit else []))


def reads_gradients(cfg) -> bool:
    """Whether G is collected."""
    return hgs_lora.wants_gradients(cfg.hessian, cfg.init, qra.METHODS[cfg.ranks].reads)


def weighed(layer: Layer, cfg) -> tuple[Tensor, Tensor, Tensor | None]:
    """(E, L, G) with R E L, G = R^T R, of whose energy a rank wins back what its singular value has: what the grid costs, in the
    picture's units, or, where gradients are not collected, the residual W - Q, with R = 1."""
    if layer.white.G_OO is not None:
        return layer.w_OK, hgs_lora.grid_cost(layer.white).sqrt(), layer.white.G_OO
    gw = quant.quantize_weight(layer.w_OK, cfg.group_w, layer.taps)
    return layer.w_OK - quant.dequantize(gw), layer.white.L_KK, None


def spectrum(layer: Layer, cfg) -> Tensor:
    """QRA's sigma_l, the strongest singular values of R E L, as many as a layer may have ranks."""
    return hgs_lora.whitened_spectrum(*weighed(layer, cfg), rank_bounds(cfg).most, dtype=torch.float32).cpu()


def whole(layer: Layer, cfg) -> float:
    """||R E L||_F: the root of the sum of the squares of all singular values of which `spectrum` has the first."""
    return float(hgs_lora.whitened_gram(*weighed(layer, cfg), dtype=torch.float32).trace()) ** 0.5


def energy(layer: Layer, cfg) -> float:
    """QRA's E_l: the energy of the layer's output, or 1 where gradients put all layers in the picture's units."""
    return 1.0 if layer.white.G_OO is not None else float((layer.w_OK.double() @ layer.white.L_KK).square().sum())


def variation(layer: Layer, cfg) -> tuple[float, float]:
    """QRA's v_x, of what is rounded (z, after smoothing and rotation), and v_w, of the float layer's weight."""
    return hessian.variation(layer.stats, layer.module.weight)


# What rules of qra.METHODS may read, each from a layer as Calibration.for_ranks hands it out: change this to add yours
STATISTICS: dict[str, Callable] = {
    "spectrum": spectrum,
    "whole": whole,  # where layers may stay in 16 bits
    "energy": energy,
    "variation": variation,
}


# ---------------------------------------------------------------- slices, shared factors, devices


class Calibration:
    """Iterates over the layers that this process works on, each with its statistics, weight and Whitener, as often as it is asked
    to. A layer has them until the next one is asked for, so that --hessian-mb is kept to (module docstring)."""

    def __init__(self, cfg, base: Denoiser, layers: list[Layer], cond: dict[str, Tensor], x_T: Tensor):
        self.cfg, self.layers, self.half = cfg, {layer.name: layer for layer in layers}, cfg.hessian_mb << 19  # bytes
        phases, micro = [int(K) for K in cfg.sampling_steps.split(",")], cfg.micro or 16
        few = slice(math.ceil(cfg.gradient_captions / process_count()) or None)  # captions of this process for G; 0: all
        forward, _ = tdpt.calibration(base, base.path, x_T, cond, phases, micro=micro)
        _, backward = tdpt.calibration(base, base.path, x_T[few], {k: v[few] for k, v in cond.items()}, phases, micro=micro)
        backward = backward if reads_gradients(cfg) else None
        sums = (8 * sum(side**2 for side in sides) for sides in zip(*(layer.shape for layer in layers), strict=True))
        self.diagonals = backward is not None and max(sums) > self.half  # what the ranks are given of H
        if cfg.centre or any(cfg.exponents):
            w4a4 = [layer for layer in layers if layer.kind == "w4a4"]
            names, rows = [layer.name for layer in w4a4], len(cfg.exponents) > 1
            self.centre_and_smooth(w4a4, hessian.ranges(base.net, names, forward, rows))
        changed = {k: v.grid_input for k, v in self.layers.items() if v.rotated or v.shift_I is not None or v.smooth_I is not None}
        collect = partial(hessian.slices, base.net, list(self.layers), forward, backward, self.half, inputs=changed)
        self.slices = lambda **more: collect(group_x={name: layer.rounded_in for name, layer in self.layers.items()}, **more)
        self.everything: dict | None = None  # a slice that holds all layers
        if cfg.inputs_8bit:
            self.give_8_bits(cfg.inputs_8bit)

    def centre_and_smooth(self, layers: list[Layer], ranges: dict[str, hessian.Range]) -> None:
        """The shift and lambda of each layer. Those that read one tensor have one lambda, so that they also share z and its
        statistics: of --smooth's exponents the one whose lambda costs them least."""
        together: dict[str, list[Layer]] = {}
        for layer in layers:
            together.setdefault(ranges[layer.name].first, []).append(layer)
        for first, group in together.items():
            seen, linear = ranges[first], all(isinstance(layer.module, nn.Linear) for layer in group)
            mean_I = seen.mean_I if self.cfg.centre and linear else None
            changes = self.changes_of_input(group, seen, mean_I, self.cfg.exponents)
            least = changes[0]
            if len(changes) > 1:
                least = min(changes, key=lambda change: loss_on_grid(changed_by(group, *change), seen.rows_TI, self.cfg))
            changed_by(group, *least)

    @staticmethod
    def changes_of_input(
        group: list[Layer], seen: hessian.Range, mean_I: Tensor | None, exponents: list[float]
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """(lambda, shift) for each of SmoothQuant's exponents and the largest of the layers' weights; None where there is none."""
        wmax_I = torch.stack([layer.module.weight.abs().movedim(1, -1).flatten(0, -2).amax(0) for layer in group]).amax(0)
        middle_I = 0 if mean_I is None else mean_I
        xmax_I = torch.maximum(seen.high_I - middle_I, middle_I - seen.low_I)
        changes = []
        for a in exponents:
            lambda_I, shift_I = quant.smoothing_factors(xmax_I, wmax_I, a) if a else None, None
            if mean_I is not None:
                shift_I = (mean_I if lambda_I is None else mean_I / lambda_I).bfloat16().float()  # a file has bfloat16
            changes.append((lambda_I, shift_I))
        return changes

    def __iter__(self) -> Iterator[Layer]:
        for part in [self.everything] if self.everything else self.slices():
            if len(part) == len(self.layers):
                self.everything = dict(part)
            yield from self.prepared(part)

    def for_ranks(self) -> Iterator[Layer]:
        """The same for the rules of ranks. Where G is there they read no more of H than its diagonal (`spectrum`, `energy`), and
        where one slice may not hold all layers they are given no more."""
        if not self.diagonals:
            yield from self
            return
        for part in self.slices(diagonals=True):
            yield from self.prepared(part)

    def give_8_bits(self, n: int) -> None:
        """To the n inputs whose rounding to 4 bits costs the picture most: tr(G W N W^T), over all layers that read them."""
        costs, readers = {}, {}
        for layer in self.for_ranks():
            if layer.kind == "w4a4":
                lost_OK = (layer.white.G_OO.float() @ layer.w_OK) * layer.w_OK * layer.white.noise_K.float()
                costs[layer.name], readers[layer.name] = float(lost_OK.sum(dtype=torch.float64)), layer.stats.layers
        costs, readers = of_all_processes(costs), of_all_processes(readers)
        together = {names[0]: sum(costs[name] for name in names) for names in readers.values()}
        for first in sorted(together, key=together.get, reverse=True)[:n]:
            for name in readers[first]:
                self.layers[name].group_x = quant.EIGHT_BITS
        self.everything = None  # their N is another

    def prepared(self, part: dict[str, tuple[hessian.Stats, Tensor | None]]) -> Iterator[Layer]:
        """The layers of one slice that this process works on; those that read one input (q, k and v) come one after the other and
        share a Whitener."""
        for stats in dict.fromkeys(stats for stats, _ in part.values()):
            shared: dict[torch.device, hgs_lora.Whitener] = {}
            for layer in (self.layers[name] for name in stats.layers if name in part):
                if layer.owner == process_index():
                    self.prepare(layer, stats, part[layer.name][1], shared)
                    yield layer
                    layer.let_go()

    def prepare(self, layer: Layer, stats: hessian.Stats, G_OO: Tensor | None, shared: dict) -> None:
        device = self.device(layer, stats.H_KK.dim() == 2)
        layer.stats, layer.w_OK = stats, layer.weight(device)
        if device not in shared:
            shared[device] = hgs_lora.Whitener(stats.H_KK.to(device))
        layer.white = shared[device]
        if G_OO is not None:
            layer.white = layer.white.of_layer(G_OO.to(device), self.noise(layer))

    def noise(self, layer: Layer) -> Tensor | None:
        """N (K,) of z, None where activations are not rounded."""
        return layer.stats.noise_I.to(layer.w_OK.device).repeat(layer.taps) if layer.kind == "w4a4" else None

    def device(self, layer: Layer, splits: bool) -> torch.device:
        """Where its factors, of its split or of its ranks, are: beside the layer if they fit one half of the budget."""
        fits = hgs_lora.factor_bytes(*layer.shape, self.cfg.rounding if splits else "") <= self.half
        return layer.module.weight.device if fits else torch.device("cpu")
