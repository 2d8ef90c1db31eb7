"""One of the processes that compute a case together: all of them run this, in lockstep.

Run as ``python -m attnbench.harness.parallel.rank RANK FOLDER`` by :mod:`attnbench.harness.parallel.launch`.
What it finds is left in FOLDER; every decision is taken from numbers that all ranks share.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from attnbench.harness import accuracy, devices, memory, timing
from attnbench.harness.parallel import linear, softmax
from attnbench.harness.parallel.collectives import Ranks, gather
from attnbench.harness.parallel.launch import RESULT
from attnbench.harness.parallel.layout import shard, unshard
from attnbench.harness.parallel.suite import METHODS, layout_of, ranks_of
from attnbench.harness.subject import Subject, as_reference, build
from attnbench.harness.timing.result import sample_columns
from attnbench.harness.timing.stopping import Stopping, WarmUp
from attnbench.harness.work import work_of
from attnbench.impls.case import Case
from attnbench.results.schema import Status
from attnbench.tasks.data.inputs import make_qkv

Attend = Callable[..., Tensor]
ATTEND: Final[Mapping[str, Attend]] = {
    "softmax/ring": softmax.ring,
    "softmax/all_gather": softmax.all_gather,
    "softmax/ulysses": softmax.ulysses,
    "linear_transformer/state_exchange": linear.state_exchange,
}
PATIENCE_S = 3600.0
"""How long a rank waits for the others. What ends a wait sooner is outside: a rank that failed ends them all,
and the time limit of the case does."""


def main() -> None:
    """Join the others, measure the case in FOLDER/case.json, leave the result of this rank."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    settings = json.loads((folder / "case.json").read_text())
    case = Case.from_json(settings["case"])
    ranks = Ranks(rank, ranks_of(case))
    _settle(case.device, ranks)
    dist.init_process_group(
        "gloo" if case.device == "cpu" else "nccl",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    columns = measure(case, ranks, settings["timing"], settings["gate_max_n"])
    (folder / RESULT.format(rank)).write_text(json.dumps(columns))
    dist.destroy_process_group()


def measure(case: Case, ranks: Ranks, preset: str, gate_max_n: int) -> dict[str, Any]:
    """Check and time the case with the other ranks; the columns of its row, times of the slowest rank."""
    columns, wrong = _gate(case, ranks, gate_max_n)
    if wrong:
        return {**columns, "status": Status.INCORRECT, "reason": wrong, "flags": []}
    step, given = _local(case, ranks)
    device = timing.open_device(case.device)
    first_s = _slowest(timing.time_once(step, device), given)
    taken, warm = _sampled(step, device, timing.PRESETS[preset], given)
    meter = memory.ProfilerMeter() if case.device == "cpu" else memory.AllocatorMeter()
    peak = int(_slowest(float(meter.observe(step).peak_bytes), given))
    times = sample_columns(taken.samples)
    return {
        **columns,
        **times,
        **_work(case, times["time_us"]),
        "time_kind": "slowest_rank",
        "hot_us": times["time_us"],
        "loops": 1,
        "warmup_calls": warm.calls,
        "compile_s": max(0.0, first_s - times["time_us"] * 1e-6),
        "mem_peak_bytes": peak,
        "mem_method": meter.method,
        "mem_inputs_bytes": sum(x.nbytes for x in given),
        "input_dist": "gaussian",
        "flags": sorted(flag.text for flag in (*warm.flags(), *taken.flags())),
        "status": Status.OK,
    }


def _settle(device: str, ranks: Ranks) -> None:
    """A device for each rank: its own GPU, or one CPU with one thread, out of all that the machine has."""
    if device != "cpu":
        torch.cuda.set_device(ranks.rank)
        return
    torch.set_num_threads(1)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # undo what the worker bound itself to
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[ranks.rank % len(cpus)]})


