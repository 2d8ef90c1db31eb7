"""The summaries as a table for machines: one line an impl and case, values as stored, units in the names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from attnbench.results.aggregate import Summary
from attnbench.results.schema import COLUMNS
from attnbench.site.views.case import Case, Entry

FIRST = ("rank_best", "rank_last", "position", "ratio_to_baseline", "time_lo95_us", "time_hi95_us", "blocks")
"""What a summary adds to the columns of the schema."""

LEFT_OUT = frozenset({"samples_us", "log_tail", "environment", "block", "run_id", "time_lo_us", "time_hi_us"})
"""Columns of single blocks, which the Parquet has."""


def summary_csv(ranked: Mapping[Case, Sequence[Entry]], tasks: Iterable[Summary]) -> str:
    """All summaries as CSV; lists are joined by ``; ``, what is not known is empty."""
    names = [column.name for column in COLUMNS if column.name not in LEFT_OUT]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *FIRST, "run_ids", *names])
    for group in ranked.values():
        for entry in group:
            s = entry.summary
            places = (entry.best, entry.last, entry.position, entry.ratio, s.lo_us, s.hi_us, s.blocks)
            writer.writerow([s.label, *map(_plain, places), _plain(s.run_ids), *_values(s, names)])
    for s in tasks:
        empty = [""] * (len(FIRST) - 1)
        writer.writerow([s.label, *empty, s.blocks, _plain(s.run_ids), *_values(s, names)])
    return text.getvalue()


def _values(s: Summary, names: Sequence[str]) -> list[object]:
    own = {
        "status": str(s.status),
        "reason": s.reason,
        "flags": s.flags,
        "started_at": s.started_at,
        "time_us": s.time_us,
    }
    return [_plain(own[name] if name in own else s.get(name)) for name in names]


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return "; ".join(str(item) for item in value)
    return "" if value is None else value
