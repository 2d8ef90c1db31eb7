"""The edge to CUDA: what can be said without a GPU, NVML as recorded, and the GPU where there is one."""

import contextlib
import types

import pytest
import torch

from attnbench.harness import devices, timing
from attnbench.harness.timing import PRESETS, StreamDevice, audit, measure, open_device
from attnbench.harness.timing.cuda import CudaDevice, _kernels, flush_bytes
from attnbench.harness.timing.nvml import GpuHealth, Nvml, open_nvml


def test_flush_buffer_is_twice_the_largest_cache():
    mib = 1 << 20
    assert flush_bytes(40 * mib, None) == 256 * mib
    assert flush_bytes(200 * mib, None) == 400 * mib
    assert flush_bytes(4 * mib, devices.hardware("mi300x").last_level_bytes) == 512 * mib


def test_kernels_are_what_ran_on_the_device_in_order():
    def event(name, kind, start, annotation=False):
        return types.SimpleNamespace(
            name=name,
            device_type=kind,
            is_user_annotation=annotation,
            time_range=types.SimpleNamespace(start=start),
        )

    from torch._C._autograd import DeviceType as Kind

    events = [
        event("second", Kind.CUDA, 2.0),
        event("aten::mm", Kind.CPU, 0.0),
        event("a range", Kind.CUDA, 0.5, annotation=True),
        event("first", Kind.CUDA, 1.0),
    ]
    assert _kernels(events) == ["first", "second"]


