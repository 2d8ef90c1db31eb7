"""Every backend of window against fp64, forward and every gradient, on small grids with every option.

The rule is that of test_flash.py: the error against fp64 is at most three times that of the plain definition
in the same dtype, plus a few roundings of the largest value and of the scores.
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

from attnbench.kernels import Partition, window
from attnbench.kernels.window._configs import Config

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call: a partition, its grids, how many tokens the grids lack, sizes and options."""

    name: str
    partition: Partition
    grid: tuple[int, ...]
    grid_kv: tuple[int, ...] | None = None
    lacks: int = 0
    d: int = 16
    dv: int = 16
    h: int = 1
    kv_heads: int = 1
    bias: bool = False
    key_bias: Callable[[], Tensor] | None = None
    q_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tile: tuple[int, int] | None = (16, 16)

    def __str__(self) -> str:
        return self.name


def _removed(*shape: int, keys: slice) -> Tensor:
    bias = torch.randn(shape)
    bias[..., keys] = -INF
    return bias


CASES = [
    Case("block, bias, default tiles", Partition.block((3, 4)), (5, 7), bias=True, tile=None),
    Case("shifted, bias", Partition.block((3, 4), shift=(1, 2)), (5, 6), lacks=3, h=2, bias=True),
    Case("shifted, 1-D, grouped", Partition.block((8,), shift=(3,)), (20,), h=4, kv_heads=2),
    Case("several tiles a window", Partition.block((20,)), (30,), bias=True),
    Case("many windows a tile", Partition.block((2, 2)), (4, 6), d=40),
    Case("halo, bias, D != Dv", Partition.block((3, 3), halo=(1, 1)), (4, 5), d=24, dv=40, h=2, kv_heads=2,
         bias=True),
    Case("strided, bias", Partition.strided((4, 5), (2, 3)), (4, 5), bias=True),
    Case("dilated blocks", Partition.block((3,), dilation=(3,)), (23,), dv=8),
    Case("finer queries, clamped", Partition((4, 4), (3, 2), (2, 2), (-1, 0), (0, 0), (1, 1), "clamp"),
         (8, 4), (4, 3)),
    Case("windows beside the keys", Partition((4,), (2,), (2,), (-3,), (0,), (1,)), (17,), (7,)),
    Case("3-D, causal, bias", Partition.block((2, 2, 3), shift=(1, 1, 1)), (2, 3, 4), bias=True,
         options={"causal": True}),
    Case("key bias per head removes windows", Partition.block((4,)), (19,), h=2,
         key_bias=lambda: _removed(2, 19, keys=slice(4, 9))),
    Case("key bias, bias", Partition.block((2, 4)), (5, 4), bias=True,
         key_bias=lambda: _removed(1, 1, 20, keys=slice(17, 20))),
    Case("large logits", Partition.block((3, 3), halo=(1, 1)), (4, 4), q_scale=30.0),
    Case("negative scale", Partition.block((5,)), (9,), options={"scale": -0.3}),
    Case("one token", Partition.block((7, 7)), (1, 1), bias=True),
]  # fmt: skip
FLEX = {"shifted, bias", "halo, bias, D != Dv", "finer queries, clamped", "3-D, causal, bias",
        "key bias per head removes windows"}  # fmt: skip
HALF = {"halo, bias, D != Dv", "key bias per head removes windows",
        "large logits"}  # fmt: skip


