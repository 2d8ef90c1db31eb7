"""tensor3: every backend against fp64, forward and every gradient, and the definition against loops.

The rule: the error against fp64 is at most three times that of the definition computed in the same dtype,
plus a few roundings of the largest value and of the largest score.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported
from attnbench.kernels.tensor3 import tensor3

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like
NAMES = ("q", "k1", "k2", "v1", "v2")


@dataclass(frozen=True)
class Case:
    """One call; sizes that no tile divides. ``masks``: random ones, or the number of a set to remove."""

    name: str
    n: int = 5
    m1: int = 3
    m2: int = 6
    d: int = 12
    dv: int = 20
    q_scale: float = 1.0
    causal: bool = False
    masks: str | int = ""
    strided: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("full"),
    Case("several tiles", n=18, m1=2, m2=19),
    Case("several tiles of the first set", n=2, m1=18, m2=3),
    Case("one query, one pair", n=1, m1=1, m2=1),
    Case("causal", n=4, m1=4, m2=4, causal=True),
    Case("causal, sets of other lengths", n=3, m1=5, m2=2, causal=True),
    Case("masks", masks="random"),
    Case("a set removed", n=2, m2=2, masks=1),
    Case("large logits", n=3, q_scale=60.0),
    Case("strided", n=2, strided=True),
]


@lru_cache(maxsize=2)
def _inputs(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(sum(map(ord, case.name)))
    rows = (case.n, case.m1, case.m2, case.m1, case.m2)
    cols = (case.d,) * 3 + (case.dv,) * 2
    x = {name: torch.randn(1, 1, *shape) for name, *shape in zip(NAMES, rows, cols, strict=True)}
    x["q"] *= case.q_scale
    masks = {}
    if case.masks == "random":
        masks = {"mask1": torch.tensor([[True, False, False]]), "mask2": torch.rand(1, case.m2) < 0.4}
    elif case.masks:
        masks = {f"mask{case.masks}": torch.ones(1, 1, dtype=torch.bool)}
    return {name: t.to(dtype) for name, t in x.items()}, masks


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False) -> dict[str, Tensor]:
    """o, lse and every gradient; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs, masks = _inputs(case, dtype)
    x = {name: t.double() if wide else t.clone() for name, t in inputs.items()}
    if case.strided:
        x = {name: t.mT.contiguous().mT for name, t in x.items()}
    leaves = [t.requires_grad_() for t in x.values()]
    o, lse = tensor3(*leaves, causal=case.causal, **masks, backend=backend)
    torch.manual_seed(1)
    sent = [torch.randn(o.shape).to(o.dtype), torch.randn(lse.shape).to(lse.dtype)]
    found = torch.autograd.grad([o, lse], leaves, sent)
    results = {"o": o.detach(), "lse": lse.detach()}
    return results | {f"d_{name}": g for name, g in zip(NAMES, found, strict=True)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a backend forgets to write is seen."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(EMPTY(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(EMPTY_LIKE(*args, **options)))


def _assert_close(case: Case, dtype: torch.dtype, backend: str) -> None:
    truth = _results(case, dtype, "reference", wide=True)
    naive = _results(case, dtype, "reference")
    actual = _results(case, dtype, backend)
    for name, expected in truth.items():
        x = actual[name]
        assert x.dtype is naive[name].dtype, name
        assert x.shape == expected.shape
        blind = torch.isneginf(expected)
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        x, y, expected = (t.double().masked_fill(blind, 0.0) for t in (x, naive[name], expected))
        eps = torch.finfo(dtype).eps
        allowed = 3 * (y - expected).abs().max()
        allowed += 8 * eps * max(1.0, float(expected.abs().max())) * max(1.0, case.q_scale / 4)
        error = (x - expected).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tiles that a dot takes."""
    launch = importlib.import_module("attnbench.kernels.tensor3._launch")
    monkeypatch.setattr(launch, "candidates", lambda *args: (launch.Config(16, 16, 4, 1),))


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")

    @pytest.mark.usefixtures("small_tiles")
    def test_triton(self, case: Case) -> None:
        _assert_close(case, torch.float32, "triton")


@pytest.mark.parametrize("name", ["causal", "masks"])
def test_triton_in_half_precision_with_its_own_tiles(name: str) -> None:
    _assert_close(next(case for case in CASES if case.name == name), torch.float16, "triton")


def test_torch_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("attnbench.kernels.tensor3.torch")
    monkeypatch.setattr(module, "SCORES", 40)
    _assert_close(Case("blocks", causal=True, masks="random"), torch.float32, "torch")


# ---- the definition ----------------------------------------------------------------------------------------


def test_reference_is_the_definition() -> None:
    q, k1, k2, v1, v2 = (torch.randn(1, 1, n, 2).double() for n in (3, 3, 4, 3, 4))
    o, lse = tensor3(q, k1, k2, v1, v2, causal=True, scale=0.7, backend="reference")
    for i in range(3):
        total, value = 0.0, torch.zeros(2).double()
        for j in range(3):
            for l in range(4):
                if j <= i and l <= i + 1:
                    s = 0.7 * sum(q[0, 0, i, d] * k1[0, 0, j, d] * k2[0, 0, l, d] for d in range(2))
                    total += math.exp(s)
                    value += math.exp(s) * v1[0, 0, j] * v2[0, 0, l]
        torch.testing.assert_close(o[0, 0, i], value / total)
        assert math.isclose(lse[0, 0, i], math.log(total), rel_tol=1e-9)


def test_gradcheck() -> None:
    leaves = [torch.randn(1, 1, n, 2, dtype=torch.double, requires_grad=True) for n in (2, 3, 2, 3, 2)]
    mask = torch.tensor([[False, True, False]])
    assert torch.autograd.gradcheck(lambda *x: tensor3(*x, mask1=mask, backend="reference"), leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestProperties:
    def test_ones_in_one_set_leave_softmax_attention(self, backend: str) -> None:
        q, k, v = (torch.randn(1, 2, n, 4).double() for n in (5, 7, 7))
        ones = torch.ones(1, 2, 3, 4).double()
        o, _ = tensor3(q, ones, k, ones, v, backend=backend)
        torch.testing.assert_close(o, torch.softmax(q @ k.mT / 4, -1) @ v)

    def test_the_sets_are_interchangeable(self, backend: str) -> None:
        q, k1, k2, v1, v2 = (torch.randn(1, 2, n, 4).double() for n in (5, 7, 3, 7, 3))
        one = tensor3(q, k1, k2, v1, v2, backend=backend)
        other = tensor3(q, k2, k1, v2, v1, backend=backend)
        torch.testing.assert_close(one, other)

    def test_a_zero_query_takes_the_means(self, backend: str) -> None:
        k1, k2, v1, v2 = (torch.randn(1, 2, n, 4).double() for n in (7, 3, 7, 3))
        o, lse = tensor3(torch.zeros(1, 2, 1, 4).double(), k1, k2, v1, v2, backend=backend)
        torch.testing.assert_close(o, v1.mean(2, keepdim=True) * v2.mean(2, keepdim=True))
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(21)))

    def test_without_keys(self, backend: str) -> None:
        q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
        o, lse = tensor3(q, k[:, :, :0], k, k[:, :, :0], k, backend=backend)
        assert not o.any()
        assert torch.isneginf(lse).all()


def test_without_keys_in_triton() -> None:
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    o, lse = tensor3(q, k[:, :, :0], k, k[:, :, :0], k, backend="triton")
    assert not o.any()
    assert torch.isneginf(lse).all()


# ---- misuse ------------------------------------------------------------------------------------------------


def test_shapes_and_masks_that_do_not_match() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"q, k2, v2: observed .*\(1, 1, 5, 3\)"):
        tensor3(q, k, k, k, k[..., :3])
    with pytest.raises(ValueError, match=r"mask1: observed torch\.float32, expected torch\.bool"):
        tensor3(q, k, k, k, k, mask1=torch.zeros(1, 5))


def test_what_triton_does_not_serve() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(Unsupported, match="float64"):
        tensor3(*[q.double()] * 5, backend="triton")
    wide = torch.randn(1, 1, 3, 257)
    with pytest.raises(Unsupported, match="head dim of q: observed 257"):
        tensor3(*[wide] * 5, backend="triton")


def test_candidates_are_few_and_different() -> None:
    configs = importlib.import_module("attnbench.kernels.tensor3._configs")
    for kernel in ("forward", "backward_q", "backward_set"):
        for head_dim in (16, 128, 256):
            for itemsize in (2, 4):
                found = configs.candidates(kernel, 200, 200, head_dim, itemsize)
                assert 1 < len(found) <= 12
                assert len(set(found)) == len(found)
