"""Taylor attention: the cases of its definition that hold exactly, in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import attention

B, H, N, M, D = 2, 2, 6, 9, 4
ID = "taylor_approx_attention"


def _drawn(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(B, H, size, D, dtype=torch.float64) for size in (n, m, m))  # type: ignore


def _taylor(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, ID, **{"pattern": "NC", "backend": "torch", **options})


def _weights(q: Tensor, k: Tensor, pattern: str) -> Tensor:
    t = q @ k.mT / math.sqrt(D)
    w = 1 + t + t.square() / 2
    return w.tril() if pattern == "CS" else w


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
def test_the_linear_form_is_the_quadratic_form(pattern: str, backend: str) -> None:
    q, k, v = _drawn(N, M if pattern in ("NC", "CC") else N)
    w = _weights(q, k, pattern)
    want = w @ v / w.sum(-1, keepdim=True)
    torch.testing.assert_close(_taylor(q, k, v, pattern=pattern, backend=backend), want)


@pytest.mark.parametrize("norm", ["joint", "per_order"])
def test_a_zero_query_reads_the_mean(norm: str) -> None:
    q, k, v = _drawn(N, M)
    o = _taylor(torch.zeros_like(q), k, v, norm=norm)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o))


def test_small_scores_give_softmax_up_to_third_order() -> None:
    q, k, v = _drawn(N, M)
    errors = []
    for size in (1e-1, 1e-2):
        want = attention(size * q, k, v, "softmax", pattern="NC", backend="torch")
        errors.append(float((_taylor(size * q, k, v) - want).abs().max()))
    assert errors[1] < 1e-5
    assert 800 < errors[0] / errors[1] < 1200


@pytest.mark.parametrize(("norm", "total"), [("joint", 1.0), ("per_order", 3.0)])
@pytest.mark.parametrize("pattern", ["CS", "NC"])
def test_constant_values_show_the_sum_of_a_row(norm: str, total: float, pattern: str) -> None:
    q, k, v = _drawn(N, N)
    o = _taylor(q, k, torch.full_like(v, 2.0), norm=norm, pattern=pattern)
    torch.testing.assert_close(o, torch.full_like(o, 2.0 * total))


@pytest.mark.parametrize("pattern", ["CS", "NC"])
def test_every_order_has_its_own_normaliser(pattern: str) -> None:
    q, k, v = _drawn(N, N)
    first = q @ k.mT
    orders = (torch.ones_like(first), first, q.square() @ k.square().mT)
    seen = [w.tril() if pattern == "CS" else w for w in orders]
    want = sum(w @ v / w.sum(-1, keepdim=True) for w in seen)
    torch.testing.assert_close(_taylor(q, k, v, norm="per_order", pattern=pattern), want)


def test_the_future_does_not_matter() -> None:
    q, k, v = _drawn(130, 130)  # three chunks of 64
    o = _taylor(q, k, v, pattern="CS")
    for x in (q, k, v):
        x[:, :, 70:] = torch.randn_like(x[:, :, 70:])
    torch.testing.assert_close(_taylor(q, k, v, pattern="CS")[:, :, :70], o[:, :, :70])


def test_a_row_of_padding_is_zero() -> None:
    q, k, v = _drawn(N, M)
    hidden = torch.ones(B, M, dtype=torch.bool)
    for norm in ("joint", "per_order"):
        assert not _taylor(q, k, v, norm=norm, key_padding_mask=hidden).any()
