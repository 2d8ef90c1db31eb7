"""Every backend of linrec against the sequential definition in fp64, forward and every gradient.

The rule: the error against fp64 is at most twice (gradients: three times) that of the dense masked form
computed in the same dtype, plus one rounding of the largest value; for Triton, whose decays are differences
of sums of gates, plus one rounding of the largest sum.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attnbench.kernels import linrec
from attnbench.kernels._tiles import Target
from attnbench.kernels.features import feature, guarded
from attnbench.kernels.linrec import State

BACKENDS = ["torch", "triton"]
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 5e-4}


@dataclass(frozen=True)
class Case:
    """One call. ``gate`` is none, constant, scalar or vector; ``strong`` adds −30 and −inf gates."""

    n: int = 70
    chunk: int = 32
    gate: str = "none"
    gv: bool = False
    beta: bool = False
    normalize: bool = False
    initial: bool = False
    reverse: bool = False
    strong: bool = False
    groups: int = 2
    heads: int = 2
    dk: int = 12
    dv: int = 20
    b: int = 1
    eps_mode: str = "add"
    eps: float = 0.1
    feature_map: str = "identity"
    scale: float = 0.5

    def __str__(self) -> str:
        on = [
            name
            for name in ("gv", "beta", "normalize", "initial", "reverse", "strong")
            if getattr(self, name)
        ]
        features = [] if self.feature_map == "identity" else [self.feature_map]
        return "-".join([f"n{self.n}", f"L{self.chunk}", self.gate, *on, *features, f"g{self.groups}"])

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Inputs as leaves, rounded to ``dtype``; states stay in fp32 or fp64."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        per_step, shape = (self.b, self.heads, self.n), {"q": self.dk, "k": self.dk, "v": self.dv}
        x = {
            name: torch.randn(self.b, self.heads if name == "v" else self.groups, self.n, d, dtype=dtype)
            for name, d in shape.items()
        }
        if self.gate == "constant":
            x["g"] = -torch.rand(self.heads, dtype=wide)
        elif self.gate != "none":
            x["g"] = self._gates(*per_step, *((self.dk,) if self.gate == "vector" else ()))
        if self.gv:
            x["gv"] = self._gates(*per_step, self.dv)
        if self.beta:
            x["beta"] = torch.rand(per_step, dtype=wide)
        if self.initial:
            x["s"] = torch.randn(self.b, self.heads, self.dk, self.dv, dtype=wide)
            x["z"] = torch.rand(self.b, self.heads, self.dk, dtype=wide)
        x = {name: t.to(wide) if name in ("g", "gv", "s", "z") else t for name, t in x.items()}
        return {name: t.requires_grad_(name != "g" or self.gate != "constant") for name, t in x.items()}

    def _gates(self, *shape: int) -> Tensor:
        g = torch.nn.functional.logsigmoid(torch.randn(shape))
        if self.strong:
            g[:, :, 3::7] = -30.0
            g[:, :, 11::23] = -math.inf
        return g

    def call(self, x: dict[str, Tensor], backend: str) -> tuple[Tensor, State]:
        """The op, or the dense form computed in the dtype of the inputs for ``backend="naive"``."""
        state = State(x["s"], x["z"]) if "s" in x else None
        options: dict[str, Any] = {
            "g": x.get("g"),
            "gv": x.get("gv"),
            "beta": x.get("beta"),
            "feature_map": self.feature_map,
            "scale": self.scale,
            "normalize": self.normalize,
            "eps": self.eps,
            "eps_mode": self.eps_mode,
            "initial_state": state,
            "reverse": self.reverse,
        }
        if backend == "naive":
            return dense(x["q"], x["k"], x["v"], **options)
        return linrec(x["q"], x["k"], x["v"], **options, chunk=self.chunk, backend=backend)


def _decays(g: Tensor, dim: int) -> Tensor:
    """Decays from after step s to after step r, (B, H, N + 1, N + 1, D); step 0 is the initial state."""
    g = g.double().clamp_min(-1e6)
    sums = torch.cat((torch.zeros_like(g[:, :, :1]), g.cumsum(2)), 2)
    log = sums.unsqueeze(3) - sums.unsqueeze(2)
    visible = torch.ones(log.shape[2:4], dtype=torch.bool).tril()
    return log.masked_fill(~visible.unsqueeze(-1), -math.inf).exp().expand(*log.shape[:4], dim)


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, gv: Tensor | None, beta: Tensor | None,
    feature_map: str, scale: float, normalize: bool, eps: float, eps_mode: str,
    initial_state: State | None, reverse: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """The masked N×N form with every product rounded to the input dtype; the initial state is step 0."""
    b, h, n, dv = v.shape
    dtype, dk = v.dtype, q.shape[-1]

    def order(x: Tensor) -> Tensor:
        return x.flip(2) if reverse else x

    q, k = (order(feature(x, feature_map)).repeat_interleave(h // x.shape[1], 1) for x in (q, k))
    if g is None:
        g = torch.zeros(b, h, n, 1)
    elif g.dim() == 1:
        g = g.view(1, h, 1, 1).expand(b, h, n, 1)
    g = order(g if g.dim() == 4 else g.unsqueeze(-1))
    decay = _decays(g, dk).to(dtype)
    decay_v = None if gv is None else _decays(order(gv), dv).to(dtype)
    keys = k if beta is None else k * order(beta).unsqueeze(-1).to(dtype)
    scores = (q.unsqueeze(3) * keys.unsqueeze(2) * decay[:, :, 1:, 1:]).sum(-1)
    values = order(v)
    s, z = torch.zeros(b, h, dk, dv, dtype=dtype), torch.zeros(b, h, dk, dtype=dtype)
    if initial_state is not None:
        s, z = initial_state.s.to(dtype), initial_state.z.to(dtype)
    reads = q * decay[:, :, 1:, 0]
    outs = keys * decay[:, :, -1, 1:]
    if decay_v is None:
        o = scores @ values + reads @ s
        final = decay[:, :, -1, 0].unsqueeze(-1) * s + outs.mT @ values
    else:
        o = (scores.unsqueeze(-1) * decay_v[:, :, 1:, 1:] * values.unsqueeze(2)).sum(3)
        o = o + decay_v[:, :, 1:, 0] * (reads @ s)
        final = decay[:, :, -1, 0].unsqueeze(-1) * s * decay_v[:, :, -1, 0].unsqueeze(-2)
        final = final + outs.mT @ (values * decay_v[:, :, -1, 1:])
    if normalize:
        den = scores.sum(-1, keepdim=True) + (reads * z.unsqueeze(2)).sum(-1, keepdim=True)
        o = o / guarded(den, eps, eps_mode)
    else:
        o = scale * o
    return order(o), State(final, decay[:, :, -1, 0] * z + outs.sum(2))


def run(case: Case, x: dict[str, Tensor], backend: str, through: str = "all") -> dict[str, Tensor]:
    """Outputs and gradients by name, in fp64, for random gradients of o and the final state."""
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in x.items()}
    o, final = case.call(leaves, backend)
    results = {"o": o, "S_N": final.s}
    if case.normalize:
        results["z_N"] = final.z
    generator = torch.Generator().manual_seed(1)
    sent = {
        name: torch.randn(t.shape, generator=generator).to(x["v"].dtype).to(t.dtype)
        for name, t in results.items()
    }
    names = [name for name in results if through in ("all", name)]
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    gradients = torch.autograd.grad(
        [results[name] for name in names],
        [leaves[name] for name in wanted],
        [sent[name] for name in names],
        allow_unused=True,
        materialize_grads=True,
    )
    results |= {f"d{name}": t for name, t in zip(wanted, gradients, strict=True)}
    return {name: t.detach().double() for name, t in results.items()}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Assert the rule of this file for one case."""
    x = case.tensors(dtype)
    rounding = ROUNDING[dtype] + (2**-23 * largest_gate_sum(case, x) if backend == "triton" else 0.0)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in x.items()}
    truth, naive, actual = run(case, wide, "reference"), run(case, x, "naive"), run(case, x, backend)
    for name, t in truth.items():
        size = t.abs().max().item() + 1e-3
        error, allowed = ((y[name] - t).abs().max().item() / size for y in (actual, naive))
        factor = 3 if name.startswith("d") else 2
        limit = factor * allowed + rounding
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


