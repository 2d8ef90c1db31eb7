"""selective_scan: every backend against fp64, forward and every gradient, and the definition against loops.

The rule: the error against fp64 is at most three times that of the definition computed in the same dtype,
plus a few roundings of the largest value.
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
from attnbench.kernels.selective_scan import selective_scan

EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call; sizes that no tile of the tests divides."""

    name: str
    n: int = 7
    e: int = 3
    ns: int = 2
    batch: int = 1
    k: int = 1
    full: bool = True  # with skip, gate, bias and initial state
    softplus: bool = True
    order: bool = False
    reverse: bool = False
    segment: int = 1
    decay: float = 1.0
    strided: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("every option"),
    Case("bare", full=False, softplus=False),
    Case("one token", n=1),
    Case("one state, one channel", ns=1, e=1),
    Case("strong decay", decay=60.0),
    Case("reverse", reverse=True, full=False),
    Case("orders, two directions", n=6, ns=1, k=2, order=True),
    Case("segments", segment=2),
    Case("segments in a reversed order", ns=1, segment=4, order=True, reverse=True, full=False),
    Case("blocks of channels", n=3, e=5, ns=1, batch=2),
    Case("strided", n=6, strided=True),
]


@lru_cache(maxsize=2)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(sum(map(ord, case.name)))
    shape = (case.batch, case.k, case.n)
    x = {
        "u": torch.randn(*shape, case.e),
        "delta": torch.randn(*shape, case.e),
        "a": -case.decay * torch.rand(case.k, case.e, case.ns),
        "b": torch.randn(*shape, case.ns),
        "c": torch.randn(*shape, case.ns),
    }
    if not case.softplus:
        x["delta"] = x["delta"].abs()
    if case.full:
        x["skip"] = torch.randn(case.k, case.e)
        x["z"] = torch.randn(*shape, case.e)
        x["delta_bias"] = torch.randn(case.k, case.e)
        x["initial_state"] = torch.randn(case.batch, case.k, case.e, case.ns)
    x = {name: t.to(dtype) for name, t in x.items()}
    if case.order:
        x["order"] = torch.stack([torch.randperm(case.n) for _ in range(case.k)]).int()
    return x


