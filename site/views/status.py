"""How every planned case ended, as matrices of impl by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnbench.results.aggregate import Summary
from attnbench.results.schema import STATUS_MEANING, Status
from attnbench.site.views.case import Case, case_of
from attnbench.site.views.links import evidence, impl_page, slug
from attnbench.site.views.words import DIRECTION_WORDS, DTYPE_WORDS, LETTERS, PATTERN_WORDS


@dataclass(frozen=True)
class LegendEntry:
    """A status with its letter, its meaning, and how many cases ended so."""

    status: str
    letter: str
    meaning: str
    count: int


@dataclass(frozen=True)
class Cell:
    """How one case ended; ``first`` marks the first length of a group of columns."""

    status: str
    letter: str
    reason: str
    href: str
    first: bool


@dataclass(frozen=True)
class Line:
    """One impl: a cell for every column, None where no case was planned."""

    label: str
    page: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Group:
    """Columns that share pattern, direction and scope."""

    label: str
    title: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """All impls on one workload."""

    workload: str
    groups: tuple[Group, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Board:
    """The matrices of one device and dtype, and what to say of them."""

    device: str
    dtype: str
    path: str
    legend: tuple[LegendEntry, ...]
    matrices: tuple[Matrix, ...]
    cases: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Cases by status, in the order of the legend."""
        return tuple(entry.count for entry in self.legend)


def boards(cases: Mapping[Case, Sequence[Summary]]) -> list[Board]:
    """One board for every device and dtype; of a case measured with several stacks, the newest counts."""
    newest: dict[tuple[object, ...], Summary] = {}
    for group in cases.values():
        for s in group:
            key = (s.case_key, s.label)
            if key not in newest or s.started_at > newest[key].started_at:
                newest[key] = s
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in newest.values():
        groups.setdefault((str(s.get("device")), str(s.get("dtype"))), []).append(s)
    return [_board(*key, group) for key, group in sorted(groups.items())]


def legend(summaries: Iterable[Summary]) -> tuple[LegendEntry, ...]:
    """Every status with its letter, its meaning and how often it occurs."""
    counts = Counter(s.status for s in summaries)
    return tuple(LegendEntry(str(s), LETTERS[s], STATUS_MEANING[s], counts[s]) for s in Status)


def _board(device: str, dtype: str, group: Sequence[Summary]) -> Board:
    by_workload: dict[str, list[Summary]] = {}
    for s in group:
        by_workload.setdefault(str(s.get("workload")), []).append(s)
    return Board(
        device=device,
        dtype=DTYPE_WORDS.get(dtype, dtype),
        path=f"status/{slug(device)}-{slug(DTYPE_WORDS.get(dtype, dtype))}.html",
        legend=legend(group),
        matrices=tuple(_matrix(name, found) for name, found in sorted(by_workload.items())),
        cases=len(group),
    )


def _matrix(workload: str, group: Sequence[Summary]) -> Matrix:
    columns: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    lines: dict[str, dict[tuple[object, ...], Summary]] = {}
    pages: dict[str, str] = {}
    for s in group:
        case = case_of(s)
        where = (case.pattern, case.direction, case.scope)
        columns.setdefault(where, {})[case.n, case.m] = case.size
        lines.setdefault(s.label, {})[*where, case.n, case.m] = s
        pages[s.label] = impl_page(str(s.get("mechanism")))
    places = [(where, size) for where in sorted(columns) for size in sorted(columns[where])]
    return Matrix(
        workload=workload,
        groups=tuple(
            _group(where, [columns[where][size] for size in sorted(columns[where])])
            for where in sorted(columns)
        ),
        lines=tuple(
            Line(
                label,
                pages[label],
                tuple(
                    _cell(found.get((*where, *size)), size == min(columns[where])) for where, size in places
                ),
            )
            for label, found in sorted(lines.items())
        ),
    )


def _group(where: tuple[str, str, str], sizes: Sequence[str]) -> Group:
    pattern, direction, scope = where
    words = (PATTERN_WORDS.get(pattern, pattern), DIRECTION_WORDS.get(direction, direction), scope)
    return Group(f"{pattern} {direction} {scope}", ", ".join(words), tuple(sizes))


def _cell(s: Summary | None, first: bool) -> Cell | None:
    if s is None:
        return None
    return Cell(str(s.status), LETTERS[s.status], s.reason, evidence(s), first)
