"""generalized_neighborhood_attention against its definition pair by pair, and its exact special cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.harness.estimate.tiles import Axis, neighborhood


def heads(n: int, d: int = 8, *, b: int = 2) -> Tensor:
    return torch.randn(b, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper: object) -> torch.nn.Module:
    built = attnbench.build(
        "generalized_neighborhood_attention", 16, 2, pattern=pattern, backend=backend, **hyper
    )
    return built.double()


def sees(i: int, j: int, length: int, w: int, t: int, d: int, causal: bool) -> bool:
    """One axis of the definition."""
    if i % d != j % d:
        return False
    own = len(range(i % d, length, d))
    u, other = i // d, j // d
    if causal:
        leader = min(u // t * t + t - 1, own - 1)
        return max(leader - w + 1, 0) <= other <= u
    leader = min(u // t * t + t // 2, own - 1)
    start = min(max(leader - w // 2, 0), own - w)
    return start <= other < start + w


CASES = [
    ((11,), (4,), (3,), (1,)),
    ((13,), (3,), (2,), (2,)),
    ((6, 7), (3, 4), (3, 2), (1, 1)),
    ((8, 5), (2, 3), (2, 1), (2, 1)),
    ((3, 4, 5), (2, 2, 4), (1, 2, 4), (1, 2, 1)),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
@pytest.mark.parametrize(("grid", "w", "t", "d"), CASES)
def test_equals_the_definition(grid, w, t, d, pattern, backend):
    n, causal = math.prod(grid), pattern in ("CS", "CC")
    q, k, v = heads(n), heads(n), heads(n, 6)
    places = list(product(*map(range, grid)))
    mask = torch.tensor(
        [[all(sees(*axis, causal) for axis in zip(p, r, grid, w, t, d, strict=True)) for r in places]
         for p in places]
    )  # fmt: skip
    expected = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1) @ v
    built = module(pattern, backend, window=w, stride=t, dilation=d)
    torch.testing.assert_close(built.attend(q, k, v, grid=grid), expected)
    assert torch.equal(built.visible(n, n, torch.device("cpu"), grid=grid), mask)
    assert built.cost("flops", n, n, grid=grid) == 4 * 16 * int(mask.sum())


def test_a_stride_of_one_is_neighborhood_attention_and_a_window_of_the_grid_dense():
    q, k, v = heads(24), heads(24), heads(24)
    for pattern in ("NS", "CS"):
        near = attnbench.attention(
            q, k, v, "neighborhood_attention", pattern, "reference", grid=(4, 6), window=3
        )
        torch.testing.assert_close(module(pattern, window=3, stride=1).attend(q, k, v, grid=(4, 6)), near)
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    torch.testing.assert_close(module(window=6, stride=4).attend(q, k, v, grid=(4, 6)), dense)


def test_groups_of_queries_share_their_keys():
    mask = module(window=4, stride=2).visible(12, 12, torch.device("cpu"))
    assert torch.equal(mask[::2], mask[1::2])
    assert not torch.equal(mask[1:-1:2], mask[2::2])


@pytest.mark.parametrize(
    ("grid", "w", "t", "tile", "bound"),
    [
        ((32768,), 2048, 256, (128,), 16.0),
        ((256, 256), 80, 16, (16, 8), 10.24),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11),
        ((4096,), None, None, (64,), 21.33),
        ((64, 64), None, None, (8, 8), 7.11),
        ((24, 24, 24), None, None, (4, 4, 4), 8.0),
    ],
)
def test_tiles_are_full_at_the_papers_sizes_and_by_default(grid, w, t, tile, bound):
    """The tiles that are visited hold visible pairs only."""
    found = module(window=w, stride=t).neighborhood(grid)
    axes = [Axis(*each) for each in zip(grid, found.window, found.stride, found.dilation, strict=True)]
    counted = neighborhood(axes, tile, tile)
    assert counted.efficiency == 1.0
    assert counted.speedup == pytest.approx(bound, rel=1e-3)


def test_windows_and_strides_are_cut_to_the_grid():
    found = module(window=6, stride=4).neighborhood((3, 9))
    assert (found.window, found.stride, found.dilation) == ((3, 6), (3, 4), (1, 1))
    assert module(window=7).neighborhood((9, 9)).stride == (2, 2)
    assert module(window=(2, 6)).neighborhood((9, 9)).stride == (1, 2)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"window": 3, "stride": 4}, "expected strides of at most the window"),
        ({"window": (4, 2), "stride": 3}, "expected strides of at most the window"),
        ({"stride": 0}, "at least 1"),
        ({"stride": 50}, "expected strides of at most the window"),
        ({"window": 3, "stride": 1, "dilation": 0}, "at least 1"),
        ({"window": 3, "stride": (1, 1, 1)}, "rank 2: observed stride="),
    ],
)
def test_wrong_settings_are_refused(hyper, message):
    with pytest.raises(UsageError, match=message):
        module(**hyper).attend(heads(12), heads(12), heads(12), grid=(3, 4))


@pytest.mark.parametrize(
    ("pattern", "grid"), [("NS", (5, 3)), ("CS", (9,)), ("NC", (2, 4, 2)), ("CC", (4, 3))]
)
def test_triton_agrees(pattern, grid):
    n = math.prod(grid)
    given = [heads(n, b=1).float().requires_grad_() for _ in range(3)]
    truth = [x.detach().double().requires_grad_() for x in given]
    options = {"window": 3, "stride": 2}
    exact = module(pattern, **options)
    fast = attnbench.build(
        "generalized_neighborhood_attention", 16, 2, pattern=pattern, backend="triton", **options
    )
    upstream = torch.randn(1, 2, n, 8, dtype=torch.float64)
    outputs = fast.attend(*given, grid=grid), exact.attend(*truth, grid=grid)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    outputs[0].backward(upstream.float())
    outputs[1].backward(upstream)
    for got, want in zip(given, truth, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
