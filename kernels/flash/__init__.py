"""Dense softmax attention with options: the operation most mechanisms stand on.

Returns the output and the log-sum-exp of its scores, with gradients through both, so that any edit of an
attention map that is a union of key sets is a :func:`merge` of calls and never an N×M map.
"""

from __future__ import annotations

import math

# by name: importing the backend module flash.torch rebinds the name `torch` in this package
from torch import Tensor, exp, isneginf, logaddexp, zeros

from attnbench.kernels.backends import Op
from attnbench.kernels.flash.mask import Mask, RelativeBias

__all__ = ["OP", "Mask", "RelativeBias", "flash", "merge", "padding_bias"]

OP = Op(
    "flash",
    {
        "reference": "attnbench.kernels.flash.reference:flash",
        "torch": "attnbench.kernels.flash.torch:flash",
        "triton": "attnbench.kernels.flash.triton:flash",
        "sdpa_math": "attnbench.kernels.flash.peers:sdpa_math",
        "sdpa_flash": "attnbench.kernels.flash.peers:sdpa_flash",
        "sdpa_efficient": "attnbench.kernels.flash.peers:sdpa_efficient",
        "sdpa_cudnn": "attnbench.kernels.flash.peers:sdpa_cudnn",
        "flex": "attnbench.kernels.flash.peers:flex",
        "flash_attn": "attnbench.kernels.flash.library_peers:flash_attn",
        "flash_attn3": "attnbench.kernels.flash.library_peers:flash_attn3",
        "flash_attn4": "attnbench.kernels.flash.library_peers:flash_attn4",
        "xformers": "attnbench.kernels.flash.library_peers:xformers",
        "flashinfer": "attnbench.kernels.flash.library_peers:flashinfer",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    q_pos: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    rel_bias: RelativeBias | None = None,
    sink: Tensor | None = None,
    need_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention o = softmax(s) v with s = cap(scale·q kᵀ) + biases, over the visible keys.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, Hkv, M, D) with Hkv dividing H; query head h reads key head ⌊h·Hkv/H⌋.
        v: (B, Hkv, M, Dv); Dv may differ from D.
        causal: key j is visible to query i iff j ≤ pos_i, with pos_i = ``q_pos[i]``, by default i + M − N
            (the last query sees the last key).
        window: (left, right), −1 for unbounded: key j is visible iff pos_i − left ≤ j ≤ pos_i + right.
        q_pos: (N,) int32, non-decreasing: the position of each query on the axis of the keys.
        mask: further visibility by integers per token (segments, blocks, frames, global tokens, …); a key is
            visible iff ``causal``, ``window`` and the mask all say so. Tiles that it hides are skipped.
        scale: multiplier of the scores, 1/√D by default.
        softcap: cap > 0 replaces s by cap·tanh(s/cap), before any bias and mask.
        key_bias: broadcastable to (B, H, M), added to the scores of a key; −inf removes it.
        bias: broadcastable to (B, H, N, M), added to the scores.
        rel_bias: a table by relative position, read inside the kernel. All three biases receive gradients.
        sink: broadcastable to (B, H, N): an extra term e^sink in a row's denominator. Not part of lse.
        need_lse: False lets a peer that cannot return lse serve the call; lse is then None.
        backend: ``auto``, or one of ``OPS["flash"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp of the visible scores. A row that sees no key has o = 0, lse = −inf and zero gradients.

    Raises:
        Unsupported: the backend cannot serve a shape, a dtype or an option; nothing else is tried.

    Cost: 2·B·H·P·(D + Dv) FLOPs forward for P visible pairs, 2.5 times that backward; B·H·N·4 bytes of lse.
    Source: Dao et al., FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691).
    """
    return OP.run(
        backend,
        q,
        k,
        v,
        causal=causal,
        window=window,
        q_pos=q_pos,
        mask=mask,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        key_bias=key_bias,
        bias=bias,
        rel_bias=rel_bias,
        sink=sink,
        need_lse=need_lse,
    )


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each.

    o1, o2 (B, H, N, Dv) and lse1, lse2 (B, H, N) as :func:`flash` returns them; exact, differentiable, and
    0 with lse −inf on a row that sees no key of either set.
    """
    lse = logaddexp(lse1, lse2)
    safe = lse.masked_fill(isneginf(lse), 0.0)
    w1 = exp(lse1 - safe).unsqueeze(-1)
    w2 = exp(lse2 - safe).unsqueeze(-1)
    return (w1 * o1 + w2 * o2).to(o1.dtype), lse


def padding_bias(key_padding_mask: Tensor | None) -> Tensor | None:
    """The key_bias (B, 1, M), fp32, that removes the keys where ``key_padding_mask`` (B, M) is True."""
    if key_padding_mask is None:
        return None
    bias = zeros(key_padding_mask.shape, device=key_padding_mask.device)
    return bias.masked_fill(key_padding_mask, -math.inf).unsqueeze(1)
