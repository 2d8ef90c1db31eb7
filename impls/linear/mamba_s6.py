"""Mamba: a gated block around a state space whose step sizes and projections depend on the token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._selective import SelectiveTerms, scan_bytes, scan_flops
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import selective_scan


class MambaS6(Attention):
    """h_t = e^{Δ_t A} ∘ h_{t−1} + Δ_t u_t B_tᵀ, y_t = h_t C_t + skip ∘ u_t, out = (y ∘ silu(z)) W."""

    spec = Spec(
        id="mamba_s6",
        name="Mamba (selective scan)",
        family="linear",
        kind="mixer",
        paper=Paper(
            "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arxiv="2312.00752"
        ),
        upstream="https://github.com/state-spaces/mamba",
        patterns=(Pattern.CS,),
        summary="A small state per channel, written, read and forgotten as each token says.",
        formula="[u₀, z] = x W_in, u = silu(conv₄(u₀)), [r, B, C] = u W_x, Δ = softplus(r W_Δ + b), "
        "h_t = e^{Δ_t A} ∘ h_{t−1} + Δ_t u_t B_tᵀ, y = ((h C + skip ∘ u) ∘ silu(z)) W_out",
        cost="9·N·E·Ns + 2·N·(3·C·E + E·(2·rank + 2·Ns)) FLOPs with E = 2C; states of chunks E·Ns·4 bytes",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        ops=("selective_scan",),
        hyper=(
            Hyper("state", 16, "state size Ns of a channel"),
            Hyper("expand", 2, "channels E, in multiples of C"),
            Hyper("conv_size", 4, "tokens that the short convolution sees"),
            Hyper("dt_rank", None, "rank of the step sizes; None: ⌈C/16⌉"),
        ),
        deviations=(
            "A padded token makes no step; to the convolution it is 0.",
            "Heads have no meaning here: every channel has its own state.",
        ),
        flops_note="The counter sees the projections and the convolution; the scan is elementwise.",
        test_hyper={"state": 4},
    )

    def setup(self) -> None:
        """Create the projections, the convolution and the state space."""
        c = self.embed_dim
        self.width = self.hp.expand * c
        rank = self.hp.dt_rank or math.ceil(c / 16)
        self.in_proj = nn.Linear(c, 2 * self.width, bias=False)
        self.terms = SelectiveTerms(self.width, self.hp.state, rank, self.hp.conv_size)
        self.out_proj = nn.Linear(self.width, c, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The block on x (B, N, C), without its residual."""
        x = self.source(x, context)
        inner, z = self.in_proj(x).chunk(2, -1)
        u, delta, b, c = self.terms(inner, key_padding_mask)
        rates, skip, bias = self.terms.parameters_of_scan(torch.promote_types(x.dtype, torch.float32))
        y, _ = selective_scan(
            u,
            delta,
            rates,
            b,
            c,
            skip=skip,
            z=z,
            delta_bias=bias,
            delta_softplus=True,
            backend=self.backend,
        )
        return self.out_proj(y)

    def flops(self, n: int, m: int) -> int:
        """Projections, convolution and scan."""
        return self.counted_flops(n, m) + scan_flops(n, self.width, self.hp.state)

    def counted_flops(self, n: int, m: int) -> int:
        """Without the scan, which is elementwise."""
        return 6 * n * self.embed_dim * self.width + self.terms.flops(n)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Inner activations u, z, Δ, y, and the states of the chunks."""
        return 4 * n * self.width * itemsize + scan_bytes(n, self.width, self.hp.state)
