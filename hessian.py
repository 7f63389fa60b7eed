"""Second moments of layer inputs, streamed: the Hessians that HGS-LoRA needs and the statistics that QRA needs.

For a layer y = W x the Hessian of 1/2 ||y - y'||^2 with respect to a row of W is, for every row, the same matrix

    H = E[x x^T]                      (K x K)        [A] "Hessian-guided", [R] the activation-weighted H-norm
    ||E||_H^2 = E ||E x||^2 = tr(E H E^T) = ||E L||_F^2   with H = L L^T

H knows the inputs only: it counts an error in the last layer of a network like one in the first. What an error in y does to the
picture f is in the gradients, so the full Hessian of 1/2 ||f - f'||^2 with respect to W is taken as the Kronecker product

    G (x) H,   G = E_v[sum over rows g g^T],  g = d(v . f)/dy,  v ~ N(0, 1)    (O x O)  [O] as in K-FAC (Martens & Grosse 2015)
    ||E||_GH^2 = tr(G E H E^T) = ||R E L||_F^2   with G = R^T R

(the sum over a sample's rows makes layers comparable; inputs and gradients are taken as independent, rows as uncorrelated).

Expectation = mean over every row (token, output pixel) of every calibration call; the caller decides which points of the
trajectory the student will visit and feeds them with equal weight. A convolution is the same product after im2col:
a row x holds one window, tap-major, channel fastest, so it multiplies `w_OIhw.permute(0, 2, 3, 1).reshape(O, K)`.

    Dimensions: N images, C = I input channels, O output channels, T rows (tokens or output pixels),
                K reduction axis (linear: I; conv: kh*kw*I), Bin timestep bin.

Numerics [O]. Each block of rows gives one float32 product (at most `BLOCK_BYTES` of rows; on CUDA 16-bit rows go to its tensor
cores, which multiply them exactly and add in float32); products are summed in float64, so the total does not depend on how
calibration is cut into batches, to float32 rounding of one block. Kept as float32.

Sharing [O]. q, k and v read one tensor object, and so do the k and v of every cross-attention. At a layer's first call,
"same object, same version, same window" puts it into the group of the layer that came first; the group has ONE `Stats`,
so `stats["q"] is stats["k"]` and whatever is computed from it (Cholesky factor) can be cached by identity. If the two
tensors part ways in a later call, that is an error and not a silently wrong H.

Memory [O]. `budget_bytes` bounds the float64 totals that are alive in one pass (8 K^2 per group). What does not fit waits for
the next pass, in which `run` drives the same calibration set again. `collect_passes` yields each pass's layers as soon as they
are ready, so that a big model can be decomposed and dropped slice by slice; `collect` keeps all of them (float32).

Processes of torch.distributed, where it is initialised, each drive their own part of the calibration set, in the same order of
layers; their sums, counts and maxima are exchanged before a result is handed out, so that all get the same.

Bad input: an inf or nan input, an input whose H overflows, a layer that was never called: ValueError naming the layer.
Left out on purpose: cross moments E[q(x) x^T], grouped convolutions.
"""

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
    """im2col: rows_TK, T = N*Hout*Wout, K tap-major with the channel fastest. Zero padding. Any dtype."""
    x_NHWC = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):  # each unfold appends its taps as the last axis: N Hout Wout C kh kw
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        x_NHWC = x_NHWC.unfold(1 + axis, extent, stride[axis])[..., :: dilation[axis]]
    rows = x_NHWC.permute(0, 1, 2, 4, 5, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1] * rows.shape[2], -1)


def damp(H_KK: Tensor, eps: float = 0.01) -> Tensor:
    """H + eps * mean(diag H) * I in float64; an all-zero H (dead input) becomes the identity: no direction is preferred."""
    H = H_KK.to(torch.float64, copy=True)
    mean = H.diagonal().mean()
    H.diagonal().add_(eps * mean if mean > 0 else 1.0)
    return H


