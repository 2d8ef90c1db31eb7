"""Runs the races within a budget and leaves one row for each backend of each, whatever happens.

This is the boundary at which what a kernel or a library does is turned into a row: it catches every
exception of theirs.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from attnbench import __version__
from attnbench.harness import devices, environment, timing
from attnbench.harness.goals.problem import Problem
from attnbench.harness.goals.problems import build
from attnbench.harness.goals.settings import FAMILY, Setting
from attnbench.harness.measure import tuned_config, tuning_mode
from attnbench.harness.peaks import Peaks
from attnbench.harness.process import without_paths
from attnbench.harness.timing.result import sample_columns
from attnbench.harness.timing.turns import Turn, measure_in_turns
from attnbench.harness.worker import status_of
from attnbench.kernels import Unsupported, recording, tuning
from attnbench.results import schema
from attnbench.results.journal import Journal
from attnbench.results.rows import Row
from attnbench.results.schema import Status

DISAGREE: Final = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""RMS difference of two backends' results, relative, beyond which one of them is wrong."""

Log = Callable[[str], None]


@dataclass
class Budget:
    """Seconds that may be spent, by a clock that tests replace."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def left_s(self) -> float:
        """What is left; negative when it is overdrawn."""
        return self.seconds - (self.clock() - self._start)

    @property
    def spent_s(self) -> float:
        """What has been spent."""
        return self.clock() - self._start


@dataclass(frozen=True)
class Bench:
    """The device and how it is used: ``tensors`` is torch's name of it, ``peaks`` gives those of a dtype."""

    device: timing.StreamDevice
    tensors: str
    peaks: Callable[[str], Peaks]
    settings: timing.Settings = timing.PRESETS["turns"]


@dataclass
class _Entrant:
    """One backend of a race: its call, or the columns of the row that it ends with instead."""

    backend: str
    call: Callable[[], Sequence[Tensor]] | None = None
    result: tuple[Tensor, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)


def run(settings: Iterable[Setting], bench: Bench, budget: Budget, out: Path, log: Log) -> list[Row]:
    """Race every setting while the budget lasts; rows go to the journal as they come.

    What is not run is a row with status ``skipped``. Ends early, with the rest skipped, when the device has
    failed for good.
    """
    run_id = f"gpu-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    facts = environment.capture("cpu" if bench.tensors == "cpu" else bench.device.name)
    with Journal.open(out / "journal.jsonl", run_id=run_id, config={"suite": "gpu"}) as journal:
        why_not = ""
        for setting in settings:
            if not why_not and budget.left_s <= 0:
                why_not = f"the {budget.seconds:.0f} s of this run were over"
            start = time.monotonic()
            outcome = _skipped(setting, why_not) if why_not else _race(setting, bench)
            duration_s = (time.monotonic() - start) / len(outcome)
            for backend, columns in outcome.items():
                journal.append(_row(setting, backend, columns, bench, facts, run_id, duration_s))
            _release(bench.tensors)
            if not why_not:
                log(f"{budget.spent_s:5.0f} s  {setting.label}  {_summary(outcome)}")
                if not bench.device.healthy():
                    why_not = f"the device failed for good in {setting.label}"
        return list(journal.rows())


def compile_all(settings: Sequence[Setting], tensors: str, budget: Budget, log: Log) -> None:
    """Call everything once, untimed, every candidate of every kernel: a later process finds it compiled."""
    for setting in settings:
        if budget.left_s <= 0:
            return
        with tuning.set_mode("compile"):
            failed = _uncallable(setting, tensors)
        _release(tensors)
        log(f"{budget.spent_s:5.0f} s  compiled {setting.label}" + (f", not {failed}" if failed else ""))


def _release(tensors: str) -> None:
    """Give memory back: races are of all sizes, and processes that compile share the GPU."""
    if tensors == "cuda":
        torch.cuda.empty_cache()


# ---- one race --------------------------------------------------------------------------------------------


def _race(setting: Setting, bench: Bench) -> dict[str, dict[str, Any]]:
    """Columns of every backend of a setting."""
    with tuning.set_mode(tuning_mode("cpu" if bench.tensors == "cpu" else "cuda")):
        try:
            problem = build(setting, bench.tensors)
        except Exception as error:  # memory, mostly
            return {backend: _failure(error) for backend in setting.backends}
        entrants = [_first_call(problem, backend) for backend in setting.backends]
        _agree(entrants, setting)
        calls = {entrant.backend: entrant.call for entrant in entrants if entrant.call is not None}
        turns, failure = {}, {}
        if calls:
            try:
                turns = measure_in_turns(calls, bench.device, bench.settings)
            except Exception as error:
                failure = _failure(error)
    work = _work_columns(problem, bench)
    outcome = {}
    for entrant in entrants:
        turn = turns.get(entrant.backend)
        timed = failure if turn is None else _timed_columns(turn, work)
        outcome[entrant.backend] = {**work, **entrant.columns, **(timed if entrant.call else {})}
    return outcome


def _uncallable(setting: Setting, tensors: str) -> list[str]:
    """Call every backend once; those that failed."""
    try:
        problem = build(setting, tensors)
    except Exception:  # it will be a row when it is raced
        return list(setting.backends)
    return [backend for backend in setting.backends if _first_call(problem, backend).call is None]


