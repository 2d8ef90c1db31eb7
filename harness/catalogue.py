"""What the site says of mechanisms, tasks, workloads and devices beside their results, as plain values.

The site imports no torch; the command line makes this from the Specs, which do, and hands it over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from attnbench.harness import devices
from attnbench.impls import registry
from attnbench.impls.spec import Hyper, Input, Pattern, Spec
from attnbench.tasks import registry as task_registry
from attnbench.tasks import workloads
from attnbench.tasks.base import Preset, Task

Plain = dict[str, Any]


def catalogue() -> dict[str, dict[str, Plain]]:
    """``mechanisms``, ``tasks``, ``workloads`` and ``devices``: name → facts that JSON can hold.

    Imports every mechanism, and torch with them.
    """
    found = {
        "mechanisms": {name: _mechanism(registry.mechanism(name).spec) for name in registry.ids()},
        "tasks": {name: _task(task_registry.task(name)) for name in task_registry.ids()},
        "workloads": {entry.workload.name: _workload(entry) for entry in workloads.entries()},
        "devices": {name: _device(hardware) for name, hardware in devices.table().items()},
    }
    plain: dict[str, dict[str, Plain]] = json.loads(json.dumps(found, default=str))
    return plain


def _mechanism(spec: Spec) -> Plain:
    kind = registry.mechanism(spec.id)
    return {
        "name": spec.name,
        "family": spec.family,
        "kind": spec.kind,
        "paper": {**asdict(spec.paper), "url": spec.paper.url},
        "upstream": spec.upstream,
        "patterns": [str(pattern) for pattern in spec.patterns],
        "backends": {str(p): list(kind.backends(p)) for p in spec.patterns},
        "ops": {str(p): list(spec.ops_for(Pattern(p))) for p in spec.patterns},
        "hot_loop": spec.hot_loop,
        "summary": spec.summary,
        "formula": spec.formula,
        "cost": spec.cost,
        "exact": spec.exact,
        "row_sum": spec.row_sum,
        "causality": spec.causality,
        "stochastic": spec.stochastic,
        "grid_ranks": list(spec.grid_ranks),
        "lengths": spec.lengths,
        "padding": spec.padding,
        "square_heads": spec.square_heads,
        "forward_only": spec.forward_only,
        "on_tensors": spec.on_tensors,
        "hyper": [_hyper(hyper) for hyper in spec.hyper],
        "inputs": [_input(found) for found in spec.inputs],
        "deviations": list(spec.deviations),
        "confidence": spec.confidence,
        "module": kind.__module__,
    }


def _hyper(hyper: Hyper) -> Plain:
    shown = {"name": hyper.name, "meaning": hyper.meaning, "default": repr(hyper.default)}
    return {**shown, "choices": [repr(choice) for choice in hyper.choices]}


def _input(found: Input) -> Plain:
    return {"name": found.name, "meaning": found.meaning, "shape": found.shape}


def _task(task: Task) -> Plain:
    return {
        "title": task.title,
        "suite": task_registry.suite_of(task.id),
        "patterns": [str(pattern) for pattern in task.patterns],
        "metric": task.metric,
        "better": task.better,
        "data": task.data,
        "source": task.source,
        "presets": {name: _preset(preset) for name, preset in task.presets.items()},
    }


def _preset(preset: Preset) -> Plain:
    recipe: Mapping[str, Any] = asdict(preset.recipe)
    return {
        "workload": preset.shape.workload.name,
        "n": preset.shape.n,
        "m": preset.shape.m,
        "recipe": dict(recipe),
        "checks": {str(pattern): asdict(check) for pattern, check in preset.checks.items()},
    }


def _workload(entry: workloads.WorkloadEntry) -> Plain:
    return {
        **asdict(entry.workload),
        "patterns": [str(pattern) for pattern in entry.patterns],
        "suites": list(entry.suites),
    }


def _device(hardware: devices.Hardware) -> Plain:
    return {
        "title": hardware.title,
        "tflops": dict(hardware.tflops),
        "bandwidth_gbps": hardware.bandwidth_gbps,
        "memory_gb": hardware.memory_gb,
        "l2_mib": hardware.l2_mib,
        "last_level_mib": hardware.last_level_mib,
        "sms": hardware.sms,
        "torch_names": list(hardware.torch_names),
        "source": hardware.source,
    }
