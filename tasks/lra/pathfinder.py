"""Pathfinder (noncausal self attention): tell whether two dots are the ends of one dashed curve.

After Long Range Arena (arXiv 2011.04006), pixel by pixel. Generated in ``tiny`` and ``small``, which are not
the arena's pictures; ``paper`` reads those.
"""

from __future__ import annotations

from attnbench.impls.spec import Pattern
from attnbench.tasks.lra._curves import Curves, PublishedCurves
from attnbench.tasks.lra._session import ArenaTask, arena_preset
from attnbench.tasks.trainer import Recipe

TINY = arena_preset(
    "pathfinder",
    "tiny",
    Curves(side=8, steps=6, distractors=1, train=12_800, test=1_000),
    Recipe(steps=600, lr=3e-3, warmup=60),
    batch=32,
    heads=4,
    head_dim=16,
    layers=2,
    ratio=2,
    eval_batch=250,
)

SMALL = arena_preset(
    "pathfinder",
    "small",
    Curves(side=32, steps=28, distractors=4, train=100_000, test=4_000),
    Recipe(steps=6_000, lr=1e-3, warmup=600, dtype="bfloat16", max_seconds=420.0),
    batch=128,
    heads=8,
    head_dim=16,
    layers=4,
    ratio=2,
    eval_batch=128,
)

PAPER = arena_preset(
    "pathfinder",
    "paper",
    PublishedCurves(side=32),
    Recipe(steps=62_400, lr=1e-3, warmup=312),
    batch=512,
    heads=4,
    head_dim=8,
    layers=4,
    ratio=1,
    eval_batch=256,
    dropout=0.2,
)
"""The net of the arena's repository, 200 epochs. Its heads are 4 wide in 16 channels, ours 8 in 32, and it
reads the mean of all tokens where ours reads the one in front."""

TASK = ArenaTask(
    id="pathfinder",
    title="Pathfinder",
    patterns=(Pattern.NS,),
    metric="accuracy",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="Generated pictures of dashed curves that are like Pathfinder (tiny, small), or the published ones "
    "of 32² pixels (paper)",
    source="Long Range Arena: A Benchmark for Efficient Transformers (arXiv 2011.04006)",
)
