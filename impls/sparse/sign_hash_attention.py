"""Sign-hash attention: a query attends to the keys on its side of a few random hyperplanes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, SparseAttention
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import Buckets, buckets, padding_bias


@dataclass(frozen=True, eq=False)
class HashedKeys:
    """The keys of equal hash, and for a query without one a single key that stands in for them.

    Attributes:
        lists: the tokens by hash.
        query_ids, key_ids: the hashes, (B, H, N) and (B, H, M).
        stand_in: (B, N) or (B, 1), the key that a query sees where no visible key has its hash.
        key_padding_mask: (B, M), True = padding, or None.
        causal: whether keys after the query are hidden.
    """

    lists: Buckets
    query_ids: Tensor
    key_ids: Tensor
    stand_in: Tensor
    key_padding_mask: Tensor | None
    causal: bool

    def to_dense_mask(self) -> Tensor:
        """(B, H, N, M) bool, True where query i keeps key j."""
        kept = self.query_ids.unsqueeze(-1) == self.key_ids.unsqueeze(-2)
        seen = kept.tril() if self.causal else kept
        if self.key_padding_mask is not None:
            seen = seen & ~self.key_padding_mask[:, None, None, :]
        empty = ~seen.any(-1, keepdim=True)
        keys = torch.arange(kept.shape[-1], device=kept.device)
        return kept | (empty & (self.stand_in[:, None, :, None] == keys))

    def density(self, causal: bool) -> Tensor:
        """Pairs kept / pairs allowed, a fp64 scalar, from counts of hashes; padding counts as keys."""
        (b, h, n), m = self.query_ids.shape, self.key_ids.shape[-1]
        here = torch.nn.functional.one_hot(self.key_ids, self.lists.count)
        counts = here.cumsum(2) if causal else here.sum(2, keepdim=True).expand(-1, -1, n, -1)
        kept = counts.gather(-1, self.query_ids.unsqueeze(-1)).clamp_min(1).sum()
        allowed = n * (n + 1) // 2 if causal else n * m
        return kept.double() / (b * h * allowed)


class SignHashAttention(SparseAttention):
    """Softmax attention over the visible keys with hash(k_j) = hash(q_i); if there is none, over one key.

    hash(x) holds the signs of (x − mean x) U, with one random U (D, bits) of orthonormal columns per layer,
    bits = ⌊log₂ n_buckets⌋. The key for want of another is the query's own position in self patterns and the
    first that is not padding in cross patterns.
    """

    spec = Spec(
        id="sign_hash_attention",
        name="Sign-hash attention",
        family="sparse",
        kind="core",
        paper=Paper(
            "Efficient Content-Based Sparse Attention with Routing Transformers",
            2020,
            arxiv="2003.05997",
            venue="TACL 2021",
        ),
        upstream="google-research/google-research",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A query attends to the keys whose random projections have the same signs as its own.",
        formula="softmax over {j visible: sign((k_j − k̄_j) U) = sign((q_i − q̄_i) U)}, one key if it is empty",
        cost="O((N + M)·D·bits + N·M·D / 2^bits)",
        selection="softmax",
        permutation_invariant=False,
        ops=("buckets",),
        hyper=(Hyper("n_buckets", 16, "buckets, rounded down to a power of two"),),
        test_hyper={"n_buckets": 4},
        deviations=(
            "A query sees all keys of its bucket; upstream a bucket holds its first N / n_buckets members in "
            "the order of tokens and is filled up with others, which makes the keys of a query depend on "
            "unrelated tokens.",
            "A query without a key of its hash attends to one key: its own, in cross patterns the first.",
        ),
        flops_backend="",
        flops_note="the formula takes hashes for balanced; how many pairs are kept depends on the data",
        confidence="medium",
    )

    def setup(self) -> None:
        """The projection U, a buffer."""
        if self.hp.n_buckets < 1 or self._bits > self.head_dim:
            raise UsageError(
                f"{self.spec.id}: n_buckets: observed {self.hp.n_buckets}, "
                f"expected 1 to 2^{self.head_dim} for heads of {self.head_dim}"
            )
        self.directions: Tensor
        orthonormal = torch.linalg.qr(torch.randn(self.head_dim, max(self._bits, 1)))[0]
        self.register_buffer("directions", orthonormal[:, : self._bits].contiguous())

    @property
    def _bits(self) -> int:
        return int(self.hp.n_buckets).bit_length() - 1

    @torch.no_grad()
    def hash(self, x: Tensor) -> Tensor:
        """The bucket of every token, (B, H, N, D) → (B, H, N) int64 in 0..2^bits − 1."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        signs = (wide - wide.mean(-1, keepdim=True)) @ self.directions.to(wide.dtype) >= 0
        return (signs << torch.arange(self._bits, device=x.device)).sum(-1)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> HashedKeys:
        """The tokens by hash."""
        query_ids, key_ids = self.hash(q), self.hash(k)
        if not self.pattern.cross:
            stand_in = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        elif key_padding_mask is None:
            stand_in = query_ids.new_zeros(q.shape[0], 1)
        else:
            stand_in = (~key_padding_mask).int().argmax(-1, keepdim=True)
        lists = Buckets.by_id(query_ids, key_ids, 1 << self._bits)
        causal = self.pattern is Pattern.CS
        return HashedKeys(lists, query_ids, key_ids, stand_in, key_padding_mask, causal)

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: HashedKeys,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention inside the buckets; where that sees nothing, the value and the score of the stand-in."""
        bias = padding_bias(key_padding_mask)
        o, lse = buckets(
            q, k, v, selection.lists, causal=selection.causal, key_bias=bias, backend=self.backend
        )
        index = selection.stand_in[:, None, :, None]
        value, key = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (v, k))
        score = (q * key).sum(-1, dtype=lse.dtype) / math.sqrt(self.head_dim)
        empty = lse.isneginf()
        if key_padding_mask is not None:
            empty = empty & ~key_padding_mask.gather(1, selection.stand_in).unsqueeze(1)
        return torch.where(empty.unsqueeze(-1), value, o), torch.where(empty, score, lse)

    def flops(self, n: int, m: int) -> int:
        """2·D·bits for each hash, 4·D for each pair of equal hashes if all buckets are of one size."""
        pairs = n * (n + 1) // 2 if self.pattern is Pattern.CS else n * m
        hashes = 2 * (n + m) * self.head_dim * self._bits
        return self.num_heads * (hashes + 4 * self.head_dim * (pairs >> self._bits))
