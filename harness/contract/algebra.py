"""Checks of what a mechanism declares about its map: row sums, linearity, symmetry, exactness."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, Size, same
from attnbench.impls.spec import Pattern

ROW_SUM_LIMIT = 1e-4
"""Looser than rounding: a guard ε in a denominator is part of many definitions."""


def _sizes(probe: Probe) -> Sequence[Size]:
    return probe.fewer(probe.sizes(), probe.sizes()[1:3], "N, M")


def _mixer(probe: Probe, what: str) -> NotApplicable | None:
    if probe.face == "attend":
        return None
    return NotApplicable(f"Spec.kind is {probe.spec.kind}: {what} are properties of attend(q, k, v)")


def row_sums(probe: Probe) -> NotApplicable | None:
    """Constant values come out multiplied by the row sum that the Spec declares."""
    other = _mixer(probe, "row sums")
    if other is not None:
        return other
    if probe.spec.row_sum == "free":
        return NotApplicable("Spec.row_sum is free")

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size))
        constant = torch.arange(1.0, 9.0, dtype=probe.dtype, device=probe.target.device)
        q, k, v = instance.inputs[:3]
        sums = instance(q, k, constant.expand_as(v).contiguous()) / constant
        visible = instance.visible()
        if visible is not None:  # a row without a key has sum 0
            sums = sums[visible.any(-1).expand(sums.shape[:-1])]
        _judge_row_sums(sums, probe.spec.row_sum, size)

    probe.served(_sizes(probe), check, "N, M")
    return None


def _judge_row_sums(sums: Tensor, declared: str, size: Size) -> None:
    spread = (sums.amax(-1) - sums.amin(-1)).abs().max().item()
    if not spread <= ROW_SUM_LIMIT:
        raise CheckFailed(f"N, M = {size}: row sums differ by {spread:.3g} between value channels", "one sum")
    low, high = sums.min().item(), sums.max().item()
    least = 1.0 if declared == "one" else 0.0
    if not (least - ROW_SUM_LIMIT <= low and high <= 1.0 + ROW_SUM_LIMIT):
        raise CheckFailed(f"N, M = {size}: row sums from {low:.6g} to {high:.6g}", f"row_sum {declared}")


def linear_in_v(probe: Probe) -> NotApplicable | None:
    """attend(q, k, a·v + b·w) = a·attend(q, k, v) + b·attend(q, k, w)."""
    other = _mixer(probe, "linear maps of v")
    if other is not None:
        return other
    if not probe.spec.linear_in_v:
        return NotApplicable("Spec.linear_in_v is False")

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size))
        q, k, v = instance.inputs[:3]
        w = v.flip(-1).contiguous()
        both = instance(q, k, 2.0 * v - 0.5 * w)
        same(both, 2.0 * instance() - 0.5 * instance(q, k, w), f"N, M = {size}: attend(q, k, 2v - w/2)")

    probe.served(_sizes(probe), check, "N, M")
    return None


def permutation_invariant(probe: Probe) -> NotApplicable | None:
    """Permuting keys and values jointly leaves the output as it was."""
    if not probe.spec.permutation_invariant:
        return NotApplicable("Spec.permutation_invariant is False")
    if probe.target.pattern is Pattern.CS:
        return NotApplicable("under CS the order of the keys is what is masked")
    if probe.face == "forward" and not probe.target.pattern.cross:
        return NotApplicable(f"Spec.kind is {probe.spec.kind}: under NS its keys cannot be permuted alone")

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size))
        order = torch.randperm(size[1], generator=torch.Generator().manual_seed(5))
        order = order.to(probe.target.device)
        same(instance(*instance.taken("key", order)), instance(), f"N, M = {size}: output on permuted keys")

    probe.served(_sizes(probe), check, "N, M")
    return None


def batch_independence(probe: Probe) -> None:
    """Each batch entry gets what it gets alone and in another order of the batch (T6 of CC)."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m, batch=3))
    whole = instance()
    turned = instance(*instance.entries(lambda x: x.roll(1, 0)))
    same(turned, whole.roll(1, 0), "outputs of a batch in another order")
    first = instance(*instance.entries(lambda x: x[:1]))
    same(first, whole[:1], "output of a batch entry alone")


def exactness(probe: Probe) -> NotApplicable | None:
    """A mechanism that declares itself exact equals softmax attention computed from its definition."""
    if not probe.spec.exact:
        return NotApplicable("Spec.exact is False")
    other = _mixer(probe, "exact outputs")
    if other is not None:
        return other

    def check(size: Size) -> None:
        instance = probe.build(Shape(*size))
        expected = _softmax_attention(*instance.inputs[:3], causal=probe.target.pattern is Pattern.CS)
        same(instance(), expected, f"N, M = {size}: difference to softmax attention")

    probe.served(_sizes(probe), check, "N, M")
    return None


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q64, k64, v64 = q.double(), k.double(), v.double()
    scores = q64 @ k64.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v64).to(q.dtype)


CHECKS = (row_sums, linear_in_v, permutation_invariant, batch_independence, exactness)
