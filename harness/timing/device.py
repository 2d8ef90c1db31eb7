"""What the measuring protocols need of a device: the thin edge behind which all of torch and the clock are.

Tests put a scripted device with a simulated clock in its place and assert the order of events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from attnbench.harness.flags import Flag

Call = Callable[[], object]
Witness = Callable[[object], None]
"""Is shown the result of the last call of every headline sample, outside the time that is measured."""


def unwitnessed(result: object) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Trace:
    """What one call did.

    The names of its kernels in launch order (on a CPU: operators), and how often the host waited for the
    device inside it.
    """

    kernels: tuple[str, ...]
    host_syncs: int


class Health(Protocol):
    """A snapshot of what disturbs a measurement, taken before and after it."""

    def flags_since(self, before: Any) -> tuple[Flag, ...]:
        """Flags of the time between ``before``, an earlier snapshot of the same kind, and this one."""


class Device(Protocol):
    """A device that runs a call before the call returns: a CPU."""

    @property
    def name(self) -> str:
        """Name as in ``harness/devices.toml``, or ``cpu``."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """Peak bandwidth of the memory by the vendor; None where unknown."""

    def now_ns(self) -> int:
        """A monotonic clock of the host."""

    def synchronize(self) -> None:
        """Wait until everything that was queued has run."""

    def flush(self) -> None:
        """Evict the last-level cache; on a GPU this is queued, not awaited."""

    def probe(self) -> tuple[Call, int]:
        """A call that reads half a last-level cache, and how many bytes that is."""

    def compilations(self) -> int:
        """How many kernels and graphs were compiled or loaded in this process so far."""

    def trace(self, call: Call) -> Trace:
        """Run ``call`` once and tell what it did."""

    def health(self) -> Health:
        """A snapshot of what disturbs a measurement now."""

    def healthy(self) -> bool:
        """Whether the device still answers; after an illegal access a CUDA context does not."""

    def __hash__(self) -> int:
        """By identity: what was proved of a device once is remembered."""


@runtime_checkable
class StreamDevice(Device, Protocol):
    """A device that queues work: a GPU. Marks are events recorded in the queue."""

    def mark(self) -> Any:
        """Record an event in the queue."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has already passed the event."""

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Device time between two events, after synchronising."""

    def spin(self, us: float) -> None:
        """Queue work that keeps the device busy for about ``us`` without touching memory."""

    def capture(self, call: Call, repeats: int) -> Call | None:
        """A call that replays ``repeats`` captured calls at once; None where it cannot be captured."""
