"""Steps in a series of recorded runs: where a case became slower or faster, told apart from noise.

A series is fitted by levels: constant pieces under the sum of absolute deviations, which outliers cannot move
(the Potts functional in L1). The number of levels minimises Schwarz's criterion for Laplace noise with as
many observations as an autocorrelated series is worth. What is found here is proposed; a paired comparison
decides.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from attnbench.results.stats import mad, quantile

MIN_SEGMENT: Final = 3
"""Fewest runs of a level: one odd run is no level."""

MAX_LEVELS: Final = 12
MIN_CHANGE: Final = 0.02
MIN_CHANGE_MADS: Final = 3.0


@dataclass(frozen=True)
class Level:
    """Runs ``start`` to ``end`` (exclusive) around one value, their median."""

    start: int
    end: int
    value: float


@dataclass(frozen=True)
class Change:
    """A step between two levels: the index of the first run after it, the levels, and after over before."""

    at: int
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Level after over level before; above 1 is slower when the values are times."""
        return self.after / self.before


def levels(values: Sequence[float], min_segment: int = MIN_SEGMENT) -> list[Level]:
    """The constant pieces of a series of positive values, fitted to their logarithms.

    One level where the series is too short for two. Exact by dynamic programming: O(n²·log n) for all pieces
    and O(levels·n²) for their choice. Raises ValueError for a value that is not positive.
    """
    if any(not x > 0 for x in values):
        raise ValueError(f"a series with {min(values)}: expected positive values")
    n = len(values)
    if n == 0:
        return []
    xs = [math.log(x) for x in values]
    most = max(1, min(MAX_LEVELS, n // min_segment))
    cost = _piece_costs(xs, min_segment)
    fits = _best_fits(cost, most)
    worth = _effective_count(xs)
    noise_floor = 1e-12 * n  # identical values have no noise, and the logarithm of none is −∞
    criterion = [
        2 * worth * math.log(max(total, noise_floor) / n) + (2 * m - 1) * math.log(worth)
        for m, (total, _) in enumerate(fits, 1)
    ]
    return _levels_of(fits[int(np.argmin(criterion))][1], values)


def changes(values: Sequence[float], min_segment: int = MIN_SEGMENT) -> list[Change]:
    """The steps that are worth a look: above 2 % and above three times the noise around the levels."""
    found = levels(values, min_segment)
    residuals = [math.log(x / level.value) for level in found for x in values[level.start : level.end]]
    limit = max(math.log1p(MIN_CHANGE), MIN_CHANGE_MADS * mad(residuals) if residuals else 0.0)
    return [
        Change(after.start, before.value, after.value)
        for before, after in pairwise(found)
        if abs(math.log(after.value / before.value)) > limit
    ]


def _piece_costs(xs: Sequence[float], min_segment: int) -> np.ndarray:
    """cost[i, j]: Σ |x − median| over i ≤ t < j, infinite for a piece that is too short."""
    n = len(xs)
    cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        ordered: list[float] = []
        for j in range(i, n):
            bisect.insort(ordered, xs[j])
            half = len(ordered) // 2  # an odd middle is in neither half
            below = math.fsum(ordered[:half])
            above = math.fsum(ordered[-half:]) if half else 0.0
            if j + 1 - i >= min(min_segment, n):
                cost[i, j + 1] = above - below
    return cost


def _best_fits(cost: np.ndarray, most: int) -> list[tuple[float, list[int]]]:
    """For 1 to ``most`` levels, the smallest total cost and the ends of the pieces."""
    n = cost.shape[0]
    best = [np.concatenate([[np.inf], cost[0, 1:]])]
    from_where: list[np.ndarray] = []
    for _ in range(1, most):
        totals = best[-1][:n, None] + cost  # the piece i..j after the best fit of 0..i
        from_where.append(np.argmin(totals, axis=0))
        best.append(np.min(totals, axis=0))
    found = []
    for m in range(most):
        total = float(best[m][n])
        if math.isinf(total):
            break
        ends = [n]
        for step in reversed(range(m)):
            ends.append(int(from_where[step][ends[-1]]))
        found.append((total, ends[::-1]))
    return found


def _levels_of(ends: Sequence[int], values: Sequence[float]) -> list[Level]:
    starts = [0, *ends[:-1]]
    return [Level(a, b, quantile(values[a:b], 0.5)) for a, b in zip(starts, ends, strict=True)]


def _effective_count(xs: Sequence[float]) -> float:
    """How many independent observations the series is worth: n(1 − ρ)/(1 + ρ).

    ρ is that of a first-order autoregression, by differences, which a few steps do not move: differences of
    neighbours have variance 2σ²(1 − ρ), of every other run 2σ²(1 − ρ²), so their ratio is 1 + ρ. Spreads are
    median absolute deviations.
    """
    n = len(xs)
    if n < 4:
        return float(n)
    near = mad([b - a for a, b in pairwise(xs)])
    far = mad([b - a for a, b in zip(xs, xs[2:], strict=False)])
    if near == 0.0:
        return float(n)
    rho = min(0.9, max(0.0, (far / near) ** 2 - 1))
    return max(2.0, n * (1 - rho) / (1 + rho))
