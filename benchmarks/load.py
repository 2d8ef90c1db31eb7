"""How large a sweep can be: what the driver and the result tools cost at 10,000 and at 100,000 cases.

Nothing is measured: an engine that answers at once stands in for the workers, so that what is left is
planning, the journal, Parquet, resuming, merging, comparing, validating and reporting. Each size runs in a
process of its own, for its memory.

    python benchmarks/load.py [--sizes 12000 100000] [--folder /dev/shm]

Times are CPU times: the flush of every row to the disk is not in them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnbench.harness import run as driver
from attnbench.harness.config import RunConfig
from attnbench.harness.engines import Job
from attnbench.harness.engines.group import lost
from attnbench.harness.plan import Planned
from attnbench.results.comparison import compare_rows
from attnbench.results.merge import merge
from attnbench.results.read import rows as read_rows
from attnbench.results.report import build
from attnbench.results.rows import Row
from attnbench.results.store import write_parquet
from attnbench.results.validate import validate

BLOCKS, SHARDS = 8, 50
MACHINE = {"device": "cpu", "cpu_model": "none: nothing was measured"}
MIB = 1 << 20


class Instant:
    """An engine whose cases take no time."""

    def plan(self, request: RunConfig) -> list[Planned]:
        return driver.prepare(request)[1]

    def rows(self, job: Job) -> Generator[Row]:
        for group in job.groups():
            for item in group.cases:
                yield self._row(lost(group, item, "", MACHINE), item)

    def _row(self, row: Row, item: Planned) -> Row:
        time_us = item.case.n * random.Random(str(item.key)).lognormvariate(0.0, 0.01)
        samples = [time_us] * 30
        return {
            **row,
            **{"status": "ok", "reason": None, "time_us": time_us, "time_kind": "cpu_hot", "n_samples": 30},
            **{"samples_us": samples, "mem_peak_bytes": 4 * item.case.n, "flops": 4 * item.case.n**2},
            **{"kernels": ["aten::mm"], "n_launches": 1, "err_ratio": 1.0, "input_dist": "gaussian"},
        }


def request(cases: int) -> RunConfig:
    """A request for about ``cases`` cases: all mechanisms, as many lengths as it takes."""
    base = RunConfig(impl=("all",), gpu="cpu", workload=("tiny",), seqlen=(64,), blocks=BLOCKS)
    one = len(driver.prepare(base)[1])
    return replace(base, seqlen=tuple(64 * (i + 1) for i in range(max(1, round(cases / one)))))


def measure(cases: int, scratch: str | None) -> dict[str, float]:
    """CPU seconds of every step, which a busy machine does not change much, and what it leaves behind."""
    found: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        found[f"{name}, s"] = time.process_time() - start
        return result

    asked = request(cases)
    planned = timed("plan", lambda: driver.prepare(asked)[1])
    found["cases"] = len(planned)
    found["driver after planning, MiB"] = _peak_mib()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        base = timed("plan, journal and Parquet", lambda: driver.run(asked, place / "a", engine=Instant()))
        found["journal, rows/s"] = len(planned) / (found["plan, journal and Parquet, s"] - found["plan, s"])
        found["journal, MiB"] = (place / "a" / "journal.jsonl").stat().st_size / MIB
        found["Parquet, MiB"] = (place / "a" / "results.parquet").stat().st_size / MIB
        found["driver after running, MiB"] = _peak_mib()
        timed("resume of a finished run", lambda: driver.resume(place / "a", engine=Instant()))
        _cut(place / "a" / "journal.jsonl")
        timed("resume of half a run", lambda: driver.resume(place / "a", engine=Instant()))
        for index in range(SHARDS):
            write_parquet(base.rows[index::SHARDS], place / "parts" / f"{index:02}.parquet")
        timed(f"merge of {SHARDS} shards", lambda: merge([place / "parts"], place / "merged.parquet"))
        rows = timed("read", lambda: read_rows([place / "merged.parquet"]))
        other = [{**row, "time_us": 1.02 * row["time_us"]} for row in rows]
        timed("compare with another run", lambda: compare_rows(rows, other))
        timed("validate", lambda: validate([place / "merged.parquet"]))
        timed("report", lambda: build(rows))
    found["all of it, MiB"] = _peak_mib()
    return found


def _cut(journal: Path) -> None:
    """Leave the first half of a journal."""
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alone(cases: int, scratch: str | None) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", str(cases)]
    command += ["--folder", scratch] if scratch else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Print one column a size, and the last over the first, beside the ratio of the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[12_000, 100_000])
    parser.add_argument("--folder", help="where runs are written; default: the system's folder for such")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.folder)))
        return
    columns = [_alone(size, arguments.folder) for size in arguments.sizes]
    print(f"{platform.machine()}, Python {platform.python_version()}")
    for name in columns[0]:
        values = [column[name] for column in columns]
        ratio = f"{values[-1] / max(values[0], 1e-9):8.1f}×" if len(values) > 1 else ""
        print(f"{name:32}" + "".join(f"{value:12,.2f}" for value in values) + ratio)


if __name__ == "__main__":
    main()
