"""Document matching by bytes (noncausal self attention), after Long Range Arena (arXiv 2011.04006).

Two texts are read apart and compared by their features alone. ``paper``: whether one article cites the other.
At the smaller sizes: whether two windows of source text come from the same package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import Corpus
from attnbench.tasks.data.pool import Part, generator
from attnbench.tasks.lra._packages import PACKAGES, VOCABULARY, windows
from attnbench.tasks.lra._session import ArenaTask, Data, Examples, arena_preset, content
from attnbench.tasks.lra.lra_text import encoded
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the choice of windows changes."""


@dataclass(frozen=True)
class SamePackage:
    """Whether two windows of ``length`` bytes come from the same of the first ``packages`` packages."""

    length: int
    train: int
    test: int
    packages: int = len(PACKAGES)
    vocabulary: int = VOCABULARY
    classes: int = 2
    pairs: bool = True

    def load(self) -> Data:
        """Cut the windows. Raises UsageError for a Python installation without the sources."""
        train, test = self._draw("train", self.train), self._draw("test", self.test)
        corpus = Corpus("pairs of python library sources by package", "embedded", content(self, train, test))
        return Data(train, test, corpus)

    def _draw(self, part: Part, count: int) -> Examples:
        rng = generator(self, part, VERSION)
        same = rng.permutation(np.arange(count) % 2)
        first = rng.integers(self.packages, size=count)
        other = (first + rng.integers(1, self.packages, size=count)) % self.packages
        both = np.stack([first, np.where(same == 1, first, other)], 1)
        cut = windows(rng, both.ravel(), self.length, part == "train")
        return Examples(cut.reshape(count, 2, self.length), same)


@dataclass(frozen=True)
class Citations:
    """Whether one article cites the other, from the first ``length`` bytes of each; 0 is the padding."""

    length: int
    vocabulary: int = 256
    classes: int = 2
    pairs: bool = True

    def load(self) -> Data:
        """Read the pairs. Raises UsageError when they are not on this machine, or are not all there."""
        from attnbench.tasks.data import sources
        from attnbench.tasks.data.loaders.arena import LongRangeArena

        source = sources.find("lra")
        assert isinstance(source, LongRangeArena)
        source.require_complete(["retrieval_train", "retrieval_test"])
        train, test = (self._read(source.retrieval(split)) for split in ("train", "test"))
        return Data(train, test, source.corpus("retrieval"))

    def _read(self, rows: Iterator[tuple[str, str, int]]) -> Examples:
        texts: list[bytes] = []
        labels: list[int] = []
        for first, second, cites in rows:
            texts += [first.encode()[: self.length], second.encode()[: self.length]]
            labels.append(cites)
        flat = encoded(texts, self.length, np.zeros(len(texts), np.int64))
        assert flat.lengths is not None
        tokens = flat.tokens.reshape(len(labels), 2, self.length)
        return Examples(tokens, np.array(labels), flat.lengths.reshape(-1, 2))


TINY = arena_preset(
    "lra_retrieval",
    "tiny",
    SamePackage(length=127, train=6_400, test=500),
    Recipe(steps=100, lr=2e-3, warmup=10),
    batch=16,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=125,
)

SMALL = arena_preset(
    "lra_retrieval",
    "small",
    SamePackage(length=1023, train=50_000, test=4_000),
    Recipe(steps=3_000, lr=5e-4, warmup=300, weight_decay=0.1, dtype="bfloat16", max_seconds=420.0),
    batch=32,
    heads=4,
    head_dim=64,
    layers=4,
    ratio=4,
    eval_batch=32,
)

PAPER = arena_preset(
    "lra_retrieval",
    "paper",
    Citations(length=4_000),
    Recipe(steps=5_000, lr=5.6e-4, warmup=8_000, schedule="inverse_sqrt", weight_decay=0.1),
    batch=32,
    heads=4,
    head_dim=32,
    layers=4,
    ratio=4,
    eval_batch=32,
)
"""The net and the schedule of the arena's repository: the rate still rises when the 5,000 steps are over."""

TASK = ArenaTask(
    id="lra_retrieval",
    title="Byte-level document matching",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Pairs of windows of the standard library's sources (tiny, small), or of AAN articles (paper)",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
