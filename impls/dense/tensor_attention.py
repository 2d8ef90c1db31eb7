"""Tensor attention: a softmax over pairs of keys, which sees correlations of three tokens at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.dense._tensor_taylor import monomials, taylor3
from attnbench.impls.spec import Hyper, Input, Paper, Pattern, Spec
from attnbench.kernels import tensor3


class TensorAttention(Attention):
    """o_i = Σ_jl softmax_jl(Σ_d q_id k1_jd k2_ld / D) v1_j ∘ v2_l."""

    spec = Spec(
        id="tensor_attention",
        name="Tensor attention (Kronecker, third order)",
        family="dense",
        kind="core",
        paper=Paper(
            "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
            "Computation",
            2023,
            arxiv="2310.04064",
            venue="ICLR 2024",
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Attends over all pairs of keys of two sets, so that a score correlates three tokens, "
        "exactly or with a polynomial for the exponential.",
        formula="o_i = Σ_jl p_ijl v1_j ∘ v2_l, p_i = softmax over (j, l) of Σ_d q_id k1_jd k2_ld / D; "
        "taylor: Σ_{r ≤ g} s^r/r! for exp(s)",
        cost="4·H·N·M²·D FLOPs, 4·H·N bytes; taylor: 2·H·(N + 2·M)·F·(D + 1) FLOPs, F = (D + g choose g)",
        row_sum="free",
        square_heads="the second values have D columns and multiply the first",
        ops=("tensor3",),
        hyper=(
            Hyper(
                "form",
                "exact",
                "exact: softmax, cubic in the length; taylor: a polynomial for the exponential, linear in it",
                choices=("exact", "taylor"),
            ),
            Hyper("order", 2, "degree g of the polynomial, even"),
            Hyper("scale", None, "multiplier of the scores; 1/D when None"),
        ),
        inputs=(
            Input("k2", "second set of keys", "(B, H, M, D)", "normal", True, "op"),
            Input("v2", "second set of values", "(B, H, M, D)", "normal", True, "op"),
        ),
        deviations=(
            "The paper is theory, without a model or a release. In a layer all four key and value sets are "
            "projections of the context.",
            "CS, ours: query i sees the pairs of keys up to i of both sets.",
            "The polynomial is a Taylor series, an instance of the paper's low-degree approximation. It is "
            "matrix products in PyTorch, and has the backends reference and torch alone.",
            "The sets may differ in length in the exact form, where nothing is padded.",
        ),
    )

    def setup(self) -> None:
        """Create the projections of the second set; refuse an odd degree, and Triton for the polynomial."""
        hp = self.hp
        if hp.order < 2 or hp.order % 2:
            raise UsageError(
                f"tensor_attention: observed order={hp.order}, expected an even degree: of an odd one the "
                "weights may be negative"
            )
        if hp.form == "taylor" and self.backend not in ("auto", "reference", "torch"):
            raise UsageError(
                f"tensor_attention with form='taylor': observed backend {self.backend!r}, expected auto, "
                "reference or torch: it is matrix products"
            )
        if self.projections:
            kv_dim = self.num_kv_heads * self.head_dim
            self.k2_proj, self.v2_proj = (nn.Linear(self.embed_dim, kv_dim, bias=self.bias) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C) to pairs of tokens of itself or of the context (B, M, C)."""
        source = self.source(x, context)
        k2, v2 = (self.split(project(source), self.num_kv_heads) for project in (self.k2_proj, self.v2_proj))
        k2, v2 = self.grouped(k2, v2)
        return super().forward(x, context, grid=grid, key_padding_mask=key_padding_mask, k2=k2, v2=v2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        k2: Tensor | None = None,
        v2: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from q (B, H, N, D) to the pairs of k, v (B, H, M, D) and k2, v2 (B, H, M2, D).

        Padding (B, M) is that of both sets: UsageError where they then differ in length.
        """
        if k2 is None or v2 is None:
            raise UsageError(f"{self.spec.id}: observed no k2 or no v2, expected the second keys and values")
        if k2.shape[2] != k.shape[2] and (key_padding_mask is not None or self.hp.form == "taylor"):
            raise UsageError(
                f"{self.spec.id}: observed {k.shape[2]} and {k2.shape[2]} keys with padding or "
                "form='taylor', expected as many"
            )
        causal = self.pattern is Pattern.CS
        if self.hp.form == "taylor":
            o = taylor3(
                q,
                k,
                k2,
                v,
                v2,
                order=self.hp.order,
                scale=self._scale(q),
                causal=causal,
                padded=key_padding_mask,
            )
            return o.to(q.dtype)
        o, _ = tensor3(
            q,
            k,
            k2,
            v,
            v2,
            causal=causal,
            scale=self._scale(q),
            mask1=key_padding_mask,
            mask2=key_padding_mask,
            backend=self.backend,
        )
        return o

    def _scale(self, q: Tensor) -> float:
        return 1.0 / q.shape[-1] if self.hp.scale is None else self.hp.scale

    def flops(self, n: int, m: int) -> int:
        """4·D for every visible triple; with the polynomial 2·F·(D + 1) for every query and every key."""
        if self.hp.form == "taylor":
            return self._taylor_flops(n, m)
        triples = n * m * m
        if self.pattern is Pattern.CS:
            triples = _squares(m) - _squares(max(m - n, 0))
        return 4 * self.num_heads * triples * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every triple and masks; prefix sums are no products that are counted."""
        if self.hp.form == "taylor":
            causal = self.pattern is Pattern.CS
            return self._taylor_flops(n, max(m - n, 0) if causal else m)
        return 4 * self.num_heads * n * m * m * self.head_dim

    def _taylor_flops(self, n: int, m: int) -> int:
        d = self.head_dim
        return 2 * self.num_heads * (n + 2 * m) * monomials(d, self.hp.order) * (d + 1)

    def layer_flops(self, n: int, m: int) -> int:
        """Also the projections of the second set."""
        return super().layer_flops(n, m) + 4 * m * self.embed_dim * self.num_kv_heads * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32; with the polynomial two sums and their product, fp32."""
        if self.hp.form == "exact":
            return 4 * self.num_heads * n
        d = self.head_dim
        return 12 * self.num_heads * monomials(d, self.hp.order) * (d + 1)


def _squares(count: int) -> int:
    """1² + 2² + … + count²."""
    return count * (count + 1) * (2 * count + 1) // 6
