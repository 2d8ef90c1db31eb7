"""The driver: plan, worker processes, journal, Parquet. What ``attnbench run`` does.

The driver imports an impl only to read its Spec; everything that could crash runs in a worker. Each finished
case is in the journal before the next one starts, so a kill at any moment loses at most one case.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from attnbench import __version__
from attnbench.errors import AttnbenchError, UsageError
from attnbench.harness import devices, environment
from attnbench.harness.config import TIME_LIMITS_S, Resolved, RunConfig, resolve
from attnbench.harness.plan import Planned, plan
from attnbench.harness.process import Answer, WorkerProcess, death_reason
from attnbench.impls import registry
from attnbench.results import schema
from attnbench.results.journal import Journal
from attnbench.results.schema import Status
from attnbench.results.store import write_parquet

CONFIG, JOURNAL, RESULTS = "run.json", "journal.jsonl", "results.parquet"
SKIP_AFTER = {Status.OOM: "out of memory", Status.TIMEOUT: "over the time limit"}


class Listener(Protocol):
    """What shows progress. All methods are called from the driver's thread."""

    def planned(self, total: int, done: int) -> None:
        """The plan stands: ``total`` cases, ``done`` of them finished in an earlier attempt."""

    def started(self, case: Planned) -> None:
        """A case is about to be measured."""

    def step(self, case: Planned, done: int, of: int) -> None:
        """A task case has taken ``done`` of ``of`` training steps."""

    def finished(self, row: Mapping[str, Any]) -> None:
        """A row is in the journal."""


class Silent:
    """A listener that shows nothing."""

    def planned(self, total: int, done: int) -> None:
        """Show nothing."""

    def started(self, case: Planned) -> None:
        """Show nothing."""

    def step(self, case: Planned, done: int, of: int) -> None:
        """Show nothing."""

    def finished(self, row: Mapping[str, Any]) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its rows."""

    path: Path
    rows: tuple[dict[str, Any], ...]

    def by_status(self) -> dict[str, int]:
        """Number of rows of each status that occurs, most frequent first."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def run(config: RunConfig, out: str | Path | None = None, listener: Listener | None = None) -> Run:
    """Measure what ``config`` asks for into the folder ``out`` (default ``runs/<time>``).

    Raises UsageError for a request that means nothing, hardware that is not here, or a folder that already
    holds a run or cannot be written; nothing is measured then.
    """
    resolved, planned = prepare(config)
    path = Path(out) if out is not None else Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run_id = _create(path, config)
    return _execute(path, run_id, resolved, planned, listener or Silent())


def resume(path: str | Path, listener: Listener | None = None) -> Run:
    """Go on with the run in the folder ``path``: finished cases stay, the others are measured."""
    folder = Path(path)
    stored = _stored(folder)
    resolved, planned = prepare(RunConfig.from_json(stored["config"]))
    return _execute(folder, stored["run_id"], resolved, planned, listener or Silent())


def prepare(config: RunConfig) -> tuple[Resolved, list[Planned]]:
    """The resolved request and its plan, without measuring anything."""
    resolved = resolve(config, devices.resolve(config.gpu))
    return resolved, plan(resolved)


def _create(path: Path, config: RunConfig) -> str:
    if (path / CONFIG).exists():
        raise UsageError(
            f"{path} already holds a run: use --resume {path} to go on with it, or another --out"
        )
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).write_text(
            json.dumps({"run_id": run_id, "config": config.to_json()}, indent=2) + "\n"
        )
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another --out") from None
    return run_id


def _stored(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / CONFIG).read_text())
        return {"run_id": str(stored["run_id"]), "config": dict(stored["config"])}
    except FileNotFoundError:
        raise UsageError(
            f"{path} holds no run: observed no {CONFIG}; expected a folder made by attnbench run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / CONFIG} cannot be read as a run's configuration: {error}") from None


# ---- execution -----------------------------------------------------------------------------------------


def _execute(
    path: Path, run_id: str, resolved: Resolved, planned: Sequence[Planned], listener: Listener
) -> Run:
    with Journal.open(path / JOURNAL, run_id=run_id, config=resolved.request.to_json()) as journal:
        finished = journal.keys()
        left = [p for p in planned if p.key not in finished]
        listener.planned(len(planned), len(planned) - len(left))
        driver = _Driver(run_id, resolved, journal, listener, _measured_series(journal))
        for group in _groups(left):
            driver.measure(group)
        rows = tuple(journal.rows())
    write_parquet(rows, path / RESULTS)
    return Run(path, rows)


