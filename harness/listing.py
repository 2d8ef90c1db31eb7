"""What `list`, `check` and `env` show, as plain tables: read from Specs, the kit and the environment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from attnbench.errors import UsageError
from attnbench.harness import contract, environment
from attnbench.impls import registry
from attnbench.impls.spec import Pattern, Spec
from attnbench.kernels import OPS
from attnbench.kernels.backends import OWN, available
from attnbench.results.table import Column, Record, Table
from attnbench.results.table import table as build_table
from attnbench.tasks import registry as task_registry
from attnbench.tasks import workloads as workload_registry


def mechanisms(family: str | None, pattern: str | None) -> Table:
    """All mechanisms: patterns, operations, peers, exactness, cost and paper."""
    specs = [registry.spec(name) for name in registry.list_impls(family, pattern)]
    rows = [
        (
            s.id,
            s.family,
            " ".join(s.patterns),
            "exact" if s.exact else "approximate",
            ", ".join(_ops(s)) or s.hot_loop,
            ", ".join(_peers(s)) or None,
            s.cost,
            f"{s.paper.title} ({s.paper.year}) {s.paper.url}".rstrip(),
        )
        for s in specs
    ]
    columns = ("mechanism", "family", "patterns", "softmax", "hot loop", "peers", "cost", "paper")
    return _table(f"{len(specs)} mechanisms", columns, rows)


def tasks() -> Table:
    """All tasks: pattern, metric, presets and data."""
    found = [task_registry.task(name) for name in task_registry.ids()]
    rows = [
        (t.id, t.title, " ".join(t.patterns), t.metric, t.better, " ".join(t.presets), t.data) for t in found
    ]
    return _table(
        f"{len(found)} tasks", ("task", "title", "patterns", "metric", "better", "presets", "data"), rows
    )


def workloads() -> Table:
    """All workloads: shape, patterns, model and source."""
    rows = [
        (
            e.workload.name,
            e.workload.batch,
            e.workload.heads,
            e.workload.kv_heads,
            e.workload.head_dim,
            e.workload.grid_rank,
            " ".join(e.patterns),
            e.workload.model,
            e.workload.source,
        )
        for e in workload_registry.entries()
    ]
    columns = ("workload", "B", "H", "Hkv", "D", "grid rank", "patterns", "model", "source")
    return _table(f"{len(rows)} workloads", columns, rows, ("B", "H", "Hkv", "D", "grid rank"))


def contract_table(
    name: str, patterns: Sequence[str], backends: Sequence[str], all_checks: bool
) -> tuple[Table, int]:
    """Outcomes of the contract kit on one mechanism, and how many checks failed.

    Raises UsageError when no pattern and backend of the mechanism is among those asked for.
    """
    kind = registry.mechanism(name)
    targets = [
        target
        for target in contract.targets(kind)
        if (not patterns or target.pattern in patterns) and (not backends or target.backend in backends)
    ]
    if not targets:
        raise UsageError(
            f"{name} has nothing to check under patterns {', '.join(patterns) or 'all'} and backends "
            f"{', '.join(backends) or 'all'}: it has {', '.join(kind.spec.patterns)}"
        )
    rows, counts = [], {"passed": 0, "failed": 0, "not applicable": 0}
    for target in targets:
        for outcome in contract.run_kit(target):
            counts[outcome.status] += 1
            if all_checks or outcome.status == "failed":
                rows.append((target.pattern, target.backend, outcome.check, outcome.status, outcome.detail))
    title = f"{kind.spec.id}: " + ", ".join(f"{count} {word}" for word, count in counts.items())
    return _table(title, ("pattern", "backend", "check", "outcome", "detail"), rows), counts["failed"]


def environment_json() -> dict[str, Any]:
    """The environment of a CPU run, the backends and the peers, as plain values."""
    return {
        "environment": environment.capture("cpu"),
        "backends": {t[0]: t[1:] for t in _backend_rows()},
        "peers": environment.peers(),
    }


def environment_tables() -> list[Table]:
    """The same as tables."""
    facts = [
        (name, value) for name, value in sorted(environment.capture("cpu").items()) if value not in (None, "")
    ]
    peers = [(name, state) for name, state in environment.peers().items()]
    return [
        _table("Environment", ("what", "value"), facts),
        _table("Backends of the operations", ("backend", "cpu", "cuda", "operations"), _backend_rows()),
        _table("Peers", ("backend", "library and version, or why it is absent"), peers),
    ]


def _backend_rows() -> list[tuple[str, str, str, str]]:
    names = dict.fromkeys(name for op in OPS.values() for name in op.backends)
    rows = []
    for name in names:
        states = []
        for device in ("cpu", "cuda"):
            support = available(name, device)
            states.append("yes" if support else support.reason)
        ops = ", ".join(op.name for op in OPS.values() if name in op.backends)
        rows.append((name, states[0], states[1], ops))
    return rows


def _ops(spec: Spec) -> list[str]:
    return list(dict.fromkeys(op for p in spec.patterns for op in spec.ops_for(Pattern(p))))


def _peers(spec: Spec) -> list[str]:
    kind = registry.mechanism(spec.id)
    found = dict.fromkeys(b for p in spec.patterns for b in kind.backends(p))
    return [name for name in found if name not in OWN]


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[str] = ()
) -> Table:
    """A table whose records are ``rows`` under ``header``; None is shown as a dash, a list by its items."""
    columns = [Column(name, partial(_cell, name), name in numeric) for name in header]
    return build_table(title, columns, [dict(zip(header, row, strict=True)) for row in rows])


def _cell(name: str, record: Record) -> str:
    return "–" if record[name] is None else str(record[name])
