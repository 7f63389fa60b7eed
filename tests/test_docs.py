"""README.md: what it names exists, and its tables are those that the benchmarks wrote."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = (
    "train.py", "sample.py", "evaluate.py", "-m benchmarks.quality", "-m benchmarks.initialisation", "-m benchmarks.bench kernels",
    "-m benchmarks.bench model", "-m benchmarks.bench costs", "-m benchmarks.bench train", "-m models.pipeline",
    "-m models.memory", "-m benchmarks.faults",
)  # fmt: skip


def test_every_file_that_the_readme_names_exists():
    """Catches a file that was renamed or never committed."""
    names = set(re.findall(r"[\w./-]+\.(?:py|md|png|safetensors|txt)\b", README))
    names -= {"grid.png", "lora.safetensors", "style.safetensors", "model.safetensors", "start.safetensors"}  # of the user, of runs
    names = {name for name in names if not name.startswith(("runs/", "ByteDance/")) and not re.match(r"(NAME|FILE|KEY)\.", name)}
    missing = [name for name in names if not (ROOT / name).exists()]
    assert len(names) > 15 and not missing


def test_every_flag_that_the_readme_names_is_a_flag():
    """Catches a flag that was renamed or is gone."""
    env = {"COLUMNS": "200"}
    known = {"--nproc-per-node", "-m", "-q", "-r"}
    for script in SCRIPTS:
        done = subprocess.run(
            [sys.executable, *script.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True, env=env
        )
        known |= set(re.findall(r"--[\w-]+", done.stdout.split("options:")[1]))
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("[a-z]*.md")), ids=lambda file: file.name)
def test_the_tables_of_the_readme_are_those_of_the_benchmarks(file):
    """Catches a number that was typed, or is left from an earlier run."""
    table = file.read_text().strip()
    assert table.count("|") > 20 and table in README
