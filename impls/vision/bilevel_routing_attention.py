"""Bi-level routing attention: each region of queries picks the regions whose keys it attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Grid, Pattern, SparseAttention, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.impls.vision._cells import cell_means, cells_of, from_cells, to_cells
from attnbench.impls.vision._grids import (
    RANKS,
    Axes,
    DepthwiseConv,
    coordinates,
    grid_of,
    heads_to_image,
    image_to_heads,
    per_axis,
)
from attnbench.kernels import Selection, block_sparse
from attnbench.kernels.selection import topk


@dataclass(frozen=True)
class Regions:
    """A grid cut into boxes of ``size`` tokens per axis, from its origin; those at its end may be smaller."""

    grid: Axes
    size: Axes

    @property
    def number(self) -> int:
        """Regions of the grid."""
        return math.prod(cells_of(self.grid, self.size))

    @property
    def tokens(self) -> int:
        """Tokens of a whole region."""
        return math.prod(self.size)

    @property
    def length(self) -> int:
        """Tokens in the order of regions: on a sequence its own, else each region is filled up."""
        return self.grid[0] if len(self.grid) == 1 else self.number * self.tokens

    def order(self, x: Tensor) -> Tensor:
        """(B, H, N, D) in the order of regions, (B, H, length, D); a sequence is in it."""
        return x if len(self.grid) == 1 else to_cells(x, self.grid, self.size).flatten(2, 3)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`order`."""
        if len(self.grid) == 1:
            return x
        return from_cells(x.unflatten(2, (self.number, self.tokens)), self.grid, self.size)

    def of_tokens(self, device: torch.device) -> Tensor:
        """(N,) int64: the region of each token."""
        number = torch.zeros(1, dtype=torch.long, device=device)
        sides = cells_of(self.grid, self.size)
        for place, size, side in zip(coordinates(self.grid, device), self.size, sides, strict=True):
            number = number * side + place // size
        return number

    def sizes(self, device: torch.device) -> Tensor:
        """(R,) fp64: the tokens of each region."""
        ones = torch.ones(math.prod(self.grid), 1, dtype=torch.float64, device=device)
        return to_cells(ones, self.grid, self.size).sum((-2, -1))


@dataclass(frozen=True, eq=False)
class RoutedRegions:
    """Which key regions each query region attends to: ``blocks`` lists them, in the order of regions."""

    blocks: Selection
    queries: Regions
    keys: Regions

    def to_dense_mask(self) -> Tensor:
        """(B, 1, N, M) bool, True where query i keeps key j, in the order of the grid."""
        device = self.blocks.counts.device
        rows, columns = self.queries.of_tokens(device), self.keys.of_tokens(device)
        return self.blocks.block_mask[:, :, rows][..., columns]

    def density(self, causal: bool) -> Tensor:
        """Pairs of tokens kept / all pairs, a fp64 scalar; regions know no causality."""
        mask = self.blocks.block_mask
        shares = [x.sizes(mask.device) / math.prod(x.grid) for x in (self.queries, self.keys)]
        return torch.einsum("bhqk,q,k->bh", mask.double(), *shares).mean()


