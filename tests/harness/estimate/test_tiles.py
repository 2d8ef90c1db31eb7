"""The tile simulator: reference values of generalized neighborhood attention, brute force over the mask."""

import itertools

import pytest

from attnbench import UsageError
from attnbench.harness.estimate.tiles import (
    Axis,
    block_sparse,
    broadcast,
    neighborhood,
    smallest_full_stride,
)


def grid(lengths, windows, strides, dilations=None, causal=False):
    dilations = dilations or (1,) * len(lengths)
    return [Axis(*values, causal=causal) for values in zip(lengths, windows, strides, dilations, strict=True)]


@pytest.mark.parametrize(
    ("lengths", "windows", "strides", "query_tile", "key_tile", "speedup", "full"),
    [
        ((32768,), (2048,), (1,), (128,), (128,), 15.11, False),
        ((32768,), (2048,), (128,), (128,), (128,), 15.11, False),
        ((32768,), (2048,), (256,), (128,), (128,), 16.00, True),
        ((256, 256), (80, 80), (1, 1), (16, 8), (16, 8), 7.51, False),
        ((256, 256), (80, 80), (16, 16), (16, 8), (16, 8), 10.24, True),
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8), 5.44, False),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 11.11, True),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 10.42, False),
    ],
)
def test_reference_values(lengths, windows, strides, query_tile, key_tile, speedup, full):
    found = neighborhood(grid(lengths, windows, strides), query_tile, key_tile)
    assert found.speedup == pytest.approx(speedup, abs=0.006)
    assert (found.efficiency == 1.0) == full


def test_the_smallest_stride_of_full_tiles():
    assert smallest_full_stride(Axis(32768, 2048), 128, 128) == 256
    assert smallest_full_stride(Axis(100, 9), 16, 16) is None


def allowed(axes, query, key):
    """The definition, token by token, with tuples of coordinates."""
    for axis, i, j in zip(axes, query, key, strict=True):
        if i % axis.dilation != j % axis.dilation:
            return False
        length = len(range(i % axis.dilation, axis.length, axis.dilation))
        i, j = i // axis.dilation, j // axis.dilation
        group = i // axis.stride * axis.stride
        if axis.causal:
            leader = min(group + axis.stride - 1, length - 1)
            if not max(leader - axis.window + 1, 0) <= j <= i:
                return False
        else:
            leader = min(group + axis.stride // 2, length - 1)
            start = min(max(leader - axis.window // 2, 0), length - axis.window)
            if not start <= j < start + axis.window:
                return False
    return True


CASES = [
    grid((13,), (5,), (1,)),
    grid((13,), (4,), (3,), causal=True),
    grid((13,), (3,), (2,), (3,)),
    grid((6, 7), (3, 4), (1, 2)),
    grid((6, 7), (3, 3), (2, 1), (1, 2)),
    grid((6, 7), (3, 4), (2, 2), causal=True),
    grid((3, 4, 5), (2, 3, 2), (1, 3, 2)),
]


@pytest.mark.parametrize("axes", CASES, ids=str)
def test_single_tiling_is_brute_force_over_the_mask(axes):
    places = list(itertools.product(*(range(axis.length) for axis in axes)))
    pairs = [(i, j) for i, q in enumerate(places) for j, k in enumerate(places) if allowed(axes, q, k)]
    found = neighborhood(axes, (4,) + (1,) * (len(axes) - 1), (3,) + (1,) * (len(axes) - 1), "single")
    assert found.pairs == len(pairs)
    assert found.visited == len({(i // 4, j // 3) for i, j in pairs})
    assert found.all_pairs == len(places) ** 2


@pytest.mark.parametrize("axes", CASES, ids=str)
def test_multi_tiling_is_brute_force_over_tiles_of_residue_classes(axes):
    tile_q, tile_k = (2, 3, 2)[: len(axes)], (3, 2, 2)[: len(axes)]

    def tile(place, sizes):
        return tuple(
            (x % a.dilation, x // a.dilation // t) for x, a, t in zip(place, axes, sizes, strict=True)
        )

    places = list(itertools.product(*(range(axis.length) for axis in axes)))
    ranges = {}  # a kernel visits the box from the first to the last key tile of each axis
    for q in places:
        for k in places:
            if allowed(axes, q, k):
                ranges.setdefault(tile(q, tile_q), []).append(tile(k, tile_k))
    visited = 0
    for keys in ranges.values():
        box = 1
        for axis_tiles in zip(*keys, strict=True):
            numbers = [number for _, number in axis_tiles]
            box *= max(numbers) - min(numbers) + 1
        visited += box
    assert neighborhood(axes, tile_q, tile_k).visited == visited


def test_special_cases():
    whole = neighborhood(grid((64,), (64,), (1,)), (16,), (16,))
    assert (whole.speedup, whole.efficiency, whole.speedup_flops) == (1.0, 1.0, 1.0)
    blocked = neighborhood(grid((64,), (16,), (16,)), (16,), (16,))  # stride = window: separate blocks
    assert (blocked.speedup, blocked.efficiency) == (4.0, 1.0)


def test_block_masks_are_counted_from_their_rows():
    found = block_sparse((1, 2, 1, 0), n=250, m=512, block_m=64, block_n=128)
    assert (found.visited, found.dense, found.speedup, found.efficiency) == (4, 16, 4.0, 1.0)
    for counts in ((1, 2, 1), (5, 0, 0, 0), (-1, 0, 0, 0)):
        with pytest.raises(UsageError, match="block mask: observed"):
            block_sparse(counts, n=250, m=512, block_m=64, block_n=128)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UsageError, match="observed stride 4, expected 1 to 3"):
        Axis(10, 3, 4)
    with pytest.raises(UsageError, match="observed window 4 × dilation 3 on an axis of 10"):
        Axis(10, 4, 1, 3)
    with pytest.raises(UsageError, match="observed rank 1 and 2 on a grid of rank 2"):
        neighborhood(grid((4, 4), (2, 2), (1, 1)), (4,), (2, 2))
    assert broadcast(3, 2, int) == broadcast((3, 3), 2, int) == (3, 3)
    with pytest.raises(UsageError, match=r"observed \[1, 2\], expected one value or 3"):
        broadcast((1, 2), 3, int)
