"""How many keys a query keeps at a given density: what makes sparse mechanisms comparable."""

from __future__ import annotations

import math

from attnbench.impls.spec import Pattern


def keys_at(density: float, n: int, m: int, pattern: Pattern) -> int:
    """Keys k per query, at least 1, with which the share ``density`` of the allowed pairs is kept.

    Noncausal, every query keeps k = density·M. Causal, a query has only the keys before it: min(i + 1, k)
    over N = M rows adds up to density·N²/2 for k = N·(1 − √(1 − density)).
    """
    kept = m * (1 - math.sqrt(1 - density)) if pattern is Pattern.CS else density * m
    return max(1, round(kept))
