"""Blocked local attention: the queries of a block share its keys and a halo around them. HaloNet."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.impls.vision._grids import (
    Axes,
    aligned_grid,
    at_rank,
    axes_by_rank,
    coordinates,
    count_pairs,
    grid_of,
    pad_grid,
    round_up,
)
from attnbench.kernels import Partition, padding_bias, window
from attnbench.kernels.window import reference

AXES = ("block", "halo", "q_stride")


class HaloAttention(Attention):
    """Softmax attention of blocks of queries over larger windows of keys, with relative embeddings."""

    spec = Spec(
        id="halo_attention",
        name="HaloNet blocked local attention",
        family="vision",
        kind="core",
        paper=Paper(
            "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
            2021,
            arxiv="2103.12731",
            venue="CVPR 2021",
        ),
        upstream="huggingface/pytorch-image-models timm/layers/halo_attn.py; lucidrains/halonet-pytorch",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A block of queries attends to its own tokens and to a halo of h tokens around the block.",
        formula="o_i = softmax over {j : βb − h ≤ p_j < (β + 1)b + h on every axis} of "
        "q_i·k_j/√D + Σ_a q_i·R_a[p_j − p_i], β = ⌊p_i/b⌋",
        cost="4·N·Π(b + 2h)·C + 2·N·C·Σ(2(b + h) − 1) FLOPs, 2·N·(C + H·Σ(b + 2h))·e + 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        grid_ranks=(1, 2, 3),
        lengths="aligned",
        ops=("window",),
        hyper=(
            Hyper("block", 8, "side b of a block of queries, one number or one per axis"),
            Hyper("halo", 3, "tokens h around a block that it sees too, one number or one per axis"),
            Hyper("rel", True, "add the learned relative embeddings, which all heads share"),
            Hyper("scale_rel", False, "multiply the relative scores by 1/√D, too"),
            Hyper(
                "border",
                "masked",
                "keys outside the grid: left out, or, as in the paper and timm, zeros whose relative score "
                "counts",
                choices=("masked", "upstream"),
            ),
            Hyper(
                "q_stride",
                1,
                "every how many-th token of an axis is a query; divides b. The output then has only those: "
                "attention that downsamples",
            ),
        ),
        test_hyper={"block": 3, "halo": 1},
        padding="blocks are counted in positions, which dropping a key shifts",
        flops_note="flops() looks relative scores up, of which there are N·Σ(2(b + h) − 1); the counted form "
        "multiplies them in as Σ(b + 2h) further features of q and k",
        deviations=(
            "Keys outside the grid are left out; the paper argues that they need no mask, and timm leaves "
            "them in, which border='upstream' does. Rows of weights then add up to less than 1.",
            "CS and CC are ours: key j is visible to query i if, besides, j ≤ i in row-major order. Under NC "
            "and CC token n of x lies on token n of the context.",
            "timm stores 2(b + 2h) − 1 relative embeddings per axis, of which 2(b + h) − 1 can be reached.",
        ),
    )

    def setup(self) -> None:
        """Create R_a, (2(b + h) − 1, D) for each axis; grids of lower rank use those of the last axes."""
        self.axes = {
            name: axes_by_rank(self.spec, name, getattr(self.hp, name), {}, least=int(name != "halo"))
            for name in AXES
        }
        self._check()
        rank = max(self._ranks)
        block, halo = (self.axes[name][rank] for name in ("block", "halo"))
        self.rows = tuple(2 * (b + h) - 1 for b, h in zip(block, halo, strict=True))
        if self.hp.rel:
            self.relative = nn.Parameter(torch.empty(sum(self.rows), self.head_dim))
            nn.init.normal_(self.relative, std=self.head_dim**-0.5)

    @property
    def _ranks(self) -> set[int]:
        return set.intersection(*(set(by_rank) for by_rank in self.axes.values()))

    def _check(self) -> None:
        hp = self.hp
        given = f"block={hp.block}, halo={hp.halo}, q_stride={hp.q_stride}"
        if not self._ranks:
            raise UsageError(f"{self.spec.id}: observed {given}, expected settings of one rank")
        strided = False
        for rank in self._ranks:
            pairs = list(zip(self.axes["block"][rank], self.axes["q_stride"][rank], strict=True))
            strided = strided or any(s > 1 for _, s in pairs)
            if any(b % s for b, s in pairs):
                raise UsageError(f"{self.spec.id}: observed {given}, expected a q_stride dividing the block")
        if self.pattern.causal and (strided or hp.border == "upstream"):
            raise UsageError(
                f"{self.spec.id} under {self.pattern}: observed q_stride={hp.q_stride}, "
                f"border={hp.border!r}, expected 1 and 'masked': causality is the row-major order of one grid"
            )

    def _sizes(self, rank: int) -> tuple[Axes, Axes, Axes]:
        """Block, halo and stride of the queries on grids of ``rank``."""
        if rank not in self._ranks:  # says which setting is of another rank
            for name in AXES:
                at_rank(self.spec, name, self.axes[name], rank)
        block, halo, stride = (self.axes[name][rank] for name in AXES)
        return block, halo, stride

    def partition(self, grid: Axes) -> Partition:
        """Blocks of queries and their windows of keys, in coordinates of the keys' grid."""
        block, halo, stride = self._sizes(len(grid))
        zeros = (0,) * len(grid)
        return Partition(
            window=tuple(b // s for b, s in zip(block, stride, strict=True)),
            key_window=tuple(b + 2 * h for b, h in zip(block, halo, strict=True)),
            key_step=block,
            key_offset=zeros if self.hp.border == "upstream" else tuple(-h for h in halo),
            shift=zeros,
            dilation=(1,) * len(grid),
        )

    def grids(self, grid: Axes) -> tuple[Axes, Axes]:
        """The grids of queries and of keys: strided, and with the halo of zeros around it."""
        block, halo, stride = self._sizes(len(grid))
        queries = tuple(-(-g // s) for g, s in zip(grid, stride, strict=True))
        if self.hp.border == "masked":
            return queries, grid
        whole = round_up(grid, block)
        return queries, tuple(g + 2 * h for g, h in zip(whole, halo, strict=True))

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
        """Halo attention of q (B, H, N, D) over k, v (B, Hkv, N, ·) on one grid.

        With a q_stride s the output has Π⌈G/s⌉ tokens instead of N.
        """
        sides = aligned_grid(self.spec, grid, q, k)
        queries, keys = self.grids(sides)
        key_bias = padding_bias(key_padding_mask)
        if queries != sides:
            q = q[:, :, _kept(sides, self._sizes(len(sides))[2], q.device)]
        if self.hp.border == "upstream":
            halo = self._sizes(len(sides))[1]
            k, v = (pad_grid(x, sides, halo, keys) for x in (k, v))
            if key_bias is not None:
                key_bias = pad_grid(key_bias.unsqueeze(-1), sides, halo, keys).squeeze(-1)
        scale = self.head_dim**-0.5
        if self.hp.rel:
            q, k = self._with_positions(q, k, sides, 1.0 if self.hp.scale_rel else 1.0 / scale)
        o, _ = window(
            q,
            k,
            v,
            self.partition(sides),
            grid=queries,
            grid_kv=keys,
            key_bias=key_bias,
            causal=self.pattern.causal,
            scale=scale,
            backend=self.backend,
        )
        return o

    def _with_positions(self, q: Tensor, k: Tensor, grid: Axes, factor: float) -> tuple[Tensor, Tensor]:
        """The queries and keys with more features, whose products are the relative scores · ``factor``.

        A window has e = b + 2h consecutive keys per axis, so their positions modulo e are all different: k
        says its own by a one-hot vector, q has the relative score of each. Exact, on any backend.
        """
        block, halo, stride = self._sizes(len(grid))
        rank, outside = len(grid), self.hp.border == "upstream"
        index = _relative_rows(grid, block, halo, stride, outside, q.device)
        scores = []
        for table, rows in zip(self.relative.split(self.rows)[-rank:], index, strict=True):
            every = q @ table.to(q.dtype).T  # against all rows of the table, of which a query needs e
            scores.append(every.gather(-1, rows.expand(*q.shape[:2], -1, -1)) * factor)
        place = _places(self.grids(grid)[1], block, halo, k.device).to(k.dtype)
        return torch.cat((q, *scores), -1), torch.cat((k, place.expand(*k.shape[:2], -1, -1)), -1)

    def visible(self, n: int, m: int, device: torch.device, *, grid: Grid = None) -> Tensor:
        """The mask among the tokens of the grid, bool (queries, N)."""
        sides = grid_of(self.spec, grid, m)
        queries, keys = self.grids(sides)
        halo = self._sizes(len(sides))[1]
        mask = reference.visible(self.partition(sides), queries, keys, _count(queries), _count(keys), device)
        if keys != sides:
            inside = torch.arange(_count(keys), device=device).view(keys)
            for axis, (h, g) in enumerate(zip(halo, sides, strict=True)):
                inside = inside.narrow(axis, h, g)
            mask = mask[:, inside.flatten()]
        return mask.tril() if self.pattern.causal else mask

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """2·D for the score and 2·D for the value of every pair, and the relative scores of each query."""
        sides = grid_of(self.spec, grid, n)
        queries, keys = self.grids(sides)
        pairs = count_pairs(self.partition(sides).on(queries, keys), causal=self.pattern.causal)
        return 4 * self.embed_dim * pairs + self._table_flops(_count(queries), len(sides))

    def counted_flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """The reference computes every pair, with the features of positions, and masks."""
        sides = grid_of(self.spec, grid, n)
        queries, keys = (_count(each) for each in self.grids(sides))
        width = 2 * self.head_dim + self._features(len(sides))
        return 2 * self.num_heads * queries * keys * width + self._table_flops(queries, len(sides))

    def _table_flops(self, queries: int, rank: int) -> int:
        return 2 * queries * self.embed_dim * sum(self.rows[-rank:]) if self.hp.rel else 0

    def _features(self, rank: int) -> int:
        block, halo, _ = self._sizes(rank)
        return sum(block) + 2 * sum(halo) if self.hp.rel else 0

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """Queries and keys with the features of positions, and the log-sum-exp, fp32."""
        features = self._features(len(grid_of(self.spec, grid, n)))
        wide = (n * self.num_heads + m * self.num_kv_heads) * (self.head_dim + features) * itemsize
        return 4 * self.num_heads * n + (wide if self.hp.rel else 0)


def _count(grid: Axes) -> int:
    count = 1
    for side in grid:
        count *= side
    return count


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _kept(grid: Axes, stride: Axes, device: torch.device) -> Tensor:
    """The tokens that are queries."""
    tokens = torch.arange(_count(grid), device=device).view(grid)
    return tokens[tuple(slice(None, None, s) for s in stride)].flatten()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _relative_rows(
    grid: Axes, block: Axes, halo: Axes, stride: Axes, outside: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Per axis (queries, e): the row of R_a for the key whose place is t in the window of a query."""
    kept = _kept(grid, stride, device)
    found = []
    for p, b, h in zip(coordinates(grid, device), block, halo, strict=True):
        p = p[kept][:, None]
        first = p // b * b + (0 if outside else -h)  # of the window, in coordinates of the keys' grid
        t = torch.arange(b + 2 * h, device=device)
        found.append((t - first) % (b + 2 * h) - p % b + b - 1)
    return tuple(found)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _places(keys: Axes, block: Axes, halo: Axes, device: torch.device) -> Tensor:
    """(M, Σe): the position of each key modulo e on each axis, one-hot."""
    found = [
        F.one_hot(p % (b + 2 * h), b + 2 * h)
        for p, b, h in zip(coordinates(keys, device), block, halo, strict=True)
    ]
    return torch.cat(found, -1)
