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
the calibration set is cut into batches, up to the float32 rounding of one block. It is kept as float32.

Sharing [O]. q, k and v read one tensor object, and so do the k and v of every cross-attention. At a layer's first call, "same
object, same version, same window" puts it into the group of the layer that came first. The group has one `Stats`, so that
`stats["q"] is stats["k"]`, and whatever is computed from it (such as its Cholesky factor) can be cached by identity. If the two
tensors part ways in a later call, that is an error and not a silently wrong H.

Memory [O]. `budget_bytes` bounds the float64 totals that are alive in one pass: 8 K^2 bytes for each group, 8 O^2 for each G. What
does not fit waits for the next pass, in which the same calibration set is driven through the model again. `collect_passes` and
`collect_output_passes` yield each pass's layers as soon as they are ready, in float32, and `Slices` joins the two, so that a big
model can be decomposed slice by slice.

Where torch.distributed is initialised, each process drives its own part of the calibration set, in the same order of layers. Sums,
counts and maxima are exchanged before a result is handed out, so that all processes get the same.

Bad input: an input or gradient with inf or nan, an input whose H overflows, or a layer that was never called raises a ValueError
that names the layer. Left out on purpose: cross moments E[q(x) x^T], grouped convolutions.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import quant

BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # rows that are unfolded at a time, in float32; changes memory, not results


# ---------------------------------------------------------------- reference math


def unfold(x_NCHW: Tensor, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> Tensor:
    """im2col with zero padding: rows_TK, T = N*Hout*Wout, K tap-major with the channel fastest. Any dtype, which is kept."""
    x_NHWC = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):  # each unfold appends its taps as the last axis: N Hout Wout C kh kw
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        x_NHWC = x_NHWC.unfold(1 + axis, extent, stride[axis])[..., :: dilation[axis]]
    rows = x_NHWC.permute(0, 1, 2, 4, 5, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1] * rows.shape[2], -1)


def damp(H_KK: Tensor, eps: float = 0.01) -> Tensor:
    """H + eps * mean(diag H) * I in float64. An all-zero H (dead input) becomes the identity, which prefers no direction."""
    H = H_KK.to(torch.float64, copy=True)
    mean = H.diagonal().mean()
    H.diagonal().add_(eps * mean if mean > 0 else 1.0)
    return H


def smooth(H_KK: Tensor, lambda_I: Tensor) -> Tensor:
    """Hessian of x / lambda, the input that a smoothed layer (W * lambda) sees: H_ij / (lambda_i lambda_j), in H's dtype."""
    inverse_K = (1.0 / lambda_I.to(H_KK)).repeat(len(H_KK) // len(lambda_I))
    return inverse_K[:, None] * H_KK * inverse_K


def moments(rows_TK: Tensor) -> Tensor:
    """rows^T rows, float32 (K, K), from rows of any floating dtype."""
    if rows_TK.is_cuda and rows_TK.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows_TK.mT, rows_TK, out_dtype=torch.float32)
    rows = rows_TK.float()
    return rows.mT @ rows


def rounding_noise(x: Tensor, group_x: int, conv: bool) -> Tensor:
    """Sum over tokens or pixels of (x - q(x))^2 for each channel, float64 (I,), on the 4-bit grid that the kernels use.

    x: (.., I), or (N, I, H, W) with conv. group_x: channels that share a multiplier."""
    x = (x.permute(0, 2, 3, 1) if conv else x.reshape(-1, x.shape[-1])).float().contiguous()
    grid = (quant.quantize_activation_per_sample if conv else quant.quantize_activation)(x, group_x)
    return (x - quant.dequantize_activation(*grid, x.shape[-1])).flatten(0, -2).square().sum(0).double()


