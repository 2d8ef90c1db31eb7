"""The tables of ``attnbench report``: times, outcomes and task scores, as plain data without a renderer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from attnbench.results import stats
from attnbench.results.aggregate import SEVERITY, Ranked, Summary, newest, rank, summarise
from attnbench.results.format import (
    BYTE_UNITS,
    NONE,
    TIME_UNITS,
    common_unit,
    interval,
    length,
    number,
    scientific,
)
from attnbench.results.rows import Row
from attnbench.results.schema import Status
from attnbench.results.seeds import Score, mixed_data, scores
from attnbench.results.table import Column, Record, Table, table

BASELINE: Final = "softmax/sdpa_flash"
"""The impl that times are compared with unless another is named."""

SAME_SWEEP: Final = ("device", "scope", "workload", "pattern", "dtype", "direction")
"""Columns that all rows of one table share, apart from the length; together with software and method."""


@dataclass(frozen=True)
class Report:
    """Everything that ``attnbench report`` prints. ``notes`` concern all of it."""

    cases: tuple[Table, ...]
    tasks: tuple[Table, ...]
    statuses: tuple[Table, ...]
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in reading order."""
        return (*self.cases, *self.tasks, *self.statuses)


def build(rows: Iterable[Row], baseline: str = BASELINE) -> Report:
    """The report of some rows, of each case the newest version of the code only (noted when it matters)."""
    kept, older = newest(summarise(rows))
    notes = []
    if older:
        notes.append(
            f"older summaries of the same cases left out: {len(older)} "
            "(from another commit, preset or version of the method)"
        )
    return Report(
        cases=tuple(case_tables(kept, baseline)),
        tasks=tuple(task_tables(kept)),
        statuses=tuple(status_tables(kept)),
        notes=tuple(notes),
    )


# ---- cases ---------------------------------------------------------------------------------------------


def case_tables(summaries: Iterable[Summary], baseline: str = BASELINE) -> list[Table]:
    """One table for each device, scope, workload, pattern, dtype, direction and length, fastest first.

    ``×`` is the baseline's time over the impl's: above 1 is faster than the baseline. Cases that did not end
    as ``ok`` stand below, with their reason and no number.
    """
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for s in summaries:
        if s.get("scope") != "task":
            groups.setdefault((*sweep_of(s), s.get("n") or 0, s.get("m") or 0), []).append(s)
    order = sorted(groups, key=lambda key: (*map(str, key[:-2]), key[-2], key[-1]))
    return [_case_table(groups[key], baseline) for key in order]


def sweep_of(summary: Summary) -> tuple[Any, ...]:
    """What the cases of one table or figure share; an equal value means comparable but for the length."""
    return (
        *(summary.get(name) for name in SAME_SWEEP),
        summary.software_key,
        summary.measurement_version,
    )


def _case_table(group: Sequence[Summary], baseline: str) -> Table:
    ranked = rank(group)
    base = next((r.summary for r in ranked if r.summary.label == baseline), None)
    records = [_case_record(r.summary, r, base) for r in ranked]
    failed = sorted((s for s in group if not s.ok), key=lambda s: (SEVERITY.index(s.status), s.label))
    records += [_case_record(s, None, None) for s in failed]
    time = common_unit((s.time_us for s in group), TIME_UNITS)
    memory = common_unit((s.get("mem_peak_bytes") for s in group), BYTE_UNITS)
    columns = (
        Column("rank", lambda r: r["rank"] or NONE),
        Column("impl", lambda r: r["impl"], numeric=False),
        Column(f"time {time.name}", lambda r: _scaled(r, "time_us", time.size)),
        Column(f"95 % interval {time.name}", lambda r: interval(r["time_lo_us"], r["time_hi_us"], time)),
        Column(f"× vs {baseline}", _speedup_cell),
        Column(f"peak memory {memory.name}", lambda r: _scaled(r, "mem_peak_bytes", memory.size)),
        Column("error vs fp64", lambda r: scientific(r["err_rms"])),
        Column("error vs softmax", _approximation_cell),
        Column("status", _status_cell, numeric=False),
    )
    return table(_case_title(group[0]), columns, records, _case_notes(ranked, base, baseline))


