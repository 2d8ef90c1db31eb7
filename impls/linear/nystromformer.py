"""Nystromformer: the attention matrix from its rows and columns at landmarks, joined by a pseudo-inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.linear._segments import segment_means
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import flash, padding_bias


def pseudo_inverse(a: Tensor, iterations: int, *, per_matrix: bool = True) -> Tensor:
    """Moore–Penrose inverse of a (..., R, R), row-stochastic up to zero rows, by a cubic-order iteration.

    Starts from aᵀ divided by the largest column sum of each matrix, or of the whole batch with
    ``per_matrix=False``. Converges for singular matrices too. Source: Xiong et al.,
    Nystromformer (arXiv 2102.03902).
    """
    columns = a.sum(-2)
    largest = columns.amax(-1) if per_matrix else columns.amax()
    z = a.transpose(-1, -2) / largest.clamp_min(torch.finfo(a.dtype).tiny)[..., None, None]
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = 0.25 * z @ (13 * identity - x @ (15 * identity - x @ (7 * identity - x)))
    return z


class Nystromformer(Attention):
    """Softmax attention approximated by softmax(q K̄ᵀ) · softmax(Q̄ K̄ᵀ)⁺ · softmax(Q̄ kᵀ) v."""

    spec = Spec(
        id="nystromformer",
        name="Nystromformer",
        family="linear",
        kind="core",
        paper=Paper(
            "Nystromformer: A Nystrom-based Algorithm for Approximating Self-Attention",
            2021,
            arxiv="2102.03902",
            venue="AAAI 2021",
        ),
        upstream="https://github.com/mlpen/Nystromformer",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Rebuilds the attention matrix from R landmark queries and keys, the means of segments.",
        formula="o = F1 F2⁺ (F3 v) [+ conv(v)], F1 = softmax(q K̄ᵀ/√D), F2 = softmax(Q̄ K̄ᵀ/√D), "
        "F3 = softmax(Q̄ kᵀ/√D), Q̄, K̄ means of R segments",
        cost="4·H·(N + M)·R·D + 8·T·H·R³ FLOPs and H·R·(4·R + D·e) bytes",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        ops=("flash",),
        hyper=(
            Hyper("num_landmarks", 64, "landmarks R", cab=16),
            Hyper("iterations", 6, "steps T of the pseudo-inverse"),
            Hyper(
                "conv_kernel",
                None,
                "odd width of a depthwise convolution of v along the tokens, one filter per head, added to "
                "the output; None: without. Self attention only",
                cab=5,
            ),
            Hyper(
                "variant",
                "paper",
                "cab: scores divided by D instead of √D, the pseudo-inverse starts from the largest column "
                "sum of the whole batch",
                choices=("paper", "cab"),
            ),
        ),
        deviations=(
            "Cross attention: landmark queries from the queries, landmark keys from the keys; the paper has "
            "self attention only.",
            "Plain softmax attention wherever N ≤ R or M ≤ R, which is exact and costs no more.",
            "Padding is left out of the landmarks, whose segments divide the other tokens; upstream averages "
            "zeros in.",
            "The start of the pseudo-inverse is scaled for each matrix, so that no output depends on the "
            "other elements of the batch.",
        ),
        test_hyper={"num_landmarks": 4},
    )

    def setup(self) -> None:
        """Create the optional convolution."""
        kernel = self.hp.conv_kernel
        self.conv: nn.Conv2d | None = None
        if kernel is None:
            return
        if kernel % 2 == 0:
            raise UsageError(f"nystromformer: observed conv_kernel={kernel}, expected an odd width")
        if self.pattern.cross:
            raise UsageError(
                f"nystromformer under NC: observed conv_kernel={kernel}, expected None: "
                "the convolution of the values has M rows, the output N"
            )
        h = self.num_heads
        self.conv = nn.Conv2d(h, h, (kernel, 1), padding=(kernel // 2, 0), groups=h, bias=False)

    @property
    def scale(self) -> float:
        """Multiplier of the scores: 1/√D, in CAB's variant 1/D."""
        return 1.0 / (self.head_dim if self.hp.variant == "cab" else math.sqrt(self.head_dim))

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
        """Landmark attention of q (B, H, N, D) over k, v (B, H, M, ·)."""
        if self._is_dense(q.shape[2], k.shape[2]):
            o = self._flash(q, k, v, padding_bias(key_padding_mask))
        else:
            o = self._landmark_attention(q, k, v, key_padding_mask)
        if self.conv is not None:
            seen = v if key_padding_mask is None else v.masked_fill(key_padding_mask[:, None, :, None], 0.0)
            o = o + self.conv(seen)
        return o

    def _is_dense(self, n: int, m: int) -> bool:
        return min(n, m) <= self.hp.num_landmarks

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        o, _ = flash(q, k, v, scale=self.scale, key_bias=key_bias, need_lse=False, backend=self.backend)
        return o

    def _landmark_attention(self, q: Tensor, k: Tensor, v: Tensor, padded: Tensor | None) -> Tensor:
        """F1 (F2⁺ (F3 v)), where no factor is larger than N×R or R×M and only F2 is stored."""
        count = self.hp.num_landmarks
        landmark_q, live_q = segment_means(q, count, None if self.pattern.cross else padded)
        landmark_k, live_k = segment_means(k, count, padded)
        kernel = self._landmark_kernel(landmark_q, landmark_k, live_q, live_k)
        per_matrix = self.hp.variant == "paper"
        inverse = pseudo_inverse(kernel, self.hp.iterations, per_matrix=per_matrix)
        summary = self._flash(landmark_q, k, v, padding_bias(padded))
        mixed = (inverse @ summary.to(inverse.dtype)).to(v.dtype)
        dead = None if live_k is None else padding_bias(~live_k)
        return self._flash(q, landmark_k, mixed, dead)

    def _landmark_kernel(
        self, landmark_q: Tensor, landmark_k: Tensor, live_q: Tensor | None, live_k: Tensor | None
    ) -> Tensor:
        """F2 (B, H, R, R), at least in fp32; rows and columns of landmarks without a token are 0."""
        wide = torch.promote_types(landmark_q.dtype, torch.float32)
        scores = self.scale * landmark_q.to(wide) @ landmark_k.to(wide).transpose(-1, -2)
        if live_k is None:
            return scores.softmax(-1)
        dead = ~live_k[:, None, None, :]
        kernel = scores.masked_fill(dead, torch.finfo(wide).min).softmax(-1).masked_fill(dead, 0.0)
        return kernel if live_q is None else kernel.masked_fill(~live_q[:, None, :, None], 0.0)

    def flops(self, n: int, m: int) -> int:
        """Two landmark attentions, the R×R kernel and its pseudo-inverse, the convolution if there is one."""
        d, r = self.head_dim, self.hp.num_landmarks
        if self._is_dense(n, m):
            per_head = 4 * n * m * d
        else:
            per_head = 4 * (n + m) * r * d + 4 * r * r * d + 8 * self.hp.iterations * r**3
        if self.conv is not None:
            per_head += 2 * n * d * self.hp.conv_kernel
        return self.num_heads * per_head

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The R×R kernel in fp32 and R rows of values."""
        r = self.hp.num_landmarks
        return 0 if self._is_dense(n, m) else self.num_heads * r * (4 * r + self.head_dim * itemsize)
