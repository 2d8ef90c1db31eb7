"""What a figure shows, as plain data: scaling curves with the place where they end, and error against time.

The figures for papers and the charts of the site draw the same series.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.aggregate import Summary, worst
from attnbench.results.schema import Status

PATTERNS: Final = ("NS", "CS", "NC", "CC")
ENDS: Final = (Status.OOM, Status.TIMEOUT)
"""What ends a curve; every other failure leaves a gap and is counted beside the panel."""

_NAME_CHARACTERS: Final = 150
"""Of a figure's file name; file systems take 255 bytes and a suffix is still to come."""

_SAME_FIGURE: Final = ("device", "scope", "workload", "dtype", "direction")


@dataclass(frozen=True)
class Point:
    """One measured value with the interval of its time, where there is one."""

    x: float
    y: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Series:
    """The points of one impl, ascending in x; ``end`` is the first x that failed, and how."""

    label: str
    points: tuple[Point, ...]
    end: tuple[int, Status] | None = None


@dataclass(frozen=True)
class Panel:
    """The series of one pattern. ``not_drawn`` counts the impls without any point, by status."""

    pattern: str
    series: tuple[Series, ...]
    not_drawn: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Figure:
    """Panels that share their axes. ``name`` is fit for a file, ``x`` is ``n`` or ``m``."""

    title: str
    name: str
    x: str
    panels: tuple[Panel, ...]


def scaling(summaries: Iterable[Summary], column: str = "time_us") -> list[Figure]:
    """Curves of ``time_us`` or another number over the length, one figure for each sweep, a panel a pattern.

    The length is N, or M where the queries are few and fixed and the keys grow, as in decoding.
    """
    figures = []
    for group in _grouped(summaries):
        x = _swept(group)
        panels = []
        for pattern in PATTERNS:
            inside = [s for s in group if s.get("pattern") == pattern]
            curves = [_curve(label, found, x, column) for label, found in _by_label(inside).items()]
            drawn = tuple(c for c in curves if c.points or c.end)
            if inside:
                panels.append(Panel(pattern, drawn, _not_drawn(inside, drawn)))
        if any(series.points for panel in panels for series in panel.series):
            figures.append(Figure(_title(group[0]), _name(group[0], column), x, tuple(panels)))
    return figures


def fidelity(summaries: Iterable[Summary], column: str = "approx_err_gaussian") -> list[Figure]:
    """Time (x, µs) against approximation error (y), one point an impl, a panel a pattern.

    Drawn at the length that the most impls reached, the longest of those. Exact mechanisms have error 0.
    Only forward passes: a backward adds time and nothing to the error.
    """
    figures = []
    for group in _grouped(s for s in summaries if s.get("direction") == "fwd"):
        usable = [s for s in group if _has_fidelity(s, column)]
        if all(s.get("exact") for s in usable):
            continue
        x = _swept(group)
        reached = Counter(s.get(x) for s in usable)
        at = max(reached, key=lambda length: (reached[length], length))
        panels = []
        for pattern in PATTERNS:
            inside = [s for s in group if s.get("pattern") == pattern and s.get(x) == at]
            found = tuple(_fidelity_series(s, column) for s in inside if _has_fidelity(s, column))
            if found:
                panels.append(Panel(pattern, found, _not_drawn(inside, found)))
        title, name = f"{_title(group[0])} · {x.upper()}={at}", f"{_name(group[0], column)}_{x}{at}"
        figures.append(Figure(title, name, "time_us", tuple(panels)))
    return figures


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both x and y, lower being better, ascending in x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


# ---- inside --------------------------------------------------------------------------------------------


def _grouped(summaries: Iterable[Summary]) -> list[list[Summary]]:
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for s in summaries:
        if s.get("scope") != "task":
            key = (*(str(s.get(name)) for name in _SAME_FIGURE), s.software_key, s.measurement_version)
            groups.setdefault(key, []).append(s)
    return [groups[key] for key in sorted(groups)]


def _by_label(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    found: dict[str, list[Summary]] = {}
    for s in sorted(summaries, key=lambda s: s.label):
        found.setdefault(s.label, []).append(s)
    return found


def _swept(group: Sequence[Summary]) -> str:
    lengths = {s.get("n") for s in group}
    return "m" if len(lengths) == 1 and len({s.get("m") for s in group}) > 1 else "n"


def _curve(label: str, found: Sequence[Summary], x: str, column: str) -> Series:
    points = []
    for s in sorted(found, key=lambda s: s.get(x) or 0):
        value = s.time_us if column == "time_us" else s.get(column)
        if s.ok and value:
            ends = (s.lo_us, s.hi_us) if column == "time_us" else (None, None)
            points.append(Point(s.get(x), float(value), *ends))
    failed = [(s.get(x), s.status) for s in found if s.status in ENDS]
    return Series(label, tuple(points), min(failed, default=None))


def _has_fidelity(s: Summary, column: str) -> bool:
    return s.ok and s.time_us is not None and bool(s.get("exact") or s.get(column) is not None)


def _fidelity_series(s: Summary, column: str) -> Series:
    assert s.time_us is not None
    error = 0.0 if s.get("exact") else float(s.get(column))
    return Series(s.label, (Point(s.time_us, error, s.lo_us, s.hi_us),))


def _not_drawn(inside: Sequence[Summary], drawn: Sequence[Series]) -> tuple[tuple[str, int], ...]:
    """How many impls have nothing to show, by their worst status; ``no value`` for measured ones."""
    shown = {series.label for series in drawn}
    statuses = [
        worst(s.status for s in found) for label, found in _by_label(inside).items() if label not in shown
    ]
    counts = Counter("no value" if status == Status.OK else str(status) for status in statuses)
    return tuple(sorted(counts.items()))


def _title(s: Summary) -> str:
    scope = "" if s.get("scope") == "op" else f" · {s.get('scope')}"
    return " · ".join(str(s.get(name)) for name in ("device", "workload", "dtype", "direction")) + scope


def _name(s: Summary, column: str) -> str:
    """A file name from known characters only, whatever a workload is called."""
    text = "_".join(str(s.get(name)) for name in _SAME_FIGURE) + f"_{s.software_key[:6]}_{column}"
    name = "".join(c if (c.isascii() and c.isalnum()) or c in "-_." else "-" for c in text)
    if len(name) <= _NAME_CHARACTERS:
        return name
    return f"{name[:_NAME_CHARACTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
