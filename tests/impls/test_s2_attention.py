"""s2_attention's blocks against its rules, and the stripes that heads share out."""

from __future__ import annotations

import math

import pytest
import torch

import attnbench
from attnbench.errors import UsageError


def module(pattern: str = "CS", heads: int = 2, **hyper):
    return attnbench.build(
        "s2_attention", 8 * heads, heads, pattern=pattern, backend="reference", block=4, **hyper
    )


def blocks(n: int, m: int | None = None, **options) -> torch.Tensor:
    """(H, Tq, Tk) bool, what select keeps."""
    return module(**options).selection(n, n if m is None else m, torch.device("cpu")).block_mask[0]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("local", "stride", "offset"), [(1, 2, 0), (2, 5, 1), (3, 8, 0)])
def test_causal_rule(heads, local, stride, offset):
    mask = blocks(40, heads=heads, local_blocks=local, stride=stride, offset=offset)
    step = max(1, stride // heads)
    for h in range(heads):
        for i in range(10):
            for j in range(10):
                kept = j <= i and (i - j < local or (j + h * step + offset) % stride == 0)
                assert mask[h, i, j] == kept, (h, i, j)


@pytest.mark.parametrize("hetero", [False, True])
def test_noncausal_rule(hetero):
    mask = blocks(40, pattern="NS", local_blocks=2, stride=3, hetero_ns=hetero)
    for h in range(2):
        for i in range(10):
            for j in range(10):
                beyond = max(0, i - j - 2 + 1) + max(0, j - i - 2 + 1)
                shift = h * 1 if hetero else 0
                assert mask[h, i, j] == (beyond == 0 or (beyond + shift) % 3 == 0), (h, i, j)


def test_stripes_of_all_heads_cover_the_context_when_the_stride_is_short_enough():
    mask = blocks(60, heads=4, local_blocks=1, stride=4).any(0)
    assert torch.equal(mask, torch.ones(15, 15, dtype=torch.bool).tril())
    wide = blocks(60, heads=2, local_blocks=1, stride=8).any(0)
    assert not torch.equal(wide, torch.ones(15, 15, dtype=torch.bool).tril())


def test_a_block_that_left_the_window_unselected_never_comes_back():
    for head in blocks(60, local_blocks=2, stride=4):
        for j in range(15):
            column = head[j:, j].int()
            assert (column[3:].diff() <= 0).all()


def test_dense_special_cases():
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    dense = attnbench.attention(q, k, v, "softmax", "CS", "reference")
    for hyper in ({"stride": 1}, {"local_blocks": 8}, {"dense_heads": 2, "stride": 5, "local_blocks": 1}):
        torch.testing.assert_close(module(**hyper).attend(q, k, v), dense)
    one = module(dense_heads=1, stride=5, local_blocks=1).attend(q, k, v)
    torch.testing.assert_close(one[:, 1], dense[:, 1])
    assert not torch.allclose(one[:, 0], dense[:, 0])


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC", "CC"])
def test_output_is_softmax_attention_over_the_blocks(pattern):
    n, m = (26, 26) if pattern in ("NS", "CS") else (10, 26)
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (n, m, m))
    mixer = module(pattern, local_blocks=1, stride=3)
    mask = mixer.select(q, k).to_dense_mask()
    if pattern == "CS":
        mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(mixer.attend(q, k, v), scores.softmax(-1) @ v)
    assert mixer.flops(n, m) == 4 * 8 * int(mask.sum())


def test_grouped_heads_share_a_stripe():
    mixer = attnbench.build(
        "s2_attention", 32, 4, pattern="CS", num_kv_heads=2, block=4, local_blocks=1, stride=2
    )
    assert mixer.selection(32, 32, torch.device("cpu")).counts.shape[1] == 2


def test_a_stripe_beyond_the_last_block_keeps_that_one():
    mask = blocks(8, 8, pattern="NC", heads=4, stride=8, local_blocks=1)
    assert mask.any(-1).all()


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match="at most 2 dense heads"):
        module(dense_heads=3)