def smooth(H_KK: Tensor, lambda_I: Tensor) -> Tensor:
    """Hessian of x / lambda, the input that a smoothed layer (W * lambda) sees: H_ij / (lambda_i lambda_j), in H's dtype."""
    inverse_K = (1.0 / lambda_I.to(H_KK)).repeat(len(H_KK) // len(lambda_I))
    return inverse_K[:, None] * H_KK * inverse_K


@dataclass(eq=False)
class Stats:
    """What one tensor that feeds one or more layers looked like during calibration."""

    H_KK: Tensor  # mean of x x^T over rows; float32 (float64 while it is accumulated)
    absmax_BinI: Tensor  # float32, max |x| per timestep bin and input channel (also for convolutions)
    calls_Bin: Tensor  # int64, forward calls seen in each bin: 0 marks a row of absmax without data
    noise_I: Tensor  # float32, E[(x_i - q(x)_i)^2] of the 4-bit grid per channel; zeros where collect was given no group_x
    count: int = 0  # rows
    pixels: int = 0  # tokens or input pixels: not rows where a convolution has a stride
    layers: list[str] = field(default_factory=list)  # names that share this input

    @property
    def xmax_I(self) -> Tensor:
        """max |x| per input channel over all timesteps: what smoothing needs."""
        return self.absmax_BinI.amax(0)

    @property
    def mean_square_I(self) -> Tensor:
        """E[x_i^2] per input channel (for a convolution, averaged over taps)."""
        return self.H_KK.diagonal().reshape(-1, self.absmax_BinI.shape[1]).mean(0)

    def update(self, rows_TK: Tensor) -> None:
        """Add one block of rows to the running sum (H is a sum until `finish`)."""
        self.H_KK += moments(rows_TK)  # float32 into float64, without a copy
        self.count += len(rows_TK)

    def finish(self) -> None:
        totals = torch.tensor([self.count, self.pixels], dtype=torch.int64, device=self.H_KK.device)
        exchange(self.H_KK, self.noise_I, self.calls_Bin, totals)
        exchange(self.absmax_BinI, op="max")
        self.count, self.pixels = totals.tolist()
        self.H_KK = self.H_KK.div_(self.count).float()
        self.noise_I = self.noise_I.div(self.pixels).float()
        if not torch.isfinite(self.H_KK).all():
            raise ValueError(f"layer {self.layers[0]!r}: the second moments of its input overflow float32")


def moments(rows_TK: Tensor) -> Tensor:
    """rows^T rows, float32 (K, K)."""
    if rows_TK.is_cuda and rows_TK.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows_TK.mT, rows_TK, out_dtype=torch.float32)
    rows = rows_TK.float()
    return rows.mT @ rows


