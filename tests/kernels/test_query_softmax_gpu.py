"""query_softmax on a GPU at real sizes: Triton against fp64, bitwise determinism, owners of the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels.query_softmax import query_softmax

pytestmark = pytest.mark.gpu

SIZES = [(7, 16384, 64), (128, 4000, 128), (1000, 1500, 128), (100, 1000, 256)]


def _inputs(n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, 2, rows, d, device="cuda").to(dtype) for rows in (n, m, m)]


def _run(inputs: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """o, mass and every gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, mass, _ = query_softmax(*leaves, **options, backend=backend)
    torch.manual_seed(1)
    sent = [torch.randn(t.shape, device="cuda").to(t.dtype) for t in (o, mass)]
    found = torch.autograd.grad([o, mass], leaves, sent)
    return [t.detach() for t in (o, mass, *found)]


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(n: int, m: int, d: int, normalize: bool, dtype: torch.dtype) -> None:
    inputs = _inputs(n, m, d, dtype)
    options = {"normalize": normalize, "eps": 1e-8}
    truth = _run([x.double() for x in inputs], "reference", **options)
    for found, expected in zip(_run(inputs, "triton", **options), truth, strict=True):
        eps = max(torch.finfo(dtype).eps, 2e-6)
        assert (found.double() - expected).abs().max() <= 4 * eps * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("n", [8, 500])
def test_arg_max(n: int) -> None:
    q, k, v = _inputs(n, 3000, 64, torch.float32)
    o, mass, index = query_softmax(q, k, v, hard=True, backend="triton")
    best = (q.double() @ k.double().mT).argmax(-2)
    assert (index == best).float().mean() > 0.999  # but for scores that fp32 cannot tell apart
    owned = torch.nn.functional.one_hot(index.long(), n).mT.double()
    torch.testing.assert_close(o.double(), owned @ v.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(mass.double(), owned.sum(-1))


def test_bitwise_determinism() -> None:
    inputs = _inputs(16, 50_000, 64, torch.bfloat16)
    first, second = (_run(inputs, "triton", normalize=True, eps=1e-8) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
