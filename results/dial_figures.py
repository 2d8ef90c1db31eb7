"""Figures of a task's score against its dial: length, number of pairs, depth of a needle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from attnbench.results.dials import DialCurve
from attnbench.results.palette import BLACK, COLOURS, MARKERS, NOTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXACT: Final = "softmax/"
LONGEST_NAME: Final = 150
WIDE: Final = 4.0
"""A dial whose largest setting is so many times its smallest gets a logarithmic axis."""


def by_dial(curves: Iterable[DialCurve]) -> list[list[DialCurve]]:
    """The curves that belong in one figure: a task, pattern, preset, metric and dial; no single points."""
    groups: dict[tuple[str, ...], list[DialCurve]] = {}
    for curve in curves:
        if len(curve.points) > 1:
            where = (curve.task, curve.pattern, curve.preset, curve.metric, curve.dial)
            groups.setdefault(where, []).append(curve)
    return list(groups.values())


def dial_name(group: Sequence[DialCurve]) -> str:
    """A file name for the figure of ``group``, from known characters only."""
    first = group[0]
    text = "_".join((first.task, first.pattern, first.preset, first.metric, first.dial))
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)[:LONGEST_NAME]


def dial_figure(group: Sequence[DialCurve]) -> Figure:
    """One curve an impl: means over seeds, bars for their 95 % intervals.

    Exact forms of softmax are black, controls are dashed grey; a dotted line marks the setting of training.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    canvas = Figure(figsize=(4.6, 2.6), layout=ConstrainedLayoutEngine(h_pad=0.02))
    axis = canvas.subplots()
    axis.grid(True)
    looks = _looks(group)
    for curve in sorted(group, key=lambda c: (c.control, c.label)):
        _draw(axis, curve, *looks[curve.label])
    xs = sorted({point.x for curve in group for point in curve.points})
    if xs[0] > 0 and xs[-1] >= WIDE * xs[0]:
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
    axis.set_xticks(xs, [str(x) for x in xs])
    trained = next((curve.trained for curve in group if curve.trained in xs), None)
    if trained is not None:
        axis.axvline(trained, color=NOTE, linewidth=0.8, linestyle=":", zorder=1)
        at = ("data", "axes fraction")
        axis.annotate("trained", (trained, 1.0), (2, 2), at, "offset points", fontsize=6, color=NOTE)
    first = group[0]
    axis.set_xlabel(first.dial)
    axis.set_ylabel(first.metric)
    canvas.legend(loc="outside right center", borderaxespad=0.2)
    canvas.suptitle(f"{first.task} · {first.pattern} · preset {first.preset}", x=0.01, ha="left", fontsize=9)
    return canvas


def _looks(group: Sequence[DialCurve]) -> Mapping[str, tuple[str, str, str]]:
    """Label → colour, marker, line. Other impls are told apart by colour and marker."""
    looks, others = {}, 0
    for label in sorted({curve.label for curve in group}):
        if any(curve.control for curve in group if curve.label == label):
            looks[label] = (NOTE, "", "--" if label.startswith("no_mixing") else "-.")
        elif label.startswith(EXACT):
            looks[label] = (BLACK, "o", ":" if BLACK in {colour for colour, _, _ in looks.values()} else "-")
        else:
            looks[label] = (COLOURS[others % len(COLOURS)], MARKERS[others % len(MARKERS)], "-")
            others += 1
    return looks


def _draw(axis: Axes, curve: DialCurve, colour: str, marker: str, line: str) -> None:
    points = [point for point in curve.points if math.isfinite(point.value)]
    axis.plot(
        [point.x for point in points],
        [point.value for point in points],
        color=colour,
        marker=marker,
        linestyle=line,
        markeredgecolor="white",
        markeredgewidth=0.4,
        label=curve.label,
    )
    for point in points:
        if point.lo is not None and point.hi is not None:
            axis.plot([point.x] * 2, [point.lo, point.hi], color=colour, linewidth=2.2, alpha=0.45)