def exchange(*tensors: Tensor, op: str = "sum") -> None:
    """Sums (or maxima) over the processes of torch.distributed, in place; nothing where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)


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


# ---------------------------------------------------------------- streaming


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


def _rounding_noise(x: Tensor, group_x: int, conv: bool) -> Tensor:
    """Sum over tokens or pixels of (x - q(x))^2 per channel, float64, on the grid that the kernels use."""
    x = (x.permute(0, 2, 3, 1) if conv else x.reshape(-1, x.shape[-1])).float().contiguous()
    grid = (quant.quantize_activation_per_sample if conv else quant.quantize_activation)(x, group_x)
    return (x - quant.dequantize_activation(*grid, x.shape[-1])).flatten(0, -2).square().sum(0).double()


def _observe(group: _Group, x: Tensor, bin: int, bins: int, group_x: int) -> None:
    """Add one call's input to the group's Stats: absmax per channel (and the finiteness check), then rows in blocks."""
    x, K = x.detach(), group.K
    if group.stats is None:
        group.stats = Stats(
            H_KK=torch.zeros(K, K, dtype=torch.float64, device=x.device),
            absmax_BinI=torch.zeros(bins, group.channels, device=x.device),
            calls_Bin=torch.zeros(bins, dtype=torch.int64, device=x.device),
            noise_I=torch.zeros(group.channels, dtype=torch.float64, device=x.device),
            layers=group.layers,
        )
    x_TI = x.reshape(-1, x.shape[-1]) if group.window is None else x.permute(0, 2, 3, 1).flatten(0, 2)
    if not len(x_TI):
        return
    absmax_I = torch.maximum(x_TI.amax(0), -x_TI.amin(0)).float()  # nan and inf survive both
    if not torch.isfinite(absmax_I).all():
        raise ValueError(f"layer {group.layers[0]!r}: its calibration input contains inf or nan")
    group.stats.absmax_BinI[bin] = torch.maximum(group.stats.absmax_BinI[bin], absmax_I)
    group.stats.calls_Bin[bin] += 1
    group.stats.pixels += len(x_TI)
    if group.window is None:
        blocks, row_bytes = x_TI, 4 * K
    else:
        blocks, row_bytes = x, 4 * K * x.shape[2] * x.shape[3]  # at stride 1 and "same" padding, about the size of its rows
    for block in blocks.split(max(1, BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cpu"]) // row_bytes)):
        if group_x:
            group.stats.noise_I += _rounding_noise(block, group_x, group.window is not None)
        group.stats.update(block if group.window is None else unfold(block, *group.window))


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
    forward to say which timestep bin it belongs to (bin 0 until told otherwise). It must repeat itself on each pass.
    group_x > 0 also measures what rounding the inputs to 4 bits costs (`noise_I`), in groups of that size.
    Raises ValueError for unknown, unsupported, never called or over-budget layers and for inf or nan inputs.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in layer_names if name not in modules]
    if unknown:
        raise ValueError(f"layer {unknown[0]!r} is not in the model")
    windows = {name: _window(modules[name], name) for name in layer_names}
    groups: list[_Group] = []  # in order of first call
    group_of: dict[str, _Group] = {}
    current_bin = 0
    left = budget_bytes  # of the first pass

    def set_bin(i: int) -> None:
        nonlocal current_bin
        if not 0 <= i < bins:
            raise ValueError(f"timestep bin {i} is outside 0..{bins - 1}")
        current_bin = i

    def join(name: str, x: Tensor) -> _Group:
        """First call of a layer: the group that reads the same tensor through the same window, or a new one."""
        nonlocal left
        for group in groups:
            if group.window == windows[name] and group.reads(x):
                group.layers.append(name)
                return group
        weight = modules[name].weight
        group = _Group([name], windows[name], K=weight[0].numel(), channels=weight.shape[1])
        if group.bytes > budget_bytes:
            raise ValueError(
                f"layer {name!r} alone needs {group.bytes} bytes for its {group.K} x {group.K} Hessian, "
                f"the budget is {budget_bytes}"
            )
        group.due = group.bytes <= left
        left -= group.bytes if group.due else 0
        groups.append(group)
        return group

    def make_hook(name: str):
        def before_forward(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            if name not in group_of:
                group_of[name] = join(name, x)
            group = group_of[name]
            if group.layers[0] == name:
                group.remember(x)
                if group.due:
                    _observe(group, x, current_bin, bins, group_x)
            elif not group.reads(x):
                raise ValueError(f"layers {group.layers[0]!r} and {name!r} shared their input at first, later not")

        return before_forward

    def one_pass(names: list[str]) -> None:
        set_bin(0)
        handles = [modules[n].register_forward_pre_hook(make_hook(n), with_kwargs=True) for n in names]
        try:
            with torch.no_grad():
                run(set_bin)
        finally:
            for handle in handles:
                handle.remove()

    def hand_out(finished: list[_Group]) -> dict[str, Stats]:
        result = {}
        for group in finished:
            if group.stats is None or group.stats.count == 0:
                raise ValueError(f"layer {group.layers[0]!r} saw no input rows in its pass of the calibration run")
            group.stats.finish()
            result.update(dict.fromkeys(group.layers, group.stats))
            group.due, group.stats = False, None
        return result

    one_pass(list(windows))
    silent = [name for name in windows if name not in group_of]
    if silent:
        raise ValueError(f"layer {silent[0]!r} was never called by the calibration run")
    waiting = [group for group in groups if not group.due]
    yield hand_out([group for group in groups if group.due])
    while waiting:
        left = budget_bytes
        for group in waiting:  # in order; a small one may overtake a big one that does not fit any more
            group.due = group.bytes <= left
            left -= group.bytes if group.due else 0
        ready, waiting = [g for g in waiting if g.due], [g for g in waiting if not g.due]
        one_pass([group.layers[0] for group in ready])
        yield hand_out(ready)


def collect(model, layer_names, run, budget_bytes: int = 2 << 30, bins: int = 4, group_x: int = 0) -> dict[str, Stats]:
    """All passes of `collect_passes` in one dict, in the order of `layer_names`. Same arguments, same errors."""
    found = {}
    for part in collect_passes(model, layer_names, run, budget_bytes, bins, group_x):
        found.update(part)
    return {name: found[name] for name in layer_names}


def collect_output_passes(
    model: nn.Module, layer_names: list[str], run: Callable[[], int], budget_bytes: int = 2 << 30
) -> Iterator[dict[str, Tensor]]:
    """Yield {name: G_OO}, float32, once per pass: second moments of what flows back into each layer's output, summed over rows,
    mean over samples.

    run() drives the calibration set through `model` once, calls backward on each v . f with v ~ N(0, 1), repeats itself on
    each pass and returns the number of samples (captions times jumps). No gradient of a parameter is needed or computed.
    Raises ValueError for layers that are unknown, over budget or that no gradient reaches, and for gradients of inf or nan.
    """
    modules, waiting, reached = dict(model.named_modules()), list(layer_names), set()
    if unknown := [name for name in waiting if name not in modules]:
        raise ValueError(f"layer {unknown[0]!r} is not in the model")

    def make_hook(name: str, total_OO: Tensor):
        def backward(g):
            g_NHWO = g.permute(0, 2, 3, 1) if isinstance(modules[name], nn.Conv2d) else g
            total_OO.add_(moments(g_NHWO.reshape(-1, len(total_OO))))
            reached.add(name)

        def forward(module, args, y):
            y = y if y.requires_grad else y.detach().requires_grad_()  # the first layer that a gradient reaches
            y.register_hook(backward)
            return y

        return forward

    def hand_out(totals: dict[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        exchange(count)
        found = {}
        for name in list(totals):
            total = totals.pop(name)  # no sum stays while the caller works with what was made of it
            exchange(total)
            found[name] = (total / count).float()
            if name not in reached:
                raise ValueError(f"layer {name!r} was never called by the calibration run, or what it feeds is not measured")
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"layer {name!r}: the gradients of its output contain inf or nan")
        return found

    while waiting:
        totals, left = {}, budget_bytes
        for name in waiting:
            weight = modules[name].weight
            if 8 * len(weight) ** 2 > budget_bytes:
                raise ValueError(f"layer {name!r} alone needs {8 * len(weight) ** 2} bytes for its G, the budget is {budget_bytes}")
            if 8 * len(weight) ** 2 <= left:
                totals[name] = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
                left -= totals[name].nbytes
        handles = [modules[name].register_forward_hook(make_hook(name, total)) for name, total in totals.items()]
        try:
            with torch.enable_grad():
                samples = run()
        finally:
            for handle in handles:
                handle.remove()
        count = torch.tensor(samples, dtype=torch.int64, device=next(iter(totals.values())).device)
        waiting = [name for name in waiting if name not in totals]
        yield hand_out(totals, count)


def collect_outputs(model, layer_names, run, budget_bytes: int = 2 << 30) -> dict[str, Tensor]:
    """All passes of `collect_output_passes` in one dict, in the order of `layer_names`. Same arguments, same errors."""
    found = {}
    for part in collect_output_passes(model, layer_names, run, budget_bytes):
        found.update(part)
    return {name: found[name] for name in layer_names}


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


def least_bytes(shapes, gradients: bool) -> int:
    """Of --hessian-mb, for layers of `shapes` (O, K): half of it takes the float64 sums, H or G, of the widest one."""
    return 16 * max(max(O, K) if gradients else K for O, K in shapes) ** 2
