"""query_softmax: every backend against fp64, forward and every gradient, and the definition against loops.

The rule: the error against fp64 is at most three times that of the definition computed in the same dtype,
plus a few roundings of the largest value.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported
from attnbench.kernels.query_softmax import query_softmax

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call; sizes that no tile divides. ``mask`` is the shape of a mask that also loses key 5."""

    name: str
    n: int = 7
    m: int = 37
    d: int = 12
    dv: int = 20
    h: int = 1
    q_scale: float = 1.0
    mask: tuple[int, ...] = ()
    strided: bool = False
    values: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def hard(self) -> bool:
        """Whether the case takes the arg-max."""
        return bool(self.options.get("hard"))


MEAN = {"normalize": True, "eps": 1e-8}
CASES = [
    Case("sum"),
    Case("mean", h=2, options=MEAN),
    Case("dead queries", q_scale=60.0, options=MEAN),
    Case("several tiles of queries", n=40, m=21, options=MEAN),
    Case("one query", n=1, options={"normalize": True}),
    Case("one key", m=1),
    Case("masked", mask=(7, 37), options={"normalize": True, "eps": 1e-3}),
    Case("masked keys, guard of the mass", mask=(1, 37),
         options={"normalize": True, "eps": 1e-2, "eps_mode": "mass"}),
    Case("masked, several tiles of queries", n=40, m=21, mask=(40, 21)),
    Case("without values", values=False, mask=(7, 37)),
    Case("arg-max", h=2, options={"hard": True}),
    Case("arg-max, mean", mask=(7, 37), options={"hard": True, "normalize": True}),
    Case("arg-max, several tiles of queries", n=40, m=21, mask=(40, 21), options={"hard": True, "eps": 0.1}),
    Case("strided", n=5, m=18, strided=True),
]  # fmt: skip


