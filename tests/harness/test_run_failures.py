"""A run whose disk, engine or watcher fails: what was measured stays, the rest is resumed."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import AttnbenchError
from attnbench.harness.config import RunConfig
from attnbench.harness.engines import Job
from attnbench.harness.engines.group import lost
from attnbench.harness.listener import Silent
from attnbench.harness.plan import Planned
from attnbench.harness.run import prepare, resume, run
from attnbench.results import store
from attnbench.results.read import rows as read_rows
from attnbench.results.rows import Row, check, mended

CONFIG = RunConfig(
    impl=("softmax/torch",), gpu="cpu", workload=("tiny",), seqlen=(16, 32, 48), pattern=("NS",)
)


class Instant:
    """Answers every case at once; ``fails_at`` raises before that row."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.closed = False

    def plan(self, request: RunConfig) -> list[Planned]:
        return prepare(request)[1]

    def rows(self, job: Job) -> Generator[Row]:
        try:
            for group in job.groups():
                for item in group.cases:
                    self.fails_at -= 1
                    if self.fails_at == -1:
                        raise AttnbenchError("the cluster is gone")
                    yield lost(group, item, "it was not measured", {})
        finally:
            self.closed = True


def _keys(path: Path) -> list[tuple[str, int]]:
    return [(row["case_key"], row["block"]) for row in read_rows([path / "journal.jsonl"])]


@pytest.fixture
def planned() -> list[tuple[str, int]]:
    return sorted(item.key for item in prepare(CONFIG)[1])


def _full_after(writes: int, real: Any) -> Any:
    left = [writes]

    def write(descriptor: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(descriptor, data))

    return write


def test_a_full_disk_ends_the_run_and_a_freed_one_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: list[tuple[str, int]]
) -> None:
    engine = Instant()
    with monkeypatch.context() as patch:
        patch.setattr(
            "attnbench.results.journal.os.write", _full_after(4, os.write)
        )  # the header, three rows
        with pytest.raises(
            AttnbenchError, match=r"No space left on device; every row before this one is safe"
        ):
            run(CONFIG, tmp_path / "run", engine=engine)
    assert engine.closed
    assert len(_keys(tmp_path / "run")) == 3
    assert len(planned) > 3
    assert sorted(_keys(resume(tmp_path / "run", engine=Instant()).path)) == planned


def test_a_disk_that_is_full_at_the_end_costs_only_the_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: list[tuple[str, int]]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store.pq, "write_table", full)
        with pytest.raises(AttnbenchError, match="No space left on device; nothing was changed"):
            run(CONFIG, tmp_path / "run", engine=Instant())
    assert sorted(_keys(tmp_path / "run")) == planned
    assert not (tmp_path / "run" / "results.parquet").exists()
    resume(tmp_path / "run", engine=Instant(fails_at=0))  # nothing is measured again
    assert len(read_rows([tmp_path / "run" / "results.parquet"])) == len(planned)


def test_an_engine_that_fails_keeps_its_rows(tmp_path: Path, planned: list[tuple[str, int]]) -> None:
    with pytest.raises(AttnbenchError, match="the cluster is gone"):
        run(CONFIG, tmp_path / "run", engine=Instant(fails_at=2))
    assert len(_keys(tmp_path / "run")) == 2
    assert sorted(_keys(resume(tmp_path / "run", engine=Instant()).path)) == planned


def test_an_interrupt_between_two_rows_loses_none(tmp_path: Path, planned: list[tuple[str, int]]) -> None:
    class Impatient(Silent):
        def finished(self, row: Any) -> None:
            raise KeyboardInterrupt

    engine = Instant()
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path / "run", Impatient(), engine)
    assert engine.closed
    assert len(_keys(tmp_path / "run")) == 1
    assert sorted(_keys(resume(tmp_path / "run", engine=Instant()).path)) == planned


@pytest.mark.parametrize(
    "changes",
    [
        {"flops": 1 << 80},
        {"flops": "many"},
        {"time_us": float("nan")},
        {"samples_us": [1.0, float("inf")]},
        {"time_us": None},
        {"kernels": ["a", 1]},
        {"flags": ["\udcff"]},
        {"status": "splendid"},
        {"no_such_column": 1},
    ],
    ids=str,
)
def test_a_row_that_an_impl_made_invalid_is_an_error_of_its_case(make_row, changes: dict[str, Any]) -> None:
    row = make_row()
    found = mended({**row, **changes})
    check(found)
    assert (found["status"], found["case_key"]) == ("error", row["case_key"])
    assert next(iter(changes)).removesuffix("_us") in found["reason"]


def test_a_valid_row_stays_as_it_is(make_row) -> None:
    row = make_row()
    assert mended(row) is row
