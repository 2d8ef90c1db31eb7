"""IP-Adapter: two cross attentions with one query, to a text and to an image prompt, added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Input, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias

IMAGE_TOKENS = 4
"""Tokens of the image prompt that the costs count; a call may bring any number."""


class IpAdapter(Attention):
    """o = softmax(q k₁ᵀ/√D) v₁ + λ·softmax(q k₂ᵀ/√D) v₂: two softmaxes, not one over both contexts."""

    spec = Spec(
        id="ip_adapter_decoupled_cross_attention",
        name="IP-Adapter decoupled cross-attention",
        family="cross",
        kind="core",
        paper=Paper(
            "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
            2023,
            arxiv="2308.06721",
        ),
        upstream="https://github.com/tencent-ailab/IP-Adapter",
        patterns=(Pattern.NC, Pattern.CC),
        summary="An image prompt gets keys, values and a softmax of its own, added to the text's.",
        formula="o = softmax(q k₁ᵀ/√D) v₁ + λ·softmax(q k₂ᵀ/√D) v₂, k₂ = c₂ W'_k, v₂ = c₂ W'_v",
        cost="4·H·N·(M + P)·D FLOPs, 8·H·N bytes",
        row_sum="free",
        linear_in_v=False,
        square_heads="the values of the image prompt have D columns and are added to those of the text",
        grouped_kv=True,
        ops=("few_query",),
        hyper=(Hyper("scale", 1.0, "weight λ of the image prompt: 1 in training, 0 to 1 afterwards"),),
        inputs=(
            Input("context2", "tokens of the image prompt", "(B, 4, C)", "normal", True, "layer"),
            Input("k2", "keys of the image prompt", "(B, Hkv, 4, D)", "normal", True, "op"),
            Input("v2", "values of the image prompt", "(B, Hkv, 4, D)", "normal", True, "op"),
        ),
        deviations=(
            "All projections are trained; the adapter trains W'_k and W'_v and freezes the host's.",
            "Costs count an image prompt of 4 tokens, as in the base adapter; the plus variant has 16.",
        ),
    )

    def setup(self) -> None:
        """Create W'_k and W'_v, without a bias, from the weights of W_k and W_v."""
        if not self.projections:
            return
        kv_dim = self.num_kv_heads * self.head_dim
        self.k2_proj = nn.Linear(self.embed_dim, kv_dim, bias=False)
        self.v2_proj = nn.Linear(self.embed_dim, kv_dim, bias=False)
        with torch.no_grad():
            self.k2_proj.weight.copy_(self.k_proj.weight)
            self.v2_proj.weight.copy_(self.v_proj.weight)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        context2: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Read the text (B, M, C), which alone has padding, and context2 (B, P, C) from x (B, N, C)."""
        if context2 is None:
            raise UsageError(f"{self.spec.id}: observed no context2, expected the image prompt (B, P, C)")
        k2 = self.split(self.k2_proj(context2), self.num_kv_heads)
        v2 = self.split(self.v2_proj(context2), self.num_kv_heads)
        return super().forward(x, context, grid=grid, key_padding_mask=key_padding_mask, k2=k2, v2=v2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        k2: Tensor | None = None,
        v2: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Read k, v (B, Hkv, M, D) and k2, v2 (B, Hkv, P, D), which have no padding, from q (B, H, N, D)."""
        if k2 is None or v2 is None:
            raise UsageError(
                f"{self.spec.id}: observed no k2 or no v2, expected keys and values of the image prompt"
            )
        text, _ = few_query(
            q, k, v, key_bias=padding_bias(key_padding_mask), need_lse=False, backend=self.backend
        )
        image, _ = few_query(q, k2, v2, need_lse=False, backend=self.backend)
        return text + self.hp.scale * image

    def flops(self, n: int, m: int) -> int:
        """2·D for the score and 2·D for the value of every pair of both softmaxes."""
        return 4 * n * (m + IMAGE_TOKENS) * self.embed_dim

    def layer_flops(self, n: int, m: int) -> int:
        """Also the projections of the image prompt."""
        kv_dim = self.num_kv_heads * self.head_dim
        return super().layer_flops(n, m) + 4 * IMAGE_TOKENS * self.embed_dim * kv_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Both outputs before they are added, and a log-sum-exp each, fp32, kept for the backward."""
        return 2 * n * self.embed_dim * itemsize + 8 * self.num_heads * n
