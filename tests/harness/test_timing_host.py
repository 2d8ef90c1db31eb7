"""The CPU protocol on a simulated clock, the machine read from laid-out files, and the real CPU, loosely."""

import os
import subprocess
import sys

import pytest
import torch

from attnbench.harness import timing
from attnbench.harness.timing import PRESETS, Host, Settings, measure, open_device, pin
from attnbench.harness.timing.compiles import CompileCounter
from attnbench.harness.timing.cpu import CpuDevice
from attnbench.harness.timing.host import CpuHealth, parse_cpulist

QUICK = Settings(max_samples=60, min_total_s=0.0)


class FakeCpu:
    """A host clock that only calls and flushes move; ``cached`` says whether the last thing was a call."""

    name, kind, bandwidth_bytes_per_s = "cpu", "cpu", None

    def __init__(self, flush_works=True):
        self.us = 0.0
        self.flush_works = flush_works
        self.script = []
        self.cached = False
        self.health_flags = ()

    def now_ns(self):
        return round(self.us * 1e3)

    def synchronize(self):
        pass

    def flush(self):
        self.script.append("flush")
        self.us += 10_000.0
        self.cached = self.cached and not self.flush_works

    def probe(self):
        return self.call(10.0, 30.0), 1 << 20

    def compilations(self):
        return 0

    def health(self):
        self.script.append("health")
        return self

    def flags_since(self, before):
        return self.health_flags

    def healthy(self):
        return True

    def call(self, hot_us, cold_us):
        def run():
            self.script.append("call")
            self.us += hot_us if self.cached else cold_us
            self.cached = True

        return run


def names(result):
    return [flag.name for flag in result.flags]


def test_a_sample_is_as_many_calls_as_last_five_ms():
    cpu = FakeCpu()
    result = measure(cpu.call(40.0, 90.0), cpu, QUICK)
    assert result.kind == "cpu_hot"
    assert result.loops == 125
    assert result.samples_us == pytest.approx([40.0] * len(result.samples_us))
    assert (result.hot_us, result.cold_us) == pytest.approx((40.0, 90.0))
    first, second = (i for i, event in enumerate(cpu.script) if event == "health")
    assert cpu.script[first + 1 : second] == ["call"] * (125 * len(result.samples_us))


def test_a_long_call_is_one_sample():
    cpu = FakeCpu()
    assert measure(cpu.call(7000.0, 7000.0), cpu, QUICK).loops == 1


def test_a_cold_sample_is_one_call_after_one_flush():
    cpu = FakeCpu()
    result = measure(cpu.call(40.0, 90.0), cpu, QUICK)
    tail = cpu.script[len(cpu.script) - cpu.script[::-1].index("health") :]
    sampled = [tail[i : i + 2] for i in range(0, 2 * 10, 2)]
    assert sampled == [["flush", "call"]] * 10
    assert result.cold_us == pytest.approx(90.0)  # the 10 ms of the flush are in no sample


def test_a_flush_that_does_nothing_is_found_out():
    cpu = FakeCpu(flush_works=False)
    assert "cache_not_cold" in names(measure(cpu.call(40.0, 90.0), cpu, QUICK))
    assert "cache_not_cold" not in names(measure((c := FakeCpu()).call(40.0, 90.0), c, QUICK))


def test_columns_of_a_cpu_have_no_gpu_numbers():
    cpu = FakeCpu()
    columns = measure(cpu.call(40.0, 90.0), cpu, QUICK).columns()
    assert columns["time_us"] == columns["hot_us"]
    assert [columns[name] for name in ("e2e_us", "launch_us", "graph")] == [None, None, None]


def test_flags_of_the_machine_are_kept():
    cpu = FakeCpu()
    cpu.health_flags = (timing.host.Flag("steal", "5 %", "1 %"),)
    assert "steal" in names(measure(cpu.call(40.0, 40.0), cpu, QUICK))


# ---- the machine as its files tell it ------------------------------------------------------------------


def lay_out(root, files):
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")


@pytest.fixture
def server(tmp_path):
    """Two NUMA nodes of two cores with two hardware threads each: CPUs 0-3 and 4-7 are first and second."""
    files = {"proc/loadavg": "9.50 1.0 1.0 2/94 7398", "sys/fs/cgroup/cpu.max": "max 100000"}
    stat = ["cpu 0 0 0 0 0 0 0 0 0 0"]
    for cpu in range(8):
        core = cpu % 4
        base = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{base}/topology/thread_siblings_list"] = f"{core},{core + 4}"
        node = core // 2
        pair = f"{2 * node}-{2 * node + 1},{2 * node + 4}-{2 * node + 5}"
        for index, (level, size, shared) in enumerate([(1, "48K", f"{core},{core + 4}"), (3, "32M", pair)]):
            cache = f"{base}/cache/index{index}"
            files |= {f"{cache}/level": str(level), f"{cache}/size": size, f"{cache}/shared_cpu_list": shared}
        stat.append(f"cpu{cpu} 100 0 50 800 0 0 0 {cpu} 7 0")
    files["proc/stat"] = "\n".join(stat)
    files |= {
        "sys/devices/system/node/node0/cpulist": "0-1,4-5",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7",
    }
    lay_out(tmp_path, files)
    return tmp_path


def host(root, *cpus):
    return Host(root, allowed=lambda: frozenset(cpus))


def test_cores_and_caches_are_those_that_we_may_use(server):
    assert host(server, *range(8)).cores() == [(0, (0, 4)), (0, (1, 5)), (1, (2, 6)), (1, (3, 7))]
    assert host(server, *range(8)).physical_cores() == 4
    assert host(server, 0, 4, 1).physical_cores() == 2
    assert host(server, *range(8)).last_level_cache_bytes() == 64 << 20
    assert host(server, 0, 1).last_level_cache_bytes() == 32 << 20


