"""Diffusion by a continuous noise level, as SR3 trains and samples it (arXiv 2104.07636, 2009.00713)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""From a noisy image (B, 3, H, W) and its level (B) to the noise in it."""


@dataclass(frozen=True)
class Diffusion:
    """A schedule of ``steps`` noise variances from ``first`` to ``last`` on a line, sampled in ``sampled``.

    The level of a step is the share of the signal's amplitude that is left, √ᾱ.
    """

    steps: int
    first: float
    last: float
    sampled: int

    def levels(self) -> Tensor:
        """√ᾱ after 0, 1, …, ``steps`` steps: (steps + 1), from 1 down, fp64."""
        betas = torch.linspace(self.first, self.last, self.steps, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), (1.0 - betas).cumprod(0).sqrt()])

    def noised(self, x: Tensor, noise: Tensor, draw: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mix x (B, …) and ``noise`` at a random level: (noisy x, levels (B)).

        A step is drawn uniformly, then a level uniformly between those before and after it.
        """
        levels = self.levels().float()
        step = torch.randint(self.steps, (len(x),), generator=draw)
        share = torch.rand(len(x), generator=draw)
        level = (levels[step] + share * (levels[step + 1] - levels[step])).to(x.device)
        shaped = level.view(-1, *(1,) * (x.ndim - 1))
        return shaped * x + (1.0 - shaped.square()).sqrt() * noise, level

    def sample(self, denoise: Denoise, start: Tensor, draw: torch.Generator) -> Tensor:
        """Denoise ``start`` (B, 3, H, W), pure noise, in ``sampled`` steps; values in [-1, 1].

        With fewer steps than the schedule has, evenly spaced levels of it are visited. Noise comes from
        ``draw``, on the CPU.
        """
        visited = torch.linspace(0, self.steps, self.sampled + 1).round().long()
        levels = self.levels()[visited].tolist()
        x = start
        for before, here in zip(levels[-2::-1], levels[:0:-1], strict=True):
            x = _step(x, denoise, before, here, draw)
        return x


def _step(x: Tensor, denoise: Denoise, before: float, here: float, draw: torch.Generator) -> Tensor:
    """From level ``here`` to ``before``: the mean of the posterior, and noise unless it is the last step."""
    alpha_bar, alpha_bar_before = here**2, before**2
    alpha = alpha_bar / alpha_bar_before
    level = torch.full((len(x),), here, device=x.device)
    clean = ((x - (1.0 - alpha_bar) ** 0.5 * denoise(x, level)) / here).clamp(-1.0, 1.0)
    mean = (before * (1.0 - alpha) * clean + alpha**0.5 * (1.0 - alpha_bar_before) * x) / (1.0 - alpha_bar)
    if before == 1.0:
        return mean
    variance = (1.0 - alpha_bar_before) / (1.0 - alpha_bar) * (1.0 - alpha)
    return mean + variance**0.5 * torch.randn(x.shape, generator=draw).to(x.device)