def largest_gate_sum(case: Case, x: dict[str, Tensor]) -> float:
    """The largest sum of the gates of a chunk, without those that are resets."""
    if case.gate == "none":
        return 0.0
    g = x["g"].detach().abs().view(case.b if case.gate == "scalar" else 1, case.heads, -1)
    g = g.expand(-1, -1, case.n)
    g = torch.nn.functional.pad(g.masked_fill(g > 104, 0.0), (0, -case.n % case.chunk))
    return g.unflatten(-1, (-1, case.chunk)).sum(-1).max().item()


VARIANTS = (
    {},
    {"gate": "constant", "groups": 1, "initial": True},
    {"gate": "scalar", "beta": True, "initial": True},
    {"normalize": True, "feature_map": "elu1", "beta": True, "reverse": True},
    {
        "gate": "scalar",
        "normalize": True,
        "feature_map": "relu",
        "eps_mode": "max",
        "eps": 4.0,
        "initial": True,
    },
    {"gate": "scalar", "groups": 1, "reverse": True, "strong": True, "initial": True},
)
"""What every backend computes."""

VECTOR_VARIANTS = (
    {"gate": "vector", "beta": True, "initial": True},
    {"gate": "vector", "groups": 1, "reverse": True, "strong": True},
    {"gate": "vector", "normalize": True, "feature_map": "exp", "initial": True},
    {"gv": True, "initial": True},
    {"gv": True, "gate": "scalar", "reverse": True, "strong": True, "initial": True},
    {"gv": True, "gate": "vector", "beta": True, "groups": 1},
)
"""Gates over Dk and Dv, here in eager PyTorch; in Triton they have a file of tests of their own."""

