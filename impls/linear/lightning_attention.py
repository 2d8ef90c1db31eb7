"""Lightning Attention: causal linear attention with a constant decay per head, in chunks."""

from __future__ import annotations

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


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(−8(h+1)/H) of H heads, H a power of two.

    Otherwise those of the power of two below, then every other one of twice that many.
    """
    below = 1 << (heads.bit_length() - 1)
    if below == heads:
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: heads - below]


class LightningAttention(Attention):
    """o_i = scale Σ_{j≤i} e^{−slope (i−j)} (q_i·k_j) v_j: no softmax, no normaliser."""

    spec = Spec(
        id="lightning_attention",
        name="Lightning Attention (TransNormerLLM)",
        family="linear",
        kind="core",
        paper=Paper(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
            2024,
            arxiv="2405.17381",
            venue="ICML 2024",
        ),
        upstream="https://github.com/OpenNLPLab/lightning-attention",
        patterns=(Pattern.CS,),
        summary="Linear attention whose past decays at a fixed rate per head, computed in chunks.",
        formula="o_i = scale Σ_{j≤i} e^{−slope_h (i−j)} (q_i·k_j) v_j; "
        "layer: q, k, v = silu(Linear(x)), y = Linear(norm(o) ∘ sigmoid(U₂ U₁ x))",
        cost="H·N·(4·L·D + 4·D²) FLOPs with chunks of L, H·⌈N/L⌉·D²·4 bytes of states",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        ops=("linrec",),
        hyper=(
            Hyper("scale", 1.0, "multiplier of the output"),
            Hyper(
                "slopes",
                "alibi",
                "decay rates: alibi, 2^(−8(h+1)/H)·(1 − layer/(n_layers − 1) + 1e-5), as in the code; "
                "linear, (8h/H)(1 − layer/n_layers), as in the paper",
                choices=("alibi", "linear"),
            ),
            Hyper("layer", 0, "index of the layer: later layers decay more slowly"),
            Hyper("n_layers", 12, "number of layers"),
            Hyper(
                "norm",
                "layer",
                "of the heads together: layer, LayerNorm, as in the code; srms, x√C/|x| without parameters, "
                "as in the paper",
                choices=("layer", "srms"),
            ),
        ),
        deviations=(
            "Lightning Attention 1 and 2 (arXiv 2401.04658) are two implementations of this function; it is "
            "computed in the chunked form of the second.",
            "No rotation of q and k, which the paper has in the first layer only.",
            "A padded token does not let time pass; upstream takes no padding mask.",
        ),
        flops_backend="torch",
    )

    def setup(self) -> None:
        """Create the projections of the published block; UsageError for a layer that does not exist."""
        hp = self.hp
        if not 0 <= hp.layer < hp.n_layers:
            raise UsageError(
                f"lightning_attention: observed layer={hp.layer}, expected 0 to n_layers − 1 = "
                f"{hp.n_layers - 1}"
            )
        if not self.projections:
            return
        c, d, kv = self.embed_dim, self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj, self.out_proj = nn.Linear(c, c, bias=False), nn.Linear(c, c, bias=False)
        self.k_proj, self.v_proj = nn.Linear(c, kv, bias=False), nn.Linear(c, kv, bias=False)
        self.norm = nn.LayerNorm(c) if hp.norm == "layer" else nn.RMSNorm(c, 1e-6, elementwise_affine=False)
        self.gate = nn.Sequential(nn.Linear(c, d, bias=False), nn.Linear(d, c, bias=False))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The attention block of TransNormerLLM on x (B, N, C), without its residual."""
        x = self.source(x, context)
        q = self.split(F.silu(self.q_proj(x)), self.num_heads)
        k = self.split(F.silu(self.k_proj(x)), self.num_kv_heads)
        v = self.split(F.silu(self.v_proj(x)), self.num_kv_heads)
        o = self.attend(q, *self.grouped(k, v), key_padding_mask=key_padding_mask)
        return self.out_proj(self.norm(self.join(o)) * torch.sigmoid(self.gate(x)))

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
        """Decayed linear attention of q, k (B, H, N, D) and v (B, H, N, Dv)."""
        gate = self.log_decay(q.device, torch.promote_types(q.dtype, torch.float32))
        o, _ = linrec(
            q,
            k,
            v,
            g=held(gate, key_padding_mask),
            beta=write_strength(key_padding_mask, k),
            scale=self.hp.scale,
            chunk=CHUNK,
            backend=self.backend,
        )
        return o

    def log_decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Minus the slopes, (H,): constants."""
        return _log_decay(
            self.num_heads, self.hp.slopes, self.hp.layer, self.hp.n_layers, device=device, dtype=dtype
        )

    def flops(self, n: int, m: int) -> int:
        """The chunked recurrence."""
        return self.num_heads * chunked_flops(n, self.head_dim, self.head_dim)

    def layer_flops(self, n: int, m: int) -> int:
        """Also the projections and the output gate."""
        return super().layer_flops(n, m) + 4 * n * self.embed_dim * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The fp32 states at the starts of the chunks."""
        return self.num_heads * state_bytes(n, self.head_dim, self.head_dim)


@lru_cache(maxsize=64)  # a copy from the host on every call would wait for the device
@torch.inference_mode(False)
def _log_decay(
    heads: int, kind: str, layer: int, layers: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if kind == "alibi":
        share = 1.0 - layer / max(layers - 1, 1) + 1e-5
        slopes = [share * slope for slope in alibi_slopes(heads)]
    else:
        slopes = [8.0 * h / heads * (1.0 - layer / layers) for h in range(heads)]
    return -torch.tensor(slopes, dtype=dtype, device=device)
