"""Layers of SDXL and FLUX on an NVIDIA GPU, ours against bf16: what the kernels take, not what Python takes to launch them.

    python -m benchmarks.gpu_layers            half a minute; its table of an H200 is docs/tables/gpu_layers.md

Both sides as CUDA graphs (triton.testing.do_bench_cudagraph, the median of its runs), on the same inputs; ours has a branch of rank
32, bias, unpacking and quantization in it. `prepare` is the first launch alone (backends/gpu.py), TOPS counts the rest."""

import torch

from backends import gpu
from backends.gpu import triton  # None where there is none
from benchmarks.bench import CUDA, Layer
from benchmarks.tables import markdown

SHAPES = [  # M, K, N as in bench.py; the last two are of two pictures
    ("linear", 8192, 1280, 1280), ("linear", 8192, 1280, 10240), ("linear", 1024, 1280, 10240), ("linear", 1024, 1280, 1280),
    ("linear", 1024, 5120, 1280), ("linear", 4096, 640, 5120), ("linear", 4096, 640, 640), ("linear", 4608, 15360, 3072),
    ("linear", 4608, 3072, 12288), ("linear", 4608, 3072, 3072), ("conv", 1024, 11520, 1280), ("conv", 8192, 5760, 640),
    ("conv", 32768, 2880, 320),
]  # fmt: skip


class First:
    """Stands for backends.gpu.prepare and remembers how it was launched last."""

    def __init__(self, kernel):
        self.kernel, self.again = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.again = lambda: self.kernel[grid](*args, **options)
            self.again()

        return launch


@torch.inference_mode()
def main() -> None:
    head = ["M x K x N", "ours, us", "bf16, us", "times bf16", "of it prepare", "TOPS of the rest", "error to eager"]
    print("\n".join(markdown(head)))
    first = gpu.prepare = First(gpu.prepare)
    for kind, M, K, N in SHAPES:
        layer = Layer(kind, M, K, N, "cuda")
        ours, eager, dense = (CUDA[name](layer) for name in ("ours", "ours_eager", "bf16"))
        y, oracle = ours().float(), eager().float()
        error = (y - oracle).norm() / oracle.norm()
        mine, its, before = (
            1e3 * triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median") for call in (ours, dense, first.again)
        )
        tops = 2 * M * K * N / (mine - before) / 1e6
        name = f"{'3x3 conv ' if kind == 'conv' else ''}{M} x {K} x {N}"
        print(f"| {name} | {mine:.1f} | {its:.1f} | {its / mine:.2f} | {before:.1f} | {tops:.0f} | {error:.1e} |", flush=True)
    print(f"\n{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
