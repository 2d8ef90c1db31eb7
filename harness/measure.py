"""Measures one case inside a worker: correctness first, then work, memory and time, as columns of a row.

The order matters: a wrong result is found before anything is timed, and what is known is sent to the driver
before the long part starts, so that a time limit does not lose it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attnbench.harness import accuracy, devices, memory, peaks, selection_report, timing
from attnbench.harness.flags import Flag
from attnbench.harness.guard import Guard, random_state
from attnbench.harness.parallel import launch, ranks_of
from attnbench.harness.subject import Subject, as_reference, build
from attnbench.harness.witness import Witness
from attnbench.harness.work import work_of
from attnbench.impls import registry
from attnbench.impls.base import SparseAttention
from attnbench.impls.case import Case
from attnbench.impls.spec import Pattern
from attnbench.kernels import flash, recording, tuning
from attnbench.results.schema import Status

Send = Callable[[dict[str, Any]], None]
DISTRIBUTIONS = ("gaussian", "structured", "recorded")
UNCOUNTABLE = ("flex",)
"""Backends that torch's dispatch modes (counter, CPU audit) break, for good in that process."""

FIDELITY_MAX_N = 2048
"""Exact attention in fp64 holds the whole score matrix: beyond this length fidelity is measured at it."""


@dataclass(frozen=True)
class Gate:
    """What the correctness gate found: columns and what is wrong.

    ``output`` is that of a case which is short enough to have passed as it is, with its tolerance.
    """

    columns: dict[str, Any]
    wrong: str
    output: Tensor | None = None
    tolerance: float = math.inf

    def unlike(self, first: Tensor) -> str:
        """What is wrong when ``first``, on inputs equal to those of the gate, is another output."""
        return "" if self.output is None else accuracy.unlike(first, self.output, self.tolerance)


