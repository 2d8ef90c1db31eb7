"""flash-linear-attention (fla) as a backend of :func:`attnbench.kernels.linrec`, by the setting of the call.

fla has one function for each combination of rule and gate, in the layout (B, N, H, D). A feature map, β under
``add`` and the repetition of grouped heads are computed before it, as fla's own layers do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.features import feature
from attnbench.kernels.linrec import State

FLA_EPS = 1e-10
"""What fla adds to the denominator of normalised linear attention; it has no option for it."""


def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    rule: str,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: str,
    initial_state: State | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, State]:
    """Compute with fla's chunked function for the setting; ``chunk`` is left to fla.

    ``add``: ``chunk_linear_attn`` without a gate, ``chunk_simple_gla`` with a constant or scalar one (its
    ``chunk_retention`` is that call), ``chunk_gla`` with one over Dk. ``delta``: ``chunk_delta_rule``, or
    ``chunk_gated_delta_rule`` with a constant or scalar gate. Raises Unsupported for what fla does not
    define: ``gv``, ``reverse``, another eps than its own, gates over Dk under ``delta``, fp64, and fp32 under
    ``delta``.
    """
    _check(q, v, g, gv, rule, normalize, eps, eps_mode, reverse)
    heads = v.shape[1]
    q, k = (feature(x, feature_map) for x in (q, k))
    gated_delta = rule == "delta" and g is not None
    if q.shape[1] != heads and not gated_delta:  # the one function that takes grouped heads
        q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    write = None if beta is None else beta.to(v.dtype)
    if rule == "add" and write is not None:
        k = k * write.unsqueeze(-1)
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": None if initial_state is None else initial_state.s.float(),
        "output_final_state": True,
    }
    if rule == "delta":
        write = torch.ones(v.shape[:3], dtype=v.dtype, device=v.device) if write is None else write
        options["beta"] = write.transpose(1, 2)
    if g is not None and g.dim() > 1:
        options["g"] = g.float().transpose(1, 2)
    elif g is not None and rule == "delta":
        options["g"] = g.detach().float().view(1, 1, -1).expand(v.shape[0], v.shape[2], heads)
    elif g is not None:
        options["g_gamma"] = g.detach().float()
    if rule == "add" and g is None:
        options["normalize"] = normalize
        if normalize and initial_state is not None:
            z = torch.zeros_like(q[:, :, 0]) if initial_state.z is None else initial_state.z.to(q.dtype)
            options["initial_state"] = (options["initial_state"], z.unsqueeze(1))
    function = _function(rule, None if g is None else g.dim())
    o, final = function(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    o = o.transpose(1, 2)
    if normalize:
        return o, State(final[0].float(), final[1].squeeze(1).float())
    return o, State(final.float(), None)


def _function(rule: str, gate_dims: int | None) -> Callable[..., Any]:
    """The function of fla for a rule and a gate of so many dimensions; imported here, on the first call."""
    name = {
        ("add", None): "linear_attn",
        ("add", 1): "simple_gla",
        ("add", 3): "simple_gla",
        ("add", 4): "gla",
        ("delta", None): "delta_rule",
        ("delta", 1): "gated_delta_rule",
        ("delta", 3): "gated_delta_rule",
    }[rule, gate_dims]
    return getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")


def _check(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    rule: str,
    normalize: bool,
    eps: float,
    eps_mode: str,
    reverse: bool,
) -> None:
    """Raise Unsupported for what fla does not define."""
    if gv is not None:
        raise Unsupported("linrec/fla gate gv", "gv given", "None: fla decays the value dimension inside ABC")
    if reverse:
        raise Unsupported("linrec/fla reverse", "True", "False: fla's chunked functions run forward")
    if normalize and g is not None:
        raise Unsupported("linrec/fla normalize", "a gate", "no gate: fla normalises linear attention alone")
    if normalize and (eps, eps_mode) != (FLA_EPS, "add"):
        raise Unsupported("linrec/fla eps", f"{eps_mode} {eps}", f"add {FLA_EPS}, which fla has fixed")
    if rule == "delta" and g is not None and g.dim() == 4:
        raise Unsupported("linrec/fla delta rule gate", f"shape {tuple(g.shape)}", "None, (H,) or (B, H, N)")
    accepted = (torch.float16, torch.bfloat16) + (() if rule == "delta" else (torch.float32,))
    if v.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise Unsupported(f"linrec/fla dtype under {rule}", v.dtype, f"one of {names}")
    if rule == "delta" and q.shape[-1] > 256:
        raise Unsupported("linrec/fla head dim of the delta rule", f"Dk={q.shape[-1]}", "at most 256")
