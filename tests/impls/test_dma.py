"""dma: biases, thresholds and kept keys by loops, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.sparse import dma as module_under_test
from attnbench.impls.sparse._running_kth import running_kth_largest

SIZES = {"NS": (11, 11), "CS": (11, 11), "NC": (5, 11), "CC": (11, 6)}


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(1, h, n, 8, dtype=torch.float64)


def module(pattern: str = "CS", backend: str = "reference", *, h: int = 2, kv: int = 2, **hyper):
    options = {"top_w": 3, **hyper}
    mixer = attnbench.build(
        "dma", 8 * h, h, pattern=pattern, backend=backend, num_kv_heads=kv, **options
    ).double()
    torch.nn.init.normal_(mixer.amplitude)  # biases of the size of the scores
    return mixer


def biases(mixer, v: Tensor) -> Tensor:
    """A·softplus(W v) of one batch entry, key by key: (Hkv, M)."""
    columns = [mixer.importance.weight @ v[0, :, j].flatten() for j in range(v.shape[2])]
    return torch.stack([mixer.amplitude * (1 + x.exp()).log() for x in columns], -1).detach()


def rows(q: Tensor, k: Tensor, v: Tensor, mixer, pattern: str, kept: int) -> Tensor:
    """The output by the definition."""
    delta = biases(mixer, v)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        d = delta[h // group]
        for i in range(q.shape[2]):
            seen = range(i + 1) if pattern == "CS" else range(k.shape[2])
            best = sorted(seen, key=lambda j: -float(d[j]))[:kept]
            z = k[0, h // group, best] @ q[0, h, i] / math.sqrt(8) + d[best]
            out[0, h, i] = z.softmax(-1) @ v[0, h // group, best]
    return out


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("kv", [2, 1])
def test_rows_are_those_of_the_definition(pattern, kv, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m, kv), heads(m, kv)
    mixer = module(pattern, backend, kv=kv)
    torch.testing.assert_close(mixer.attend(q, k, v), rows(q, k, v, mixer, pattern, 3))


@pytest.mark.parametrize("pattern", SIZES)
def test_all_keys_are_softmax_attention_with_a_bias(pattern):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    mixer = module(pattern, share=1.0)
    scores = q @ k.mT / math.sqrt(8) + biases(mixer, v).unsqueeze(-2)
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(mixer.attend(q, k, v), scores.softmax(-1) @ v)


def test_equal_biases_are_all_kept_under_causality():
    q, k, v = heads(11), heads(11), heads(11)
    mixer = module()
    torch.nn.init.zeros_(mixer.amplitude)
    torch.testing.assert_close(
        mixer.attend(q, k, v), attnbench.attention(q, k, v, "softmax", "CS", "reference")
    )


def test_queries_share_their_keys_and_a_dropped_key_never_returns():
    v = heads(40)
    delta = module().biases(v).detach()
    shared = module("NC").shared_keys(delta, 7)
    assert shared.indices.shape == (1, 2, 3)
    thresholds = module().thresholds(delta)
    assert (thresholds[..., 1:] >= thresholds[..., :-1]).all()
    alive = (delta.unsqueeze(-2) >= thresholds.unsqueeze(-1)) & torch.ones(40, 40, dtype=torch.bool).tril()
    assert (alive.sum(-1)[..., 2:] == 3).all()


@pytest.mark.parametrize("k", [1, 3, 8, 30])
@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_running_kth_largest_ranks_every_prefix(k, chunk):
    x = torch.randn(2, 30, dtype=torch.float64).round(decimals=1)  # with ties
    found = running_kth_largest(x, k, chunk)
    for row in range(2):
        for i in range(30):
            ranked = x[row, : i + 1].sort(descending=True).values
            assert found[row, i] == (ranked[k - 1] if i + 1 >= k else -math.inf)


def test_blocks_that_no_query_keeps_are_skipped(monkeypatch):
    monkeypatch.setattr(module_under_test, "BLOCK", 4)
    q, k, v = heads(22), heads(22), heads(22)
    mixer = module(top_w=2)
    delta = mixer.biases(v).detach()
    blocks = module_under_test._living_blocks(delta, mixer.thresholds(delta))
    assert blocks.block_density(True) < 0.8
    torch.testing.assert_close(mixer.attend(q, k, v), rows(q, k, v, mixer, "CS", 2))


def test_variants_keep_positive_biases_or_rank_the_future():
    q, k, v = heads(11), heads(11), heads(11)
    for pattern in ("NS", "CS"):
        mixer = module(pattern, keep="relu")
        mixer.amplitude.data = torch.tensor([1.0, -1.0]).double()  # all positive, none positive
        o = mixer.attend(q, k, v)
        assert (o[:, 1] == 0).all()
        torch.testing.assert_close(o[:, :1], rows(q, k, v, mixer, pattern, 11)[:, :1])
    mixer = module(keep="global_topk")
    delta = biases(mixer, v)
    best = delta.sort(-1, descending=True).indices[:, :3]
    thresholds = mixer.thresholds(mixer.biases(v))
    torch.testing.assert_close(thresholds[0, :, 0], delta.gather(1, best)[:, 2])
    assert mixer.attend(q, k, v)[0, 0, : int(best[0].min())].abs().sum() == 0  # no key yet


def test_kept_values_train_the_biases():
    q, k, v = heads(11), heads(11), heads(11)
    mixer = module(top_w=2)
    mixer.attend(q, k, v).square().sum().backward()
    for parameter in mixer.amplitude, mixer.importance.weight:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_padded_keys_do_not_count():
    q, k, v = heads(11), heads(11), heads(11)
    padded = torch.zeros(1, 11, dtype=torch.bool)
    padded[:, [0, 4, 9]] = True
    for pattern in ("NS", "CS"):
        mixer = module(pattern)
        o = mixer.attend(q, k, v, key_padding_mask=padded)
        keep = ~padded[0]
        expected = rows(*(x[:, :, keep] for x in (q, k, v)), mixer, pattern, 3)
        torch.testing.assert_close(o[:, :, keep], expected)


def test_costs_and_refusals():
    bias = 2 * 11 * (2 * 8) * 2
    assert module("NC").flops(5, 11) == bias + 4 * 2 * 5 * 3 * 8
    assert module("CS").flops(11, 11) == bias + 4 * 2 * (1 + 2 + 9 * 3) * 8
    for hyper in ({"top_w": 0}, {"share": 0.0}):
        with pytest.raises(UsageError, match="expected at least 1"):
            module(**hyper)


@pytest.mark.parametrize("pattern", SIZES)
def test_triton_agrees(pattern):
    n, m = SIZES[pattern]
    given = [heads(length, 1).float().requires_grad_() for length in (n, m, m)]
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        mixer = module(pattern, backend, h=1, kv=1).float()
        o = mixer.attend(*given)
        parameters = [*given, *mixer.parameters()][:5]
        results.append((o, *torch.autograd.grad(o.square().sum(), parameters, allow_unused=True)[:3]))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
