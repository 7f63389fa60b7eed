"""Runs of the project's own commands for the tables of this folder: some at a time, finished ones not again."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.tables import ROOT

SVDQUANT = "--init svdquant --smooth 0.5 --no-rotate --no-centre --ranks uniform --rounding rtn"  # its start, in our number format
MACHINE = f"{platform.machine()} CPU, torch {torch.__version__}"


def parser(doc: str, out: str, n: int, what: str = "pictures of a score") -> argparse.ArgumentParser:
    """The flags that all tables have. what: help of --n."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default=out, type=lambda path: Path(path).resolve(), help="folder of the runs")
    parser.add_argument("--n", type=int, default=n, help=what)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each gets its share of the cores")
    return parser


def name_of(flags: str) -> str:
    """A folder's name for the flags of a run."""
    return "-".join(flags.replace("--", "").replace(",", "-").split()) or "default"


def each(function: Callable, items: Iterable, jobs: int) -> Iterator:
    """function(item, call) for all items, `jobs` at a time, results in order. call(script, *flags) runs one of our scripts."""
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}

    def call(script: str, *flags: str) -> None:
        done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{script} {' '.join(flags)} failed:\n{done.stderr[-2000:]}")

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda item: function(item, call), items)
