"""axial_attention against its lines one by one, its exact special cases, and how lines are laid out."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.vision._lines import Lines

GRIDS = [(3, 4), (2, 3, 2)]


def build(pattern: str = "NS", backend: str = "reference", **hyper: object) -> nn.Module:
    return attnbench.build("axial_attention", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def tokens(grid: tuple, b: int = 2) -> Tensor:
    return torch.randn(b, math.prod(grid), 16, dtype=torch.float64)


def weights(m: nn.Module, number: int) -> list[Tensor]:
    """W_q, W_k, W_v, W_o and b_o of the axis with that number."""
    part = slice(16 * number, 16 * (number + 1))
    return [*m.qkv.weight[48 * number : 48 * (number + 1)].chunk(3), m.out.weight[part], m.out.bias[part]]


def along(m: nn.Module, number: int, axis: int, x: Tensor, c: Tensor, grid: tuple) -> Tensor:
    """Multi-head attention of every token to those that differ from it on one axis alone."""
    wq, wk, wv, wo, bo = weights(m, number)
    q, k, v = x @ wq.T, c @ wk.T, c @ wv.T
    places = list(product(*map(range, grid)))
    rows = []
    for i, p in enumerate(places):
        line = [j for j, r in enumerate(places) if all(p[a] == r[a] for a in range(len(grid)) if a != axis)]
        assert len(line) == grid[axis]
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            scores = torch.stack([(q[:, i, h] * k[:, j, h]).sum(-1) for j in line], -1) / math.sqrt(8)
            heads.append(torch.einsum("bj,bjd->bd", scores.softmax(-1), v[:, line][..., h]))
        rows.append(torch.cat(heads, -1) @ wo.T + bo)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_definition(pattern, backend, grid):
    x, c = tokens(grid), tokens(grid)
    given = (x,) if pattern == "NS" else (x, c)
    rank = len(grid)
    for combine, reverse in (("sequential", False), ("sequential", True), ("sum", False)):
        m = build(pattern, backend, combine=combine, reverse=reverse)
        expected, total = x, torch.zeros(())
        for axis in reversed(range(rank)) if reverse else range(rank):
            source = x if combine == "sum" else expected
            expected = along(m, 3 - rank + axis, axis, source, source if pattern == "NS" else c, grid)
            total = total + expected
        torch.testing.assert_close(m(*given, grid=grid), total if combine == "sum" else expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_phase_is_one_axis(axis):
    grid = (2, 3, 2)
    m, x = build(phase=axis), tokens(grid)
    assert m.qkv.weight.shape == (48, 16)
    torch.testing.assert_close(m(x, grid=grid), along(m, 0, axis, x, x, grid))


def test_a_phase_reads_its_line_only():
    grid = (3, 4)
    m, x = build(phase=0), tokens(grid, b=1).requires_grad_()
    (gradient,) = torch.autograd.grad(m(x, grid=grid)[0, 5].sum(), x)
    assert (gradient[0].abs().sum(-1) != 0).tolist() == [j % 4 == 1 for j in range(12)]
    columns = torch.tensor([2, 0, 3, 1])

    def permuted(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, grid)[:, :, columns].flatten(1, 2)

    torch.testing.assert_close(m(permuted(x), grid=grid), permuted(m(x, grid=grid)))


def test_without_scores_every_output_is_the_mean_of_all_tokens():
    grid = (3, 4)
    m, x = build(), tokens(grid)
    with torch.no_grad():
        for number in (1, 2):
            wq, _, wv, wo, bo = weights(m, number)
            wq.zero_(), bo.zero_()
            wv.copy_(torch.eye(16)), wo.copy_(torch.eye(16))
    torch.testing.assert_close(m(x, grid=grid), x.mean(1, keepdim=True).expand_as(x))


def test_transposing_the_grid_and_the_weights_transposes_the_output():
    grid = (3, 4)
    m, turned, x = build(combine="sum"), build(combine="sum"), tokens(grid)
    with torch.no_grad():
        for number in (1, 2):
            for own, other in zip(weights(turned, number), weights(m, 3 - number), strict=True):
                own.copy_(other)
    transposed = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    expected = m(x, grid=grid).unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(turned(transposed, grid=(4, 3)), expected)


def test_lines_of_one_token_are_a_linear_map():
    m, x = build(combine="sum"), tokens((1, 7))
    _, _, wv, wo, bo = weights(m, 1)
    expected = x @ wv.T @ wo.T + bo + along(m, 2, 1, x, x, (1, 7))
    torch.testing.assert_close(m(x, grid=(1, 7)), expected)
    torch.testing.assert_close(m(x), expected)  # seven tokens fold into no other plane


@pytest.mark.parametrize("projected", [True, False])
def test_lines_are_views_whatever_the_axis(projected):
    grid, h = (2, 3, 4), 2
    x = torch.randn(2, 24, h, 8).transpose(1, 2) if projected else torch.randn(2, h, 24, 8)
    cells = x.unflatten(2, grid)
    for axis in range(3):
        lines = Lines(grid, axis, heads_outer=not projected)
        folded = lines.fold(x)
        assert folded.shape[2:] == (grid[axis], 8)
        assert folded.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(lines.unfold(folded, 2, h), cells)
        first = tuple(slice(None) if a == axis else 0 for a in range(3))
        assert torch.equal(folded[0, 0], cells[(0, 0, *first)])


def test_flops_counted_by_hand():
    projections, sides = 2 * 4 * 2 * 12 * 16 * 16, 3 + 4
    m = build()
    assert m.flops(12, 12, grid=(3, 4)) == projections + 4 * 12 * 16 * sides
    assert m.flops(12, 12) == m.flops(12, 12, grid=(3, 4))
    assert build(phase=1).flops(12, 12, grid=(3, 4)) == projections // 2 + 4 * 12 * 16 * 4


def test_an_axis_that_the_grid_has_not_is_refused():
    with pytest.raises(UsageError, match="phase=2 on a grid"):
        build(phase=2)(tokens((3, 4)), grid=(3, 4))


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees(pattern):
    grid = (2, 3)
    given = [tokens(grid, b=1).float() for _ in range(1 if pattern == "NS" else 2)]
    padded = torch.zeros(1, 6, dtype=torch.bool)
    padded[0, 3] = True
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        m = build(pattern, backend).float()
        leaves = [x.clone().requires_grad_() for x in given]
        output = m(*leaves, grid=grid, key_padding_mask=padded)
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, *m.parameters()])
        results.append((output, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
