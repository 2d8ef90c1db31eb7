"""What scores of tasks say when taken together: the compositional index, positions, benefit, verdicts.

Pure functions of numbers. A metric is never ranked below its noise, a missing score never replaced. The index
is that of CAB (Zhang et al., arXiv 2210.07661); what is added to it says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from attnbench.results import stats

Better = Literal["higher", "lower"]

MIN_POOL: Final = 6
"""Fewest mechanisms whose spread may define a scale of our own."""

MAD_TO_SIGMA: Final = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

BROKEN_BELOW: Final = 0.5
WEAK_BELOW: Final = 0.8
NOISE_UNITS: Final = 2.0
"""A task whose benefit of attention is below so many noise units does not measure attention."""


@dataclass(frozen=True, order=True)
class Metric:
    """One metric of one backbone on one task under one pattern; equal metrics are comparable."""

    pattern: str
    task: str
    backbone: str
    name: str


@dataclass(frozen=True)
class RawScore:
    """The score of a mechanism: a mean over seeds, or the one run that there is."""

    metric: Metric
    mechanism: str
    value: float


@dataclass(frozen=True)
class MetricScale:
    """How a score becomes a number of standard deviations above the pool, better being higher.

    ``log``: the score's natural logarithm is compared, for metrics whose errors multiply (perplexity, MSE).
    """

    metric: Metric
    better: Better
    mu: float
    sigma: float
    log: bool = False

    def z(self, value: float) -> float:
        """sign·(x − μ)/σ; −∞ for a score that is not a number or, with ``log``, not positive."""
        if math.isnan(value) or (self.log and value <= 0):
            return -math.inf
        x = math.log(value) if self.log else value
        return (x - self.mu) / self.sigma * (1.0 if self.better == "higher" else -1.0)


@dataclass(frozen=True)
class Constants:
    """The scales of an index, named; ``left_out`` says why a metric is not among them.

    Constants are cut once from a frozen pool and stay: a new mechanism does not move the others.
    """

    name: str
    scales: tuple[MetricScale, ...]
    left_out: Mapping[Metric, str] = field(default_factory=dict)

    def of(self, pattern: str) -> tuple[MetricScale, ...]:
        """The scales of one pattern."""
        return tuple(s for s in self.scales if s.metric.pattern == pattern)


@dataclass(frozen=True)
class Index:
    """A compositional index: of one task, or with ``task`` empty of the pattern.

    ``value`` is None where scores are missing; ``missing`` names them. ``constants`` names the scales.
    """

    pattern: str
    mechanism: str
    task: str
    value: float | None
    missing: tuple[str, ...]
    constants: str


def compositional_index(scores: Iterable[RawScore], constants: Constants) -> list[Index]:
    """CAB's compositional index of every mechanism: per task, and per pattern over its tasks.

    CI_task = mean of sign·(x − μ)/σ over the metrics of the task; CI_pattern = mean of CI_task over the
    tasks. Metrics weigh equally in a task and tasks in a pattern; nothing is aggregated over patterns. A
    mechanism that lacks a metric of a task has no index there, and one that lacks a task has none for the
    pattern: an average over what happens to exist would reward the absence. Raises ValueError where a score
    is given twice.
    """
    given: dict[tuple[str, str], dict[Metric, float]] = {}
    for score in scores:
        mine = given.setdefault((score.metric.pattern, score.mechanism), {})
        if score.metric in mine:
            raise ValueError(f"{score.mechanism}: observed two scores for {score.metric}, expected one")
        mine[score.metric] = score.value
    found: list[Index] = []
    for (pattern, mechanism), values in given.items():
        by_task: dict[str, list[MetricScale]] = {}
        for scale in constants.of(pattern):
            by_task.setdefault(scale.metric.task, []).append(scale)
        if not by_task:
            continue
        tasks = [_task_index(pattern, mechanism, t, s, values, constants.name) for t, s in by_task.items()]
        missing = tuple(name for index in tasks for name in index.missing)
        known = [index.value for index in tasks if index.value is not None]
        overall = statistics.fmean(known) if len(known) == len(tasks) else None
        found += [*tasks, Index(pattern, mechanism, "", overall, missing, constants.name)]
    return found


def _task_index(
    pattern: str,
    mechanism: str,
    task: str,
    scales: Sequence[MetricScale],
    values: Mapping[Metric, float],
    name: str,
) -> Index:
    missing = tuple(f"{task}: {s.metric.backbone} {s.metric.name}" for s in scales if s.metric not in values)
    value = None if missing else statistics.fmean(s.z(values[s.metric]) for s in scales)
    return Index(pattern, mechanism, task, value, missing, name)


def cut_constants(
    name: str,
    scores: Iterable[RawScore],
    pool: Sequence[str],
    better: Callable[[Metric], Better],
    *,
    noise: Mapping[Metric, float] | None = None,
    log: Callable[[Metric], bool] = lambda metric: False,
    robust: bool = False,
    min_pool: int = MIN_POOL,
) -> Constants:
    """Means and standard deviations (n − 1) of every metric over a named pool of mechanisms.

    Args:
        name: name of the constants; every index computed with them carries it.
        scores: means over seeds.
        pool: mechanisms that define the scale. Controls do not belong: they would dominate σ.
        better: the direction of a metric.
        noise: standard deviation over seeds of softmax attention, in the units of the score; a metric whose σ
            does not exceed it separates nothing and is left out, with the reason.
        log: whether a metric is compared by its logarithm.
        robust: median and 1.4826 times the median absolute deviation in place of mean and standard deviation.
        min_pool: fewest members of the pool with a score; a metric with fewer is left out.
    """
    values: dict[Metric, list[float]] = {}
    for score in scores:
        here = values.setdefault(score.metric, [])
        if score.mechanism in pool and math.isfinite(score.value):
            here.append(score.value)
    scales, left_out = [], {}
    for metric, found in values.items():
        if len(found) < max(min_pool, 2):
            left_out[metric] = f"{len(found)} mechanisms of the pool have it, expected at least {min_pool}"
            continue
        use_log = log(metric)
        if use_log and min(found) <= 0:
            left_out[metric] = f"a score of {min(found):g} has no logarithm"
            continue
        xs = [math.log(x) for x in found] if use_log else found
        mu, sigma = _centre(xs, robust)
        seed_sd = (noise or {}).get(metric, 0.0)
        if use_log:  # the standard deviation of log x, to first order
            seed_sd /= math.exp(mu)
        if sigma <= seed_sd or sigma == 0:
            left_out[metric] = f"σ = {sigma:.3g} of the pool does not exceed the noise {seed_sd:.3g}"
            continue
        scales.append(MetricScale(metric, better(metric), mu, sigma, use_log))
    return Constants(name, tuple(scales), left_out)


def _centre(xs: Sequence[float], robust: bool) -> tuple[float, float]:
    if robust:
        return stats.quantile(xs, 0.5), MAD_TO_SIGMA * stats.mad(xs)
    return statistics.fmean(xs), statistics.stdev(xs)


# ---- against the controls ------------------------------------------------------------------------------


def normalised_position(score: float, softmax: float, no_mixing: float) -> float | None:
    """Where a score lies between no mixing (0) and softmax attention (1); a better one exceeds 1.

    p = (s − s_no_mixing)/(s_softmax − s_no_mixing), the same for metrics of either direction. None where the
    two ends coincide: the task then says nothing about attention.
    """
    span = softmax - no_mixing
    return None if span == 0 else (score - no_mixing) / span


def learning(position: float | None) -> str:
    """``broken`` below 0.5 of the way from no mixing to softmax, ``weak`` below 0.8, else ``learns``.

    ``unknown`` without a position.
    """
    if position is None or math.isnan(position):
        return "unknown"
    if position < BROKEN_BELOW:
        return "broken"
    return "weak" if position < WEAK_BELOW else "learns"


@dataclass(frozen=True)
class Benefit:
    """What attention is worth on one metric: softmax less no mixing, in its unit, better being positive.

    ``lo`` and ``hi`` are the 95 % Welch interval over seeds (None below three on a side). ``units`` is the
    benefit over the noise, the pooled standard deviation over seeds; None where there is no noise to compare
    with.
    """

    metric: Metric
    value: float
    lo: float | None
    hi: float | None
    units: float | None

    @property
    def discriminates(self) -> bool | None:
        """Whether the benefit is at least two noise units; None where the noise is not known."""
        return None if self.units is None else self.units >= NOISE_UNITS


def benefit(metric: Metric, better: Better, softmax: Sequence[float], no_mixing: Sequence[float]) -> Benefit:
    """Benefit of attention from the scores over seeds of softmax attention and of the control without mixing.

    Raises ValueError for no score on a side.
    """
    if not softmax or not no_mixing:
        raise ValueError(
            f"{metric}: observed {len(softmax)} and {len(no_mixing)} seeds, expected at least one each"
        )
    sign = 1.0 if better == "higher" else -1.0
    value = sign * (statistics.fmean(softmax) - statistics.fmean(no_mixing))
    interval = stats.difference_interval(softmax, no_mixing)
    lo = hi = None
    if interval is not None:
        lo, hi = sorted((sign * interval[0], sign * interval[1]))
    noise = _pooled_sd(softmax, no_mixing)
    return Benefit(metric, value, lo, hi, None if not noise else value / noise)


def _pooled_sd(*groups: Sequence[float]) -> float | None:
    usable = [g for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in usable)
    if not freedom:
        return None
    return math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in usable) / freedom)


# ---- lengths -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthGeneralisation:
    """How a score holds at lengths below that of training (interpolation) and beyond it (extrapolation).

    Ratios of the worst score on the side to the score at the training length, 1 being no loss and larger
    worse; None where no length lies on that side.
    """

    trained: int
    interpolation: float | None
    extrapolation: float | None


def length_generalisation(
    by_length: Mapping[int, float], trained: int, better: Better
) -> LengthGeneralisation:
    """How a score holds at other lengths than that of training (CAB, §5.4: one checkpoint, many lengths).

    Scores must be positive, as perplexity or accuracy are. Raises ValueError where the training length is
    missing.
    """
    if trained not in by_length or min(by_length.values()) <= 0:
        raise ValueError(f"observed lengths {sorted(by_length)}, expected positive scores, one at {trained}")
    base = by_length[trained]

    def worst(side: Callable[[int], bool]) -> float | None:
        ratios = [x / base if better == "lower" else base / x for n, x in by_length.items() if side(n)]
        return max(ratios, default=None)

    return LengthGeneralisation(trained, worst(lambda n: n < trained), worst(lambda n: n > trained))
