"""topk_oracle against a loop over its rows, and what makes it an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

SIZES = {"NS": (12, 12), "CS": (12, 12), "NC": (5, 12), "CC": (12, 5)}


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(2, 2, n, d, dtype=torch.float64)


def scores_of(q: Tensor, k: Tensor, pattern: str) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def row(scores: Tensor, v: Tensor, kept: int) -> Tensor:
    """One row by hand: the largest visible scores, ties to the lower index."""
    visible = [j for j in range(len(scores)) if scores[j] > -math.inf]
    best = sorted(visible, key=lambda j: (-float(scores[j]), j))[:kept]
    return scores[best].softmax(-1) @ v[best]


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_rows_are_those_of_the_definition(pattern, kept):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m, 6)
    scores = scores_of(q, k, pattern)
    for backend in ("reference", "torch"):
        o = attnbench.attention(q, k, v, "topk_oracle", pattern, backend, top_k=kept)
        for b, h, i in ((0, 0, 0), (1, 1, n - 1), (0, 1, n // 2)):
            torch.testing.assert_close(o[b, h, i], row(scores[b, h, i], v[b, h], kept))


def test_ties_go_to_the_lower_key():
    q, k, v = torch.ones(1, 2, 1, 8), torch.ones(1, 2, 6, 8), heads(6)[:1].float()
    o = attnbench.attention(q, k, v, "topk_oracle", "NC", "reference", top_k=1)
    torch.testing.assert_close(o[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("hyper", [{"top_k": 12}, {"share": 1.0}, {"top_p": 1.0}])
def test_everything_is_softmax_attention(pattern, hyper):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    dense = scores_of(q, k, pattern).softmax(-1) @ v
    torch.testing.assert_close(
        attnbench.attention(q, k, v, "topk_oracle", pattern, "reference", **hyper), dense
    )


def test_mass_is_the_smallest_set_that_reaches_it():
    q, k = heads(9), heads(9)
    module = attnbench.build("topk_oracle", 16, 2, top_p=0.6)
    kept = module.select(q, k).to_dense_mask()
    weights = scores_of(q, k, "NS").softmax(-1)
    mass = (weights * kept).sum(-1)
    assert (mass >= 0.6 - 1e-12).all()
    smallest = weights.masked_fill(~kept, 2.0).amin(-1)
    assert (mass - smallest < 0.6).all()
    assert (weights.masked_fill(kept, 0.0).amax(-1) <= smallest).all()


def test_no_other_selection_of_that_size_has_more_mass():
    q, k = heads(9), heads(9)
    weights = scores_of(q, k, "NS").softmax(-1)
    kept = attnbench.build("topk_oracle", 16, 2, top_k=4).select(q, k).to_dense_mask()
    torch.testing.assert_close((weights * kept).sum(-1), weights.sort(-1).values[..., -4:].sum(-1))


def test_the_gradient_of_a_key_that_is_not_kept_is_zero():
    q, k, v = heads(1)[:1], heads(8)[:1].requires_grad_(), heads(8)[:1]
    module = attnbench.build("topk_oracle", 16, 2, pattern="NC", top_k=3, backend="reference")
    kept = module.select(q, k).to_dense_mask()[0, :, 0]
    module.attend(q, k, v).square().sum().backward()
    assert (k.grad[0][~kept] == 0).all()
    assert (k.grad[0][kept] != 0).any(-1).all()


def test_costs_and_refusals():
    module = attnbench.build("topk_oracle", 16, 2, pattern="CS", top_k=3)
    assert module.flops(4, 4) == 2 * 2 * 8 * (16 + 2 * (1 + 2 + 3 + 3))
    for hyper in ({"top_k": 0}, {"share": 1.5}, {"top_p": 0.0}):
        with pytest.raises(UsageError, match="expected above 0"):
            attnbench.build("topk_oracle", 16, 2, **hyper)
