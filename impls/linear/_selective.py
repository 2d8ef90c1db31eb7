"""What a Mamba block feeds its scan, which Mamba and Vision Mamba share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.linear._layers import ShortConv, step_bias

NO_STEP = -1e4
"""Raw step size of a padded token: its softplus is 0, so the state neither decays nor is written to."""


class Terms(NamedTuple):
    """Inputs u, the raw Δ (B, N, E), and b, c (B, N, Ns) of a scan."""

    u: Tensor
    delta: Tensor
    b: Tensor
    c: Tensor


class SelectiveTerms(nn.Module):
    """Short convolution and projections of one scan of ``width`` channels, and its A, skip and bias of Δ."""

    def __init__(self, width: int, state: int, rank: int, conv_size: int) -> None:
        super().__init__()
        self.sizes = (rank, state, state)
        self.conv = ShortConv(width, conv_size, bias=True)
        self.select = nn.Linear(width, rank + 2 * state, bias=False)
        self.step = nn.Linear(rank, width, bias=False)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        self.step_bias = nn.Parameter(step_bias(width))
        self.log_rate = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, padded: Tensor | None, *, reverse: bool = False) -> Terms:
        """The terms of x (B, N, E); ``reverse`` convolves over the next tokens in place of the last."""
        u = F.silu(self.conv(x, padded, reverse=reverse))
        raw, b, c = self.select(u).split(self.sizes, -1)
        delta = self.step(raw)
        if padded is not None:
            delta = delta.masked_fill(padded.unsqueeze(-1), NO_STEP)
        return Terms(u, delta, b, c)

    def parameters_of_scan(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A (E, Ns), skip and the bias of Δ (E) in ``dtype``."""
        return -self.log_rate.to(dtype).exp(), self.skip.to(dtype), self.step_bias.to(dtype)

    def flops(self, n: int) -> int:
        """Of the convolution and the projections."""
        width, (rank, state, _) = self.step.out_features, self.sizes
        return self.conv.flops(n) + 2 * n * width * (2 * rank + 2 * state)


def scan_flops(n: int, width: int, state: int) -> int:
    """Elementwise operations of one scan."""
    return 9 * n * width * state


def scan_bytes(n: int, width: int, state: int) -> int:
    """The fp32 states at the starts of chunks of 32 steps."""
    return -(-n // 32) * width * state * 4
