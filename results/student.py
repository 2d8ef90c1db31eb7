"""Student's t distribution, computed here because SciPy is not a dependency.

The distribution function is an incomplete beta function, evaluated by its continued fraction (Abramowitz &
Stegun 26.5.8) with Lentz's method; quantiles invert it by bisection.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_EPSILON = 4e-16


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0 and x in [0, 1]."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast below its mean only
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) for Student's t with ``freedom`` > 0 degrees of freedom, not necessarily whole."""
    tail = 0.5 * incomplete_beta(freedom / 2.0, 0.5, freedom / (freedom + t * t))
    return 1.0 - tail if t > 0.0 else tail


@lru_cache(maxsize=256)
def t_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p, to a relative error below 1e-9 for p in [1e-6, 1 - 1e-6].

    Raises ValueError for p outside (0, 1) or freedom not positive.
    """
    if not 0.0 < p < 1.0 or freedom <= 0.0:
        raise ValueError(f"t quantile for p = {p}, freedom = {freedom}; expected 0 < p < 1 and freedom > 0")
    if p < 0.5:
        return -t_quantile(1.0 - p, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if t_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d₁/(1 + d₂/(1 + …)) with the coefficients of A&S 26.5.8, by the modified Lentz method."""
    value, c, d = 1.0, 1.0, 0.0
    for m in range(1, 10_000):
        k = m // 2
        if m % 2:
            coefficient = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        else:
            coefficient = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        d = 1.0 / ((1.0 + coefficient * d) or _TINY)
        c = (1.0 + coefficient / c) or _TINY
        value *= c * d
        if abs(c * d - 1.0) < _EPSILON:
            return value
    raise ArithmeticError(f"the continued fraction of I_{x}({a}, {b}) did not converge")
