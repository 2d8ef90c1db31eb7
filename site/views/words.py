"""The words of the site: patterns, directions, statuses, and what a summary says in words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date, timedelta
from typing import Final

from attnbench.results.aggregate import Summary
from attnbench.results.rows import Row
from attnbench.results.schema import Status

PATTERN_WORDS: Final = {
    "NS": "noncausal self",
    "CS": "causal self",
    "NC": "noncausal cross",
    "CC": "causal cross",
}
DIRECTION_WORDS: Final = {"fwd": "forward", "fwd_bwd": "forward and backward", "train": "training"}
DTYPE_WORDS: Final = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
LETTERS: Final = {
    Status.OK: "✓",
    Status.INCORRECT: "I",
    Status.UNSUPPORTED: "U",
    Status.OOM: "M",
    Status.TIMEOUT: "T",
    Status.COMPILE_ERROR: "K",
    Status.ERROR: "E",
    Status.CRASHED: "C",
    Status.SKIPPED: "S",
}
STATUS_ORDER: Final = tuple(Status)
"""Statuses in the order in which tables count them."""

TIME_KINDS: Final = {
    "cpu_hot": "median of hot calls on a CPU",
    "device_cold": "median device time with a cold L2 cache",
}


STACK_FACTS: Final = (
    ("gpu_name", "{}"),
    ("torch", "torch {}"),
    ("triton", "triton {}"),
    ("cuda_runtime", "CUDA {}"),
    ("hip_runtime", "ROCm {}"),
    ("gpu_driver", "driver {}"),
)


def statement(rows: Iterable[Row]) -> str:
    """One sentence on what the times are; empty without a time."""
    kinds = sorted({row["time_kind"] for row in rows if row.get("time_kind")})
    if not kinds:
        return ""
    return (
        "Times are " + ", or ".join(TIME_KINDS.get(k, f"of kind {k}") for k in kinds) + "; lower is better."
    )


def year_before(day: str) -> str:
    """The day a year before ``day``, ISO 8601 both; empty for what is no day."""
    try:
        return (date.fromisoformat(day) - timedelta(days=365)).isoformat()
    except ValueError:
        return ""


def pattern_words(pattern: str) -> str:
    """``causal self (CS)``; an unknown pattern as it is."""
    return f"{PATTERN_WORDS[pattern]} ({pattern})" if pattern in PATTERN_WORDS else pattern


def shape(s: Summary) -> str:
    """Batch, heads and head dimension."""
    heads, kv_heads = s.get("heads"), s.get("kv_heads")
    both = heads if heads == kv_heads else f"{heads}/{kv_heads}"
    return f"B {s.get('batch')} · H {both} · D {s.get('head_dim')}"


def context(summaries: Iterable[Summary]) -> str:
    """What the times are, on which software, and when the newest was measured."""
    found = sorted(summaries, key=lambda s: s.started_at)
    kinds = sorted({str(s.get("time_kind")) for s in found if s.get("time_kind")})
    facts = json.loads(found[-1].get("environment") or "{}")
    software = [text.format(facts[name]) for name, text in STACK_FACTS if facts.get(name)]
    words = [TIME_KINDS.get(kind, kind) + ", lower is better" for kind in kinds]
    return " · ".join([*words, *software, f"measured {found[-1].started_at[:10]}"])


def flag_names(flags: Iterable[str]) -> str:
    """Names of flags without their observations, in order, joined by commas."""
    return ", ".join(sorted({flag.split(":")[0] for flag in flags}))


def value_of(key: str, s: Summary) -> float | None:
    """A value as the tables show it, None for what was not measured and for the distance of an exact impl."""
    if not s.ok or (key.startswith("approx_err") and s.get("exact")):
        return None
    value = s.get(key)
    return None if value is None else float(value)
