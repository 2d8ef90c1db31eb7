"""What this device reaches on the two things that bound everything: a matrix product and a copy.

Vendors' figures assume clocks that a power limit may not allow; a share of these is a share of what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch

from attnbench.harness.timing import Call, Device, StreamDevice

GEMM_SIZES: Final = (256, 512, 1024, 2048, 4096, 8192)
SLOW_S: Final = {"cpu": 0.005, "cuda": 0.01}
"""Sizes grow until one product takes as long as this: the peak is reached well before."""

COPY_BYTES: Final = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Large beside the last-level cache, most of the copy at least."""

SAMPLES: Final = 4


@dataclass(frozen=True)
class Peaks:
    """Highest rates that were observed; copies count bytes read and bytes written."""

    tflops: float
    gbps: float

    def bound_us(self, flops: int, moved_bytes: int) -> float:
        """Least time in µs at these rates: the longer of computing and moving."""
        return max(flops / (self.tflops * 1e12), moved_bytes / (self.gbps * 1e9)) * 1e6

    def columns(self, flops: int, moved_bytes: int) -> dict[str, Any]:
        """The columns of a row, see :mod:`attnbench.results.schema`."""
        return {
            "peak_tflops_measured": self.tflops,
            "peak_gbps_measured": self.gbps,
            "roofline_measured_us": self.bound_us(flops, moved_bytes),
        }


@dataclass(frozen=True)
class Load:
    """Makes the calls that are timed; replaced in tests."""

    gemm: Callable[[int, str, str], Call]
    copy: Callable[[int, str], Call]


def torch_gemm(size: int, dtype: str, kind: str) -> Call:
    """A square product into memory that is there already. Random values: zeros would save power and time."""
    a, b = (torch.randn(size, size, device=kind).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def torch_copy(size_bytes: int, kind: str) -> Call:
    """A copy of ``size_bytes``, which moves twice as many."""
    source = torch.ones(size_bytes // 4, device=kind)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


TORCH: Final = Load(torch_gemm, torch_copy)


@lru_cache(maxsize=16)
def measured(device: Device, dtype: str, load: Load = TORCH) -> Peaks:
    """Peaks of ``device`` for products of ``dtype`` (torch's name), measured once per process and dtype."""
    return Peaks(tflops=_gemm_tflops(device, dtype, load), gbps=_copy_gbps(device, load))


def _gemm_tflops(device: Device, dtype: str, load: Load) -> float:
    best = 0.0
    for size in GEMM_SIZES:
        seconds = _fastest_s(load.gemm(size, dtype, device.kind), device)
        best = max(best, 2 * size**3 / seconds * 1e-12)
        if seconds >= SLOW_S[device.kind]:
            break
    return best


@lru_cache(maxsize=4)
def _copy_gbps(device: Device, load: Load) -> float:
    size = COPY_BYTES[device.kind]
    return 2 * size / _fastest_s(load.copy(size, device.kind), device) * 1e-9


def _fastest_s(call: Call, device: Device) -> float:
    """Shortest of several calls, after one that is not counted: a peak is what can be reached."""
    call()
    return min(_once_s(call, device) for _ in range(SAMPLES))


def _once_s(call: Call, device: Device) -> float:
    if not isinstance(device, StreamDevice):
        start_ns = device.now_ns()
        call()
        return max(device.now_ns() - start_ns, 1) * 1e-9
    device.synchronize()
    start = device.mark()
    call()
    end = device.mark()
    device.synchronize()
    return max(device.elapsed_us(start, end), 1e-3) * 1e-6
