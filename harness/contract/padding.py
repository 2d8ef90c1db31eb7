"""Checks of key padding: a padded key is a key that is not there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Inputs, Instance, Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe, same

PADDED = 4
"""Keys that are padding in the first batch entry; the second has none."""

NOISE = 10.0
"""Multiplier of what stands in padded places: it must not matter."""


def padding_is_unseen(probe: Probe) -> None:
    """What stands in padded keys, anywhere in the sequence, changes no output of a query that counts."""
    sizes = probe.sizes()[1:]
    for n, m in probe.fewer(sizes, sizes[:1], "N, M"):
        instance = probe.build(Shape(n, m, batch=2))
        mask = torch.zeros(2, m, dtype=torch.bool, device=probe.target.device)
        mask[0, _scattered(m)] = True
        noisy = _noise_at(instance, mask[0])
        before, after = (instance(*x, key_padding_mask=mask) for x in (instance.inputs, noisy))
        if probe.face == "forward" and not probe.target.pattern.cross:  # a padded token is a query as well
            before, after = (x.masked_fill(mask.unsqueeze(-1), 0.0) for x in (before, after))
        same(after, before, f"N, M = {n, m}: outputs after changing {PADDED} padded keys")


def padding_equals_dropping(probe: Probe) -> NotApplicable | None:
    """A batch entry with padded keys gets the output that it gets without them.

    Padding lies at the end; in cross attention without positions it lies anywhere.
    """
    if probe.spec.padding:
        return NotApplicable(f"Spec.padding: {probe.spec.padding}")
    if not probe.cuttable:
        return NotApplicable(probe.uncuttable)
    sizes = probe.sizes()[1:] if probe.target.pattern.cross else probe.sizes()[2:]
    for n, m in sizes:
        instance = probe.build(Shape(n, m, batch=2))
        mask = torch.zeros(2, m, dtype=torch.bool, device=probe.target.device)
        scattered = probe.target.pattern.cross and probe.spec.permutation_invariant
        mask[0, _scattered(m) if scattered else slice(m - PADDED, m)] = True
        noisy = _noise_at(instance, mask[0])
        output = instance(*noisy, key_padding_mask=mask)
        _compare(probe, instance, output, ~mask[0])
    return None


def _scattered(m: int) -> slice:
    """PADDED evenly spaced positions out of m."""
    step = m // PADDED
    return slice(0, PADDED * step, step)


def _noise_at(instance: Instance, padded: Tensor) -> Inputs:
    """The inputs with loud tokens in the padded places of the first batch entry."""
    noisy = instance.replaced("key", padded, lambda x: x * NOISE)
    return tuple(
        torch.cat((loud[:1], x[1:])) if slot.batch == 0 else x
        for slot, loud, x in zip(instance.slots, noisy, instance.inputs, strict=True)
    )


def _compare(probe: Probe, instance: Instance, output: Tensor, keep: Tensor) -> None:
    n, m = instance.shape.n, instance.shape.m
    cross = probe.target.pattern.cross
    short = replace(instance, inputs=instance.taken("key" if cross else "query", keep))
    rows = n if cross else int(keep.sum())
    dropped = short(*short.entries(lambda x: x[:1]))
    same(output[:1, ..., :rows, :], dropped, f"N, M = {n, m}: entry with {PADDED} padded keys")
    same(output[1:], instance()[1:], f"N, M = {n, m}: entry without padding beside one with it")


def all_keys_padded(probe: Probe) -> None:
    """An entry whose keys are all padding gets finite outputs, and its neighbours theirs."""
    n, m = probe.sizes()[1]
    instance = probe.build(Shape(n, m, batch=2))
    mask = torch.zeros(2, m, dtype=torch.bool, device=probe.target.device)
    mask[0] = True
    output = instance(key_padding_mask=mask)
    if not output[0].isfinite().all():
        raise CheckFailed(f"{int((~output[0].isfinite()).sum())} outputs not finite", "finite outputs")
    same(output[1:], instance()[1:], "entry beside one whose keys are all padding")


CHECKS = (padding_is_unseen, padding_equals_dropping, all_keys_padded)
