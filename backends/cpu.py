"""Builds cpu.cpp and attention.cpp for the CPU of this machine, once, and calls the first (attention.py calls the second).

The compiler runs for some 20 seconds on the first use; its library is kept in ~/.cache/cmquant (XDG_CACHE_HOME moves it) under a
name that hashes whatever it depends on: the source, the compiler and its flags, the version of torch, and the units of the CPU,
because machines with other CPUs may share a home. Several processes may build at once, and one that is killed leaves nothing that
others would wait for: each builds in a folder of its own and renames the result.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

CPU = getattr(torch.cpu, "get_capabilities", dict)()  # units of this machine by name; {} before torch has the list
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fopenmp", "-std=c++20", "-fPIC", "-shared"]


@functools.cache
def is_available() -> bool:
    """Whether the kernels are there; builds and loads them if they are not. False on other CPUs than x86 with AVX2, and, after one
    warning, where they cannot be built."""
    if not all(CPU.get(unit) for unit in ("avx2", "fma3", "f16c")):
        return False
    try:
        torch.ops.load_library(_library())
    except (OSError, ImportError, ValueError, subprocess.CalledProcessError) as error:
        lines = getattr(error, "stderr", "").splitlines()
        why = next((line for line in lines if "error" in line), error)
        warnings.warn(f"the C++ kernels were not built, the slower eager kernels run ({why})", stacklevel=2)
        return False
    torch.library.register_fake("cmquant::w4a4", _empty)
    torch.library.register_fake("cmquant::attention", lambda q, k, v, mask, scale: q.new_empty(q.transpose(1, 2).shape))
    return True


def source() -> str:
    """The C++ code, two files as one. OSError if they are not there."""
    return "".join(Path(__file__).with_name(name).read_text() for name in ("cpu.cpp", "attention.cpp"))


def _library() -> Path:
    """The built library. OSError, CalledProcessError, ImportError or ValueError where it cannot be built."""
    compiler, code = shlex.split(os.environ.get("CXX", "c++")), source()
    about = (code, compiler, FLAGS, torch.__version__, sorted(CPU.items()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cmquant")
    library = folder / f"kernels-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        from torch.utils import cpp_extension  # a slow import, needed to build only

        folder.mkdir(parents=True, exist_ok=True)
        torch_paths = [f"-I{path}" for path in cpp_extension.include_paths()]
        torch_paths += [f"-L{path}" for path in cpp_extension.library_paths()]
        with tempfile.TemporaryDirectory(dir=folder) as own:
            Path(own, "cpu.cpp").write_text(code)
            command = [*compiler, *FLAGS, *torch_paths, f"{own}/cpu.cpp", "-o", f"{own}/kernels.so", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(f"{own}/kernels.so", library)
    return library


def _empty(x_NHWC: Tensor, codes_OP: Tensor, *others) -> Tensor:
    """Memory for what w4a4 returns; the last three of its arguments are kernel, stride and padding."""
    size = [(n + 2 * pad - kernel) // stride + 1 for n, kernel, stride, pad in zip(x_NHWC.shape[1:3], *others[-3:], strict=True)]
    return x_NHWC.new_empty(x_NHWC.shape[0], *size, codes_OP.shape[0])


def w4a4(
    x_NHWC: Tensor, codes_OP: Tensor, mult_P: Tensor, scale_O: Tensor, bias: Tensor | None, lora_A_rK: Tensor | None,
    lora_B_Or: Tensor | None, inv_smooth_I: Tensor | None, shift_I: Tensor | None, group: int, group_x: int, rotated: bool,
    per_sample: bool, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
) -> Tensor:  # fmt: skip
    """(N, H, W, I) -> (N, H', W', O) in x's dtype, as kernels.w4a4_conv2d (one scale per sample of x) and, where per_sample is
    False, as kernels.w4a4_linear of N rows that are pictures of one pixel. codes, mult, scale, group: a kernels.PackedWeight."""
    bias, inv_smooth_I, shift_I = (None if t is None else t.detach().float().contiguous() for t in (bias, inv_smooth_I, shift_I))
    A, B = (None if t is None else t.detach().to(x_NHWC.dtype).contiguous() for t in (lora_A_rK, lora_B_Or))
    operands, numbers = (codes_OP, mult_P, scale_O, bias, A, B, inv_smooth_I, shift_I), (group, group_x, rotated, per_sample)
    return torch.ops.cmquant.w4a4(x_NHWC.contiguous(), *operands, *numbers, kernel_size, stride, padding)
