"""Selective copying (causal self attention): repeat the symbols that stand scattered among blanks, in order.

Needs a count of the symbols so far besides the lookup: a fixed distance does not lead to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.recall._generate import IGNORED, Samples, places, put
from attnbench.tasks.recall._session import RecallPreset, RecallTask, shape
from attnbench.tasks.trainer import Recipe

BLANK, COPY = 0, 1
SPECIALS = 2


@dataclass(frozen=True)
class SelectiveCopying:
    """``tokens`` symbols at random places among blanks, COPY, and blanks that ask for them in order."""

    length: int
    tokens: int
    symbols: int

    @property
    def vocabulary(self) -> int:
        """The blank, COPY and the symbols."""
        return SPECIALS + self.symbols

    def sample(self, rng: np.random.Generator, count: int) -> Samples:
        """Draw ``count`` sequences."""
        room = self.length - self.tokens - 1
        text = SPECIALS + rng.integers(self.symbols, size=(count, self.tokens))
        tokens = np.full((count, self.length), BLANK)
        put(tokens, places(rng, count, room, self.tokens, 1), text)
        tokens[:, room] = COPY
        labels = np.full_like(tokens, IGNORED)
        labels[:, -self.tokens :] = text
        return Samples(tokens, labels)


_TINY = SelectiveCopying(length=64, tokens=8, symbols=14)
TINY = RecallPreset(
    shape=shape("selective_copy", "tiny", batch=32, heads=2, head_dim=32, n=64),
    recipe=Recipe(steps=800, lr=3e-3, warmup=80),
    checks={Pattern.CS: LearningCheck(softmax=0.8, no_mixing=0.15)},
    problem=_TINY,
    loads={f"tokens={tokens}": replace(_TINY, tokens=tokens) for tokens in (4, 8, 12)}
    | {f"n={n}": replace(_TINY, length=n) for n in (48, 64, 96)},
    pool=12_800,
    tests=200,
    layers=2,
    ratio=2,
    eval_batch=128,
)
"""Measured on one thread with seed 0 (accuracy): softmax 0.995, from step 600 on; chance is 1/14."""

_SMALL = SelectiveCopying(length=1024, tokens=64, symbols=62)
SMALL = RecallPreset(
    shape=shape("selective_copy", "small", batch=32, heads=4, head_dim=64, n=1024),
    recipe=Recipe(steps=2_500, lr=1e-3, warmup=250, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=_SMALL,
    loads={f"tokens={tokens}": replace(_SMALL, tokens=tokens) for tokens in (16, 32, 64, 128)}
    | {f"n={n}": replace(_SMALL, length=n) for n in (2048, 4096)},
    pool=80_000,
    tests=1_000,
    layers=4,
    ratio=4,
    eval_batch=16,
)

_PAPER = SelectiveCopying(length=256, tokens=16, symbols=14)
PAPER = RecallPreset(
    shape=shape("selective_copy", "paper", batch=128, heads=8, head_dim=16, n=256),
    recipe=Recipe(steps=20_000, lr=5e-4, warmup=200, weight_decay=0.0),
    checks={},
    problem=_PAPER,
    loads={f"tokens={tokens}": replace(_PAPER, tokens=tokens) for tokens in (16, 32, 64, 96)}
    | {f"n={n}": replace(_PAPER, length=n) for n in (256, 512, 1024)},
    pool=12_800,
    tests=1_280,
    layers=2,
    ratio=4,
    eval_batch=128,
)
"""The setting of MAD (arXiv 2403.17844): 16 symbols in all, 200 epochs of 12,800 samples, width 128; one of
its learning rates, a GELU network in place of its SwiGLU, and one model scored at all loads."""

TASK = RecallTask(
    id="selective_copy",
    title="Selective copying",
    patterns=(Pattern.CS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated symbols scattered among blanks",
    source="Mechanistic Design and Scaling of Hybrid Architectures (MAD, arXiv 2403.17844)",
)
