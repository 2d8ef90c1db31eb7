"""What the generators of this suite share: their interface, their seeds, choices without repetition.

A problem is a frozen dataclass whose fields are its dials of difficulty. Its samples are a function of the
problem and of the part (training or test) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnbench.tasks.data.pool import Part, fingerprint, generator

VERSION = 1
"""Part of every seed: raised when a generator changes what it draws."""

IGNORED = -100
"""Label of a position that is not asked."""

AT_ONCE = 1 << 22
"""Tokens that are drawn at a time."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """S sequences with what is asked of them.

    ``tokens`` (S, N), or (S, N, 2) where two symbols share a position; ``labels`` (S, N), ``IGNORED`` where
    nothing is asked. ``depth`` (S, N), where the generator knows it: how far into the sequence, from 0 to
    below 1, that lies which a position asks for.
    """

    tokens: NDArray[np.integer[Any]]
    labels: NDArray[np.integer[Any]]
    depth: NDArray[np.floating[Any]] | None = None

    def narrow(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32] | None]:
        """Tokens, labels and depth in 32 bits."""
        depth = None if self.depth is None else self.depth.astype(np.float32)
        return self.tokens.astype(np.int32), self.labels.astype(np.int32), depth


class Problem(Protocol):
    """A generator of one task at one difficulty: a frozen dataclass."""

    @property
    def length(self) -> int:
        """Tokens of a sequence, N."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of symbols; tokens and labels lie below it."""
        ...

    def __hash__(self) -> int:
        """Equal problems are one: their data are drawn once."""
        ...

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        ...


@lru_cache(maxsize=8)
def drawn(problem: Problem, part: Part, count: int) -> tuple[Samples, str]:
    """``count`` samples of the training or the test part, in 32 bits, and the SHA-256 of their content.

    Drawn a few at a time, so that a large pool needs no more memory than itself; kept for the next run on the
    same data. Depths are those of the test part only: nothing else is scored.
    """
    rng = generator(problem, part, VERSION)
    rows = max(1, AT_ONCE // problem.length)
    pieces = [problem.sample(rng, min(rows, count - start)).narrow() for start in range(0, count, rows)]
    tokens, labels = (np.concatenate([x[column] for x in pieces]) for column in (0, 1))
    depths = [x[2] for x in pieces if x[2] is not None and part == "test"]
    samples = Samples(tokens, labels, np.concatenate(depths) if depths else None)
    return samples, fingerprint(f"{VERSION}/{part}/{problem!r}", tokens, labels)


def choose(rng: np.random.Generator, count: int, population: int, picks: int) -> Ints:
    """(count, picks) numbers below ``population``, none twice in a row, in random order.

    Raises ValueError for more picks than there are numbers.
    """
    if picks > population:
        raise ValueError(f"observed {picks} picks out of {population}, expected no more than there are")
    rows = max(1, (1 << 22) // population)
    return np.concatenate(
        [
            rng.permuted(np.tile(np.arange(population), (min(rows, count - start), 1)), axis=1)[:, :picks]
            for start in range(0, count, rows)
        ]
    )


def weighted_order(rng: np.random.Generator, count: int, weights: NDArray[np.float64], picks: int) -> Ints:
    """(count, picks) indices drawn one after the other without replacement with ``weights``.

    The largest ``picks`` of log w + Gumbel noise, in falling order: the same distribution as drawing one by
    one (Yellott 1977).
    """
    keys = np.log(weights) + rng.gumbel(size=(count, len(weights)))
    return np.argsort(-keys, axis=1)[:, :picks]


def places(rng: np.random.Generator, count: int, room: int, blocks: int, size: int) -> Ints:
    """(count, blocks) first positions, ascending, of blocks of ``size`` that do not overlap in ``room``."""
    free = room - blocks * (size - 1)
    chosen = np.sort(choose(rng, count, free, blocks), axis=1)
    return chosen + np.arange(blocks) * (size - 1)


def put(tokens: Ints, at: Ints, values: Ints) -> None:
    """Write ``values`` (S, K) into rows of ``tokens`` (S, N) at positions ``at`` (S, K)."""
    np.put_along_axis(tokens, at, values, axis=1)
