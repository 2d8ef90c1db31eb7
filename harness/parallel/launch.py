"""Starts the ranks of a case from a worker, waits for all of them, and tells what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnbench.harness.parallel.suite import ranks_of
from attnbench.impls.case import Case
from attnbench.kernels import Unsupported

RESULT = "rank-{}.json"
"""What a rank leaves behind, by its number."""

POLL_S = 0.05
TAIL_LINES = 30


class RankFailed(RuntimeError):
    """A rank ended without a result."""


def measure(case: Case, preset: str, gate_max_n: int) -> dict[str, Any]:
    """The columns of a case that several processes compute together, from the first of them.

    ``preset`` names timing settings. Raises Unsupported where there are fewer GPUs than ranks, RankFailed
    with the last words of the rank that failed.
    """
    size = ranks_of(case)
    if case.device != "cpu" and torch.cuda.device_count() < size:
        raise Unsupported(f"{case.impl} on {size} ranks", f"{torch.cuda.device_count()} GPUs here", f"{size}")
    with tempfile.TemporaryDirectory(prefix="attnbench-ranks-") as scratch:
        folder = Path(scratch)
        settings = {"case": case.to_json(), "timing": preset, "gate_max_n": gate_max_n}
        (folder / "case.json").write_text(json.dumps(settings))
        logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        processes = [_start(rank, folder, log) for rank, log in enumerate(logs)]
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            raise RankFailed(_last_words(failed, processes[failed].returncode, logs[failed]))
        return dict(json.loads((folder / RESULT.format(0)).read_text()))


def _start(rank: int, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "attnbench.harness.parallel.rank", str(rank), str(folder)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all are done; the first that fails ends the wait, the others would wait for it in vain."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or all(code == 0 for code in codes):
            return failed
        time.sleep(POLL_S)


def _last_words(rank: int, code: int | None, log: Path) -> str:
    """The error of a rank in one line; its log goes to this process's output, where the log tail is kept."""
    lines = log.read_text(errors="replace").strip().splitlines()
    sys.stderr.write("\n".join([*lines[-TAIL_LINES:], ""]))
    said = lines[-1] if lines else "without a word"
    return f"rank {rank} ended with code {code}: {said}"