@pytest.fixture
def cuda(monkeypatch):
    """A CudaDevice on a torch.cuda that only keeps a script; ``waits`` makes calls wait for the device."""
    state = types.SimpleNamespace(script=[], mode=0, waits=False, breaks=False)

    @contextlib.contextmanager
    def stream(_):
        state.script.append("on stream")
        yield

    @contextlib.contextmanager
    def graph(_, stream):
        state.script.append("begin")
        yield
        if state.breaks:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        state.script.append("end")

    def set_mode(mode):
        state.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def call():
        state.script.append("call")
        if state.waits and state.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    state.call = call
    fakes = {
        "CUDAGraph": lambda: types.SimpleNamespace(replay="replay"),
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": stream,
        "graph": graph,
        "get_sync_debug_mode": lambda: state.mode,
        "set_sync_debug_mode": set_mode,
        "synchronize": lambda: state.script.append("sync"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("attnbench.harness.timing.cuda._synchronize", lambda: torch.cuda.synchronize())
    state.device = CudaDevice.__new__(CudaDevice)
    return state


def test_capture_warms_the_stream_before_it_begins(cuda):
    assert cuda.device.capture(cuda.call, 2) == "replay"
    assert cuda.script == ["on stream", "call", "sync", "begin", "call", "call", "end", "sync"]
    assert cuda.mode == 0


def test_a_call_that_waits_is_never_captured(cuda):
    cuda.waits = True
    assert cuda.device.capture(cuda.call, 2) is None
    assert "begin" not in cuda.script
    assert cuda.mode == 0


def test_a_capture_that_breaks_is_no_graph(cuda):
    cuda.breaks = True
    assert cuda.device.capture(cuda.call, 1) is None
    assert cuda.script[-1] == "sync"


def test_a_dead_context_is_not_healthy(cuda, monkeypatch):
    assert cuda.device.healthy()

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert not cuda.device.healthy()


# ---- NVML ----------------------------------------------------------------------------------------------


class RecordedNvml:
    """Answers of one GPU; a question that is not in ``answers`` is not supported on it."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    class NVMLError(Exception):
        pass

    def __init__(self, **answers):
        self.answers = answers

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def ask(*args):
            if name == "nvmlInit":
                return None
            key = name.removeprefix("nvml").removeprefix("Device")
            if key not in self.answers:
                raise self.NVMLError("Not Supported")
            answer = self.answers[key]
            return answer[args[1]] if isinstance(answer, dict) else answer

        return ask


H100 = {
    "GetHandleByUUID": "handle",
    "GetUUID": "GPU-5d2a33d1-0000-1111-2222-333344445555",
    "SystemGetDriverVersion": "580.82.07",
    "GetEccMode": (1, 1),
    "GetCurrPcieLinkGeneration": 5,
    "GetCurrPcieLinkWidth": 16,
    "GetEnforcedPowerLimit": 700_000,
    "GetPowerManagementDefaultLimit": 700_000,
    "GetPowerManagementLimitConstraints": (200_000, 700_000),
    "GetMaxClockInfo": {1: 1980, 2: 2619},
    "GetClockInfo": {1: 1980},
    "GetTemperature": {0: 61},
    "GetPowerUsage": 655_500,
    "GetCurrentClocksEventReasons": 0x4 | 0x20 | 0x1,
    "GetViolationStatus": {
        0: types.SimpleNamespace(violationTime=5_000_000),
        1: types.SimpleNamespace(violationTime=0),
    },
    "GetComputeRunningProcesses": [types.SimpleNamespace(pid=(1 << 22) + 1)],  # above any pid: not a parent
}


def test_nvml_describes_a_gpu_and_leaves_out_what_it_does_not_know():
    facts = Nvml(RecordedNvml(**H100), "GPU-x").describe()
    assert facts["gpu_driver"] == "580.82.07"
    assert facts["gpu_pci_link"] == "gen 5 x16"
    assert (facts["gpu_ecc"], facts["gpu_mig"]) == (True, None)
    assert (facts["gpu_power_limit_w"], facts["gpu_power_limit_max_w"]) == (700.0, 700.0)
    assert (facts["gpu_sm_clock_max_mhz"], facts["gpu_memory_clock_max_mhz"]) == (1980, 2619)
    assert facts["gpu_sm_clock_application_mhz"] is None
    assert "5d2a33d1" not in str(facts)  # the serial number of a card is nobody's business


def test_nvml_health_and_its_flags():
    health = Nvml(RecordedNvml(**H100), "GPU-x").health()
    assert health == GpuHealth(1980, 61, 655.5, ("SwPowerCap", "SwThermalSlowdown"), 5_000_000, 0, 1)
    before = GpuHealth(sm_clock_mhz=1900, power_violation_ns=2_000_000, thermal_violation_ns=0)
    flags = health.flags_since(before)
    assert [flag.name for flag in flags] == ["power_capped", "thermal", "clock_spread", "shared_device"]
    assert "SwPowerCap, slowed for 3.0 ms, 655.5 W, 61 °C" in flags[0].observed


def test_a_short_slow_down_between_two_snapshots_is_not_missed():
    before = GpuHealth(sm_clock_mhz=1980, thermal_violation_ns=0)
    after = GpuHealth(sm_clock_mhz=1980, thermal_violation_ns=40_000)
    assert [flag.name for flag in after.flags_since(before)] == ["thermal"]


def test_a_quiet_or_silent_gpu_has_no_flags():
    silent = Nvml(RecordedNvml(GetHandleByUUID="handle"), "GPU-x")
    assert silent.health() == GpuHealth()
    assert silent.health().flags_since(GpuHealth()) == ()
    steady = GpuHealth(1980, 50, 300.0, (), 7, 7, 0)
    assert steady.flags_since(GpuHealth(1950, 45, 200.0, (), 7, 7, 0)) == ()


def test_without_a_driver_there_is_no_nvml():
    if torch.cuda.is_available():
        pytest.skip("a driver is here")
    assert open_nvml("GPU-x") is None


# ---- a real GPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu():
    return open_device(devices.resolve("auto"))


@pytest.mark.gpu
def test_gpu_flush_is_proved_and_cold_is_not_faster_than_hot(gpu):
    assert isinstance(gpu, StreamDevice)
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    result = measure(lambda: a @ a, gpu, PRESETS["tiny"])
    assert result.flush_ratio > 1.2
    assert "cache_not_cold" not in [flag.name for flag in result.flags]
    assert result.cold_us > 0.9 * result.hot_us
    assert result.graph
    assert "events_disagree" not in [flag.name for flag in result.flags]


@pytest.mark.gpu
def test_gpu_spin_lasts_about_as_long_as_asked(gpu):
    start = gpu.mark()
    gpu.spin(2000.0)
    end = gpu.mark()
    gpu.synchronize()
    assert 1000.0 < gpu.elapsed_us(start, end) < 8000.0


@pytest.mark.gpu
def test_gpu_audit_sees_kernels_and_waiting(gpu):
    a = torch.randn(256, 256, device="cuda")
    assert audit(lambda: a @ a, gpu).n_launches >= 1
    assert not audit(lambda: a @ a, gpu).host_sync
    assert audit(lambda: a.sum().item(), gpu).host_sync
    assert gpu.capture(lambda: a.sum().item(), 1) is None


@pytest.mark.gpu
def test_gpu_side_stream_is_found_out(gpu):
    a = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()

    def call():
        with torch.cuda.stream(side):
            return a @ a

    flags = [flag.name for flag in timing.measure(call, gpu, PRESETS["tiny"]).flags]
    assert "events_disagree" in flags