def exchange(*tensors: Tensor, op: str = "sum") -> None:
    """Sums (or with op="max" maxima) over the processes of torch.distributed, in place; nothing happens where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)


# ---------------------------------------------------------------- statistics of one input


@dataclass(eq=False)
class Stats:
    """What one tensor that feeds one or more layers looked like during calibration."""

    H_KK: Tensor  # mean of x x^T over rows; float32 (the float64 sum while it is accumulated)
    absmax_BinI: Tensor  # float32, max |x| per timestep bin and input channel (also for convolutions)
    calls_Bin: Tensor  # int64, forward calls seen in each bin: 0 marks a row of absmax without data
    noise_I: Tensor  # float32, E[(x_i - q(x)_i)^2] of the 4-bit grid per channel; zeros where no group_x was given
    count: int = 0  # rows
    pixels: int = 0  # tokens or input pixels, which are not the rows where a convolution has a stride
    layers: list[str] = field(default_factory=list)  # names of the layers that share this input

    @property
    def xmax_I(self) -> Tensor:
        """max |x| per input channel over all timesteps: what smoothing needs."""
        return self.absmax_BinI.amax(0)

    def update(self, rows_TK: Tensor) -> None:
        """Add one block of rows to the running sum."""
        self.H_KK += moments(rows_TK)  # float32 into float64, without a copy
        self.count += len(rows_TK)

    def finish(self) -> None:
        """Sums over processes become means. ValueError if H overflows float32."""
        totals = torch.tensor([self.count, self.pixels], dtype=torch.int64, device=self.H_KK.device)
        exchange(self.H_KK, self.noise_I, self.calls_Bin, totals)
        exchange(self.absmax_BinI, op="max")
        self.count, self.pixels = totals.tolist()
        self.H_KK = self.H_KK.div_(self.count).float()
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


# ---------------------------------------------------------------- streaming: what every pass needs


def _find(model: nn.Module, layer_names: list[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if unknown := [name for name in layer_names if name not in modules]:
        raise ValueError(f"layer {unknown[0]!r} is not in the model")
    return {name: modules[name] for name in layer_names}


@contextlib.contextmanager
def _hooks(handles):
    """Inside, the hooks that were registered work; afterwards they are gone, whatever happened."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Budget:
    """Bytes of float64 sums that may be alive in one pass."""

    def __init__(self, total: int):
        self.total = self.left = total

    def renew(self) -> None:
        self.left = self.total

    def takes(self, size: int) -> bool:
        """Whether `size` bytes still fit, which are then taken. A small layer may overtake a big one that does not fit any more."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


# ---------------------------------------------------------------- streaming: inputs


def _window(layer: nn.Module, name: str) -> tuple | None:
    """None for a linear layer, (kernel_size, stride, padding, dilation) for a convolution."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"layer {name!r} is a {type(layer).__name__}, not a Linear or Conv2d")
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"layer {name!r}: only ungrouped convolutions with explicit zero padding are supported")
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


