"""How well a point cloud matches another: Chamfer distances and F-score, and the loss that trains it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnbench.tasks.cab._pointr import distances, pick
from attnbench.tasks.data.extras import require

F_RADII = (0.01, 0.05)
"""Distances up to which a point counts as found: that of the papers, and one for sparse clouds."""

PAIRS_AT_ONCE = 1 << 28
"""Distances that are in memory at a time, 1 GiB: all those of a batch of large clouds would not fit."""


def chamfer_loss(p: Tensor, g: Tensor) -> Tensor:
    """Mean over a batch of ½(mean over p of the distance to g + mean over g of that to p); (B, P, 3) each.

    Which point is nearest has no gradient, so all pairs are looked at outside of it.
    """
    p, g = p.float(), g.float()
    nearest_g, nearest_p = _nearest(p, g)
    to_g = torch.linalg.vector_norm(p - pick(g, nearest_g), dim=-1)
    to_p = torch.linalg.vector_norm(g - pick(p, nearest_p), dim=-1)
    return 0.5 * (to_g.mean() + to_p.mean())


@torch.no_grad()
def _nearest(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, P) of the nearest g of every p and (B, Q) of the reverse, some clouds at a time."""
    at_once = max(1, PAIRS_AT_ONCE // (p.shape[1] * g.shape[1]))
    found = []
    for some_p, some_g in zip(p.split(at_once), g.split(at_once), strict=True):
        distance = distances(some_p, some_g)
        found.append((distance.argmin(2), distance.argmin(1)))
    of_p, of_g = zip(*found, strict=True)
    return torch.cat(of_p), torch.cat(of_g)


def scores(p: NDArray[Any], g: NDArray[Any]) -> dict[str, float]:
    """``cd_l1``, ``cd_l2`` (both times 1000) and ``f_score@r=…`` of a prediction p and the truth g.

    CD-l1 is half the sum of the two mean distances, CD-l2 the sum of the two mean squared distances. Points
    that are exactly zero are padding and not counted. Without a finite prediction all distances are inf.
    """
    tree = require("scipy.spatial", "SciPy", "point-cloud completion").cKDTree
    p, g = p[np.any(p != 0.0, 1)], g[np.any(g != 0.0, 1)]
    if not len(p) or not np.isfinite(p).all():
        return {"cd_l1": math.inf, "cd_l2": math.inf, **{f"f_score@r={r:g}": 0.0 for r in F_RADII}}
    to_g, to_p = tree(g).query(p)[0], tree(p).query(g)[0]
    found = {
        "cd_l1": 1000.0 * 0.5 * float(to_g.mean() + to_p.mean()),
        "cd_l2": 1000.0 * float(np.square(to_g).mean() + np.square(to_p).mean()),
    }
    for radius in F_RADII:
        precision, recall = float((to_g < radius).mean()), float((to_p < radius).mean())
        both = precision + recall
        found[f"f_score@r={radius:g}"] = 2.0 * precision * recall / both if both else 0.0
    return found


def by_category(scored: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Means within each category, then over the categories, of the scores of all clouds."""
    categories = sorted({category for category, _ in scored})
    return {
        name: float(np.mean([np.mean([s[name] for c, s in scored if c == k]) for k in categories]))
        for name in scored[0][1]
    }
