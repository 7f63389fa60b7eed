"""Second moments of layer inputs and of output gradients, streamed: the Hessians that HGS-LoRA and QRA are made from.

For a layer y = W x the Hessian of 1/2 ||y - y'||^2 with respect to a row of W is the same matrix for every row,

    H = E[x x^T]                      (K x K)        [A] "Hessian-guided", [R] the activation-weighted H-norm
    ||E||_H^2 = E ||E x||^2 = tr(E H E^T) = ||E L||_F^2   with H = L L^T

H knows the inputs only, so it counts an error in the last layer of a network like one in the first. What an error in y does to
the picture f is in the gradients, so the full Hessian of 1/2 ||f - f'||^2 with respect to W is taken as the Kronecker product

    G (x) H,   G = E_v[sum over rows g g^T],  g = d(v . f)/dy,  v ~ N(0, 1)    (O x O)  [O] as in K-FAC (Martens & Grosse 2015)
    ||E||_GH^2 = tr(G E H E^T) = ||R E L||_F^2   with G = R^T R

The sum over a sample's rows makes layers comparable; inputs and gradients are taken as independent, and rows as uncorrelated.

The expectation is the mean over every row (token, output pixel) of every calibration call. The caller decides which points of the
trajectory the student will visit and feeds them with equal weight. A convolution is the same product after im2col: a row x holds
one window, tap-major with the channel fastest, so that it multiplies `w_OIhw.permute(0, 2, 3, 1).reshape(O, K)`.

    Dimensions: N images, C = I input channels, O output channels, T rows (tokens or output pixels),
                K reduction axis (linear: I; conv: kh*kw*I), Bin timestep bin.

Numerics [O]. Each block of rows gives one float32 product (at most `BLOCK_BYTES` of rows; on CUDA 16-bit rows go to its tensor
cores, which multiply them exactly and add in float32). The products are summed in float64, so the total does not depend on how
the calibration set is cut into batches, up to the float32 rounding of one block. It is kept as float32. Both matrices are
symmetric: only the lower triangle is computed, in strips of `STRIP` rows, and mirrored at the end.

Sharing [O]. q, k and v read one tensor object, and so do the k and v of every cross-attention. At a layer's first call, "same
object, same version, same window" puts it into the group of the layer that came first. The group has one `Stats`, so that
`stats["q"] is stats["k"]`, and whatever is computed from it (such as its Cholesky factor) can be cached by identity. If the two
tensors part ways in a later call, that is an error and not a silently wrong H.

Memory [O]. `budget_bytes` bounds the float64 totals that are alive in one pass: 8 K^2 bytes for each group, 8 O^2 for each G. What
does not fit waits for the next pass, in which the same calibration set is driven through the model again. An H that is larger than
the whole budget is summed in main memory, strip by strip, and one at most in a pass: the sums are the same, they only travel. The
factors of such a layer are in main memory too (student.py). `collect_passes` and `collect_output_passes` yield each pass's layers
as soon as they are ready, in float32, and `slices` joins the two, so that a big model can be decomposed slice by slice.

Where torch.distributed is initialised, each process drives its own part of the calibration set, in the same order of layers. Sums,
counts and maxima are exchanged before a result is handed out, so that all processes get the same.

Bad input: an input or gradient with inf or nan, an input whose H overflows, a layer that was never called, or a G that is larger
than the budget raises a ValueError that names the layer. Left out on purpose: cross moments E[q(x) x^T], grouped convolutions.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import quant

BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # rows that are unfolded at a time, in float32; changes memory, not results
STRIP = {"cpu": 256, "cuda": 2048}  # rows of H or G that are added at a time; narrow ones leave out more of what lies across

# ---------------------------------------------------------------- reference math


def unfold(x_NCHW: Tensor, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> Tensor:
    """im2col with zero padding: rows_TK, T = N*Hout*Wout, K tap-major with the channel fastest. Any dtype, which is kept."""
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    if any(padding):
        x_NHWC = F.pad(x_NHWC, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):  # each unfold appends its taps as the last axis: N Hout Wout C kh kw
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        x_NHWC = x_NHWC.unfold(1 + axis, extent, stride[axis])[..., :: dilation[axis]]
    return x_NHWC.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def diagonal(H: Tensor) -> Tensor:
    """(K,) of H (K, K), a view, or of its diagonal (K,), which may stand for H where nothing else of it is used."""
    return H.diagonal() if H.dim() == 2 else H


def damp(H_KK: Tensor, eps: float = 0.01) -> Tensor:
    """H + eps * mean(diag H) * I in float64. An all-zero H (dead input) becomes the identity, which prefers no direction."""
    H = H_KK.to(torch.float64, copy=True)
    mean = diagonal(H).mean()
    diagonal(H).add_(eps * mean if mean > 0 else 1.0)
    return H


def moments(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """left^T right, float32 (M, N), from rows of any floating dtype."""
    if left_TM.is_cuda and left_TM.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_TM.mT, right_TN, out_dtype=torch.float32)
    return left_TM.float().mT @ right_TN.float()


def add_moments(total_KK: Tensor, rows_TK: Tensor) -> None:
    """total += rows^T rows, float32 into float64, strip by strip and no further right than the diagonal. The total may be in main
    memory while the rows are on a GPU."""
    strip = STRIP[rows_TK.device.type]
    for begin in range(0, len(total_KK), strip):
        end = begin + strip
        total_KK[begin:end, :end].add_(moments(rows_TK[:, begin:end], rows_TK[:, :end]).to(total_KK.device))


def mirror(total_KK: Tensor) -> Tensor:
    """What `add_moments` left out, from what lies across the diagonal, in place."""
    strip = min(STRIP.values())  # of rows on either device
    for begin in range(strip, len(total_KK), strip):
        end = begin + strip
        total_KK[:begin, begin:end] = total_KK[begin:end, :begin].mT
    return total_KK


def rounding_noise(x_NHWC: Tensor, group_x: int) -> Tensor:
    """Sum over pixels of (x - q(x))^2 for each channel, float64 (C,), on the grid that the kernels use. group_x: channels that
    share a multiplier, or quant.EIGHT_BITS."""
    x_NHWC = x_NHWC.float().contiguous()
    grid = quant.quantize_activation(x_NHWC, group_x, per_sample=True)
    return (x_NHWC - quant.dequantize_activation(*grid, x_NHWC.shape[-1])).flatten(0, -2).square().sum(0).double()


def exchange(*tensors: Tensor, op: str = "sum") -> None:
    """Sums (or with op="max" maxima) over the processes of torch.distributed, in place; nothing happens where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)


