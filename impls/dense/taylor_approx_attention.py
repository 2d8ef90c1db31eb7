"""The "Approximate" variant of Deconstructing Attention: exp replaced by its Taylor polynomial of order 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import kv_reduce, linrec

FLOOR = 1e-6
"""Least magnitude of a denominator."""


class TaylorApproxAttention(Attention):
    """With t_ij = q_i·k_j / √D, weights 1 + t + t²/2 under one normaliser, or one normaliser for each order.

    ``norm="joint"``: o_i = Σ_j w_ij v_j / Σ_j w_ij with w = 1 + t + t²/2 ≥ ½, the Taylor softmax, by
    w_ij = φ(q_i)·φ(k_j) with the monomials φ of degree ≤ 2. ``norm="per_order"``, as published: the plain
    mean of v, plus the mean weighted by t, plus the mean weighted by the diagonal part Σ_d (q_d k_d)² / 2D of
    the square. The denominators of the last two are held at |den| ≥ 1e-6. A query that sees no key has o = 0.
    """

    spec = Spec(
        id="taylor_approx_attention",
        name="Taylor attention (Approximate)",
        family="dense",
        kind="core",
        paper=Paper(
            "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
            2025,
            arxiv="2510.11602",
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="exp(t) is replaced by 1 + t + t²/2, which makes attention a linear recurrence.",
        formula="o_i = Σ_j (1 + t_ij + t_ij²/2) v_j / Σ_j (1 + t_ij + t_ij²/2), t_ij = q_i·k_j / √D",
        cost="O((N + M)·D³)",
        ops={
            Pattern.NS: ("kv_reduce",),
            Pattern.CS: ("linrec",),
            Pattern.NC: ("kv_reduce",),
            Pattern.CC: ("kv_reduce",),
        },
        hyper=(
            Hyper(
                "norm",
                "joint",
                "joint: one normaliser for all orders; per_order: one for each, as published",
                ("joint", "per_order"),
            ),
        ),
        deviations=(
            "The default is the joint normaliser with the full square; the paper normalises each order by "
            "itself and keeps the diagonal of the square (norm=per_order), where a denominator may vanish.",
            "The paper has the causal self pattern only; the others sum over all keys.",
        ),
        flops_backend="torch",
    )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """One pass over the monomials (joint), or one for each order; features and sums in fp32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        shrink = self.head_dim**-0.25
        a, b, values = q.to(wide) * shrink, k.to(wide) * shrink, v.to(wide)
        values = torch.cat((values, values.new_ones(*values.shape[:-1], 1)), -1)  # sums the weights, too
        if self.hp.norm == "joint":
            return self._mean(_monomials(a), _monomials(b), values, key_padding_mask).to(q.dtype)
        orders = ((torch.ones_like(a[..., :1]), torch.ones_like(b[..., :1])), (a, b))
        squares = (a.square() / math.sqrt(2), b.square() / math.sqrt(2))
        means = [self._mean(x, y, values, key_padding_mask) for x, y in (*orders, squares)]
        return torch.stack(means).sum(0).to(q.dtype)

    def _mean(self, q: Tensor, k: Tensor, values: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Σ_j (q_i·k_j) v_j / Σ_j (q_i·k_j) over the visible keys; the last column of ``values`` is 1."""
        if self.pattern is Pattern.CS:
            if key_padding_mask is not None:
                k = k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
            total, _ = linrec(q, k, values, backend=self.backend)
        else:
            total = kv_reduce(q, k, values, normalize=False, key_mask=key_padding_mask, backend=self.backend)
        weighted, den = total[..., :-1], total[..., -1:]
        floor = torch.where(den < 0, -FLOOR, FLOOR).to(den.dtype)
        return weighted / torch.where(den.abs() < FLOOR, floor, den)

    def flops(self, n: int, m: int) -> int:
        """2·F·(D + 1) for writing a key and as much for reading a query, for the F features of all passes."""
        return 2 * self.num_heads * (n + m) * sum(self._features) * (self.head_dim + 1)

    def counted_flops(self, n: int, m: int) -> int:
        """The causal form also multiplies the pairs inside of chunks of 64."""
        if self.pattern is not Pattern.CS:
            return self.flops(n, m)
        chunk = 64
        inside = sum(2 * chunk * (f + self.head_dim + 1) for f in self._features)
        return self.flops(n, m) + self.num_heads * n * inside

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The features of queries and keys, in fp32 at least."""
        return self.num_heads * (n + m) * sum(self._features) * max(itemsize, 4)

    @property
    def _features(self) -> tuple[int, ...]:
        """Features of each pass."""
        d = self.head_dim
        return (1 + d + d * (d + 1) // 2,) if self.hp.norm == "joint" else (1, d, d)


def _monomials(x: Tensor) -> Tensor:
    """φ with φ(x)·φ(y) = 1 + x·y + (x·y)²/2: 1, x_a, x_a x_b for a < b, x_a²/√2; D → 1 + D + D(D+1)/2."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    mixed = x[..., first] * x[..., second]
    return torch.cat((torch.ones_like(x[..., :1]), x, mixed, x.square() / math.sqrt(2)), -1)
