"""selective_scan on a GPU at real sizes: Triton and mamba_ssm against fp64, and bitwise determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported
from attnbench.kernels.selective_scan import selective_scan

pytestmark = pytest.mark.gpu

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reversed order": {"order": True, "reverse": True},
    "segments": {"segment": 16},
}


def _inputs(dtype: torch.dtype, n: int = 1001, e: int = 200, ns: int = 16) -> dict[str, Tensor]:
    x = {name: torch.randn(2, n, e, device="cuda").to(dtype) for name in ("u", "delta", "z")}
    x |= {name: torch.randn(2, n, ns, device="cuda").to(dtype) for name in ("b", "c")}
    x["a"] = -torch.arange(1.0, ns + 1, device="cuda").expand(e, ns).contiguous()
    x["skip"], x["delta_bias"] = torch.ones(e, device="cuda"), torch.full((e,), -4.0, device="cuda")
    return x


def _run(x: dict[str, Tensor], backend: str, need_state: bool, **options: Any) -> list[Tensor]:
    """y, the final state and every gradient."""
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    if options.get("order"):
        options["order"] = torch.arange(x["u"].shape[1], device="cuda").roll(7).int()
    y, state = selective_scan(
        **leaves, delta_softplus=True, need_state=need_state, backend=backend, **options
    )
    torch.manual_seed(1)
    outputs = [y, state] if need_state else [y]
    sent = [torch.randn(t.shape, device="cuda").to(t.dtype) for t in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), sent)
    return [t.detach() for t in (*outputs, *found)]


def _assert_close(x: dict[str, Tensor], backend: str, need_state: bool = True, **options: Any) -> None:
    truth = _run({name: t.double() for name, t in x.items()}, "torch", need_state, **options)
    actual = _run(x, backend, need_state, **options)
    for found, expected in zip(actual, truth, strict=True):
        eps = max(torch.finfo(found.dtype).eps, 1e-5)
        assert (found.double() - expected).abs().max() <= 2 * eps * expected.abs().max()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(name: str, dtype: torch.dtype) -> None:
    _assert_close(_inputs(dtype), "triton", **CALLS[name])


def test_mamba_ssm() -> None:
    try:
        _assert_close(_inputs(torch.float32), "mamba_ssm", need_state=False)
    except Unsupported as why:
        pytest.skip(str(why))


def test_bitwise_determinism() -> None:
    x = _inputs(torch.bfloat16)
    first, second = (_run(x, "triton", True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
