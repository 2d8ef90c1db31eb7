"""Multi-scale retention: causal linear attention with rotary positions and a fixed decay per head."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, held, state_bytes, write_strength
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import linrec


class Retention(Attention):
    """o_i = Σ_{j≤i} γ_h^{i−j} (rot(q_i)·rot(k_j)/√D) v_j with γ_h = 1 − 2^{−5−h}."""

    spec = Spec(
        id="retention",
        name="RetNet multi-scale retention",
        family="linear",
        kind="core",
        paper=Paper(
            "Retentive Network: A Successor to Transformer for Large Language Models",
            2023,
            arxiv="2307.08621",
        ),
        upstream="https://github.com/microsoft/torchscale",
        patterns=(Pattern.CS,),
        summary="Linear attention with rotated queries and keys whose past decays at a rate set by the head.",
        formula="o_i = Σ_{j≤i} γ_h^{i−j} (q̂_i·k̂_j) v_j, q̂ = rot(q), k̂ = rot(k)/√D, γ_h = 1 − 2^{−5−h}; "
        "layer: y = Linear(silu(x W_g) ∘ RMSNorm_h(o)) with values of width 2D",
        cost="H·N·(2·L·(D + Dv) + 4·D·Dv) FLOPs with chunks of L, H·⌈N/L⌉·D·Dv·4 bytes of states",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        ops=("linrec",),
        hyper=(
            Hyper("value_factor", 2, "width of the values of the layer, in multiples of D"),
            Hyper(
                "row_norm",
                False,
                "divide row i by √Σ_j γ^{i−j} and by max(1, |Σ_j scores|), a constant for autograd, as "
                "upstream; the RMSNorm of the layer removes both",
                choices=(False, True),
            ),
        ),
        deviations=(
            "The positive factors by which upstream scales rows are an option (row_norm): the RMSNorm after "
            "the operation removes them up to its ε.",
            "A padded token writes nothing and does not decay the state, but counts as a position.",
        ),
        flops_backend="torch",
    )

    def setup(self) -> None:
        """Create the projections of the published layer; UsageError for an odd D."""
        if self.head_dim % 2:
            raise UsageError(f"retention: observed head dim {self.head_dim}, expected an even one to rotate")
        if not self.projections:
            return
        c, kv, factor = self.embed_dim, self.num_kv_heads * self.head_dim, self.hp.value_factor
        self.q_proj, self.k_proj = nn.Linear(c, c, bias=False), nn.Linear(c, kv, bias=False)
        self.v_proj, self.gate = nn.Linear(c, factor * kv, bias=False), nn.Linear(c, factor * c, bias=False)
        self.out_proj = nn.Linear(factor * c, c, bias=False)
        self.norm = nn.RMSNorm(factor * self.head_dim, eps=1e-6, elementwise_affine=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.gate):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The retention layer on x (B, N, C)."""
        x = self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        k = self.split(self.k_proj(x), self.num_kv_heads)
        v = self.split(self.v_proj(x), self.num_kv_heads)
        o = self.attend(q, *self.grouped(k, v), key_padding_mask=key_padding_mask)
        return self.out_proj(F.silu(self.gate(x)) * self.join(self.norm(o)))

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
        """Retention of q, k (B, H, N, D) and v (B, H, N, Dv)."""
        n, d = q.shape[2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = rotation(n, d, q.device, wide)
        gate = _log_decay(self.num_heads, q.device, wide)
        values = F.pad(v, (0, 1), value=1.0) if self.hp.row_norm else v  # a column that sums the scores
        o, _ = linrec(
            rotated(q, cos, sin),
            rotated(k, cos, sin),
            values,
            g=held(gate, key_padding_mask),
            beta=write_strength(key_padding_mask, k),
            scale=d**-0.5,
            chunk=CHUNK,
            backend=self.backend,
        )
        return self._normalised(o.to(wide), gate, key_padding_mask).to(v.dtype) if self.hp.row_norm else o

    def _normalised(self, o: Tensor, gate: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Scale the rows of o, whose last column holds the sums of the scores, as upstream: (B, H, N, Dv)."""
        if key_padding_mask is None:
            count = torch.arange(1, o.shape[2] + 1, dtype=o.dtype, device=o.device)
        else:
            count = (~key_padding_mask).cumsum(-1).clamp_min(1).unsqueeze(1).to(o.dtype)
        rate = gate.view(-1, 1)
        decays = torch.expm1(rate * count) / torch.expm1(rate)  # Σ γ^{i−j} over the keys up to i
        o = o / decays.sqrt().unsqueeze(-1)
        return o[..., :-1] / o[..., -1:].detach().abs().clamp_min(1.0)

    def flops(self, n: int, m: int) -> int:
        """The chunked recurrence."""
        d = self.head_dim
        return self.num_heads * chunked_flops(n, d, d + 1 if self.hp.row_norm else d)

    def layer_flops(self, n: int, m: int) -> int:
        """The recurrence with the layer's wider values, and its projections."""
        c, kv, d = self.embed_dim, self.num_kv_heads * self.head_dim, self.head_dim
        factor = self.hp.value_factor
        projections = 2 * n * c * (c + kv + factor * (kv + 2 * c))
        return projections + self.num_heads * chunked_flops(n, d, factor * d + int(self.hp.row_norm))

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The rotated queries and keys, and the fp32 states at the starts of the chunks."""
        d = self.head_dim
        return self.num_heads * (2 * n * d * itemsize + state_bytes(n, d, d))


def rotated(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pair (2p, 2p + 1) of token n of u (…, N, D) by the angle of cos, sin (N, D/2)."""
    even, odd = u.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(u.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotation(n: int, d: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, D/2) of n·10000^(−p/(D/2 − 1)), from angles in fp64: far ones lose digits."""
    pair = torch.arange(d // 2, dtype=torch.float64, device=device)
    angle = torch.arange(n, dtype=torch.float64, device=device).unsqueeze(-1)
    angle = angle * torch.pow(10000.0, -pair / max(d // 2 - 1, 1))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _log_decay(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logarithms of γ_h, (H,), exact for γ near 1."""
    return torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)], dtype=dtype, device=device)
