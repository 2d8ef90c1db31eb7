"""A GPU that is not there: calls run on the CPU as they are queued, so that a dry run takes every step."""

from __future__ import annotations

import time
from typing import Final

from attnbench.harness.peaks import Peaks
from attnbench.harness.timing.device import Call, Trace
from attnbench.harness.timing.nvml import GpuHealth

PEAKS: Final = Peaks(tflops=1.0, gbps=100.0)
"""Stand in for what a GPU would be measured at: the numbers of a dry run mean nothing."""


class PretendGpu:
    """A queue that is always empty: an event is passed when it is recorded, by the clock of the host."""

    name = "dry-run"
    kind = "cuda"
    bandwidth_bytes_per_s = None

    def now_ns(self) -> int:
        """``time.perf_counter_ns``."""
        return time.perf_counter_ns()

    def synchronize(self) -> None:
        """Nothing is queued."""

    def flush(self) -> None:
        """No cache is flushed."""

    def probe(self) -> tuple[Call, int]:
        """A call that does nothing, on no bytes."""
        return (lambda: None), 0

    def compilations(self) -> int:
        """None."""
        return 0

    def trace(self, call: Call) -> Trace:
        """Run the call; it launches nothing."""
        call()
        return Trace((), 0)

    def health(self) -> GpuHealth:
        """Nothing is known."""
        return GpuHealth()

    def healthy(self) -> bool:
        """Always."""
        return True

    def mark(self) -> int:
        """The time of the host."""
        return self.now_ns()

    def reached(self, mark: int) -> bool:
        """False, as of a host that is ahead of the device."""
        return False

    def elapsed_us(self, start: int, end: int) -> float:
        """Time between two marks, never 0."""
        return max(end - start, 1) * 1e-3

    def spin(self, us: float) -> None:
        """Hold nothing."""

    def capture(self, call: Call, repeats: int) -> Call | None:
        """Nothing can be captured."""
        return None