@dataclass(eq=False)
class _Group:
    """Layers that read one tensor through one window. The first of them does the work."""

    layers: list[str]
    window: tuple | None
    K: int
    channels: int
    due: bool = False  # observed in the current pass
    stats: Stats | None = None
    source: tuple | None = None  # (weak reference to the last input, its version)

    @property
    def bytes(self) -> int:
        return 8 * self.K * self.K

    # A weak reference keeps nothing alive, and a recycled address is no match. Inference tensors have no version counter,
    # so an in-place change between two layers could go unseen: they are never shared.
    def remember(self, x: Tensor) -> None:
        self.source = None if x.is_inference() else (weakref.ref(x), x._version)

    def reads(self, x: Tensor) -> bool:
        return self.source is not None and self.source[0]() is x and self.source[1] == x._version

    def begin(self, bins: int, device: torch.device) -> None:
        self.stats = Stats(
            H_KK=torch.zeros(self.K, self.K, dtype=torch.float64, device=device),
            absmax_BinI=torch.zeros(bins, self.channels, device=device),
            calls_Bin=torch.zeros(bins, dtype=torch.int64, device=device),
            noise_I=torch.zeros(self.channels, dtype=torch.float64, device=device),
            layers=self.layers,
        )

    def observe(self, x: Tensor, bin: int, group_x: int) -> None:
        """Add one call's input: first absmax per channel (which finds inf and nan), then the rows, in blocks."""
        stats = self.stats
        x_TI = x.reshape(-1, x.shape[-1]) if self.window is None else x.permute(0, 2, 3, 1).flatten(0, 2)
        if not len(x_TI):
            return
        absmax_I = torch.maximum(x_TI.amax(0), -x_TI.amin(0)).float()  # nan and inf survive both
        if not torch.isfinite(absmax_I).all():
            raise ValueError(f"layer {self.layers[0]!r}: its calibration input contains inf or nan")
        stats.absmax_BinI[bin] = torch.maximum(stats.absmax_BinI[bin], absmax_I)
        stats.calls_Bin[bin] += 1
        stats.pixels += len(x_TI)
        if self.window is None:
            blocks, row_bytes = x_TI, 4 * self.K
        else:
            blocks, row_bytes = x, 4 * self.K * x.shape[2] * x.shape[3]  # at stride 1 and "same" padding, about what its rows take
        for block in blocks.split(max(1, BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cpu"]) // row_bytes)):
            if group_x:
                stats.noise_I += rounding_noise(block, group_x, self.window is not None)
            stats.update(block if self.window is None else unfold(block, *self.window))

    def hand_out(self) -> Stats:
        """The finished statistics, of which the group keeps nothing. ValueError if no row was seen, or H overflows."""
        if self.stats is None or self.stats.count == 0:
            raise ValueError(f"layer {self.layers[0]!r} saw no input rows in its pass of the calibration run")
        stats, self.stats, self.due = self.stats, None, False
        stats.finish()
        return stats


class _InputCollector:
    """The passes of `collect_passes`. The first one also finds out which layers share their input."""

    def __init__(self, model: nn.Module, layer_names: list[str], budget_bytes: int, bins: int, group_x: int):
        self.layers = _find(model, layer_names)
        self.windows = {name: _window(layer, name) for name, layer in self.layers.items()}
        self.budget, self.bins, self.group_x = _Budget(budget_bytes), bins, group_x
        self.bin = 0
        self.groups: list[_Group] = []  # in order of first call
        self.group_of: dict[str, _Group] = {}

    def passes(self, run: Callable) -> Iterator[dict[str, Stats]]:
        self.drive(run, list(self.layers))
        if silent := [name for name in self.layers if name not in self.group_of]:
            raise ValueError(f"layer {silent[0]!r} was never called by the calibration run")
        waiting = [group for group in self.groups if not group.due]
        yield self.hand_out([group for group in self.groups if group.due])
        while waiting:
            self.budget.renew()
            for group in waiting:
                group.due = self.budget.takes(group.bytes)
            ready, waiting = [g for g in waiting if g.due], [g for g in waiting if not g.due]
            self.drive(run, [group.layers[0] for group in ready])
            yield self.hand_out(ready)

    def drive(self, run: Callable, names: list[str]) -> None:
        """One pass over the calibration set, in which the inputs of the layers `names` are seen."""
        self.set_bin(0)
        with _hooks([self.layers[n].register_forward_pre_hook(self.hook(n), with_kwargs=True) for n in names]), torch.no_grad():
            run(self.set_bin)

    def set_bin(self, i: int) -> None:
        if not 0 <= i < self.bins:
            raise ValueError(f"timestep bin {i} is outside 0..{self.bins - 1}")
        self.bin = i

    def hook(self, name: str) -> Callable:
        def before_forward(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            if name not in self.group_of:
                self.group_of[name] = self.join(name, x)
            group = self.group_of[name]
            if group.layers[0] == name:
                group.remember(x)
                if group.due:
                    if group.stats is None:
                        group.begin(self.bins, x.device)
                    group.observe(x.detach(), self.bin, self.group_x)
            elif not group.reads(x):
                raise ValueError(f"layers {group.layers[0]!r} and {name!r} shared their input at first, later not")

        return before_forward

    def join(self, name: str, x: Tensor) -> _Group:
        """First call of a layer: the group that reads the same tensor through the same window, or a new one."""
        for group in self.groups:
            if group.window == self.windows[name] and group.reads(x):
                group.layers.append(name)
                return group
        weight = self.layers[name].weight
        group = _Group([name], self.windows[name], K=weight[0].numel(), channels=weight.shape[1])
        if group.bytes > self.budget.total:
            raise ValueError(
                f"layer {name!r} alone needs {group.bytes} bytes for its {group.K} x {group.K} Hessian, "
                f"the budget is {self.budget.total}"
            )
        group.due = self.budget.takes(group.bytes)
        self.groups.append(group)
        return group

    def hand_out(self, groups: list[_Group]) -> dict[str, Stats]:
        found = {}
        for group in groups:
            found |= dict.fromkeys(group.layers, group.hand_out())
        return found


def collect_passes(
    model: nn.Module,
    layer_names: list[str],
    run: Callable[[Callable[[int], None]], None],
    budget_bytes: int = 2 << 30,
    bins: int = 4,
    group_x: int = 0,
) -> Iterator[dict[str, Stats]]:
    """Yield {name: Stats} once per pass over the calibration set until every layer of `layer_names` is done.

    run(set_bin) drives the whole calibration set through `model` once and calls set_bin(i), 0 <= i < bins, before each
    forward to say which timestep bin it belongs to (bin 0 until it is said). It must repeat itself on each pass.
    group_x > 0 also measures what rounding the inputs to 4 bits costs (`noise_I`), in groups of that size.
    Raises ValueError for unknown, unsupported, never called or over-budget layers and for inf or nan inputs.
    """
    yield from _InputCollector(model, layer_names, budget_bytes, bins, group_x).passes(run)


# ---------------------------------------------------------------- streaming: gradients of outputs


class _OutputCollector:
    """The passes of `collect_output_passes`."""

    def __init__(self, model: nn.Module, layer_names: list[str], budget_bytes: int):
        self.layers, self.budget = _find(model, layer_names), _Budget(budget_bytes)
        self.reached: set[str] = set()  # layers that a gradient arrived at

    def passes(self, run: Callable[[], int]) -> Iterator[dict[str, Tensor]]:
        waiting = list(self.layers)
        while waiting:
            totals = self.sums_that_fit(waiting)
            handles = [self.layers[name].register_forward_hook(self.hook(name, total)) for name, total in totals.items()]
            with _hooks(handles), torch.enable_grad():
                samples = run()
            waiting = [name for name in waiting if name not in totals]
            yield self.means(totals, samples)

    def sums_that_fit(self, waiting: list[str]) -> dict[str, Tensor]:
        totals = {}
        self.budget.renew()
        for name in waiting:
            weight = self.layers[name].weight
            size = 8 * len(weight) ** 2
            if size > self.budget.total:
                raise ValueError(f"layer {name!r} alone needs {size} bytes for its G, the budget is {self.budget.total}")
            if self.budget.takes(size):
                totals[name] = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
        return totals

    def hook(self, name: str, total_OO: Tensor) -> Callable:
        def backward(g):
            g_NHWO = g.permute(0, 2, 3, 1) if isinstance(self.layers[name], nn.Conv2d) else g
            total_OO.add_(moments(g_NHWO.reshape(-1, len(total_OO))))
            self.reached.add(name)

        def forward(module, args, y):
            y = y if y.requires_grad else y.detach().requires_grad_()  # the first layer that a gradient reaches
            y.register_hook(backward)
            return y

        return forward

    def means(self, totals: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """{name: G_OO} float32. `totals` is emptied: no sum stays while the caller works with what was made of it."""
        count = torch.tensor(samples, dtype=torch.int64, device=next(iter(totals.values())).device)
        exchange(count)
        found = {}
        for name in list(totals):
            total = totals.pop(name)
            exchange(total)
            found[name] = (total / count).float()
            if name not in self.reached:
                raise ValueError(f"layer {name!r} was never called by the calibration run, or what it feeds is not measured")
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"layer {name!r}: the gradients of its output contain inf or nan")
        return found


def collect_output_passes(
    model: nn.Module, layer_names: list[str], run: Callable[[], int], budget_bytes: int = 2 << 30
) -> Iterator[dict[str, Tensor]]:
    """Yield {name: G_OO}, float32, once per pass: second moments of the gradients at each layer's output, summed over the rows
    of a sample, averaged over samples.

    run() drives the calibration set through `model` once, calls backward on each v . f with v ~ N(0, 1), repeats itself on
    each pass and returns the number of samples (captions times jumps). No gradient of a parameter is needed or computed.
    Raises ValueError for layers that are unknown, over budget or that no gradient reaches, and for gradients of inf or nan.
    """
    yield from _OutputCollector(model, layer_names, budget_bytes).passes(run)


# ---------------------------------------------------------------- both, a slice of the layers at a time


class Slices:
    """Iterates over {name: (Stats, G_OO or None)} of the layers, slice by slice, as often as it is asked to.

    A slice's float64 sums fit `budget_bytes`: first those of H, which end as float32 and half as large, then those of G for as many
    of these layers as fit. A slice is emptied when the next one is asked for, so that the caller need not let go of it. Where one
    slice holds all layers it is kept, and a second iteration costs nothing. backward=None: G is not collected.
    Other arguments and errors are those of `collect_passes` and `collect_output_passes`."""

    def __init__(self, model: nn.Module, layer_names: list[str], forward, backward, budget_bytes: int, group_x: int = 0):
        self.model, self.names, self.forward, self.backward = model, list(layer_names), forward, backward
        self.budget_bytes, self.group_x = budget_bytes, group_x
        self.everything: dict | None = None

    def __iter__(self) -> Iterator[dict[str, tuple[Stats, Tensor | None]]]:
        if self.everything is not None:
            yield self.everything
            return
        for stats in collect_passes(self.model, self.names, self.forward, self.budget_bytes, group_x=self.group_x):
            names = [name for name in self.names if name in stats]
            for G in self.gradients(names):
                part = {name: (stats[name], G[name]) for name in names if name in G}
                if len(part) == len(self.names):
                    self.everything = part
                yield part
                if part is not self.everything:
                    part.clear()
                del G, part  # before those of the next slice are collected
            del stats

    def gradients(self, names: list[str]) -> Iterator[dict[str, Tensor | None]]:
        if self.backward is None:
            return iter([dict.fromkeys(names)])
        return collect_output_passes(self.model, names, self.backward, self.budget_bytes)


def least_bytes(shapes: list[tuple[int, int]], gradients: bool) -> int:
    """What layers of `shapes` (O, K) need at least for statistics and factors together: `Slices` gets half of it as its budget,
    and that must hold the float64 sum, H or (with `gradients`) G, of the widest layer."""
    return 16 * max(max(O, K) if gradients else K for O, K in shapes) ** 2


# ---------------------------------------------------------------- demo


def main() -> None:
    torch.manual_seed(0)
    bins, outliers = 4, torch.ones(64)
    outliers[::16] = 12.0
    model = nn.ModuleDict({n: nn.Linear(64, 32, bias=False) for n in "qkv"} | {"conv": nn.Conv2d(64, 32, 3, padding=1)})
    seen = []

    def run(set_bin):
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            set_bin(step // 2)
            x = torch.randn(4, 256, 64, generator=generator) * outliers * (1 + step // 2)
            seen.append(x)
            for name in "qkv":
                model[name](x)
            model["conv"](x.mT.unflatten(2, (16, 16)))

    passes = list(collect_passes(model, ["q", "k", "v", "conv"], run, budget_bytes=8 * 576 * 576, bins=bins))
    print(f"{'layer':6} {'pass':>4} {'K':>4} {'rows':>6} {'eff. rank':>9} {'v_x':>5} {'v_w':>5}  H shared with")
    for number, part in enumerate(passes):
        for name, stats in part.items():
            p = torch.linalg.eigvalsh(stats.H_KK.double()).clamp_min(1e-30)
            p = p / p.sum()
            v_x, v_w = variation(stats, model[name].weight)
            print(
                f"{name:6} {number:4} {len(p):4} {stats.count:6} {torch.exp(-(p * p.log()).sum()):9.1f} {v_x:5.2f} {v_w:5.2f}"
                f"  {', '.join(stats.layers) if len(stats.layers) > 1 else '-'}"
            )
    print("Effective rank exp(entropy of H's spectrum): four outlier channels leave a few directions that matter.")
    x = torch.cat([x.flatten(0, 1) for x in seen[: len(seen) // len(passes)]]).double()
    error = (passes[0]["q"].H_KK - x.mT @ x / len(x)).norm() / (x.mT @ x / len(x)).norm()
    assert error < 1e-6, "the streamed H must equal the float64 second moment of all rows at once"
    assert passes[0]["q"] is passes[0]["k"]


if __name__ == "__main__":
    main()
