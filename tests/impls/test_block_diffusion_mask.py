"""block_diffusion_mask against its three rules pair by pair, and what they imply for blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def module(n_heads: int = 2, backend: str = "reference", **hyper):
    return attnbench.build("block_diffusion_mask", 8 * n_heads, n_heads, backend=backend, **hyper)


def heads(n: int) -> Tensor:
    return torch.randn(1, 2, n, 8, dtype=torch.float64)


def sees_in_training(i: int, j: int, n: int, block: int) -> bool:
    half = math.ceil(n / 2)
    bi, bj = (i % half) // block, (j % half) // block
    if i < half:
        return bj == bi if j < half else bj < bi
    return j >= half and bj <= bi


def mask_of(n: int, m: int, block: int, mode: str) -> Tensor:
    if mode == "train":
        return torch.tensor([[sees_in_training(i, j, n, block) for j in range(m)] for i in range(n)])
    return torch.tensor([[j // block <= (i + m - n) // block for j in range(m)] for i in range(n)])


CALLS = [
    ("train", 24, 24, 4),
    ("train", 13, 13, 4),
    ("train", 1, 1, 4),
    ("train", 10, 10, 32),
    ("infer", 12, 12, 4),
    ("infer", 5, 14, 4),
    ("infer", 9, 4, 3),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("mode", "n", "m", "block"), CALLS)
def test_equals_the_explicit_mask(mode, n, m, block, backend):
    q, k, v = heads(n), heads(m), heads(m)
    mask = mask_of(n, m, block, mode)
    ours = module(backend=backend, mode=mode, block=block)
    assert torch.equal(ours.visible(n, m, torch.device("cpu")), mask)
    assert ours.pairs(n, m) == mask.sum()
    assert ours.flops(n, m) == 4 * 2 * 8 * int(mask.sum())
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v  # a query before all keys sees none
    torch.testing.assert_close(ours.attend(q, k, v), expected)


def test_pairs_of_whole_blocks():
    assert module(block=4).pairs(64, 64) == 32 * (32 + 4)
    assert module(block=4, mode="infer").pairs(32, 32) == 32 * (32 + 4) // 2
    assert module(block=32).pairs(8192, 8192) == 4096 * (4096 + 32)


def test_equal_copies_give_equal_halves_and_the_clean_half_stands_alone():
    q, k, v = heads(12), heads(12), heads(12)
    doubled = [torch.cat((x, x), 2) for x in (q, k, v)]
    o = module(block=4).attend(*doubled)
    alone = module(block=4, mode="infer").attend(q, k, v)
    torch.testing.assert_close(o[:, :, :12], o[:, :, 12:])
    torch.testing.assert_close(o[:, :, 12:], alone)
    doubled[1][:, :, :12], doubled[2][:, :, :12] = heads(12), heads(12)
    torch.testing.assert_close(module(block=4).attend(*doubled)[:, :, 12:], alone)


def test_blocks_of_one_and_of_everything():
    q, k, v = heads(16), heads(16), heads(16)
    halves = [[x[:, :, half] for x in (q, k, v)] for half in (slice(0, 8), slice(8, 16))]
    single = module(block=1).attend(q, k, v)
    causal = attnbench.attention(*halves[1], "softmax", "CS", "reference")
    torch.testing.assert_close(single[:, :, 8:], causal)
    torch.testing.assert_close(single[:, :, 0], v[:, :, 0])
    whole = module(block=8).attend(q, k, v)
    for half, found in zip(halves, whole.split(8, 2), strict=True):
        torch.testing.assert_close(found, attnbench.attention(*half, "softmax", "NS", "reference"))


def test_a_token_reaches_only_the_blocks_that_may_read_it():
    q, k, v = heads(24), heads(24), heads(24)
    before = module(block=4).attend(q, k, v)

    def moved(token: int) -> list[int]:
        other = v.clone()
        other[:, :, token] += 1.0
        changed = (module(block=4).attend(q, k, other) - before).abs().amax((0, 1, 3)) > 0
        return changed.nonzero().flatten().tolist()

    assert moved(5) == [4, 5, 6, 7]  # noisy block 1
    assert moved(12 + 5) == [8, 9, 10, 11, *range(16, 24)]  # clean block 1: noisy block 2, clean from 1 on


def test_the_last_queries_of_a_cache_are_the_last_rows():
    q, k, v = heads(14), heads(14), heads(14)
    whole = module(block=4, mode="infer").attend(q, k, v)
    torch.testing.assert_close(module(block=4, mode="infer").attend(q[:, :, 9:], k, v), whole[:, :, 9:])


def test_wrong_calls_are_refused():
    with pytest.raises(UsageError, match="positive size"):
        module(block=0)
    with pytest.raises(UsageError, match="mode='both'"):
        module(mode="both")
    with pytest.raises(UsageError, match="N = 5, M = 8, expected N = M"):
        module().attend(heads(5), heads(8), heads(8))


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_triton_agrees(mode):
    given = [heads(36).float().requires_grad_() for _ in range(3)]
    results = []
    for backend in ("reference", "triton"):
        o = module(backend=backend, mode=mode, block=4).attend(*given)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
