"""Every backend of gather against fp64, forward and every gradient, with lists per query and shared lists."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import SharedKeys, TokenKeys, Unsupported, flash, gather

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call: sizes, heads, share of keys in a list, options, and how to draw the bias."""

    name: str
    shared: bool
    n: int = 2
    m: int = 9
    d: int = 16
    dv: int = 16
    b: int = 1
    h: int = 2
    kv_heads: int = 1
    list_heads: int = 1
    density: float = 0.5
    causal: bool = False
    bias: Callable[[], Tensor] | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("per query", False, list_heads=2),
    Case("per query, causal with grouped heads", False, h=4, kv_heads=2, list_heads=2, causal=True, dv=24),
    Case("per query, a bias", False, bias=lambda: torch.randn(2, 9)),
    Case("per query, none", False, density=0.0),
    Case("per query, one of each", False, n=1, m=1, density=1.1),
    Case("shared", True, n=5, m=20),
    Case("shared, lists of a query head", True, h=4, kv_heads=2, list_heads=4, n=5, m=20, d=24, dv=40),
    Case("shared, causal", True, kv_heads=2, n=6, m=12, causal=True),
    Case("shared, causal N>M has blind queries", True, n=5, m=3, causal=True),
    Case("shared, a bias of a head", True, b=2, kv_heads=2, n=3, m=20, bias=lambda: torch.randn(2, 20)),
    Case("shared, causal, a bias of all heads", True, n=3, causal=True, bias=lambda: torch.randn(9)),
    Case("shared, none", True, density=0.0),
]


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def _inputs(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], TokenKeys | SharedKeys, list[Tensor]]:
    """The tensors that receive a gradient, the lists, and the gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    sizes = {"q": (case.h, case.n, case.d), "k": (case.kv_heads, case.m, case.d)}
    sizes["v"] = (case.kv_heads, case.m, case.dv)
    given = {name: torch.randn(case.b, *size).to(dtype) for name, size in sizes.items()}
    if case.bias is not None:
        given["key_bias"] = case.bias()
    selection: TokenKeys | SharedKeys
    if case.shared:
        mask = torch.rand(1, case.list_heads, case.m) < case.density
        selection = SharedKeys.from_mask(mask, case.n)
    else:
        selection = TokenKeys.from_mask(torch.rand(1, case.list_heads, case.n, case.m) < case.density)
    do = torch.randn(case.b, case.h, case.n, case.dv).to(dtype)
    return given, selection, [do, torch.randn(case.b, case.h, case.n)]


def _run(case: Case, dtype: torch.dtype, backend: str, compute: torch.dtype | None) -> dict[str, Tensor]:
    given, selection, back = _inputs(case, dtype)
    if compute is not None:
        given, back = {name: x.to(compute) for name, x in given.items()}, [x.to(compute) for x in back]
    given = {name: x.requires_grad_() for name, x in given.items()}
    o, lse = gather(**given, selection=selection, causal=case.causal, backend=backend)
    found = torch.autograd.grad([o, lse], list(given.values()), back)
    gradients = {f"d_{name}": g for name, g in zip(given, found, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **gradients}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a backend forgets to write is seen."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(EMPTY(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(EMPTY_LIKE(*args, **options)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied keys are masked in blocks that a tile of the interpreter walks at once."""
    monkeypatch.setattr(importlib.import_module("attnbench.kernels.gather.triton"), "KEY_BLOCK", 16)


def _assert_close(case: Case, dtype: torch.dtype, backend: str) -> None:
    """At most three times the error of the plain definition in the same dtype, plus a few roundings."""
    truth = _run(case, dtype, "reference", torch.float64)
    naive = _run(case, dtype, "reference", None)
    actual = _run(case, dtype, backend, None)
    for name, x in actual.items():
        assert (x.dtype, x.shape) == (naive[name].dtype, naive[name].shape)
        blind = torch.isneginf(truth[name])
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        expected = truth[name].masked_fill(blind, 0.0)
        error, plain = (
            float((y.double().masked_fill(blind, 0.0) - expected).abs().max()) for y in (x, naive[name])
        )
        eps = torch.finfo(dtype if name != "lse" else torch.float32).eps
        allowed = 3 * plain + 8 * eps * max(1.0, float(expected.abs().max()))
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    def test_triton(self, case: Case, small_blocks: None) -> None:
        _assert_close(case, torch.float32, "triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")


