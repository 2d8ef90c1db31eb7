"""Linear attention with the feature map elu + 1: the mechanism that made attention a recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, state_bytes, write_strength
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import kv_reduce, linrec


class LinearTransformer(Attention):
    """Kernelised attention whose weights are φ(q_i)·φ(k_j), summed over the keys once."""

    spec = Spec(
        id="linear_transformer",
        name="Linear transformer",
        family="linear",
        kind="core",
        paper=Paper(
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            2020,
            arxiv="2006.16236",
            venue="ICML 2020",
        ),
        upstream="https://github.com/idiap/fast-transformers",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A positive feature map in place of softmax: keys and values sum up to one D×D matrix.",
        formula="o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)·Σ_j φ(k_j) + ε), φ(u) = elu(u) + 1; "
        "CS: sums over j ≤ i",
        cost="2·H·(N + M)·D² FLOPs and H·D·(D + 1)·4 bytes; CS: H·N·(4·L·D + 4·D²) FLOPs with chunks of L",
        ops={
            Pattern.NS: ("kv_reduce",),
            Pattern.CS: ("linrec",),
            Pattern.NC: ("kv_reduce",),
            Pattern.CC: ("kv_reduce",),
        },
        hyper=(
            Hyper("eps", 1e-6, "added to the denominator"),
            Hyper(
                "feature_map",
                "elu1",
                "φ; identity is the unnormalised form",
                choices=("elu1", "relu", "squared_relu", "exp", "identity"),
            ),
        ),
        deviations=(
            "The causal form requires as many keys as queries; upstream pads or truncates the keys to N.",
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
        """Linear attention of q (B, H, N, D) over k, v (B, H, M, ·); prefix sums under CS."""
        options = {
            "feature_map": self.hp.feature_map,
            "normalize": self.hp.feature_map != "identity",
            "eps": self.hp.eps,
            "backend": self.backend,
        }
        if self.pattern is Pattern.CS:
            o, _ = linrec(q, k, v, beta=write_strength(key_padding_mask, k), chunk=CHUNK, **options)
            return o
        return kv_reduce(q, k, v, key_mask=key_padding_mask, **options)

    def flops(self, n: int, m: int) -> int:
        """The sum over the keys and the product per query; under CS the chunked recurrence."""
        d = self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * chunked_flops(n, d, d)
        return 2 * self.num_heads * (n + m) * d * d

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The fp32 sums Σ φ(k) vᵀ and Σ φ(k); under CS one of them per chunk."""
        d = self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * state_bytes(n, d, d + 1)
        return self.num_heads * d * (d + 1) * 4
