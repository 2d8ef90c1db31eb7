"""One run: where it ran, what it planned, how that ended, and every block with its samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnbench.results.aggregate import Summary, summarise
from attnbench.results.format import BYTE_UNITS, NONE, common_unit, number
from attnbench.results.rows import Row
from attnbench.results.schema import Status
from attnbench.site.views.case import case_of
from attnbench.site.views.columns import shown
from attnbench.site.views.links import evidence, evidence_page, run_page, slug
from attnbench.site.views.provenance import Environment, FlagCount, environments, flag_counts
from attnbench.site.views.words import DTYPE_WORDS, STATUS_ORDER

BINS: Final = 40
STRIP_WIDTH, STRIP_HEIGHT = 176.0, 18.0


@dataclass(frozen=True)
class MechanismCount:
    """What a run recorded of one mechanism: rows by status, and the page that has them."""

    mechanism: str
    page: str
    rows: int
    statuses: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One run. ``statuses`` are in the order of :data:`STATUS_ORDER`, as are those of its mechanisms."""

    run_id: str
    page: str
    parquet: str
    devices: tuple[str, ...]
    presets: tuple[str, ...]
    suites: tuple[str, ...]
    started: str
    ended: str
    hours: float
    rows: tuple[Row, ...]
    statuses: tuple[int, ...]
    environments: tuple[Environment, ...]
    flags: tuple[FlagCount, ...]
    mechanisms: tuple[MechanismCount, ...]


@dataclass(frozen=True)
class Strip:
    """Samples as a histogram: an SVG path in a box of 176 × 18, and the same in words."""

    path: str
    median: float
    words: str


@dataclass(frozen=True)
class Block:
    """One block of a case: one row. ``order`` is its place in the run, from 1."""

    block: int
    order: int
    status: str
    reason: str
    time: str
    percentiles: str
    strip: Strip | None
    memory: str
    error: str
    launches: str
    flags: tuple[str, ...]
    duration: str
    log_tail: str


@dataclass(frozen=True)
class Evidence:
    """All blocks of one impl on one case in one run."""

    anchor: str
    label: str
    title: str
    blocks: tuple[Block, ...]
    rows: tuple[Row, ...]


