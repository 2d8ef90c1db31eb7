"""InLine attention: linear attention whose weights are shifted to add up to one, plus a local term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, state_bytes, write_strength
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import kv_reduce, linrec
from attnbench.kernels.features import feature


class InLineAttention(Attention):
    """o_i = (s/M) q_i Σ_j k_j v_jᵀ + (1 − s q_i·k̄) v̄, k̄ and v̄ the means of keys and values."""

    spec = Spec(
        id="inline_attention",
        name="InLine attention (injective linear attention)",
        family="linear",
        kind="core",
        paper=Paper(
            "Bridging the Divide: Reconsidering Softmax and Linear Attention",
            2024,
            arxiv="2412.06590",
            venue="NeurIPS 2024",
        ),
        upstream="https://github.com/LeapLabTHU/InLine",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Linear attention normalised by subtraction, so that different queries get different "
        "weights.",
        formula="o_i = Σ_j w_ij v_j, w_ij = s q_i·k_j/M + (1 − s q_i·k̄)/M, s = 1/√D; CS: over j ≤ i; "
        "NS layer: o + dwconv(v) with a kernel predicted from the mean of x",
        cost="2·H·(N + M)·D² FLOPs and H·D²·4 bytes; CS: H·N·(4·L·D + 4·D²) FLOPs with chunks of L; "
        "the local term 18·N·C",
        ops={
            Pattern.NS: ("kv_reduce",),
            Pattern.CS: ("linrec",),
            Pattern.NC: ("kv_reduce",),
            Pattern.CC: ("kv_reduce",),
        },
        grid_ranks=(1, 2),
        hyper=(
            Hyper(
                "feature_map",
                "identity",
                "φ of q and k",
                choices=("identity", "relu", "leaky_relu", "exp"),
            ),
            Hyper("local_kernel", 3, "side of the kernel of the local term, odd; 0: none. NS layers only"),
        ),
        deviations=(
            "CS is ours: M, sums and means become those of the prefix.",
            "The keys are centred, Σ_j (k_j − k̄) v_jᵀ, in place of the correction of every query: the same "
            "function, and a constant added to all keys costs no digits.",
            "A plain sequence is a grid of one row to the local term; a class token is a token like others.",
        ),
        flops_backend="torch",
    )

    def setup(self) -> None:
        """Create the predictor of the local kernels; UsageError for an even kernel."""
        side, c = self.hp.local_kernel, self.embed_dim
        if side < 0 or (side and side % 2 == 0):
            raise UsageError(f"inline_attention: observed local_kernel={side}, expected an odd number or 0")
        self.local = self.projections and self.pattern is Pattern.NS and side > 0
        if self.local:
            self.predict = nn.Sequential(
                nn.Conv1d(c, c, 1, groups=self.num_heads),
                nn.GELU(),
                nn.Conv1d(c, side * side * c, 1, groups=self.num_heads),
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C); under NS add the local term of x on its grid."""
        if not self.local:
            return super().forward(x, context, grid=grid, key_padding_mask=key_padding_mask)
        x = self.source(x, context)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = (self.split(k, self.num_kv_heads), self.split(v, self.num_kv_heads))
        k, v = self.grouped(*heads)
        o = self.attend(self.split(q, self.num_heads), k, v, key_padding_mask=key_padding_mask)
        o = self.join(o) + self._local_term(x, self.join(v), grid, key_padding_mask)
        return self.out_proj(o)

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
        """The global term of q (B, H, N, D) over k, v (B, H, M, ·); over prefixes under CS."""
        q, k = self._feature(q), self._feature(k)
        if self.pattern is Pattern.CS:
            return self._causal(q, k, v, key_padding_mask)
        m = k.shape[2]
        wide = torch.promote_types(k.dtype, torch.float32)
        if key_padding_mask is None:
            mean_k, mean_v = (x.mean(2, keepdim=True, dtype=wide) for x in (k, v))
            share: Tensor | float = 1.0
        else:
            count = (~key_padding_mask).sum(-1).clamp_min(1)[:, None, None, None].to(wide)
            hidden = key_padding_mask[:, None, :, None]
            mean_k, mean_v = (
                x.masked_fill(hidden, 0.0).sum(2, keepdim=True, dtype=wide) / count for x in (k, v)
            )
            share = m / count
        centred = (k - mean_k).to(k.dtype)
        o = kv_reduce(
            q,
            centred,
            v,
            normalize=False,
            scale=q.shape[-1] ** -0.5 / m,
            key_mask=key_padding_mask,
            backend=self.backend,
        )
        return (share * o + mean_v).to(v.dtype)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """o_i = (s/i) q_i S_i + (1 − (s/i) q_i·K_i) V_i/i with prefix sums S, K and V."""
        wide = torch.promote_types(k.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        o, _ = linrec(
            q,
            k,
            v,
            beta=write_strength(key_padding_mask, k),
            scale=scale,
            chunk=CHUNK,
            backend=self.backend,
        )
        if key_padding_mask is None:
            count = torch.arange(1, k.shape[2] + 1, device=k.device).to(wide).view(-1, 1)
        else:
            hidden = key_padding_mask[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            count = (~hidden).cumsum(2).clamp_min(1).to(wide)
        means_k, means_v = (x.cumsum(2, dtype=wide) / count for x in (k, v))
        rest = 1.0 - scale * (q * means_k).sum(-1, keepdim=True)
        return (o / count + rest * means_v).to(v.dtype)

    def _feature(self, u: Tensor) -> Tensor:
        if self.hp.feature_map == "leaky_relu":
            return F.leaky_relu(u)
        return u if self.hp.feature_map == "identity" else feature(u, self.hp.feature_map)

    def _local_term(self, x: Tensor, v: Tensor, grid: Grid, key_padding_mask: Tensor | None) -> Tensor:
        """Depthwise convolution of v (B, N, C) on the grid, its kernels predicted from the mean of x."""
        b, n, c = x.shape
        side = self.hp.local_kernel
        if key_padding_mask is None:
            mean = x.mean(1)
        else:
            hidden = key_padding_mask.unsqueeze(-1)
            v = v.masked_fill(hidden, 0.0)
            count = (~hidden).sum(1).clamp_min(1).to(x.dtype)
            mean = x.masked_fill(hidden, 0.0).sum(1) / count
        kernels = self.predict(mean.unsqueeze(-1)).reshape(b * c, 1, side, side)
        rows, columns = (1, n) if grid is None else grid
        planes = v.mT.reshape(1, b * c, rows, columns)
        o = F.conv2d(planes, kernels, padding=side // 2, groups=b * c)
        return o.reshape(b, c, n).mT

    def flops(self, n: int, m: int) -> int:
        """The sum over the keys and the product per query; under CS the chunked recurrence."""
        d = self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * chunked_flops(n, d, d)
        return 2 * self.num_heads * (n + m) * d * d

    def layer_flops(self, n: int, m: int) -> int:
        """Also the projections, the prediction of the local kernels and their convolution."""
        flops = super().layer_flops(n, m)
        if not self.local:
            return flops
        c, taps = self.embed_dim, self.hp.local_kernel**2
        return flops + 2 * n * c * taps + 2 * c * self.head_dim * (1 + taps)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Centred keys and the fp32 sum; under CS means of prefixes and one sum per chunk, fp32."""
        d = self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * (8 * n * d + state_bytes(n, d, d))
        return self.num_heads * (m * d * itemsize + d * (d + 2) * 4)
