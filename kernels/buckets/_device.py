"""What the kernels share: argument types, tiles of lists, ranges of entries, gathered loads and scores.

An entry of a list is a slot, a token is an index into q, k or v; scores are in units of log 2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from attnbench.kernels.flash._device import LOG2E, View, head_pointer


class Side(NamedTuple):
    """The list of the queries or of the keys; offsets are None where every bucket has ``chunk`` entries."""

    entries: View
    labels: View | None
    offsets: View | None
    chunk: int
    length: int
    group: int  # query heads that share a list


class Tiles(NamedTuple):
    """The tiles of a list: ``per_bucket`` each, or a table of the bucket and the first slot of every tile."""

    bucket: View | None
    first: View | None
    per_bucket: int
    total: int


class Extent(NamedTuple):
    """Lengths, heads and buckets of a call."""

    n: int
    m: int
    heads: int
    group: int  # query heads of one key head
    count: int
    look_back: int


class Score(NamedTuple):
    """Multipliers of q·k on its way into exp2, and of dq and dk; the score of a token with itself if set."""

    inner: float
    outer: float
    self_log2: float | None


@triton.jit
def tile_bounds(side, tiles, b, h, tile, BLOCK: tl.constexpr):
    """The bucket of a tile, its first slot, and the end of the bucket; first ≥ end in a tile without work."""
    if side.offsets is None:
        bucket = tile // tiles.per_bucket
        first = bucket * side.chunk + tile % tiles.per_bucket * BLOCK
        return bucket, first, (bucket + 1) * side.chunk
    else:
        g = h // side.group
        bucket = tl.load(head_pointer(tiles.bucket, b, g) + tile * tiles.bucket.n)
        first = tl.load(head_pointer(tiles.first, b, g) + tile * tiles.first.n)
        return bucket, first, tl.load(head_pointer(side.offsets, b, g) + (bucket + 1) * side.offsets.n)


@triton.jit
def bucket_start(side, b, h, bucket, count):
    """The first slot of a bucket from −count to 2·count, on a list that repeats itself on both sides."""
    if side.offsets is None:
        return bucket * side.chunk
    else:
        turn = tl.where(bucket < 0, -1, tl.where(bucket > count, 1, 0))
        at = head_pointer(side.offsets, b, h // side.group) + (bucket - turn * count) * side.offsets.n
        return tl.load(at) + turn * side.length


@triton.jit
def tokens(side, b, h, slots, end):
    """The tokens of slots, which may lie one length outside the list; −1 from ``end`` on. And the slots."""
    slots_in = tl.where(slots < 0, slots + side.length, slots)
    slots_in = tl.where(slots_in >= side.length, slots_in - side.length, slots_in)
    at = head_pointer(side.entries, b, h // side.group) + slots_in.to(tl.int64) * side.entries.n
    return tl.load(at, mask=slots < end, other=-1), slots_in


@triton.jit
def labels(side, b, h, slots, live):
    """The labels of slots inside the list, None without."""
    if side.labels is None:
        return None
    else:
        at = head_pointer(side.labels, b, h // side.group) + slots.to(tl.int64) * side.labels.n
        return tl.load(at, mask=live, other=0)


@triton.jit
def gather(pointer, x, rows, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The rows of a head by index as (len(rows), COLS): 0 where the index is −1, and beyond WIDTH columns."""
    cols = tl.arange(0, COLS)
    tile = (pointer + rows.to(tl.int64) * x.n)[:, None] + cols[None, :] * x.d
    if WIDTH == COLS:
        return tl.load(tile, mask=(rows >= 0)[:, None], other=0.0)
    else:
        return tl.load(tile, mask=(rows >= 0)[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def scatter(pointer, x, rows, live, tile, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Write the rows of a tile to rows of a head by index, where live."""
    cols = tl.arange(0, COLS)
    target = (pointer + rows.to(tl.int64) * x.n)[:, None] + cols[None, :] * x.d
    tl.store(target, tile.to(x.base.dtype.element_ty), mask=live[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def scores(dot, i, j, i_label, j_label, key_bias, b, h, extent, score, CAUSAL: tl.constexpr):
    """Turn q·k into scores in log 2, −inf where a pair is not seen; i and j broadcast to the pairs."""
    s = dot * score.inner
    if score.self_log2 is not None:
        s = tl.where(i == j, score.self_log2, s)
    if key_bias is not None:
        at = head_pointer(key_bias, b, h) + tl.maximum(j, 0).to(tl.int64) * key_bias.n
        s += tl.load(at).to(tl.float32) * LOG2E
    seen = j >= 0
    if CAUSAL:
        seen = seen & (j <= i + (extent.m - extent.n))
    if i_label is not None:
        seen = seen & (i_label == j_label)
    return tl.where(seen, s, -float("inf"))
