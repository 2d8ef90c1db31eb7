"""The table of one case as text: the first one of a page, which the script redraws when another is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attnbench.results.aggregate import Summary
from attnbench.results.format import NONE, Unit, number
from attnbench.site.views import columns as c
from attnbench.site.views.case import Case, Entry
from attnbench.site.views.columns import Column
from attnbench.site.views.links import evidence, impl_page
from attnbench.site.views.profile import Standing
from attnbench.site.views.words import context, flag_names, shape, value_of

MEASURES: Final = ("time", "memory", "work", "fidelity", "selection")
"""Groups of columns that a failed impl has nothing in; its reason stands there."""

BARRED: Final = "tflops_effective"
"""The column with bars: equal work over time, so that a longer bar is a faster impl."""


@dataclass(frozen=True)
class Head:
    """A column and the unit that its table is in."""

    column: Column
    unit: str


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, the value as stored, small print, and a bar in percent of the column."""

    column: Column
    text: str
    value: float | str | None = None
    detail: str = ""
    bar: int = 0


@dataclass(frozen=True)
class Line:
    """One impl. ``span`` is the number of columns that its reason takes when it was not measured."""

    entry: Entry
    mechanism: str
    backend: str
    page: str
    evidence: str
    badges: tuple[tuple[str, str], ...]
    cells: tuple[Cell, ...]
    span: int

    @property
    def summary(self) -> Summary:
        """What is known of it."""
        return self.entry.summary


@dataclass(frozen=True)
class CaseTable:
    """All impls on one case. ``shape`` and ``context`` say what was measured, and on what."""

    case: Case
    shape: str
    context: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]


def case_table(
    case: Case,
    entries: Sequence[Entry],
    columns: Sequence[Column],
    standings: Mapping[str, Standing] | None = None,
    old_before: str = "",
) -> CaseTable:
    """The table of ``entries``, which must not be empty, in ``columns``.

    ``standings`` are those over all cases of the setting, for the columns that show them.
    What was measured before the day ``old_before`` is marked as old.
    """
    values = {
        column.key: [_value(column.key, entry, standings or {}) for entry in entries] for column in columns
    }
    units = {
        column.key: column.unit([v for v in values[column.key] if isinstance(v, int | float)])
        for column in columns
    }
    most = max((v for v in values.get(BARRED, ()) if isinstance(v, float)), default=0.0)
    lines = []
    for at, entry in enumerate(entries):
        skipped = () if entry.summary.ok else tuple(k.key for k in columns if _measure(k))
        cells = tuple(
            _cell(column, values[column.key][at], units[column.key], entry, most)
            for column in columns
            if column.key not in ("rank", "impl", *skipped)
        )
        lines.append(_line(entry, cells, len(skipped), entry.summary.started_at[:10] < old_before))
    first = entries[0].summary
    return CaseTable(
        case=case,
        shape=shape(first),
        context=context(entry.summary for entry in entries),
        heads=tuple(Head(column, units[column.key].name) for column in columns),
        lines=tuple(lines),
    )


# ---- inside --------------------------------------------------------------------------------------------


def _measure(column: Column) -> bool:
    return column.group in MEASURES or column.key in ("time_us", "ratio")


def _value(key: str, entry: Entry, standings: Mapping[str, Standing]) -> float | str | None:
    s = entry.summary
    own = {"time_us": s.time_us, "ratio": entry.ratio, "rank": entry.position, "blocks": s.blocks}
    if key in own:
        return own[key]
    texts = {"impl": s.label, "family": str(s.get("family")), "date": s.started_at[:10]}
    if key in texts:
        return texts[key]
    if key == "flags":
        return flag_names(s.flags)
    standing = standings.get(s.label)
    if key == "coverage":
        return standing.coverage if standing else None
    if key == "geo_mean":
        return standing.geo_mean if standing else None
    if key.startswith("within_"):
        return standing.within[[w.key for w in c.PROFILE].index(key)] if standing else None
    return value_of(key, s)


def _cell(column: Column, value: float | str | None, unit: Unit, entry: Entry, most: float) -> Cell:
    if not isinstance(value, int | float):
        return Cell(column, value or NONE, value)
    if column.key == "time_us":
        half = entry.half_width_us
        text = c.shown(value, unit, half)
        return Cell(column, text, value, percent(half, value))
    if column.key == BARRED:
        return Cell(column, c.shown(value, unit), value, bar=round(100 * value / most) if most else 0)
    if column.group == "profile" and column.units == c.PERCENT:
        return Cell(column, f"{100 * value:.0f}", value, bar=round(100 * value))
    return Cell(column, str(value) if column.key == "blocks" else c.shown(value, unit), value)


def percent(half: float | None, value: float) -> str:
    """``±1.2 %`` of ``value``; empty without an interval."""
    return "" if half is None or not value else f"±{number(100 * half / value, digits=2)} %"


def _line(entry: Entry, cells: tuple[Cell, ...], span: int, old: bool) -> Line:
    s = entry.summary
    mechanism = str(s.get("mechanism"))
    badges = [("baseline", "what × baseline compares with")] if entry.baseline else []
    if s.get("exact"):
        badges.append(("exact", "computes softmax attention exactly"))
    if s.ok and s.preliminary:
        badges.append(("k=1", "preliminary: a single block, so no rank"))
    if old:
        badges.append(("old", "measured more than a year before the newest row"))
    return Line(
        entry=entry,
        mechanism=mechanism,
        backend=s.label.removeprefix(f"{mechanism}/"),
        page=impl_page(mechanism),
        evidence=evidence(s),
        badges=tuple(badges),
        cells=cells,
        span=span,
    )
