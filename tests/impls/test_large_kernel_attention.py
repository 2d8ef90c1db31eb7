"""large_kernel_attention against its taps one by one, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError


def build(pattern: str = "NS", **hyper: object) -> nn.Module:
    m = attnbench.build(
        "large_kernel_attention", 8, 2, pattern=pattern, backend="reference", **hyper
    ).double()
    for convolution in (m.near, m.far):
        nn.init.normal_(convolution.bias)
    return m


def tokens(grid: tuple, b: int = 1) -> Tensor:
    return torch.randn(b, math.prod(grid), 8, dtype=torch.float64)


def depthwise(x: Tensor, grid: tuple, conv: nn.Module, *, causal: bool) -> Tensor:
    """Σ over taps of weight · token, tap by tap, tokens beyond the grid being 0."""
    width, dilation = conv.width, conv.dilation
    taps = conv.taps.at(len(grid))
    places = list(product(*map(range, grid)))
    rows = []
    for p in places:
        row = conv.bias.expand(x.shape[0], -1)
        for tap in product(range(width), repeat=len(grid)):
            first = width - 1 if causal else width // 2
            r = tuple(a + dilation * (t - first) for a, t in zip(p, tap, strict=True))
            if r in places:
                row = row + x[:, places.index(r)] * taps[(slice(None), *tap)]
        rows.append(row)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("grid", [(9,), (4, 5), (2, 3, 3)])
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_equals_the_definition(grid, pattern):
    causal = pattern == "CS"
    m, x = build(pattern, kernel=3, dilated_kernel=3, dilation=2), tokens(grid, b=2)
    u = m.proj_in(x)
    u = 0.5 * u * (1.0 + torch.erf(u / math.sqrt(2.0)))
    gate = depthwise(depthwise(u, grid, m.near, causal=causal), grid, m.far, causal=causal)
    torch.testing.assert_close(m(x, grid=grid), m.proj_out(u * m.pointwise(gate)) + x)


def test_a_constant_gate_leaves_two_projections_and_the_residual():
    m, x = build(), tokens((4, 5))
    nn.init.zeros_(m.pointwise.weight), nn.init.ones_(m.pointwise.bias)
    torch.testing.assert_close(m(x, grid=(4, 5)), m.proj_out(nn.functional.gelu(m.proj_in(x))) + x)


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_receptive_field(pattern):
    """5 + 6·3 = 23 tokens per axis: 11 on each side, or 22 before."""
    grid = (25, 26)
    m, x = build(pattern), tokens(grid).requires_grad_()
    centre = 12 if pattern == "NS" else 23
    (gradient,) = torch.autograd.grad(m(x, grid=grid)[0, centre * 26 + centre].sum(), x)
    seen = (gradient[0].abs().sum(-1) != 0).unflatten(0, grid)
    first, last = (centre - 11, centre + 11) if pattern == "NS" else (centre - 22, centre)
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[first : last + 1, first : last + 1] = True
    assert torch.equal(seen, expected)


def test_a_shift_of_the_input_shifts_interior_outputs():
    m, x = build(), tokens((40,))
    moved = m(x.roll(2, 1))[:, 13:27]
    torch.testing.assert_close(moved, m(x)[:, 11:25])


def test_two_convolutions_are_one_sparse_one_in_the_interior():
    m, x = build(), tokens((31,))
    nn.init.zeros_(m.near.bias)
    composed = torch.zeros(8, 23, dtype=torch.float64)
    for i, j in product(range(7), range(5)):
        composed[:, 3 * i + j] += m.far.taps.at(1)[:, i] * m.near.taps.at(1)[:, j]
    gate = m.far(m.near(x.mT)).mT
    expected = torch.stack([(x[0, i - 11 : i + 12] * composed.T).sum(0) for i in range(11, 20)])
    torch.testing.assert_close(gate[0, 11:20], expected + m.far.bias)


def test_flops_counted_by_hand():
    m = build()
    assert m.flops(20, 20, grid=(4, 5)) == 6 * 20 * 8 * 8 + 2 * (25 + 49) * 20 * 8
    assert m.flops(20, 20) == 6 * 20 * 8 * 8 + 2 * 12 * 20 * 8


@pytest.mark.parametrize("hyper", [{"kernel": 4}, {"dilated_kernel": 6}, {"dilation": 0}, {"kernel": 0}])
def test_wrong_values_are_refused(hyper):
    with pytest.raises(UsageError, match="expected"):
        build(**hyper)