class Measurer:
    """Measures cases in this process, one device for all of them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._timing_preset: str = settings["timing"]
        self._timing = timing.PRESETS[self._timing_preset]
        self._gate_max_n: int = settings["gate_max_n"]
        self._preset: str = settings["preset"]
        self._checkpoints = Path(settings["checkpoints"])
        torch.set_num_threads(settings["threads"])
        self._device = timing.open_device(settings["device"])
        self._guard = Guard()  # no impl is loaded yet

    def poisoned(self) -> bool:
        """Whether the device context is dead, so that nothing after this can be trusted."""
        return not self._device.healthy()

    def measure(self, case: Case, send: Send) -> dict[str, Any]:
        """All columns that the worker knows of ``case``, its status and its flags included."""
        if ranks_of(case):  # by processes of their own
            return launch.measure(case, self._timing_preset, self._gate_max_n)
        row = self._train(case, send) if case.scope == "task" else self._measured(case, send)
        wrong = self._guard.replaced()
        if wrong:
            row |= {"status": Status.INCORRECT, "reason": wrong}
        return {**row, "flags": sorted({*row["flags"], *_texts(self._guard.changed())})}

    def _measured(self, case: Case, send: Send) -> dict[str, Any]:
        peaks.measured(self._device, case.dtype)  # while the case does not hold its memory yet
        subject = build(case)
        first: list[Tensor] = []
        with tuning.set_mode(tuning_mode(self._device.kind)), tuning.picked() as choices:
            first_s = timing.time_once(lambda: first.append(subject.step()[0].clone()), self._device)
        changed = self._guard.changed()  # what follows is not to be built under settings of the impl
        gate, flags = self._checks(case)
        flags += changed
        columns = gate.columns | self._work(subject)
        columns["tuned_config"] = tuned_config(choices)
        send({"kind": "partial", "columns": columns})
        audit = self._audit(subject)
        columns |= audit.columns() if audit else {}
        wrong = gate.wrong or gate.unlike(first[0])
        if wrong:
            return {**columns, "status": Status.INCORRECT, "reason": wrong, "flags": _texts(flags)}
        before = [x.detach().clone() for x in subject.given]
        held = (*subject.module.parameters(), *subject.module.buffers())
        used = memory.measure(
            subject.step, subject.forward, subject.inputs, case.direction, self._device, held
        )
        witness = Witness(subject, first[0], gate.tolerance)
        timed, disturbed = self._timed(subject, first_s, witness, send)
        wrong = witness.finish() or self._after(subject, before)
        flags += [*(audit.flags if audit else ()), *used.flags, *timed.flags, *disturbed]
        if wrong:
            return {**columns, "status": Status.INCORRECT, "reason": wrong, "flags": _texts(flags)}
        columns |= used.columns() | timed.columns() | self._selector(subject, timed.columns()["time_us"])
        columns |= self._rates(columns, case)
        return {**columns, "flags": _texts([*flags, *self._physics(columns)]), "status": Status.OK}

    def _timed(
        self, subject: Subject, first_s: float, witness: Witness, send: Send
    ) -> tuple[timing.Timing, tuple[Flag, ...]]:
        """The times, between two readings of the clock for the driver to compare with its own."""
        torch.manual_seed(subject.case.seed)  # a call that seeds has seeded before: it must be seen to
        drawn = random_state()
        send({"kind": "clock", "seconds": self._device.now_ns() * 1e-9})
        timed = timing.measure(subject.step, self._device, self._timing, first_s, witness)
        send({"kind": "clock", "seconds": self._device.now_ns() * 1e-9})
        if subject.module.spec.stochastic or random_state() == drawn:
            return timed, ()
        return timed, (Flag("random_state", "a call changed torch's random state", "Spec.stochastic"),)

    def _audit(self, subject: Subject) -> timing.Audit | None:
        """What one call launches; None where the backend cannot be looked at."""
        if subject.case.backend in UNCOUNTABLE and self._device.kind == "cpu":
            return None
        return timing.audit(subject.step, self._device)

    # ---- correctness -----------------------------------------------------------------------------------

    def _checks(self, case: Case) -> tuple[Gate, list[Flag]]:
        gate = self._gate(case)
        flags: list[Flag] = []
        spec = registry.spec(case.mechanism)
        if not gate.wrong and case.direction == "fwd" and case.scope == "op" and not spec.exact:
            for dist in DISTRIBUTIONS:
                values, flag = self._fidelity(case, dist)
                gate = replace(gate, columns=gate.columns | values)
                flags += flag
            gate = replace(gate, columns=gate.columns | self._selection(case))
        return gate, flags

    def _gate(self, case: Case) -> Gate:
        """Correctness on this shape, or on the longest that the fp64 reference is run at."""
        short = replace(case, n=min(case.n, self._gate_max_n), m=min(case.m, self._gate_max_n), grid=())
        if case.grid:
            short = case
        subject = build(short)
        if subject.selects:  # a choice between nearly equal scores is rounding, what is chosen is attended to
            subject = replace(subject, selection=subject.select())
        before = [x.detach().clone() for x in subject.given]
        with accuracy.poisoned_allocations(), recording() as used:
            got = subject.step()
        again = subject.step()
        columns = {"gate_n": short.n, "ops_used": sorted({f"{op}/{backend}" for op, backend in used})}
        wrong = self._changed(subject, before) or accuracy.sharing(got[0], again[0], subject.given)
        if wrong:  # nothing that follows would be computed on the same inputs
            return Gate(columns, wrong)
        truth = as_reference(subject, torch.float64).step()
        yard = as_reference(subject, subject.inputs[0].dtype).step()
        verdict = accuracy.gate(got, again, truth, yard, subject.like())
        output = got[0] if short == case else None
        return Gate({**verdict.columns, **columns}, verdict.wrong, output, verdict.tolerance)

    def _fidelity(self, case: Case, dist: str) -> tuple[dict[str, Any], list[Flag]]:
        short = replace(case, n=min(case.n, FIDELITY_MAX_N), m=min(case.m, FIDELITY_MAX_N))
        subject = build(short if not case.grid else case, dist)
        got = subject.step()[0]
        q, k, v = (x.double() for x in subject.inputs)
        causal = Pattern(case.pattern) is Pattern.CS
        exact, _ = flash(q, k, v, causal=causal, need_lse=False, backend="torch")
        try:
            error, cosine = accuracy.fidelity(got, exact)
        except FloatingPointError as why:
            return {}, [Flag(f"not_finite_{dist}", str(why), "finite output")]
        return {f"approx_err_{dist}": error, f"approx_cosine_{dist}": cosine}, []

    def _selection(self, case: Case) -> dict[str, Any]:
        """Density and recall of a selection, on recorded inputs: on random ones all keys are alike."""
        short = replace(case, n=min(case.n, FIDELITY_MAX_N), m=min(case.m, FIDELITY_MAX_N))
        subject = build(case if case.grid else short, "recorded")
        if not subject.selects:
            return {}
        assert isinstance(subject.module, SparseAttention)
        return dict(selection_report.report(subject.module, *subject.inputs, **subject.keywords()))

    def _selector(self, subject: Subject, total_us: float) -> dict[str, Any]:
        """Time of the selection alone and its share of a forward call."""
        if not subject.selects or subject.case.direction != "fwd":
            return {}
        alone = timing.measure(subject.select, self._device, self._timing)
        return dict(selection_report.selector_share(alone.columns()["time_us"], total_us))

    def _after(self, subject: Subject, before: Sequence[Tensor]) -> str:
        """What is wrong after timing: an input that changed, an output that is no longer finite."""
        finite = subject.step()[0].isfinite().all()
        return self._changed(subject, before) or (
            "" if finite else "the output of a later call is not finite"
        )

    @staticmethod
    def _changed(subject: Subject, before: Sequence[Tensor]) -> str:
        """Which input differs from its copy of before; empty when none does."""
        for index, (now, then) in enumerate(zip(subject.given, before, strict=True)):
            if not torch.equal(now.detach(), then):
                return f"input {index} was changed by the call"
        return ""

    # ---- work ------------------------------------------------------------------------------------------

    def _work(self, subject: Subject) -> dict[str, Any]:
        case = subject.case
        work = work_of(case, subject.module, sum(x.nbytes for x in subject.given))
        bound = devices.roofline_us(work.flops, work.moved_bytes, _arithmetic(case.dtype), case.device)
        return {
            "flops": work.flops,
            "flops_dense": work.flops_dense,
            "flops_counted": _counted(subject),
            "bytes_min": work.moved_bytes,
            "roofline_us": bound,
            "mem_formula_bytes": work.extra_bytes,
            "input_dist": "gaussian",
            **peaks.measured(self._device, case.dtype).columns(work.flops, work.moved_bytes),
        }

    @staticmethod
    def _rates(columns: Mapping[str, Any], case: Case) -> dict[str, Any]:
        seconds = columns["time_us"] * 1e-6
        bound = columns["roofline_us"]
        return {
            "tflops": columns["flops"] / seconds * 1e-12,
            "tflops_effective": columns["flops_dense"] / seconds * 1e-12,
            "gbps_min": columns["bytes_min"] / seconds * 1e-9,
            "roofline_pct": None if bound is None else 100.0 * bound / columns["time_us"],
            "roofline_measured_pct": 100.0 * columns["roofline_measured_us"] / columns["time_us"],
        }

    @staticmethod
    def _physics(columns: Mapping[str, Any]) -> list[Flag]:
        bound = columns["roofline_us"]
        if bound is None or columns["time_us"] >= bound:
            return []
        return [
            Flag("faster_than_physics", f"{columns['time_us']:.3g} µs", f"{bound:.3g} µs by the roofline")
        ]

    # ---- tasks -----------------------------------------------------------------------------------------

    def _train(self, case: Case, send: Send) -> dict[str, Any]:
        from attnbench.tasks.base import TrainingDiverged
        from attnbench.tasks.run import run_task

        def progress(done: int, total: int, loss: float) -> None:
            send({"kind": "progress", "done": done, "total": total, "loss": loss})

        try:
            columns = run_task(
                case.task,
                case.mechanism,
                backend=case.backend,
                pattern=case.pattern,
                preset=self._preset,
                seed=case.seed,
                device="cpu" if case.device == "cpu" else "cuda",
                hyper=dict(case.hyper),
                progress=progress,
                checkpoint=self._checkpoints / f"{case.key()}.pt",
            )
        except TrainingDiverged as error:
            return {"status": Status.INCORRECT, "reason": str(error), "flags": []}
        return {"flags": [], **columns, "status": Status.OK}


def tuning_mode(kind: str) -> tuning.Mode:
    """How kernels are configured in a first call: tuned on a GPU, unless the user's environment says else."""
    return "tune" if kind == "cuda" and tuning.VARIABLE not in os.environ else tuning.mode()


