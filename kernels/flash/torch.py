"""The torch backend of :func:`attnbench.kernels.flash`: what a good practitioner writes in eager PyTorch.

Where only o is wanted that is ``scaled_dot_product_attention``; its fused kernels give no lse, no soft-cap
and no sink, and there it is two batched products around a softmax in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels._attention import scaled_scores, softmax_product
from attnbench.kernels.flash._masks import all_biases, band, dense_mask, sdpa_mask
from attnbench.kernels.flash.mask import Mask, RelativeBias


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_pos: Tensor | None,
    mask: Mask | None,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    rel_bias: RelativeBias | None,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse for any dtype and option; autograd gives every gradient.

    With lse, a soft-cap or a sink it holds B·H·N·M scores in fp32 (fp64 for fp64 inputs), and as many
    weights for the backward pass.
    """
    where = band(q, k, causal, window)
    bias = all_biases(bias, rel_bias)
    if not need_lse and softcap <= 0 and sink is None:
        # scale 0 goes with a mask: a fused kernel multiplies the −inf of is_causal by it
        square = where.n == where.m and where.left is None and where.right == 0 and scale != 0.0
        if square and q_pos is None and mask is None and key_bias is None and bias is None:
            return _sdpa(q, k, v, None, True, scale), None
        dense = dense_mask(where, q_pos, mask)
        attn_mask = sdpa_mask(dense and dense.visible, key_bias, bias, q.dtype)
        return _sdpa(q, k, v, attn_mask, False, scale), None
    dense = dense_mask(where, q_pos, mask)
    scores = scaled_scores(q, k, scale / softcap if softcap > 0 else scale)
    if softcap > 0:
        scores = torch.tanh(scores) * softcap
    if bias is not None:
        scores = scores.add_(bias)
    if key_bias is not None:
        scores = scores.add_(key_bias.unsqueeze(-2))
    if dense is not None:
        scores = scores.masked_fill_(~dense.visible, -math.inf)
    o, lse = softmax_product(scores, v, sink)
    return o, lse if need_lse else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The fused attention of PyTorch; it gives 0 to a query without keys."""
    grouped = k.shape[1] != q.shape[1]
    if grouped and mask is not None:
        # no fused kernel takes grouped heads and a mask: repeated keys cost M·D, the map of the rest N·M
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
