"""block_topk_oracle: the mass it selects by, and that nothing selects better."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import attnbench
from attnbench.errors import UsageError
from attnbench.harness.selection_report import recall


def heads(n: int) -> torch.Tensor:
    return torch.randn(1, 2, n, 8, dtype=torch.float64)


def module(pattern: str = "NS", **hyper):
    return attnbench.build(
        "block_topk_oracle", 16, 2, pattern=pattern, backend="reference", **{"block": 4, **hyper}
    )


def weights_of(q, k, pattern):
    scores = q @ k.mT / math.sqrt(8)
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
def test_everything_is_softmax_attention(pattern):
    q, k, v = heads(14), heads(14), heads(14)
    dense = weights_of(q, k, pattern) @ v
    torch.testing.assert_close(module(pattern, share=1.0).attend(q, k, v), dense)
    torch.testing.assert_close(module(pattern, top_p=1.0).attend(q, k, v), dense)


def test_the_blocks_with_the_largest_mass_are_kept():
    q, k = heads(16), heads(16)
    kept = module(share=0.5).select(q, k).block_mask
    mass = weights_of(q, k, "NS").unflatten(-1, (4, 4)).sum(-1).unflatten(-2, (4, 4)).sum(-2)
    assert (kept.sum(-1) == 2).all()
    best = max(itertools.combinations(range(4), 2), key=lambda pair: float(mass[0, 1, 2, list(pair)].sum()))
    assert set(kept[0, 1, 2].nonzero().flatten().tolist()) == set(best)
    torch.testing.assert_close((mass * kept).sum(-1), mass.sort(-1).values[..., -2:].sum(-1))


def test_recall_is_the_selected_share_of_the_mass():
    q, k, v = heads(16), heads(16), heads(16)
    mixer = module(share=0.5)
    selection = mixer.select(q, k)
    weights = weights_of(q, k, "NS")
    dense_lse = (q @ k.mT / math.sqrt(8)).logsumexp(-1)
    _, lse = mixer.consume(q, k, v, selection)
    torch.testing.assert_close((lse - dense_lse).exp(), (weights * selection.to_dense_mask()).sum(-1))
    assert recall(lse, dense_lse)["recall_mean"] == pytest.approx(
        float((weights * selection.to_dense_mask()).sum(-1).mean())
    )


def test_blocks_of_one_token_are_the_token_oracle():
    q, k, v = heads(12), heads(12), heads(12)
    blockwise = module(block=1, share=0.25).attend(q, k, v)
    torch.testing.assert_close(
        blockwise, attnbench.attention(q, k, v, "topk_oracle", "NS", "reference", top_k=3)
    )


def test_the_diagonal_is_always_kept_under_causality():
    q, k = heads(20), heads(20)
    kept = module("CS", share=0.01).select(q, k).block_mask
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert (kept.sum(-1) == 1).all()


def test_wrong_shares_are_refused():
    with pytest.raises(UsageError, match="shares above 0"):
        module(share=0.0)
