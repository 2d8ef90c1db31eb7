"""bilevel_routing_attention against its definition token by token, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

GRIDS = [(10,), (5, 6), (3, 3, 4)]


def heads(n: int) -> Tensor:
    return torch.randn(2, 2, n, 8, dtype=torch.float64)


def build(pattern: str = "NS", backend: str = "reference", **hyper: object) -> nn.Module:
    options = {"regions": 2, "region": 4, "topk": 2, **hyper}
    m = attnbench.build("bilevel_routing_attention", 16, 2, pattern=pattern, backend=backend, **options)
    if m.lepe is not None:
        nn.init.normal_(m.lepe.bias)
    return m.double()


def regions(grid: tuple, m: nn.Module) -> list[list[int]]:
    """The tokens of each region, row-major in both."""
    size = [m.hp.region] if len(grid) == 1 else [math.ceil(g / m.hp.regions) for g in grid]
    found: dict[tuple, list[int]] = {}
    for token, place in enumerate(product(*map(range, grid))):
        found.setdefault(tuple(p // s for p, s in zip(place, size, strict=True)), []).append(token)
    return [found[name] for name in sorted(found)]


def routed(q: Tensor, k: Tensor, queries: list, keys: list, topk: int) -> list[list[int]]:
    """For one batch entry, the regions that each region of queries picks; equal scores go to the first."""
    lists = []
    for own in queries:
        scores = [float((q[:, own].mean(1) * k[:, other].mean(1)).sum()) for other in keys]
        ranked = sorted(zip([-s for s in scores], range(len(keys)), strict=True))
        lists.append([r for _, r in ranked[:topk]])
    return lists


def definition(q: Tensor, k: Tensor, v: Tensor, m: nn.Module, grid: tuple, grid_kv: tuple) -> Tensor:
    queries, keys = regions(grid, m), regions(grid_kv, m)
    o = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for own, picked in zip(queries, routed(q[b], k[b], queries, keys, m.hp.topk), strict=True):
            seen = [j for r in picked for j in keys[r]]
            scores = q[b][:, own] @ k[b][:, seen].mT / math.sqrt(16)
            o[b][:, own] = scores.softmax(-1) @ v[b][:, seen]
    return o


def lepe(v: Tensor, m: nn.Module, grid: tuple) -> Tensor:
    """The depthwise convolution of 5 taps per axis, tap by tap."""
    places, rank = list(product(*map(range, grid))), len(grid)
    image = v.transpose(1, 2).flatten(2)
    taps = m.lepe.taps.at(rank)
    rows = []
    for p in places:
        row = m.lepe.bias.expand(v.shape[0], -1)
        for tap in product(range(5), repeat=rank):
            r = tuple(a + t - 2 for a, t in zip(p, tap, strict=True))
            if r in places:
                row = row + image[:, places.index(r)] * taps[(slice(None), *tap)]
        rows.append(row)
    return torch.stack(rows, 1).unflatten(-1, (2, 8)).transpose(1, 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_self_attention_equals_the_definition(grid, backend):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n)
    m = build(backend=backend)
    assert len(regions(grid, m)) > m.hp.topk
    expected = definition(q, k, v, m, grid, grid) + lepe(v, m, grid)
    torch.testing.assert_close(m.attend(q, k, v, grid=grid), expected)


@pytest.mark.parametrize(("grid", "grid_kv"), [((10,), (13,)), ((5, 6), (4, 3)), ((2, 2, 3), (3, 1, 5))])
def test_cross_attention_equals_the_definition(grid, grid_kv):
    q, k, v = heads(math.prod(grid)), heads(math.prod(grid_kv)), heads(math.prod(grid_kv))
    m = build("NC")
    found = m.attend(q, k, v, grid=grid, grid_kv=grid_kv)
    torch.testing.assert_close(found, definition(q, k, v, m, grid, grid_kv))


@pytest.mark.parametrize("grid", GRIDS)
def test_all_regions_are_dense_attention(grid):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n)
    for scale in (None, 0.3):
        m = build(topk=None, lepe=False, scale=scale)
        dense = ((scale or 16**-0.5) * q @ k.mT).softmax(-1) @ v
        torch.testing.assert_close(m.attend(q, k, v, grid=grid), dense)


@pytest.mark.parametrize("grid", GRIDS)
def test_output_and_gradients_are_those_of_the_mask(grid):
    n = math.prod(grid)
    leaves = [heads(n).requires_grad_() for _ in range(3)]
    q, k, v = leaves
    m = build(lepe=False)
    selection = m.select(q, k, grid=grid)
    mask = selection.to_dense_mask()
    assert mask.shape == (2, 1, n, n)
    assert not mask.all()
    scores = (q @ k.mT / 4.0).masked_fill(~mask, -math.inf)
    upstream = heads(n)
    expected = torch.autograd.grad(scores.softmax(-1) @ v, leaves, upstream)
    found = torch.autograd.grad(m.attend(q, k, v, grid=grid), leaves, upstream)
    torch.testing.assert_close(found, expected)
    _, lse = m.consume(q, k, v, selection, grid=grid)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert float(selection.density(False)) == pytest.approx(float(mask.double().mean()))


def test_equal_scores_go_to_the_first_regions():
    m = build()
    mask = m.select(torch.zeros(1, 2, 30, 8), torch.randn(1, 2, 30, 8), grid=(5, 6)).to_dense_mask()
    first = sorted(j for own in regions((5, 6), m)[:2] for j in own)
    assert mask.sum(-1).unique().tolist() == [len(first)]
    assert mask[0, 0, 0].nonzero().flatten().tolist() == first


def test_padding_is_no_part_of_the_means():
    grid, m = (4, 4), build(topk=1)
    q, k = heads(16), heads(16)
    padded = torch.zeros(2, 16, dtype=torch.bool)
    padded[:, [0, 1, 4, 5]] = True  # the whole first region
    padded[0, 2] = True
    kept = [[j for j in own if not padded[0, j]] for own in regions(grid, m)]
    expected = routed(q[0], k[0], kept[1:], kept[1:], 1)
    blocks = m.select(q, k, grid=grid, key_padding_mask=padded).blocks.block_mask[0, 0]
    assert not blocks[:, 0].any()
    assert [row.nonzero().flatten().tolist() for row in blocks[1:]] == [[r + 1] for (r,) in expected]


def test_flops_counted_by_hand():
    m = build(regions=2, topk=2)
    attended = 4 * 24 * (2 * 6) * 16  # four regions of six tokens, two of them for each query
    assert m.flops(24, 24, grid=(4, 6)) == attended + 2 * 4 * 4 * 16 + 2 * 25 * 24 * 16
    assert m.flops(12, 12) == 4 * 12 * 8 * 16 + 2 * 3 * 3 * 16 + 2 * 5 * 12 * 16
    cross = build("NC", regions=2, topk=2)
    assert cross.flops(24, 8, grid=(4, 6), grid_kv=(2, 4)) == 4 * 24 * 4 * 16 + 2 * 4 * 4 * 16


@pytest.mark.parametrize("hyper", [{"topk": 0}, {"region": 0}])
def test_wrong_values_are_refused(hyper):
    with pytest.raises(UsageError, match="expected positive numbers"):
        build(**hyper)


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees(pattern):
    given = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in given]
        torch.manual_seed(1)
        m = build(pattern, backend).float()
        cross = {"grid_kv": (4, 3)} if pattern == "NC" else {}
        output = m.attend(*leaves, grid=(3, 4), **cross)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
