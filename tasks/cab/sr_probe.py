"""Super-resolution through attention alone: four copies of a digit, one of them sharp.

Every other operation works on single pixels, so the three blurred copies can only be restored by finding the
pixel of the sharp copy that belongs to each of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, Corpus, LearningCheck, Preset, Session, Shape, Task
from attnbench.tasks.blocks import Block
from attnbench.tasks.data import pictures, pool
from attnbench.tasks.trainer import Recipe

CELL = 8
"""Pixels of a side of one copy."""

PERIODS = (8, 4, 2)
"""Periods of the sines and cosines that tell a pixel where it lies; positions repeat from copy to copy."""

TRAIN = 1500
"""Digits to train on; the other 297 are tested."""

CHANNELS = 2 + 4 * len(PERIODS)
"""The mosaic, the mask of the sharp copy, and the positions."""

LEAST_ERROR = 1e-12
"""Mean squared errors below it count as it: a copy without any error has a PSNR too."""


@dataclass(frozen=True)
class MosaicPreset(Preset):
    """``side`` copies in each direction; ``layers`` of attention."""

    side: int
    layers: int


class PixelModel(nn.Module):
    """Networks on single pixels around attention among all pixels, on the grid (size, size)."""

    def __init__(self, size: int, attentions: list[Attention]) -> None:
        super().__init__()
        self.grid, width = (size, size), attentions[0].embed_dim
        self.stem = nn.Sequential(nn.Linear(CHANNELS, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.blocks = nn.ModuleList(Block(width, attention, ratio=2) for attention in attentions)
        self.head = nn.Linear(width, 1)  # without a norm: what attention copies must arrive as it is

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, size², CHANNELS) → what to add to the mosaic, (B, size²)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, grid=self.grid)
        return self.head(x)[..., 0]


class MosaicSession(Session):
    """One preset with its digits."""

    def __init__(self, preset: MosaicPreset, device: str) -> None:
        self.preset = preset
        self.size = CELL * preset.side
        digits = torch.from_numpy(pictures.digits())
        self.train_part, self.test_part = digits[:TRAIN].to(device), digits[TRAIN:].to(device)
        self.corpus = Corpus(
            "digits of scikit-learn", "embedded", pool.fingerprint(f"{preset.side} a side", digits)
        )
        self.tokens_per_step = preset.shape.workload.batch * preset.shape.n

    def model(self, attention: BuildAttention) -> nn.Module:
        """Pixels to corrections, see :class:`PixelModel`."""
        return PixelModel(self.size, [attention(layer) for layer in range(self.preset.layers)])

    def batches(self, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Mosaics of training digits (B, size², CHANNELS) and their values without blur (B, size²)."""
        draw = torch.Generator().manual_seed(seed)
        batch, copies = self.preset.shape.workload.batch, self.preset.side**2

        def mosaics() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(self.train_part), (batch,), generator=draw)
            sharp = torch.randint(copies, (batch,), generator=draw)
            return mosaic(self.train_part[rows.to(self.train_part.device)], sharp, self.preset.side)

        return mosaics

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean absolute error of all pixels."""
        pixels, truth = batch
        return F.l1_loss(pixels[..., 0] + model(pixels), truth)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR (dB, peak 1) over the blurred copies, mean over the test digits; copies are sharp in turn."""
        sharp = torch.arange(len(self.test_part)) % self.preset.side**2
        errors, before = [], []
        for digits, index in zip(self.test_part.split(64), sharp.split(64), strict=True):
            pixels, truth = mosaic(digits, index, self.preset.side)
            restored = pixels[..., 0] + model(pixels).float()
            errors.append(_blurred_error(restored, truth, pixels[..., 1]))
            before.append(_blurred_error(pixels[..., 0], truth, pixels[..., 1]))
        return {"psnr": _psnr(torch.cat(errors)), "blurred_psnr": _psnr(torch.cat(before))}


def _blurred_error(image: Tensor, truth: Tensor, sharp: Tensor) -> Tensor:
    """Mean squared error (B) of the pixels outside the sharp copy."""
    return ((image - truth).square() * (1.0 - sharp)).sum(1) / (1.0 - sharp).sum(1)


def _psnr(error: Tensor) -> float:
    return float((-10.0 * error.double().clamp(min=LEAST_ERROR).log10()).mean())


def mosaic(digits: Tensor, sharp: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """``side``² copies of each digit (B, 8, 8), all but number ``sharp`` (B) blurred to 2 × 2 means.

    Returns pixels (B, N, CHANNELS), row by row, and the values without blur (B, N).
    """
    blurred = F.interpolate(F.avg_pool2d(digits[:, None], 4), scale_factor=4, mode="nearest")[:, 0]
    device, size = digits.device, side * CELL
    cells = torch.arange(side * side, device=device) == sharp.to(device)[:, None]
    mask = cells.view(-1, side, side).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).float()
    truth = digits.repeat(1, side, side)
    image = torch.where(mask > 0, truth, blurred.repeat(1, side, side))
    place = _positions(size, device).expand(len(digits), -1, -1)
    pixels = torch.cat([image.flatten(1)[..., None], mask.flatten(1)[..., None], place], 2)
    return pixels, truth.flatten(1)


def _positions(size: int, device: torch.device) -> Tensor:
    """(size², 4·periods): sine and cosine of each coordinate at each period."""
    line = torch.arange(size, device=device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angles = [2.0 * math.pi * c.flatten() / period for c in (y, x) for period in PERIODS]
    return torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


@dataclass(frozen=True)
class MosaicRestoration(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> MosaicSession:
        """Load the digits onto ``device``. Raises UsageError without scikit-learn."""
        chosen = self.preset(preset)
        assert isinstance(chosen, MosaicPreset)
        return MosaicSession(chosen, device)


def _shape(preset: str, batch: int, width: int, side: int) -> Shape:
    workload = Workload(
        name=f"sr_probe_{preset}",
        batch=batch,
        heads=1,
        kv_heads=1,
        head_dim=width,
        model="networks on single pixels around attention",
        source="attnbench/tasks/cab/sr_probe.py",
        grid_rank=2,
    )
    size = side * CELL
    return Shape(workload, size**2, size**2, (size, size))


TINY = MosaicPreset(
    shape=_shape("tiny", batch=16, width=32, side=2),
    recipe=Recipe(steps=800, lr=8e-3, warmup=80),
    checks={Pattern.NS: LearningCheck(softmax=30.0, no_mixing=18.0)},
    side=2,
    layers=1,
)
"""For one core: 12,800 mosaics are seen. Measured with seeds 0, 1 and 2: 44.9, 43.2 and 45.8 dB with softmax;
with seed 0: 12.9 dB without mixing, 14.7 dB with linear attention. At a rate of 4e-3 softmax has 16.6 dB
after 800 steps; with a norm before the head 1,000 steps at 4e-3 gave 18.2 dB, at 1e-2 15.9 dB."""

SMALL = MosaicPreset(
    shape=_shape("small", batch=32, width=64, side=8),
    recipe=Recipe(steps=4000, lr=3e-3, warmup=400, dtype="bfloat16", max_seconds=420.0),
    checks={},
    side=8,
    layers=2,
)

TASK = MosaicRestoration(
    id="sr_probe",
    title="Super-resolution, attention only",
    patterns=(Pattern.NS,),
    metric="psnr",
    better="higher",
    presets={"tiny": TINY, "small": SMALL},
    data="Mosaics of handwritten digits in scikit-learn: copies of one digit, one of them sharp",
    source="Probe of this benchmark after CAB (arXiv 2210.07661)",
)
