"""One training loop for every task: AdamW, a schedule, clipping, checkpoints, a clear end when it fails."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnbench.tasks.base import Batch, TrainingDiverged

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps planned and the loss."""

CHECK_EVERY = 10
"""Steps between two looks at the loss: reading it waits for the device."""


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained.

    ``lr`` rises linearly over ``warmup`` steps; from there it falls to ``lr·final`` at ``steps``, along half
    a cosine or a line, or as the inverse square root of the step (which knows no ``final``). Weight decay
    acts on matrices, not on vectors. A step sums the gradients of ``accumulate`` batches. ``dtype`` is the
    arithmetic of the forward on a GPU (autocast); a CPU always computes in fp32. Training that lasts longer
    than ``max_seconds`` ends there, evaluation excluded.
    """

    steps: int
    lr: float
    warmup: int
    final: float = 0.0
    schedule: Literal["cosine", "linear", "inverse_sqrt"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
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
    if recipe.schedule == "inverse_sqrt":
        return recipe.lr * math.sqrt(max(1, recipe.warmup) / (step + 1))
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    left = 1.0 - done if recipe.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return recipe.lr * (recipe.final + (1.0 - recipe.final) * left)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a training writes its state, to go on from there after it was killed."""

    path: Path
    every_s: float = 60.0

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: int, seconds: float) -> None:
        """Write the state after ``done`` steps in place of the last one, or leave the last one whole."""
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "done": done,
            "seconds": seconds,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Steps done and seconds spent; (0, 0) without a checkpoint. Only tensors and numbers are read."""
        if not self.path.is_file():
            return 0, 0.0
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return state["done"], state["seconds"]

    def clear(self) -> None:
        """Remove the checkpoint of a training that is over."""
        self.path.unlink(missing_ok=True)


def train(
    model: nn.Module,
    batches: Callable[[], Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    recipe: Recipe,
    tokens_per_step: int,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train ``model`` in place.

    On one thread of a CPU the result is a function of model, batches and torch's global generator alone, and
    the same when the training was cut at a checkpoint and resumed: the batches of the steps done are drawn
    again and thrown away. ``tokens_per_step`` counts those of one batch. Raises TrainingDiverged at the first
    look (every ``CHECK_EVERY`` steps) that finds a non-finite loss.
    """
    model.train()
    optimizer = _optimizer(model, recipe)
    done, before = checkpoints.restore(model, optimizer) if checkpoints else (0, 0.0)
    resumed = done
    for _ in range(done * recipe.accumulate):
        batches()
    start = saved = clock()
    value = math.nan
    while done < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, done)
        loss = _step(model, optimizer, batches, loss_of, recipe)
        done += 1
        if done % CHECK_EVERY == 0 or done == recipe.steps:
            value = _finite(loss, done - 1)
            if progress is not None:
                progress(done, recipe.steps, value)
            now = clock()
            if before + now - start > recipe.max_seconds:
                break
            if checkpoints and now - saved > checkpoints.every_s:
                checkpoints.save(model, optimizer, done, before + now - start)
                saved = now
    here = clock() - start
    tokens = (done - resumed) * recipe.accumulate * tokens_per_step
    return Trained(done, before + here, tokens / here if here else 0.0, value, done == recipe.steps)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    recipe: Recipe,
) -> Tensor:
    """One update; returns the mean loss of its batches."""
    optimizer.zero_grad(set_to_none=True)
    total: Tensor | None = None
    for _ in range(recipe.accumulate):
        with precision(model, recipe):
            loss = loss_of(model, batches()) / recipe.accumulate
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    assert total is not None
    return total


def precision(model: nn.Module, recipe: Recipe) -> torch.autocast:
    """Autocast to the recipe's dtype on a GPU; nothing on a CPU. Training and evaluation share it."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and recipe.dtype == "bfloat16")


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingDiverged(step, value)
    return value
