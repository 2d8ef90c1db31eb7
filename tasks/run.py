"""Train and evaluate one mechanism on one task: the columns of a task's row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention
from attnbench.impls.spec import Pattern
from attnbench.kernels import recording
from attnbench.tasks import controls, registry
from attnbench.tasks.base import BuildAttention, Session, Shape, Task, TrainingDiverged
from attnbench.tasks.trainer import Progress, Trained, seed_of, train

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
) -> dict[str, Any]:
    """Train ``mechanism`` (an id, an entry point, a file.py:Class or a control) on ``task`` and evaluate it.

    ``pattern`` defaults to the task's first. Seeds of initialisation, order and noise are derived from
    ``seed``, so that two mechanisms share the initial weights of all but their own parameters and see the
    same batches; torch's global generator is left as it was. Returns columns of a row by name.

    Raises UsageError for an unknown name, preset, pattern or hyper-parameter, TrainingDiverged when the loss
    or the metric is not finite, and what the backend raises.
    """
    found = registry.task(task)
    chosen = _pattern(found, pattern)
    shape = found.workload(preset)
    session = found.open(preset, device)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed_of(seed, "init"))
        model = session.model(_attention_of(shape, mechanism, chosen, backend, seed, hyper or {})).to(device)
        torch.manual_seed(seed_of(seed, "noise"))
        with recording() as used:
            trained = train(
                model,
                session.batches(seed_of(seed, "order")),
                session.loss,
                found.preset(preset).recipe,
                session.tokens_per_step,
                progress,
            )
        value = session.evaluate(model)[found.metric]
    if not math.isfinite(value):
        raise TrainingDiverged(trained.steps, value)
    params, params_softmax = _count(model), _softmax_parameters(session, shape, chosen)
    return {
        "task": found.id,
        "n": shape.n,
        "m": shape.m,
        "metric": found.metric,
        "metric_value": value,
        "metric_better": found.better,
        "steps": trained.steps,
        "train_s": trained.train_s,
        "tokens_per_s": trained.tokens_per_s,
        "params": params,
        "params_softmax": params_softmax,
        "data": session.corpus.label,
        "data_fingerprint": session.corpus.fingerprint,
        "control": mechanism in controls.NAMES,
        "ops_used": sorted({f"{op}/{name}" for op, name in used}),
        "flags": _flags(trained, found.preset(preset).recipe.steps, params, params_softmax),
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

    def build(layer: int) -> Attention:
        w = shape.workload
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, f"attention/{layer}"))
            return controls.build_attention(
                mechanism, w.width, w.heads, pattern=pattern, backend=backend, n=shape.n, m=shape.m, **hyper
            )

    return build


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
