"""Every backend of few_query against fp64, forward and every gradient, in each regime, whole and split.

The rule: the error against fp64 is at most twice (gradients: three times) that of the plain definition
computed in the same dtype, plus a few roundings of the largest value and what one rounding of the scores,
which a backward pass that recomputes them sees, does to it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, few_query

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call: sizes, options, and multiprocessors to fill: with many, rows or keys are split."""

    name: str
    n: int = 3
    m: int = 70
    d: int = 16
    dv: int = 16
    h: int = 2
    kv_heads: int = 2
    b: int = 1
    q_scale: float = 1.0
    processors: int = 1
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict, hash=False)
    transposed: bool = False
    half: bool = False  # in fp16 as well as in fp32

    def __str__(self) -> str:
        return self.name


def _removed(m: int, *shape: int, keys: slice) -> Tensor:
    bias = torch.randn(*shape, m)
    bias[..., keys] = -INF
    return bias


CASES = [
    Case("few queries"),
    Case("few queries, split, grouped heads, D != Dv", d=24, dv=40, kv_heads=1, processors=4,
         options={"causal": True}, half=True),
    Case("one query, split", n=1, h=3, kv_heads=1, processors=4, options={"causal": True}),
    Case("few queries, padded, split", b=2, h=1, kv_heads=1, processors=4, transposed=True,
         tensors={"key_bias": lambda: _removed(70, 2, 1, keys=slice(0, 40))}, half=True),
    Case("few queries, biases", kv_heads=1, options={"scale": -0.3}, processors=2,
         tensors={"key_bias": lambda: torch.randn(1, 70), "bias": lambda: torch.randn(2, 3, 70)}),
    Case("key bias differs in a group", kv_heads=1,
         tensors={"key_bias": lambda: _removed(70, 2, keys=slice(60, 70))}),
    Case("a part of the splits is empty", processors=4,
         tensors={"key_bias": lambda: _removed(70, 1, keys=slice(16, 70))}),
    Case("few keys", n=70, m=5, transposed=True),
    Case("few keys, split, grouped heads, D != Dv", n=40, m=7, d=40, dv=24, kv_heads=1, processors=4,
         tensors={"key_bias": lambda: _removed(7, 1, keys=slice(2, 4)), "bias": lambda: torch.randn(40, 7)},
         half=True),
    Case("few keys, blind queries", n=20, m=5, options={"causal": True}, processors=2),
    Case("one of each", n=1, m=1),
    Case("no key is left", b=2, n=2, m=20, h=1, kv_heads=1,
         tensors={"key_bias": lambda: torch.tensor([0.0, -INF]).view(2, 1, 1)}),
    Case("neither", n=40, m=40, h=1, kv_heads=1, options={"causal": True}, q_scale=30.0),
    Case("neither, split, grouped heads", n=18, m=40, kv_heads=1, processors=8,
         tensors={"key_bias": lambda: torch.randn(40), "bias": lambda: torch.randn(2, 18, 40)}),
]  # fmt: skip
CALLS = [(c, torch.float32) for c in CASES] + [(c, torch.float16) for c in CASES if c.half]


@lru_cache(maxsize=1)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as ``dtype`` holds them, biases in fp32, and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
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
    return (
        drawn
        | {name: draw() for name, draw in case.tensors.items()}
        | {"d_lse": torch.randn(case.b, case.h, case.n)}
    )


