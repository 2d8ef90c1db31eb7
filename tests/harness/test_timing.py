"""When a device is warm, when there are enough samples, what the flags say: on synthetic sequences."""

import itertools
import random

import pytest

from attnbench.harness.timing import PRESETS, Settings
from attnbench.harness.timing.settings import LIMITS
from attnbench.harness.timing.stopping import Stopping, WarmUp

QUICK = Settings(min_samples=10, min_total_s=0.0, max_samples=500)


def names(flags):
    return [flag.name for flag in flags]


def run(rule, values, seconds_per_sample=0.0):
    """Feed values until the rule is finished; returns how many it took."""
    for count, value in enumerate(values):
        if rule.finished(count * seconds_per_sample):
            return count
        rule.add(value, value)
    raise AssertionError("the rule never finished")


def noisy(sigma, seed=0):
    rng = random.Random(seed)
    return (1000.0 * rng.gauss(1.0, sigma) for _ in itertools.count())


def test_constant_times_stop_as_soon_as_the_least_numbers_are_reached():
    rule = Stopping(QUICK)
    assert run(rule, itertools.repeat(100.0)) == 10
    assert rule.half_width == 0.0


def test_summed_time_is_waited_for():
    rule = Stopping(Settings())
    assert run(rule, itertools.repeat(1000.0)) == 100  # 0.1 s of 1 ms samples, more than 30
    assert rule.flags() == ()


@pytest.mark.parametrize(("sigma", "least", "most"), [(0.005, 10, 40), (0.02, 50, 300)])
def test_noise_asks_for_more_samples(sigma, least, most):
    rule = Stopping(QUICK)
    assert least <= run(rule, noisy(sigma)) <= most
    assert rule.half_width <= 0.005


def test_interval_is_the_order_statistics_one():
    rule = Stopping(QUICK)
    for value in range(1, 101):
        rule.add(float(value), 1.0)
    # n = 100: ranks floor(50 - 9.8) = 40 and ceil(51 + 9.8) = 61 around the median 50.5
    assert rule.half_width == pytest.approx((61 - 50.5) / 50.5)


def test_half_width_reaches_to_the_further_end():
    rule = Stopping(QUICK)
    for value in [100.0] * 6 + [101.0, 104.0, 109.0, 116.0]:
        rule.add(value, 1.0)
    # n = 10: ranks floor(5 - 3.1) = 1 and ceil(6 + 3.1) = 10 around the median 100
    assert rule.half_width == pytest.approx(0.16)


def test_wild_samples_end_at_the_cap_and_say_how_wide_the_interval_is():
    rule = Stopping(QUICK)
    assert run(rule, noisy(0.3)) == 500
    assert names(rule.flags()) == ["not_converged"]
    width = float(rule.flags()[0].observed.removeprefix("median known to ±").removesuffix("%")) / 100
    assert width == pytest.approx(rule.half_width, abs=1e-4)


def test_wall_cap_waits_for_the_floor_of_samples():
    rule = Stopping(Settings())
    assert run(rule, itertools.repeat(2e6), seconds_per_sample=20.0) == 5
    assert names(rule.flags()) == ["few_samples", "not_converged"]


def test_no_sample_is_dropped_and_order_is_kept():
    rule = Stopping(QUICK)
    values = [3.0, 1.0, 2.0, 900.0]
    for value in values:
        rule.add(value, value)
    assert rule.samples == values


def test_two_modes_are_flagged():
    rule = Stopping(QUICK)
    rng = random.Random(1)
    for i in range(60):
        rule.add((100.0 if i % 3 else 150.0) + rng.random(), 100.0)
    assert "multimodal" in names(rule.flags())


def test_a_cheaper_preset_is_judged_by_the_published_one():
    steady = Stopping(PRESETS["tiny"])
    assert 10 <= run(steady, itertools.repeat(5000.0)) < LIMITS.min_samples
    assert names(steady.flags()) == ["few_samples"]
    rough = Stopping(PRESETS["tiny"])
    run(rough, noisy(0.05))
    assert LIMITS.half_width < rough.half_width <= PRESETS["tiny"].half_width
    assert "not_converged" in names(rough.flags())


def test_tiny_is_looser_than_default_in_every_respect():
    tiny, default = PRESETS["tiny"], PRESETS["default"]
    assert default == LIMITS
    for name in ("warmup_calls", "warmup_s", "warmup_cap_s", "min_samples", "max_samples", "wall_cap_s"):
        assert getattr(tiny, name) < getattr(default, name)
    assert tiny.half_width > default.half_width


def test_warm_up_needs_calls_time_and_agreeing_windows():
    rule = WarmUp(Settings())
    assert run(rule, itertools.repeat(1000.0)) == 300  # 0.3 s of 1 ms calls
    assert rule.flags() == ()
    slow = WarmUp(Settings())
    assert run(slow, itertools.repeat(60_000.0)) == 10


def test_warm_up_goes_on_while_the_device_gets_faster():
    rule = WarmUp(Settings())
    steady_after = 600
    calls = run(rule, (1000.0 * max(1.0, 3.0 - i / 300) for i in itertools.count()))
    assert calls > steady_after
    assert rule.flags() == ()


def test_warm_up_gives_up_at_its_cap_and_says_why():
    rule = WarmUp(Settings())
    assert run(rule, (1000.0 * 1.001**i for i in itertools.count()), seconds_per_sample=0.01) == 300
    (flag,) = rule.flags()
    assert flag.name == "not_warm"
    assert "drift" in flag.observed
    assert "1.0% between windows" in flag.limit


def test_cold_windows_are_counted_by_busy_time_not_by_sample_time():
    rule = WarmUp(Settings())
    calls = 0
    while not rule.finished(0.0):
        rule.add(20.0, 200.0)  # a 20 µs kernel under a 180 µs flush
        calls += 1
    assert calls in (1500, 1501)  # 0.3 s of 200 µs, added up in floating point
