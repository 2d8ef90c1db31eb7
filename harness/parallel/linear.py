"""Linear attention over a sequence that is split among ranks: what they exchange does not grow with it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from attnbench.harness.parallel.collectives import Ranks, summed
from attnbench.kernels import linrec
from attnbench.kernels.features import feature, guarded
from attnbench.kernels.kv_reduce import FeatureMap
from attnbench.kernels.linrec import State

FEATURES: Final[FeatureMap] = "elu1"
EPS: Final = 1e-6
"""Those of the linear transformer."""


def state_exchange(q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, *, causal: bool) -> Tensor:
    """Linear attention of this rank's q, k, v (B, H, N/P, D) over the whole sequence.

    Each rank sums up its keys and values to a state, D·(D + 1) numbers a head; the states are gathered, and
    the recurrence starts from the sum of those before (``causal``), or every query reads the sum of all.
    Source: Sun et al., LASP (arXiv 2404.02882), which passes states from rank to rank, and LASP-2
    (arXiv 2502.07563), which gathers them as here. The mechanism: linear transformer (arXiv 2006.16236).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    keys = feature(k.to(exact), FEATURES)
    ones = torch.ones_like(v[..., :1], dtype=exact)
    own = keys.transpose(-1, -2) @ torch.cat((v.to(exact), ones), -1)
    total = summed(own, ranks, causal=causal)
    s, z = total[..., :-1], total[..., -1]
    if causal:
        start = State(s.contiguous(), z.contiguous())
        o, _ = linrec(q, k, v, feature_map=FEATURES, normalize=True, eps=EPS, initial_state=start)
        return o
    queries = feature(q.to(exact), FEATURES)
    denominator = guarded((queries @ z.unsqueeze(-1)), EPS, "add")
    return ((queries @ s) / denominator).to(q.dtype)
