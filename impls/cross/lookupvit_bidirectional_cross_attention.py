"""LookupViT: a few compressed tokens gather from all, think, and write back by the same map, transposed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.case import fold
from attnbench.impls.cross._blocks import Read, feed_forward, feed_forward_flops, read_flops
from attnbench.impls.cross._resize import linear_matrix, on_axes, on_axes_flops
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias


class LookupViT(Attention):
    """z_p gathers from z_l with weights A, is refined, and z_l receives Aᵀ W z_p."""

    spec = Spec(
        id="lookupvit_bidirectional_cross_attention",
        name="LookupViT bidirectional cross-attention (MHBC)",
        family="cross",
        kind="mixer",
        paper=Paper(
            "LookupViT: Compressing visual information to a limited number of tokens",
            2024,
            arxiv="2407.12753",
            venue="ECCV 2024",
        ),
        patterns=(Pattern.NS, Pattern.NC),
        summary="Full attention among a few compressed tokens only; the others are read and written through "
        "one map.",
        formula="A = softmax(W_q LN z_p · W_k LN z_l / √D), z_p ← z_p + A W_v LN z_l; z_p ← z_p + MHA, FFN; "
        "z_l ← z_l + Aᵀ W_v2 LN z_p; z_l ← z_l + FFN(LN z_l)",
        cost="8·M_p·N·C + 4·M_p²·C FLOPs and projections of M_p·C² and N·C² terms; 4·H·M_p bytes of the map",
        row_sum="free",
        query_separable=False,
        linear_in_v=False,
        padding="compressed tokens start from places on the grid, which dropping a token shifts",
        grid_ranks=(2, 3),
        ops=("few_query",),
        hyper=(
            Hyper("side", 5, "side of the compressed grid: M_p = side², on a 3-D grid side³ tokens"),
            Hyper("compressed_ratio", 4.0, "hidden width of the compressed tokens' feed-forward, in C"),
            Hyper("lookup_ratio", 0.5, "hidden width of the lookup tokens' feed-forward, in C"),
            Hyper(
                "renorm", False, "divide the rows of Aᵀ by their sums; else a token receives what falls to it"
            ),
        ),
        deviations=(
            "NC: x are the compressed tokens and the context the lookup tokens; gather and refine only, "
            "for the output is x's. The write-back is that of NS.",
            "A is not stored for the write-back but computed again from the log-sum-exp of its rows.",
            "Padded tokens are left out of the resized grid, whose other weights are divided by their sum.",
            "No class token; positional embeddings are the model's.",
        ),
        test_hyper={"side": 2},
        confidence="medium",
    )

    def setup(self) -> None:
        """Create gather and refine, under NS also what writes back."""
        c, hp, bias = self.embed_dim, self.hp, self.bias
        if hp.side < 1 or min(hp.compressed_ratio, hp.lookup_ratio) <= 0:
            raise UsageError(
                f"{self.spec.id}: observed side={hp.side}, compressed_ratio={hp.compressed_ratio}, "
                f"lookup_ratio={hp.lookup_ratio}, expected positive numbers"
            )
        self.norm_compressed, self.norm_lookup = nn.LayerNorm(c), nn.LayerNorm(c)
        self.gather = nn.ModuleDict({name: nn.Linear(c, c, bias=bias) for name in ("q", "k", "v", "out")})
        self.refine_norm, self.refine = nn.LayerNorm(c), Read(c, c, self.num_heads, bias=bias)
        self.ffn_norm, self.ffn = nn.LayerNorm(c), feed_forward(c, self._hidden(hp.compressed_ratio))
        if self.pattern is Pattern.NS:
            self.infuse_norm = nn.LayerNorm(c)
            self.infuse = nn.ModuleDict({name: nn.Linear(c, c, bias=bias) for name in ("v", "out")})
            self.lookup_norm = nn.LayerNorm(c)
            self.lookup_ffn = feed_forward(c, self._hidden(hp.lookup_ratio))

    def _hidden(self, ratio: float) -> int:
        return max(1, round(ratio * self.embed_dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """NS: lookup tokens x (B, N, C) on ``grid``, updated. NC: compressed tokens x that read the context.

        Raises UsageError under NS without a grid.
        """
        lookup, padded = self.source(x, context), key_padding_mask
        if self.pattern is Pattern.NC:
            return self._refined(self._gathered(x, lookup, padded)[0])
        if grid is None:
            raise UsageError(f"{self.spec.id} under NS: observed no grid, expected the sides of x's grid")
        z, q, k, lse = self._gathered(self.compressed(x, grid, padded), lookup, padded)
        assert lse is not None  # under NS it is asked for
        v = self.split(self.infuse["v"](self.infuse_norm(self._refined(z))), self.num_heads)
        x = x + self.infuse["out"](self.join(self._write_back(q, k, v, lse, padded)))
        o: Tensor = x + self.lookup_ffn(self.lookup_norm(x))
        return o

    def compressed(self, x: Tensor, grid: tuple[int, ...], padded: Tensor | None = None) -> Tensor:
        """Resize x (B, N, C) on ``grid`` linearly to ``side`` along every axis, without the padding."""
        sizes = (self.hp.side,) * len(grid)
        if padded is None:
            return on_axes(x, grid, sizes, linear_matrix)
        kept = (~padded).unsqueeze(-1).to(x.dtype)
        total = on_axes(x.masked_fill(padded.unsqueeze(-1), 0.0), grid, sizes, linear_matrix)
        weight = on_axes(kept, grid, sizes, linear_matrix)
        return total / weight.masked_fill(weight == 0, 1.0)

    def _gathered(
        self, z: Tensor, lookup: Tensor, padded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The compressed tokens with what they read; q, k and, where it is written back, lse of the map."""
        tokens, h = self.norm_lookup(lookup), self.num_heads
        q = self.split(self.gather["q"](self.norm_compressed(z)), h)
        k, v = (self.split(self.gather[name](tokens), h) for name in ("k", "v"))
        needed = self.pattern is Pattern.NS
        o, lse = few_query(q, k, v, key_bias=padding_bias(padded), need_lse=needed, backend=self.backend)
        return z + self.gather["out"](self.join(o)), q, k, lse

    def _refined(self, z: Tensor) -> Tensor:
        """Self attention and a feed-forward of the compressed tokens, each with its residual."""
        tokens = self.refine_norm(z)
        z = z + self.refine(tokens, tokens, key_bias=None, backend=self.backend)
        refined: Tensor = z + self.ffn(self.ffn_norm(z))
        return refined

    def _write_back(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, padded: Tensor | None) -> Tensor:
        """Σ_p A_pj v_p for every lookup token j, with A_pj = exp(q_p·k_j/√D − lse_p): (B, H, N, D).

        The lookup tokens are the queries here, and −lse a bias of the keys: the softmax over p times its own
        normaliser, which is the mass that falls to j.
        """
        finite = lse.masked_fill(lse == -math.inf, 0.0)  # all tokens are padding: none receives anything
        o, mass = few_query(k, q, v, key_bias=-finite, need_lse=not self.hp.renorm, backend=self.backend)
        if padded is not None:
            o = o.masked_fill(padded[:, None, :, None], 0.0)
        if mass is None or self.hp.renorm:
            return o
        if padded is not None:  # its score is in no row of A, and the exponential of it unbounded
            mass = mass.masked_fill(padded.unsqueeze(1), -math.inf)
        return (mass.exp().unsqueeze(-1) * o).to(o.dtype)

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Gather, refine, write-back with the scores computed again, both feed-forwards, the resize."""
        c = self.embed_dim
        if self.pattern is Pattern.NC:
            return self._gather_and_refine_flops(n, m)
        grid = fold(n, 2, (2,)) if grid is None else grid
        sizes = (self.hp.side,) * len(grid)
        few = math.prod(sizes)
        write_back = 2 * few * c * c + 4 * few * n * c + 2 * n * c * c
        lookup = feed_forward_flops(n, c, self._hidden(self.hp.lookup_ratio))
        resize = on_axes_flops(grid, sizes, c)
        return resize + self._gather_and_refine_flops(few, n) + write_back + lookup

    def _gather_and_refine_flops(self, few: int, many: int) -> int:
        c = self.embed_dim
        ffn = feed_forward_flops(few, c, self._hidden(self.hp.compressed_ratio))
        return read_flops(few, many, c, c) + read_flops(few, few, c, c) + ffn

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """Keys, values and normalised copies of the lookup tokens, and lse (4 bytes) of the map's rows."""
        if self.pattern is Pattern.NC:
            return 3 * m * self.embed_dim * itemsize + 4 * self.num_heads * n
        few = self.hp.side ** (2 if grid is None else len(grid))
        return 5 * n * self.embed_dim * itemsize + 4 * self.num_heads * (few + n)
