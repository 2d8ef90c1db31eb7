"""probsparse against a direct evaluation of its definition and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.impls.sparse.probsparse import ProbSparse

BACKENDS = ("reference", "torch")
CALLS = [("NS", 40, 40), ("NS", 1, 1), ("NC", 50, 17), ("NC", 17, 50), ("CS", 40, 40)]


def heads(n: int, d: int = 8, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(pattern: str, backend: str = "reference", **hyper: object) -> ProbSparse:
    hyper = {"factor": 1, **hyper}
    built = attnbench.build("probsparse", 16, 2, pattern=pattern, backend=backend, **hyper)
    assert isinstance(built, ProbSparse)
    return built.double()


def share(length: int, factor: int = 1) -> int:
    return max(1, factor * math.ceil(math.log(length)))


def table_of(n: int, m: int, factor: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(m, (n, min(m, share(m, factor))), generator=generator)


def direct(q: Tensor, k: Tensor, v: Tensor, pattern: str, table: Tensor, inactive: str = "sum") -> Tensor:
    """The definition, one head and one query after another."""
    n, m = q.shape[2], k.shape[2]
    o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        measure = []
        for i in range(n):
            logits = k[b, h, table[i]] @ q[b, h, i]
            measure.append((logits.max() - logits.sum() / m).item())
        active = sorted(range(n), key=lambda i: (-measure[i], i))[: min(n, share(n))]
        for i in range(n):
            seen = i + 1 if pattern == "CS" else m
            keys, values = k[b, h, :seen], v[b, h, :seen]
            if i in active:
                o[b, h, i] = (keys @ q[b, h, i] / math.sqrt(q.shape[-1])).softmax(0) @ values
            elif pattern == "CS" and inactive == "sum":
                o[b, h, i] = values.sum(0)
            else:
                o[b, h, i] = values.mean(0)
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), CALLS)
def test_equals_the_definition(pattern: str, n: int, m: int, backend: str) -> None:
    q, k, v = heads(n), heads(m), heads(m, 6)
    o = module(pattern, backend).attend(q, k, v)
    torch.testing.assert_close(o, direct(q, k, v, pattern, table_of(n, m)))


@pytest.mark.parametrize("padded", [False, True])
def test_measuring_in_blocks_of_queries_changes_nothing(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, sparse = heads(40), heads(40), module("NS", factor=2)
    mask = (torch.arange(40) % 5 == 0).expand(2, 40) if padded else None
    whole = sparse.select(q, k, mask)
    monkeypatch.setattr("attnbench.impls.sparse.probsparse.QUERIES_AT_ONCE", 16)
    assert torch.equal(sparse.select(q, k, mask), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_means_on_request(backend: str) -> None:
    q, k, v = heads(40), heads(40), heads(40)
    o = module("CS", backend, inactive="prefix_mean").attend(q, k, v)
    torch.testing.assert_close(o, direct(q, k, v, "CS", table_of(40, 40), "prefix_mean"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC", "CS"])
def test_enough_active_queries_give_softmax_attention(pattern: str, backend: str) -> None:
    n, m = (30, 20) if pattern == "NC" else (30, 30)
    q, k, v = heads(n), heads(m), heads(m)
    o = module(pattern, backend, factor=9).attend(q, k, v)
    torch.testing.assert_close(o, attnbench.attention(q, k, v, "softmax", pattern, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("NS", 40, 40), ("NC", 40, 17)])
def test_constant_values_are_returned(pattern: str, n: int, m: int, backend: str) -> None:
    v = torch.full((2, 2, m, 8), 3.0, dtype=torch.float64)
    o = module(pattern, backend).attend(heads(n), heads(m), v)
    torch.testing.assert_close(o, torch.full_like(o, 3.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_give_the_mean_on_all_rows(backend: str) -> None:
    q, v = heads(40), heads(17)
    k = heads(1).expand(-1, -1, 17, -1)
    o = module("NC", backend).attend(q, k, v)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o))


def test_no_more_rows_than_active_queries_differ_from_the_mean() -> None:
    q, k, v = heads(60), heads(60), heads(60)
    o = module("NS").attend(q, k, v)
    other = ((o - v.mean(2, keepdim=True)).abs().amax(-1) > 1e-9).sum(-1)
    assert (other == share(60)).all()


def test_permuting_keys_with_the_table_changes_nothing() -> None:
    q, k, v = heads(40), heads(17), heads(17)
    sparse = module("NC")
    o = sparse.attend(q, k, v)
    order = torch.randperm(17)
    permuted = direct(q, k[:, :, order], v[:, :, order], "NC", order.argsort()[table_of(40, 17)])
    torch.testing.assert_close(permuted, o)


def test_a_frozen_selection_is_used_and_is_causal() -> None:
    q, k, v = heads(40), heads(40), heads(40)
    sparse = module("CS")
    selection = sparse.select(q, k)
    assert selection.shape == (2, 2, share(40))
    before = sparse.attend(q, k, v, selection=selection)
    torch.testing.assert_close(before, sparse.attend(q, k, v), rtol=0, atol=0)
    future = [torch.cat((u[:, :, :20], 5 * heads(20)), 2) for u in (q, k, v)]
    after = sparse.attend(*future, selection=selection)
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20])
    assert not torch.equal(sparse.select(*future[:2]), selection)


def test_equal_measures_are_ordered_by_index() -> None:
    q = heads(1).expand(-1, -1, 40, -1)
    k = heads(1).expand(-1, -1, 40, -1)
    assert torch.equal(module("NS").select(q, k)[0, 0], torch.arange(share(40)))


@pytest.mark.parametrize("redraw", [False, True])
def test_the_table_repeats_by_seed_and_changes_only_on_request(redraw: bool) -> None:
    q, k = heads(80), heads(80)
    one, two, other = (module("NS", redraw=redraw, seed=seed) for seed in (7, 7, 8))
    first, again = one.select(q, k), one.select(q, k)
    assert torch.equal(first, two.select(q, k))
    assert not torch.equal(first, other.select(q, k))
    assert torch.equal(first, again) is not redraw


def test_drawing_leaves_the_global_random_state_alone() -> None:
    sparse, q, k = module("NS", redraw=True), heads(40), heads(40)
    before = torch.random.get_rng_state()
    sparse.select(q, k)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_padded_tokens_are_neither_sampled_nor_active() -> None:
    q, k, v = heads(60), heads(60), heads(60)
    padded = torch.zeros(2, 60, dtype=torch.bool)
    padded[:, ::3] = True
    sparse = module("NS")
    loud = [u.masked_fill(padded[:, None, :, None], 50.0) for u in (q, k, v)]
    rows = sparse.select(*loud[:2], padded)
    assert not padded[0][rows].any()
    before, after = (sparse.attend(*inputs, key_padding_mask=padded) for inputs in ((q, k, v), loud))
    torch.testing.assert_close(after[:, :, ~padded[0]], before[:, :, ~padded[0]])
    assert not sparse.attend(q, k, v, key_padding_mask=torch.ones_like(padded)).any()


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_gradients_with_the_selection_frozen(pattern: str) -> None:
    q, k, v = (heads(12, 4, b=1).requires_grad_() for _ in range(3))
    sparse = attnbench.build("probsparse", 8, 2, pattern=pattern, backend="reference", factor=1).double()
    selection = sparse.select(q, k)
    torch.autograd.gradcheck(lambda *x: sparse.attend(*x, selection=selection), (q, k, v))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    q, k, v = heads(60, b=1), heads(60, b=1), heads(60, b=1)
    o = module(pattern, "triton").float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(o.double(), direct(q, k, v, pattern, table_of(60, 60)), rtol=1e-4, atol=1e-4)
