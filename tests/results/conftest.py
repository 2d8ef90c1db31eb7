"""Synthetic rows that the schema accepts, for every test of ``attnbench.results``."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from attnbench.results import schema
from attnbench.results.schema import Status

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


def _values(column: schema.Column) -> st.SearchStrategy[Any]:
    """Everything that the type of a column admits, with text of any alphabet."""

    def of(kind: pa.DataType) -> st.SearchStrategy[Any]:
        if pa.types.is_boolean(kind):
            return st.booleans()
        if pa.types.is_string(kind):
            return st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
        if pa.types.is_integer(kind):
            return st.integers(-(2**63), 2**63 - 1)
        width = 32 if kind == pa.float32() else 64
        return st.floats(allow_nan=False, allow_infinity=False, width=width)

    if pa.types.is_list(column.type):
        return st.lists(of(column.type.value_type), max_size=4)
    return of(column.type)


@pytest.fixture(scope="session")
def any_rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Lists of valid rows with arbitrary values in every column and distinct keys."""
    optional = {c.name: st.none() | _values(c) for c in schema.COLUMNS if not c.required}
    required = {c.name: _values(c) for c in schema.COLUMNS if c.required}
    anything = st.fixed_dictionaries({**required, **optional})

    def valid(row: dict[str, Any], status: Status) -> dict[str, Any]:
        row = {**row, "status": status.value, "reason": row["reason"] or "a reason"}
        if status != Status.OK:
            return schema.without_performance(row)
        return {**row, "time_us": row["time_us"] or 1.0, "metric_value": row["metric_value"] or 0.5}

    rows = st.builds(valid, anything, st.sampled_from(list(Status)))
    return st.lists(rows, max_size=4, unique_by=lambda row: (row["case_key"], row["block"]))
