"""One session for every task of this suite: sequences of tokens, or pairs of them, to a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, Corpus, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import TokenModel
from attnbench.tasks.data.pool import epochs, fingerprint
from attnbench.tasks.trainer import Recipe


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences (S, N), or pairs (S, 2, N), of tokens with a class (S,) each.

    ``lengths`` (S,) or (S, 2) counts the tokens that are no padding; None where none is.
    """

    tokens: NDArray[Any]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Data:
    """Training and test part of a problem."""

    train: Examples
    test: Examples
    corpus: Corpus


class Problem(Protocol):
    """A data set at one difficulty: a frozen dataclass whose fields are the dials."""

    @property
    def length(self) -> int:
        """Tokens of a sequence with its padding, N."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def pairs(self) -> bool:
        """Whether an example is a pair of sequences."""
        ...

    def __hash__(self) -> int:
        """Equal problems are one: their data are drawn once."""
        ...

    def load(self) -> Data:
        """Draw or read the examples. Raises UsageError where they are not on this machine."""
        ...


@lru_cache(maxsize=2)
def loaded(problem: Problem) -> Data:
    """The data of ``problem``, kept for the next run on it."""
    return problem.load()


def synthetic(name: str, problem: Problem, train: Examples, test: Examples) -> Data:
    """Data that were generated here, with the fingerprint of their content."""
    return Data(train, test, Corpus(f"{name}, {problem!r}", "synthetic", content(problem, train, test)))


def content(problem: Problem, *parts: Examples) -> str:
    """SHA-256 of the problem's dials and of the content of ``parts``."""
    return fingerprint(repr(problem), *(x for part in parts for x in (part.tokens, part.labels)))


@dataclass(frozen=True)
class ArenaPreset(Preset):
    """A problem and the dimensions of the model, an encoder with a token in front that is read."""

    problem: Problem
    layers: int
    ratio: int
    eval_batch: int
    std: float = 0.3
    dropout: float = 0.0


class Classifier(TokenModel):
    """A class for a whole sequence, read off one more token that is put in front of it.

    What is not mixed never reaches that token: without attention the output is the same for every input.
    """

    def __init__(self, preset: ArenaPreset, attentions: list[Attention]) -> None:
        problem = preset.problem
        super().__init__(
            problem.vocabulary + 1,
            problem.length + 1,
            attentions,
            outputs=problem.classes,
            ratio=preset.ratio,
            std=preset.std,
            dropout=preset.dropout,
        )
        self.front = problem.vocabulary

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of ``tokens`` (B, N); ``where`` (B, N), when given, is True at real tokens."""
        return self.head(self.summary(tokens, where))

    def summary(self, tokens: Tensor, where: Tensor | None) -> Tensor:
        """The features (B, C) of the token in front."""
        front = tokens.new_full((len(tokens), 1), self.front)
        padding = None if where is None else ~F.pad(where, (1, 0), value=True)
        return self.features(self.embed(torch.cat([front, tokens], 1)), padding)[:, 0]


class TwoTowers(Classifier):
    """A class for a pair of sequences: a network over a, b, a·b and a − b of their separate features."""

    def __init__(self, preset: ArenaPreset, attentions: list[Attention]) -> None:
        super().__init__(preset, attentions)
        width = attentions[0].embed_dim
        self.compare = nn.Sequential(nn.Linear(4 * width, width), nn.GELU())

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of pairs (B, 2, N); ``where`` (B, 2, N), when given, is True at real tokens."""
        both = self.summary(tokens.flatten(0, 1), None if where is None else where.flatten(0, 1))
        a, b = both.unflatten(0, (-1, 2)).unbind(1)
        return self.head(self.compare(torch.cat([a, b, a * b, a - b], 1)))


class ArenaSession(Session):
    """The examples of a preset on a device."""

    def __init__(self, preset: ArenaPreset, device: str) -> None:
        self.preset = preset
        data = loaded(preset.problem)
        self.corpus = data.corpus
        self.train, self.test = (
            tuple(torch.from_numpy(x).to(device) for x in _columns(part)) for part in (data.train, data.test)
        )
        self.padded = data.train.lengths is not None
        self.tokens_per_step = preset.shape.workload.batch * int(np.prod(data.train.tokens.shape[1:]))

    def model(self, attention: BuildAttention) -> nn.Module:
        """A classifier of sequences, or of pairs of them, around ``layers`` attention modules."""
        attentions = [attention(layer) for layer in range(self.preset.layers)]
        kind = TwoTowers if self.preset.problem.pairs else Classifier
        return kind(self.preset, attentions)

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, ...]]:
        """Batches (tokens, labels, lengths) of the training part, each epoch in another order."""
        return epochs(self.train, self.preset.shape.workload.batch, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross entropy, in nats."""
        tokens, labels, lengths = batch
        return F.cross_entropy(self._logits(model, tokens, lengths), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test part."""
        model.eval()
        right = 0
        for tokens, labels, lengths in zip(
            *(x.split(self.preset.eval_batch) for x in self.test), strict=True
        ):
            right += int((self._logits(model, tokens, lengths).argmax(-1) == labels).sum())
        return {"accuracy": right / len(self.test[0])}

    def _logits(self, model: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        where = positions < lengths[..., None] if self.padded else None
        return model(tokens.long(), where)


def _columns(part: Examples) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    lengths = part.lengths
    if lengths is None:
        lengths = np.full(part.tokens.shape[:-1], part.tokens.shape[-1])
    return part.tokens, part.labels, lengths


@dataclass(frozen=True)
class ArenaTask(Task):
    """A task of this suite; see ``data`` and the module of its presets."""

    def open(self, preset: str, pattern: Pattern, device: str) -> ArenaSession:
        """Load the examples of ``preset``.

        Raises UsageError for an unknown preset and for data that are not on this machine.
        """
        chosen = self.preset(preset)
        assert isinstance(chosen, ArenaPreset)
        return ArenaSession(chosen, device)


def arena_preset(
    task: str,
    name: str,
    problem: Problem,
    recipe: Recipe,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    layers: int,
    ratio: int,
    eval_batch: int,
    dropout: float = 0.0,
    check: LearningCheck | None = None,
) -> ArenaPreset:
    """A preset, its shape derived from the problem: one token more than its length."""
    workload = Workload(
        name=f"{task}_{name}",
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        model=f"sequence classifier of the task {task}",
        source=f"attnbench/tasks/lra/{task}.py",
    )
    return ArenaPreset(
        shape=Shape(workload, problem.length + 1, problem.length + 1),
        recipe=recipe,
        checks={Pattern.NS: check} if check else {},
        problem=problem,
        layers=layers,
        ratio=ratio,
        eval_batch=eval_batch,
        dropout=dropout,
    )
