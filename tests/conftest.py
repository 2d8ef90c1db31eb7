"""Test-wide settings: Triton is interpreted, one thread computes, no test depends on the order of others."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch
    from torch.utils._device import _device_constructors

    _device_constructors()  # cached at its first call, which must not be while a test patches torch.empty
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(absent)
