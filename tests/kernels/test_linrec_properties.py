"""What holds exactly for the linear recurrence, for every backend, and what each backend refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, linrec
from attnbench.kernels.linrec import State

H, DK, DV = 2, 12, 20
NORMALIZED = {"normalize": True, "feature_map": "elu1"}

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def draw(n: int, *extra: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k, v and the ``extra`` inputs among g (scalar), beta, s and z, of one batch and H heads."""
    shapes = {"q": (n, DK), "k": (n, DK), "v": (n, DV), "g": (n,), "beta": (n,), "s": (DK, DV), "z": (DK,)}
    x = {name: torch.randn(1, H, *shapes[name], dtype=dtype) for name in ("q", "k", "v", *extra)}
    for name in {"g", "beta", "z"} & set(x):
        x[name] = -x[name].abs() if name == "g" else x[name].abs()
    return x


def call(x: dict[str, Tensor], backend: str, chunk: int = 16, **options: Any) -> tuple[Tensor, State]:
    """The op on named inputs; ``s`` and ``z`` are the initial state."""
    inputs = {name: x.get(name) for name in ("g", "gv", "beta")}
    state = State(x["s"], x.get("z")) if "s" in x else None
    return linrec(
        x["q"], x["k"], x["v"], **inputs, initial_state=state, chunk=chunk, backend=backend, **options
    )


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for fp32 roundings of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


def halves(n: int, reverse: bool) -> tuple[slice, slice]:
    """Steps before and from the middle, in the order of time."""
    low, high = slice(0, n), slice(n, None)
    return (high, low) if reverse else (low, high)


@backends
def test_chunk_length_changes_nothing(backend: str) -> None:
    x = {name: t.requires_grad_() for name, t in draw(70, "g", "beta", "s", "z").items()}
    results = []
    for chunk in (16, 64):
        o, final = call(x, backend, chunk=chunk, **NORMALIZED)
        loss = o.sin().sum() + final.s.cos().sum() + final.z.sum()
        results.append([o, *final, *torch.autograd.grad(loss, list(x.values()))])
    for one, other in zip(*results, strict=True):
        close(one, other)


@backends
@directions
def test_a_sequence_in_two_parts_is_the_sequence(backend: str, reverse: bool) -> None:
    x = draw(50, "g", "beta")
    o, final = call(x, backend, reverse=reverse, **NORMALIZED)
    first, second = ({name: t[:, :, part] for name, t in x.items()} for part in halves(23, reverse))
    first_o, middle = call(first, backend, reverse=reverse, **NORMALIZED)
    second_o, last = call(second | {"s": middle.s, "z": middle.z}, backend, reverse=reverse, **NORMALIZED)
    close(torch.cat((second_o, first_o) if reverse else (first_o, second_o), 2), o)
    close(last.s, final.s)
    close(last.z, final.z)


@backends
def test_zero_gates_are_no_gates(backend: str) -> None:
    x = draw(17, "s")
    expected, final = call(x, backend)
    gates = [{"g": torch.zeros(1, H, 17)}, {"g": torch.zeros(H)}]
    gates += [{"g": torch.zeros(1, H, 17, DK)}, {"gv": torch.zeros(1, H, 17, DV)}]
    for gate in gates:
        o, gated_final = call(x | gate, backend)
        close(o, expected)
        close(gated_final.s, final.s)


@backends
def test_gates_that_are_equal_over_dims_are_scalar(backend: str) -> None:
    x = draw(20, "g", "s")
    o, final = call(x, backend)
    g = x.pop("g").unsqueeze(-1)
    for name, dim in (("g", DK), ("gv", DV)):
        wide_o, wide_final = call(x | {name: g.expand(-1, -1, -1, dim)}, backend)
        close(wide_o, o)
        close(wide_final.s, final.s)


@backends
def test_gates_that_are_equal_over_steps_are_constant(backend: str) -> None:
    x, g = draw(40), torch.tensor([-0.1, -2.0])
    scalar, constant = (call(x | {"g": t}, backend)[0] for t in (g.view(1, H, 1).expand(1, H, 40), g))
    close(constant, scalar)


@backends
@directions
@pytest.mark.parametrize("gate", [-1e4, -math.inf])
def test_a_reset_forgets_and_costs_no_digits(backend: str, reverse: bool, gate: float) -> None:
    x = draw(50, "g", "s")
    x["g"][:, :, 20] = gate
    forgotten, kept = halves(21 if reverse else 20, reverse)
    o, final = call(x, backend, reverse=reverse)
    changed = {name: t.clone() for name, t in x.items()}
    for name in ("q", "k", "v"):
        changed[name][:, :, forgotten] *= -3
    changed["s"] += 7
    changed_o, changed_final = call(changed, backend, reverse=reverse)
    assert torch.equal(changed_o[:, :, kept], o[:, :, kept])
    assert torch.equal(changed_final.s, final.s)
    assert not torch.equal(changed_o[:, :, forgotten], o[:, :, forgotten])
    alone = {name: t[:, :, kept] for name, t in x.items() if name != "s"}
    torch.testing.assert_close(call(alone, backend, reverse=reverse)[0], o[:, :, kept], rtol=1e-5, atol=5e-6)