@lru_cache(maxsize=2)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(sum(map(ord, case.name)))
    shapes = {"q": (case.n, case.d), "k": (case.m, case.d), "v": (case.m, case.dv)}
    x: dict[str, Any] = {name: torch.randn(1, case.h, *shape) for name, shape in shapes.items()}
    x["q"] *= case.q_scale
    x = {name: t.to(dtype) for name, t in x.items()}
    if not case.values:
        x["v"] = None
    x["mask"] = None
    if case.mask:
        x["mask"] = torch.rand(case.mask) < 0.3
        x["mask"][..., 5] = True
    return x


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False) -> dict[str, Tensor]:
    """o, mass, index and every gradient; ``wide`` computes the inputs of ``dtype`` in fp64."""
    x = dict(_inputs(case, dtype))
    mask = x.pop("mask")
    for name, t in x.items():
        if t is not None:
            t = t.double() if wide else t.clone()
            x[name] = (t.mT.contiguous().mT if case.strided else t).requires_grad_()
    o, mass, index = query_softmax(**x, mask=mask, **case.options, backend=backend)
    outputs = {} if o is None else {"o": o}
    if not case.hard:
        outputs["mass"] = mass
    torch.manual_seed(1)
    sent = [torch.randn(t.shape).to(t.dtype) for t in outputs.values()]
    wanted = {name: t for name, t in x.items() if t is not None and (name == "v" or not case.hard)}
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), sent)
    results = {name: t.detach() for name, t in outputs.items()} | {"mass": mass.detach()}
    if index is not None:
        results["index"] = index
    return results | {f"d_{name}": g for name, g in zip(wanted, found, strict=True)}


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
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert x.dtype is naive[name].dtype, name
        assert x.shape == truth[name].shape
        if name == "index":
            assert torch.equal(x, naive[name])
            continue
        error = (x.double() - truth[name]).abs().max()
        allowed = 3 * (naive[name].double() - truth[name]).abs().max()
        # Half precision rounds the weights or the scores before a product. A score of up to 3 q_scale is
        # rounded three times by eps / 2 (product, change to base 2, difference to the log-sum-exp), and its
        # weight is off by the sum: 4.5 eps q_scale.
        eps = torch.finfo(dtype if dtype is torch.float16 else x.dtype).eps
        allowed += 8 * eps * max(1.0, float(truth[name].abs().max())) * max(1.0, case.q_scale / 2)
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that short sequences have several, in several parts."""
    launch = importlib.import_module("attnbench.kernels.query_softmax._launch")
    config = launch.Config(16, 16, 4, 1)
    monkeypatch.setattr(launch, "candidates", lambda *args: (config,))
    monkeypatch.setattr(launch, "split_count", lambda tiles, programs, processors: min(tiles, 2))


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")

    @pytest.mark.usefixtures("small_tiles")
    def test_triton(self, case: Case) -> None:
        _assert_close(case, torch.float32, "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["mean", "dead queries", "masked", "arg-max, mean"])
def test_triton_in_half_precision(name: str) -> None:
    _assert_close(next(case for case in CASES if case.name == name), torch.float16, "triton")


def test_triton_with_its_own_tiles() -> None:
    _assert_close(Case("default tiles", n=20, m=70, d=40, dv=24, options=MEAN), torch.float32, "triton")


# ---- the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("eps_mode", ["weight", "mass"])
def test_reference_is_the_definition(hard: bool, eps_mode: str) -> None:
    q, k, v = torch.randn(3, 2).double(), torch.randn(4, 2).double(), torch.randn(4, 2).double()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1] = True
    mask[0, 2] = True
    options = {"hard": hard, "normalize": True, "eps": 0.1, "eps_mode": eps_mode, "scale": 0.7}
    o, mass, index = query_softmax(
        q[None, None], k[None, None], v[None, None], mask=mask, **options, backend="reference"
    )
    sums, masses, owners = torch.zeros(3, 2).double(), [0.0] * 3, []
    for j in range(4):
        rivals = [i for i in range(3) if not mask[i, j]]
        scores = {i: math.exp(0.7 * float(q[i] @ k[j])) for i in rivals}
        owners.append(max(rivals, key=scores.__getitem__) if rivals else -1)
        for i in rivals:
            w = float(i == owners[-1]) if hard else scores[i] / sum(scores.values())
            w += 0.1 if eps_mode == "weight" else 0.0
            masses[i] += w
            sums[i] += w * v[j]
    torch.testing.assert_close(mass[0, 0], torch.tensor(masses).double())
    den = mass[0, 0] + (0.1 if eps_mode == "mass" else 0.0)
    torch.testing.assert_close(o[0, 0], sums / den[:, None])
    assert index is None if not hard else index[0, 0].tolist() == owners


def test_gradcheck() -> None:
    q, k, v = (torch.randn(1, 1, n, 2, dtype=torch.double, requires_grad=True) for n in (3, 4, 4))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return query_softmax(q, k, v, normalize=True, eps=0.1, mask=mask, backend="reference")[:2]

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestProperties:
    def test_mass_is_conserved(self, backend: str) -> None:
        q, k, v = (torch.randn(2, 2, n, 8).double() for n in (5, 30, 30))
        for hard in (False, True):
            o, mass, _ = query_softmax(q, k, v, hard=hard, backend=backend)
            torch.testing.assert_close(o.sum(2), v.sum(2))
            torch.testing.assert_close(mass.sum(2), torch.full((2, 2), 30.0).double())

    def test_transpose_of_softmax_attention(self, backend: str) -> None:
        """⟨g, mix(v)⟩ = ⟨softmax over q of the same scores applied to g, v⟩."""
        q, k, v, g = (torch.randn(1, 2, n, 8).double() for n in (5, 30, 30, 5))
        o, _, _ = query_softmax(q, k, v, backend=backend)
        other = torch.softmax(8**-0.5 * k @ q.mT, -1) @ g
        torch.testing.assert_close((g * o).sum(), (other * v).sum())

    def test_cold_softmax_is_the_arg_max(self, backend: str) -> None:
        q, k, v = (torch.randn(1, 1, n, 8).double() for n in (5, 30, 30))
        soft = query_softmax(q, k, v, scale=1e5, backend=backend)
        hard = query_softmax(q, k, v, hard=True, backend=backend)
        torch.testing.assert_close(soft.o, hard.o)
        assert torch.equal(hard.index[0, 0], (k @ q.mT).argmax(-1)[0, 0].int())

    def test_equal_queries_share_and_the_first_takes(self, backend: str) -> None:
        q = torch.randn(1, 1, 1, 8).double().expand(1, 1, 4, 8)
        k, v = torch.randn(1, 1, 9, 8).double(), torch.randn(1, 1, 9, 3).double()
        o = query_softmax(q, k, v, **MEAN, backend=backend).o
        torch.testing.assert_close(o, v.mean(2, keepdim=True).expand(1, 1, 4, 3))
        assert not query_softmax(q, k, v, hard=True, backend=backend).index.any()

    def test_empty_cluster_and_no_keys(self, backend: str) -> None:
        q, k = torch.tensor([[[[1.0], [-1.0]]]]), torch.ones(1, 1, 3, 1)
        o, mass, _ = query_softmax(q, k, k, hard=True, normalize=True, backend=backend)
        assert o.flatten().tolist() == [1.0, 0.0]
        assert mass.flatten().tolist() == [3.0, 0.0]
        nothing = query_softmax(q, k[:, :, :0], k[:, :, :0], normalize=True, backend=backend)
        assert nothing.o.flatten().tolist() == [0.0, 0.0]

    def test_arg_max_gives_no_gradient_to_scores(self, backend: str) -> None:
        q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for n in (3, 5, 5))
        query_softmax(q, k, v, hard=True, backend=backend).o.sum().backward()
        assert q.grad is None or not q.grad.any()
        torch.testing.assert_close(v.grad, torch.ones_like(v))


def test_no_keys_and_ties_in_triton() -> None:
    q = torch.ones(1, 1, 4, 8)
    k, v = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 3)
    assert not query_softmax(q, k, v, hard=True, backend="triton").index.any()
    nothing = query_softmax(q, k[:, :, :0], v[:, :, :0], normalize=True, backend="triton")
    assert not nothing.o.any()
    assert not nothing.mass.any()


# ---- misuse ------------------------------------------------------------------------------------------------


def test_shapes_and_options_that_do_not_match() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"q, k, v: observed .*\(1, 1, 6, 4\)"):
        query_softmax(q, k, torch.randn(1, 1, 6, 4))
    with pytest.raises(ValueError, match="eps_mode: observed 'sum'"):
        query_softmax(q, k, k, eps_mode="sum")
    with pytest.raises(ValueError, match=r"mask: observed torch\.float32, expected torch\.bool"):
        query_softmax(q, k, k, mask=torch.zeros(3, 5))


def test_what_triton_does_not_serve() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    with pytest.raises(Unsupported, match="float64"):
        query_softmax(q.double(), k.double(), k.double(), backend="triton")
    with pytest.raises(Unsupported, match="head dim of v: observed 257"):
        query_softmax(q, k, torch.randn(1, 1, 5, 257), backend="triton")


def test_candidates_are_few_and_splits_are_not_short() -> None:
    configs = importlib.import_module("attnbench.kernels.query_softmax._configs")
    for head_dim in (16, 64, 128, 256):
        for n in (1, 7, 100, 4096):
            found = configs.candidates("mix", n, 4096, head_dim, 2, 90)
            assert 1 <= len(found) <= 12
            assert len(set(found)) == len(found)
    assert configs.split_count(1000, 4, 132) == 132
    assert configs.split_count(6, 4, 132) == 1
    assert configs.split_count(1000, 10_000, 132) == 1