LENGTHS = (1, 17, 64, 70, 130)


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("n", LENGTHS)
def test_torch_in_fp64(n: int, chunk: int) -> None:
    variants = VARIANTS + VECTOR_VARIANTS
    start = LENGTHS.index(n) + chunk // 16
    for i in range(0, len(variants), 2):
        case = Case(n=n, chunk=chunk, **variants[(start + i) % len(variants)])
        try:
            check(case, "torch", torch.float64)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", [Case(b=2, **v) for v in VARIANTS + VECTOR_VARIANTS], ids=str)
def test_torch_in_low_precision(case: Case, dtype: torch.dtype) -> None:
    check(case, "torch", dtype)


GRID = [
    Case(n=n, chunk=chunk, **VARIANTS[i % len(VARIANTS)])
    for i, (n, chunk) in enumerate(
        ((1, 16), (17, 16), (40, 32), (33, 16), (70, 64), (40, 16), (64, 64), (1, 64), (32, 32))
    )
]
"""Lengths that are shorter than a chunk, whole chunks and more than them; every variant."""


@pytest.mark.parametrize("case", GRID, ids=str)
def test_triton_on_a_grid_of_lengths_and_chunks(case: Case) -> None:
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("case", [Case(chunk=16, n=20, b=2, **v) for v in VARIANTS[2:4]], ids=str)
def test_triton_in_fp16(case: Case) -> None:
    check(case, "triton", torch.float16)


@pytest.mark.parametrize("feature_map", ["elu1", "relu", "squared_relu", "exp"])
def test_triton_feature_maps(feature_map: str) -> None:
    check(
        Case(n=33, chunk=16, feature_map=feature_map, normalize=True, heads=1, groups=1),
        "triton",
        torch.float32,
    )
    check(Case(n=33, chunk=16, feature_map=feature_map, heads=1, groups=1), "torch", torch.float32)


@pytest.mark.parametrize(("dk", "dv"), [(80, 16), (16, 136), (1, 1)])
def test_triton_head_dims_over_several_tiles(dk: int, dv: int) -> None:
    case = Case(n=20, chunk=16, dk=dk, dv=dv, heads=1, groups=1, gate="scalar", beta=True, initial=True)
    check(case, "triton", torch.float32)
    check(
        Case(n=20, chunk=16, dk=dk, dv=dv, heads=1, groups=1, normalize=True, feature_map="relu"),
        "triton",
        torch.float32,
    )


@pytest.mark.parametrize("variant", [VARIANTS[5], VARIANTS[3]], ids=["gated", "normalized"])
def test_triton_segments_of_a_long_sequence(variant: dict[str, Any]) -> None:
    """Few heads on many processors split the scan over chunks; the carry joins the parts."""
    case = Case(n=16 * 17 - 3, chunk=16, heads=1, dk=4, dv=3, **(variant | {"groups": 1}))
    triton = importlib.import_module("attnbench.kernels.linrec.triton")
    with mock.patch.object(triton, "target", return_value=Target(90, 64)):
        check(case, "triton", torch.float32)


