"""Means of consecutive segments: the landmarks of Nystromformer and LARA."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_means(u: Tensor, count: int, padded: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means of ``count`` consecutive segments of the tokens of u (B, H, N, D), as (B, H, count, D).

    Where ``count`` does not divide N, the first segments have ⌊N/count⌋ tokens and the others one more.
    With ``padded`` (B, N), True where a token is padding, the segments divide the remaining tokens only, as
    if the padding were not there; the second result (B, count) is then False for a segment without a token,
    whose mean is 0. It is None without ``padded``. Needs 1 ≤ count ≤ N.
    """
    if padded is not None:
        return _means_of_kept(u, count, padded)
    size, longer = divmod(u.shape[-2], count)
    if longer == 0:
        return u.unflatten(-2, (count, size)).mean(-2), None
    short = count - longer
    head, tail = u.split((short * size, longer * (size + 1)), -2)
    means = (head.unflatten(-2, (short, size)).mean(-2), tail.unflatten(-2, (longer, size + 1)).mean(-2))
    return torch.cat(means, -2), None


def _means_of_kept(u: Tensor, count: int, padded: Tensor) -> tuple[Tensor, Tensor]:
    """Segment means over the tokens that are not padding, by one averaging matrix per batch element."""
    kept = ~padded
    rank = kept.cumsum(-1) - 1
    total = kept.sum(-1, keepdim=True)
    size = total // count
    short = (size + 1) * count - total
    boundary = short * size
    early = rank // size.clamp_min(1)
    late = short + (rank - boundary) // (size + 1)
    segment = torch.where(rank < boundary, early, late)
    slots = torch.arange(count, device=u.device).unsqueeze(-1)
    member = (segment.unsqueeze(1) == slots) & kept.unsqueeze(1)
    weights = member.to(u.dtype) / member.sum(-1, keepdim=True).clamp_min(1)
    means = weights.unsqueeze(1) @ u.masked_fill(padded[:, None, :, None], 0.0)
    return means, member.any(-1)
