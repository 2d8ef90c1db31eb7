"""NATTEN as a backend of neighborhood, where it is installed: it computes our definition, or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Neighborhood, Unsupported, neighborhood

pytest.importorskip("natten", reason="NATTEN is not installed")

of = Neighborhood.of


def _qkv(tokens: int, d: int = 16) -> list[Tensor]:
    return [torch.randn(1, 2, tokens, d) for _ in range(3)]


@pytest.mark.parametrize(
    ("pattern", "grid"),
    [
        (of((5,)), (19,)),
        (of((6,), stride=(4,), causal=(True,)), (22,)),
        (of((4, 3), dilation=(2, 3), stride=(3, 1)), (9, 11)),
        (of((2, 3, 2), stride=(2, 2, 1), causal=(True, False, False)), (3, 5, 4)),
    ],
)
def test_computes_the_definition(pattern: Neighborhood, grid: tuple[int, ...]) -> None:
    q, k, v = _qkv(int(torch.tensor(grid).prod()))
    found = neighborhood(q, k, v, pattern, grid=grid, backend="natten")
    expected = neighborhood(q, k, v, pattern, grid=grid, backend="reference")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_says_what_it_cannot_serve() -> None:
    q, k, v = _qkv(12)
    with pytest.raises(Unsupported, match="natten bias"):
        neighborhood(q, k, v, of((3,)), grid=(12,), bias=torch.zeros(2, 5), backend="natten")
    with pytest.raises(Unsupported, match="natten tokens: observed 12, expected 14"):
        neighborhood(q, k, v, of((3,)), grid=(14,), backend="natten")
    with pytest.raises(Unsupported, match="natten scale"):
        neighborhood(q, k, v, of((3,)), grid=(12,), scale=0.0, backend="natten")
