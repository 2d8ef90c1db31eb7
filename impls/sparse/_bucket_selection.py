"""Sorted lists of tokens as a selection: which pairs the buckets of hashing and clustering show at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.kernels import Buckets


@dataclass(frozen=True, eq=False)
class BucketSelection:
    """The lists of :func:`attnbench.kernels.buckets`, buckets of equal size, seen as pairs of tokens."""

    lists: Buckets

    def to_dense_mask(self) -> Tensor:
        """(B, Hs, N, M) bool, True where query i sees key j in some bucket, before causality and padding.

        Holds B·Hs·Lq·c numbers for chunks of c keys, and the mask.
        """
        lists = self.lists
        queries = lists.queries.unflatten(-1, (lists.count, lists.query_chunk)).long().unsqueeze(-1)
        keys = lists.keys.unflatten(-1, (lists.count, lists.key_chunk)).long().unsqueeze(-2)
        mask = torch.zeros(*queries.shape[:2], lists.n * lists.m + 1, dtype=torch.bool, device=queries.device)
        for back in range(lists.look_back + 1):
            seen_keys = keys.roll(back, 2)
            seen = (queries >= 0) & (seen_keys >= 0) & self._same_label(back)
            pair = torch.where(seen, queries * lists.m + seen_keys, lists.n * lists.m)
            mask.scatter_(-1, pair.flatten(2), True)
        return mask[..., :-1].unflatten(-1, (lists.n, lists.m))

    def _same_label(self, back: int) -> Tensor:
        lists = self.lists
        if lists.query_labels is None or lists.key_labels is None:
            return torch.ones((), dtype=torch.bool, device=lists.queries.device)
        ours = lists.query_labels.unflatten(-1, (lists.count, lists.query_chunk)).unsqueeze(-1)
        theirs = lists.key_labels.unflatten(-1, (lists.count, lists.key_chunk)).unsqueeze(-2)
        return ours == theirs.roll(back, 2)
