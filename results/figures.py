"""Figures for papers: time and memory against length, error against time, scores of tasks, and their dials.

Built on matplotlib's object interface, so no window system and no global state is touched; matplotlib is
imported when a figure is drawn. An impl looks the same in every panel and figure of one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from attnbench.errors import UsageError
from attnbench.results import dials
from attnbench.results import series as data
from attnbench.results.aggregate import newest, summarise
from attnbench.results.dial_figures import by_dial, dial_figure, dial_name
from attnbench.results.files import atomically
from attnbench.results.format import bytes_text, length, number, time_text
from attnbench.results.palette import BLACK, COLOURS, GREY, MARKERS, NOTE
from attnbench.results.report import BASELINE
from attnbench.results.rows import Row
from attnbench.results.schema import Status
from attnbench.results.score_figures import score_figure, score_name
from attnbench.results.seeds import scores
from attnbench.results.series import Panel, Point, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = ("pdf", "png", "svg")
HIGHLIGHTED: Final = 12
"""Series drawn in colour beside the baseline; the others stay visible as thin grey lines."""

LINES: Final = ("-", (0, (4, 1.5)), (0, (1, 1)))
END_MARKS: Final = {Status.OOM: "x", Status.TIMEOUT: "1"}
END_WORDS: Final = {Status.OOM: "out of memory", Status.TIMEOUT: "over the time limit"}

PATTERN_TITLES: Final = {
    "NS": "NS · noncausal self",
    "CS": "CS · causal self",
    "NC": "NC · noncausal cross",
    "CC": "CC · causal cross",
}

STYLE: Final[Any] = {  # Any: matplotlib's versions differ in the type of the keys
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "grid.color": "#EDEDED",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "attnbench",
}


Drawn = TypeVar("Drawn")


class Look(NamedTuple):
    """How a series is drawn, wherever it is drawn."""

    colour: str
    marker: str
    line: Any


Looks = Mapping[str, Look]
"""Label → look, those worth a colour first."""


def draw(
    rows: Iterable[Row], folder: str | Path, formats: Sequence[str] = ("pdf",), baseline: str = BASELINE
) -> list[Path]:
    """Draw every figure that the rows give, into ``folder``, and return the files in order.

    Raises UsageError for an unknown format and AttnbenchError when the folder cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"figure format {unknown[0]!r}; expected one of {', '.join(FORMATS)}")
    summaries, _ = newest(summarise(rows))
    times, memory = data.scaling(summaries), data.scaling(summaries, "mem_peak_bytes")
    errors = data.fidelity(summaries)
    looks, tables = looks_of([*times, *memory, *errors], baseline), scores(summaries)
    figures = [
        *((f.name, scaling_figure(f, looks)) for f in times),
        *((f.name, scaling_figure(f, looks, "mem_peak_bytes")) for f in memory),
        *((f.name, fidelity_figure(f, looks)) for f in errors),
        *((score_name(table), _styled(score_figure, table)) for table in tables),
        *((dial_name(group), _styled(dial_figure, group)) for group in by_dial(dials.curves(tables))),
    ]
    return [save(figure, Path(folder) / f"{name}.{kind}") for name, figure in figures for kind in formats]


