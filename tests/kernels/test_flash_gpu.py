"""flash on a GPU at real sizes: Triton and the peers against fp64, bitwise determinism, long offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, flash

pytestmark = pytest.mark.gpu

SIZES = [(1024, 1024, 64), (4096, 4096, 128), (1000, 3000, 128), (2048, 2048, 80)]
PEERS = ("sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex")


def _inputs(n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the gradient of o that is sent back."""
    shapes = ((1, 4, n, d), (1, 2, m, d), (1, 2, m, d), (1, 4, n, d))
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def _run(inputs: list[Tensor], backend: str, need_lse: bool, **options: Any) -> list[Tensor]:
    *leaves, do = [x.detach().requires_grad_() for x in inputs]
    o, lse = flash(*leaves, **options, need_lse=need_lse, backend=backend)
    gradients = torch.autograd.grad(o, leaves, do.detach())
    return [o.detach(), *([lse.detach()] if need_lse else []), *gradients]


def _assert_close(inputs: list[Tensor], backend: str, need_lse: bool = True, **options: Any) -> None:
    truth = _run([x.double() for x in inputs], "reference", need_lse, **options)
    naive = _run(inputs, "reference", need_lse, **options)
    actual = _run(inputs, backend, need_lse, **options)
    for x, y, t in zip(actual, naive, truth, strict=True):
        allowed = 3 * (y.double() - t).abs().max() + 1e-5
        assert (x.double() - t).abs().max() <= allowed


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(n: int, m: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    _assert_close(_inputs(n, m, d, dtype), "triton", causal=causal)


def test_every_option_of_triton() -> None:
    n, m = 1500, 2000
    options = {
        "causal": True,
        "window": (700, -1),
        "q_pos": torch.randint(0, m, (n,), device="cuda").sort().values.int(),
        "softcap": 20.0,
        "key_bias": torch.randn(1, 1, m, device="cuda"),
        "bias": torch.randn(4, n, m, device="cuda"),
        "sink": torch.randn(4, 1, device="cuda"),
    }
    _assert_close(_inputs(n, m, 64), "triton", **options)


@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize(("n", "m"), [(1024, 1024), (512, 1024)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (100, 0)}], ids=["all", "causal", "window"]
)
def test_peers(backend: str, n: int, m: int, options: dict[str, Any]) -> None:
    try:
        _assert_close(_inputs(n, m, 64), backend, need_lse=backend == "flex", **options)
    except Unsupported as why:
        pytest.skip(str(why))


def test_bitwise_determinism() -> None:
    inputs = _inputs(4096, 4096, 128)
    first, second = (_run(inputs, "triton", True, causal=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """The last head of 2³¹ + elements is the same as when it is alone."""
    n, d = 128, 64
    heads = 2**31 // (n * d) + 8
    q = torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16)
    o, lse = flash(q, q, q, backend="triton")
    alone, alone_lse = flash(*(q[:, -1:],) * 3, backend="triton")
    assert torch.equal(o[:, -1:], alone)
    assert torch.equal(lse[:, -1:], alone_lse)
