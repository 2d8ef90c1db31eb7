"""hilo_attention against its two groups of heads token by token, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

GRIDS = [(7,), (4, 5), (2, 3, 3)]


def build(pattern: str = "NS", backend: str = "reference", **hyper: object) -> nn.Module:
    options = {"alpha": 0.5, **hyper}
    return attnbench.build("hilo_attention", 16, 4, pattern=pattern, backend=backend, **options).double()


def tokens(grid: tuple, b: int = 2) -> Tensor:
    return torch.randn(b, math.prod(grid), 16, dtype=torch.float64)


def windows(grid: tuple, side: int) -> list[list[int]]:
    found: dict[tuple, list[int]] = {}
    for token, place in enumerate(product(*map(range, grid))):
        found.setdefault(tuple(p // side for p in place), []).append(token)
    return [found[name] for name in sorted(found)]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of 4 channels, (B, N, ·) on (B, M, ·)."""
    parts = []
    for h in range(q.shape[-1] // 4):
        own = slice(4 * h, 4 * h + 4)
        parts.append((q[..., own] @ k[..., own].mT / 2.0).softmax(-1) @ v[..., own])
    return torch.cat(parts, -1)


def high(m: nn.Module, x: Tensor, c: Tensor, grid: tuple) -> Tensor:
    q, (k, v) = m.high_q(x), m.high_kv(c).chunk(2, -1)
    o = torch.zeros_like(q)
    for own in windows(grid, m.hp.window):
        o[:, own] = attention(q[:, own], k[:, own], v[:, own])
    return m.high_out(o)


def low(m: nn.Module, x: Tensor, c: Tensor, grid: tuple) -> Tensor:
    means = torch.stack([c[:, own].mean(1) for own in windows(grid, m.hp.window)], 1)
    k, v = m.low_kv(means).chunk(2, -1)
    return m.low_out(attention(m.low_q(x), k, v))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["NS", "NC"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_definition(grid, pattern, backend):
    m, x = build(pattern, backend), tokens(grid)
    c = x if pattern == "NS" else tokens(grid)
    found = m(x, grid=grid) if pattern == "NS" else m(x, c, grid=grid)
    torch.testing.assert_close(found, torch.cat([high(m, x, c, grid), low(m, x, c, grid)], -1))


def test_padding_is_no_part_of_a_mean_and_a_window_of_padding_no_key():
    m, grid = build(alpha=1.0), (4, 4)
    x = tokens(grid, b=1)
    padded = torch.zeros(1, 16, dtype=torch.bool)
    padded[0, [0, 1, 4, 5, 2]] = True
    kept = [[j for j in own if not padded[0, j]] for own in windows(grid, 2)]
    means = torch.stack([x[:, own].mean(1) for own in kept if own], 1)
    assert means.shape[1] == 3
    k, v = m.low_kv(means).chunk(2, -1)
    expected = m.low_out(attention(m.low_q(x), k, v))
    torch.testing.assert_close(m(x, grid=grid, key_padding_mask=padded), expected)


@pytest.mark.parametrize(
    ("alpha", "window", "low_heads"), [(0.0, 2, 0), (0.5, 2, 2), (0.9, 2, 3), (1.0, 2, 4), (0.0, 1, 4)]
)
def test_heads_are_shared_out(alpha, window, low_heads):
    m = build(alpha=alpha, window=window)
    assert (m.low_heads, m.high_heads) == (low_heads, 4 - low_heads)
    assert hasattr(m, "low_q") == (low_heads > 0)
    assert hasattr(m, "high_q") == (low_heads < 4)


def test_windows_of_one_token_are_dense_attention():
    m, x = build(window=1), tokens((4, 5))
    k, v = m.low_kv(x).chunk(2, -1)
    torch.testing.assert_close(m(x, grid=(4, 5)), m.low_out(attention(m.low_q(x), k, v)))


def test_low_heads_see_tokens_that_fill_their_window_as_themselves():
    m, few = build(alpha=1.0), tokens((2, 3))
    repeated = few.unflatten(1, (2, 3)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    k, v = m.low_kv(repeated).chunk(2, -1)
    expected = m.low_out(attention(m.low_q(repeated), k, v))
    torch.testing.assert_close(m(repeated, grid=(4, 6)), expected)


def test_sides_may_differ_from_axis_to_axis():
    m, x = build(window=(1, 3)), tokens((3, 6))
    own = [list(range(first, first + 3)) for first in range(0, 18, 3)]
    q, (k, v) = m.high_q(x), m.high_kv(x).chunk(2, -1)
    expected = torch.cat([attention(q[:, w], k[:, w], v[:, w]) for w in own], 1)
    torch.testing.assert_close(m(x, grid=(3, 6))[..., :8], m.high_out(expected))


def test_flops_counted_by_hand():
    m = build()  # two heads of four channels in each group
    projections = 3 * 2 * 24 * 16 * 8 + 2 * 24 * 8 * 8 + 2 * 24 * 16 * 8 + 2 * 2 * 6 * 16 * 8 + 2 * 24 * 8 * 8
    assert m.flops(24, 24, grid=(4, 6)) == projections + 4 * 24 * 4 * 8 + 4 * 24 * 6 * 8


@pytest.mark.parametrize("hyper", [{"window": 0}, {"alpha": 1.5}, {"window": (2, 0)}])
def test_wrong_values_are_refused(hyper):
    with pytest.raises(UsageError, match="sides of at least 1"):
        build(**hyper)


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees(pattern):
    given = [tokens((3, 3), b=1).float() for _ in range(1 if pattern == "NS" else 2)]
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        m = build(pattern, backend).float()
        leaves = [x.clone().requires_grad_() for x in given]
        output = m(*leaves, grid=(3, 3))
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, *m.parameters()])
        results.append((output, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
