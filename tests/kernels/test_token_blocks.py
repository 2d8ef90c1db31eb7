"""Every backend of token_blocks against fp64, forward and every gradient, on small shapes with every option.

The rule: the error against fp64 is at most twice (gradients: three times) that of the plain definition
computed in the same dtype, plus a few roundings of the largest value. A score of size s is known to s·eps,
the relative error of its weight, which the backward pass computes anew: large logits are allowed more.
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

from attnbench.kernels import Selection, TokenBlocks, Unsupported, block_sparse, flash, token_blocks
from attnbench.kernels.flash._configs import Config

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call: sizes, lists per head, options, how to draw the bias, and the walks that it can break."""

    name: str
    n: int = 3
    m: int = 20
    d: int = 16
    dv: int = 16
    b: int = 1
    h: int = 2
    kv_heads: int = 1
    list_batch: int = 1
    list_heads: int = 1
    block_k: int = 8
    density: float = 0.5
    q_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    bias: Callable[[], Tensor] | None = field(default=None, hash=False)
    tile: tuple[int, int] = (16, 16)
    walks: tuple[str, ...] = ("query", "key")

    def __str__(self) -> str:
        return self.name


def _removed(*shape: int) -> Tensor:
    bias = torch.randn(*shape)
    bias[..., 5:12] = -INF
    return bias


CAUSAL = {"causal": True}
QUERY, KEY = ("query",), ("key",)
CASES = [
    Case("heads share a list", n=2),
    Case("every block", density=1.1, walks=()),
    Case("no block", n=2, m=9, density=0.0),
    Case("one query", n=1, m=17, walks=KEY),
    Case("one of each", n=1, m=1, density=1.1, walks=QUERY),
    Case("causal", n=5, m=5, block_k=4, options=CAUSAL, density=0.7, walks=KEY),
    Case("causal N>M has blind queries", n=5, m=3, block_k=2, options=CAUSAL, density=1.1,
         walks=KEY),
    Case("lists of a key head", b=2, h=4, kv_heads=2, list_batch=2, list_heads=2, n=1, d=24, dv=40, m=8,
         walks=QUERY),
    Case("lists of a query head", list_heads=2, n=2, m=12, options=CAUSAL, walks=KEY),
    Case("heads of lists astride heads of keys", h=6, kv_heads=2, list_heads=3, n=1, m=8, walks=KEY),
    Case("more heads than a tile", h=20, n=1, m=8, density=1.1, walks=QUERY),
    Case("several tiles of a block", n=2, m=70, h=1, block_k=64, tile=(16, 32), options=CAUSAL),
    Case("blocks that no tile divides", n=2, m=47, h=1, block_k=23, options=CAUSAL),
    Case("blocks of one key", n=2, m=8, block_k=1, density=0.3, walks=QUERY),
    Case("default tiles", n=2, m=70, d=40, dv=24, block_k=64, tile=(0, 0), options=CAUSAL),
    Case("large logits", q_scale=30.0, options=CAUSAL, walks=KEY),
    Case("negative scale", h=1, m=9, options={"scale": -0.3}, walks=QUERY),
    Case("bias of all heads", n=2, bias=lambda: _removed(1, 20), walks=QUERY),
    Case("bias of a head", n=2, options=CAUSAL, bias=lambda: _removed(2, 20), walks=KEY),
    Case("bias of a batch element", b=2, n=1, m=9, bias=lambda: _removed(2, 1, 9), walks=QUERY),
]  # fmt: skip
WALKS = [pytest.param(case, order, id=f"{case}-{order}") for case in CASES for order in case.walks]
HALF = ("causal", "blocks that no tile divides", "bias of a head")


