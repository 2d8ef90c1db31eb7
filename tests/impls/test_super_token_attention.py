"""super_token_attention against its steps written out, its gradients, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.vision._grids import round_up
from attnbench.impls.vision.super_token_attention import gathered, neighbours


def build(backend: str = "reference", **hyper: object) -> nn.Module:
    options = {"cell_size": 2, **hyper}
    return attnbench.build("super_token_attention", 16, 2, backend=backend, **options).double()


def tokens(grid: tuple, b: int = 2) -> Tensor:
    return torch.randn(b, math.prod(grid), 16, dtype=torch.float64)


def mhsa(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    parts = [
        (q[..., h] @ k[..., h].mT / math.sqrt(8)).softmax(-1) @ v[..., h] for h in (slice(0, 8), slice(8, 16))
    ]
    return m.out(torch.cat(parts, -1))


def definition(m: nn.Module, x: Tensor, grid: tuple) -> Tensor:
    """Steps 1 to 5, token by token and cell by cell."""
    size, hp = m.hp.cell_size, m.hp
    sides = tuple(g // size for g in round_up(grid, (size,) * len(grid)))
    cells = list(product(*map(range, sides)))
    home = [cells.index(tuple(p // size for p in place)) for place in product(*map(range, grid))]
    steps = list(product((-1, 0, 1), repeat=len(grid)))
    around = [[tuple(c + s for c, s in zip(cell, step, strict=True)) for step in steps] for cell in cells]
    kept = x.detach() if hp.detach else x
    means = [x[:, [n for n, c in enumerate(home) if c == j]].mean(1) for j in range(len(cells))]
    for _ in range(hp.n_iter):
        q: list[dict[int, Tensor]] = []
        for n, own in enumerate(home):
            there = [cells.index(cell) if cell in cells else None for cell in around[own]]
            if hp.border == "masked":
                there = [j for j in there if j is not None]
            known = [torch.zeros_like(x[:, 0]) if j is None else means[j] for j in there]
            known = [s.detach() if hp.detach else s for s in known]
            scores = torch.stack([(kept[:, n] * s).sum(-1) / 4.0 for s in known], -1)
            shares = zip(there, scores.softmax(-1).unbind(-1), strict=True)
            q.append({j: share for j, share in shares if j is not None})
        means = []
        for j in range(len(cells)):
            members = [(n, q[n][j].unsqueeze(-1)) for n in range(len(home)) if j in q[n]]
            total = sum(share * x[:, n] for n, share in members)
            means.append(total / (sum(share for _, share in members) + 1e-12))
    mixed = mhsa(m, torch.stack(means, 1))
    rows = [sum(share.unsqueeze(-1) * mixed[:, j] for j, share in own.items()) for own in q]
    return torch.stack(rows, 1)


CASES = [
    ((9,), {"border": "upstream", "n_iter": 2}),
    ((9,), {"border": "masked", "detach": False}),
    ((4, 5), {"border": "upstream", "n_iter": 1}),
    ((4, 5), {"border": "masked", "n_iter": 2}),
    ((5, 4), {"border": "upstream", "n_iter": 2, "detach": False}),
    ((2, 3, 4), {"border": "masked", "n_iter": 1}),
]


@pytest.mark.parametrize(("grid", "hyper"), CASES)
def test_outputs_and_gradients_equal_the_definition(grid, hyper):
    m, x = build(**hyper), tokens(grid, b=1).requires_grad_()
    found, expected = m(x, grid=grid), definition(m, x, grid)
    torch.testing.assert_close(found, expected)
    leaves = [x, *m.parameters()]
    upstream = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


def test_cells_of_one_token_are_dense_attention():
    m, x = build(cell_size=1), tokens((4, 5))
    torch.testing.assert_close(m(x, grid=(4, 5)), mhsa(m, x))


def test_one_cell_gives_every_token_the_attention_of_the_mean():
    m, x = build(cell_size=8, border="masked"), tokens((4, 5))
    expected = mhsa(m, x.mean(1, keepdim=True)).expand_as(x)
    torch.testing.assert_close(m(x, grid=(4, 5)), expected)


def test_beyond_the_grid_the_source_lets_weight_go_even_from_a_lone_token():
    m, x = build(), tokens((1, 1), b=1)
    own = (x * x).sum(-1, keepdim=True) / 4.0
    share = own.exp() / (own.exp() + 8.0)
    torch.testing.assert_close(m(x, grid=(1, 1)), share * mhsa(m, x))


@pytest.mark.parametrize("border", ["masked", "upstream"])
def test_weights_sum_to_one_over_the_cells_of_the_grid(border):
    m, x = build(border=border), tokens((5, 7))
    with torch.no_grad():
        m.qkv.weight[32:] = 0.0
        m.qkv.bias[32:] = 0.0
        share = (m(x, grid=(5, 7)) / m.out.bias)[..., 0]
    ones = torch.ones_like(share)
    if border == "masked":
        torch.testing.assert_close(share, ones)
    else:  # only around the centre no cell lies beyond the grid
        inside = share.unflatten(1, (5, 7))[:, 2:4, 2:6]
        torch.testing.assert_close(inside, torch.ones_like(inside))
        assert (share < 1.0 - 1e-6).sum() == 2 * (35 - 8)


def test_small_tokens_are_shared_out_evenly():
    m, x = build(border="masked"), 1e-6 * tokens((4, 4))
    nn.init.zeros_(m.qkv.bias), nn.init.zeros_(m.out.bias)
    mean = x.mean(1, keepdim=True)  # there are four cells, each around all others
    torch.testing.assert_close(1e6 * m(x, grid=(4, 4)), 1e6 * mhsa(m, mean).expand_as(x))


@pytest.mark.parametrize("sides", [(3,), (2, 3), (1, 2, 2)])
def test_gathering_is_the_adjoint_of_the_neighbours(sides):
    k = math.prod(sides)
    cells = torch.randn(2, k, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.randn(2, k, 3 ** len(sides), 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(neighbours(cells, sides), cells, shares)
    torch.testing.assert_close(gathered(shares, sides), expected)


def test_flops_counted_by_hand():
    m = build(n_iter=2)
    attended = 4 * 6 * 6 * 16 + 8 * 6 * 16 * 16
    assert m.flops(24, 24, grid=(4, 6)) == 2 * 9 * 24 * 16 * 5 + attended
    assert build(cell_size=1).flops(24, 24) == 4 * 24 * 24 * 16 + 8 * 24 * 16 * 16


def test_cells_by_default_have_sixteen_tokens():
    m = build(cell_size=None)
    assert m.flops(64, 64) == 2 * 3 * 64 * 16 * 3 + 4 * 4 * 4 * 16 + 8 * 4 * 16 * 16
    assert m.flops(64, 64, grid=(8, 8)) == 2 * 9 * 64 * 16 * 3 + 4 * 4 * 4 * 16 + 8 * 4 * 16 * 16


def test_wrong_values_are_refused():
    with pytest.raises(UsageError, match="n_iter=0"):
        build(n_iter=0)
    with pytest.raises(UsageError, match="cell_size=0"):
        build(cell_size=0)(tokens((4, 5)), grid=(4, 5))


def test_triton_agrees():
    x = tokens((4, 3), b=1).float()
    padded = torch.zeros(1, 12, dtype=torch.bool)
    padded[0, [0, 1, 3, 4, 8]] = True  # a whole cell and a token
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        m = build(backend).float()
        leaf = x.clone().requires_grad_()
        output = m(leaf, grid=(4, 3), key_padding_mask=padded)
        gradients = torch.autograd.grad(output.square().sum(), [leaf, *m.parameters()])
        results.append((output, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
