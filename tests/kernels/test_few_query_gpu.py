"""few_query on a GPU at real sizes: Triton and the peers against fp64, bitwise determinism, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, few_query

pytestmark = pytest.mark.gpu

SIZES = [(1, 20_000), (49, 4096), (256, 10_000), (4096, 49), (10_000, 77), (1000, 1000)]
PEERS = ("sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex")


def _inputs(n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the gradient of o that is sent back."""
    shapes = ((1, 4, n, d), (1, 2, m, d), (1, 2, m, d), (1, 4, n, d))
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def _run(inputs: list[Tensor], backend: str, need_lse: bool = True, **options: Any) -> list[Tensor]:
    *leaves, do = [x.detach().requires_grad_() for x in inputs]
    o, lse = few_query(*leaves, **options, need_lse=need_lse, backend=backend)
    gradients = torch.autograd.grad(o, leaves, do.detach())
    return [o.detach(), *([lse.detach()] if lse is not None else []), *gradients]


def _assert_close(inputs: list[Tensor], backend: str, need_lse: bool = True, **options: Any) -> None:
    truth = _run([x.double() for x in inputs], "reference", need_lse, **options)
    naive = _run(inputs, "reference", need_lse, **options)
    actual = _run(inputs, backend, need_lse, **options)
    for x, y, t in zip(actual, naive, truth, strict=True):
        assert (x.double() - t).abs().max() <= 3 * (y.double() - t).abs().max() + 1e-5


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    _assert_close(_inputs(n, m, d, dtype), "triton")


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_biases(n: int, m: int) -> None:
    biases = {"key_bias": torch.randn(1, 1, m, device="cuda"), "bias": torch.randn(4, n, m, device="cuda")}
    _assert_close(_inputs(n, m, 64), "triton", **biases)


@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize(("n", "m"), [(1, 4096), (4096, 49)])
def test_peers(backend: str, n: int, m: int) -> None:
    try:
        _assert_close(_inputs(n, m, 64), backend, need_lse=backend == "flex")
    except Unsupported as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_bitwise_determinism_without_waiting(n: int, m: int) -> None:
    inputs = _inputs(n, m, 64)
    first = _run(inputs, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _run(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
