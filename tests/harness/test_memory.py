"""Memory of a call: known allocations exactly, attention against theory, saved tensors, an allocator."""

import types

import pytest
import torch

from attnbench.harness.memory import AllocatorMeter, ProfilerMeter, measure, measure_with, replay
from attnbench.harness.timing import open_device

MIB = 1 << 20


@pytest.fixture(scope="module")
def cpu():
    return open_device("cpu")


def names(memory):
    return [flag.name for flag in memory.flags]


# ---- the meter -----------------------------------------------------------------------------------------


def test_replay_is_a_running_sum_in_the_order_of_time():
    seen = replay([(30, -100), (10, 100), (20, 50), (40, 20)])
    assert (seen.peak_bytes, seen.held_bytes) == (150, 70)
    assert replay([]).peak_bytes == 0


def test_known_allocations_are_seen_exactly():
    """Pins the profiler's raw events, which torch does not promise to keep."""

    def call():
        a = torch.empty(1000, 250)
        b = torch.empty(500, 250)
        del a
        c = torch.empty(250, 250)
        return b, c

    seen = ProfilerMeter().observe(call)
    assert seen.peak_bytes == 4 * (250_000 + 125_000)
    assert seen.held_bytes == 4 * (125_000 + 62_500)


def test_what_is_held_before_is_not_counted():
    before = torch.empty(MIB)
    seen = ProfilerMeter().observe(lambda: before.neg_())
    assert (seen.peak_bytes, seen.held_bytes) == (0, 0)


def test_observing_twice_gives_the_same():
    x = torch.randn(64, 64)
    assert ProfilerMeter().observe(lambda: (x @ x).relu()) == ProfilerMeter().observe(lambda: (x @ x).relu())


# ---- attention -----------------------------------------------------------------------------------------


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


@pytest.mark.parametrize("n", [1024, 2048, 4096])
def test_explicit_softmax_attention_needs_two_score_matrices(cpu, n):
    d = 16
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    used = measure(lambda: attention(q, k, v), lambda: attention(q, k, v), (q, k, v), "fwd", cpu)
    scores, output = 4 * n * n, 4 * n * d
    assert used.peak_bytes == pytest.approx(2 * scores + output, rel=0.05)
    assert used.output_bytes == output
    columns = used.columns()
    assert columns["mem_inputs_bytes"] == 3 * output
    assert columns["mem_saved_bytes"] == 0
    assert columns["mem_workspace_bytes"] == used.peak_bytes - output
    assert columns["mem_method"] == "profiler"
    assert names(used) == []


def test_backward_saves_the_weights_and_not_the_inputs(cpu):
    n, d = 256, 16
    q, k, v = (torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3))
    g = torch.randn(1, 1, n, d)

    def forward():
        return attention(q, k, v)

    def step():
        return torch.autograd.grad(forward(), (q, k, v), g)

    used = measure(step, forward, (q, k, v), "fwd_bwd", cpu)
    assert used.saved_bytes == 4 * n * n
    assert used.peak_bytes > used.saved_bytes + used.output_bytes
    assert names(used) == []


def test_parameters_and_buffers_are_not_saved_memory(cpu):
    layer = torch.nn.Linear(256, 256)
    x = torch.randn(8, 256, requires_grad=True)
    g = torch.randn(8, 256)

    def step():
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), g)

    used = measure(step, lambda: layer(x), (x,), "fwd_bwd", cpu, held=layer.parameters())
    assert used.saved_bytes == 0
    assert names(used) == []


def test_a_storage_that_is_saved_twice_counts_once(cpu):
    x = torch.randn(512, 512, requires_grad=True)

    def forward():
        y = x.exp()  # exp saves y; the product saves it twice more
        return y * y.t()

    used = measure(lambda: torch.autograd.grad(forward().sum(), x), forward, (x,), "fwd_bwd", cpu)
    assert used.saved_bytes == 512 * 512 * 4


def test_an_output_that_is_also_saved_counts_as_output(cpu):
    x = torch.randn(512, 512, requires_grad=True)
    used = measure(lambda: torch.autograd.grad(x.exp().sum(), x), lambda: x.exp(), (x,), "fwd_bwd", cpu)
    assert (used.saved_bytes, used.output_bytes) == (0, 512 * 512 * 4)
    assert names(used) == []


