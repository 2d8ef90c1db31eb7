"""The torch backend of :func:`attnbench.kernels.block_sparse`: gather the listed key blocks, then attend.

Every block of queries gets its keys as one contiguous row, so that scores exist only for listed blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels._attention import scaled_scores, softmax_product
from attnbench.kernels.selection import Selection

CHUNK_SCORES = 2**25
"""Scores computed at a time, 128 MiB in fp32; without gradients no more than that exist at once."""


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    key_bias: Tensor | None,
    row_threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype and option; autograd gives every gradient.

    For gradients it holds B·H·N·K scores and weights, and B·H·Tq·K·(D + Dv) gathered keys and values, where
    K = Kmax·block_k is the width of the longest possible list. On CPU, Kmax is cut to the longest list;
    elsewhere that would wait for the device, and a selection knows its ``k_max`` or pays for Tk.
    """
    b, h, n, _ = q.shape
    lists = _Lists(selection, b, h)
    device = q.device
    queries, keys = q_pos, k_pos
    if causal:
        queries = torch.arange(n, device=device) + (k.shape[2] - n) if q_pos is None else q_pos
        keys = torch.arange(k.shape[2], device=device) if k_pos is None else k_pos
    rows = [_rows(x, selection, (b, h, n)) for x in (queries, row_threshold)]
    columns = [_columns(x, selection, (b, h, k.shape[2])) for x in (keys, key_bias)]
    q_blocks = F.pad(q, (0, 0, 0, -n % selection.block_q)).unflatten(2, (-1, selection.block_q))
    k_blocks, v_blocks = (
        F.pad(x, (0, 0, 0, -x.shape[2] % selection.block_k)).unflatten(2, (-1, selection.block_k))
        for x in (k, v)
    )
    per_block = b * h * selection.block_q * max(1, lists.width) * selection.block_k
    chunk = max(1, CHUNK_SCORES // per_block)
    parts = [
        _attend(q_blocks, k_blocks, v_blocks, lists, slice(start, start + chunk), rows, columns, scale)
        for start in range(0, selection.query_blocks, chunk)
    ]
    o, lse = (torch.cat(x, 2).flatten(2, 3)[:, :, :n] for x in zip(*parts, strict=True))
    return o, lse


class _Lists:
    """The lists of every (b, h), cut to the longest on CPU, where reading its length does not wait."""

    def __init__(self, selection: Selection, b: int, h: int) -> None:
        indices = selection.indices
        if indices.device.type == "cpu":
            indices = indices[..., : max(1, int(selection.counts.max()))]
        self.width = indices.shape[-1]
        self.block_k = selection.block_k
        live = selection.live[..., : self.width]
        offset = torch.arange(self.block_k, device=indices.device)
        inside = indices.unsqueeze(-1) * self.block_k + offset < selection.m
        self.blocks = _per_head(indices.clamp(min=0).long(), b, h)
        self.exists = _per_head(live.unsqueeze(-1) & inside, b, h)

    def gather(self, blocks: Tensor, at: slice) -> Tensor:
        """Pick from (B, Hkv, Tk, block_k, ...) the listed blocks, (B, H, chunk, width·block_k, ...)."""
        index = self.blocks[:, :, at]
        b, h = index.shape[:2]
        batch = torch.arange(b, device=index.device).view(b, 1, 1, 1)
        head = torch.arange(h, device=index.device).view(1, h, 1, 1) // (h // blocks.shape[1])
        return blocks[batch, head, index].flatten(3, 4)


def _per_head(x: Tensor, b: int, h: int) -> Tensor:
    return x.repeat_interleave(h // x.shape[1], 1).expand(b, *(-1,) * (x.dim() - 1))


def _rows(x: Tensor | None, selection: Selection, shape: tuple[int, int, int]) -> Tensor | None:
    """(B, H, N) per query as (B, H, Tq, block_q)."""
    if x is None:
        return None
    return F.pad(x.expand(shape), (0, -shape[2] % selection.block_q)).unflatten(2, (-1, selection.block_q))


def _columns(x: Tensor | None, selection: Selection, shape: tuple[int, int, int]) -> Tensor | None:
    """(B, H, M) per key as (B, H, Tk, block_k)."""
    if x is None:
        return None
    return F.pad(x.expand(shape), (0, -shape[2] % selection.block_k)).unflatten(2, (-1, selection.block_k))


def _attend(
    q_blocks: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    lists: _Lists,
    at: slice,
    rows: list[Tensor | None],
    columns: list[Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o (B, H, chunk, block_q, Dv) and lse (B, H, chunk, block_q) of some blocks of queries."""
    queries, threshold = (None if x is None else x[:, :, at].unsqueeze(-1) for x in rows)
    keys, bias = (None if x is None else lists.gather(x, at).unsqueeze(-2) for x in columns)
    q, k, v = q_blocks[:, :, at], lists.gather(k_blocks, at), lists.gather(v_blocks, at)
    blocks = q.shape[:3]
    scores = scaled_scores(q.flatten(0, 2).unsqueeze(1), k.flatten(0, 2).unsqueeze(1), scale)
    mask = lists.exists[:, :, at].flatten(3, 4).unsqueeze(-2)
    if keys is not None:
        mask = mask & (keys <= queries)
    if threshold is not None:
        mask = mask & (bias >= threshold)
    if bias is not None:
        scores = scores.add_(bias.flatten(0, 2).unsqueeze(1))
    mask = mask.expand(*blocks, *scores.shape[2:]).flatten(0, 2).unsqueeze(1)
    scores = scores.masked_fill_(~mask, -math.inf)
    o, lse = softmax_product(scores, v.flatten(0, 2).unsqueeze(1), None)
    return o.squeeze(1).unflatten(0, blocks), lse.squeeze(1).unflatten(0, blocks)