class BilevelRoutingAttention(SparseAttention):
    """Softmax attention of a region's queries over the k regions nearest to its mean, plus LePE."""

    spec = Spec(
        id="bilevel_routing_attention",
        name="Bi-level routing attention (BRA)",
        family="vision",
        kind="core",
        paper=Paper(
            "BiFormer: Vision Transformer with Bi-Level Routing Attention",
            2023,
            arxiv="2303.08810",
            venue="CVPR 2023",
        ),
        upstream="https://github.com/rayleizhu/BiFormer",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Each region of a grid picks the k regions whose mean keys match its mean query; its queries "
        "attend to all keys there.",
        formula="I(r) = top-k_s q̄_r·k̄_s over regions, heads together; o_i = Σ_{j ∈ I(r(i))} "
        "softmax_j(q_i·k_j/√C) v_j + LePE(v)_i",
        cost="4·N·k·m·C + 2·R²·C + 50·N·C FLOPs in the plane, for R regions of m tokens",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        square_heads="LePE has one filter per channel of the model",
        padding="regions are counted in positions, which dropping a key shifts",
        selection="other",
        grid_ranks=RANKS,
        grid_kv=True,
        ops=("block_sparse",),
        flops_note="counted_flops: the reference computes every pair and masks.",
        hyper=(
            Hyper("regions", 7, "regions S per axis of a grid, one number or one per axis; at most its side"),
            Hyper(
                "region", 64, "tokens of a region on a sequence, where S regions would grow with its length"
            ),
            Hyper("topk", 4, "regions k that each region attends to; None: all"),
            Hyper("scale", None, "multiplier of the scores; None: 1/√C, of the whole width as in the source"),
            Hyper(
                "lepe",
                True,
                "add a depthwise convolution of the values, of 5 taps per axis; self attention only",
            ),
        ),
        test_hyper={"regions": 2, "region": 4, "topk": 2},
        deviations=(
            "A grid that S does not divide has smaller regions at its end; the releases pad it with zeros or "
            "biases, which take part as keys.",
            "Cross attention is ours: regions of the queries' grid pick regions of the keys' grid, without "
            "LePE.",
            "Pooling of keys inside regions, which the paper's models leave off, is left out.",
        ),
    )

    def setup(self) -> None:
        """Check the hyper-parameters and create the filters of LePE."""
        hp = self.hp
        if hp.region < 1 or (hp.topk is not None and hp.topk < 1):
            raise UsageError(
                f"{self.spec.id}: observed region={hp.region}, topk={hp.topk}, expected positive numbers"
            )
        lepe = hp.lepe and self.pattern is Pattern.NS
        self.lepe = DepthwiseConv(self.embed_dim, 5, RANKS) if lepe else None

    @property
    def scale(self) -> float:
        """Multiplier of the scores: 1/√C unless given."""
        return 1.0 / math.sqrt(self.embed_dim) if self.hp.scale is None else float(self.hp.scale)

    def regions_of(self, grid: Grid, n: int) -> Regions:
        """How the grid of ``n`` tokens is cut."""
        sides = grid_of(self.spec, grid, n)
        if len(sides) == 1:
            return Regions(sides, (self.hp.region,))
        wanted = per_axis(self.spec, "regions", self.hp.regions, len(sides))
        return Regions(sides, tuple(-(-g // s) for g, s in zip(sides, wanted, strict=True)))

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Grid = None,
        grid_kv: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> RoutedRegions:
        """The top-k regions of keys for every region of queries, the same for all heads."""
        queries, keys = self._cut(q.shape[2], k.shape[2], grid, grid_kv)
        padded_q = None if self.pattern.cross else key_padding_mask
        mean_q, _ = cell_means(self.join(q), queries.grid, queries.size, padded_q)
        mean_k, dead = cell_means(self.join(k), keys.grid, keys.size, key_padding_mask)
        scores = mean_q @ mean_k.transpose(-1, -2)
        seen = torch.ones_like(scores, dtype=torch.bool)
        if dead is not None:
            seen = seen & ~dead.unsqueeze(-2)
        count = self._listed(keys)
        mask = topk(scores, count, seen).unsqueeze(1)
        blocks = Selection.from_block_mask(
            mask, queries.tokens, keys.tokens, queries.length, keys.length, k_max=count
        )
        return RoutedRegions(blocks, queries, keys)

    def _listed(self, keys: Regions) -> int:
        """Regions that each region attends to."""
        return keys.number if self.hp.topk is None else min(self.hp.topk, keys.number)

    def consume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: RoutedRegions,
        *,
        grid: Grid = None,
        grid_kv: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over the selected regions, without LePE."""
        queries, keys = selection.queries, selection.keys
        o, lse = block_sparse(
            queries.order(q),
            keys.order(k),
            keys.order(v),
            selection.blocks,
            scale=self.scale,
            key_bias=self._key_bias(keys, k, key_padding_mask),
            backend=self.backend,
        )
        return queries.restore(o), queries.restore(lse.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def _key_bias(keys: Regions, k: Tensor, padded: Tensor | None) -> Tensor | None:
        """−inf, in the order of regions, at padding and where a region hangs over the grid; None without."""
        if padded is None and keys.length == k.shape[2]:
            return None
        kept = torch.ones(1, k.shape[2], device=k.device) if padded is None else (~padded).float()
        return keys.order(kept[:, None, :, None]).squeeze(-1).log()

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
        """Route, attend to the selected regions, and add LePE(v)."""
        common = {"grid": grid, "key_padding_mask": key_padding_mask, **inputs}
        o = super().attend(q, k, v, selection=selection, **common)
        if self.lepe is None:
            return o
        if key_padding_mask is not None:
            v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        image = heads_to_image(v, grid_of(self.spec, grid, v.shape[2]))
        return o + image_to_heads(self.lepe(image), self.num_heads)

    def flops(self, n: int, m: int, *, grid: Grid = None, grid_kv: Grid = None) -> int:
        """Routing scores, k whole regions of keys for every query, LePE."""
        queries, keys = self._cut(n, m, grid, grid_kv)
        attended = 4 * n * min(m, self._listed(keys) * keys.tokens) * self.embed_dim
        return attended + self._fixed_flops(queries, keys, n)

    def counted_flops(self, n: int, m: int, *, grid: Grid = None, grid_kv: Grid = None) -> int:
        """The reference computes every pair, with what hangs over the grid, and masks."""
        queries, keys = self._cut(n, m, grid, grid_kv)
        return 4 * queries.length * keys.length * self.embed_dim + self._fixed_flops(queries, keys, n)

    def _fixed_flops(self, queries: Regions, keys: Regions, n: int) -> int:
        routing = 2 * queries.number * keys.number * self.embed_dim
        return routing + (0 if self.lepe is None else self.lepe.flops(n, len(queries.grid)))

    def _cut(self, n: int, m: int, grid: Grid, grid_kv: Grid) -> tuple[Regions, Regions]:
        """How the grids of queries and keys are cut; in self attention they are one."""
        queries = self.regions_of(grid, n)
        return queries, self.regions_of(grid_kv, m) if self.pattern.cross else queries

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None, grid_kv: Grid = None) -> int:
        """Copies of q, k, v and o in the order of regions on a grid, routing scores, LePE, log-sum-exp."""
        queries, keys = self._cut(n, m, grid, grid_kv)
        copied = 0 if len(queries.grid) == 1 else 2 * (queries.length + keys.length)
        kept = copied + (0 if self.lepe is None else n)
        scores = 4 * queries.number * keys.number
        return kept * self.embed_dim * itemsize + scores + 4 * self.num_heads * n
