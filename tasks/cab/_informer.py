"""Informer (arXiv 2012.07436): a post-norm encoder that halves its length, a decoder that answers at once.

Every attention is given from outside, so that encoder self attention (NS) or decoder cross attention (NC)
can be the one under test.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.impls.base import Attention
from attnbench.tasks.blocks import Block, DecoderBlock, sinusoids


class ValueEmbedding(nn.Module):
    """A circular convolution over three rows, sinusoidal positions, and time features if there are any."""

    def __init__(self, channels: int, marks: int, width: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Conv1d(channels, width, 3, padding=1, padding_mode="circular", bias=False)
        self.time = nn.Linear(marks, width, bias=False) if marks else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor, marks: Tensor) -> Tensor:
        """(B, N, channels), (B, N, marks) → (B, N, C)."""
        x = self.value(values.transpose(1, 2)).transpose(1, 2)
        x = x + sinusoids(x.shape[1], x.shape[2], x.device)
        return self.dropout(x if self.time is None else x + self.time(marks))


class Distil(nn.Module):
    """Half the length: circular convolution, batch norm, ELU, maximum over three at stride two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, ⌈N/2⌉, C)."""
        x = F.elu(self.norm(self.convolution(x.transpose(1, 2))))
        return F.max_pool1d(x, 3, stride=2, padding=1).transpose(1, 2)


class Informer(nn.Module):
    """Forecasts ``pred`` rows: layers of ``encoder`` NS, ``own`` CS and ``cross`` attention."""

    def __init__(
        self,
        channels: int,
        marks: int,
        pred: int,
        encoder: list[Attention],
        own: list[Attention],
        cross: list[Attention],
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        width, self.pred = encoder[0].embed_dim, pred
        self.embed_seen = ValueEmbedding(channels, marks, width, dropout)
        self.embed_asked = ValueEmbedding(channels, marks, width, dropout)
        self.encoder = nn.ModuleList(Block(width, a, dropout=dropout, post_norm=True) for a in encoder)
        self.distil = nn.ModuleList(Distil(width) for _ in encoder[1:])
        self.norm_memory = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, o, c, dropout=dropout, post_norm=True)
            for o, c in zip(own, cross, strict=True)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels)

    def forward(self, seen: Tensor, seen_marks: Tensor, start: Tensor, asked_marks: Tensor) -> Tensor:
        """Forecast (B, pred, channels) from ``seen`` (B, N, channels) and their time features.

        ``start`` (B, label, channels), label may be 0, are the last rows seen: the decoder reads them, then a
        zero for every row to forecast; ``asked_marks`` are the time features of both.
        """
        x = self.embed_seen(seen, seen_marks)
        for layer, block in enumerate(self.encoder):
            if layer:
                x = self.distil[layer - 1](x)
            x = block(x)
        memory = self.norm_memory(x)
        asked = torch.cat((start, start.new_zeros(len(start), self.pred, start.shape[2])), 1)
        y = self.embed_asked(asked, asked_marks)
        for block in self.decoder:
            y = block(y, memory)
        return self.head(self.norm(y[:, -self.pred :]))
