"""Decays between the steps of a chunk, for the eager form of the recurrence.

Every decay is the exponential of a *sum* of log-gates, never of a difference of two cumulative sums: none
overflows, −inf resets the state exactly, and a strong gate costs its neighbours no digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SUB = 16
"""Steps of a sub-block of a vector gate: what lies between two sub-blocks is a product of matrices."""


class Decay(NamedTuple):
    """Decays of a chunk of L steps: from its start to each step, from each step to its end, and over it.

    ``into`` and ``out`` are (…, L, 1 or D), ``total`` is (…, 1 or D). Start and end are in the order of time.
    """

    into: Tensor
    out: Tensor
    total: Tensor


def between(g: Tensor) -> Tensor:
    """Decays between boundaries, g (…, L) → (…, L + 1, L + 1): exp of a sum of gates, 0 below the diagonal.

    Boundary a lies before gate a and boundary L after the last one; entry (a, b) decays from a to b ≥ a.
    """
    steps = g.shape[-1] + 1
    below = torch.ones(steps, steps, dtype=torch.bool, device=g.device).tril(-1)
    after = F.pad(g, (1, 0)).unsqueeze(-2).expand(*g.shape[:-1], steps, steps).triu(1)
    return after.cumsum(-1).masked_fill(below, -math.inf).exp()


def scalar_decay(g: Tensor, reverse: bool) -> tuple[Tensor, Decay]:
    """Γ (…, L, L), Γ_rs the decay from the write of step s to the read of step r, and Decay, of g (…, L)."""
    e = between(g)
    if reverse:
        return e[..., :-1, :-1], Decay(e[..., :-1, -1:], e[..., 0, :-1].unsqueeze(-1), e[..., 0, -1:])
    return e[..., 1:, 1:].mT, Decay(e[..., 0, 1:].unsqueeze(-1), e[..., 1:, -1:], e[..., 0, -1:])


def vector_decay(g: Tensor, reverse: bool) -> Decay:
    """The Decay of gates g (…, L, D), dimension by dimension."""
    if reverse:
        into, out = _suffix(g), F.pad(g[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    else:
        into, out = g.cumsum(-2), _suffix(F.pad(g[..., 1:, :], (0, 0, 0, 1)))
    return Decay(into.exp(), out.exp(), g.sum(-2).exp())


def _suffix(x: Tensor) -> Tensor:
    return x.flip(-2).cumsum(-2).flip(-2)


class VectorGate:
    """Products of a chunk under a gate (…, L, D), SUB ≥ L or dividing L, in two levels (arXiv 2312.06635).

    Inside a sub-block the decays are explicit, (…, SUB, SUB, D). Between sub-blocks J and I they factor into
    write → end of J, the sub-blocks in between, and start of I → read, all ≤ 1, around a matrix product.
    """

    def __init__(self, g: Tensor, reverse: bool) -> None:
        self.reverse = reverse
        self.sub = min(SUB, g.shape[-2])
        blocks = g.unflatten(-2, (-1, self.sub))
        self.inside = vector_decay(blocks, reverse)
        self.across = between(blocks.sum(-2).mT).movedim(-3, -1)  # (…, L/SUB + 1, L/SUB + 1, D)
        self.diagonal = scalar_decay(blocks.mT, reverse)[0].movedim(-3, -1)  # (…, L/SUB, SUB, SUB, D)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """P_rs = Σ_d q_rd k_sd decay_rsd for s not after r, else 0: (…, L, L) from q, k (…, L, D)."""
        q, k = q.unflatten(-2, (-1, self.sub)), k.unflatten(-2, (-1, self.sub))
        own = (self.diagonal * k.unsqueeze(-3)) @ q.unsqueeze(-1)
        own = own.squeeze(-1)
        reads, writes = q * self.inside.into, k * self.inside.out
        rows = []
        for i in range(q.shape[-3]):
            past, hops = self._past(i, q.shape[-3])
            far = reads[..., i, :, :] @ (writes[..., past, :, :] * hops).flatten(-3, -2).mT
            near, later = own[..., i, :, :], k.shape[-3] * self.sub - far.shape[-1] - self.sub
            row = torch.cat((near, far) if self.reverse else (far, near), -1)
            rows.append(F.pad(row, (later, 0) if self.reverse else (0, later)))
        return torch.cat(rows, -2)

    def apply(self, p: Tensor, v: Tensor) -> Tensor:
        """Outputs Σ_s p_rs v_sm decay_rsm (…, L, D) of p (…, L, L), 0 where s is after r, and v (…, L, D)."""
        v = v.unflatten(-2, (-1, self.sub))
        writes = v * self.inside.out
        outputs = []
        for i in range(v.shape[-3]):
            past, hops = self._past(i, v.shape[-3])
            rows = p[..., i * self.sub : (i + 1) * self.sub, :].unflatten(-1, (-1, self.sub))
            far = rows[..., past, :].flatten(-2) @ (writes[..., past, :, :] * hops).flatten(-3, -2)
            near = rows[..., i, :].unsqueeze(-2) @ (self.diagonal[..., i, :, :, :] * v[..., i, None, :, :])
            outputs.append(far * self.inside.into[..., i, :, :] + near.squeeze(-2))
        return torch.cat(outputs, -2)

    def _past(self, i: int, blocks: int) -> tuple[slice, Tensor]:
        """The sub-blocks that sub-block ``i`` sees whole, and the decay from the end of each to its start."""
        if self.reverse:
            return slice(i + 1, blocks), self.across[..., i + 1, i + 1 : blocks, :].unsqueeze(-2)
        return slice(0, i), self.across[..., 1 : i + 1, i, :].unsqueeze(-2)
