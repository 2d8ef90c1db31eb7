"""Mask2Former's masked attention: each query reads the places that its own predicted mask covers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Input, Paper, Pattern, Spec
from attnbench.impls.synthetic import Dims
from attnbench.kernels import flash, padding_bias

MEAN_LOGIT = -1.0
"""Mean of the synthetic logits, of variance 1: masks cover a sixth of the places."""


def _logits(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=device) + MEAN_LOGIT


class MaskedCrossAttention(Attention):
    """Softmax attention over {j : σ(P_ij) ≥ threshold}, or over every key where that set is empty."""

    spec = Spec(
        id="masked_cross_attention",
        name="Masked cross-attention (Mask2Former)",
        family="cross",
        kind="core",
        paper=Paper(
            "Masked-attention Mask Transformer for Universal Image Segmentation",
            2022,
            arxiv="2112.01527",
            venue="CVPR 2022",
        ),
        upstream="https://github.com/facebookresearch/Mask2Former",
        patterns=(Pattern.NC, Pattern.CC),
        summary="Restricts every query to the foreground of the mask that the previous layer predicted for "
        "it.",
        formula="o_i = softmax over Ω_i of q_i·k_j/√D, Ω_i = {j : σ(P_ij) ≥ ½}, all keys where that is empty",
        cost="4·H·N·M·D FLOPs, N·M·e bytes for the mask, which the heads share",
        grouped_kv=True,
        ops=("flash",),
        hyper=(Hyper("threshold", 0.5, "probability from which on a place is foreground, in (0, 1)"),),
        inputs=(Input("mask_logits", "logit of query i's mask at key j", "(B, N, M)", _logits),),
        deviations=(
            "Every pair is computed and the hidden ones are masked, as upstream does.",
            "Positions added to queries and keys, the residual and the norm after it are the layer's.",
            "A row whose foreground is all padding counts as empty.",
        ),
    )

    def setup(self) -> None:
        """Refuse a threshold that is no probability."""
        if not 0.0 < self.hp.threshold < 1.0:
            raise UsageError(
                f"masked_cross_attention: observed threshold={self.hp.threshold}, expected one in (0, 1)"
            )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        mask_logits: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Read the foreground of mask_logits (B, N, M) in k, v (B, Hkv, M, ·) from q (B, H, N, D).

        The mask is a constant for autograd. :func:`on_key_grid` brings logits of another size to the keys.
        """
        seen = self.visible(
            q.shape[2],
            k.shape[2],
            q.device,
            mask_logits=mask_logits,
            key_padding_mask=key_padding_mask,
        )
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -math.inf)
        o, _ = flash(
            q,
            k,
            v,
            bias=bias,
            key_bias=padding_bias(key_padding_mask),
            need_lse=False,
            backend=self.backend,
        )
        return o

    @torch.no_grad()
    def visible(
        self,
        n: int,
        m: int,
        device: torch.device,
        *,
        mask_logits: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: Grid = None,
    ) -> Tensor:
        """The mask, bool (B, 1, N, M): foreground without padding, or everything where there is none."""
        if mask_logits is None:
            raise UsageError(f"{self.spec.id}: observed no mask_logits, expected the masks (B, N, M)")
        if mask_logits.shape[-2:] != (n, m):
            raise UsageError(
                f"{self.spec.id}: observed mask_logits {tuple(mask_logits.shape)}, expected (B, {n}, {m})"
            )
        level = math.log(self.hp.threshold / (1.0 - self.hp.threshold))
        seen = mask_logits >= level
        if key_padding_mask is not None:
            seen = seen & ~key_padding_mask.unsqueeze(1)
        return (seen | ~seen.any(-1, keepdim=True)).unsqueeze(1)

    def flops(self, n: int, m: int) -> int:
        """2·D for the score and 2·D for the value of every pair, seen or not."""
        return 4 * n * m * self.embed_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The mask as a bias, and the log-sum-exp, fp32, kept for the backward."""
        return n * m * itemsize + 4 * self.num_heads * n


def on_key_grid(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, N, h, w) on the grid ``size`` of the keys, as (B, N, M): resized first, cut off later.

    Bilinear without aligned corners, so that thresholds of the result are those of the release.
    """
    return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).flatten(-2)
