"""Mutation check: breaks central lines one at a time in a copy of the code and shows that a test fails for each.

python tests/mutate.py          (minutes; not collected by pytest; Triton 3.8 has to be there for those of kernels_triton)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTATIONS = [  # what breaks, file, line as it is, line as broken, test file that must notice
    ("sign of the zero point", "kernels.py", ".to(torch.int8) - ZERO", ".to(torch.int8) + ZERO", "kernels"),
    ("nibble order", "kernels.py", "return low | high << 4", "return high | low << 4", "kernels"),
    ("more columns than are exact", "kernels.py", "EXACT = 1024", "EXACT = 4096", "kernels"),
    ("tap order of im2col", "kernels.py", "windows.permute(0, 1, 2, 4, 5, 3)", "windows.permute(0, 1, 2, 5, 4, 3)", "kernels"),
    ("nibbles of kernels.cpp", "kernels.cpp", "k = nibbles<0>(p, table", "k = nibbles<4>(p, table", "kernels"),
    ("stale scratch memory", "kernels.cpp", "std::fill_n(row_B, LANES * R, Low(0.f));", "", "kernels"),
    ("transposed GPTQ factor", "quant.py", "H = H.flip(0, 1)  # R", "H = H.flip(0, 1).t()", "quant"),
    ("one row overwrites its weight", "quant.py", "clone(memory_format=torch.contiguous_format)", "contiguous()", "quant"),
    ("one step of subspace iteration", "hgs_lora.py", "for _ in range(4):", "for _ in range(1):", "hgs_lora"),
    ("clip range one step short", "quant.py", "MMAX, ZERO = -8, 7, 16, 8", "MMAX, ZERO = -8, 6, 16, 8", "quant"),
    ("transposed Cholesky factor", "hgs_lora.py", "cholesky(self.H_KK)", "cholesky(self.H_KK).mT", "hgs_lora"),
    ("gradients' factor transposed", "hgs_lora.py", "else no_influence).mT", "else no_influence)", "hgs_lora"),
    ("activation noise of the branch", "hgs_lora.py", "[Q_OK * noise_K.sqrt()]", "[E_OK * noise_K.sqrt()]", "hgs_lora"),
    ("gradients averaged over rows", "hessian.py", "total_OO.add_(moments(", "total_OO.add_(len(g) ** -0.5 * moments(", "hessian"),
    ("anchor is the moving LoRA", "hgs_lora.py", "if self.use_anchor", "if not self.use_anchor", "hgs_lora"),
    ("tap order of the Hessian", "hessian.py", "permute(0, 1, 2, 4, 5, 3)", "permute(0, 1, 2, 5, 4, 3)", "hessian"),
    ("budget counts O only", "qra.py", "ranks[name] * (O + K) for", "ranks[name] * O for", "qra"),
    ("phase edge off by one", "tdpt.py", "(edges >= t[:, None]).sum(1)", "(edges > t[:, None]).sum(1)", "tdpt"),
    ("T' belongs to the late stage", "tdpt.py", "early_B = t >= split_time", "early_B = t > split_time", "tdpt"),
    ("guidance convention", "tdpt.py", "return u + w * (c - u)", "return c + w * (c - u)", "tdpt"),
    ("resume forgets the moments", "checkpoint.py", ".to(p.device, copy=True)", ".mul(0)", "train"),
    ("an update of half of its pictures", "checkpoint.py", "        if self.given_up:\n            return\n", "", "train"),
    ("choices without the start", "pretrained.py", "world, teacher, statistics)", "world, teacher, 0)", "real"),
    ("guidance of the student", "models.py", 'about.get("guidance", denoiser.guidance)', "denoiser.guidance", "real"),
    ("weights that changed", "pretrained.py", 'b"".join(ends)', 'b""', "real"),
    ("one share for all ranks", "train.py", "cache = network.path, slice(rank()", "cache = network.path, slice(0", "train"),
    ("share of a micro-batch", "train.py", "len(rows) * world() / cfg.batch", "1.0", "real"),
    ("statistics of one process only", "hessian.py", "dist.is_initialized() and dist.get_world_size() > 1", "False", "hessian"),
    ("scale and alpha of a LoRA file", "pretrained.py", "B.float() * scale", "B.float()", "real"),
    ("alpha of a LoRA's metadata", "pretrained.py", ", metadata=about)", ")", "pretrained"),
    ("guidance of a network without it", "train.py", 'if network.name == "flux"', "if network.guidance", "pretrained"),
    ("a cost of nothing", "hgs_lora.py", "max(c, 1e-12) * H_K", "c * H_K", "hgs_lora"),
    ("windows that overlap", "kernels.py", "windows.contiguous().view", "windows.view", "kernels"),
    ("shards of all ranks by each", "cache.py", "k % world == rank and not", "not", "cache"),
    ("one noise for all shards", "cache.py", "data.step_generator(0, k, stream=4)", "torch.Generator()", "cache"),
    ("first step of the pipeline", "pipeline.py", 'timestep_spacing="trailing"', 'timestep_spacing="leading"', "pipeline"),
    ("checksum skips the tail", "integrity.py", "while chunk := file.read(CHUNK):", "while chunk := b'':", "faults"),
    ("order of a GPU's nibbles", "kernels_triton.py", "u >> high * 4", "u >> 4 - high * 4", "kernels_triton"),
    ("a GPU's branch of the last part", "kernels_triton.py", "a += tl.load(low", "a = tl.load(low", "kernels_triton"),
    ("a GPU's GPTQ feeds back the error", "gptq_triton.py", "w -= u[:, :, None]", "w += u[:, :, None]", "kernels_triton"),
    ("damaged state becomes the previous", "checkpoint.py", "self.good = path == self.path", "self.good = True", "faults"),
]  # fmt: skip


def main() -> None:
    missed = []
    for what, name, line, broken, test in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "code"
            shutil.copytree(
                ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__", "venv", ".venv")
            )
            code = (copy / name).read_text()
            if code.count(line) < 1:
                sys.exit(f"mutate.py: {name} has no line {line!r} any more: update MUTATIONS")
            (copy / name).write_text(code.replace(line, broken))
            job = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/test_{test}.py"]
            done = subprocess.run(job, cwd=copy, capture_output=True, text=True)
        noticed = done.returncode == 1
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        print(f"{'noticed' if noticed else 'MISSED ':8} {name:14} {what:32} {last}", flush=True)
        missed += [] if noticed else [what]
    print(f"{len(MUTATIONS) - len(missed)} of {len(MUTATIONS)} mutations make a test fail")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
