"""Attention-based multiple-instance pooling: a gated network scores every instance, a softmax pools them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.cross._unread import with_zero_gradient
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias

WIDEST = 256
"""Widest values of the kernels: wider instances are pooled in equal parts, by the same weights."""


class AbmilPooling(Attention):
    """z_k = Σ_j softmax_j(w_k·u_j) h_j with u = tanh(V h) ⊙ σ(U h): K learned readers of a bag."""

    spec = Spec(
        id="abmil_gated_pooling",
        name="Gated attention pooling (ABMIL)",
        family="cross",
        kind="mixer",
        paper=Paper(
            "Attention-based Deep Multiple Instance Learning", 2018, arxiv="1802.04712", venue="ICML 2018"
        ),
        upstream="https://github.com/AMLab-Amsterdam/AttentionDeepMIL",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Pools a bag of instances into K vectors, by weights that a small gated network gives.",
        formula="u_j = tanh(V h_j) ⊙ σ(U h_j); a_k = softmax_j(w_k·u_j); z_k = Σ_j a_kj h_j",
        cost="4·M·C·L + 2·M·L·K + 2·M·K·C FLOPs, M·L·e bytes",
        row_sum="one",
        query_separable=False,
        linear_in_v=False,
        ops=("few_query",),
        hyper=(
            Hyper("branches", 1, "pooled vectors K: the largest number of rows of x"),
            Hyper("hidden", 128, "width L of the scoring network"),
            Hyper("gated", True, "multiply by σ(U h); False: tanh(V h) alone"),
        ),
        deviations=(
            "Row k of the output is pooled by branch k. x says how many are wanted and is not read: the "
            "queries are the parameters w.",
            "NS: x itself is the bag, and there are as many branches as instances.",
            "Scores have no bias: it cancels in the softmax.",
        ),
        test_hyper={"hidden": 6},
    )

    def setup(self) -> None:
        """Create the scoring network and its readers w."""
        hp, c = self.hp, self.embed_dim
        if min(hp.branches, hp.hidden) < 1:
            raise UsageError(
                f"abmil_gated_pooling: observed branches={hp.branches}, hidden={hp.hidden}, expected at "
                "least 1"
            )
        self.signal = nn.Linear(c, hp.hidden, bias=self.bias)
        self.gate = nn.Linear(c, hp.hidden, bias=self.bias) if hp.gated else None
        bound = 1.0 / math.sqrt(hp.hidden)
        self.readers = nn.Parameter(torch.empty(hp.branches, hp.hidden).uniform_(-bound, bound))

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """A branch for every row of x."""
        return {"branches": n}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Pool the context (B, M, C), under NS x itself, by the first N branches: (B, N, C) for x (B, N, C).

        Raises UsageError where x has more rows than there are branches.
        """
        bag, n = self.source(x, context), x.shape[1]
        if n > self.hp.branches:
            raise UsageError(
                f"abmil_gated_pooling: observed {n} rows of x, expected at most branches={self.hp.branches}"
            )
        o = self.pooled(bag, n, key_padding_mask)
        return with_zero_gradient(o, x) if self.pattern.cross else o

    def pooled(self, bag: Tensor, branches: int, key_padding_mask: Tensor | None = None) -> Tensor:
        """The first ``branches`` pooled vectors of a bag (B, M, C): (B, branches, C)."""
        u = torch.tanh(self.signal(bag))
        if self.gate is not None:
            u = u * torch.sigmoid(self.gate(bag))
        parts, b = self._parts(), bag.shape[0]
        o, _ = few_query(
            self.readers[:branches].expand(b, parts, -1, -1),
            u.unsqueeze(1).expand(-1, parts, -1, -1),
            self.split(bag, parts),
            scale=1.0,
            key_bias=padding_bias(key_padding_mask),
            need_lse=False,
            backend=self.backend,
        )
        return self.join(o)

    def _parts(self) -> int:
        """Equal parts of the width that are at most WIDEST."""
        c = self.embed_dim
        return next(p for p in range(-(-c // WIDEST), c + 1) if c % p == 0)

    def flops(self, n: int, m: int) -> int:
        """The scoring network, the scores (once for every part of the values), the pooling."""
        c, hidden = self.embed_dim, self.hp.hidden
        network = 2 * m * c * hidden * (2 if self.hp.gated else 1)
        return network + 2 * m * hidden * n * self._parts() + 2 * m * n * c

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The scoring network's output and both factors."""
        return m * self.hp.hidden * itemsize * (3 if self.hp.gated else 1)
