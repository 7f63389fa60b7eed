"""docs/recipes.md: each diff is applied to a copy of the code and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import QUICK, weights  # noqa: F401  (weights is a fixture)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
DIFFS = dict(zip(("ema", "tails", "quantease"), re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL), strict=True))
FLAGS = "--rollout 0 --targets ema,fp --ranks tails --hessian input"
NEW_ROUNDING = """
import torch
import quant, train
from benchmarks import ablate
from kernels import dequantize, pack

gen = torch.Generator().manual_seed(0)
w_OK, rows = torch.randn(32, 192, generator=gen), torch.randn(512, 192, generator=gen) @ torch.randn(192, 192, generator=gen)
H_KK = rows.mT @ rows / 512
found = {name: quant.quantize_weight(w_OK, H_KK=H_KK, rounding=name) for name in ("rtn", "quantease")}
e_OK = {name: w_OK - dequantize(pack(gw)) for name, gw in found.items()}
cost_O = {name: ((e @ H_KK) * e).sum(1) for name, e in e_OK.items()}
assert (found["quantease"].codes_OK != found["rtn"].codes_OK).float().mean() > 0.1, "it is another rounding"
assert (cost_O["quantease"] <= cost_O["rtn"]).all() and cost_O["quantease"].sum() < 0.7 * cost_O["rtn"].sum()
rows = {label: train.parse(flags.split()) for label, flags in ablate.GROUPS["split"].rows.items()}
assert [label for label, cfg in rows.items() if cfg.rounding == "quantease"] == ["coordinate descent (QuantEase)"]
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code, which recipes are applied to."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__", "venv", ".venv"))
    return folder


def apply(diff: str, folder: Path) -> dict[str, int]:
    """Lines that the diff adds to each file of the folder."""
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    parts = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    return {name: len(re.findall(r"^\+", part, re.MULTILINE)) for name, part in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.slow
def test_recipes_apply_touch_at_most_two_files_and_run(weights, copy, tmp_path):  # noqa: F811
    """Catches a recipe for code that has changed, and a change that needs more places than the page says."""
    for name, diff in DIFFS.items():
        assert f'"{name}"' in diff and 1 <= len(apply(diff, copy)) <= 2
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *QUICK.split(), *weights.split(), *FLAGS.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
def test_a_new_rounding_is_a_few_lines_in_one_file_and_a_row_of_the_grid(copy):
    """Catches a method that needs more than the page says, that rounds as before or worse, and a row that train.py refuses."""
    added = apply(DIFFS["quantease"], copy)
    assert added.pop("benchmarks/ablate.py") == 1
    ((file, lines),) = added.items()
    assert lines <= 25 and f"It touches two files: {lines} lines in `{file}`, and one line of the grid" in " ".join(PAGE.split())
    done = subprocess.run([sys.executable, "-c", NEW_ROUNDING], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
