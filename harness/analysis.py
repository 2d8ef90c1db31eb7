"""What an attention map looks like: the map of any mechanism, and pure functions of maps (B, H, N, M).

All functions compute in fp64 and return one value per batch entry, head and, where it says so, row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls import registry
from attnbench.impls.base import Attention

LARGEST_MAP = 2**26
"""Entries B·H·N·M beyond which a map is refused: this is for looking, not for long sequences."""


def attention_map(
    mechanism: str | Attention,
    q: Tensor,
    k: Tensor,
    *,
    pattern: str = "NS",
    backend: str = "reference",
    grid: tuple[int, ...] | None = None,
    **options: Any,
) -> Tensor:
    """The matrix A with o = A v that a mechanism applies on q (B, H, N, D) and k (B, Hkv, M, D).

    By linearity in v: ``attend`` is called on identity values, D columns at a time for mechanisms whose
    values must be as wide as their keys. Exact in the dtype of q; (B, H, N, M). ``options`` are
    hyper-parameters and declared inputs (inputs only, for a module).

    Raises UsageError for a mixer, for a mechanism that is not linear in v, and for a map beyond 2²⁶ entries.
    """
    module, inputs = _module(mechanism, q, k, pattern, backend, options)
    spec = module.spec
    if not spec.on_tensors or not spec.linear_in_v:
        why = "is a mixer" if not spec.on_tensors else "is not linear in v"
        raise UsageError(f"{spec.id} {why}: it has no attention map")
    (b, h, n, d), m = q.shape, k.shape[2]
    if b * h * n * m > LARGEST_MAP:
        raise UsageError(f"a map of {b}×{h}×{n}×{m}: observed {b * h * n * m} entries, expected at most 2²⁶")
    identity = torch.eye(m, dtype=q.dtype, device=q.device)
    columns = []
    with torch.no_grad():
        for values in identity.split(d, dim=1):
            width = values.shape[1]
            padded = torch.nn.functional.pad(values, (0, d - width))
            v = padded.expand(b, k.shape[1], m, d).contiguous()
            o = module.attend(q, *module.grouped(k, v), grid=grid, **inputs)
            columns.append(o[..., :width])
    return torch.cat(columns, -1)


def _module(
    mechanism: str | Attention, q: Tensor, k: Tensor, pattern: str, backend: str, options: dict[str, Any]
) -> tuple[Attention, dict[str, Any]]:
    if isinstance(mechanism, Attention):
        return mechanism, options
    module, inputs = registry.operation(q, k, k, mechanism, pattern, backend, **options)
    return module.eval(), inputs


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy of each row in nats, (B, H, N); 0 for a one-hot row, ln M for a uniform one.

    Rows are taken as they are, with 0·ln 0 = 0; negative weights give NaN.
    """
    w = weights.double()
    return -torch.xlogy(w, w).sum(-1)


def sink_mass(weights: Tensor, sinks: int = 1) -> Tensor:
    """Mean weight of the first ``sinks`` keys over the rows, (B, H) (arXiv 2309.17453)."""
    return weights.double()[..., :sinks].sum(-1).mean(-1)


def distance_profile(weights: Tensor, edges: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> Tensor:
    """Share of the mass by |i + M − N − j|, (B, H, len(edges) + 1): [0, e₀), [e₀, e₁), …, [e_last, ∞).

    Rows are normalised by the total mass of the head; a head without mass gets NaN.
    """
    w = weights.double()
    n, m = w.shape[-2:]
    i = torch.arange(n, device=w.device)[:, None] + (m - n)
    distance = (i - torch.arange(m, device=w.device)).abs()
    bins = torch.bucketize(distance, torch.tensor(edges, device=w.device), right=True)
    share = [w.masked_fill(bins != b, 0.0).sum((-1, -2)) for b in range(len(edges) + 1)]
    return torch.stack(share, -1) / w.sum((-1, -2)).unsqueeze(-1)


def mean_distance(weights: Tensor) -> Tensor:
    """Mean |i + M − N − j| under the weights, per head, (B, H): how far a head looks (arXiv 2010.11929)."""
    w = weights.double()
    n, m = w.shape[-2:]
    i = torch.arange(n, device=w.device)[:, None] + (m - n)
    distance = (i - torch.arange(m, device=w.device)).abs().double()
    return (w * distance).sum((-1, -2)) / w.sum((-1, -2))


def numerical_rank(weights: Tensor, tolerance: float | None = None) -> Tensor:
    """Number of singular values above ``tolerance`` times the largest, (B, H) int64; 0 for a zero map.

    The default tolerance is max(N, M)·ε of the dtype of ``weights``.
    """
    if tolerance is None:
        tolerance = max(weights.shape[-2:]) * torch.finfo(weights.dtype).eps
    values = torch.linalg.svdvals(weights.double())
    return (values > tolerance * values[..., :1]).sum(-1)


def effective_rank(weights: Tensor) -> Tensor:
    """Exp of the entropy of the normalised singular values, (B, H), from 1 to min(N, M)."""
    values = torch.linalg.svdvals(weights.double())
    return entropy(values / values.sum(-1, keepdim=True)).exp()


def retrieval_score(weights: Tensor, queries: Tensor, needles: Tensor) -> Tensor:
    """Share of retrievals in which the largest weight of a query is on its needle, (B, H) (arXiv 2404.15574).

    ``queries`` and ``needles`` (T,) int64: token ``queries[t]`` should copy from key ``needles[t]``. Of equal
    largest weights the first counts. ValueError when the two differ in length or are empty.
    """
    if queries.shape != needles.shape or queries.numel() == 0:
        raise ValueError(
            f"queries and needles: observed {tuple(queries.shape)} and {tuple(needles.shape)}, "
            "expected the same length, at least 1"
        )
    found = weights[..., queries, :].argmax(-1) == needles
    return found.double().mean(-1)
