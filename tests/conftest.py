"""Deterministic property tests; tests marked `gpu` skip where there is none."""

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
