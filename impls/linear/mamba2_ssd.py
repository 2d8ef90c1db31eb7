"""Mamba-2: a state space with one scalar decay per head, which makes it gated linear attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._layers import ShortConv, log_uniform_rates, step_bias, step_sizes
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, held, padded_to_chunks, state_bytes
from attnbench.impls.spec import Hyper, Input, Paper
from attnbench.kernels import linrec


class Mamba2SSD(Attention):
    """S_t = e^{Δ_t A} S_{t−1} + Δ_t B_t x_tᵀ, y_t = S_tᵀ C_t + skip·x_t: q is C, k is B, v is x."""

    spec = Spec(
        id="mamba2_ssd",
        name="Mamba-2 (SSD)",
        family="linear",
        kind="core",
        paper=Paper(
            "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
            "Space Duality",
            2024,
            arxiv="2405.21060",
            venue="ICML 2024",
        ),
        upstream="https://github.com/state-spaces/mamba",
        patterns=(Pattern.CS,),
        summary="A state space whose decay is one number per token and head, computed as chunked attention.",
        formula="S_t = e^{Δ_t A_h} S_{t−1} + Δ_t k_t v_tᵀ, o_t = S_tᵀ q_t + skip_h v_t; layer: "
        "[z, v, k, q, Δ] = x W, conv₄ and silu on v, k, q, y = Linear(RMSNorm(o ∘ silu(z)))",
        cost="H·N·(4·L·D + 4·D²) FLOPs with chunks of L, H·⌈N/L⌉·D²·4 bytes of states",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        ops=("linrec",),
        inputs=(Input("dt", "step size Δ > 0 of each token", "(B, H, M)", step_sizes, True, "op"),),
        hyper=(
            Hyper("state", 128, "state size of the layer: width of its queries and keys"),
            Hyper("groups", 1, "groups of heads of the layer that share queries and keys"),
            Hyper("expand", 2, "inner width of the layer, in multiples of C"),
            Hyper("conv_size", 4, "tokens that the short convolution sees"),
            Hyper("dt_limit", (0.0, math.inf), "bounds of the layer's step size"),
        ),
        deviations=(
            "Heads are those given, of width 2D in the layer; upstream fixes their width at 64.",
            "A padded token makes no step; to the convolution it is 0.",
        ),
        flops_backend="torch",
        test_hyper={"state": 8},
    )

    def setup(self) -> None:
        """Create A and the skip connection of the operation, and the projections of the layer."""
        c, h, hp = self.embed_dim, self.num_heads, self.hp
        if hp.groups < 1 or h % hp.groups:
            raise UsageError(f"mamba2_ssd: observed groups={hp.groups}, expected a divisor of {h} heads")
        self.log_rate = nn.Parameter(log_uniform_rates(h, 1.0, 16.0))
        self.skip = nn.Parameter(torch.ones(h))
        if not self.projections:
            return
        del self.q_proj, self.k_proj, self.v_proj
        width = hp.expand * c
        self.widths = (width, width + 2 * hp.groups * hp.state, h)
        self.in_proj = nn.Linear(c, sum(self.widths), bias=False)
        self.conv = ShortConv(self.widths[1], hp.conv_size, bias=True)
        self.step_bias = nn.Parameter(step_bias(h))
        self.norm = nn.RMSNorm(width // hp.groups, eps=1e-5, elementwise_affine=False)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, c, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The Mamba-2 block on x (B, N, C), without its residual."""
        x = self.source(x, context)
        hp = self.hp
        z, mixed, raw = self.in_proj(x).split(self.widths, -1)
        mixed = F.silu(self.conv(mixed, key_padding_mask))
        states = hp.groups * hp.state
        v, k, q = mixed.split((self.widths[0], states, states), -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(raw.to(wide) + self.step_bias.to(wide)).clamp(*hp.dt_limit).mT
        o = self.attend(
            self.split(q, hp.groups),
            self.split(k, hp.groups),
            self.split(v, self.num_heads),
            key_padding_mask=key_padding_mask,
            dt=dt,
        )
        y = (self.join(o) * F.silu(z)).unflatten(-1, (hp.groups, -1))
        return self.out_proj(self.norm(y).flatten(-2) * self.norm_weight)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        dt: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """SSD of q, k (B, G, N, D), G dividing H, and v (B, H, N, P) with step sizes dt (B, H, N), or 1."""
        wide = torch.promote_types(v.dtype, torch.float32)
        # a negative step is none: the state would grow without bound
        steps = (
            torch.ones(v.shape[:3], dtype=wide, device=v.device) if dt is None else dt.to(wide).clamp_min(0)
        )
        steps = held(steps, key_padding_mask)
        if key_padding_mask is not None:
            v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        gate = -self.log_rate.to(wide).exp().view(-1, 1) * steps
        o, _ = linrec(q, k, v, g=gate, beta=steps, chunk=CHUNK, backend=self.backend)
        return o + self.skip.to(o.dtype).view(-1, 1, 1) * v

    def flops(self, n: int, m: int) -> int:
        """The chunked recurrence."""
        return self.num_heads * chunked_flops(n, self.head_dim, self.head_dim)

    def layer_flops(self, n: int, m: int) -> int:
        """The recurrence with the layer's widths and shared scores, projections and convolution."""
        c, h, hp = self.embed_dim, self.num_heads, self.hp
        width = hp.expand * c
        mixed = width + 2 * hp.groups * hp.state
        steps, length = padded_to_chunks(n)
        scores = hp.groups * 2 * length * hp.state
        recurrence = steps * (scores + h * (width // h) * (2 * length + 4 * hp.state))
        return 2 * n * (c * (2 * width + mixed + h) + mixed * hp.conv_size) + recurrence

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The fp32 states at the starts of the chunks, and gates and steps."""
        return self.num_heads * (8 * n + state_bytes(n, self.head_dim, self.head_dim))
