"""From rows to one summary per case: blocks become a value with an interval, values become rank ranges.

Report and site show summaries, never single rows, so that both round, rank and mark in the same way.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from attnbench.results import schema, stats
from attnbench.results.rows import Row
from attnbench.results.schema import Status

SEVERITY: Final = (
    Status.INCORRECT,
    Status.CRASHED,
    Status.ERROR,
    Status.COMPILE_ERROR,
    Status.OOM,
    Status.TIMEOUT,
    Status.SKIPPED,
    Status.UNSUPPORTED,
    Status.OK,
)
"""Worst first: what a case is called whose blocks ended differently."""

SAME_MEASUREMENT: Final = (
    "case_key",
    "software_key",
    "measurement_version",
    "preset",
    "attnbench_version",
    "commit",
)
"""Rows with equal values here are replications of one another. The preset decides how long a task trains. The
last two stand for the impl's own code, which the software key leaves out: an older kernel's time is another
measurement, not another block."""

_OWN_FIELDS: Final = frozenset({"samples_us", "flags", "status", "reason", "started_at"})
"""Columns that a summary has in another form; samples stay with their rows."""


@dataclass(frozen=True)
class Summary:
    """What is known of one case with one version of the software, from all its blocks.

    ``time_us`` is the median of the block medians, ``lo_us`` and ``hi_us`` the 95 % t-interval of their
    logarithms, None below three blocks. ``preliminary`` marks a single block. ``status`` is the worst of the
    blocks (``statuses`` counts all); performance is there only when every block is ``ok``. ``columns`` has
    the other columns of the schema: the median over blocks of a number, else the newest known value.
    """

    case_key: str
    software_key: str
    measurement_version: int
    status: Status
    statuses: dict[str, int]
    reason: str
    blocks: int
    preliminary: bool
    flags: tuple[str, ...]
    run_ids: tuple[str, ...]
    started_at: str
    block_times_us: tuple[float, ...]
    time_us: float | None
    lo_us: float | None
    hi_us: float | None
    between_cv: float | None
    columns: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """The aggregated value of a column of the schema; None where nothing is known."""
        return self.columns.get(name)

    @property
    def ok(self) -> bool:
        """Whether every block was measured and passed its checks."""
        return self.status == Status.OK

    @property
    def impl(self) -> str:
        """``mechanism/backend``."""
        return str(self.columns["impl"])

    @property
    def label(self) -> str:
        """The impl with the hyper-parameters that differ from its defaults: ``performer/torch m=64``."""
        hyper = json.loads(self.columns.get("hyper") or "{}")
        return " ".join([self.impl, *(f"{name}={value}" for name, value in sorted(hyper.items()))])


@dataclass(frozen=True)
class Ranked:
    """A summary in a ranking. ``lo`` and ``hi`` are None where the summary has no interval to rank by."""

    summary: Summary
    position: int
    lo: int | None
    hi: int | None

    @property
    def text(self) -> str:
        """``3``, ``2–4`` for a tie, ``~5`` for a place by value alone."""
        if self.lo is None:
            return f"~{self.position}"
        return str(self.lo) if self.lo == self.hi else f"{self.lo}–{self.hi}"


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each group of rows that replicate one another, in the order first seen."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in SAME_MEASUREMENT), []).append(row)
    return [_summary(group) for group in groups.values()]


def newest(summaries: Iterable[Summary]) -> tuple[list[Summary], list[Summary]]:
    """(newest, older): of every case and software key the summary measured last, and the others.

    Older ones come from another commit of attnbench, another version of the method, or, for operations,
    another preset; a task with another preset is another score.
    """
    last: dict[Hashable, Summary] = {}
    everything = list(summaries)
    for s in everything:
        key = (s.case_key, s.software_key, s.get("preset") if s.get("scope") == "task" else "")
        if key not in last or s.started_at > last[key].started_at:
            last[key] = s
    kept = list(last.values())
    chosen = {id(s) for s in kept}
    return kept, [s for s in everything if id(s) not in chosen]


def rank(summaries: Iterable[Summary]) -> list[Ranked]:
    """Order the ``ok`` summaries by time, fastest first, with the ranks that their intervals leave open.

    A summary whose interval overlaps others' shares their ranks ("2–4"): its best rank is one more than the
    number surely faster, its worst the number not surely slower. One without an interval has a position
    only and takes no part in the ranks of others. Raises ValueError when the summaries differ in device,
    software key or measurement version: their times are not comparable.
    """
    measured = [s for s in summaries if s.ok and s.time_us is not None]
    stacks = {(s.get("device"), s.software_key, s.measurement_version) for s in measured}
    if len(stacks) > 1:
        raise ValueError(f"{len(stacks)} devices or software keys in one ranking; rank each by itself")
    measured.sort(key=lambda s: (s.time_us, s.label))
    ranges = rank_ranges([_interval(s) for s in measured])
    return [
        Ranked(s, position, *(around or (None, None)))
        for position, (s, around) in enumerate(zip(measured, ranges, strict=True), 1)
    ]


def rank_ranges(intervals: Sequence[tuple[float, float] | None]) -> list[tuple[int, int] | None]:
    """(best, worst) rank of each interval among those given, lower being better; None for None."""
    known = [interval for interval in intervals if interval is not None]
    starts, ends = sorted(lo for lo, _ in known), sorted(hi for _, hi in known)

    def place(lo: float, hi: float) -> tuple[int, int]:
        surely_better, not_surely_worse = bisect_left(ends, lo), bisect_right(starts, hi)
        return 1 + surely_better, not_surely_worse

    return [None if interval is None else place(*interval) for interval in intervals]


def worst(statuses: Iterable[str]) -> Status:
    """The worst of some statuses, by :data:`SEVERITY`. Raises ValueError for an unknown or no status."""
    return min((Status(status) for status in statuses), key=SEVERITY.index)


# ---- inside --------------------------------------------------------------------------------------------


def _summary(group: Sequence[Row]) -> Summary:
    newest_first = sorted(group, key=lambda row: str(row["started_at"]), reverse=True)
    status = worst(row["status"] for row in group)
    times = tuple(row["time_us"] for row in group if row.get("time_us") is not None)
    times = times if status == Status.OK else ()
    interval = stats.block_interval(times) if times else None
    first = newest_first[0]
    return Summary(
        case_key=first["case_key"],
        software_key=first["software_key"],
        measurement_version=first["measurement_version"],
        status=status,
        statuses=dict(Counter(str(row["status"]) for row in group)),
        reason=next((row.get("reason") or "" for row in newest_first if row["status"] == status), ""),
        blocks=len(group),
        preliminary=len(group) == 1,
        flags=tuple(dict.fromkeys(flag for row in group for flag in row.get("flags") or ())),
        run_ids=tuple(dict.fromkeys(row["run_id"] for row in group)),
        started_at=str(first["started_at"]),
        block_times_us=times,
        time_us=stats.quantile(times, 0.5) if times else None,
        lo_us=interval[0] if interval else None,
        hi_us=interval[1] if interval else None,
        between_cv=stats.between_cv(times),
        columns={
            c.name: _combined(c, newest_first, status) for c in schema.COLUMNS if c.name not in _OWN_FIELDS
        },
    )


def _combined(column: schema.Column, newest_first: Sequence[Row], status: Status) -> Any:
    """The median over blocks of a performance or error number; of anything else the newest known value."""
    known = [value for row in newest_first if (value := row.get(column.name)) is not None]
    if not known or (column.performance and status != Status.OK):
        return None
    numeric = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
    if not numeric or not (column.performance or column.group == "error"):
        return known[0]
    middle = stats.quantile(known, 0.5)
    return round(middle) if pa.types.is_integer(column.type) else middle


def _interval(summary: Summary) -> tuple[float, float] | None:
    if summary.lo_us is None or summary.hi_us is None:
        return None
    return summary.lo_us, summary.hi_us
