"""Every backend of flash against fp64, forward and every gradient, on small shapes with every option.

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

from attnbench.kernels import Unsupported, flash
from attnbench.kernels.flash._configs import Config

INF = math.inf
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


@dataclass(frozen=True)
class Case:
    """One call: sizes, options that are numbers, and how to draw the tensors among the options."""

    name: str
    n: int = 70
    m: int = 70
    d: int = 16
    dv: int = 16
    h: int = 2
    kv_heads: int = 2
    b: int = 1
    q_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tensors: dict[str, Callable[[], Tensor]] = field(default_factory=dict, hash=False)
    tile: tuple[int, int] = (32, 16)

    def __str__(self) -> str:
        return self.name


def _removed(m: int, *shape: int, keys: slice) -> Tensor:
    bias = torch.randn(*shape, m)
    bias[..., keys] = -INF
    return bias


def _positions(n: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (n,)).sort().values.int()


CASES = [
    Case("full"),
    Case("one query", n=1, m=17, d=24),
    Case("one key", n=17, m=1),
    Case("one of each", n=1, m=1),
    Case("causal", options={"causal": True}),
    Case("causal N<M", n=33, options={"causal": True}),
    Case("causal N>M has blind queries", m=33, options={"causal": True}),
    Case("grouped heads, D != Dv", d=24, dv=40, h=4, b=2, n=40, m=64, options={"causal": True}),
    Case("one key head", d=40, dv=24, h=3, kv_heads=1, n=17, m=64),
    Case("default tiles", n=130, m=140, d=40, dv=40, h=1, kv_heads=1, options={"causal": True}, tile=(0, 0)),
    Case("window", options={"window": (10, 5)}),
    Case("window to the left", options={"window": (20, -1)}),
    Case("window to the right", options={"window": (-1, 3)}),
    Case("causal window", n=64, options={"causal": True, "window": (9, 0)}),
    Case("window beside the keys", n=40, m=17, options={"window": (3, 2)}),
    Case("positions", n=33, options={"causal": True}, tensors={"q_pos": lambda: _positions(33, -3, 80)}),
    Case("positions in a window", n=33, options={"window": (9, 4)},
         tensors={"q_pos": lambda: _positions(33, 0, 90)}),
    Case("positions, left side", n=33, options={"window": (9, -1)},
         tensors={"q_pos": lambda: _positions(33, 0, 64)}),
    Case("soft-cap", q_scale=8.0, options={"softcap": 3.0, "causal": True}),
    Case("soft-cap far above the scores", q_scale=0.02, options={"softcap": 1000.0}),
    Case("key bias",
         tensors={"key_bias": lambda: _removed(70, 1, 1, keys=slice(5, 30))}, options={"causal": True}),
    Case("key bias per head", h=4, n=40, tensors={"key_bias": lambda: _removed(70, 4, keys=slice(60, 70))}),
    Case("key bias removes all", b=2, n=17,
         tensors={"key_bias": lambda: torch.tensor([0.0, -INF]).view(2, 1, 1)}),
    Case("bias", tensors={"bias": lambda: torch.randn(1, 2, 70, 70)}),
    Case("bias broadcast", b=2, n=33,
         tensors={"bias": lambda: torch.randn(33, 70)}, options={"causal": True}),
    Case("bias of keys", n=33, tensors={"bias": lambda: _removed(70, 2, 1, keys=slice(0, 20))}),
    Case("sink", tensors={"sink": lambda: torch.randn(2, 1)}, options={"causal": True}),
    Case("sink above all", n=17, tensors={"sink": lambda: torch.tensor([[200.0], [-INF]])}, m=33),
    Case("sink and blind queries", m=33, tensors={"sink": lambda: torch.randn(70)}, options={"causal": True}),
    Case("large logits", q_scale=30.0, options={"causal": True}),
    Case("negative scale", n=33, options={"scale": -0.3}),
    Case("zero scale", n=33, m=33, options={"scale": 0.0, "causal": True}),
    Case(
        "every option", n=33, d=24, dv=40, h=4, options={"causal": True, "window": (40, -1), "softcap": 3.0},
        tensors={
            "key_bias": lambda: _removed(70, 1, 1, keys=slice(30, 50)),
            "bias": lambda: torch.randn(4, 1, 70),
            "sink": lambda: torch.randn(4, 1),
            "q_pos": lambda: _positions(33, -3, 80),
        },
    ),
]  # fmt: skip
IN_HALF = {"full", "one key head", "positions in a window", "bias broadcast", "large logits", "every option"}
"""Where the interpreter computes in fp16, too: the types of tiles do not depend on the options."""
WITHOUT_LSE = {"one key head", "window to the right", "key bias per head", "bias broadcast", "sink"}


@lru_cache(maxsize=1)
def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as ``dtype`` holds them, biases and sink in fp32, and two gradients to send back."""
    torch.manual_seed(sum(map(ord, case.name)))
    q = case.q_scale * torch.randn(case.b, case.h, case.n, case.d)
    k = torch.randn(case.b, case.kv_heads, case.m, case.d)
    v = torch.randn(case.b, case.kv_heads, case.m, case.dv)
    drawn = {name: draw() for name, draw in case.tensors.items()}
    return {
        **{name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))},
        **drawn,
        "do": torch.randn(case.b, case.h, case.n, case.dv).to(dtype),
        "d_lse": torch.randn(case.b, case.h, case.n),
    }


