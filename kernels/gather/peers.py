"""Attention of others as a backend of :func:`attnbench.kernels.gather`: flex with a BlockMask."""

from __future__ import annotations

from torch import Tensor

from attnbench.kernels.token_blocks.peers import masked_flex
from attnbench.kernels.token_selection import SharedKeys, TokenKeys


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenKeys | SharedKeys,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    Keeps a mask of M bytes per head of lists, N·M with a list per query. Raises Unsupported on CPU when a
    gradient is required: flex has no backward pass there.
    """
    return masked_flex("gather", q, k, v, selection, causal=causal, scale=scale, key_bias=key_bias)
