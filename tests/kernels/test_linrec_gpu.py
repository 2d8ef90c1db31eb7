"""linrec on a GPU at real sizes: Triton against fp64, bitwise determinism, sums past the range of fp16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import linrec
from attnbench.kernels.linrec import State

pytestmark = pytest.mark.gpu

B, H, N = 2, 4, 4091
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "constant": {"gate": True, "scale": 0.1},
    "gated": {"g": True, "beta": True, "state": True, "groups": 2},
    "normalized": {"normalize": True, "feature_map": "elu1", "beta": True, "state": True},
    "reversed": {"g": True, "normalize": True, "feature_map": "relu", "reverse": True},
    "delta": {"rule": "delta", "beta": True, "state": True, "scale": 0.1},
    "gated delta": {"rule": "delta", "g": True, "beta": True, "groups": 2, "reverse": True},
    "vector": {"vector": True, "beta": True, "state": True, "groups": 2, "scale": 0.1},
    "gv": {"gv": True, "state": True, "scale": 0.1},
}


def run(x: dict[str, Tensor], backend: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name, for fixed gradients of o and the final state."""
    leaves = {name: t.detach().requires_grad_(t.dim() > 1) for name, t in x.items()}
    state = State(leaves["s"], leaves["z"] if options.get("normalize") else None) if "s" in x else None
    o, final = linrec(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        g=leaves.get("g"),
        gv=leaves.get("gv"),
        beta=leaves.get("beta"),
        initial_state=state,
        backend=backend,
        **options,
    )
    generator = torch.Generator(device="cuda").manual_seed(1)
    results = {"o": o, "S_N": final.s}
    sent = [torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype) for t in results.values()]
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    gradients = torch.autograd.grad(
        list(results.values()), [leaves[n] for n in wanted], sent, allow_unused=True, materialize_grads=True
    )
    return {name: t.detach() for name, t in results.items()} | dict(zip(wanted, gradients, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CALLS)
def test_bf16_at_4k(name: str, dim: int) -> None:
    options = dict(CALLS[name])
    groups = options.pop("groups", H)
    shapes = {"q": (B, groups, N, dim), "k": (B, groups, N, dim), "v": (B, H, N, dim)}
    x = {key: torch.randn(shape, device="cuda").bfloat16() for key, shape in shapes.items()}
    if options.pop("gate", False):
        x["g"] = -torch.rand(H, device="cuda")
    if options.pop("g", False):
        x["g"] = torch.nn.functional.logsigmoid(torch.randn(B, H, N, device="cuda"))
    for gate, key in (("vector", "g"), ("gv", "gv")):
        if options.pop(gate, False):
            x[key] = torch.nn.functional.logsigmoid(torch.randn(B, H, N, dim, device="cuda"))
    if options.get("rule") == "delta":
        x["k"] = torch.nn.functional.normalize(x["k"].float(), dim=-1).bfloat16()
    if options.pop("beta", False):
        x["beta"] = torch.rand(B, H, N, device="cuda")
    if options.pop("state", False):
        x["s"] = torch.randn(B, H, dim, dim, device="cuda")
        x["z"] = torch.rand(B, H, dim, device="cuda")
    truth = run({key: t.double() for key, t in x.items()}, "torch", options)
    actual, again = (run(x, "triton", options) for _ in range(2))
    for key, t in truth.items():
        error = (actual[key].double() - t).norm() / (t.norm() + 1e-6)
        # the delta rule reads back what it rounded, the others only sum it
        assert error < (3e-2 if "rule" in options else 1.5e-2), f"{key}: relative error {error:.1e}"
        assert torch.equal(actual[key], again[key]), f"{key} differs between two runs"


def test_fp16_normalizer_past_the_range_of_fp16() -> None:
    """z grows past 65504, and dO/den falls below the smallest fp16 number: neither may be lost."""
    x = {name: torch.randn(1, 2, 65536, 64, device="cuda").half() for name in "qkv"}
    options = {"normalize": True, "feature_map": "elu1"}
    truth = run({key: t.double() for key, t in x.items()}, "torch", options)
    actual = run(x, "triton", options)
    assert actual["o"].isfinite().all()
    for key in ("o", "S_N", "q", "k", "v"):
        assert (actual[key].double() - truth[key]).norm() < 1e-2 * truth[key].norm()
