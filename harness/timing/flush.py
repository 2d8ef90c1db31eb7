"""Proof that a flush empties the cache: a reduction is slower after it, and not impossibly fast.

Without it a flush that stops working (a cache that grew, an optimised-away write) goes unnoticed for months.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from attnbench.harness.flags import Flag
from attnbench.harness.timing.device import Call, Device, StreamDevice
from attnbench.results import stats

RATIO_LIMIT: Final = 1.2
BANDWIDTH_LIMIT: Final = 1.05
SAMPLES: Final = 11
HOLD_US: Final = 200.0


@dataclass(frozen=True)
class FlushProof:
    """``ratio``: flushed over hot time. ``bandwidth_share``: what the flushed time implies, over the peak."""

    ratio: float
    bandwidth_share: float | None

    @property
    def flags(self) -> tuple[Flag, ...]:
        """``cache_not_cold`` when the reduction was as fast as hot, or faster than the memory can be."""
        if self.ratio < RATIO_LIMIT:
            return (Flag("cache_not_cold", f"flushed/hot {self.ratio:.2f}", f"at least {RATIO_LIMIT}"),)
        if self.bandwidth_share is not None and self.bandwidth_share > BANDWIDTH_LIMIT:
            seen = f"{self.bandwidth_share:.2f} of the peak bandwidth after a flush"
            return (Flag("cache_not_cold", seen, f"at most {BANDWIDTH_LIMIT}"),)
        return ()


@lru_cache(maxsize=4)
def prove_flush(device: Device) -> FlushProof:
    """Time the probe hot and flushed, once per device object."""
    call, size_bytes = device.probe()
    hot = stats.quantile([_time(call, device, flushed=False) for _ in range(SAMPLES)][1:], 0.5)
    cold = stats.quantile([_time(call, device, flushed=True) for _ in range(SAMPLES)], 0.5)
    peak = device.bandwidth_bytes_per_s
    return FlushProof(
        ratio=cold / max(hot, 1e-3),
        bandwidth_share=None if peak is None else size_bytes / max(cold * 1e-6, 1e-9) / peak,
    )


def _time(call: Call, device: Device, *, flushed: bool) -> float:
    if flushed:
        device.flush()
    if isinstance(device, StreamDevice):
        device.spin(HOLD_US)
        start = device.mark()
        call()
        end = device.mark()
        device.synchronize()
        return device.elapsed_us(start, end)
    start_ns = device.now_ns()
    call()
    return (device.now_ns() - start_ns) * 1e-3
