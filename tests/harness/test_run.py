"""The driver from plan to Parquet, with mechanisms that misbehave and drivers that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnbench.errors import AttnbenchWarning
from attnbench.harness.config import RunConfig
from attnbench.harness.run import Run, prepare, resume, run
from attnbench.results.read import rows
from attnbench.results.schema import problems

ZOO = Path(__file__).parent / "zoo.py"
EXPECTED = {
    "Honest": ("ok", ""),
    "Raises": ("error", "always raises"),
    "ReturnsNan": ("incorrect", "not finite"),
    "WrongShape": ("incorrect", "shape"),
    "WrongDtype": ("incorrect", "dtype"),
    "WrongValues": ("incorrect", "error"),
    "Mutates": ("incorrect", "changed"),
    "Hangs": ("timeout", "time limit of 8 s"),
    "EatsMemory": ("oom", "allocate"),
    "Segfaults": ("crashed", "SIGSEGV"),
    "Exits": ("crashed", "code 7"),
    "KillsItself": ("crashed", "SIGKILL"),
    "Prints": ("ok", ""),
    "Unsupportive": ("unsupported", "another N"),
}

ZOO_GROUP = pytest.mark.xdist_group("zoo")
"""One process runs the whole zoo, once; xdist would else repeat it in each of its workers."""


def _config(*names: str, **values: object) -> RunConfig:
    defaults: dict[str, object] = {
        "impl": tuple(f"{ZOO}:{name}" for name in names),
        "gpu": "cpu",
        "workload": ("tiny",),
        "pattern": ("NS",),
        "seqlen": (16,),
        "direction": ("fwd",),
        "threads": 1,
    }
    return RunConfig(**(defaults | values))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(_config(*EXPECTED, time_limit_s=8.0), tmp_path_factory.mktemp("zoo") / "run")


@ZOO_GROUP
@pytest.mark.parametrize("name", EXPECTED)
def test_each_misbehaviour_ends_as_its_status(zoo_run: Run, name: str) -> None:
    found = [row for row in zoo_run.rows if row["mechanism"].endswith(f":{name}")]
    assert len(found) == 1
    status, reason = EXPECTED[name]
    assert found[0]["status"] == status, found[0]["reason"]
    assert reason in (found[0].get("reason") or "")
    assert problems(found[0]) == []


@ZOO_GROUP
def test_planned_cases_equal_rows_and_parquet_equals_journal(zoo_run: Run) -> None:
    assert len(zoo_run.rows) == len(EXPECTED)
    assert len(rows([zoo_run.path / "results.parquet"])) == len(rows([zoo_run.path / "journal.jsonl"]))


@ZOO_GROUP
def test_a_log_tail_is_kept_and_bounded(zoo_run: Run) -> None:
    raised = next(row for row in zoo_run.rows if row["status"] == "error")
    assert "ValueError: this mechanism always raises" in raised["log_tail"]
    assert all(len(row.get("log_tail") or "") <= 4096 for row in zoo_run.rows)


@pytest.mark.slow
def test_longer_lengths_are_skipped_after_out_of_memory(tmp_path: Path) -> None:
    done = run(_config("EatsMemory", seqlen=(16, 32, 64)), tmp_path / "run")
    assert [row["status"] for row in done.rows] == ["oom", "skipped", "skipped"]
    assert done.rows[1]["reason"] == "out of memory at N=16"


def _keys(path: Path) -> list[tuple[str, int]]:
    return sorted((row["case_key"], row["block"]) for row in rows([path]))


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_keys(tmp_path: Path) -> None:
    config = _config("Honest", seqlen=(16, 24, 32, 40), direction=("fwd", "fwd_bwd"))
    planned = sorted(item.key for item in prepare(config)[1])
    out = tmp_path / "run"
    code = (
        "import json, sys\n"
        "from attnbench.harness.config import RunConfig\n"
        "from attnbench.harness.run import run\n"
        "run(RunConfig.from_json(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, json.dumps(config.to_json()), str(out)]
    driver = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journal = out / "journal.jsonl"
        if journal.exists() and len(journal.read_bytes().splitlines()) >= 3:  # the header and two rows
            break
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    with (out / "journal.jsonl").open("ab") as journal_file:
        journal_file.write(b'{"case_key": "cut in the mid')
    assert not (out / "results.parquet").exists()
    before = len(_keys(out / "journal.jsonl"))
    assert 2 <= before < len(planned)
    with pytest.warns(AttnbenchWarning, match="cut short"):
        resume(out)
    assert _keys(out / "results.parquet") == planned


@pytest.mark.slow
def test_shards_are_disjoint_and_complete() -> None:
    whole = _config("Honest", "Raises", seqlen=(16, 32, 64, 128), direction=("fwd", "fwd_bwd"))
    parts = [
        item.key for i in (1, 2, 3) for item in prepare(RunConfig(**{**vars(whole), "shard": (i, 3)}))[1]
    ]
    assert sorted(parts) == sorted(item.key for item in prepare(whole)[1])


def test_the_plan_is_the_same_every_time_and_shuffled_by_the_seed() -> None:
    config = _config("Honest", "Raises", "Mutates", "Hangs")
    order = [item.case.mechanism for item in prepare(config)[1]]
    assert order == [item.case.mechanism for item in prepare(config)[1]]
    others = {
        tuple(item.case.mechanism for item in prepare(RunConfig(**{**vars(config), "seed": seed}))[1])
        for seed in range(8)
    }
    assert len(others) > 1