def runs(rows: Iterable[Row]) -> list[Run]:
    """Every run, the newest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["run_id"], []).append(row)
    found = [_run(run_id, group) for run_id, group in groups.items()]
    return sorted(found, key=lambda run: (run.started, run.run_id), reverse=True)


def evidences(run: Run) -> dict[str, list[Evidence]]:
    """Mechanism → all its cases in the run, in the order of the cases."""
    order = {id(row): at for at, row in enumerate(sorted(run.rows, key=lambda r: str(r["started_at"])), 1)}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        groups.setdefault((row["case_key"], row["software_key"]), []).append(row)
    found: dict[str, list[Evidence]] = {}
    for group in groups.values():
        group.sort(key=lambda row: row["block"])
        found.setdefault(group[0]["mechanism"], []).append(_evidence(group, order))
    for cases in found.values():
        cases.sort(key=lambda e: _sortable(e.rows[0]))
    return found


def strip(samples: Sequence[float]) -> Strip:
    """A histogram of ``samples``, which must not be empty, in :data:`BINS` bins between their extremes."""
    lo, hi = min(samples), max(samples)
    width = (hi - lo) or 1.0
    counts = Counter(min(int(BINS * (x - lo) / width), BINS - 1) for x in samples)
    most = max(counts.values())
    step = STRIP_WIDTH / BINS
    heights = [(at, max(STRIP_HEIGHT * count / most, 1.0)) for at, count in sorted(counts.items())]
    bars = [f"M{step * at:.4g} {STRIP_HEIGHT:g}v-{h:.3g}h{step:.3g}V{STRIP_HEIGHT:g}z" for at, h in heights]
    middle = sorted(samples)[len(samples) // 2]
    words = f"{len(samples)} samples from {number(lo)} to {number(hi)} µs"
    return Strip("".join(bars), round(STRIP_WIDTH * (middle - lo) / width, 1), words)


# ---- inside --------------------------------------------------------------------------------------------


def _run(run_id: str, rows: Sequence[Row]) -> Run:
    by_mechanism: dict[str, list[Row]] = {}
    for row in rows:
        by_mechanism.setdefault(row["mechanism"], []).append(row)
    return Run(
        run_id=run_id,
        page=run_page(run_id),
        parquet=f"data/runs/{slug(run_id)}.parquet",
        devices=_known(rows, "device"),
        presets=_known(rows, "preset"),
        suites=_known(rows, "suite"),
        started=min(str(row["started_at"]) for row in rows),
        ended=max(str(row["started_at"]) for row in rows),
        hours=sum(row["duration_s"] or 0.0 for row in rows) / 3600,
        rows=tuple(rows),
        statuses=_statuses(rows),
        environments=tuple(environments(rows)),
        flags=tuple(flag_counts(rows)),
        mechanisms=tuple(
            MechanismCount(name, evidence_page(run_id, name), len(group), _statuses(group))
            for name, group in sorted(by_mechanism.items())
        ),
    )


def _known(rows: Iterable[Row], name: str) -> tuple[str, ...]:
    return tuple(sorted({str(row[name]) for row in rows}))


def _statuses(rows: Iterable[Row]) -> tuple[int, ...]:
    counts = Counter(row["status"] for row in rows)
    return tuple(counts[status] for status in STATUS_ORDER)


def _evidence(group: Sequence[Row], order: Mapping[int, int]) -> Evidence:
    (summary, *_) = summarise(group)
    return Evidence(
        anchor=evidence(summary).partition("#")[2],
        label=summary.label,
        title=_title(summary),
        blocks=tuple(_block(row, order[id(row)]) for row in group),
        rows=tuple(group),
    )


def _title(s: Summary) -> str:
    dtype = DTYPE_WORDS.get(str(s.get("dtype")), str(s.get("dtype")))
    if s.get("scope") == "task":
        return f"{s.get('task') or s.get('suite')}, {s.get('pattern')}, seed {s.get('seed')}, {dtype}"
    case = case_of(s)
    words = (case.workload, case.pattern, case.size, case.direction, case.scope, case.device, dtype)
    return " · ".join(words)


def _block(row: Row, order: int) -> Block:
    ok = row["status"] == Status.OK
    samples = row["samples_us"] if ok else None
    score = row["metric_value"]
    spread = [number(row[name]) for name in ("min_us", "p5_us", "p95_us") if row[name] is not None]
    return Block(
        block=row["block"],
        order=order,
        status=row["status"],
        reason=row["reason"] or "",
        time=f"{row['metric']} {score:.4g}" if score is not None else number(row["time_us"], digits=4),
        percentiles=" / ".join(spread),
        strip=strip(samples) if samples else None,
        memory=_bytes(row["mem_peak_bytes"]),
        error=number(row["err_ratio"]),
        launches=NONE if row["n_launches"] is None else str(row["n_launches"]),
        flags=tuple(row["flags"] or ()),
        duration=number(row["duration_s"]),
        log_tail=row["log_tail"] or "",
    )


def _bytes(size: int | None) -> str:
    if size is None:
        return NONE
    unit = common_unit([size], BYTE_UNITS)
    return f"{shown(size, unit)} {unit.name}"


def _sortable(row: Row) -> tuple[Any, ...]:
    names = ("backend", "hyper", "workload", "pattern", "scope", "dtype", "direction")
    return (*(str(row[name]) for name in names), row["n"], row["m"] or 0, row["seed"] or 0)


def settings(rows: Iterable[Row]) -> list[str]:
    """Configurations that our kernels ran with, each once."""
    found = (row["tuned_config"] for row in rows if row["tuned_config"])
    return sorted({json.dumps(json.loads(text), sort_keys=True) for text in found})