def _case_record(s: Summary, ranked: Ranked | None, base: Summary | None) -> Record:
    ratio = _speedup(s, base)
    place = {name: s.get(name) for name in (*SAME_SWEEP, "n", "m")}
    columns = ("mem_peak_bytes", "err_rms", "approx_err_gaussian", "tflops", "roofline_pct")
    return {
        **place,
        "software_key": s.software_key,
        "rank": ranked.text if ranked else None,
        "impl": s.label,
        "exact": s.get("exact"),
        "time_us": s.time_us,
        "time_lo_us": s.lo_us,
        "time_hi_us": s.hi_us,
        "blocks": s.blocks,
        "between_cv": s.between_cv,
        "speedup": ratio[0],
        "speedup_lo": ratio[1],
        "speedup_hi": ratio[2],
        **{name: s.get(name) for name in columns},
        "status": str(s.status),
        "statuses": [f"{count} {name}" for name, count in s.statuses.items()],
        "reason": s.reason or None,
        "flags": list(s.flags),
        "started_at": s.started_at,
    }


def _speedup(s: Summary, base: Summary | None) -> tuple[float | None, float | None, float | None]:
    """(ratio, lower, upper) of the baseline's time over this one's; the ends None below three blocks."""
    if base is None or base.time_us is None or s.time_us is None:
        return None, None, None
    around = stats.ratio_interval(base.block_times_us, s.block_times_us)
    if around is None or s is base:
        return base.time_us / s.time_us, None, None
    return around.value, around.lo, around.hi


def _speedup_cell(record: Record) -> str:
    ratio, lo, hi = record["speedup"], record["speedup_lo"], record["speedup_hi"]
    return number(ratio, (hi - lo) / 2 if lo is not None else None)


def _approximation_cell(record: Record) -> str:
    return "exact" if record["exact"] else scientific(record["approx_err_gaussian"])


def _scaled(record: Record, name: str, size: float) -> str:
    value = record[name]
    if value is None:
        return NONE
    lo, hi = record.get("time_lo_us"), record.get("time_hi_us")
    half = (hi - lo) / 2 / size if name == "time_us" and lo is not None and hi is not None else None
    return number(value / size, half)


def _status_cell(record: Record) -> str:
    """``ok``, with its flags by name; else the status with its reason, and how many blocks ended so."""
    if record["status"] == Status.OK:
        names = dict.fromkeys(flag.partition(":")[0] for flag in record["flags"])
        return f"ok ⚑ {', '.join(names)}" if names else "ok"
    counts = record["statuses"]
    blocks = f" ({', '.join(counts)})" if len(counts) > 1 else ""
    return f"{record['status']}{blocks}: {record['reason']}"


def _case_title(s: Summary) -> str:
    n, m = s.get("n"), s.get("m")
    keys = f" M={length(m)}" if m is not None and m != n else ""
    scope = "" if s.get("scope") == "op" else f" · {s.get('scope')}"
    names = (s.get(name) for name in ("device", "workload", "pattern", "dtype", "direction"))
    return " · ".join(str(name) for name in names) + f"{scope} · N={length(n)}{keys}"


def _case_notes(ranked: Sequence[Ranked], base: Summary | None, baseline: str) -> list[str]:
    notes = []
    if any(r.lo is None for r in ranked):
        notes.append(
            f"preliminary: ~ marks places by value alone, an interval needs {stats.MIN_BLOCKS} blocks"
        )
    if base is None and ranked:
        notes.append(f"the baseline {baseline} was not measured here")
    return notes


# ---- tasks ---------------------------------------------------------------------------------------------