def _first_call(problem: Problem, backend: str) -> _Entrant:
    call = problem.call(backend)
    start = time.monotonic()
    try:
        with tuning.picked() as choices, recording() as used:
            result = tuple(call())
            if problem.upstream.is_cuda:
                torch.cuda.synchronize()
    except Unsupported as error:
        return _Entrant(backend, columns={"status": Status.UNSUPPORTED, "reason": str(error)})
    except Exception as error:
        return _Entrant(backend, columns=_failure(error))
    columns = {
        "compile_s": time.monotonic() - start,
        "tuned_config": tuned_config(choices),
        "ops_used": sorted({f"{op}/{name}" for op, name in used}),
    }
    return _Entrant(backend, call, result, columns)


def _agree(entrants: Sequence[_Entrant], setting: Setting) -> None:
    """Exclude who disagrees: with a peer if there is one (then ours is the one that is doubted)."""
    ran = [entrant for entrant in entrants if entrant.call is not None]
    truth = next((e for e in ran if e.backend != setting.ours), None)
    for entrant in ran:
        wrong = _wrong(entrant, truth or entrant, setting)
        if wrong:
            entrant.call = None
            entrant.columns |= {"status": Status.INCORRECT, "reason": wrong}
    for entrant in entrants:
        entrant.result = ()  # the memory is needed


def _wrong(entrant: _Entrant, truth: _Entrant, setting: Setting) -> str:
    """What is wrong with the results of one backend, empty when nothing is."""
    limit = DISAGREE[setting.dtype]
    for index, (got, wanted) in enumerate(zip(entrant.result, truth.result, strict=True)):
        what = "the output" if index == 0 else f"gradient {index}"
        if not bool(got.isfinite().all()):
            return f"{what} is not finite"
        if entrant is truth:
            continue
        error = _rms(got.float() - wanted.float()) / max(_rms(wanted.float()), 1e-12)
        if error > limit:
            return f"{what} differs from {truth.backend}: observed {error:.2g} relative RMS, limit {limit:g}"
    return ""


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---- rows ------------------------------------------------------------------------------------------------


def _failure(error: Exception) -> dict[str, Any]:
    """Columns of the exception that is being handled."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:500]
    return {"status": status_of(error), "reason": reason, "log_tail": without_paths(traceback.format_exc())}


def _skipped(setting: Setting, why: str) -> dict[str, dict[str, Any]]:
    return {b: {"status": Status.SKIPPED, "reason": why} for b in setting.backends}


def _work_columns(problem: Problem, bench: Bench) -> dict[str, Any]:
    setting = problem.setting
    bound = devices.roofline_us(problem.flops, problem.moved_bytes, setting.dtype, bench.device.name)
    return {
        "flops": problem.flops,
        "bytes_min": problem.moved_bytes,
        "roofline_us": bound,
        "input_dist": "gaussian",
        **bench.peaks(setting.dtype).columns(problem.flops, problem.moved_bytes),
    }


def _timed_columns(turn: Turn, work: Mapping[str, Any]) -> dict[str, Any]:
    columns = sample_columns(turn.samples_us)
    time_us, bound = columns["time_us"], work["roofline_us"]
    flags = [flag.text for flag in turn.flags]
    if bound is not None and time_us < bound:
        flags.append(f"faster_than_physics: observed {time_us:.3g} µs, limit {bound:.3g} µs by the roofline")
    return {
        **columns,
        "status": Status.OK,
        "time_kind": "device_cold",
        "cold_us": time_us,
        "loops": 1,
        "warmup_calls": turn.warmup_calls,
        "tflops": work["flops"] / time_us * 1e-6,
        "gbps_min": work["bytes_min"] / time_us * 1e-3,
        "roofline_pct": None if bound is None else 100 * bound / time_us,
        "roofline_measured_pct": 100 * work["roofline_measured_us"] / time_us,
        "flags": sorted(flags),
    }


def _row(
    setting: Setting,
    backend: str,
    columns: Mapping[str, Any],
    bench: Bench,
    facts: Mapping[str, Any],
    run_id: str,
    duration_s: float,
) -> Row:
    case = setting.case(backend, bench.device.name)
    row: Row = {
        "run_id": run_id,
        "case_key": case.key(),
        "block": 0,
        "suite": "gpu",
        "preset": "paper",
        "mechanism": case.mechanism,
        "backend": backend,
        "impl": case.impl,
        "family": FAMILY[setting.op],
        "pattern": case.pattern,
        "workload": case.workload.name,
        "batch": setting.batch,
        "heads": setting.heads,
        "kv_heads": setting.heads,
        "head_dim": setting.head_dim,
        "grid": list(setting.grid),
        "n": setting.n,
        "m": setting.m,
        "dtype": setting.dtype,
        "direction": case.direction,
        "scope": "op",
        "hyper": json.dumps(dict(case.hyper)),
        "seed": 0,
        "device": case.device,
        "flags": [],
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(duration_s, 3),
        "attnbench_version": __version__,
        "commit": facts.get("commit"),
        "measurement_version": schema.MEASUREMENT_VERSION,
        "software_key": environment.software_key(facts),
        "environment": json.dumps(facts, sort_keys=True),
        **columns,
    }
    return row if row["status"] == Status.OK else schema.without_performance(row)


def _summary(outcome: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{backend} {columns['time_us']:.0f} µs" if "time_us" in columns else f"{backend} {columns['status']}"
        for backend, columns in outcome.items()
    )
