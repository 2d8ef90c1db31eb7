"""A table as plain data: raw records for machines, cells of text for people, and both as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: its header with the unit, how a record is shown in it, and whether it is right-aligned."""

    header: str
    cell: Callable[[Record], str]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """``rows`` are texts under ``header``; ``records`` are the same rows unrounded, units in their names.

    ``notes`` say what a reader must know to read the table right.
    """

    title: str
    header: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()


def table(
    title: str, columns: Sequence[Column], records: Sequence[Record], notes: Iterable[str] = ()
) -> Table:
    """Build a table by showing every record in every column."""
    return Table(
        title=title,
        header=tuple(column.header for column in columns),
        numeric=tuple(column.numeric for column in columns),
        rows=tuple(tuple(column.cell(record) for column in columns) for record in records),
        records=tuple(records),
        notes=tuple(notes),
    )


def to_csv(tables: Iterable[Table]) -> str:
    """Records of all tables as one CSV text, unrounded; lists are joined by ``; ``, None is empty."""
    records = [record for found in tables for record in found.records]
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_plain(record.get(name)) for name in names] for record in records)
    return text.getvalue()


def to_markdown(tables: Iterable[Table]) -> str:
    """Tables as GitHub Markdown, each under a heading, its notes as a list below it."""
    blocks = []
    for found in tables:
        rule = ["---:" if numeric else ":---" for numeric in found.numeric]
        lines = [_line(found.header), _line(rule), *(_line(row) for row in found.rows)]
        notes = [f"- {note}" for note in found.notes]
        blocks.append("\n".join([f"### {found.title}", "", *lines, *(["", *notes] if notes else [])]))
    return "\n\n".join(blocks) + "\n" if blocks else ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return "; ".join(str(item) for item in value)
    return "" if value is None else value
