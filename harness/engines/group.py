"""Measures a group of cases, those that share a worker process, and writes one row for every case.

What every engine runs, in the driver or on another machine: crashes and time limits become rows here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench import __version__
from attnbench.errors import AttnbenchError
from attnbench.harness import environment
from attnbench.harness.config import TIME_LIMITS_S, RunConfig, preset_of
from attnbench.harness.listener import Listener
from attnbench.harness.parallel import ranks_of
from attnbench.harness.plan import Planned
from attnbench.harness.process import Answer, WorkerProcess, death_reason, printable
from attnbench.impls import registry
from attnbench.results import schema
from attnbench.results.rows import Row, mended
from attnbench.results.schema import Status
from attnbench.tasks import registry as tasks

KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}
"""Settings of glibc with which a worker keeps freed memory, as the CUDA allocator does.

Otherwise the layout of the heap, an accident of each process, decides whether every call pays for its pages
anew, which doubles its time.
"""

SKIP_AFTER = {Status.OOM: "out of memory", Status.TIMEOUT: "over the time limit"}

Series = tuple[object, ...]
Exceeded = Mapping[Series, tuple[int, str]]
"""Series of lengths that a case has shown to be too long: that case's N, and what it ran out of."""


@dataclass(frozen=True)
class Group:
    """Cases that share a worker process, in ascending length. Plain values: it travels between machines.

    ``checkpoints`` is the folder of half-finished trainings, ``exceeded`` what earlier cases have shown.
    """

    run_id: str
    request: RunConfig
    cases: tuple[Planned, ...]
    checkpoints: Path
    exceeded: Exceeded = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device that all its cases are for."""
        return self.cases[0].case.device


def grouped(planned: Iterable[Planned]) -> Iterator[tuple[Planned, ...]]:
    """Consecutive cases that share a worker; at the end, those of each device that need none, together."""
    group: list[Planned] = []
    idle: dict[str, list[Planned]] = {}

    def whole() -> Iterator[tuple[Planned, ...]]:
        if all(item.unsupported for item in group):
            idle.setdefault(group[0].case.device, []).extend(group)
        else:
            yield tuple(group)

    for item in planned:
        if group and (item.worker, item.case.device) != (group[0].worker, group[0].case.device):
            yield from whole()
            group = []
        group.append(item)
    if group:
        yield from whole()
    yield from (tuple(items) for items in idle.values())


def exceeded_by(planned: Iterable[Planned], rows: Iterable[Row]) -> dict[tuple[int, Series], tuple[int, str]]:
    """What finished rows say of the lengths after them, by block and series."""
    series = {item.key: (item.block, item.case.series()) for item in planned}
    found: dict[tuple[int, Series], tuple[int, str]] = {}
    for row in rows:
        key = series.get((row["case_key"], row["block"]))
        if key is not None and row["status"] in SKIP_AFTER:
            found[key] = (row["n"], SKIP_AFTER[Status(row["status"])])
    return found


def measure(group: Group, listener: Listener) -> Generator[Row]:
    """Measure the group, one row after the other as cases finish; a worker that dies is replaced.

    Raises AttnbenchError when no worker process can be started.
    """
    crew = _Crew(group, listener)
    exceeded = dict(group.exceeded)
    try:
        for item in group.cases:
            row = crew.row(item, exceeded)
            status = Status(row["status"])
            if status in SKIP_AFTER and group.request.infer:
                exceeded[item.case.series()] = (item.case.n, SKIP_AFTER[status])
            yield row
    finally:
        crew.close()


def lost(group: Group, item: Planned, reason: str, machine: Mapping[str, Any]) -> Row:
    """The row of a case whose machine was lost with it, time after time; ``machine``: what is known of it."""
    return _row(group, item, {"status": Status.CRASHED, "reason": reason}, 0.0, machine)


class _Crew:
    """The workers of one group: at most one at a time."""

    def __init__(self, group: Group, listener: Listener) -> None:
        self._group, self._listener = group, listener
        self._preset = preset_of(group.request)
        self._threads = group.request.threads or self._preset.threads or environment.physical_cores()
        self._worker: WorkerProcess | None = None
        self._machine: dict[str, Any] = {}

    def close(self) -> None:
        """End the present worker, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def row(self, item: Planned, exceeded: Exceeded) -> Row:
        """The row of one case: that of a measurement, or why there need not be one."""
        columns, duration_s = self._without_worker(item, exceeded), 0.0
        if columns is None:
            start = time.monotonic()
            columns = self._ask(self._ready(), item)
            duration_s = time.monotonic() - start
        if not self._machine:  # a row says where it is from, also one that needed no worker
            self._ready()
        return _row(self._group, item, columns, duration_s, self._machine)

    def _without_worker(self, item: Planned, exceeded: Exceeded) -> dict[str, Any] | None:
        """Columns of a case that need not be run: it is unsupported, or a shorter one was too much."""
        if item.unsupported:
            return {"status": Status.UNSUPPORTED, "reason": item.unsupported}
        if item.case.series() in exceeded:
            n, why = exceeded[item.case.series()]
            return {"status": Status.SKIPPED, "reason": f"{why} at N={n}"}
        return None

    def _ready(self) -> WorkerProcess:
        """The worker of the group; a new one when there is none or it died."""
        if self._worker is not None and self._worker.alive:
            return self._worker
        self.close()
        settings = {
            "device": self._group.device,
            "timing": self._preset.timing,
            "gate_max_n": self._preset.gate_max_n,
            "preset": self._group.request.preset,
            "threads": self._threads,
            "checkpoints": str(self._group.checkpoints),
        }
        fresh = WorkerProcess(settings, worker_environment(self._threads))
        answer = fresh.wait_ready()
        if answer.how != "done":
            tail = fresh.log_tail()
            fresh.close()
            raise AttnbenchError(
                f"a worker process could not start ({answer.how}): {tail or 'it printed nothing'}"
            )
        self._machine, self._worker = answer.message["environment"], fresh
        return fresh

    def _ask(self, worker: WorkerProcess, item: Planned) -> dict[str, Any]:
        limit = self._group.request.time_limit_s or TIME_LIMITS_S[item.case.scope]
        self._listener.started(item)
        answer = worker.ask({"case": item.case.to_json()}, limit, _stepper(self._listener, item))
        columns = _columns_of(answer, limit)
        if columns["status"] not in (Status.OK, Status.UNSUPPORTED):
            columns["log_tail"] = worker.log_tail()
        if columns.get(
            "poisoned"
        ):  # a device context is dead after a sticky error: the next case needs another
            self.close()
        return columns


