"""The model of point-cloud completion: PoinTr (arXiv 2108.08839) around given attention modules.

A scan becomes proxies (points with features of their neighbourhood), an encoder relates them, a decoder
turns queries into patches of the whole surface. Distances to neighbours are geometry: no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention
from attnbench.tasks.blocks import Block


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the model. ``stages`` are the points and channels after each step of the grouping.

    A query becomes a patch of ``fold``² points.
    """

    width: int
    queries: int
    stages: tuple[tuple[int, int], ...]
    fold: int
    global_width: int
    stem: int = 8
    group: int = 16
    graph: int = 8
    ratio: int = 2


@torch.no_grad()
def farthest(points: Tensor, count: int) -> Tensor:
    """Indices (B, count) of points (B, P, 3) of which each is the farthest from those before it."""
    chosen = points.new_zeros(len(points), count, dtype=torch.long)
    nearest = points.new_full(points.shape[:2], torch.inf)
    rows = torch.arange(len(points), device=points.device)
    for step in range(1, count):
        last = points[rows, chosen[:, step - 1], None]
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        chosen[:, step] = nearest.argmax(1)
    return chosen


def distances(p: Tensor, g: Tensor) -> Tensor:
    """Distances (B, P, Q) between points, from differences: products would lose those of near points."""
    return torch.cdist(p.float(), g.float(), compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def neighbours(of: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices (B, N, count) of the points ``among`` (B, M, 3) that are nearest to each ``of`` (B, N, 3)."""
    return distances(of, among).topk(min(count, among.shape[1]), largest=False).indices


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, C) at ``index`` (B, …), as (B, …, C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, index.shape[1:])


class EdgeConv(nn.Module):
    """Features of points from those of their neighbours (DGCNN, arXiv 1801.07829): the maximum over edges."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2 * channels, out), nn.LayerNorm(out), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, source: Tensor, index: Tensor) -> Tensor:
        """Tokens x (B, N, C) with neighbours ``index`` (B, N, k) in ``source`` (B, M, C) → (B, N, out)."""
        centre = x[:, :, None].expand(-1, -1, index.shape[-1], -1)
        return self.edge(torch.cat([pick(source, index) - centre, centre], -1)).amax(2)


class Proxies(nn.Module):
    """A scan as few points with features: steps of farthest-point sampling and edge convolution."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.dims = dims
        self.stem = nn.Linear(3, dims.stem)
        channels = [dims.stem, *(out for _, out in dims.stages)]
        self.steps = nn.ModuleList(map(EdgeConv, channels[:-1], channels[1:]))
        self.feature = nn.Sequential(
            nn.Linear(channels[-1], dims.width), nn.GELU(), nn.Linear(dims.width, dims.width)
        )
        self.position = nn.Sequential(nn.Linear(3, dims.width), nn.GELU(), nn.Linear(dims.width, dims.width))

    def forward(self, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Scan (B, P, 3) → centres (B, M, 3) and their tokens (B, M, width)."""
        points, x = scan, self.stem(scan)
        for (count, _), step in zip(self.dims.stages, self.steps, strict=True):
            kept, centre = points, x
            if count < points.shape[1]:
                index = farthest(points, count)
                kept, centre = pick(points, index), pick(x, index)
            x = step(centre, x, neighbours(kept, points, self.dims.group))
            points = kept
        return points, self.feature(x) + self.position(points)


class GeometryBlock(Block):
    """The first block of a stack: beside its attention, a convolution over the graph of the points."""

    def __init__(self, width: int, attention: Attention, ratio: int) -> None:
        super().__init__(width, attention, ratio)
        self.graph = EdgeConv(width, width)
        self.merge = nn.Linear(2 * width, width)

    def mixed(self, x: Tensor, source: Tensor | None, index: Tensor) -> Tensor:
        """What attention and graph read from ``source`` (x itself where None), merged; (B, N, C)."""
        attended = self.attention(x, source)
        return self.merge(torch.cat([attended, self.graph(x, x if source is None else source, index)], -1))

    def read(self, x: Tensor, source: Tensor | None, index: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C) with ``index`` (B, N, k), the neighbours of each token in the source."""
        if source is not None and self.norm_context is not None:
            source = self.norm_context(source)
        x = x + self.mixed(self.norm1(x), source, index)
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Self attention among the queries and cross attention to the proxies, in turns.

    With ``graph`` the first layer of both kinds also reads the graph of the points.
    """

    def __init__(
        self, width: int, selfs: Sequence[Attention], crosses: Sequence[Attention], ratio: int, graph: bool
    ) -> None:
        super().__init__()
        self.selfs, self.crosses = nn.ModuleList(), nn.ModuleList()
        for depth, (own, cross) in enumerate(zip(selfs, crosses, strict=True)):
            kind = GeometryBlock if graph and depth == 0 else Block
            self.selfs.append(kind(width, own, ratio))
            self.crosses.append(kind(width, cross, ratio))

    def forward(self, queries: Tensor, memory: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
        """Queries (B, N, C) after all layers; ``own`` and ``other`` index neighbours among N and M."""
        for self_block, cross_block in zip(self.selfs, self.crosses, strict=True):
            if isinstance(self_block, GeometryBlock):
                assert isinstance(cross_block, GeometryBlock)
                assert own is not None
                assert other is not None
                queries = cross_block.read(self_block.read(queries, None, own), memory, other)
            else:
                queries = cross_block(self_block(queries), memory)
        return queries


class Fold(nn.Module):
    """A patch of points from a feature: a square of seeds, folded twice (FoldingNet, arXiv 1712.07262)."""

    seeds: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        line = torch.linspace(-1.0, 1.0, side) if side > 1 else torch.zeros(1)
        self.register_buffer("seeds", torch.cartesian_prod(line, line), persistent=False)
        self.first = self._mlp(width + 2, width)
        self.second = self._mlp(width + 3, width)

    @staticmethod
    def _mlp(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, N, C) → offsets (B, N, side², 3)."""
        shape = (*x.shape[:2], len(self.seeds))
        wide = x[:, :, None].expand(*shape, -1)
        once = self.first(torch.cat([wide, self.seeds.to(x.dtype).expand(*shape, -1)], -1))
        return self.second(torch.cat([wide, once], -1))


class Encoder(nn.Module):
    """Proxies and their relations: the part that both models share."""

    def __init__(self, dims: Dimensions, attentions: Sequence[Attention]) -> None:
        super().__init__()
        self.dims = dims
        self.proxies = Proxies(dims)
        first, *others = attentions
        self.first = GeometryBlock(dims.width, first, dims.ratio)
        self.others = nn.ModuleList(Block(dims.width, attention, dims.ratio) for attention in others)

    def forward(self, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Scan (B, P, 3) → centres (B, M, 3) and tokens (B, M, width)."""
        centres, x = self.proxies(scan)
        x = self.first.read(x, None, neighbours(centres, centres, self.dims.graph))
        for block in self.others:
            x = block(x)
        return centres, x


class PoinTr(nn.Module):
    """The published wiring: a global feature gives coarse centres, which become the queries."""

    def __init__(
        self,
        dims: Dimensions,
        encoder: Sequence[Attention],
        selfs: Sequence[Attention],
        crosses: Sequence[Attention],
    ) -> None:
        super().__init__()
        self.dims, width, wide = dims, dims.width, dims.global_width
        self.encoder = Encoder(dims, encoder)
        self.lift = nn.Sequential(nn.Linear(width, wide), nn.LeakyReLU(0.2), nn.Linear(wide, wide))
        self.coarse = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 3 * dims.queries))
        self.query = nn.Sequential(nn.Linear(wide + 3, width), nn.GELU(), nn.Linear(width, width))
        self.decoder = Decoder(width, selfs, crosses, dims.ratio, graph=True)
        self.reduce = nn.Linear(wide + width + 3, width)
        self.fold = Fold(width, dims.fold)

    def forward(self, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Scan (B, P, 3) → coarse cloud (B, 2·queries, 3) and dense cloud (B, queries·fold² + P, 3).

        Both contain points of the scan: the coarse one as many as there are queries, the dense one all.
        """
        centres, memory = self.encoder(scan)
        whole = self.lift(memory).amax(1)
        coarse = self.coarse(whole).float().unflatten(-1, (-1, 3))
        spread = whole[:, None].expand(-1, self.dims.queries, -1)
        queries = self.query(torch.cat([spread, coarse.to(spread.dtype)], -1))
        own = neighbours(coarse, coarse, self.dims.graph)
        queries = self.decoder(queries, memory, own, neighbours(coarse, centres, self.dims.graph))
        x = self.reduce(torch.cat([spread, queries, coarse.to(spread.dtype)], -1))
        patches = (coarse[:, :, None] + self.fold(x).float()).flatten(1, 2)
        known = pick(scan, farthest(scan, self.dims.queries))
        return torch.cat([coarse, known], 1), torch.cat([patches, scan], 1)


class Probe(nn.Module):
    """The same parts with learned queries: cross attention is the only way from the scan to the output."""

    def __init__(
        self,
        dims: Dimensions,
        encoder: Sequence[Attention],
        selfs: Sequence[Attention],
        crosses: Sequence[Attention],
    ) -> None:
        super().__init__()
        self.encoder = Encoder(dims, encoder)
        self.query = nn.Parameter(torch.randn(dims.queries, dims.width))
        self.decoder = Decoder(dims.width, selfs, crosses, dims.ratio, graph=False)
        self.centre = nn.Linear(dims.width, 3)
        self.fold = Fold(dims.width, dims.fold)

    def forward(self, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Scan (B, P, 3) → centres (B, queries, 3) and predicted cloud (B, queries·fold², 3)."""
        _, memory = self.encoder(scan)
        x = self.decoder(self.query.expand(len(scan), -1, -1), memory, None, None)
        centres = self.centre(x).float()
        return centres, (centres[:, :, None] + self.fold(x).float()).flatten(1, 2)
