"""Toy mechanisms for the tests of the contract kit: right ones, and ones that cannot be checked in full."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from attnbench.impls.base import Attention, MapAttention, SparseAttention
from attnbench.impls.spec import Input, Paper, Pattern, Spec
from attnbench.kernels import Unsupported

SPEC = Spec(
    id="toy",
    name="Toy",
    family="user",
    kind="core",
    paper=Paper("Toys", 2024, venue="tests"),
    patterns=tuple(Pattern),
    summary="Softmax attention.",
    formula="o = softmax(q kᵀ/√D) v",
    cost="4·H·N·M·D FLOPs",
    hot_loop="GEMM",
    exact=True,
)


class Toy(Attention):
    """Right softmax attention in plain torch; a broken toy overrides one step."""

    spec = SPEC

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        hidden = self.hidden(q, k, padded=key_padding_mask, **inputs)
        scores = self.scores(q, k).masked_fill(hidden, -math.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
        return self.output(scores.softmax(-1).nan_to_num(0.0), q, k, v)

    def scores(self, q, k):
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

    def hidden(self, q, k, **inputs):
        shape = (q.shape[-2], k.shape[-2])
        if self.pattern is Pattern.CS:
            return torch.ones(shape, dtype=torch.bool).triu(1)
        return torch.zeros(shape, dtype=torch.bool)

    def output(self, weights, q, k, v):
        return weights @ v

    def flops(self, n, m):
        return 4 * self.num_heads * n * m * self.head_dim


def toy_spec(**changes):
    return replace(SPEC, exact=False, **changes)


class SelectsKeysGlobally(Toy):
    """Keeps the half of the keys that all queries score highest: right once the selection is frozen."""

    spec = toy_spec(causality="selection_leaky", permutation_invariant=False, padding="toy")

    def select(self, q, k, padded=None):
        total = self.scores(q, k).sum(-2, keepdim=True)
        if padded is not None:
            total = total.masked_fill(padded[:, None, None, :], -math.inf)
        best = total.topk(-(-k.shape[-2] // 2)).indices
        return torch.ones(*k.shape[:2], 1, k.shape[-2], dtype=torch.bool).scatter(-1, best, False)

    def hidden(self, q, k, padded=None, selection=None):
        dropped = self.select(q, k, padded) if selection is None else selection
        own = torch.eye(q.shape[-2], k.shape[-2], dtype=torch.bool)
        return super().hidden(q, k) | (dropped & ~own)

    def flops(self, n, m):
        return super().flops(n, m) * 3 // 2


# ---- toys that cannot be checked in full, and other kinds ----------------------------------------------


class NeedsGpu(Toy):
    spec = toy_spec(backends=("reference", "sdpa_cudnn"))


class ClaimsTriton(Toy):
    """Served by torch under another name: for the reduced sizes of interpreted kernels."""

    spec = toy_spec(backends=("reference", "triton"))


class RefusesEverything(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        raise Unsupported("toy", "anything", "nothing")


class RefusesLongQueries(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        if q.shape[-2] > 20:
            raise Unsupported("toy", f"N = {q.shape[-2]}", "N <= 20")
        return super().attend(q, k, v, key_padding_mask=key_padding_mask)


class WantsLabels(Toy):
    spec = toy_spec(inputs=(Input("labels", "class of each key", "(B, M)", "labels"),))


class WrongTestHyper(Toy):
    spec = toy_spec(test_hyper={"y": 0})


class Mixer(Attention):
    """A right causal mixer: a running mean of projected tokens."""

    spec = toy_spec(kind="mixer", patterns=(Pattern.NS, Pattern.CS), row_sum="free", query_separable=False)

    def setup(self):
        self.proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, x, context=None, *, grid=None, key_padding_mask=None, **inputs):
        y = self.proj(self.source(x, context))
        keep = torch.ones_like(y[..., :1])
        if key_padding_mask is not None:
            keep = (~key_padding_mask).unsqueeze(-1).to(y.dtype)
        if self.pattern is Pattern.CS:
            return (y * keep).cumsum(-2) / keep.cumsum(-2).clamp_min(1.0)
        return ((y * keep).sum(-2, keepdim=True) / keep.sum(-2, keepdim=True).clamp_min(1.0)).expand_as(y)

    def flops(self, n, m):
        return 2 * n * self.embed_dim**2


class LeakyMixer(Mixer):
    spec = replace(Mixer.spec, patterns=(Pattern.CS,))

    def forward(self, x, context=None, *, grid=None, key_padding_mask=None, **inputs):
        return super().forward(x - x.mean(-2, keepdim=True), context, key_padding_mask=key_padding_mask)


class Grid2d(Toy):
    """Refuses tokens without a grid."""

    spec = toy_spec(patterns=(Pattern.NS,), grid_ranks=(2,))

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        if grid is None or math.prod(grid) != q.shape[-2]:
            raise ValueError(f"grid {grid} for {q.shape[-2]} tokens")
        return super().attend(q, k, v, key_padding_mask=key_padding_mask)


# ---- inputs, grids, selections and maps ----------------------------------------------------------------


class WantsTheUnknown(Toy):
    spec = toy_spec(inputs=(Input("labels", "class of each key", "(B, M)", "no such generator"),))


class ScalesQueries(Toy):
    """An input per query that gets a gradient, and one per key that does not."""

    spec = toy_spec(
        permutation_invariant=True,
        inputs=(
            Input("scale", "multiplier of each query", "(B, N)", "uniform", differentiable=True),
            Input("kept", "whether a key may be attended to", "(B, M)", "mask"),
        ),
        row_sum="at_most_one",
    )

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, scale=None, kept=None, **inputs):
        dropped = ~kept if key_padding_mask is None else ~kept | key_padding_mask
        return super().attend(q * self.scale_of(scale)[:, None, :, None], k, v, key_padding_mask=dropped)

    def scale_of(self, scale):
        return scale


@dataclass(frozen=True)
class Kept:
    """The least that a selection is."""

    mask: torch.Tensor

    def to_dense_mask(self):
        return self.mask


class SameRowOfTheGrid(SparseAttention):
    """Attends to the kept keys of the own row of a 2-D grid, and to the own token."""

    spec = toy_spec(
        patterns=(Pattern.NS, Pattern.NC),
        grid_ranks=(2,),
        lengths="aligned",
        selection="softmax",
        inputs=(Input("kept", "whether a key may be attended to", "(B, M)", "mask"),),
        permutation_invariant=False,
    )

    def select(self, q, k, *, grid=None, key_padding_mask=None, kept=None, **inputs):
        if math.prod(grid) != q.shape[-2]:
            raise ValueError(f"grid {grid} for {q.shape[-2]} tokens")
        place = torch.arange(q.shape[-2], device=q.device)
        row = place // self.width(grid)
        own = place[:, None] == place
        return Kept((row[:, None] == row) & (kept[:, None, None, :] | own))

    def width(self, grid):
        return grid[1]

    def consume(self, q, k, v, selection, *, grid=None, key_padding_mask=None, **inputs):
        mask = selection.to_dense_mask()
        if key_padding_mask is not None:
            mask = mask & ~key_padding_mask[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)

    def flops(self, n, m):
        return 4 * self.num_heads * n * m * self.head_dim


class Sharpened(MapAttention):
    """Squares the weights of softmax attention and normalises them again."""

    spec = toy_spec(kind="map")

    def transform(self, weights, *, grid=None, key_padding_mask=None, **inputs):
        squared = weights.square()
        return squared / squared.sum(-1, keepdim=True).clamp_min(1e-30)
