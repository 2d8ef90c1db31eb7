"""reformer_lsh: hashing, sorting and looking back by loops, and its exact special cases."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError


def heads(n: int, d: int = 8) -> Tensor:
    return torch.randn(1, 2, n, d, dtype=torch.float64)


def module(pattern: str = "NS", backend: str = "reference", **hyper):
    options = {"bucket_size": 4, "num_hashes": 2, **hyper}
    return attnbench.build("reformer_lsh", 16, 2, pattern=pattern, backend=backend, **options).eval()


def visits(x: Tensor, mixer, head: int, masked: bool) -> dict[int, Counter]:
    """How often each token sees each other, by the definition, for the directions of ``mixer``."""
    n, c, rounds = x.shape[2], mixer.hp.bucket_size, mixer.hp.num_hashes
    count = 2 * math.ceil(n / (2 * c))
    directions = mixer._directions(count // 2, x.device).double().unflatten(-1, (rounds, -1))
    entries = []
    for r in range(rounds):
        along = x[0, head] @ directions[:, r]
        hashes = torch.cat([along, -along], -1).argmax(-1).tolist()
        order = sorted(range(n), key=lambda i: (hashes[i], i))
        entries += [(i, (r, hashes[i])) for i in order] + [None] * (count * c - n)
    chunks = [entries[s : s + c] for s in range(0, len(entries), c)]
    seen = {i: Counter() for i in range(n)}
    for t, chunk in enumerate(chunks):
        for query in filter(None, chunk):
            for key in filter(None, chunks[t] + chunks[t - 1]):
                if not masked or key[1] == query[1]:
                    seen[query[0]][key[0]] += 1
    return seen


def rows(x: Tensor, v: Tensor, mixer, pattern: str, once: bool, masked: bool) -> Tensor:
    """The output by the definition."""
    out = torch.zeros(*x.shape[:3], v.shape[-1], dtype=x.dtype)
    for h in range(x.shape[1]):
        for i, seen in visits(x, mixer, h, masked).items():
            keys = [j for j in seen if pattern != "CS" or j <= i]
            unit = x[0, h, keys] / x[0, h, keys].norm(dim=-1, keepdim=True)
            z = unit @ x[0, h, i] / math.sqrt(x.shape[-1])
            z[keys.index(i)] = -5e4
            times = torch.tensor([1.0 if once else float(seen[j]) for j in keys], dtype=x.dtype)
            out[0, h, i] = (z + times.log()).softmax(-1) @ v[0, h, keys]
    return out


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", ["NS", "CS"])
@pytest.mark.parametrize(
    "options", [{}, {"dedup": True}, {"bucket_mask": True}, {"dedup": True, "bucket_mask": True}]
)
def test_rows_are_those_of_the_definition(pattern, options, backend):
    x, v = heads(21), heads(21, 6)
    mixer = module(pattern, backend, **options)
    expected = rows(x, v, mixer, pattern, options.get("dedup", False), options.get("bucket_mask", False))
    torch.testing.assert_close(mixer.attend(x, x, v), expected)


def test_dense_mask_is_what_is_visited():
    x = heads(13)
    for options in ({}, {"bucket_mask": True}):
        mixer = module(**options)
        mask = mixer.select(x, x).to_dense_mask()
        for h in range(2):
            seen = visits(x, mixer, h, bool(options))
            assert all(set(mask[0, h, i].nonzero().flatten().tolist()) == set(seen[i]) for i in range(13))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_two_chunks_are_dense_attention_to_unit_keys(pattern):
    x, v = heads(8), heads(8)
    scores = x @ (x / x.norm(dim=-1, keepdim=True)).mT / math.sqrt(8)
    scores = scores.masked_fill(torch.eye(8, dtype=torch.bool), -5e4)
    if pattern == "CS":
        scores = scores.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(module(pattern, num_hashes=1).attend(x, x, v), scores.softmax(-1) @ v)


@pytest.mark.parametrize("dedup", [False, True])
def test_rounds_with_one_rotation_are_one_round(dedup, monkeypatch):
    x, v = heads(21), heads(21)
    one, many = module(num_hashes=1), module(num_hashes=3, dedup=dedup)
    directions = one._directions(3, x.device)
    monkeypatch.setattr(many, "_directions", lambda half, device: directions.repeat(1, 3))
    torch.testing.assert_close(many.attend(x, x, v), one.attend(x, x, v))


def test_equal_tokens_output_the_mean_of_the_others_they_visit():
    x, v = torch.ones(1, 2, 12, 8, dtype=torch.float64), heads(12)
    mixer = module(num_hashes=1)
    mask = mixer.select(x, x).to_dense_mask() & ~torch.eye(12, dtype=torch.bool)
    weights = mask.double() / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(mixer.attend(x, x, v), weights @ v)


def test_padded_tokens_sort_last_and_are_not_seen():
    x, v = heads(12), heads(12)
    padded = torch.zeros(1, 12, dtype=torch.bool)
    padded[:, [2, 5, 6]] = True
    mixer = module(num_hashes=1)
    lists = mixer.select(x, x, key_padding_mask=padded).lists
    assert lists.queries[..., 9:12].tolist() == [[[2, 5, 6]] * 2]
    louder = v.masked_fill(padded[:, None, :, None], 1e3)
    for dedup in (False, True):
        o = module(dedup=dedup).attend(x, x, louder, key_padding_mask=padded)
        assert o.abs().max() < 10


def test_projections_change_in_training_only():
    x, v = heads(40), heads(40)
    mixer = module(num_hashes=1)
    assert torch.equal(mixer.attend(x, x, v), mixer.attend(x, x, v))
    mixer.train()
    assert not torch.equal(mixer.attend(x, x, v), mixer.attend(x, x, v))
    fixed = module(num_hashes=1, redraw=False).train()
    assert torch.equal(fixed.attend(x, x, v), fixed.attend(x, x, v))
    assert not torch.equal(module(seed=1).attend(x, x, v), module(seed=2).attend(x, x, v))


def test_layer_shares_queries_and_keys():
    layer = module("CS")
    assert not hasattr(layer, "k_proj")
    x = torch.randn(1, 11, 16)
    q, v = (layer.split(p(x), 2) for p in (layer.q_proj, layer.v_proj))
    torch.testing.assert_close(layer(x), layer.out_proj(layer.join(layer.attend(q, q, v))))


def test_costs_and_refusals():
    mixer = module()  # 21 tokens: 6 buckets of 4 a round
    assert mixer.flops(21, 21) == 2 * (2 * 21 * 8 * 2 * 3 + 4 * 8 * (2 * 6 * 4) * 8)
    with pytest.raises(UsageError, match="expected positive numbers"):
        module(bucket_size=0)


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees(pattern):
    given = [heads(20)[:, :1].float().requires_grad_(), heads(20)[:, :1].float().requires_grad_()]
    results = []
    for backend in ("reference", "triton"):
        mixer = attnbench.build(
            "reformer_lsh", 8, 1, pattern=pattern, backend=backend, bucket_size=8, num_hashes=2
        ).eval()
        o = mixer.attend(given[0], given[0], given[1])
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
