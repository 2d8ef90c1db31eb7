"""The torch backend of :func:`attnbench.kernels.token_blocks`: some queries at a time, by lists or by mask.

Gathering costs a copy of the listed keys per query, a mask costs a product with every key: the copies win
where the lists are short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels._attention import scaled_scores, softmax_product
from attnbench.kernels.token_blocks._units import Units, units
from attnbench.kernels.token_selection import TokenBlocks

CHUNK_SCORES = 2**25
"""Scores, or numbers of gathered keys, computed at a time; without gradients no more exist at once."""
DENSE_BELOW = 8
"""A product with every key is taken where the keys are fewer than this many times the listed ones."""


def token_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype and option; autograd gives every gradient.

    Holds for gradients, with L = K·block_k the width of the longest possible list, B·H·N·M scores and weights
    where M < 8·L, else B·H·N·L of them and B·N·L·(D + Dv) gathered keys per heads that share a list.
    """
    b, h, n, d = q.shape
    m, dv = k.shape[2], v.shape[3]
    bias = None if key_bias is None else key_bias.expand(b, h, m)
    shared = units(h, k.shape[1], selection.indices.shape[1])
    width = selection.indices.shape[3] * selection.block_k
    dense = m < DENSE_BELOW * width
    per_query = b * (h * m if dense else max(h * width, shared.count * width * (d + dv)))
    chunk = max(1, CHUNK_SCORES // per_query)
    parts = []
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        last_key = torch.arange(rows.start, rows.stop, device=q.device) + (m - n) if causal else None
        attend = _with_mask if dense else _with_lists
        parts.append(attend(q[:, :, rows], k, v, bias, selection, rows, last_key, scale, shared))
    o, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return o, lse


def _with_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    selection: TokenBlocks,
    rows: slice,
    last_key: Tensor | None,
    scale: float,
    shared: Units,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse of some queries from their scores with every key."""
    m = k.shape[2]
    blocks = selection.block_mask[:, :, rows]
    mask = blocks.repeat_interleave(selection.block_k, 3)[..., :m]
    if last_key is not None:
        mask = mask & (torch.arange(m, device=q.device) <= last_key[:, None])
    scores = scaled_scores(q, k, scale)
    if bias is not None:
        scores = scores.add_(bias.unsqueeze(-2))
    grouped = scores.view(scores.shape[0], mask.shape[1], -1, *scores.shape[2:])
    scores = grouped.masked_fill(~mask.unsqueeze(2), -math.inf).view(scores.shape)
    return softmax_product(scores, v, None)


def _with_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    selection: TokenBlocks,
    rows: slice,
    last_key: Tensor | None,
    scale: float,
    shared: Units,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse of some queries from copies of the keys that they list."""
    b, _, n, d = q.shape
    sel, m = selection, k.shape[2]
    inside = torch.arange(sel.block_k, device=q.device)
    index = (sel.indices[:, :, rows].unsqueeze(-1) * sel.block_k + inside).flatten(3)
    exists = sel.live[:, :, rows].repeat_interleave(sel.block_k, 3) & (index < m)
    if last_key is not None:
        exists = exists & (index <= last_key[:, None])
    index, exists = (
        x.repeat_interleave(shared.count // x.shape[1], 1).expand(b, -1, -1, -1)
        for x in (index.clamp(0, m - 1).long(), exists)
    )
    batch = torch.arange(b, device=q.device).view(b, 1, 1, 1)
    unit = torch.arange(shared.count, device=q.device).view(1, -1, 1, 1)
    key_head = unit // (shared.count // k.shape[1])
    listed_k, listed_v = (x[batch, key_head, index].flatten(0, 2).unsqueeze(1) for x in (k, v))
    # the heads of a unit are the rows of one product
    heads = q.unflatten(1, (shared.count, shared.rows)).transpose(2, 3)
    scores = scaled_scores(heads.reshape(-1, 1, shared.rows, d), listed_k, scale)
    if bias is not None:
        at = index.unsqueeze(2).expand(-1, -1, shared.rows, -1, -1).flatten(3)
        listed = bias.unflatten(1, (shared.count, shared.rows)).gather(3, at).unflatten(3, (n, -1))
        scores = scores.add_(listed.transpose(2, 3).reshape(scores.shape))
    scores = scores.masked_fill_(~exists.flatten(0, 2)[:, None, None], -math.inf)
    o, lse = softmax_product(scores, listed_v, None)
    o, lse = (x.squeeze(1).unflatten(0, (b, shared.count, n)).transpose(2, 3).flatten(1, 2) for x in (o, lse))
    return o, lse