def test_triton_fp16() -> None:
    _assert_close(_case("per query"), torch.float16, "triton")


@pytest.mark.parametrize("name", ["per query, a bias", "shared, causal"])
def test_flex(name: str) -> None:
    case = _case(name)
    given, selection, _ = _inputs(case, torch.float32)
    expected = gather(**given, selection=selection, causal=case.causal, backend="reference")
    found = gather(**given, selection=selection, causal=case.causal, backend="flex")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
class TestMeaning:
    def test_a_shared_list_is_attention_to_those_keys(self, backend: str) -> None:
        q, k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
        kept = torch.tensor([17, 3, 4, 11])
        selection = SharedKeys.from_indices(kept.expand(1, 1, 4), 5, 20, complete=True)
        found = gather(q, k, v, selection, backend=backend)
        expected = flash(q, k[:, :, kept], v[:, :, kept], backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_one_key_per_query_is_its_value(self, backend: str) -> None:
        q, k, v = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)
        keys = torch.tensor([4, 0, 8])
        selection = TokenKeys.from_indices(keys.view(1, 1, 3, 1), 9)
        o, lse = gather(q, k, v, selection, backend=backend)
        torch.testing.assert_close(o, v[:, :, keys])
        torch.testing.assert_close(lse, (q * k[:, :, keys]).sum(-1) / 4)

    def test_every_key_is_dense_attention(self, backend: str) -> None:
        q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 7, 16), torch.randn(1, 1, 7, 16)
        expected = flash(q, k, v, causal=True, backend="reference")
        lists: list[Any] = [TokenKeys.from_mask(torch.ones(1, 1, 3, 7, dtype=torch.bool))]
        lists.append(SharedKeys.from_mask(torch.ones(1, 1, 7, dtype=torch.bool), 3))
        for selection in lists:
            found = gather(q, k, v, selection, causal=True, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    q, k, v = (torch.randn(1, h, n, 3).double().requires_grad_() for h, n in ((2, 3), (1, 5), (1, 5)))
    bias = torch.randn(1, 2, 5).double().requires_grad_()
    lists: list[Any] = [TokenKeys.from_indices(torch.tensor([[[[0, 3], [2, -1], [-1, -1]]]]), 5)]
    lists.append(SharedKeys.from_indices(torch.tensor([[[1, 4, -1]]]), 3, 5))
    for selection in lists:

        def call(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor, selection: Any = selection
        ) -> tuple[Tensor, ...]:
            o, lse = gather(q, k, v, selection, causal=True, key_bias=bias, backend=backend)
            return o, lse.masked_fill(torch.isneginf(lse), 0.0)

        assert torch.autograd.gradcheck(call, (q, k, v, bias))


class TestErrors:
    def test_selection_of_another_length(self) -> None:
        q = torch.randn(1, 2, 4, 16)
        selection = SharedKeys.from_mask(torch.ones(1, 1, 4, dtype=torch.bool), 5)
        with pytest.raises(ValueError, match=r"selection: observed N = 5.* expected N = 4"):
            gather(q, q, q, selection)

    def test_triton_refuses_fp64(self) -> None:
        q = torch.randn(1, 1, 4, 16).double()
        selection = SharedKeys.from_mask(torch.ones(1, 1, 4, dtype=torch.bool), 4)
        with pytest.raises(Unsupported, match=r"gather/triton dtype of q: observed torch\.float64"):
            gather(q, q, q, selection, backend="triton")

    def test_flex_refuses_gradients_on_cpu(self) -> None:
        q = torch.randn(1, 1, 4, 16, requires_grad=True)
        selection = SharedKeys.from_mask(torch.ones(1, 1, 4, dtype=torch.bool), 4)
        with pytest.raises(Unsupported, match="gather/flex on CPU"):
            gather(q, q, q, selection, backend="flex")


def test_lists_of_a_key_head_are_not_repeated() -> None:
    module = importlib.import_module("attnbench.kernels.gather._shared")
    selection = SharedKeys.from_mask(torch.ones(1, 1, 6, dtype=torch.bool), 4)
    k = torch.randn(1, 2, 6, 8)
    keys, values, bias, index = module.listed(k, k, selection, None, 8)
    assert keys.shape == values.shape == (1, 2, 6, 8)
    assert torch.equal(keys, k)
    assert bias.shape == index.shape == (1, 2, 6)
