"""Passkey retrieval (causal self attention): one marked key and value in a haystack, asked for at the end.

One needle alone is marked, so that no key has to be compared: what counts is how far and at how great a
length it is still found. ``multi_needle`` is the task in which keys compete.
"""

from __future__ import annotations

from dataclasses import replace

from attnbench.impls.spec import Pattern
from attnbench.tasks.base import LearningCheck
from attnbench.tasks.recall._needles import Needles
from attnbench.tasks.recall._session import RecallPreset, RecallTask, shape
from attnbench.tasks.trainer import Recipe

_TINY = Needles(length=128, needles=1, queries=1, keys=32, values=28, fillers=64)
TINY = RecallPreset(
    shape=shape("passkey", "tiny", batch=32, heads=2, head_dim=32, n=128),
    recipe=Recipe(steps=200, lr=3e-3, warmup=20),
    checks={Pattern.CS: LearningCheck(softmax=0.9, no_mixing=0.15)},
    problem=_TINY,
    loads={f"n={n}": replace(_TINY, length=n) for n in (64, 128, 256)},
    pool=8_000,
    tests=300,
    layers=2,
    ratio=2,
    eval_batch=64,
    std=0.1,
)
"""Measured on one thread with seed 0 (accuracy): softmax 1.00; chance is 1/28. Embeddings that start from 0.3
reach 0.38 in 250 steps."""

_SMALL = Needles(length=1024, needles=1, queries=1, keys=64, values=64, fillers=256)
SMALL = RecallPreset(
    shape=shape("passkey", "small", batch=64, heads=4, head_dim=64, n=1024),
    recipe=Recipe(steps=1_500, lr=1e-3, warmup=150, dtype="bfloat16", max_seconds=420.0),
    checks={},
    problem=_SMALL,
    loads={f"n={n}": replace(_SMALL, length=n) for n in (1024, 2048, 4096, 8192)},
    pool=50_000,
    tests=1_000,
    layers=4,
    ratio=4,
    eval_batch=16,
)

PAPER = replace(
    SMALL,
    shape=shape("passkey", "paper", batch=64, heads=8, head_dim=64, n=4096),
    recipe=Recipe(steps=20_000, lr=5e-4, warmup=1_000, dtype="bfloat16"),
    problem=replace(_SMALL, length=4096),
    loads={f"n={n}": replace(_SMALL, length=n) for n in (4096, 8192, 16_384, 32_768, 65_536, 131_072)},
    pool=20_000,
    tests=200,
    layers=8,
    eval_batch=1,
)
"""The lengths of RULER, 4 k to 128 k; RULER asks pretrained models, this one is trained at 4 k."""

TASK = RecallTask(
    id="passkey",
    title="Passkey retrieval",
    patterns=(Pattern.CS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated haystacks of random tokens with one marked key and value",
    source="RULER: What's the Real Context Size of Your Long-Context Language Models? (arXiv 2404.06654)",
)
