"""A pytest plugin: one fixture that times an attention case with pytest-benchmark, in anybody's test suite.

Loaded by every pytest of an environment with attnbench: it imports nothing of ours until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attnbench.harness.subject import Subject
    from attnbench.impls.case import Case

GATE_MAX_N = 2048
"""Longest length at which results are compared with the reference, which holds an N×M map in fp64."""

RunCase = Callable[..., "Subject"]


@pytest.fixture
def attnbench_case(request: pytest.FixtureRequest) -> RunCase:
    """Check one case against its reference and time it with pytest-benchmark.

    Call it as ``attnbench_case("softmax/torch", pattern="CS", n=256)``; an impl is an id, ``id/backend`` or
    ``file.py:Class``. Options: ``workload`` (a name of ``attnbench list --workloads``, default ``tiny``),
    ``dtype`` (``fp32``), ``direction`` (``fwd``, ``fwd_bwd``), ``gpu`` (``cpu``, ``auto`` or a name),
    ``seed``, and ``hyper``, a dict of hyper-parameters. A case that the impl declares it cannot serve skips
    the test with the reason; wrong results fail it. Times are stored and compared by pytest-benchmark's own
    options, with what was measured in ``extra_info``. Returns what was timed.
    """
    if not request.config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "attnbench_case: observed no plugin pytest-benchmark, expected it: "
            "pip install 'attnbench[pytest]'"
        )
    benchmark = request.getfixturevalue("benchmark")

    def run_case(impl: str, **options: Any) -> Subject:
        case = _case(impl, **options)
        wrong = _wrong(case)
        if wrong:
            pytest.fail(f"{case.label()}: {wrong}", pytrace=False)
        return _timed(case, benchmark)

    return run_case


def _case(
    impl: str,
    *,
    pattern: str = "NS",
    n: int = 256,
    workload: str = "tiny",
    dtype: str = "fp32",
    direction: str = "fwd",
    gpu: str = "cpu",
    seed: int = 0,
    hyper: dict[str, Any] | None = None,
) -> Case:
    """The one case that the options mean; skips the test where it cannot be served."""
    from attnbench.errors import UsageError
    from attnbench.harness.config import RunConfig
    from attnbench.harness.run import prepare

    mechanism = impl if ".py:" in impl else impl.partition("/")[0]
    request = RunConfig(
        impl=(impl,),
        gpu=gpu,
        workload=(workload,),
        pattern=(pattern,),
        seqlen=(n,),
        dtype=(dtype,),
        direction=(direction,),
        seed=seed,
        hyper=tuple((mechanism, name, value) for name, value in (hyper or {}).items()),
    )
    _, planned = prepare(request)
    if len(planned) != 1:
        raise UsageError(f"attnbench_case({impl!r}): observed {len(planned)} cases, expected one")
    if planned[0].unsupported:
        pytest.skip(planned[0].unsupported)
    return planned[0].case


def _wrong(case: Case) -> str:
    """What the correctness gate finds, at this length or at the longest that the reference can hold."""
    from dataclasses import replace

    import torch

    from attnbench.harness import accuracy
    from attnbench.harness.subject import as_reference, build
    from attnbench.kernels import Unsupported

    short = case if case.grid else replace(case, n=min(case.n, GATE_MAX_N), m=min(case.m, GATE_MAX_N))
    subject = build(short)
    if subject.selects:  # a choice between nearly equal scores is rounding, what is chosen is attended to
        subject = replace(subject, selection=subject.select())
    try:
        got, again = subject.step(), subject.step()
    except Unsupported as error:
        pytest.skip(str(error))
    truth = as_reference(subject, torch.float64).step()
    yard = as_reference(subject, subject.inputs[0].dtype).step()
    return accuracy.gate(got, again, truth, yard, subject.like()).wrong


def _timed(case: Case, benchmark: Any) -> Subject:
    """Time the case; on a GPU a call ends when the device has finished it."""
    import torch

    from attnbench.harness.subject import build

    subject = build(case)
    on_gpu = subject.inputs[0].is_cuda

    def call() -> None:
        subject.step()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        impl=case.impl,
        pattern=case.pattern,
        workload=case.workload.name,
        n=case.n,
        m=case.m,
        dtype=case.dtype,
        direction=case.direction,
        device=case.device,
        case_key=case.key(),
        torch=torch.__version__,
    )
    benchmark(call)
    return subject
