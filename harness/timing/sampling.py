"""What both protocols share: the sampling loop, the first call, and the guard against recompilation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attnbench.harness.flags import Flag
from attnbench.harness.timing.device import Call, Device
from attnbench.harness.timing.settings import Settings
from attnbench.harness.timing.stopping import Stopping, WarmUp

Sampler = Callable[[], tuple[float, float]]
"""Takes one sample: (time of one call in µs, time measured or kept busy for it in µs)."""


def time_once(call: Call, device: Device) -> float:
    """Wall time in seconds of one call and what it queued, compilation included."""
    device.synchronize()
    start = device.now_ns()
    call()
    device.synchronize()
    return (device.now_ns() - start) * 1e-9


def warm_up(sampler: Sampler, device: Device, settings: Settings) -> WarmUp:
    """Sample without keeping until the device is warm."""
    rule, start = WarmUp(settings), device.now_ns()
    while not rule.finished((device.now_ns() - start) * 1e-9):
        rule.add(*sampler())
    return rule


def sample(sampler: Sampler, device: Device, settings: Settings) -> Stopping:
    """Sample until the median is known or a cap is reached."""
    rule, start = Stopping(settings), device.now_ns()
    while not rule.finished((device.now_ns() - start) * 1e-9):
        rule.add(*sampler())
    return rule


def sample_compiled(
    sampler: Sampler, device: Device, settings: Settings
) -> tuple[Stopping, tuple[Flag, ...]]:
    """The same; if something was compiled meanwhile, all is sampled again and flagged ``recompiled``."""
    before = device.compilations()
    taken = sample(sampler, device, settings)
    compiled = device.compilations() - before
    if not compiled:
        return taken, ()
    flag = Flag("recompiled", f"{compiled} while sampling, which was repeated", "0")
    return sample(sampler, device, settings), (flag,)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect now and not inside the block, if the collector was on."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
