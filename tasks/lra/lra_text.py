"""Text classification by bytes (noncausal self attention), after Long Range Arena (arXiv 2011.04006).

``paper`` is the sentiment of film reviews. At the smaller sizes it is the package of the standard library
that a window of source text comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import Corpus, LearningCheck
from attnbench.tasks.data.pool import Part, generator
from attnbench.tasks.lra._packages import PACKAGES, VOCABULARY, windows
from attnbench.tasks.lra._session import ArenaTask, Data, Examples, arena_preset, content
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the choice of windows changes."""


@dataclass(frozen=True)
class PackageOf:
    """Which of eight packages a window of ``length`` bytes comes from."""

    length: int
    train: int
    test: int
    vocabulary: int = VOCABULARY
    classes: int = len(PACKAGES)
    pairs: bool = False

    def load(self) -> Data:
        """Cut the windows. Raises UsageError for a Python installation without the sources."""
        train, test = self._draw("train", self.train), self._draw("test", self.test)
        corpus = Corpus("python library sources by package", "embedded", content(self, train, test))
        return Data(train, test, corpus)

    def _draw(self, part: Part, count: int) -> Examples:
        rng = generator(self, part, VERSION)
        labels = rng.permutation(np.arange(count) % self.classes)
        return Examples(windows(rng, labels, self.length, part == "train"), labels)


@dataclass(frozen=True)
class Reviews:
    """Whether a film review is positive, from its first ``length`` bytes; 0 is the padding."""

    length: int
    vocabulary: int = 256
    classes: int = 2
    pairs: bool = False

    def load(self) -> Data:
        """Read the reviews. Raises UsageError when they are not on this machine, or are not all there."""
        from attnbench.tasks.data import sources
        from attnbench.tasks.data.loaders.texts import IMDB

        source = sources.find("imdb")
        assert isinstance(source, IMDB)
        source.require_complete()
        train, test = (self._read(source.reviews(part)) for part in ("train", "test"))
        return Data(train, test, source.corpus())

    def _read(self, rows: Iterator[tuple[str, int]]) -> Examples:
        texts, labels = zip(*rows, strict=True)
        return encoded([text.encode() for text in texts], self.length, np.array(labels))


def encoded(texts: list[bytes], length: int, labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Examples:
    """Texts as bytes, the first ``length`` of each, padded to that."""
    tokens = np.zeros((len(texts), length), np.uint8)
    for row, text in zip(tokens, texts, strict=True):
        start = np.frombuffer(text[:length], np.uint8)
        row[: len(start)] = start
    return Examples(tokens, labels, np.array([min(length, len(text)) for text in texts]))


TINY = arena_preset(
    "lra_text",
    "tiny",
    PackageOf(length=127, train=7_680, test=800),
    Recipe(steps=240, lr=3e-3, warmup=24),
    batch=32,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=250,
    check=LearningCheck(softmax=0.28, no_mixing=0.2),
)
"""Tests mixing, not addressing. Measured with seed 0: softmax 0.360, uniform averaging 0.344, no mixing
0.125, which is chance."""

SMALL = arena_preset(
    "lra_text",
    "small",
    PackageOf(length=1023, train=50_000, test=4_000),
    Recipe(steps=3_000, lr=5e-4, warmup=300, weight_decay=0.1, dtype="bfloat16", max_seconds=420.0),
    batch=64,
    heads=4,
    head_dim=64,
    layers=4,
    ratio=4,
    eval_batch=64,
)

PAPER = arena_preset(
    "lra_text",
    "paper",
    Reviews(length=4_000),
    Recipe(steps=20_000, lr=5.6e-4, warmup=8_000, schedule="inverse_sqrt", weight_decay=0.1),
    batch=32,
    heads=4,
    head_dim=64,
    layers=4,
    ratio=4,
    eval_batch=32,
)
"""The net and the schedule of the arena's repository at the length of the paper: its rate 0.05/√step peaks at
5.6e-4. As there, the test part is not used to choose anything."""

TASK = ArenaTask(
    id="lra_text",
    title="Byte-level text classification",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Windows of the standard library's sources by package (tiny, small), or IMDB reviews (paper)",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
