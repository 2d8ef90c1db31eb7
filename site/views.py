"""What the pages show, as plain values: pure functions of rows, without HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.results.aggregate import Summary, newest, rank, summarise
from attnbench.results.format import number
from attnbench.results.rows import Row
from attnbench.results.schema import BY_NAME, STATUS_MEANING, Status
from attnbench.results.seeds import Score, mixed_data, scores

BASELINES = ("softmax/sdpa_flash", "softmax/sdpa_math", "softmax/torch", "softmax/reference")
"""The impl that times are compared with: the first of these that was measured on the same case."""

LETTERS = {
    Status.OK: "✓",
    Status.INCORRECT: "I",
    Status.UNSUPPORTED: "U",
    Status.OOM: "M",
    Status.TIMEOUT: "T",
    Status.COMPILE_ERROR: "K",
    Status.ERROR: "E",
    Status.CRASHED: "C",
    Status.SKIPPED: "S",
}
FACETS = ("device", "workload", "pattern", "scope", "dtype", "direction", "n")
SELECTORS = (
    ("device", "Device"),
    ("workload", "Workload"),
    ("pattern", "Pattern"),
    ("scope", "Scope"),
    ("dtype", "dtype"),
    ("direction", "Direction"),
    ("n", "Queries N"),
)
TIME_KINDS = {
    "cpu_hot": "Times are medians of hot calls on a CPU; lower is better.",
    "device_cold": "Times are median device times with a cold L2 cache; lower is better.",
}
PATTERN_WORDS = {
    "NS": "noncausal self",
    "CS": "causal self",
    "NC": "noncausal cross",
    "CC": "causal cross",
}


@dataclass(frozen=True)
class ColumnHead:
    """A column of the case table; ``help`` is its meaning in the schema."""

    label: str
    unit: str
    help: str
    kind: str = "num"


@dataclass(frozen=True)
class Cell:
    """One measured cell: text, sort key, a detail in small print, and a bar in percent of the column."""

    text: str
    key: float | str = ""
    detail: str = ""
    bar: int = 0
    kind: str = "num"


@dataclass(frozen=True)
class Entry:
    """One line of a case table."""

    mechanism: str
    backend: str
    exact: bool
    baseline: bool
    rank: str
    rank_key: float | str
    status: str
    reason: str
    cells: tuple[Cell, ...]

    @property
    def failed(self) -> bool:
        """Whether the case has no measurement."""
        return self.status != Status.OK


@dataclass(frozen=True)
class Section:
    """All impls on one case."""

    anchor: str
    title: str
    subtitle: str
    facets: dict[str, str]
    entries: tuple[Entry, ...]


COLUMNS = (
    ColumnHead(
        "rank", "", "Place by time; a range where intervals overlap, ~ where a single block has none."
    ),
    ColumnHead("impl", "", "Mechanism and backend.", "text"),
    ColumnHead("time", "µs", BY_NAME["time_us"].doc),
    ColumnHead("× baseline", "", "Time of the underlined baseline over this time: above 1 is faster."),
    ColumnHead("effective", "GFLOP/s", BY_NAME["tflops_effective"].doc),
    ColumnHead("peak memory", "KiB", BY_NAME["mem_peak_bytes"].doc),
    ColumnHead("saved", "KiB", BY_NAME["mem_saved_bytes"].doc),
    ColumnHead("error ratio", "×", BY_NAME["err_ratio"].doc),
    ColumnHead(
        "off softmax", "%", "RMS distance to exact softmax attention on recorded inputs; – when exact."
    ),
    ColumnHead("flags", "", "What makes the numbers less certain.", "text"),
)


def sections(rows: Iterable[Row]) -> list[Section]:
    """One section per case of operations and layers, in the order of the facets."""
    current, _ = newest(summarise(row for row in rows if row.get("scope") != "task"))
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for summary in current:
        key = (*(summary.get(name) for name in FACETS), summary.get("m"), summary.software_key)
        groups.setdefault(key, []).append(summary)
    return [_section(groups[key]) for key in sorted(groups, key=lambda k: tuple(map(_sortable, k)))]


def _section(group: Sequence[Summary]) -> Section:
    first = group[0]
    facets = {name: str(first.get(name)) for name in FACETS}
    pattern = facets["pattern"]
    baseline = _baseline(group)
    ranked = {id(r.summary): (r.text, r.position) for r in rank(group)}
    done = sorted((s for s in group if id(s) in ranked), key=lambda s: ranked[id(s)][1])
    failed = sorted((s for s in group if id(s) not in ranked), key=lambda s: (s.status, s.label))
    slowest = max((s.time_us or 0.0 for s in done), default=0.0)
    preliminary = any(s.preliminary for s in done)
    entries = [
        _entry(s, *ranked.get(id(s), ("–", "")), baseline=baseline, slowest=slowest) for s in [*done, *failed]
    ]
    size = f"N = {first.get('n')}" + ("" if first.get("m") == first.get("n") else f", M = {first.get('m')}")
    shape = (
        f"B {first.get('batch')} · H {first.get('heads')}/{first.get('kv_heads')} · D {first.get('head_dim')}"
    )
    notes = [shape, facets["dtype"], f"measured {first.started_at[:10]}"]
    if preliminary:
        notes.append("preliminary: one block a case, so ranks have no interval")
    return Section(
        anchor="-".join((*facets.values(), first.software_key[:6])),
        title=f"{facets['workload']}, {PATTERN_WORDS[pattern]} ({pattern}), {size}, {facets['direction']}",
        subtitle=" · ".join(notes),
        facets=facets,
        entries=tuple(entries),
    )


def _entry(s: Summary, place: str, order: float | str, *, baseline: Summary | None, slowest: float) -> Entry:
    cells: tuple[Cell, ...] = ()
    if s.ok:
        assert s.time_us is not None
        ratio = None if baseline is None or baseline.time_us is None else baseline.time_us / s.time_us
        lo = s.lo_us if s.lo_us is not None else s.get("time_lo_us")
        hi = s.hi_us if s.hi_us is not None else s.get("time_hi_us")
        width = "" if lo is None or hi is None else f"±{50 * (hi - lo) / s.time_us:.1f} %"
        effective = s.get("tflops_effective")
        fidelity = None if s.get("exact") else s.get("approx_err_recorded")
        cells = (
            Cell(number(s.time_us), s.time_us, width, round(100 * s.time_us / slowest)),
            _cell(ratio),
            _cell(None if effective is None else 1e3 * effective),
            _cell(_kib(s.get("mem_peak_bytes"))),
            _cell(_kib(s.get("mem_saved_bytes"))),
            _cell(s.get("err_ratio")),
            _cell(None if fidelity is None else 100 * fidelity),
            Cell(", ".join(sorted({flag.split(":")[0] for flag in s.flags})) or "–", kind="text"),
        )
    mechanism, _, backend = s.label.rpartition("/")
    return Entry(
        mechanism=mechanism,
        backend=backend,
        exact=bool(s.get("exact")),
        baseline=s is baseline,
        rank=place,
        rank_key=order,
        status=s.status,
        reason=s.reason,
        cells=cells,
    )


def _baseline(group: Sequence[Summary]) -> Summary | None:
    measured = {s.impl: s for s in group if s.ok and s.get("hyper") in (None, "{}")}
    return next((measured[name] for name in BASELINES if name in measured), None)


def _cell(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(number(value), value)


def _kib(value: float | None) -> float | None:
    return None if value is None else value / 1024


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


# ---- tasks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskEntry:
    """One impl on a task: mean over seeds with its interval, or why there is none."""

    impl: str
    control: bool
    rank: str
    status: str
    reason: str
    value: str
    interval: str
    seeds: int
    train: str
    params: str

    @property
    def failed(self) -> bool:
        """Whether a seed gave no score, so that there is no mean."""
        return self.status != Status.OK


@dataclass(frozen=True)
class TaskTable:
    """One task at one preset with one software."""

    anchor: str
    title: str
    metric: str
    better: str
    subtitle: str
    entries: tuple[TaskEntry, ...]


def task_tables(rows: Iterable[Row]) -> list[TaskTable]:
    """One table per task, pattern, preset, device and software, best score first, failures last."""
    current, _ = newest(summarise(row for row in rows if row.get("scope") == "task"))
    return [_task_table(found) for found in scores(current)]


def _task_table(found: Sequence[Score]) -> TaskTable:
    first = found[0]
    known = next((score for score in found if score.metric), first)
    notes = [known.data or "no data", first.device]
    mixed = mixed_data(found)
    if mixed:
        notes.append(f"seeds {', '.join(map(str, mixed))} were run on different data: do not compare them")
    return TaskTable(
        anchor=f"task-{first.task}-{first.preset}-{first.pattern}-{first.software_key[:6]}",
        title=f"{first.task}, preset {first.preset}, {PATTERN_WORDS[first.pattern]} ({first.pattern})",
        metric=known.metric or "metric",
        better=known.better or "–",
        subtitle=" · ".join(notes),
        entries=tuple(_task_entry(score) for score in found),
    )


def _task_entry(s: Score) -> TaskEntry:
    places = "–" if s.best is None else str(s.best) if s.best == s.last else f"{s.best}–{s.last}"
    return TaskEntry(
        impl=s.label,
        control=s.control,
        rank=places,
        status=str(s.status),
        reason=s.reason,
        value="–" if s.value is None else f"{s.value:.4g}",
        interval="–" if s.lo is None or s.hi is None else f"{s.lo:.4g} – {s.hi:.4g}",
        seeds=len(s.seeds),
        train="–" if s.train_s is None else number(s.train_s),
        params="–" if s.params is None else number(s.params),
    )


# ---- status matrix -------------------------------------------------------------------------------------


def legend(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every status with its letter, its meaning and how often it occurs."""
    counts = Counter(row["status"] for row in rows)
    return [
        {"status": str(s), "letter": LETTERS[s], "meaning": STATUS_MEANING[s], "count": counts[s]}
        for s in Status
    ]


