"""Super-resolution (noncausal self attention): CAB's task, SR3's U-Net from photos on a CPU to faces.

Its convolutions suffice: a model without attention scores as well, as in CAB's own study. ``sr_probe`` asks
for what only attention can do; both are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.impls.case import Workload
from attnbench.impls.spec import Pattern
from attnbench.tasks.base import BuildAttention, Preset, Session, Shape, Task
from attnbench.tasks.cab import _sr_data
from attnbench.tasks.cab._diffusion import Diffusion
from attnbench.tasks.cab._unet import UNet, UNetDimensions
from attnbench.tasks.data.extras import require
from attnbench.tasks.data.pictures import psnr_ssim
from attnbench.tasks.trainer import Recipe


@dataclass(frozen=True)
class SRPreset(Preset):
    """Sizes of the network, the data and the evaluation; ``shape`` is the attention of most tokens.

    ``diffusion`` None is the one-step variant: the network predicts what bicubic enlargement lacks. A
    diffusion is sampled once for each of ``samples`` seeds.
    """

    dims: UNetDimensions
    pictures: _sr_data.Pictures
    diffusion: Diffusion | None
    eval_batch: int
    samples: int = 1


def network(preset: SRPreset, attention: BuildAttention) -> UNet:
    """The U-Net of a preset. Attention has one head, as wide as its map, and is given the grid of the pixels.

    Layers are numbered from the input to the output.
    """
    layers = count()

    def at(resolution: int, channels: int) -> Attention:
        workload = replace(preset.shape.workload, head_dim=channels)
        pixels = resolution**2
        return attention(next(layers), Shape(workload, pixels, pixels, (resolution, resolution)))

    if preset.diffusion is not None:
        return UNet(preset.dims, 6, 3, at)
    model = UNet(preset.dims, 3, 3, at)
    for parameter in model.out.parameters():
        nn.init.zeros_(parameter)  # training starts at the bicubic image
    return model


class SRSession(Session):
    """One preset with its images."""

    def __init__(self, preset: SRPreset, device: str) -> None:
        require("skimage.metrics", "scikit-image", "super-resolution")
        self.preset, self.device = preset, device
        self.pairs = _sr_data.load(preset.pictures)
        self.corpus = self.pairs.corpus
        self.tokens_per_step = preset.shape.workload.batch * preset.shape.n

    def model(self, attention: BuildAttention) -> nn.Module:
        """The U-Net: (B, 3 or 6, size, size) → (B, 3, size, size), see :func:`network`."""
        return network(self.preset, attention)

    def batches(self, seed: int) -> Callable[[], _sr_data.Pair]:
        """Bicubic and sharp images."""
        return self.pairs.batches(self.preset.shape.workload.batch, seed)

    def loss(self, model: nn.Module, batch: _sr_data.Pair) -> Tensor:
        """Mean absolute error: of the residual in one step, of the noise in diffusion."""
        condition, sharp = (images.to(self.device) for images in batch)
        if self.preset.diffusion is None:
            return F.l1_loss(model(condition), sharp - condition)
        noise = torch.randn_like(sharp)
        noisy, level = self.preset.diffusion.noised(sharp, noise)
        return F.l1_loss(model(torch.cat([condition, noisy], 1), level), noise)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Means of PSNR (dB) and SSIM over the test images and samples, and those of bicubic enlargement."""
        pairs = self.pairs.test()
        conditions = _sr_data.to_tensor([condition for condition, _ in pairs])
        scored = []
        for seed in range(self.preset.samples):
            draw = torch.Generator().manual_seed(seed)
            restored = [
                _sr_data.to_pixels(self._restored(model, part.to(self.device), draw))
                for part in conditions.split(self.preset.eval_batch)
            ]
            scored += [
                psnr_ssim(x, sharp) for x, (_, sharp) in zip(np.concatenate(restored), pairs, strict=True)
            ]
        bicubic = [psnr_ssim(condition, sharp) for condition, sharp in pairs]
        return {
            "psnr": _mean(scored, "psnr_db"),
            "ssim": _mean(scored, "ssim"),
            "bicubic_psnr": _mean(bicubic, "psnr_db"),
            "bicubic_ssim": _mean(bicubic, "ssim"),
        }

    def _restored(self, model: nn.Module, condition: Tensor, draw: torch.Generator) -> Tensor:
        diffusion = self.preset.diffusion
        if diffusion is None:
            return condition + model(condition)
        start = torch.randn(condition.shape, generator=draw).to(condition.device)
        return diffusion.sample(partial(_noise_in, model, condition), start, draw)