def _gate(case: Case, ranks: Ranks, gate_max_n: int) -> tuple[dict[str, Any], str]:
    """The split call against the reference on one device, in fp64 and in the dtype, on the whole sequence."""
    parts = 2 * ranks.size
    n = case.n if case.n <= gate_max_n else max(parts, gate_max_n // parts * parts)
    subject = build(_whole(case, n))
    layout = layout_of(case)
    mine = [shard(x.detach(), ranks.rank, ranks.size, layout) for x in subject.inputs]
    upstream = None if subject.upstream is None else shard(subject.upstream, ranks.rank, ranks.size, layout)
    step = _step(case, ranks, mine, upstream)
    got, again = ([unshard(gather(x, ranks), layout) for x in results] for results in (step(), step()))
    truth = as_reference(subject, torch.float64).step()
    yard = as_reference(subject, subject.inputs[0].dtype).step()
    verdict = accuracy.gate(got, again, truth, yard, subject.like())
    return {**verdict.columns, "gate_n": n, "ops_used": [case.impl]}, verdict.wrong


def _whole(case: Case, n: int) -> Case:
    """The case on one device: the mechanism's own reference, N tokens."""
    return replace(case, backend="reference", n=n, m=n, hyper=())


def _local(case: Case, ranks: Ranks) -> tuple[Callable[[], object], list[Tensor]]:
    """The call that is timed, and its inputs: drawn for this rank alone, the whole would not fit."""
    w = case.workload
    kind = "cpu" if case.device == "cpu" else "cuda"
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator(kind).manual_seed(case.seed * ranks.size + ranks.rank)
    n, d = case.n // ranks.size, w.head_dim
    given = list(make_qkv("gaussian", w.batch, w.heads, w.kv_heads, n, n, d, d, dtype, kind, generator))
    upstream = None
    if case.direction == "fwd_bwd":
        shape = (w.batch, w.heads, n, d)
        upstream = torch.randn(shape, generator=generator, device=kind, dtype=dtype)
    return _step(case, ranks, given, upstream), given


def _step(
    case: Case, ranks: Ranks, given: list[Tensor], upstream: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """One call: the output of this rank, and with an upstream gradient those of its q, k, v."""
    attend, causal = ATTEND[case.impl], case.pattern == "CS"

    def step() -> tuple[Tensor, ...]:
        if upstream is None:
            with torch.no_grad():
                return (attend(*given, ranks, causal=causal),)
        leaves = [x.detach().requires_grad_() for x in given]
        output = attend(*leaves, ranks, causal=causal)
        return (output.detach(), *torch.autograd.grad(output, leaves, upstream))

    return step


def _sampled(
    step: Callable[[], object], device: timing.Device, settings: timing.Settings, like: list[Tensor]
) -> tuple[Stopping, WarmUp]:
    """Warm up and sample by the usual rules, on times and clocks that all ranks agree on."""
    warm, taken = WarmUp(settings), Stopping(settings)
    rules: tuple[WarmUp | Stopping, ...] = (warm, taken)
    for rule in rules:
        start = device.now_ns()
        while not rule.finished(_slowest((device.now_ns() - start) * 1e-9, like)):
            dist.barrier()
            sample_us = _slowest(timing.time_once(step, device), like) * 1e6
            rule.add(sample_us, sample_us)
    return taken, warm


def _slowest(value: float, like: list[Tensor]) -> float:
    """The largest value of any rank."""
    shared = torch.tensor([value], dtype=torch.float64, device=like[0].device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()


def _work(case: Case, time_us: float) -> dict[str, Any]:
    """Work of the whole call, and the rates of all ranks together."""
    size, subject = ranks_of(case), _described(case)
    work = work_of(_whole(case, case.n), subject.module)
    bound = devices.roofline_us(work.flops // size, work.moved_bytes // size, case.dtype, case.device)
    return {
        "flops": work.flops,
        "flops_dense": work.flops_dense,
        "bytes_min": work.moved_bytes,
        "roofline_us": bound,
        "tflops": work.flops / time_us * 1e-6,
        "tflops_effective": work.flops_dense / time_us * 1e-6,
        "gbps_min": work.moved_bytes / time_us * 1e-3,
        "roofline_pct": None if bound is None else 100.0 * bound / time_us,
    }


def _described(case: Case) -> Subject:
    """A subject whose module knows the formulas; its length does not matter to them."""
    return build(replace(_whole(case, 2), direction="fwd"))


assert set(ATTEND) == set(METHODS)

if __name__ == "__main__":
    main()
