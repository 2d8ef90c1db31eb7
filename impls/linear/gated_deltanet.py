"""Gated DeltaNet: the delta rule on a memory that also decays as a whole."""

from __future__ import annotations

from attnbench.impls.base import Pattern, Spec
from attnbench.impls.linear._delta import BETA, DEVIATIONS, DeltaRule, layer_hyper
from attnbench.impls.spec import Input, Paper


class GatedDeltaNet(DeltaRule):
    """S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t−1} + β_t k̂_t v_tᵀ with α_t = e^{g_t}."""

    gated = True

    spec = Spec(
        id="gated_deltanet",
        name="Gated DeltaNet",
        family="linear",
        kind="core",
        paper=Paper(
            "Gated Delta Networks: Improving Mamba2 with Delta Rule",
            2025,
            arxiv="2412.06464",
            venue="ICLR 2025",
        ),
        upstream="https://github.com/NVlabs/GatedDeltaNet",
        patterns=(Pattern.CS, Pattern.NC, Pattern.CC),
        summary="The delta rule with a gate per token and head that lets the whole memory fade.",
        formula="S_t = α_t (I − β_t k̂_t k̂_tᵀ) S_{t−1} + β_t k̂_t v_tᵀ, o_t = S_tᵀ q̂_t/√D; NC, CC: every "
        "query reads S_M; layer: log α = −A softplus(x W_a + b), y = Linear(RMSNorm_h(o) ∘ silu(x W_g))",
        cost="H·N·(7·L·D + 6·D²) FLOPs with chunks of L, H·⌈N/L⌉·D²·4 bytes of states",
        row_sum="free",
        permutation_invariant=False,
        ops=("linrec",),
        inputs=(BETA, Input("g", "log-gate ≤ 0 of each token", "(B, H, M)", "log_decay", True, "op")),
        hyper=layer_hyper(2.0, gate=True),
        deviations=DEVIATIONS,
        flops_backend="torch",
    )
