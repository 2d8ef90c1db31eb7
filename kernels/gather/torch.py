"""The torch backend of :func:`attnbench.kernels.gather`: copy the listed keys, then attend.

A list per query is a list of blocks of one key; a shared list leaves dense attention over fewer keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.kernels._attention import scaled_scores, softmax_product
from attnbench.kernels.gather._shared import listed
from attnbench.kernels.token_blocks.torch import token_blocks
from attnbench.kernels.token_selection import SharedKeys, TokenKeys


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenKeys | SharedKeys,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse for any dtype and option; autograd gives every gradient.

    A shared list of K keys holds B·H·N·K scores and weights; for a list per query see ``token_blocks``.
    """
    if isinstance(selection, TokenKeys):
        return token_blocks(q, k, v, selection.blocks, causal=causal, scale=scale, key_bias=key_bias)
    n, m = q.shape[2], k.shape[2]
    keys, values, bias, index = listed(k, v, selection, key_bias, q.shape[1])
    scores = scaled_scores(q, keys, scale)
    if bias is not None:
        scores = scores.add_(bias.repeat_interleave(q.shape[1] // bias.shape[1], 1).unsqueeze(-2))
    if causal:
        index = index.repeat_interleave(q.shape[1] // index.shape[1], 1).unsqueeze(-2)
        last_key = torch.arange(n, device=q.device)[:, None] + (m - n)
        scores = scores.masked_fill(index > last_key, -math.inf)
    return softmax_product(scores, values, None)
