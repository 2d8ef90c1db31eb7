"""Launches of a forward and a backward pass of every family of kernels, to be compiled ahead of time."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels._tiles import Launch, Target, row_terms
from attnbench.kernels.linrec._delta_launch import delta_gradients, delta_states
from attnbench.kernels.linrec._launch import Inputs, Settings, gradients, outputs, state_gradients, states
from attnbench.kernels.linrec._vector_launch import vector_gradients, vector_outputs, vector_scores

FAMILIES = ("gated", "normalized", "delta", "vector", "gv")
"""β and a scalar gate; feature map and normaliser; as the first under the delta rule; β and a vector gate."""

_SCORED = ("vector_scores", "states", "vector_output", "vector_gradient")

EXAMPLES = (
    ("gated", 128, torch.bfloat16, None),
    ("delta", 128, torch.bfloat16, None),
    ("vector", 128, torch.bfloat16, _SCORED),
    ("gated", 64, torch.bfloat16, ("output", "gradient")),
    ("delta", 256, torch.bfloat16, ("delta_states", "delta_state_gradients", "delta_gradient")),
    ("normalized", 64, torch.float16, ("states", "output", "row_terms", "gradient")),
    ("gv", 64, torch.float16, ("vector_output", "vector_gradient")),
    ("gated", 128, torch.float32, ("output", "gradient")),
)
"""Family, head dim, dtype and kernels (None: all) that are compiled ahead of time.

Every kernel once at the usual head dim, those that differ most in registers or shared memory at others.
"""


def example_launches(family: str, dim: int, dtype: torch.dtype, target: Target) -> list[Launch]:
    """What the family launches for grouped heads and a length that no chunk divides."""
    b, groups, h, n = 2, 2, 4, 1000
    q, k = (torch.empty(b, groups, n, dim, dtype=dtype) for _ in range(2))
    v, steps = torch.empty(b, h, n, dim, dtype=dtype), torch.empty(b, h, n)
    normalize = family == "normalized"
    settings = Settings("elu1" if normalize else "identity", 1.0, normalize, 1e-6, "add", False, 64)
    g = {"normalized": None, "gv": None, "vector": torch.empty(b, h, n, dim)}.get(family, steps)
    gv = torch.empty(b, h, n, dim) if family == "gv" else None
    inputs = Inputs(q, k, v, g, None if normalize else steps, settings, target, gv)
    return {"delta": _delta, "vector": _vector, "gv": _vector}.get(family, _add)(inputs)


def _add(inputs: Inputs) -> list[Launch]:
    settings = inputs.settings
    forward, before, _ = states(inputs, None)
    output, o, den = outputs(inputs, before)
    rows: list[Launch] = []
    inverse: Tensor | None = None
    d_den: Tensor | None = None
    if den is not None:
        launch, inverse, d_den = row_terms(o, o, den, settings.eps, settings.eps_mode)
        rows.append(launch)
    backward, d_before, _ = state_gradients(inputs, o, inverse, d_den, None)
    gated = inputs.g is not None
    last, _ = gradients(inputs, o, inverse, d_den, before, d_before, need_dg=gated, need_dbeta=gated)
    return [*forward, output, *rows, *backward, last]


def _delta(inputs: Inputs) -> list[Launch]:
    forward, before, _, written, inverse = delta_states(inputs, None)
    output, o, _ = outputs(written, before)
    backward, _ = delta_gradients(inputs, o, written.v, inverse, before, None, need_dg=True, need_dbeta=True)
    return [*forward, output, *backward]


def _vector(inputs: Inputs) -> list[Launch]:
    first, scores = vector_scores(inputs)
    forward, before, _ = states(inputs, None)
    output, o, _ = vector_outputs(inputs, scores, before)
    backward, d_before, _ = state_gradients(inputs, o, None, None, None)
    over_k, over_v = inputs.g is not None, inputs.gv is not None
    last, _, _ = vector_gradients(inputs, o, scores, None, None, before, d_before, over_k, True, over_v)
    return [first, *forward, output, *backward, *last]
