"""Induction (causal self attention): a symbol comes back; say what followed it before.

The smallest problem that two layers solve and one does not: the first marks each token with the one before.
``small`` and ``paper`` ask once, at the end; ``tiny`` asks wherever a text repeats itself, which is learned
from far fewer samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.recall._generate import IGNORED, Samples, choose, put
from attnbench.tasks.recall._session import RecallPreset, RecallTask, shape
from attnbench.tasks.trainer import Recipe

SPECIAL = 0


@dataclass(frozen=True)
class Induction:
    """Random symbols; the special one stands once among them and once more at the end, where is asked."""

    length: int
    vocabulary: int

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        tokens = rng.integers(1, self.vocabulary, size=(count, self.length))
        at = rng.integers(self.length - 2, size=(count, 1))
        put(tokens, at, np.full_like(at, SPECIAL))
        tokens[:, -1] = SPECIAL
        labels = np.full_like(tokens, IGNORED)
        labels[:, -1:] = np.take_along_axis(tokens, at + 1, 1)
        depth = np.zeros(tokens.shape)
        depth[:, -1:] = at / self.length
        return Samples(tokens, labels, depth)


@dataclass(frozen=True)
class Repeats:
    """Distinct symbols, from ``shortest`` to ``longest`` of them, over and over; the next one is asked.

    It is asked from the second time on. The period differs between sequences, so that no fixed distance leads
    to the answer.
    """

    length: int
    vocabulary: int
    shortest: int
    longest: int

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        period = rng.integers(self.shortest, self.longest + 1, size=(count, 1))
        symbols = choose(rng, count, self.vocabulary, self.longest)
        text = np.take_along_axis(symbols, np.arange(self.length + 1) % period, 1)
        asked = np.arange(self.length) >= period
        return Samples(text[:, :-1], np.where(asked, text[:, 1:], IGNORED))


_TINY = Repeats(length=64, vocabulary=32, shortest=8, longest=24)
TINY = RecallPreset(
    shape=shape("induction", "tiny", batch=32, heads=2, head_dim=32, n=64),
    recipe=Recipe(steps=350, lr=3e-3, warmup=35),
    checks={Pattern.CS: LearningCheck(softmax=0.7, no_mixing=0.2)},
    problem=_TINY,
    loads={f"n={n}": replace(_TINY, length=n) for n in (32, 64, 128)},
    pool=9_600,
    tests=256,
    layers=2,
    ratio=2,
    eval_batch=128,
)
"""Measured on one thread with seeds 0, 1, 2 (accuracy): softmax 0.986, 0.983, 0.987; no_mixing 0.03; uniform
0.08, chance being 1/8 at best. Asked once a sequence, softmax learns nothing in 500 steps."""

_SMALL = Induction(length=256, vocabulary=16)
SMALL = RecallPreset(
    shape=shape("induction", "small", batch=128, heads=4, head_dim=64, n=256),
    recipe=Recipe(steps=4_000, lr=1e-3, warmup=400, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=_SMALL,
    loads={f"n={n}": replace(_SMALL, length=n) for n in (64, 256, 1024, 4096, 16_384)},
    pool=200_000,
    tests=1_000,
    layers=4,
    ratio=4,
    eval_batch=8,
)

PAPER = replace(
    SMALL,
    shape=shape("induction", "paper", batch=8, heads=4, head_dim=16, n=256),
    recipe=Recipe(steps=200_000, lr=1e-3, warmup=1_000),
    loads={f"n={2**e}": replace(_SMALL, length=2**e) for e in range(6, 21)},
    pool=500_000,
    tests=100,
    layers=2,
    eval_batch=1,
)
"""The setting of Mamba (arXiv 2312.00752): 16 symbols, two layers of width 64, trained at a length of 256 and
asked at lengths from 64 to 2²⁰; a pool of half a million samples stands for fresh ones."""

TASK = RecallTask(
    id="induction",
    title="Induction",
    patterns=(Pattern.CS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated random symbols that repeat (tiny), or of which one comes back (small, paper)",
    source="In-context Learning and Induction Heads (arXiv 2209.11895)",
)
