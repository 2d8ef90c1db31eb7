"""A CUDA (or ROCm) GPU as a device. Only calls of torch: what they are for is in stream_protocol.py."""

from __future__ import annotations

import time
import warnings
from typing import Any, Final

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnbench.harness import devices
from attnbench.harness.timing.compiles import CompileCounter
from attnbench.harness.timing.device import Call, Trace
from attnbench.harness.timing.nvml import GpuHealth, open_nvml

LEAST_FLUSH_BYTES: Final = 256 << 20
CALIBRATION_CYCLES: Final = 2_000_000

# Bound before any impl is imported: patching these later does not change what is measured.
_Event = torch.cuda.Event
_elapsed_ms = torch.cuda.Event.elapsed_time
_record = torch.cuda.Event.record
_query = torch.cuda.Event.query
_synchronize = torch.cuda.synchronize
_sleep = torch.cuda._sleep
_now_ns = time.perf_counter_ns


def flush_bytes(l2_bytes: int, last_level_bytes: int | None) -> int:
    """Size of the flush buffer: twice the largest cache, and at least 256 MiB."""
    return max(2 * l2_bytes, 2 * (last_level_bytes or 0), LEAST_FLUSH_BYTES)


class CudaDevice:
    """The current CUDA device, named as in ``harness/devices.toml``."""

    kind = "cuda"

    def __init__(self, name: str) -> None:
        self.name = name
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        sheet = devices.hardware(name)
        self.bandwidth_bytes_per_s = sheet.bandwidth_bytes_per_s if sheet else None
        self._l2_bytes = int(properties.L2_cache_size)
        size = flush_bytes(self._l2_bytes, sheet.last_level_bytes if sheet else None)
        self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._nvml = open_nvml(f"GPU-{properties.uuid}")
        self._compiles = CompileCounter(triton=True)
        self._cycles_per_us = self._calibrate()

    def now_ns(self) -> int:
        """``time.perf_counter_ns``."""
        return _now_ns()

    def synchronize(self) -> None:
        """Wait for every stream."""
        _synchronize()

    def flush(self) -> None:
        """Queue zeros over the flush buffer."""
        self._buffer.zero_()

    def probe(self) -> tuple[Call, int]:
        """A sum over half an L2 cache, and its size in bytes."""
        data = torch.ones(self._l2_bytes // 8, device="cuda")
        return data.sum, data.nbytes

    def mark(self) -> torch.cuda.Event:
        """A timing event, recorded in the current stream."""
        event = _Event(enable_timing=True)
        _record(event)
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        """Whether the event has been passed."""
        return bool(_query(mark))

    def elapsed_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time between two events that have been passed."""
        return 1e3 * _elapsed_ms(start, end)

    def spin(self, us: float) -> None:
        """Queue one thread that counts clock cycles."""
        _sleep(int(us * self._cycles_per_us))

    def capture(self, call: Call, repeats: int) -> Call | None:
        """A CUDA graph of ``repeats`` calls. None when the call waits for the device, or capture fails.

        The wait is looked for first: a capture that fails in the middle can leave torch's generator unusable.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        mode = torch.cuda.get_sync_debug_mode()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream):
                call()  # libraries allocate their workspaces per stream, which a capture must not do
            torch.cuda.set_sync_debug_mode(mode)
            _synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeats):
                    call()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            _synchronize()
        return graph.replay

    def compilations(self) -> int:
        """Graphs of torch.compile and kernels of Triton."""
        return self._compiles.count()

    def trace(self, call: Call) -> Trace:
        """Run ``call`` under the profiler and with torch's warnings about waiting."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
                self.synchronize()
        waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        return Trace(tuple(_kernels(profiler.events())), waits)

    def health(self) -> GpuHealth:
        """What NVML tells; nothing where there is none."""
        return GpuHealth() if self._nvml is None else self._nvml.health()

    def healthy(self) -> bool:
        """Whether the context still answers."""
        try:
            _synchronize()
        except RuntimeError:
            return False
        return True

    def _calibrate(self) -> float:
        """Clock cycles that the spin counts in a µs."""
        _sleep(CALIBRATION_CYCLES)
        start = self.mark()
        _sleep(CALIBRATION_CYCLES)
        end = self.mark()
        self.synchronize()
        return CALIBRATION_CYCLES / self.elapsed_us(start, end)


def _kernels(events: Any) -> list[str]:
    """Names of what ran on the device, in the order of its start."""
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [e.name for e in sorted(ran, key=lambda e: e.time_range.start)]
