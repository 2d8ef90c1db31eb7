"""Selective self-attention: every token sets the temperature of its softmax, and the weight of its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, padding_bias


class SelectiveSelfAttention(Attention):
    """o = softmax((τ^q ⊙ q) kᵀ/√D) (τ^v ⊙ v), with τ of the token and of its position."""

    spec = Spec(
        id="selective_self_attention",
        name="Selective self-attention (SSA)",
        family="dense",
        kind="core",
        paper=Paper(
            "Selective Attention: Enhancing Transformer through Principled Context Control",
            2024,
            arxiv="2411.12892",
            venue="NeurIPS 2024",
        ),
        upstream="https://github.com/umich-sota/selective_attention",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Scales queries and values by a learned function of the token and of how much it sees, so "
        "that sparse and dense contexts get a softmax of their own sharpness.",
        formula="o_i = Σ_j softmax_j(τ^q_i q_i·k_j/√D) τ^v_j v_j, τ_i = tanh(w·x_i) + 1 + σ(α)·ln n_i",
        cost="4·H·N·M·D + 2·H·(N + M)·D FLOPs, 4·H·N + (N + M)·C·e bytes",
        row_sum="free",
        permutation_invariant=False,
        linear_in_v=False,
        square_heads="the temperature of values has a learned vector of the width of a head",
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper(
                "form",
                "token",
                "token: τ of token and position; position: τ^q_i = 1 + e^(−e^β)·ln n_i alone, as released",
                choices=("token", "position"),
            ),
            Hyper("value_temp", True, "scale the values too (form token)"),
            Hyper("key_temp", False, "scale the keys too (form token)"),
            Hyper("alpha_init", -4.47, "initial α of form token, one for each of q, k and v of a layer"),
            Hyper("beta_init", 1.5, "initial β of form position; 2 for fine-tuning"),
        ),
        deviations=(
            "The token's part reads the projected q, k or v through one vector per head, the shared-weight "
            "form; the paper's general form has a small network on x.",
            "n_i counts the keys that query i sees, for values and keys their place in the sequence from 1; "
            "padding is not counted. Outside CS n_i is M.",
        ),
        confidence="medium",
    )

    def setup(self) -> None:
        """Create w (zero) and α for what is scaled, or β."""
        hp, d = self.hp, self.head_dim
        if hp.form == "position":
            if hp.key_temp:
                raise UsageError(
                    "selective_self_attention: observed key_temp=True with form='position', "
                    "expected form='token': the other scales queries only"
                )
            self.beta = nn.Parameter(torch.tensor(float(hp.beta_init)))
            return
        heads = {"q": self.num_heads}
        heads |= {name: self.num_kv_heads for name in "kv" if (hp.key_temp if name == "k" else hp.value_temp)}
        self.directions = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(count, d)) for name, count in heads.items()}
        )
        self.alphas = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(float(hp.alpha_init))) for name in heads}
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
        """Attend from q (B, H, N, D) to k, v (B, Hkv, M, D), each scaled by its temperatures."""
        log_seen, log_place = self._log_counts(q.shape[2], k.shape[2], key_padding_mask, q)
        o, _ = flash(
            self._scaled("q", q, log_seen),
            self._scaled("k", k, log_place),
            self._scaled("v", v, log_place),
            causal=self.pattern is Pattern.CS,
            key_bias=padding_bias(key_padding_mask),
            need_lse=False,
            backend=self.backend,
        )
        return o

    def temperature(self, name: str, x: Tensor, log_count: Tensor) -> Tensor:
        """τ (B, H, L) or (1, 1, L) of q, k or v, given as x (B, H, L, D); log_count broadcasts to it."""
        if self.hp.form == "position":
            return 1.0 + torch.exp(-torch.exp(self.beta)) * log_count
        token = torch.tanh(torch.einsum("bhld,hd->bhl", x, self.directions[name]))
        return token + 1.0 + torch.sigmoid(self.alphas[name]) * log_count

    def _scaled(self, name: str, x: Tensor, log_count: Tensor) -> Tensor:
        """Tokens times their temperature, where they have one."""
        known = ("q",) if self.hp.form == "position" else tuple(self.directions)
        if name not in known:
            return x
        return x * self.temperature(name, x, log_count).unsqueeze(-1).to(x.dtype)

    def _log_counts(self, n: int, m: int, padded: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of how many keys queries see, (·, 1, N or 1), and of the places of keys, (·, 1, M)."""
        if padded is None:
            place = torch.arange(1, m + 1, device=like.device).unsqueeze(0)
        else:
            place = (~padded).cumsum(-1)
        seen = place[:, -1:]
        if self.pattern is Pattern.CS:
            last = torch.arange(n, device=like.device) + (m - n)
            seen = place[:, last.clamp(min=0)] * (last >= 0)
        wide = torch.promote_types(like.dtype, torch.float32)
        log_seen, log_place = (x.clamp(min=1).to(wide).log().unsqueeze(1) for x in (seen, place))
        return log_seen, log_place

    def flops(self, n: int, m: int) -> int:
        """4·H·P·D for P visible pairs, 2·D for the temperature of every token of every head."""
        pairs = n * m
        if self.pattern is Pattern.CS:
            pairs = n * m - n * (n - 1) // 2 if m >= n else m * (m + 1) // 2
        return 4 * self.num_heads * pairs * self.head_dim + self._temperature_flops(n, m)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.num_heads * n * m * self.head_dim + self._temperature_flops(n, m)

    def _temperature_flops(self, n: int, m: int) -> int:
        if self.hp.form == "position":
            return 0
        keys = int(self.hp.key_temp) + int(self.hp.value_temp)
        return 2 * self.head_dim * (self.num_heads * n + keys * self.num_kv_heads * m)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The scaled copies, and the log-sum-exp, fp32, kept for the backward."""
        keys = 0 if self.hp.form == "position" else int(self.hp.key_temp) + int(self.hp.value_temp)
        copies = self.head_dim * (self.num_heads * n + keys * self.num_kv_heads * m)
        return copies * itemsize + 4 * self.num_heads * n
