"""The stages of a run on a GPU: check and compile side by side, then race alone, then write the report.

Checks and compilation need CPUs more than the GPU and disturb a timing, so they come first, in processes of
their own that end when their time is over; what they compiled is in the caches of Triton and Inductor.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from attnbench.errors import UsageError
from attnbench.harness import devices
from attnbench.harness.goals import judge, session
from attnbench.harness.goals.dry import PEAKS, PretendGpu
from attnbench.harness.goals.session import Bench, Budget, Log
from attnbench.harness.goals.settings import DRY, FULL, settings
from attnbench.harness.timing import PRESETS, Settings
from attnbench.results.rows import Row
from attnbench.results.sources import JOURNAL, RESULTS
from attnbench.results.store import write_parquet

REPORT: Final = "report.md"
CHECKS: Final = "checks.txt"
WRITING_S: Final = 10.0
"""Kept back from the budget: the race that runs when it is over, and the report."""

COMPILED_N: Final = 65536
"""Longer inputs than these are served by the same kernels, and their memory is better left alone."""

DRY_TIMING: Final = Settings(
    warmup_calls=1,
    warmup_s=0.0,
    warmup_cap_s=0.0,
    min_samples=3,
    min_total_s=0.0,
    max_samples=4,
    wall_cap_s=0.05,
    floor_samples=3,
)


@dataclass(frozen=True)
class Plan:
    """What one call does. ``prepare_s`` is the part of ``budget_s`` for checks and compilation."""

    out: Path
    budget_s: float = 540.0
    prepare_s: float = 200.0
    compilers: int = 10
    dry: bool = False
    checks: bool = True
    root: Path = Path(__file__).resolve().parents[2]


@dataclass
class Stage:
    """A process of the preparation, in its own group, whose output goes to a file."""

    name: str
    command: Sequence[str]
    log: Path
    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _killed: bool = field(default=False, init=False)

    def start(self) -> None:
        """Start it, with kernels compiled and not interpreted."""
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def join(self, deadline: float) -> None:
        """Wait until ``deadline`` by the monotonic clock, then end the whole process group."""
        assert self._process is not None
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._killed = True
        self.end()

    def end(self) -> None:
        """End it, and all that it has started, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        assert self._process is not None
        lines = self.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        how = "not finished in time" if self._killed else f"exit code {self._process.returncode}"
        return f"{how}; {last.strip('= ')}"

    @property
    def passed(self) -> bool:
        """Whether it ended by itself, well."""
        return not self._killed and self._process is not None and self._process.returncode == 0


def run(plan: Plan, log: Log) -> int:
    """Everything; returns 1 when a check failed or a goal was missed, else 0.

    Rows are in the journal as they come, and Parquet file and report are written even when the race is
    interrupted. Raises UsageError when the folder holds a run already.
    """
    if (plan.out / JOURNAL).exists():
        raise UsageError(f"{plan.out} already holds a run: choose another --out")
    plan.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(plan.budget_s - WRITING_S)
    scale = DRY if plan.dry else FULL
    races = settings(scale)
    facts = []
    checks = _prepare(plan, budget, log)
    facts.append(("correctness on the GPU", checks.outcome if checks else "not run"))
    bench = _bench(plan)
    bench.peaks(scale.dtype)  # before any race holds memory
    started = budget.spent_s
    try:
        session.run(races, bench, budget, plan.out, log)
    finally:
        found = judge.races(_journal_rows(plan.out), scale.ours)
        facts += _facts(bench, scale.dtype, budget, started, len(races))
        text = judge.report(found, f"Goals on {bench.device.name}", facts)
        (plan.out / REPORT).write_text(text, encoding="utf-8")
        write_parquet(_journal_rows(plan.out), plan.out / RESULTS)
        log(f"{budget.spent_s:5.0f} s  wrote {plan.out / REPORT} and {RESULTS}")
    missed = any(verdict.met is False for verdict in judge.verdicts(found))
    return 1 if missed or (checks is not None and not checks.passed) else 0


def compile_part(part: tuple[int, int], seconds: float, dry: bool, log: Log) -> None:
    """Compile part i of n of the races, as a process of the preparation does."""
    index, count = part
    short = [setting for setting in settings(DRY if dry else FULL) if setting.n <= COMPILED_N]
    session.compile_all(short[index - 1 :: count], "cpu" if dry else "cuda", Budget(seconds), log)


def _prepare(plan: Plan, budget: Budget, log: Log) -> Stage | None:
    """Checks and compilation side by side; the stage of the checks."""
    deadline = time.monotonic() + min(plan.prepare_s, budget.left_s)
    script = [sys.executable, str(plan.root / "scripts" / "gpu.py")]
    stages = [
        Stage(
            f"compile {i}/{plan.compilers}",
            [
                *script,
                "--compile",
                f"{i}/{plan.compilers}",
                "--seconds",
                f"{plan.prepare_s:g}",
                *(["--dry-run"] if plan.dry else []),
            ],
            plan.out / f"compile-{i}.log",
            plan.root,
        )
        for i in range(1, plan.compilers + 1)
    ]
    checks = Stage("checks", _pytest(plan), plan.out / CHECKS, plan.root) if plan.checks else None
    everything = [*stages, *([checks] if checks else [])]
    try:
        for stage in everything:
            stage.start()
        for stage in everything:
            stage.join(deadline)
            log(f"{budget.spent_s:5.0f} s  {stage.name}: {stage.outcome}")
    finally:
        for stage in everything:
            stage.end()
    for stage in stages:
        if stage.passed:
            stage.log.unlink()
    return checks


def _pytest(plan: Plan) -> list[str]:
    """The tests that need a GPU. In a dry run: that they can be collected."""
    files = sorted((plan.root / "tests" / "kernels").glob("test_*_gpu.py"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *map(str, files)]
    if plan.dry:
        return [*command, "--collect-only"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return [*command, "--maxfail", "20", "--tb", "short", *parallel]


def _bench(plan: Plan) -> Bench:
    if plan.dry:
        torch.set_num_threads(1)  # the shapes are too small to share
        return Bench(PretendGpu(), "cpu", lambda dtype: PEAKS, DRY_TIMING)
    from attnbench.harness import peaks
    from attnbench.harness.timing.cuda import CudaDevice

    device = CudaDevice(devices.name_of(torch.cuda.get_device_name()))
    return Bench(device, "cuda", lambda dtype: peaks.measured(device, dtype), PRESETS["turns"])


def _facts(bench: Bench, dtype: str, budget: Budget, started: float, races: int) -> list[tuple[str, str]]:
    reached = bench.peaks(dtype)
    return [
        ("measured peaks", f"{reached.tflops:.0f} TFLOP/s {dtype}, {reached.gbps:.0f} GB/s copy"),
        ("races", f"{races} planned; racing began at {started:.0f} s and ended at {budget.spent_s:.0f} s"),
    ]


def _journal_rows(out: Path) -> list[Row]:
    from attnbench.results.journal import read_journal

    return list(read_journal(out / JOURNAL).rows)
