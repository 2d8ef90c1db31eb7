"""moba: the routing of the definition, loop by loop, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.sparse import moba as module_under_test

SIZES = {"NS": (14, 14), "CS": (14, 14), "NC": (5, 14), "CC": (14, 6)}


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(1, h, n, 8, dtype=torch.float64)


def run(q: Tensor, k: Tensor, v: Tensor, pattern: str, backend: str = "reference", **hyper: int) -> Tensor:
    return attnbench.attention(q, k, v, "moba", pattern, backend, **{"block": 4, "top_k": 2, **hyper})


def row(q: Tensor, k: Tensor, v: Tensor, i: int, pattern: str, size: int, kept: int) -> Tensor:
    """Output of query i of one head by the definition."""
    blocks = [range(s, min(s + size, len(k))) for s in range(0, len(k), size)]
    gate = {}
    for number, tokens in enumerate(blocks):
        gate[number] = float(q[i] @ k[list(tokens)].mean(0))
        if pattern == "CS" and number > i // size:
            gate[number] = -math.inf
        if pattern in ("NS", "CS") and number == i // size:
            gate[number] = math.inf
    order = sorted((n for n in gate if gate[n] > -math.inf), key=lambda n: (-gate[n], n))
    keys = [j for n in order[:kept] for j in blocks[n] if pattern != "CS" or j <= i]
    return (q[i] @ k[keys].T / math.sqrt(q.shape[-1])).softmax(-1) @ v[keys]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_rows_are_those_of_the_definition(pattern, kept, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    o = run(q, k, v, pattern, backend, top_k=kept)
    for h in range(2):
        expected = torch.stack([row(q[0, h], k[0, h], v[0, h], i, pattern, 4, kept) for i in range(n)])
        torch.testing.assert_close(o[0, h], expected)


def test_every_query_head_chooses_for_itself_among_shared_keys():
    q, k, v = heads(14, 4), heads(14), heads(14)
    expected = run(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), "CS")
    torch.testing.assert_close(run(q, k, v, "CS"), expected)


@pytest.mark.parametrize("hyper", [{"top_k": 4}, {"block": 14, "top_k": 1}])
@pytest.mark.parametrize("pattern", SIZES)
def test_all_blocks_are_softmax_attention(pattern, hyper):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    torch.testing.assert_close(
        run(q, k, v, pattern, **hyper), attnbench.attention(q, k, v, "softmax", pattern, "reference")
    )


def test_special_cases():
    q, k, v = heads(14), heads(14), heads(14)
    dense = attnbench.attention(q, k, v, "softmax", "CS", "reference")
    own_block = run(q, k, v, "CS", top_k=1)
    for start in range(0, 14, 4):
        part = slice(start, start + 4)
        alone = attnbench.attention(q[:, :, part], k[:, :, part], v[:, :, part], "softmax", "CS", "reference")
        torch.testing.assert_close(own_block[:, :, part], alone)
    torch.testing.assert_close(run(q, k, v, "CS")[:, :, :4], dense[:, :, :4])
    tokens = run(q, k, v, "NC", block=1, top_k=3)
    torch.testing.assert_close(
        tokens, attnbench.attention(q, k, v, "topk_oracle", "NC", "reference", top_k=3)
    )


def test_the_choice_has_no_gradient():
    q, k, v = heads(12), heads(12), heads(12)
    mixer = attnbench.build("moba", 16, 2, pattern="CS", backend="reference", block=4, top_k=2)
    selection = mixer.select(q, k)
    given = [x.requires_grad_() for x in (q, k, v)]
    free = torch.autograd.grad(mixer.attend(*given).square().sum(), given)
    frozen = torch.autograd.grad(mixer.attend(*given, selection=selection).square().sum(), given)
    for a, b in zip(free, frozen, strict=True):
        assert torch.equal(a, b)


def test_rows_are_routed_some_at_a_time(monkeypatch):
    q, k = heads(14), heads(14)
    mixer = attnbench.build("moba", 16, 2, pattern="CS", block=4, top_k=2)
    whole = mixer.select(q, k)
    monkeypatch.setattr(module_under_test, "GATES_AT_ONCE", 24)
    some = mixer.select(q, k)
    assert torch.equal(whole.indices, some.indices)
    assert torch.equal(whole.counts, some.counts)


def test_padded_keys_do_not_route():
    q, k, v = heads(14), heads(14), heads(14)
    padded = torch.zeros(1, 14, dtype=torch.bool)
    padded[:, [1, 4, 5, 6, 7]] = True  # one of the first block, all of the second
    kept = attnbench.build("moba", 16, 2, pattern="NC", block=4, top_k=3).select(
        q, k, key_padding_mask=padded
    )
    assert not kept.block_mask[..., 1].any()
    assert kept.block_mask[..., [0, 2, 3]].all()
    o = run(q, k, v, "NC", key_padding_mask=padded, top_k=3)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(padded[:, None, None], -math.inf)
    torch.testing.assert_close(o, scores.softmax(-1) @ v)


def test_costs_and_refusals():
    mixer = attnbench.build("moba", 16, 2, pattern="CS", block=4, top_k=2)
    pairs = (1 + 2 + 3 + 4) + 4 * 4 + (1 + 2 + 3 + 4) + 4 * 2 + (1 + 2)
    assert mixer.flops(10, 10) == 2 * 8 * (2 * 10 * 3 + 4 * pairs)
    for hyper in ({"block": 0}, {"top_k": 0}):
        with pytest.raises(UsageError, match="expected positive numbers"):
            attnbench.build("moba", 16, 2, **hyper)


@pytest.mark.parametrize("pattern", SIZES)
def test_triton_agrees(pattern):
    n, m = {"NC": (5, 9), "CC": (9, 6)}.get(pattern, (9, 9))
    given = [heads(length, 1).float().requires_grad_() for length in (n, m, m)]
    results = []
    for backend in ("reference", "triton"):
        o = run(*given, pattern, backend, block=5)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
