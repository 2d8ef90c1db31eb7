"""Steps in the recorded runs of every case: what became slower or faster, when, and with which software.

A series is the medians of one case by run; :mod:`attnbench.results.history` finds the steps. A step is
confirmed when the blocks of the two runs around it decide it by the rule of ``attnbench compare``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.compare import Pair, Verdict, decide
from attnbench.results.history import MIN_SEGMENT, Change, Level, changes, levels
from attnbench.results.rows import Row
from attnbench.results.stats import quantile
from attnbench.site.views.compare import case_words, label_of

NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "attnbench/steps")
FEWEST: Final = 2 * MIN_SEGMENT
"""Runs below which a series can have no step."""


@dataclass(frozen=True)
class RunPoint:
    """One run of a case: when, with what, and the medians of its blocks."""

    run_id: str
    date: str
    software: str
    commit: str
    value_us: float
    blocks: Mapping[int, float]


@dataclass(frozen=True)
class Series:
    """All runs of one case, oldest first, with the levels and steps found in them."""

    case_key: str
    impl: str
    mechanism: str
    device: str
    case: str
    runs: tuple[RunPoint, ...]
    levels: tuple[Level, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Step:
    """One step of one series. ``ratio`` is after over before: above 1 is slower."""

    series: Series
    change: Change
    confirmed: bool

    @property
    def after(self) -> RunPoint:
        """The first run after the step."""
        return self.series.runs[self.change.at]

    @property
    def before(self) -> RunPoint:
        """The last run before it."""
        return self.series.runs[self.change.at - 1]

    @property
    def ratio(self) -> float:
        """Level after over level before."""
        return self.change.ratio


@dataclass(frozen=True)
class Event:
    """Steps of one impl on one device at one run, in one direction: one entry of the list and of the feed.

    ``steps`` has the largest first. ``id`` does not depend on how many cases took part.
    """

    id: str
    impl: str
    mechanism: str
    device: str
    slower: bool
    run_id: str
    date: str
    software: tuple[str, str]
    commits: tuple[str, str]
    steps: tuple[Step, ...]

    @property
    def word(self) -> str:
        """``slower`` or ``faster``."""
        return "slower" if self.slower else "faster"

    @property
    def confirmed(self) -> int:
        """How many of the steps a paired comparison confirms."""
        return sum(step.confirmed for step in self.steps)

    @property
    def extent(self) -> str:
        """By how much: ``12 %``, or ``9 % to 14 %``."""
        sizes = sorted(abs(step.ratio - 1) for step in self.steps)
        low, high = f"{100 * sizes[0]:.0f} %", f"{100 * sizes[-1]:.0f} %"
        return low if low == high else f"{low} to {high}"

    @property
    def title(self) -> str:
        """The event in one line."""
        cases = f"{len(self.steps)} case{'' if len(self.steps) == 1 else 's'}"
        return f"{self.impl} is {self.extent} {self.word} in {cases} on {self.device}"

    @property
    def new_software(self) -> bool:
        """Whether hardware or software changed at the step: then the impl need not be the cause."""
        return self.software[0] != self.software[1]


def all_series(rows: Iterable[Row]) -> list[Series]:
    """Every case that was measured in at least :data:`FEWEST` runs with one version of the method.

    A run counts for a case when all its blocks are ``ok``.
    """
    groups: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("scope") != "task":
            key = (row["case_key"], row["measurement_version"])
            groups.setdefault(key, {}).setdefault(row["run_id"], []).append(row)
    found = []
    for (case_key, _), by_run in groups.items():
        runs = sorted(
            (_point(group) for group in by_run.values() if all(r["status"] == "ok" for r in group)),
            key=lambda run: (run.date, run.run_id),
        )
        if len(runs) >= FEWEST:
            found.append(_series(case_key, next(iter(by_run.values()))[0], runs))
    return found


def events(found: Iterable[Series]) -> list[Event]:
    """Steps by impl, device, run and direction, newest first, then the larger."""
    groups: dict[tuple[str, str, str, bool], list[Step]] = {}
    for series in found:
        for change in series.changes:
            step = Step(series, change, _confirmed(series, change))
            key = (series.impl, series.device, step.after.run_id, change.ratio > 1)
            groups.setdefault(key, []).append(step)
    made = [_event(key, steps) for key, steps in groups.items()]
    return sorted(made, key=lambda e: (_backwards(e.date), -abs(e.steps[0].ratio - 1), e.id))


# ---- inside --------------------------------------------------------------------------------------------


def _point(group: Sequence[Row]) -> RunPoint:
    first = min(group, key=lambda row: (str(row["started_at"]), row["block"]))
    times = {row["block"]: float(row["time_us"]) for row in group}
    return RunPoint(
        run_id=first["run_id"],
        date=str(first["started_at"]),
        software=first["software_key"],
        commit=first.get("commit") or "",
        value_us=quantile(list(times.values()), 0.5),
        blocks=times,
    )


def _series(case_key: str, row: Row, runs: Sequence[RunPoint]) -> Series:
    values = [run.value_us for run in runs]
    return Series(
        case_key=case_key,
        impl=label_of(row),
        mechanism=row["mechanism"],
        device=row["device"],
        case=case_words(row),
        runs=tuple(runs),
        levels=tuple(levels(values)),
        changes=tuple(changes(values)),
    )


def _confirmed(series: Series, change: Change) -> bool:
    before, after = series.runs[change.at - 1], series.runs[change.at]
    common = sorted(set(before.blocks) & set(after.blocks))
    found = decide([Pair(before.blocks[b], after.blocks[b]) for b in common]).verdict
    return found == (Verdict.SLOWER if change.ratio > 1 else Verdict.FASTER)


def _event(key: tuple[str, str, str, bool], steps: Sequence[Step]) -> Event:
    impl, device, run_id, slower = key
    ordered = sorted(steps, key=lambda s: (-abs(s.ratio - 1), s.series.case_key))
    first = ordered[0]
    return Event(
        id=str(uuid.uuid5(NAMESPACE, "\n".join((impl, device, run_id, "slower" if slower else "faster")))),
        impl=impl,
        mechanism=first.series.mechanism,
        device=device,
        slower=slower,
        run_id=run_id,
        date=first.after.date,
        software=(first.before.software, first.after.software),
        commits=(first.before.commit, first.after.commit),
        steps=tuple(ordered),
    )


def _backwards(date: str) -> tuple[Any, ...]:
    """A key under which later dates come first."""
    return tuple(-ord(c) for c in date)
