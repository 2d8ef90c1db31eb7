"""Every backend of buckets against fp64, forward and every gradient, and the definition against loops.

The rule: the error against fp64 is at most twice (gradients: three times) that of the plain definition
computed in the same dtype, plus a few roundings of the largest value and what one rounding of the scores,
which a backward pass that recomputes them sees, does to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Buckets, Unsupported, buckets, flash

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


def _rounds(n: int, rounds: int, b: int = 1, heads: int = 1) -> Tensor:
    """One permutation of n tokens after another for each head: (b, heads, rounds·n)."""
    lists = [torch.cat([torch.randperm(n) for _ in range(rounds)]) for _ in range(b * heads)]
    return torch.stack(lists).view(b, heads, rounds * n)


def _draw(tokens: int, entries: int, heads: int = 1) -> Tensor:
    """Entries at random, a fifth of them empty."""
    drawn = torch.randint(0, tokens, (1, heads, entries))
    return drawn.masked_fill(torch.rand(drawn.shape) < 0.2, -1)


def _hashing(chunk: int = 16, **options: Any) -> Callable[[Case], Buckets]:
    return lambda c: Buckets.chunks(_rounds(c.n, 2, heads=c.h), chunk, c.n, look_back=1, **options)


def _labelled(c: Case) -> Buckets:
    order = _rounds(c.n, 2)
    return Buckets.chunks(order, 10, c.n, look_back=2, labels=torch.randint(0, 3, order.shape))


def _clusters(c: Case) -> Buckets:
    keys = _draw(c.m, 36, c.h)
    return Buckets.chunks(_draw(c.n, 24, c.h), 8, c.n, keys=keys, key_chunk=12, m=c.m)


def _ragged(c: Case) -> Buckets:
    ids = [torch.randint(0, 4, (c.b, 1, tokens)) for tokens in (c.n, c.m)]
    return Buckets.by_id(ids[0], ids[1] + (ids[1] == 2), 4)  # no key has id 2


@dataclass(frozen=True)
class Case:
    """One call: sizes, how to draw the lists and the key bias, and options."""

    name: str
    lists: Callable[[Case], Buckets] = field(hash=False)
    n: int = 24
    m: int = 24
    d: int = 16
    dv: int = 16
    h: int = 2
    kv_heads: int = 2
    b: int = 1
    q_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    key_bias: Callable[[], Tensor] | None = field(default=None, hash=False)
    transposed: bool = False
    half: bool = False  # in fp16 as well as in fp32

    def __str__(self) -> str:
        return self.name


def _removed(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -INF)


CASES = [
    Case("hashing", _hashing(), h=1, kv_heads=1, options={"self_score": -5e4}),
    Case("hashing, causal, padded", _hashing(), options={"self_score": -50.0, "causal": True},
         key_bias=lambda: _removed(1, 24), transposed=True, half=True),
    Case("labels, grouped heads, D != Dv", _labelled, n=20, m=20, d=24, dv=40, kv_heads=1, q_scale=30.0),
    Case("one round", lambda c: Buckets.chunks(_rounds(c.n, 1), 8, c.n, look_back=1, distinct=True),
         options={"causal": True}, key_bias=lambda: torch.randn(2, 24)),
    Case("clusters, mean", _clusters, m=30, options={"combine": "mean"}, key_bias=lambda: torch.randn(30)),
    Case("clusters, mean, causal, grouped heads", _clusters, n=20, m=30, kv_heads=1,
         options={"combine": "mean", "causal": True}, half=True),
    Case("clusters, merged", _clusters, n=20, m=30, dv=8),
    Case("ragged", _ragged, b=2, h=1, kv_heads=1, m=40),
    Case("ragged, causal, grouped heads", _ragged, kv_heads=1, m=40, options={"causal": True, "scale": -0.3},
         key_bias=lambda: _removed(2, 40), half=True),
    Case("ragged, mean of one", _ragged, h=1, kv_heads=1, m=20, options={"combine": "mean"}),
    Case("one token", lambda c: Buckets.chunks(torch.zeros(1, 1, 3), 1, 1), n=1, m=1),
    Case("one key", lambda c: Buckets.by_id(torch.zeros(1, 2, c.n), torch.zeros(1, 2, 1), 3), m=1),
]  # fmt: skip


@lru_cache(maxsize=1)
def _inputs(case: Case, dtype: torch.dtype) -> tuple[Buckets, dict[str, Tensor]]:
    """The lists; the inputs as ``dtype`` holds them, the bias in fp32; and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    lists = case.lists(case)
    shapes = {
        "q": (case.b, case.h, case.n, case.d),
        "k": (case.b, case.kv_heads, case.m, case.d),
        "v": (case.b, case.kv_heads, case.m, case.dv),
        "do": (case.b, case.h, case.n, case.dv),
    }
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    drawn["q"] *= case.q_scale
    if case.transposed:
        drawn = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in drawn.items()}
    if case.key_bias is not None:
        drawn["key_bias"] = case.key_bias()
    return lists, drawn | {"d_lse": torch.randn(case.b, case.h, case.n)}


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False) -> dict[str, Tensor]:
    """o, lse and gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    lists, drawn = _inputs(case, dtype)
    inputs = {name: x.double() if wide else x for name, x in drawn.items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    o, lse = buckets(q, k, v, lists, key_bias=inputs.get("key_bias"), **case.options, backend=backend)
    gradients = torch.autograd.grad([o, lse], list(inputs.values()), [do, d_lse])
    named = {f"d_{name}": x for name, x in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **named}


def _assert_close(case: Case, dtype: torch.dtype, backend: str) -> None:
    _, inputs = _inputs(case, dtype)
    keys = inputs["k"].repeat_interleave(case.h // case.kv_heads, 1)
    largest = float((case.d**-0.5 * inputs["q"].float() @ keys.float().mT).abs().max())
    rescored = torch.finfo(torch.float32).eps * max(largest, abs(case.options.get("self_score", 0.0)))
    truth = _results(case, dtype, "reference", wide=True)
    naive = _results(case, dtype, "reference")
    actual = _results(case, dtype, backend)
    for name, x in actual.items():
        assert x.dtype is naive[name].dtype
        assert x.shape == truth[name].shape
        blind = torch.isneginf(truth[name])
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        expected = truth[name].masked_fill(blind, 0.0)
        error = _error(x, expected, blind)
        allowed = (3 if name.startswith("d_") else 2) * _error(naive[name], expected, blind)
        eps = torch.finfo(dtype if name != "lse" else torch.float32).eps
        allowed += (4 * eps + rescored) * max(1.0, float(expected.abs().max()))
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


def _error(x: Tensor, expected: Tensor, blind: Tensor) -> float:
    return float((x.double().masked_fill(blind, 0.0) - expected).abs().max())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a backend forgets to write is seen."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(EMPTY(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(EMPTY_LIKE(*args, **options)))


CALLS = [(c, torch.float32) for c in CASES] + [(c, torch.float16) for c in CASES if c.half]


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
class TestAgainstFp64:
    def test_triton(self, case: Case, dtype: torch.dtype) -> None:
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
        _assert_close(case, dtype, "triton")

    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")


def _looped(case: Case) -> tuple[Tensor, Tensor]:
    """The definition in loops over buckets and entries, in Python's numbers, without gradients."""
    lists, inputs = _inputs(case, torch.float32)
    q, k, v = (inputs[name].double() for name in "qkv")
    bias = inputs.get("key_bias", torch.zeros(case.m)).double().expand(case.b, case.h, case.m)
    o = torch.zeros(case.b, case.h, case.n, case.dv, dtype=torch.double)
    lse = torch.full((case.b, case.h, case.n), -INF, dtype=torch.double)
    for b in range(case.b):
        for h in range(case.h):
            visits = _visits(case, lists, b, h)
            for i in range(case.n):
                outputs, masses = [], []
                for keys in visits[i]:
                    g = h * case.kv_heads // case.h
                    weights = [
                        math.exp(_score(case, q[b, h, i], k[b, g, j], bias[b, h, j], i, j)) for j in keys
                    ]
                    masses.append(sum(weights))
                    total = sum(w * v[b, g, j] for w, j in zip(weights, keys, strict=True))
                    outputs.append(total / masses[-1] if masses[-1] else torch.zeros(case.dv))
                mass = sum(masses)
                if case.options.get("combine") == "mean":
                    o[b, h, i] = sum(outputs) / max(len(outputs), 1)
                elif mass:
                    o[b, h, i] = sum(m * x for m, x in zip(masses, outputs, strict=True)) / mass
                lse[b, h, i] = math.log(mass) if mass else -INF
    return o, lse


