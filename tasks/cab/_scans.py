"""Pairs of a partial scan and the whole surface: from analytic shapes, or from the PCN set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from attnbench.tasks.base import Corpus
from attnbench.tasks.data import pool, shapes, sources
from attnbench.tasks.data.loaders.clouds import PCN, Points

Pair = tuple[Tensor, Tensor]
"""Scans (B, P, 3) and whole surfaces (B, Q, 3)."""


@dataclass(frozen=True)
class Clouds:
    """Which pairs a preset learns from; ``shapes`` None means PCN. ``scanned`` is P."""

    scanned: int
    shapes: shapes.Shapes | None


class Scans(Protocol):
    """What a session needs of its data."""

    corpus: Corpus

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Training pairs that ``seed`` alone determines."""
        ...

    def test(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Scans (1, P, 3), whole surfaces (Q, 3) and categories, one after the other, always the same."""
        ...


def load(clouds: Clouds, device: str) -> Scans:
    """The data of a preset. Raises DataMissing where it asks for PCN and PCN is not here."""
    if clouds.shapes is None:
        return PCNScans(clouds.scanned, device)
    return ShapeScans(clouds.scanned, clouds.shapes, device)


class ShapeScans:
    """Analytic shapes: every step sees each cloud of its batch from a new random viewpoint."""

    def __init__(self, scanned: int, dials: shapes.Shapes, device: str) -> None:
        self.scanned = scanned
        self.train_part, _ = (x.to(device) for x in shapes.clouds(dials, "train"))
        self.test_part, self.families = shapes.clouds(dials, "test")
        self.corpus = Corpus(
            f"{len(shapes.FAMILIES)} families of analytic shapes",
            "synthetic",
            pool.fingerprint(f"{dials!r}/{shapes.VERSION}", self.train_part.cpu(), self.test_part),
        )

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Clouds in a new order each epoch."""
        take = pool.epochs([self.train_part], batch, seed)
        draw = torch.Generator().manual_seed(seed)

        def pairs() -> Pair:
            (whole,) = take()
            return shapes.partial(whole, _viewpoints(batch, draw).to(whole.device), self.scanned), whole

        return pairs

    def test(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Every test cloud from one viewpoint."""
        viewpoints = _viewpoints(len(self.test_part), torch.Generator().manual_seed(0))
        scans = shapes.partial(self.test_part, viewpoints, self.scanned)
        for scan, whole, family in zip(scans, self.test_part, self.families.tolist(), strict=True):
            yield scan[None].to(self.train_part.device), whole, family


def _viewpoints(count: int, draw: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=draw), dim=1)


class PCNScans:
    """The PCN set, read from disk sample by sample: one of eight scans a step, mirrored at random."""

    def __init__(self, scanned: int, device: str) -> None:
        source = sources.find("pcn")
        assert isinstance(source, PCN)
        source.require_complete()
        self.source, self.scanned, self.device = source, scanned, device
        self.corpus = source.corpus()

    def batches(self, batch: int, seed: int) -> Callable[[], Pair]:
        """Models in a new order each epoch; x, z, both or neither are mirrored, each with probability ¼."""
        models, views = self.source.models("train"), self.source.VIEWS["train"]
        take = pool.epochs([torch.arange(len(models))], batch, seed)
        draw = np.random.default_rng(seed)

        def pairs() -> Pair:
            scans, wholes = [], []
            for index in take()[0].tolist():
                mirror = np.array([draw.choice([-1, 1]), 1, draw.choice([-1, 1])], np.float32)
                scan = self.source.partial(models[index], int(draw.integers(views)))
                scans.append(resampled(scan, self.scanned, draw) * mirror)
                wholes.append(self.source.complete(models[index]) * mirror)
            return self._tensor(np.stack(scans)), self._tensor(np.stack(wholes))

        return pairs

    def test(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The one scan of every test model."""
        draw = np.random.default_rng(0)
        models = self.source.models("test")
        categories = sorted({model.taxonomy for model in models})
        for model in models:
            scan = resampled(self.source.partial(model), self.scanned, draw)
            whole = torch.from_numpy(self.source.complete(model))
            yield self._tensor(scan[None]), whole, categories.index(model.taxonomy)

    def _tensor(self, points: Points) -> Tensor:
        return torch.from_numpy(points).to(self.device)


def resampled(points: Points, count: int, draw: np.random.Generator) -> Points:
    """``count`` of the points in random order; where there are fewer, zeros fill the rest."""
    kept = points[draw.permutation(len(points))[:count]]
    return np.concatenate([kept, np.zeros((count - len(kept), 3), np.float32)])
