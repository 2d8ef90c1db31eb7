"""A series of runs over time: every run a point, its levels as steps, rules where the software changed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from attnbench.results.format import number
from attnbench.results.history import Change, Level
from attnbench.site.charts.base import TIME_LABEL, Record, Spec, frame, listed, rounded
from attnbench.site.palette import DIM, FAINT, LIGHT

WIDTH, HEIGHT = 420, 110
SMALL = (120, 28)


def timeline(
    dates: Sequence[str],
    values: Sequence[float],
    software: Sequence[str],
    levels: Sequence[Level],
    changes: Sequence[Change],
    *,
    title: str = "",
    small: bool = False,
) -> Spec:
    """Times (µs) of one case by run, oldest first.

    ``levels`` and ``changes`` are those of :mod:`attnbench.results.history`; a step is marked ▲ (slower) or
    ▼. ``small`` is a sparkline without axes.
    """
    points = [
        {"x": i, "date": date[:10], "y": rounded(y), "software": key}
        for i, (date, y, key) in enumerate(zip(dates, values, software, strict=True))
    ]
    rules = [
        {"x": i - 0.5, "software": f"{a} → {b}"} for i, (a, b) in enumerate(pairwise(software), 1) if a != b
    ]
    ends = f"from {number(values[0])} to {number(values[-1])} µs"
    description = (
        f"Time over {len(values)} runs, {ends}; steps: {len(changes)}, changes of software: {len(rules)}."
    )
    width, height = SMALL if small else (WIDTH, HEIGHT)
    table = listed(("date", "date"), ("y", "time, µs"), ("software", "software"))
    return {
        **frame(title, description, table, width, height),
        "datasets": {
            "points": points,
            "levels": [
                {"l": k, "x": edge, "y": rounded(level.value)}
                for k, level in enumerate(levels)
                for edge in (level.start - 0.5, level.end - 0.5)
            ],
            "changes": [
                {"x": c.at, "y": rounded(values[c.at]), "sign": "▲" if c.ratio > 1 else "▼"} for c in changes
            ],
            "rules": rules,
        },
        "layer": _layers(_place(dates, values, small), small),
    }


def _place(dates: Sequence[str], values: Sequence[float], small: bool) -> Record:
    names = "[" + ",".join(f"'{date[:10]}'" for date in dates) + "]"
    across = {
        "title": None,
        "grid": False,
        "values": list(range(len(values))),
        "labelExpr": f"{names}[datum.value]",
        "labelOverlap": "greedy",
    }
    return {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"domain": [-0.5, len(values) - 0.5], "nice": False},
            "axis": None if small else across,
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"domain": [min(values) * 0.97, max(values) * 1.05], "nice": not small},
            "axis": None if small else {"title": None, "labelExpr": TIME_LABEL, "tickCount": 4},
        },
    }


def _layers(place: Record, small: bool) -> list[Record]:
    tooltip = [
        {"field": "date", "type": "nominal"},
        {"field": "y", "type": "quantitative", "title": "time µs"},
        {"field": "software", "type": "nominal"},
    ]
    dot = {"type": "point", "filled": True, "color": FAINT if small else DIM, "size": 14 if small else 28}
    return [
        {
            "data": {"name": "rules"},
            "mark": {"type": "rule", "color": DIM, "strokeDash": [3, 3]},
            "encoding": {"x": place["x"], "tooltip": {"field": "software", "type": "nominal"}},
        },
        {
            "data": {"name": "levels"},
            "mark": {"type": "line", "color": LIGHT["1"], "strokeWidth": 2},
            "encoding": {**place, "detail": {"field": "l", "type": "ordinal"}},
        },
        {"mark": dot, "encoding": {**place, "tooltip": tooltip}},
        {
            "data": {"name": "changes"},
            "mark": {"type": "text", "fontSize": 12, "dy": -11, "color": LIGHT["2"]},
            "encoding": {**place, "text": {"field": "sign", "type": "nominal"}},
        },
    ]