class Stashes(torch.autograd.Function):
    """Keeps a tensor for the backward past autograd's knowledge."""

    @staticmethod
    def forward(ctx, x):
        ctx.stash = x.exp()
        return ctx.stash.sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.stash


def test_memory_stashed_past_autograd_is_found_out(cpu):
    x = torch.randn(512, 512, requires_grad=True)
    used = measure(
        lambda: torch.autograd.grad(Stashes.apply(x), x), lambda: Stashes.apply(x), (x,), "fwd_bwd", cpu
    )
    assert used.saved_bytes == 0
    (flag,) = used.flags
    assert flag.name == "hidden_saved"
    assert "1048580 B held" in flag.observed


def test_tables_of_the_first_call_belong_to_no_call(cpu):
    tables = {}

    def call():
        return x + tables.setdefault("table", torch.ones(MIB))

    x = torch.randn(MIB)
    assert measure(call, call, (x,), "fwd", cpu).peak_bytes == 4 * MIB


# ---- CUDA's allocator, recorded ------------------------------------------------------------------------


class FakeCuda:
    """The statistics of a caching allocator; ``allocate`` is what a call does to it."""

    def __init__(self, start=1000, total=1 << 40):
        self.now = self.peak = start
        self.reserved, self.raw, self.total = start, 0, total
        self.script = []

    def allocate(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)
        self.reserved = max(self.reserved, self.now)

    def synchronize(self):
        self.script.append("synchronize")

    def empty_cache(self):
        self.script.append("empty_cache")
        self.reserved = self.now

    def memory_allocated(self):
        return self.now

    def memory_reserved(self):
        return self.reserved

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.script.append("reset_peak")
        self.peak = self.now

    def mem_get_info(self):
        return self.total - self.reserved - self.raw, self.total


def test_allocator_meter_counts_from_the_base_and_resets_before_the_call():
    cuda = FakeCuda()
    cuda.allocate(9 * MIB)
    cuda.allocate(-9 * MIB)

    def call():
        cuda.script.append("call")
        cuda.allocate(5 * MIB)
        cuda.allocate(-2 * MIB)

    seen = AllocatorMeter(cuda).observe(call)
    assert (seen.peak_bytes, seen.held_bytes, seen.outside_bytes) == (5 * MIB, 3 * MIB, 0)
    assert cuda.script == ["synchronize", "empty_cache", "reset_peak", "call", "synchronize"]


def test_memory_taken_past_the_allocator_is_found_out():
    cuda = FakeCuda()
    x = torch.randn(4)

    def step():
        cuda.raw += 8 * MIB
        return x

    used = measure_with(AllocatorMeter(cuda), step, lambda: x, (x,), "fwd")
    assert used.method == "allocator"
    (flag,) = used.flags
    assert (flag.name, flag.observed) == ("outside_allocator", f"{8 * MIB} B")


@pytest.mark.parametrize(("hidden", "expected"), [(512, []), (MIB, ["hidden_saved"])])
def test_hidden_memory_of_a_gpu_call_is_found_out(hidden, expected):
    cuda = FakeCuda()
    x = torch.randn(256, 256, requires_grad=True)

    def forward():
        y = x.exp()
        cuda.allocate(4 * 256 * 256 + hidden)
        return y

    def step():
        forward()
        cuda.allocate(-4 * 256 * 256 - hidden)

    assert names(measure_with(AllocatorMeter(cuda), step, forward, (x,), "fwd_bwd")) == expected


@pytest.mark.gpu
def test_gpu_attention_needs_two_score_matrices():
    n, d = 2048, 64
    q, k, v = (torch.randn(1, 4, n, d, device="cuda") for _ in range(3))
    device = types.SimpleNamespace(kind="cuda")
    used = measure(lambda: attention(q, k, v), lambda: attention(q, k, v), (q, k, v), "fwd", device)
    assert used.peak_bytes == pytest.approx(4 * 4 * (2 * n * n + n * d), rel=0.05)
