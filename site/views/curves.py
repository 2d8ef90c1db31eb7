"""Times over the length as tables: a line an impl, beside the baseline and the fastest of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attnbench.results.aggregate import Summary
from attnbench.results.format import BYTE_UNITS, NONE, TIME_UNITS, Unit, common_unit
from attnbench.site.views.case import Case, Entry
from attnbench.site.views.columns import shown
from attnbench.site.views.links import evidence

NAMED: Final = 2
"""Cases that a failure is illustrated with."""


@dataclass(frozen=True)
class Point:
    """One impl at one length: its time and peak memory as text, or how it failed; ``note`` names the impl."""

    status: str
    reason: str
    text: str
    memory: str
    value: float | None
    note: str
    href: str


@dataclass(frozen=True)
class Curve:
    """One line of a table, None where no case was planned.

    ``kind`` is ``own``, ``baseline`` or ``fastest``.
    """

    label: str
    kind: str
    points: tuple[Point | None, ...]


@dataclass(frozen=True)
class CurveTable:
    """Curves of one mechanism in one setting, by pattern.

    ``case`` has the setting; its pattern and length are those of no case.
    """

    case: Case
    sizes: tuple[str, ...]
    time_unit: str
    memory_unit: str
    patterns: tuple[tuple[str, tuple[Curve, ...]], ...]


@dataclass(frozen=True)
class Failures:
    """One way in which an impl failed: status, reason, and the cases, of which some are named."""

    label: str
    status: str
    reason: str
    cases: int
    named: tuple[tuple[str, str], ...]


def curve_tables(ranked: Mapping[Case, Sequence[Entry]], mechanism: str) -> list[CurveTable]:
    """The tables of ``mechanism``, by device, dtype, direction, scope, workload and software."""
    settings: dict[Case, dict[Case, Sequence[Entry]]] = {}
    for case, group in ranked.items():
        if any(e.summary.get("mechanism") == mechanism for e in group):
            settings.setdefault(replace(case, pattern="", n=0, m=0), {})[case] = group
    return [_table(setting, inside, mechanism) for setting, inside in settings.items()]


def failures(summaries: Iterable[Summary], name: Callable[[Summary], str]) -> list[Failures]:
    """Failures with equal impl, status and reason together, the most frequent of each impl first.

    ``name`` turns a summary into the words that name its case.
    """
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for s in summaries:
        if not s.ok:
            groups.setdefault((s.label, str(s.status), s.reason), []).append(s)
    found = [
        Failures(*key, len(group), tuple((name(s), evidence(s)) for s in group[:NAMED]))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda f: (f.label, -f.cases, f.status, f.reason))


# ---- inside --------------------------------------------------------------------------------------------


def _table(setting: Case, found: Mapping[Case, Sequence[Entry]], mechanism: str) -> CurveTable:
    listed = [
        e.summary
        for group in found.values()
        for at, e in enumerate(group)
        if at == 0 or e.baseline or e.summary.get("mechanism") == mechanism
    ]
    time = common_unit([s.time_us for s in listed], TIME_UNITS)
    memory = common_unit([s.get("mem_peak_bytes") for s in listed if s.ok], BYTE_UNITS)
    sizes = sorted({(case.n, case.m) for case in found})
    by_pattern: dict[str, dict[tuple[int, int], Sequence[Entry]]] = {}
    for case, group in found.items():
        by_pattern.setdefault(case.pattern, {})[case.n, case.m] = group
    return CurveTable(
        setting,
        tuple(str(n) if n == m else f"{n} × {m}" for n, m in sizes),
        time.name,
        memory.name,
        tuple(
            (pattern, tuple(_curves(groups, sizes, mechanism, time, memory)))
            for pattern, groups in sorted(by_pattern.items())
        ),
    )


def _curves(
    groups: Mapping[tuple[int, int], Sequence[Entry]],
    sizes: Sequence[tuple[int, int]],
    mechanism: str,
    time: Unit,
    memory: Unit,
) -> list[Curve]:
    own: dict[str, dict[tuple[int, int], Point]] = {}
    reference: dict[tuple[int, int], Point] = {}
    fastest: dict[tuple[int, int], Point] = {}
    names: dict[str, None] = {}
    for size, group in groups.items():
        for at, entry in enumerate(group):
            if entry.summary.get("mechanism") == mechanism:
                own.setdefault(entry.summary.label, {})[size] = _point(entry, time, memory)
            elif entry.baseline:
                reference[size] = _point(entry, time, memory)
                names[entry.summary.label] = None
            if at == 0 and entry.summary.ok:
                fastest[size] = replace(_point(entry, time, memory), note=entry.summary.label)

    def curve(label: str, kind: str, points: Mapping[tuple[int, int], Point]) -> Curve:
        return Curve(label, kind, tuple(points.get(size) for size in sizes))

    found = [curve(label, "own", points) for label, points in sorted(own.items())]
    if reference:
        found.append(curve(" or ".join(names), "baseline", reference))
    if fastest:
        found.append(curve("fastest of all", "fastest", fastest))
    return found


def _point(entry: Entry, time: Unit, memory: Unit) -> Point:
    s = entry.summary
    peak = s.get("mem_peak_bytes") if s.ok else None
    return Point(
        status=str(s.status),
        reason=s.reason,
        text=shown(s.time_us, time, entry.half_width_us),
        memory=NONE if peak is None else shown(peak, memory),
        value=s.time_us,
        note="",
        href=evidence(s),
    )
