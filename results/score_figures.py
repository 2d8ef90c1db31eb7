"""Figures of task scores for papers: every seed, the mean with its interval, the controls to stand above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from attnbench.results.seeds import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SEED, NOTE = "#1A1A1A", "#0072B2", "#6A6A6A"
ROW_HEIGHT: Final = 0.19
"""Inches for one impl."""


def score_name(found: Sequence[Score]) -> str:
    """A file name for one table of scores, from known characters only."""
    first = found[0]
    text = "_".join((first.device, first.task, first.pattern, first.preset, first.software_key[:6], "score"))
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


def score_figure(found: Sequence[Score]) -> Figure:
    """The scores of one task, best first: seeds as ticks, means as dots, 95 % intervals as lines.

    Controls are dashed lines across. What has no score stands below, with its status.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = [s for s in found if s.value is not None and not s.control]
    missing = [s for s in found if s.value is None and not s.control]
    height = 0.9 + ROW_HEIGHT * max(len(shown), 1) + (0.15 if missing else 0.0)
    canvas = Figure(figsize=(3.4, height), layout=ConstrainedLayoutEngine(h_pad=0.02))
    axis = canvas.subplots()
    for row, score in enumerate(shown):
        _draw_score(axis, row, score)
    _draw_controls(axis, [s for s in found if s.control and s.value is not None])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_yticks(range(len(shown)), [s.label for s in shown])
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")
    first = next((s for s in found if s.metric), found[0])
    better = f" ({first.better} is better)" if first.better else ""
    axis.set_xlabel(f"{first.metric or 'score'}{better}")
    canvas.suptitle(_title(found), x=0.01, ha="left", fontsize=9)
    if missing:
        text = ", ".join(f"{s.label} ({s.status})" for s in missing)
        canvas.supxlabel(f"no score: {text}", x=0.01, ha="left", fontsize=6, color=NOTE)
    return canvas


def _draw_score(axis: Axes, row: int, score: Score) -> None:
    axis.plot(score.values, [row] * len(score.values), linestyle="", marker="|", markersize=7, color=SEED)
    if score.lo is not None and score.hi is not None:
        axis.plot([score.lo, score.hi], [row, row], color=INK, linewidth=1.0)
    if score.value is not None:
        axis.plot([score.value], [row], marker="o", markersize=3.5, color=INK)


def _draw_controls(axis: Axes, controls: Sequence[Score]) -> None:
    """A dashed line for each control, its name above the panel; alternating heights keep names apart."""
    for place, control in enumerate(sorted(controls, key=lambda s: s.value or 0.0)):
        assert control.value is not None
        axis.axvline(control.value, color=NOTE, linewidth=0.8, linestyle=(0, (4, 2)))
        axis.annotate(
            control.label.partition("/")[0],
            (control.value, 1.0),
            (0, 2 + 7 * (place % 2)),
            ("data", "axes fraction"),
            "offset points",
            ha="center",
            fontsize=6,
            color=NOTE,
        )


def _title(found: Sequence[Score]) -> str:
    first = found[0]
    seeds = max(len(s.seeds) for s in found)
    return f"{first.task} · {first.pattern} · preset {first.preset} · {seeds} seed{'' if seeds == 1 else 's'}"
