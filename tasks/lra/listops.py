"""ListOps (noncausal self attention): the value of a nested expression of MIN, MAX, MED and SM over digits.

Generated as in Long Range Arena (arXiv 2011.04006), short in ``tiny``; ``paper`` reads its published files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from attnbench.errors import UsageError
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.data.pool import Part, generator
from attnbench.tasks.lra._session import ArenaTask, Data, Examples, arena_preset, synthetic
from attnbench.tasks.trainer import Recipe

VERSION = 1
"""Part of every seed: raised when the generator changes what it draws."""

OPERATORS: Mapping[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
SYMBOLS = ("", *map(str, range(10)), *OPERATORS, END)
"""The padding, then all symbols of an expression."""
CODES = {symbol: code for code, symbol in enumerate(SYMBOLS)}

OPERATOR_SHARE = 0.25
"""Probability that a node above the greatest depth is an operator and not a digit."""

CLASSES = 10


def expression(rng: np.random.Generator, depth: int, arguments: int, inner: bool = False) -> Iterator[str]:
    """The symbols of a random expression with operators nested up to ``depth``, 2 to ``arguments`` each.

    The outermost node is an operator; ``inner`` ones are in a quarter of the cases.
    """
    if inner and (depth == 0 or rng.random() >= OPERATOR_SHARE):
        yield str(rng.integers(10))
        return
    yield tuple(OPERATORS)[rng.integers(len(OPERATORS))]
    for _ in range(rng.integers(2, arguments + 1)):
        yield from expression(rng, depth - 1, arguments, inner=True)
    yield END


def value(symbols: list[str]) -> int:
    """What an expression evaluates to."""
    stack: list[list[int]] = [[]]
    names: list[str] = []
    for symbol in symbols:
        if symbol in OPERATORS:
            names.append(symbol)
            stack.append([])
        elif symbol == END:
            values = stack.pop()
            stack[-1].append(OPERATORS[names.pop()](values))
        else:
            stack[-1].append(int(symbol))
    return stack[0][0]


@dataclass(frozen=True)
class ListOps:
    """Expressions of more than ``shortest`` and fewer than ``longest`` symbols, operators ``depth`` deep.

    Drawn until they have such a length, which keeps the distribution of Long Range Arena for given dials.
    """

    shortest: int
    longest: int
    depth: int
    arguments: int
    train: int
    test: int

    @property
    def length(self) -> int:
        """Symbols of the longest expression."""
        return self.longest - 1

    @property
    def vocabulary(self) -> int:
        """Symbols with the padding."""
        return len(SYMBOLS)

    @property
    def classes(self) -> int:
        """The digits."""
        return CLASSES

    @property
    def pairs(self) -> bool:
        """One expression an example."""
        return False

    def load(self) -> Data:
        """Draw both parts."""
        return synthetic("listops", self, self._draw("train", self.train), self._draw("test", self.test))

    def _draw(self, part: Part, count: int) -> Examples:
        rng = generator(self, part, VERSION)
        found: list[list[str]] = []
        while len(found) < count:
            symbols = list(expression(rng, self.depth, self.arguments))
            if self.shortest < len(symbols) < self.longest:
                found.append(symbols)
        return encoded(found, [value(symbols) for symbols in found], self.length)


@dataclass(frozen=True)
class PublishedListOps:
    """The published files, expressions of 500 to 2,000 symbols."""

    length: int = 2_000
    vocabulary: int = len(SYMBOLS)
    classes: int = CLASSES
    pairs: bool = False

    def load(self) -> Data:
        """Read the files. Raises UsageError when they are not on this machine, or are not all there."""
        from attnbench.tasks.data import sources
        from attnbench.tasks.data.loaders.arena import LongRangeArena

        source = sources.find("lra")
        assert isinstance(source, LongRangeArena)
        source.require_complete(["listops_train", "listops_test"])
        train, test = (self._read(source.listops(split)) for split in ("train", "test"))
        return Data(train, test, source.corpus("listops"))

    def _read(self, rows: Iterator[tuple[str, int]]) -> Examples:
        """Parentheses say nothing that brackets do not; the arena's own reader drops them as well."""
        texts, labels = zip(*rows, strict=True)
        return encoded(
            [t.replace("(", " ").replace(")", " ").split() for t in texts], list(labels), self.length
        )


def encoded(expressions: list[list[str]], labels: list[int], length: int) -> Examples:
    """Expressions as codes, padded to ``length``. Raises UsageError for a longer one, or another symbol."""
    tokens = np.zeros((len(expressions), length), np.int64)
    for row, symbols in zip(tokens, expressions, strict=True):
        if len(symbols) > length or not CODES.keys() >= set(symbols):
            raise UsageError(
                f"listops: observed {len(symbols)} symbols {sorted(set(symbols))}, expected at most {length} "
                f"out of {', '.join(SYMBOLS[1:])}; copy the data again"
            )
        row[: len(symbols)] = [CODES[symbol] for symbol in symbols]
    lengths = np.array([len(symbols) for symbols in expressions])
    return Examples(tokens.astype(np.uint8), np.array(labels), lengths)


TINY = arena_preset(
    "listops",
    "tiny",
    ListOps(shortest=9, longest=64, depth=3, arguments=5, train=12_800, test=800),
    Recipe(steps=500, lr=3e-3, warmup=50),
    batch=32,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=250,
    check=LearningCheck(softmax=0.3, no_mixing=0.2),
)
"""Tests mixing, hardly addressing. Measured with seed 0: softmax 0.373, uniform averaging 0.334, no mixing
0.100, which is chance."""

SMALL = arena_preset(
    "listops",
    "small",
    ListOps(shortest=100, longest=512, depth=10, arguments=10, train=20_000, test=2_000),
    Recipe(steps=5_000, lr=5e-4, warmup=500, weight_decay=0.1, dtype="bfloat16", max_seconds=420.0),
    batch=64,
    heads=8,
    head_dim=32,
    layers=4,
    ratio=2,
    eval_batch=64,
)

PAPER = arena_preset(
    "listops",
    "paper",
    PublishedListOps(),
    Recipe(steps=5_000, lr=1.6e-3, warmup=1_000, schedule="inverse_sqrt", weight_decay=0.1),
    batch=32,
    heads=8,
    head_dim=64,
    layers=4,
    ratio=2,
    eval_batch=32,
)
"""The net and the schedule of the arena's repository: its rate 0.05/√step peaks at 1.6e-3."""

TASK = ArenaTask(
    id="listops",
    title="ListOps",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated expressions by the generator of Long Range Arena, short in tiny and small; the published "
    "files in paper",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