def _noise_in(model: nn.Module, condition: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
    return model(torch.cat([condition, noisy], 1), level).float()


def _mean(scored: list[dict[str, float]], name: str) -> float:
    return float(np.mean([found[name] for found in scored]))


@dataclass(frozen=True)
class SuperResolution(Task):
    """The task; see the module's docstring and ``data``."""

    def open(self, preset: str, pattern: Pattern, device: str) -> SRSession:
        """Load the images. Raises UsageError without the libraries, DataMissing without the faces."""
        chosen = self.preset(preset)
        assert isinstance(chosen, SRPreset)
        return SRSession(chosen, device)


def _shape(preset: str, batch: int, dims: UNetDimensions) -> Shape:
    """The attention at the highest attended resolution."""
    side = max(dims.attended)
    workload = Workload(
        name=f"sr_{preset}",
        batch=batch,
        heads=1,
        kv_heads=1,
        head_dim=dims.channels(side),
        model="SR3 U-Net",
        source="attnbench/tasks/cab/sr.py",
        grid_rank=2,
    )
    return Shape(workload, side**2, side**2, (side, side))


_TINY = UNetDimensions(32, 16, (1, 2), attended=(16,), blocks=1, groups=8, noise_level=False)
_SMALL = UNetDimensions(32, 32, (1, 2, 2), attended=(8, 16, 32), blocks=2, groups=16, dropout=0.1)
_PAPER = UNetDimensions(
    128, 64, (1, 2, 4, 8, 8), attended=(16, 32, 64, 128), blocks=2, groups=32, dropout=0.2
)

TINY = SRPreset(
    shape=_shape("tiny", 4, _TINY),
    recipe=Recipe(steps=250, lr=2e-3, warmup=25),
    checks={},
    dims=_TINY,
    pictures=_sr_data.Pictures("photos", high=32, low=8, tested=64),
    diffusion=None,
    eval_batch=32,
)
"""For one core: 1,000 crops are seen, in one step instead of a diffusion, which would only learn noise. No
learning check: convolutions restore what can be restored."""

SMALL = SRPreset(
    shape=_shape("small", 64, _SMALL),
    recipe=Recipe(steps=6000, lr=3e-4, warmup=300, dtype="bfloat16", max_seconds=400.0),
    checks={},
    dims=_SMALL,
    pictures=_sr_data.Pictures("photos", high=32, low=8, tested=128, test_reduction=1),
    diffusion=Diffusion(steps=200, first=1e-6, last=1e-1, sampled=50),
    eval_batch=128,
    samples=3,
)
"""For one GPU. The steps are an estimate from FLOPs, hence the time limit and no learning check."""

PAPER = SRPreset(
    shape=_shape("paper", 4, _PAPER),
    recipe=Recipe(steps=1_000_000, lr=1e-4, warmup=0, final=1.0, betas=(0.9, 0.999), weight_decay=0.0),
    checks={},
    dims=_PAPER,
    pictures=_sr_data.Pictures("faces", high=128, low=16, tested=100),
    diffusion=Diffusion(steps=2000, first=1e-6, last=1e-2, sampled=2000),
    eval_batch=20,
)
"""SR3 with attention at 128 pixels as well, as CAB gives it to efficient mechanisms; softmax has the same
layers here, so that only the mechanism differs. Known differences: the projections have biases and there is
an output projection, as in every attention module of this benchmark; AdamW without decay stands for Adam;
the last weights are scored, not a mean of checkpoints; gradients are clipped at 1."""

TASK = SuperResolution(
    id="sr",
    title="Super-resolution",
    patterns=(Pattern.NS,),
    metric="psnr",
    better="higher",
    presets={"tiny": TINY, "small": SMALL, "paper": PAPER},
    data="tiny, small: crops of photos in scikit-learn and scikit-image, two of them held out; paper: FFHQ, "
    "tested on CelebA-HQ",
    source="CAB (arXiv 2210.07661) with SR3 (arXiv 2104.07636)",
)
