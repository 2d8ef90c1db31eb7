"""window and neighborhood on a GPU at real sizes: Triton and the peers against fp64, bitwise determinism."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Neighborhood, Partition, neighborhood, window

pytestmark = pytest.mark.gpu

WINDOWS = {
    "swin": (Partition.block((7, 7), shift=(3, 3)), (56, 56), 32),
    "halo": (Partition.block((8, 8), halo=(3, 3)), (60, 64), 64),
    "stripes": (Partition.block((64, 7)), (64, 60), 64),
    "strided": (Partition.strided((56, 56), (7, 7)), (56, 56), 128),
    "video": (Partition.block((8, 7, 7), shift=(4, 3, 3)), (8, 28, 28), 32),
}
NEIGHBORHOODS = {
    "image": (Neighborhood.of((7, 7)), (56, 56), 32),
    "dilated": (Neighborhood.of((7, 7), dilation=(8, 7)), (60, 52), 64),
    "strided": (Neighborhood.of((16, 16), stride=(8, 8)), (64, 64), 128),
    "sequence": (Neighborhood.of((256,), causal=(True,)), (3000,), 64),
    "video": (Neighborhood.of((4, 8, 8), stride=(2, 4, 4), causal=(True, False, False)), (8, 24, 20), 80),
}


def _run(
    op: Callable[..., Any], inputs: list[Tensor], what: Any, backend: str, **options: Any
) -> list[Tensor]:
    *leaves, do = [x.detach().requires_grad_() for x in inputs]
    extra = {"bias": leaves[3]} if len(leaves) > 3 else {}
    o, lse = op(*leaves[:3], what, **extra, **options, backend=backend)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do.detach())]


def _inputs(grid: tuple[int, ...], d: int, dtype: torch.dtype, table: tuple[int, ...] | None) -> list[Tensor]:
    n = math.prod(grid)
    q, k, v, do = (torch.randn(2, 3, n, d, device="cuda").to(dtype) for _ in range(4))
    return [q, k, v, *([] if table is None else [torch.randn(3, *table, device="cuda")]), do]


def _assert_close(op: Any, inputs: list[Tensor], what: Any, backend: str, **options: Any) -> list[Tensor]:
    truth = _run(op, [x.double() for x in inputs], what, "reference", **options)
    naive = _run(op, inputs, what, "reference", **options)
    actual = _run(op, inputs, what, backend, **options)
    for x, y, t in zip(actual, naive, truth, strict=True):
        allowed = 3 * (y.double() - t).abs().max() + 1e-5 * max(1.0, float(t.abs().max()))
        assert (x.double() - t).abs().max() <= allowed
    return actual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_window(name: str, biased: bool, dtype: torch.dtype) -> None:
    partition, grid, d = WINDOWS[name]
    inputs = _inputs(grid, d, dtype, partition.table if biased else None)
    first = _assert_close(window, inputs, partition, "triton", grid=grid)
    again = _run(window, inputs, partition, "triton", grid=grid)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhood(name: str, biased: bool, dtype: torch.dtype) -> None:
    pattern, grid, d = NEIGHBORHOODS[name]
    inputs = _inputs(grid, d, dtype, pattern.table if biased else None)
    first = _assert_close(neighborhood, inputs, pattern, "triton", grid=grid)
    again = _run(neighborhood, inputs, pattern, "triton", grid=grid)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["flex", "natten"])
@pytest.mark.parametrize("name", ["image", "strided"])
def test_peers(name: str, backend: str) -> None:
    if backend == "natten" and importlib.util.find_spec("natten") is None:
        pytest.skip("NATTEN is not installed")
    pattern, grid, d = NEIGHBORHOODS[name]
    _assert_close(neighborhood, _inputs(grid, d, torch.bfloat16, None), pattern, backend, grid=grid)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of a head lie more than 2³¹ elements behind its first."""
    n, stride = 64, 2**25 + 2**10
    wide = [torch.empty((n - 1) * stride + 16, device="cuda", dtype=torch.float16) for _ in range(3)]
    q, k, v = (x.as_strided((1, 1, n, 16), (1, 1, stride, 1)).normal_() for x in wide)
    partition = Partition.block((8,))
    found = window(q, k, v, partition, grid=(n,), backend="triton")
    expected = window(*(x.contiguous() for x in (q, k, v)), partition, grid=(n,), backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
