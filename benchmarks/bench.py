"""Speed, memory and error of the kernels on SDXL's and FLUX's layer shapes and networks, against what a user would run instead.

    python -m benchmarks.bench kernels             every shape, every implementation that is installed (five minutes)
    python -m benchmarks.bench kernels --quick     two shapes, under a minute
    python -m benchmarks.bench kernels --json rows.json --plot benchmarks/kernels.png
    python -m benchmarks.bench model --model sdxl  a denoiser's step, 4-bit against bfloat16, eager and compiled; on CUDA and for
                                                   tiny also 4 steps against the teacher's 20 guided ones, and throughput
    python -m benchmarks.bench train               an update of training, W4A4 against a LoRA of the 16-bit network
    python -m benchmarks.bench costs               how time grows with tokens, width and rank
    python -m benchmarks.bench gpu                 all of these on CUDA, and training at full size; what fails is named, the others
                                                   go on; --parts kernels,tiny chooses, --minutes 5 bounds each

One process, the same tensors for all: rounds in which every implementation runs once, in random order, after a warm-up that also
pays for compilation (`compile_s` of --json). Median and quartiles over rounds. Ours includes quantizing the activations,
unpacking the weight and a branch of rank 32; bf16 has no branch. Peers: pip install -r requirements-bench.txt; what is missing
or refuses a shape is named, and the table goes on without it. (gemlite, for CUDA, is not in that file: it is built from source.)

    gops      2 M K N / median, the branch not counted (in --json)
    ceiling   the int8 product alone, int8 operands at hand and int32 output (`int8_ceiling`): its share is ours / ceiling
    error     |y - y64| / |y64|, y64 = x W^T + bias in float64 with unquantized operands; Gaussian weights and inputs
    peak      the largest growth of (resident or CUDA) memory during one call, its result included
"""

