"""What a worker process is started with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attnbench.harness.engines.group import worker_environment

FAULTS = """\
import resource

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    held = [bytearray(8 << 20), bytearray(40 << 20)]
    del held
before = faults()
for _ in range(20):
    held = [bytearray(8 << 20), bytearray(40 << 20)]
    del held
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_memory_stays_with_the_worker() -> None:
    def faults(**changes: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", FAULTS],
            env=worker_environment(1) | changes,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(run.stdout)

    assert faults() < 1000
    given_back = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    assert faults(**given_back) > 20 * (48 << 20) // 4096 // 2


def test_the_user_may_set_the_allocator_and_what_is_timed_is_never_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = worker_environment(2)
    assert (env["MALLOC_ARENA_MAX"], env["OMP_NUM_THREADS"]) == ("7", "2")
    assert "TRITON_INTERPRET" not in env
