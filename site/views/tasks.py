"""Scores of tasks: mean and interval over seeds, tie ranks, failures with their reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnbench.results.aggregate import Summary
from attnbench.results.format import NONE, number
from attnbench.results.schema import Status
from attnbench.results.scorecard import judge
from attnbench.results.seeds import Score, mixed_data, scores
from attnbench.site.views.links import evidence, impl_page, slug, task_page
from attnbench.site.views.words import pattern_words


@dataclass(frozen=True)
class Seed:
    """One seed of one impl: its value as text, the value itself, and where it was recorded."""

    seed: int
    text: str
    value: float | None
    href: str


@dataclass(frozen=True)
class TaskEntry:
    """One impl on a task: mean over seeds with its interval, or why there is none."""

    impl: str
    mechanism: str
    page: str
    control: bool
    rank: str
    status: str
    reason: str
    score: Score
    value: str
    interval: str
    seeds: tuple[Seed, ...]
    train: str
    params: str
    href: str

    @property
    def failed(self) -> bool:
        """Whether a seed gave no score, so that there is no mean."""
        return self.status != Status.OK


@dataclass(frozen=True)
class TaskTable:
    """One task at one preset, pattern and device with one software; the best first, failures last.

    ``problems`` says why it does not measure attention, empty where it does.
    """

    anchor: str
    task: str
    preset: str
    pattern: str
    device: str
    title: str
    metric: str
    better: str
    subtitle: str
    warning: str
    problems: tuple[str, ...]
    train_hours: float
    entries: tuple[TaskEntry, ...]

    @property
    def page(self) -> str:
        """The page that has this table."""
        return task_page(self.task)

    @property
    def leader(self) -> TaskEntry | None:
        """The best score, controls aside."""
        return next((e for e in self.entries if not e.failed and not e.control), None)

    @property
    def tied(self) -> int:
        """How many others may be the best too, as far as their seeds can tell."""
        return sum(e.score.best == 1 for e in self.entries if not e.control and e is not self.leader)


@dataclass(frozen=True)
class Place:
    """What one impl reached in one task table."""

    table: TaskTable
    entry: TaskEntry


def task_tables(current: Iterable[Summary]) -> list[TaskTable]:
    """One table for every task, pattern, preset, device and software, by task."""
    known = list(current)
    by_score: dict[tuple[str, ...], list[Summary]] = {}
    for s in known:
        by_score.setdefault(_where(s), []).append(s)
    tables = [_table(found, by_score) for found in scores(known)]
    return sorted(tables, key=lambda t: (t.task, t.device == "cpu", t.preset, t.pattern, t.anchor))


def places(tables: Iterable[TaskTable]) -> dict[str, list[Place]]:
    """Mechanism → its entries in all task tables."""
    found: dict[str, list[Place]] = {}
    for table in tables:
        for entry in table.entries:
            found.setdefault(entry.mechanism, []).append(Place(table, entry))
    return found


# ---- inside --------------------------------------------------------------------------------------------


def _where(s: Summary) -> tuple[str, ...]:
    task = str(s.get("task") or s.get("suite"))
    names = (task, *(str(s.get(name)) for name in ("pattern", "device", "preset")))
    return (*names, s.software_key, s.label)


def _table(found: Sequence[Score], summaries: dict[tuple[str, ...], list[Summary]]) -> TaskTable:
    first = found[0]
    known = next((score for score in found if score.metric), first)
    mixed = mixed_data(found)
    seeds = ", ".join(map(str, mixed))
    newest = max(score.started_at for score in found)[:10]
    where = (first.task, first.preset, first.pattern, first.device, first.software_key[:6])
    entries = []
    for score in found:
        key = (score.task, score.pattern, score.device, score.preset, score.software_key, score.label)
        entries.append(_entry(score, summaries[key]))
    return TaskTable(
        anchor="_".join(slug(part) for part in where),
        task=first.task,
        preset=first.preset,
        pattern=first.pattern,
        device=first.device,
        title=f"{first.preset}, {pattern_words(first.pattern)}, {first.device}",
        metric=known.metric or "metric",
        better=known.better or NONE,
        subtitle=f"{known.data or 'no data'} · software {first.software_key[:8]} · measured {newest}",
        warning=f"Seeds {seeds} were run on different data: do not compare them." if mixed else "",
        problems=judge(found).problems,
        train_hours=sum((score.train_s or 0.0) * len(score.seeds) for score in found) / 3600,
        entries=tuple(entries),
    )


def _entry(score: Score, summaries: Sequence[Summary]) -> TaskEntry:
    ordered = sorted(summaries, key=lambda s: s.get("seed") or 0)
    mechanism = str(ordered[0].get("mechanism"))
    places = NONE if score.best is None else f"{score.best}"
    if score.best != score.last:
        places = f"{score.best}–{score.last}"
    return TaskEntry(
        impl=score.label,
        mechanism=mechanism,
        page="" if score.control else impl_page(mechanism),
        control=score.control,
        rank=places,
        status=str(score.status),
        reason=score.reason,
        score=score,
        value=NONE if score.value is None else number(score.value, _half(score), 4),
        interval=_interval(score),
        seeds=tuple(_seed(s) for s in ordered),
        train=number(score.train_s),
        params=number(score.params),
        href=evidence(ordered[0]),
    )


def _seed(s: Summary) -> Seed:
    value = s.get("metric_value") if s.ok else None
    text = number(value, digits=4) if value is not None else str(s.status)
    return Seed(s.get("seed") or 0, text, value, evidence(s))


def _half(score: Score) -> float | None:
    return None if score.lo is None or score.hi is None else (score.hi - score.lo) / 2


def _interval(score: Score) -> str:
    half = _half(score)
    if score.lo is None or score.hi is None:
        return NONE
    return f"{number(score.lo, half)} – {number(score.hi, half)}"
