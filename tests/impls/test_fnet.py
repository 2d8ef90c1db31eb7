"""FNet: the cases of its definition that hold exactly, in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench import build

N, C = 6, 8


def _mix(x: Tensor, backend: str = "torch") -> Any:
    return build("fnet", x.shape[-1], 2, backend=backend).double()(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, N, C, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_it_is_the_sum_over_cosines(x: Tensor, backend: str) -> None:
    n, c = torch.arange(N).double(), torch.arange(C).double()
    angle = torch.outer(n, n)[:, None, :, None] / N + torch.outer(c, c)[None, :, None, :] / C
    want = torch.einsum("ncmd,bmd->bnc", (2 * math.pi * angle).cos(), x)
    torch.testing.assert_close(_mix(x, backend), want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_first_entry_is_the_sum_and_an_impulse_becomes_flat(x: Tensor, backend: str) -> None:
    torch.testing.assert_close(_mix(x, backend)[:, 0, 0], x.sum((1, 2)))
    impulse = torch.zeros_like(x)
    impulse[:, 0, 0] = 1
    torch.testing.assert_close(_mix(impulse, backend), torch.ones_like(x))


def test_it_is_linear(x: Tensor) -> None:
    y = torch.randn_like(x)
    torch.testing.assert_close(_mix(2 * x - y), 2 * _mix(x) - _mix(y))


def test_twice_is_the_mean_of_x_and_its_mirror_image(x: Tensor) -> None:
    mirrored = x[:, -torch.arange(N) % N][:, :, -torch.arange(C) % C]
    torch.testing.assert_close(_mix(_mix(x)), N * C / 2 * (x + mirrored))


def test_it_has_no_parameters() -> None:
    assert list(build("fnet", C, 2).state_dict()) == []
