"""Speed, memory and error of the kernels on SDXL's and FLUX's layer shapes and networks, against what a user would run instead.

    python -m benchmarks.bench kernels             every shape, every implementation that is installed (11 rounds: five minutes)
    python -m benchmarks.bench kernels --quick     two shapes, under a minute
    python -m benchmarks.bench kernels --json rows.json
    python -m benchmarks.bench model --model sdxl  a denoiser's step, 4-bit against bfloat16, eager and compiled; on CUDA and for
                                                   tiny also 4 steps against the teacher's 20 guided ones, and throughput
    python -m benchmarks.bench train               an update of training, W4A4 against a LoRA of the 16-bit network
    python -m benchmarks.bench costs               how time grows with tokens, width and rank
    python -m benchmarks.bench attention           in 8 bits (backends/attention.py) against torch's, on a CPU
    benchmarks/gpu.sh                              all of these on CUDA, and training at full size

One process, the same tensors for all: rounds in which every implementation runs once, in random order, after a warm-up that also
pays for compilation (`compile_s` of --json). Median and quartiles over rounds. Ours includes quantizing the activations,
unpacking the weight and a branch of rank 32; bf16 has no branch. Peers: pip install -r requirements-bench.txt; what is missing
or refuses a shape is named, and the table goes on without it.

    gops      2 M K N / median, the branch not counted (in --json)
    ceiling   the int8 product alone, int8 operands at hand and int32 output (`int8_ceiling`): its share is ours / ceiling
    error     |y - y64| / |y64|, y64 = x W^T + bias in float64 with unquantized operands; Gaussian weights and inputs
    peak      the largest growth of (resident or CUDA) memory during one call, its result included
"""

import argparse
import copy
import ctypes
import functools
import json
import math
import platform
import random
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import kernels
import layers
import quant
import tdpt
from backends import attention, cpu, gpu
from benchmarks.tables import markdown
from models import encoders, memory
from models.denoiser import FAST, Denoiser, LoRA, float_layers
from models.family import FACTOR, FAMILIES
from run.common import UserError, peak_memory, run_script

DTYPE = torch.bfloat16
# model, kind, M rows (tokens or pixels), K = taps * I, N outputs
SDXL = [
    ("sdxl", "linear", 1024, 1280, 10240), ("sdxl", "linear", 1024, 1280, 1280), ("sdxl", "linear", 1024, 5120, 1280),
    ("sdxl", "linear", 4096, 640, 5120), ("sdxl", "linear", 4096, 640, 640), ("sdxl", "conv", 1024, 11520, 1280),
]  # fmt: skip
FLUX = [
    ("flux", "linear", 4608, 15360, 3072), ("flux", "linear", 4608, 3072, 12288), ("flux", "linear", 4608, 3072, 3072),
    ("flux", "linear", 4096, 3072, 3072), ("flux", "linear", 4096, 3072, 12288), ("flux", "linear", 4096, 12288, 3072),
]  # fmt: skip
FLUX_CPU = list(dict.fromkeys((*shape[:2], 512, *shape[3:]) for shape in FLUX))  # 512 tokens
QUICK = [("sdxl", "linear", 1024, 1280, 1280), ("sdxl", "conv", 256, 5760, 640)]
RANK = 32


