"""The W4A4 student of a consistency model, before training: statistics, ranks, split. Steps 1 to 3 of the method.

    1. H = E[x x^T] of what each layer reads, G = E[g g^T] of the gradients that reach its output       hessian.py
    2. a rank per layer under one budget                                                               qra.py
    3. W ~ Q + B A                                                                                     hgs_lora.py

Scale [O]. All H of SDXL take 60 GB in float64, all G 55, so layers are worked on in slices, each with its own passes over the
calibration captions. `--hessian-mb` bounds what statistics and factors hold at a time:

    passes for H    1/2 its float64 sums, which end as float32: 1/4
    passes for G    1/4 H, 1/2 the float64 sums of G, which end as float32: 1/4
    split           1/4 H, 1/4 G, 1/2 the factors of one layer

A layer whose factors need more than that (factor_bytes) is split on the CPU. Ranks weigh all layers against each other, so
the slices are gone through twice, for the spectra and for the splits; where one slice holds everything its statistics stay for
the second time. The network itself is changed at the very end, since later slices are measured on it; until then the packed
layers wait in main memory.

Processes of a torchrun each drive their own captions; sums and maxima are exchanged (hessian.py), every layer is split by
one process and sent to the others. Which process does what changes the last bits of the sums, nothing else.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import hessian
import hgs_lora
import qra
import quant
import tdpt
from layers import PackedLayer, packed_class, replace_layer
from models import family
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
    """The consistency model as a plain network -> its packed twin with LoRA, in place, and the table of layers.

    cond, x_T: this process' calibration captions, encoded, and their noises, on the network's device. cfg: train.Config.
    UserError for a budget without room for the widest layer, and for statistics of which nothing can be made."""
    kinds = {name: family.precision(name) for name in float_layers(base.net)}
    layers = {name: layer for name, layer in float_layers(base.net).items() if kinds[name] != "16bit"}
    for name, layer in layers.items():
        if cfg.rank > min(layer.weight.flatten(1).shape):
            raise UserError(f"--rank {cfg.rank} is larger than layer {name} {tuple(layer.weight.shape)}: choose a smaller one")
    order = {name: i for i, name in enumerate(layers)}
    world, rank = process_count(), process_index()
    shapes = {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()}
    least = {name: hessian.least_bytes([shape], hgs_lora.wants_gradients(cfg)) for name, shape in shapes.items()}
    widest = max(least, key=least.get)
    if cfg.hessian_mb << 20 < least[widest]:
        needed = f"give at least {-(-least[widest] >> 20)}"
        raise UserError(f"--hessian-mb {cfg.hessian_mb} has no room for layer {widest} {shapes[widest]}: {needed}")

    # 1. statistics, a slice of the layers at a time
    phases, micro = [int(K) for K in cfg.sampling_steps.split(",")], cfg.micro or 16
    forward, _ = tdpt.calibration(base, base.path, x_T, cond, phases, micro=micro)
    few = slice(-(-cfg.gradient_captions // world) or None)
    _, backward = tdpt.calibration(base, base.path, x_T[few], {k: v[few] for k, v in cond.items()}, phases, micro=micro)
    kept, half = [], cfg.hessian_mb << 19

    def slices() -> Iterator[list[tuple[str, hessian.Stats, Tensor | None]]]:
        if kept:
            yield from kept
            return
        for stats in hessian.collect_passes(base.net, list(layers), forward, half, group_x=cfg.group_x):
            names = sorted(stats, key=order.get)
            none = [dict.fromkeys(names)]
            for G in hessian.collect_output_passes(base.net, names, backward, half) if hgs_lora.wants_gradients(cfg) else none:
                part = [(name, stats[name], G_OO) for name, G_OO in G.items()]
                if len(part) == len(layers):
                    kept.append(part)
                yield part
                del G, part  # before those of the next are collected
            del stats

    def whitened(part):
        """(name, layer, its Stats, W, its Whitener, smoothing factors) of this process' layers in a slice."""
        mine, cache = [row for row in part if order[row[0]] % world == rank], {}
        homes = {
            name: "cpu" if hgs_lora.factor_bytes(*shapes[name], cfg.rounding) > half else layers[name].weight.device
            for name, _, _ in mine
        }
        readers = Counter((stats, homes[name]) for name, stats, _ in mine)  # q, k, v share a Whitener, which goes with the last
        for name, stats, G_OO in mine:
            layer, taps, home = layers[name], layers[name].weight[0, 0].numel(), homes[name]
            w_OK = quant.flatten_conv(layer.weight[..., None, None] if layer.weight.dim() == 2 else layer.weight).float().to(home)
            lam, white = None, cache.pop((stats, home), None)
            readers[stats, home] -= 1
            if cfg.smooth and kinds[name] == "w4a4":
                xmax_I = stats.xmax_I.to(home)
                lam = quant.smoothing_factors(xmax_I, w_OK.abs().unflatten(1, (taps, -1)).amax((0, 1)), cfg.smooth)
                w_OK, white = w_OK * lam.repeat(taps), hgs_lora.Whitener(hessian.smooth(stats.H_KK.to(home), lam))
                # N below is scaled as if each channel had its own step, which is a group's: an approximation
            else:
                white = white or hgs_lora.Whitener(stats.H_KK.to(home))
                if readers[stats, home]:
                    cache[stats, home] = white
            noise_K = (stats.noise_I.to(home) / (1 if lam is None else lam**2)).repeat(taps) if kinds[name] == "w4a4" else None
            yield name, layer, stats, w_OK, white if G_OO is None else white.of_layer(G_OO.to(home), noise_K), lam
            del white

    # 2. QRA: ranks from the whitened spectrum of what the grid costs and the variation of activations and weights
    spectra, energy, v_x, v_w = {}, {}, {}, {}
    for part in slices() if cfg.ranks != "uniform" else ():
        for name, layer, stats, w_OK, white, _ in whitened(part):
            gw = quant.quantize_weight(w_OK, cfg.group_w, layer.weight[0, 0].numel())
            if white.R_OO is not None:  # all layers in the picture's units
                cost_K = hgs_lora.grid_cost(w_OK, white, gw)
                spectra[name] = hgs_lora.whitened_spectrum(w_OK, cost_K.sqrt(), white.R_OO, 4 * cfg.rank)
                energy[name] = 1.0
            else:
                spectra[name] = hgs_lora.whitened_spectrum(w_OK - quant.dequantize(gw), white.L_KK, None, 4 * cfg.rank)
                energy[name] = float((w_OK.double() @ white.L_KK).square().sum())
            v_x[name], v_w[name] = hessian.variation(stats, layer.weight)
            del stats, white  # before those of the next are made
        del part
    if world > 1 and cfg.ranks != "uniform":
        for values in (spectra, energy, v_x, v_w):
            parts = [None] * world
            dist.all_gather_object(parts, {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()})
            values.update({k: v for part in parts for k, v in part.items()})
    by_name = [{name: values[name] for name in layers if name in values} for values in (spectra, energy, v_x, v_w)]
    ranks = qra.allocate(shapes, *by_name, cfg.ranks, cfg.rank, r_min=min(4, cfg.rank), r_max=4 * cfg.rank, seed=cfg.seed)

    # 3. HGS-LoRA: W ~ Q + B A; the packed layers take the float layers' places when all are there
    table, packed, bar = {}, {}, tqdm(total=len(layers), desc=f"split ({cfg.init}, {cfg.rounding})", disable=rank > 0)
    for part in slices():
        for name, layer, stats, w_OK, white, lam in whitened(part):
            grid = (cfg.group_w, layer.weight[0, 0].numel(), cfg.rounding, cfg.iters)
            gen = step_generator(cfg.seed, order[name], stream=2)
            gw, A_rK, B_Or = hgs_lora.decompose(w_OK, white, ranks[name], cfg.init, *grid, generator=gen)
            packed[name] = packed_class(kinds[name], layer).from_float(layer, gw, A_rK, B_Or, lam, cfg.group_x).cpu()
            table[name] = {"kind": kinds[name], "shape": shapes[name], "rank": ranks[name], "smooth": lam is not None}
            table[name] |= {"group_w": cfg.group_w, "group_x": cfg.group_x}
            table[name]["error"] = hgs_lora.relative_error(w_OK, white.L_KK, gw, A_rK, B_Or)
            bar.update()
            del stats, white
        del part
    for name, layer in layers.items():
        if world > 1:
            packed[name], table[name] = _sent(packed.get(name), table.get(name), layer, kinds[name], order[name] % world)
        replace_layer(base.net, name, packed.pop(name))
    return base, {name: table[name] for name in layers}


def _sent(packed: PackedLayer | None, row: dict | None, layer: nn.Module, kind: str, owner: int):
    """The packed layer and its row of the table, of process `owner`, on every process."""
    rows = [row]
    dist.broadcast_object_list(rows, src=owner)
    row = rows[0]
    if packed is None:
        packed = packed_class(kind, layer)(layer, row["rank"], row["group_w"], row["group_x"], row["smooth"])
    packed.to(layer.weight.device)
    for tensor in packed.state_dict().values():
        dist.broadcast(tensor, src=owner)
    packed.set_anchor()
    return packed.cpu(), row
