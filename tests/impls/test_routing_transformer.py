"""routing_transformer: clusters and their means by loops, the k-means update, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

SIZES = {"NS": (14, 14), "CS": (14, 14), "NC": (7, 14)}


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(1, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper):
    mixer = attnbench.build(
        "routing_transformer", 16, 2, pattern=pattern, backend=backend, **{"num_clusters": 3, **hyper}
    )
    return mixer.double().eval()


def normal(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def rows(q: Tensor, k: Tensor, v: Tensor, mixer, pattern: str, scale: float) -> Tensor:
    """The output by the definition."""
    n, m, clusters = q.shape[2], k.shape[2], mixer.hp.num_clusters
    shared = mixer.shared
    total = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    count = torch.zeros(n)
    for h in range(q.shape[1]):
        count.zero_()
        queries, keys = normal(q[0, h]), normal((q if shared else k)[0, h])
        for c in range(clusters):
            centre = mixer.centroids[h, c]
            members = sorted(range(n), key=lambda i: (-float(queries[i] @ centre), i))
            those = sorted(range(m), key=lambda j: (-float(keys[j] @ centre), j))[: max(1, m // clusters)]
            for i in members[: max(1, n // clusters)]:
                seen = [j for j in those if pattern != "CS" or j <= i]
                weights = (keys[seen] @ queries[i] * scale).softmax(-1)
                total[0, h, i] += weights @ v[0, h, seen]
                count[i] += 1
        total[0, h] /= count.clamp(min=1).unsqueeze(-1)
    return total


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("scale", ["sqrt_dim", "upstream"])
def test_rows_are_those_of_the_definition(pattern, scale, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m, 6)
    mixer = module(pattern, backend, logit_scale=scale)
    expected = rows(q, k, v, mixer, pattern, 1.0 if scale == "upstream" else 1 / math.sqrt(8))
    torch.testing.assert_close(mixer.attend(q, k, v), expected)


@pytest.mark.parametrize("pattern", SIZES)
def test_one_cluster_is_softmax_attention_on_normalised_tokens(pattern):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    keys = normal(q) if pattern == "CS" else normal(k)
    expected = attnbench.attention(normal(q), keys, v, "softmax", pattern, "reference")
    torch.testing.assert_close(module(pattern, num_clusters=1).attend(q, k, v), expected)


def test_equal_centroids_are_one_cluster():
    q, k, v = heads(12), heads(12), heads(12)
    mixer, one = module(), module(num_clusters=1, window=4)
    mixer.centroids.copy_(mixer.centroids[:, :1].clone().expand_as(mixer.centroids))
    one.centroids.copy_(mixer.centroids[:, :1])
    torch.testing.assert_close(mixer.attend(q, k, v), one.attend(q, k, v))
    covered = one.select(q, k).to_dense_mask().any(-1)
    assert covered.sum() == 2 * 4
    sums = one.attend(q, k, torch.ones_like(v))[..., 0]
    torch.testing.assert_close(sums, covered.double())


def test_shared_queries_and_keys_are_an_option_without_causality():
    q, k, v = heads(14), heads(14), heads(14)
    mixer = module(share_qk=True)
    torch.testing.assert_close(mixer.attend(q, k, v), rows(q, k, v, mixer, "NS", 1 / math.sqrt(8)))
    layer = module("CS")
    assert not hasattr(layer, "k_proj")
    assert hasattr(module(), "k_proj")
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, v = (layer.split(p(x), 2) for p in (layer.q_proj, layer.v_proj))
    torch.testing.assert_close(layer(x), layer.out_proj(layer.join(layer.attend(q, q, v))))


@pytest.mark.parametrize("pattern", SIZES)
def test_a_training_step_moves_centroids_by_running_means(pattern):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    mixer = module(pattern, decay=0.75)
    before = mixer.centroids.clone()
    mixer.attend(q, k, v)
    assert torch.equal(mixer.centroids, before)  # evaluation leaves them alone
    mixer.train().attend(q, k, v)
    for h in range(2):
        tokens = list(normal(q[0, h])) + ([] if pattern == "CS" else list(normal(k[0, h])))
        size, total = torch.ones(3).double() * 0.75, before[h] * 0.75
        for x in tokens:
            nearest = int((before[h] @ x).argmax())
            size[nearest] += 0.25
            total[nearest] += 0.25 * x
        smooth = (size + 1e-5) / (size.sum() + 3e-5) * size.sum()
        torch.testing.assert_close(mixer.centroids[h], total / smooth.unsqueeze(-1))
        torch.testing.assert_close(mixer.sizes[h], size)


def test_padded_tokens_neither_route_nor_move_centroids():
    q, k, v = heads(12), heads(12), heads(12)
    padded = torch.zeros(1, 12, dtype=torch.bool)
    padded[:, [0, 3, 7]] = True
    mixer = module("CS")
    assert not mixer.select(q, k, key_padding_mask=padded).to_dense_mask()[..., padded[0]].any()
    whole = module("CS").train()
    whole.load_state_dict(mixer.state_dict())
    whole.attend(q, k, v, key_padding_mask=padded)
    mixer.update(q[:, :, ~padded[0]], k[:, :, ~padded[0]])
    torch.testing.assert_close(whole.centroids, mixer.centroids)


def test_commitment_loss_draws_tokens_to_their_centroids():
    q, k = heads(6).requires_grad_(), heads(6)
    mixer = module(beta=0.5)
    expected = [
        (normal(x[0, h, i]) - mixer.centroids[h][(mixer.centroids[h] @ normal(x[0, h, i])).argmax()])
        .square()
        .sum()
        for x in (q, k)
        for h in range(2)
        for i in range(6)
    ]
    loss = mixer.commitment_loss(q, k)
    torch.testing.assert_close(loss, 0.5 * torch.stack(expected).mean())
    loss.backward()
    assert q.grad is not None
    assert q.grad.abs().max() > 0


def test_costs_and_refusals():
    assert module("NC").flops(7, 14) == 2 * 3 * 8 * (2 * 21 + 4 * 2 * 4)
    assert module("CS").flops(14, 14) == 2 * 3 * 8 * (2 * 14 + 4 * 4 * 4)
    for pattern, hyper in (
        ("NS", {"num_clusters": 0}),
        ("CS", {"share_qk": False}),
        ("NC", {"share_qk": True}),
    ):
        with pytest.raises(UsageError, match="routing_transformer"):
            module(pattern, **hyper)


@pytest.mark.parametrize("pattern", SIZES)
def test_triton_agrees(pattern):
    n, m = SIZES[pattern]
    given = [heads(length)[:, :1].float().requires_grad_() for length in (n, m, m)]
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        mixer = attnbench.build(
            "routing_transformer", 8, 1, pattern=pattern, backend=backend, num_clusters=2
        ).eval()
        o = mixer.attend(*given)
        used = [x for x in given if pattern != "CS" or x is not given[1]]
        results.append((o, *torch.autograd.grad(o.square().sum(), used)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
