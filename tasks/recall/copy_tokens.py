"""Copying (causal self attention): repeat a string of symbols after a gap, in order.

Needs a lookup by position alone; symbols say nothing of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.recall._generate import IGNORED, Samples
from attnbench.tasks.recall._session import RecallPreset, RecallTask, shape
from attnbench.tasks.trainer import Recipe

BLANK, COPY = 0, 1
SPECIALS = 2


@dataclass(frozen=True)
class Copying:
    """``tokens`` random symbols, ``gap`` blanks, COPY, and ``tokens`` blanks that ask for them in order."""

    tokens: int
    gap: int
    symbols: int

    @property
    def vocabulary(self) -> int:
        """The blank, COPY and the symbols."""
        return SPECIALS + self.symbols

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return 2 * self.tokens + self.gap + 1

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        text = SPECIALS + rng.integers(self.symbols, size=(count, self.tokens))
        tokens = np.full((count, self.length), BLANK)
        tokens[:, : self.tokens] = text
        tokens[:, self.tokens + self.gap] = COPY
        labels = np.full_like(tokens, IGNORED)
        labels[:, -self.tokens :] = text
        return Samples(tokens, labels)


_TINY = Copying(tokens=16, gap=31, symbols=14)
TINY = RecallPreset(
    shape=shape("copy_tokens", "tiny", batch=32, heads=2, head_dim=32, n=64),
    recipe=Recipe(steps=400, lr=3e-3, warmup=40),
    checks={Pattern.CS: LearningCheck(softmax=0.9, no_mixing=0.15)},
    problem=_TINY,
    loads={f"tokens={tokens}": replace(_TINY, tokens=tokens, gap=63 - 2 * tokens) for tokens in (8, 16, 24)}
    | {f"n={n}": replace(_TINY, gap=n - 33) for n in (48, 64, 96)},
    pool=12_800,
    tests=200,
    layers=2,
    ratio=2,
    eval_batch=128,
)
"""Measured on one thread with seed 0 (accuracy): softmax 1.00, from step 100 on; chance is 1/14."""

_SMALL = Copying(tokens=256, gap=511, symbols=62)
SMALL = RecallPreset(
    shape=shape("copy_tokens", "small", batch=32, heads=4, head_dim=64, n=1024),
    recipe=Recipe(steps=2_500, lr=1e-3, warmup=250, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=_SMALL,
    loads={
        f"tokens={tokens}": replace(_SMALL, tokens=tokens, gap=1023 - 2 * tokens)
        for tokens in (64, 128, 256, 384)
    }
    | {f"n={n}": replace(_SMALL, gap=n - 513) for n in (2048, 4096)},
    pool=80_000,
    tests=1_000,
    layers=4,
    ratio=4,
    eval_batch=16,
)

TASK = RecallTask(
    id="copy_tokens",
    title="Copying",
    patterns=(Pattern.CS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL},
    data="Generated strings of random symbols",
    source="Unitary Evolution Recurrent Neural Networks (arXiv 1511.06464)",
)
