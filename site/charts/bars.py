"""Charts with one line an impl: performance profile, coverage, crossing lengths and scores of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from attnbench.results.efficiency import Crossing
from attnbench.results.format import number
from attnbench.results.schema import Status
from attnbench.results.seeds import Score
from attnbench.site.charts.base import (
    HEIGHT,
    LABELS,
    LENGTH_LABEL,
    LINE_HEIGHT,
    SERIES_FIELD,
    WIDTH,
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
from attnbench.site.palette import DIM, FAINT, GRID, INK, LIGHT, PAPER, Look
from attnbench.site.views.words import LETTERS

ROW: Final = 20
STATUS_COLOURS: Final[dict[Status, str]] = {
    Status.OK: LIGHT["1"],
    Status.INCORRECT: LIGHT["4"],
    Status.UNSUPPORTED: GRID,
    Status.OOM: LIGHT["2"],
    Status.TIMEOUT: LIGHT["6"],
    Status.COMPILE_ERROR: LIGHT["5"],
    Status.ERROR: LIGHT["3"],
    Status.CRASHED: LIGHT["7"],
    Status.SKIPPED: FAINT,
}
DARK_LETTER_ON: Final = (Status.UNSUPPORTED, Status.SKIPPED)
POINT: Final = {
    "type": "point",
    "filled": True,
    "size": 50,
    "opacity": 1,
    "stroke": PAPER,
    "strokeWidth": 0.7,
}

Profile = Mapping[str, Sequence[tuple[float, float]]]
"""Label → steps (τ, share of the cases in which its time is at most τ times the best), ascending in τ."""


def performance_profile(
    found: Profile, cases: int, looks: Mapping[str, Look], shown: Sequence[str], title: str = ""
) -> Spec:
    """Share of the cases (y) that an impl solves within τ times the best time (x, logarithmic).

    Higher is better: the height at the left edge is how often it is the fastest, at the right edge how often
    it gives a result at all. Dolan and Moré, arXiv cs/0102001.
    """
    steps = {label: taken for label, taken in found.items() if taken}
    right = max([tau for taken in steps.values() for tau, _ in taken] + [2.0]) * 1.05
    points = [
        {"s": label, "x": rounded(tau), "y": rounded(share)}
        for label, taken in steps.items()
        for tau, share in [*taken, (right, taken[-1][1])]
    ]
    ends = sorted((HEIGHT * (1 - taken[-1][1]), label) for label, taken in steps.items() if label in shown)
    places = spread([place for place, _ in ends], LINE_HEIGHT, 0.0, HEIGHT)
    colour = of_series(list(steps), looks, "colour")
    times = {"title": "time over the best, at most", "values": ticks(1.0, right), "grid": False}
    place: Record = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"type": "log", "domain": [1.0, right], "nice": False},
            "axis": {**times, "labelExpr": "format(datum.value, '~g') + '×'"},
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"domain": [0, 1]},
            "axis": {"title": "share of the cases", "format": ".0%", "tickCount": 5},
        },
    }
    step = {"type": "line", "interpolate": "step-after"}
    first = sorted((-taken[0][1], label) for label, taken in steps.items() if taken[0][0] <= 1.0)
    lead = f" Most often the fastest: {first[0][1]}, {-first[0][0]:.0%}." if first else ""
    description = f"Performance profile of {len(found)} impls over {cases} cases.{lead}"
    return {
        **frame(title, description, listed(("s", "impl"), ("x", "within × best"), ("y", "share of cases"))),
        "params": [{"name": "shown", "value": list(shown)}],
        "datasets": {
            "points": points,
            "labels": [
                {"s": label, "y": rounded(1 - at / HEIGHT)}
                for (_, label), at in zip(ends, places, strict=True)
            ],
        },
        "layer": [
            {
                "transform": [{"filter": "indexof(shown, datum.s) < 0"}],
                "mark": {**step, "color": FAINT, "strokeWidth": 1},
                "encoding": {**place, "detail": {"field": "s", "type": "nominal"}},
            },
            {
                "transform": [{"filter": "indexof(shown, datum.s) >= 0"}],
                "mark": {**step, "strokeWidth": 1.6},
                "encoding": {**place, "color": colour},
            },
            beside(place["y"]),
        ],
    }


def coverage(counts: Mapping[str, Mapping[str, int]], title: str = "") -> Spec:
    """How many cases of each impl ended how: one stacked bar an impl, with the letter of each status."""
    records = [record for label, found in counts.items() for record in _stack(label, found)]
    seen = {r["status"] for r in records}
    present = [status for status in Status if str(status) in seen]
    colours = {"domain": [str(s) for s in present], "range": [STATUS_COLOURS[s] for s in present]}
    legend = {"title": None, "orient": "top", "labelColor": DIM, "columns": 3}
    on_light = " || ".join(f"datum.status === '{status}'" for status in DARK_LETTER_ON)
    x = {"field": "x", "type": "quantitative", "axis": {"title": "cases", "tickMinStep": 1}}
    total = sum(r["count"] for r in records)
    fine = sum(r["count"] for r in records if r["status"] == Status.OK)
    description = f"How the cases of {len(counts)} impls ended: {fine} of {total} ok."
    return {
        **frame(title, description, _table("status", "status", "count", "cases"), WIDTH, _rows(counts)),
        "datasets": {"points": records},
        "layer": [
            {
                "mark": {"type": "bar", "height": 14, "stroke": PAPER, "strokeWidth": 0.7},
                "encoding": {
                    "y": _by_impl(),
                    "x": x,
                    "x2": {"field": "x2"},
                    "color": {"field": "status", "type": "nominal", "scale": colours, "legend": legend},
                    "tooltip": [{"field": field, "type": "nominal"} for field in ("s", "status", "count")],
                },
            },
            {
                "transform": [{"calculate": "(datum.x + datum.x2) / 2", "as": "middle"}],
                "mark": {"type": "text", "fontSize": 10},
                "encoding": {
                    "y": _by_impl(),
                    "x": {"field": "middle", "type": "quantitative"},
                    "text": {"field": "letter", "type": "nominal"},
                    "color": {"condition": {"test": on_light, "value": INK}, "value": PAPER},
                },
            },
        ],
    }


def crossings(
    found: Mapping[str, Crossing],
    lengths: Sequence[int],
    looks: Mapping[str, Look],
    baseline: str,
    title: str = "",
) -> Spec:
    """From which length on an impl is faster than the baseline: a point and its interval, a line an impl.

    ``always`` stands at the shortest length measured with ◀, ``never`` at the longest with ▶. An end of an
    interval beyond what was measured is drawn to the edge.
    """
    left, right = float(lengths[0]), float(max(lengths[-1], 2 * lengths[0]))
    order = {"always": 0, "crosses": 1, "never": 2}
    ordered = sorted(found.items(), key=lambda i: (order[i[1].side], i[1].length or 0.0, i[0]))
    records = [_crossing(label, c, left, right) for label, c in ordered]
    colour = of_series(list(found), looks, "colour")
    axis = {"title": f"faster than {baseline} from this length on", "values": list(lengths)}
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2, "domain": [left, right], "nice": False},
        "axis": {**axis, "labelExpr": LENGTH_LABEL},
    }
    sign = "datum.side === 'always' ? '◀' : datum.side === 'never' ? '▶' : '●'"
    crossing = sum(1 for c in found.values() if c.side == "crosses")
    description = (
        f"Length from which {len(found)} impls are faster than {baseline}: "
        f"{crossing} cross it within what was measured."
    )
    table = _table("side", "what", "x", "length", "lo", "from", "hi", "to")
    return {
        **frame(title, description, table, WIDTH, _rows(found)),
        "datasets": {"points": records},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.lo)"}],
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.4},
                "encoding": {
                    "y": _by_impl(),
                    "x": {**x, "field": "lo"},
                    "x2": {"field": "hi"},
                    "color": colour,
                },
            },
            {
                "transform": [{"calculate": sign, "as": "sign"}],
                "mark": {"type": "text", "fontSize": 12},
                "encoding": {
                    "y": _by_impl(),
                    "x": x,
                    "text": {"field": "sign", "type": "nominal"},
                    "color": SERIES_FIELD,
                    "tooltip": [{"field": f, "type": "nominal"} for f in ("s", "side", "x", "lo", "hi")],
                },
            },
        ],
    }


def seeds(found: Sequence[Score], looks: Mapping[str, Look], title: str = "") -> Spec:
    """Scores of a task: every seed as a tick, the mean and its 95 % interval; controls as dashed rules."""
    scored = [s for s in found if s.value is not None]
    mechanisms = [s for s in scored if not s.control]
    metric = next((f"{s.metric}, {s.better} is better" for s in scored if s.metric), "metric")
    colour = of_series([s.label for s in mechanisms], looks, "colour")
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"zero": False, "padding": 8},
        "axis": {"title": metric},
    }
    lead = f" Best mean: {scored[0].label}, {number(scored[0].value, digits=4)}." if scored else ""
    description = f"{metric}: {len(mechanisms)} impls over their seeds.{lead}"
    table = _table("x", "mean", "lo", "from", "hi", "to", "seeds", "seeds")
    beyond = sorted((rounded(s.value), s.label) for s in scored if s.control and s.value is not None)
    controls = [{"s": label, "x": value, "line": i % 2} for i, (value, label) in enumerate(beyond)]
    return {
        **frame(title, description, table, WIDTH, _rows(mechanisms)),
        "datasets": {
            "points": [_score(s) for s in mechanisms],
            "seeds": [{"s": s.label, "x": rounded(v)} for s in mechanisms for v in s.values],
            "controls": controls,
        },
        "layer": [
            {
                "data": {"name": "controls"},
                "mark": {"type": "rule", "color": DIM, "strokeDash": [4, 3]},
                "encoding": {"x": x, "tooltip": {"field": "s", "type": "nominal"}},
            },
            *(_control_names(x, line) for line in range(2)),
            {
                "transform": [{"filter": "isValid(datum.lo)"}],
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.4},
                "encoding": {
                    "y": _by_impl(),
                    "x": {**x, "field": "lo"},
                    "x2": {"field": "hi"},
                    "color": colour,
                },
            },
            {
                "data": {"name": "seeds"},
                "mark": {"type": "tick", "thickness": 1.5, "size": 12},
                "encoding": {"y": _by_impl(), "x": x, "color": SERIES_FIELD},
            },
            {"mark": POINT, "encoding": {"y": _by_impl(), "x": x, "color": SERIES_FIELD}},
        ],
    }


# ---- inside --------------------------------------------------------------------------------------------


def _stack(label: str, found: Mapping[str, int]) -> list[Record]:
    """Segments of one bar, end to end; one that is too short for a letter has none."""
    records: list[Record] = []
    start, total = 0, sum(found.values())
    for status in Status:
        count = found.get(str(status), 0)
        if count:
            letter = LETTERS[status] if count * 14 >= total else ""
            end = start + count
            records.append({"s": label, "status": str(status), "x": start, "x2": end, "count": count})
            records[-1]["letter"] = letter
            start = end
    return records


def _crossing(label: str, c: Crossing, left: float, right: float) -> Record:
    at = {"always": left, "never": right}.get(c.side, c.length)
    assert at is not None
    record: Record = {"s": label, "x": rounded(at), "side": c.side}
    if c.side == "crosses" and c.lo is not None and c.hi is not None:
        record |= {"lo": rounded(min(max(c.lo, left), right)), "hi": rounded(min(max(c.hi, left), right))}
    return record


def _score(s: Score) -> Record:
    assert s.value is not None
    record: Record = {"s": s.label, "x": rounded(s.value), "seeds": len(s.values)}
    if s.lo is not None and s.hi is not None:
        record |= {"lo": rounded(s.lo), "hi": rounded(s.hi)}
    return record


def _control_names(x: Record, line: int) -> Record:
    """Names over the rules of controls, on two lines in turn: neighbours would stand in one another."""
    mark = {"type": "text", "color": DIM, "fontSize": 10, "baseline": "bottom", "dy": -2 - 11 * line}
    return {
        "data": {"name": "controls"},
        "transform": [{"filter": f"datum.line === {line}"}],
        "mark": mark,
        "encoding": {"x": x, "y": {"value": 0}, "text": {"field": "s", "type": "nominal"}},
    }


def _by_impl() -> Record:
    axis = {"title": None, "labelLimit": LABELS + 60, "ticks": False, "domain": False, "labelColor": INK}
    return {"field": "s", "type": "nominal", "sort": None, "axis": axis}


def _rows(lines: Mapping[str, object] | Sequence[object]) -> int:
    return ROW * max(1, len(lines))


def _table(*pairs: str) -> Record:
    """A table that begins with the impl; ``pairs`` are fields and their headings in turn."""
    return listed(("s", "impl"), *zip(pairs[::2], pairs[1::2], strict=True))
