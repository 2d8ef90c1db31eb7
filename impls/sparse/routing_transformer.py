"""Routing Transformer: tokens attend inside clusters, which online k-means keeps up to date."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._bucket_selection import BucketSelection
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Buckets, buckets, padding_bias

SMOOTHING = 1e-5
"""Pseudo-count of the Laplace smoothing of cluster sizes."""


class RoutingTransformer(SparseAttention):
    """Softmax attention between the queries and the keys that lie nearest to the same centroid."""

    centroids: Tensor
    sizes: Tensor
    sums: Tensor

    spec = Spec(
        id="routing_transformer",
        name="Routing Transformer",
        family="sparse",
        kind="core",
        paper=Paper(
            "Efficient Content-Based Sparse Attention with Routing Transformers",
            2020,
            arxiv="2003.05997",
            venue="TACL 2021",
        ),
        upstream="https://github.com/google-research/google-research routing_transformer/utils.py",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="Each centroid takes the queries and the keys nearest to it, and they attend to each other.",
        formula="o_i = mean over the clusters c ∋ i of softmax(q̂_i·k̂_j / √D) v_j over the keys j of c; "
        "q̂ = LN(q), k̂ = LN(k), a cluster: the w largest q̂·μ_c and the w largest k̂·μ_c",
        cost="2·H·(N + M)·n_c·D FLOPs to route and 4·H·n_c·w²·D to attend, w = N/n_c; 8·H·(N + M)·n_c bytes",
        causality="selection_leaky",
        row_sum="at_most_one",
        query_separable=False,
        selection="other",
        ops=("buckets",),
        flops_backend="torch",
        hyper=(
            Hyper("num_clusters", 16, "centroids n_c of a head; √N of them cost least"),
            Hyper("window", None, "queries and keys of a cluster; without, ⌊N/n_c⌋ and ⌊M/n_c⌋"),
            Hyper("share_qk", None, "queries are keys; without, under CS only, where they must be"),
            Hyper(
                "logit_scale",
                "sqrt_dim",
                "scores divided by √D, or as they are in the release, which is much sharper",
                choices=("sqrt_dim", "upstream"),
            ),
            Hyper("decay", 0.999, "share of the old running statistics that a training step keeps"),
            Hyper("beta", 1e-4, "weight of commitment_loss"),
        ),
        test_hyper={"num_clusters": 3},
        padding="the size of a cluster is a share of all tokens, padded ones included",
        deviations=(
            "All heads route; the paper gives half of them a local window.",
            "The mean is over the clusters of a token; the release divides by their number + 0.01.",
            "Running statistics start as one token at each centroid, so that a cluster that took none keeps "
            "its place.",
            "With shared queries and keys attend reads q for both and ignores k; the layer has no key "
            "projection then.",
            "CS routes over all tokens and masks by position: causal only with the clusters frozen.",
        ),
        confidence="medium",
    )

    def setup(self) -> None:
        """Create the centroids and their running statistics; drop the key projection where it is shared."""
        hp, shape = self.hp, (self.num_heads, self.hp.num_clusters, self.head_dim)
        if hp.num_clusters < 1 or (hp.window is not None and hp.window < 1) or not 0 <= hp.decay <= 1:
            raise UsageError(
                f"routing_transformer: observed num_clusters={hp.num_clusters}, window={hp.window}, "
                f"decay={hp.decay}, expected positive numbers and a decay in [0, 1]"
            )
        needed = {Pattern.CS: True, Pattern.NC: False}.get(self.pattern, hp.share_qk)
        if hp.share_qk is not None and hp.share_qk is not needed:
            raise UsageError(
                f"routing_transformer under {self.pattern}: observed share_qk={hp.share_qk}, "
                f"expected {needed}"
            )
        self.shared = bool(needed)
        if self.projections and self.shared:
            del self.k_proj
        start = _layer_norm(torch.randn(shape))
        self.register_buffer("centroids", start)
        self.register_buffer("sums", start.clone())
        self.register_buffer("sizes", torch.ones(shape[:2]))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to itself or to ``context`` (B, M, C) → (B, N, C)."""
        if not self.shared:
            return super().forward(x, context, key_padding_mask=key_padding_mask, **inputs)
        self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        v = self.split(self.v_proj(x), self.num_kv_heads)
        _, v = self.grouped(v, v)
        return self.out_proj(self.join(self.attend(q, q, v, key_padding_mask=key_padding_mask)))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        selection: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Route, attend in the clusters, and in training mode move the centroids afterwards."""
        o = super().attend(q, k, v, key_padding_mask=key_padding_mask, selection=selection, **inputs)
        if self.training:
            self.update(q, k, key_padding_mask)
        return o

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> BucketSelection:
        """The queries and the keys of every cluster, each in the order of their positions."""
        n = q.shape[2]
        own = None if self.pattern.cross else key_padding_mask
        queries, w_q = self._members(q, own)
        if self.shared:
            return BucketSelection(Buckets.chunks(queries, w_q, n))
        keys, w_k = self._members(k, key_padding_mask)
        lists = Buckets.chunks(queries, w_q, n, keys=keys, key_chunk=w_k, m=k.shape[2])
        return BucketSelection(lists)

    def _members(self, x: Tensor, padded: Tensor | None) -> tuple[Tensor, int]:
        """The tokens nearest to each centroid, (B, H, n_c·w), ascending in each cluster; and w."""
        size = self._window(x.shape[2])
        scores = self._nearness(x).mT
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, None, :], -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True)
        members = best.indices[..., :size].masked_fill(best.values[..., :size] == -math.inf, -1)
        return members.sort(-1).values.flatten(2), size

    def _nearness(self, x: Tensor) -> Tensor:
        """(B, H, N, n_c): LN(x)·μ in fp32 (fp64 for fp64 inputs)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return _layer_norm(x.to(wide)) @ self.centroids.to(wide).mT

    def _window(self, length: int) -> int:
        """Tokens of a cluster out of ``length``."""
        return min(length, int(self.hp.window or max(1, length // self.hp.num_clusters)))

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BucketSelection,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The mean over the clusters of a token of softmax attention inside them; 0 without a cluster."""
        queries = _layer_norm(q)
        keys = queries if self.shared else _layer_norm(k)
        return buckets(
            queries,
            keys,
            v,
            selection.lists,
            causal=self.pattern is Pattern.CS,
            combine="mean",
            scale=None if self.hp.logit_scale == "sqrt_dim" else 1.0,
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )

    @torch.no_grad()
    def update(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> None:
        """Move the centroids towards the tokens nearest to them, by running means over calls.

        Every token counts for one centroid; queries and keys both count, shared ones once.
        """
        counts, totals = self._assigned(q, None if self.pattern.cross else key_padding_mask)
        if not self.shared:
            more, others = self._assigned(k, key_padding_mask)
            counts, totals = counts + more, totals + others
        decay = self.hp.decay
        sizes = self.sizes.to(counts.dtype) * decay + counts * (1.0 - decay)
        sums = self.sums.to(totals.dtype) * decay + totals * (1.0 - decay)
        whole = sizes.sum(-1, keepdim=True)
        smooth = (sizes + SMOOTHING) / (whole + self.hp.num_clusters * SMOOTHING) * whole
        self.sizes.copy_(sizes)
        self.sums.copy_(sums)
        self.centroids.copy_(sums / smooth.unsqueeze(-1))

    def _assigned(self, x: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (H, n_c) of each centroid and their sum (H, n_c, D), over the batch."""
        nearness = self._nearness(x)
        nearest = nearness.argmax(-1, keepdim=True)
        weights = torch.zeros_like(nearness).scatter_(-1, nearest, 1.0)
        if padded is not None:
            weights = weights.masked_fill(padded[:, None, :, None], 0.0)
        return weights.sum((0, 2)), (weights.mT @ _layer_norm(x.to(nearness.dtype))).sum(0)

    def commitment_loss(self, q: Tensor, k: Tensor) -> Tensor:
        """β·mean ‖x − μ‖², x the normalised queries and keys, μ their nearest centroids as constants.

        To be added to the loss of a task; it draws tokens to the centroids, which have no gradient.
        """
        parts = []
        for x in (q,) if self.shared else (q, k):
            nearest = self._nearness(x.detach()).argmax(-1)
            heads = torch.arange(self.num_heads, device=x.device).view(1, -1, 1)
            wide = _layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)))
            parts.append((wide - self.centroids[heads, nearest].to(wide.dtype)).square().sum(-1).flatten())
        return self.hp.beta * torch.cat(parts).mean()

    def flops(self, n: int, m: int) -> int:
        """2·D for the nearness of every token to every centroid and 4·D for every pair inside a cluster.

        Of the pairs, CS hides about half, in clusters that are computed whole.
        """
        routed = n if self.shared else n + m
        pairs = self._window(n) * self._window(n if self.shared else m)
        return self.num_heads * self.hp.num_clusters * self.head_dim * (2 * routed + 4 * pairs)

    def layer_flops(self, n: int, m: int) -> int:
        """One projection less where queries are keys."""
        kv = self.num_kv_heads * self.head_dim
        others = (n if self.shared else 2 * m) * kv
        return self.flops(n, m) + 2 * self.embed_dim * (2 * n * self.embed_dim + others)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Nearness with its order, the lists, normalised copies and the outputs of each cluster in fp32."""
        routed = n if self.shared else n + m
        entries = self.hp.num_clusters * self._window(n)
        per_token = 12 * self.hp.num_clusters + self.head_dim * itemsize
        return self.num_heads * (routed * per_token + entries * (16 + 4 * self.head_dim) + 4 * n)


def _layer_norm(x: Tensor) -> Tensor:
    """(x − mean) / √(variance + 10⁻⁵) along the last axis, without learnt scales."""
    return F.layer_norm(x, x.shape[-1:])