def _stepper(listener: Listener, item: Planned) -> Callable[[dict[str, Any]], None]:
    return lambda message: listener.step(item, message["done"], message["total"])


def _row(
    group: Group, item: Planned, columns: Mapping[str, Any], duration_s: float, machine: Mapping[str, Any]
) -> Row:
    case = item.case
    row: Row = {
        "run_id": group.run_id,
        "case_key": case.key(),
        "block": item.block,
        "suite": tasks.suite_of(case.task) if case.task else group.request.suite,
        "task": case.task or None,
        "preset": group.request.preset,
        "mechanism": case.mechanism,
        "backend": case.backend,
        "impl": case.impl,
        **_spec_columns(case.mechanism),
        "pattern": case.pattern,
        "workload": case.workload.name,
        "batch": case.workload.batch,
        "heads": case.workload.heads,
        "kv_heads": case.workload.kv_heads,
        "head_dim": case.workload.head_dim,
        "grid": list(case.grid),
        "geometry": case.geometry or None,
        "n": case.n,
        "m": case.m,
        "dtype": case.dtype,
        "direction": case.direction,
        "scope": case.scope,
        "hyper": json.dumps(dict(case.hyper), sort_keys=True),
        "seed": case.seed,
        "device": case.device,
        "world_size": ranks_of(case) or 1,
        "flags": [],
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(duration_s, 3),
        "attnbench_version": __version__,
        "commit": machine.get("commit"),
        "measurement_version": schema.MEASUREMENT_VERSION,
        "software_key": environment.software_key(machine),
        "environment": json.dumps(machine, sort_keys=True),
        **{name: value for name, value in columns.items() if name in schema.BY_NAME},
    }
    if row.get("reason"):
        row["reason"] = printable(row["reason"])
    return mended(row if row["status"] == Status.OK else schema.without_performance(row))


def _columns_of(answer: Answer, limit_s: float) -> dict[str, Any]:
    """The columns of an answer, or of the way in which the worker failed to give one."""
    if answer.how == "done":
        columns = {**answer.partial, **answer.message["row"]}
        if columns["status"] == Status.OK and answer.clock:
            columns |= {"status": Status.INCORRECT, "reason": f"the clock was tampered with: {answer.clock}"}
        return columns
    if answer.how == "timeout":
        reason = f"not finished after the time limit of {limit_s:g} s"
        return {**answer.partial, "status": Status.TIMEOUT, "reason": reason}
    if answer.out_of_memory:
        reason = f"{death_reason(answer)}: the kernel's out-of-memory killer"
        return {**answer.partial, "status": Status.OOM, "reason": reason}
    return {**answer.partial, "status": Status.CRASHED, "reason": death_reason(answer)}


def _spec_columns(mechanism: str) -> dict[str, Any]:
    from attnbench.tasks import controls

    if mechanism in controls.NAMES:
        return {"family": "control", "exact": False}
    spec = registry.spec(mechanism)
    return {"family": registry.family_of(mechanism), "exact": spec.exact}


def worker_environment(threads: int) -> dict[str, str]:
    """The driver's environment without Triton's interpreter: what is timed is compiled or not at all."""
    env = {**KEEP_MEMORY, **os.environ}
    env.pop("TRITON_INTERPRET", None)
    env["OMP_NUM_THREADS"] = str(threads)
    env["KINETO_LOG_LEVEL"] = "99"  # the profiler would fill the log tail with notices of its own
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


__all__ = ["Exceeded", "Group", "Series", "exceeded_by", "grouped", "lost", "measure"]
