"""Attention in which the queries compete for every key: softmax or arg-max over the query axis, then sums.

Slots, k-means cluster centres, prototypes and sender-normalised attention: few queries as a rule, long keys.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

# by name: importing the backend module query_softmax.torch rebinds the name `torch` in this package
from torch import Tensor
from torch import bool as bool_dtype

from attnbench.kernels.backends import Op

OP = Op(
    "query_softmax",
    {
        "reference": "attnbench.kernels.query_softmax.reference:query_softmax",
        "torch": "attnbench.kernels.query_softmax.torch:query_softmax",
        "triton": "attnbench.kernels.query_softmax.triton:query_softmax",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


class Assignment(NamedTuple):
    """What the queries received: values, mass, and with arg-max the query that took each key."""

    o: Tensor | None
    mass: Tensor
    index: Tensor | None


def query_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    hard: bool = False,
    normalize: bool = False,
    eps: float = 0.0,
    eps_mode: Literal["weight", "mass"] = "weight",
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Assignment:
    """Distribute every key over the queries: w_ij = softmax over i of scale·q_i·k_j, and o_i = Σ_j w_ij v_j.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, H, M, D).
        v: (B, H, M, Dv); Dv may differ from D. None where only mass and index are wanted: o is then None.
        hard: w_ij = 1 for the query with the largest score (the first of equals), else 0. Gradients then flow
            to v only.
        normalize: divide o by the mass of the query: the weighted mean over the keys in place of the sum.
        eps: guard of the mean. ``eps_mode="weight"`` adds it to every weight of a pair that is not masked,
            before all sums; ``"mass"`` only to the mass in the denominator.
        scale: multiplier of the scores, 1/√D by default.
        mask: bool, broadcastable to (B, H, N, M); True removes a pair: the query does not compete for the
            key. A key without any query goes to none.
        backend: ``auto``, or one of ``OPS["query_softmax"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, 0 for a query without mass; mass Σ_j w_ij (B, H, N) in fp32 (fp64
        for fp64 inputs); index (B, H, M) int32 if ``hard``, −1 for a key without queries, else None.
        o and mass are differentiable in q, k and v, with ``hard`` o in v.

    Raises:
        ValueError: shapes that do not match, a mask that is not bool, or an unknown ``eps_mode``.
        Unsupported: the backend cannot serve a shape or a dtype.

    Cost: 2·B·H·N·M·(D + Dv) FLOPs forward; B·H·M·4 bytes.
    Source: Locatello et al., Slot Attention (arXiv 2006.15055); arg-max: Yu et al., k-means Mask Transformer
    (arXiv 2207.04044); sums without normalisation: Ding et al., Visual Dependency Transformers (arXiv
    2304.03282).
    """
    b, h, n, d = q.shape
    shapes_match = k.dim() == 4 and k.shape == (b, h, k.shape[2], d)
    if not shapes_match or (v is not None and (v.dim() != 4 or v.shape[:3] != k.shape[:3])):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v) if x is not None)
        raise ValueError(f"q, k, v: observed {shapes}, expected (B, H, N, D), (B, H, M, D), (B, H, M, Dv)")
    if eps_mode not in ("weight", "mass"):
        raise ValueError(f"eps_mode: observed {eps_mode!r}, expected 'weight' or 'mass'")
    if mask is not None:
        if mask.dtype is not bool_dtype:
            raise ValueError(f"mask: observed {mask.dtype}, expected torch.bool, True for a pair to remove")
        mask = mask.expand(b, h, n, k.shape[2])
    o, mass, index = OP.run(
        backend,
        q,
        k,
        v,
        hard=hard,
        normalize=normalize,
        eps=eps,
        eps_mode=eps_mode,
        scale=1.0 / math.sqrt(d) if scale is None else scale,
        mask=mask,
    )
    return Assignment(o, mass, index)
