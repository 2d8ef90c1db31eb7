"""From tensors and lists to launches: units of heads, order of the walk, items, buffers of parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels._tiles import target
from attnbench.kernels.flash._configs import Config
from attnbench.kernels.flash._launch import LOG2E, Call, Launch, Options, RowTerms, view
from attnbench.kernels.token_blocks._backward import backward_kv, backward_q, sum_items
from attnbench.kernels.token_blocks._configs import Kernel, Order, candidates, choose_order, most_rows
from attnbench.kernels.token_blocks._device import Extent, Items, Lists
from attnbench.kernels.token_blocks._forward import forward, merge
from attnbench.kernels.token_blocks._units import Units, units
from attnbench.kernels.token_selection import Tiles, TokenBlocks
from attnbench.kernels.tuning import pick

Launches = list[Launch]


@dataclass(frozen=True)
class TokenCall:
    """The inputs of one call; ``order`` forces a walk."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: TokenBlocks
    key_bias: Tensor | None
    causal: bool
    scale: float
    capability: int
    order: Order | None = None

    @property
    def _head_dim(self) -> int:
        return max(self.q.shape[3], self.v.shape[3])

    @cached_property
    def units(self) -> Units:
        """Runs of heads that share keys, lists and biases, as many as a tile has room for."""
        heads, bias = self.q.shape[1], self.key_bias
        shared = [self.k.shape[1], self.selection.indices.shape[1]]
        if bias is not None and bias.dim() > 1:
            shared.append(bias.shape[-2])
        return units(heads, *shared, most=most_rows(self._head_dim, self.q.dtype))

    @cached_property
    def bias(self) -> Tensor | None:
        """The bias of the keys per unit, (B, U, M)."""
        if self.key_bias is None:
            return None
        return self.key_bias.expand(self.q.shape[0], self.units.count, self.k.shape[2])

    @cached_property
    def walk(self) -> Order:
        """The order in which forward and dq kernels walk the lists."""
        if self.order is not None:
            return self.order
        sel, b = self.selection, self.q.shape[0]
        n, width = sel.indices.shape[2:]
        rows = self.units.rows
        key_tile = candidates("forward", "key", self._head_dim, self.q.dtype, rows, sel.block_k, width)[0]
        return choose_order(
            n=n,
            width=width,
            key_blocks=sel.key_blocks,
            block_k=sel.block_k,
            d=self.q.shape[3],
            dv=self.v.shape[3],
            rows=rows,
            itemsize=self.q.element_size(),
            queries=b * self.units.count * n,
            processors=target(self.q.device).processors,
            most=key_tile.block_m,
        )

    @property
    def _extent(self) -> Extent:
        h, count = self.q.shape[1], self.units.count
        lists = self.selection.indices.shape[1]
        n, m = self.q.shape[2], self.k.shape[2]
        return Extent(n, m, h, count, self.units.rows, count // self.k.shape[1], count // lists)

    @property
    def _lists(self) -> Lists:
        sel = self.selection
        return Lists(self._listed(sel.indices), self._listed(sel.counts), sel.indices.shape[3])

    def _listed(self, x: Tensor) -> Any:
        """A tensor of the selection for every batch element, contiguous inside a head."""
        x = x.contiguous()
        return view(x.expand(self.q.shape[0], *x.shape[1:]))

    def _items(self, tiles: Tiles) -> Items:
        order, _ = self.selection.by_block
        return Items(*map(self._listed, (order, tiles.block, tiles.start, tiles.stop, tiles.first)))

    @property
    def _dense(self) -> Call:
        """The same call without lists, of which tile constants and row terms do not depend on them."""
        options = Options(None, None, self.scale, 0.0)
        return Call(self.q, self.k, self.v, None, None, None, None, options, self.capability)

    def _tuned(self, kernel: Kernel, build: Callable[[Config], Launches]) -> Launches:
        """The launches of the tile that serves this call best."""
        sel = self.selection
        n, width = sel.indices.shape[2:]
        rows, dtype = self.units.rows, self.q.dtype
        options = candidates(kernel, self.walk, self._head_dim, dtype, rows, sel.block_k, width)
        sizes = (triton.next_power_of_2(x) for x in (self._head_dim, sel.block_k, width, n))
        key = (self.capability, str(dtype), self.walk, rows, self.causal, self.bias is not None, *sizes)

        def launch(config: Config) -> Callable[[], None]:
            launches = build(config)
            return lambda: [each.run() for each in launches] and None

        return build(pick("token_blocks", kernel, key, options, launch, self.q.device))

    def _walk_launches(
        self, config: Config, kernel: Any, inputs: tuple, outputs: tuple, tail: tuple, slots: tuple = ()
    ) -> Launch:
        """The launch of a kernel that walks the lists: a tile per query, or per item of the right size."""
        sel = self.selection
        items = None
        tiles = self.q.shape[2]
        if self.walk == "key":
            cut = sel.tiles(config.block_m // self.units.rows)
            items, tiles = self._items(cut), cut.block.shape[2]
        constants = self._dense._constants(config) | {
            "WHOLE": sel.block_k % config.block_n == 0,
            "CAUSAL": self.causal,
            "KEY_MAJOR": self.walk == "key",
        }
        args = (*inputs, *outputs, self._lists, items, self._extent, sel.block_k, tiles, *slots, *tail)
        return Launch(kernel, tiles * self.q.shape[0] * self.units.count, args, constants)

    def _inputs(self) -> tuple:
        return tuple(map(view, (self.q, self.k, self.v, self.bias)))

    def _merge(
        self, parts: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None, lse_log2: Tensor | None
    ) -> Launch:
        b, h, n = self.q.shape[:3]
        d = out.shape[3]
        block_d = max(16, triton.next_power_of_2(d))
        block_m = max(1, 2048 // block_d)
        tiles = triton.cdiv(n, block_m)
        group = h // self.selection.indices.shape[1]
        args = (parts, part_lse, view(out), lse, lse_log2, self._lists, h, group, n, tiles)
        constants = {"D": d, "BLOCK_D": block_d, "BLOCK_M": block_m, "WEIGHTED": part_lse is not None}
        return Launch(merge, tiles * b * h, args, constants | {"num_warps": 4, "num_stages": 1})

    def _parts(self, d: int | None) -> Tensor:
        """Memory for one fp32 part per entry of a list and query head, (B, H, N·K, d) or (B, H, N·K)."""
        b, h, n = self.q.shape[:3]
        entries = (b, h, n * self.selection.indices.shape[3])
        shape = entries if d is None else (*entries, d)
        return torch.empty(shape, device=self.q.device, dtype=torch.float32)

    def forward(self, o: Tensor, lse: Tensor, lse_log2: Tensor) -> Launches:
        """Write o, lse and, for the backward kernels, lse in log 2."""

        def build(config: Config) -> Launches:
            tail = (self.scale * LOG2E,)
            if self.walk == "query":
                outputs = (view(o), lse, lse_log2)
                return [self._walk_launches(config, forward, self._inputs(), outputs, tail, (o.shape[2],))]
            parts, part_lse = self._parts(self.v.shape[3]), self._parts(None)
            outputs = (view(parts), None, part_lse)
            return [
                self._walk_launches(config, forward, self._inputs(), outputs, tail, (parts.shape[2],)),
                self._merge(parts, part_lse, o, lse, lse_log2),
            ]

        return self._tuned("forward", build)

    def row_terms(
        self, do: Tensor, o: Tensor, d_lse: Tensor | None, lse_log2: Tensor, delta: Tensor
    ) -> Launches:
        """Write delta = do·o − d_lse, as in dense attention."""
        return [self._dense.row_terms(do, o, d_lse, RowTerms(lse_log2, delta, None, None))]

    def backward_q(self, do: Tensor, lse_log2: Tensor, delta: Tensor, dq: Tensor) -> Launches:
        """Write dq."""

        def build(config: Config) -> Launches:
            inputs = (*self._inputs(), view(do))
            tail = (self.scale * LOG2E, self.scale)
            if self.walk == "query":
                outputs = (view(dq), lse_log2, delta)
                return [self._walk_launches(config, backward_q, inputs, outputs, tail)]
            parts = self._parts(self.q.shape[3])
            outputs = (view(parts), lse_log2, delta)
            walk = self._walk_launches(config, backward_q, inputs, outputs, tail)
            return [walk, self._merge(parts, None, dq, None, None)]

        return self._tuned("backward_q", build)

    def backward_kv(
        self, do: Tensor, lse_log2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, d_bias: Tensor | None
    ) -> Launches:
        """Write dk, dv and, where it is given, the gradient (B, U, M) of the key bias in fp32.

        An item has at most twice as many entries as a block has on average, so that a block which every
        query chooses is the work of many programs, and at most 1.5·Tk parts of a block exist per unit.
        """
        sel = self.selection
        n, width = sel.indices.shape[2:]

        def build(config: Config) -> Launches:
            entries = max(triton.cdiv(config.block_m, self.units.rows), -(-2 * n * width // sel.key_blocks))
            tiles = sel.tiles(entries)
            count, b = tiles.block.shape[2], self.q.shape[0]
            shape = (b, self.units.count, count, sel.block_k)
            device = self.q.device
            parts = [
                None if x is None else torch.empty(*shape, d, device=device, dtype=torch.float32)
                for x, d in ((dk, dk.shape[3]), (dv, dv.shape[3]), (d_bias, 1))
            ]
            key_tiles = triton.cdiv(sel.block_k, config.block_n)
            args = (*self._inputs(), view(do), *parts, lse_log2, delta, width, self._items(tiles))
            args += (self._extent, sel.block_k, count, key_tiles, self.scale * LOG2E, self.scale)
            constants = self._dense._constants(config) | {"CAUSAL": self.causal}
            launches = [Launch(backward_kv, key_tiles * count * b * self.units.count, args, constants)]
            outs = (dk, dv, None if d_bias is None else d_bias.unsqueeze(-1))
            return launches + [
                self._sum(part, out, tiles, count)
                for part, out in zip(parts, outs, strict=True)
                if part is not None and out is not None
            ]

        return self._tuned("backward_kv", build)

    def _sum(self, parts: Tensor, out: Tensor, tiles: Tiles, count: int) -> Launch:
        sel, extent = self.selection, self._extent
        b, heads, m, d = out.shape
        block_d = triton.next_power_of_2(d)
        block_n = max(1, min(triton.next_power_of_2(sel.block_k), 1024 // block_d))
        key_tiles = sel.key_blocks * triton.cdiv(sel.block_k, block_n)
        args = (parts, view(out), self._listed(tiles.first), extent.units, extent.unit_lists, heads, m)
        args += (count, sel.block_k, key_tiles)
        constants = {"D": d, "BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
        return Launch(sum_items, key_tiles * b * heads, args, constants)
