"""X-Pool: every text pools the frames of a video by attention, and keeps nothing of itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias


class XPoolTextConditionedPooling(Attention):
    """With x̂ = LN₁(x), ĉ = LN₁(c): u = LN₂(W_o·softmax(W_q x̂ (W_k ĉ)ᵀ/√D) W_v ĉ), y = LN₃(u + W u).

    Queries x (B, N, C) are texts, the context c (B, M, C) are frames. No residual leads from the query to the
    output, which lives in the space of the frames. All linear maps start as the identity without bias.
    """

    spec = Spec(
        id="xpool_text_conditioned_pooling",
        name="X-Pool",
        family="cross",
        kind="mixer",
        paper=Paper(
            "X-Pool: Cross-Modal Language-Video Attention for Text-Video Retrieval",
            2022,
            arxiv="2203.15086",
            venue="CVPR 2022",
        ),
        upstream="layer6ai-labs/xpool",
        patterns=(Pattern.NC, Pattern.CC),
        summary="Texts pool the frames of a video by attention, without a residual from the text.",
        formula="u = LN₂(W_o·softmax(W_q x̂ (W_k ĉ)ᵀ/√D) W_v ĉ), y = LN₃(u + W u), x̂ = LN₁(x), ĉ = LN₁(c)",
        cost="O(N·M·C + (N + M)·C²)",
        row_sum="free",
        linear_in_v=False,
        ops=("few_query",),
        deviations=(
            "It has the heads that it is built with; the paper has one.",
            "The dropout of 0.3 after the last linear map is left out.",
        ),
    )

    def setup(self) -> None:
        """Five linear maps that start as the identity, three layer norms."""
        c = self.embed_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.last = (
            _identity(c, self.bias) for _ in range(5)
        )
        self.norm_in, self.norm_pooled, self.norm_out = (nn.LayerNorm(c) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Texts x (B, N, C) and frames ``context`` (B, M, C) → (B, N, C), one pooled video for each text."""
        frames = self.norm_in(self.source(x, context))
        q = self.split(self.q_proj(self.norm_in(x)), self.num_heads)
        k = self.split(self.k_proj(frames), self.num_heads)
        v = self.split(self.v_proj(frames), self.num_heads)
        o, _ = few_query(
            q, k, v, key_bias=padding_bias(key_padding_mask), need_lse=False, backend=self.backend
        )
        pooled = self.norm_pooled(self.out_proj(self.join(o)))
        y: Tensor = self.norm_out(pooled + self.last(pooled))
        return y

    def all_pairs(self, texts: Tensor, videos: Tensor) -> Tensor:
        """Every text (Bt, C) pools the frames of every video (Bv, F, C) → (Bv, Bt, C), as in retrieval."""
        return self.forward(texts.expand(videos.shape[0], -1, -1), videos)

    def flops(self, n: int, m: int) -> int:
        """Queries, output and the last map, keys and values, and 4·C for every pair."""
        c = self.embed_dim
        return 6 * n * c * c + 4 * m * c * c + 4 * n * m * c


def _identity(width: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(width, width, bias=bias)
    nn.init.eye_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
