"""CrossViT: the class token of one branch reads the patch tokens of the other and returns to its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias

INIT_STD = 0.02
EPS = 1e-6


class CrossViTCrossAttention(Attention):
    """x_0 ← g(y + MHA(LN y; LN [y ; c])) with y = f(x_0); the other rows of x pass through."""

    spec = Spec(
        id="crossvit_cross_attention",
        name="CrossViT class-token cross-attention",
        family="cross",
        kind="mixer",
        paper=Paper(
            "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
            2021,
            arxiv="2103.14899",
            venue="ICCV 2021",
        ),
        upstream="https://github.com/IBM/CrossViT",
        patterns=(Pattern.NS, Pattern.NC, Pattern.CC),
        summary="One token, projected into the other branch, reads that branch and itself; it comes back "
        "without a residual.",
        formula="y = W_f GELU(LN x_0); ẑ = LN [y ; c]; y' = y + W_o softmax(W_q ẑ_0 · W_k ẑ / √D) W_v ẑ; "
        "x_0 ← W_g GELU(LN y')",
        cost="4·(M + 1)·C_b² + 4·(M + 1)·C_b FLOPs; absorbed: 4·H·(M + 1)·C_b + 4·C_b²",
        row_sum="free",
        query_separable=False,
        linear_in_v=False,
        ops=("few_query",),
        hyper=(
            Hyper("context_dim", None, "width C_b of the other branch; None: the model width"),
            Hyper(
                "projection",
                "separate",
                "absorbed: the key and value weights move to the query and the output, so that keys and "
                "values are never stored; equal, and cheaper for one query",
                choices=("separate", "absorbed"),
            ),
        ),
        deviations=(
            "NS is the degenerate form: the class token reads the other tokens of its own branch.",
            "The symmetric fusion of two branches is two calls, both on the old tokens.",
            "Absorbed, the keys have no bias: it adds the same to all scores of the query.",
        ),
    )

    def setup(self) -> None:
        """Create f, the attention of the other branch, and g."""
        c, self.width = self.embed_dim, self.hp.context_dim or self.embed_dim
        if self.width < 1 or self.width % self.num_heads:
            raise UsageError(
                f"crossvit_cross_attention: observed context_dim={self.width} with {self.num_heads} heads, "
                "expected a multiple of the heads, which are those of the other branch"
            )
        if not self.pattern.cross and self.width != c:
            raise UsageError(
                f"crossvit_cross_attention under NS: observed context_dim={self.width}, expected {c}: "
                "the other tokens are x's own"
            )
        width, bias = self.width, self.bias
        absorbed = self.hp.projection == "absorbed"
        self.norm_in, self.enter = nn.LayerNorm(c, EPS), nn.Linear(c, width)
        self.norm = nn.LayerNorm(width, EPS)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias and not absorbed)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self.norm_out, self.leave = nn.LayerNorm(width, EPS), nn.Linear(width, c)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Replace row 0 of x (B, N, C) by what it reads from the context (B, M, C_b), under NS from x[1:].

        ``key_padding_mask`` is that of the context, under NS of x; the class token's own key always counts.
        """
        source = self.source(x, context)
        if not self.pattern.cross:
            source = source[:, 1:]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[:, 1:]
        y = self.enter(F.gelu(self.norm_in(x[:, :1])))
        tokens = self.norm(torch.cat((y, source), 1))
        padded = None if key_padding_mask is None else F.pad(key_padding_mask, (1, 0), value=False)
        read = self._absorbed if self.hp.projection == "absorbed" else self._separate
        y = y + self.out_proj(read(tokens, padding_bias(padded)))
        return torch.cat((self.leave(F.gelu(self.norm_out(y))), x[:, 1:]), 1)

    def _separate(self, tokens: Tensor, key_bias: Tensor | None) -> Tensor:
        """Token 0 reads all tokens (B, 1 + M, C_b), by keys and values of every head: (B, 1, C_b)."""
        q = self.split(self.q_proj(tokens[:, :1]), self.num_heads)
        k = self.split(self.k_proj(tokens), self.num_heads)
        v = self.split(self.v_proj(tokens), self.num_heads)
        o, _ = few_query(q, k, v, key_bias=key_bias, need_lse=False, backend=self.backend)
        return self.join(o)

    def _absorbed(self, tokens: Tensor, key_bias: Tensor | None) -> Tensor:
        """The same from the tokens themselves: keys and values of one head, shared by all queries."""
        h = self.num_heads
        q = self.split(self.q_proj(tokens[:, :1]), h)
        q = q @ self.k_proj.weight.unflatten(0, (h, -1))
        shared = tokens.unsqueeze(1)
        scale = 1.0 / math.sqrt(self.width // h)
        o, _ = few_query(
            q, shared, shared, scale=scale, key_bias=key_bias, need_lse=False, backend=self.backend
        )
        o = self.join(o @ self.v_proj.weight.unflatten(0, (h, -1)).transpose(-1, -2))
        return o if self.v_proj.bias is None else o + self.v_proj.bias

    def flops(self, n: int, m: int) -> int:
        """Both changes of width, the projections, and one query over its own key and the context."""
        keys, c, width = 1 + (m if self.pattern.cross else n - 1), self.embed_dim, self.width
        fixed = 4 * c * width + 4 * width * width
        if self.hp.projection == "absorbed":
            return fixed + 4 * width * width + 4 * self.num_heads * keys * width
        return fixed + 4 * keys * width * width + 4 * keys * width

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The joined and the normalised tokens; keys and values unless they are absorbed."""
        keys = 1 + (m if self.pattern.cross else n - 1)
        return keys * self.width * itemsize * (2 if self.hp.projection == "absorbed" else 4)
