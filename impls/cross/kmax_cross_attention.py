"""kMaX: every key goes to the one query that scores it highest, and a query sums the values of its keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.cross._blocks import both_padded
from attnbench.impls.cross._unread import with_zero_gradient
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import query_softmax


class KMax(Attention):
    """o_i = Σ_j [i = argmax over queries of q·k_j] v_j: one step of k-means with queries as centres."""

    spec = Spec(
        id="kmax_cross_attention",
        name="kMaX k-means cross-attention",
        family="cross",
        kind="core",
        paper=Paper("k-means Mask Transformer", 2022, arxiv="2207.04044", venue="ECCV 2022"),
        upstream="https://github.com/bytedance/kmax-deeplab",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Replaces the softmax over keys by an arg-max over queries: keys are clustered, queries are "
        "the centres.",
        formula="A_ij = 1 if i = argmax_i' q_i'·k_j (the first of equals) else 0; o_i = Σ_j A_ij v_j",
        cost="2·H·N·M·D FLOPs and H·M·D additions, 4·H·M bytes",
        row_sum="free",
        query_separable=False,
        ops=("query_softmax",),
        hyper=(
            Hyper("mean", False, "divide the sum by the size of the cluster, as k-means does; source: sum"),
        ),
        deviations=(
            "The operation inside plain projections: the release's layer adds convolutions, batch norms, "
            "self attention of the centres and a feed-forward, which belong to its decoder.",
            "Per head; the release has one head.",
            "The assignment has no gradient, so neither have the projections of q and k: theirs is zero. "
            "The release trains them by losses on its mask logits.",
            "NS is ours: a token that is padding neither is assigned nor competes.",
        ),
    )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Assign the keys k (B, H, M, D) to the queries q (B, H, N, D) and sum v (B, H, M, Dv) by query."""
        mask = None
        if key_padding_mask is not None:
            mask = both_padded(key_padding_mask, queries_too=not self.pattern.cross)
        o = query_softmax(q, k, v, hard=True, normalize=self.hp.mean, mask=mask, backend=self.backend).o
        assert o is not None  # v is given
        return with_zero_gradient(o, q, k)

    def flops(self, n: int, m: int) -> int:
        """The scores of every pair, and an addition for every channel of every value."""
        return self.embed_dim * m * (2 * n + 1)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference multiplies the values by the one-hot map."""
        return 4 * n * m * self.embed_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The query of each key."""
        return 4 * self.num_heads * m
