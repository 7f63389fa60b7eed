"""docs/recipes.md: each diff is applied to a copy of the code and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import QUICK, weights  # noqa: F401  (weights is a fixture)

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
FLAGS = "--rollout 0 --targets ema,fp --ranks tails --hessian input"


@pytest.mark.slow
def test_recipes_apply_touch_at_most_two_files_and_run(weights, tmp_path):  # noqa: F811
    """Catches a recipe for code that has changed, and a change that needs more places than the page says."""
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__", "venv", ".venv"))
    assert len(DIFFS) == 2
    for name, diff in zip(("ema", "tails"), DIFFS, strict=True):
        assert f'"{name}"' in diff and 1 <= diff.count("\n+++ ") + diff.startswith("+++ ") <= 2
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    command = [sys.executable, "train.py", *QUICK.split(), *weights.split(), *FLAGS.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model.safetensors").exists()
