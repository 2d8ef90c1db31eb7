"""What all charts share: the frame of a spec, ticks, labels that do not overlap, rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from attnbench.site.palette import DIM, FAINT, GRID, Look, scale

Spec = dict[str, Any]
Record = dict[str, Any]

SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v5.json"
WIDTH, HEIGHT, LABELS = 236, 200, 148
LINE_HEIGHT: Final = 13
ROOM: Final = 30
"""Pixels beside the names of rows: the reader's font may be wider than the one that they were measured in."""
FONT: Final = "Liberation Sans, Arial, Helvetica, sans-serif"
CONFIG: Final[Spec] = {
    "aria": False,
    "mark": {"aria": False},  # the drawing has one name; unnamed marks inside are noise to a screen reader
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": DIM,
        "titleColor": DIM,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 6,
        "domainColor": FAINT,
        "tickColor": FAINT,
        "gridColor": GRID,
        "labelOverlap": True,
        "labelFlush": False,
    },
}
TIME_LABEL: Final = (
    "datum.value >= 1e6 ? format(datum.value / 1e6, '~r') + ' s' : "
    "datum.value >= 1e3 ? format(datum.value / 1e3, '~r') + ' ms' : format(datum.value, '~r') + ' µs'"
)
BYTE_LABEL: Final = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : format(datum.value, '~r') + ' B'"
)
LENGTH_LABEL: Final = (
    "datum.value >= 1048576 ? datum.value / 1048576 + 'M' : "
    "datum.value >= 1024 && datum.value % 1024 === 0 ? datum.value / 1024 + 'k' : datum.value"
)


def spread_labels(
    ends: Iterable[tuple[str, float]], low: float, high: float, height: float, gap: float = LINE_HEIGHT
) -> list[Record]:
    """Labels beside the ends of curves on a logarithmic axis, moved apart where they would overlap."""
    span = math.log(high / low)
    wanted = sorted((height * (1 - math.log(y / low) / span), label) for label, y in ends)
    places = spread([place for place, _ in wanted], gap, 0.0, height)
    return [
        {"s": label, "y": rounded(low * (high / low) ** (1 - place / height))}
        for (_, label), place in zip(wanted, places, strict=True)
    ]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places moved to stand ``gap`` apart, within [low, high] where they fit."""
    found = list(places)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    if found and found[-1] > high:
        found[-1] = high
        for i in range(len(found) - 2, -1, -1):
            found[i] = min(found[i], found[i + 1] - gap)
    overflow = low - found[0] if found and found[0] < low else 0.0
    return [place + overflow for place in found]


def ticks(low: float, high: float, base: int = 10) -> list[float]:
    """Powers of the base within a range, thinned to eight; of ten also 2 and 5 times where there are few."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    steps = (1.0, 2.0, 5.0) if base == 10 and last - first <= 2 else (1.0,)
    found = [base**k * step for k in range(first, last + 1) for step in steps]
    inside = [float(f"{value:.6g}") for value in found if low <= value <= high]
    return inside[:: math.ceil(len(inside) / 8) or 1] if inside else []


def rounded(value: float) -> float:
    """Six significant digits: what a chart or its table can show."""
    return float(f"{value:.6g}")


def frame(
    title: str, description: str, table: Mapping[str, Any], width: int = WIDTH, height: int = HEIGHT
) -> Spec:
    """The outside of a spec. ``table`` says what the table under the chart shows, see :func:`listed`."""
    return {
        "$schema": SCHEMA,
        "title": title,
        "description": description,
        "usermeta": dict(table),
        "width": width,
        "height": height,
        "padding": {"left": 4 if height == HEIGHT else ROOM, "top": 10, "right": 14, "bottom": 4},
        "config": CONFIG,
        "data": {"name": "points"},
    }


def listed(*columns: tuple[str, str]) -> dict[str, Any]:
    """A table with a line for each record of ``points``; a column is (field, heading)."""
    return {"columns": [list(column) for column in columns]}


def pivoted(across: str, unit: str) -> dict[str, Any]:
    """A table with a line for each series ``s``, a column for each ``x`` and ``y`` in the cells."""
    return {"across": across, "unit": unit}


SERIES_FIELD: Final[Spec] = {"field": "s", "type": "nominal"}
"""A series in a further layer: layers share scales, so that the list of colours stands in a spec once."""


def of_series(domain: Sequence[str], looks: Mapping[str, Look], channel: str) -> Spec:
    """The encoding that gives each series its ``colour`` or ``shape``; labels beside lines are the legend."""
    return {"field": "s", "type": "nominal", "scale": scale(domain, dict(looks), channel), "legend": None}


def beside(y: Spec, colour: Spec = SERIES_FIELD) -> Spec:
    """The layer of names to the right of the plot, from the records of ``labels``."""
    return {
        "data": {"name": "labels"},
        "mark": {"type": "text", "align": "left", "fontSize": 11, "limit": LABELS - 10},
        "encoding": {
            "x": {"value": WIDTH + 8},
            "y": y,
            "text": {"field": "s", "type": "nominal"},
            "color": colour,
        },
    }
