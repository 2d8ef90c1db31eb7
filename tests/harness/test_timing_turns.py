"""Calls that are compared are sampled in turns, each round beginning with another one."""

import importlib.util
from pathlib import Path

import pytest

from attnbench.harness.timing import Settings
from attnbench.harness.timing.turns import measure_in_turns, ratio

_spec = importlib.util.spec_from_file_location("fake_gpu", Path(__file__).with_name("test_timing_stream.py"))
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

QUICK = Settings(
    warmup_calls=2,
    warmup_s=0.0,
    warmup_cap_s=0.0,
    min_samples=12,
    min_total_s=0.0,
    max_samples=12,
    wall_cap_s=1e9,
)


def named(gpu, name, log, **options):
    call = fakes.simple(gpu, **options)

    def logged():
        log.append(name)
        call()

    return logged


def test_rounds_rotate_and_every_call_has_as_many_samples():
    gpu, log = fakes.FakeGpu(), []
    calls = {name: named(gpu, name, log) for name in "abc"}
    found = measure_in_turns(calls, gpu, QUICK)
    assert {len(turn.samples_us) for turn in found.values()} == {12}
    assert "".join(log[-36:]) == "abcbcacab" * 4


def test_samples_are_cold_and_the_ratio_is_that_of_the_times():
    gpu, log = fakes.FakeGpu(), []
    calls = {
        "ours": named(gpu, "ours", log, hot_us=100.0, cold_us=130.0),
        "peer": named(gpu, "peer", log, hot_us=200.0, cold_us=260.0),
    }
    found = measure_in_turns(calls, gpu, QUICK)
    assert set(found["ours"].samples_us) == {130.0}
    assert ratio(found["peer"], found["ours"]) == pytest.approx(2.0)


def test_drift_that_hits_all_calls_leaves_the_ratio_alone():
    gpu, log = fakes.FakeGpu(), []
    drift = {"factor": lambda i: 1.0 + 0.05 * i}
    calls = {
        "ours": named(gpu, "ours", log, hot_us=100.0, cold_us=100.0, **drift),
        "peer": named(gpu, "peer", log, hot_us=150.0, cold_us=150.0, **drift),
    }
    found = measure_in_turns(calls, gpu, QUICK)
    assert max(found["ours"].samples_us) > 1.3 * min(found["ours"].samples_us)
    assert ratio(found["peer"], found["ours"]) == pytest.approx(1.5)


def test_the_cap_is_for_all_calls_together():
    gpu, log = fakes.FakeGpu(), []
    calls = {name: named(gpu, name, log, hot_us=2e5, cold_us=2e5) for name in "ab"}
    capped = Settings(
        warmup_calls=1,
        warmup_s=0.0,
        warmup_cap_s=0.0,
        min_samples=12,
        max_samples=60,
        wall_cap_s=1.0,
        floor_samples=3,
    )
    found = measure_in_turns(calls, gpu, capped)
    assert {len(turn.samples_us) for turn in found.values()} == {3}
    assert any(flag.name == "few_samples" for flag in found["a"].flags)
