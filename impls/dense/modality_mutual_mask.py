"""Modality-mutual attention: causal, but an image also sees the question that is asked about it later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import MaskAttention, Pattern, Spec
from attnbench.impls.spec import Input, Paper
from attnbench.impls.synthetic import Dims
from attnbench.kernels.flash import Mask

SIXTEENTHS = (1, 8, 12)
"""Where the image starts and ends and where the question ends in synthetic sequences, in sixteenths."""


def _layout(n: int) -> tuple[int, int, int]:
    """First token of the image, of the question and of the answer among n, of which short ones lack some."""
    first, question, answer = (n * part // 16 for part in SIXTEENTHS)
    return first, question, answer


def _spans(dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    first, question, answer = _layout(shape[-1])
    spans = torch.zeros(shape, dtype=torch.long, device=device)
    spans[..., first:question] = 1
    spans[..., question:answer] = -1
    return spans


class ModalityMutualMask(MaskAttention):
    """Softmax attention over {j : j ≤ i, or i is of an image and j of its question}."""

    spec = Spec(
        id="modality_mutual_mask",
        name="Modality-mutual attention (AKI)",
        family="dense",
        kind="mask",
        paper=Paper(
            "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for "
            "Multimodal LLMs",
            2025,
            arxiv="2503.02597",
        ),
        upstream="https://github.com/sony/aki",
        patterns=(Pattern.NS,),
        summary="Lets the tokens of an image look ahead at the question, so that what is asked decides "
        "what is read out of the image.",
        formula="o_i = softmax over Ω_i of q_i·k_j/√D, Ω_i = {j ≤ i} ∪ {j : g_i > 0 and g_j = −g_i}",
        cost="2·H·N·(N + 1)·D + 4·H·I·Q·D FLOPs for an image of I and a question of Q tokens, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash",),
        inputs=(
            Input(
                "spans",
                "group of each token: g > 0 in image g, −g in the question about it, 0 in other text",
                "(B, N)",
                _spans,
            ),
        ),
        deviations=(
            "Any number of images, each with its own question: the union of their rectangles. The release "
            "has one image per sample.",
            "Costs count the synthetic layout: an image from 1/16 to 1/2 of the sequence, the question to "
            "3/4, the answer after it.",
        ),
    )

    def mask_options(
        self, n: int, m: int, device: torch.device, *, spans: Tensor | None = None
    ) -> Mapping[str, Any]:
        """Causal, or the same group on either side. UsageError without spans (B, N), or where N ≠ M."""
        return {"mask": self._mask(n, m, spans)}

    def visible(self, n: int, m: int, device: torch.device, *, spans: Tensor | None = None) -> Tensor:
        """The mask, bool (B, 1, N, M)."""
        return self._mask(n, m, spans).dense(n, m)

    @torch.no_grad()
    def _mask(self, n: int, m: int, spans: Tensor | None) -> Mask:
        if spans is None:
            raise UsageError(f"{self.spec.id}: observed no spans, expected the group of each token (B, N)")
        if spans.dim() != 2 or spans.shape[1] != n or n != m:
            raise UsageError(
                f"{self.spec.id}: observed spans {tuple(spans.shape)} for {n} queries and {m} keys, expected "
                "(B, N) with N = M: the image must be read in one pass with its question"
            )
        position = torch.arange(n, device=spans.device)
        group = spans.unsqueeze(1)
        image, question = (torch.where(side > 0, side, -1) for side in (group, -group))
        return Mask.upto(position) | Mask.same(image, question)

    def pairs(self, n: int, m: int) -> int:
        """Visible pairs of the synthetic layout: the triangle and one rectangle above it."""
        first, question, answer = _layout(n)
        return n * (n + 1) // 2 + (question - first) * (answer - question)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n