def test_a_cpu_quota_limits_the_threads(server):
    lay_out(server, {"sys/fs/cgroup/cpu.max": "250000 100000"})
    assert host(server, *range(8)).physical_cores() == 2
    lay_out(server, {"sys/fs/cgroup/cpu.max": "50000 100000"})
    assert host(server, *range(8)).physical_cores() == 1


def test_a_machine_that_tells_nothing(tmp_path):
    silent = host(tmp_path, 0, 1)
    assert silent.physical_cores() == 2
    assert silent.last_level_cache_bytes() is None
    health = silent.health(2, 0.0)
    assert (health.steal_ticks, health.load_1m, health.unpinned) == (None, None, "")
    assert CpuDevice(silent).probe()[1] == 32 << 20


def test_unpinned_says_why(server):
    assert host(server, 0, 1).unpinned(2) == ""
    assert host(server, *range(8)).unpinned(2) == "2 threads on 8 CPUs"
    assert host(server, 0, 4).unpinned(2) == "2 CPUs on 1 cores"
    assert host(server, 0, 2).unpinned(2) == "2 NUMA nodes"


def test_ticks_are_those_of_our_cpus(server):
    health = host(server, 2, 3).health(2, 0.0)
    assert health.steal_ticks == 2 + 3
    assert health.total_ticks == 2 * 950 + 5  # guest time is part of user time already
    assert health.load_1m == 9.5


def test_flags_between_two_snapshots():
    quiet = CpuHealth(0.0, 0, 1000, 0.5, 4, 10, "")
    noisy = CpuHealth(1.0, 30, 1400, 5.0, 4, 200, "2 threads on 8 CPUs")
    assert [flag.name for flag in noisy.flags_since(quiet)] == [
        "unpinned",
        "steal",
        "load",
        "context_switches",
    ]
    assert noisy.flags_since(quiet)[1].observed == "7.5% taken by the hypervisor"
    assert CpuHealth(1.0, 1, 1400, 4.0, 4, 25, "").flags_since(quiet) == ()
    assert CpuHealth(1.0, None, None, None, 4, 25, "").flags_since(quiet) == ()


@pytest.mark.parametrize(("text", "cpus"), [("", []), ("3", [3]), ("0-2,8", [0, 1, 2, 8])])
def test_cpulist(text, cpus):
    assert parse_cpulist(text) == cpus


@pytest.mark.parametrize(
    ("allowed", "threads", "expected"),
    [(range(8), 2, (0, 1)), ((1, 2, 3, 6, 7), 2, (2, 3)), (range(8), 4, (0, 1, 2, 3)), ((0, 4), 2, ())],
)
def test_pin_takes_one_cpu_of_each_core_of_one_node(server, monkeypatch, allowed, threads, expected):
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append((pid, cpus)), raising=False)
    assert pin(threads, host(server, *allowed)) == expected
    assert bound == ([(0, expected)] if expected else [])


# ---- the real CPU --------------------------------------------------------------------------------------


def test_the_real_cpu_measures_a_matrix_product():
    a = torch.randn(128, 128)
    device = open_device("cpu")
    result = measure(lambda: a @ a, device, PRESETS["tiny"])
    assert 1.0 < result.hot_us < 1e6
    assert result.loops > 1
    assert result.columns()["time_us"] == result.hot_us
    assert device.healthy()


def test_the_real_flush_reaches_beyond_the_last_level_cache():
    device = CpuDevice()
    device.flush()
    assert device._evict.nbytes == 2 * device._cache_bytes
    assert device.probe()[1] == device._cache_bytes // 2


def test_operators_are_named_without_views_and_allocations():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)

    def call():
        scores = torch.softmax(q @ q.transpose(-1, -2), -1)
        return torch.autograd.grad(scores.reshape(2, 64).square().sum(), q)

    found = timing.audit(call, open_device("cpu"))
    assert {"aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::sum"} <= set(found.kernels)
    assert not [name for name in found.kernels if "view" in name or "empty" in name or "transpose" in name]
    assert found.n_launches > len(found.kernels)
    assert not found.host_sync


def test_graphs_of_torch_compile_are_counted():
    counter = CompileCounter(triton=False)
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    before = counter.count()
    compiled(torch.ones(3))
    assert counter.count() == before + 1
    compiled(torch.ones(3))
    assert counter.count() == before + 1
    compiled(torch.ones(3, dtype=torch.float64))
    assert counter.count() == before + 2


KERNEL = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Offline:
    target = GPUTarget("cuda", 80, 32)
    def get_current_target(self): return self.target
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0
    def get_active_torch_device(self): return torch.device("cpu")
    def map_python_to_cpp_type(self, t): return t

driver.set_active(Offline())

@triton.jit
def double(x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(x + i) * 2)

heard = []
triton.knobs.compilation.listener = lambda **what: heard.append(what)
from attnbench.harness.timing.compiles import CompileCounter
counter = CompileCounter(triton=True)
counts = [counter.count()]
for n in (16, 16, 32):
    double.warmup(torch.ones(32), n, grid=(1,))
    counts.append(counter.count())
print(counts, len(heard))
"""


def test_kernels_that_triton_compiles_are_counted(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[0, 1, 1, 2] 2", done.stderr


def test_of_equal_cores_the_idlest_is_taken(monkeypatch):
    seen = iter(({0: 100, 1: 100}, {0: 109, 1: 101}))
    bound = []
    monkeypatch.setattr(Host, "busy_ticks", lambda self: next(seen))
    monkeypatch.setattr(Host, "cores", lambda self: [(0, (0,)), (0, (1,))])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(cpus))
    assert pin(1, Host()) == (1,)
    assert bound == [(1,)]
