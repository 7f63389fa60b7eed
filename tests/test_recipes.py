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
FLAGS = {"ema": "--rollout 0 --targets ema,fp", "tails": "--ranks tails --hessian input --steps 0"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_recipe_applies_touches_at_most_two_files_and_runs(name, weights, tmp_path):  # noqa: F811
    """Catches a recipe for code that has changed, and a change that needs more places than the page says."""
    (diff,) = (diff for diff in DIFFS if f'"{name}"' in diff)
    assert 1 <= diff.count("\n+++ ") + diff.startswith("+++ ") <= 2
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__", "venv", ".venv"))
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *QUICK.split(), *weights.split(), *FLAGS[name].split(), "--out", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model.safetensors").exists()
