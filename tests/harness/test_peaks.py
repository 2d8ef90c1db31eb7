"""Measured peaks: the fastest product and copy of a simulated device, and of this machine."""

import json

import pytest
import torch

from attnbench.harness import devices
from attnbench.harness.measure import tuned_config, tuning_mode
from attnbench.harness.peaks import COPY_BYTES, GEMM_SIZES, Load, Peaks, measured
from attnbench.harness.timing.cpu import CpuDevice
from attnbench.kernels import tuning


class Clock:
    """A device on which calls take scripted times, by the host's clock or by events."""

    name, kind, bandwidth_bytes_per_s = "fake", "cpu", None

    def __init__(self):
        self.us = 0.0

    def now_ns(self):
        return round(self.us * 1e3)

    def work(self, us):
        self.us += us


class Queue(Clock):
    """The same as a stream: what is timed lies between two marks; the host sees nothing."""

    kind = "cuda"

    def now_ns(self):
        return 0

    def synchronize(self):
        pass

    def mark(self):
        return self.us

    def reached(self, mark):
        return True

    def elapsed_us(self, start, end):
        return end - start

    def flush(self):
        pass

    def probe(self):
        return (lambda: None), 0

    def spin(self, us):
        pass

    def capture(self, call, repeats):
        return None

    def compilations(self):
        return 0

    def trace(self, call):
        return None

    def health(self):
        return None

    def healthy(self):
        return True


def load_of(device, tflops, gbps, jitter=()):
    """Products at ``tflops(size)``, copies at ``gbps``; each call also takes the next of ``jitter``."""
    sizes, noise = [], iter(jitter)

    def gemm(size, dtype, kind):
        sizes.append((size, dtype, kind))
        return lambda: device.work(2 * size**3 / tflops(size) * 1e-6 + next(noise, 0.0))

    def copy(size_bytes, kind):
        return lambda: device.work(2 * size_bytes / gbps * 1e-3 + next(noise, 0.0))

    return Load(gemm, copy), sizes


@pytest.mark.parametrize("device", [Clock(), Queue()], ids=["host", "stream"])
def test_the_peak_is_the_best_size_and_the_rate_of_the_copy(device):
    rates = dict(zip(GEMM_SIZES, (10.0, 50.0, 200.0, 400.0, 800.0, 700.0), strict=True))
    load, sizes = load_of(device, rates.get, 3000.0)
    found = measured(device, "bfloat16", load)
    assert found.tflops == pytest.approx(800.0, rel=1e-3)
    assert found.gbps == pytest.approx(3000.0, rel=1e-3)
    assert [size for size, _, _ in sizes] == list(GEMM_SIZES)
    assert {(dtype, kind) for _, dtype, kind in sizes} == {("bfloat16", device.kind)}
    assert measured(device, "bfloat16", load) is found  # once per process


def test_sizes_stop_growing_once_a_product_is_long():
    device = Clock()
    load, sizes = load_of(device, lambda size: 0.05, 10.0)
    assert measured(device, "float32", load).tflops == pytest.approx(0.05, rel=1e-3)
    assert [size for size, _, _ in sizes] == [256, 512]  # 512³ takes 5.4 ms at 0.05 TFLOP/s


def test_a_disturbed_call_does_not_lower_the_peak():
    device = Clock()
    load, _ = load_of(device, lambda size: 0.05, 10.0, jitter=[5e5, 9e3, 0.0, 3e3])
    assert measured(device, "float32", load).tflops == pytest.approx(0.05, rel=1e-3)


def test_the_bound_is_the_longer_of_computing_and_moving():
    found = Peaks(tflops=100.0, gbps=1000.0)
    assert found.bound_us(10**9, 1) == pytest.approx(10.0)
    assert found.bound_us(1, 10**7) == pytest.approx(10.0)
    assert found.columns(10**9, 1)["roofline_measured_us"] == pytest.approx(10.0)


def test_this_cpu_has_plausible_peaks():
    found = measured(CpuDevice(), "float32")
    assert 1e-4 < found.tflops < 100
    assert 0.1 < found.gbps < 2000
    assert set(COPY_BYTES) == {"cpu", "cuda"}


@pytest.mark.gpu
def test_this_gpu_is_within_its_vendor_figures():
    from attnbench.harness.timing.cuda import CudaDevice

    name = devices.name_of(torch.cuda.get_device_name())
    sheet = devices.hardware(name)
    if sheet is None:
        pytest.skip(f"{name} is not in devices.toml")
    found = measured(CudaDevice(name), "bfloat16")
    assert 0.4 * sheet.tflops["bf16"] < found.tflops < 1.02 * sheet.tflops["bf16"]
    assert 0.6 * sheet.bandwidth_gbps < found.gbps < 1.02 * sheet.bandwidth_gbps


# ---- tuning ----------------------------------------------------------------------------------------------


def test_first_calls_tune_on_a_gpu_unless_the_user_decides(monkeypatch):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    assert (tuning_mode("cuda"), tuning_mode("cpu")) == ("tune", "cache")
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert tuning_mode("cuda") == "off"


def test_a_row_records_each_configuration_once():
    def one(kernel, block, source):
        return tuning.Picked("flash", kernel, {"block": block}, source)

    choices = [one("forward", 64, "tuned"), one("forward", 64, "tuned"), one("forward", 32, "cache")]
    assert json.loads(tuned_config([*choices, one("backward_q", 16, "default")])) == {
        "flash/backward_q": [{"config": {"block": 16}, "source": "default"}],
        "flash/forward": [
            {"config": {"block": 64}, "source": "tuned"},
            {"config": {"block": 32}, "source": "cache"},
        ],
    }
    assert tuned_config([]) is None