@lru_cache(maxsize=1)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as ``dtype`` holds them, biases in fp32, and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    n, m = (math.prod(grid) - case.lacks for grid in (case.grid, case.grid_kv or case.grid))
    shapes = {
        "q": (case.h, n, case.d),
        "k": (case.kv_heads, m, case.d),
        "v": (case.kv_heads, m, case.dv),
        "do": (case.h, n, case.dv),
    }
    found = {name: torch.randn(1, *shape).to(dtype) for name, shape in shapes.items()}
    found["q"] *= case.q_scale
    found["d_lse"] = torch.randn(1, case.h, n)
    if case.bias:
        found["bias"] = torch.randn(case.h, *case.partition.table)
    if case.key_bias is not None:
        found["key_bias"] = case.key_bias()
    return found


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False, train: bool = True) -> Any:
    """o, lse and, to ``train``, gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs = {name: x.double() if wide else x for name, x in _inputs(case, dtype).items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.clone().requires_grad_(train) for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    others = {name: x for name, x in inputs.items() if name.endswith("bias")}
    o, lse = window(
        q, k, v, case.partition, grid=case.grid, grid_kv=case.grid_kv, **others, **case.options,
        backend=backend,
    )  # fmt: skip
    results = {"o": o.detach(), "lse": lse.detach()}
    if train:
        found = torch.autograd.grad([o, lse], list(inputs.values()), [do, d_lse])
        results |= {f"d_{name}": gradient for name, gradient in zip(inputs, found, strict=True)}
    return results


def _assert_close(case: Case, dtype: torch.dtype, backend: str, train: bool = True) -> None:
    inputs = _inputs(case, dtype)
    keys = inputs["k"].repeat_interleave(case.h // case.kv_heads, 1)
    scores = case.options.get("scale", case.d**-0.5) * inputs["q"].float() @ keys.float().mT
    rescored = torch.finfo(torch.float32).eps * float(scores.abs().max())
    truth = _results(case, dtype, "reference", wide=True)
    naive = _results(case, dtype, "reference")
    actual = _results(case, dtype, backend, train=train)
    assert actual.keys() == (truth.keys() if train else {"o", "lse"})
    for name, x in actual.items():
        assert x.dtype is naive[name].dtype
        assert x.shape == truth[name].shape
        blind = torch.isneginf(truth[name])
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        expected = truth[name].masked_fill(blind, 0.0)
        error = _error(x, expected, blind)
        eps = torch.finfo(dtype if name != "lse" else torch.float32).eps
        if name == "lse":  # a sum of exponentials of scores, whose factors were rounded once in the dtype
            eps += torch.finfo(dtype).eps / 4
        allowed = 3 * _error(naive[name], expected, blind)
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


def _tiles(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int] | None) -> None:
    """Tiles small enough that small grids have several, and boxes of several steps; None: the default."""
    if tile is not None:
        launch = importlib.import_module("attnbench.kernels.window._launch")
        monkeypatch.setattr(launch, "candidates", lambda *args: (Config(*tile, 4, 1),))


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    def test_triton(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        _tiles(monkeypatch, case.tile)
        _assert_close(case, torch.float32, "triton")
        if case.name in HALF:
            _assert_close(case, torch.float16, "triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FLEX], ids=str)
def test_flex(case: Case) -> None:
    _assert_close(case, torch.float32, "flex", train=False)


def test_torch_computes_a_chunk_of_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("attnbench.kernels.window.torch")
    monkeypatch.setattr(backend, "CHUNK_SCORES", 1)
    case = CASES[5]
    _results.cache_clear()
    _assert_close(case, torch.float32, "torch")


def test_strides_and_layout() -> None:
    """Heads last in memory, and an expanded gradient: read as they lie, and o comes back in that order."""
    partition, grid = Partition.block((3, 3)), (3, 4)
    wide = [torch.randn(1, 12, 2, 32) for _ in range(3)]
    q, k, v = (x[..., ::2].transpose(1, 2).requires_grad_() for x in wide)
    o, lse = window(q, k, v, partition, grid=grid, backend="triton")
    assert o.transpose(1, 2).is_contiguous()
    o2, lse2 = window(q, k, v, partition, grid=grid, backend="reference")
    torch.testing.assert_close((o, lse), (o2, lse2))
    found, expected = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (o, o2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradient_of_lse_alone() -> None:
    q, k, v = (torch.randn(1, 1, 12, 16, requires_grad=True) for _ in range(3))
    found, expected = (
        torch.autograd.grad(window(q, k, v, Partition.block((5,)), grid=(12,), backend=b)[1].sum(), (q, k))
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)
