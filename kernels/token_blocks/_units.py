"""Units: runs of query heads that read the same key head by the same list."""

from __future__ import annotations

import math
from typing import NamedTuple


class Units(NamedTuple):
    """The ``count`` units of a call, each of ``rows`` consecutive query heads."""

    count: int
    rows: int


def units(heads: int, *divisors: int, most: int | None = None) -> Units:
    """The largest units for H query heads and numbers of heads that divide H: of keys, of lists, of biases.

    A unit lies within one head of each; ``most`` bounds its rows.
    """
    count = math.lcm(*divisors)
    rows = heads // count
    if most is not None:
        rows = max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)
    return Units(heads // rows, rows)
