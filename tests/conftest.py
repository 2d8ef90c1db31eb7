"""Test-wide settings: Triton is interpreted, one thread computes, no test depends on the order of others."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from attnbench.results import schema
from attnbench.results.schema import Status


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


MakeRow = Callable[..., dict[str, Any]]
IDENTITY = (
    "mechanism",
    "backend",
    "pattern",
    "workload",
    "n",
    "m",
    "dtype",
    "direction",
    "device",
    "scope",
    "hyper",
    "seed",
)


def _make_row(**changes: Any) -> dict[str, Any]:
    """A valid row. Any column can be changed; ``samples_us`` and what follows from it come from ``time_us``,
    ``case_key`` from the columns that identify a case, and a status other than ok drops performance.
    """
    row: dict[str, Any] = {
        "run_id": "run-a",
        "block": 0,
        "suite": "ops",
        "preset": "tiny",
        "mechanism": "softmax",
        "backend": "sdpa_flash",
        "family": "dense",
        "exact": True,
        "pattern": "NS",
        "workload": "bert_base",
        "batch": 2,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "grid": [],
        "n": 256,
        "dtype": "float32",
        "direction": "fwd",
        "scope": "op",
        "hyper": "{}",
        "input_dist": "gaussian",
        "seed": 0,
        "device": "cpu",
        "status": "ok",
        "flags": [],
        "started_at": "2026-11-24T10:00:00+00:00",
        "duration_s": 1.5,
        "time_kind": "cpu_hot",
        "attnbench_version": "0.1.0",
        "commit": "f5f9884",
        "measurement_version": 1,
        "software_key": "5of7ware",
        "environment": json.dumps({"cpu": "test"}),
        **changes,
    }
    row.setdefault("m", row["n"])
    row.setdefault("impl", f"{row['mechanism']}/{row['backend']}")
    key = json.dumps([row[name] for name in IDENTITY] + [row.get("task")])
    row.setdefault("case_key", hashlib.sha256(key.encode()).hexdigest()[:16])
    if row["status"] != Status.OK:
        row.setdefault("reason", f"it ended as {row['status']}")
        return schema.without_performance(row)
    if row["scope"] != "task":
        _measured(row)
    return row


def _measured(row: dict[str, Any]) -> None:
    time_us = row.setdefault("time_us", 100.0)
    row.setdefault("samples_us", [time_us * f for f in (0.98, 0.99, 1.0, 1.01, 1.03)])
    row.setdefault("n_samples", len(row["samples_us"]))
    row.setdefault("mem_peak_bytes", 4 * row["n"] * row["n"])
    row.setdefault("roofline_us", 1.0)
    row.setdefault("err_rms", 3e-7)


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    return _make_row
