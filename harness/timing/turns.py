"""Times several calls in turns: what is compared is measured side by side, so that drift hits all alike.

A round samples every call once, cold, and each round starts with another call; the ratio of two calls is
taken within rounds. The samples are those of :mod:`.stream_protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from attnbench.harness.flags import Flag
from attnbench.harness.timing.device import Call, StreamDevice
from attnbench.harness.timing.sampling import gc_paused, warm_up
from attnbench.harness.timing.settings import Settings
from attnbench.harness.timing.stopping import Stopping
from attnbench.harness.timing.stream_protocol import StreamSampler, held_us, queueing_us
from attnbench.results import stats


@dataclass(frozen=True)
class Turn:
    """Cold samples of one call in µs, round by round."""

    samples_us: tuple[float, ...]
    warmup_calls: int
    flags: tuple[Flag, ...]


def measure_in_turns(calls: Mapping[str, Call], device: StreamDevice, settings: Settings) -> dict[str, Turn]:
    """Sample until every median is known or a cap is reached; ``settings.wall_cap_s`` is for all calls."""
    names = list(calls)
    samplers, warm = {}, {}
    rules = {name: Stopping(settings) for name in names}
    with gc_paused():
        for name in names:
            sampler = samplers[name] = StreamSampler(device, held_us(queueing_us(calls[name], device)))
            warm[name] = warm_up(partial(sampler, calls[name], flushed=True), device, settings)
            sampler.restart()
        start_ns, rounds = device.now_ns(), 0
        before = device.health()
        while not all(rule.finished((device.now_ns() - start_ns) * 1e-9) for rule in rules.values()):
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                rules[name].add(*samplers[name].timed(calls[name], flushed=True))
            rounds += 1
        disturbed = device.health().flags_since(before)
    return {
        name: Turn(
            tuple(rules[name].samples),
            warm[name].calls,
            (*warm[name].flags(), *rules[name].flags(), *samplers[name].flags(), *disturbed),
        )
        for name in names
    }


def ratio(over: Turn, under: Turn) -> float:
    """Median over the rounds of the time of ``over`` by that of ``under``."""
    return stats.quantile([a / b for a, b in zip(over.samples_us, under.samples_us, strict=True)], 0.5)
