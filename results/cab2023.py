"""The figures that CAB published, as typed records: what our arithmetic must reproduce from.

Zhang et al., Comprehensive Attention Benchmarking on Long Sequence Modeling, ICML 2023 (arXiv 2210.07661),
and its repository Shark-NLP/CAB. Kept as published, mistakes included; ``data/cab2023/README.md`` says where
each is from.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Final

from attnbench.results.scores import Constants, Metric, MetricScale, RawScore

SOURCE: Final = "https://arxiv.org/abs/2210.07661"

SOFTMAX: Final = "vanilla"
"""CAB's name of softmax attention."""


def _records(name: str) -> Iterator[dict[str, str]]:
    text = (files(__package__) / "data" / "cab2023" / name).read_text(encoding="utf-8")
    return csv.DictReader(text.splitlines())


@cache
def raw_scores() -> tuple[RawScore, ...]:
    """Every published score, forecasting averages unrounded (from the detailed table)."""
    exact = _forecasting()
    return tuple(
        RawScore(
            Metric(r["pattern"], r["task"], r["backbone"], r["metric"]),
            r["mechanism"],
            exact.get((r["metric"], r["mechanism"]), float(r["value"])),
        )
        for r in _records("raw_scores.csv")
    )


def _forecasting() -> dict[tuple[str, str], float]:
    """Averages such as ETT-MSE per mechanism, over univariate and multivariate runs of the data sets."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in _records("lstf_detail.csv"):
        group = "ETT" if r["dataset"].startswith("ETT") else r["dataset"]
        found.setdefault((f"{group}-{r['metric']}", r["mechanism"]), []).append(float(r["value"]))
    return {key: fmean(values) for key, values in found.items()}


@cache
def constants() -> Constants:
    """CAB's own means and standard deviations, under the name ``cab2023``."""
    data = json.loads(
        (files(__package__) / "data" / "cab2023" / "constants.json").read_text(encoding="utf-8")
    )
    scales = tuple(
        MetricScale(
            Metric(pattern, m["task"], m["backbone"], m["metric"]),
            better="higher" if m["sign"] > 0 else "lower",
            mu=float(m["mu"]),
            sigma=float(m["sigma"]),
        )
        for pattern, found in data["patterns"].items()
        for m in found["metrics"]
    )
    return Constants("cab2023", scales)


@cache
def compositional_index() -> Mapping[tuple[str, str, str], float]:
    """Published index by (pattern, mechanism, task); the task ``Avg`` is the index of the pattern."""
    return {
        (r["pattern"], r["mechanism"], r["task"]): float(r["ci"]) for r in _records("compositional_index.csv")
    }


@cache
def efficiency_lengths() -> Mapping[tuple[str, str], float]:
    """Published efficiency length in tokens by (mechanism, ``time`` or ``memory``)."""
    return {
        (r["mechanism"], r["quantity"]): float(r["efficiency_length"])
        for r in _records("efficiency_length.csv")
    }


@cache
def cost_curves(quantity: str) -> Mapping[str, Mapping[int, float]]:
    """Mechanism → length → cost: milliseconds for ``time``, MiB for ``memory``."""
    column = {"time": "milliseconds", "memory": "mebibytes"}[quantity]
    curves: dict[str, dict[int, float]] = {}
    for r in _records(f"cost_{quantity}.csv"):
        curves.setdefault(r["mechanism"], {})[int(r["length"])] = float(r[column])
    return curves


@cache
def correlations(of: str) -> Mapping[tuple[str, str], float]:
    """Published Pearson correlations of every pair, of ``pattern`` or ``task``; read off figures, ± 0.01."""
    return {
        (r[""], other): float(value)
        for r in _records(f"{of}_correlation.csv")
        for other, value in r.items()
        if other
    }
