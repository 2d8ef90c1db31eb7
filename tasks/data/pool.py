"""Generated samples: a generator for every part of every problem, and the order in which a pool is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Part = Literal["train", "test"]


def generator(problem: object, part: Part, version: int) -> np.random.Generator:
    """A generator for one part of the data of ``problem``: a dataclass whose ``repr`` states all its dials.

    Parts, problems and versions of the code that draws have different seeds.
    """
    digest = hashlib.sha256(f"{version}/{part}/{problem!r}".encode()).digest()
    return np.random.default_rng(list(digest))


def fingerprint(what: str, *arrays: NDArray[Any] | Tensor) -> str:
    """SHA-256 of a description and of the content of ``arrays``."""
    found = hashlib.sha256(what.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def epochs(columns: Sequence[Tensor], batch: int, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """A source of ``batch`` rows of ``columns``, tensors of one length that is at least ``batch``.

    Every epoch has an order of its own, which ``seed`` determines; rows beyond the last full batch of an
    epoch wait for the next.
    """
    order_of = torch.Generator().manual_seed(seed)
    count, device = len(columns[0]), columns[0].device
    left: list[Tensor] = []

    def take() -> tuple[Tensor, ...]:
        if not left:
            order = torch.randperm(count, generator=order_of)[: count - count % batch]
            left.extend(reversed(order.to(device).split(batch)))
        rows = left.pop()
        return tuple(column[rows] for column in columns)

    return take
