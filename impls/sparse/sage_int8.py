"""SageAttention: dense attention whose scores are products of 8-bit integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec, causal_pairs
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, flash_int8, padding_bias
from attnbench.kernels.flash_int8 import BLOCKS
from attnbench.kernels.flash_int8._quantise import (
    LOG2E,
    expand_scale,
    key_mean,
    prepared_keys,
    quantise,
)


@dataclass(frozen=True, eq=False)
class Ranges:
    """What quantisation reads of all tokens: the mean of the keys and the scale of every block.

    ``mean`` (B, Hkv, 1, D) or None, ``q_scale`` (B, H, ⌈N/block_q⌉), ``k_scale`` (B, Hkv, ⌈M/block_k⌉), fp32.
    """

    mean: Tensor | None
    q_scale: Tensor
    k_scale: Tensor


class SageInt8(Attention):
    """Softmax attention with q kᵀ in INT8 and p v in 16 bits, for inference."""

    spec = Spec(
        id="sage_int8",
        name="SageAttention (INT8)",
        family="sparse",
        kind="core",
        paper=Paper(
            "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration",
            2024,
            arxiv="2410.02367",
            venue="ICLR 2025",
        ),
        upstream="https://github.com/thu-ml/SageAttention",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="Dense attention on INT8 queries and keys, the mean of the keys subtracted before rounding.",
        formula="k̂ = k − mean_j k_j; q, k̂ → INT8 with one scale per block; o = softmax(INT32(q kᵀ)·scales) v",
        cost="4·H·N·M·D operations, half of them in INT8; H·(N + M)·D bytes of integers",
        causality="selection_leaky",
        query_separable=False,
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash_int8",),
        hyper=(
            Hyper("block_q", 128, "queries that share a scale", choices=BLOCKS),
            Hyper("block_k", 64, "keys that share a scale", choices=BLOCKS),
            Hyper("smooth_k", True, "subtract the mean of the keys, which changes no weight"),
        ),
        test_hyper={"block_q": 16, "block_k": 16},
        forward_only="rounding has no derivative",
        padding="scales are those of blocks of tokens, which dropping a token changes",
        deviations=(
            "Forward only, as rounding has no derivative: inputs that require gradients are refused.",
            "CS is causal up to quantisation: scales and the mean of the keys read later tokens. It is "
            "causal with them frozen, as selection=select(q, k) does.",
            "CC is not offered: the scale of a block of queries reads later queries.",
            "The mean and the scales leave out padded keys. Sums are in fp32; the release adds up fp16 "
            "inside a tile.",
            "Version 1. The INT4 and FP8 products of SageAttention2 (arXiv 2411.10958) are left out.",
        ),
    )

    def setup(self) -> None:
        """Refuse flags that are none."""
        if not isinstance(self.hp.smooth_k, bool):
            raise UsageError(f"sage_int8: observed smooth_k={self.hp.smooth_k!r}, expected True or False")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> Ranges:
        """The scales and the mean that :meth:`attend` would take from these inputs, to freeze them."""
        mean = key_mean(k, key_padding_mask) if self.hp.smooth_k else None
        _, q_scale = quantise(q.float() * (LOG2E / math.sqrt(q.shape[-1])), self.hp.block_q)
        _, k_scale = quantise(prepared_keys(k, mean, key_padding_mask), self.hp.block_k)
        return Ranges(mean, q_scale, k_scale)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        selection: Ranges | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Quantised attention; with a given ``selection`` its scales and mean instead of those of q and k.

        Given ones are applied by rounding to the same integers and attending to those as floats, at the
        speed of dense attention. Raises Unsupported where a gradient is required.
        """
        if selection is not None:
            return self._with_ranges(q, k, v, selection, key_padding_mask)
        o, _ = flash_int8(
            q,
            k,
            v,
            causal=self.pattern is Pattern.CS,
            smooth_k=self.hp.smooth_k,
            block_q=self.hp.block_q,
            block_k=self.hp.block_k,
            key_padding_mask=key_padding_mask,
            need_lse=False,
            backend=self.backend,
        )
        return o

    def _with_ranges(self, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, padded: Tensor | None) -> Tensor:
        queries = _rounded(q.float() * (LOG2E / math.sqrt(q.shape[-1])), ranges.q_scale, self.hp.block_q)
        keys = _rounded(prepared_keys(k, ranges.mean, padded), ranges.k_scale, self.hp.block_k)
        o, _ = flash(
            queries.to(q.dtype),
            keys.to(q.dtype),
            v,
            causal=self.pattern is Pattern.CS,
            scale=1.0 / LOG2E,
            key_bias=padding_bias(padded),
            need_lse=False,
            backend="auto" if self.backend == "sage" else self.backend,
        )
        return o

    def flops(self, n: int, m: int) -> int:
        """2·D for the score and 2·D for the value of every visible pair, an INT8 operation as one."""
        pairs = causal_pairs(n, m) if self.pattern is Pattern.CS else n * m
        return 4 * self.num_heads * pairs * self.head_dim

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        return 4 * self.num_heads * n * m * self.head_dim

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Integers and scales of queries and keys, and the log-sum-exp."""
        queries = self.num_heads * (n * (self.head_dim + 4) + 4 * -(-n // self.hp.block_q))
        return queries + self.num_kv_heads * (m * self.head_dim + 4 * -(-m // self.hp.block_k))


def _rounded(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """X (B, H, N, D) on the grid of integers −127..127 times the scale of its block of rows, in fp32."""
    per_row = expand_scale(scale, block, x.shape[-2]).unsqueeze(-1)
    ratio = x / per_row
    return (ratio + torch.copysign(torch.full_like(ratio, 0.5), ratio)).trunc().clamp(-127, 127) * per_row
