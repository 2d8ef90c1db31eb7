"""What the peer of linrec asks of flash-linear-attention, through a module that stands for it.

The stand-in computes with our definition, so that a wrong argument or layout shows in the result.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, linrec
from attnbench.kernels.backends import available
from attnbench.kernels.linrec import State
from attnbench.kernels.linrec.peers import fla

B, HG, H, N, DK, DV = 2, 2, 4, 9, 6, 5
NAMES = ("linear_attn", "simple_gla", "gla", "delta_rule", "gated_delta_rule")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls that reach the stand-in of ``fla.ops``."""
    made: list[tuple[str, dict[str, Any]]] = []
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for name in NAMES:
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", _stand_in(name, made))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def _stand_in(name: str, made: list[tuple[str, dict[str, Any]]]) -> Any:
    def chunk(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
        made.append((name, options))
        assert q.shape[:2] == v.shape[:2] == (B, N), "layout (B, N, H, D)"
        assert name == "gated_delta_rule" or q.shape[2] == v.shape[2], "q and k of every head"
        assert options["output_final_state"] is True
        g, beta, s = options.get("g"), options.get("beta"), options["initial_state"]
        normalize = options.get("normalize", False)
        state = None
        if s is not None:
            state = State(s[0], s[1].squeeze(1)) if isinstance(s, tuple) else State(s, None)
        o, final = linrec(
            *(x.transpose(1, 2) for x in (q, k, v)),
            g=options.get("g_gamma") if g is None else g.transpose(1, 2),
            beta=None if beta is None else beta.transpose(1, 2),
            rule="delta" if name.endswith("delta_rule") else "add",
            scale=options["scale"],
            normalize=normalize,
            eps=1e-10,
            initial_state=state,
            backend="reference",
        )
        return o.transpose(1, 2), (final.s, final.z.unsqueeze(1)) if final.z is not None else final.s

    return chunk


def draw(*extra: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of one call: positive q and k, v, and the ``extra`` among gates, beta and state."""
    shapes = {"constant": (H,), "scalar": (B, H, N), "vector": (B, H, N, DK)}
    x: dict[str, Any] = {name: torch.rand(B, HG, N, DK, dtype=dtype) for name in "qk"}
    x["v"] = torch.randn(B, H, N, DV, dtype=dtype)
    for name in set(extra) & set(shapes):
        x["g"] = -torch.rand(shapes[name])
    if "beta" in extra:
        x["beta"] = torch.rand(B, H, N, dtype=dtype)
    if "state" in extra:
        x["initial_state"] = State(torch.randn(B, H, DK, DV), torch.rand(B, H, DK))
    return x


DEFAULTS: dict[str, Any] = {
    "g": None, "gv": None, "beta": None, "rule": "add", "feature_map": "identity", "scale": 0.5,
    "normalize": False, "eps": 1e-10, "eps_mode": "add", "initial_state": None, "reverse": False, "chunk": 64,
}  # fmt: skip

SERVED = [
    ("linear_attn", (), {}),
    ("linear_attn", ("beta", "state"), {"feature_map": "elu1", "normalize": True}),
    ("simple_gla", ("constant", "beta"), {}),
    ("simple_gla", ("scalar", "state"), {"feature_map": "relu"}),
    ("gla", ("vector", "beta", "state"), {}),
    ("delta_rule", ("state",), {"rule": "delta"}),
    ("delta_rule", ("beta",), {"rule": "delta"}),
    ("gated_delta_rule", ("scalar", "beta", "state"), {"rule": "delta"}),
    ("gated_delta_rule", ("constant",), {"rule": "delta"}),
]


@pytest.mark.parametrize(("name", "extra", "options"), SERVED)
def test_the_setting_chooses_the_function(
    calls: list[tuple[str, dict[str, Any]]], name: str, extra: tuple[str, ...], options: dict[str, Any]
) -> None:
    x = draw(*extra, dtype=torch.float16 if name.endswith("delta_rule") else torch.float32)
    x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    o, final = fla(**(DEFAULTS | x | options))
    expected, expected_final = linrec(**(DEFAULTS | x | options), backend="reference")
    assert [call[0] for call in calls] == [name]
    tolerance = 4e-3 if x["v"].dtype is torch.float16 else 1e-5
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(final.s, expected_final.s, rtol=tolerance, atol=tolerance)
    assert (final.z is None) == (expected_final.z is None)
    if final.z is not None:
        torch.testing.assert_close(final.z, expected_final.z)
    assert "g" not in calls[0][1] or calls[0][1]["g"].dtype is torch.float32


def test_gradients_reach_every_input(calls: list[tuple[str, dict[str, Any]]]) -> None:
    x = draw("scalar", "beta")
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    o, _ = fla(**(DEFAULTS | leaves))
    reference, _ = linrec(**(DEFAULTS | leaves), backend="reference")
    actual, expected = (torch.autograd.grad(y.sin().sum(), list(leaves.values())) for y in (o, reference))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("extra", "options", "what"),
    [
        ((), {"gv": torch.zeros(B, H, N, DV)}, "gate gv"),
        ((), {"reverse": True}, "reverse"),
        (("scalar",), {"normalize": True}, "normalize"),
        ((), {"normalize": True, "eps": 1e-6}, "eps"),
        (("vector",), {"rule": "delta"}, "delta rule gate"),
        ((), {"rule": "delta"}, "dtype under delta"),
        ((), {"v": torch.zeros(B, H, N, DV).double()}, "dtype under add"),
    ],
)
def test_refuses_what_fla_does_not_define(
    calls: list[tuple[str, dict[str, Any]]], extra: tuple[str, ...], options: dict[str, Any], what: str
) -> None:
    with pytest.raises(Unsupported, match=what):
        fla(**(DEFAULTS | draw(*extra) | options))
    assert calls == []


def test_needs_the_library_and_a_gpu() -> None:
    assert not available("fla", "cpu")
    with pytest.raises(Unsupported, match="linrec/fla"):
        linrec(**(DEFAULTS | draw()), backend="fla")