def matrices(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One matrix per device, workload and dtype: impls × (pattern, direction) × length."""
    current, _ = newest(summarise(row for row in rows if row.get("scope") != "task"))
    groups: dict[tuple[str, ...], list[Summary]] = {}
    for s in current:
        groups.setdefault((s.get("device"), s.get("workload"), s.get("dtype")), []).append(s)
    return [_matrix(key, group) for key, group in sorted(groups.items())]


def _matrix(key: tuple[str, ...], group: Sequence[Summary]) -> dict[str, Any]:
    places = sorted({(s.get("pattern"), s.get("direction"), s.get("n"), s.get("m")) for s in group})
    heads = Counter((pattern, direction) for pattern, direction, _, _ in places)
    cells = {(s.label, s.get("pattern"), s.get("direction"), s.get("n"), s.get("m")): s for s in group}
    rows = []
    for label in sorted({s.label for s in group}):
        line = []
        for place in places:
            found = cells.get((label, *place))
            line.append(None if found is None else _status_cell(found))
        rows.append({"impl": label, "cells": line})
    return {
        "title": " · ".join(map(str, key)),
        "groups": [{"label": f"{p} {d}", "span": heads[p, d]} for p, d in sorted(heads)],
        "columns": [n if n == m else f"{n}×{m}" for _, _, n, m in places],
        "rows": rows,
    }


def _status_cell(s: Summary) -> dict[str, str]:
    reason = f": {s.reason}" if s.reason else ""
    where = f"{s.label} {s.get('pattern')} {s.get('direction')} N={s.get('n')}"
    return {"status": str(s.status), "letter": LETTERS[s.status], "title": f"{where}: {s.status}{reason}"}


# ---- provenance ----------------------------------------------------------------------------------------


def environments(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every software key with the facts of its newest environment."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["software_key"], []).append(row)
    found = []
    for key, group in sorted(groups.items()):
        facts = json.loads(max(group, key=lambda row: str(row["started_at"]))["environment"])
        known = [
            (name, _fact(value)) for name, value in sorted(facts.items()) if value not in (None, "", [], {})
        ]
        title = ", ".join(sorted({str(row["device"]) for row in group}))
        found.append({"key": key, "title": title, "rows": len(group), "facts": known})
    return found


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def runs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every run: its preset, start, number of rows and version."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["run_id"], []).append(row)
    return [
        {
            "run_id": run_id,
            "preset": ", ".join(sorted({row["preset"] for row in group})),
            "started": min(str(row["started_at"]) for row in group),
            "rows": len(group),
            "version": f"{group[0]['attnbench_version']} {(group[0].get('commit') or '')[:10]}".strip(),
        }
        for run_id, group in sorted(groups.items())
    ]


def flags(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every flag with the number of rows that carry it and one example."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for text in row.get("flags") or ():
            seen.setdefault(text.split(":")[0], []).append(text)
    return [{"name": n, "count": len(t), "example": min(t)} for n, t in sorted(seen.items())]


def statement(rows: Iterable[Row]) -> str:
    """One sentence on what the times are."""
    kinds = sorted({row["time_kind"] for row in rows if row.get("time_kind")})
    return " ".join(TIME_KINDS.get(kind, f"Times are of kind {kind}.") for kind in kinds)
