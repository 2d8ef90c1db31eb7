"""Timing on a GPU: cold, hot and end to end, three numbers that are never mixed.

A sample is queued while a spin holds the device, so that the host is ahead when the start event is reached
and launch gaps are not measured; a cache flush comes before the spin, outside the events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from attnbench.harness.flags import Flag
from attnbench.harness.timing.device import Call, StreamDevice, Witness, unwitnessed
from attnbench.harness.timing.flush import prove_flush
from attnbench.harness.timing.result import Timing
from attnbench.harness.timing.sampling import (
    gc_paused,
    sample,
    sample_compiled,
    time_once,
    warm_up,
)
from attnbench.harness.timing.settings import Settings
from attnbench.results import stats

HOLD_FACTOR: Final = 2.0
HOLD_CAP_US: Final = 5000.0
HOLD_LEAST_US: Final = 20.0
"""The spin covers twice the time that the host needs to queue a call, within these ends."""

EXPOSED_LIMIT: Final = 0.05
GRAPH_TARGET_US: Final = 2000.0
GRAPH_MAX_CALLS: Final = 100
CROSS_CHECK_TARGET_US: Final = 5000.0
CROSS_CHECK_FACTOR: Final = 1.5
CROSS_CHECK_SLACK_US: Final = 20.0


@dataclass
class StreamSampler:
    """Takes samples between two events; counts those that the spin did not cover."""

    device: StreamDevice
    hold_us: float
    witness: Witness = unwitnessed
    taken: int = field(default=0, init=False)
    exposed: int = field(default=0, init=False)

    def __call__(self, call: Call, *, flushed: bool, calls: int = 1) -> tuple[float, float]:
        """(time per call, time the device was busy) in µs. ``call`` stands for ``calls`` calls."""
        device = self.device
        begin = device.mark()
        if flushed:
            device.flush()
        device.spin(self.hold_us)
        start = device.mark()
        result = call()
        end = device.mark()
        self.taken += 1
        self.exposed += device.reached(start)
        device.synchronize()
        taken = device.elapsed_us(start, end) / calls, device.elapsed_us(begin, end)
        self.witness(result)
        return taken

    def timed(self, call: Call, *, flushed: bool, calls: int = 1) -> tuple[float, float]:
        """The same, but (time per call, time between the events): what counts as measured."""
        us, _ = self(call, flushed=flushed, calls=calls)
        return us, us * calls

    def restart(self) -> None:
        """Forget the samples so far: those of a warm-up do not count."""
        self.taken = self.exposed = 0

    def flags(self) -> tuple[Flag, ...]:
        """``launch_exposed`` when the device was ahead of the host, so that samples hold launch gaps."""
        share = self.exposed / max(self.taken, 1)
        if share <= EXPOSED_LIMIT:
            return ()
        seen = f"spin of {self.hold_us:.0f} µs over before the call was queued in {share:.0%} of samples"
        return (Flag("launch_exposed", seen, f"{EXPOSED_LIMIT:.0%}"),)


def measure_stream(
    call: Call,
    device: StreamDevice,
    settings: Settings,
    first_s: float | None = None,
    witness: Witness = unwitnessed,
) -> Timing:
    """Time ``call``: cold (headline), hot, from a CUDA graph where it can be captured, and end to end.

    ``witness`` is shown the result of every cold sample.
    """
    first_s = time_once(call, device) if first_s is None else first_s
    with gc_paused():
        queue_us = queueing_us(call, device)
        hold_us = held_us(queue_us)
        warm_sampler, cold_sampler = StreamSampler(device, hold_us), StreamSampler(device, hold_us, witness)
        warm = warm_up(lambda: warm_sampler(call, flushed=True), device, settings)
        before = device.health()
        colds, recompiled = sample_compiled(lambda: cold_sampler.timed(call, flushed=True), device, settings)
        after = device.health()
        cold_us = stats.quantile(colds.samples, 0.5)
        walls = sample(lambda: _end_to_end(call, device), device, settings.secondary())
        disagree = _cross_check(call, device, max(queue_us, cold_us))
        proof = prove_flush(device)
        hot_us, graph = _hot(call, StreamSampler(device, hold_us), settings.secondary())
    return Timing(
        kind="device_cold",
        samples_us=tuple(colds.samples),
        loops=1,
        warmup_calls=warm.calls,
        compile_s=max(0.0, first_s - cold_us * 1e-6),
        flush_ratio=proof.ratio,
        cold_us=cold_us,
        hot_us=hot_us,
        e2e_us=stats.quantile(walls.samples, 0.5),
        graph=graph,
        flags=(
            *warm.flags(),
            *colds.flags(),
            *recompiled,
            *cold_sampler.flags(),
            *disagree,
            *proof.flags,
            *after.flags_since(before),
        ),
    )


def held_us(queue_us: float) -> float:
    """How long the device is held, so that a host that queues for ``queue_us`` is ahead of it."""
    return min(max(HOLD_FACTOR * queue_us, HOLD_LEAST_US), HOLD_CAP_US)


def queueing_us(call: Call, device: StreamDevice) -> float:
    """Median time that the host needs to queue one call, on an empty queue."""
    times = []
    for _ in range(5):
        device.synchronize()
        start = device.now_ns()
        call()
        times.append((device.now_ns() - start) * 1e-3)
    device.synchronize()
    return stats.quantile(times, 0.5)


def _end_to_end(call: Call, device: StreamDevice) -> tuple[float, float]:
    us = time_once(call, device) * 1e6
    return us, us


def _cross_check(call: Call, device: StreamDevice, expected_us: float) -> tuple[Flag, ...]:
    """``events_disagree`` when calls in a row take longer on the wall clock than the events account for.

    They do when a call works on a stream that the events do not see, or when somebody tampered with the
    events. ``expected_us``: the longer of queueing a call and running it.
    """
    calls = min(max(math.ceil(CROSS_CHECK_TARGET_US / max(expected_us, 1.0)), 3), 100)
    device.synchronize()
    start = device.now_ns()
    for _ in range(calls):
        call()
    device.synchronize()
    wall_us = (device.now_ns() - start) * 1e-3 / calls
    limit_us = CROSS_CHECK_FACTOR * expected_us + CROSS_CHECK_SLACK_US
    if wall_us <= limit_us:
        return ()
    return (
        Flag("events_disagree", f"{wall_us:.1f} µs a call on the wall clock", f"{limit_us:.1f} µs by events"),
    )


def _hot(call: Call, sampler: StreamSampler, settings: Settings) -> tuple[float, bool]:
    """Hot time per call: replayed from a CUDA graph, and True, or launched one by one where that fails.

    Last of all, because a capture that fails can leave the context in a state that nothing else should see.
    """
    taken = sample(lambda: sampler.timed(call, flushed=False), sampler.device, settings)
    hot_us = stats.quantile(taken.samples, 0.5)
    calls = min(max(round(GRAPH_TARGET_US / max(hot_us, 1.0)), 1), GRAPH_MAX_CALLS)
    replay = sampler.device.capture(call, calls)
    if replay is None:
        return hot_us, False
    replay()
    taken = sample(lambda: sampler.timed(replay, flushed=False, calls=calls), sampler.device, settings)
    return stats.quantile(taken.samples, 0.5), True
