"""What keeps a worker, and whatever an impl starts in it, from harming or outliving its driver.

Linux has the means; elsewhere the process group and the time limit are all there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

MARK: Final = "ATTNBENCH_WORKER"
"""Variable by whose value the processes that an impl started are known, whatever group they moved to."""

MEMORY_SHARE: Final = 0.85
"""Share of the free memory that a CPU worker may take before its allocations fail: an impl that eats
memory then ends as ``oom`` instead of taking the machine down."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ROUNDS: Final = 50
PAUSE_S: Final = 0.01
"""What is killed may just have started something: look again, so often, so long after."""

COMPILER: Final = ("torch/_inductor/compile_worker", "multiprocessing.resource_tracker")
"""Command lines of the helpers that torch's compiler keeps: they are no impl's."""


def contain(device: str) -> None:
    """Bind this worker to its driver.

    It dies with it, keeps its orphans in sight, is the first to be killed when memory runs out and leaves no
    core file; on a CPU its allocations fail before the machine's do.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device == "cpu":  # a CUDA context reserves more than there is, and needs no limit
        limit = int(psutil.virtual_memory().available * MEMORY_SHARE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def children() -> int:
    """How many processes this one has below it, without those of torch's compiler."""
    return sum(not _of_compiler(process) for process in psutil.Process().children(recursive=True))


def descendants(pid: int) -> list[psutil.Process]:
    """Everything below worker ``pid``, which must not have been waited for: else its number may be another's.

    While it lives it is the parent of its orphans; when it has died they are nobody's.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def end_family(pid: int, mark: str, known: Iterable[psutil.Process]) -> None:
    """Kill all that came of worker ``pid``: its group, ``known`` descendants, whatever carries its mark."""
    for process in known:
        with contextlib.suppress(psutil.Error):
            process.kill()  # unless its number is another's by now
    for _ in range(ROUNDS):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        left = list(_marked(mark))
        if not left:
            return
        for number in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(PAUSE_S)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _marked(mark: str) -> Iterator[int]:
    """Processes whose environment holds the mark; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                yield int(folder.name)


def _of_compiler(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return True  # it is gone
    return any(name in line for name in COMPILER) or not _alive(process)
