"""Timing on a CPU: many calls per sample for the headline, one call after an eviction for the cold time."""

from __future__ import annotations

import math
from collections.abc import Callable

from attnbench.harness.timing.device import Call, Device, Witness, unwitnessed
from attnbench.harness.timing.flush import prove_flush
from attnbench.harness.timing.result import Timing
from attnbench.harness.timing.sampling import gc_paused, sample, sample_compiled, time_once, warm_up
from attnbench.harness.timing.settings import Settings
from attnbench.results import stats


def measure_host(
    call: Call,
    device: Device,
    settings: Settings,
    first_s: float | None = None,
    witness: Witness = unwitnessed,
) -> Timing:
    """Time ``call`` with its inputs in cache (headline) and evicted; see :class:`Timing`.

    A headline sample is as many calls in a row as last ``min_sample_s``, so that the timer and the scheduler
    are small against it. ``witness`` is shown the result of the last of them, after the clock was read.
    """
    first_s = time_once(call, device) if first_s is None else first_s

    def hot(loops: int, witness: Witness = unwitnessed) -> tuple[float, float]:
        start = device.now_ns()
        for _ in range(loops - 1):
            call()
        result = call()
        taken = (device.now_ns() - start) * 1e-3
        witness(result)
        return taken / loops, taken

    def cold() -> tuple[float, float]:
        device.flush()
        return hot(1)

    with gc_paused():
        warm = warm_up(lambda: hot(1), device, settings)
        loops, calibration_calls = _calibrate(hot, settings, warm.call_us)
        before = device.health()
        taken, recompiled = sample_compiled(lambda: hot(loops, witness), device, settings)
        after = device.health()
        colds = sample(cold, device, settings.secondary())
        proof = prove_flush(device)
    median = stats.quantile(taken.samples, 0.5)
    return Timing(
        kind="cpu_hot",
        samples_us=tuple(taken.samples),
        loops=loops,
        warmup_calls=warm.calls + calibration_calls,
        compile_s=max(0.0, first_s - median * 1e-6),
        flush_ratio=proof.ratio,
        cold_us=stats.quantile(colds.samples, 0.5),
        hot_us=median,
        e2e_us=None,
        graph=None,
        flags=(*warm.flags(), *taken.flags(), *recompiled, *proof.flags, *after.flags_since(before)),
    )


def _calibrate(
    hot: Callable[[int], tuple[float, float]], settings: Settings, call_us: float
) -> tuple[int, int]:
    """Calls per sample so that it lasts ``min_sample_s``, and how many calls it took to find out.

    ``call_us`` is the median time of one call: a single one may have been interrupted.
    """
    least_us, calls = settings.min_sample_s * 1e6, 0
    loops = math.ceil(least_us / max(call_us, 1e-3))
    taken_us = call_us if loops == 1 else 0.0
    while taken_us < least_us:
        _, taken_us = hot(loops)
        calls += loops
        if taken_us < least_us:
            loops = max(loops + 1, math.ceil(loops * least_us / max(taken_us, 1e-3)))
    return loops, calls
