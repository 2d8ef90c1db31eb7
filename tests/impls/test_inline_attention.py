"""inline_attention against its weights, its local term against loops, and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.inline_attention import InLineAttention

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "CS", "NC", "CC")
FEATURES = {"identity": lambda u: u, "relu": F.relu, "leaky_relu": F.leaky_relu, "exp": torch.exp}


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "torch", **hyper: object) -> InLineAttention:
    return attnbench.build("inline_attention", 16, 2, pattern=pattern, backend=backend, **hyper).double()


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Of one set of keys: s q·k/M + (1 − s q·k̄)/M."""
    scale, m = q.shape[-1] ** -0.5, k.shape[2]
    rest = 1 - scale * (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True)
    return (scale * q @ k.mT + rest) / m


def direct(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    if not causal:
        return weights(q, k) @ v
    rows = [weights(q[:, :, i : i + 1], k[:, :, : i + 1]) @ v[:, :, : i + 1] for i in range(q.shape[2])]
    return torch.cat(rows, 2)


def sizes(pattern: str) -> tuple[int, int]:
    return (5, 11) if pattern in ("NC", "CC") else (21, 21)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", list(FEATURES))
def test_equals_the_dense_form(pattern: str, name: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m, 6)
    phi = FEATURES[name]
    o = module(pattern, backend, feature_map=name).attend(q, k, v)
    torch.testing.assert_close(o, direct(phi(q), phi(k), v, causal=pattern == "CS"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_keys_or_zero_queries_give_the_mean_and_a_shift_of_the_keys_nothing(
    pattern: str, backend: str
) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m)
    layer = module(pattern, backend)
    count = torch.arange(1, m + 1, dtype=torch.float64).unsqueeze(-1)
    mean = v.cumsum(2) / count if pattern == "CS" else v.mean(2, keepdim=True).expand(-1, -1, n, -1)
    torch.testing.assert_close(layer.attend(q, heads(1).expand_as(k), v), mean)
    torch.testing.assert_close(layer.attend(torch.zeros_like(q), k, v), mean)
    torch.testing.assert_close(layer.attend(q, k + 3 * heads(1), v), layer.attend(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_anywhere_equals_dropping_the_keys(pattern: str, backend: str) -> None:
    n, m = sizes(pattern)
    q, k, v = heads(n), heads(m), heads(m)
    padded = torch.zeros(2, m, dtype=torch.bool)
    padded[:, [0, 3, m - 1]] = True
    kept = ~padded[0]
    rows = kept if n == m else slice(None)
    o = module(pattern, backend).attend(q, k, v, key_padding_mask=padded)
    expected = direct(q[:, :, rows], k[:, :, kept], v[:, :, kept], causal=pattern == "CS")
    torch.testing.assert_close(o[:, :, rows], expected)


def local_term(layer: InLineAttention, x: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """By loops: v (B, N, C) under one 3×3 kernel per batch element and channel."""
    first, last = layer.predict[0], layer.predict[2]
    c = x.shape[-1]
    hidden, kernels = [], []
    for group in range(2):
        own = slice(group * 8, group * 8 + 8)
        mixed = x.mean(1)[:, own] @ first.weight[own, :, 0].T + first.bias[own]
        hidden.append(F.gelu(mixed))
        out = slice(group * 72, group * 72 + 72)
        kernels.append(hidden[-1] @ last.weight[out, :, 0].T + last.bias[out])
    kernel = torch.cat(kernels, -1).unflatten(-1, (c, 3, 3))
    planes, o = v.unflatten(1, grid), torch.zeros_like(v).unflatten(1, grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    r, s = row + dr, column + dc
                    if 0 <= r < grid[0] and 0 <= s < grid[1]:
                        o[:, row, column] += kernel[..., dr + 1, dc + 1] * planes[:, r, s]
    return o.flatten(1, 2)


@pytest.mark.parametrize("grid", [None, (3, 5), (4, 2)])
def test_layer_adds_a_local_term_on_the_grid(grid: tuple[int, int] | None) -> None:
    layer = module()
    sides = (1, 9) if grid is None else grid
    x = torch.randn(2, sides[0] * sides[1], 16, dtype=torch.float64)
    v = layer.v_proj(x)
    q, k = layer.split(layer.q_proj(x), 2), layer.split(layer.k_proj(x), 2)
    o = layer.join(weights(q, k) @ layer.split(v, 2)) + local_term(layer, x, v, sides)
    torch.testing.assert_close(layer(x, grid=grid), layer.out_proj(o))


def test_local_kernel_zero_and_cross_patterns_have_no_local_term() -> None:
    assert not hasattr(module(local_kernel=0), "predict")
    assert not hasattr(module("NC"), "predict")
    assert not hasattr(module("CS"), "predict")
    with pytest.raises(UsageError, match="observed local_kernel=2, expected an odd number or 0"):
        module(local_kernel=2)


def test_flops() -> None:
    assert module().flops(10, 10) == 2 * 2 * 20 * 64
    assert module("NC").flops(10, 30) == 2 * 2 * 40 * 64
    assert module("CS").flops(10, 10) == 2 * 10 * (4 * 10 * 8 + 4 * 64)
    # the kernels: 16 → 16 and 16 → 144 in two groups; the convolution: 9 taps
    local = 2 * 16 * 8 + 2 * 144 * 8 + 2 * 10 * 16 * 9
    assert module().layer_flops(10, 10) == 2 * 2 * 20 * 64 + 8 * 10 * 256 + local


@pytest.mark.parametrize("pattern", PATTERNS)
def test_triton_agrees_with_fp64(pattern: str) -> None:
    n, m = (9, 40) if pattern in ("NC", "CC") else (40, 40)
    inputs = [heads(x, b=1).requires_grad_() for x in (n, m, m)]
    single = [x.detach().float().requires_grad_() for x in inputs]
    exact = module(pattern, "reference").attend(*inputs)
    o = module(pattern, "triton").attend(*single)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    exact.square().sum().backward()
    o.square().sum().backward()
    for x, y in zip(single, inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-4)
