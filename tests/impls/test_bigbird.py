"""bigbird's blocks against its rules row by row, and softmax attention over them."""

from __future__ import annotations

import math

import pytest
import torch

import attnbench
from attnbench.errors import UsageError


def module(pattern: str, **hyper):
    return attnbench.build("bigbird", 16, 2, pattern=pattern, backend="reference", block=4, **hyper).double()


def blocks(pattern: str, n: int, **hyper) -> torch.Tensor:
    """(H, T, T) bool, what select keeps."""
    return module(pattern, **hyper).selection(n, n, torch.device("cpu")).block_mask[0]


@pytest.mark.parametrize("r", [0, 1, 2])
def test_rows_of_blocks_are_those_of_the_definition(r):
    mask = blocks("NS", 40, num_random=r)
    t = mask.shape[-1]
    for head in mask:
        assert head[0].all()
        assert head[-1].all()
        for i in range(1, t - 1):
            fixed = {0, t - 1, i - 1, i, i + 1}
            kept = set(head[i].nonzero().flatten().tolist())
            assert fixed <= kept
            assert len(kept) == min(t, len(fixed) + r)


def test_few_blocks_are_dense_and_no_random_ones_are_symmetric():
    assert blocks("NS", 20, num_random=1).all()  # T = 5 = 4 + r
    mask = blocks("NS", 60, num_random=0)
    assert torch.equal(mask, mask.mT)


def test_heads_and_rows_draw_apart_and_a_seed_fixes_the_draw():
    mask = blocks("NS", 80, num_random=2)
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask, blocks("NS", 80, num_random=2))
    assert not torch.equal(mask, blocks("NS", 80, num_random=2, seed=1))


def test_random_blocks_are_spread_over_the_row():
    found = torch.zeros(40)
    for seed in range(60):
        found += blocks("NS", 160, num_random=1, seed=seed)[:, 20].sum(0)
    free = [j for j in range(1, 39) if abs(j - 20) > 1]
    drawn = found[free]
    assert drawn.sum() == 120
    assert (drawn > 0).sum() > 25  # 120 uniform draws leave about one of 35 unseen


def test_causal_rows_do_not_depend_on_where_the_sequence_ends():
    whole, prefix = blocks("CS", 80, num_random=1), blocks("CS", 48, num_random=1)
    assert torch.equal(whole[:, :12, :12], prefix)
    i, j = torch.arange(20)[:, None], torch.arange(20)
    assert not whole[:, j > i].any()
    assert (whole.sum(-1)[:, 4:] == 4).all()  # the first, I − 1, I and one random


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_output_is_softmax_attention_over_the_blocks(pattern):
    n = 38
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64) for _ in range(3))
    mixer = module(pattern, num_random=1)
    mask = blocks(pattern, n, num_random=1).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :n, :n]
    if pattern == "CS":
        mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(mixer.attend(q, k, v), scores.softmax(-1) @ v)
    assert mixer.flops(n, n) == 4 * 8 * int(mask.sum())


def test_global_rows_are_dense_rows():
    q, k, v = (torch.randn(1, 2, 60, 8, dtype=torch.float64) for _ in range(3))
    sparse, dense = module("NS", num_random=0).attend(q, k, v), (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    for rows in (slice(0, 4), slice(56, 60)):
        torch.testing.assert_close(sparse[:, :, rows], dense[:, :, rows])
    assert not torch.allclose(sparse, dense)


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match="expected at least 1 and 0"):
        attnbench.build("bigbird", 16, 2, block=0)
