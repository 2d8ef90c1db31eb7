"""Pictures of dashed curves, two dots on the ends of one or of two of them; generated, or as published.

Generated ones are like those of Pathfinder (Linsley et al., arXiv 1805.08315) and are not the arena's: scores
on them must not be reported as its.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.pool import Part, generator
from attnbench.tasks.lra._session import Data, Examples, synthetic

VERSION = 1
"""Part of every seed: raised when the generator changes what it draws."""

BLANK, DASH, DOT = 0, 1, 2
DASH_PERIOD = 3
"""Every third point of a curve is a gap."""
TRIES = 40
"""Places to try for a curve before the whole picture is given up."""
AT_ONCE = 2048


@dataclass(frozen=True)
class Curves:
    """Pictures of ``side``² pixels with two curves of ``steps`` points and ``distractors`` more.

    A curve takes steps of one pixel and turns by N(0, ``turn``²) radians at each. Curves keep a pixel apart.
    Label 1: the dots are both ends of the first curve; label 0: an end of each of the first two.
    """

    side: int
    steps: int
    distractors: int
    train: int
    test: int
    turn: float = 0.35
    vocabulary: int = 3
    classes: int = 2
    pairs: bool = False

    @property
    def length(self) -> int:
        """Pixels of a picture."""
        return self.side**2

    def load(self) -> Data:
        """Draw both parts."""
        train, test = self._draw("train", self.train), self._draw("test", self.test)
        return synthetic("pathfinder-like", self, train, test)

    def _draw(self, part: Part, count: int) -> Examples:
        rng = generator(self, part, VERSION)
        labels = rng.permutation(np.arange(count) % 2)
        found = np.empty((count, self.length), np.uint8)
        for start in range(0, count, AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            found[rows] = self._pictures(rng, labels[rows])
        return Examples(found, labels)

    def _pictures(self, rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pictures (S, side²) with ``labels`` (S,)."""
        done: list[NDArray[np.int64]] = []
        missing = len(labels)
        while missing:
            curves = self.curves(rng, len(labels))[:missing]
            done.append(curves)
            missing -= len(curves)
        curves = np.concatenate(done)
        pictures = np.full((len(labels), self.length), BLANK, np.uint8)
        rows = np.arange(len(labels))
        for step in range(self.steps):
            if step % DASH_PERIOD != DASH_PERIOD - 1:
                pictures[rows[:, None], curves[:, :, step]] = DASH
        pictures[rows, curves[:, 0, 0]] = DOT
        pictures[rows, np.where(labels == 1, curves[:, 0, -1], curves[:, 1, -1])] = DOT
        return pictures

    def curves(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Pixels (at most ``count``, curves, steps) of sets of curves that keep apart."""
        number = 2 + self.distractors
        found = np.zeros((count, number, self.steps), np.int64)
        taken = np.zeros((count, self.side + 2, self.side + 2), bool)
        kept = np.ones(count, bool)
        for curve in range(number):
            pending = np.flatnonzero(kept)
            for _ in range(TRIES):
                y, x, inside = self._walks(rng, len(pending))
                good = inside & ~taken[pending[:, None], y + 1, x + 1].any(1)
                rows, y, x = pending[good], y[good], x[good]
                found[rows, curve] = y * self.side + x
                for dy in range(3):
                    for dx in range(3):
                        taken[rows[:, None], y + dy, x + dx] = True
                pending = pending[~good]
            kept[pending] = False
        return found[kept]

    def _walks(
        self, rng: np.random.Generator, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Rows and columns (count, steps) of walks, and which of them stay inside; others are clipped."""
        turns = self.turn * rng.standard_normal((count, self.steps))
        heading = 2.0 * np.pi * rng.random((count, 1)) + turns.cumsum(1)
        steps = np.stack([np.sin(heading), np.cos(heading)])
        steps[:, :, 0] = self.side * rng.random((2, count))
        points = steps.cumsum(2)
        inside = np.asarray(((points >= 0.0) & (points < self.side)).all((0, 2)))
        y, x = np.clip(points, 0, self.side - 1).astype(np.int64)
        return y, x, inside


@dataclass(frozen=True)
class PublishedCurves:
    """The 200,000 published pictures of ``side``² pixels: four fifths to train on, the last tenth to test."""

    side: int
    vocabulary: int = 256
    classes: int = 2
    pairs: bool = False

    @property
    def length(self) -> int:
        """Pixels of a picture."""
        return self.side**2

    def load(self) -> Data:
        """Read the pictures. Raises UsageError when they are not on this machine, or are not all there."""
        from attnbench.tasks.data import sources
        from attnbench.tasks.data.loaders.arena import LongRangeArena

        source = sources.find("lra")
        assert isinstance(source, LongRangeArena)
        source.require_complete([f"pathfinder{self.side}"])
        pictures, labels = source.pathfinder(self.side)
        tokens = pictures.reshape(len(pictures), self.length)
        tenth = len(tokens) // 10
        train, test = (
            Examples(tokens[: 8 * tenth], labels[: 8 * tenth]),
            Examples(tokens[-tenth:], labels[-tenth:]),
        )
        return Data(train, test, source.corpus(f"pathfinder{self.side}"))
