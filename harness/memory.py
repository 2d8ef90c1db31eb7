"""Memory that one call needs, in calls of their own, apart from the timed ones.

On CUDA the caching allocator keeps account; on a CPU the profiler's allocation events are replayed, which is
exact and repeatable where resident-set sizes are neither.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from attnbench.harness.flags import Flag
from attnbench.harness.timing import Call, Device

HIDDEN_SHARE: Final = 0.01
HIDDEN_BYTES: Final = 64 << 10
"""Saved memory and memory held after the forward may differ by this: allocators round up."""

OUTSIDE_BYTES: Final = 1 << 20
RESIDENT_SLACK_BYTES, RESIDENT_SLACK_SHARE = 8 << 20, 0.25
"""Resident memory may grow by so much more than a call allocates: pages, arenas, buffers of libraries."""


@dataclass(frozen=True)
class Observation:
    """What a meter saw of one call, in bytes.

    The peak above the start, what was held while the result lived, and what the device lost that the meter
    knows nothing of.
    """

    peak_bytes: int
    held_bytes: int
    outside_bytes: int = 0


class Meter(Protocol):
    """Keeps account of the memory of one call."""

    method: str

    def observe(self, call: Call) -> Observation:
        """Run ``call`` and keep its result until the account is closed."""

    def outside(self, call: Call, seen: Observation) -> int:
        """Bytes that ``call`` takes past torch's allocator, beside those of ``seen``, a look at it."""


@dataclass(frozen=True)
class Memory:
    """Memory of one call in bytes. ``saved``: kept for the backward, without inputs and output."""

    peak_bytes: int
    saved_bytes: int
    inputs_bytes: int
    output_bytes: int
    method: str
    flags: tuple[Flag, ...]

    def columns(self) -> dict[str, Any]:
        """The columns ``mem_*`` of a row, except the formula's."""
        return {
            "mem_peak_bytes": self.peak_bytes,
            "mem_saved_bytes": self.saved_bytes,
            "mem_workspace_bytes": max(0, self.peak_bytes - self.output_bytes - self.saved_bytes),
            "mem_inputs_bytes": self.inputs_bytes,
            "mem_output_bytes": self.output_bytes,
            "mem_method": self.method,
        }


def measure(
    step: Callable[[], object],
    forward: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    direction: str,
    device: Device,
    held: Iterable[Tensor] = (),
) -> Memory:
    """Memory of ``step``, one call of ``direction`` (``fwd`` or ``fwd_bwd``), with ``forward`` its forward.

    ``held`` are tensors that exist whether or not the call is made: parameters and buffers.
    """
    meter: Meter = AllocatorMeter() if device.kind == "cuda" else ProfilerMeter()
    return measure_with(meter, step, forward, inputs, direction, held)


def measure_with(
    meter: Meter,
    step: Callable[[], object],
    forward: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    direction: str,
    held: Iterable[Tensor] = (),
) -> Memory:
    """The same with a given meter."""
    step()  # tables and workspaces that stay after the first call belong to no call
    peak = meter.observe(step)
    flags = list(_outside(meter.outside(step, peak)))
    if direction == "fwd":
        with torch.no_grad():
            output_bytes = _storages([forward()]).total()
        saved_bytes = 0
    else:
        saved_bytes, output_bytes, hidden = _saved(meter, forward, [*inputs, *held])
        flags += hidden
    return Memory(
        peak_bytes=peak.peak_bytes,
        saved_bytes=saved_bytes,
        inputs_bytes=sum(x.numel() * x.element_size() for x in inputs),
        output_bytes=output_bytes,
        method=meter.method,
        flags=tuple(flags),
    )


def _outside(taken_bytes: int) -> tuple[Flag, ...]:
    """``outside_allocator``: memory that a call took past torch's allocator; ``mem_*`` do not count it."""
    if taken_bytes <= OUTSIDE_BYTES:
        return ()
    return (Flag("outside_allocator", f"{taken_bytes} B", f"{OUTSIDE_BYTES} B"),)


