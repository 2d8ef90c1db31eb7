"""The delta rule and the block it is published in, which DeltaNet and Gated DeltaNet share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern
from attnbench.impls.linear._layers import ShortConv, log_uniform_rates, step_bias
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, held, padded_to_chunks, state_bytes
from attnbench.impls.spec import Hyper, Input
from attnbench.kernels import linrec

NORM_EPS = 1e-6
"""Added to |k|² inside the root: a key of zeros stays one."""

BETA = Input("beta", "strength of the write of each token, in [0, 1]", "(B, H, M)", "uniform", True, "op")

DEVIATIONS = (
    "NC and CC are ours: the context is written to the memory in its order and every query reads the last "
    "state; each sequence has its own short convolution.",
    "A padded token writes nothing and does not decay the state; to the convolutions it is 0.",
)


def layer_hyper(expand_v: float, *, gate: bool) -> tuple[Hyper, ...]:
    """Hyper-parameters of the block."""
    return (
        Hyper("expand_k", 1.0, "width of queries and keys of the layer, in multiples of C"),
        Hyper("expand_v", expand_v, "width of values of the layer, in multiples of C"),
        Hyper("conv_size", 4, "tokens that the short convolutions of q, k and v see; 0: no convolution"),
        Hyper(
            "qk_activation",
            "silu",
            "after the convolutions of q and k; v always gets a silu",
            choices=("silu", "relu", "identity"),
        ),
        Hyper("use_beta", True, "learn β per token and head; False: β = 1", choices=(True, False)),
        Hyper(
            "negative_eigenvalues",
            False,
            "double β, so that a write may flip the sign of what the state holds at its key",
            choices=(False, True),
        ),
        Hyper("use_gate", gate, "multiply the normalised output by silu(x W_g)", choices=(True, False)),
    )


class DeltaRule(Attention):
    """S_t = e^{g_t} (I − β_t k̂_t k̂_tᵀ) S_{t−1} + β_t k̂_t v_tᵀ, o_t = S_tᵀ q̂_t/√D, k̂ and q̂ of length 1."""

    gated = False

    def setup(self) -> None:
        """Create the projections of the published layer; UsageError when a width is not whole."""
        key, value = self.hp.expand_k * self.head_dim, self.hp.expand_v * self.head_dim
        if self.projections and (key < 1 or value < 1 or key % 1 or value % 1):
            raise UsageError(
                f"{self.spec.id}: observed head dims {key:g} of keys and {value:g} of values, expected whole "
                f"numbers: expand_k = {self.hp.expand_k}, expand_v = {self.hp.expand_v} times {self.head_dim}"
            )
        self.key_dim, self.value_dim = int(key), int(value)
        if not self.projections:
            return
        c, h, hkv, size = self.embed_dim, self.num_heads, self.num_kv_heads, self.hp.conv_size
        widths = (h * self.key_dim, hkv * self.key_dim, hkv * self.value_dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c, width, bias=False) for width in widths)
        if size:
            self.q_conv, self.k_conv, self.v_conv = (ShortConv(w, size, bias=False) for w in widths)
        if self.hp.use_beta:
            self.beta_proj = nn.Linear(c, h, bias=False)
        if self.gated:
            self.step_proj = nn.Linear(c, h, bias=False)
            self.log_rate = nn.Parameter(log_uniform_rates(h, 0.0, 16.0))
            self.step_bias = nn.Parameter(step_bias(h))
        if self.hp.use_gate:
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
        """The layer on x (B, N, C), with keys, values, β and gates from the context in a cross pattern."""
        source = self.source(x, context)
        own = None if self.pattern.cross else key_padding_mask
        q = self.split(self._activated("q", x, own), self.num_heads)
        k = self.split(self._activated("k", source, key_padding_mask), self.num_kv_heads)
        v = self.split(self._activated("v", source, key_padding_mask), self.num_kv_heads)
        k, v = self.grouped(k, v)
        beta, g = self._beta(source), self._log_gate(source) if self.gated else None
        o = self.attend(q, k, v, key_padding_mask=key_padding_mask, beta=beta, g=g)
        o = self.join(self.norm(o))
        return self.out_proj(o * F.silu(self.gate(x)) if self.hp.use_gate else o)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        beta: Tensor | None = None,
        g: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The delta rule on q (B, H, N, D), k and v (B, H, M, ·) with β and log-gates g (B, H, M).

        Without ``beta`` it is 1, without ``g`` nothing decays.
        """
        q, k = unit(q), unit(k)
        if key_padding_mask is not None:
            beta = torch.ones_like(k[..., 0]) if beta is None else beta
            beta = held(beta, key_padding_mask)
            g = None if g is None else held(g, key_padding_mask)
        scale = q.shape[-1] ** -0.5
        causal = self.pattern is Pattern.CS
        o, state = linrec(
            q if causal else k,
            k,
            v,
            g=g,
            beta=beta,
            rule="delta",
            scale=scale,
            chunk=CHUNK,
            backend=self.backend,
        )
        return o if causal else (scale * (q.to(state.s.dtype) @ state.s)).to(v.dtype)

    # ---- the layer's parts -----------------------------------------------------------------------------

    def _activated(self, name: str, x: Tensor, padded: Tensor | None) -> Tensor:
        """Projection ``name`` of x (B, N, C), its short convolution and its activation."""
        y = getattr(self, f"{name}_proj")(x)
        if self.hp.conv_size:
            y = getattr(self, f"{name}_conv")(y, padded)
        activation = "silu" if name == "v" else self.hp.qk_activation
        return y if activation == "identity" else getattr(F, activation)(y)

    def _beta(self, source: Tensor) -> Tensor | None:
        """β (B, H, M)."""
        if not self.hp.use_beta:
            return None
        beta = torch.sigmoid(self.beta_proj(source)).mT
        return 2.0 * beta if self.hp.negative_eigenvalues else beta

    def _log_gate(self, source: Tensor) -> Tensor:
        """Log-gates −A softplus(x W + bias), (B, H, M), at least in fp32."""
        wide = torch.promote_types(source.dtype, torch.float32)
        step = F.softplus(self.step_proj(source).to(wide) + self.step_bias.to(wide))
        return (-self.log_rate.to(wide).exp() * step).mT

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """The chunked recurrence; in a cross pattern the writes alone, and one product per query."""
        return self.num_heads * self._flops(n, m, self.head_dim, self.head_dim, solve=True)

    def counted_flops(self, n: int, m: int) -> int:
        """The counter sees no triangular solve, and in a cross pattern the outputs that nobody reads."""
        d = self.head_dim
        counted = self._flops(n, m, d, d, solve=False)
        if self.pattern.cross:
            counted += chunked_flops(m, d, d) - 2 * padded_to_chunks(m)[0] * d * d
        return self.num_heads * counted

    def layer_flops(self, n: int, m: int) -> int:
        """The recurrence with the layer's widths, its projections and its convolutions."""
        c, h, hkv, dk, dv = (
            self.embed_dim,
            self.num_heads,
            self.num_kv_heads,
            self.key_dim,
            self.value_dim,
        )
        queries = h * dk + h * dv * (1 + int(self.hp.use_gate))
        keys = hkv * (dk + dv) + h * (int(self.hp.use_beta) + int(self.gated))
        convolutions = 2 * self.hp.conv_size * (n * h * dk + m * hkv * (dk + dv))
        return 2 * c * (n * queries + m * keys) + convolutions + h * self._flops(n, m, dk, dv, solve=True)

    def _flops(self, n: int, m: int, dk: int, dv: int, *, solve: bool) -> int:
        """Of one head: kᵀk, the solve, W S and the writes; reads by chunk (CS) or by query."""
        steps, length = padded_to_chunks(m)
        writes = steps * (2 * length * dk + 4 * dk * dv + (length * (dk + dv) if solve else 0))
        if self.pattern.cross:
            return writes + 2 * n * dk * dv
        return writes + steps * (2 * length * (dk + dv) + 2 * dk * dv)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Unit queries and keys, U and W in fp32, and the states at the starts of the chunks."""
        d = self.head_dim
        return self.num_heads * ((n + m) * d * itemsize + 8 * m * d + state_bytes(m, d, d))


def unit(u: Tensor) -> Tensor:
    """u/√(|u|² + 1e-6) over the last dimension, computed at least in fp32."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + NORM_EPS)).to(u.dtype)