@backends
@directions
def test_no_output_depends_on_the_future(backend: str, reverse: bool) -> None:
    x = draw(50, "g", "beta")
    past, future = halves(21, reverse)
    o, _ = call(x, backend, reverse=reverse, **NORMALIZED)
    changed = {name: t.clone() for name, t in x.items()}
    for t in changed.values():
        t[:, :, future] = 0.5 * t[:, :, future] - 0.1
    changed_o, _ = call(changed, backend, reverse=reverse, **NORMALIZED)
    assert torch.equal(changed_o[:, :, past], o[:, :, past])
    assert not torch.equal(changed_o[:, :, future], o[:, :, future])


@backends
def test_linear_in_v_and_the_initial_state(backend: str) -> None:
    x, y = draw(40, "g", "s"), draw(40, "g", "s")
    other = x | {name: y[name] for name in ("v", "s")}
    mixed = x | {name: 2 * x[name] - y[name] for name in ("v", "s")}
    (o_x, _), (o_y, _), (o, _) = (call(t, backend) for t in (x, other, mixed))
    close(o, 2 * o_x - o_y)


@backends
def test_constant_values_come_back_when_normalized(backend: str) -> None:
    x = draw(48, "g", "beta")
    x["v"] = torch.ones_like(x["v"])
    o, _ = call(x, backend, eps=0.0, **NORMALIZED)
    close(o, x["v"])


