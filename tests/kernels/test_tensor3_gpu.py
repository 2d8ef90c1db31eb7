"""tensor3 on a GPU at real sizes: Triton against fp64, and bitwise determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench.kernels.tensor3 import tensor3

pytestmark = pytest.mark.gpu


def _inputs(n: int, m1: int, m2: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, 2, rows, d, device="cuda").to(dtype) for rows in (n, m1, m2, m1, m2)]


def _run(inputs: list[Tensor], backend: str, causal: bool) -> list[Tensor]:
    """o, lse and every gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, lse = tensor3(*leaves, causal=causal, backend=backend)
    torch.manual_seed(1)
    sent = [torch.randn(t.shape, device="cuda").to(t.dtype) for t in (o, lse)]
    return [t.detach() for t in (o, lse, *torch.autograd.grad([o, lse], leaves, sent))]


@pytest.mark.parametrize(("n", "m1", "m2", "d"), [(130, 130, 130, 64), (50, 70, 90, 128), (33, 40, 40, 256)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(n: int, m1: int, m2: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = _inputs(n, m1, m2, d, dtype)
    truth = _run([x.double() for x in inputs], "reference", causal)
    for found, expected in zip(_run(inputs, "triton", causal), truth, strict=True):
        eps = max(torch.finfo(dtype).eps, 2e-6)
        assert (found.double() - expected).abs().max() <= 4 * eps * max(1.0, float(expected.abs().max()))


def test_bitwise_determinism() -> None:
    inputs = _inputs(200, 200, 200, 64, torch.bfloat16)
    first, second = (_run(inputs, "triton", True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
