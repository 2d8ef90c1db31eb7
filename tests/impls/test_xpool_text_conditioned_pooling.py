"""X-Pool: the cases of its definition that hold exactly, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnbench import build

C, N, F = 16, 5, 7


@pytest.fixture
def layer() -> Any:
    module = build("xpool_text_conditioned_pooling", C, 2, pattern="NC", backend="torch").double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def texts() -> Tensor:
    return torch.randn(3, N, C, dtype=torch.float64)


@pytest.fixture
def frames() -> Tensor:
    return torch.randn(3, F, C, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, F])
def test_with_equal_frames_the_text_does_not_matter(
    layer: Any, texts: Tensor, frames: Tensor, count: int
) -> None:
    y = layer(texts, frames[:, :1].expand(-1, count, -1))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(y, layer(torch.randn_like(texts), frames[:, :1]))


def test_the_order_of_frames_does_not_matter(layer: Any, texts: Tensor, frames: Tensor) -> None:
    torch.testing.assert_close(layer(texts, frames[:, torch.randperm(F)]), layer(texts, frames))


def test_all_pairs_are_single_calls(layer: Any, texts: Tensor, frames: Tensor) -> None:
    y = layer.all_pairs(texts[0], frames)
    for video in range(3):
        for text in range(N):
            single = layer(texts[:1, text : text + 1], frames[video : video + 1])
            torch.testing.assert_close(y[video, text], single[0, 0])


def test_it_starts_as_plain_dot_product_pooling(texts: Tensor, frames: Tensor) -> None:
    layer: Any = build("xpool_text_conditioned_pooling", C, 1, pattern="NC", backend="torch").double()
    layer.norm_in = layer.norm_pooled = layer.norm_out = nn.Identity()
    pooled = (texts @ frames.mT / C**0.5).softmax(-1) @ frames
    torch.testing.assert_close(layer(texts, frames), 2 * pooled)


def test_it_is_its_definition_and_has_no_residual_from_the_text(
    layer: Any, texts: Tensor, frames: Tensor
) -> None:
    x, c = layer.norm_in(texts), layer.norm_in(frames)
    q, k, v = layer.q_proj(x).chunk(2, -1), layer.k_proj(c).chunk(2, -1), layer.v_proj(c).chunk(2, -1)
    heads = [(q[h] @ k[h].mT / (C / 2) ** 0.5).softmax(-1) @ v[h] for h in range(2)]
    pooled = torch.cat(heads, -1)
    u = layer.norm_pooled(layer.out_proj(pooled))
    torch.testing.assert_close(layer(texts, frames), layer.norm_out(u + layer.last(u)))


def test_the_first_text_reads_the_last_frame(layer: Any, texts: Tensor, frames: Tensor) -> None:
    y = layer(texts, frames)[:, 0]
    frames[:, -1, 0] += 3.0  # not all channels alike: the layer norm would remove that
    assert (layer(texts, frames)[:, 0] - y).abs().amax(-1).min() > 1e-3
