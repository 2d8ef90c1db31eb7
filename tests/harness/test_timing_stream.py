"""The GPU protocol on a simulated device: a host that queues, a device that runs, one cache, one clock."""

import math

import pyarrow as pa
import pytest

from attnbench.harness.timing import PRESETS, Settings, StreamDevice, Trace, audit, measure
from attnbench.harness.timing.nvml import GpuHealth
from attnbench.results import schema

FLUSH_US, SYNC_US, FLUSH_LAUNCH_US = 120.0, 5.0, 3.0
QUICK = Settings(max_samples=60, min_total_s=0.001)


class FakeGpu:
    """Work is queued by the host and run in order; an event passes when all that was queued before has run.

    ``cached`` is the kernel whose data the cache holds. Times in µs since the start of the simulation.
    """

    name = "fake"
    kind = "cuda"
    bandwidth_bytes_per_s = 1e12

    def __init__(self, flush_works=True, capturable=True, probe_us=(10.0, 20.0), trace=None):
        self.script = []
        self.host_us = self.device_us = self.side_us = 0.0
        self.cached = None
        self.flush_works, self.capturable = flush_works, capturable
        self.probe_us, self.told = probe_us, trace
        self.compiled = 0
        self.healths = iter((GpuHealth(), GpuHealth()))

    def run(self, us, stream="main"):
        """Queue work of ``us``; returns when it ends."""
        if stream == "side":
            self.side_us = max(self.side_us, self.host_us) + us
            return self.side_us
        self.device_us = max(self.device_us, self.host_us) + us
        return self.device_us

    def now_ns(self):
        return round(self.host_us * 1e3)

    def synchronize(self):
        self.script.append("sync")
        self.host_us = max(self.host_us, self.device_us, self.side_us) + SYNC_US

    def flush(self):
        self.script.append("flush")
        self.host_us += FLUSH_LAUNCH_US
        self.run(FLUSH_US)
        if self.flush_works:
            self.cached = None

    def spin(self, us):
        self.script.append("spin")
        self.run(us)

    def mark(self):
        self.script.append("mark")
        return self.run(0.0)

    def reached(self, mark):
        return mark <= self.host_us

    def elapsed_us(self, start, end):
        assert end <= self.host_us, "the events were read before they had passed"
        return end - start

    def probe(self):
        hot, cold = self.probe_us
        return FakeCall(self, [(1.0, hot, cold)]), 10_000_000

    def compilations(self):
        return self.compiled

    def trace(self, call):
        call()
        return self.told or Trace(("kernel_b", "kernel_a", "kernel_b"), 0)

    def health(self):
        self.script.append("health")
        return next(self.healths)

    def healthy(self):
        return True

    def capture(self, call, repeats):
        self.script.append("capture")
        if not self.capturable:
            return None
        return FakeCall(self, [(4.0, *(repeats * us for us in call.device_us()))])


class FakeCall:
    """A call of launches (host µs, device µs hot, device µs cold)."""

    def __init__(self, gpu, launches, stream="main", first_us=0.0, compile_at=None, factor=lambda i: 1.0):
        self.gpu, self.launches, self.stream, self.first_us = gpu, launches, stream, first_us
        self.compile_at, self.factor, self.calls = compile_at, factor, 0

    def device_us(self):
        return tuple(sum(launch[i] for launch in self.launches) for i in (1, 2))

    def __call__(self):
        gpu = self.gpu
        gpu.script.append("call")
        if self.calls == 0:
            gpu.host_us += self.first_us
        hit = gpu.cached is self
        for host_us, hot_us, cold_us in self.launches:
            gpu.host_us += host_us
            gpu.run(self.factor(self.calls) * (hot_us if hit else cold_us), self.stream)
        gpu.cached = self
        self.calls += 1
        if self.calls == self.compile_at:
            gpu.compiled += 1


def simple(gpu, host_us=8.0, hot_us=100.0, cold_us=130.0, **options):
    return FakeCall(gpu, [(host_us, hot_us, cold_us)], **options)


def names(timing):
    return [flag.name for flag in timing.flags]


def test_the_fake_is_a_stream_device():
    assert isinstance(FakeGpu(), StreamDevice)


