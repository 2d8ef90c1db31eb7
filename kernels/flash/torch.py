"""The torch backend of :func:`attnbench.kernels.flash`: what a good practitioner writes in eager PyTorch.

Where only o is wanted that is ``scaled_dot_product_attention``; its fused kernels give no lse, no soft-cap
and no sink, and there it is two batched products around a softmax in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels.flash._masks import band, dense_mask, sdpa_mask


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_pos: Tensor | None,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse for any dtype and option; autograd gives every gradient.

    With lse, a soft-cap or a sink it holds B·H·N·M scores in fp32 (fp64 for fp64 inputs), and as many
    weights for the backward pass.
    """
    where = band(q, k, causal, window)
    if not need_lse and softcap <= 0 and sink is None:
        # scale 0 goes with a mask: a fused kernel multiplies the −inf of is_causal by it
        square = where.n == where.m and where.left is None and where.right == 0 and scale != 0.0
        if square and q_pos is None and key_bias is None and bias is None:
            return _sdpa(q, k, v, None, True, scale), None
        mask = dense_mask(where, q_pos)
        attn_mask = sdpa_mask(mask and mask.visible, key_bias, bias, q.dtype)
        return _sdpa(q, k, v, attn_mask, False, scale), None
    mask = dense_mask(where, q_pos)
    scores = _scores(q, k, scale / softcap if softcap > 0 else scale)
    if softcap > 0:
        scores = torch.tanh(scores) * softcap
    if bias is not None:
        scores = scores.add_(bias)
    if key_bias is not None:
        scores = scores.add_(key_bias.unsqueeze(-2))
    if mask is not None:
        scores = scores.masked_fill_(~mask.visible, -math.inf)
    o, lse = _softmax_product(scores, v, sink)
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


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale·q kᵀ as (B, H, N, M) in fp32 or fp64; the query heads of a group are rows of one product."""
    b, h, n, d = q.shape
    kv_heads, m = k.shape[1:3]
    rows = q.reshape(b * kv_heads, -1, d)
    columns = k.reshape(b * kv_heads, m, d).transpose(1, 2)
    scores = torch.baddbmm(q.new_zeros(()), rows, columns, beta=0, alpha=scale).view(b, h, n, m)
    return scores if scores.dtype is torch.float64 else scores.float()


def _softmax_product(scores: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn scores, which are overwritten, into o and lse; a row of −inf gives 0, −inf and zero gradients."""
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)  # −inf − −inf would be NaN
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    lse = (peak + total.log()).squeeze(-1)
    share = 1.0 / total
    if sink is not None:  # of the row's mass, the part that is not the sink's
        share = share * torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)
    b, h, n, m = weights.shape
    kv_heads, dv = v.shape[1], v.shape[3]
    rows = (weights * share).to(v.dtype).view(b * kv_heads, -1, m)
    o = torch.bmm(rows, v.reshape(b * kv_heads, m, dv)).view(b, h, n, dv)
    return o, lse.masked_fill(blind.squeeze(-1), -math.inf)
