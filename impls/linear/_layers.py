"""Parts of the blocks that recurrences are published in: a short convolution, step sizes, their biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.synthetic import Dims

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class ShortConv(nn.Conv1d):
    """Depthwise convolution of x (B, N, E) over the ``size`` newest tokens, or the next ones in ``reverse``.

    The last weight is that of the token itself. Padded tokens, ``padded`` (B, N), count as 0.
    """

    def __init__(self, width: int, size: int, *, bias: bool) -> None:
        super().__init__(width, width, size, groups=width, bias=bias)

    def forward(self, x: Tensor, padded: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """(B, N, E) → (B, N, E)."""
        if padded is not None:
            x = x.masked_fill(padded.unsqueeze(-1), 0.0)
        reach = self.kernel_size[0] - 1
        rows = F.pad(x.mT, (0, reach) if reverse else (reach, 0))
        weight = self.weight.flip(-1) if reverse else self.weight
        return F.conv1d(rows, weight, self.bias, groups=self.groups).mT

    def flops(self, n: int) -> int:
        """Of one sequence of n tokens."""
        return 2 * n * self.out_channels * self.kernel_size[0]


def step_bias(count: int) -> Tensor:
    """Inverse softplus of ``count`` step sizes, log-uniform in [0.001, 0.1]: dt + log(1 − e^−dt)."""
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    dt = torch.empty(count).uniform_(low, high).exp().clamp_min(STEP_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


def step_sizes(
    dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Tensor:
    """Synthetic step sizes, distributed as the published initial ones: log-uniform in [0.001, 0.1]."""
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    return torch.rand(shape, generator=generator, device=device).mul_(high - low).add_(low).exp_()


def log_uniform_rates(count: int, low: float, high: float) -> Tensor:
    """Logarithms log A of ``count`` rates A, uniform in [low, high] but at least 1e-4."""
    return torch.empty(count).uniform_(low, high).clamp_min(1e-4).log()
