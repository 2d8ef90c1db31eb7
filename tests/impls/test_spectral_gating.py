"""spectral_gating against circular convolution, and its exact special cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.spectral_gating import SpectralGating

BACKENDS = ("reference", "torch")
C = 3
GRIDS = [(4, 5), (5, 6), (1, 7), (1, 1), (9,), (2, 3, 4)]


def tokens(grid: tuple[int, ...], *, b: int = 2) -> Tensor:
    return torch.randn(b, math.prod(grid), C, dtype=torch.float64)


def module(grid: tuple[int, ...], backend: str = "torch") -> SpectralGating:
    layer = attnbench.build("spectral_gating", C, 1, pattern="NS", backend=backend, filter_grid=grid)
    torch.nn.init.normal_(layer.filter)
    return layer.double()


def kernel(layer: SpectralGating, grid: tuple[int, ...]) -> Tensor:
    """The convolution's kernel (*grid, C): a cosine or sine wave per frequency, by loops."""
    w = torch.view_as_complex(layer.filter.detach())
    total = torch.zeros(*grid, C, dtype=torch.float64)
    for place in itertools.product(*(range(side) for side in grid)):
        for frequency in itertools.product(*(range(side) for side in w.shape[:-1])):
            turn = sum(k * t / side for k, t, side in zip(frequency, place, grid, strict=True))
            wave = torch.tensor(complex(math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)))
            mirrored = frequency[-1] not in (0, grid[-1] / 2)
            total[place] += (2.0 if mirrored else 1.0) * (w[frequency] * wave).real
    return total / math.prod(grid)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_circular_convolution(grid: tuple[int, ...], backend: str) -> None:
    layer, x = module(grid, backend), tokens(grid)
    weights, cells = kernel(layer, grid), x.unflatten(1, grid)
    y = torch.zeros_like(cells)
    axes = tuple(range(1, len(grid) + 1))
    for place in itertools.product(*(range(side) for side in grid)):
        y += weights[place] * cells.roll(place, axes)
    torch.testing.assert_close(layer(x, grid=grid), y.flatten(1, len(grid)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_is_the_identity_and_zero_is_zero(backend: str) -> None:
    layer, x = module((4, 5), backend), tokens((4, 5))
    torch.nn.init.zeros_(layer.filter)
    assert not layer(x).any()
    torch.nn.init.ones_(layer.filter[..., 0])
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equivariant_to_circular_shifts_linear_and_channels_apart(backend: str) -> None:
    layer, x, other = module((4, 5), backend), tokens((4, 5)), tokens((4, 5))
    y = layer(x).unflatten(1, (4, 5))
    shifted = x.unflatten(1, (4, 5)).roll((1, 3), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(layer(shifted).unflatten(1, (4, 5)), y.roll((1, 3), (1, 2)))
    torch.testing.assert_close(layer(2 * x - other), 2 * layer(x) - layer(other))
    x[..., 1] += 1.0
    torch.testing.assert_close(layer(x).unflatten(1, (4, 5))[..., [0, 2]], y[..., [0, 2]])


def test_other_grids_interpolate_the_gate() -> None:
    layer = module((4, 6))
    expected = F.interpolate(
        layer.filter.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(0),
        (7, 6),
        mode="bicubic",
        align_corners=True,
    )
    gate = layer.gate((7, 10), torch.float64)
    torch.testing.assert_close(torch.view_as_real(gate).permute(2, 3, 0, 1).flatten(0, 1), expected[0])
    same = module((7, 10))
    with torch.no_grad():
        same.filter.copy_(torch.view_as_real(gate))
    x = tokens((7, 10))
    torch.testing.assert_close(layer(x, grid=(7, 10)), same(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_cells_count_as_zero(backend: str) -> None:
    layer, x = module((4, 5), backend), tokens((4, 5))
    padded = torch.zeros(2, 20, dtype=torch.bool)
    padded[:, 17:] = True
    silent = x.masked_fill(padded.unsqueeze(-1), 0.0)
    torch.testing.assert_close(layer(x, key_padding_mask=padded), layer(silent))


def test_half_precision_is_transformed_in_single_precision() -> None:
    layer, x = module((4, 5)).bfloat16(), tokens((4, 5)).bfloat16()
    exact = layer.double()(x.double())
    y = layer.bfloat16()(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


def test_initial_gates_are_small() -> None:
    layer = attnbench.build("spectral_gating", 64, 1, pattern="NS")
    assert layer.filter.shape == (14, 8, 64, 2)
    assert abs(layer.filter.std().item() / 0.02 - 1) < 0.05


def test_wrong_grids_are_refused() -> None:
    layer = module((4, 5))
    for wrong in ((4, 6), (20,)):
        with pytest.raises(UsageError, match="for 20 tokens, expected one of 2 sides"):
            layer(tokens((4, 5)), grid=wrong)
    with pytest.raises(UsageError, match=r"observed filter_grid=\(0, 3\)"):
        module((0, 3))


def test_flops_are_two_transforms_and_a_product() -> None:
    # 64 tokens: 5·64·6 for the FFTs, 6 per complex product at 8·5 frequencies
    assert module((8, 8)).flops(64, 64, grid=(8, 8)) == C * (5 * 64 * 6 + 6 * 40)
    assert module((8, 8)).flops(64, 64, grid=(4, 16)) == C * (5 * 64 * 6 + 6 * 36)
