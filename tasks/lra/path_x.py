"""Pathfinder at its greatest length (noncausal self attention): 16,384 pixels, where softmax attention fails.

After Long Range Arena (arXiv 2011.04006). ``tiny`` is far smaller and no mechanism leaves chance there: it
tells that a mechanism runs, not what it is good for, and has no learning check.
"""

from __future__ import annotations

from attnbench.impls.spec import Pattern
from attnbench.tasks.lra._curves import Curves, PublishedCurves
from attnbench.tasks.lra._session import ArenaTask, arena_preset
from attnbench.tasks.trainer import Recipe

TINY = arena_preset(
    "path_x",
    "tiny",
    Curves(side=16, steps=12, distractors=1, train=3_200, test=500),
    Recipe(steps=80, lr=2e-3, warmup=8),
    batch=16,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=125,
)

SMALL = arena_preset(
    "path_x",
    "small",
    Curves(side=128, steps=112, distractors=6, train=20_000, test=1_000),
    Recipe(steps=1_000, lr=1e-3, warmup=100, dtype="bfloat16", max_seconds=420.0),
    batch=16,
    heads=4,
    head_dim=16,
    layers=4,
    ratio=2,
    eval_batch=16,
)

PAPER = arena_preset(
    "path_x",
    "paper",
    PublishedCurves(side=128),
    Recipe(steps=62_400, lr=1e-3, warmup=312),
    batch=512,
    heads=4,
    head_dim=8,
    layers=4,
    ratio=1,
    eval_batch=32,
    dropout=0.2,
)
"""The net of Pathfinder; see there. A batch of 512 needs tens of gigabytes."""

TASK = ArenaTask(
    id="path_x",
    title="Path-X",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated pictures of dashed curves that are like Pathfinder (tiny, small), or the published ones "
    "of 128² pixels (paper)",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
