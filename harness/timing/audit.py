"""What a call launches: kernel names and count, and whether the host waits inside it.

It catches mislabelled baselines, silent fall-backs and masks built inside the timed part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnbench.harness.flags import Flag
from attnbench.harness.timing.device import Call, Device, StreamDevice


@dataclass(frozen=True)
class Audit:
    """Kernels of one warm call: their names, sorted, and the number of launches. On a CPU: operators."""

    kernels: tuple[str, ...]
    n_launches: int
    host_syncs: int
    flags: tuple[Flag, ...]

    @property
    def host_sync(self) -> bool:
        """Whether the host waits for the device inside the call."""
        return self.host_syncs > 0

    def columns(self) -> dict[str, Any]:
        """``kernels`` and ``n_launches``."""
        return {"kernels": list(self.kernels), "n_launches": self.n_launches}


def audit(call: Call, device: Device) -> Audit:
    """Trace one call, after one that compiles and tunes whatever there is to."""
    call()
    device.synchronize()
    trace = device.trace(call)
    flags = []
    if trace.host_syncs:
        flags.append(Flag("host_sync", f"{trace.host_syncs} waits for the device inside the call", "0"))
    if isinstance(device, StreamDevice) and not trace.kernels:
        flags.append(Flag("kernels_unseen", "the profiler saw no kernel", "at least 1"))
    return Audit(tuple(sorted(set(trace.kernels))), len(trace.kernels), trace.host_syncs, tuple(flags))