@lru_cache(maxsize=2)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as ``dtype`` holds them, the bias in fp32, and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    q = case.q_scale * torch.randn(case.b, case.h, case.n, case.d)
    k = torch.randn(case.b, case.kv_heads, case.m, case.d)
    v = torch.randn(case.b, case.kv_heads, case.m, case.dv)
    mask = torch.rand(case.list_batch, case.list_heads, case.n, -(-case.m // case.block_k)) < case.density
    inputs = {
        **{name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))},
        "selection": TokenBlocks.from_block_mask(mask, case.block_k, case.m),
        "do": torch.randn(case.b, case.h, case.n, case.dv).to(dtype),
        "d_lse": torch.randn(case.b, case.h, case.n),
    }
    return inputs if case.bias is None else inputs | {"key_bias": case.bias()}


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool) -> dict[str, Tensor]:
    """o, lse and gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs = dict(_inputs(case, dtype))
    selection = inputs.pop("selection")
    if wide:
        inputs = {name: x.double() for name, x in inputs.items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    o, lse = token_blocks(
        q, k, v, selection, key_bias=inputs.get("key_bias"), **case.options, backend=backend
    )
    found = torch.autograd.grad([o, lse], list(inputs.values()), [do, d_lse])
    gradients = {f"d_{name}": g for name, g in zip(inputs, found, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **gradients}


def _assert_close(case: Case, dtype: torch.dtype, actual: dict[str, Tensor]) -> None:
    truth = _results(case, dtype, "reference", True)
    naive = _results(case, dtype, "reference", False)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert x.dtype is naive[name].dtype
        assert x.shape == truth[name].shape
        blind = torch.isneginf(truth[name])
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        expected = truth[name].masked_fill(blind, 0.0)
        error = _error(x, expected, blind)
        allowed = (3 if name.startswith("d_") else 2) * _error(naive[name], expected, blind)
        eps = torch.finfo(dtype if name != "lse" else torch.float32).eps
        allowed += max(8.0, 2 * case.q_scale) * eps * max(1.0, float(expected.abs().max()))
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


def _walk(monkeypatch: pytest.MonkeyPatch, order: str, tile: tuple[int, int]) -> None:
    """Force a walk, with tiles small enough that short lists have several of them; (0, 0) is the default."""
    launch = importlib.import_module("attnbench.kernels.token_blocks._launch")
    monkeypatch.setattr(launch, "choose_order", lambda **sizes: order)
    if tile != (0, 0):
        monkeypatch.setattr(launch, "candidates", lambda *args: (Config(*tile, 4, 1),))
        monkeypatch.setattr(launch, "most_rows", lambda *args: tile[0])


@pytest.mark.parametrize(("case", "order"), WALKS)
def test_triton_against_fp64(case: Case, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _walk(monkeypatch, order, case.tile)
    _results.cache_clear()
    _assert_close(case, torch.float32, _results(case, torch.float32, "triton", False))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in HALF], ids=str)
def test_triton_fp16_against_fp64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _walk(monkeypatch, "key", case.tile)
    _results.cache_clear()
    _assert_close(case, torch.float16, _results(case, torch.float16, "triton", False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["lists", "mask"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_against_fp64(
    case: Case, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("attnbench.kernels.token_blocks.torch")
    monkeypatch.setattr(module, "CHUNK_SCORES", 1000)  # a few queries at a time
    monkeypatch.setattr(module, "DENSE_BELOW", 0 if way == "lists" else 10**9)
    _results.cache_clear()
    _assert_close(case, dtype, _results(case, dtype, "torch", False))


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_definition(causal: bool) -> None:
    h, kv_heads, list_heads, n, m, block_k = 6, 2, 3, 4, 9, 4
    q, k, v = (torch.randn(2, x, y, 3).double() for x, y in ((h, n), (kv_heads, m), (kv_heads, m)))
    selection = TokenBlocks.from_block_mask(torch.rand(1, list_heads, n, 3) < 0.5, block_k, m)
    bias = torch.randn(2, h, m).double()
    o, lse = token_blocks(q, k, v, selection, causal=causal, scale=0.7, key_bias=bias, backend="reference")
    for b in range(2):
        for head in range(h):
            for i in range(n):
                at = (0, head * list_heads // h, i)
                listed = selection.indices[at][: int(selection.counts[at])].tolist()
                keys = [j for j in range(m) if j // block_k in listed and not (causal and j > i + m - n)]
                key_head = head * kv_heads // h
                terms = [math.exp(0.7 * float(q[b, head, i] @ k[b, key_head, j]) + float(bias[b, head, j]))
                         for j in keys]  # fmt: skip
                expected = sum(
                    (t * v[b, key_head, j] for t, j in zip(terms, keys, strict=True)), torch.zeros(3)
                )
                expected = expected / sum(terms) if keys else expected.double()
                torch.testing.assert_close(o[b, head, i], expected)
                assert float(lse[b, head, i]) == pytest.approx(math.log(sum(terms)) if keys else -INF)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    mask = torch.tensor([[[[True, False, True], [False, True, False], [False, False, False]]]])
    selection = TokenBlocks.from_block_mask(mask, 2, 5)
    q, k, v = (torch.randn(1, h, n, 3).double().requires_grad_() for h, n in ((2, 3), (1, 5), (1, 5)))
    bias = torch.randn(1, 2, 5).double().requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = token_blocks(q, k, v, selection, causal=True, key_bias=bias, backend=backend)
        return o, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("backend", ["reference", "torch", "query", "key"])
class TestMeaning:
    def _call(
        self, backend: str, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if backend in ("query", "key"):
            _walk(monkeypatch, backend, (16, 16))
            backend = "triton"
        return token_blocks(*args, **options, backend=backend)

    def _random(self, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(1, 2, n, 16), torch.randn(1, 1, m, 16), torch.randn(1, 1, m, 16)

    @pytest.mark.parametrize("causal", [False, True])
    def test_every_block_is_dense_attention(
        self, backend: str, causal: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = self._random(6, 11)
        selection = TokenBlocks.from_block_mask(torch.ones(1, 1, 6, 3, dtype=torch.bool), 4, 11)
        found = self._call(backend, monkeypatch, q, k, v, selection, causal=causal)
        expected = flash(q, k, v, causal=causal, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_the_own_block_alone_is_block_diagonal(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = self._random(12, 12)
        own = (torch.arange(12) // 4).view(1, 1, 12, 1)
        selection = TokenBlocks.from_indices(own, 4, 12)
        found = self._call(backend, monkeypatch, q, k, v, selection, causal=True)
        blocks = Selection.from_block_mask(torch.eye(3, dtype=torch.bool)[None, None], 4, 4, 12, 12)
        expected = block_sparse(q, k, v, blocks, causal=True, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_keys_outside_the_lists_do_not_matter(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = self._random(4, 12)
        selection = TokenBlocks.from_indices(torch.tensor([2, 0]).expand(1, 1, 4, 2), 4, 12)
        junk = 7.0 if backend in ("reference", "torch") else math.nan  # those multiply it by 0
        k[:, :, 4:8], v[:, :, 4:8] = junk, junk
        found = self._call(backend, monkeypatch, q, k, v, selection)
        kept = torch.cat([torch.arange(4), torch.arange(8, 12)])
        expected = flash(q, k[:, :, kept], v[:, :, kept], backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_strides(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in self._random(6, 11))
        k = torch.cat([k, k], -1)[..., ::2]
        selection = TokenBlocks.from_block_mask(torch.rand(1, 1, 6, 3) < 0.6, 4, 11)
        grid = selection.indices.transpose(2, 3).contiguous().transpose(2, 3)
        strided = TokenBlocks(selection.counts, grid, 4, 11)
        found = self._call(backend, monkeypatch, q, k, v, strided, causal=True)
        expected = token_blocks(
            *(x.contiguous() for x in (q, k, v)), selection, causal=True, backend="reference"
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestOrder:
    def _order(self, **sizes: int) -> str:
        default = {
            "n": 16384, "width": 4, "key_blocks": 32, "block_k": 512, "d": 128, "dv": 128, "rows": 1,
            "itemsize": 2, "queries": 8 * 16384, "processors": 132, "most": 64,
        }  # fmt: skip
        configs = importlib.import_module("attnbench.kernels.token_blocks._configs")
        return configs.choose_order(**default | sizes)

    def test_a_list_per_head_goes_by_key(self) -> None:
        assert self._order() == "key"

    def test_many_heads_per_list_and_small_blocks_go_by_query(self) -> None:
        assert self._order(rows=16, block_k=64, key_blocks=256, width=16) == "query"
        assert self._order(rows=64, block_k=64, key_blocks=256, width=16) == "query"

    def test_few_queries_are_spread_over_the_blocks(self) -> None:
        assert self._order(n=1, rows=16, block_k=64, key_blocks=256, width=16, queries=8) == "key"

    def test_blocks_of_one_key_go_by_query(self) -> None:
        assert self._order(block_k=1, key_blocks=16384, width=64) == "query"
        assert self._order(n=1, block_k=1, key_blocks=16384, width=64, queries=8) == "query"


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
@pytest.mark.parametrize("order", ["query", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_hold_the_rows_of_a_unit(kernel: str, order: str, dtype: torch.dtype) -> None:
    configs = importlib.import_module("attnbench.kernels.token_blocks._configs")
    for d in (40, 128, 256):
        for rows in (1, 7, configs.most_rows(d, dtype)):
            for block_k in (1, 7, 24, 32, 64, 512):
                options = configs.candidates(kernel, order, d, dtype, rows, block_k, 16)
                assert len(set(options)) == len(options) <= 12
                for config in options:
                    if kernel != "backward_kv":
                        assert config.block_m >= rows
                    for side in (config.block_m, config.block_n):
                        assert side >= 16
                        assert side & (side - 1) == 0
                    if block_k % 32 == 0:
                        assert block_k % config.block_n == 0


class TestErrors:
    def _selection(self, n: int = 16, heads: int = 1) -> TokenBlocks:
        return TokenBlocks.from_block_mask(torch.ones(1, heads, n, 1, dtype=torch.bool), 16, 16)

    def test_selection_of_another_length(self) -> None:
        q = torch.randn(1, 2, 16, 16)
        with pytest.raises(ValueError, match=r"selection: observed N = 15.* expected N = 16"):
            token_blocks(q, q, q, self._selection(15))

    def test_selection_of_another_head_count(self) -> None:
        q = torch.randn(1, 4, 16, 16)
        with pytest.raises(ValueError, match=r"Hs = 3.* Hs dividing 4"):
            token_blocks(q, q, q, self._selection(heads=3))

    def test_shapes_that_do_not_match(self) -> None:
        q = torch.randn(1, 4, 16, 16)
        with pytest.raises(ValueError, match=r"observed \(1, 4, 16, 16\) and \(1, 3, 16, 16\)"):
            token_blocks(q, q[:, :3], q[:, :3], self._selection())

    def test_triton_refuses_fp64_and_wide_heads(self) -> None:
        q = torch.randn(1, 1, 16, 16, dtype=torch.float64)
        with pytest.raises(Unsupported, match=r"observed torch\.float64"):
            token_blocks(q, q, q, self._selection(), backend="triton")
        q = torch.randn(1, 1, 16, 257)
        with pytest.raises(Unsupported, match="observed 257"):
            token_blocks(q, q, q, self._selection(), backend="triton")

    def test_flex_refuses_gradients_on_cpu(self) -> None:
        q = torch.randn(1, 1, 16, 16, requires_grad=True)
        with pytest.raises(Unsupported, match="require gradients"):
            token_blocks(q, q, q, self._selection(), backend="flex")


def test_flex_against_the_definition() -> None:
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 6), (2, 11), (2, 11)))
    selection = TokenBlocks.from_block_mask(torch.rand(1, 2, 6, 3) < 0.6, 4, 11)
    options = {"causal": True, "key_bias": torch.randn(4, 11), "scale": 0.3}
    found = token_blocks(q, k, v, selection, **options, backend="flex")
    expected = token_blocks(q, k, v, selection, **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flex_keeps_its_block_mask() -> None:
    peers = importlib.import_module("attnbench.kernels.token_blocks.peers")
    n, m = 200, 300
    selection = TokenBlocks.from_block_mask(torch.rand(1, 2, n, 10) < 0.02, 32, m)
    mask = peers.block_mask(selection, True, 4)
    assert peers.block_mask(selection, True, 4) is mask
    seen = selection.to_dense_mask() & torch.ones(n, m, dtype=torch.bool).tril(m - n)
    tiles = [[x.any((2, 3)) for x in row.split(128, 3)] for row in seen.split(128, 2)]
    expected = torch.stack([torch.stack(row, -1) for row in tiles], -2).repeat_interleave(2, 1)
    found = mask.to_dense().bool()
    assert torch.equal(found & expected, expected), "a tile with visible keys is left out"
