"""Global filters: a learned gate on every frequency of the grid of tokens (GFNet, SpectFormer)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.case import fold
from attnbench.impls.spec import Hyper, Paper

INITIAL_SCALE = 0.02

RESIZE = {1: "linear", 2: "bicubic", 3: "trilinear"}
"""Interpolation of the gate by the rank of the grid."""


class SpectralGating(Attention):
    """y = F⁻¹(W ∘ F(x)), F the real orthonormal Fourier transform over the grid, for every channel alone."""

    spec = Spec(
        id="spectral_gating",
        name="GFNet global filter / SpectFormer spectral gating",
        family="linear",
        kind="mixer",
        paper=Paper(
            "Global Filter Networks for Image Classification", 2021, arxiv="2107.00645", venue="NeurIPS 2021"
        ),
        upstream="https://github.com/raoyongming/GFNet",
        patterns=(Pattern.NS,),
        summary="Multiplies every frequency of the grid by a learned complex number per channel.",
        formula="y = irfft2(W ∘ rfft2(x)), W (Gh, ⌊Gw/2⌋ + 1, C) complex, transforms orthonormal: a circular "
        "convolution with irfft2(W)",
        cost="C·(5·N·log₂N + 3·N) FLOPs; spectra of 2·C·(N/2)·8 bytes; N·C parameters",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        padding="the convolution is circular over all cells of the grid: a padded cell counts as 0",
        grid_ranks=(2,),
        hot_loop="two real FFTs over the grid (torch.fft, fp32) around a complex product",
        backends=("reference", "torch"),
        hyper=(
            Hyper(
                "filter_grid",
                (14, 14),
                "sides of the grid that W is stored for, 1 to 3 of them; W is interpolated to other grids of "
                "as many sides",
            ),
        ),
        deviations=(
            "SpectFormer (arXiv 2304.06446) uses the same operator, in its first layers only; which layers "
            "is up to the model.",
            "On a grid other than filter_grid, W is interpolated on every call.",
        ),
        flops_backend="",
        flops_note="A real FFT of length N counts as 2.5·N·log2 N; torch's counter gives 0.",
        test_hyper={"filter_grid": (4, 4)},
    )

    def setup(self) -> None:
        """Create W; UsageError for a grid that is none."""
        sides = tuple(self.hp.filter_grid)
        if not 1 <= len(sides) <= 3 or min(sides) < 1:
            raise UsageError(f"spectral_gating: observed filter_grid={sides}, expected 1 to 3 positive sides")
        self.sides = sides
        shape = (*spectrum(sides), self.embed_dim, 2)
        self.filter = nn.Parameter(INITIAL_SCALE * torch.randn(shape))

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """The grid of a folded sequence."""
        return {"filter_grid": fold(n, 2, (2,))}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Filter x (B, N, C) on its grid, by default that of W; UsageError where N does not fill it."""
        x = self.source(x, context)
        sides = self.sides if grid is None else tuple(grid)
        if len(sides) != len(self.sides) or math.prod(sides) != x.shape[1]:
            raise UsageError(
                f"spectral_gating: observed grid {sides} for {x.shape[1]} tokens, expected one of "
                f"{len(self.sides)} sides that they fill"
            )
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        cells = x.to(wide).unflatten(1, sides)
        gate = self.gate(sides, wide)
        mix = _by_definition if self.backend == "reference" else _by_fft
        return mix(cells, gate).flatten(1, len(sides)).to(x.dtype)

    def gate(self, sides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """W on a grid, complex (…, ⌊last/2⌋ + 1, C): as stored, or interpolated by parts."""
        stored = self.filter.to(dtype)
        if sides != self.sides:
            planes = stored.flatten(-2).movedim(-1, 0).unsqueeze(0)
            mode = RESIZE[len(sides)]
            planes = F.interpolate(planes, spectrum(sides), mode=mode, align_corners=True)
            stored = planes.squeeze(0).movedim(0, -1).unflatten(-1, (-1, 2))
        return torch.view_as_complex(stored.contiguous())

    def flops(self, n: int, m: int, *, grid: Grid = None) -> int:
        """Two real FFTs and one complex product per frequency."""
        sides = fold(n, 2, (2,)) if grid is None else grid
        transforms = 5 * n * math.log2(n)
        return round(self.embed_dim * (transforms + 6 * math.prod(spectrum(sides))))

    def extra_bytes(self, n: int, m: int, itemsize: int, *, grid: Grid = None) -> int:
        """The spectrum of x and its product with W, complex64."""
        sides = fold(n, 2, (2,)) if grid is None else grid
        return 2 * 8 * self.embed_dim * math.prod(spectrum(sides))


def spectrum(sides: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the real Fourier transform over a grid: half of the last side."""
    return (*sides[:-1], sides[-1] // 2 + 1)


def _by_fft(x: Tensor, gate: Tensor) -> Tensor:
    """Filter x (B, *sides, C) by transforms over the sides."""
    axes = tuple(range(1, x.dim() - 1))
    frequencies = torch.fft.rfftn(x, dim=axes, norm="ortho") * gate
    return torch.fft.irfftn(frequencies, s=x.shape[1:-1], dim=axes, norm="ortho")


def _by_definition(x: Tensor, gate: Tensor) -> Tensor:
    """The same by the sums of the definition, one side after the other."""
    sides = x.shape[1:-1]
    last = len(sides)
    z = x.to(gate.dtype)
    for axis, side in enumerate(sides, start=1):
        count = side // 2 + 1 if axis == last else side
        z = _along(z, axis, _waves(count, side, -1.0, x))
    z = z * gate
    for axis, side in enumerate(sides[:-1], start=1):
        z = _along(z, axis, _waves(side, side, 1.0, x))
    side, count = sides[-1], sides[-1] // 2 + 1
    twice = torch.full((count,), 2.0, dtype=x.dtype, device=x.device)  # a frequency and its mirror image
    twice[0] = 1.0
    if side % 2 == 0:
        twice[-1] = 1.0
    return _along(z, last, _waves(count, side, 1.0, x).mT * twice).real


def _waves(count: int, side: int, sign: float, like: Tensor) -> Tensor:
    """exp(sign·2πi k t/side)/√side, (count, side) over frequencies k and places t."""
    k, t = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (count, side))
    angle = sign * 2.0 * math.pi / side * (k.unsqueeze(-1) * t).remainder(side)
    return torch.polar(torch.full_like(angle, side**-0.5), angle)


def _along(z: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Product of ``matrix`` (J, I) with z along an axis of I entries."""
    return torch.tensordot(matrix, z, ([1], [axis])).movedim(0, axis)
