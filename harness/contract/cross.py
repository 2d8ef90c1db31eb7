"""Checks of causal cross attention (CC) in the sense of CAB (arXiv 2210.07661).

Output i is one function of queries 0..i and the whole context, the same for every number of queries. CAB's
own test compares sums, starts at N/2 and lets NaN pass; these check every row, gradients and poison too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Inputs, Instance, Shape, at
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, Size, same
from attnbench.impls.base import SparseAttention
from attnbench.impls.spec import Pattern

SLOW_SIZES: tuple[Size, ...] = ((5, 16), (33, 20))
"""For interpreted Triton; both relations of N and M stay."""

TILED: Size = (130, 20)
TILE_EDGES = (15, 16, 31, 32, 63, 64, 127, 128)
"""Queries of more than one tile, and the rows beside the borders of tiles of 16 to 128."""


def _only_cc(probe: Probe) -> NotApplicable | None:
    if probe.target.pattern is Pattern.CC:
        return None
    return NotApplicable(f"pattern {probe.target.pattern} is not causal cross attention")


def _rows(probe: Probe, n: int) -> Sequence[int]:
    """Every row, of long queries those at tile borders; of an interpreted kernel five of short ones."""
    if n == TILED[0]:
        return probe.fewer(TILE_EDGES, TILE_EDGES[4:], f"for N = {n} rows")
    some = sorted({0, 1, n // 2, n - 2, n - 1} & set(range(n)))
    return probe.fewer(range(n), some, f"for N = {n} rows") if len(some) < n else range(n)


def _every_size(probe: Probe, check: Callable[[Instance, int], None], *more: Size) -> None:
    """Run ``check(instance, n)`` for every size, ``more`` sizes and every precision."""

    def each(size: Size) -> None:
        for dtype in probe.dtypes:
            check(probe.build(Shape(*size), dtype=dtype), size[0])

    sizes: Sequence[Size] = probe.sizes()
    if probe.slow:
        sizes = probe.fewer(sizes, SLOW_SIZES if probe.crossed else sizes[1::2], "N, M")
    tiled = more if probe.crossed else [(n, n) for n, _ in more]
    probe.served((*sizes, *tiled), each, "N, M")


def cc_prefix(probe: Probe) -> NotApplicable | None:
    """T1: the last output on queries 0..i alone equals output i among all queries, for every i."""
    other = _only_cc(probe)
    if other is not None:
        return other
    if not probe.cuttable or not probe.crossed:
        return NotApplicable(probe.uncuttable)

    def check(instance: Instance, n: int) -> None:
        whole = instance()
        for i in _rows(probe, n):
            alone = instance(*instance.prefix(i + 1))
            same(alone[..., -1, :], whole[..., i, :], f"{_size(instance)}: output {i} on queries 0..{i}")

    _every_size(probe, check)
    return None


def cc_poison(probe: Probe) -> NotApplicable | None:
    """T2: NaN in the queries after i leaves outputs 0..i finite and as they were."""
    other = _only_cc(probe)
    if other is not None:
        return other

    def check(instance: Instance, n: int) -> None:
        whole = instance()
        for i in _rows(probe, n):
            poisoned = instance.with_future(i, lambda x: torch.full_like(x, math.nan))
            what = f"{_size(instance)}: outputs 0..{i} with NaN in the queries after {i}"
            same(instance(*poisoned)[..., : i + 1, :], whole[..., : i + 1, :], what)

    _every_size(probe, check, TILED)
    return None


def cc_jacobian(probe: Probe) -> NotApplicable | None:
    """T3: the gradient of output i with respect to every later query is exactly zero."""
    other = _only_cc(probe)
    if other is not None:
        return other

    def check(instance: Instance, n: int) -> None:
        leaves = instance.leaves()
        output = instance.differentiable(*leaves)
        axes = [(x, axis) for x, axis in instance.axes("query") if x in instance.differentiated]
        for i in _rows(probe, n):
            gradients = torch.autograd.grad(
                output[..., i, :].sum(),
                [leaves[x] for x, _ in axes],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for (x, axis), gradient in zip(axes, gradients, strict=True):
                later = gradient[at(axis, slice(i + 1, None))]
                if not (later == 0).all():
                    worst = later.nan_to_num(nan=math.inf).abs().max().item()
                    what = "query" if instance.slots[x].main else instance.slots[x].name
                    raise CheckFailed(
                        f"{_size(instance)}: |d output {i} / d later {what}| = {worst:.3g}", "0"
                    )

    _every_size(probe, check)
    return None


def cc_completeness(probe: Probe) -> NotApplicable | None:
    """T4: output 0 depends on the last key of the context: no causal mask is put on the keys."""
    other = _only_cc(probe)
    if other is not None:
        return other

    compared: list[Size] = []

    def check(instance: Instance, n: int) -> None:
        m = instance.shape.m
        visible = instance.visible()
        if visible is not None and not visible[..., 0, -1].any():
            probe.note(f"N, M = {n}, {m}: the declared mask hides the last key from query 0")
            return
        changed = [instance.changed(instance.key_side, partial(_with_last, how)) for how in _CHANGES]
        if not any(_selects_last(instance, inputs) for inputs in changed):
            probe.note(f"N, M = {n}, {m}: query 0 does not select the last key")
            return
        before = instance()
        compared.append((n, m))
        moved = max((instance(*inputs) - before)[..., 0, :].abs().max().item() for inputs in changed)
        if not moved > 1e-6 * before.abs().max().item():
            raise CheckFailed(
                f"{_size(instance)}: output 0 moved by {moved:.3g} when context token {m - 1} changed",
                "an output that reads the whole context",
            )

    _every_size(probe, check)
    if not compared:
        return NotApplicable("the mask or the selection hides the last key from query 0 at every size")
    return None


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x + 3.0, lambda x: 3.0 - 2.0 * x)
"""Two ways to change a token: a shift, which a LayerNorm removes, and one that it does not."""


def _with_last(how: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x[..., -1, :] = how(x[..., -1, :])
    return x


def _selects_last(instance: Instance, louder: Inputs) -> bool:
    """Whether query 0 selects the last key, before or after it was changed; True without a selection."""
    if not isinstance(instance.module, SparseAttention):
        return True
    return any(
        bool(found.selection().to_dense_mask()[..., 0, -1].any())
        for found in (instance, replace(instance, inputs=louder))
    )


def query_separable(probe: Probe) -> NotApplicable | None:
    """T5: query i alone gets output i; where positions count, it gets it among any other queries."""
    if not probe.target.pattern.cross:
        return NotApplicable(f"pattern {probe.target.pattern} is self attention: no query stands alone")
    if not probe.spec.query_separable:
        return NotApplicable("Spec.query_separable is False: output i may read other queries")
    alone = probe.spec.permutation_invariant and probe.cuttable

    def check(instance: Instance, n: int) -> None:
        whole = instance()
        for i in _rows(probe, n):
            if alone:
                row = instance(*instance.taken("query", slice(i, i + 1)))
            else:
                others = torch.tensor([j for j in range(n) if j != i], dtype=torch.long)
                company = instance.replaced("query", others, lambda x: -3.0 * x.flip(-1))
                row = instance(*company)[..., i : i + 1, :]
            where = "alone" if alone else "among other queries"
            same(row, whole[..., i : i + 1, :], f"{_size(instance)}: output of query {i} {where}")

    _every_size(probe, check)
    return None


def _size(instance: Instance) -> str:
    return f"N, M = {instance.shape.n}, {instance.shape.m}"


CHECKS = (cc_prefix, cc_poison, cc_jacobian, cc_completeness, query_separable)
