"""buckets on a GPU at real sizes: Triton against fp64 in every kind of list, and bitwise determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Buckets, buckets

pytestmark = pytest.mark.gpu

N, HEADS = 1024, 2


def _rounds(rounds: int) -> Tensor:
    order = torch.rand(1, HEADS, rounds, N, device="cuda").argsort(-1)
    return order.flatten(2)


def _hashing() -> tuple[Buckets, dict[str, Any]]:
    return Buckets.chunks(_rounds(4), 64, N, look_back=1), {"self_score": -5e4, "causal": True}


def _clusters() -> tuple[Buckets, dict[str, Any]]:
    entries = torch.rand(1, HEADS, 8, N, device="cuda").argsort(-1)[..., :128].sort(-1).values
    return Buckets.chunks(entries.flatten(2), 128, N), {"combine": "mean"}


def _ragged() -> tuple[Buckets, dict[str, Any]]:
    ids = torch.randint(0, 16, (1, HEADS, N), device="cuda")
    return Buckets.by_id(ids, ids, 16), {"key_bias": torch.randn(HEADS, N, device="cuda")}


def _inputs(d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, HEADS, N, d, device="cuda").to(dtype) for _ in range(4)]


def _run(inputs: list[Tensor], lists: Buckets, backend: str, **options: Any) -> list[Tensor]:
    *leaves, do = [x.detach().requires_grad_() for x in inputs]
    o, lse = buckets(*leaves, lists, **options, backend=backend)
    gradients = torch.autograd.grad([o, lse], leaves, [do.detach(), torch.ones_like(lse)])
    return [o.detach(), lse.detach(), *gradients]


@pytest.mark.parametrize("kind", [_hashing, _clusters, _ragged])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(kind: Any, d: int, dtype: torch.dtype) -> None:
    lists, options = kind()
    inputs = _inputs(d, dtype)
    truth = _run([x.double() for x in inputs], lists, "reference", **options)
    naive = _run(inputs, lists, "reference", **options)
    actual = _run(inputs, lists, "triton", **options)
    rescored = torch.finfo(torch.float32).eps * abs(options.get("self_score", 0.0))
    for x, y, t in zip(actual, naive, truth, strict=True):
        blind = torch.isneginf(t)
        assert torch.equal(torch.isneginf(x), blind)
        error, plain = ((z.double() - t).masked_fill(blind, 0.0).abs().max() for z in (x, y))
        largest = t.masked_fill(blind, 0.0).abs().max().clamp(min=1.0)
        assert error <= 3 * plain + (1e-5 + rescored) * largest


@pytest.mark.parametrize("kind", [_hashing, _clusters, _ragged])
def test_bitwise_determinism(kind: Any) -> None:
    lists, options = kind()
    inputs = _inputs(64, torch.bfloat16)
    first, second = (_run(inputs, lists, "triton", **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nothing_waits_for_the_device() -> None:
    inputs = _inputs(64, torch.bfloat16)
    ids = torch.randint(0, 16, (1, HEADS, N), device="cuda")
    order = _rounds(2)
    for lists in (Buckets.by_id(ids, ids, 16), Buckets.chunks(order, 64, N, look_back=1)):
        _run(inputs, lists, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(inputs, Buckets.by_id(ids, ids, 16), "triton")
        _run(inputs, Buckets.chunks(order, 64, N, look_back=1), "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