@lru_cache(maxsize=4)
def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False) -> dict[str, Tensor]:
    """y, the final state and every gradient; ``wide`` computes the inputs of ``dtype`` in fp64."""
    leaves = {}
    for name, x in _inputs(case, dtype).items():
        x = x.double() if wide and x.is_floating_point() else x.clone()
        if case.strided and x.dim() == 4:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        leaves[name] = x.requires_grad_() if x.is_floating_point() else x
    y, state = selective_scan(
        **leaves, delta_softplus=case.softplus, reverse=case.reverse, segment=case.segment, need_state=True,
        backend=backend,
    )  # fmt: skip
    torch.manual_seed(1)
    sent = [torch.randn(y.shape).to(y.dtype), torch.randn(state.shape).to(state.dtype)]
    wanted = {name: x for name, x in leaves.items() if x.is_floating_point()}
    found = torch.autograd.grad([y, state], list(wanted.values()), sent)
    results = {"y": y.detach(), "state": state.detach()}
    return results | {f"d_{name}": g for name, g in zip(wanted, found, strict=True)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a backend forgets to write is seen."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(EMPTY(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(EMPTY_LIKE(*args, **options)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that few steps are several chunks: the interpreter scans element by element."""
    configs = importlib.import_module("attnbench.kernels.selective_scan._configs")
    launch = importlib.import_module("attnbench.kernels.selective_scan._launch")
    backend = importlib.import_module("attnbench.kernels.selective_scan.triton")

    def candidates(direction: str, e: int, segment: int) -> tuple[Any, ...]:
        return (configs.Config(4, 4, 1),)

    monkeypatch.setattr(backend, "candidates", candidates)
    monkeypatch.setattr(launch, "carry_block", lambda width: (2, 8))


def _assert_close(case: Case, dtype: torch.dtype, backend: str) -> None:
    truth = _results(case, dtype, "reference", wide=True)
    naive = _results(case, dtype, "reference")
    actual = _results(case, dtype, backend)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert x.dtype is naive[name].dtype, name
        assert x.shape == truth[name].shape
        error = (x.double() - truth[name]).abs().max()
        allowed = 3 * (naive[name].double() - truth[name]).abs().max()
        allowed += 8 * torch.finfo(x.dtype).eps * max(1.0, float(truth[name].abs().max()))
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")

    @pytest.mark.usefixtures("small_tiles")
    def test_triton(self, case: Case) -> None:
        _assert_close(case, torch.float32, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_triton_in_half_precision() -> None:
    _assert_close(CASES[0], torch.float16, "triton")


def test_triton_with_its_own_tiles() -> None:
    _assert_close(Case("default tiles", n=3, e=2, ns=1), torch.float32, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_triton_with_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("attnbench.kernels.selective_scan._launch")
    monkeypatch.setattr(launch, "MAX_OFFSET", 0)
    _assert_close(Case("far", n=5, order=True), torch.float32, "triton")


# ---- the definition ----------------------------------------------------------------------------------------


def test_reference_is_the_recurrence() -> None:
    """Loops over numbers, as the docstring has it, with segments, an order and a gate."""
    case = Case("loops", n=7, e=2, ns=3, order=True, segment=3)
    x = {name: t.double() if t.is_floating_point() else t for name, t in _inputs(case, torch.float64).items()}
    y, state = selective_scan(**x, delta_softplus=True, segment=3, need_state=True, backend="reference")
    order = x["order"][0].tolist()
    for e in range(2):
        h = x["initial_state"][0, 0, e].clone()
        a = x["a"][0, e]
        steps, writes, forward = [], [], []
        for token in order:
            raw = float(x["delta"][0, 0, token, e] + x["delta_bias"][0, e])
            steps.append(math.log1p(math.exp(raw)))
            writes.append(steps[-1] * x["u"][0, 0, token, e] * x["b"][0, 0, token])
            h = torch.exp(steps[-1] * a) * h + writes[-1]
            forward.append(h)
        for t, token in enumerate(order):
            total = forward[t].clone()
            decay = torch.ones(3, dtype=torch.float64)
            for later in range(t + 1, min(7, (t // 3 + 1) * 3)):
                decay = decay * torch.exp(steps[later - 1] * a)
                total += decay * writes[later]
            gate = float(x["z"][0, 0, token, e])
            value = float(total @ x["c"][0, 0, token] + x["skip"][0, e] * x["u"][0, 0, token, e])
            assert math.isclose(float(y[0, 0, token, e]), value * gate / (1 + math.exp(-gate)), rel_tol=1e-9)
        torch.testing.assert_close(state[0, 0, e], h)


def test_gradcheck() -> None:
    x = _inputs(Case("gradcheck", n=3, e=1, segment=2), torch.float64)
    names = list(x)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, leaves, strict=True))
        return selective_scan(**named, delta_softplus=True, segment=2, need_state=True, backend="reference")

    assert torch.autograd.gradcheck(call, [x[name].requires_grad_() for name in names])


def _plain(n: int = 24, e: int = 3, ns: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    u, delta = torch.randn(2, n, e).double(), torch.rand(2, n, e).double()
    b, c = torch.randn(2, n, ns).double(), torch.randn(2, n, ns).double()
    return u, delta, -torch.rand(e, ns).double(), b, c


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestProperties:
    def test_split_and_carried_state(self, backend: str) -> None:
        u, delta, a, b, c = _plain()
        whole, state = selective_scan(u, delta, a, b, c, need_state=True, backend=backend)
        head, carried = selective_scan(
            u[:, :10], delta[:, :10], a, b[:, :10], c[:, :10], need_state=True, backend=backend
        )
        tail, last = selective_scan(
            u[:, 10:], delta[:, 10:], a, b[:, 10:], c[:, 10:], initial_state=carried, need_state=True,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(torch.cat([head, tail], 1), whole)
        torch.testing.assert_close(last, state)

    def test_constant_parameters_are_a_convolution(self, backend: str) -> None:
        u, delta, a, b, c = _plain()
        delta, b, c = delta[:, :1].expand_as(delta), b[:, :1].expand_as(b), c[:, :1].expand_as(c)
        y, _ = selective_scan(u, delta, a, b, c, backend=backend)
        lag = torch.arange(24).double()
        kernel = torch.einsum(
            "bn,bn,be,bent->bet", b[:, 0], c[:, 0], delta[:, 0],
            torch.exp(lag * (delta[:, 0, :, None] * a)[..., None]),
        )  # fmt: skip
        expected = torch.zeros_like(y)
        for t in range(24):
            for s in range(t + 1):
                expected[:, t] += kernel[..., t - s] * u[:, s]
        torch.testing.assert_close(y, expected)

    def test_zero_rates_are_a_cumulative_sum(self, backend: str) -> None:
        u, delta, a, b, c = _plain()
        y, _ = selective_scan(u, delta, 0 * a, b, c, backend=backend)
        states = ((delta * u)[..., None] * b[..., None, :]).cumsum(1)
        torch.testing.assert_close(y, (states * c[..., None, :]).sum(-1))

    def test_reverse_is_a_flip(self, backend: str) -> None:
        x = _plain()
        flipped = [t.flip(1) if t.dim() == 3 else t for t in x]
        y, _ = selective_scan(*x, reverse=True, segment=4, backend=backend)
        torch.testing.assert_close(y, selective_scan(*flipped, segment=4, backend=backend)[0].flip(1))

    def test_an_order_is_a_permutation_of_copies(self, backend: str) -> None:
        x = _plain()
        order = torch.randperm(24)
        permuted = [t[:, order] if t.dim() == 3 else t for t in x]
        y, _ = selective_scan(*x, order=order, backend=backend)
        torch.testing.assert_close(y[:, order], selective_scan(*permuted, backend=backend)[0])

    def test_one_segment_is_both_directions_less_the_own_term(self, backend: str) -> None:
        u, delta, a, b, c = _plain()
        y, _ = selective_scan(u, delta, a, b, c, segment=24, backend=backend)
        both = sum(
            selective_scan(u, delta, a, b, c, reverse=way, backend=backend)[0] for way in (False, True)
        )
        torch.testing.assert_close(y, both - delta * u * (b * c).sum(-1, keepdim=True))

    def test_directions_are_separate_scans(self, backend: str) -> None:
        u, delta, a, b, c = _plain()
        orders = torch.stack([torch.randperm(24) for _ in range(3)])
        rates = a * torch.rand(3, 3, 2).double()
        y, state = selective_scan(u, delta, rates, b, c, order=orders, need_state=True, backend=backend)
        assert y.shape == (2, 3, 24, 3)
        for k in range(3):
            alone, last = selective_scan(
                u, delta, rates[k], b, c, order=orders[k], need_state=True, backend=backend
            )
            torch.testing.assert_close(y[:, k], alone)
            torch.testing.assert_close(state[:, k], last)

    def test_no_tokens(self, backend: str) -> None:
        u, delta, a, b, c = (t[:, :0] if t.dim() == 3 else t for t in _plain())
        start = torch.randn(2, 3, 2).double()
        y, state = selective_scan(u, delta, a, b, c, initial_state=start, need_state=True, backend=backend)
        assert y.shape == (2, 0, 3)
        assert torch.equal(state, start)


def test_no_tokens_in_triton() -> None:
    x = [t[:, :0].float() if t.dim() == 3 else t.float() for t in _plain()]
    start = torch.randn(2, 3, 2)
    y, state = selective_scan(*x, initial_state=start, need_state=True, backend="triton")
    assert y.shape == (2, 0, 3)
    assert torch.equal(state, start)


# ---- misuse ------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_match() -> None:
    u, delta, a, b, c = _plain()
    with pytest.raises(ValueError, match=r"delta: observed \(2, 5, 3\), expected \(2, 24, 3\)"):
        selective_scan(u, delta[:, :5], a, b, c)
    with pytest.raises(ValueError, match="c: observed"):
        selective_scan(u, delta, a, b, c[..., :1])
    with pytest.raises(ValueError, match="real rates"):
        selective_scan(u, delta, a.to(torch.complex128), b, c)
    with pytest.raises(ValueError, match="segment: observed 0"):
        selective_scan(u, delta, a, b, c, segment=0)


def test_what_triton_does_not_serve() -> None:
    x = _plain()
    with pytest.raises(Unsupported, match="float64"):
        selective_scan(*x, backend="triton")
    u, delta, a, b, c = (t.float() for t in x)
    with pytest.raises(Unsupported, match="segment: observed 6, expected a power of two up to 32"):
        selective_scan(u, delta, a, b, c, segment=6, backend="triton")
    wide = torch.zeros(2, 24, 257)
    with pytest.raises(Unsupported, match="state size: observed 257"):
        selective_scan(u, delta, torch.zeros(3, 257), wide, wide, backend="triton")


def test_candidates_are_few_and_hold_segments() -> None:
    configs = importlib.import_module("attnbench.kernels.selective_scan._configs")
    for direction in ("forward", "backward"):
        for segment in (1, 4, 16, 32):
            found = configs.candidates(direction, 2048, segment)
            assert 1 < len(found) <= 12
            assert len(set(found)) == len(found)
            assert all(config.length % segment == 0 for config in found)
