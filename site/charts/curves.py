"""Curves over the length in log-log, one line a series: what costs and errors grow like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attnbench.results.format import length, number
from attnbench.results.schema import Status
from attnbench.results.series import Panel, Point, Series
from attnbench.site.charts.base import (
    BYTE_LABEL,
    HEIGHT,
    LENGTH_LABEL,
    SERIES_FIELD,
    TIME_LABEL,
    Record,
    Spec,
    beside,
    frame,
    of_series,
    pivoted,
    rounded,
    spread_labels,
    ticks,
)
from attnbench.site.palette import DIM, FAINT, INK, PAPER, Look

HIGHLIGHTED: Final = 8
"""Series drawn in colour beside the baseline; the others stay visible in grey."""

END_WORDS: Final = {Status.OOM: "out of memory", Status.TIMEOUT: "over the time limit"}
SHOWN: Final = {"filter": "indexof(shown, datum.s) >= 0"}
OTHERS: Final = {"filter": "indexof(shown, datum.s) < 0"}


@dataclass(frozen=True)
class Metric:
    """What the y axis shows: a column of the schema or a derived number, with the unit it is stored in.

    ``name`` is a short word for addresses. ``guides`` draws the slopes N¹ and N², which only costs have.
    """

    name: str
    column: str
    title: str
    unit: str
    label: str = "format(datum.value, '~g')"
    base: int = 10
    guides: bool = False
    interval: bool = False


METRICS: Final = (
    Metric("time", "time_us", "time of a call", "µs", TIME_LABEL, guides=True, interval=True),
    Metric("ratio", "ratio", "time over the baseline's", "×", "format(datum.value, '~g') + '×'"),
    Metric("memory", "mem_peak_bytes", "peak memory of a call", "B", BYTE_LABEL, 2, guides=True),
    Metric("tflops", "tflops", "arithmetic rate, TFLOP/s", "TFLOP/s"),
    Metric("error", "err_rms", "RMS error against fp64", "", "format(datum.value, '~e')"),
    Metric("softmax", "approx_err_gaussian", "RMS error against softmax", ""),
)
METRIC: Final = {metric.name: metric for metric in METRICS}


def scaling(
    panel: Panel,
    looks: Mapping[str, Look],
    metric: Metric,
    *,
    x: str = "n",
    shown: Sequence[str] | None = None,
    y_range: tuple[float, float] | None = None,
    title: str = "",
) -> Spec:
    """Curves over the length in log-log: time, memory, rate or error, one line a series.

    ``shown`` are the labels drawn in colour, by default :func:`highlighted`; all others are grey. A ✕ stands
    at the last length that a series reached before memory or time ran out. ``y_range`` joins the axes of
    panels.
    """
    drawn = [s for s in panel.series if s.points]
    chosen = [label for label in (highlighted(panel, looks) if shown is None else shown) if label in looks]
    points = [_point(s.label, p, metric) for s in drawn for p in s.points]
    values = [r["y"] for r in points]
    low, high = y_range or (min(values, default=1.0), max(values, default=1.0))
    low, high = low / 1.25, high * 1.25
    lengths = sorted({r["x"] for r in points}) or [1]
    left, right = (lengths[0], lengths[-1]) if len(lengths) > 1 else (lengths[0] / 2, lengths[0] * 2)
    place = _place(metric, x, lengths, (left, right), (low, high))
    ends = [(s.label, s.points[-1].y) for s in drawn if s.label in chosen]
    return {
        **frame(title, _describe(panel, metric, chosen, drawn), pivoted(x, _heading(metric))),
        "params": [{"name": "shown", "value": chosen}],
        "datasets": {
            "points": points,
            "labels": spread_labels(ends, low, high, HEIGHT),
            "ends": [_end(s) for s in drawn if s.end],
            **_guides(metric, (left, right), (low, high)),
        },
        "layer": _layers(place, [s.label for s in drawn], looks, _tooltip(metric, x)),
    }


def highlighted(panel: Panel, looks: Mapping[str, Look], limit: int = HIGHLIGHTED) -> list[str]:
    """Labels worth a colour: the baseline, and those that reach furthest, lowest there, best first."""
    drawn = [s for s in panel.series if s.points]
    baseline = [s.label for s in drawn if looks[s.label].colour == INK]
    others = sorted(
        (s for s in drawn if s.label not in baseline),
        key=lambda s: (-s.points[-1].x, s.points[-1].y, s.label),
    )
    return [*baseline, *(s.label for s in others[:limit])]


# ---- inside --------------------------------------------------------------------------------------------


def _place(
    metric: Metric,
    x: str,
    lengths: Sequence[float],
    across: tuple[float, float],
    up: tuple[float, float],
) -> Record:
    return {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"type": "log", "base": 2, "domain": list(across), "nice": False},
            "axis": {
                "title": "queries N" if x == "n" else "keys M",
                "values": list(lengths),
                "labelExpr": LENGTH_LABEL,
                "grid": False,
            },
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"type": "log", "base": metric.base, "domain": list(up), "nice": False},
            "axis": {"title": metric.title, "values": ticks(*up, metric.base), "labelExpr": metric.label},
        },
    }


def _layers(
    place: Record, domain: Sequence[str], looks: Mapping[str, Look], tooltip: Sequence[Record]
) -> list[Record]:
    """From the back: slope guides, grey curves, intervals, curves, points, ends, names."""
    colour, shape = (of_series(domain, looks, channel) for channel in ("colour", "shape"))
    reason = {"field": "why", "type": "nominal"}
    dashed = {"type": "line", "color": FAINT, "strokeDash": [3, 3], "strokeWidth": 1}
    marker = {"type": "point", "filled": True, "size": 38, "opacity": 1, "stroke": PAPER, "strokeWidth": 0.7}
    cross = {"type": "text", "text": "✕", "fontWeight": "bold", "dy": -10}
    band = {"x": place["x"], "y": {**place["y"], "field": "lo"}, "y2": {"field": "hi"}, "color": colour}
    slope = {"field": "g", "type": "nominal"}
    return [
        {"data": {"name": "guides"}, "mark": dashed, "encoding": {**place, "detail": slope}},
        {
            "data": {"name": "guide_ends"},
            "mark": {"type": "text", "color": DIM, "fontSize": 10, "align": "right", "dy": 8, "dx": -3},
            "encoding": {**place, "text": slope},
        },
        {
            "transform": [OTHERS],
            "mark": {"type": "line", "color": FAINT, "strokeWidth": 1},
            "encoding": {**place, "detail": SERIES_FIELD},
        },
        {
            "transform": [SHOWN, {"filter": "isValid(datum.lo)"}],
            "mark": {"type": "area", "opacity": 0.22},
            "encoding": band,
        },
        {
            "transform": [SHOWN],
            "mark": {"type": "line", "strokeWidth": 1.6},
            "encoding": {**place, "color": SERIES_FIELD},
        },
        {
            "transform": [SHOWN],
            "mark": marker,
            "encoding": {**place, "color": SERIES_FIELD, "shape": shape, "tooltip": list(tooltip)},
        },
        {
            "data": {"name": "ends"},
            "transform": [SHOWN],
            "mark": {**cross, "fontSize": 13},
            "encoding": {**place, "color": SERIES_FIELD, "tooltip": reason},
        },
        {
            "data": {"name": "ends"},
            "transform": [OTHERS],
            "mark": {**cross, "fontSize": 10, "color": DIM},
            "encoding": {**place, "tooltip": reason},
        },
        beside(place["y"]),
    ]


def _tooltip(metric: Metric, x: str) -> list[Record]:
    return [
        {"field": "s", "type": "nominal", "title": "impl"},
        {"field": "x", "type": "quantitative", "title": x.upper()},
        {"field": "y", "type": "quantitative", "title": _heading(metric), "format": ",.4~g"},
    ]


def _heading(metric: Metric) -> str:
    return (
        metric.title if not metric.unit or metric.unit in metric.title else f"{metric.title}, {metric.unit}"
    )


def _point(label: str, p: Point, metric: Metric) -> Record:
    record: Record = {"s": label, "x": p.x, "y": rounded(p.y)}
    if metric.interval and p.lo is not None and p.hi is not None:
        record |= {"lo": rounded(p.lo), "hi": rounded(p.hi)}
    return record


def _end(s: Series) -> Record:
    assert s.end is not None
    last, (at, status) = s.points[-1], s.end
    why = f"{s.label}: {END_WORDS.get(status, str(status))} at {length(at)}"
    return {"s": s.label, "x": last.x, "y": rounded(last.y), "why": why}


def _guides(metric: Metric, xs: tuple[float, float], ys: tuple[float, float]) -> dict[str, list[Record]]:
    """Straight lines of slope 1 and 2 from the lower left corner, each with its name where it leaves."""
    lines: list[Record] = []
    ends: list[Record] = []
    (left, right), (low, high) = xs, ys
    for name, power in (("N¹", 1), ("N²", 2)) if metric.guides else ():
        far = min(right, left * (high / low) ** (1 / power))
        end = {"g": name, "x": rounded(far), "y": rounded(low * (far / left) ** power)}
        lines += [{"g": name, "x": rounded(left), "y": rounded(low)}, end]
        ends.append(end)
    return {"guides": lines, "guide_ends": ends}


def _describe(panel: Panel, metric: Metric, chosen: Sequence[str], drawn: Sequence[Series]) -> str:
    text = [f"{metric.title} over the length on logarithmic axes, {len(drawn)} series, {panel.pattern}."]
    longest = max((s.points[-1].x for s in drawn), default=0)
    last = sorted((s.points[-1].y, s.label) for s in drawn if s.points[-1].x == longest and s.label in chosen)
    if last:
        value = f"{number(last[0][0])} {metric.unit}".strip()
        text.append(f"At {length(longest)} tokens the lowest is {last[0][1]}, {value}.")
    ended = [s.label for s in drawn if s.end]
    if ended:
        text.append(f"Ended by memory or time: {', '.join(ended)}.")
    return " ".join(text)
