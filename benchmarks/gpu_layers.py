"""Layers of SDXL and FLUX on an NVIDIA GPU, ours against bf16: what the kernels take, not what Python takes to launch them.

    python -m benchmarks.gpu_layers            half a minute; its table of an H200 is docs/tables/gpu_layers.md

Both sides as CUDA graphs (triton.testing.do_bench_cudagraph, the median of its runs), on the same inputs; ours has a branch of rank
32, bias, unpacking and quantization in it. `prepare` is the first launch alone (backends/gpu.py), TOPS counts the rest."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

import kernels
import quant
from backends import gpu

LINEAR = [  # M, K, N
    (8192, 1280, 1280), (8192, 1280, 10240), (1024, 1280, 10240), (1024, 1280, 1280), (1024, 5120, 1280), (4096, 640, 5120),
    (4096, 640, 640), (4608, 15360, 3072), (4608, 3072, 12288), (4608, 3072, 3072),
]  # fmt: skip
CONV = [(1, 1280, 1280, 32), (2, 640, 640, 64), (2, 320, 320, 128)]  # pictures, channels in and out, side
RANK = 32


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def random_weight(O: int, K: int, taps: int = 1) -> kernels.PackedWeight:
    codes, mult = (torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for n in (O * K // 2, O * K // 128))
    scale = quant.round_scale(torch.rand(O, device="cuda") / K**0.5 / 40)
    return kernels.PackedWeight(codes.view(O, -1), mult, scale, K // taps, taps, 64)


class First:
    """Stands for backends.gpu.prepare and remembers how it was launched last."""

    def __init__(self, kernel):
        self.kernel, self.again = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.again = lambda: self.kernel[grid](*args, **options)
            self.again()

        return launch


def row(name: str, operations: int, ours: Callable, eager: Callable, dense: Callable, first: First) -> str:
    y, oracle = ours().float(), eager().float()
    error = (y - oracle).norm() / oracle.norm()
    clock = lambda call: 1e3 * triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")  # noqa: E731
    mine, its, before = clock(ours), clock(dense), clock(first.again)
    tops = operations / (mine - before) / 1e6
    return f"| {name} | {mine:.1f} | {its:.1f} | {its / mine:.2f} | {before:.1f} | {tops:.0f} | {error:.1e} |"


@torch.inference_mode()
def main() -> None:
    print(
        "| M x K x N | ours, us | bf16, us | times bf16 | of it prepare | TOPS of the rest | error to eager |\n" + "|---" * 7 + "|"
    )
    first = gpu.prepare = First(gpu.prepare)
    for M, K, N in LINEAR:
        w, x, dense = random_weight(N, K), random(M, K), random(N, K, scale=K**-0.5)
        rest = random(N), random(RANK, K, scale=K**-0.5), random(N, RANK, scale=0.1)
        fns = (kernels.native(kernels.w4a4_linear), kernels.w4a4_linear)
        ours, eager = (lambda fn=fn: fn(x, w, *rest) for fn in fns)  # noqa: B023
        print(row(f"{M} x {K} x {N}", 2 * M * K * N, ours, eager, lambda: F.linear(x, dense, rest[0]), first), flush=True)  # noqa: B023
    for n, C, O, side in CONV:
        M, K = n * side**2, 9 * C
        x, dense = (t.contiguous(memory_format=torch.channels_last) for t in (random(n, C, side, side), random(O, C, 3, 3)))
        w, rest = random_weight(O, K, 9), (random(O), random(RANK, K, scale=K**-0.5), random(O, RANK, scale=0.1))
        fns = (kernels.native(kernels.w4a4_conv2d), kernels.w4a4_conv2d)
        ours, eager = (lambda fn=fn: fn(x, w, *rest) for fn in fns)  # noqa: B023
        its = lambda: F.conv2d(x, dense, rest[0], padding=1)  # noqa: E731, B023
        print(row(f"3x3 conv {M} x {K} x {O}", 2 * M * K * O, ours, eager, its, first), flush=True)
    print(f"\n{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
