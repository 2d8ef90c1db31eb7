"""Point clouds of analytic shapes, and the partial scan of one: what completion learns from without data.

Eight families, each with random proportions, scaled along its axes, turned about z, and centred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnbench.tasks.data import pool

VERSION = 1
"""To be raised with every change of what is drawn."""

RADIUS = 0.5
"""Largest distance of a point from the centre of its cloud."""

Points = NDArray[Any]
Draw = np.random.Generator


@dataclass(frozen=True)
class Shapes:
    """All dials of a set of shapes: clouds in the two parts, and points of each."""

    train: int
    test: int
    points: int


def _sphere(draw: Draw, count: int) -> Points:
    points = draw.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _box(draw: Draw, count: int) -> Points:
    points = draw.uniform(-1.0, 1.0, (count, 3))
    points[np.arange(count), draw.integers(0, 3, count)] = draw.choice([-1.0, 1.0], count)
    return points


def _disc(draw: Draw, count: int, radius: float, height: float | Points) -> Points:
    angle, distance = draw.uniform(0.0, 2.0 * np.pi, count), radius * np.sqrt(draw.uniform(0.0, 1.0, count))
    return np.stack([distance * np.cos(angle), distance * np.sin(angle), np.broadcast_to(height, count)], 1)


def _tube(draw: Draw, count: int, radius: float, low: float, high: float) -> Points:
    angle = draw.uniform(0.0, 2.0 * np.pi, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), draw.uniform(low, high, count)], 1)


def _cylinder(draw: Draw, count: int) -> Points:
    ends = draw.binomial(count, 1.0 / 3.0)  # side 4π, two ends of π each
    caps = _disc(draw, ends, 1.0, draw.choice([-1.0, 1.0], ends))
    return np.concatenate([_tube(draw, count - ends, 1.0, -1.0, 1.0), caps])


def _cone(draw: Draw, count: int) -> Points:
    base = draw.binomial(count, 1.0 / (1.0 + np.sqrt(5.0)))
    side = _disc(draw, count - base, 1.0, 0.0)
    side[:, 2] = 1.0 - 2.0 * np.linalg.norm(side[:, :2], axis=1)
    return np.concatenate([side, _disc(draw, base, 1.0, -1.0)])


def _torus(draw: Draw, count: int) -> Points:
    radius = draw.uniform(0.2, 0.45)
    inner = draw.uniform(0.0, 2.0 * np.pi, 4 * count)
    dense = draw.uniform(0.0, 1.0 + radius, 4 * count) < 1.0 + radius * np.cos(inner)
    inner, outer = inner[dense][:count], draw.uniform(0.0, 2.0 * np.pi, count)
    wide = 1.0 + radius * np.cos(inner)
    return np.stack([wide * np.cos(outer), wide * np.sin(outer), radius * np.sin(inner)], 1)


def _lamp(draw: Draw, count: int) -> Points:
    """A stem with a disc on its top."""
    stem = count // 3
    return np.concatenate([_tube(draw, stem, 0.1, -1.0, 1.0), _disc(draw, count - stem, 0.8, 1.0)])


def _bracket(draw: Draw, count: int) -> Points:
    """Two slabs at a right angle."""
    upright = count // 2
    slabs = _box(draw, count)
    slabs[:upright] = slabs[:upright] * [0.15, 1.0, 1.0] + [-0.85, 0.0, 0.0]
    slabs[upright:] = slabs[upright:] * [0.85, 1.0, 0.15] + [0.15, 0.0, -0.85]
    return slabs


def _helix(draw: Draw, count: int) -> Points:
    turns, along = draw.uniform(1.5, 3.0), draw.uniform(0.0, 1.0, count)
    angle = 2.0 * np.pi * turns * along
    centre = np.stack([np.cos(angle), np.sin(angle), 2.0 * along - 1.0], 1)
    return centre + 0.08 * _sphere(draw, count)


FAMILIES: tuple[Callable[[Draw, int], Points], ...] = (
    _sphere,
    _box,
    _cylinder,
    _cone,
    _torus,
    _lamp,
    _bracket,
    _helix,
)


def cloud(draw: Draw, family: int, count: int) -> NDArray[np.float32]:
    """``count`` points (count, 3) of a random member of a family, in random order, within ``RADIUS``."""
    points = FAMILIES[family](draw, count) * draw.uniform(0.5, 1.0, 3)
    turn = draw.uniform(0.0, 2.0 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    points = points @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    points -= (points.max(0) + points.min(0)) / 2.0
    points *= RADIUS / np.linalg.norm(points, axis=1).max()
    return draw.permutation(points).astype(np.float32)


def clouds(shapes: Shapes, part: pool.Part) -> tuple[Tensor, Tensor]:
    """(points (n, points, 3), families (n)) of one part; families take turns."""
    draw = pool.generator(shapes, part, VERSION)
    count = shapes.train if part == "train" else shapes.test
    families = np.arange(count) % len(FAMILIES)
    points = np.stack([cloud(draw, int(family), shapes.points) for family in families])
    return torch.from_numpy(points), torch.from_numpy(families)


def partial(points: Tensor, viewpoints: Tensor, kept: int) -> Tensor:
    """The ``kept`` points of each cloud (B, P, 3) that are farthest from its viewpoint (B, 3)."""
    distance = (points - viewpoints[:, None]).square().sum(-1)
    order = distance.topk(kept, dim=1).indices
    return points.gather(1, order[..., None].expand(-1, -1, 3))
