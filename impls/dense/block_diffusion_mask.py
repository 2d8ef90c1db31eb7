"""The mask of block diffusion: noisy blocks read themselves and the clean text before them, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import MaskAttention, Pattern, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels.flash import Mask


class BlockDiffusionMask(MaskAttention):
    """Softmax attention in [noisy; clean], two copies of one text that is cut into blocks."""

    spec = Spec(
        id="block_diffusion_mask",
        name="Block-diffusion mask (Fast-dLLM v2)",
        family="dense",
        kind="mask",
        paper=Paper("Fast-dLLM v2: Efficient Block-Diffusion LLM", 2025, arxiv="2509.26328"),
        upstream="https://github.com/NVlabs/Fast-dLLM",
        patterns=(Pattern.NS,),
        summary="Trains a block-diffusion language model on all blocks at once: a noisy block sees itself "
        "and the clean blocks before it.",
        formula="train: noisy i sees noisy j iff b_i = b_j and clean j iff b_j < b_i; clean i sees clean j "
        "iff b_j ≤ b_i. infer: b_j ≤ b_i. b = ⌊position / block⌋",
        cost="4·H·L·(L + block)·D FLOPs for N = 2·L tokens, 4·H·N bytes; infer: 2·H·N·(N + block)·D",
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper("block", 32, "tokens of a block"),
            Hyper(
                "mode",
                "train",
                "train: the first half of the sequence is the noisy copy, the second the clean one; infer: "
                "one text, causal between blocks, and the queries may be its last tokens",
                choices=("train", "infer"),
            ),
        ),
        test_hyper={"block": 4},
        padding="halves and blocks are counted in positions, which dropping a key shifts",
        deviations=(
            "The mask is that of BD3-LM (arXiv 2503.09573), which the paper takes over.",
            "A text need not be a multiple of the block; in a sequence of odd length the last clean token "
            "is missing.",
            "Complementary token masks, the label shift, sub-blocks at decoding and the rotary positions, "
            "which both copies share, belong to the model.",
        ),
    )

    def setup(self) -> None:
        """Refuse an empty block."""
        if self.hp.block < 1:
            raise UsageError(
                f"block_diffusion_mask: observed block={self.hp.block}, expected a positive size"
            )

    def mask_options(self, n: int, m: int, device: torch.device) -> Mapping[str, Any]:
        """Blocks of the noisy and of the clean tokens. UsageError where training has N ≠ M."""
        return {"mask": self._mask(n, m, device)}

    def visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """The mask, bool (N, M)."""
        return self._mask(n, m, device).dense(n, m)[0, 0]

    def _mask(self, n: int, m: int, device: torch.device) -> Mask:
        if self.hp.mode == "infer":
            return _causal_blocks(n, m, self.hp.block, device)
        if n != m:
            raise UsageError(
                f"block_diffusion_mask in mode train: observed N = {n}, M = {m}, expected N = M: noisy and "
                "clean copy are one sequence"
            )
        return _two_copies(n, self.hp.block, device)

    def pairs(self, n: int, m: int) -> int:
        """Visible pairs, counted token by token from the ends of the blocks."""
        block = self.hp.block
        if self.hp.mode == "infer":
            position = torch.arange(n) + (m - n)
            return int(((position // block + 1) * block).clamp(0, m).sum())
        noisy = _noisy(n)
        start = torch.arange(noisy) // block * block
        own = (start + block).clamp(max=noisy) - start
        earlier = start.clamp(max=n - noisy)
        clean = (start[: n - noisy] + block).clamp(max=n - noisy)
        return int(own.sum() + earlier.sum() + clean.sum())

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n


def _noisy(n: int) -> int:
    """Tokens of the noisy copy among n."""
    return n - n // 2


@lru_cache(maxsize=32)  # one mask per length: what backends derive from a mask is kept with it
@torch.inference_mode(False)
def _two_copies(n: int, block: int, device: torch.device) -> Mask:
    index, noisy = torch.arange(n, device=device), _noisy(n)
    clean = index >= noisy
    number = torch.where(clean, index - noisy, index) // block
    nothing = torch.full_like(number, -1)
    own = Mask.same(torch.where(clean, nothing, number))
    newest = torch.where(clean, number, number - 1)
    return own | Mask.between(number.new_zeros(1), newest, torch.where(clean, number, nothing))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _causal_blocks(n: int, m: int, block: int, device: torch.device) -> Mask:
    keys = torch.arange(m, device=device)
    queries = torch.arange(n, device=device) + (m - n)
    return Mask.upto(queries // block, keys // block)
