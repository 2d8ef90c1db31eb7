"""From tensors and a Selection to launches: lists in the order of the kernels, tiles that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels.block_sparse._backward import backward_kv, backward_q
from attnbench.kernels.block_sparse._blocks import entries_below, partition, unmasked_blocks
from attnbench.kernels.block_sparse._configs import candidates, choose
from attnbench.kernels.block_sparse._device import Columns, Extent, Lists, Rows
from attnbench.kernels.block_sparse._forward import forward
from attnbench.kernels.flash._configs import Config, Kernel
from attnbench.kernels.flash._launch import LOG2E, Call, Launch, Options, RowTerms, view
from attnbench.kernels.selection import Selection
from attnbench.kernels.tuning import pick


@dataclass(frozen=True)
class BlockCall:
    """The inputs of one call; positions, bias and threshold expanded to (B, H, N) and (B, H, M)."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection
    q_pos: Tensor | None
    k_pos: Tensor | None
    key_bias: Tensor | None
    row_threshold: Tensor | None
    causal: bool
    scale: float
    capability: int

    @property
    def _dense(self) -> Call:
        """The same call without a selection, of which tile constants and row terms do not depend on one."""
        options = Options(None, None, self.scale, 0.0)
        return Call(self.q, self.k, self.v, None, None, None, None, options, self.capability)

    @property
    def _extent(self) -> Extent:
        h, kv_heads = self.q.shape[1], self.k.shape[1]
        sel = self.selection
        return Extent(sel.n, sel.m, sel.block_q, sel.block_k, h, h // kv_heads)

    def _tuned(self, kernel: Kernel, build: Callable[[Config], Launch]) -> Launch:
        """The launch with the default tiles, which divide the blocks or cover one, or with tuned ones."""
        sel = self.selection
        d = max(self.q.shape[3], self.v.shape[3])
        vectors = self.key_bias is not None or self._positioned
        default = choose(kernel, self.capability, d, self.q.dtype, sel.block_q, sel.block_k, vectors)
        widths = (max(16, triton.next_power_of_2(x.shape[3])) for x in (self.q, self.v))
        lengths = (triton.next_power_of_2(max(x, 1)) for x in (sel.n, sel.m, sel.indices.shape[-1]))
        group = self.q.shape[1] // self.k.shape[1]
        options = sel.block_q, sel.block_k, group, self.causal, vectors
        config = pick(
            op="block_sparse",
            kernel=kernel,
            key=(self.capability, str(self.q.dtype), *widths, *lengths, *options),
            candidates=candidates(default),
            launch=lambda config: build(config).run,
            device=self.q.device,
        )
        return build(config)

    def _constants(self, config: Config) -> dict[str, Any]:
        sel = self.selection
        return self._dense._constants(config) | {
            "Q_TILES": triton.cdiv(sel.block_q, config.block_m),
            "K_TILES": triton.cdiv(sel.block_k, config.block_n),
            "CAUSAL": self.causal,
        }

    def _key_edges(self, config: Config) -> dict[str, bool]:
        """Whether tiles of keys are cut: by the end of every block, by the end of the sequence."""
        sel = self.selection
        return {"RAGGED_K": sel.block_k % config.block_n != 0, "UNEVEN_K": sel.m % sel.block_k != 0}

    @property
    def _positioned(self) -> bool:
        """Whether positions are the caller's, so that the place of a block says nothing about causality."""
        return self.q_pos is not None or self.k_pos is not None

    def _per_token(self) -> tuple[Rows, Columns]:
        return (
            Rows(view(self.q_pos), view(self.row_threshold)),
            Columns(view(self.k_pos), view(self.key_bias)),
        )

    def _lists(self, selection: Selection, split: Tensor | None, indices: Tensor | None = None) -> Lists:
        b, h = self.q.shape[:2]
        indices = (selection.indices if indices is None else indices).contiguous()
        views = (
            None if x is None else view(x.expand(b, *(-1,) * (x.dim() - 1)))
            for x in (indices, selection.counts, split)
        )
        return Lists(*views, h // selection.counts.shape[1])

    def _key_lists(self) -> Lists:
        """The lists of the selection with the entries first that need no mask."""
        sel = self.selection
        if not (self.causal and self._positioned):
            return self._lists(sel, entries_below(sel, unmasked_blocks(sel, self.causal)))
        if sel.full is None:
            return self._lists(sel, None)
        indices, split = partition(sel, sel.full & (sel.indices < sel.m // sel.block_k))
        return self._lists(sel, split, indices)

    def _query_lists(self) -> Lists:
        """The transposed lists with the entries first that need the mask of causality."""
        sel = self.selection.transpose()
        if not self.causal:
            return self._lists(sel, None)
        if not self._positioned:
            # ascending, so that in the list of key block J the query blocks that mask it come first
            whole = unmasked_blocks(self.selection, True)
            key_block = torch.arange(sel.query_blocks, device=whole.device)
            return self._lists(sel, entries_below(sel, torch.searchsorted(whole, key_block, right=True)))
        if sel.full is None:
            return self._lists(sel, None)
        indices, split = partition(sel, ~sel.full)
        return self._lists(sel, split, indices)

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launch:
        """Write o, lse and, for the backward kernels, lse in log 2."""
        args = (view(self.q), view(self.k), view(self.v), view(o), lse, lse_log2, self._key_lists())
        args += (*self._per_token(), self._extent, self.scale * LOG2E)

        def build(config: Config) -> Launch:
            constants = self._constants(config) | self._key_edges(config)
            tiles = self.selection.query_blocks * constants["Q_TILES"]
            return Launch(forward, tiles * self._dense.heads, (*args, tiles), constants)

        return self._tuned("forward", build)

    def row_terms(
        self, do: Tensor, o: Tensor, d_lse: Tensor | None, lse_log2: Tensor, delta: Tensor
    ) -> Launch:
        """Write delta = do·o − d_lse, as in dense attention."""
        return self._dense.row_terms(do, o, d_lse, RowTerms(lse_log2, delta, None, None))

    def backward_q(self, do: Tensor, lse_log2: Tensor, delta: Tensor, dq: Tensor) -> Launch:
        """Write dq."""
        args = (view(self.q), view(self.k), view(self.v), view(do), view(dq), lse_log2, delta)
        args += (self._key_lists(), *self._per_token(), self._extent, self.scale * LOG2E, self.scale)

        def build(config: Config) -> Launch:
            constants = self._constants(config) | self._key_edges(config)
            tiles = self.selection.query_blocks * constants["Q_TILES"]
            return Launch(backward_q, tiles * self._dense.heads, (*args, tiles), constants)

        return self._tuned("backward_q", build)

    def backward_kv(
        self, do: Tensor, lse_log2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, d_bias: Tensor | None
    ) -> Launch:
        """Write dk, dv and, where it is given, the gradient (B, H, M) of the key bias in fp32."""
        sel = self.selection
        args = (view(self.q), view(self.k), view(self.v), view(do), view(dk), view(dv), view(d_bias))
        args += (lse_log2, delta, self._query_lists(), *self._per_token(), self._extent)
        args += (self.scale * LOG2E, self.scale)

        def build(config: Config) -> Launch:
            constants = self._constants(config)
            constants["RAGGED_Q"] = (sel.block_q % config.block_m or sel.n % sel.block_q) != 0
            tiles = sel.key_blocks * constants["K_TILES"]
            return Launch(backward_kv, tiles * self.k.shape[0] * self.k.shape[1], (*args, tiles), constants)

        return self._tuned("backward_kv", build)
