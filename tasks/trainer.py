"""One training loop for every task: AdamW, warm-up and cosine, clipping, and a clear end when it fails."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbench.tasks.base import TrainingDiverged

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps planned and the loss."""

CHECK_EVERY = 10
"""Steps between two looks at the loss: reading it waits for the device."""


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained.

    ``lr`` rises linearly over ``warmup`` steps and falls along half a cosine to ``lr·final`` at ``steps``.
    Weight decay acts on matrices, not on vectors. Training that lasts longer than ``max_seconds`` ends
    there, evaluation excluded.
    """

    steps: int
    lr: float
    warmup: int
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    max_seconds: float = math.inf


@dataclass(frozen=True)
class Trained:
    """What a training run took. ``complete`` is False when the time limit cut it short."""

    steps: int
    train_s: float
    tokens_per_s: float
    loss: float
    complete: bool


def seed_of(seed: int, purpose: str) -> int:
    """An independent 63-bit seed for one purpose (data, init, order, noise) of the run's ``seed``."""
    digest = hashlib.sha256(f"attnbench/{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0)."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (recipe.final + (1.0 - recipe.final) * 0.5 * (1.0 + math.cos(math.pi * done)))


def train(
    model: nn.Module,
    batches: Callable[[], Tensor],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    recipe: Recipe,
    tokens_per_step: int,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Trained:
    """Train ``model`` in place.

    On one thread of a CPU the result is a function of model, batches and torch's global generator alone.
    Raises TrainingDiverged at the first look (every ``CHECK_EVERY`` steps) that finds a non-finite loss.
    """
    model.train()
    optimizer = _optimizer(model, recipe)
    start, value, done = clock(), math.nan, 0
    while done < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, done)
        loss = loss_of(model, batches())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        done += 1
        if done % CHECK_EVERY == 0 or done == recipe.steps:
            value = _finite(loss, done - 1)
            if progress is not None:
                progress(done, recipe.steps, value)
            if clock() - start > recipe.max_seconds:
                break
    seconds = clock() - start
    return Trained(done, seconds, done * tokens_per_step / seconds, value, done == recipe.steps)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingDiverged(step, value)
    return value
