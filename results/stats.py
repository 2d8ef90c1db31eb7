"""Statistics of samples and blocks, as pure functions of numbers.

Two levels, never mixed: the samples of one process are correlated and only describe it; blocks, each a fresh
process, are the independent replications from which intervals are made (t on logarithms, k >= 3).
References: Hahn & Meeker, Statistical Intervals, ch. 5 (order statistics); Tukey 1977 (fences).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from attnbench.results.student import t_quantile

MIN_BLOCKS: Final = 3
"""Blocks needed for an interval: with two, the t quantile (12.7) makes every interval useless."""

GAP_FACTOR: Final = 2.5
GAP_ALPHA: Final = 0.01
GAP_MIN_SAMPLES: Final = 20
GAP_MIN_MODE: Final = 5
GAP_MIN_RELATIVE: Final = 0.01


@dataclass(frozen=True)
class Description:
    """What the samples of one block look like, in their unit.

    ``lo`` and ``hi`` bound the median at 95 %; they are None where so few samples have no such interval.
    """

    n: int
    median: float
    lo: float | None
    hi: float | None
    mean: float
    min: float
    p5: float
    p25: float
    p75: float
    p95: float
    mad: float
    n_outliers_mild: int
    n_outliers_severe: int


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its confidence interval."""

    value: float
    lo: float
    hi: float


def describe(samples: Sequence[float]) -> Description:
    """All of the below for one block. No sample is dropped. Raises ValueError for no samples."""
    ordered = sorted(float(x) for x in samples)
    interval = median_interval(ordered)
    mild, severe = tukey_outliers(ordered)
    return Description(
        n=len(ordered),
        median=quantile(ordered, 0.5),
        lo=interval[0] if interval else None,
        hi=interval[1] if interval else None,
        mean=math.fsum(ordered) / len(ordered),
        min=ordered[0],
        p5=quantile(ordered, 0.05),
        p25=quantile(ordered, 0.25),
        p75=quantile(ordered, 0.75),
        p95=quantile(ordered, 0.95),
        mad=mad(ordered),
        n_outliers_mild=mild,
        n_outliers_severe=severe,
    )


def quantile(samples: Sequence[float], p: float) -> float:
    """Quantile by linear interpolation between order statistics: x at position p·(n − 1), from 0.

    The definition of numpy and R (type 7). Raises ValueError for no samples or p outside [0, 1].
    """
    if len(samples) == 0 or not 0.0 <= p <= 1.0:
        raise ValueError(f"quantile {p} of {len(samples)} samples; expected p in [0, 1] and a sample")
    ordered = sorted(samples)
    position = p * (len(ordered) - 1)
    index = math.floor(position)
    below, above = ordered[index], ordered[min(index + 1, len(ordered) - 1)]
    return min(below + (position - index) * (above - below), above)  # rounding must not leave the bracket


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Interval that covers the median of the distribution in at least 95 % of repetitions.

    The number of independent samples below the median is Binomial(n, 1/2), so [x_(l), x_(u)] covers it with
    probability P(l <= B < u), whatever the distribution. The normal approximation of B gives the 1-based
    ranks l = ⌊n/2 − 0.98 √n⌋ and u = ⌈n/2 + 1 + 0.98 √n⌉; the exact coverage is never below 95 %. None below
    8 samples, where rank l does not exist. Samples of one process are correlated: the interval then says
    how well *this process* is known, not what the next process will give.
    """
    n = len(samples)
    half = 0.98 * math.sqrt(n)
    low, high = math.floor(n / 2 - half), math.ceil(n / 2 + 1 + half)
    if low < 1 or high > n:
        return None
    ordered = sorted(samples)
    return ordered[low - 1], ordered[high - 1]


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled (× 1.4826 estimates a normal sigma)."""
    centre = quantile(samples, 0.5)
    return quantile([abs(x - centre) for x in samples], 0.5)


def tukey_outliers(samples: Sequence[float]) -> tuple[int, int]:
    """(mild, severe): samples more than 1.5, and more than 3, interquartile ranges outside the quartiles.

    The severe are among the mild. They are counted, never dropped.
    """
    ordered = sorted(samples)
    q1, q3 = quantile(ordered, 0.25), quantile(ordered, 0.75)

    def beyond(factor: float) -> int:
        reach = factor * (q3 - q1)
        return sum(1 for x in ordered if x < q1 - reach or x > q3 + reach)

    return beyond(1.5), beyond(3.0)


