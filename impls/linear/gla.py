"""Gated linear attention: every dimension of the key forgets at a rate that the token sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._recurrence import CHUNK, held, state_bytes, vector_gate_flops, write_strength
from attnbench.impls.spec import Hyper, Input, Paper
from attnbench.kernels import linrec


class GLA(Attention):
    """S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t/√D."""

    spec = Spec(
        id="gla",
        name="Gated Linear Attention",
        family="linear",
        kind="core",
        paper=Paper(
            "Gated Linear Attention Transformers with Hardware-Efficient Training",
            2024,
            arxiv="2312.06635",
            venue="ICML 2024",
        ),
        upstream="https://github.com/fla-org/flash-linear-attention",
        patterns=(Pattern.CS,),
        summary="Linear attention with a gate per token and key dimension, computed in chunks.",
        formula="S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t/√D; layer: "
        "g = logsigmoid(W₂ W₁ x + b)/16, y = Linear(RMSNorm_h(o) ∘ silu(x W_r))",
        cost="H·N·((L + 16)·D + 2·L·D + 4·D²) FLOPs with chunks of L, H·⌈N/L⌉·D²·4 bytes of states",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        ops=("linrec",),
        inputs=(
            Input(
                "g", "log-gate ≤ 0 of each token and key dimension", "(B, H, M, D)", "log_decay", True, "op"
            ),
        ),
        hyper=(
            Hyper("expand_k", 0.5, "width of queries and keys of the layer, in multiples of C"),
            Hyper("expand_v", 1.0, "width of values of the layer, in multiples of C"),
            Hyper("gate_low_rank", 16, "rank of the gate's projection"),
            Hyper("gate_logit_normalizer", 16.0, "divisor of the log-gate: a gate near 0.5^(1/16) at first"),
            Hyper("clamp_min", None, "lower bound of the log-gate of the layer, or None"),
            Hyper(
                "feature_map",
                "identity",
                "φ of q and k",
                choices=("identity", "elu1", "relu", "squared_relu", "exp"),
            ),
        ),
        deviations=("A padded token writes nothing and does not decay the state.",),
        flops_backend="torch",
    )

    def setup(self) -> None:
        """Create the projections of the published layer; UsageError when the heads do not divide a width."""
        key, value = (self.hp.expand_k * self.head_dim, self.hp.expand_v * self.head_dim)
        if self.projections and (key < 1 or value < 1 or key % 1 or value % 1):
            raise UsageError(
                f"gla: observed head dims {key:g} of keys and {value:g} of values, expected whole numbers: "
                f"expand_k = {self.hp.expand_k} and expand_v = {self.hp.expand_v} times {self.head_dim}"
            )
        self.key_dim, self.value_dim = int(key), int(value)
        if not self.projections:
            return
        c, h, hkv, rank = self.embed_dim, self.num_heads, self.num_kv_heads, self.hp.gate_low_rank
        self.q_proj = nn.Linear(c, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(c, hkv * self.key_dim, bias=False)
        self.v_proj = nn.Linear(c, hkv * self.value_dim, bias=False)
        self.decay = nn.Sequential(nn.Linear(c, rank, bias=False), nn.Linear(rank, h * self.key_dim))
        self.gate = nn.Linear(c, h * self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.out_proj = nn.Linear(h * self.value_dim, c, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The gated layer on x (B, N, C)."""
        x = self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        k = self.split(self.k_proj(x), self.num_kv_heads)
        v = self.split(self.v_proj(x), self.num_kv_heads)
        logits = self.split(self.decay(x), self.num_heads)
        g = F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32)))
        g = g / self.hp.gate_logit_normalizer
        if self.hp.clamp_min is not None:
            g = g.clamp_min(self.hp.clamp_min)
        o = self.attend(q, *self.grouped(k, v), key_padding_mask=key_padding_mask, g=g)
        return self.out_proj(self.join(self.norm(o)) * F.silu(self.gate(x)))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        g: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Gated linear attention of q, k (B, H, N, D), v (B, H, N, Dv) with log-gates g (B, H, N, D)."""
        o, _ = linrec(
            q,
            k,
            v,
            g=None if g is None else held(g, key_padding_mask),
            beta=write_strength(key_padding_mask, k),
            feature_map=self.hp.feature_map,
            scale=q.shape[-1] ** -0.5,
            chunk=CHUNK,
            backend=self.backend,
        )
        return o

    def flops(self, n: int, m: int) -> int:
        """The chunked recurrence under a vector gate."""
        return self.num_heads * vector_gate_flops(n, self.head_dim, self.head_dim)

    def layer_flops(self, n: int, m: int) -> int:
        """The recurrence with the layer's widths, and its projections."""
        c, h, hkv, rank = self.embed_dim, self.num_heads, self.num_kv_heads, self.hp.gate_low_rank
        dk, dv = self.key_dim, self.value_dim
        widths = h * dk + hkv * (dk + dv) + rank + 2 * h * dv
        return 2 * n * (c * widths + rank * h * dk) + h * vector_gate_flops(n, dk, dv)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The fp32 states at the starts of the chunks."""
        return self.num_heads * state_bytes(n, self.head_dim, self.head_dim)
