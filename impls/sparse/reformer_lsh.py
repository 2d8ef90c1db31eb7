"""Reformer: tokens are sorted by their hashes, and chunks of them attend to themselves and the one before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.sparse._bucket_selection import BucketSelection
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Buckets, TokenKeys, buckets, gather, padding_bias

SELF_SCORE = -5e4
"""Score of a token with itself: it attends to itself only where it sees nothing else."""

PROJECTIONS_AT_ONCE = 2**25
"""Projections on random directions that are in memory at the same time."""


class ReformerLsh(SparseAttention):
    """Softmax attention of tokens to those that hash to places near theirs; keys are queries."""

    spec = Spec(
        id="reformer_lsh",
        name="Reformer LSH attention",
        family="sparse",
        kind="core",
        paper=Paper("Reformer: The Efficient Transformer", 2020, arxiv="2001.04451", venue="ICLR 2020"),
        upstream="https://github.com/google/trax; lucidrains/reformer-pytorch",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Sorts tokens by random-projection hashes and attends inside chunks of the sorted order, in "
        "several rounds.",
        formula="o_i = Σ_j m_ij e^{z_ij} v_j / Σ_j m_ij e^{z_ij}, z_ij = q_i·q_j / (√D‖q_j‖), z_ii = −5·10⁴, "
        "m_ij: rounds in which j stands in the chunk of i or the one before; order: argmax [x G; −x G]",
        cost="H·N·D·R·N/c FLOPs to hash and 8·H·R·N·c·D to attend; 4·H·R·N·D bytes of partial outputs",
        causality="selection_leaky",
        stochastic=True,
        query_separable=False,
        permutation_invariant=False,
        selection="other",
        ops=("buckets", "gather"),
        flops_backend="torch",
        hyper=(
            Hyper("bucket_size", 64, "tokens c of a chunk"),
            Hyper("num_hashes", 8, "rounds R of hashing"),
            Hyper("seed", 0, "seed of the random projections"),
            Hyper("redraw", True, "draw new projections at every call in training mode"),
            Hyper("bucket_mask", False, "hide tokens of the chunks that hash to another bucket"),
            Hyper("dedup", False, "count a pair that several rounds show once"),
        ),
        test_hyper={"bucket_size": 4, "num_hashes": 2},
        padding="the number of buckets follows from the length, padded tokens included",
        deviations=(
            "Queries are the keys: attend reads q for both and ignores k; the layer has no key projection.",
            "Any length: a round is filled up with empty entries to a multiple of 2c. Padded tokens sort "
            "behind all others.",
            "Projections come from a seed and are the same at every call in evaluation.",
            "CS sorts over all tokens and masks by position: causal only with the order frozen.",
        ),
    )

    def setup(self) -> None:
        """Refuse sizes without meaning; drop the key projection."""
        hp = self.hp
        if hp.bucket_size < 1 or hp.num_hashes < 1:
            raise UsageError(
                f"reformer_lsh: observed bucket_size={hp.bucket_size}, num_hashes={hp.num_hashes}, "
                "expected positive numbers"
            )
        if self.projections:
            del self.k_proj
        self.draws = 0
        self._drawn: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend within x (B, N, C) → (B, N, C), with one projection for queries and keys."""
        self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        v = self.split(self.v_proj(x), self.num_kv_heads)
        _, v = self.grouped(v, v)
        return self.out_proj(self.join(self.attend(q, q, v, key_padding_mask=key_padding_mask)))

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
        """The tokens of each head in the order of their hashes, round after round; k is not read."""
        n, c = q.shape[2], self.hp.bucket_size
        hashes = self._hashes(q)
        if key_padding_mask is not None:
            hashes = hashes.masked_fill(key_padding_mask[:, None, None, :], self._buckets(n))
        found = hashes.sort(dim=-1, stable=True)
        fill = (0, self._buckets(n) * c - n)
        order = torch.nn.functional.pad(found.indices, fill, value=-1).flatten(2)
        labels = None
        if self.hp.bucket_mask:
            rounds = torch.arange(self.hp.num_hashes, device=q.device).unsqueeze(-1)
            labels = found.values + rounds * (self._buckets(n) + 1)
            labels = torch.nn.functional.pad(labels, fill, value=-1).flatten(2)
        lists = Buckets.chunks(order, c, n, look_back=1, labels=labels, distinct=self.hp.num_hashes == 1)
        return BucketSelection(lists)

    def _buckets(self, n: int) -> int:
        """Buckets of a round, an even number: those that hash as x and as −x."""
        return 2 * -(-n // (2 * self.hp.bucket_size))

    def _hashes(self, q: Tensor) -> Tensor:
        """(B, H, R, N) int64: the direction ±G_r that each token lies nearest to, per round."""
        wide = torch.promote_types(q.dtype, torch.float32)
        half = self._buckets(q.shape[2]) // 2
        directions = self._directions(half, q.device).to(wide)
        rows = max(1, PROJECTIONS_AT_ONCE // (q.shape[0] * q.shape[1] * directions.shape[1]))
        parts = []
        for tokens in q.to(wide).split(rows, 2):
            along = (tokens @ directions).unflatten(-1, (-1, half))  # (B, H, ·, R, half)
            high, low = along.argmax(-1, keepdim=True), along.argmin(-1, keepdim=True)
            positive = along.gather(-1, high) >= -along.gather(-1, low)
            parts.append(torch.where(positive, high, low + half).squeeze(-1))
        return torch.cat(parts, 2).transpose(2, 3)

    def _directions(self, half: int, device: torch.device) -> Tensor:
        """(D, R·half) in fp32, the same on every device; new ones at every call in training."""
        if self.training and self.hp.redraw:
            self.draws += 1
        key = half, self.draws, device
        if key not in self._drawn:
            if self.training:
                self._drawn.clear()  # each is used once
            generator = torch.Generator().manual_seed(self.hp.seed + self.draws)
            shape = self.head_dim, self.hp.num_hashes * half
            self._drawn[key] = torch.randn(shape, generator=generator).to(device)
        return self._drawn[key]

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
        """Softmax attention inside the chunks, to keys of length one; k is not read."""
        keys = normalised(q)
        if self.hp.dedup:
            lists = self._each_once(selection, key_padding_mask)
            return gather(q, keys, v, lists, backend=self.backend)
        return buckets(
            q,
            keys,
            v,
            selection.lists,
            causal=self.pattern is Pattern.CS,
            self_score=SELF_SCORE,
            key_bias=padding_bias(key_padding_mask),
            backend=self.backend,
        )

    @torch.no_grad()
    def _each_once(self, selection: BucketSelection, padded: Tensor | None) -> TokenKeys:
        """The keys of every query without repetitions, and without itself unless it sees nothing else.

        That is what a self score far below all others amounts to.
        """
        lists = selection.lists
        c, n = lists.key_chunk, lists.n
        chunks = lists.keys.unflatten(-1, (lists.count, c))
        seen = torch.cat([chunks, chunks.roll(1, 2)], -1).long()
        at = lists.query_visits  # the entries of a token, one per round
        entry = at.entries[..., (lists.queries.shape[-1] - n * self.hp.num_hashes) :].long()
        chunk = entry.unflatten(-1, (n, -1)) // c  # (B, H, N, R)
        index = chunk.flatten(2).unsqueeze(-1).expand(-1, -1, -1, 2 * c)
        found = seen.gather(2, index).unflatten(2, (n, -1))  # (B, H, N, R, 2c)
        if lists.query_labels is not None and lists.key_labels is not None:
            labels = lists.key_labels.unflatten(-1, (lists.count, c))
            labels = torch.cat([labels, labels.roll(1, 2)], -1).gather(2, index).unflatten(2, (n, -1))
            own = lists.query_labels.gather(-1, entry).unflatten(-1, (n, -1)).unsqueeze(-1)
            found = found.masked_fill(labels != own, -1)
        return self._without_self(found.flatten(3), padded)

    def _without_self(self, found: Tensor, padded: Tensor | None) -> TokenKeys:
        """Lists of (B, H, N, K) keys with repetitions and −1, of which causality and padding remove more."""
        n = found.shape[2]
        own = torch.arange(n, device=found.device).unsqueeze(-1)
        found = found.masked_fill(found == own, -1)
        if self.pattern is Pattern.CS:
            found = found.masked_fill(found > own, -1)
        if padded is not None:
            gone = padded[:, None, None, :].expand(*found.shape[:3], -1).gather(-1, found.clamp(min=0))
            found = found.masked_fill(gone, -1)
        found = found.sort(-1).values
        repeated = torch.nn.functional.pad(found[..., 1:] == found[..., :-1], (1, 0))
        found = found.masked_fill(repeated, -1)
        alone = (found < 0).all(-1, keepdim=True)
        if padded is not None:
            alone = alone & ~padded[:, None, :, None]
        first = torch.where(alone, own, found[..., :1])
        return TokenKeys.from_indices(torch.cat([first, found[..., 1:]], -1), n)

    def flops(self, n: int, m: int) -> int:
        """2·D for every projection and 4·D for every pair of entries; CS hides about half of them.

        Which are hidden is up to the hashes, and chunks are computed whole.
        """
        rounds, c, count = self.hp.num_hashes, self.hp.bucket_size, self._buckets(n)
        return self.num_heads * self.head_dim * rounds * (n * count + 8 * count * c * c)

    def layer_flops(self, n: int, m: int) -> int:
        """One projection less than other mechanisms: queries are keys."""
        values = self.num_kv_heads * self.head_dim
        return self.flops(n, m) + 2 * n * self.embed_dim * (2 * self.embed_dim + values)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Hashes with their order, the lists, partial outputs and log-sum-exps in fp32, normalised keys."""
        entries = self.hp.num_hashes * self._buckets(n) * self.hp.bucket_size
        return self.num_heads * (entries * (28 + 4 * self.head_dim) + n * (self.head_dim * itemsize + 4))


def normalised(x: Tensor) -> Tensor:
    """X / ‖x‖ along the last axis, computed in fp32 at least; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1, eps=1e-12).to(x.dtype)
