"""Attention with bounded-memory control: keys and values are pooled into R slots, then attended to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, state_bytes
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import Unsupported, flash, linrec, padding_bias

HIDDEN = -1e30
"""Control logit of a padded token: finite, for a running log-sum-exp of −∞ has no gradient."""

LARGEST_LOGIT = 32.0
"""Bound of the control logits of a token."""


class Abc(Attention):
    """o_i = softmax_r(q_i·K̃_r / √D) Ṽ with K̃ = softmax_j(k_j W_k) k, Ṽ = softmax_j(v_j W_v) v."""

    spec = Spec(
        id="abc",
        name="Attention with bounded-memory control (ABC)",
        family="linear",
        kind="core",
        paper=Paper("ABC: Attention with Bounded-memory Control", 2022, arxiv="2110.02488", venue="ACL 2022"),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A learned softmax over tokens pools keys and values into R slots, which queries attend to.",
        formula="K̃ = softmax_j(k W_k)ᵀ k, Ṽ = softmax_j(v W_v)ᵀ v, o_i = softmax_r(q_i·K̃_r / √D) Ṽ; "
        "CS: softmax over j ≤ i",
        cost="H·(8·M + 4·N)·R·D FLOPs and 2·H·R·D·e bytes; CS: 4·H·N·R·D and two recurrences of D × R",
        upstream="Shark-NLP/CAB modules/abc.py; fla-org/flash-linear-attention fla/ops/abc (recurrent form)",
        linear_in_v=False,
        ops={
            Pattern.NS: ("flash",),
            Pattern.NC: ("flash",),
            Pattern.CC: ("flash",),
            Pattern.CS: ("linrec",),
        },
        hyper=(
            Hyper("slots", 16, "number R of slots", cab=16),
            Hyper(
                "control",
                "kv",
                "what the control logits come from: kv, the projected keys and the projected values; x, the "
                "token, with one logit per head and slot for both, clamped to ±32",
                choices=("kv", "x"),
                cab="kv",
            ),
            Hyper(
                "variant",
                "paper",
                "cab reproduces CAB's causal code, which never accumulates over time",
                choices=("paper", "cab"),
            ),
        ),
        test_hyper={"slots": 4},
        square_heads="the control weights W_v have as many rows as v has columns, D of them",
        deviations=(
            "By default the control logits come from the projected k and v, with W_k and W_v shared by the "
            "heads, as in CAB; control='x' is the paper's ABC_MLP.",
            "The causal form accumulates, by the recurrence of prefix softmaxes; variant='cab' reads only "
            "the token's own key and value, as CAB's released code does.",
        ),
    )

    def setup(self) -> None:
        """Create the control weights: W_k and W_v, (D, R) each, or W, from C to H·R."""
        if self.hp.control == "kv":
            self.control_k = nn.Parameter(torch.empty(self.head_dim, self.hp.slots))
            self.control_v = nn.Parameter(torch.empty(self.head_dim, self.hp.slots))
            for weight in (self.control_k, self.control_v):
                nn.init.xavier_uniform_(weight, gain=2**-0.5)
        elif self.projections:  # a bias would cancel in the softmax over the tokens
            self.control = nn.Linear(self.embed_dim, self.num_heads * self.hp.slots, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C), with control logits from the tokens when ``control`` is x."""
        if self.hp.control == "x":
            logits = self.control(self.source(x, context)).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            inputs["slot_logits"] = self.split(logits, self.num_heads)
        return super().forward(x, context, grid=grid, key_padding_mask=key_padding_mask, **inputs)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        slot_logits: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from q (B, H, N, D) to the slots of k and v (B, H, M, ·).

        ``slot_logits`` (B, H, M, R) are the control logits of ``control`` x; UsageError when they are missing
        there, or given to ``control`` kv. Under ``control`` kv Dv must equal D, Unsupported otherwise.
        """
        if (slot_logits is None) is (self.hp.control == "x"):
            expected = "the control logits (B, H, M, R)" if slot_logits is None else "none"
            given = "none" if slot_logits is None else tuple(slot_logits.shape)
            raise UsageError(
                f"abc with control={self.hp.control!r}: observed slot_logits {given}, expected {expected}"
            )
        if slot_logits is None and v.shape[-1] != self.head_dim:
            raise Unsupported("abc values", f"Dv = {v.shape[-1]}", f"Dv = D = {self.head_dim}, as W_v has")
        if self.pattern is Pattern.CS:
            return self._causal(q, k, v, slot_logits, key_padding_mask)
        if slot_logits is None:
            bias = padding_bias(key_padding_mask)
            slot_k, slot_v = self._pooled(self.control_k, k, bias), self._pooled(self.control_v, v, bias)
        else:
            weights = self._weights(slot_logits, key_padding_mask).to(k.dtype)
            slot_k, slot_v = weights @ k, weights @ v
        o, _ = flash(q, slot_k, slot_v, need_lse=False, backend=self.backend)
        return o

    def _pooled(self, control: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax over tokens of x·control, applied to x: R learned queries that read x, unscaled."""
        queries = control.t().contiguous().expand(*x.shape[:2], -1, -1).to(x.dtype)
        slots, _ = flash(queries, x, x, scale=1.0, key_bias=bias, need_lse=False, backend=self.backend)
        return slots

    def _weights(self, logits: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Softmax over the tokens of logits (B, H, M, R), as (B, H, R, M), at least in fp32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(-1, -2)
        if key_padding_mask is None:
            return logits.softmax(-1)
        padded = key_padding_mask[:, None, None, :]
        return logits.masked_fill(padded, HIDDEN).softmax(-1).masked_fill(padded, 0.0)

    # ---- causal ----------------------------------------------------------------------------------------

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, slot_logits: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Slots of prefixes, by two recurrences whose gates are the growth of the prefix normalisers."""
        if key_padding_mask is not None:
            hidden = key_padding_mask[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        wide = torch.promote_types(k.dtype, torch.float32)
        if slot_logits is None:
            gate_k, write_k = _prefix_softmax(k.to(wide) @ self.control_k.to(wide), key_padding_mask)
            gate_v, write_v = _prefix_softmax(v.to(wide) @ self.control_v.to(wide), key_padding_mask)
        else:
            gate_k, write_k = gate_v, write_v = _prefix_softmax(slot_logits.to(wide), key_padding_mask)
        scale = 1.0 / math.sqrt(q.shape[-1])
        if self.hp.variant == "cab":
            own = scale * (q * k).sum(-1, keepdim=True) * write_k
            return ((torch.softmax(own, -1) * write_v).sum(-1, keepdim=True) * v).to(q.dtype)
        options: dict[str, Any] = {"chunk": CHUNK, "backend": self.backend}
        logits, _ = linrec(q, k, write_k.to(q.dtype), gv=gate_k, scale=scale, **options)
        p = torch.softmax(logits.to(wide), -1).to(q.dtype)
        o, _ = linrec(p, write_v.to(q.dtype), v, g=gate_v, **options)
        return o

    # ---- backends --------------------------------------------------------------------------------------

    @classmethod
    def backends(cls, pattern: Pattern | str) -> tuple[str, ...]:
        """As for any mechanism, but fla's recurrence has not the gate over values of the causal form."""
        names = super().backends(pattern)
        return tuple(b for b in names if b != "fla") if Pattern(pattern) is Pattern.CS else names

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """Pooling and reading the slots; under CS the logits of control kv and the two recurrences."""
        r, d = self.hp.slots, self.head_dim
        if self.pattern is not Pattern.CS:
            pooling = 8 if self.hp.control == "kv" else 4
            return self.num_heads * (pooling * m + 4 * n) * r * d
        recurrences = 0 if self.hp.variant == "cab" else chunked_flops(n, d, r) + chunked_flops(n, r, d)
        return self._logit_flops(n) + self.num_heads * recurrences

    def _logit_flops(self, n: int) -> int:
        return 4 * n * self.num_heads * self.hp.slots * self.head_dim if self.hp.control == "kv" else 0

    def counted_flops(self, n: int, m: int) -> int:
        """Under CS the reference runs the recurrences elementwise: the counter sees the logits alone."""
        return self._logit_flops(n) if self.pattern is Pattern.CS else self.flops(n, m)

    def layer_flops(self, n: int, m: int) -> int:
        """Also the control logits of the tokens under control x."""
        control = 2 * m * self.embed_dim * self.num_heads * self.hp.slots if self.hp.control == "x" else 0
        return super().layer_flops(n, m) + control

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Slot keys and values; under CS gates, writes and the states of the chunks, fp32."""
        r, d = self.hp.slots, self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * (16 * n * r + 2 * state_bytes(n, d, r))
        return 2 * itemsize * self.num_heads * r * d


def _prefix_softmax(logits: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-gates g_i = z_{i−1} − z_i ≤ 0 and writes w_i = e^(a_i − z_i), z the running log-sum-exp of a.

    The softmax of a over the tokens up to i gives token j the weight w_j·exp(g_(j+1) + … + g_i).
    """
    a = logits
    if key_padding_mask is not None:
        a = a.masked_fill(key_padding_mask[:, None, :, None], HIDDEN)
    z = torch.logcumsumexp(a, 2)
    growth = (z[:, :, :-1] - z[:, :, 1:]).clamp_max(0.0)
    return nn.functional.pad(growth, (0, 0, 1, 0)), torch.exp(a - z)
