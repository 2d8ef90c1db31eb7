"""seer_attention: the gate by loops, what it selects, and that it learns the map it is distilled from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

SIZES = {"NS": (22, 22), "CS": (22, 22), "NC": (9, 22), "CC": (9, 22)}


def heads(n: int, h: int = 2) -> Tensor:
    return torch.randn(1, h, n, 8, dtype=torch.float64)


def module(pattern: str = "CS", backend: str = "reference", *, h: int = 2, kv: int = 2, **hyper):
    options = {"block": 4, "gate_dim": 6, **hyper}
    return attnbench.build(
        "seer_attention", 8 * h, h, pattern=pattern, backend=backend, num_kv_heads=kv, **options
    ).double()


def weights_of(q: Tensor, k: Tensor, mixer, pattern: str, h: int) -> list[Tensor]:
    """Rows of the gate of query head h, prefill: the visible blocks of each block of queries."""
    group, b = q.shape[1] // k.shape[1], mixer.hp.block
    found = []
    for start in range(0, q.shape[2], b):
        query = q[0, h, start : start + b].mean(0)
        if mixer.gate_q is not None:
            query = query @ mixer.gate_q[h]
        keys = []
        for first in range(0, start + 1 if pattern == "CS" else k.shape[2], b):
            tokens = k[0, h // group, first : first + b]
            pooled = torch.cat([tokens.max(0).values, tokens.min(0).values])
            keys.append(pooled @ mixer.gate_k[h if mixer.gate_k.shape[0] == q.shape[1] else h // group])
        found.append((torch.stack(keys) @ query / math.sqrt(mixer.hp.gate_dim)).softmax(-1))
    return found


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
@pytest.mark.parametrize(
    ("kv", "hyper"), [(2, {}), (1, {}), (1, {"gate_dim": 8}), (1, {"gate_dim": 8, "force_double": True})]
)
def test_gate_is_that_of_the_definition(pattern, kv, hyper):
    n, m = SIZES[pattern]
    q, k = heads(n), heads(m, kv)
    mixer = module(pattern, kv=kv, **hyper)
    assert (mixer.gate_q is None) == (hyper == {"gate_dim": 8})
    gate = mixer.gate(q, k)
    for h in range(2):
        for row, expected in zip(gate[0, h], weights_of(q, k, mixer, pattern, h), strict=True):
            torch.testing.assert_close(row[: len(expected)], expected)
            assert (row[len(expected) :] == 0).all()


def kept_by_hand(weights: Tensor, row: int, last: int, pattern: str, mixer, total: int) -> set[int]:
    """Blocks of one row by the definition; ``total`` blocks of keys, ``last`` the last row."""
    hp = mixer.hp
    if pattern == "CS" and row >= last - 1:
        return set(range(len(weights)))
    order = sorted(range(len(weights)), key=lambda j: (-float(weights[j]), j))
    if pattern in ("CS", "NS"):
        order = [row, *(j for j in order if j != row)]
    if hp.method == "threshold":
        return {j for j in order if weights[j] > hp.threshold} | set(order[:1])
    share = 1 - math.sqrt(1 - hp.share) if pattern == "CS" else hp.share
    return set(order[: max(1, math.floor(share * total))])


@pytest.mark.parametrize("pattern", ["NS", "CS", "NC"])
@pytest.mark.parametrize("hyper", [{"share": 0.7}, {"method": "threshold", "threshold": 0.2}])
def test_selection_is_that_of_the_definition(pattern, hyper):
    n, m = SIZES[pattern]
    q, k = heads(n), heads(m)
    mixer = module(pattern, **hyper)
    kept = mixer.select(q, k).block_mask
    for h in range(2):
        table = weights_of(q, k, mixer, pattern, h)
        for row, weights in enumerate(table):
            expected = kept_by_hand(weights, row, len(table) - 1, pattern, mixer, kept.shape[-1])
            assert set(kept[0, h, row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize(
    "hyper", [{"share": 1.0}, {"method": "threshold", "threshold": 0.0}, {"method": "budget"}]
)
def test_everything_is_softmax_attention(pattern, hyper):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m), heads(m)
    dense = attnbench.attention(q, k, v, "softmax", pattern, "reference")
    torch.testing.assert_close(module(pattern, **hyper).attend(q, k, v), dense)
    if pattern != "CC":
        torch.testing.assert_close(module(pattern, gate="decode", **hyper).attend(q, k, v), dense)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", SIZES)
def test_output_is_softmax_attention_over_what_is_kept(pattern, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m, 1), heads(m, 1)
    mixer = module(pattern, backend, kv=1, share=0.4)
    mask = mixer.select(q, k).to_dense_mask()
    assert not mask.all()
    if pattern == "CS":
        mask = mask & torch.ones(n, m, dtype=torch.bool).tril()
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(mixer.attend(q, k, v), scores.softmax(-1) @ v)


def test_decode_gate_is_that_of_the_definition_and_strictly_causal():
    q, k, v = heads(22, 4), heads(22, 2), heads(22, 2)
    mixer = module(h=4, kv=2, gate="decode", share=0.8)
    gate = mixer.gate(q, k)
    assert gate.shape == (1, 2, 22, 6)
    for g, t in ((0, 9), (1, 21)):
        query = torch.cat([q[0, 2 * g, t], q[0, 2 * g + 1, t]]) @ mixer.gate_q[g]
        pooled = [k[0, g, s : s + 4] for s in range(0, t // 4 * 4, 4)]
        keys = [torch.cat([x.max(0).values, x.min(0).values]) @ mixer.gate_k[g] for x in pooled]
        expected = (torch.stack(keys) @ query / math.sqrt(6)).softmax(-1)
        torch.testing.assert_close(gate[0, g, t, : len(keys)], expected)
    before = mixer.attend(q, k, v)
    for i in (0, 5, 14):
        changed = [
            torch.cat([x[:, :, : i + 1], 5 * torch.randn_like(x[:, :, i + 1 :])], 2) for x in (q, k, v)
        ]
        torch.testing.assert_close(mixer.attend(*changed)[:, :, : i + 1], before[:, :, : i + 1])


def test_budget_counts_keys():
    q, k = heads(9), heads(22)
    kept = module("CC", method="budget", budget=9).select(q, k)
    assert (kept.counts == 3).all()


def test_rotary_positions_are_relative():
    q, k = heads(22), heads(22)
    plain, rotated = module("NS"), module("NS", rotary_base=100.0)
    rotated.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain.gate(q, k), rotated.gate(q, k))
    x = torch.randn(6, dtype=torch.float64).expand(1, 1, 3, 6)
    a = rotated._rotated(x, torch.tensor([0, 4, 8]))
    torch.testing.assert_close((a[0, 0, 0] * a[0, 0, 1]).sum(), (a[0, 0, 1] * a[0, 0, 2]).sum())
    torch.testing.assert_close(a.norm(dim=-1), x.norm(dim=-1))


def test_maximum_and_minimum_of_equal_tokens_are_one():
    q, k = heads(24), heads(6).repeat_interleave(4, 2)
    mixer = module("NS")
    gate = mixer.gate(q, k)
    mixer.gate_k.data[:, :8] += mixer.gate_k.data[:, 8:]
    mixer.gate_k.data[:, 8:] = 0.0
    torch.testing.assert_close(mixer.gate(q, k), gate)
    assert not torch.allclose(mixer.gate(q, heads(24)), gate)


def test_without_weights_the_gate_is_uniform():
    mixer = module()
    mixer.gate_k.data.zero_()
    gate = mixer.gate(heads(22), heads(22))
    torch.testing.assert_close(gate[0, 0, 3, :4], torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("pattern", "hyper"), [("CS", {}), ("NS", {}), ("CS", {"gate": "decode"}), ("CC", {})]
)
def test_loss_is_the_divergence_from_block_maxima(pattern, hyper):
    q, k = heads(22, 4), heads(22, 2)
    mixer = module(pattern, h=4, kv=2, **hyper)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(22, 22, dtype=torch.bool).triu(1), -math.inf)
    rows = 1 if hyper or pattern == "CC" else 4
    largest = torch.zeros(4, math.ceil(22 / rows), 6, dtype=torch.float64)
    weights = scores.softmax(-1)[0]
    for i in range(22):
        for j in range(22):
            cell = largest[:, i // rows, j // 4]
            largest[:, i // rows, j // 4] = torch.maximum(cell, weights[:, i, j])
    gate = mixer.gate(q, k)
    if rows == 1:
        largest = torch.maximum(largest[::2], largest[1::2])
        largest = largest.masked_fill(gate[0] == 0, 0.0)
    total = largest.sum(-1, keepdim=True)
    truth = (largest / total.masked_fill(total == 0, 1.0))[:, largest.shape[1] // 4 :]
    gate = gate[0, :, largest.shape[1] // 4 :]
    terms = torch.where(truth > 0, truth * (truth / gate.clamp(min=1e-300)).log(), 0.0)
    torch.testing.assert_close(mixer.distillation_loss(q, k), 10 * terms.mean())


def test_fit_trains_the_gate_alone():
    q, k = heads(32), heads(32)
    mixer = module(gate_dim=8)
    frozen = [p for name, p in mixer.named_parameters() if name.startswith("gate_")]
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    losses = mixer.fit([(q, k)] * 30, lr=3e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert not any(p.requires_grad for p in frozen)
    others = [p for name, p in mixer.named_parameters() if not name.startswith("gate_")]
    assert all(p.grad is None for p in others)


def test_costs_and_refusals():
    mixer = module("NC", h=4, kv=2, share=0.5)
    gate = 2 * 6 * (4 * 3 * 8 + 2 * 6 * 16 + 4 * 3 * 6)
    assert mixer.flops(9, 22) == gate + 4 * 4 * 8 * 9 * (3 * 4)
    causal = module("CS", share=0.75)  # half of 6 blocks
    pairs = sum(min(2, i // 4) * 4 + i % 4 + 1 for i in range(16)) + sum(i + 1 for i in range(16, 22))
    gate = 2 * 6 * (2 * 6 * 8 + 2 * 6 * 16 + 2 * 6 * 6)
    assert causal.flops(22, 22) == gate + 4 * 2 * 8 * pairs
    for hyper in ({"block": 0}, {"share": 0.0}, {"gate_dim": 5, "rotary_base": 1e4}):
        with pytest.raises(UsageError, match="seer_attention: observed"):
            module(**hyper)


@pytest.mark.parametrize("pattern", SIZES)
def test_triton_agrees(pattern):
    n, m = {"NC": (5, 9), "CC": (5, 9)}.get(pattern, (9, 9))
    given = [heads(length, 1).float().requires_grad_() for length in (n, m, m)]
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        o = module(pattern, backend, h=1, kv=1).float().attend(*given)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