def test_a_cold_sample_is_flushed_then_held_then_timed():
    gpu = FakeGpu()
    measure(simple(gpu), gpu, QUICK)
    script = " ".join(event for event in gpu.script if event != "health").replace("capture call ", "")
    turns = [turn.split() for turn in script.split("sync")]
    samples = [turn for turn in turns if turn.count("mark") == 3]
    cold = [turn for turn in samples if "flush" in turn]
    assert len(cold) > 60
    assert all(turn == ["mark", "flush", "spin", "mark", "call", "mark"] for turn in cold)
    hot = [turn for turn in samples if "flush" not in turn]
    assert len(hot) > 20
    assert all(turn == ["mark", "spin", "mark", "call", "mark"] for turn in hot)


def test_neither_flush_nor_spin_nor_launch_enters_a_sample():
    gpu = FakeGpu()
    timing = measure(FakeCall(gpu, [(30.0, 2.0, 3.0)] * 4), gpu, QUICK)
    assert timing.samples_us == pytest.approx([12.0] * len(timing.samples_us))
    assert timing.cold_us == pytest.approx(12.0)
    assert timing.hot_us == pytest.approx(8.0)
    # eager Python sees the launches: the device runs each kernel while the next one is queued
    assert timing.e2e_us == pytest.approx(4 * 30.0 + 2.0 + SYNC_US)
    assert timing.columns()["launch_us"] == pytest.approx(timing.e2e_us - 8.0)
    assert "launch_exposed" not in names(timing)


def test_all_columns_are_the_schemas_and_fit_their_types():
    gpu = FakeGpu()
    columns = measure(simple(gpu), gpu, QUICK).columns()
    for name, value in columns.items():
        pa.array([value], schema.BY_NAME[name].type)
    assert columns["time_kind"] == "device_cold"
    assert columns["time_us"] == columns["cold_us"] == columns["time_lo_us"] == columns["time_hi_us"] == 130.0
    assert columns["n_samples"] == len(columns["samples_us"])
    of_time = {c.name for c in schema.COLUMNS if c.group == "time"}
    assert set(columns) == of_time


def test_a_clean_measurement_has_no_flag():
    gpu = FakeGpu()
    assert names(measure(simple(gpu, hot_us=1000.0, cold_us=1300.0), gpu)) == []


def test_a_flush_that_does_nothing_is_found_out():
    gpu = FakeGpu(flush_works=False)
    timing = measure(simple(gpu), gpu, QUICK)
    assert timing.flush_ratio == pytest.approx(1.0)
    assert "cache_not_cold" in names(timing)


def test_a_probe_faster_than_the_memory_is_found_out():
    # 10 MB in 9 µs is 1.1 TB/s where the memory has 1
    timing = measure(simple(gpu := FakeGpu(probe_us=(5.0, 9.0))), gpu, QUICK)
    assert timing.flush_ratio == pytest.approx(1.8)
    (flag,) = [f for f in timing.flags if f.name == "cache_not_cold"]
    assert "1.11 of the peak" in flag.observed


def test_a_host_slower_than_the_longest_spin_is_flagged():
    gpu = FakeGpu()
    timing = measure(FakeCall(gpu, [(4000.0, 10.0, 10.0)] * 2), gpu, QUICK)
    assert "launch_exposed" in names(timing)
    assert timing.cold_us > 20.0


def test_recompilation_while_sampling_is_flagged_and_sampled_again():
    gpu = FakeGpu()
    plain = measure(simple(gpu), gpu, QUICK)
    calls_before = 1 + 5 + plain.warmup_calls
    gpu = FakeGpu()
    call = simple(gpu, compile_at=calls_before + 3, factor=lambda i: 5.0 if i == calls_before + 2 else 1.0)
    timing = measure(call, gpu, QUICK)
    assert names(timing).count("recompiled") == 1
    assert max(timing.samples_us) == pytest.approx(130.0)
    assert "recompiled" not in names(plain)


def test_compilation_before_sampling_is_no_flag_and_compile_s():
    gpu = FakeGpu()
    timing = measure(simple(gpu, first_us=2e6, compile_at=1), gpu, QUICK)
    assert "recompiled" not in names(timing)
    assert timing.compile_s == pytest.approx(2.0, rel=1e-3)


