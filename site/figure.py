"""A chart as it stands on a page: drawn, named, its numbers as a table, its spec for the script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.results.format import NONE, number
from attnbench.site import draw
from attnbench.site.charts.base import Record, Spec
from attnbench.site.views.slices import compact


@dataclass(frozen=True)
class DataCell:
    """One cell of the table under a chart: its text, the value it shows, and whether it is a number."""

    text: str
    value: Any
    numeric: bool


@dataclass(frozen=True)
class DataTable:
    """The numbers of a chart: a head, and lines of which the first cell names the series."""

    head: tuple[str, ...]
    lines: tuple[tuple[DataCell, ...], ...]


@dataclass(frozen=True)
class Figure:
    """What the template needs: ``spec`` is JSON fit for a ``<script>``, empty where it is elsewhere."""

    id: str
    title: str
    note: str
    svg: str
    table: DataTable
    spec: str = ""


def figure(spec: Spec, id: str, note: str = "", interactive: bool = True) -> Figure:
    """Draw a chart. ``id`` is unique on its page; ``note`` stands under the title.

    With ``interactive`` the page carries the spec, and a button draws it with tooltips.
    """
    return Figure(
        id=id,
        title=spec["title"],
        note=note,
        svg=draw.svg(spec, id),
        table=table_of(spec),
        spec=inline(spec) if interactive else "",
    )


def table_of(spec: Mapping[str, Any]) -> DataTable:
    """The records of ``points`` as the table that the spec's ``usermeta`` asks for."""
    records: Sequence[Record] = spec["datasets"]["points"]
    wanted = spec["usermeta"]
    if "columns" in wanted:
        columns = [(field, heading) for field, heading in wanted["columns"]]
        lines = tuple(tuple(_cell(r.get(field)) for field, _ in columns) for r in records)
        return DataTable(tuple(heading for _, heading in columns), lines)
    lengths = sorted({r["x"] for r in records})
    series: dict[str, dict[float, float]] = {}
    for r in records:
        series.setdefault(r["s"], {})[r["x"]] = r["y"]
    head = (f"impl ({wanted['unit']})", *(f"{wanted['across'].upper()} = {x:g}" for x in lengths))
    return DataTable(
        head, tuple((_cell(s), *(_cell(values.get(x)) for x in lengths)) for s, values in series.items())
    )


def inline(spec: Mapping[str, Any]) -> str:
    """JSON that may stand inside a ``<script>`` element, whatever names it holds."""
    text = compact(spec)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cell(value: Any) -> DataCell:
    if value is None:
        return DataCell(NONE, "", True)
    if isinstance(value, bool):
        return DataCell("yes" if value else "no", int(value), False)
    if isinstance(value, int):
        return DataCell(str(value), value, True)
    if isinstance(value, float):
        return DataCell(number(value, digits=4), value, True)
    return DataCell(str(value), value, False)
