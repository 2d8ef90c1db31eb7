"""Error or score against time, one point an impl: the front that no other beats, the exact ones apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnbench.results.format import number
from attnbench.results.series import Panel, Point, pareto
from attnbench.site.charts.base import (
    HEIGHT,
    LINE_HEIGHT,
    SERIES_FIELD,
    TIME_LABEL,
    Record,
    Spec,
    beside,
    frame,
    listed,
    of_series,
    rounded,
    spread,
    ticks,
)
from attnbench.site.palette import DIM, FAINT, INK, PAPER, Look

Named = tuple[str, Point]


def tradeoff(
    panel: Panel,
    looks: Mapping[str, Look],
    *,
    y_title: str = "RMS error against softmax",
    higher: bool = False,
    log: bool = True,
    title: str = "",
) -> Spec:
    """Error or score (y) against time in µs (x); ``higher`` says that more of y is better.

    The front is drawn and named; what another beats in both is faded, never hidden. With ``log``, exact
    mechanisms (y is 0) stand as ticks below, and the interval of the fastest is a band through the panel.
    """
    points = [(s.label, s.points[0]) for s in panel.series if s.points]
    exact = sorted((item for item in points if log and item[1].y == 0.0), key=lambda i: (i[1].x, i[0]))
    others = [item for item in points if item not in exact]
    sign = -1.0 if higher else 1.0
    front = {(p.x, sign * p.y) for p in pareto(replace(p, y=sign * p.y) for _, p in others)}
    records = [_record(label, p, (p.x, p.y) in front) for label, p in others]
    on_front = sorted((r for r in records if r["front"]), key=lambda r: r["x"])
    up = _y_range([r["y"] for r in records], log)
    place = _place([p.x for _, p in points], up, y_title, log)
    return {
        **frame(title, _describe(panel, on_front, exact, y_title), _table(y_title)),
        "datasets": {
            "points": records,
            "labels": _names(on_front, up, log),
            "exact": [{"s": label, "x": rounded(p.x), "y": 0.0} for label, p in exact],
            "band": [_band(p) for _, p in exact[:1]],
        },
        "layer": _layers(place, [label for label, _ in [*others, *exact]], looks),
    }


def _y_range(ys: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(ys, default=1.0), max(ys, default=1.0)
    if log:
        return low / 1.6, high * 1.25
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _place(xs: Sequence[float], up: tuple[float, float], y_title: str, log: bool) -> Record:
    left, right = min(xs, default=1.0) / 1.3, max(xs, default=1.0) * 1.3
    axis: Record = {"title": y_title, "labelExpr": "format(datum.value, '~g')"}
    if log:
        axis["values"] = ticks(*up)
    return {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"type": "log", "domain": [left, right], "nice": False},
            "axis": {
                "title": "time of a call",
                "values": ticks(left, right),
                "labelExpr": TIME_LABEL,
                "grid": False,
            },
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"type": "log" if log else "linear", "domain": list(up), "nice": False},
            "axis": axis,
        },
    }


def _layers(place: Record, domain: Sequence[str], looks: Mapping[str, Look]) -> list[Record]:
    """From the back: the band of the fastest exact impl, exact ones, the front, points, names."""
    colour, shape = (of_series(domain, looks, channel) for channel in ("colour", "shape"))
    tooltip = [
        {"field": "s", "type": "nominal", "title": "impl"},
        {"field": "x", "type": "quantitative", "title": "time µs", "format": ",.4~g"},
        {"field": "y", "type": "quantitative", "title": place["y"]["axis"]["title"], "format": ".4~g"},
    ]
    fade = {"condition": {"test": "datum.front", "value": 1}, "value": 0.35}
    word = {"type": "text", "color": DIM, "fontSize": 10, "align": "left", "baseline": "top", "dx": 3}
    return [
        {
            "data": {"name": "band"},
            "mark": {"type": "rect", "color": INK, "opacity": 0.14},
            "encoding": {"x": {**place["x"], "field": "lo"}, "x2": {"field": "hi"}},
        },
        {
            "data": {"name": "band"},
            "mark": {**word, "text": "exact"},
            "encoding": {"x": {**place["x"], "field": "hi"}, "y": {"value": 1}},
        },
        {
            "data": {"name": "exact"},
            "mark": {"type": "tick", "orient": "vertical", "thickness": 2, "size": 14},
            "encoding": {
                "x": place["x"],
                "y": {"value": HEIGHT - 7},
                "color": colour,
                "tooltip": tooltip[:2],
            },
        },
        {
            "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "interpolate": "step-after", "color": FAINT, "strokeDash": [4, 2]},
            "encoding": place,
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "stroke": PAPER, "strokeWidth": 0.7},
            "encoding": {**place, "color": SERIES_FIELD, "shape": shape, "opacity": fade, "tooltip": tooltip},
        },
        beside(place["y"]),
    ]


def _names(front: Sequence[Record], up: tuple[float, float], log: bool) -> list[Record]:
    """The labels of the front beside the plot, moved apart where they would overlap."""
    low, high = (math.log(y) for y in up) if log else up
    at = [
        (HEIGHT * (1 - ((math.log(r["y"]) if log else r["y"]) - low) / (high - low)), r["s"]) for r in front
    ]
    at.sort()
    places = spread([y for y, _ in at], LINE_HEIGHT, 0.0, HEIGHT)
    values = [low + (high - low) * (1 - place / HEIGHT) for place in places]
    return [
        {"s": label, "y": rounded(math.exp(value) if log else value)}
        for (_, label), value in zip(at, values, strict=True)
    ]


def _table(y_title: str) -> Record:
    return listed(("s", "impl"), ("x", "time, µs"), ("y", y_title), ("front", "on the front"))


def _record(label: str, p: Point, front: bool) -> Record:
    return {"s": label, "x": rounded(p.x), "y": rounded(p.y), "front": front}


def _band(p: Point) -> Record:
    """The interval of the fastest exact impl, or its time ± 1 % where a single block has none."""
    lo, hi = (p.lo, p.hi) if p.lo is not None and p.hi is not None else (p.x * 0.99, p.x * 1.01)
    return {"lo": rounded(lo), "hi": rounded(hi)}


def _describe(panel: Panel, front: Sequence[Record], exact: Sequence[Named], y_title: str) -> str:
    count = sum(1 for s in panel.series if s.points)
    text = [f"{y_title} over time, {count} impls, {panel.pattern}."]
    if front:
        named = ", ".join(f"{r['s']} ({number(r['x'])} µs, {number(r['y'])})" for r in front)
        text.append(f"On the front, fastest first: {named}.")
    if exact:
        text.append(f"The fastest exact one is {exact[0][0]}, {number(exact[0][1].x)} µs.")
    return " ".join(text)
