"""Linformer: keys and values projected along the sequence to R rows, then softmax attention over those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import flash

INIT_STD = 0.02


class Linformer(Attention):
    """Softmax attention over E k and F v with learned E, F of R rows."""

    spec = Spec(
        id="linformer",
        name="Linformer",
        family="linear",
        kind="core",
        paper=Paper("Linformer: Self-Attention with Linear Complexity", 2020, arxiv="2006.04768"),
        upstream="https://github.com/facebookresearch/fairseq/tree/main/examples/linformer",
        patterns=(Pattern.NS, Pattern.NC, Pattern.CC),
        summary="Learned projections along the sequence shorten keys and values to R rows.",
        formula="o = softmax(q (E k)ᵀ/√D) F v, with E and F (R, M) the first M columns of learned tables",
        cost="4·Hkv·M·R·D + 4·H·N·R·D FLOPs, 2·R·max_len parameters, 2·Hkv·R·D·e bytes",
        row_sum="free",
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash",),
        hot_loop="one batched GEMM over the keys, then flash over R keys",
        hyper=(
            Hyper("max_len", None, "largest number of keys; the width of the tables E and F, required"),
            Hyper("rank", 256, "projected rows R", cab=16),
            Hyper(
                "sharing",
                "headwise",
                "none: E and F per key head; headwise: one E and one F; key_value: one table for both",
                choices=("none", "headwise", "key_value"),
            ),
        ),
        deviations=(
            "E and F start from N(0, 0.02²) as in a widely used port; fairseq draws them Xavier uniform.",
            "Sharing one table over the layers is left to the model that owns the layers.",
        ),
        test_hyper={"max_len": 64, "rank": 6},
    )

    def setup(self) -> None:
        """Create the tables; UsageError without max_len."""
        if self.hp.max_len is None:
            raise UsageError(
                "linformer: observed no max_len, expected the largest number of keys: "
                "the projections have one column per key"
            )
        heads = (self.num_kv_heads,) if self.hp.sharing == "none" else ()
        shape = (*heads, self.hp.rank, self.hp.max_len)
        self.key_table = nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))
        if self.hp.sharing != "key_value":
            self.value_table = nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """The width of the tables, M."""
        return {"max_len": m}

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
        """Attention of q (B, H, N, D) over the projections of k, v (B, Hkv, M, ·).

        Padded keys and values enter the projections as 0. Raises UsageError when M exceeds ``max_len``:
        the tables do not extrapolate.
        """
        m = k.shape[2]
        if m > self.hp.max_len:
            raise UsageError(f"linformer: observed {m} keys, expected at most max_len={self.hp.max_len}")
        if key_padding_mask is not None:
            padded = key_padding_mask[:, None, :, None]
            k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
        values = self.key_table if self.hp.sharing == "key_value" else self.value_table
        o, _ = flash(
            q, self.key_table[..., :m] @ k, values[..., :m] @ v, need_lse=False, backend=self.backend
        )
        return o

    def flops(self, n: int, m: int) -> int:
        """Two projections of M rows to R, and attention over R keys."""
        r, d = self.hp.rank, self.head_dim
        return 4 * r * d * (self.num_kv_heads * m + self.num_heads * n)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The projected keys and values."""
        return 2 * self.num_kv_heads * self.hp.rank * self.head_dim * itemsize