def test_first_call_made_elsewhere_is_taken_over():
    gpu = FakeGpu()
    assert measure(simple(gpu), gpu, QUICK, first_s=3.0).compile_s == pytest.approx(3.0, rel=1e-3)


def test_hot_time_comes_from_a_graph_where_it_can_and_capture_is_last():
    gpu = FakeGpu()
    timing = measure(FakeCall(gpu, [(50.0, 10.0, 12.0)] * 3), gpu, QUICK)
    assert timing.graph is True
    assert timing.hot_us == pytest.approx(30.0)
    assert "flush" not in gpu.script[gpu.script.index("capture") :]
    gpu = FakeGpu(capturable=False)
    timing = measure(FakeCall(gpu, [(50.0, 10.0, 12.0)] * 3), gpu, QUICK)
    assert timing.graph is False
    assert timing.hot_us == pytest.approx(30.0)


def test_work_on_a_stream_that_events_do_not_see_is_found_out():
    gpu = FakeGpu()
    timing = measure(simple(gpu, hot_us=500.0, cold_us=500.0, stream="side"), gpu, QUICK)
    assert timing.cold_us == pytest.approx(0.0)
    assert "events_disagree" in names(timing)


def test_tampered_events_are_found_out():
    gpu = FakeGpu()
    honest = gpu.elapsed_us
    gpu.elapsed_us = lambda start, end: honest(start, end) / 10
    assert "events_disagree" in names(measure(simple(gpu, hot_us=500.0, cold_us=600.0), gpu, QUICK))


def test_a_long_call_is_sampled_a_few_times_only():
    gpu = FakeGpu()
    timing = measure(simple(gpu, hot_us=8e6, cold_us=8e6), gpu)
    assert len(timing.samples_us) == 5
    assert {"few_samples", "not_warm"} <= set(names(timing))
    assert math.isfinite(timing.hot_us)


def test_a_device_that_never_settles_is_not_warm():
    gpu = FakeGpu()
    timing = measure(simple(gpu, hot_us=900.0, cold_us=1000.0, factor=lambda i: 1.002**i), gpu, QUICK)
    assert "not_warm" in names(timing)


def test_health_is_read_around_the_samples_and_its_flags_are_kept():
    gpu = FakeGpu()
    gpu.healths = iter((GpuHealth(sm_clock_mhz=1980), GpuHealth(sm_clock_mhz=1755)))
    timing = measure(simple(gpu), gpu, QUICK)
    (flag,) = [f for f in timing.flags if f.name == "clock_spread"]
    assert flag.observed == "1980 then 1755 MHz"
    first, second = (i for i, event in enumerate(gpu.script) if event == "health")
    assert gpu.script[first:second].count("flush") == len(timing.samples_us)


def test_warm_up_keeps_the_duty_cycle_of_the_measurement():
    gpu = FakeGpu()
    timing = measure(simple(gpu), gpu, QUICK)
    before = gpu.script[: gpu.script.index("health")]
    assert before.count("flush") == timing.warmup_calls


def test_tiny_takes_fewer_samples_and_says_so():
    gpu = FakeGpu()
    timing = measure(simple(gpu, hot_us=8000.0, cold_us=8000.0), gpu, PRESETS["tiny"])
    assert 10 <= len(timing.samples_us) < 30
    assert "few_samples" in names(timing)


def test_audit_names_kernels_once_and_counts_launches():
    gpu = FakeGpu()
    found = audit(simple(gpu), gpu)
    assert found.columns() == {"kernels": ["kernel_a", "kernel_b"], "n_launches": 3}
    assert (found.host_sync, found.flags) == (False, ())
    assert gpu.script == ["call", "sync", "call"]  # compiled and tuned before it is traced


def test_audit_flags_waiting_and_blindness():
    gpu = FakeGpu(trace=Trace(("kernel",), 2))
    found = audit(simple(gpu), gpu)
    assert found.host_sync
    assert [flag.text for flag in found.flags] == [
        "host_sync: observed 2 waits for the device inside the call, limit 0"
    ]
    gpu = FakeGpu(trace=Trace((), 0))
    assert [flag.name for flag in audit(simple(gpu), gpu).flags] == ["kernels_unseen"]
