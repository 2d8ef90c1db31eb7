"""What Explore shows: the charts of every sweep, a sweep being all lengths and patterns of one setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from attnbench.results import series
from attnbench.results.aggregate import Summary
from attnbench.results.efficiency import Crossing, crossing_interval
from attnbench.results.seeds import Score, scores
from attnbench.results.series import Figure, Panel, Point, Series
from attnbench.site import charts, palette
from attnbench.site.charts import METRICS, Metric, Spec
from attnbench.site.views.case import BASELINES, case_of
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS, pattern_words

RESAMPLES: Final = 200
ERRORS: Final = {
    "gaussian": ("approx_err_gaussian", "RMS error, gaussian inputs"),
    "structured": ("approx_err_structured", "RMS error, structured inputs"),
    "recorded": ("approx_err_recorded", "RMS error, recorded inputs"),
}
"""Inputs of the distance to exact attention → its column and what it is called."""


@dataclass(frozen=True, order=True)
class Sweep:
    """What the charts of one view share; ``stack`` is the software and the version of the method."""

    device: str
    scope: str
    workload: str
    dtype: str
    direction: str
    stack: str

    @property
    def title(self) -> str:
        """The setting in words."""
        words = (DTYPE_WORDS.get(self.dtype, self.dtype), DIRECTION_WORDS.get(self.direction, self.direction))
        return " · ".join((self.device, self.workload, *words, self.scope))

    def state(self) -> dict[str, str]:
        """The setting as the keys of the address have it."""
        return {
            "gpu": self.device,
            "scope": self.scope,
            "workload": self.workload,
            "dtype": self.dtype,
            "dir": self.direction,
            "sw": self.stack,
        }


@dataclass(frozen=True)
class View:
    """The charts of a sweep, each a list of specs, one a pattern.

    ``curves`` by metric, ``errors`` by inputs and length, ``tasks`` by task and length. ``baseline`` is empty
    where none was measured.
    """

    sweep: Sweep
    baseline: str
    labels: tuple[str, ...]
    curves: Mapping[str, Sequence[Spec]]
    errors: Mapping[str, Mapping[str, Sequence[Spec]]]
    tasks: Mapping[str, Mapping[str, Sequence[Spec]]]
    crossings: Sequence[Spec]


def sweeps(current: Iterable[Summary]) -> dict[Sweep, list[Summary]]:
    """Summaries of operations and layers by sweep, in order."""
    groups: dict[Sweep, list[Summary]] = {}
    for s in current:
        case = case_of(s)
        sweep = Sweep(case.device, case.scope, case.workload, case.dtype, case.direction, case.stack)
        groups.setdefault(sweep, []).append(s)
    return {sweep: groups[sweep] for sweep in sorted(groups)}


def default_sweep(found: Mapping[Sweep, Sequence[Summary]]) -> Sweep | None:
    """The sweep to show first: forward on an accelerator, with the most cases measured; None of none."""

    def order(sweep: Sweep) -> tuple[Any, ...]:
        group = found[sweep]
        measured = sum(s.ok for s in group)
        newest = max(s.started_at for s in group)
        return sweep.device != "cpu", sweep.direction == "fwd", measured, newest, sweep

    return max(found, key=order, default=None)


def view(sweep: Sweep, group: Sequence[Summary], tasks: Sequence[Summary]) -> View:
    """All charts of one sweep."""
    baseline = baseline_of(group)
    figures = {metric.name: _curves(group, metric, baseline) for metric in METRICS}
    looks = looks_of(group, baseline)
    return View(
        sweep=sweep,
        baseline=baseline,
        labels=tuple(looks),
        curves={m.name: _scaling(figures[m.name], m, looks) for m in METRICS if figures[m.name]},
        errors=_errors(group, looks),
        tasks=_tasks(group, tasks, looks),
        crossings=_crossings(group, baseline, looks),
    )


def baseline_of(group: Iterable[Summary]) -> str:
    """The first of the baselines that was measured in a sweep; empty for none."""
    measured = {s.label for s in group if s.ok}
    return next((name for name in BASELINES if name in measured), "")


def looks_of(group: Iterable[Summary], baseline: str) -> dict[str, palette.Look]:
    """One look for each impl of a sweep: the baseline, then by name, so that looks do not jump about."""
    labels = sorted({s.label for s in group} - {baseline})
    return palette.looks([*([baseline] if baseline else []), *labels], baseline)


def crossings(group: Iterable[Summary], baseline: str) -> dict[str, Crossing]:
    """From which length on each impl of one pattern is faster than the baseline; empty without a baseline."""
    everything = list(group)
    x = swept(everything)
    times: dict[str, dict[int, Sequence[float]]] = {}
    for s in everything:
        if s.ok and s.block_times_us:
            times.setdefault(s.label, {})[int(s.get(x))] = s.block_times_us
    reference = times.pop(baseline, {})
    return {
        label: crossing_interval(curve, reference, resamples=RESAMPLES)
        for label, curve in sorted(times.items())
        if set(curve) & set(reference)
    }


def swept(group: Sequence[Summary]) -> str:
    """The length that grows in a sweep: ``n``, or ``m`` where the queries are few and fixed."""
    return "m" if len({s.get("n") for s in group}) == 1 and len({s.get("m") for s in group}) > 1 else "n"


# ---- curves --------------------------------------------------------------------------------------------


def _curves(group: Sequence[Summary], metric: Metric, baseline: str) -> Figure | None:
    if metric.column != "ratio":
        return next(iter(series.scaling(group, metric.column)), None)
    figure = next(iter(series.scaling(group)), None)
    if figure is None or not baseline:
        return None
    return replace(figure, panels=tuple(_relative(panel, baseline) for panel in figure.panels))


def _relative(panel: Panel, baseline: str) -> Panel:
    """Every time over the baseline's at the same length; lengths that it lacks are left out and say so."""
    reference = {p.x: p.y for s in panel.series if s.label == baseline for p in s.points}
    found = tuple(
        replace(s, points=tuple(Point(p.x, p.y / reference[p.x]) for p in s.points if p.x in reference))
        for s in panel.series
    )
    lost = sum(1 for s in panel.series for p in s.points if p.x not in reference)
    extra = ((f"points without {baseline}", lost),) if lost else ()
    return replace(panel, series=found, not_drawn=(*panel.not_drawn, *extra))


