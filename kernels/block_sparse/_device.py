"""What the forward and the backward kernels share: argument types, list entries, scores and their masks."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LOG2E, View, head_pointer


class Lists(NamedTuple):
    """Lists of blocks (B, Hs, T, Kmax), their lengths and where their second part begins, both (B, Hs, T).

    One part needs the test of positions, the other does not; ``split`` is None where every entry needs it.
    """

    indices: View
    counts: View
    split: View | None
    group: int  # query heads that share the lists


class Extent(NamedTuple):
    """Lengths, blocks and heads of a call."""

    n: int
    m: int
    block_q: int
    block_k: int
    heads: int
    group: int  # query heads of one key head


class Rows(NamedTuple):
    """What a call says of each query, (B, H, N): its position and its threshold. None: not given."""

    pos: View | None
    threshold: View | None


class Columns(NamedTuple):
    """What a call says of each key, (B, H, M): its position and its bias. None: not given."""

    pos: View | None
    bias: View | None


@triton.jit
def list_bounds(lists, b, h, block):
    """The list of a block as a pointer, the place where its second part begins, and its length."""
    h = h // lists.group
    entries = head_pointer(lists.indices, b, h) + block.to(tl.int64) * lists.indices.n
    count = tl.load(head_pointer(lists.counts, b, h) + block * lists.counts.n)
    split = count
    if lists.split is not None:
        split = tl.load(head_pointer(lists.split, b, h) + block * lists.split.n)
    return entries, split, count


@triton.jit
def row_values(x, b, h, index, end, other, EDGE: tl.constexpr):
    """The values of a (B, H, N) tensor at ``index``, ``other`` from ``end`` on where EDGE looks."""
    at = head_pointer(x, b, h) + index.to(tl.int64) * x.n
    if EDGE:
        return tl.load(at, mask=index < end, other=other)
    else:
        return tl.load(at)


@triton.jit
def query_positions(rows, b, h, index, end, extent, EDGE: tl.constexpr):
    """Positions of the queries ``index`` on the axis of the keys."""
    if rows.pos is None:
        return index + (extent.m - extent.n)
    else:
        return row_values(rows.pos, b, h, index, end, 0, EDGE)


@triton.jit
def key_positions(columns, b, h, index, end, EDGE: tl.constexpr):
    """Positions of the keys ``index``."""
    if columns.pos is None:
        return index
    else:
        return row_values(columns.pos, b, h, index, end, 0, EDGE)


@triton.jit
def biased(s_log2, bias, threshold):
    """Add the bias of the keys, and hide those below the threshold of the queries; either may be None."""
    if bias is not None:
        s_log2 += bias * LOG2E
        if threshold is not None:
            s_log2 = tl.where(bias >= threshold, s_log2, -float("inf"))
    return s_log2
