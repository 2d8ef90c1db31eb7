"""Spatial-reduction attention: the cases of its definition that hold exactly, in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench import build

C, H = 8, 2
GRIDS = [(11,), (4, 6), (5, 7), (3, 4, 5)]


def _layer(pattern: str = "NS", **hyper: Any) -> Any:
    return build("spatial_reduction_attention", C, H, pattern=pattern, backend="torch", **hyper).double()


def _tokens(grid: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.randn(batch, math.prod(grid), C, dtype=torch.float64)


def _dense(layer: Any, x: Tensor, coarse: Tensor) -> Any:
    q, (k, v) = layer.q_proj(x), layer.kv_proj(coarse).chunk(2, -1)
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (q, k, v))
    return layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _channels_first(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    return x.reshape(x.shape[0], *grid, -1).movedim(-1, 1)


def test_without_reduction_it_is_dense_attention() -> None:
    layer, x = _layer(reduction=1), _tokens((4, 6))
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"q_proj", "kv_proj", "out_proj"}
    torch.testing.assert_close(layer(x, grid=(4, 6)), _dense(layer, x, x))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_keys_are_those_of_a_strided_convolution(grid: tuple[int, ...]) -> None:
    layer, x = _layer(reduction=2), _tokens(grid)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    ends = [end for size in reversed(grid) for end in (0, -size % 2)]
    weight = layer.kernel[(0,) * (3 - len(grid))].movedim((-1, -2), (0, 1))
    made = convolve(F.pad(_channels_first(x, grid), ends), weight, layer.kernel_bias, stride=2)
    want = _dense(layer, x, layer.norm(made.flatten(2).mT))
    torch.testing.assert_close(layer(x, grid=grid), want)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_linear_variant_pools_adaptively(grid: tuple[int, ...]) -> None:
    layer, x = _layer(variant="linear", pool=3), _tokens(grid)  # bins overlap where 3 does not divide
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(grid) - 1]
    pooled = pool(_channels_first(x, grid), 3).flatten(2).mT
    coarse = F.gelu(layer.norm(pooled @ layer.kernel + layer.kernel_bias))
    torch.testing.assert_close(layer(x, grid=grid), _dense(layer, x, coarse))


def test_an_averaging_kernel_gives_the_keys_of_mean_tokens() -> None:
    layer, x, grid = _layer(reduction=2, kernel_rank=2), _tokens((4, 6)), (4, 6)
    with torch.no_grad():
        layer.kernel.copy_(torch.eye(C).expand(2, 2, C, C) / 4)
        layer.kernel_bias.zero_()
    layer.norm = nn.Identity()
    means = F.avg_pool2d(_channels_first(x, grid), 2).flatten(2).mT
    torch.testing.assert_close(layer(x, grid=grid), _dense(layer, x, means))


def test_without_values_every_token_reads_their_bias() -> None:
    layer, grid = _layer(), (5, 7)
    with torch.no_grad():
        layer.kv_proj.weight[C:] = 0
    y = layer(_tokens(grid), grid=grid)
    want = layer.out_proj(layer.kv_proj.bias[C:])
    torch.testing.assert_close(y, want.expand_as(y))


def test_in_cross_attention_the_context_is_reduced_on_its_own_grid() -> None:
    layer, x, context = _layer("NC", reduction=2), _tokens((3, 3)), _tokens((4, 6))
    coarse, hidden = layer.reduce(context, (4, 6))
    assert coarse.shape == (2, 6, C)
    assert hidden is None
    torch.testing.assert_close(layer(x, context, grid=(3, 3), grid_kv=(4, 6)), _dense(layer, x, coarse))


@pytest.mark.parametrize("variant", ["conv", "linear"])
def test_padded_tokens_count_as_the_end_of_the_grid(variant: str) -> None:
    layer, x = _layer(variant=variant, reduction=2, pool=3), _tokens((11,))
    hidden = (torch.arange(11) >= 7).expand(2, -1)
    y = layer(x, key_padding_mask=hidden)
    torch.testing.assert_close(
        y[:, :7], layer(torch.where(hidden[..., None], 9.0, x), key_padding_mask=hidden)[:, :7]
    )
    if variant == "conv":
        torch.testing.assert_close(y[:, :7], layer(x[:, :7]))
