"""The peer of selective_scan: exactly mamba_ssm's function on its layout, or Unsupported."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, available
from attnbench.kernels.selective_scan import peers
from attnbench.kernels.selective_scan.reference import selective_scan as reference

INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def _options(**changes: Any) -> dict[str, Any]:
    names = ("skip", "z", "delta_bias", "order", "initial_state")
    plain = dict.fromkeys(names) | {"delta_softplus": True, "reverse": False, "segment": 1}
    return plain | {"need_state": False} | changes


def _inputs(k: int = 2, n: int = 6, e: int = 3, ns: int = 2) -> tuple[Tensor, ...]:
    u, delta = torch.randn(1, k, n, e), torch.randn(1, k, n, e)
    return u, delta, -torch.rand(k, e, ns), torch.randn(1, k, n, ns), torch.randn(1, k, n, ns)


def _channels_first_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, D: Any, z: Any, delta_bias: Any,
    delta_softplus: bool, return_last_state: bool,
) -> Any:  # fmt: skip
    """What the library documents: u (B, E, N), groups of channels share b and c (B, G, Ns, N)."""
    assert delta_softplus
    groups = b.shape[1]

    def split(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else x.unflatten(axis, (groups, -1))

    y, state = reference(
        split(u, 1).mT, split(delta, 1).mT, split(a, 0), b.mT, c.mT,
        **_options(skip=split(D, 0), z=None if z is None else split(z, 1).mT,
                   delta_bias=split(delta_bias, 0), need_state=True),
    )  # fmt: skip
    y = y.mT.flatten(1, 2)
    return (y, state.flatten(1, 2)) if return_last_state else y


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in the place of the library's."""
    module = ModuleType(INTERFACE)
    module.selective_scan_cuda = object()
    module.selective_scan_fn = _channels_first_scan
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, INTERFACE, module)
    peers._function.cache_clear()
    yield module
    peers._function.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("full", [False, True])
def test_directions_are_groups_of_channels(full: bool) -> None:
    x = _inputs()
    options = _options(need_state=True)
    if full:
        options |= {"skip": torch.randn(2, 3), "z": torch.randn(1, 2, 6, 3), "delta_bias": torch.randn(2, 3)}
    y, state = peers.mamba_ssm(*x, **options)
    expected, last = reference(*x, **options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, last)


@pytest.mark.usefixtures("library")
def test_the_state_is_returned_only_when_asked_for() -> None:
    assert peers.mamba_ssm(*_inputs(), **_options())[1] is None


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.zeros(2, 6)}, "order"),
        ({"reverse": True}, "reverse"),
        ({"segment": 4}, "segment"),
        ({"initial_state": torch.zeros(1, 2, 3, 2)}, "initial_state"),
        ({"skip": torch.zeros(2, 3, dtype=torch.half)}, "dtypes of a, skip, delta_bias"),
        ({"z": torch.zeros(1, 2, 6, 3, dtype=torch.half)}, "dtypes of u, delta, b, c, z"),
    ],
)
def test_refuses_what_it_has_no_option_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        peers.mamba_ssm(*_inputs(), **_options(**change))


@pytest.mark.usefixtures("library")
def test_refuses_inputs_that_it_would_compute_otherwise() -> None:
    u, *rest = _inputs()
    with pytest.raises(Unsupported, match="need_state: observed inputs that require gradients"):
        peers.mamba_ssm(u.requires_grad_(), *rest, **_options(need_state=True))
    with torch.no_grad():
        peers.mamba_ssm(u, *rest, **_options(need_state=True))
    with pytest.raises(Unsupported, match=r"dtype: observed torch\.float64"):
        peers.mamba_ssm(*(x.double() for x in _inputs()), **_options())
    with pytest.raises(Unsupported, match="state size: observed 257"):
        peers.mamba_ssm(*_inputs(ns=257), **_options())


def test_needs_its_extension(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    library.selective_scan_cuda = None
    with pytest.raises(Unsupported, match="no selective_scan_cuda"):
        peers.mamba_ssm(*_inputs(), **_options())
    monkeypatch.setitem(sys.modules, INTERFACE, None)  # an import of it fails
    with pytest.raises(Unsupported, match="ImportError"):
        peers.mamba_ssm(*_inputs(), **_options())


def test_is_not_available_on_cpu() -> None:
    assert not available("mamba_ssm", "cpu")
