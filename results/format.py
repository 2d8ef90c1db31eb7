"""Numbers as text: as many digits as their interval supports, one unit for a whole column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

NONE: Final = "–"
"""What stands where there is no number."""


class Unit(NamedTuple):
    """A unit to print in, and its size in the unit that a column is stored in."""

    name: str
    size: float


TIME_UNITS: Final = (Unit("µs", 1.0), Unit("ms", 1e3), Unit("s", 1e6))
BYTE_UNITS: Final = (Unit("B", 1.0), Unit("KiB", 2.0**10), Unit("MiB", 2.0**20), Unit("GiB", 2.0**30))


def common_unit(values: Iterable[float | None], units: tuple[Unit, ...]) -> Unit:
    """The largest unit in which the smallest positive value is still at least 1; the first without one."""
    positive = [value for value in values if value]
    smallest = min(positive, default=0.0)
    return max((unit for unit in units if unit.size <= smallest), key=lambda u: u.size, default=units[0])


def number(value: float | None, half_width: float | None = None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, never in exponent form.

    With ``half_width``, as many digits as an interval of ± ``half_width`` supports: one beyond its leading
    digit, 2 to 5 in all.
    """
    if value is None:
        return NONE
    if value == 0.0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if half_width:
        digits = min(max(magnitude - math.floor(math.log10(half_width)) + 2, 2), 5)
    rounded = float(f"{value:.{digits - 1}e}")  # may reach the next power of ten: 9.999 → 10.0
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{rounded:.{decimals}f}"


def interval(lo: float | None, hi: float | None, unit: Unit) -> str:
    """``[lo, hi]`` in ``unit``, with the digits that its width supports."""
    if lo is None or hi is None:
        return NONE
    half = (hi - lo) / 2 / unit.size
    return f"[{number(lo / unit.size, half)}, {number(hi / unit.size, half)}]"


def scientific(value: float | None) -> str:
    """An error such as ``3.2e-04``."""
    return NONE if value is None else f"{value:.1e}"


def length(tokens: float) -> str:
    """A number of tokens as axes and titles show it: 512, 1k, 64k, 1M; others in full."""
    whole = round(tokens)
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{suffix}"
    return str(whole)


def time_text(us: float) -> str:
    """A time with the unit that suits it, for axes: 20 µs, 3 ms."""
    unit = common_unit([us], TIME_UNITS)
    return f"{us / unit.size:g} {unit.name}"


def bytes_text(size: float) -> str:
    """A size with the unit that suits it, for axes: 512 KiB, 3 GiB."""
    unit = common_unit([size], BYTE_UNITS)
    return f"{size / unit.size:g} {unit.name}"
