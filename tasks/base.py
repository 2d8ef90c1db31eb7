"""What a task is: the data, the model around the attention under test, the metric, the learning check.

A task trains a small model whose only variable part is the attention, so that the difference of two scores
is the difference of two mechanisms. Imports no torch at run time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attnbench.errors import AttnbenchError, unknown_name
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnbench.impls.base import Attention
    from attnbench.tasks.trainer import Recipe

Batch = Any
"""What a session's batches yield and its loss takes: a tensor, or a tuple of tensors."""


class BuildAttention(Protocol):
    """Builds the attention under test for one layer; who provides it seeds each layer."""

    def __call__(self, layer: int, shape: Shape | None = None) -> Attention:
        """The module of layer ``layer``; ``shape`` where it differs from the shape of the preset."""
        ...


class TrainingDiverged(AttnbenchError):
    """The loss stopped being a finite number. ``step`` counts optimiser steps from 0."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"training diverged: observed loss {loss} at step {step}, expected a finite loss")
        self.step, self.loss = step, loss


@dataclass(frozen=True)
class Shape:
    """What the attention of a task sees: ``workload`` with N queries and M keys.

    ``grid`` is the grid that the tokens really lie on, row by row; empty for a sequence.
    """

    workload: Workload
    n: int
    m: int
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """The data of one run: its name, where it comes from, and the SHA-256 of its content."""

    name: str
    origin: Literal["real", "embedded", "synthetic"]
    fingerprint: str

    @property
    def label(self) -> str:
        """What a row stores, e.g. ``embedded: python help topics``."""
        return f"{self.origin}: {self.name}"


@dataclass(frozen=True)
class LearningCheck:
    """Limits that prove that a preset tests attention: softmax on one side, no mixing on the other.

    ``softmax`` is the score that softmax attention must beat, ``no_mixing`` the one that a model whose
    tokens cannot exchange information must fail to reach.
    """

    softmax: float
    no_mixing: float

    def problems(self, better: str, softmax: float, no_mixing: float) -> list[str]:
        """What is wrong with two observed scores, in words; empty when the preset learns as it should."""
        sign = 1.0 if better == "lower" else -1.0
        found = []
        if sign * softmax >= sign * self.softmax:
            found.append(f"softmax scored {softmax:.4g}, expected {better} than {self.softmax:g}")
        if sign * no_mixing <= sign * self.no_mixing:
            found.append(f"no_mixing scored {no_mixing:.4g}: {better} than {self.no_mixing:g} is a leak")
        return found


class Session(ABC):
    """One preset of a task, with its data loaded on a device: what the trainer and the evaluation call."""

    corpus: Corpus
    tokens_per_step: int

    @abstractmethod
    def model(self, attention: BuildAttention) -> nn.Module:
        """The model around the given attention modules, initialised from torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Callable[[], Batch]:
        """A source of training batches that ``seed`` alone determines, however often it was called before."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of one batch, a scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """All metrics on the whole test part; the task's headline metric is among them.

        A metric at another length or load is named ``metric@n=512`` or ``metric@pairs=16``: figures of
        accuracy against length are drawn from these names.
        """


@dataclass(frozen=True)
class Preset:
    """One size of a task; tasks add the dimensions of their model.

    ``shape`` is what the attention under test sees; a task whose patterns see different shapes overrides
    :meth:`Task.workload`. ``checks`` holds the patterns that the preset was shown to discriminate.
    """

    shape: Shape
    recipe: Recipe
    checks: Mapping[Pattern, LearningCheck]


@dataclass(frozen=True)
class Task(ABC):
    """A training-and-evaluation problem with one headline metric.

    ``data`` says in words what is learned from, ``source`` where the problem was published.
    """

    id: str
    title: str
    patterns: tuple[Pattern, ...]
    metric: str
    better: Literal["lower", "higher"]
    presets: Mapping[str, Preset]
    data: str
    source: str

    def preset(self, name: str) -> Preset:
        """A preset by name; UsageError with the ones that exist."""
        if name not in self.presets:
            raise unknown_name(f"preset of task {self.id}", name, self.presets)
        return self.presets[name]

    def workload(self, preset: str, pattern: Pattern) -> Shape:
        """The shape that the attention under test sees in ``preset`` when it stands for ``pattern``."""
        return self.preset(preset).shape

    @abstractmethod
    def open(self, preset: str, pattern: Pattern, device: str) -> Session:
        """Load the data of ``preset`` onto ``device``, for a model whose ``pattern`` is under test.

        All other attention of the model is softmax attention (:func:`attnbench.tasks.controls.softmax`).
        """
