"""What watches an impl in its own process: the witness of timed calls, the guard, the memory beside torch."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnbench.harness import memory, timing
from attnbench.harness.guard import Guard
from attnbench.harness.subject import Subject, build
from attnbench.harness.timing import PRESETS, measure
from attnbench.harness.timing.cpu import CpuDevice
from attnbench.harness.witness import Witness
from attnbench.impls.case import Case
from attnbench.results import stats
from attnbench.tasks import workloads

LOOKS = 200
TOLERANCE = 1e-5


def subject(direction: str = "fwd", mechanism: str = "softmax") -> Subject:
    workload = workloads.entry("tiny").workload
    return build(Case(mechanism, "torch", "NS", workload, 16, 16, "float32", direction, "cpu"))


def watched(found: Subject, call: Callable[[Subject], tuple[Tensor, ...]]) -> str:
    """What a witness says after many samples of ``call``."""
    witness = Witness(found, found.step()[0].clone(), TOLERANCE)
    for _ in range(LOOKS):
        witness(call(found))
    return witness.finish()


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("mechanism", ["softmax", "linear_transformer", "performer"])
def test_an_honest_call_passes_and_finds_its_inputs_as_they_were(direction: str, mechanism: str) -> None:
    found = subject(direction, mechanism)
    before = [x.detach().clone() for x in found.given]
    assert watched(found, lambda s: tuple(s.step())) == ""
    assert all(torch.equal(x, y) for x, y in zip(found.given, before, strict=True))


def test_a_result_that_was_kept_is_found_out() -> None:
    found = subject()
    kept = tuple(x.clone() for x in found.step())
    assert "did not follow its input" in watched(found, lambda s: kept)


def test_less_work_after_some_calls_is_found_out() -> None:
    calls = iter(range(10**6))
    said = watched(subject(), lambda s: tuple(s.step()) if next(calls) < 50 else (s.inputs[2].clone(),))
    assert "from that of an earlier one on equal inputs" in said


@pytest.mark.parametrize("spoil", [lambda o: o * float("nan"), lambda o: o[:, :, 1:], lambda o: o.double()])
def test_an_output_that_is_none_is_found_out(spoil: Callable[[Tensor], Tensor]) -> None:
    assert "output of a later call" in watched(subject(), lambda s: (spoil(s.step()[0]),))


def test_looks_are_few_and_not_regular() -> None:
    gaps = set()
    for _ in range(5):
        looked: list[int] = []
        found = subject()
        witness = Witness(found, found.step()[0].clone(), TOLERANCE)
        for index in range(LOOKS):
            before = witness._next
            witness(found.step())
            if witness._next != before:
                looked.append(index)
        assert looked[0] == 0
        assert 3 <= len(looked) <= 40
        gaps.add(tuple(looked))
    assert len(gaps) > 1


def test_every_headline_sample_is_shown_after_its_time_was_taken() -> None:
    shown: list[object] = []
    taken = measure(lambda: "result", CpuDevice(), PRESETS["tiny"], 0.0, shown.append)
    assert shown == ["result"] * len(taken.samples_us)


# ---- functions and settings ----------------------------------------------------------------------------


def test_a_guard_names_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    assert guard.replaced() == ""
    monkeypatch.setattr("time.perf_counter_ns", lambda: 0)
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, end: 0.0)
    monkeypatch.setattr(stats, "quantile", lambda samples, share: 0.0)
    monkeypatch.setattr(CpuDevice, "now_ns", lambda self: 0)
    said = guard.replaced()
    assert "time.perf_counter_ns" in said
    monkeypatch.undo()
    assert guard.replaced() == ""
    monkeypatch.setattr(CpuDevice, "now_ns", lambda self: 0)
    assert "CpuDevice.now_ns" in guard.replaced()
    monkeypatch.setattr(timing, "measure", None)
    assert "attnbench.harness.timing.measure" in guard.replaced()


def test_a_guard_puts_settings_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guard = Guard()
    assert guard.changed() == ()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.set_grad_enabled(False)
    os.chdir("/")
    (flag,) = guard.changed()
    for what in ("threads 3", "default dtype torch.float64", "gradients False", "folder /"):
        assert what in flag.observed
    assert guard.changed() == ()
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109


# ---- memory --------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(memory.resident_growth(lambda: None) is None, reason="needs Linux and glibc")


@needs_proc
def test_memory_that_torch_does_not_know_of_is_seen() -> None:
    def call() -> Tensor:
        with mmap.mmap(-1, 32 << 20) as mapped:
            mapped.write(b"x" * (32 << 20))
        return torch.ones(1 << 20)

    used = memory.measure(call, call, (), "fwd", CpuDevice())
    assert [flag.name for flag in used.flags] == ["outside_allocator"]
    assert used.peak_bytes == 4 << 20


@needs_proc
def test_memory_of_torch_is_not_taken_for_another() -> None:
    x = torch.ones(1 << 22)
    used = memory.measure(lambda: x.exp().sum(), lambda: x.exp().sum(), (x,), "fwd", CpuDevice())
    assert used.flags == ()


def test_cases_travel_to_the_worker_as_they_are() -> None:
    case = replace(subject().case, hyper=(("a", 1),), grid=(4, 4))
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