def tuned_config(choices: Sequence[tuning.Picked]) -> str | None:
    """What was picked, as JSON: ``op/kernel`` → its distinct configurations. None when nothing was."""
    found: dict[str, list[dict[str, Any]]] = {}
    for choice in choices:
        plain = choice.plain()
        entry = {"config": plain["config"], "source": plain["source"]}
        entries = found.setdefault(f"{choice.op}/{choice.kernel}", [])
        if entry not in entries:
            entries.append(entry)
    return json.dumps(found, sort_keys=True) if found else None


def _arithmetic(dtype: str) -> str:
    """The arithmetic that bounds a dtype here: fp32 products are TF32 ones where torch is set so."""
    if dtype == "float32" and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return dtype


def _counted(subject: Subject) -> int | None:
    """FLOPs that torch's counter sees in a forward; None when it sees none (fused attention on a CPU)."""
    if subject.case.backend in UNCOUNTABLE:
        return None
    counter = FlopCounterMode(display=False)
    frozen = replace(
        subject,
        inputs=tuple(x.detach() for x in subject.inputs),
        extras={name: x.detach() for name, x in subject.extras.items()},
        upstream=None,
    )
    with counter:  # its hooks on modules do not understand autograd.grad
        frozen.step()
    return counter.get_total_flops() or None


def _texts(flags: Sequence[Flag]) -> list[str]:
    return sorted({flag.text for flag in flags})