def _styled(make: Callable[[Sequence[Drawn]], Figure], found: Sequence[Drawn]) -> Figure:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        return make(found)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format of its suffix; equal figures give equal bytes."""
    import matplotlib as mpl

    path = Path(path)
    kind = path.suffix.lstrip(".")
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    if kind not in undated:
        raise UsageError(f"{path}: figure format {kind!r}; expected one of {', '.join(FORMATS)}")
    with atomically(path) as draft, mpl.rc_context(STYLE):
        figure.savefig(draft, format=kind, metadata=undated[kind], dpi=300, bbox_inches="tight")
    return path


def looks_of(figures: Iterable[data.Figure], baseline: str = BASELINE) -> Looks:
    """A look for each label, best placed in any panel first; the baseline is black and comes before all.

    The first 77 looks differ in colour or marker.
    """
    places: dict[str, int] = {}
    for panel in (panel for figure in figures for panel in figure.panels):
        for place, series in enumerate(_best_first(panel)):
            places[series.label] = min(place, places.get(series.label, place))
    looks = {baseline: Look(BLACK, "o", "-")} if baseline in places else {}
    others = sorted(places.keys() - {baseline}, key=lambda label: (places[label], label))
    for index, label in enumerate(others):
        line = LINES[index // len(COLOURS) % len(LINES)]
        looks[label] = Look(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], line)
    return looks


def scaling_figure(figure: data.Figure, looks: Looks, column: str = "time_us") -> Figure:
    """Log-log curves over the length, a panel a pattern.

    Where a curve ran out of memory or time, its mark stands in the rail above the panel at the first length
    that failed. Bars are 95 % intervals; they are often narrower than the marker.
    """
    import matplotlib as mpl

    shown = _shown(figure.panels, looks, HIGHLIGHTED)
    with mpl.rc_context(STYLE):
        rows = max(_rail_rows(panel, shown) for panel in figure.panels)
        canvas, axes = _canvas(len(figure.panels), rows)
        for panel, (rail, axis) in zip(figure.panels, axes, strict=True):
            _draw_curves(axis, panel, shown)
            _draw_rail(rail, panel, shown, rows)
            _panel_title(rail, panel, figure.panels)
            axis.set_xlabel("queries N" if figure.x == "n" else "keys M")
        if rows:
            axes[0][0].set_ylabel("stops at", rotation=0, ha="right", va="center", fontsize=6, color=NOTE)
        axes[0][1].set_ylabel("time of a call" if column == "time_us" else "peak memory of a call")
        _scale_axes([axis for _, axis in axes], figure.panels, column)
        _legend(canvas, figure.panels, shown)
        canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=9)
    return canvas


def fidelity_figure(figure: data.Figure, looks: Looks) -> Figure:
    """Approximation error against time, a panel a pattern; what another impl beats in both is faded.

    Exact mechanisms stand in a strip of their own below: zero has no place on a logarithmic axis.
    """
    import matplotlib as mpl

    shown = _shown(figure.panels, looks, len(looks))
    with mpl.rc_context(STYLE):
        canvas, axes = _canvas(len(figure.panels), strip_rows=2, strip_below=True)
        for panel, (strip, axis) in zip(figure.panels, axes, strict=True):
            _draw_errors(axis, strip, panel, shown)
            _panel_title(axis, panel, figure.panels)
            axis.set(xscale="log", yscale="log")
            axis.tick_params(which="both", labelbottom=False)
            strip.set_xlabel("time of a call")
        axes[0][1].set_ylabel("RMS error against softmax")
        axes[0][0].set_ylabel("exact", rotation=0, ha="right", va="center")
        points = [p for panel in figure.panels for s in panel.series for p in s.points]
        for strip, axis in axes:
            _log_ticks(strip.xaxis, [p.x for p in points], time_text)
            _log_ticks(axis.yaxis, [p.y for p in points if p.y > 0.0], lambda y: number(y, digits=1))
        _legend(canvas, figure.panels, shown, lines=False)
        canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=9)
    return canvas


# ---- layout --------------------------------------------------------------------------------------------


def _best_first(panel: Panel) -> list[Series]:
    """Curves that reach furthest first, among those the one lowest there; single points by y, then x."""
    with_points = [series for series in panel.series if series.points]
    if all(len(series.points) == 1 for series in with_points):
        return sorted(with_points, key=lambda s: (s.points[0].y, s.points[0].x, s.label))
    return sorted(with_points, key=lambda s: (-s.points[-1].x, s.points[-1].y, s.label))


def _shown(panels: Sequence[Panel], looks: Looks, limit: int) -> Looks:
    """The looks of at most ``limit`` series that these panels have, and of the baseline."""
    present = {series.label for panel in panels for series in panel.series}
    found = {label: look for label, look in looks.items() if label in present}
    extra = sum(1 for look in found.values() if look.colour == BLACK)
    return dict(list(found.items())[: limit + extra])


def _canvas(
    panels: int, strip_rows: int, strip_below: bool = False
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure with (strip, main axis), sharing x, for each panel; all main axes share y."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height, strip = 3.0 if panels == 1 else 2.1, 2.3, 0.12 * max(strip_rows, 1)
    layout = ConstrainedLayoutEngine(h_pad=0.02, hspace=0.0)
    canvas = Figure(figsize=(width * panels + 1.4, height + strip + 0.7), layout=layout)
    heights = [height, strip] if strip_below else [strip, height]
    grid = canvas.subplots(
        2, panels, squeeze=False, sharex="col", sharey="row", gridspec_kw={"height_ratios": heights}
    )
    main, small = (0, 1) if strip_below else (1, 0)
    return canvas, [(grid[small][i], grid[main][i]) for i in range(panels)]


def _panel_title(axis: Axes, panel: Panel, panels: Sequence[Panel]) -> None:
    """The pattern, and in a second line what has no point here, so that nothing is missing in silence."""
    noted = any(other.not_drawn for other in panels)
    axis.set_title(PATTERN_TITLES.get(panel.pattern, panel.pattern), loc="left", pad=14 if noted else 4)
    missing = ", ".join(f"{count} {status}" for status, count in panel.not_drawn)
    if missing:
        axis.annotate(
            f"not drawn: {missing}",
            (0, 1),
            (0, 4),
            "axes fraction",
            "offset points",
            fontsize=6,
            color=NOTE,
        )


def _legend(canvas: Figure, panels: Sequence[Panel], shown: Looks, lines: bool = True) -> None:
    """Beside the panels: coloured series in the order of their curves, the grey rest, the end marks."""
    from matplotlib.lines import Line2D

    order = dict.fromkeys(s.label for panel in panels for s in _best_first(panel) if s.label in shown)
    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle=look.line if lines else "", label=label
        )
        for label, look in ((label, shown[label]) for label in order)
    ]
    grey = {s.label for panel in panels for s in panel.series} - shown.keys()
    if grey:
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"{len(grey)} more"))
    ends = {s.end[1] for panel in panels for s in panel.series if s.end and s.label in shown}
    for status in (status for status in data.ENDS if lines and status in ends):
        handles.append(
            Line2D([], [], color=BLACK, marker=END_MARKS[status], linestyle="", label=END_WORDS[status])
        )
    canvas.legend(
        handles=handles,
        loc="outside right center",
        ncols=math.ceil(len(handles) / 20),
        borderaxespad=0.2,
        handlelength=2.6 if lines else 1.0,
    )


def _log_ticks(axis: Any, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Labels at powers of ten, and at 2 and 5 times them where that gives fewer than two labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = math.floor(math.log10(1.1 * max(values))) > math.ceil(math.log10(min(values) / 1.1))
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


# ---- curves --------------------------------------------------------------------------------------------


def _draw_curves(axis: Axes, panel: Panel, shown: Looks) -> None:
    axis.grid(True, which="major")
    for series in panel.series:
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        look = shown.get(series.label)
        if look is None:
            axis.plot(x, y, color=GREY, linewidth=0.7, zorder=1.5)
            continue
        axis.plot(
            x,
            y,
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            markeredgecolor="white",
            markeredgewidth=0.4,
            zorder=3 if look.colour == BLACK else 2,
        )
        for point in series.points:
            if point.lo is not None and point.hi is not None:
                axis.plot([point.x] * 2, [point.lo, point.hi], color=look.colour, linewidth=2.2, alpha=0.45)


def _rail_rows(panel: Panel, shown: Looks) -> int:
    return sum(1 for series in panel.series if series.end and series.label in shown)


def _draw_rail(rail: Axes, panel: Panel, shown: Looks, rows: int) -> None:
    """One row for each coloured series that ended, in its colour; the rail keeps its height without any."""
    rail.set_ylim(-0.5, max(rows, 1) - 0.5)
    rail.tick_params(which="both", bottom=False, labelbottom=False, left=False, labelleft=False)
    for side in ("left", "bottom"):
        rail.spines[side].set_visible(False)
    ended = [
        (series.end, shown[series.label]) for series in panel.series if series.end and series.label in shown
    ]
    for row, ((x, status), look) in enumerate(sorted(ended, key=lambda item: -item[0][0])):
        rail.plot([x], [row], color=look.colour, marker=END_MARKS[status], markersize=4.5)


def _scale_axes(axes: Sequence[Axes], panels: Sequence[Panel], column: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    lengths = sorted(
        {p.x for panel in panels for s in panel.series for p in s.points}
        | {float(s.end[0]) for panel in panels for s in panel.series if s.end}
    )
    stride = math.ceil(len(lengths) / 6)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths[::stride], [length(x) for x in lengths[::stride]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
        if column == "time_us":
            axis.set_yscale("log")
            values = [p.y for panel in panels for s in panel.series for p in s.points]
            _log_ticks(axis.yaxis, values, time_text)
        else:
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
            axis.yaxis.set_minor_formatter(NullFormatter())


# ---- errors --------------------------------------------------------------------------------------------


def _draw_errors(axis: Axes, strip: Axes, panel: Panel, shown: Looks) -> None:
    axis.grid(True, which="major")
    strip.tick_params(left=False, labelleft=False)
    strip.set_ylim(-0.5, 0.5)
    approximate = [(series, series.points[0]) for series in panel.series if series.points[0].y > 0.0]
    front = data.pareto(point for _, point in approximate)
    axis.step(
        [p.x for p in front],
        [p.y for p in front],
        where="post",
        color=GREY,
        linewidth=0.8,
        linestyle=LINES[1],
    )
    for series, point in approximate:
        _mark(axis, point, shown[series.label], faded=point not in front)
    for series in panel.series:
        if series.points[0].y == 0.0:
            _mark(strip, series.points[0], shown[series.label], faded=False)


def _mark(axis: Axes, point: Point, look: Look, faded: bool) -> None:
    alpha = 0.5 if faded else 1.0
    if point.lo is not None and point.hi is not None:
        axis.plot([point.lo, point.hi], [point.y] * 2, color=look.colour, linewidth=0.8, alpha=alpha)
    axis.plot(
        [point.x],
        [point.y],
        color=look.colour,
        marker=look.marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.4,
        alpha=alpha,
    )
