"""The helpers of grid mechanisms: grids, settings per axis, parameters per rank, convolutions, counts."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from attnbench.errors import UsageError
from attnbench.impls import registry
from attnbench.impls.vision._grids import (
    DepthwiseConv,
    PerRank,
    at_rank,
    axes_by_rank,
    count_pairs,
    crop_grid,
    grid_of,
    heads_to_image,
    image_to_heads,
    pad_grid,
    per_axis,
    position_tables,
)
from attnbench.kernels import Neighborhood, Partition
from attnbench.kernels.neighborhood import reference as of_neighborhoods
from attnbench.kernels.window import reference as of_windows

SWIN = registry.spec("swin_window_attention")
CSWIN = registry.spec("cswin_attention")


def test_a_sequence_is_its_own_grid_or_folded():
    assert grid_of(SWIN, None, 12) == (12,)
    assert grid_of(CSWIN, None, 12) == (3, 4)
    assert grid_of(SWIN, [3, 4], 12) == (3, 4)
    with pytest.raises(UsageError, match="expected rank 2"):
        grid_of(CSWIN, (12,), 12)
    with pytest.raises(UsageError, match="of 12, expected 13 tokens"):
        grid_of(SWIN, (3, 4), 13)


def test_settings_per_axis_and_rank():
    assert per_axis(SWIN, "window", 3, 2) == (3, 3)
    assert per_axis(SWIN, "window", [3, 4], 2) == (3, 4)
    defaults = {1: (9,), 2: (3, 4), 3: (2, 2, 2)}
    assert axes_by_rank(SWIN, "window", None, defaults) == defaults
    assert axes_by_rank(CSWIN, "window", None, defaults) == {2: (3, 4)}
    assert axes_by_rank(SWIN, "window", 5, {}) == {1: (5,), 2: (5, 5), 3: (5, 5, 5)}
    assert axes_by_rank(SWIN, "window", (5, 6), {}) == {2: (5, 6)}
    with pytest.raises(UsageError, match="rank 3: observed window=\\(5, 6\\), expected 3 numbers"):
        at_rank(SWIN, "window", {2: (5, 6)}, 3)
    for value in (0, (2, 0), (2, 1.5)):
        with pytest.raises(UsageError, match="whole numbers of at least 1"):
            axes_by_rank(SWIN, "window", value, {})


def test_padding_and_cropping_keep_the_tokens():
    x = torch.randn(2, 3, 20, 5)
    padded = pad_grid(x, (4, 5), (1, 0), (6, 7))
    laid = padded.unflatten(2, (6, 7))
    assert torch.equal(laid[:, :, 1:5, :5].flatten(2, 3), x)
    assert padded.abs().sum() == x.abs().sum()
    assert torch.equal(crop_grid(pad_grid(x, (4, 5), (0, 0), (6, 7)), (6, 7), (4, 5)), x)


def test_sections_of_a_parameter_do_not_overlap():
    parameter = PerRank(2, {2: (3, 2), 1: (4,)})
    torch.nn.init.zeros_(parameter.weight)
    parameter.at(1).detach().fill_(1.0)
    assert parameter.at(2).shape == (2, 3, 2)
    assert not parameter.at(2).any()
    assert parameter.weight.sum() == 2 * 4
    with pytest.raises(UsageError, match="grid of rank 3, expected rank"):
        parameter.at(3)


def test_tables_too_large_to_be_wanted_are_left_out():
    sides = {rank: (511,) * rank for rank in (1, 2, 3)}
    assert position_tables(2, sides).shapes == {1: (511,)}
    assert position_tables(2, {2: (511, 511)}).shapes == {2: (511, 511)}  # asked for by axis


@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_depthwise_convolution_is_its_sum_over_taps(grid, causal):
    conv = DepthwiseConv(6, 3, (1, 2, 3), causal=causal).double()
    torch.nn.init.normal_(conv.bias)
    image = torch.randn(2, 6, *grid, dtype=torch.float64)
    with torch.no_grad():
        found, taps = conv(image), conv.taps.at(len(grid))
    for p in product(*map(range, grid)):
        expected = conv.bias.detach().expand(2, 6).clone()
        for offset in product((-1, 0, 1), repeat=len(grid)):
            r = tuple(a + b for a, b in zip(p, offset, strict=True))
            seen = all(0 <= a < g for a, g in zip(r, grid, strict=True)) and (r <= p or not causal)
            if seen:
                expected += taps[(slice(None), *(o + 1 for o in offset))] * image[(..., *r)]
        torch.testing.assert_close(found[(..., *p)], expected)
    assert conv.flops(math.prod(grid), len(grid)) == 2 * 6 * 3 ** len(grid) * math.prod(grid)


def test_images_of_heads_have_their_channels_in_order():
    v = torch.randn(2, 3, 20, 4)
    image = heads_to_image(v, (4, 5))
    assert torch.equal(image[:, 5, 2, 3], v[:, 1, 13, 1])
    assert torch.equal(image_to_heads(image, 3), v)


@pytest.mark.parametrize("grid", [(9,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_counted_from_the_axes(grid, causal):
    n, rank, cpu = math.prod(grid), len(grid), torch.device("cpu")
    for partition in (
        Partition.block((3,) * rank, shift=(1,) * rank),
        Partition.block((2,) * rank, halo=(1,) * rank),
        Partition.block((2,) * rank, dilation=(2,) * rank),
    ):
        mask = of_windows.visible(partition, grid, grid, n, n, cpu)
        mask = mask.tril() if causal else mask
        assert count_pairs(partition.on(grid, grid), causal=causal) == mask.sum()
    pattern = Neighborhood.of((2,) * rank, causal=(causal,) * rank)
    mask = of_neighborhoods.visible(pattern, grid, n, cpu)
    assert count_pairs(pattern.on(grid)) == mask.sum()
