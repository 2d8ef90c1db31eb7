"""One session for every task of this suite: train on one load, score at it and at others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.kernels import Unsupported
from attnbench.tasks.base import BuildAttention, Corpus, Preset, Session, Shape, Task
from attnbench.tasks.blocks import TokenModel
from attnbench.tasks.data.pool import epochs, fingerprint
from attnbench.tasks.recall._generate import IGNORED, Problem, Samples, drawn

DEPTHS = 10
"""Bins of the depth at which a needle lies."""

EFFECTIVE = 0.9
"""Accuracy up to which a length counts as served."""


@dataclass(frozen=True)
class RecallPreset(Preset):
    """A problem with a pool of training samples, the loads to score at, and the model's dimensions.

    ``loads`` are names as ``n=256`` or ``pairs=8`` with the problem at that load; ``problem``, which is
    trained on, is one of them. Positions are sine waves, which every length has.
    """

    problem: Problem
    loads: Mapping[str, Problem]
    pool: int
    tests: int
    layers: int
    ratio: int
    eval_batch: int
    std: float = 0.3


class RecallSession(Session):
    """Samples of a preset on a device: a pool to train on, fresh ones at every load to score."""

    def __init__(self, preset: RecallPreset, task: str, device: str) -> None:
        self.preset, self.device = preset, device
        train, trained = drawn(preset.problem, "train", preset.pool)
        self.tokens, self.labels = (torch.from_numpy(x).to(device) for x in (train.tokens, train.labels))
        self.loads = {name: drawn(load, "test", preset.tests) for name, load in preset.loads.items()}
        parts = [trained, *(of_load for _, of_load in self.loads.values())]
        self.corpus = Corpus(f"{task}, {preset.problem!r}", "synthetic", fingerprint("/".join(parts)))
        self.tokens_per_step = preset.shape.workload.batch * preset.problem.length

    def model(self, attention: BuildAttention) -> nn.Module:
        """A causal model over tokens around ``layers`` attention modules."""
        p = self.preset
        attentions = [attention(layer) for layer in range(p.layers)]
        vocabulary = max(load.vocabulary for load in p.loads.values())
        return TokenModel(vocabulary, p.shape.n, attentions, ratio=p.ratio, std=p.std, positions="sinusoidal")

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, ...]]:
        """Batches (tokens, labels) out of the pool, each epoch in another order."""
        return epochs((self.tokens, self.labels), self.preset.shape.workload.batch, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross entropy of the positions that are asked, in nats."""
        tokens, labels = batch
        asked = labels != IGNORED
        return F.cross_entropy(model(tokens, asked), labels[asked].long())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy per asked position, and ``exact``: the share of sequences with every position right.

        Both at every load, as ``accuracy@n=256``; without a load for the one that was trained on. Where
        depths are known, ``accuracy@n=256,depth=30`` is that of needles 30 to 40 % into the sequence, and
        ``effective_n`` the longest length served with an accuracy of 0.9, 0 for none. A load that the
        mechanism refuses (a table of a fixed length) is nan.
        """
        model.eval()
        found: dict[str, float] = {}
        for name, load in self.preset.loads.items():
            samples = self.loads[name][0]
            trained = load == self.preset.problem
            scores = self._score(model, samples, strict=trained)
            found |= {f"{key}@{name}{suffix}": value for (key, suffix), value in scores.items()}
            if trained:
                found |= {key: value for (key, suffix), value in scores.items() if not suffix}
        if any(samples.depth is not None for samples, _ in self.loads.values()):
            served = [
                load.length
                for name, load in self.preset.loads.items()
                if found[f"accuracy@{name}"] >= EFFECTIVE
            ]
            found["effective_n"] = float(max(served, default=0))
        return found

    def _score(self, model: nn.Module, samples: Samples, strict: bool) -> dict[tuple[str, str], float]:
        """Metrics by (name, suffix of the load)."""
        try:
            right = self._right(model, samples)
        except (UsageError, Unsupported):
            if strict:
                raise
            right = torch.full(samples.labels.shape, math.nan)
        asked = torch.from_numpy(samples.labels != IGNORED)
        exact = torch.where(asked, right, 1.0).amin(1)
        found = {("accuracy", ""): right[asked].mean().item(), ("exact", ""): exact.mean().item()}
        if samples.depth is not None:
            bins = (torch.from_numpy(samples.depth) * DEPTHS).long()
            for index in range(DEPTHS):
                there = right[asked & (bins == index)]
                found["accuracy", f",depth={100 * index // DEPTHS}"] = there.mean().item()
        return found

    def _right(self, model: nn.Module, samples: Samples) -> Tensor:
        """1.0 where an answer is right, 0.0 elsewhere, (S, N) on the CPU."""
        right = torch.zeros(samples.labels.shape)
        size = self.preset.eval_batch
        for start in range(0, len(right), size):
            rows = slice(start, start + size)
            tokens, labels = (
                torch.from_numpy(x[rows]).to(self.device) for x in (samples.tokens, samples.labels)
            )
            asked = labels != IGNORED
            answers = model(tokens, asked).argmax(-1) == labels[asked]
            right[rows][asked.cpu()] = answers.float().cpu()
        return right


@dataclass(frozen=True)
class RecallTask(Task):
    """A task of this suite; see ``data`` and the module of its presets."""

    def open(self, preset: str, pattern: Pattern, device: str) -> RecallSession:
        """Draw the samples of ``preset``. Raises UsageError for an unknown preset."""
        chosen = self.preset(preset)
        assert isinstance(chosen, RecallPreset)
        return RecallSession(chosen, self.id, device)


def shape(task: str, preset: str, batch: int, heads: int, head_dim: int, n: int) -> Shape:
    """What the attention of a task of this suite sees."""
    workload = Workload(
        name=f"{task}_{preset}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model=f"token model of the task {task}",
        source=f"attnbench/tasks/recall/{task}.py",
    )
    return Shape(workload, n, n)
