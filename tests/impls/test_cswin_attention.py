"""cswin_attention against its definition pair by pair and tap by tap, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def heads(n: int, h: int = 4, *, b: int = 2) -> Tensor:
    return torch.randn(b, h, n, 4, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build("cswin_attention", 16, 4, pattern=pattern, backend=backend, **hyper)
    for conv in built.lepe:
        torch.nn.init.normal_(conv.bias)
    return built.double()


def definition(q: Tensor, k: Tensor, v: Tensor, built, grid: tuple, *, causal: bool = False) -> Tensor:
    places = list(product(*map(range, grid)))
    token = {p: n for n, p in enumerate(places)}
    s = built.hp.stripe
    out = torch.zeros_like(v)
    for h in range(4):
        branch = 0 if built.hp.full else h // 2
        for i, (y, x) in enumerate(places):

            def inside(r: tuple, h: int = h, y: int = y, x: int = x) -> bool:
                if built.hp.full:
                    return True
                return r[1] // s == x // s if h < 2 else r[0] // s == y // s

            seen = [j for j, r in enumerate(places) if inside(r) and (j <= i or not causal)]
            scores = (k[:, h, seen] @ q[:, h, i, :, None]).squeeze(-1) / 2.0
            out[:, h, i] = (scores.softmax(-1)[..., None] * v[:, h, seen]).sum(1)
            if not built.hp.lepe:
                continue
            conv = built.lepe[branch]
            channels = slice(4 * (h % built.heads), 4 * (h % built.heads) + 4)
            taps = conv.taps.at(2)[channels]
            for dy, dx in product((-1, 0, 1), repeat=2):
                r = (y + dy, x + dx)
                if r in token and inside(r) and (token[r] <= i or not causal):
                    out[:, h, i] += taps[:, dy + 1, dx + 1] * v[:, h, token[r]]
            out[:, h, i] += conv.bias[channels]
    return out


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("pattern", "hyper"),
    [
        ("NS", {"stripe": 2}),
        ("CS", {"stripe": 3}),
        ("NC", {"stripe": 1}),
        ("NS", {"stripe": 2, "lepe": False}),
        ("NS", {"full": True}),
    ],
)
@pytest.mark.parametrize("grid", [(4, 5), (1, 7)])
def test_equals_the_definition(grid, pattern, hyper, backend):
    n = math.prod(grid)
    q, k, v = heads(n), heads(n), heads(n)
    built = module(pattern, backend, **hyper)
    with torch.no_grad():
        found = built.attend(q, k, v, grid=grid)
        torch.testing.assert_close(found, definition(q, k, v, built, grid, causal=pattern == "CS"))


def test_special_cases():
    grid, n = (4, 5), 20
    q, k, v = heads(n), heads(n), heads(n)
    dense = (q @ k.mT / 2.0).softmax(-1) @ v
    torch.testing.assert_close(module(stripe=5, lepe=False).attend(q, k, v, grid=grid), dense)
    built = module(stripe=5)
    for conv in built.lepe:  # the centre tap alone adds v
        torch.nn.init.zeros_(conv.taps.weight)
        torch.nn.init.zeros_(conv.bias)
        conv.taps.at(2).detach()[:, 1, 1] = 1.0
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), dense + v)


def test_stripes_of_one_are_lines():
    grid, n = (4, 5), 20
    q, k, v = (x.unflatten(2, grid) for x in (heads(n), heads(n), heads(n)))
    found = module(stripe=1, lepe=False).attend(*(x.flatten(2, 3) for x in (q, k, v)), grid=grid)
    rows = (q @ k.mT / 2.0).softmax(-1) @ v
    columns = [x.transpose(2, 3) for x in (q, k, v)]
    columns = ((columns[0] @ columns[1].mT / 2.0).softmax(-1) @ columns[2]).transpose(2, 3)
    expected = torch.cat((columns[:, :2], rows[:, 2:]), 1).flatten(2, 3)
    torch.testing.assert_close(found, expected)


def test_transposed_grids_exchange_the_halves_of_the_heads():
    q, k, v = heads(20), heads(20), heads(20)
    direct, turned = module(stripe=2), module(stripe=2)
    for own, other in zip(direct.lepe, reversed(turned.lepe), strict=True):
        other.taps.at(2).detach().copy_(own.taps.at(2).mT)
        other.bias.detach().copy_(own.bias)

    def turn(x: Tensor, grid: tuple) -> Tensor:
        return x.unflatten(2, grid).transpose(2, 3).flatten(2, 3).roll(2, 1)

    o = turned.attend(*(turn(x, (4, 5)) for x in (q, k, v)), grid=(5, 4))
    torch.testing.assert_close(turn(o, (5, 4)), direct.attend(q, k, v, grid=(4, 5)))


def test_a_sequence_is_folded():
    q, k, v = heads(12), heads(12), heads(12)
    built = module(stripe=2)
    torch.testing.assert_close(built.attend(q, k, v), built.attend(q, k, v, grid=(3, 4)))


def test_flops_count_stripes_and_taps():
    """Rows 4, columns 5, stripes of 2: column stripes of 8, 8 and 4 tokens, row stripes of 10 and 10."""
    pairs = 64 + 64 + 16 + 100 + 100
    convolution = 2 * 9 * 20 * 16
    grid = (4, 5)
    assert module(stripe=2).cost("flops", 20, 20, grid=grid) == 4 * 8 * pairs + convolution
    assert module(stripe=2, lepe=False).cost("flops", 20, 20, grid=grid) == 4 * 8 * pairs
    assert module(full=True).cost("flops", 20, 20, grid=grid) == 4 * 16 * 400 + convolution
    causal = (pairs + 2 * 20) // 2  # half of every stripe and its diagonal
    assert module("CS", stripe=2, lepe=False).cost("flops", 20, 20, grid=grid) == 4 * 8 * causal


@pytest.mark.parametrize(
    ("hyper", "grid", "message"),
    [
        ({"stripe": 0}, (3, 4), "at least 1"),
        ({}, (12,), "expected rank 2"),
        ({}, (2, 2, 3), "expected rank 2"),
    ],
)
def test_wrong_settings_are_refused(hyper, grid, message):
    with pytest.raises(UsageError, match=message):
        module(**hyper).attend(heads(12), heads(12), heads(12), grid=grid)


def test_odd_numbers_of_heads_have_no_halves():
    with pytest.raises(UsageError, match="3 heads, expected an even number"):
        attnbench.build("cswin_attention", 12, 3)
    assert attnbench.build("cswin_attention", 12, 3, full=True).heads == 3


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_triton_agrees(pattern):
    grid, n = (4, 5), 20
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    exact = module(pattern, stripe=2)
    fast = attnbench.build("cswin_attention", 16, 4, pattern=pattern, backend="triton", stripe=2)
    fast.load_state_dict(exact.state_dict())
    upstream = torch.randn(1, 4, n, 4, dtype=torch.float64)
    outputs = fast.attend(*given, grid=grid), exact.attend(*truth, grid=grid)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    outputs[0].backward(upstream.float())
    outputs[1].backward(upstream)
    for got, want in zip(given, truth, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
