"""From a resolved request to the list of cases, in the order in which they are measured.

Pure: no clock, no device, no file. Every case planned here ends as exactly one row per block.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

from attnbench.errors import UsageError
from attnbench.harness import parallel
from attnbench.harness.config import Resolved
from attnbench.harness.select import Selected, backends_of, patterns_of, select
from attnbench.impls import registry
from attnbench.impls.case import Case, Direction, Scope, Workload, fold
from attnbench.impls.spec import Pattern
from attnbench.tasks import controls, workloads
from attnbench.tasks import registry as tasks


@dataclass(frozen=True)
class Planned:
    """A case, the replication it is for, and the reason why it cannot run here (empty when it can)."""

    case: Case
    block: int
    unsupported: str = ""

    @cached_property
    def key(self) -> tuple[str, int]:
        """What the journal knows a finished case by."""
        return _key(self.case), self.block

    @property
    def worker(self) -> tuple[object, ...]:
        """Cases with equal values share a worker process, in ascending length."""
        c = self.case
        return (self.block, c.mechanism, c.backend, c.dtype, c.direction, c.scope)


@lru_cache(maxsize=1 << 17)
def _key(case: Case) -> str:
    """The key of a case, computed once for all of its blocks."""
    return case.key()


def plan(resolved: Resolved) -> list[Planned]:
    """All cases of a request: its shard, grouped by worker, groups shuffled by the recorded seed per block.

    Raises UsageError for an unknown name, and when nothing at all is left to measure.
    """
    request = resolved.request
    names = controls.NAMES if request.task else ()
    if request.suite == parallel.SUITE and not request.task:
        return _ordered(
            _shard(_replicated(parallel.cases(resolved), request.blocks), request.shard), request.seed
        )
    if request.ranks:
        raise UsageError(f"--ranks: observed --suite {request.suite}, expected --suite {parallel.SUITE}")
    selected = select(request.impl, names)
    _check_hyper(resolved, {choice.mechanism for choice in selected})
    cases = list(_task_cases(resolved, selected) if request.task else _op_cases(resolved, selected))
    if not cases:
        raise _nothing(resolved, selected)
    return _ordered(_shard(_replicated(cases, request.blocks), request.shard), request.seed)


def series_of(planned: Iterable[Planned]) -> int:
    """Number of worker processes that a plan needs."""
    return len({p.worker for p in planned if not p.unsupported})


# ---- operations ----------------------------------------------------------------------------------------


def _op_cases(resolved: Resolved, selected: Sequence[Selected]) -> Iterator[Case]:
    entries = _entries(resolved)
    for choice in selected:
        kind = registry.mechanism(choice.mechanism)
        scope: Scope = "op" if kind.spec.on_tensors else "layer"
        for pattern in patterns_of(choice, resolved.patterns):
            for backend in backends_of(choice, pattern, resolved.device):
                for entry in entries:
                    if pattern in entry.patterns:
                        base = _base(resolved, choice.mechanism, backend, pattern, entry.workload, scope)
                        yield from _lengths(resolved, base, entry)


def _base(
    resolved: Resolved, mechanism: str, backend: str, pattern: str, workload: Workload, scope: Scope
) -> Case:
    return Case(
        mechanism=mechanism,
        backend=backend,
        pattern=pattern,
        workload=workload,
        n=1,
        m=1,
        dtype=resolved.dtypes[0],
        direction="fwd",
        device=resolved.device,
        scope=scope,
        hyper=tuple(sorted(resolved.hyper.get(mechanism, {}).items())),
        seed=resolved.request.seed,
    )


def _lengths(resolved: Resolved, base: Case, entry: workloads.WorkloadEntry) -> Iterator[Case]:
    lengths = resolved.request.seqlen or entry.lengths.get(resolved.request.preset, ())
    for dtype in resolved.dtypes:
        for direction in resolved.directions:
            for length in lengths:
                n, m = _sizes(entry.workload, length, base.pattern)
                yield replace(
                    base,
                    n=n,
                    m=m,
                    hyper=_at_density(resolved, base, n, m),
                    dtype=dtype,
                    direction=cast(Direction, direction),
                    grid=fold(n, entry.workload.grid_rank, registry.spec(base.mechanism).grid_ranks),
                )


def _at_density(resolved: Resolved, base: Case, n: int, m: int) -> tuple[tuple[str, Any], ...]:
    """Hyper-parameters of a case: those of the requested density, overridden by those that were named."""
    density = resolved.request.density
    if not density:
        return base.hyper
    kind = registry.mechanism(base.mechanism)
    chosen = kind.at_density(density, n, m, Pattern(base.pattern)) or {}
    return tuple(sorted({**chosen, **dict(base.hyper)}.items()))


def _sizes(workload: Workload, length: int, pattern: str) -> tuple[int, int]:
    """(N, M) for a swept length: the queries, or the keys where the workload fixes the queries."""
    if workload.n_fixed is not None and pattern in ("NC", "CC", "CS"):
        return workload.n_fixed, length
    return length, workload.keys(length, pattern)


def _entries(resolved: Resolved) -> list[workloads.WorkloadEntry]:
    request = resolved.request
    suite = workloads.suite(request.suite)  # rows carry its name: it must be one
    if request.workload:
        return [workloads.entry(name) for name in request.workload]
    return [e for e in suite if request.preset in e.lengths]


# ---- tasks ---------------------------------------------------------------------------------------------


def _task_cases(resolved: Resolved, selected: Sequence[Selected]) -> Iterator[Case]:
    request = resolved.request
    exact = (Selected("softmax", backend) for backend in controls.EXACT)
    chosen = [*selected, *exact, *(Selected(control, "torch") for control in controls.NAMES)]
    for name in tasks.select(request.task):
        task = tasks.task(name)
        for choice in chosen:
            for pattern in task.patterns:
                if pattern not in resolved.patterns:
                    continue
                shape = task.workload(request.preset, pattern)
                for backend in _task_backends(choice, pattern, resolved.device):
                    for seed in resolved.preset.seeds:
                        yield Case(
                            mechanism=choice.mechanism,
                            backend=backend,
                            pattern=pattern,
                            workload=shape.workload,
                            n=shape.n,
                            m=shape.m,
                            dtype="float32",
                            direction="train",
                            device=resolved.device,
                            scope="task",
                            hyper=tuple(sorted(resolved.hyper.get(choice.mechanism, {}).items())),
                            task=name,
                            seed=request.seed + seed,
                        )


def _task_backends(choice: Selected, pattern: str, device: str) -> tuple[str, ...]:
    """A task trains a mechanism once, with its best backend, unless one was named."""
    if choice.mechanism in controls.NAMES:
        return ("torch",)
    if pattern not in registry.spec(choice.mechanism).patterns:
        return ()
    named = choice if choice.backend != "*" else Selected(choice.mechanism, "best")
    return backends_of(named, pattern, device)


def _check_hyper(resolved: Resolved, selected: Collection[str]) -> None:
    """Refuse a hyper-parameter of a mechanism that is not measured, or one that the mechanism has not."""
    for mechanism, values in resolved.hyper.items():
        if mechanism not in selected:
            raise UsageError(
                f"--set {mechanism}.…: observed no {mechanism} among the impls, expected one of them"
            )
        try:
            registry.spec(mechanism).resolve(values)
        except ValueError as error:
            raise UsageError(f"--set: {error}") from None


# ---- order, shards, reasons ----------------------------------------------------------------------------


def _replicated(cases: Iterable[Case], blocks: int) -> list[Planned]:
    distinct = {case: _why_not(case) for case in dict.fromkeys(cases)}
    return [Planned(case, block, why) for block in range(blocks) for case, why in distinct.items()]


def _why_not(case: Case) -> str:
    if parallel.ranks_of(case):
        return parallel.why_not(case)
    if case.task:
        return controls.why_not(case.mechanism, case.task)
    try:
        return registry.mechanism(case.mechanism).supports(case).reason
    except Exception as error:  # a user's code: the others are measured all the same
        return f"its supports() raised {type(error).__name__}: {error}"


def _shard(planned: list[Planned], shard: tuple[int, int]) -> list[Planned]:
    """Part i of n by a stable hash of the case, so that every machine computes the same split."""
    index, count = shard
    return [p for p in planned if int(hashlib.sha256(p.key[0].encode()).hexdigest(), 16) % count == index - 1]


def _ordered(planned: list[Planned], seed: int) -> list[Planned]:
    groups: dict[tuple[object, ...], list[Planned]] = {}
    for item in planned:
        groups.setdefault(item.worker, []).append(item)
    order: list[Planned] = []
    for block in sorted({p.block for p in planned}):
        keys = [key for key in groups if key[0] == block]
        random.Random(f"{seed}/{block}").shuffle(keys)
        for key in keys:
            order += sorted(
                groups[key], key=lambda p: (p.case.pattern, p.case.workload.name, p.case.n, p.case.m)
            )
    return order


def _nothing(resolved: Resolved, selected: Sequence[Selected]) -> UsageError:
    names = ", ".join(dict.fromkeys(choice.mechanism for choice in selected))
    have = sorted({str(p) for s in selected if s.mechanism not in controls.NAMES for p in _patterns(s)})
    return UsageError(
        f"nothing to measure: {names} under pattern {', '.join(resolved.patterns)}, "
        f"preset {resolved.request.preset}; observed patterns {', '.join(have) or 'none'} and the lengths "
        f"{resolved.request.seqlen or 'of the preset'}; expected a pattern that the impl has and a workload "
        "with lengths in this preset (--pattern, --workload, --seqlen)"
    )


def _patterns(choice: Selected) -> tuple[str, ...]:
    return registry.spec(choice.mechanism).patterns
