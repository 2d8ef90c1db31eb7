"""Checks of result files before they are published: everything that is wrong, one line each.

Reading refuses what cannot be understood; this looks for rows that can be read and cannot be true.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from attnbench.errors import UsageError
from attnbench.results import schema, stats
from attnbench.results.merge import differing
from attnbench.results.rows import Row, misfits
from attnbench.results.schema import Status
from attnbench.results.sources import Part, Paths, locate, read_part

IDENTITY: Final = (
    *("mechanism", "backend", "pattern", "workload", "batch", "heads", "kv_heads", "head_dim", "grid"),
    *("n", "m", "dtype", "direction", "scope", "hyper", "seed", "device"),
)
"""Columns that a case key stands for."""

CHOICES: Final[dict[str, frozenset[str]]] = {
    "pattern": frozenset({"NS", "CS", "NC", "CC"}),
    "dtype": frozenset({"float32", "float16", "bfloat16", "float64"}),
    "direction": frozenset({"fwd", "fwd_bwd", "train"}),
    "scope": frozenset({"op", "layer", "task"}),
    "family": frozenset({"dense", "linear", "sparse", "vision", "cross", "user", "control"}),
    "time_kind": frozenset({"device_cold", "cpu_hot"}),
    "mem_method": frozenset({"allocator", "profiler"}),
    "truth_dtype": frozenset({"float64", "float32"}),
    "metric_better": frozenset({"lower", "higher"}),
}
SIGNED: Final = frozenset(
    {
        *("metric_value", "seed", "cosine", "approx_cosine_gaussian"),
        *("approx_cosine_structured", "approx_cosine_recorded"),
    }
)
"""Numeric columns that may be negative; a cosine is checked against [-1, 1]."""

POSITIVE: Final = frozenset(
    {
        "batch",
        "heads",
        "kv_heads",
        "head_dim",
        "n",
        "m",
        "time_us",
        "n_samples",
        "loops",
        "measurement_version",
    }
)
ASCENDING: Final = (
    ("min_us", "p5_us", "p25_us", "time_us", "p75_us", "p95_us"),
    ("time_lo_us", "time_us", "time_hi_us"),
)
ROUNDING: Final = 1e-5
"""Relative tolerance between a number and the float32 samples that it was computed from."""


@dataclass(frozen=True)
class Problem:
    """One finding: an ``error`` must not be published, a ``warning`` deserves a look.

    ``where`` locates the row; it is empty when the whole file is meant.
    """

    severity: Literal["error", "warning"]
    path: Path
    where: str
    message: str

    def __str__(self) -> str:
        place = f"{self.path}, {self.where}" if self.where else str(self.path)
        return f"{self.severity}: {place}: {self.message}"


def validate(paths: Paths) -> list[Problem]:
    """Everything that is wrong with some results, files in the order given; empty when nothing is.

    Raises UsageError only for paths that do not exist or hold no results: what cannot be read is a finding.
    """
    problems: list[Problem] = []
    parts: list[Part] = []
    for path in locate(paths):
        try:
            parts.append(read_part(path))
        except UsageError as error:
            problems.append(Problem("error", path, "", str(error)))
    for part in parts:
        for index, row in enumerate(part.rows):
            problems += [Problem(s, part.path, part.locator(index), m) for s, m in check_row(row)]
    return [*problems, *_duplicates(parts), *_inconsistent_keys(parts)]


Finding = tuple[Literal["error", "warning"], str]


def check_row(row: Row) -> list[Finding]:
    """(severity, message) of everything that is wrong with one row by itself."""
    wrong = [*schema.problems(row), *misfits(row)]
    if wrong:
        return [("error", text) for text in wrong]
    return [found for check in ROW_CHECKS for found in check(row)]


# ---- one row -------------------------------------------------------------------------------------------


def _choices(row: Row) -> Iterator[Finding]:
    for name, known in CHOICES.items():
        if row[name] is not None and row[name] not in known:
            yield "error", f"{name}: observed {row[name]!r}, expected one of {', '.join(sorted(known))}"
    if row["impl"] != f"{row['mechanism']}/{row['backend']}":
        yield "error", f"impl: observed {row['impl']!r}, expected {row['mechanism']}/{row['backend']}"
    if (row["scope"] == "task") != (row["direction"] == "train") and row["direction"] is not None:
        yield "error", f"scope {row['scope']} with direction {row['direction']}: only a task is trained"


def _ranges(row: Row) -> Iterator[Finding]:
    for column in schema.COLUMNS:
        value = row[column.name]
        numeric = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        if value is None or not numeric:
            continue
        if column.name in POSITIVE and value <= 0:
            yield "error", f"{column.name}: observed {value}, expected more than 0"
        elif column.name not in SIGNED and value < 0:
            yield "error", f"{column.name}: observed {value}, expected 0 or more"
        elif "cosine" in column.name and abs(value) > 1.0 + 1e-6:
            yield "error", f"{column.name}: observed {value}, expected a cosine in [-1, 1]"
    if any(sample <= 0.0 for sample in row["samples_us"] or ()):
        yield "error", "samples_us: observed a sample of no or negative duration"


def _order(row: Row) -> Iterator[Finding]:
    for names in ASCENDING:
        known = [(name, row[name]) for name in names if row[name] is not None]
        for (a, x), (b, y) in itertools.pairwise(known):
            if x > y * (1.0 + ROUNDING):
                yield "error", f"{a} {x:g} is more than {b} {y:g}"


def _samples(row: Row) -> Iterator[Finding]:
    """The headline must follow from the samples: a number edited by hand does not."""
    samples = row["samples_us"]
    if row["status"] != Status.OK or row["scope"] == "task":
        return
    if not samples:
        yield "warning", "samples_us is empty: the headline cannot be checked"
        return
    if row["n_samples"] != len(samples):
        yield (
            "error",
            f"n_samples: observed {row['n_samples']}, expected {len(samples)}, the samples there are",
        )
    median = stats.quantile(samples, 0.5)
    if not math.isclose(row["time_us"], median, rel_tol=ROUNDING):
        yield "error", f"time_us: observed {row['time_us']:g}, expected {median:g}, the median of samples_us"


def _physics(row: Row) -> Iterator[Finding]:
    time, bound = row["time_us"], row["roofline_us"]
    if time is None or bound is None or time >= bound:
        return
    known = any(flag.startswith("faster_than_physics") for flag in row["flags"] or ())
    severity: Literal["error", "warning"] = "warning" if known else "error"
    yield severity, f"faster_than_physics: observed {time:g} µs, expected at least {bound:g} µs (roofline_us)"


def _json(row: Row) -> Iterator[Finding]:
    for name in ("hyper", "environment", "tuned_config"):
        if row[name] is None:
            continue
        try:
            value = json.loads(row[name])
        except (ValueError, RecursionError):
            yield "error", f"{name}: observed {row[name][:40]!r}, expected JSON"
            continue
        if not isinstance(value, dict) or (name == "environment" and not value):
            yield "error", f"{name}: observed {row[name][:40]!r}, expected a JSON object with its settings"


def _time_stamp(row: Row) -> Iterator[Finding]:
    text = row["started_at"]
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        yield "error", f"started_at: observed {text!r}, expected an ISO 8601 time"
        return
    if offset != timedelta(0):
        yield "error", f"started_at: observed {text!r}, expected UTC, as +00:00"


def _provenance(row: Row) -> Iterator[Finding]:
    if row["commit"] is not None and row["commit"].endswith("+dirty"):
        yield "warning", f"commit {row['commit']}: measured with local changes, nobody can repeat it"
    if row["measurement_version"] != schema.MEASUREMENT_VERSION:
        yield (
            "warning",
            f"measurement_version {row['measurement_version']} is not compared with "
            f"{schema.MEASUREMENT_VERSION}, the current one",
        )


ROW_CHECKS: Final[tuple[Callable[[Row], Iterator[Finding]], ...]] = (
    *(_choices, _ranges, _order, _samples, _physics, _json, _time_stamp, _provenance),
)


# ---- between rows --------------------------------------------------------------------------------------


def _duplicates(parts: Sequence[Part]) -> Iterator[Problem]:
    first: dict[tuple[Any, ...], tuple[Part, int]] = {}
    for part in parts:
        for index, row in enumerate(part.rows):
            key = tuple(row[name] for name in schema.KEY)
            there, at = first.setdefault(key, (part, index))
            if None in key or (there is part and at == index):
                continue
            names = differing(there.rows[at], row)
            place = f"{there.path}, {there.locator(at)}"
            if names:
                message = f"the same measurement as {place} with different values: {', '.join(names)}"
                yield Problem("error", part.path, part.locator(index), message)
            else:
                message = f"the same row as {place}; merge keeps one"
                yield Problem("warning", part.path, part.locator(index), message)


def _inconsistent_keys(parts: Sequence[Part]) -> Iterator[Problem]:
    """A case key must stand for one set of identity columns, and these for one key; null fits anything."""
    meaning: dict[str, dict[str, Any]] = {}
    keys: dict[str, str] = {}
    for part in parts:
        for index, row in enumerate(part.rows):
            key = row["case_key"]
            known = meaning.setdefault(key, {})
            values = {name: row[name] for name in IDENTITY if row[name] is not None}
            wrong = [
                f"{n} {v!r} after {known[n]!r}" for n, v in values.items() if known.setdefault(n, v) != v
            ]
            if wrong:
                message = f"case_key {key} stands for two cases: {', '.join(wrong)}"
                yield Problem("error", part.path, part.locator(index), message)
            if len(values) == len(IDENTITY):
                # workload and task have parts that no column shows: name them, so that only true equals meet
                identity = json.dumps([values, row["suite"], row["task"], row["input_dist"]])
                other = keys.setdefault(identity, key)
                if other != key:
                    message = (
                        f"the same case has two keys, {other} and {key}: was the key's definition changed?"
                    )
                    yield Problem("warning", part.path, part.locator(index), message)
