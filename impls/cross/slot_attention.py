"""Slot Attention: slots compete for every input by a softmax over slots; a GRU updates them, T times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.cross._blocks import both_padded
from attnbench.impls.cross._unread import with_zero_gradient
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import query_softmax


class SlotAttention(Attention):
    """T times: s ← GRU(weighted mean of values under softmax over slots, s), s ← s + MLP(LN s)."""

    spec = Spec(
        id="slot_attention",
        name="Slot Attention",
        family="cross",
        kind="mixer",
        paper=Paper(
            "Object-Centric Learning with Slot Attention", 2020, arxiv="2006.15055", venue="NeurIPS 2020"
        ),
        upstream="https://github.com/google-research/google-research/tree/master/slot_attention",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Slots take turns at explaining the inputs: weights are normalised over slots, then averaged "
        "over inputs.",
        formula="T times: a = softmax over slots of k q^T/√C + ε, q = W_q LN s; u_s = Σ_j a_js v_j / Σ_j "
        "a_js; s ← GRU(u, s); s ← s + MLP(LN s)",
        cost="4·T·M·S·C + 4·M·C² + T·S·(14 + 4·r)·C² FLOPs; 2·M·C·e bytes",
        row_sum="free",
        query_separable=False,
        linear_in_v=False,
        ops=("query_softmax",),
        hyper=(
            Hyper("iterations", 3, "rounds T"),
            Hyper("mlp_ratio", 2, "hidden width of the slots' MLP, in slot widths"),
            Hyper("eps", 1e-8, "added to every weight before they are averaged"),
            Hyper(
                "init",
                "slots",
                "what x is: the initial slots, or noise ε of which the slots μ + exp(log σ)·ε are made",
                choices=("slots", "noise"),
            ),
            Hyper("truncated", False, "gradients through the last round only"),
        ),
        deviations=(
            "One head of the model width, whatever num_heads is: the definition has no heads.",
            "NS is degenerate: x are slots and inputs. A token that is padding neither is read nor competes.",
            "Sampled slots are a function of given noise, so that the layer draws nothing.",
        ),
    )

    def setup(self) -> None:
        """Create projections without a bias, the GRU, the MLP and their norms."""
        c, hp = self.embed_dim, self.hp
        if hp.iterations < 1 or hp.mlp_ratio < 1 or hp.eps < 0:
            raise UsageError(
                f"slot_attention: observed iterations={hp.iterations}, mlp_ratio={hp.mlp_ratio}, "
                f"eps={hp.eps}, expected at least 1, 1 and 0"
            )
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(c) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c, c, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, hp.mlp_ratio * c), nn.ReLU(), nn.Linear(hp.mlp_ratio * c, c))
        if hp.init == "noise":
            self.mean, self.log_std = (nn.Parameter(torch.empty(1, 1, c)) for _ in range(2))
            for parameter in (self.mean, self.log_std):
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The slots after T rounds on the context (B, M, C), under NS on x; x (B, S, C) starts them."""
        tokens = self.norm_inputs(self.source(x, context))
        k, v = self.k_proj(tokens).unsqueeze(1), self.v_proj(tokens).unsqueeze(1)
        mask = None
        if key_padding_mask is not None:
            mask = both_padded(key_padding_mask, queries_too=not self.pattern.cross)
        first = slots = self.mean + self.log_std.exp() * x if self.hp.init == "noise" else x
        for step in range(self.hp.iterations):
            if self.hp.truncated and step == self.hp.iterations - 1 and step:
                slots = with_zero_gradient(slots.detach(), first)
            slots = self._round(slots, k, v, mask)
        return slots

    def _round(self, slots: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Compete, average, update: (B, S, C) → (B, S, C)."""
        u = query_softmax(
            self.q_proj(self.norm_slots(slots)).unsqueeze(1),
            k,
            v,
            normalize=True,
            eps=self.hp.eps,
            mask=mask,
            backend=self.backend,
        ).o
        assert u is not None  # v is given
        updated = self.gru(u.flatten(0, 2), slots.flatten(0, 1)).view_as(slots)
        result: Tensor = updated + self.mlp(self.norm_mlp(updated))
        return result

    def flops(self, n: int, m: int) -> int:
        """Keys and values once; in every round the queries, both products, the GRU and the MLP."""
        c = self.embed_dim
        per_slot = (2 + 12 + 4 * self.hp.mlp_ratio) * c * c
        return 4 * m * c * c + self.hp.iterations * n * (4 * m * c + per_slot)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Normalised inputs, keys and values; the gates of the slots."""
        return itemsize * self.embed_dim * (3 * m + 6 * n)
