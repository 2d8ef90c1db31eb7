"""criss_cross_attention against its definition token by token, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UsageError

GRIDS = [(3, 4), (1, 5), (2, 3, 3)]


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(2, 2, n, d, dtype=torch.float64)


def build(pattern: str = "NS", backend: str = "reference", num_heads: int = 2, **hyper: object) -> nn.Module:
    built = attnbench.build("criss_cross_attention", 16, num_heads, pattern=pattern, backend=backend, **hyper)
    return built.double()


def crossed(grid: tuple, i: int, j: int) -> bool:
    """Whether tokens i and j lie on one line of the grid."""
    places = list(product(*map(range, grid)))
    return sum(a != b for a, b in zip(places[i], places[j], strict=True)) <= 1


def definition(q: Tensor, k: Tensor, v: Tensor, grid: tuple, *, causal: bool, scale: float) -> Tensor:
    n = q.shape[2]
    rows = []
    for i in range(n):
        keys = [j for j in range(n) if crossed(grid, i, j) and (j <= i or not causal)]
        scores = scale * torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in keys], -1)
        rows.append(torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v[:, :, keys]))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_definition(grid, pattern, backend):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n, 6)
    for scale in (None, 0.7):
        found = build(pattern, backend, scale=scale).attend(q, k, v, grid=grid)
        expected = definition(q, k, v, grid, causal=pattern == "CS", scale=scale or 8**-0.5)
        torch.testing.assert_close(found, expected)


def test_a_line_is_dense_attention():
    q, k, v = heads(7), heads(7), heads(7)
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    for grid in ((1, 7), (7, 1)):
        torch.testing.assert_close(build().attend(q, k, v, grid=grid), dense)


@pytest.mark.parametrize("recurrence", [1, 2])
def test_two_passes_reach_every_token(recurrence):
    grid = (3, 4)
    m, x = build(recurrence=recurrence), torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x, grid=grid)[0, 5].sum(), x)
    reached = (gradient[0].abs().sum(-1) != 0).tolist()
    assert reached == [recurrence == 2 or crossed(grid, 5, j) for j in range(12)]


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_the_module_of_the_source(pattern):
    grid, causal = (3, 4), pattern == "CS"
    m = build(pattern, num_heads=1, module=True, recurrence=2)
    x, c = (torch.randn(2, 12, 16, dtype=torch.float64) for _ in range(2))
    given = (x, c) if pattern == "NC" else (x,)
    assert m.q_proj.weight.shape == (2, 16)
    assert not hasattr(m, "out_proj")
    torch.testing.assert_close(m(*given, grid=grid), x)  # γ starts at 0
    nn.init.constant_(m.gamma, 0.5)
    y = x
    for _ in range(2):
        source = c if pattern == "NC" else y
        q, k, v = (f(t).unsqueeze(1) for f, t in ((m.q_proj, y), (m.k_proj, source), (m.v_proj, source)))
        y = 0.5 * definition(q, k, v, grid, causal=causal, scale=1.0).squeeze(1) + y
    torch.testing.assert_close(m(*given, grid=grid), y)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_flops_count_the_visible_pairs(grid, pattern):
    n = math.prod(grid)
    pairs = sum(crossed(grid, i, j) and (j <= i or pattern == "NS") for i in range(n) for j in range(n))
    m = build(pattern)
    assert int(m.visible(n, n, torch.device("cpu"), grid=grid).sum()) == pairs
    assert m.flops(n, n, grid=grid) == 4 * pairs * 16


def test_flops_of_the_module_of_the_source():
    m = build(num_heads=1, module=True, recurrence=2)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        m(torch.randn(1, 35, 16, dtype=torch.float64), grid=(5, 7))
    own_places = 2 * 2 * 35 * (2 + 16)  # each pass: scores and values of 35 pairs that are masked
    assert counter.get_total_flops() == m.layer_flops(35, 35, grid=(5, 7)) + own_places


@pytest.mark.parametrize(
    ("num_heads", "hyper", "match"),
    [(2, {"recurrence": 0}, "recurrence=0"), (4, {"module": True}, "multiple of num_heads")],
)
def test_wrong_values_are_refused(num_heads, hyper, match):
    with pytest.raises(UsageError, match=match):
        build(num_heads=num_heads, **hyper)


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_triton_agrees(pattern):
    grid = (2, 3)
    given = [torch.randn(1, 1, 6, 8) for _ in range(3)]
    padded = torch.zeros(1, 6, dtype=torch.bool)
    padded[0, 1] = True
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in given]
        m = build(pattern, backend).float()
        output = m.attend(*leaves, grid=grid, key_padding_mask=padded)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