def _scaling(figure: Figure | None, metric: Metric, looks: Mapping[str, palette.Look]) -> list[Spec]:
    if figure is None:
        return []
    values = [p.y for panel in figure.panels for s in panel.series for p in s.points]
    joined = (min(values), max(values)) if values else None
    return [
        charts.scaling(
            panel, looks, metric, x=figure.x, y_range=joined, title=_title(panel, metric.title)
        )
        for panel in figure.panels
        if any(s.points for s in panel.series)
    ]  # fmt: skip


def _title(panel: Panel, what: str) -> str:
    """The pattern, what is drawn, and what has no point here, so that nothing is missing in silence."""
    missing = ", ".join(f"{count} {status}" for status, count in panel.not_drawn)
    return f"{pattern_words(panel.pattern)}: {what}" + (f" (not drawn: {missing})" if missing else "")


# ---- error and score against time ----------------------------------------------------------------------


def _errors(group: Sequence[Summary], looks: Mapping[str, palette.Look]) -> dict[str, dict[str, list[Spec]]]:
    found: dict[str, dict[str, list[Spec]]] = {}
    x = swept(group)
    for inputs, (column, words) in ERRORS.items():
        for length in sorted({int(s.get(x)) for s in group}):
            what = f"error and time at {x.upper()}={length}"
            figures = series.fidelity([s for s in group if s.get(x) == length], column)
            specs = [
                charts.tradeoff(panel, looks, y_title=words, title=_title(panel, what))
                for figure in figures
                for panel in figure.panels
                if any(p.y > 0 for s in panel.series for p in s.points)
            ]
            if specs:
                found.setdefault(inputs, {})[str(length)] = specs
    return found


def _tasks(
    group: Sequence[Summary], tasks: Sequence[Summary], looks: Mapping[str, palette.Look]
) -> dict[str, dict[str, list[Spec]]]:
    """Score of a task against the time of an operation of the same pattern, for impls that have both."""
    found: dict[str, dict[str, list[Spec]]] = {}
    x = swept(group)
    for table in _newest_tables(group, tasks):
        best = {score.label: score for score in table if score.value is not None and not score.control}
        first = next(iter(best.values()), table[0])
        for length in sorted({int(s.get(x)) for s in group}):
            here = [s for s in group if s.ok and s.get(x) == length and s.get("pattern") == first.pattern]
            panel = Panel(
                first.pattern, tuple(_scored(s, best[s.label]) for s in here if s.label in best), ()
            )
            if len(panel.series) > 1:
                spec = charts.tradeoff(
                    panel,
                    looks,
                    y_title=f"{first.task}: {first.metric}, {first.better} is better",
                    higher=first.better == "higher",
                    log=False,
                    title=_title(panel, f"score of {first.task} and time at {x.upper()}={length}"),
                )
                found.setdefault(first.task, {}).setdefault(str(length), []).append(spec)
    return found


def _newest_tables(group: Sequence[Summary], tasks: Sequence[Summary]) -> list[list[Score]]:
    """The scores measured on the device of a sweep, of each task and pattern the newest; forward only."""
    if not group or group[0].get("direction") != "fwd":
        return []
    newest: dict[tuple[str, str], list[Score]] = {}
    for table in scores(s for s in tasks if s.get("device") == group[0].get("device")):
        key = (table[0].task, table[0].pattern)
        if key not in newest or _date(table) > _date(newest[key]):
            newest[key] = table
    return [newest[key] for key in sorted(newest)]


def _date(table: Sequence[Score]) -> str:
    return max(score.started_at for score in table)


def _scored(s: Summary, score: Score) -> Series:
    assert s.time_us is not None
    assert score.value is not None
    return Series(s.label, (Point(s.time_us, score.value, s.lo_us, s.hi_us),))


def _crossings(group: Sequence[Summary], baseline: str, looks: Mapping[str, palette.Look]) -> list[Spec]:
    specs = []
    x = swept(group)
    for pattern in series.PATTERNS:
        inside = [s for s in group if s.get("pattern") == pattern]
        found = crossings(inside, baseline)
        lengths = sorted({int(s.get(x)) for s in inside if s.label == baseline and s.ok})
        if found and len(lengths) > 1:
            title = f"{pattern_words(pattern)}: from which length faster than {baseline}"
            specs.append(charts.crossings(found, lengths, looks, baseline, title=title))
    return specs