class Layer:
    """Operands of one shape: float layer, input, float64 answer, and our packed weight, plain or rotated, with its branch."""

    def __init__(self, kind: str, M: int, K: int, N: int, device: str):
        torch.manual_seed(0)
        self.kind, self.shape, conv = kind, (M, K, N), kind == "conv"
        if conv:
            side = 1 << (M.bit_length() - 1) // 2  # of one picture, or of two
            self.float = nn.Conv2d(K // 9, N, 3, padding=1, device=device).to(memory_format=torch.channels_last)
            self.x = torch.randn(M // side**2, K // 9, side, side, device=device).to(memory_format=torch.channels_last)
        else:
            self.float, self.x = nn.Linear(K, N, device=device), torch.randn(M, K, device=device)
        self.float.requires_grad_(False)
        self.reference = copy.deepcopy(self.float).double()(self.x.double())
        w_OK = quant.flatten_conv(self.float.weight) if conv else self.float.weight
        taps, self.ours = 9 if conv else 1, {}
        for rotated in (False, True):
            grid = quant.quantize_weight(quant.rotate_taps(w_OK, taps) if rotated else w_OK, taps=taps)
            left = w_OK - (quant.rotate_taps(quant.dequantize(grid), taps) if rotated else quant.dequantize(grid))
            U, S, V = torch.svd_lowrank(left, RANK, niter=1)
            A, B = (S.sqrt()[:, None] * V.T).to(DTYPE), (U * S.sqrt()).to(DTYPE)
            self.ours[rotated] = kernels.pack(grid), self.float.bias.clone(), A, B
        self.inv_smooth = torch.ones(w_OK.shape[1] // taps, device=device)  # takes as long as other factors
        self.float, self.x = self.float.to(DTYPE), self.x.to(DTYPE)

    def error(self, y: torch.Tensor) -> float | None:
        """None for the ceiling's integers."""
        return None if y.dtype == torch.int32 else float((y.double() - self.reference).norm() / self.reference.norm())

    def linear(self) -> nn.Linear:
        """A fresh copy of the float layer, for a peer that converts linear layers only. RuntimeError for a convolution."""
        if self.kind == "conv":
            raise RuntimeError("no convolutions")
        return copy.deepcopy(self.float)


def ours(layer: Layer, backend: str, group_x: int = 8, plain: bool = False) -> Callable:
    """The layer as train.py makes it by default, smoothed and rotated, or plain."""
    if backend == "native" and not (gpu.is_available() if layer.x.is_cuda else cpu.is_available()):
        raise RuntimeError("there is no Triton" if layer.x.is_cuda else "backends/cpu.cpp cannot be built here")
    conv, inv_smooth = layer.kind == "conv", None if plain else layer.inv_smooth
    fn = kernels.BACKENDS[backend](kernels.w4a4_conv2d if conv else kernels.w4a4_linear)
    more = ((3, 3), (1, 1), (1, 1)) if conv else (None,)  # geometry, or no shift
    return functools.partial(fn, layer.x, *layer.ours[not plain], inv_smooth, group_x, *more, not plain)


def ceiling(layer: Layer) -> Callable:
    if not (kernels.VNNI or layer.x.is_cuda):
        raise RuntimeError("no int8 units that torch uses")
    (M, K, N), device = layer.shape, layer.x.device
    X, W = torch.randint(-128, 113, (M, K), dtype=torch.int8, device=device), kernels.weight_int8(layer.ours[False][0]).t()
    out = torch.empty(M, N, dtype=torch.int32, device=device)
    return functools.partial(torch._int_mm, X, W, out=out)


def torchao(layer: Layer, config: Callable) -> Callable:
    """config: torchao.quantization -> what its quantize_ takes."""
    from torchao import quantization

    module = nn.Sequential(layer.linear())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(module, config(quantization))
    return functools.partial(torch.compile(module), layer.x)


def torchao_int4_on_cpu(_) -> object:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(set_inductor_config=False)  # which would change the others' compilation


def sdnq(layer: Layer, dtype: str, openvino: bool = False) -> Callable:
    import sdnq.kernel_wrappers as wrappers
    from sdnq import SDNQConfig, sdnq_quantize_layer

    if openvino:
        from sdnq.kernels.openvino_mm import openvino_int_mm
    conv = layer.kind == "conv"
    config = SDNQConfig(weights_dtype=dtype, use_quantized_matmul=True, quant_conv=conv, use_quantized_matmul_conv=conv)
    module, _ = sdnq_quantize_layer(copy.deepcopy(layer.float), config, torch_dtype=DTYPE)
    engine = openvino_int_mm if openvino else None

    def call():
        wrappers.openvino_int_mm = engine  # SDNQ chooses once for a process; here both run in turn
        return module(layer.x)

    return call


def bitsandbytes(layer: Layer) -> Callable:
    import bitsandbytes

    _, K, N = layer.shape
    module = bitsandbytes.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=DTYPE)
    module.load_state_dict(layer.linear().state_dict())
    return functools.partial(module.to(layer.x.device), layer.x)


CPU = {
    "bf16": lambda layer: functools.partial(layer.float, layer.x),
    "bf16_compiled": lambda layer: functools.partial(torch.compile(layer.float), layer.x),
    "float32": lambda layer: functools.partial(copy.deepcopy(layer.float).float(), layer.x.float()),
    "int8_ceiling": ceiling,
    "ours": lambda layer: ours(layer, "native"),
    "ours_plain": lambda layer: ours(layer, "native", 16, plain=True),
    "ours_w4a8": lambda layer: ours(layer, "native", quant.EIGHT_BITS),
    "ours_compile": lambda layer: ours(layer, "compile"),
    "ours_eager": lambda layer: ours(layer, "eager"),
    "sdnq_uint4": lambda layer: sdnq(layer, "uint4"),
    "sdnq_uint4_openvino": lambda layer: sdnq(layer, "uint4", openvino=True),
    "sdnq_int8": lambda layer: sdnq(layer, "int8"),
    "torchao_w8a8": lambda layer: torchao(layer, lambda q: q.Int8DynamicActivationInt8WeightConfig()),
    "torchao_int4": lambda layer: torchao(layer, torchao_int4_on_cpu),
    "bnb_nf4": bitsandbytes,
}
CUDA = {k: v for k, v in CPU.items() if k not in ("sdnq_uint4_openvino", "torchao_int4")} | {
    "torchao_int4": lambda layer: torchao(layer, lambda q: q.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")),
    "torchao_fp8": lambda layer: torchao(layer, lambda q: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow())),
}


def clock(fn: Callable, cuda: bool) -> tuple[float, torch.Tensor]:
    """(seconds, result) of one call. A GPU is kept busy for a millisecond first, so that a layer's launches are queued when it
    begins: its time, not Python's. For whole networks that is nothing, they are timed as they are called."""
    if not cuda:
        start = time.perf_counter()
        y = fn()
        return time.perf_counter() - start, y
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles
    begin.record()
    y = fn()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, y


@torch.inference_mode()
def race(builders: dict[str, Callable], rounds: int, cuda: bool) -> list[tuple[dict, Callable]]:
    """(a row of "impl", "median_ms", "q1_ms", "q3_ms", "compile_s", its call) for each builder whose call works.

    Two calls come first; how much longer the first of them took is compilation. Then rounds in which each runs once, in an order
    drawn anew: none always finds the caches as one other leaves them. A builder may raise anything: a peer's error is its own and
    no reason to lose the others' times, it is printed."""
    calls, compile_s = {}, {}
    for name, build in builders.items():
        try:
            call = build()
            (first, _), (second, _) = clock(call, cuda), clock(call, cuda)
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}", file=sys.stderr)
            if cuda and name.startswith("ours"):
                traceback.print_exc()
            continue
        calls[name], compile_s[name] = call, max(0, first - second)
    times, order = {name: [] for name in calls}, random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(1e3 * clock(calls[name], cuda)[0])
    rows = []
    for name, ms in times.items():
        q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive") if rounds > 1 else ms * 3
        row = {"impl": name, "median_ms": median, "q1_ms": q1, "q3_ms": q3, "compile_s": compile_s[name]}
        rows.append((row, calls[name]))
    return rows


def resident(field: str) -> float:
    """Resident memory of this process in megabytes (Linux): VmRSS now, VmHWM its high-water mark."""
    return float(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def peak_growth(call: Callable, cuda: bool) -> float | None:
    """Megabytes by which memory grows at most during one call. None where the system does not tell."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = resident("VmRSS")
        call()
        return max(0.0, resident("VmHWM") - before)
    except (OSError, TypeError, AttributeError):
        return None  # not Linux


@torch.inference_mode()
def measure(layer: Layer, implementations: dict[str, Callable], rounds: int, cuda: bool) -> list[dict]:
    """Rows of one shape. Implementations that cannot run it are printed with their reason and left out."""
    M, K, N = layer.shape
    about = {"what": f"{'3x3 conv ' if layer.kind == 'conv' else ''}{M} x {K} x {N}", "kind": layer.kind, "shape": layer.shape}
    builders = {name: lambda build=build: build(layer) for name, build in implementations.items()}
    return [
        about | row | {"error": layer.error(call()), "gops": 2e-6 * M * K * N / row["median_ms"]}
        for row, call in race(builders, rounds, cuda)
    ]


def pivot(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """What was measured -> implementation -> its row."""
    found = {}
    for row in rows:
        found.setdefault(row["what"], {})[row["impl"]] = row
    return found


def ratio(at: dict[str, dict], above: str, below: str, form: str = ".2f") -> str:
    """Of the medians of two implementations; - if one of them has none."""
    return format(at[above]["median_ms"] / at[below]["median_ms"], form) if at.keys() >= {above, below} else "-"


def table(rows: list[dict], mine: str = "ours", base: str = "bf16", corner: str = "M x K x N") -> list[str]:
    """Median milliseconds, a line for what was measured and a column per implementation, `mine` first with quartiles; then the
    medians of the error and of the compilation."""
    names = list(dict.fromkeys(row["impl"] for row in rows))
    names.sort(key=lambda name: (name != mine, name not in (base, "int8_ceiling")))
    lines = [[corner, names[0], f"times {base}", "of the ceiling", *names[1:]]]
    for what, at in pivot(rows).items():
        first, *others = (f"{at[name]['median_ms']:.2f}" if name in at else "-" for name in names)
        if mine in at:
            first += f" ({at[mine]['q1_ms']:.2f} .. {at[mine]['q3_ms']:.2f})"
        lines.append([what, first, ratio(at, base, mine), ratio(at, "int8_ceiling", mine, ".0%"), *others])
    for label, key, digits in (("error", "error", 4), ("compilation, s", "compile_s", 1)):
        values = [[row[key] for row in rows if row["impl"] == name and row.get(key) is not None] for name in names]
        first, *others = (f"{statistics.median(found):.{digits}f}" if found else "-" for found in values)
        lines += [[label, first, "", "", *others]] if any(values) else []
    if "int8_ceiling" not in names:
        lines = [line[:3] + line[4:] for line in lines]
    return markdown(*lines)


def bench_kernels(args: argparse.Namespace) -> Iterator[list[dict]]:
    cuda = args.device == "cuda"
    implementations = {k: v for k, v in (CUDA if cuda else CPU).items() if not args.only or k in args.only}
    if not implementations:
        sys.exit(f"--only {' '.join(args.only)} is not for {args.device}")
    for model, kind, M, K, N in QUICK if args.quick else SDXL + (FLUX if cuda else FLUX_CPU):
        print(f"{model} {kind} {M} x {K} x {N}", file=sys.stderr)
        torch.compiler.reset()
        yield measure(Layer(kind, M, K, N, args.device), implementations, args.rounds, cuda)


def fill(module: nn.Module, device: str) -> nn.Module:
    """A module on the meta device -> random weights of ordinary size on `device`, bfloat16, also A and B; codes are random."""
    module.to(DTYPE).to_empty(device=device)  # (packed layers keep their dtypes)
    gen = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        last = name.split(".")[-1]
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=gen)
        elif last == "scale_O":
            tensor.fill_(2.0**-11)
        elif last == "inv_smooth" or (last == "weight" and tensor.dim() == 1):
            tensor.fill_(1)  # norms too
        else:
            tensor.normal_(0, 0.02, generator=gen)
    for _, layer in layers.packed_layers(module):
        if layer.rank:
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(DTYPE), layer.lora_B.to(DTYPE)
    return module.eval().requires_grad_(False)


def by_default(packed: nn.Module) -> nn.Module:
    """Packed layers with activations as train.py has them by default: groups of 8, rotated where their channels allow it."""
    for _, layer in layers.packed_layers(packed):
        layer.group_x, layer.rotated = 8, layer.channels % quant.TURN == 0
    return packed


def networks(args: argparse.Namespace, part: str = "") -> tuple[nn.Module, nn.Module]:
    """bf16 denoiser and its W4A4 twin, or one `part` of them, random weights."""
    family = FAMILIES[args.model]
    with torch.device("meta"):
        dense, packed = family.build(), memory.packed_twin(family, family.build(), args.rank, under=part, smooth=True)
    dense, packed = (fill(net.get_submodule(part), args.device) for net in (dense, packed))
    layers.set_backend(by_default(packed), "native")
    if args.lora_bits == 8:
        layers.store_8bit(packed)  # as checkpoints of SDXL and FLUX are: factors and scales are computed in every call
    return (dense, packed) if part else (Denoiser(family, dense), Denoiser(family, packed))


# of the large networks, for CPUs
PARTS = {"sdxl": ("down_blocks.1", "mid_block"), "flux": ("transformer_blocks.0", "single_transformer_blocks.0")}


def part_inputs(model: str, part: str) -> dict:
    """Arguments of a part for a picture of 1024 x 1024 pixels, bfloat16; FLUX's 4,096 + 512 tokens also have positions, as cosines
    and sines."""
    if model == "flux":
        shapes = {"hidden_states": (1, 4096, 3072), "encoder_hidden_states": (1, 512, 3072), "temb": (1, 3072)}
        more = {"image_rotary_emb": (torch.randn(4608, 128), torch.randn(4608, 128))}
    else:
        pixels, more = (1, 320, 64, 64) if part == "down_blocks.1" else (1, 1280, 32, 32), {}
        shapes = {"hidden_states": pixels, "temb": (1, 1280), "encoder_hidden_states": (1, 77, 2048)}
    return {k: torch.randn(shape, dtype=DTYPE) for k, shape in shapes.items()} | more


def step_inputs(denoiser: Denoiser, batch: int, device: str) -> dict:
    """Arguments x, t, s, cond of a denoiser for a step of `batch` pictures."""
    x = torch.randn(batch, *denoiser.latent, device=device, dtype=DTYPE)
    cond = encoders.random_text(denoiser, FACTOR * denoiser.latent[1], [str(i) for i in range(batch)])
    t, s = (edge.expand(batch) for edge in denoiser.path.grid(4, device)[:2])
    return {"x": x, "t": t, "s": s, "cond": {k: v.to(device) for k, v in cond.items()}}


class Graphed:
    """A denoiser whose step is a CUDA graph, one for each shape and dtype: the kernels without the time that Python takes to launch
    them."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.path, self.graphs = denoiser, denoiser.path, {}

    def __call__(self, x, t, s, cond) -> torch.Tensor:
        inputs = (x, t, s, cond)
        key = tuple((v.shape, v.dtype) for v in tree_leaves(inputs))
        if key not in self.graphs:  # of a module, its forward would be replaced
            self.graphs[key] = torch.cuda.make_graphed_callables(self.denoiser.forward, tree_map(torch.clone, inputs))
        return self.graphs[key](*inputs).clone()


def bench_model(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows also have "peak_mb" and "weights_mb"."""
    whole = args.device == "cuda" or args.model not in PARTS
    large = whole and args.model in PARTS  # blocks are compiled one by one: the whole of one takes minutes
    graphed = Graphed if args.device == "cuda" else lambda denoiser: denoiser
    for part in [""] if whole else PARTS[args.model]:
        torch.compiler.reset()
        dense, packed = networks(args, part)
        nets, compiled = {"bf16": dense, "ours": packed}, {}
        x = part_inputs(args.model, part) if part else step_inputs(dense, 1, args.device)

        def step(chosen: dict, nets=nets, x=x, what=part or "one step") -> list[dict]:
            return timed(what, {name: lambda net=net: lambda: net(**x) for name, net in chosen.items()}, nets, args)

        if args.compile and not large:
            fast = {k: torch.compile(net) if part else Denoiser(net.family, torch.compile(net.net)) for k, net in nets.items()}
            compiled = {f"{name}_compiled": net if part else graphed(net) for name, net in fast.items()}
        yield step(nets | compiled)
        if whole:
            yield throughput(nets, args)
        if args.compile and large:
            for net in nets.values():
                net.net.compile_repeated_blocks()
            compiled = {f"{name}_compiled": graphed(net) for name, net in nets.items()}
            yield step(compiled)
        if whole:
            yield timed("a picture", generations(compiled or nets, x["x"], x["cond"], args.model), nets, args)


@torch.inference_mode()
def timed(what: str, builders: dict[str, Callable], nets: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    """Rows of the network that each name begins with."""
    cuda, rows = args.device == "cuda", []
    for row, call in race(builders, args.rounds, cuda):
        net = nets["ours" if row["impl"].startswith("ours") else "bf16"]
        graph = cuda and "_compiled" in row["impl"]  # its memory was taken when it was made
        row |= {"peak_mb": None if graph else peak_growth(call, cuda)}
        rows.append({"what": what} | row | {"weights_mb": sum(t.nbytes for t in memory.tensors_of(net)) / 1e6})
    return rows


def generations(nets: dict[str, nn.Module], x: torch.Tensor, cond: dict, model: str) -> dict[str, Callable]:
    """Whole samplings of one picture: 4 steps of both, and 20 of the teacher, guided by two predictions a step (FLUX: one)."""
    (bf16, dense), (ours, packed) = nets.items()
    null = {k: torch.zeros_like(v) for k, v in cond.items()}
    teacher = dense if "flux" in model else tdpt.guided(dense, 5.0, null)
    return {
        f"{bf16}, 4 steps": lambda: lambda: tdpt.sample(dense, dense.path, x, cond, 4),
        f"{ours}, 4 steps": lambda: lambda: tdpt.sample(packed, packed.path, x, cond, 4),
        f"{bf16} teacher, 20 guided steps": lambda: lambda: tdpt.sample(teacher, dense.path, x, cond, 20),
    }


def throughput(nets: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    """Steps a second times pictures in a batch, not compiled as a whole; the batch is doubled until memory or the gain ends."""
    rows = []
    for name, net in nets.items():
        best, speed, batch = [], 0.0, 1
        while batch <= 256:
            inputs = step_inputs(net, batch, args.device)
            found = timed("", {name: lambda: lambda: net(**inputs)}, nets, args)  # noqa: B023
            if not found or batch / found[0]["median_ms"] < speed / 0.97:
                break  # out of memory, or no faster
            best, speed = found, batch / found[0]["median_ms"]
            best[0]["what"] = f"batch {batch}: {1e3 * speed:.2f} pictures a second and step"
            batch *= 2
        rows += best
    return rows


def model_table(rows: list[dict]) -> list[str]:
    lines = [["", "implementation", "ms", "quartiles", "times bf16", "weights MB", "peak MB", "compile s"]]
    for what, at in pivot(rows).items():
        base = next((name for name in at if name.startswith("bf16")), "")
        for name, row in at.items():
            times = f"{row['median_ms']:.1f}", f"{row['q1_ms']:.1f} .. {row['q3_ms']:.1f}", ratio(at, base, name)
            peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            lines.append([what, name, *times, f"{row['weights_mb']:.1f}", peak, f"{row['compile_s']:.0f}"])
    return markdown(*lines)


SWEEPS = {  # (M, K, N, rank)
    "tokens": [(M, 1280, 1280, RANK) for M in (256, 512, 1024, 2048, 4096, 8192, 16384)],
    "width": [(512, K, K, RANK) for K in (640, 1280, 2560, 5120, 10240, 15360)],
    "rank": [(1024, 1280, 1280, r) for r in (0, 8, 16, 32, 64, 128)],
}


def bench_costs(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows also have "sweep" and "size"."""
    for sweep, points in SWEEPS.items():
        for M, K, N, r in points:
            with torch.device("meta"):
                dense = nn.Linear(K, N)
                packed = by_default(layers.W4A4Linear(dense, r, smooth=True))
            dense, packed = (fill(layer, args.device) for layer in (dense, packed))
            layers.set_backend(packed, "native")
            x = torch.randn(M, K, device=args.device, dtype=DTYPE)
            builders = {"bf16": lambda: lambda: dense(x), "ours": lambda: lambda: packed(x)}  # noqa: B023
            size = {"tokens": M, "width": K, "rank": r}[sweep]
            point = {"sweep": sweep, "what": f"{sweep}: {M} x {K} x {N}, rank {r}", "size": size}
            yield [point | row for row, _ in race(builders, args.rounds, args.device == "cuda")]


def costs_table(rows: list[dict]) -> list[str]:
    """Below the times the slopes: exponents, and for the rank the milliseconds of one more."""
    slopes = [[sweep, *(f"{slope(rows, sweep, name):.3f}" for name in ("ours", "bf16"))] for sweep in SWEEPS]
    return [*table(rows), "", *markdown(["exponent, for the rank ms", "ours", "bf16"], *slopes)]


def slope(rows: list[dict], sweep: str, name: str) -> float:
    """Least-squares slope of an implementation's ms over the sizes that both sides have (memory may not have sufficed), of their
    logarithms but for the rank; NaN of fewer than two points."""
    found = [at[name] for at in pivot(row for row in rows if row["sweep"] == sweep).values() if len(at) == 2]
    x, y = [row["size"] for row in found], [row["median_ms"] for row in found]
    if sweep != "rank":
        x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


def bench_train(args: argparse.Namespace) -> Iterator[list[dict]]:
    """One update on an on-policy rollout of 4 jumps, by a LoRA of the 16-bit network and by that of the W4A4 one: same layers, same
    rank, float32 factors, the same reference. "update" is everything, "learner" without drawing the reference."""
    dense, packed = networks(args)
    fp = copy.deepcopy(dense)
    gen = torch.Generator().manual_seed(0)
    for name, layer in float_layers(dense.net).items():
        if dense.family.precision(name) != "16bit":
            dense.net.set_submodule(name, LoRA(layer, args.rank, gen).to(args.device))
    cond, edges = step_inputs(fp, args.batch, args.device)["cond"], fp.path.grid(4, args.device)
    x_T = torch.randn(args.batch, *fp.latent, device=args.device)
    states = tdpt.rollout_states(fp, fp.path, x_T, cond, edges)

    def update(learner: Denoiser, reference: bool) -> Callable:
        params = [p for name, p in learner.named_parameters() if "lora_" in name]
        for p in params:
            p.data = p.data.float()
            p.requires_grad_()
        optimizer = torch.optim.AdamW(params, lr=1e-6)

        @torch.inference_mode(False)
        def call() -> None:
            z = tdpt.rollout_states(fp, fp.path, x_T, cond, edges) if reference else states
            for loss in tdpt.rollout_phases(learner, learner.path, z, cond, edges):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    calls = {f"{what}, {name}": update(net, what == "update") for what in ("learner", "update")
             for name, net in (("fp LoRA", dense), ("W4A4", packed))}  # fmt: skip
    found = race({name: lambda call=call: call for name, call in calls.items()}, args.rounds, args.device == "cuda")
    yield [row | dict(zip(("what", "impl"), row["impl"].split(", "), strict=True)) for row, _ in found]


ATTENTION = {  # heads, queries, keys, channels of a head
    "flux, 1024 pixels": (24, 4608, 4608, 128),
    "sdxl, 1024 pixels, outer blocks": (10, 4096, 4096, 64),
    "sdxl, 1024 pixels, inner blocks": (20, 1024, 1024, 64),
    "sdxl, 1024 pixels, to the caption": (10, 4096, 77, 64),
    "sd15, 512 pixels, outer blocks": (8, 4096, 4096, 40),
}


@torch.inference_mode()
def bench_attention(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Both in the dtype that networks have on this CPU. "error" is that of the first head, without the mean of its values."""
    if args.device == "cuda":
        raise UserError("the attention that is measured here is a CPU's: add --device cpu")
    for what, (H, T, S, D) in ATTENTION.items():
        gen = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n, H, D, generator=gen).transpose(1, 2).to(FAST) for n in (T, S, S))  # as diffusers makes them
        builders = {"torch": lambda: lambda: nn.functional.scaled_dot_product_attention(q, k, v)}  # noqa: B023
        builders["ours"] = lambda: lambda: attention.attention(q, k, v)  # noqa: B023
        first = [t[:, :1].double() for t in (q, k, v)]
        exact, mean = nn.functional.scaled_dot_product_attention(*first), first[-1].mean(2, keepdim=True)
        yield [
            {"what": f"{what}: {H} x {T} x {S} x {D}"}
            | row
            | {"error": float((call()[:, :1] - exact).norm() / (exact - mean).norm())}
            for row, call in race(builders, args.rounds, False)
        ]


def about(args: argparse.Namespace) -> str:
    flags = [f"{name} {getattr(args, name)}" for name in ("model", "rank", "batch") if hasattr(args, name)]
    cpu = f"{platform.machine()} CPU ({kernels.CPU.get('cpu_name')}), {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    end = f"torch {torch.__version__}; median of {args.rounds} rounds; peak memory {peak_memory('cpu') / 1e9:.1f} GB"
    return "; ".join(filter(None, [", ".join(flags), device, end]))


COMMANDS = {  # -> what yields rows, and their table
    "kernels": (bench_kernels, table),
    "model": (bench_model, model_table),
    "train": (bench_train, functools.partial(table, mine="W4A4", base="fp LoRA", corner="")),
    "costs": (bench_costs, costs_table),
    "attention": (bench_attention, functools.partial(table, base="torch", corner="heads x queries x keys x channels")),
}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    clis = {name: commands.add_parser(name, allow_abbrev=False) for name in COMMANDS}
    for name, cli in clis.items():
        cli.set_defaults(lora_bits=16)
        cli.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        cli.add_argument("--rounds", type=int, default=11)
        cli.add_argument("--json", default="", help="file for the rows")
        if name in ("model", "train"):
            cli.add_argument("--model", choices=tuple(FAMILIES), default="tiny")
            cli.add_argument("--rank", type=int, default=16)
    clis["kernels"].add_argument("--quick", action="store_true")
    clis["kernels"].add_argument("--only", nargs="+", choices=list(CPU | CUDA), help="implementations")
    clis["model"].add_argument("--lora-bits", type=int, choices=(8, 16), help="8: the form of SDXL's and FLUX's checkpoints")
    clis["model"].add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA, as CUDA graphs")
    clis["train"].add_argument("--batch", type=int, default=32)
    return parser.parse_args(argv)


def main(argv: list[str]) -> list:
    args, rows = arguments(argv), []
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device: run kernels, model or costs with --device cpu")
    measured, tabulate = COMMANDS[args.command]
    for some in measured(args):
        rows += some
        if args.json:  # so far: a part that is stopped leaves what it measured
            Path(args.json).write_text(json.dumps(rows, indent=1))
    print("\n".join([*(tabulate(rows) if rows else []), "", about(args)]))
    return rows


if __name__ == "__main__":
    run_script("benchmarks.bench", main)
