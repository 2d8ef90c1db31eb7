"""dilated_neighborhood_attention against neighborhoods of each class of positions, and its special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def heads(n: int, d: int = 8, *, b: int = 2) -> Tensor:
    return torch.randn(b, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build(
        "dilated_neighborhood_attention", 16, 2, pattern=pattern, backend=backend, **hyper
    )
    return built.double()


def sees(i: int, j: int, length: int, w: int, d: int, causal: bool) -> bool:
    """One axis of the definition: neighborhoods of length ⌈(G − g)/d⌉ within the class g = p mod d."""
    if i % d != j % d:
        return False
    own = len(range(i % d, length, d))
    u, other = i // d, j // d
    if causal:
        return max(u - w + 1, 0) <= other <= u
    start = min(max(u - w // 2, 0), own - w)
    return start <= other < start + w


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
@pytest.mark.parametrize(
    ("grid", "w", "d"), [((11,), (3,), (3,)), ((7, 8), (3, 2), (2, 3)), ((4, 3, 5), (2, 2, 2), (2, 1, 2))]
)
def test_equals_the_definition(grid, w, d, pattern, backend):
    n, causal = math.prod(grid), pattern in ("CS", "CC")
    q, k, v = heads(n), heads(n), heads(n, 6)
    places = list(product(*map(range, grid)))
    mask = torch.tensor(
        [[all(sees(*axis, causal) for axis in zip(p, r, grid, w, d, strict=True)) for r in places]
         for p in places]
    )  # fmt: skip
    expected = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1) @ v
    built = module(pattern, backend, window=w, dilation=d)
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), expected)
    assert torch.equal(built.visible(n, n, torch.device("cpu"), grid=grid), mask)
    assert built.cost("flops", n, n, grid=grid) == 4 * 16 * int(mask.sum())


def test_interleaved_sequences_in_the_batch_are_the_same():
    """Of unequal lengths too: 11 tokens at distance 3 are classes of 4, 4 and 3."""
    q, k, v = heads(11), heads(11), heads(11)
    found = module(window=3, dilation=3).attend(q, k, v)
    near = attnbench.build("neighborhood_attention", 16, 2, window=3, backend="reference")
    for g in range(3):
        alone = near.attend(*(x[:, :, g::3] for x in (q, k, v)))
        torch.testing.assert_close(found[:, :, g::3], alone)


def test_special_cases():
    q, k, v = heads(24), heads(24), heads(24)
    near = attnbench.attention(q, k, v, "neighborhood_attention", grid=(4, 6), window=3, backend="reference")
    for hyper in ({"dilation": 1}, {"phase": 0}):
        torch.testing.assert_close(module(window=3, **hyper).attend(q, k, v, grid=(4, 6)), near)
    whole = module(window=2, dilation=2).attend(q[:, :, :16], k[:, :, :16], v[:, :, :16], grid=(4, 4))
    classes = torch.tensor([[(y % 2) * 2 + x % 2 for x in range(4)] for y in range(4)]).flatten()
    scores = q[:, :, :16] @ k[:, :, :16].mT / math.sqrt(8)
    scores = scores.masked_fill(classes[:, None] != classes, -math.inf)
    torch.testing.assert_close(whole, scores.softmax(-1) @ v[:, :, :16])  # every class sees itself


def test_dilations_are_the_widest_or_reduced_to_what_fits():
    widest = module(window=3)
    assert widest.neighborhood((13, 6)).dilation == (4, 2)
    assert widest.neighborhood((2, 9)).dilation == (1, 3)
    assert widest.neighborhood((2, 9)).window == (2, 3)
    given = module(window=3, dilation=(4, 2))
    assert given.neighborhood((12, 12)).dilation == (4, 2)
    assert given.neighborhood((7, 12)).dilation == (2, 2)


@pytest.mark.parametrize("dilation", ["max", 0, (1, 0), (2, 2, 2)])
def test_wrong_dilations_are_refused(dilation):
    with pytest.raises(UsageError, match="observed dilation="):
        module(window=2, dilation=dilation).attend(heads(12), heads(12), heads(12), grid=(3, 4))


@pytest.mark.parametrize(
    ("pattern", "grid"), [("NS", (5, 3)), ("CS", (9,)), ("NC", (2, 4, 2)), ("CC", (4, 3))]
)
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    exact = module(pattern, window=2, dilation=2)
    fast = attnbench.build(
        "dilated_neighborhood_attention", 16, 2, pattern=pattern, backend="triton", window=2, dilation=2
    )
    upstream = torch.randn(1, 2, n, 8, dtype=torch.float64)
    outputs = fast.attend(*given, grid=grid), exact.attend(*truth, grid=grid)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    outputs[0].backward(upstream.float())
    outputs[1].backward(upstream)
    for got, want in zip(given, truth, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
