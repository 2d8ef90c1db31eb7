"""FNet: a discrete Fourier transform over tokens and channels in place of attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Paper, Pattern, Spec


class FNet(Attention):
    """y = Re(F_N x F_C): y_nc = Σ_md x_md cos(2π(n·m/N + c·d/C)), unnormalised and without parameters.

    A grid is read in row-major order as one sequence; the heads play no role. The ``reference`` multiplies
    by the cosine and sine matrices, ``torch`` runs the FFT. Both compute in fp32, in fp64 for fp64 inputs.
    """

    spec = Spec(
        id="fnet",
        name="FNet Fourier mixing",
        family="linear",
        kind="mixer",
        paper=Paper(
            "FNet: Mixing Tokens with Fourier Transforms", 2021, arxiv="2105.03824", venue="NAACL 2022"
        ),
        upstream="google-research/google-research",
        patterns=(Pattern.NS,),
        summary="The real part of the Fourier transform over tokens and channels; nothing is learned.",
        formula="y = Re(F_N x F_C) = Cos_N x Cos_C − Sin_N x Sin_C",
        cost="O(N·C·log(N·C))",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        padding="every output is a sum over all N positions, and N sets the frequencies; a padded token "
        "counts as zeros",
        hot_loop="a two-dimensional FFT",
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
        """Mix x (B, N, C) → (B, N, C); a token that ``key_padding_mask`` (B, N) marks counts as zeros."""
        x = self.source(x, context)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if key_padding_mask is not None:
            wide = wide.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        mixed = _by_matrices(wide) if self.backend == "reference" else torch.fft.fft2(wide).real
        return mixed.to(x.dtype)

    def flops(self, n: int, m: int) -> int:
        """5/2·N·C·log2(N·C): a real transform of N·C numbers by radix 2."""
        return round(2.5 * n * self.embed_dim * math.log2(n * self.embed_dim))

    def counted_flops(self, n: int, m: int) -> int:
        """The reference multiplies by four matrices."""
        return 4 * n * self.embed_dim * (n + self.embed_dim)


def _by_matrices(x: Tensor) -> Tensor:
    """Cos_N x Cos_C − Sin_N x Sin_C."""
    cos_n, sin_n = _waves(x.shape[-2], x)
    cos_c, sin_c = _waves(x.shape[-1], x)
    return cos_n @ (x @ cos_c) - sin_n @ (x @ sin_c)


def _waves(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2π·n·m/size, (size, size); n·m is reduced modulo size before it is rounded."""
    index = torch.arange(size, device=like.device)
    turns = (index[:, None] * index % size).double() / size
    angle = 2 * math.pi * turns
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
