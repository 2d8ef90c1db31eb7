"""DeltaNet: a memory that replaces what it holds at a key in place of adding to it."""

from __future__ import annotations

from attnbench.impls.base import Pattern, Spec
from attnbench.impls.linear._delta import BETA, DEVIATIONS, DeltaRule, layer_hyper
from attnbench.impls.spec import Paper


class DeltaNet(DeltaRule):
    """S_t = S_{t−1} + β_t k̂_t (v_t − S_{t−1}ᵀ k̂_t)ᵀ, o_t = S_tᵀ q̂_t/√D."""

    spec = Spec(
        id="deltanet",
        name="DeltaNet",
        family="linear",
        kind="core",
        paper=Paper(
            "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
            2024,
            arxiv="2406.06484",
            venue="NeurIPS 2024",
        ),
        upstream="https://github.com/fla-org/flash-linear-attention",
        patterns=(Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Linear attention that writes the difference between a value and what its key recalls.",
        formula="S_t = S_{t−1} + β_t k̂_t (v_t − S_{t−1}ᵀ k̂_t)ᵀ, o_t = S_tᵀ q̂_t/√D, û = u/√(|u|² + 1e-6); "
        "NC, CC: every query reads S_M; layer: q, k, v = silu(conv₄(Linear(x))), β = sigmoid(x W_b), "
        "y = Linear(RMSNorm_h(o))",
        cost="H·N·(7·L·D + 6·D²) FLOPs with chunks of L, H·⌈N/L⌉·D²·4 bytes of states",
        row_sum="free",
        permutation_invariant=False,
        ops=("linrec",),
        inputs=(BETA,),
        hyper=layer_hyper(1.0, gate=False),
        deviations=(
            *DEVIATIONS,
            "Keys are normalised by their length; the sum normalisation of the first paper "
            "(arXiv 2102.11174) needs its feature map.",
        ),
        flops_backend="torch",
    )
