"""Segment means: sizes where the count does not divide the length, and padding as if it were not there."""

from __future__ import annotations

import pytest
import torch

from attnbench.impls.linear._segments import segment_means


@pytest.mark.parametrize(
    ("n", "count", "sizes"), [(12, 4, [3, 3, 3, 3]), (11, 4, [2, 3, 3, 3]), (3, 3, [1, 1, 1])]
)
def test_first_segments_are_the_shorter_ones(n: int, count: int, sizes: list[int]) -> None:
    u = torch.randn(2, 3, n, 5, dtype=torch.float64)
    means, live = segment_means(u, count)
    expected = torch.stack([part.mean(2) for part in u.split(sizes, 2)], 2)
    torch.testing.assert_close(means, expected)
    assert live is None


@pytest.mark.parametrize("dropped", [[], [0, 1], [10, 11, 12], [0, 3, 4, 9], list(range(1, 13))])
def test_padding_equals_dropping_the_tokens(dropped: list[int]) -> None:
    u = torch.randn(1, 2, 13, 5, dtype=torch.float64)
    padded = torch.zeros(1, 13, dtype=torch.bool)
    padded[:, dropped] = True
    kept = u[:, :, ~padded[0]]
    u = u.masked_fill(padded[:, None, :, None], float("nan"))
    means, live = segment_means(u, 4, padded)
    count = min(4, kept.shape[2])
    assert live is not None
    assert int(live.sum()) == count
    torch.testing.assert_close(means[:, :, live[0]], segment_means(kept, count)[0])
    assert (means[:, :, ~live[0]] == 0).all()


def test_batch_elements_with_different_padding_are_independent() -> None:
    u = torch.randn(2, 1, 9, 3, dtype=torch.float64)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, 5:] = True
    means, live = segment_means(u, 3, padded)
    torch.testing.assert_close(means[:1], segment_means(u[:1, :, :5], 3)[0])
    torch.testing.assert_close(means[1:], segment_means(u[1:], 3)[0])
    assert live is not None
    assert live.all()