def _groups(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Consecutive cases that share a worker."""
    group: list[Planned] = []
    for item in planned:
        if group and item.worker != group[0].worker:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _measured_series(journal: Journal) -> dict[tuple[str, int], str]:
    """Series that a finished case has shown to be too long, by (case key, block) of that case."""
    return {
        (row["case_key"], row["block"]): f"{SKIP_AFTER[Status(row['status'])]} at N={row['n']}"
        for row in journal.rows()
        if row["status"] in SKIP_AFTER
    }


class _Driver:
    """Runs groups of cases, one worker at a time, and writes one row for every case."""

    def __init__(
        self,
        run_id: str,
        resolved: Resolved,
        journal: Journal,
        listener: Listener,
        too_long: dict[tuple[str, int], str],
    ) -> None:
        self._run_id, self._resolved = run_id, resolved
        self._journal, self._listener = journal, listener
        self._threads = resolved.request.threads or resolved.preset.threads or environment.physical_cores()
        self._worker: WorkerProcess | None = None
        self._known: dict[str, Any] = {}
        self._too_long = too_long

    def measure(self, group: Sequence[Planned]) -> None:
        """Measure a group in ascending length; a worker that dies is replaced for the cases after."""
        queue = deque(group)
        exceeded: dict[tuple[object, ...], tuple[int, str]] = {}
        for item in group:
            if item.key in self._too_long:
                exceeded[item.case.series()] = (item.case.n, self._too_long[item.key])
        try:
            while queue:
                item = queue.popleft()
                row = self._without_worker(item, exceeded)
                if row is None:
                    row = self._ask(self._ready_worker(), item)
                    status = Status(row["status"])
                    if status in SKIP_AFTER and self._resolved.request.infer:
                        exceeded[item.case.series()] = (item.case.n, SKIP_AFTER[status])
                self._journal.append(row)
                self._listener.finished(row)
        finally:
            self.close()

    def close(self) -> None:
        """End the worker of the present group, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def _environment(self) -> dict[str, Any]:
        """What the newest worker says of itself; one is started for a row that needs none."""
        if not self._known:
            self._ready_worker()
        return self._known

    def _without_worker(
        self, item: Planned, exceeded: Mapping[tuple[object, ...], tuple[int, str]]
    ) -> dict[str, Any] | None:
        """The row of a case that need not be run: it is unsupported, or a shorter one was too much."""
        if item.unsupported:
            return self._row(item, {"status": Status.UNSUPPORTED, "reason": item.unsupported}, 0.0)
        if item.case.series() in exceeded:
            n, why = exceeded[item.case.series()]
            return self._row(item, {"status": Status.SKIPPED, "reason": f"{why} at N={n}"}, 0.0)
        return None

    def _ready_worker(self) -> WorkerProcess:
        """The worker of the present group; a new one when there is none or it died."""
        if self._worker is not None and self._worker.alive:
            return self._worker
        self.close()
        preset = self._resolved.preset
        settings = {
            "device": self._resolved.device,
            "timing": preset.timing,
            "gate_max_n": preset.gate_max_n,
            "preset": self._resolved.request.preset,
            "threads": self._threads,
        }
        fresh = WorkerProcess(settings, _worker_environment(self._threads))
        answer = fresh.wait_ready()
        if answer.how != "done":
            tail = fresh.log_tail()
            fresh.close()
            raise AttnbenchError(
                f"a worker process could not start ({answer.how}): {tail or 'it printed nothing'}"
            )
        self._known, self._worker = answer.message["environment"], fresh
        return fresh

    def _ask(self, worker: WorkerProcess, item: Planned) -> dict[str, Any]:
        limit = self._resolved.request.time_limit_s or TIME_LIMITS_S[item.case.scope]
        self._listener.started(item)
        start = time.monotonic()

        def progress(message: dict[str, Any]) -> None:
            self._listener.step(item, message["done"], message["total"])

        answer = worker.ask({"case": item.case.to_json()}, limit, progress)
        columns = _columns_of(answer, limit)
        if columns["status"] not in (Status.OK, Status.UNSUPPORTED):
            columns["log_tail"] = worker.log_tail()
        return self._row(item, columns, time.monotonic() - start)

    def _row(self, item: Planned, columns: Mapping[str, Any], duration_s: float) -> dict[str, Any]:
        case = item.case
        spec = _spec_columns(case.mechanism)
        known = {name: value for name, value in columns.items() if name in schema.BY_NAME}
        row: dict[str, Any] = {
            "run_id": self._run_id,
            "case_key": case.key(),
            "block": item.block,
            "suite": case.task or self._resolved.request.suite,
            "preset": self._resolved.request.preset,
            "mechanism": case.mechanism,
            "backend": case.backend,
            "impl": case.impl,
            **spec,
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
            "flags": [],
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "duration_s": round(duration_s, 3),
            "attnbench_version": __version__,
            "commit": self._environment.get("commit"),
            "measurement_version": schema.MEASUREMENT_VERSION,
            "software_key": environment.software_key(self._environment),
            "environment": json.dumps(self._environment, sort_keys=True),
            **known,
        }
        return row if row["status"] == Status.OK else schema.without_performance(row)


def _columns_of(answer: Answer, limit_s: float) -> dict[str, Any]:
    """The columns of an answer, or of the way in which the worker failed to give one."""
    if answer.how == "done":
        return {**answer.partial, **answer.message["row"]}
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


def _worker_environment(threads: int) -> dict[str, str]:
    """The driver's environment without Triton's interpreter: what is timed is compiled or not at all."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["OMP_NUM_THREADS"] = str(threads)
    env["KINETO_LOG_LEVEL"] = "99"  # the profiler would fill the log tail with notices of its own
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


__all__ = ["Listener", "Run", "Silent", "prepare", "resume", "run"]
