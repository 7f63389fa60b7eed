"""Speed and error of the kernels on SDXL's and FLUX's layer shapes, against what a user would run instead.

    python bench.py kernels                          every shape, every implementation that is installed (minutes)
    python bench.py kernels --quick                  two shapes, under a minute
    python bench.py kernels --json rows.json --plot benchmarks/kernels.png

One process, the same tensors for all: rounds in which every implementation runs once, in turn, after a warm-up that also pays
for compilation (`compile_s` of --json). Median and quartiles over rounds. Ours includes quantizing the activations,
unpacking the weight and a branch of rank 32; bf16 has no branch. Peers: pip install -r requirements-bench.txt; what is missing
or refuses a shape is named, and the table goes on without it. (gemlite, for CUDA, is not in that file: it is built from source.)

    GOPS      2 M K N / median, the branch not counted
    ceiling   the int8 product alone, int8 operands at hand and int32 output (`int8_ceiling`): its share is ours / ceiling
    error     |y - y64| / |y64|, y64 = x W^T + bias in float64 with unquantized operands; Gaussian weights and inputs
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hgs_lora
import kernels
import models
import quant
from models import UserError

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
        packed = hgs_lora.W4A4Conv2d if kind == "conv" else hgs_lora.W4A4Linear
        self.packed = packed.from_float(self.float, gw, S.sqrt()[:, None] * V.T, U * S.sqrt()).requires_grad_(False)
        self.W8 = kernels.weight_int8(self.packed.packed)
        self.X8 = torch.randint(-128, 113, (M, K), dtype=torch.int8, device=device)
        self.float, self.x = self.float.to(dtype), self.x.to(dtype)

    def _double(self) -> torch.Tensor:
        layer = self.float
        w, b, x = layer.weight.double(), layer.bias.double(), self.x.double()
        return F.linear(x, w, b) if self.kind == "linear" else F.conv2d(x, w, b, padding=1)

    def error(self, y: torch.Tensor) -> float | None:
        if y.shape != self.reference.shape:
            return None  # the ceiling's integers
        return float((y.double() - self.reference).norm() / self.reference.norm())

    def module(self) -> nn.Module:
        """A fresh copy of the float layer, for a peer to convert."""
        return nn.Sequential(copy.deepcopy(self.float))


# ------------------------------------------------------------------------------------------------ implementations
# name -> function(layer) -> callable; it may raise anything: then the row says why. Change this to add yours.


def ours(layer: Layer, backend: str) -> Callable:
    if backend == "native" and not kernels.load_native():
        raise RuntimeError("kernels.cpp cannot be built here")
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


def sdnq(layer: Layer, dtype: str, openvino: bool = False) -> Callable:
    import sdnq.kernel_wrappers as wrappers
    from sdnq import SDNQConfig, sdnq_quantize_layer

    if openvino and wrappers.openvino_int_mm is None:
        raise RuntimeError("openvino is not installed")
    conv = layer.kind == "conv"
    config = SDNQConfig(weights_dtype=dtype, use_quantized_matmul=True, quant_conv=conv, use_quantized_matmul_conv=conv)
    module, _ = sdnq_quantize_layer(layer.module()[0], config, torch_dtype=layer.dtype)
    engine = wrappers.openvino_int_mm if openvino else None

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
    from gemlite.helper import A8W4_HQQ_INT8_dynamic

    module = A8W4_HQQ_INT8_dynamic(device=str(layer.x.device)).from_linear(layer.module()[0])
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
    "torchao_int4": lambda layer: torchao(layer, lambda q: q.Int4WeightOnlyConfig(int4_packing_format="plain_int32")),
    "bnb_nf4": bitsandbytes,
}
CUDA = {k: v for k, v in CPU.items() if k not in ("ours", "ours_compile", "sdnq_uint4_openvino", "torchao_int4")} | {
    "ours": lambda layer: ours(layer, "compile"),
    "torchao_int4": lambda layer: torchao(layer, lambda q: q.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")),
    "torchao_fp8": lambda layer: torchao(layer, lambda q: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow())),
    "gemlite_a8w4": gemlite,
}


# ------------------------------------------------------------------------------------------------ measuring


def clock(fn: Callable, cuda: bool) -> tuple[float, torch.Tensor]:
    """(seconds, result) of one call."""
    if not cuda:
        start = time.perf_counter()
        y = fn()
        return time.perf_counter() - start, y
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    y = fn()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, y


@torch.inference_mode()
def measure(layer: Layer, implementations: dict[str, Callable], rounds: int, cuda: bool) -> list[dict]:
    """Rows of one shape. Implementations that cannot run it are printed with their reason and left out."""
    calls, rows = {}, {}
    for name, build in implementations.items():
        try:
            call = build(layer)
            first, y = clock(call, cuda)
            second, _ = clock(call, cuda)
        except Exception as error:  # a peer's error is its own, and no reason to lose the others' times
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}", file=sys.stderr)
            continue
        calls[name] = call
        rows[name] = {"kind": layer.kind, "shape": layer.shape, "impl": name, "error": layer.error(y)}
        rows[name]["compile_s"] = max(0, first - second)
        del y
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(1e3 * clock(call, cuda)[0])
    for name, row in rows.items():
        q1, median, q3 = statistics.quantiles(times[name], n=4, method="inclusive")
        row |= {"median_ms": median, "q1_ms": q1, "q3_ms": q3}
        M, K, N = layer.shape
        row["gops"] = 2e-6 * M * K * N / median
    return list(rows.values())


def table(rows: list[dict]) -> list[str]:
    """Markdown: a line per shape and implementation."""
    lines = [
        "| layer | M x K x N | implementation | ms | quartiles | GOPS | of the int8 ceiling | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ceilings = {(row["kind"], row["shape"]): row["median_ms"] for row in rows if row["impl"] == "int8_ceiling"}
    for row in rows:
        ceiling = ceilings.get((row["kind"], row["shape"]))
        share = f"{100 * ceiling / row['median_ms']:.0f}%" if ceiling else "-"
        error = "-" if row["error"] is None else f"{row['error']:.4f}"
        times = f"{row['median_ms']:.2f} | {row['q1_ms']:.2f} .. {row['q3_ms']:.2f}"
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['kind']} | {shape} | {row['impl']} | {times} | {row['gops']:.0f} | {share} | {error} |")
    return lines


def plot(rows: list[dict], file: Path) -> None:
    """Speed relative to bf16, one group of bars per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes, names = list(dict.fromkeys((r["kind"], r["shape"]) for r in rows)), list(dict.fromkeys(r["impl"] for r in rows))
    at = {(r["kind"], r["shape"], r["impl"]): r["median_ms"] for r in rows}
    figure, axis = plt.subplots(figsize=(max(8, 2 * len(shapes)), 4))
    for k, name in enumerate(names):
        bars = [(s, at[*shape, "bf16"] / at[*shape, name]) for s, shape in enumerate(shapes) if (*shape, name) in at]
        axis.bar([s + 0.8 * k / len(names) for s, _ in bars], [v for _, v in bars], 0.8 / len(names), label=name)
    axis.axhline(1, color="black", linewidth=0.5)
    names_of_shapes = [f"{kind}\n{'x'.join(map(str, shape))}" for kind, shape in shapes]
    axis.set_xticks([s + 0.4 for s in range(len(shapes))], names_of_shapes, fontsize=7)
    axis.set_ylabel("times as fast as bf16")
    axis.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def bench_kernels(args: argparse.Namespace) -> None:
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
        rows += measure(Layer(kind, M, K, N, args.device, torch.bfloat16), chosen, args.rounds, cuda)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))
    cpu = f"{platform.machine()} CPU ({kernels.CPU.get('cpu_name')}), {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if cuda else cpu
    print("\n".join(table(rows)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{device}; torch {torch.__version__}; median of {args.rounds} rounds; peak memory {peak:.1f} GB")
    if args.plot:
        plot(rows, Path(args.plot))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cli = commands.add_parser("kernels", allow_abbrev=False, help="layer shapes of SDXL and FLUX, ours against peers")
    cli.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--rounds", type=int, default=11)
    cli.add_argument("--only", choices=("", "sdxl", "flux"), default="", help="shapes of one model")
    cli.add_argument("--impl", default="", help="implementations, by name, with commas")
    cli.add_argument("--quick", action="store_true")
    cli.add_argument("--json", default="")
    cli.add_argument("--plot", default="", metavar="PNG")
    bench_kernels(parser.parse_args(argv))


if __name__ == "__main__":
    models.run_script("bench.py", main)
