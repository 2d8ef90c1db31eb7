"""Combiner: every query attends to all tokens, to near ones directly and to others through span summaries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._spans import (
    Axis,
    Partial,
    Side,
    Spans,
    cumulative_maximum,
    folded,
    row_maximum,
    shifted,
    spread,
    tail,
    visible,
)
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, merge, padding_bias


class Combiner(Attention):
    """One softmax over direct keys and spans: k_Ω = max k_j, v_Ω = Σ_j softmax_j(max q·k_j/√D) v_j."""

    spec = Spec(
        id="combiner",
        name="Combiner",
        family="linear",
        kind="core",
        paper=Paper(
            "Combiner: Full Attention Transformer with Sparse Computation Cost",
            2021,
            arxiv="2107.05768",
            venue="NeurIPS 2021",
        ),
        upstream="https://github.com/google-research/google-research/tree/master/combiner",
        patterns=(Pattern.NS, Pattern.CS),
        summary="Sees every token: some directly, the others through a summary of the span that they are in.",
        formula="o_i = (Σ_{j∈D} e^{s q_i·k_j} v_j + Σ_{Ω∈P} e^{s q_i·k_Ω} v_Ω)/(Σ_D e^{s q_i·k_j} + Σ_P "
        "e^{s q_i·k_Ω}), k_Ω = max_{j∈Ω} k_j, v_Ω = Σ_{j∈Ω} softmax_j(s q_Ω·k_j) v_j, q_Ω = max_{j∈Ω} q_j",
        cost="tokens as R rows of W: fixed 4·H·N·D·(W + R), axial_rowmajor 4·H·N·D·(2·W + R), "
        "axial_mixture 4·H·N·D·(5·W + 4·R), logsparse 8·H·N·D·log₂N FLOPs",
        query_separable=False,
        permutation_invariant=False,
        ops=("flash",),
        hyper=(
            Hyper(
                "variant",
                "fixed",
                "what is seen directly, and the spans: fixed, the own row, and every other row; logsparse, "
                "the own token, and aligned blocks of 1, 2, 4, … tokens; axial_rowmajor, the own row, and "
                "every other row as its query in the own column sees it; axial_mixture, the own row and "
                "column, and of the others what lies before (and after) the own one",
                choices=("fixed", "logsparse", "axial_rowmajor", "axial_mixture"),
            ),
            Hyper("width", None, "tokens W of a row; None: ⌈√N⌉"),
            Hyper(
                "row_summary",
                "none",
                "k_Ω of axial_rowmajor: none, the key in the own column; wsum, the mean key under the "
                "weights of v_Ω",
                choices=("none", "wsum"),
            ),
        ),
        deviations=(
            "NS is ours for logsparse (the mirror image of what precedes is added) and axial_mixture (spans "
            "on both sides). Its own row is no span of a query: upstream has it twice.",
            "Where W does not divide N, cells of the last row are padding; a padded cell summarises no row.",
            "No learned summary key of axial_rowmajor and no other pooling than the maximum.",
            "With width None past outputs depend on N through W; fix it to decode.",
        ),
        test_hyper={"width": 4},
        confidence="medium",
    )

    def setup(self) -> None:
        """Check the width."""
        if self.hp.width is not None and self.hp.width < 1:
            raise UsageError(f"combiner: observed width={self.hp.width}, expected at least 1 or None")

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """Rows of ⌈√N⌉."""
        return {"width": math.isqrt(n - 1) + 1}

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
        """Structured attention of q, k (B, H, N, D) and v (B, H, N, Dv)."""
        if self.hp.variant == "logsparse":
            return self._logsparse(q, k, v, key_padding_mask)
        n = q.shape[2]
        rows, width = self._fold(n)
        missing = rows * width - n
        hidden = None if key_padding_mask is None else F.pad(key_padding_mask, (0, missing), value=True)
        if missing:
            q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
            if hidden is None:
                hidden = tail(rows * width, n, q.device)
        if hidden is not None:
            hidden = hidden.unflatten(-1, (rows, width))
        q, k, v = (x.unflatten(2, (rows, width)) for x in (q, k, v))
        parts = getattr(self, f"_{self.hp.variant}")(q, k, v, hidden)
        o, lse = parts[0]
        for other in parts[1:]:
            o, lse = merge(o, lse, *other)
        return o.flatten(2, 3)[:, :, :n]

    def _fold(self, n: int) -> tuple[int, int]:
        """Rows R and tokens W of each."""
        width = min(self.hp.width or math.isqrt(n - 1) + 1, n)
        return -(-n // width), width

    @property
    def _causal(self) -> bool:
        return self.pattern is Pattern.CS

    @property
    def _others(self) -> tuple[Side, ...]:
        """The sides on which other rows, columns and cells are seen."""
        return ("before",) if self._causal else ("before", "after")

    # ---- variants: q, k, v (B, H, R, W, ·) -------------------------------------------------------------

    def _fixed(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> list[Partial]:
        """The own row, and the maxima of all others."""
        parts = [self._along("row", q, Spans(k, v, hidden), "upto" if self._causal else "all")]
        gone = None if hidden is None else hidden.all(-1)
        pooled_q, pooled_k = (row_maximum(x, hidden, gone) for x in (q, k))
        read, _ = self._along("row", pooled_q.unsqueeze(3), Spans(k, v, hidden), "all")
        rows, width = q.shape[2:4]
        for side in self._others:
            options = visible(side, rows, width, q.device)
            far = flash(
                q.flatten(2, 3),
                pooled_k,
                read.squeeze(3),
                key_bias=padding_bias(gone),
                backend=self.backend,
                **options,
            )
            parts.append(folded(far, 2, (rows, width)))
        return parts

    def _axial_rowmajor(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> list[Partial]:
        """The own row, and of every other row what its query in the own column reads from it."""
        read_keys = self.hp.row_summary == "wsum"
        values = torch.cat((v, k), -1) if read_keys else v
        whole, lse = self._along("row", q, Spans(k, values, hidden), "all")
        summary = Spans(k, whole, hidden)
        if read_keys:
            summary = Spans(whole[..., v.shape[-1] :], whole[..., : v.shape[-1]], hidden)
        near = (summary.v, lse)
        if self._causal:
            near = self._along("row", q, Spans(k, v, hidden), "upto")
        return [near, *(self._along("column", q, summary, side) for side in self._others)]

    def _axial_mixture(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> list[Partial]:
        """The own row and column; other columns, and other rows in two halves, as maxima."""
        cells = Spans(k, v, hidden)
        parts = [self._along("row", q, cells, "upto" if self._causal else "all")]
        parts += [self._along("column", q, cells, side) for side in self._others]
        for side in self._others:
            columns = self._running(q, cells, "column", side)
            parts += [self._along("row", q, columns, "before"), self._along("row", q, columns, "after")]
        halves_of_rows: tuple[Side, ...] = ("before", "after")
        for half in halves_of_rows:
            halves = self._running(q, cells, "row", half)
            parts += [self._along("column", q, halves, side) for side in self._others]
        return parts

    def _running(self, q: Tensor, cells: Spans, axis: Axis, side: Side) -> Spans:
        """For every cell the summary of the cells on one side of it, along rows or columns."""
        dim = 3 if axis == "row" else 2
        hidden = cells.empty
        if hidden is None:
            hidden = torch.zeros(1, *q.shape[2:4], dtype=torch.bool, device=q.device)
        seen = shifted((~hidden).to(q.dtype), dim - 1, side, 0.0)
        empty = cumulative_maximum(seen, dim - 1, side) == 0
        pooled = []
        for x in (q, cells.k):
            x = x.masked_fill(hidden[:, None, ..., None], -torch.inf)
            maximum = cumulative_maximum(shifted(x, dim, side, -torch.inf), dim, side)
            pooled.append(maximum.masked_fill(empty[:, None, ..., None], 0.0))
        read, _ = self._along(axis, pooled[0], cells, side)
        return Spans(pooled[1], read, empty)

    def _along(self, axis: Axis, q: Tensor, items: Spans, side: Side) -> Partial:
        """Attention of every cell to the items of its row or column, on one side of it."""
        k, v, empty = items
        heads, outer = q.shape[1:3]
        if axis == "column":
            q, k, v = (x.transpose(2, 3) for x in (q, k, v))
            empty = None if empty is None else empty.mT
            outer = q.shape[2]
        bias = None
        if empty is not None:
            bias = torch.zeros(empty.shape, device=q.device).masked_fill(empty, -torch.inf)
            bias = bias.unsqueeze(1).expand(-1, heads, -1, -1).flatten(1, 2)
        options = visible(side, k.shape[3], 1, q.device)
        flat = (x.flatten(1, 2) for x in (q, k, v))
        o, lse = folded(flash(*flat, key_bias=bias, backend=self.backend, **options), 1, (heads, outer))
        return (o.transpose(2, 3), lse.transpose(2, 3)) if axis == "column" else (o, lse)

    # ---- logsparse -------------------------------------------------------------------------------------

    def _logsparse(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """The own token and one aligned block for every set bit of its index; mirrored too under NS."""
        wide = torch.promote_types(q.dtype, torch.float32)
        own = q.shape[-1] ** -0.5 * (q.to(wide) * k.to(wide)).sum(-1)
        if hidden is not None:
            own = own.masked_fill(hidden.unsqueeze(1), -torch.inf)
        o, lse = v.to(wide), own
        for part in self._blocks(q, k, v, hidden):
            o, lse = merge(o, lse, *part)
        if not self._causal:
            mirrored = None if hidden is None else hidden.flip(-1)
            for part in self._blocks(q.flip(2), k.flip(2), v.flip(2), mirrored):
                o, lse = merge(o, lse, *(x.flip(2) for x in part))
        return o.masked_fill(lse.isneginf().unsqueeze(-1), 0.0).to(v.dtype)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> list[Partial]:
        """By level l: what tokens whose index has the bit l read of the block of 2^l tokens before theirs."""
        n = q.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        index = torch.arange(n, device=q.device)
        parts = []
        for level in range((n - 1).bit_length()):
            size = 1 << level
            blocks = n >> level

            def blocked(x: Tensor, size: int = size, blocks: int = blocks) -> Tensor:
                return x[:, :, : size * blocks].unflatten(2, (blocks, size))

            gone = None if hidden is None else hidden[:, : size * blocks].unflatten(1, (blocks, size))
            empty = None if gone is None else gone.all(-1)
            keys = row_maximum(blocked(k), gone, empty)
            values = v
            if level:
                queries = row_maximum(blocked(q), gone, empty).unsqueeze(3)
                read, _ = self._along("row", queries, Spans(blocked(k), blocked(v), gone), "all")
                values = read.squeeze(3)
            key = spread(keys, size, n).to(wide)
            score = q.shape[-1] ** -0.5 * (q.to(wide) * key).sum(-1)
            unseen = index.bitwise_and(size) == 0
            if empty is not None:
                unseen = unseen | spread(empty.unsqueeze(1).unsqueeze(-1), size, n).squeeze(-1)
            parts.append((spread(values, size, n).to(wide), score.masked_fill(unseen, -torch.inf)))
        return parts

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """Scores and values of all visible items, on the folded grid with its padding, and the summaries."""
        rows, width = self._fold(n)
        own = width * (width + 1) // 2 if self._causal else width * width
        earlier, sides = rows * (rows - 1) // 2, len(self._others)
        if self.hp.variant == "fixed":
            items = rows * own + rows * width + sides * width * earlier
        elif self.hp.variant == "axial_rowmajor":
            items = (rows * own if self._causal else 0) + sides * width * earlier
            return self._per_pair() * rows * width * width + 4 * self.head_dim * self.num_heads * items
        elif self.hp.variant == "axial_mixture":
            left = width * (width - 1) // 2
            direct = rows * own + sides * width * earlier
            columns = sides * (width * earlier + (rows - 1) * width * (width - 1))
            halves = 2 * (rows * left + sides * earlier * (width - 1))
            items = direct + columns + halves
        else:
            levels = range((n - 1).bit_length())
            reads = sum(((torch.arange(n) >> level) & 1).sum().item() for level in levels)
            items = n + sides * int(reads) + self._pooled(n)
        return 4 * self.head_dim * self.num_heads * items

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair of a call and masks; logsparse reads its spans elementwise."""
        rows, width = self._fold(n)
        by_row, by_column, sides = rows * width * width, width * rows * rows, len(self._others)
        if self.hp.variant == "fixed":
            items = by_row + rows * width + sides * rows * width * rows
        elif self.hp.variant == "axial_rowmajor":
            items = (by_row if self._causal else 0) + sides * by_column
            return self._per_pair() * by_row + 4 * self.head_dim * self.num_heads * items
        elif self.hp.variant == "axial_mixture":
            items = by_row * (3 + 2 * sides) + by_column * 4 * sides
        else:
            items = self._pooled(n)
        return 4 * self.head_dim * self.num_heads * items

    def _per_pair(self) -> int:
        """FLOPs of a pair, all heads, in the reading of whole rows: wsum reads keys as well."""
        read = 6 if self.hp.row_summary == "wsum" else 4
        return read * self.head_dim * self.num_heads

    def _pooled(self, n: int) -> int:
        """Tokens read to summarise the blocks of two and more, in each direction."""
        levels = range(1, (n - 1).bit_length())
        return len(self._others) * sum((n >> level) << level for level in levels)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Summaries and log-sum-exps."""
        rows, width = self._fold(n)
        d = self.head_dim
        calls = {"fixed": 2, "axial_rowmajor": 3, "axial_mixture": 9}.get(self.hp.variant, 2)
        summaries = rows if self.hp.variant == "fixed" else rows * width * (calls - 2)
        if self.hp.variant == "logsparse":
            summaries = 2 * n
        return self.num_heads * (2 * summaries * d * itemsize + 4 * calls * n)
