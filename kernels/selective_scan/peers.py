"""The selective scan of others: the CUDA kernel of mamba_ssm.

It computes exactly the call that is asked for or raises Unsupported. Directions are its groups of channels;
whatever else its layout needs, transposed copies, is part of its time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported

MAX_STATE = 256


def mamba_ssm(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor | None,
    reverse: bool,
    segment: int,
    initial_state: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute with ``mamba_ssm``'s selective_scan_fn on (B, K·E, N) copies.

    Raises Unsupported for what that function has no option for: an order, ``reverse``, segments, an initial
    state; for gradients of a final state, which it drops; for dtypes that it does not take; and without its
    CUDA extension.
    """
    for name, asked in (
        ("order", order is not None),
        ("reverse", reverse),
        ("segment", segment > 1),
        ("initial_state", initial_state is not None),
    ):
        if asked:
            raise Unsupported(f"selective_scan/mamba_ssm {name}", "asked for", "none: it has no such option")
    inputs = [x for x in (u, delta, a, b, c, skip, z, delta_bias) if x is not None]
    if need_state and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise Unsupported(
            "selective_scan/mamba_ssm need_state", "inputs that require gradients", "a forward pass"
        )
    if any(x is not None and x.dtype is not u.dtype for x in (delta, b, c, z)):
        observed = ", ".join(str(x.dtype) for x in (u, delta, b, c, z) if x is not None)
        raise Unsupported("selective_scan/mamba_ssm dtypes of u, delta, b, c, z", observed, "one dtype")
    if u.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise Unsupported("selective_scan/mamba_ssm dtype", u.dtype, "float16, bfloat16 or float32")
    if any(x is not None and x.dtype is not torch.float32 for x in (a, skip, delta_bias)):
        observed = ", ".join(str(x.dtype) for x in (a, skip, delta_bias) if x is not None)
        raise Unsupported("selective_scan/mamba_ssm dtypes of a, skip, delta_bias", observed, "float32")
    if a.shape[-1] > MAX_STATE:
        raise Unsupported("selective_scan/mamba_ssm state size", a.shape[-1], f"at most {MAX_STATE}")
    k, e = u.shape[1], u.shape[3]
    result = _function()(
        _channels_first(u),
        _channels_first(delta),
        a.flatten(0, 1),
        b.mT,
        c.mT,
        D=None if skip is None else skip.flatten(),
        z=None if z is None else _channels_first(z),
        delta_bias=None if delta_bias is None else delta_bias.flatten(),
        delta_softplus=delta_softplus,
        return_last_state=need_state,
    )
    y, state = result if need_state else (result, None)
    y = y.unflatten(1, (k, e)).mT
    return y, None if state is None else state.float().unflatten(1, (k, e))


def _channels_first(x: Tensor) -> Tensor:
    """(B, K, N, E) → (B, K·E, N)."""
    return x.mT.flatten(1, 2)


@lru_cache(maxsize=1)
def _function() -> Callable[..., Any]:
    """selective_scan_fn, once its compiled kernel is known to be there."""
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as why:
        raise Unsupported("selective_scan/mamba_ssm", f"ImportError: {why}", "an import that works") from why
    if getattr(module, "selective_scan_cuda", None) is None:
        raise Unsupported("selective_scan/mamba_ssm", "no selective_scan_cuda", "its CUDA extension")
    return module.selective_scan_fn
