"""Correlation of scores between patterns and between tasks, with the number of mechanisms behind each cell.

With the two or three mechanisms that are often common to two patterns every correlation is near ±1; a cell
says how many there are, and says nothing below four.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from attnbench.results.scores import Index

MIN_MECHANISMS: Final = 4
"""Fewest common mechanisms of a correlation: with fewer the Fisher interval does not exist."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's ρ between two sets of scores over ``n`` common mechanisms.

    ``lo`` and ``hi`` are the 95 % interval of r by Fisher's z. All None below four mechanisms, or where one
    side is constant.
    """

    n: int
    pearson: float | None = None
    spearman: float | None = None
    lo: float | None = None
    hi: float | None = None


def correlate(a: Mapping[str, float], b: Mapping[str, float], level: float = 0.95) -> Correlation:
    """Correlation of two score sets, mechanism → score, over the mechanisms in both."""
    common = sorted(set(a) & set(b))
    n = len(common)
    xs, ys = [a[m] for m in common], [b[m] for m in common]
    if n < MIN_MECHANISMS or len(set(xs)) < 2 or len(set(ys)) < 2:
        return Correlation(n)
    r = max(-1.0, min(1.0, pearson(xs, ys)))
    rho = max(-1.0, min(1.0, pearson(ranks(xs), ranks(ys))))
    if abs(r) == 1.0:
        return Correlation(n, r, rho, r, r)
    half = NormalDist().inv_cdf(0.5 + level / 2) / math.sqrt(n - 3)
    z = math.atanh(r)
    return Correlation(n, r, rho, math.tanh(z - half), math.tanh(z + half))


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's product-moment correlation. Raises statistics.StatisticsError for constant or short input."""
    return statistics.correlation(xs, ys)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            found[i] = (start + end) / 2 + 1
        start = end + 1
    return found


def matrix(columns: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], Correlation]:
    """The correlation of every pair of named score sets, both ways round and with themselves."""
    return {(a, b): correlate(columns[a], columns[b]) for a in columns for b in columns}


def by_pattern(indices: Sequence[Index]) -> dict[str, dict[str, float]]:
    """Pattern → mechanism → compositional index of the pattern, where there is one."""
    return _columns(indices, whole=True)


def by_task(indices: Sequence[Index]) -> dict[str, dict[str, float]]:
    """``pattern:task`` → mechanism → index of the task, where there is one."""
    return _columns(indices, whole=False)


def _columns(indices: Sequence[Index], *, whole: bool) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for index in indices:
        if index.value is not None and (index.task == "") is whole:
            name = index.pattern if whole else f"{index.pattern}:{index.task}"
            found.setdefault(name, {})[index.mechanism] = index.value
    return found
