"""The delta rule and gates over Dk or Dv in linrec: every backend against the definition in fp64.

Forward and every gradient. A tolerance is a multiple of the dtype's rounding times the largest value of what
is compared: products and triangular systems of at most 64 steps lose a few roundings, not more.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.kernels import linrec
from attnbench.kernels._tiles import Target
from attnbench.kernels.linrec import State

TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 3e-3}


@dataclass(frozen=True)
class Setting:
    """One call. ``gate`` is none, constant, scalar or vector; ``strong`` adds −30 and −inf gates."""

    rule: str = "delta"
    gate: str = "none"
    gv: bool = False
    beta: bool = False
    initial: bool = False
    reverse: bool = False
    strong: bool = False
    normalize: bool = False
    feature_map: str = "identity"
    n: int = 41
    chunk: int = 32
    groups: int = 1
    heads: int = 1
    dk: int = 12
    dv: int = 7

    def __str__(self) -> str:
        names = ("gv", "beta", "initial", "reverse", "strong", "normalize")
        on = [name for name in names if getattr(self, name)]
        return "-".join([self.rule, self.gate, *on, f"n{self.n}", f"L{self.chunk}", f"h{self.heads}"])

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs rounded to ``dtype``; gates, β and states in fp32 or fp64. Unit keys under delta."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        n, h = self.n, self.heads
        q, k = (torch.randn(1, self.groups, n, self.dk, dtype=wide) for _ in range(2))
        v = torch.randn(1, h, n, self.dv, dtype=wide)
        k = F.normalize(k, dim=-1) if self.rule == "delta" else k
        x = {name: t.to(dtype) for name, t in (("q", q), ("k", k), ("v", v))}
        if self.gate == "constant":
            x["g"] = -torch.rand(h, dtype=wide)
        elif self.gate != "none":
            x["g"] = self._gates(1, h, n, *((self.dk,) if self.gate == "vector" else ())).to(wide)
        if self.gv:
            x["gv"] = self._gates(1, h, n, self.dv).to(wide)
        if self.beta:
            x["beta"] = torch.rand(1, h, n, dtype=wide)
        if self.initial:
            x["s"] = torch.randn(1, h, self.dk, self.dv, dtype=wide)
            x["z"] = torch.rand(1, h, self.dk, dtype=wide)
        return x

    def _gates(self, *shape: int) -> Tensor:
        g = F.logsigmoid(torch.randn(shape))
        if self.strong:
            g[:, :, 3::7] = -30.0
            g[:, :, 11::23] = -math.inf
        return g

    def run(self, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Outputs and gradients by name in fp64, for random gradients of o and the final state."""
        x = {name: t.detach().requires_grad_(t.dim() > 1) for name, t in x.items()}
        state = State(x["s"], x["z"] if self.normalize else None) if "s" in x else None
        inputs = {name: x.get(name) for name in ("g", "gv", "beta")}
        options: dict[str, Any] = {
            "rule": self.rule,
            "reverse": self.reverse,
            "normalize": self.normalize,
            "feature_map": self.feature_map,
        }
        o, final = linrec(
            x["q"], x["k"], x["v"], **inputs, **options, scale=0.5, eps=0.1, initial_state=state,
            chunk=self.chunk, backend=backend,
        )  # fmt: skip
        results = {"o": o, "S_N": final.s} | ({} if final.z is None else {"z_N": final.z})
        generator = torch.Generator().manual_seed(1)
        sent = [
            torch.randn(t.shape, generator=generator).to(x["v"].dtype).to(t.dtype) for t in results.values()
        ]
        leaves = {f"d{name}": t for name, t in x.items() if t.requires_grad}
        gradients = torch.autograd.grad(
            list(results.values()), list(leaves.values()), sent, allow_unused=True, materialize_grads=True
        )
        results |= dict(zip(leaves, gradients, strict=True))
        return {name: t.detach().double() for name, t in results.items()}

    def check(self, backend: str, dtype: torch.dtype) -> None:
        """Assert that ``backend`` agrees with the definition in fp64 on the same inputs."""
        x = self.tensors(dtype)
        truth = self.run({name: t.double() for name, t in x.items()}, "reference")
        for name, t in self.run(x, backend).items():
            error = (t - truth[name]).abs().max().item() / (truth[name].abs().max().item() + 1e-3)
            assert error <= TOLERANCE[dtype], f"{name}: error {error:.2e}"


DELTA = (
    Setting(n=17, chunk=16),
    Setting(n=1, chunk=64, beta=True, initial=True),
    Setting(n=70, chunk=64, gate="scalar", beta=True, initial=True, groups=1, heads=2),
    Setting(gate="scalar", beta=True, initial=True, strong=True, reverse=True),
    Setting(gate="constant", beta=True, reverse=True, chunk=16, groups=2, heads=2, n=17),
    Setting(gate="scalar", feature_map="relu", n=17, chunk=16, dk=70, dv=40),
)
ADD = (
    Setting("add", "vector", n=18, chunk=16, beta=True, initial=True, groups=1, heads=2),
    Setting("add", "vector", n=50, chunk=32, strong=True, reverse=True, initial=True),
    Setting("add", "vector", n=37, chunk=32, normalize=True, feature_map="exp", initial=True, beta=True),
    Setting("add", "none", gv=True, n=34, chunk=32, initial=True, beta=True),
    Setting("add", "scalar", gv=True, n=34, chunk=32, strong=True, reverse=True, initial=True),
    Setting("add", "vector", gv=True, n=1, chunk=16, beta=True, dk=20, dv=17),
    Setting("add", "vector", n=65, chunk=64, dk=3, dv=2),
)
EAGER = (
    Setting(gate="vector", beta=True, initial=True, groups=1, heads=2),
    Setting(gate="vector", beta=True, reverse=True, strong=True, initial=True, chunk=16),
)