def _saved(
    meter: Meter, forward: Callable[[], Tensor], known: Sequence[Tensor]
) -> tuple[int, int, tuple[Flag, ...]]:
    """(bytes saved for the backward, bytes of the output, flags): each storage once, ``known`` ones not.

    ``hidden_saved`` when the forward holds more or less than was saved through autograd: tensors stashed on
    a context, or memory of a library.
    """
    saved, output = _Storages(), _Storages()

    def call() -> Tensor:
        with saved_tensors_hooks(saved.pack, _unpack):
            result = forward()
        output.pack(result)
        return result

    seen = meter.observe(call)
    before = _storages(known)
    saved_bytes = saved.without(before).without(output).total()
    output_bytes = output.total()
    account = saved_bytes + output.without(before).total()
    limit = max(HIDDEN_BYTES, int(HIDDEN_SHARE * account))
    flags: tuple[Flag, ...] = ()
    if abs(seen.held_bytes - account) > limit:
        told = f"{seen.held_bytes} B held after the forward, {account} B of them saved or output"
        flags = (Flag("hidden_saved", told, f"{limit} B apart"),)
    return saved_bytes, output_bytes, flags


class _Storages(dict[int, int]):
    """Storages by address, with their sizes. Valid while the tensors live."""

    def pack(self, tensor: Tensor) -> Tensor:
        """Take note of the storage; the hook of :class:`saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        self[storage.data_ptr()] = storage.nbytes()
        return tensor

    def without(self, others: _Storages) -> _Storages:
        """Those that are not among the others."""
        return _Storages({k: v for k, v in self.items() if k not in others})

    def total(self) -> int:
        """Bytes of all."""
        return sum(self.values())


def _storages(tensors: Iterable[Tensor]) -> _Storages:
    found = _Storages()
    for tensor in tensors:
        found.pack(tensor)
    return found


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


class ProfilerMeter:
    """CPU: replays the allocations and frees that torch's profiler records.

    The events are read from the profiler's raw results, which torch does not promise to keep; a test on
    known allocations pins them.
    """

    method = "profiler"

    def observe(self, call: Call) -> Observation:
        """Profile ``call``; memory of other threads that compute for it is counted too."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        events = [
            (e.start_ns(), e.nbytes())
            for e in profiler.profiler.kineto_results.events()
            if e.name() == "[memory]" and e.device_type() == DeviceType.CPU
        ]
        del result
        return replay(events)

    def outside(self, call: Call, seen: Observation) -> int:
        """What resident memory grows by beyond the replayed peak and the slack; 0 without /proc."""
        grown = resident_growth(call)
        if grown is None or grown <= seen.peak_bytes * (1 + RESIDENT_SLACK_SHARE) + RESIDENT_SLACK_BYTES:
            return 0
        return grown - seen.peak_bytes


def resident_growth(call: Call) -> int | None:
    """Bytes by which this process's resident memory grows at most during ``call``; None without /proc.

    What is free on the heap is given back first: memory that was used before would not show. Large blocks
    are pages of their own meanwhile: holes of the heap that they do not fit would be counted as theirs.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):  # another libc than glibc
        return None
    libc.malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # the peak is now what is resident now
    except OSError:
        return None
    libc.mallopt(M_MMAP_MAX, MMAP_MAX)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    try:
        before = _resident_bytes("VmRSS")
        result = call()
        grown = _resident_bytes("VmHWM") - before
        del result
    finally:
        libc.mallopt(M_MMAP_MAX, int(os.environ.get("MALLOC_MMAP_MAX_", MMAP_MAX)))
    return grown


M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
MMAP_THRESHOLD, MMAP_MAX = 128 << 10, 65536
"""Parameters of glibc's mallopt and their defaults."""

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def replay(events: Iterable[tuple[int, int]]) -> Observation:
    """Running sum of (time, bytes) events, frees negative: its maximum and its end."""
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return Observation(peak_bytes=peak, held_bytes=held)


class AllocatorMeter:
    """CUDA: the statistics of torch's allocator. ``cuda`` is ``torch.cuda``, or a recording of it."""

    method = "allocator"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def observe(self, call: Call) -> Observation:
        """Run ``call`` on an emptied cache."""
        cuda = self._cuda
        gc.collect()
        cuda.synchronize()
        cuda.empty_cache()
        free, reserved = cuda.mem_get_info()[0], cuda.memory_reserved()
        base = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = call()
        cuda.synchronize()
        held = cuda.memory_allocated() - base
        peak = cuda.max_memory_allocated() - base
        lost = free - cuda.mem_get_info()[0] - (cuda.memory_reserved() - reserved)
        del result
        return Observation(peak_bytes=peak, held_bytes=held, outside_bytes=lost)

    def outside(self, call: Call, seen: Observation) -> int:
        """What was seen already: memory that the device lost and the allocator did not get."""
        return seen.outside_bytes