@backends
@pytest.mark.parametrize("gate", [-30.0, -1e4, -math.inf])
def test_strong_gates_stay_finite(backend: str, gate: float) -> None:
    x = draw(40, "g", "beta", "s")
    x["g"] = torch.full_like(x["g"], gate)
    x = {name: t.requires_grad_() for name, t in x.items()}
    o, final = call(x, backend, chunk=32)
    gradients = torch.autograd.grad(o.sum() + final.s.sum(), list(x.values()))
    assert all(t.isfinite().all() for t in (o, final.s, *gradients))
    close(o, x["beta"].unsqueeze(-1) * (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["vector", "normalized", "delta"])
def test_gradcheck(backend: str, kind: str) -> None:
    """Finite differences, through o and the final state, to every input and the initial state."""
    n = 5
    x = {name: t[..., :3] if name in "qkv" else t for name, t in draw(n, "beta", dtype=torch.float64).items()}
    x["s"] = torch.randn(1, H, 3, 3, dtype=torch.float64)
    if kind == "vector":
        x["g"], x["gv"] = (-torch.rand(1, H, n, 3, dtype=torch.float64) for _ in range(2))
        x["q"], x["k"] = x["q"][:, :1], x["k"][:, :1]
    elif kind == "delta":
        x["g"] = -torch.rand(1, H, n, dtype=torch.float64)
    else:
        x["g"], x["z"] = -torch.rand(1, H, n, dtype=torch.float64), torch.rand(1, H, 3, dtype=torch.float64)
    options = {"normalized": NORMALIZED, "delta": {"rule": "delta"}}.get(kind, {})

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        o, final = call(dict(zip(x, tensors, strict=True)), backend, chunk=2, **options)
        return (o, *(t for t in final if t is not None))

    assert torch.autograd.gradcheck(outputs, tuple(t.clone().requires_grad_() for t in x.values()))


def draw_delta(n: int, *extra: str) -> dict[str, Tensor]:
    """As :func:`draw` for the delta rule: keys of unit length, β in (0, 1)."""
    x = draw(n, "beta", *extra)
    return x | {"k": torch.nn.functional.normalize(x["k"], dim=-1), "beta": torch.rand_like(x["beta"])}


SETTINGS = {
    "delta": {"rule": "delta"},
    "vector": {"g": -torch.linspace(0.05, 3.0, DK)},
    "gv": {"gv": -torch.linspace(0.05, 3.0, DV)},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


def draw_setting(setting: str, n: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs of one head and the options of ``call`` for a setting; gates differ over steps and dims."""
    options = dict(SETTINGS[setting])
    x = {name: t[:, :1] for name, t in draw_delta(n, "s", *(["g"] if setting == "delta" else [])).items()}
    for name in ("g", "gv"):
        if name in options:
            x[name] = torch.rand(1, 1, n, 1) * options.pop(name)
    return x, options


@backends
@settings
def test_chunks_parts_and_causality_of_rules_and_vector_gates(backend: str, setting: str) -> None:
    """The chunk changes nothing, nor does a cut with the state passed on; the future changes no output."""
    x, options = draw_setting(setting, 37)
    o, final = call(x, backend, **options)
    other, _ = call(x, backend, chunk=32, **options)
    close(other, o)
    past, future = halves(21, False)
    first, second = ({k: t if k == "s" else t[:, :, part] for k, t in x.items()} for part in (past, future))
    first_o, middle = call(first, backend, **options)
    second_o, last = call(second | {"s": middle.s}, backend, **options)
    close(torch.cat((first_o, second_o), 2), o)
    close(last.s, final.s)
    changed = {name: t.clone() for name, t in x.items()}
    for name in set(changed) - {"s"}:
        changed[name][:, :, 21:] = 0.5 * changed[name][:, :, 21:] - 0.1
    changed_o, _ = call(changed, backend, **options)
    assert torch.equal(changed_o[:, :, :21], o[:, :, :21])
    assert not torch.equal(changed_o[:, :, 21:], o[:, :, 21:])


@backends
@settings
@pytest.mark.parametrize("gate", [-30.0, -math.inf])
def test_strong_gates_under_rules_and_vector_gates(backend: str, setting: str, gate: float) -> None:
    """Everything before a reset is forgotten, and outputs and gradients stay finite."""
    x, options = draw_setting(setting, 18)
    name = "gv" if setting == "gv" else "g"
    x[name] = x[name].clone()
    x[name][:, :, 9] = gate
    leaves = {key: t.clone().requires_grad_() for key, t in x.items()}
    o, final = call(leaves, backend, **options)
    gradients = torch.autograd.grad(o.sum() + final.s.sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (o, final.s, *gradients))
    alone = {key: t[:, :, 9:] for key, t in x.items() if key != "s"}
    close(call(alone, backend, **options)[0], o[:, :, 9:])


@backends
def test_delta_with_orthonormal_keys_is_add(backend: str) -> None:
    x = draw_delta(DK)
    x["k"] = torch.linalg.qr(torch.randn(1, H, DK, DK))[0]
    (delta, delta_final), (add, add_final) = (call(x, backend, rule=rule) for rule in ("delta", "add"))
    close(delta, add)
    close(delta_final.s, add_final.s)


@backends
def test_delta_holds_what_it_wrote_last(backend: str) -> None:
    """β = 1 and unit keys: reading with the key of a step right after it gives its value."""
    x = draw_delta(40)
    del x["beta"]
    o, _ = call(x | {"q": x["k"]}, backend, rule="delta")
    close(o, x["v"])


@backends
def test_delta_is_linear_in_v_and_the_initial_state(backend: str) -> None:
    x, y = draw_delta(20, "g", "s"), draw_delta(20, "s")
    other = x | {name: y[name] for name in ("v", "s")}
    mixed = x | {name: 2 * x[name] - y[name] for name in ("v", "s")}
    (o_x, _), (o_y, _), (o, _) = (call(t, backend, rule="delta") for t in (x, other, mixed))
    close(o, 2 * o_x - o_y)


def test_delta_refuses_what_it_has_no_form_for() -> None:
    for backend in ("torch", "triton"):
        with pytest.raises(Unsupported, match="gate gv under the delta rule"):
            call(draw(3) | {"gv": torch.zeros(1, H, 3, DV)}, backend, rule="delta")
    with pytest.raises(Unsupported, match="gate g under the delta rule"):
        call(draw(3) | {"g": torch.zeros(1, H, 3, DK)}, "triton", rule="delta")
    with pytest.raises(Unsupported, match="normalize"):
        call(draw(3), "auto", rule="delta", normalize=True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"k": torch.zeros(1, H, 4, DK)}, "linrec k: observed shape"),
        ({"q": torch.zeros(1, 3, 3, DK)}, "linrec heads"),
        ({"g": torch.zeros(1, H, 4)}, "linrec g: observed shape"),
        ({"beta": torch.zeros(1, H, 3, 1)}, "linrec beta: observed shape"),
        ({"s": torch.zeros(1, H, DV, DK)}, "linrec S_0: observed shape"),
        ({"v": torch.zeros(H, 3, DV)}, "linrec q, v: observed 4 and 3 dimensions"),
    ],
)
def test_shapes_that_do_not_belong_together(options: dict[str, Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        call(draw(3) | options, "auto")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"v": torch.zeros(1, H, 3, 257)}, "head dims"),
        ({"v": torch.zeros(1, H, 3, DV).double()}, "dtypes"),
    ],
)
def test_triton_refuses(options: dict[str, Tensor], what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        call(draw(3) | options, "triton")


def test_triton_refuses_a_chunk_that_is_no_tile() -> None:
    with pytest.raises(Unsupported, match="chunk: observed 48"):
        call(draw(3), "triton", chunk=48)


def test_refusals_common_to_all() -> None:
    for backend in ("reference", "torch", "triton"):
        with pytest.raises(ValueError, match="rule: observed 'oja'"):
            call(draw(3), backend, rule="oja")
        with pytest.raises(ValueError, match="eps_mode: observed 'mul'"):
            call(draw(3), backend, eps_mode="mul")
    with pytest.raises(Unsupported, match="normalize"):
        call(draw(3) | {"gv": torch.zeros(1, H, 3, DV)}, "auto", normalize=True)
