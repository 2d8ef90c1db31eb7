"""From tensors and lists to launches: views, tiles and compile-time constants of each kernel.

A launch is a value, so that the ahead-of-time compilation builds exactly what a call on a GPU would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from attnbench.kernels.buckets._backward import backward_kv, backward_q, entry_terms, row_terms, sum_entries
from attnbench.kernels.buckets._configs import candidates
from attnbench.kernels.buckets._device import Extent, Score, Side, Tiles
from attnbench.kernels.buckets._forward import combine, forward
from attnbench.kernels.buckets.layout import Buckets, Visits
from attnbench.kernels.flash._configs import Config, Kernel
from attnbench.kernels.flash._launch import LOG2E, Launch, view
from attnbench.kernels.tuning import pick


@dataclass(frozen=True)
class Terms:
    """What the backward kernels know of a query, (B, H, N), or with a gate of an entry, (B, H, Lq); fp32."""

    lse_log2: Tensor
    delta: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class BucketCall:
    """The inputs of one call, the key bias expanded to (B, H, M)."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: Buckets
    key_bias: Tensor | None
    causal: bool
    self_score: float | None
    scale: float
    capability: int

    @property
    def heads(self) -> int:
        """B·H, the query heads of the whole batch."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def key_rows_are_tokens(self) -> bool:
        """Whether one program alone contributes to the gradient of a key, and can write it."""
        return self.lists.distinct and self.q.shape[1] == self.k.shape[1]

    def forward(self, o: Tensor, lse: Tensor | None, lse_log2: Tensor) -> Launch:
        """Write o and lse: of the tokens where lse is given, else of the entries."""
        args = (view(o), lse, lse_log2)
        return self._picked("forward", lambda config: self._by_tiles(forward, config, args, lse is not None))

    def combine(
        self, entries_o: Tensor, entries_lse: Tensor, o: Tensor, lse: Tensor, lse_log2: Tensor, mean: bool
    ) -> Launch:
        """Write o and lse of the tokens from those of the entries."""
        visits, starts, group = self._visits(self.lists.query_visits)
        n, length, dv = self.lists.n, self.lists.queries.shape[-1], o.shape[3]
        tiles, constants = _rows(n, dv)
        args = (view(entries_o), entries_lse, view(o), lse, lse_log2, visits, starts)
        args += (length, group, self.q.shape[1], n, tiles)
        return Launch(combine, tiles * self.heads, args, constants | {"MEAN": mean})

    def row_terms(self, do: Tensor, o: Tensor, d_lse: Tensor | None, terms: Terms) -> Launch:
        """Write delta of the tokens from lse in log 2."""
        tiles, constants = _rows(self.lists.n, o.shape[3])
        args = (view(do), view(o), view(d_lse), terms.lse_log2, terms.delta)
        args += (self.lists.n, self.q.shape[1], tiles)
        return Launch(row_terms, tiles * self.heads, args, constants)

    def entry_terms(
        self,
        do: Tensor,
        entries_o: Tensor,
        entries_lse: Tensor,
        d_lse: Tensor | None,
        lse_log2: Tensor,
        terms: Terms,
    ) -> Launch:
        """Write lse, delta and gate of the entries, for a mean."""
        _, starts, _ = self._visits(self.lists.query_visits)
        tiles, constants = _rows(self.lists.queries.shape[-1], entries_o.shape[3])
        args = (view(do), view(entries_o), entries_lse, view(d_lse), lse_log2)
        args += (terms.lse_log2, terms.delta, terms.gate)
        args += (self._side("query"), starts, self.lists.n, self.q.shape[1], tiles)
        return Launch(entry_terms, tiles * self.heads, args, constants)

    def backward_q(self, do: Tensor, terms: Terms, dq: Tensor) -> Launch:
        """Write dq, of the tokens where the lists hold each once, else of the entries."""
        args = (view(do), view(dq), terms.lse_log2, terms.delta, terms.gate)
        return self._picked(
            "backward_q", lambda config: self._by_tiles(backward_q, config, args, self.lists.distinct)
        )

    def backward_kv(self, do: Tensor, terms: Terms, dk: Tensor, dv: Tensor, d_bias: Tensor | None) -> Launch:
        """Write dk, dv and d_bias, of the tokens if key_rows_are_tokens, else of the entries."""
        args = (view(do), view(dk), view(dv), view(d_bias), terms.lse_log2, terms.delta, terms.gate)
        return self._picked(
            "backward_kv",
            lambda config: self._by_tiles(backward_kv, config, args, self.key_rows_are_tokens),
        )

    def sum_entries(self, parts: Tensor, out: Tensor, side: Literal["query", "key"]) -> Launch:
        """Write to ``out`` the sums over the entries of a token and the query heads of a head of out."""
        visits, starts, group = self._visits(
            self.lists.query_visits if side == "query" else self.lists.key_visits
        )
        b, out_heads, n, d = out.shape
        tiles, constants = _rows(n, d)
        constants["D"], constants["BLOCK_D"] = constants.pop("DV"), constants.pop("BLOCK_DV")
        members = self.q.shape[1] // out_heads
        args = (view(parts), view(out), visits, starts, group, out_heads, members, n, tiles)
        return Launch(sum_entries, tiles * b * out_heads, args, constants)

    def _picked(self, kernel: Kernel, launch: Callable[[Config], Launch]) -> Launch:
        d = max(self.q.shape[3], self.v.shape[3])
        lists = self.lists
        query_chunk = lists.query_chunk or -(-lists.queries.shape[-1] // lists.count)
        key_chunk = lists.key_chunk or -(-lists.keys.shape[-1] // lists.count)
        seen = 1 + lists.look_back
        if kernel == "backward_kv":
            query_chunk *= seen
        else:
            key_chunk *= seen
        crowded = self.key_bias is not None or lists.query_labels is not None
        choices = candidates(kernel, d, self.q.dtype, query_chunk, key_chunk, crowded)
        width = max(16, triton.next_power_of_2(d))
        key = (
            self.capability,
            str(self.q.dtype),
            width,
            query_chunk,
            key_chunk,
            lists.query_chunk == 0,
            crowded,
        )
        return launch(pick("buckets", kernel, key, choices, lambda config: launch(config).run, self.q.device))

    def _by_tiles(self, kernel: Any, config: Config, args: tuple[Any, ...], direct: bool) -> Launch:
        """A launch over the tiles of query entries, or of key entries for dk and dv."""
        over_keys = kernel is backward_kv
        tiles = self._tiles("key", config.block_n) if over_keys else self._tiles("query", config.block_m)
        args = (view(self.q), view(self.k), view(self.v), *args)
        args += (self._side("query"), self._side("key"), tiles, view(self.key_bias))
        args += (self._extent, self._score)
        d, dv = self.q.shape[3], self.v.shape[3]
        constants = {
            "D": d,
            "DV": dv,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": self.causal,
            "DIRECT": direct,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return Launch(kernel, tiles.total * self.heads, args, constants)

    @property
    def _extent(self) -> Extent:
        h, lists = self.q.shape[1], self.lists
        return Extent(lists.n, lists.m, h, h // self.k.shape[1], lists.count, lists.look_back)

    @property
    def _score(self) -> Score:
        own = None if self.self_score is None else self.self_score * LOG2E
        return Score(self.scale * LOG2E, self.scale, own)

    def _side(self, side: Literal["query", "key"]) -> Side:
        lists = self.lists
        if side == "query":
            entries, labels, offsets = lists.queries, lists.query_labels, lists.query_offsets
            chunk = lists.query_chunk
        else:
            entries, labels, offsets = lists.keys, lists.key_labels, lists.key_offsets
            chunk = lists.key_chunk
        shape = (self.q.shape[0], *entries.shape[1:])
        labels = None if labels is None else view(labels.expand(shape))
        group = self.q.shape[1] // entries.shape[1]
        return Side(
            view(entries.expand(shape)), labels, self._per_list(offsets), chunk, entries.shape[2], group
        )

    def _tiles(self, side: Literal["query", "key"], block: int) -> Tiles:
        lists = self.lists
        chunk = lists.query_chunk if side == "query" else lists.key_chunk
        if chunk:
            each = triton.cdiv(chunk, block)
            return Tiles(None, None, each, each * lists.count)
        bucket, first = lists.tiles(side, block)
        return Tiles(self._per_list(bucket), self._per_list(first), 0, bucket.shape[-1])

    def _visits(self, visits: Visits) -> tuple[Any, Any, int]:
        """Views of the inverse list, and the query heads that share it."""
        group = self.q.shape[1] // visits.entries.shape[1]
        return self._per_list(visits.entries), self._per_list(visits.starts), group

    def _per_list(self, x: Tensor | None) -> Any:
        return None if x is None else view(x.expand(self.q.shape[0], -1, -1))


def _rows(n: int, width: int) -> tuple[int, dict[str, Any]]:
    """Tiles and constants of a kernel that reads whole rows of ``width``."""
    block_d = max(16, triton.next_power_of_2(width))
    block_t = max(16, 4096 // block_d)
    constants = {"DV": width, "BLOCK_DV": block_d, "BLOCK_T": block_t, "num_warps": 4, "num_stages": 1}
    return triton.cdiv(n, block_t), constants
