"""Every backend of block_mass against fp64, and against the attention map that it summarises."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, block_mass, flash
from attnbench.kernels.flash._configs import Config


@dataclass(frozen=True)
class Case:
    """One call; ``tile`` is smaller than some blocks, so that these have several tiles."""

    name: str
    n: int = 70
    m: int = 70
    d: int = 16
    h: int = 2
    kv_heads: int = 2
    block_q: int = 32
    block_k: int = 32
    causal: bool = False
    scale: float | None = None
    q_scale: float = 1.0
    tile: tuple[int, int] = (32, 32)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("full"),
    Case("causal", causal=True),
    Case("one query", n=1, m=17, causal=True),
    Case("one key", n=17, m=1),
    Case("causal N<M", n=33, m=90, causal=True, block_q=16, block_k=48),
    Case("causal N>M has blind queries", n=90, m=33, causal=True, block_k=16),
    Case("grouped heads", h=4, kv_heads=2, n=40, d=24, causal=True),
    Case("several tiles of a block", block_q=64, block_k=64, tile=(16, 32), causal=True),
    Case("blocks that no tile divides", n=50, m=61, block_q=24, block_k=7, causal=True),
    Case("large logits", q_scale=30.0),
    Case("negative scale", scale=-0.3, n=33),
]


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(map(ord, case.name)))
    q = (case.q_scale * torch.randn(2, case.h, case.n, case.d)).to(dtype)
    k = torch.randn(2, case.kv_heads, case.m, case.d).to(dtype)
    options = {"causal": case.causal, "scale": case.scale, "backend": "reference"}
    _, lse = flash(q.double(), k.double(), k.double(), **options)
    return q, k, lse.float()


def _call(case: Case, inputs: tuple[Tensor, ...], reduce: str, backend: str) -> Tensor:
    return block_mass(
        *inputs, block_q=case.block_q, block_k=case.block_k, scale=case.scale, causal=case.causal,
        reduce=reduce, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduce", ["sum", "max"])
class TestAgainstFp64:
    def _assert_close(self, case: Case, dtype: torch.dtype, reduce: str, backend: str) -> None:
        inputs = _inputs(case, dtype)
        truth = _call(case, tuple(x.double() for x in inputs), reduce, "reference")
        found = _call(case, inputs, reduce, backend)
        assert found.dtype is torch.float32
        # a score of size s has an error of s·eps in fp32, which is the relative error of its weight; in fp16
        # the products of q and k are exact in fp32, and only the plain definition rounds the score to fp16
        tolerance = 2e-5 * max(1.0, case.q_scale)
        if backend == "torch" and dtype is torch.float16:
            tolerance = 4e-3 * case.q_scale
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_triton(
        self, case: Case, reduce: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = importlib.import_module("attnbench.kernels.block_mass.triton")
        monkeypatch.setattr(module, "choose", lambda *args: Config(*case.tile, 4, 2))
        self._assert_close(case, dtype, reduce, "triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
    def test_torch(
        self, case: Case, reduce: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = importlib.import_module("attnbench.kernels.block_mass.torch")
        monkeypatch.setattr(module, "CHUNK_SCORES", 1)  # one query block at a time
        if dtype is torch.float64:
            inputs = tuple(x.double() for x in _inputs(case, dtype))
            expected = _call(case, inputs, reduce, "reference")
            torch.testing.assert_close(_call(case, inputs, reduce, "torch"), expected)
        else:
            self._assert_close(case, dtype, reduce, "torch")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
class TestMeaning:
    def test_sums_add_up_to_the_queries_that_see_a_key(self, backend: str) -> None:
        case = Case("causal N>M has blind queries", n=90, m=33, causal=True)
        mass = _call(case, _inputs(case, torch.float32), "sum", backend)
        torch.testing.assert_close(mass.sum((2, 3)), torch.full((2, 2), 33.0), rtol=1e-4, atol=0)

    def test_a_row_without_mass(self, backend: str) -> None:
        case = Case("full", n=33)
        q, k, lse = _inputs(case, torch.float32)
        mass = _call(case, (q, k, torch.full_like(lse, -math.inf)), "max", backend)
        assert torch.equal(mass, torch.zeros_like(mass))

    def test_blocks_of_one_are_the_map(self, backend: str) -> None:
        case = Case("ones", n=5, m=7, block_q=1, block_k=1, causal=True)
        q, k, lse = _inputs(case, torch.float32)
        hidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
        expected = (q @ k.mT / 4).masked_fill(hidden, -math.inf).softmax(-1)
        torch.testing.assert_close(_call(case, (q, k, lse), "sum", backend), expected, rtol=1e-5, atol=1e-6)

    def test_strides(self, backend: str) -> None:
        case = Case("causal", causal=True, n=40)
        q, k, lse = _inputs(case, torch.float32)
        expected = _call(case, (q, k, lse), "sum", "reference")
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, lse)]
        torch.testing.assert_close(
            _call(case, tuple(strided), "sum", backend), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_gradcheck(backend: str, reduce: str) -> None:
    case = Case("small", n=5, m=7, d=3, block_q=2, block_k=3, causal=True)
    inputs = tuple(x[:1].double().requires_grad_() for x in _inputs(case, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: _call(case, x, reduce, backend), inputs)


class TestErrors:
    def test_triton_has_no_gradient(self) -> None:
        q, k, lse = _inputs(Case("full"), torch.float32)
        with pytest.raises(Unsupported, match="require gradients"):
            _call(Case("full"), (q.requires_grad_(), k, lse), "sum", "triton")

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match="q, k, lse: observed"):
            block_mass(
                torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5), block_q=2, block_k=2
            )

    def test_reduction(self) -> None:
        q, k, lse = _inputs(Case("full"), torch.float32)
        with pytest.raises(ValueError, match="observed 'mean'"):
            _call(Case("full"), (q, k, lse), "mean", "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
def test_real_size(dtype: torch.dtype, d: int) -> None:
    q = torch.randn(2, 8, 4000, d, device="cuda", dtype=dtype)
    k = torch.randn(2, 2, 4000, d, device="cuda", dtype=dtype)
    _, lse = flash(q, k, k, causal=True)
    options = {"block_q": 128, "block_k": 128, "causal": True}
    expected = block_mass(q.double(), k.double(), lse.double(), **options, backend="torch")
    first, second = (block_mass(q, k, lse, **options, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), expected, rtol=1e-3, atol=1e-3)
