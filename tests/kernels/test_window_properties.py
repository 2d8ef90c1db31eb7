"""The definition of window against the published algorithms, its maps, its special cases and its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels import Partition, Unsupported, flash, window
from attnbench.kernels.window._configs import candidates
from attnbench.kernels.window._maps import AxisMap, grid_map
from attnbench.kernels.window.reference import visible


def _qkv(tokens: int, heads: int = 2, d: int = 8) -> list[Tensor]:
    return [torch.randn(2, heads, tokens, d, dtype=torch.float64) for _ in range(3)]


def _windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, Gh, Gw, D) as (B, H, windows, tokens of a window, D)."""
    b, h, gh, gw, d = x.shape
    x = x.view(b, h, gh // size[0], size[0], gw // size[1], size[1], d)
    return x.transpose(3, 4).reshape(b, h, -1, size[0] * size[1], d)


def _merged(x: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of _windows."""
    b, h, _, _, d = x.shape
    x = x.view(b, h, grid[0] // size[0], grid[1] // size[1], *size, d).transpose(3, 4)
    return x.reshape(b, h, *grid, d)


@pytest.mark.parametrize(("size", "shift"), [((3, 4), (1, 2)), ((2, 3), (1, 1)), ((3, 4), (0, 0))])
def test_swin_rolls_and_masks(size: tuple[int, int], shift: tuple[int, int]) -> None:
    """Roll, partition, mask pairs that the roll made neighbours, roll back: as Swin computes its windows."""
    grid = 6, 12
    q, k, v = _qkv(72)
    table = torch.randn(2, 2 * size[0] - 1, 2 * size[1] - 1, dtype=torch.float64)
    rolled = [_windows(x.view(2, 2, *grid, 8).roll((-shift[0], -shift[1]), (2, 3)), size) for x in (q, k, v)]
    strips = []
    for length, w, s in zip(grid, size, shift, strict=True):
        strip = torch.zeros(length, dtype=torch.long)
        strip[length - w : length - s] = 1
        if s:
            strip[length - s :] = 2
        strips.append(strip)
    region = (strips[0][:, None] * 3 + strips[1][None]).view(1, 1, *grid, 1)
    region = _windows(region, size)[0, 0, :, :, 0]
    local = torch.cartesian_prod(*(torch.arange(w) for w in size))
    delta = local[:, None] - local[None] + torch.tensor(size) - 1
    scores = rolled[0] @ rolled[1].mT * 8**-0.5 + table[:, delta[..., 0], delta[..., 1]].unsqueeze(1)
    scores = scores.masked_fill(region[:, :, None] != region[:, None, :], -math.inf)
    o = _merged(scores.softmax(-1) @ rolled[2], size, grid).roll(shift, (2, 3)).flatten(2, 3)
    found, _ = window(q, k, v, Partition.block(size, shift=shift), grid=grid, bias=table, backend="reference")
    torch.testing.assert_close(found, o)


def test_halo_unfolds() -> None:
    """Blocks of queries and unfolded blocks of keys with their halo, as HaloNet computes them."""
    block, halo, tokens = 4, 3, 16
    q, k, v = _qkv(tokens)
    exists = F.pad(torch.ones(tokens, dtype=torch.bool), (halo, halo)).unfold(0, block + 2 * halo, block)
    keys, values = (F.pad(x, (0, 0, halo, halo)).unfold(2, block + 2 * halo, block) for x in (k, v))
    scores = q.unflatten(2, (-1, block)) @ keys * 8**-0.5
    scores = scores.masked_fill(~exists[:, None], -math.inf)
    o = (scores.softmax(-1) @ values.mT).flatten(2, 3)
    found, lse = window(q, k, v, Partition.block((block,), halo=(halo,)), grid=(tokens,), backend="reference")
    torch.testing.assert_close(found, o)
    torch.testing.assert_close(lse, scores.logsumexp(-1).flatten(2, 3))


def test_strided_groups_are_transposed_blocks() -> None:
    """MaxViT's grid attention: token i·(G/g) + c of a line is the i-th of group c."""
    q, k, v = _qkv(6 * 8)
    tokens, grid = (2, 4), (6, 8)
    groups = [
        x.view(2, 2, 2, 3, 4, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 2, 6, 8, 8) for x in (q, k, v)
    ]
    o = (groups[0] @ groups[1].mT * 8**-0.5).softmax(-1) @ groups[2]
    o = o.view(2, 2, 3, 2, 2, 4, 8).permute(0, 1, 4, 2, 5, 3, 6).reshape(q.shape)
    found, _ = window(q, k, v, Partition.strided(grid, tokens), grid=grid, backend="reference")
    torch.testing.assert_close(found, o)


def test_long_distance_groups() -> None:
    """CrossFormer: tokens of one super-cell of g·I at interval I form a group."""
    g, interval, tokens = 3, 2, 14
    mask = visible(
        Partition.block((g,), dilation=(interval,)), (tokens,), (tokens,), tokens, tokens, torch.device("cpu")
    )
    for i in range(tokens):
        for j in range(tokens):
            same = i // (g * interval) == j // (g * interval) and i % interval == j % interval
            assert mask[i, j] == same


def test_clamped_windows_of_a_coarser_grid() -> None:
    """The context of query block a: P keys of the grid G/R from clamp((aP − (R−1)P/2)/R, 0, G/R − P) on."""
    p, r, length = 4, 2, 24
    partition = Partition((p,), (p,), (p // r,), (-(r - 1) * p // (2 * r),), (0,), (1,), "clamp")
    mask = visible(partition, (length,), (length // r,), length, length // r, torch.device("cpu"))
    for i in range(length):
        first = min(max((i // p * p - (r - 1) * p // 2) // r, 0), length // r - p)
        assert mask[i].nonzero().flatten().tolist() == list(range(first, first + p))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_one_window_is_dense_attention(backend: str) -> None:
    q, k, v = (x.float() for x in _qkv(20, d=16))
    found = window(q, k, v, Partition.block((4, 9)), grid=(4, 5), causal=True, backend=backend)
    expected = flash(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(found, expected)


def test_a_constant_in_the_table_changes_nothing_but_lse() -> None:
    q, k, v = _qkv(20)
    partition = Partition.block((3, 3), shift=(1, 1), halo=(1, 1))
    table = torch.randn(2, *partition.table, dtype=torch.float64)
    runs = [window(q, k, v, partition, grid=(4, 5), bias=t, backend="torch") for t in (table, table + 3.0)]
    torch.testing.assert_close(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1] + 3.0, runs[1][1])


def test_absent_tokens_are_not_read() -> None:
    """A sequence that ends before its grid equals one whose missing keys are removed."""
    q, k, v = _qkv(20)
    removed = torch.zeros(20).masked_fill(torch.arange(20) >= 17, -math.inf)
    partition = Partition.block((3, 2), halo=(1, 1))
    o, lse = window(q, k, v, partition, grid=(4, 5), key_bias=removed, backend="reference")
    short = [x[:, :, :17] for x in (q, k, v)]
    for backend in ("reference", "torch"):
        found = window(*short, partition, grid=(4, 5), backend=backend)
        torch.testing.assert_close(found, (o[:, :, :17], lse[:, :, :17]))


def test_gradcheck() -> None:
    partition = Partition.block((2, 2), halo=(1, 0), shift=(1, 0))
    q, k, v = (torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, *partition.table, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, t, b=backend: window(q, k, v, partition, grid=(3, 3), bias=t, backend=b),
            (q, k, v, bias),
        )


def _random_axis(rng: np.random.Generator) -> AxisMap:
    length, keys, dilation = rng.integers(1, 40), rng.integers(1, 40), rng.integers(1, 5)

    def intervals(u: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.sort(rng.integers(0, count + 1, (2, len(u))), axis=1)
        return np.minimum(ends[0], ends[1]), np.maximum(ends[0], ends[1])

    return AxisMap.of_classes(int(length), int(keys), int(dilation), intervals)


def _dense(axis: AxisMap) -> np.ndarray:
    p, j = np.arange(axis.length)[:, None], np.arange(axis.key_length)[None]
    u = j // axis.dilation
    return (p % axis.dilation == j % axis.dilation) & (axis.lo[p] <= u) & (u < axis.hi[p])


@pytest.mark.parametrize("seed", range(40))
def test_maps(seed: int) -> None:
    """Transposition exchanges the sides; tiles hold every query once and boxes every key it sees."""
    axis = _random_axis(np.random.default_rng(seed))
    mask = _dense(axis)
    assert np.array_equal(_dense(axis.transposed()), mask.T)
    assert grid_map([axis]).pairs() == mask.sum()
    for size, (count, box, phase) in axis.sizes.items():
        tiles = axis.tiles(size, phase)
        assert tiles.table.shape[1] <= count + axis.classes
        assert tiles.box <= box or axis.dilation > 1
        back, width = tiles.frame
        seen = np.zeros(axis.length, int)
        for residue, first, rows, lo, extent in tiles.table.T:
            positions = residue + axis.dilation * np.arange(first, first + rows)
            seen[positions] += 1
            assert rows <= size
            held = residue + axis.dilation * np.arange(lo, lo + extent)
            outside = np.setdiff1d(np.arange(axis.key_length), held)
            assert not mask[positions][:, outside].any()
            if tiles.even:
                assert mask[positions][:, held].all()
            if extent:
                assert lo - (first - back) >= 0
                assert lo + extent - (first - back) <= width
        assert (seen == 1).all()


def test_tiles_are_windows_where_windows_fill_them() -> None:
    swin = Partition.block((7, 7), shift=(3, 3)).on((56, 56), (56, 56))
    assert swin.choose(64, 64) == (1, 7, 7)
    assert all(each.even and each.box <= 7 for each in swin.tiles((1, 7, 7)))
    tiny = Partition.block((2, 2)).on((56, 56), (56, 56))
    assert math.prod(tiny.choose(64, 64)) == 64
    assert candidates("forward", 64, torch.float16, swin)[0].block_m == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (4, 4)}, "hold 20 tokens"),
        ({"grid": (20,)}, "expected 2 axes"),
        ({"bias": torch.zeros(2, 5, 4)}, r"expected \(H, \*table\)"),
        ({"grid_kv": (5, 4), "causal": True}, "grid_kv with causal"),
        ({"grid_kv": (5, 4), "bias": torch.zeros(2, 5, 5)}, "grid_kv with bias"),
        ({"partition": Partition((3, 3), (3, 3), (3, 3), (0, 0), (0, 0), (1, 1), "clamp"),
          "bias": torch.zeros(2, 5, 5)}, "observed border 'clamp'"),
        ({"v": torch.zeros(2, 2, 19, 8)}, r"expected \(B, H, N, D\)"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_match(arguments: dict, message: str) -> None:
    q, k, v = _qkv(20)
    given = {"v": v, "partition": Partition.block((3, 3)), "grid": (4, 5), **arguments}
    with pytest.raises(ValueError, match=message):
        window(q, k, given.pop("v"), given.pop("partition"), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partition.block((0,)), "window: observed"),
        (lambda: Partition.block((2, 2, 2, 2)), "1 to 3 axes"),
        (lambda: Partition((2,), (2,), (-1,), (0,), (0,), (1,)), "key_step: observed"),
        (lambda: Partition((2,), (2,), (2,), (0,), (0,), (1,), "wrap"), "border: observed 'wrap'"),
        (lambda: AxisMap(2, 4, 1, np.array([2, 1]), np.array([3, 3])), "an end that decreases"),
    ],
)
def test_descriptions_that_are_none(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_triton_cannot_serve() -> None:
    q, k, v = _qkv(20)
    with pytest.raises(Unsupported, match=r"window/triton dtype of q: observed torch\.float64"):
        window(q, k, v, Partition.block((3, 3)), grid=(4, 5), backend="triton")
    q, k, v = (torch.zeros(1, 1, 20, 300) for _ in range(3))
    with pytest.raises(Unsupported, match="head dim of q: observed 300"):
        window(q, k, v, Partition.block((3, 3)), grid=(4, 5), backend="triton")


def test_flex_on_cpu_has_no_gradient() -> None:
    q, k, v = (x.float().requires_grad_() for x in _qkv(20))
    with pytest.raises(Unsupported, match="window/flex on CPU"):
        window(q, k, v, Partition.block((3, 3)), grid=(4, 5), backend="flex")