@lru_cache(maxsize=4)
def _results(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    wide: bool = False,
    train: bool = True,
    need_lse: bool = True,
) -> dict[str, Tensor]:
    """o, lse and, to ``train``, gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs = {name: x.double() if wide else x for name, x in _inputs(case, dtype).items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.detach().requires_grad_(train) for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    others = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
    o, lse = few_query(q, k, v, **others, **case.options, need_lse=need_lse, backend=backend)
    assert (lse is not None) == need_lse
    outputs = [o] if lse is None else [o, lse]
    results = {name: x.detach() for name, x in zip(("o", "lse"), outputs, strict=False)}
    if train:
        found = torch.autograd.grad(outputs, list(inputs.values()), [do, d_lse][: len(outputs)])
        results |= {f"d_{name}": x for name, x in zip(inputs, found, strict=True)}
    return results


def _assert_close(case: Case, dtype: torch.dtype, backend: str, **options: bool) -> None:
    inputs = _inputs(case, dtype)
    keys = inputs["k"].repeat_interleave(case.h // case.kv_heads, 1)
    scores = case.options.get("scale", case.d**-0.5) * inputs["q"].float() @ keys.float().mT
    rescored = torch.finfo(torch.float32).eps * float(scores.abs().max())
    need_lse = options.get("need_lse", True)
    truth = _results(case, dtype, "reference", wide=True, need_lse=need_lse)
    naive = _results(case, dtype, "reference", need_lse=need_lse)
    actual = _results(case, dtype, backend, **options)
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


def _gpu_of(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    """A GPU with so many multiprocessors, on which the splits of short sequences pay."""
    from attnbench.kernels._tiles import Target

    triton = importlib.import_module("attnbench.kernels.few_query.triton")
    configs = importlib.import_module("attnbench.kernels.few_query._configs")
    monkeypatch.setattr(triton, "here", lambda device: Target(90, processors))
    monkeypatch.setattr(configs, "MIN_SPLIT", 16)


@pytest.mark.filterwarnings("ignore:Flash attention")  # why the one allowed SDPA kernel refuses
@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
class TestAgainstFp64:
    def test_triton(self, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
        _gpu_of(monkeypatch, case.processors)
        _assert_close(case, dtype, "triton")

    @pytest.mark.parametrize("need_lse", [True, False])
    def test_torch(self, case: Case, dtype: torch.dtype, need_lse: bool) -> None:
        _assert_close(case, dtype, "torch", need_lse=need_lse)

    def test_sdpa_math(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "sdpa_math", need_lse=False)

    def test_sdpa_flash(self, case: Case, dtype: torch.dtype) -> None:
        if case.d != case.dv or case.tensors:
            with pytest.raises(Unsupported, match="few_query/sdpa_flash"):
                _results(case, dtype, "sdpa_flash", need_lse=False)
        else:
            _assert_close(case, dtype, "sdpa_flash", need_lse=False)

    def test_flex(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "flex", train=False)


def test_reference_is_the_definition() -> None:
    case = CASES[1]
    inputs = _inputs(case, torch.float32)
    q, k, v = (inputs[name].double() for name in "qkv")
    o, lse = few_query(q, k, v, causal=True, backend="reference")
    for h in range(case.h):
        for i in range(case.n):
            seen = [j for j in range(case.m) if j <= i + case.m - case.n]
            weights = [math.exp(float(q[0, h, i] @ k[0, 0, j]) / math.sqrt(case.d)) for j in seen]
            expected = sum(w * v[0, 0, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(o[0, h, i], expected)
            torch.testing.assert_close(float(lse[0, h, i]), math.log(sum(weights)))


def test_gradcheck() -> None:
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.double, requires_grad=True) for n in (2, 5, 5))
    key_bias, bias = (torch.randn(s, 5, dtype=torch.double, requires_grad=True) for s in (1, 2))

    def call(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, bias: Tensor) -> Any:
        return few_query(q, k, v, causal=True, key_bias=key_bias, bias=bias, backend="reference")

    assert torch.autograd.gradcheck(call, (q, k, v, key_bias, bias))


@pytest.mark.parametrize(("n", "m"), [(3, 40), (40, 3)])
def test_unnormalised_sums_follow_from_o_and_lse(n: int, m: int) -> None:
    """Writing an attention map back along its columns: Σ_p exp(s_pj − lse_p) u_p, whose mass is that of u."""
    q, k, u = (torch.randn(1, 2, size, 8) for size in (n, m, n))
    _, lse = few_query(q, k, k, backend="triton")
    o, mass = few_query(k, q, u, key_bias=-lse, backend="triton")
    written = torch.exp(mass).unsqueeze(-1) * o
    expected = torch.softmax(q @ k.mT / math.sqrt(8), -1).mT @ u
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(written.sum(2), u.sum(2), rtol=1e-4, atol=1e-4)


class TestSplits:
    configs = importlib.import_module("attnbench.kernels.few_query._configs")

    def test_none_where_programs_fill_the_gpu(self) -> None:
        assert self.configs.split(100_000, 64, programs=300, processors=132) == (1, 100_032)

    def test_two_programs_a_processor(self) -> None:
        splits, length = self.configs.split(1_000_000, 64, programs=8, processors=132)
        assert splits == 33
        assert length % 64 == 0

    @pytest.mark.parametrize("length", [1, 255, 256, 300, 5000, 65537])
    def test_cover_all_and_none_is_empty(self, length: int) -> None:
        splits, each = self.configs.split(length, 64, programs=1, processors=132)
        assert (splits - 1) * each < length <= splits * each


class TestNothingToDo:
    @pytest.mark.parametrize(("n", "m"), [(0, 5), (3, 0), (0, 0)])
    def test_no_queries_or_no_keys(self, n: int, m: int) -> None:
        q, k, v = (torch.randn(1, 2, size, 8, requires_grad=True) for size in (n, m, m))
        o, lse = few_query(q, k, v, backend="triton")
        assert torch.equal(o, torch.zeros(1, 2, n, 8))
        assert torch.equal(lse, torch.full((1, 2, n), -INF))
        gradients = torch.autograd.grad(o.sum(), (q, k, v))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


class TestErrors:
    def test_shapes(self) -> None:
        x = torch.randn(1, 2, 4, 8)
        with pytest.raises(ValueError, match=r"observed .*\(1, 3, 4, 8\), expected \(B, H, N, D\)"):
            few_query(x, torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8))

    def test_what_triton_does_not_serve(self) -> None:
        x = torch.randn(1, 2, 4, 8)
        with pytest.raises(Unsupported, match=r"few_query/triton dtype of q: observed .*float64"):
            few_query(*(x.double(),) * 3, backend="triton")
        with pytest.raises(Unsupported, match="head dim of q: observed 300"):
            few_query(*(torch.randn(1, 1, 2, 300),) * 3, backend="triton")