def task_tables(summaries: Iterable[Summary]) -> list[Table]:
    """One table for each task, pattern, preset, device and software: metric over seeds, best first."""
    return [_task_table(found) for found in scores(summaries)]


def _task_table(found: Sequence[Score]) -> Table:
    metric = next((s.metric for s in found if s.metric), "metric")
    better = next((s.better for s in found if s.better), "")
    first = found[0]
    columns = (
        Column("rank", lambda r: r["rank"] or NONE),
        Column("impl", lambda r: f"{r['impl']} (control)" if r["control"] else r["impl"], numeric=False),
        Column(f"{metric}{f' ({better} is better)' if better else ''}", _metric_cell),
        Column("± 95 %", lambda r: number(_half(r), digits=2)),
        Column("seeds", lambda r: str(len(r["seeds"]))),
        Column("parameters", lambda r: NONE if r["params"] is None else f"{r['params']:,}"),
        Column("training s", lambda r: number(r["train_s"])),
        Column("status", _status_cell, numeric=False),
    )
    mixed = mixed_data(found)
    notes = [f"seeds {', '.join(map(str, mixed))}: the data differ, do not compare"] if mixed else []
    data = next((s.data for s in found if s.data), "")
    title = " · ".join(
        name for name in (first.device, first.task, first.pattern, f"preset {first.preset}", data) if name
    )
    return table(title, columns, [_task_record(score) for score in found], notes)


def _task_record(s: Score) -> Record:
    ranks = None if s.best is None else str(s.best) if s.best == s.last else f"{s.best}–{s.last}"
    return {
        "device": s.device,
        "task": s.task,
        "pattern": s.pattern,
        "preset": s.preset,
        "software_key": s.software_key,
        "rank": ranks,
        "impl": s.label,
        "control": s.control,
        "metric": s.metric,
        "metric_better": s.better,
        "metric_mean": s.value,
        "metric_lo": s.lo,
        "metric_hi": s.hi,
        "metric_sd": s.sd,
        "seeds": list(s.seeds),
        "metric_values": list(s.values),
        "params": s.params,
        "params_softmax": s.params_softmax,
        "steps": s.steps,
        "train_s": s.train_s,
        "tokens_per_s": s.tokens_per_s,
        "data": s.data,
        "status": str(s.status),
        "statuses": [f"{count} {name}" for name, count in s.statuses.items()],
        "reason": s.reason or None,
        "flags": [],
        "started_at": s.started_at,
    }


def _half(record: Record) -> float | None:
    lo, hi = record["metric_lo"], record["metric_hi"]
    return None if lo is None or hi is None else (hi - lo) / 2


def _metric_cell(record: Record) -> str:
    return number(record["metric_mean"], _half(record), digits=4)


# ---- outcomes ------------------------------------------------------------------------------------------


def status_tables(summaries: Iterable[Summary]) -> list[Table]:
    """One table per device: how many cases of each impl ended how, with a total below."""
    devices: dict[str, dict[str, Counter[str]]] = {}
    for s in summaries:
        devices.setdefault(s.get("device"), {}).setdefault(s.impl, Counter())[str(s.status)] += 1
    return [_status_table(device, counts) for device, counts in sorted(devices.items())]


def _status_table(device: str, counts: Mapping[str, Counter[str]]) -> Table:
    total = sum(counts.values(), Counter())
    seen = [str(status) for status in Status if total[status]]
    columns = [
        Column("impl", lambda r: r["impl"], numeric=False),
        *(Column(name, partial(_count, name)) for name in seen),
        Column("cases", lambda r: str(r["cases"])),
    ]
    records = [
        {"device": device, "impl": impl, **{name: found[name] for name in seen}, "cases": found.total()}
        for impl, found in [*sorted(counts.items()), ("all", total)]
    ]
    return table(f"{device} · how the cases ended", columns, records)


def _count(name: str, record: Record) -> str:
    return str(record[name] or NONE)
