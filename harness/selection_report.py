"""What a selection keeps: density in three senses, recall of the softmax mass, and the selector's share."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from attnbench.impls.base import SparseAttention
from attnbench.impls.spec import Pattern
from attnbench.kernels import flash, padding_bias

COLUMNS: Final = (
    "density",
    "block_density",
    "executed_density",
    "recall_mean",
    "recall_p5",
    "recall_p1",
    "recall_min",
    "selector_us",
    "selector_share",
)
"""Columns of a row, all fractions but ``selector_us``; NaN-free: a value that is not defined is None."""

TILE: Final = (64, 64)
"""Tile of the executed density, where a kernel's own is not known."""

DENSE_LIMIT: Final = 2**26
"""Entries of a dense mask beyond which a selection without ``density`` of its own is not measured."""


def densities(
    selection: Any, *, causal: bool, n: int, m: int, tile: tuple[int, int] = TILE
) -> dict[str, float | None]:
    """Kept pairs / allowed pairs, kept blocks / visible blocks, computed pairs / allowed pairs.

    Allowed is every pair, with ``causal`` those with j ≤ i + M − N. A selection without blocks has a
    density only: through its own ``density(causal)``, or its dense mask up to 2²⁶ entries.
    """
    found: dict[str, float | None] = {"density": None, "block_density": None, "executed_density": None}
    if hasattr(selection, "density"):
        found["density"] = float(selection.density(causal))
    elif n * m <= DENSE_LIMIT:
        found["density"] = dense_density(selection.to_dense_mask(), causal=causal)
    if hasattr(selection, "block_density"):
        found["block_density"] = float(selection.block_density(causal))
    if hasattr(selection, "executed_density"):
        found["executed_density"] = float(selection.executed_density(causal, *tile))
    return found


def dense_density(mask: Tensor, *, causal: bool) -> float:
    """Share of the allowed pairs that a mask (B, H, N, M) keeps."""
    n, m = mask.shape[-2:]
    allowed = torch.ones(n, m, dtype=torch.bool, device=mask.device)
    if causal:
        allowed = allowed.tril(m - n)
    kept = (mask & allowed).sum().item()
    return kept / (allowed.sum().item() * (mask.numel() // (n * m)))


def recall(lse_sparse: Tensor, lse_dense: Tensor) -> dict[str, float | None]:
    """Softmax mass that the kept keys have in dense attention, exp(lse_sparse − lse_dense), over all rows.

    Defined for unmodified scores. A row that keeps nothing has recall 0; rows without any key are left out.
    Percentiles are of the rows: ``p5`` is what 95 % of them reach. In fp64.
    """
    dense, sparse = lse_dense.double().flatten(), lse_sparse.double().flatten()
    rows = dense.isfinite()
    mass = (sparse[rows] - dense[rows]).exp().clamp(max=1.0)
    if mass.numel() == 0:
        return dict.fromkeys(("recall_mean", "recall_p5", "recall_p1", "recall_min"))
    ordered = mass.sort().values  # torch.quantile refuses more than 2²⁴ rows
    low = {f"recall_p{p}": ordered[max(0, math.ceil(ordered.numel() * p / 100) - 1)].item() for p in (5, 1)}
    return {"recall_mean": mass.mean().item(), **low, "recall_min": ordered[0].item()}


def selector_share(selector_us: float, total_us: float) -> dict[str, float | None]:
    """Time of ``select`` alone and its share of the whole call, at most 1."""
    share = min(selector_us / total_us, 1.0) if total_us > 0 else None
    return {"selector_us": selector_us, "selector_share": share}


def report(
    module: SparseAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    tile: tuple[int, int] = TILE,
    **keywords: Any,
) -> dict[str, float | None]:
    """Density and recall of ``module`` on q (B, H, N, D), k and v (B, Hkv, M, ·), for the columns of a row.

    Recall is None where ``Spec.selection`` is not ``softmax`` or the consumer returns no log-sum-exp. Costs
    one selection, one sparse and one dense forward; ``keywords`` are the grids and the declared inputs.
    """
    causal = module.pattern is Pattern.CS
    k, v = module.grouped(k, v)
    common = {"key_padding_mask": key_padding_mask, **keywords}
    with torch.no_grad():
        selection = module.select(q, k, **common)
        found = densities(selection, causal=causal, n=q.shape[2], m=k.shape[2], tile=tile)
        found |= dict.fromkeys(("recall_mean", "recall_p5", "recall_p1", "recall_min"))
        if module.spec.selection != "softmax":
            return found
        _, sparse = module.consume(q, k, v, selection, **common)
        if sparse is not None:
            _, dense = flash(q, k, v, causal=causal, key_bias=padding_bias(key_padding_mask))
            assert dense is not None  # need_lse is True by default
            found |= recall(sparse, dense)
    return found
