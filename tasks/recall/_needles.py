"""Needles in a haystack of tokens, after RULER (arXiv 2404.06654), for models trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnbench.tasks.recall._generate import IGNORED, Samples, choose, places, put

MARK, ASK = 0, 1
"""Symbols that announce a needle and a question."""
SPECIALS = 2


@dataclass(frozen=True)
class Needles:
    """``needles`` times MARK key value… in a haystack, then ``queries`` times ASK key and room for answers.

    The symbols are MARK, ASK, ``fillers``, ``keys`` and ``values``, in this order. Keys are distinct, and so
    are the keys that are asked for. A needle has ``per_key`` values; the answers but the last stand in the
    sequence, each after the position that asks for it.
    """

    length: int
    needles: int
    queries: int
    keys: int
    values: int
    fillers: int
    per_key: int = 1

    @property
    def vocabulary(self) -> int:
        """All symbols."""
        return SPECIALS + self.fillers + self.keys + self.values

    @property
    def haystack(self) -> int:
        """Positions before the first question."""
        return self.length - self.queries * (1 + self.per_key)

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        size = 2 + self.per_key
        at = places(rng, count, self.haystack, self.needles, size)
        keys = SPECIALS + self.fillers + choose(rng, count, self.keys, self.needles)
        first_value = SPECIALS + self.fillers + self.keys
        values = first_value + rng.integers(self.values, size=(count, self.needles, self.per_key))
        tokens = SPECIALS + rng.integers(self.fillers, size=(count, self.length))
        put(tokens, at, np.full_like(at, MARK))
        put(tokens, at + 1, keys)
        for index in range(self.per_key):
            put(tokens, at + 2 + index, values[:, :, index])

        labels = np.full_like(tokens, IGNORED)
        depth = np.zeros(tokens.shape)
        asked = choose(rng, count, self.needles, self.queries)
        start = self.haystack + np.arange(self.queries) * (1 + self.per_key)
        tokens[:, start] = ASK
        tokens[:, start + 1] = np.take_along_axis(keys, asked, 1)
        for index in range(self.per_key):
            answers = np.take_along_axis(values[:, :, index], asked, 1)
            labels[:, start + 1 + index] = answers
            depth[:, start + 1 + index] = np.take_along_axis(at, asked, 1) / self.haystack
            if index + 1 < self.per_key:
                tokens[:, start + 2 + index] = answers
        return Samples(tokens, labels, depth)


@dataclass(frozen=True)
class StackedNeedles:
    """Needles whose key and value share a position: no pair of neighbours has to be put together first.

    Every position holds two symbols: (key, value) for a needle, (key, blank) at the last ``queries``
    positions, where the value is asked, and (filler, blank) elsewhere. Symbol 0 is the blank; ``fillers``,
    ``keys`` and ``values`` follow in this order. Keys are distinct, and so are the keys that are asked for.
    """

    length: int
    needles: int
    queries: int
    keys: int
    values: int
    fillers: int

    @property
    def vocabulary(self) -> int:
        """All symbols."""
        return 1 + self.fillers + self.keys + self.values

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        haystack = self.length - self.queries
        at = places(rng, count, haystack, self.needles, 1)
        keys = 1 + self.fillers + choose(rng, count, self.keys, self.needles)
        values = 1 + self.fillers + self.keys + rng.integers(self.values, size=keys.shape)
        asked = choose(rng, count, self.needles, self.queries)
        first = 1 + rng.integers(self.fillers, size=(count, self.length))
        second = np.zeros_like(first)
        put(first, at, keys)
        put(second, at, values)
        first[:, haystack:] = np.take_along_axis(keys, asked, 1)
        labels = np.full_like(first, IGNORED)
        labels[:, haystack:] = np.take_along_axis(values, asked, 1)
        depth = np.zeros(first.shape)
        depth[:, haystack:] = np.take_along_axis(at, asked, 1) / haystack
        return Samples(np.stack([first, second], 2), labels, depth)
