"""The k-th largest number of every prefix of a sequence: what a causal top-k compares with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 256
"""Prefixes that are ranked at once."""


def running_kth_largest(x: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """The k-th largest of x[..., : i + 1] for every i, of the shape of x; −∞ while there are fewer than k.

    Chunk by chunk, with the k largest of all earlier numbers at hand. With at most c new ones, the k-th
    largest is the (c + 1)-th of the new ones and the c + 1 smallest of the old: at most c of them exceed the
    largest of those, which the rest of the old ones do not undercut. So c rows of 2c + 1 numbers are ranked
    per chunk: O(N·c) numbers in all, and N/c merges of k + c.
    """
    leaders = x.new_full((*x.shape[:-1], k), -math.inf)  # descending
    parts = []
    for some in x.split(chunk, -1):
        length = some.shape[-1]
        width = min(k, length + 1)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        new = some.unsqueeze(-2).expand(*some.shape, length).masked_fill(later, -math.inf)
        old = leaders[..., k - width :].unsqueeze(-2).expand(*some.shape, width)
        ranked = torch.cat([old, new], -1).sort(dim=-1, descending=True).values
        parts.append(ranked[..., width - 1])
        leaders = torch.cat([leaders, some], -1).sort(dim=-1, descending=True).values[..., :k]
    return torch.cat(parts, -1)