def test_candidates_are_few_and_the_default_is_first() -> None:
    config = importlib.import_module("attnbench.kernels.linrec._config")
    for kernel in ("states", "output", "gradient", "delta_states", "delta_gradient", "vector_gradient"):
        for dim, itemsize, capability in itertools.product((1, 64, 256), (2, 4), (80, 90)):
            found = config.candidates(kernel, dim, dim, 64, itemsize, capability)
            assert found[0] == config.config(kernel, dim, dim, 64, itemsize, capability)
            assert len(set(found)) == len(found) <= 8
            assert all(min(each.block_k, each.block_v) >= 16 for each in found)
            assert kernel != "delta_states" or all(each.block_k >= dim for each in found)


def test_triton_with_half_of_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tuning does: candidates are launched on memory of their own, then one is chosen."""
    launch = importlib.import_module("attnbench.kernels.linrec._launch")

    def choose(*, candidates: Any, launch: Any, **_: Any) -> Any:
        halves = [each for each in candidates if each.block_k < candidates[0].block_k]
        launch(halves[0] if halves else candidates[-1])()
        return halves[0] if halves else candidates[-1]

    monkeypatch.setattr(launch, "pick", choose)
    case = Case(n=20, chunk=16, gate="scalar", beta=True, initial=True, heads=1, groups=1, dk=20, dv=20)
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [Case(n=17, chunk=16, **VARIANTS[2]), Case(n=17, chunk=16, **VARIANTS[4])], ids=str
)
def test_any_strides_and_no_read_of_fresh_memory(case: Case, backend: str) -> None:
    x = case.tensors(torch.float32)
    expected = run(case, x, backend)
    wide = {}
    for name, t in x.items():
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan).movedim(-1, 0).contiguous()
        view = padded.movedim(0, -1)[..., 1::2]
        wide[name] = view.copy_(t.detach()).requires_grad_(t.requires_grad)
        assert not view.is_contiguous()
    with poisoned():
        actual = run(case, wide, backend)
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=2e-6, atol=2e-6, msg=name)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh allocation with NaN: what a kernel leaves unwritten and reads shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def fill(make: Any) -> Any:
        def filled(*args: Any, **options: Any) -> Tensor:
            x = make(*args, **options)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return filled

    with (
        mock.patch.object(torch, "empty", fill(empty)),
        mock.patch.object(torch, "empty_like", fill(empty_like)),
        mock.patch.object(Tensor, "new_empty", fill(new_empty)),
    ):
        yield


@pytest.mark.parametrize("through", ["S_N", "z_N"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_the_final_state_alone(backend: str, through: str) -> None:
    case = Case(n=40, chunk=16, gate="scalar", beta=True, normalize=True, feature_map="elu1", initial=True)
    x = case.tensors(torch.float32)
    truth = run(case, {k: t.detach().double().requires_grad_() for k, t in x.items()}, "reference", through)
    actual = run(case, x, backend, through)
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "variant", [{"gate": "scalar"}, {"normalize": True, "feature_map": "elu1"}], ids=["gate", "norm"]
)
def test_error_does_not_grow_with_the_length(variant: dict[str, Any]) -> None:
    case = Case(n=4096, chunk=16, heads=1, groups=1, dk=4, dv=4, **variant)
    x = case.tensors(torch.float32)
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    truth, actual = run(case, wide, "reference", "o"), run(case, x, "torch", "o")
    for name in ("o", "dq", *(["dg"] if "dg" in truth else [])):
        error = ((actual[name] - truth[name]).abs() / (truth[name].abs().max() + 1e-9)).amax((0, 1))
        error = error.amax(-1) if error.dim() == 2 else error
        early, late = error[:1024].max(), error[-1024:].max()
        assert late <= 4 * early + 1e-6, f"{name}: {early:.1e} in the first quarter, {late:.1e} in the last"


def test_scan_over_many_chunks_in_several_levels() -> None:
    """300 chunks are two levels of groups of 16, and 17 chunks leave a group with one."""
    for n, gate in ((600, "scalar"), (600, "constant"), (34, "scalar")):
        case = Case(n=n, chunk=2, gate=gate, reverse=gate == "scalar", initial=True, dk=3, dv=2)
        x = case.tensors()
        truth, actual = run(case, x, "reference"), run(case, x, "torch")
        for name in truth:
            torch.testing.assert_close(actual[name], truth[name], rtol=1e-9, atol=1e-9)