def _score(case: Case, q: Tensor, k: Tensor, bias: Tensor, i: int, j: int) -> float:
    own = case.options.get("self_score")
    scale = case.options.get("scale", case.d**-0.5)
    return float(bias) + (own if own is not None and i == j else scale * float(q @ k))


def _visits(case: Case, lists: Buckets, b: int, h: int) -> dict[int, list[list[int]]]:
    """For each query, the keys that each of its entries sees."""

    def of(x: Tensor) -> list[int]:
        return x[min(b, x.shape[0] - 1), h * x.shape[1] // case.h].tolist()

    queries, keys = of(lists.queries), of(lists.keys)
    if lists.query_chunk:
        starts = [lists.query_chunk * g for g in range(lists.count + 1)]
        key_starts = [lists.key_chunk * g for g in range(lists.count + 1)]
    else:
        starts, key_starts = of(lists.query_offsets), of(lists.key_offsets)
    labels = (None, None) if lists.query_labels is None else (of(lists.query_labels), of(lists.key_labels))
    visits: dict[int, list[list[int]]] = {i: [] for i in range(case.n)}
    for g in range(lists.count):
        seen = [(g - back) % lists.count for back in range(lists.look_back + 1)]
        for e in range(starts[g], starts[g + 1]):
            if queries[e] < 0:
                continue
            visible = [f for x in seen for f in range(key_starts[x], key_starts[x + 1]) if keys[f] >= 0]
            if labels[0] is not None:
                visible = [f for f in visible if labels[0][e] == labels[1][f]]
            if case.options.get("causal"):
                visible = [f for f in visible if keys[f] <= queries[e] + case.m - case.n]
            visits[queries[e]].append([keys[f] for f in visible])
    return visits


@pytest.mark.parametrize("case", [c for c in CASES if c.q_scale == 1.0], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    lists, inputs = _inputs(case, torch.float32)
    q, k, v = (inputs[name].double() for name in "qkv")
    found = buckets(q, k, v, lists, key_bias=inputs.get("key_bias"), **case.options, backend="reference")
    for x, expected in zip(found, _looped(case), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("combine", ["lse", "mean"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(combine: str, backend: str) -> None:
    lists = Buckets.chunks(_rounds(6, 2), 3, 6, look_back=1)
    q, k, v = (torch.randn(1, 1, 6, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 6, dtype=torch.double, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Any:
        options = {"causal": True, "self_score": -2.0, "combine": combine}
        return buckets(q, k, v, lists, key_bias=key_bias, **options, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


def _qkv(n: int, d: int = 8) -> list[Tensor]:
    return [torch.randn(1, 2, n, d) for _ in range(3)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
class TestSpecialCases:
    def test_two_chunks_that_look_back_are_dense_attention(self, backend: str) -> None:
        q, k, v = _qkv(32)
        o, lse = buckets(q, k, v, Buckets.chunks(_rounds(32, 1), 16, 32, look_back=1), backend=backend)
        dense, dense_lse = flash(q, k, v, backend="reference")
        torch.testing.assert_close(o, dense)
        torch.testing.assert_close(lse, dense_lse)

    def test_equal_rounds_are_one_round_with_twice_the_mass(self, backend: str) -> None:
        q, k, v = _qkv(32)
        order = _rounds(32, 1)
        o, lse = buckets(q, k, v, Buckets.chunks(order, 8, 32, look_back=1), backend=backend)
        twice = Buckets.chunks(torch.cat([order, order], -1), 8, 32, look_back=1)
        o2, lse2 = buckets(q, k, v, twice, backend=backend)
        torch.testing.assert_close(o2, o)
        torch.testing.assert_close(lse2, lse + math.log(2))

    @pytest.mark.parametrize("combine", ["lse", "mean"])
    def test_constant_values_come_back_to_visited_tokens(self, backend: str, combine: str) -> None:
        q, k, v = _qkv(20)
        queries = torch.tensor([[[0, 1, 2, 3, 2, 5, 6, -1]]])
        lists = Buckets.chunks(queries, 4, 20, keys=_draw(20, 16), key_chunk=8)
        o, lse = buckets(q, k, torch.ones_like(v), lists, combine=combine, backend=backend)
        visited = torch.tensor([0, 1, 2, 3, 5, 6])
        expected = torch.zeros(20).index_fill(0, visited, 1.0)
        torch.testing.assert_close(o, expected.view(1, 1, 20, 1).expand_as(o))
        assert torch.equal(torch.isneginf(lse[0, 0]), expected == 0)


class TestLists:
    def test_multiplicity_counts_every_visit(self) -> None:
        lists = Buckets.chunks(torch.tensor([[[0, 1, 2, 2, 1, 0]]]), 2, 3, look_back=1)
        # the chunks are 01, 22, 10; each sees itself and the one before, the first sees the last
        expected = torch.tensor([[3, 3, 2], [3, 3, 2], [2, 2, 4]])
        assert torch.equal(lists.to_multiplicity()[0, 0], expected)

    def test_ids_that_are_equal_see_each_other_once(self) -> None:
        query_ids, key_ids = torch.randint(0, 4, (2, 3, 10)), torch.randint(0, 4, (2, 3, 15))
        lists = Buckets.by_id(query_ids, key_ids, 4)
        expected = (query_ids.unsqueeze(-1) == key_ids.unsqueeze(-2)).long()
        assert torch.equal(lists.to_multiplicity(), expected)

    @pytest.mark.parametrize("block", [1, 3, 16])
    def test_tiles_hold_every_entry_once(self, block: int) -> None:
        ids = torch.randint(0, 5, (2, 2, 33))
        ids[0, 0] = 3
        lists = Buckets.by_id(ids, ids, 5)
        bucket, first = lists.tiles("query", block)
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ends = lists.query_offsets[b, h][bucket[b, h].long() + 1].tolist()
            tiles = zip(first[b, h].tolist(), ends, strict=True)
            entries = [e for start, end in tiles for e in range(start, min(start + block, end))]
            assert sorted(entries) == list(range(33))

    def test_visits_find_the_entries_of_each_token(self) -> None:
        visits = Buckets.chunks(torch.tensor([[[2, 0, -1, 2]]]), 2, 4).query_visits
        assert visits.starts.tolist() == [[[1, 2, 2, 4, 4]]]
        assert visits.entries[0, 0, 1:].tolist() == [1, 0, 3]


class TestErrors:
    def test_entries_that_fill_no_chunk(self) -> None:
        with pytest.raises(ValueError, match="queries: observed 10 entries, expected a multiple of 4"):
            Buckets.chunks(torch.zeros(1, 1, 10), 4, 10)

    def test_lists_with_different_numbers_of_chunks(self) -> None:
        with pytest.raises(ValueError, match="keys: observed 3 chunks, expected 2"):
            Buckets.chunks(torch.zeros(1, 1, 8), 4, 10, keys=torch.zeros(1, 1, 6), key_chunk=2)

    def test_look_back_that_sees_a_bucket_twice(self) -> None:
        with pytest.raises(ValueError, match="look_back: observed 2, expected 0 to 1"):
            Buckets.chunks(torch.zeros(1, 1, 8), 4, 8, look_back=2)

    def test_labels_of_one_list(self) -> None:
        entries = torch.zeros(1, 1, 8)
        with pytest.raises(ValueError, match="labels: observed those of one list"):
            Buckets.chunks(entries, 4, 8, keys=entries, labels=entries)

    def test_lists_of_other_sizes(self) -> None:
        q, k, v = _qkv(8)
        with pytest.raises(ValueError, match="lists: observed N = 9, M = 9, expected N = 8, M = 8"):
            buckets(q, k, v, Buckets.chunks(torch.zeros(1, 1, 8), 4, 9))
        with pytest.raises(ValueError, match=r"lists.queries: observed B = 1, Hs = 3"):
            buckets(q, k, v, Buckets.chunks(torch.zeros(1, 3, 8), 4, 8))

    def test_unknown_combination(self) -> None:
        q, k, v = _qkv(8)
        with pytest.raises(ValueError, match="combine: observed 'max'"):
            buckets(q, k, v, Buckets.chunks(torch.zeros(1, 1, 8), 4, 8), combine="max")

    def test_what_triton_does_not_serve(self) -> None:
        lists = Buckets.chunks(torch.zeros(1, 1, 8), 4, 8)
        with pytest.raises(Unsupported, match=r"buckets/triton dtype of q: observed .*float64"):
            buckets(*(x.double() for x in _qkv(8)), lists, backend="triton")
        with pytest.raises(Unsupported, match="head dim of q: observed 300"):
            buckets(*_qkv(8, 300), lists, backend="triton")
