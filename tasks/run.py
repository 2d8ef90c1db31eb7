"""Train and evaluate one mechanism on one task: the columns of a task's row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention
from attnbench.impls.case import fold
from attnbench.impls.spec import Pattern
from attnbench.kernels import Unsupported, recording
from attnbench.tasks import controls, registry
from attnbench.tasks.base import BuildAttention, Session, Shape, Task, TrainingDiverged
from attnbench.tasks.trainer import Checkpoints, Progress, Trained, precision, seed_of, train

PARAMETER_LIMIT = 1.1
"""CAB's rule: a mechanism may add a tenth to the parameters of the model with softmax attention."""


def run_task(
    task: str,
    mechanism: str,
    *,
    backend: str = "auto",
    pattern: Pattern | str | None = None,
    preset: str = "tiny",
    seed: int = 0,
    device: str = "cpu",
    hyper: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train ``mechanism`` (an id, an entry point, a file.py:Class or a control) on ``task`` and evaluate it.

    ``pattern`` defaults to the task's first. Seeds of initialisation, order and noise are derived from
    ``seed``, so that two mechanisms share the initial weights of all but their own parameters and see the
    same batches; torch's global generator is left as it was. With ``checkpoint`` a training that was killed
    goes on from that file, which is removed when the training is over. Returns columns of a row by name.

    Raises UsageError for an unknown name, preset, pattern or hyper-parameter, TrainingDiverged when the loss
    or the metric is not finite, Unsupported for a mechanism that needs inputs which no task has, and what the
    backend raises.
    """
    found = registry.task(task)
    chosen = _pattern(found, pattern)
    recipe = found.preset(preset).recipe
    shape = found.workload(preset, chosen)
    session = found.open(preset, chosen, device)
    builder = _attention_of(shape, mechanism, chosen, backend, seed, hyper or {})
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed_of(seed, "init"))
        model = session.model(builder).to(device)
        torch.manual_seed(seed_of(seed, "noise"))
        _reset_peak(device)
        checkpoints = Checkpoints(checkpoint) if checkpoint else None
        with recording() as used:
            trained = train(
                model,
                session.batches(seed_of(seed, "order")),
                session.loss,
                recipe,
                session.tokens_per_step,
                progress,
                checkpoints=checkpoints,
            )
        peak = _peak_bytes(device)
        model.eval()
        with precision(model, recipe):
            metrics = session.evaluate(model)
        if checkpoints:
            checkpoints.clear()
    value = metrics[found.metric]
    if not math.isfinite(value):
        raise TrainingDiverged(trained.steps, value)
    params, params_softmax = _count(model), _softmax_parameters(session, shape, chosen)
    check = found.preset(preset).checks.get(chosen)
    return {
        "task": found.id,
        "n": shape.n,
        "m": shape.m,
        "grid": list(_grid_of(mechanism, shape)),
        "geometry": _geometry(mechanism, shape),
        "metric": found.metric,
        "metric_value": value,
        "metric_better": found.better,
        "metrics": _as_json(metrics),
        "check_softmax": check.softmax if check else None,
        "check_no_mixing": check.no_mixing if check else None,
        "steps": trained.steps,
        "train_s": trained.train_s,
        "tokens_per_s": trained.tokens_per_s,
        "mem_peak_bytes": peak,
        "params": params,
        "params_softmax": params_softmax,
        "data": session.corpus.label,
        "data_fingerprint": session.corpus.fingerprint,
        "control": mechanism in controls.NAMES,
        "ops_used": sorted({f"{op}/{name}" for op, name in used}),
        "flags": _flags(trained, recipe.steps, params, params_softmax),
    }


def _pattern(task: Task, pattern: Pattern | str | None) -> Pattern:
    if pattern is None:
        return task.patterns[0]
    if pattern not in task.patterns:
        raise UsageError(f"task {task.id}: observed pattern {pattern}, expected {', '.join(task.patterns)}")
    return Pattern(pattern)


def _attention_of(
    shape: Shape, mechanism: str, pattern: Pattern, backend: str, seed: int, hyper: Mapping[str, Any]
) -> BuildAttention:
    """Builds a layer from a seed of its own and leaves the generator to the rest of the model."""
    reason = controls.why_not(mechanism, shape.workload.name)
    if reason:
        raise Unsupported(mechanism, reason, "a mechanism that needs x and a context only")
    preset_shape = shape

    def build(layer: int, shape: Shape | None = None) -> Attention:
        seen = preset_shape if shape is None else shape
        w = seen.workload
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, f"attention/{layer}"))
            module = controls.build_attention(
                mechanism, w.width, w.heads, pattern=pattern, backend=backend, n=seen.n, m=seen.m, **hyper
            )
        if 1 not in module.spec.grid_ranks:
            module.register_forward_pre_hook(_fold, with_kwargs=True)
        return module

    return build


def _fold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a mechanism for grids the grid that its tokens fold into, where the model is a sequence to it."""
    assert isinstance(module, Attention)
    x, context = args[0], args[1] if len(args) > 1 else kwargs.get("context")
    given = kwargs.get("grid")
    ranks = module.spec.grid_ranks
    kwargs["grid"] = fold(x.shape[1], 1, ranks) if given is None or len(given) not in ranks else given
    if context is not None and module.spec.grid_kv and kwargs.get("grid_kv") is None:
        kwargs["grid_kv"] = fold(context.shape[1], 1, ranks)
    return args, kwargs


def _grid_of(mechanism: str, shape: Shape) -> tuple[int, ...]:
    """The grid that the mechanism sees: the task's own, or what a sequence is folded into; () for none."""
    ranks = controls.attention_class(mechanism).spec.grid_ranks
    if len(shape.grid) in ranks:
        return shape.grid
    return fold(shape.n, 1, ranks)


def _geometry(mechanism: str, shape: Shape) -> str | None:
    grid = _grid_of(mechanism, shape)
    return None if not grid else "native" if grid == shape.grid else "folded"


def _as_json(metrics: Mapping[str, float]) -> str:
    """All metrics by name; one that is not finite is null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in sorted(metrics.items())})


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int | None:
    """Peak of allocated GPU memory since the reset; a CPU does not count."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _softmax_parameters(session: Session, shape: Shape, pattern: Pattern) -> int:
    """Parameters of the same model with softmax attention; nothing is allocated."""
    with torch.device("meta"):
        return _count(session.model(_attention_of(shape, "softmax", pattern, "auto", 0, {})))


def _flags(trained: Trained, planned: int, params: int, params_softmax: int) -> list[str]:
    found = []
    if not trained.complete:
        found.append(
            f"stopped_early: observed {trained.steps} steps in {trained.train_s:.0f} s, limit {planned} steps"
        )
    if params > PARAMETER_LIMIT * params_softmax:
        extra = 100.0 * (params / params_softmax - 1.0)
        found.append(f"parameters: observed {extra:+.1f} % of the softmax model, limit +10 %")
    return found