# ---------------------------------------------------------------- statistics of one input


@dataclass(eq=False)
class Stats:
    """What one tensor that feeds one or more layers, or what these make of it (`inputs`), looked like during calibration."""

    layers: list[str]  # names of the layers that share this input
    H_KK: Tensor  # mean of x x^T over rows, or its diagonal (K,); float32 (the float64 sum while it is accumulated)
    absmax_BinI: Tensor  # float32, max |x| per timestep bin and input channel (also for convolutions)
    calls_Bin: Tensor  # int64, forward calls seen in each bin: 0 marks a row of absmax without data
    noise_I: Tensor  # float32, E[(x_i - q(x)_i)^2] of the kernels' grid per channel; zeros where no group_x was given
    count: int = 0  # rows
    pixels: int = 0  # tokens or input pixels, which are not the rows where a convolution has a stride

    def add(self, x: Tensor, window: tuple, bin: int, group_x: int | None) -> None:
        """One call's input: first absmax per channel (which finds inf and nan), then the rows, in blocks."""
        x_NCHW = x if window else x.reshape(-1, x.shape[-1])[..., None, None]  # a token is a picture of one pixel
        if not x_NCHW.numel():
            return
        absmax_I = torch.maximum(x_NCHW.amax((0, 2, 3)), -x_NCHW.amin((0, 2, 3))).float()  # nan and inf survive both
        if not torch.isfinite(absmax_I).all():
            raise ValueError(f"layer {self.layers[0]!r}: its calibration input contains inf or nan")
        self.absmax_BinI[bin] = torch.maximum(self.absmax_BinI[bin], absmax_I)
        self.calls_Bin[bin] += 1
        pixels = x_NCHW.shape[2] * x_NCHW.shape[3]
        self.pixels += len(x_NCHW) * pixels
        picture_bytes = 4 * len(self.H_KK) * pixels  # at stride 1 and "same" padding, about what its rows take
        for block in x_NCHW.split(max(1, BLOCK_BYTES["cuda" if x.is_cuda else "cpu"] // picture_bytes)):
            if group_x is not None:
                self.noise_I += rounding_noise(block.permute(0, 2, 3, 1), group_x)
            rows_TK = unfold(block, *window)
            if self.H_KK.dim() == 2:
                add_moments(self.H_KK, rows_TK)
            else:
                self.H_KK += rows_TK.float().square().sum(0, dtype=torch.float64)
            self.count += len(rows_TK)

    def finish(self) -> None:
        """Sums over processes become means. ValueError if no row was seen, or H overflows float32."""
        if self.count == 0:
            raise ValueError(f"layer {self.layers[0]!r} saw no input rows in its pass of the calibration run")
        totals = torch.tensor([self.count, self.pixels], dtype=torch.int64, device=self.noise_I.device)
        exchange(self.H_KK, self.noise_I, self.calls_Bin, totals)
        exchange(self.absmax_BinI, op="max")
        self.count, self.pixels = totals.tolist()
        self.H_KK = self.H_KK.div_(self.count).float()
        if self.H_KK.dim() == 2:
            mirror(self.H_KK)
        self.noise_I = self.noise_I.div(self.pixels).float()
        if not torch.isfinite(self.H_KK).all():
            raise ValueError(f"layer {self.layers[0]!r}: the second moments of its input overflow float32")


def variation(stats: Stats, weight: Tensor) -> tuple[float, float]:
    """QRA's v_x and v_w [A: "degree of variation in activations and weights"; O: this measure of it].

    v_x = sd / mean of the input's channel absmax over (timestep bins with data) x (channels);
    v_w = the same for max |W| per input channel of `weight` (O, I) or (O, I, kh, kw). An all-zero tensor has variation 0.
    """

    def coefficient(absmax: Tensor) -> float:
        mean = absmax.double().mean()
        return float(absmax.double().std(correction=0) / mean) if mean > 0 else 0.0

    weight_I = weight.detach().abs().float().transpose(0, 1).flatten(1).amax(1)
    return coefficient(stats.absmax_BinI[stats.calls_Bin > 0]), coefficient(weight_I)


# ---------------------------------------------------------------- passes for H


def _find(model: nn.Module, layer_names: list[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if unknown := [name for name in layer_names if name not in modules]:
        raise ValueError(f"layer {unknown[0]!r} is not in the model")
    return {name: modules[name] for name in layer_names}


def _window(layer: nn.Module, name: str) -> tuple:
    """The arguments of `unfold`: () for a linear layer, (kernel_size, stride, padding, dilation) for a convolution."""
    if isinstance(layer, nn.Linear):
        return ()
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"layer {name!r} is a {type(layer).__name__}, not a Linear or Conv2d")
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"layer {name!r}: only ungrouped convolutions with explicit zero padding are supported")
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


@dataclass(eq=False)
class _Group:
    """Layers that read one tensor through one window. The first of them does the work."""

    layers: list[str]
    window: tuple
    stats: Stats | None  # None: it waits for a later pass
    source: tuple | None = None  # (weak reference to the last input, its version)

    # A weak reference keeps nothing alive, and a recycled address is no match. Inference tensors have no version counter,
    # so an in-place change between two layers could go unseen: they are never shared.
    def remember(self, x: Tensor) -> None:
        self.source = None if x.is_inference() else (weakref.ref(x), x._version)

    def reads(self, x: Tensor) -> bool:
        return self.source is not None and self.source[0]() is x and self.source[1] == x._version


@dataclass
class Range:
    """What a layer's input looks like channel by channel, over all rows of the calibration set."""

    first: str  # name of the first layer that reads the same tensor
    low_I: Tensor  # float32, min x
    high_I: Tensor  # float32, max x
    mean_I: Tensor  # float32, E[x]
    # one row (token or pixel) of each sample that this process saw, in x's dtype, in main memory. Which rows depends on the order
    # of the samples, and so on batches and processes
    rows_TI: Tensor | None = None


def one_row_each(x_NTI: Tensor, seen: int) -> Tensor:
    """(N, I): one row of each sample n of a batch, the `seen` + n th of all samples, from places that scatter over its T rows."""
    n = torch.arange(len(x_NTI), device=x_NTI.device)
    return x_NTI[n, (seen + n) * 40503 % 2**16 % x_NTI.shape[1]]  # 2^16 over the golden ratio


def ranges(model: nn.Module, layer_names: list[str], run: Callable, rows: bool = False) -> dict[str, Range]:
    """{name: Range} of each layer's input, in one pass of the calibration set; layers that read one tensor share one. `run` is that
    of collect_passes; processes exchange what they saw, except rows_TI. ValueError for a layer that is unknown or never called."""
    layers, groups, first = _find(model, layer_names), {}, {}

    def add(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if name not in first:
            first[name] = next((group.layers[0] for group in groups.values() if group.reads(x)), name)
        if first[name] != name:
            return
        groups.setdefault(name, _Group([name], (), None)).remember(x)
        x_NTI = (x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x).detach().unflatten(0, (len(x), 1)).flatten(1, -2)
        if rows:
            kept.setdefault(name, []).append(one_row_each(x_NTI, sum(map(len, kept.get(name, [])))).cpu())
        x_TI = x_NTI.flatten(0, 1)
        total = torch.cat([x_TI.sum(0, dtype=torch.float64), x_TI.new_tensor([len(x_TI)], dtype=torch.float64)])
        extremes = torch.cat([-x_TI.amin(0), x_TI.amax(0)]).float()
        sums[name], most[name] = sums.get(name, 0) + total, torch.maximum(most.get(name, extremes), extremes)

    sums, most, kept = {}, {}, {}  # the last entry of a sum counts rows
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(add, name), with_kwargs=True))
        run(lambda bin: None)
    if silent := [name for name in layers if name not in first]:
        raise ValueError(f"layer {silent[0]!r} was never called by the calibration run")
    exchange(*sums.values())
    exchange(*most.values(), op="max")
    found = {}
    for name, total in sums.items():
        minus_low_I, high_I = most[name].chunk(2)
        found[name] = Range(name, -minus_low_I, high_I, (total[:-1] / total[-1]).float(), torch.cat(kept[name]) if rows else None)
    return {name: found[first[name]] for name in layers}


class _InputPass:
    """One pass of `collect_passes`: finds out which layers share their input, and measures as many groups as the budget has room
    for, in the order of their first calls. A small group may overtake a big one that does not fit any more."""

    def __init__(
        self, layers: dict[str, nn.Module], budget_bytes: int, bins: int, group_x: int | dict | None, inputs: dict, diagonals: bool
    ):
        self.layers, self.bins, self.group_x, self.inputs, self.diagonals = layers, bins, group_x, inputs, diagonals
        self.windows = {name: _window(layer, name) for name, layer in layers.items()}
        self.budget = self.left = budget_bytes
        self.one_in_main_memory = False
        self.bin = 0
        self.group_of: dict[str, _Group] = {}

    def collect(self, run: Callable) -> dict[str, Stats]:
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(self.before_forward, name), with_kwargs=True))
            run(self.set_bin)
        if silent := [name for name in self.layers if name not in self.group_of]:
            raise ValueError(f"layer {silent[0]!r} was never called by the calibration run")
        found = {name: group.stats for name, group in self.group_of.items() if group.stats}
        for stats in dict.fromkeys(found.values()):
            stats.finish()
        return found

    def set_bin(self, i: int) -> None:
        if not 0 <= i < self.bins:
            raise ValueError(f"timestep bin {i} is outside 0..{self.bins - 1}")
        self.bin = i

    def before_forward(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if name not in self.group_of:
            self.group_of[name] = self.join(name, x)
        group = self.group_of[name]
        if group.layers[0] == name:
            group.remember(x)
            if group.stats:
                x_NI = x.detach().movedim(1, -1) if group.window else x.detach()
                z_NI = self.inputs.get(name, lambda x: x)(x_NI)
                group.stats.add(z_NI.movedim(-1, 1) if group.window else z_NI, group.window, self.bin, self.rounded_in(name))
        elif not group.reads(x):
            raise ValueError(f"layers {group.layers[0]!r} and {name!r} shared their input at first, later not")

    def rounded_in(self, name: str) -> int | None:
        return self.group_x[name] if isinstance(self.group_x, dict) else self.group_x

    def join(self, name: str, x: Tensor) -> _Group:
        """First call of a layer: the group that reads the same tensor through the same window, or a new one."""
        window, weight = self.windows[name], self.layers[name].weight
        mine = window, name in self.inputs, self.rounded_in(name)
        for group in self.group_of.values():
            first = group.layers[0]
            if mine == (group.window, first in self.inputs, self.rounded_in(first)) and group.reads(x):
                group.layers.append(name)
                return group
        layers, stats, channels, K = [name], None, weight.shape[1], weight[0].numel()
        shape = (K,) if self.diagonals else (K, K)
        size = 8 * math.prod(shape)
        wide = size > self.budget
        fits = not self.one_in_main_memory if wide else size <= self.left
        if fits and wide:
            self.one_in_main_memory = True
        elif fits:
            self.left -= size
        if fits:
            zeros = partial(torch.zeros, device=x.device)
            absmax_BinI, calls_Bin = zeros(self.bins, channels), zeros(self.bins, dtype=torch.int64)
            H_KK = torch.zeros(shape, dtype=torch.float64, device="cpu" if wide else x.device)
            stats = Stats(layers, H_KK, absmax_BinI, calls_Bin, zeros(channels, dtype=torch.float64))
        return _Group(layers, window, stats)


def _passes(layers: dict[str, nn.Module], collect: Callable[[dict[str, nn.Module]], dict]) -> Iterator[dict]:
    """What `collect` finds of the layers that are left, pass after pass, until it has found something for each of them."""
    while layers:
        found = collect(layers)
        layers = {name: layer for name, layer in layers.items() if name not in found}
        yield found
        del found  # before the sums of the next pass


def collect_passes(
    model: nn.Module,
    layer_names: list[str],
    run: Callable,
    budget_bytes: int = 2 << 30,
    bins: int = 4,
    group_x: int | dict[str, int] | None = None,
    inputs: dict[str, Callable] | None = None,
    diagonals: bool = False,
) -> Iterator[dict[str, Stats]]:
    """Yield {name: Stats} once per pass over the calibration set until every layer of `layer_names` is done.

    run(set_bin) drives the whole calibration set through `model` once and calls set_bin(i), 0 <= i < bins, before each
    forward to say which timestep bin it belongs to (bin 0 until it is said). It must repeat itself on each pass.
    group_x also measures what rounding the inputs costs (`noise_I`): 4 bits in groups of that size, or quant.EIGHT_BITS; {name:
    one of these, or None} where layers differ, which then do not share.
    inputs: {name: function of x (.., I)} for layers whose statistics are those of what it returns, a tensor of the same shape, and
    not of x; layers that share their input share that.
    diagonals: of each H the diagonal alone, for which one pass is enough.
    Raises ValueError for unknown, unsupported or never called layers and for inf or nan inputs.
    """
    layers, inputs = _find(model, layer_names), inputs or {}
    return _passes(layers, lambda left: _InputPass(left, budget_bytes, bins, group_x, inputs, diagonals).collect(run))


# ---------------------------------------------------------------- passes for G


class _OutputPass:
    """One pass of `collect_output_passes`, for as many layers as the budget has room for."""

    def __init__(self, layers: dict[str, nn.Module], budget_bytes: int):
        self.layers, left = layers, budget_bytes
        self.totals: dict[str, Tensor] = {}  # float64 sums
        self.reached: set[str] = set()  # layers that a gradient arrived at
        for name, layer in layers.items():
            O = len(layer.weight)
            size = 8 * O * O
            if size > budget_bytes:
                raise ValueError(f"layer {name!r} alone needs {size} bytes for its G, the budget is {budget_bytes}")
            if size <= left:
                left -= size
                self.totals[name] = torch.zeros(O, O, dtype=torch.float64, device=layer.weight.device)

    def collect(self, run: Callable[[], int]) -> dict[str, Tensor]:
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name in self.totals:
                hooks.enter_context(self.layers[name].register_forward_hook(partial(self.after_forward, name)))
            samples = run()
        count = torch.tensor(samples, dtype=torch.int64, device=next(iter(self.totals.values())).device)
        exchange(count)
        return {name: self.mean(name, count) for name in list(self.totals)}

    def after_forward(self, name: str, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()  # the first layer that a gradient reaches
        y.register_hook(partial(self.add, name))
        return y

    def add(self, name: str, g: Tensor) -> None:
        g_NHWO = g.permute(0, 2, 3, 1) if isinstance(self.layers[name], nn.Conv2d) else g
        add_moments(self.totals[name], g_NHWO.reshape(-1, g_NHWO.shape[-1]))
        self.reached.add(name)

    def mean(self, name: str, count: Tensor) -> Tensor:
        """G (O, O), float32, in place of its sum. ValueError if no gradient arrived, or one that is no number."""
        total_OO = self.totals.pop(name)
        exchange(total_OO)
        G_OO = mirror((total_OO / count).float())
        if name not in self.reached:
            raise ValueError(f"layer {name!r} was never called by the calibration run, or what it feeds is not measured")
        if not torch.isfinite(G_OO).all():
            raise ValueError(f"layer {name!r}: the gradients of its output contain inf or nan")
        return G_OO


def collect_output_passes(
    model: nn.Module, layer_names: list[str], run: Callable[[], int], budget_bytes: int = 2 << 30
) -> Iterator[dict[str, Tensor]]:
    """Yield {name: G_OO}, float32, once per pass: second moments of the gradients at each layer's output, summed over the rows
    of a sample, averaged over samples.

    run() drives the calibration set through `model` once, calls backward on each v . f with v ~ N(0, 1), repeats itself on
    each pass and returns the number of samples (captions times jumps). No gradient of a parameter is needed or computed.
    Raises ValueError for layers that are unknown, over budget or that no gradient reaches, and for gradients of inf or nan.
    """
    return _passes(_find(model, layer_names), lambda layers: _OutputPass(layers, budget_bytes).collect(run))


# ---------------------------------------------------------------- both, a slice of the layers at a time


def slices(
    model: nn.Module, layer_names: list[str], forward: Callable, backward: Callable | None, budget_bytes: int, **about_inputs
) -> Iterator[dict[str, tuple[Stats, Tensor | None]]]:
    """Yield {name: (Stats, G_OO or None)} of the layers, slice by slice.

    A slice's float64 sums fit `budget_bytes`: first those of H, which end as float32 and half as large, then those of G for as many
    of these layers as fit. A slice is emptied when the next one is asked for, so that the caller need not let go of it.
    backward=None: G is not collected. Other arguments (about_inputs: group_x, inputs, diagonals) and errors are those of
    `collect_passes` and `collect_output_passes`."""
    for stats in collect_passes(model, layer_names, forward, budget_bytes, **about_inputs):
        names = [name for name in layer_names if name in stats]
        for G in [dict.fromkeys(names)] if backward is None else collect_output_passes(model, names, backward, budget_bytes):
            part = {name: (stats[name], G[name]) for name in names if name in G}
            yield part
            part.clear()
            del G, part  # before those of the next slice are collected
        del stats


def least_bytes(shapes: list[tuple[int, int]], gradients: bool) -> int:
    """What layers of `shapes` (O, K) need at least for statistics and factors together: `slices` gets half of it as its budget, and
    that must hold the float64 sum, H or (with `gradients`) G, of the widest layer. An H of more inputs than a GPU's strip has rows
    may be in main memory."""
    return 16 * max(max(O if gradients else 0, min(K, STRIP["cuda"])) for O, K in shapes) ** 2


# ---------------------------------------------------------------- demo


def main() -> None:
    """q, k and v read one input with four outlier channels; the convolution, whose H is larger, waits for a second pass."""
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(64, 32) for n in "qkv"} | {"conv": nn.Conv2d(64, 32, 3, padding=1)})
    x_NTI = torch.randn(32, 256, 64) * torch.ones(64).index_fill_(0, torch.arange(0, 64, 16), 12.0)

    def run(set_bin):
        for step, x in enumerate(x_NTI.split(8)):
            set_bin(step)
            for name in "qkv":
                model[name](x)
            model["conv"](x.mT.unflatten(2, (16, 16)))

    print(f"{'layer':6} {'pass':>4} {'rows':>6} {'K':>4} {'effective rank':>14} {'v_x':>5} {'v_w':>5}  one H for")
    passes = list(collect_passes(model, list(model), run, budget_bytes=8 * 576**2))
    for number, part in enumerate(passes):
        for name, stats in part.items():
            p = torch.linalg.eigvalsh(stats.H_KK.double()).clamp_min(0)
            rank, (v_x, v_w) = torch.special.entr(p / p.sum()).sum().exp(), variation(stats, model[name].weight)
            print(f"{name:6} {number:4} {stats.count:6} {len(p):4} {rank:14.1f} {v_x:5.2f} {v_w:5.2f}  {', '.join(stats.layers)}")
    print("Effective rank is exp(entropy of H's spectrum): four outlier channels leave a few directions that matter.")
    H_KK, x_TK = passes[0]["q"].H_KK, x_NTI.flatten(0, 1).double()
    exact_KK = x_TK.mT @ x_TK / len(x_TK)
    assert (H_KK - exact_KK).norm() < 1e-6 * exact_KK.norm(), "the streamed H equals the float64 moments of all rows at once"


if __name__ == "__main__":
    main()
