"""From which length on a mechanism is cheaper than a baseline: where measured curves cross, and CAB's fit.

Pure functions of cost curves, length → cost in any one unit. CAB's efficiency length (arXiv 2210.07661) is
the root of fitted curves; it is kept for comparison, the crossing of what was measured is the number to use.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from attnbench.results.stats import quantile

Curve = Mapping[int, float]
"""Cost by length, all positive, in one unit."""

MAX_RESIDUAL: Final = 0.15
"""Largest relative residual of a fit that may be used."""

RESAMPLES: Final = 1000


@dataclass(frozen=True)
class Crossing:
    """The length from which on a curve stays below the baseline's.

    ``side``: ``crosses`` at ``length`` tokens; ``always`` below, from the shortest length measured, which
    ``length`` is; ``never`` below at the longest measured, ``length`` None. ``lo`` and ``hi`` bound
    ``length`` at 95 %; an end is infinite where the resampled curves need not cross, and both are None
    without samples.
    """

    side: Literal["crosses", "always", "never"]
    length: float | None
    lo: float | None = None
    hi: float | None = None


def crossing(curve: Curve, baseline: Curve) -> Crossing:
    """Smallest length from which the curve is below the baseline at every longer length that both measured.

    Between the two neighbouring lengths both costs are taken as powers of the length, straight lines in
    log-log. Raises ValueError where no length is common to both.
    """
    lengths = sorted(set(curve) & set(baseline))
    if not lengths:
        raise ValueError(f"observed lengths {sorted(curve)} and {sorted(baseline)}, expected a common one")
    excess = [math.log(curve[n]) - math.log(baseline[n]) for n in lengths]
    above = [i for i, x in enumerate(excess) if x >= 0]
    if not above:
        return Crossing("always", float(lengths[0]))
    last = above[-1]
    if last == len(lengths) - 1:
        return Crossing("never", None)
    share = excess[last] / (excess[last] - excess[last + 1])
    log_n = math.log(lengths[last]) + share * (math.log(lengths[last + 1]) - math.log(lengths[last]))
    return Crossing("crosses", math.exp(log_n))


def crossing_interval(
    curve: Mapping[int, Sequence[float]],
    baseline: Mapping[int, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Crossing:
    """The crossing of the medians of repeated measurements, with a 95 % bootstrap interval over repeats.

    Repeats should be independent (blocks); from the samples of one process the interval says only how well
    that process is known. Deterministic under ``seed``. No interval where a length was measured once only.
    """
    central = crossing(_medians(curve), _medians(baseline))
    common = set(curve) & set(baseline)
    if any(len(xs) < 2 for group in (curve, baseline) for n, xs in group.items() if n in common):
        return central
    draw = random.Random(seed)
    found = sorted(
        _position(crossing(_redrawn(curve, draw), _redrawn(baseline, draw))) for _ in range(resamples)
    )
    lo, hi = (found[min(len(found) - 1, int(p * len(found)))] for p in (0.025, 0.975))
    return Crossing(central.side, central.length, lo, hi)


def _medians(repeats: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {n: quantile(xs, 0.5) for n, xs in repeats.items()}


def _redrawn(repeats: Mapping[int, Sequence[float]], draw: random.Random) -> dict[int, float]:
    return {n: quantile(draw.choices(xs, k=len(xs)), 0.5) for n, xs in repeats.items()}


def _position(found: Crossing) -> float:
    """A crossing as a number that sorts: 0 where always below, infinite where never."""
    if found.side == "crosses" and found.length is not None:
        return found.length
    return 0.0 if found.side == "always" else math.inf


@dataclass(frozen=True)
class FittedLength:
    """CAB's efficiency length: where the fitted line d·n + e meets the fitted parabola a·n² + b·n + c.

    ``length`` is the larger root, None where there is none; ``other_root`` the smaller. ``residual`` is the
    largest relative deviation of a measured point from its fit, ``r2`` the coefficient of determination of
    the parabola. ``problems`` says why the number should not be used; empty for a sound one.
    """

    length: float | None
    other_root: float | None
    residual: float
    r2: float
    problems: tuple[str, ...]


def fitted_length(
    curve: Curve, baseline: Curve, *, skip: Sequence[int] = (), weighted: bool = False
) -> FittedLength:
    """Efficiency length by CAB's procedure: least squares over all lengths, the larger root.

    Args:
        curve: cost of the efficient mechanism, fitted by a line.
        baseline: cost of softmax attention, fitted by a parabola.
        skip: lengths left out of the line (CAB leaves out 256 for time).
        weighted: weigh residuals by 1/cost², so that the longest length does not decide alone.

    Raises ValueError for fewer than three lengths of the baseline or two of the curve.
    """
    line_at = [n for n in sorted(curve) if n not in skip]
    parabola_at = sorted(baseline)
    if len(parabola_at) < 3 or len(line_at) < 2:
        raise ValueError(
            f"observed {len(parabola_at)} lengths of the baseline and {len(line_at)} of the curve, "
            "expected at least 3 and 2"
        )
    a, b, c = _fit(parabola_at, [baseline[n] for n in parabola_at], 2, weighted)
    d, e = _fit(line_at, [curve[n] for n in line_at], 1, weighted)
    residual = max(
        *(abs(a * n * n + b * n + c - baseline[n]) / baseline[n] for n in parabola_at),
        *(abs(d * n + e - curve[n]) / curve[n] for n in line_at),
    )
    small, large = _roots(a, b - d, c - e)
    measured = (min(*line_at, *parabola_at), max(*line_at, *parabola_at))
    problems = _problems(large, measured, residual, b)
    ys = np.array([baseline[n] for n in parabola_at])
    ns = np.array(parabola_at, dtype=float)
    r2 = 1 - float(((a * ns**2 + b * ns + c - ys) ** 2).sum() / ((ys - ys.mean()) ** 2).sum())
    return FittedLength(large, small, residual, r2, problems)


def _fit(ns: Sequence[int], ys: Sequence[float], degree: int, weighted: bool) -> list[float]:
    weights = [1 / y for y in ys] if weighted else None  # polyfit weighs residuals before squaring them
    return [float(x) for x in np.polyfit(np.array(ns, dtype=float), np.array(ys), degree, w=weights)]


def _roots(a: float, b: float, c: float) -> tuple[float | None, float | None]:
    discriminant = b * b - 4 * a * c
    if a == 0 or discriminant < 0:
        return None, None
    ends = sorted((-b + sign * math.sqrt(discriminant)) / (2 * a) for sign in (-1, 1))
    return ends[0], ends[1]


def _problems(
    root: float | None, measured: tuple[int, int], residual: float, linear_term: float
) -> tuple[str, ...]:
    found = []
    if root is None:
        found.append("the fitted curves do not meet")
    elif not measured[0] <= root <= measured[1]:
        found.append(f"extrapolated: {root:.0f} is outside the measured {measured[0]} to {measured[1]}")
    if residual > MAX_RESIDUAL:
        found.append(f"a point is {residual:.0%} off its fit, more than {MAX_RESIDUAL:.0%}")
    if linear_term < 0:
        found.append("the fitted parabola falls before it rises")
    return tuple(found)


def scaling_exponent(curve: Curve, points: int = 3) -> float | None:
    """Slope of log cost over log length at the longest lengths: 1 for linear cost, 2 for quadratic.

    None with fewer than ``points`` lengths.
    """
    lengths = sorted(curve)[-points:]
    if len(lengths) < points:
        return None
    return float(np.polyfit(np.log(lengths), np.log([curve[n] for n in lengths]), 1)[0])
