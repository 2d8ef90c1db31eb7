"""A run from end to end on a CPU, and what a run leaves that is cut short or meets kernels that fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnbench import UsageError
from attnbench.harness.goals import problems, session, stages
from attnbench.harness.goals.dry import PEAKS, PretendGpu
from attnbench.harness.goals.session import Bench, Budget
from attnbench.harness.goals.settings import DRY, settings
from attnbench.harness.goals.stages import DRY_TIMING, Stage
from attnbench.harness.timing import StreamDevice
from attnbench.kernels import tuning
from attnbench.results import read
from attnbench.results.validate import validate

ROOT = Path(__file__).resolve().parents[3]
PLAN = settings(DRY)


def first(op, backward=False):
    return next(s for s in PLAN if s.op == op and s.backward == backward)


def race(tmp_path, *chosen, budget=None, device=None):
    bench = Bench(device or PretendGpu(), "cpu", lambda dtype: PEAKS, DRY_TIMING)
    lines = []
    rows = session.run(chosen, bench, budget or Budget(60.0), tmp_path, lines.append)
    return {(row["mechanism"], row["backend"]): row for row in rows}


def test_a_dry_run_takes_every_step(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "gpu.py", "--dry-run", "--out", tmp_path]
    done = subprocess.run(
        [*command, "--compilers", "1", "--prepare", "4", "--seconds", "30"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rows = read.rows(tmp_path)
    planned = {(s.case(b, "dry-run").key()) for s in PLAN for b in s.backends}
    assert {row["case_key"] for row in rows} == planned
    assert {row["status"] for row in rows} <= {"ok", "unsupported", "skipped"}
    assert rows == read.rows(tmp_path / "results.parquet")
    assert [problem for problem in validate([tmp_path]) if problem.severity == "error"] == []
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Goals on dry-run\n")
    assert "correctness on the GPU: " in text
    assert "| flash | ≥ 1 × the best of sdpa_flash, flex |" in text


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    (tmp_path / "journal.jsonl").write_text("")
    with pytest.raises(UsageError, match="already holds a run"):
        stages.run(stages.Plan(tmp_path, dry=True), print)


def test_a_row_has_its_times_its_bounds_and_its_proof(tmp_path):
    found = race(tmp_path, first("flash", backward=True))
    row = found["op:flash", "torch"]
    assert row["status"] == "ok"
    assert row["ops_used"] == ["flash/torch"]
    assert row["n_samples"] == len(row["samples_us"]) >= 3
    assert row["roofline_measured_pct"] > 0
    assert row.get("roofline_us") is None  # no vendor has figures of a pretended GPU
    assert len(found["op:flash", "sdpa_flash"]["samples_us"]) == row["n_samples"]
    assert found["op:flash", "sdpa_cudnn"]["status"] == "unsupported"


def test_what_the_budget_does_not_reach_is_skipped_with_the_reason(tmp_path):
    ticks = iter([0.0, 1.0, 2.0, 99.0] + [99.0] * 9)
    budget = Budget(10.0, clock=lambda: next(ticks))
    found = race(tmp_path, first("flash"), first("kv_reduce"), budget=budget)
    assert found["op:flash", "torch"]["status"] == "ok"
    skipped = found["op:kv_reduce", "torch"]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "the 10 s of this run were over")


def test_a_wrong_result_wins_no_race(tmp_path, monkeypatch):
    right = problems.kv_reduce

    def wrong(*args, backend, **options):
        return right(*args, backend=backend, **options) * (1.01 if backend == "torch" else 1.0)

    monkeypatch.setattr(problems, "kv_reduce", wrong)
    found = race(tmp_path, first("kv_reduce"))
    ours = found["op:kv_reduce", "torch"]
    assert ours["status"] == "incorrect"
    assert "differs from reference: observed 0.01" in ours["reason"]
    assert "time_us" not in ours
    assert found["op:kv_reduce", "reference"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("no"), "oom"),
        (RuntimeError("illegal memory access"), "error"),
        (type("CompilationError", (Exception,), {})("at line 3"), "compile_error"),
    ],
)
def test_an_exception_is_the_row_of_its_backend_alone(tmp_path, monkeypatch, error, status):
    right = problems.kv_reduce

    def failing(*args, backend, **options):
        if backend == "torch":
            raise error
        return right(*args, backend=backend, **options)

    monkeypatch.setattr(problems, "kv_reduce", failing)
    found = race(tmp_path, first("kv_reduce"))
    assert found["op:kv_reduce", "torch"]["status"] == status
    assert str(error) in found["op:kv_reduce", "torch"]["reason"]
    assert str(ROOT) not in found["op:kv_reduce", "torch"]["log_tail"]
    assert found["op:kv_reduce", "reference"]["status"] == "ok"


def test_after_the_death_of_the_device_all_is_skipped(tmp_path):
    class Dead(PretendGpu):
        def healthy(self):
            return False

    found = race(tmp_path, first("flash"), first("kv_reduce"), device=Dead())
    skipped = found["op:kv_reduce", "reference"]
    assert skipped["status"] == "skipped"
    assert skipped["reason"].startswith("the device failed for good in flash")


def test_a_problem_that_cannot_be_built_fails_all_its_backends(tmp_path, monkeypatch):
    def no_memory(setting, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(session, "build", no_memory)
    found = race(tmp_path, first("flash"))
    assert {row["status"] for row in found.values()} == {"oom"}


def test_compiling_calls_everything_once_in_its_mode(monkeypatch):
    modes = []
    right = problems.kv_reduce

    def noting(*args, **options):
        modes.append(tuning.mode())
        return right(*args, **options)

    monkeypatch.setattr(problems, "kv_reduce", noting)
    lines = []
    session.compile_all([first("kv_reduce")], "cpu", Budget(60.0), lines.append)
    assert modes == ["compile", "compile"]
    session.compile_all([first("kv_reduce")], "cpu", Budget(0.0), lines.append)
    assert len(modes) == 2


def test_the_pretended_gpu_is_a_stream():
    assert isinstance(PretendGpu(), StreamDevice)


def test_a_stage_that_outlasts_its_time_is_ended_with_its_children(tmp_path):
    code = "import subprocess,sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    stage = Stage("slow", [sys.executable, "-c", code], tmp_path / "log", tmp_path)
    stage.start()
    import time

    while "begun" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    stage.join(time.monotonic())
    assert not stage.passed
    assert stage.outcome == "not finished in time; begun"
    quick = Stage("quick", [sys.executable, "-c", "print('3 passed')"], tmp_path / "log2", tmp_path)
    quick.start()
    quick.join(time.monotonic() + 30)
    assert quick.passed
    assert quick.outcome == "exit code 0; 3 passed"
