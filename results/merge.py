"""Union of results: the shards of a sweep, or the runs of several machines, as one set of rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.results import schema
from attnbench.results.rows import Row, misfits
from attnbench.results.sources import Part, Paths, read_parts
from attnbench.results.store import write_parquet


@dataclass(frozen=True)
class Merged:
    """What a merge did: rows written, and identical copies that were left out."""

    rows: int
    duplicates: int


def merge(paths: Paths, out: str | Path) -> Merged:
    """Write the union of ``paths`` to the Parquet file ``out``, as a whole or not at all.

    The order of rows depends on them alone, so the same shards in another order give the same file. Raises
    UsageError for unreadable or invalid input and for rows that contradict each other.
    """
    parts = list(read_parts(paths))
    for part in parts:
        _refuse_invalid(part)
    rows = union(parts)
    rows.sort(key=lambda row: (row["started_at"], *(str(row[name]) for name in schema.KEY)))
    write_parquet(rows, out)
    return Merged(len(rows), sum(len(part.rows) for part in parts) - len(rows))


def union(parts: Iterable[Part]) -> list[Row]:
    """All rows, those with an equal ``schema.KEY`` and equal values once, in the order first seen.

    Raises UsageError that lists the rows with an equal key and different values.
    """
    first: dict[tuple[Any, ...], tuple[str, Row]] = {}
    conflicts: list[str] = []
    for part in parts:
        for index, row in enumerate(part.rows):
            here = f"{part.path}, {part.locator(index)}"
            there, known = first.setdefault(tuple(row[name] for name in schema.KEY), (here, row))
            if known is not row and (names := differing(known, row)):
                conflicts.append(
                    f"{there} and {here} (case {row['case_key']}, block {row['block']}): {', '.join(names)}"
                )
    if conflicts:
        more = f"\n… and {len(conflicts) - 10} more" if len(conflicts) > 10 else ""
        raise UsageError(
            f"{len(conflicts)} measurements are given twice with different values; expected one row for each "
            f"{', '.join(schema.KEY)}. Leave one of the files out:\n" + "\n".join(conflicts[:10]) + more
        )
    return [row for _, row in first.values()]


def differing(a: Row, b: Row) -> list[str]:
    """Columns in which two canonical rows differ; NaN equals NaN here."""
    return [name for name in schema.BY_NAME if a[name] != b[name] and not _both_nan(a[name], b[name])]


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and a != a and b != b


def _refuse_invalid(part: Part) -> None:
    for index, row in enumerate(part.rows):
        found = [*schema.problems(row), *misfits(row)]
        if found:
            raise UsageError(
                f"{part.path}, {part.locator(index)}: {'; '.join(found)}. Nothing was merged: see everything "
                f"that is wrong with attnbench validate {part.path}, then leave the file out or correct it"
            )
