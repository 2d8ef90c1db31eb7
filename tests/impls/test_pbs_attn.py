"""pbs_attn: the order inside segments, the blocks that are kept, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def heads(n: int) -> Tensor:
    return torch.randn(1, 2, n, 8, dtype=torch.float64)


def module(pattern: str = "CS", **hyper):
    options = {"block": 4, "segment": 8, "top_p": 0.5, **hyper}
    return attnbench.build("pbs_attn", 16, 2, pattern=pattern, backend="reference", **options)


def dense(q: Tensor, k: Tensor, v: Tensor, pattern: str, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / math.sqrt(8)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def test_keys_are_sorted_inside_complete_segments_by_the_last_queries():
    q, k = heads(21), heads(21)
    order = module().select(q, k).order
    weights = (q[:, :, -4:] @ k[:, :, :16].mT / math.sqrt(8)).softmax(-1).mean(-2)
    for h in range(2):
        for first in (0, 8):
            inside = order[0, h, first : first + 8]
            assert sorted(inside.tolist()) == list(range(first, first + 8))
            assert (weights[0, h, inside].diff() <= 0).all()
        assert order[0, h, 16:].tolist() == list(range(16, 21))


def test_own_segment_and_first_token_are_always_kept():
    q, k = heads(32), heads(32)
    found = module(top_p=1e-9).select(q, k)
    mask = found.to_dense_mask()
    i, j = torch.arange(32)[:, None] // 8, torch.arange(32)[None, :] // 8
    assert mask[:, :, i == j].all()
    assert mask[..., 0].all()
    blocks = found.blocks.block_mask[0, 0]
    for row in range(2, 8):  # one block at least, that reaches any mass, besides the forced ones
        assert 3 <= blocks[row].sum() <= 4


@pytest.mark.parametrize(
    ("pattern", "hyper"), [("CS", {"top_p": 1.0}), ("CS", {"segment": 64}), ("NS", {"top_p": 1.0})]
)
def test_everything_is_softmax_attention(pattern, hyper):
    q, k, v = heads(27), heads(27), heads(27)
    torch.testing.assert_close(module(pattern, **hyper).attend(q, k, v), dense(q, k, v, pattern))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_output_is_softmax_attention_over_what_is_kept(pattern):
    q, k, v = heads(30), heads(30), heads(30)
    mixer = module(pattern)
    mask = mixer.select(q, k).to_dense_mask()
    assert not mask.all()
    torch.testing.assert_close(mixer.attend(q, k, v), dense(q, k, v, pattern, mask))


def test_segments_of_one_block_select_as_if_nothing_were_permuted():
    q, k = heads(32), heads(32)
    permuted = module(segment=4).select(q, k)
    pooled = (q.unflatten(2, (8, 4)).mean(3) @ k.unflatten(2, (8, 4)).mean(3).mT) / math.sqrt(8)
    earlier = torch.ones(8, 8, dtype=torch.bool).tril(-1)
    weights = pooled.masked_fill(~earlier, -1e300).softmax(-1)
    for h in range(2):
        for row in range(2, 8):
            order = weights[0, h, row, :row].argsort(descending=True)
            mass, kept = 0.0, {0, row}
            for block in order.tolist():
                kept.add(block)
                mass += float(weights[0, h, row, block])
                if mass >= 0.5:
                    break
            assert set(permuted.blocks.block_mask[0, h, row].nonzero().flatten().tolist()) == kept


def test_density_counts_pairs_in_the_original_order():
    q, k = heads(30), heads(30)
    found = module().select(q, k)
    allowed = torch.ones(30, 30, dtype=torch.bool).tril()
    expected = (found.to_dense_mask() & allowed).sum() / (2 * allowed.sum())
    assert float(found.density(True)) == pytest.approx(float(expected))


def test_a_segment_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(UsageError, match="multiple of the block"):
        module(segment=6)