@lru_cache(maxsize=4)
def _results(
    case: Case, dtype: torch.dtype, backend: str, need_lse: bool, wide: bool = False, train: bool = True
) -> dict[str, Tensor]:
    """o, lse and, to ``train``, gradients; ``wide`` computes the inputs of ``dtype`` in fp64."""
    inputs = dict(_inputs(case, dtype))
    if wide:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.clone().requires_grad_(train and x.is_floating_point()) for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    others = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
    o, lse = flash(q, k, v, **others, **case.options, need_lse=need_lse, backend=backend)
    assert (lse is not None) == need_lse
    results = {"o": o.detach()} if lse is None else {"o": o.detach(), "lse": lse.detach()}
    if train:
        wanted = {name: x for name, x in inputs.items() if x.requires_grad}
        outputs, gradients = ([o], [do]) if lse is None else ([o, lse], [do, d_lse])
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
        results |= {f"d_{name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return results


def _assert_close(
    case: Case, dtype: torch.dtype, backend: str, need_lse: bool = False, train: bool = True
) -> None:
    inputs = _inputs(case, dtype)
    keys = inputs["k"].repeat_interleave(case.h // case.kv_heads, 1)
    scores = case.options.get("scale", case.d**-0.5) * inputs["q"].float() @ keys.float().mT
    rescored = torch.finfo(torch.float32).eps * float(scores.abs().max())
    truth = _results(case, dtype, "reference", need_lse, wide=True)
    naive = _results(case, dtype, "reference", need_lse)
    actual = _results(case, dtype, backend, need_lse, train=train)
    assert actual.keys() == (truth.keys() if train else {"o", "lse"} & truth.keys())
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


def _tiles(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    """Tiles small enough that short sequences have full, cut and skipped ones; (0, 0) is the default."""
    if tile != (0, 0):
        launch = importlib.import_module("attnbench.kernels.flash._launch")
        monkeypatch.setattr(launch, "choose", lambda *args: Config(*tile, 4, 2))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a sink far above the scores: o = 0
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in CASES
        for dtype in (torch.float32, torch.float16)
        if dtype is torch.float32 or case.name in IN_HALF
    ],
)
def test_triton_against_fp64(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _tiles(monkeypatch, case.tile)
    # without lse there is no gradient of lse either, which the kernels know at compile time
    _assert_close(case, dtype, "triton", need_lse=case.name not in WITHOUT_LSE)


@pytest.mark.filterwarnings("ignore:Flash attention")  # why the one allowed SDPA kernel refuses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    @pytest.mark.parametrize("need_lse", [True, False])
    def test_torch(self, case: Case, dtype: torch.dtype, need_lse: bool) -> None:
        _assert_close(case, dtype, "torch", need_lse)

    def test_sdpa_math(self, case: Case, dtype: torch.dtype) -> None:
        if case.options.get("softcap") or "sink" in case.tensors:
            with pytest.raises(Unsupported, match="asked for"):
                _results(case, dtype, "sdpa_math", False)
        else:
            _assert_close(case, dtype, "sdpa_math")

    def test_sdpa_flash(self, case: Case, dtype: torch.dtype) -> None:
        if (
            case.options.get("softcap")
            or case.d != case.dv
            or {"sink", "bias", "key_bias"} & set(case.tensors)
        ):
            with pytest.raises(Unsupported):
                _results(case, dtype, "sdpa_flash", False)
        else:
            _assert_close(case, dtype, "sdpa_flash")

    def test_flex(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "flex", need_lse=True, train=False)