def largest_gap(samples: Sequence[float]) -> tuple[float, float] | None:
    """Ends of a gap that shows the samples to have two modes, or None where there is no sign of it.

    Between neighbouring order statistics of a smooth density the spacings are near to exponential, so the
    largest of m exceeds the mean of the others by more than ln(m/α) with probability about α. Only gaps with
    a tenth of the samples, and at least 5, on either side count: a few outliers are not a mode. The density
    is lower near the tails, hence the factor 2.5 (simulated: at most 1 % false alarms on normal,
    autocorrelated, drifting and exponential samples, 3 to 5 % on log-normal with sigma 1; two normal modes
    12 sigma apart are found in 99 % of sets of 30). A gap below 1 % of the median, or of no more than two
    steps of the timer, says nothing and is passed over, as are fewer than 20 samples.
    """
    n = len(samples)
    if n < GAP_MIN_SAMPLES:
        return None
    ordered = sorted(samples)
    side = max(GAP_MIN_MODE, math.ceil(0.1 * n))
    gaps = [(ordered[i + 1] - ordered[i], i) for i in range(side - 1, n - side)]
    widest, at = max(gaps)
    if widest <= GAP_MIN_RELATIVE * abs(quantile(ordered, 0.5)):
        return None
    if widest <= 2.0 * min(gap for gap, _ in gaps if gap > 0.0):
        return None
    others = (math.fsum(gap for gap, _ in gaps) - widest) / (len(gaps) - 1)
    if widest <= GAP_FACTOR * math.log(len(gaps) / GAP_ALPHA) * others:
        return None
    return ordered[at], ordered[at + 1]


# ---- between blocks ------------------------------------------------------------------------------------


def geometric_mean(values: Sequence[float]) -> float:
    """Exponential of the mean logarithm. Raises ValueError for no values or one that is not positive."""
    return math.exp(statistics.fmean(_logs(values)))


def between_cv(medians: Sequence[float]) -> float | None:
    """Coefficient of variation of block medians: their standard deviation (n − 1) over their mean.

    None for fewer than two blocks.
    """
    if len(medians) < 2:
        return None
    return statistics.stdev(medians) / statistics.fmean(medians)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Interval of the mean of independent, roughly normal values, for instance a metric over seeds.

    Mean ± t · s / √k with k − 1 degrees of freedom. None for fewer than three values.
    """
    k = len(values)
    if k < MIN_BLOCKS:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(0.5 + level / 2, k - 1) * statistics.stdev(values) / math.sqrt(k)
    return mean - half, mean + half


def block_interval(medians: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Interval of a time from the medians of independent blocks: the t-interval of their logarithms.

    Effects on time multiply (clock, contention), so logarithms are nearer to normal and the ends stay
    positive. None for fewer than three blocks: no interval is better than a made-up one.
    """
    interval = t_interval(_logs(medians), level)
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def difference_interval(
    a: Sequence[float], b: Sequence[float], level: float = 0.95
) -> tuple[float, float] | None:
    """Welch's interval of mean(a) − mean(b) for independent values; None where a side has fewer than three.

    ± t · √(s₁²/k₁ + s₂²/k₂) with the Welch–Satterthwaite degrees of freedom.
    """
    if min(len(a), len(b)) < MIN_BLOCKS:
        return None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    difference = statistics.fmean(a) - statistics.fmean(b)
    half = 0.0
    if va + vb > 0.0:
        freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        half = t_quantile(0.5 + level / 2, freedom) * math.sqrt(va + vb)
    return difference - half, difference + half


def ratio_interval(over: Sequence[float], under: Sequence[float], level: float = 0.95) -> Interval | None:
    """How many times ``over`` is as large as ``under``, both medians of independent blocks, with interval.

    The value is the ratio of the two medians. The interval is Welch's, of the difference of the mean
    logarithms. Blocks are not paired here; a paired design is sharper. None where either side has fewer than
    three blocks.
    """
    if min(len(over), len(under)) < MIN_BLOCKS:
        return None
    interval = difference_interval(_logs(over), _logs(under), level)
    assert interval is not None
    value = quantile(over, 0.5) / quantile(under, 0.5)
    return Interval(value, math.exp(interval[0]), math.exp(interval[1]))


def _logs(values: Sequence[float]) -> list[float]:
    if len(values) == 0 or min(values) <= 0.0:
        raise ValueError(f"logarithms of {list(values)[:5]}; expected at least one value, all positive")
    return [math.log(x) for x in values]
