"""The U-Net of SR3 (arXiv 2104.07636), with the attention modules of its spatial blocks given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention

AttentionAt = Callable[[int, int], Attention]
"""From a resolution and the channels there to the attention of one block."""


@dataclass(frozen=True)
class UNetDimensions:
    """Sizes of the network: ``base`` channels times ``multipliers``, halving the resolution after each.

    ``attended`` are the resolutions whose blocks have attention. ``noise_level`` conditions every block on
    the level of the noise in the input. Group norms have ``groups`` groups.
    """

    size: int
    base: int
    multipliers: tuple[int, ...]
    attended: tuple[int, ...]
    blocks: int
    groups: int
    dropout: float = 0.0
    noise_level: bool = True

    def channels(self, resolution: int) -> int:
        """Channels at ``resolution``."""
        return self.base * self.multipliers[int(math.log2(self.size // resolution))]


class SpatialAttention(nn.Module):
    """Group norm, attention among all pixels of a feature map, and a residual."""

    def __init__(self, channels: int, groups: int, attention: Attention) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels), attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W); the pixels are tokens on the grid (H, W)."""
        height, width = x.shape[-2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, grid=(height, width))
        return x + mixed.transpose(1, 2).unflatten(2, (height, width))


class ResidualBlock(nn.Module):
    """Two convolutions with group norm and SiLU, conditioned on the noise level by an added vector.

    Attention follows where it is given.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        *,
        level: int = 0,
        dropout: float = 0.0,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(groups, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.level = nn.Linear(level, outputs) if level else None
        self.second = nn.Sequential(
            nn.GroupNorm(groups, outputs),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SpatialAttention(outputs, groups, attention) if attention is not None else None

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W); ``level`` (B, level) is the embedded noise level."""
        y = self.first(x)
        if self.level is not None and level is not None:
            y = y + self.level(level)[:, :, None, None]
        y = self.second(y) + self.skip(x)
        return y if self.attention is None else self.attention(y)


class LevelEmbedding(nn.Module):
    """The noise level of a sample, a number in (0, 1], as sinusoids through a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, level: Tensor) -> Tensor:
        """(B) → (B, width)."""
        half = self.width // 2
        rates = torch.exp(-math.log(1e4) / half * torch.arange(half, device=level.device))
        angles = level[:, None] * rates
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class UNet(nn.Module):
    """Down, middle and up: ``blocks`` residual blocks a resolution on the way down, one more on the way up.

    The middle has two blocks, the first always with attention. ``inputs`` channels go in, ``outputs`` come
    out.
    """

    def __init__(self, dims: UNetDimensions, inputs: int, outputs: int, attention: AttentionAt) -> None:
        super().__init__()
        level = dims.base if dims.noise_level else 0

        def block(ins: int, outs: int, resolution: int, attended: bool) -> ResidualBlock:
            chosen = attention(resolution, outs) if attended else None
            return ResidualBlock(ins, outs, dims.groups, level=level, dropout=dims.dropout, attention=chosen)

        self.level = LevelEmbedding(level) if level else None
        self.stem = nn.Conv2d(inputs, dims.base, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        resolutions = [dims.size >> depth for depth in range(len(dims.multipliers))]
        width, skips = dims.base, [dims.base]
        for depth, resolution in enumerate(resolutions):
            if depth:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(dims.blocks):
                outs = dims.channels(resolution)
                self.down.append(block(width, outs, resolution, resolution in dims.attended))
                width = outs
                skips.append(width)
        self.middle = nn.ModuleList(
            [block(width, width, resolutions[-1], True), block(width, width, resolutions[-1], False)]
        )
        for depth, resolution in reversed(list(enumerate(resolutions))):
            outs = dims.channels(resolution)
            for _ in range(dims.blocks + 1):
                self.up.append(block(width + skips.pop(), outs, resolution, resolution in dims.attended))
                width = outs
            if depth:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(dims.groups, width)
        self.out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W); ``level`` (B) is the noise level where it conditions."""
        embedded = self.level(level) if self.level is not None and level is not None else None
        x = self.stem(x)
        kept = [x]
        for module in self.down:
            x = module(x, embedded) if isinstance(module, ResidualBlock) else module(x)
            kept.append(x)
        for module in self.middle:
            x = module(x, embedded)
        for module in self.up:
            if isinstance(module, ResidualBlock):
                x = module(torch.cat([x, kept.pop()], 1), embedded)
            else:
                x = module(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.out(F.silu(self.norm(x)))
