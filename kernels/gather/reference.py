"""The definition of :func:`attnbench.kernels.gather`: dense attention under a mask."""

from __future__ import annotations

from torch import Tensor

from attnbench.kernels.token_blocks.reference import masked_attention
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
    """Compute o and lse from the N×M score matrix; every gradient is autograd's."""
    return masked_attention(q, k, v, selection, causal=causal, scale=scale, key_bias=key_bias)