@pytest.mark.parametrize("setting", DELTA + ADD + EAGER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
def test_torch(setting: Setting, dtype: torch.dtype) -> None:
    setting.check("torch", dtype)


@pytest.mark.parametrize("setting", DELTA + ADD, ids=str)
def test_triton_in_fp32(setting: Setting) -> None:
    setting.check("triton", torch.float32)


@pytest.mark.parametrize("setting", [DELTA[3], ADD[1]], ids=str)
def test_triton_in_fp16(setting: Setting) -> None:
    setting.check("triton", torch.float16)


@pytest.mark.filterwarnings("ignore:.*encountered in multiply")  # a trial reads memory not yet filled
@pytest.mark.parametrize(
    "setting",
    [
        Setting(n=20, chunk=16, beta=True, gate="scalar", dk=20, dv=20),
        Setting("add", "vector", n=20, chunk=16, beta=True, dk=20, dv=20),
    ],
    ids=str,
)
def test_triton_with_half_of_every_tile(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tuning does: candidates are launched on memory of their own, then one is chosen."""
    launch = importlib.import_module("attnbench.kernels.linrec._launch")

    def choose(*, candidates: Any, launch: Any, **_: Any) -> Any:
        default = candidates[0]
        size = default.block_k * default.block_v
        smaller = [each for each in candidates if each.block_k * each.block_v < size]
        chosen = smaller[0] if smaller else candidates[-1]
        launch(chosen)()
        return chosen

    monkeypatch.setattr(launch, "pick", choose)
    setting.check("triton", torch.float32)


@pytest.mark.parametrize("gv", [False, True], ids=["vector", "gv"])
def test_segments_of_a_long_sequence(gv: bool) -> None:
    """Few heads on many processors split the scan over chunks; the carry decays every row or column."""
    setting = Setting(
        "add", "none" if gv else "vector", gv=gv, initial=True, n=16 * 17 - 3, chunk=16, dk=3, dv=2
    )
    launch = importlib.import_module("attnbench.kernels.linrec._vector_launch")
    x = setting.tensors(torch.float32)
    expected = linrec(x["q"], x["k"], x["v"], g=x.get("g"), gv=x.get("gv"), chunk=16, backend="torch")
    with mock.patch.object(launch, "target", return_value=Target(90, 64)):
        actual = linrec(x["q"], x["k"], x["v"], g=x.get("g"), gv=x.get("gv"), chunk=16, backend="triton")
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1].s, expected[1].s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(gate="scalar", beta=True, initial=True, n=20, chunk=16),
        Setting("add", "vector", gv=True, beta=True, n=9, chunk=16),
    ],
    ids=str,
)
def test_any_strides_and_no_read_of_fresh_memory(setting: Setting) -> None:
    x = setting.tensors(torch.float32)
    expected = setting.run(x, "triton")
    views = {}
    for name, t in x.items():
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan).movedim(-1, 0).contiguous()
        views[name] = padded.movedim(0, -1)[..., 1::2].copy_(t)
        assert not views[name].is_contiguous()
    fresh = (torch.empty, torch.empty_like, Tensor.new_empty)

    def poisoned(make: Any) -> Any:
        def filled(*args: Any, **options: Any) -> Tensor:
            t = make(*args, **options)
            return t.fill_(math.nan) if t.is_floating_point() else t

        return filled

    with (
        mock.patch.object(torch, "empty", poisoned(fresh[0])),
        mock.patch.object(torch, "empty_like", poisoned(fresh[1])),
        mock.patch.object(Tensor, "new_empty", poisoned(fresh[2])),
    ):
        actual = setting.run(views, "triton")
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rule", ["add", "delta"])
def test_the_definition_against_products_of_matrices(rule: str, reverse: bool) -> None:
    """S_t as the sum over steps of what each wrote, times the transitions (I − β k kᵀ) diag(e^g) since."""
    setting = Setting(
        rule, "vector", gv=rule == "add", beta=True, initial=True, reverse=reverse, n=6, dk=3, dv=2
    )
    x = setting.tensors(torch.float64)
    q, k, v, beta = x["q"][0, 0], x["k"][0, 0], x["v"][0, 0], x["beta"][0, 0]
    order = list(range(6))[:: -1 if reverse else 1]
    gv = x["gv"][0, 0] if "gv" in x else torch.zeros_like(v)

    def step(t: int) -> Tensor:
        forget = beta[t] * torch.outer(k[t], k[t]) if rule == "delta" else torch.zeros(3, 3)
        return (torch.eye(3, dtype=torch.float64) - forget) @ torch.diag(x["g"][0, 0, t].exp())

    o = torch.zeros_like(v)
    for i, t in enumerate(order):
        terms = [(x["s"][0, 0], order[: i + 1])]
        terms += [
            (beta[s] * torch.outer(k[s], v[s]), order[j + 1 : i + 1]) for j, s in enumerate(order[: i + 1])
        ]
        for term, later in terms:
            carried = term
            for u in later:
                carried = step(u) @ carried @ torch.diag(gv[u].exp())
            o[t] += 0.5 * carried.T @ q[t]
    torch.testing.assert_close(setting.run(x, "reference")["o"][0, 0], o)
