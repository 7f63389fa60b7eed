"""Deterministic property tests; tests marked `gpu` skip where there is none. With `-n 2` two processes share the files of tests and
the cores: two programs that each ask for all of these would wait for one another."""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # before torch is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "cmquant", derandomize=True, deadline=None, print_blob=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cmquant")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
