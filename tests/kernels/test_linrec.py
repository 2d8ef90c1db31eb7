"""Every backend of linrec against the sequential definition in fp64, forward and every gradient.

The rule: the error against fp64 is at most twice (gradients: three times) that of the dense masked form
computed in the same dtype, plus one rounding of the largest value; for Triton, whose decays are differences
of sums of gates, plus one rounding of the largest sum.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, linrec
from attnbench.kernels._tiles import Target
from attnbench.kernels.features import feature, guarded
from attnbench.kernels.linrec import State

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
"""What only reference and torch compute."""

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
    Case(n=n, chunk=chunk, **VARIANTS[(i + 2 * j) % len(VARIANTS)])
    for i, n in enumerate(LENGTHS)
    for j, chunk in enumerate((16, 32, 64))
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_triton_on_a_grid_of_lengths_and_chunks(case: Case) -> None:
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("case", [Case(chunk=16, n=40, b=2, **v) for v in VARIANTS], ids=str)
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
    case = Case(n=16 * 27 - 3, chunk=16, heads=1, dk=4, dv=3, **(variant | {"groups": 1}))
    triton = importlib.import_module("attnbench.kernels.linrec.triton")
    with mock.patch.object(triton, "target", return_value=Target(90, 64)):
        check(case, "triton", torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case", [Case(n=33, chunk=16, **VARIANTS[2]), Case(n=33, chunk=16, **VARIANTS[4])], ids=str
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


# The exact properties of the recurrence.

BACKENDS = ["torch", "triton"]


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_length_changes_nothing(backend: str) -> None:
    x = Case(**VARIANTS[2]).tensors(torch.float32)
    one, other = (run(Case(chunk=chunk, **VARIANTS[2]), x, backend) for chunk in (16, 64))
    for name in one:
        _close(one[name], other[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_in_two_parts_is_the_sequence(backend: str, reverse: bool) -> None:
    case = Case(n=50, chunk=16, gate="scalar", beta=True, normalize=True, feature_map="elu1", reverse=reverse)
    x = case.tensors(torch.float32)
    o, final = case.call(x, backend)
    cut = [{name: t[:, :, part] for name, t in x.items()} for part in (slice(0, 23), slice(23, None))]
    if reverse:
        cut.reverse()
    first_o, middle = case.call(cut[0], backend)
    second_o, last = case.call(cut[1] | {"s": middle.s, "z": middle.z}, backend)
    parts = (second_o, first_o) if reverse else (first_o, second_o)
    _close(torch.cat(parts, 2), o)
    _close(last.s, final.s)
    _close(last.z, final.z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gates_are_no_gates(backend: str) -> None:
    case = Case(n=40, chunk=16)
    x = case.tensors(torch.float32)
    expected, _ = case.call(x, backend)
    gates = {"scalar": torch.zeros(1, 2, 40), "constant": torch.zeros(2)}
    if backend == "torch":
        gates |= {"vector": torch.zeros(1, 2, 40, case.dk)}
        o, _ = case.call(x | {"gv": torch.zeros(1, 2, 40, case.dv)}, backend)
        _close(o, expected)
    for g in gates.values():
        o, _ = case.call(x | {"g": g}, backend)
        _close(o, expected)


def test_gates_that_are_equal_over_dims_or_steps_are_scalar_or_constant() -> None:
    case = Case(n=40, chunk=32, gate="scalar", initial=True)
    x = case.tensors()
    o, final = case.call(x, "torch")
    for name, dim in (("g", case.dk), ("gv", case.dv)):
        wide = {key: t for key, t in x.items() if key != "g"} | {
            name: x["g"].unsqueeze(-1).expand(-1, -1, -1, dim)
        }
        wide_o, wide_final = case.call(wide, "torch")
        _close(wide_o, o)
        _close(wide_final.s, final.s)
    constant = torch.tensor([-0.1, -2.0], dtype=torch.float64)
    o, _ = case.call(x | {"g": constant.view(1, 2, 1).expand(1, 2, 40)}, "torch")
    constant_o, _ = case.call(x | {"g": constant}, "torch")
    _close(constant_o, o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate", [-1e4, -math.inf])
def test_a_reset_forgets_and_costs_no_digits(backend: str, reverse: bool, gate: float) -> None:
    case = Case(n=50, chunk=16, gate="scalar", initial=True, reverse=reverse)
    x = case.tensors(torch.float32)
    x["g"] = x["g"].detach().clone()
    x["g"][:, :, 20] = gate
    forgotten, kept = (slice(21, None), slice(0, 21)) if reverse else (slice(0, 20), slice(20, None))
    o, final = case.call(x, backend)
    changed = {name: t.detach().clone() for name, t in x.items()}
    for name in ("q", "k", "v"):
        changed[name][:, :, forgotten] *= -3
    changed["s"] += 7
    changed_o, changed_final = case.call(changed, backend)
    assert torch.equal(changed_o[:, :, kept], o[:, :, kept])
    assert torch.equal(changed_final.s, final.s)
    assert not torch.equal(changed_o[:, :, forgotten], o[:, :, forgotten])
    alone = {name: t[:, :, kept] for name, t in x.items() if name not in ("s", "z")}
    torch.testing.assert_close(case.call(alone, backend)[0], o[:, :, kept], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_no_output_depends_on_the_future(backend: str, reverse: bool) -> None:
    case = Case(n=50, chunk=16, gate="scalar", beta=True, normalize=True, feature_map="elu1", reverse=reverse)
    x = case.tensors(torch.float32)
    o, _ = case.call(x, backend)
    future, past = (slice(0, 21), slice(21, None)) if reverse else (slice(21, None), slice(0, 21))
    changed = {name: t.detach().clone() for name, t in x.items()}
    for t in changed.values():
        t[:, :, future] = 0.5 * t[:, :, future] - 0.1
    changed_o, _ = case.call(changed, backend)
    assert torch.equal(changed_o[:, :, past], o[:, :, past])
    assert not torch.equal(changed_o[:, :, future], o[:, :, future])


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_v_and_the_initial_state(backend: str) -> None:
    case = Case(n=40, chunk=16, gate="scalar", initial=True)
    x, y = case.tensors(torch.float32), case.tensors(torch.float32)
    mixed = x | {name: 2 * x[name] - y[name] for name in ("v", "s")}
    (o_x, _), (o_y, _), (o, _) = (case.call(t, backend) for t in (x, x | {"v": y["v"], "s": y["s"]}, mixed))
    _close(o, 2 * o_x - o_y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_come_back_when_normalized(backend: str) -> None:
    case = Case(n=48, chunk=16, gate="scalar", normalize=True, feature_map="elu1")
    x = case.tensors(torch.float32)
    x["v"] = torch.ones_like(x["v"])
    o, _ = linrec(
        x["q"],
        x["k"],
        x["v"],
        g=x["g"],
        normalize=True,
        feature_map="elu1",
        eps=0.0,
        chunk=16,
        backend=backend,
    )
    _close(o, torch.ones_like(o))


@pytest.mark.parametrize("through", ["S_N", "z_N"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_the_final_state_alone(backend: str, through: str) -> None:
    case = Case(n=40, chunk=16, gate="scalar", beta=True, normalize=True, feature_map="elu1", initial=True)
    x = case.tensors(torch.float32)
    truth = run(case, {k: t.detach().double().requires_grad_() for k, t in x.items()}, "reference", through)
    actual = run(case, x, backend, through)
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [-30.0, -1e4, -math.inf])
def test_strong_gates_stay_finite(backend: str, gate: float) -> None:
    case = Case(n=40, chunk=32, gate="scalar", initial=True, beta=True)
    x = case.tensors(torch.float32)
    x["g"] = torch.full_like(x["g"], gate).requires_grad_()
    results = run(case, x, backend)
    assert all(t.isfinite().all() for t in results.values())
    own = case.scale * x["beta"].unsqueeze(-1) * (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    _close(results["o"], own.detach().double())


def test_gradcheck_of_the_definition() -> None:
    case = Case(n=5, chunk=2, gate="vector", gv=True, beta=True, initial=True, dk=2, dv=3, groups=1)
    x = {name: t for name, t in case.tensors().items() if name != "z"}

    def outputs(*tensors: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        values = dict(zip(x, tensors, strict=True))
        o, final = case.call(values | {"z": torch.zeros(1, 2, 2, dtype=torch.float64)}, backend)
        return o, final.s

    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda *t, b=backend: outputs(*t, backend=b), tuple(x.values()))
    case = Case(n=5, chunk=2, gate="scalar", normalize=True, feature_map="elu1", initial=True, dk=2, dv=3)
    x = case.tensors()

    def normalized(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        o, final = case.call(dict(zip(x, tensors, strict=True)), backend)
        return o, *final

    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda *t, b=backend: normalized(*t, backend=b), tuple(x.values()))


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
            _close(actual[name], truth[name])


# What a backend does not compute, it says.


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"gate": "vector"}, "gate g"),
        ({"gv": True}, "gate gv"),
        ({"chunk": 48}, "chunk"),
        ({"dk": 257}, "head dims"),
    ],
)
def test_triton_refuses(options: dict[str, Any], what: str) -> None:
    case = Case(n=3, **options)
    with pytest.raises(Unsupported, match=what):
        case.call(case.tensors(torch.float32), "triton")


def test_refusals_common_to_all() -> None:
    case = Case(n=3)
    x = case.tensors()
    with pytest.raises(Unsupported, match="dtypes"):
        case.call(x, "triton")
    for backend in ("reference", "torch", "triton"):
        with pytest.raises(Unsupported, match="rule"):
            linrec(x["q"], x["k"], x["v"], rule="delta", backend=backend)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="normalize"):
        linrec(x["q"], x["k"], x["v"], gv=torch.zeros_like(x["v"]), normalize=True)


# On a GPU, at real sizes.


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS, ids=[str(Case(**v)) for v in VARIANTS])
def test_gpu_bf16_at_4k(variant: dict[str, Any], dim: int) -> None:
    case = Case(n=4096 - 5, chunk=64, dk=dim, dv=dim, **variant)
    x = {
        name: (t.detach().bfloat16() if name in "qkv" else t.detach()).cuda().requires_grad_(t.requires_grad)
        for name, t in case.tensors(torch.float32).items()
    }
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in x.items()}
    truth, actual = _run_on_gpu(case, wide, "torch"), _run_on_gpu(case, x, "triton")
    again = _run_on_gpu(case, x, "triton")
    for name, t in truth.items():
        error = (actual[name].double() - t).norm() / (t.norm() + 1e-6)
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        assert torch.equal(actual[name], again[name]), f"{name} differs between two runs"


def _run_on_gpu(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in x.items()}
    o, final = case.call(leaves, backend)
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    loss = (o.float() * o.detach().float().cos()).sum() + 0.01 * final.s.sum()
    gradients = torch.autograd.grad(
        loss, [leaves[n] for n in wanted], allow_unused=True, materialize_grads=True
    )
    return {"o": o.detach(), "S_N": final.s.detach()} | dict(zip(wanted, gradients, strict=True))


@pytest.mark.gpu
def test_gpu_fp16_normalizer_past_the_range_of_fp16() -> None:
    """z grows to N·D, past 65504, and its gradient falls to 1e-8: neither may be lost."""
    q, k, v = (torch.randn(1, 2, 16384, 64, device="cuda").half().requires_grad_() for _ in range(3))
    options = {"normalize": True, "feature_map": "elu1"}
    o, _ = linrec(q, k, v, **options, backend="triton")
    actual = torch.autograd.grad(o.float().sum(), (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth_o, _ = linrec(*wide, **options, backend="torch")
    truth = torch.autograd.grad(truth_o.sum(), wide)
    for x, t in zip((o, *actual), (truth_o, *truth), strict=True):
        assert (x.double() - t).norm() < 1e-2 * t.norm()