import argparse
import copy
import ctypes
import json
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernels
import quant
import tdpt
from backends import cpu, gpu
from layers import W4A4Conv2d, W4A4Linear, packed_layers, set_backend
from models import encoders, memory, tiny
from models.denoiser import Denoiser, LoRA, float_layers
from models.family import FACTOR, FAMILIES
from run.common import UserError, peak_memory, run_script

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
    """Operands of one shape: float layer, input, float64 answer, and our packed weight with its branch."""

    def __init__(self, kind: str, M: int, K: int, N: int, device: str, dtype: torch.dtype, seed: int = 0):
        torch.manual_seed(seed)
        self.kind, self.shape, self.dtype = kind, (M, K, N), dtype
        if kind == "linear":
            self.float, self.x = nn.Linear(K, N, device=device), torch.randn(M, K, device=device)
        else:
            side = int(M**0.5)
            self.float = nn.Conv2d(K // 9, N, 3, padding=1, device=device).to(memory_format=torch.channels_last)
            self.x = torch.randn(1, K // 9, side, side, device=device).to(memory_format=torch.channels_last)
        self.float.requires_grad_(False)
        self.reference = self._double()
        w_OK = quant.flatten_conv(self.float.weight) if kind == "conv" else self.float.weight
        gw = quant.quantize_weight(w_OK, taps=9 if kind == "conv" else 1)
        U, S, V = torch.svd_lowrank(w_OK - quant.dequantize(gw), RANK, niter=1)
        packed = W4A4Conv2d if kind == "conv" else W4A4Linear
        self.packed = packed.from_float(self.float, gw, S.sqrt()[:, None] * V.T, U * S.sqrt()).requires_grad_(False)
        self.W8 = kernels.weight_int8(self.packed.packed)
        self.X8 = torch.randint(-128, 113, (M, K), dtype=torch.int8, device=device)
        self.float, self.x = self.float.to(dtype), self.x.to(dtype)

    def _double(self) -> torch.Tensor:
        layer = self.float
        w, b, x = layer.weight.double(), layer.bias.double(), self.x.double()
        return F.linear(x, w, b) if self.kind == "linear" else F.conv2d(x, w, b, padding=1)

    def error(self, y: torch.Tensor) -> float | None:
        if y.dtype == torch.int32:
            return None  # the ceiling's
        return float((y.double() - self.reference).norm() / self.reference.norm())

    def module(self) -> nn.Module:
        """A fresh copy of the float layer, for a peer to convert."""
        return nn.Sequential(copy.deepcopy(self.float))


def ours(layer: Layer, backend: str) -> Callable:
    if backend == "native" and not (gpu.is_available() if layer.x.is_cuda else cpu.is_available()):
        raise RuntimeError("there is no Triton" if layer.x.is_cuda else "backends/cpu.cpp cannot be built here")
    packed = layer.packed
    fn = kernels.BACKENDS[backend](kernels.w4a4_conv2d if layer.kind == "conv" else kernels.w4a4_linear)
    A, B = (p.to(layer.dtype) for p in (packed.lora_A, packed.lora_B))
    return lambda: fn(layer.x, packed.packed, packed.bias, A, B)


def float32(layer: Layer) -> Callable:
    module, x = layer.module()[0].float(), layer.x.float()
    return lambda: module(x)


def compiled_float(layer: Layer) -> Callable:
    fast = torch.compile(layer.float)
    return lambda: fast(layer.x)


def ceiling(layer: Layer) -> Callable:
    if not (kernels.VNNI or layer.x.is_cuda):
        raise RuntimeError("no int8 units that torch uses")
    W = layer.W8.t()
    if layer.x.is_cuda:
        return lambda: torch._int_mm(layer.X8, W)
    out = torch.empty(layer.shape[0], layer.shape[2], dtype=torch.int32)
    return lambda: torch._int_mm(layer.X8, W, out=out)


def torchao(layer: Layer, config: Callable) -> Callable:
    """config: torchao.quantization -> what its quantize_ takes."""
    from torchao import quantization

    if layer.kind == "conv":
        raise RuntimeError("no convolutions")
    module = layer.module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(module, config(quantization))
    fast = torch.compile(module)
    return lambda: fast(layer.x)


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
    module, _ = sdnq_quantize_layer(layer.module()[0], config, torch_dtype=layer.dtype)
    engine = openvino_int_mm if openvino else None

    def call():
        wrappers.openvino_int_mm = engine  # SDNQ chooses once for a process; here both run in turn
        return module(layer.x)

    return call


def bitsandbytes(layer: Layer) -> Callable:
    import bitsandbytes

    if layer.kind == "conv":
        raise RuntimeError("no convolutions")
    _, K, N = layer.shape
    module = bitsandbytes.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=layer.dtype)
    module.load_state_dict(layer.float.state_dict())
    module = module.to(layer.x.device)
    return lambda: module(layer.x)


def gemlite(layer: Layer) -> Callable:
    """Weights on a uint4 grid with a scale for 64, activations float8."""
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    if layer.kind == "conv":
        raise RuntimeError("no convolutions")
    w_NGg = layer.float.weight.unflatten(1, (-1, 64))
    scale_NG = w_NGg.abs().amax(-1) / 7.5
    codes_NK = (w_NGg / scale_NG[..., None] + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    grid = codes_NK, scale_NG.flatten()[:, None], torch.full_like(scale_NG, 8).flatten()[:, None], layer.float.bias
    module = A8W4_HQQ_INT_dynamic(device=str(layer.x.device), dtype=layer.dtype).from_weights(*grid)
    return lambda: module(layer.x)


CPU = {
    "bf16": lambda layer: lambda: layer.float(layer.x),
    "bf16_compiled": compiled_float,
    "float32": float32,
    "int8_ceiling": ceiling,
    "ours": lambda layer: ours(layer, "native"),
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
    "gemlite_a8w4": gemlite,
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


def prepare(builders: dict[str, Callable], cuda: bool) -> tuple[dict[str, Callable], dict[str, float]]:
    """Calls that work, after their warm-up, and how much longer the first took than the second (compilation), in seconds. A
    builder may raise anything, a peer's error is its own and no reason to lose the others' times: it is printed."""
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
    return calls, compile_s


def interleave(calls: dict[str, Callable], rounds: int, cuda: bool) -> dict[str, dict]:
    """median_ms, q1_ms, q3_ms of every call, over rounds in which each runs once, in an order drawn anew: none always finds the
    caches as one other leaves them."""
    times, order = {name: [] for name in calls}, random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(1e3 * clock(calls[name], cuda)[0])
    quartiles = {name: statistics.quantiles(t, n=4, method="inclusive") if rounds > 1 else t * 3 for name, t in times.items()}
    return {name: {"median_ms": median, "q1_ms": q1, "q3_ms": q3} for name, (q1, median, q3) in quartiles.items()}


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
    calls, compile_s = prepare({name: lambda build=build: build(layer) for name, build in implementations.items()}, cuda)
    (M, K, N), rows = layer.shape, []
    for name, times in interleave(calls, rounds, cuda).items():
        row = {"kind": layer.kind, "shape": layer.shape, "impl": name, "error": layer.error(calls[name]()), **times}
        rows.append(row | {"compile_s": compile_s[name], "gops": 2e-6 * M * K * N / times["median_ms"]})
    return rows


def by_shape(rows: list[dict]) -> tuple[list, list[str], dict]:
    """Shapes (kind, (M, K, N)) and implementations in order, and the row of (kind, (M, K, N), implementation)."""
    at = {(row["kind"], tuple(row["shape"]), row["impl"]): row for row in rows}
    return list(dict.fromkeys(key[:2] for key in at)), list(dict.fromkeys(key[2] for key in at)), at


def table(rows: list[dict]) -> list[str]:
    """Markdown: median milliseconds, a line per shape and a column per implementation, ours first with quartiles; then the medians
    over shapes of the error and of the compilation."""
    shapes, names, at = by_shape(rows)
    names.sort(key=lambda name: (name != "ours", name not in ("bf16", "int8_ceiling")))
    shares = ["times bf16", "of the ceiling"] if "ours" in names else []
    lines = ["| M x K x N | " + " | ".join(names[:1] + shares + names[1:]) + " |", "|---" * (1 + len(names) + len(shares)) + "|"]
    for shape in shapes:
        ms = {name: at[*shape, name]["median_ms"] for name in names if (*shape, name) in at}
        cells = [f"{ms[name]:.2f}" if name in ms else "-" for name in names]
        if "ours" in ms:
            cells[0] += f" ({at[*shape, 'ours']['q1_ms']:.2f} .. {at[*shape, 'ours']['q3_ms']:.2f})"
            cells.insert(1, f"{100 * ms['int8_ceiling'] / ms['ours']:.0f}%" if "int8_ceiling" in ms else "-")
            cells.insert(1, f"{ms['bf16'] / ms['ours']:.2f}" if "bf16" in ms else "-")
        lines.append(f"| {'3x3 conv ' if shape[0] == 'conv' else ''}{' x '.join(map(str, shape[1]))} | " + " | ".join(cells) + " |")
    for label, key, digits in (("error", "error", 4), ("compilation, s", "compile_s", 1)):
        cells = []
        for name in names:
            values = [row[key] for row in rows if row["impl"] == name and row[key] is not None]
            cells.append(f"{statistics.median(values):.{digits}f}" if values else "-")
        lines.append(f"| {label} | " + " | ".join(cells[:1] + [""] * len(shares) + cells[1:]) + " |")
    return lines


def plot(rows: list[dict], file: Path) -> None:
    """Speed relative to bf16, one group of bars per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes, names, at = by_shape(rows)
    figure, axis = plt.subplots(figsize=(max(8, 1.3 * len(shapes)), 4))
    for k, name in enumerate(names):
        color = "black" if name == "ours" else plt.get_cmap("tab20")(k)
        bars = [
            (s, at[*shape, "bf16"]["median_ms"] / at[*shape, name]["median_ms"])
            for s, shape in enumerate(shapes)
            if (*shape, name) in at
        ]
        axis.bar([s + 0.8 * k / len(names) for s, _ in bars], [v for _, v in bars], 0.8 / len(names), label=name, color=color)
    axis.axhline(1, color="black", linewidth=0.5)
    names_of_shapes = [f"{kind}\n{'x'.join(map(str, shape))}" for kind, shape in shapes]
    axis.set_xticks([s + 0.4 for s in range(len(shapes))], names_of_shapes, fontsize=7)
    axis.set_ylabel("times as fast as bf16")
    axis.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def keep(rows: list[dict], args: argparse.Namespace) -> None:
    """--json so far: a part that is stopped leaves what it measured."""
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def bench_kernels(args: argparse.Namespace) -> list[dict]:
    cuda = args.device == "cuda"
    shapes = QUICK if args.quick else SDXL + (FLUX if cuda else FLUX_CPU)
    implementations, rows = CUDA if cuda else CPU, []
    names = args.impl.split(",") if args.impl else list(implementations)
    if unknown := [name for name in names if name not in implementations]:
        raise UserError(f"no implementation {', '.join(unknown)}: choose from {', '.join(implementations)}")
    chosen = {name: implementations[name] for name in names}
    for model, kind, M, K, N in shapes:
        if args.only not in model:
            continue
        print(f"{model} {kind} {M} x {K} x {N}", file=sys.stderr)
        torch.compiler.reset()
        keep(rows := rows + measure(Layer(kind, M, K, N, args.device, torch.bfloat16), chosen, args.rounds, cuda), args)
    print("\n".join(table(rows)))
    print(f"\n{about(args)}; median of {args.rounds} rounds; peak memory {peak_memory('cpu') / 1e9:.1f} GB")
    if args.plot:
        plot(rows, Path(args.plot))
    return rows


def fill(module: nn.Module, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A module on the meta device -> random weights of ordinary size on `device`; packed layers get random codes, and their A, B
    `dtype`."""
    module.to(dtype).to_empty(device=device)  # (packed layers keep their dtypes)
    gen = torch.Generator(device).manual_seed(seed)
    for name, tensor in module.state_dict().items():
        last = name.split(".")[-1]
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=gen)
        elif last == "scale_O":
            tensor.fill_(2.0**-11)
        elif last == "weight" and tensor.dim() == 1:
            tensor.fill_(1)  # norms
        else:
            tensor.normal_(0, 0.02, generator=gen)
    for _, layer in packed_layers(module):
        if layer.rank:
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    return module.eval().requires_grad_(False)


def networks(args: argparse.Namespace, part: str) -> tuple[nn.Module, nn.Module]:
    """bf16 denoiser and its W4A4 twin, or one `part` of them, random weights."""
    with torch.device("meta"):
        dense, packed = (FAMILIES[args.model].build() for _ in range(2))
        memory.packed_twin(FAMILIES[args.model], packed, args.rank, under=part)
    dense, packed = (fill(net.get_submodule(part), args.device, torch.bfloat16) for net in (dense, packed))
    if not part:
        dense, packed = (Denoiser(FAMILIES[args.model], net) for net in (dense, packed))
    set_backend(packed, "native")
    for _, layer in packed_layers(packed) if args.lora_bits == 8 else ():
        layer.store_8bit()  # as checkpoints of SDXL and FLUX are: factors and scales are computed in every call
    return dense, packed


# Parts of the large networks at their sizes for 1024 x 1024 pixels: model -> part -> shapes of its arguments
PARTS = {
    "sdxl": {
        "down_blocks.1": {"hidden_states": (1, 320, 64, 64), "temb": (1, 1280), "encoder_hidden_states": (1, 77, 2048)},
        "mid_block": {"hidden_states": (1, 1280, 32, 32), "temb": (1, 1280), "encoder_hidden_states": (1, 77, 2048)},
    },
    "flux": {
        "transformer_blocks.0": {"hidden_states": (1, 4096, 3072), "encoder_hidden_states": (1, 512, 3072), "temb": (1, 3072)},
        "single_transformer_blocks.0": {
            "hidden_states": (1, 4096, 3072), "encoder_hidden_states": (1, 512, 3072), "temb": (1, 3072),
        },
    },
}  # fmt: skip


def part_inputs(model: str, part: str) -> dict:
    """Arguments of a part, bfloat16; FLUX's also get cosines and sines of the positions of its 4,096 + 512 tokens."""
    x = {k: torch.randn(shape, dtype=torch.bfloat16) for k, shape in PARTS[model][part].items()}
    return x | ({"image_rotary_emb": (torch.randn(4608, 128), torch.randn(4608, 128))} if model == "flux" else {})


CONDITION = {  # tokens and pooled text of one picture
    "tiny": ((tiny.TOKENS, tiny.WIDTH), (tiny.WIDTH,)), "tiny-flux": ((tiny.TOKENS, tiny.WIDTH), (tiny.WIDTH,)),
    "sdxl": ((77, 2048), (1280,)), "flux": ((512, 4096), (768,)),
}  # fmt: skip


def compiled_denoiser(denoiser: Denoiser) -> Denoiser:
    """The same one, its network through torch.compile."""
    fast = copy.copy(denoiser)
    fast._modules = denoiser._modules | {"net": torch.compile(denoiser.net)}
    return fast


class Graphed:
    """A denoiser whose step is a CUDA graph, one for each shape and dtype: the kernels without the time that Python takes to launch
    them."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.path, self.graphs = denoiser, denoiser.path, {}

    def capture(self, inputs: dict[str, torch.Tensor], cond: dict) -> tuple:
        mine, stream, graph = {k: v.clone() for k, v in inputs.items()}, torch.cuda.Stream(), torch.cuda.CUDAGraph()

        def call() -> torch.Tensor:
            return self.denoiser(mine["x"], mine["t"], mine["s"], {k: mine[k] for k in cond})

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # the first one compiles
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            y = call()
        return graph, mine, y

    def __call__(self, x, t, s, cond) -> torch.Tensor:
        inputs = {"x": x, "t": t, "s": s, **cond}
        key = tuple((v.shape, v.dtype) for v in inputs.values())
        if key not in self.graphs:
            self.graphs[key] = self.capture(inputs, cond)
        graph, mine, y = self.graphs[key]
        for k, v in inputs.items():
            mine[k].copy_(v)
        graph.replay()
        return y.clone()


def step_inputs(denoiser: Denoiser, batch: int, device: str) -> tuple:
    """x, t, s, cond for a step of `batch` pictures."""
    family = denoiser.family
    shapes = family.cond_shapes(denoiser.net.config, family.tokens)
    x = torch.randn(batch, *denoiser.latent, device=device, dtype=torch.bfloat16)
    cond = {k: torch.randn(batch, *shape, device=device) for k, shape in shapes.items()}
    if family.told_sizes:
        cond["time_ids"] = encoders.square(FACTOR * denoiser.latent[1], batch).to(device)
    times = denoiser.path.grid(4, device)
    return x, times[0].expand(batch), times[1].expand(batch), cond


def nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def bench_model(args: argparse.Namespace) -> list[dict]:
    """Rows {"what", "impl", "median_ms", "q1_ms", "q3_ms", "compile_s", "peak_mb", "weights_mb"}, printed as a table."""
    rows, whole = [], args.device == "cuda" or args.model not in PARTS
    for part in [""] if whole else PARTS[args.model]:
        torch.compiler.reset()
        nets = dict(zip(("bf16", "ours"), networks(args, part), strict=True))
        if part:
            x = (), part_inputs(args.model, part)
        else:
            x = step_inputs(nets["bf16"], 1, args.device), {}
        large = whole and args.model in PARTS  # blocks are compiled one by one: the whole of one takes minutes
        graphed = Graphed if args.device == "cuda" else lambda denoiser: denoiser
        if args.compile and not large:
            fast = {name: torch.compile(net) if part else graphed(compiled_denoiser(net)) for name, net in nets.items()}
            nets |= {f"{name}_compiled": net for name, net in fast.items()}
        rows += timed(part or "one step", {k: lambda net=net: lambda: net(*x[0], **x[1]) for k, net in nets.items()}, nets, args)  # noqa: B023
        keep(rows, args)
        if whole:
            keep(rows := rows + throughput(nets, args), args)
        if args.compile and large:
            for net in nets.values():
                net.net.compile_repeated_blocks()
            nets |= {f"{name}_compiled": graphed(net) for name, net in nets.items()}
            calls = {k: lambda net=net: lambda: net(*x[0]) for k, net in nets.items() if k.endswith("compiled")}  # noqa: B023
            keep(rows := rows + timed("one step", calls, nets, args), args)
        if whole:
            keep(rows := rows + timed("a picture", generations(nets, args), nets, args), args)
    print("\n".join(model_table(rows)))
    print(f"\n{args.model}, rank {args.rank}; {about(args)}; median of {args.rounds} rounds")
    return rows


@torch.inference_mode()
def timed(what: str, builders: dict[str, Callable], nets: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    cuda = args.device == "cuda"
    calls, compile_s = prepare(builders, cuda)
    rows = []
    for name, times in interleave(calls, args.rounds, cuda).items():
        weights = nbytes(nets["ours" if name.startswith("ours") else "bf16"]) / 1e6  # a picture's rows have longer names
        graph = cuda and "_compiled" in name  # its memory was taken when it was made
        peak = None if graph else peak_growth(calls[name], cuda)
        row = {"what": what, "impl": name, **times, "compile_s": compile_s[name], "peak_mb": peak}
        rows.append(row | {"weights_mb": weights})
    return rows


@torch.inference_mode()
def generations(nets: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, Callable]:
    """Whole samplings of one picture: 4 steps of both, and 20 of the teacher, guided by two predictions a step (FLUX: one)."""
    x, _, _, cond = step_inputs(nets["bf16"], 1, args.device)
    suffix = "_compiled" if args.compile else ""
    dense, packed = nets["bf16" + suffix], nets["ours" + suffix]
    guided = dense if "flux" in args.model else tdpt.guided(dense, 5.0, {k: torch.zeros_like(v) for k, v in cond.items()})
    return {
        f"bf16{suffix}, 4 steps": lambda: lambda: tdpt.sample(dense, dense.path, x, cond, 4),
        f"ours{suffix}, 4 steps": lambda: lambda: tdpt.sample(packed, packed.path, x, cond, 4),
        f"bf16{suffix} teacher, 20 guided steps": lambda: lambda: tdpt.sample(guided, dense.path, x, cond, 20),
    }


@torch.inference_mode()
def throughput(nets: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    """Steps a second times pictures in a batch, not compiled as a whole; the batch is doubled until memory or the gain ends."""
    cuda, rows = args.device == "cuda", []
    for name in ("bf16", "ours"):
        net, best, batch = nets[name], None, 1
        while batch <= 256:
            inputs = step_inputs(net, batch, args.device)
            calls, _ = prepare({name: lambda: lambda: net(*inputs)}, cuda)  # noqa: B023
            if not calls:
                break  # out of memory
            times = interleave(calls, min(args.rounds, 5), cuda)[name]
            if best and times["median_ms"] / batch > 0.97 * best["median_ms"] / best["batch"]:
                break
            best = times | {"batch": batch, "peak_mb": peak_growth(calls[name], cuda)}
            batch *= 2
        if best:
            what = f"batch {best['batch']}: {1e3 * best.pop('batch') / best['median_ms']:.2f} pictures a second and step"
            rows.append({"what": what, "impl": name, **best, "compile_s": 0.0, "weights_mb": nbytes(net) / 1e6})
    return rows


def model_table(rows: list[dict]) -> list[str]:
    lines = [
        "| | implementation | ms | quartiles | times bf16 | weights MB | peak MB | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next((r["median_ms"] for r in rows if r["what"] == row["what"] and r["impl"].startswith("bf16")), None)
        speed = f"{base / row['median_ms']:.2f}" if base else "-"
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        times = f"{row['median_ms']:.1f} | {row['q1_ms']:.1f} .. {row['q3_ms']:.1f} | {speed}"
        lines.append(f"| {row['what']} | {row['impl']} | {times} | {row['weights_mb']:.1f} | {peak} | {row['compile_s']:.0f} |")
    return lines


SWEEPS = {  # (M, K, N, rank)
    "tokens": [(M, 1280, 1280, RANK) for M in (256, 512, 1024, 2048, 4096, 8192, 16384)],
    "width": [(512, K, K, RANK) for K in (640, 1280, 2560, 5120, 10240, 15360)],
    "rank": [(1024, 1280, 1280, r) for r in (0, 8, 16, 32, 64, 128)],
}


@torch.inference_mode()
def bench_costs(args: argparse.Namespace) -> list[dict]:
    """Rows {"sweep", "shape": [M, K, N], "rank", "impl", times}. The exponent is the slope of log time over log size; for the rank,
    the time of one more."""
    cuda, rows = args.device == "cuda", []
    for sweep, points in SWEEPS.items():
        for M, K, N, r in points:
            with torch.device("meta"):
                dense = nn.Linear(K, N)
                packed = W4A4Linear(dense, r)
            dense, packed = (fill(layer, args.device, torch.bfloat16) for layer in (dense, packed))
            set_backend(packed, "native")
            x = torch.randn(M, K, device=args.device, dtype=torch.bfloat16)
            calls, _ = prepare({"bf16": lambda: lambda: dense(x), "ours": lambda: lambda: packed(x)}, cuda)  # noqa: B023
            for name, times in interleave(calls, args.rounds, cuda).items():
                rows.append({"sweep": sweep, "shape": [M, K, N], "rank": r, "impl": name, **times})
            keep(rows, args)
    lines = ["| | M x K x N, rank | bf16 ms | ours ms | times bf16 |", "|---|---|---|---|---|"]
    for sweep in SWEEPS:
        points, of = measured(rows, sweep)
        for (M, K, N, r), dense, packed in zip(points, of["bf16"], of["ours"], strict=True):
            lines.append(f"| {sweep} | {M} x {K} x {N}, {r} | {dense:.2f} | {packed:.2f} | {dense / packed:.2f} |")
        bf16, ours = (slope(sizes(sweep, points), of[name], log=sweep != "rank") for name in ("bf16", "ours"))
        lines.append(f"| {sweep} | {'ms a rank' if sweep == 'rank' else 'exponent'} | {bf16:.3f} | {ours:.3f} | |")
    print("\n".join(lines))
    print(f"\n{about(args)}; median of {args.rounds} rounds")
    if args.plot:
        plot_costs(rows, Path(args.plot))
    return rows


def measured(rows: list[dict], sweep: str) -> tuple[list[tuple], dict[str, list[float]]]:
    """The points of a sweep that both sides have (memory may not have sufficed), and their times in ms."""
    ms = {(r["impl"], *r["shape"], r["rank"]): r["median_ms"] for r in rows if r["sweep"] == sweep}
    points = [point for point in SWEEPS[sweep] if ("bf16", *point) in ms and ("ours", *point) in ms]
    return points, {name: [ms[name, *point] for point in points] for name in ("bf16", "ours")}


def sizes(sweep: str, points: list[tuple]) -> list[int]:
    return [point[{"tokens": 0, "width": 1, "rank": 3}[sweep]] for point in points]


def slope(x: list[float], y: list[float], log: bool) -> float:
    """Least-squares slope of y over x, of their logarithms if `log`."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    x, y = (x.log(), y.log()) if log else (x, y)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def plot_costs(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(4 * len(SWEEPS), 3.5))
    for axis, sweep in zip(axes, SWEEPS, strict=True):
        for name in ("bf16", "ours"):
            points, of = measured(rows, sweep)
            value = slope(sizes(sweep, points), of[name], log=sweep != "rank")
            label = f"{name}, {value:.3f} ms a rank" if sweep == "rank" else f"{name}, exponent {value:.2f}"
            axis.plot(sizes(sweep, points), of[name], marker="o", label=label)
        if sweep != "rank":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.set_ylim(*((0, None) if sweep == "rank" else (None, None)))
        axis.set_xlabel(sweep)
        axis.set_ylabel("ms")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def bench_train(args: argparse.Namespace) -> list[dict]:
    """One update on an on-policy rollout of 4 jumps, by a LoRA of the 16-bit network and by that of the W4A4 one: same layers, same
    rank, float32 factors, the same reference. "update" is everything, "learner" without drawing the reference."""
    dense, packed = networks(args, "")
    fp = copy.deepcopy(dense)
    gen = torch.Generator().manual_seed(0)
    for name, layer in float_layers(dense.net).items():
        if dense.family.precision(name) != "16bit":
            dense.net.set_submodule(name, LoRA(layer, args.rank, gen).to(args.device))
    _, _, _, cond = step_inputs(fp, args.batch, args.device)
    x_T, edges = torch.randn(args.batch, *fp.latent, device=args.device), fp.path.grid(4, args.device)

    def update(learner: Denoiser, reference: bool) -> Callable:
        params = [p for name, p in learner.named_parameters() if "lora_" in name]
        for p in params:
            p.data = p.data.float()
            p.requires_grad_()
        optimizer, states = torch.optim.AdamW(params, lr=1e-6), tdpt.rollout_states(fp, fp.path, x_T, cond, edges)

        def call() -> None:
            z = tdpt.rollout_states(fp, fp.path, x_T, cond, edges) if reference else states
            with torch.enable_grad():
                for loss in tdpt.rollout_phases(learner, learner.path, z, cond, edges):
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    calls = {f"{name}, {what}": update(net, what == "update") for what in ("learner", "update")
             for name, net in (("fp LoRA", dense), ("W4A4", packed))}  # fmt: skip
    for call in calls.values():
        call(), call()
    rows = [{"what": name, **times} for name, times in interleave(calls, args.rounds, args.device == "cuda").items()]
    print(f"| {args.model}, batch {args.batch}, rank {args.rank} | fp LoRA ms | W4A4 ms | W4A4 / fp LoRA |\n|---|---|---|---|")
    for what, (dense, packed) in zip(("learner", "update"), (rows[:2], rows[2:]), strict=True):
        cells = [f"{r['median_ms']:.0f} ({r['q1_ms']:.0f} .. {r['q3_ms']:.0f})" for r in (dense, packed)]
        print(f"| {what} | {cells[0]} | {cells[1]} | {packed['median_ms'] / dense['median_ms']:.2f} |")
    print(f"\n{about(args)}; median of {args.rounds} rounds")
    return rows


def about(args: argparse.Namespace) -> str:
    cpu = f"{platform.machine()} CPU ({kernels.CPU.get('cpu_name')}), {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name() if args.device == 'cuda' else cpu}; torch {torch.__version__}"


def gpu_jobs(out: Path, runs: Path) -> dict[str, str]:
    """Name -> command of each part of `bench gpu`, the shortest first. Rows go to `out`, run folders to `runs`."""
    rows = {"kernels": "kernels", "tiny": "model --model tiny", "costs": "costs", "train": "train"}
    rows |= {model: f"model --model {model} --rounds 5 --lora-bits 8" for model in ("sdxl", "flux")}
    jobs = {"layers": "-m benchmarks.gpu_layers", "tests": "-m pytest -q -m gpu"}
    jobs |= {
        name: f"-m benchmarks.bench {job} --device cuda --json {shlex.quote(str(out))}/{name}.json" for name, job in rows.items()
    }
    for model in ("sdxl", "flux"):  # statistics, ranks, split, 20 updates, packing, reloading, 4 steps, all with random weights
        flags = f"--model {model} --weights random --steps 20 --batch 8 --calibration 8 --eval-n 4 --data {runs}/prompts.txt"
        jobs[f"train-{model}"] = f"train.py {flags} --out {runs}/{model}"
    return jobs


def bench_gpu(args: argparse.Namespace) -> list[str]:
    """What waits for a GPU, each part in a process of its own: one that fails or hangs leaves the others a clean device, what it
    printed is in NAME.txt. Last a line for each part."""
    with tempfile.TemporaryDirectory() as runs:  # gigabytes, of which nothing is kept
        prompts = "\n".join(f"{n} red houses by a river" for n in range(16))  # our own list takes minutes
        (Path(runs) / "prompts.txt").write_text(prompts)
        return run_parts(gpu_jobs(Path(args.out).resolve(), Path(runs)), args)


def run_parts(jobs: dict[str, str], args: argparse.Namespace) -> list[str]:
    """Those of `jobs` that --parts names, or all of them."""
    out, lines = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    if unknown := set(filter(None, args.parts.split(","))) - jobs.keys():
        raise UserError(f"--parts knows {', '.join(jobs)}, not {', '.join(sorted(unknown))}")
    for name, job in jobs.items():
        if args.parts and name not in args.parts.split(","):
            continue
        print(f"\n## python {job}\n", flush=True)
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
        with open(out / f"{name}.txt", "w") as file:
            argv, where = [sys.executable, *shlex.split(job)], Path(__file__).parents[1]
            about = dict(stdout=file, stderr=subprocess.STDOUT, cwd=where)
            try:
                end = f"exit code {subprocess.run(argv, **about, timeout=60 * args.minutes).returncode}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {args.minutes} minutes"
        text = (out / f"{name}.txt").read_text().splitlines()
        print("\n".join(text[-40:]))
        rows = json.loads((out / f"{name}.json").read_text()) if (out / f"{name}.json").exists() else []
        lines.append(f"{name:12} {end}: {summary(rows) if rows else text[-1] if text else ''}")
    print("\n## in short\n\n" + "\n".join(lines))
    return lines


def summary(rows: list[dict]) -> str:
    """The median of how many times as fast as its bf16 counterpart each implementation of ours was."""
    at = {(str(r.get("what") or r.get("shape")) + str(r.get("rank", "")), r.get("impl", "")): r["median_ms"] for r in rows}
    ratios = {}
    for (what, name), ms in at.items():
        dense = re.sub("ours(_compiled?)?", lambda found: "bf16_compiled" if found[1] else "bf16", name)
        if name.startswith("ours") and (what, dense) in at:
            ratios.setdefault(f"{name} / {dense}", []).append(at[what, dense] / ms)
    parts = [f"{name} {statistics.median(values):.2f}x ({len(values)})" for name, values in ratios.items()]
    return ", ".join(parts) or f"{len(rows)} rows"


def main(argv: list[str]) -> list:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    clis = {
        "kernels": commands.add_parser("kernels", allow_abbrev=False, help="layer shapes of SDXL and FLUX, ours against peers"),
        "model": commands.add_parser("model", allow_abbrev=False, help="denoisers, or on a CPU parts of them, 4-bit against bf16"),
        "train": commands.add_parser("train", allow_abbrev=False, help="an update of training, W4A4 against a LoRA at 16 bits"),
        "costs": commands.add_parser("costs", allow_abbrev=False, help="time over tokens, width and rank"),
    }
    for cli in clis.values():
        cli.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        cli.add_argument("--rounds", type=int, default=11)
        cli.add_argument("--json", default="")
    cli = clis["kernels"]
    cli.add_argument("--only", choices=("", "sdxl", "flux"), default="", help="shapes of one model")
    cli.add_argument("--impl", default="", help="implementations, by name, with commas")
    cli.add_argument("--quick", action="store_true")
    cli.add_argument("--plot", default="", metavar="PNG")
    cli = clis["model"]
    cli.add_argument("--model", choices=tuple(CONDITION), default="tiny")
    cli.add_argument("--rank", type=int, default=16)
    cli.add_argument("--lora-bits", type=int, choices=(8, 16), default=16, help="8: the form of SDXL's and FLUX's checkpoints")
    cli.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA, as CUDA graphs")
    cli = clis["train"]
    cli.set_defaults(lora_bits=16)
    cli.add_argument("--model", choices=tuple(CONDITION), default="tiny")
    cli.add_argument("--rank", type=int, default=16)
    cli.add_argument("--batch", type=int, default=32)
    clis["costs"].add_argument("--plot", default="", metavar="PNG")
    gpu = commands.add_parser("gpu", allow_abbrev=False, help="all of these on CUDA")
    gpu.add_argument("--out", default="benchmarks/gpu", help="folder for rows as JSON and what each part printed")
    gpu.add_argument("--parts", default="", help="some of " + ", ".join(gpu_jobs(Path(), Path())) + "; default all")
    gpu.add_argument("--minutes", type=float, default=60, help="a part may take")
    gpu.set_defaults(device="cuda", json="")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device: run kernels, model or costs with --device cpu")
    commands = {"kernels": bench_kernels, "model": bench_model, "train": bench_train, "costs": bench_costs, "gpu": bench_gpu}
    rows = commands[args.command](args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    run_script("benchmarks.bench", main)
