"""Every backend of block_sparse against fp64, forward and every gradient, on small shapes with every option.

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

from attnbench.kernels import Unsupported, block_sparse, flash
from attnbench.kernels.flash._configs import Config
from attnbench.kernels.selection import Selection, diagonal, last_blocks, visible

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One call: sizes, blocks, lists per head, options, and how to draw the tensors among the options."""

    name: str
    n: int = 70
    m: int = 70
    d: int = 16
    dv: int = 16
    b: int = 1
    h: int = 2
    kv_heads: int = 2
    list_batch: int = 1
    list_heads: int = 1
    block_q: int = 32
    block_k: int = 32
    density: float = 0.6
    q_scale: float = 1.0
    full: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict, hash=False)
    tile: tuple[int, int] = (32, 32)

    def __str__(self) -> str:
        return self.name


def _permuted(n: int, h: int = 1) -> Tensor:
    return torch.stack([torch.randperm(n) for _ in range(h)]).int()


def _removed(m: int, *shape: int) -> Tensor:
    bias = torch.randn(*shape, m)
    bias[..., 5:40] = -INF
    return bias


CAUSAL = {"causal": True}
CASES = [
    Case("lists of all heads"),
    Case("every block", density=1.1),
    Case("no block", density=0.0, n=33, m=40),
    Case("one query", n=1, m=17),
    Case("one key", n=17, m=1, density=1.1),
    Case("one of each", n=1, m=1, density=1.1),
    Case("causal", options=CAUSAL),
    Case("causal N<M", n=33, m=90, options=CAUSAL, block_k=16, tile=(16, 16)),
    Case("causal N>M has blind queries", n=90, m=33, options=CAUSAL),
    Case("lists of a key head", b=2, h=4, list_batch=2, list_heads=2, d=24, dv=40, n=40, options=CAUSAL),
    Case("lists of a query head", h=4, list_heads=4, n=40, m=64, options=CAUSAL),
    Case("one key head", h=3, kv_heads=1, list_heads=3, d=40, dv=24, n=40),
    Case(
        "several tiles of a block", n=100, m=120, h=1, kv_heads=1, block_q=64, block_k=64, tile=(16, 32),
        options=CAUSAL,
    ),
    Case("blocks that no tile divides", block_q=24, block_k=7, n=50, m=61, options=CAUSAL),
    Case("blocks of one query", block_q=1, block_k=16, n=5, m=40, options=CAUSAL),
    Case(
        "default tiles", n=130, m=140, h=1, kv_heads=1, d=40, dv=40, block_q=64, block_k=128, tile=(0, 0),
        options=CAUSAL,
    ),
    Case("large logits", q_scale=30.0, options=CAUSAL),
    Case("negative scale", n=33, options={"scale": -0.3}),
    Case("key bias", tensors={"key_bias": lambda: _removed(70, 1, 1)}, options=CAUSAL),
    Case("key bias per head", h=4, n=40, tensors={"key_bias": lambda: _removed(70, 4)}),
    Case(
        "threshold",
        tensors={"key_bias": lambda: torch.randn(2, 70), "row_threshold": lambda: torch.randn(2, 70)},
    ),
    Case("positions of queries", n=40, options=CAUSAL, tensors={"q_pos": lambda: _permuted(70)[0, :40] - 3}),
    Case("positions of keys", options=CAUSAL, tensors={"k_pos": lambda: _permuted(70, 2)}),
    Case(
        "permuted, with flags", b=2, h=4, list_heads=2, n=48, m=48, block_q=16, block_k=16, density=1.1,
        full=True, options=CAUSAL, tile=(16, 16),
        tensors={"q_pos": lambda: _sorted_blocks(48, 16), "k_pos": lambda: _sorted_blocks(48, 16)},
    ),
    Case(
        "every option", b=2, h=4, list_batch=2, list_heads=4, n=33, m=50, d=24, dv=40, block_q=16, block_k=24,
        options={"causal": True, "scale": 0.4},
        tensors={
            "key_bias": lambda: _removed(50, 4),
            "row_threshold": lambda: torch.randn(2, 1, 33) - 1,
            "q_pos": lambda: torch.randint(0, 50, (2, 1, 33)),
            "k_pos": lambda: _permuted(50),
        },
    ),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def _sorted_blocks(n: int, block: int) -> Tensor:
    """A permutation that moves whole blocks: many pairs of blocks are visible as a whole."""
    return torch.arange(n).view(-1, block)[torch.randperm(n // block)].flatten()


def _selection(case: Case, tensors: dict[str, Tensor]) -> Selection:
    blocks = -(-case.n // case.block_q), -(-case.m // case.block_k)
    mask = torch.rand(case.list_batch, case.list_heads, *blocks) < case.density
    full = None
    if case.full:
        seen = tensors["k_pos"][None, :] <= tensors["q_pos"][:, None]
        full = seen.view(blocks[0], case.block_q, blocks[1], case.block_k).all(3).all(1).expand(mask.shape)
        assert 0 < int(full.sum()) < full.numel()
    return Selection.from_block_mask(mask, case.block_q, case.block_k, case.n, case.m, full=full)


@lru_cache(maxsize=2)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as ``dtype`` holds them, bias and threshold in fp32, and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    q = case.q_scale * torch.randn(case.b, case.h, case.n, case.d)
    k = torch.randn(case.b, case.kv_heads, case.m, case.d)
    v = torch.randn(case.b, case.kv_heads, case.m, case.dv)
    drawn = {name: draw() for name, draw in case.tensors.items()}
    return {
        **{name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))},
        **drawn,
        "selection": _selection(case, drawn),
        "do": torch.randn(case.b, case.h, case.n, case.dv).to(dtype),
        "d_lse": torch.randn(case.b, case.h, case.n),
    }


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool) -> dict[str, Tensor]:
    """o, lse and gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs = dict(_inputs(case, dtype))
    selection = inputs.pop("selection")
    if wide:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.detach().clone() for name, x in inputs.items()}
    wanted = {name: inputs[name].requires_grad_() for name in ("q", "k", "v", "key_bias") if name in inputs}
    q, k, v = (inputs.pop(name) for name in "qkv")
    o, lse = block_sparse(q, k, v, selection, **inputs, **case.options, backend=backend)
    found = torch.autograd.grad([o, lse], list(wanted.values()), [do, d_lse])
    gradients = {f"d_{name}": g for name, g in zip(wanted, found, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **gradients}


def _assert_close(case: Case, dtype: torch.dtype, backend: str) -> None:
    truth = _results(case, dtype, "reference", True)
    naive = _results(case, dtype, "reference", False)
    actual = _results(case, dtype, backend, False)
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


def _tiles(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    """Tiles small enough that short sequences have several of them; (0, 0) is the default."""
    if tile != (0, 0):
        launch = importlib.import_module("attnbench.kernels.block_sparse._launch")
        monkeypatch.setattr(launch, "choose", lambda *args: Config(*tile, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    def test_triton(self, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        _tiles(monkeypatch, case.tile)
        _assert_close(case, dtype, "triton")

    def test_torch(self, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("attnbench.kernels.block_sparse.torch")
        monkeypatch.setattr(module, "CHUNK_SCORES", 5000)  # a few query blocks at a time
        _assert_close(case, dtype, "torch")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
class TestMeaning:
    def _random(self, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(1, 2, n, 16), torch.randn(1, 2, m, 16), torch.randn(1, 2, m, 16)

    @pytest.mark.parametrize("causal", [False, True])
    def test_every_block_is_dense_attention(self, backend: str, causal: bool) -> None:
        q, k, v = self._random(40, 50)
        selection = Selection.from_block_mask(torch.ones(1, 1, 3, 4, dtype=torch.bool), 16, 16, 40, 50)
        found = block_sparse(q, k, v, selection, causal=causal, backend=backend)
        expected = flash(q, k, v, causal=causal, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_the_last_blocks_are_a_block_window(self, backend: str) -> None:
        q, k, v = self._random(64, 64)
        seen = visible(64, 64, 16, 16, True, CPU)
        selection = Selection.from_block_mask(last_blocks(seen, 1)[None, None], 16, 16, 64, 64)
        assert torch.equal(selection.block_mask[0, 0], diagonal(64, 64, 16, 16, CPU))
        o, _ = block_sparse(q, k, v, selection, causal=True, backend=backend)
        blocks = [flash(*(x[:, :, i : i + 16] for x in (q, k, v)), causal=True)[0] for i in range(0, 64, 16)]
        torch.testing.assert_close(o, torch.cat(blocks, 2), rtol=1e-5, atol=1e-5)

    def test_permuting_keys_with_their_positions_changes_nothing(self, backend: str) -> None:
        q, k, v = self._random(40, 48)
        order = torch.randperm(48)
        selection = Selection.from_block_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16, 16, 40, 48)
        found = block_sparse(
            q, k[:, :, order], v[:, :, order], selection, causal=True, k_pos=order, backend=backend
        )
        expected = flash(q, k, v, causal=True, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_no_future_key_is_read_into_the_past(self, backend: str) -> None:
        q, k, v = self._random(40, 40)
        selection = Selection.from_block_mask(torch.rand(1, 2, 3, 3) < 2, 16, 16, 40, 40)
        before = block_sparse(q, k, v, selection, causal=True, backend=backend)
        k[:, :, 20:], v[:, :, 20:] = 50 * torch.randn(2, 20, 16), torch.randn(2, 20, 16)
        after = block_sparse(q, k, v, selection, causal=True, backend=backend)
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close(x[:, :, :20], y[:, :, :20], rtol=1e-5, atol=1e-6)

    def test_keys_outside_the_lists_do_not_matter(self, backend: str) -> None:
        q, k, v = self._random(40, 64)
        mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
        mask[..., [0, 2]] = True
        k[:, :, 16:32], v[:, :, 48:] = math.nan, math.nan
        k[:, :, 48:], v[:, :, 16:32] = math.nan, math.nan
        if backend == "reference":
            k, v = (
                k.nan_to_num(7.0),
                v.nan_to_num(7.0),
            )  # the definition multiplies every value by a weight of 0
        selection = Selection.from_block_mask(mask, 16, 16, 40, 64)
        found = block_sparse(q, k, v, selection, backend=backend)
        kept = torch.cat([torch.arange(16), torch.arange(32, 48)])
        expected = flash(q, k[:, :, kept], v[:, :, kept], backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_strides(self, backend: str) -> None:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in self._random(40, 48))
        k = torch.cat([k, k], -1)[..., ::2]
        selection = Selection.from_block_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16, 16, 40, 48)
        grid = selection.indices.transpose(2, 3).contiguous().transpose(2, 3)
        strided = Selection(selection.counts, grid, 16, 16, 40, 48)
        found = block_sparse(q, k, v, strided, causal=True, backend=backend)
        expected = flash(q, k, v, causal=True, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    selection = Selection.from_block_mask(mask, 3, 2, 5, 6)
    q, k, v = (torch.randn(1, h, n, 3).double().requires_grad_() for h, n in ((2, 5), (1, 6), (1, 6)))
    bias = torch.randn(1, 2, 6).double().requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = block_sparse(q, k, v, selection, causal=True, key_bias=bias, backend=backend)
        return o, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_waste_nothing_of_a_block(kernel: str, capability: int, dtype: torch.dtype) -> None:
    choose = importlib.import_module("attnbench.kernels.block_sparse._configs").choose
    for d, vectors in ((40, False), (128, True), (256, False)):
        for block in (1, 7, 16, 24, 32, 64, 96, 128, 192, 1024):
            config = choose(kernel, capability, d, dtype, block, block, vectors)
            for side in (config.block_m, config.block_n):
                assert side >= 16
                assert side & (side - 1) == 0
                assert block % side == 0 if block % 32 == 0 else side < max(17, 2 * block)


@pytest.mark.parametrize("fewer", ["block_m", "block_n"])
def test_triton_with_half_a_tile(fewer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tuning does: candidates are launched, then one is chosen; halves divide a block as wholes do."""
    launch = importlib.import_module("attnbench.kernels.block_sparse._launch")

    def choose(*, candidates: Any, launch: Any, **_: Any) -> Any:
        assert len(set(candidates)) == len(candidates) <= 8
        default = candidates[0]
        halves = (each for each in candidates if getattr(each, fewer) < getattr(default, fewer))
        half = next(halves, candidates[-1])  # a side of 16 has none
        launch(half)()
        return half

    monkeypatch.setattr(launch, "pick", choose)
    _results.cache_clear()  # the results of the default tiles
    _assert_close(next(case for case in CASES if case.name == "causal"), torch.float32, "triton")


class TestErrors:
    def _selection(self, n: int = 16, heads: int = 1) -> Selection:
        return Selection.from_block_mask(torch.ones(1, heads, 1, 1, dtype=torch.bool), 16, 16, n, 16)

    def test_selection_of_another_length(self) -> None:
        q = torch.randn(1, 2, 16, 16)
        with pytest.raises(ValueError, match=r"selection: observed N = 15.* expected N = 16"):
            block_sparse(q, q, q, self._selection(15))

    def test_selection_of_another_head_count(self) -> None:
        q = torch.randn(1, 4, 16, 16)
        with pytest.raises(ValueError, match=r"Hs = 3.* Hs dividing 4"):
            block_sparse(q, q, q, self._selection(heads=3))

    def test_threshold_without_a_bias(self) -> None:
        q = torch.randn(1, 2, 16, 16)
        with pytest.raises(ValueError, match="row_threshold: observed no key_bias"):
            block_sparse(q, q, q, self._selection(), row_threshold=torch.zeros(16))

    def test_triton_refuses_fp64_and_wide_heads(self) -> None:
        q = torch.randn(1, 1, 16, 16, dtype=torch.float64)
        with pytest.raises(Unsupported, match=r"observed torch\.float64"):
            block_sparse(q, q, q, self._selection(), backend="triton")
        q = torch.randn(1, 1, 16, 257)
        with pytest.raises(Unsupported, match="observed 257"):
            block_sparse(q, q, q, self._selection(), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
class TestOnGpu:
    def _run(
        self, dtype: torch.dtype, d: int, block: int, backend: str, compute: torch.dtype
    ) -> list[Tensor]:
        torch.manual_seed(0)
        n, device = 4000, torch.device("cuda")
        blocks = -(-n // block)
        mask = (torch.rand(1, 8, blocks, blocks, device=device) < 0.2) | diagonal(n, n, block, block, device)
        selection = Selection.from_block_mask(mask, block, block, n, n)
        q, k, v, do = (torch.randn(1, h, n, d, device=device, dtype=dtype).to(compute) for h in (8, 2, 2, 8))
        given = [x.requires_grad_() for x in (q, k, v)]
        o, lse = block_sparse(*given, selection, causal=True, backend=backend)
        return [o, lse, *torch.autograd.grad(o, given, do)]

    def test_triton_at_real_size(self, dtype: torch.dtype, d: int, block: int) -> None:
        truth = self._run(dtype, d, block, "reference", torch.float64)
        first, second = (self._run(dtype, d, block, "triton", dtype) for _ in range(2))
        for x, y, expected in zip(first, second, truth, strict=True):
            assert torch.equal(x, y), "two runs differ"
            assert _relative(x, expected) < 8 * torch.finfo(dtype).eps

    def test_flex_at_real_size(self, dtype: torch.dtype, d: int, block: int) -> None:
        if block % 128:
            with pytest.raises(Unsupported, match="multiples of 128"):
                self._run(dtype, d, block, "flex", dtype)
            return
        truth = self._run(dtype, d, block, "reference", torch.float64)
        for x, expected in zip(self._run(dtype, d, block, "flex", dtype), truth, strict=True):
            assert _relative(x, expected) < 8 * torch.finfo(dtype).eps

    def test_nothing_waits_for_the_device(self, dtype: torch.dtype, d: int, block: int) -> None:
        self._run(dtype, d, block, "triton", dtype)  # compiled and allocated
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run(dtype, d, block, "triton", dtype)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _relative(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())
