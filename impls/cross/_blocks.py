"""The blocks that cross mechanisms share: projections around one softmax, and a feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention
from attnbench.kernels import few_query


class Read(nn.Module):
    """Wo·merge(softmax(q kᵀ/√D) v) with q from tokens of width ``dim`` and k, v from others.

    The heads have width dim / heads on both sides; the caller checks that ``heads`` divides ``dim``.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor, *, key_bias: Tensor | None, backend: str) -> Tensor:
        """Let x (B, N, dim) read context (B, M, ·); ``key_bias`` (B, 1, M) as :func:`few_query` takes it."""
        q = Attention.split(self.q_proj(x), self.heads)
        k = Attention.split(self.k_proj(context), self.heads)
        v = Attention.split(self.v_proj(context), self.heads)
        o, _ = few_query(q, k, v, key_bias=key_bias, need_lse=False, backend=backend)
        return self.out_proj(Attention.join(o))


def read_flops(n: int, m: int, dim: int, context_dim: int) -> int:
    """Forward FLOPs of a :class:`Read` of m tokens by n: four projections and the attention."""
    return 4 * n * dim * dim + 4 * m * context_dim * dim + 4 * n * m * dim


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Linear → GELU → Linear, 4·N·dim·hidden FLOPs."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def feed_forward_flops(n: int, dim: int, hidden: int) -> int:
    """Forward FLOPs of :func:`feed_forward` on n tokens."""
    return 4 * n * dim * hidden


def both_padded(padded: Tensor, *, queries_too: bool) -> Tensor:
    """Pairs to remove where queries compete, bool (B, 1, M or 1, M): those with a padded key.

    With ``queries_too`` (self attention) a padded token does not compete either.
    """
    keys = padded[:, None, None, :]
    return torch.logical_or(keys, padded[:, None, :, None]) if queries_too else keys
