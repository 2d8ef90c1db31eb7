"""Several needles in a haystack (causal self attention): find the values of the keys that are asked for.

All needles look alike, so that keys must be compared. ``tiny`` has key and value at one position; in
``small`` and ``paper`` they are tokens one after the other, which takes far longer to learn.
"""

from __future__ import annotations

from dataclasses import replace

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.recall._needles import Needles, StackedNeedles
from attnbench.tasks.recall._session import RecallPreset, RecallTask, shape
from attnbench.tasks.trainer import Recipe

_TINY = StackedNeedles(length=128, needles=8, queries=4, keys=32, values=28, fillers=64)
TINY = RecallPreset(
    shape=shape("multi_needle", "tiny", batch=16, heads=2, head_dim=32, n=128),
    recipe=Recipe(steps=320, lr=3e-3, warmup=32),
    checks={Pattern.CS: LearningCheck(softmax=0.9, no_mixing=0.15)},
    problem=_TINY,
    loads={f"n=128,needles={needles}": replace(_TINY, needles=needles) for needles in (8, 16, 32)}
    | {f"n={n},needles=8": replace(_TINY, length=n) for n in (64, 256)},
    pool=7_680,
    tests=200,
    layers=2,
    ratio=2,
    eval_batch=64,
)
"""Measured on one thread with seed 0 (accuracy): softmax 0.99; chance is 1/28 among all values and
1/8 among those present."""

_SMALL = Needles(length=1024, needles=4, queries=4, keys=64, values=64, fillers=256)
SMALL = RecallPreset(
    shape=shape("multi_needle", "small", batch=64, heads=4, head_dim=64, n=1024),
    recipe=Recipe(steps=3_000, lr=1e-3, warmup=300, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=_SMALL,
    loads={f"n={n}": replace(_SMALL, length=n) for n in (1024, 2048, 4096, 8192)}
    | {f"n=1024,needles={needles}": replace(_SMALL, needles=needles) for needles in (16, 64)},
    pool=100_000,
    tests=1_000,
    layers=4,
    ratio=4,
    eval_batch=16,
)
"""Four needles, all asked for. Whether a model finds out within the limit depends on the seed: before that it
names any of the four, an accuracy of a quarter. So there is no learning check."""

_PAPER = replace(_SMALL, length=4096, fillers=1024, keys=256, values=256)
PAPER = replace(
    SMALL,
    shape=shape("multi_needle", "paper", batch=64, heads=8, head_dim=64, n=4096),
    recipe=Recipe(steps=50_000, lr=5e-4, warmup=2_000, dtype="bfloat16"),
    problem=_PAPER,
    loads={f"n={n}": replace(_PAPER, length=n) for n in (4096, 8192, 16_384, 32_768, 65_536, 131_072)}
    | {
        "n=4096,queries=1": replace(_PAPER, queries=1),
        "n=4096,values=4": replace(_PAPER, queries=1, per_key=4),
        "n=4096,needles=256": replace(_PAPER, needles=256),
    },
    pool=50_000,
    tests=200,
    layers=8,
    eval_batch=1,
)
"""RULER's multi-query, multi-key (one question), multi-value and many needles, at its lengths; RULER asks
pretrained models, this one is trained on four needles at 4 k."""

TASK = RecallTask(
    id="multi_needle",
    title="Several needles in a haystack",
    patterns=(Pattern.CS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated haystacks of random tokens with several keys and values",
    source="RULER: What's the Real Context Size of Your Long-Context Language Models? (arXiv 2404.06654)",
)
