"""Pieces that the models of several tasks share: blocks of encoders and decoders, and a model over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid


def network(width: int, ratio: int, activation: Callable[[], nn.Module] = nn.GELU) -> nn.Module:
    """The feed-forward network of a block, ``ratio`` times as wide inside."""
    return nn.Sequential(nn.Linear(width, ratio * width), activation(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Transformer block: attention, then a GELU network ``ratio`` times as wide, or ``mlp`` in its place.

    With ``ratio`` 0 and no ``mlp`` nothing comes after the attention. Pre-norm unless ``post_norm``. With an
    attention of a cross pattern the block reads ``context``, which a pre-norm block normalises like x.
    ``dropout`` acts on what is added to x.
    """

    def __init__(
        self,
        width: int,
        attention: Attention,
        ratio: int = 4,
        *,
        mlp: nn.Module | None = None,
        dropout: float = 0.0,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if attention.pattern.cross and not post_norm else None
        self.attention = attention
        self.mlp = network(width, ratio) if mlp is None and ratio else mlp
        self.dropout = nn.Dropout(dropout)
        self.post_norm = post_norm

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) → (B, N, C); ``key_padding_mask`` (B, M) is True where a key is padding."""
        if self.post_norm:
            mixed = self.attention(x, context, grid=grid, key_padding_mask=key_padding_mask)
            x = self.norm1(x + self.dropout(mixed))
            return x if self.mlp is None else self.norm2(x + self.dropout(self.mlp(x)))
        source = context if self.norm_context is None or context is None else self.norm_context(context)
        mixed = self.attention(self.norm1(x), source, grid=grid, key_padding_mask=key_padding_mask)
        x = x + self.dropout(mixed)
        return x if self.mlp is None else x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Causal self attention, attention to the encoder's memory, then a network; see :class:`Block`.

    The memory is read as it is: the encoder ends with a norm.
    """

    def __init__(
        self,
        width: int,
        own: Attention,
        cross: Attention,
        ratio: int = 4,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        dropout: float = 0.0,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = own, cross
        self.mlp = network(width, ratio, activation)
        self.dropout = nn.Dropout(dropout)
        self.post_norm = post_norm

    def forward(self, x: Tensor, memory: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C), (B, M, C) → (B, N, C); ``key_padding_mask`` (B, M) is True where memory is padding."""
        layers: tuple[Callable[[Tensor], Tensor], ...] = (
            self.own,
            lambda h: self.cross(h, memory, key_padding_mask=key_padding_mask),
            self.mlp,
        )
        for norm, layer in zip(self.norms, layers, strict=True):
            if self.post_norm:
                x = norm(x + self.dropout(layer(x)))
            else:
                x = x + self.dropout(layer(norm(x)))
        return x


def sinusoids(
    length: int, width: int, device: torch.device | str | None = None, *, rate: float = 1.0
) -> Tensor:
    """Position table (length, width), width even: sines, then cosines, wavelengths from 2π to 2π·10⁴.

    Attention Is All You Need (arXiv 1706.03762), the halves side by side instead of interleaved. Positions
    are ``rate`` apart, as in Deep Voice 3 (arXiv 1710.07654).
    """
    position = rate * torch.arange(length, device=device, dtype=torch.float32)[:, None]
    exponent = torch.arange(width // 2, device=device, dtype=torch.float32) / max(1, width // 2 - 1)
    angle = position * 10_000.0**-exponent
    return torch.cat((angle.sin(), angle.cos()), -1)


class TokenModel(nn.Module):
    """Tokens to logits: embeddings and positions, blocks, a final norm, a linear head.

    The positions stand outside the attention, so that every mechanism gets them alike. With ``learned`` ones
    inputs may be shorter than ``context``; ``sinusoidal`` ones are defined at every length. ``std`` is the
    standard deviation of the initial embeddings and of either kind of position. A ``tied`` head is the
    embedding itself.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        attentions: list[Attention],
        *,
        outputs: int | None = None,
        ratio: int = 4,
        std: float = 0.1,
        positions: Literal["learned", "sinusoidal"] = "learned",
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = attentions[0].embed_dim
        self.std = std
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(width, attention, ratio, dropout=dropout) for attention in attentions
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary if outputs is None else outputs, bias=False)
        for embedding in (self.token, self.position):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=std)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """Logits (B, N, outputs) at each of ``tokens`` (B, N), or (K, outputs) at the K places ``where``.

        Symbols that share a position, ``tokens`` (B, N, S), are added. ``where`` is a bool mask (B, N).
        """
        features = self.features(self.embed(tokens))
        return self.head(features if where is None else features[where])

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, N, C) of tokens (B, N), or the sums over S symbols of tokens (B, N, S)."""
        embedded: Tensor = self.token(tokens)
        return embedded.sum(2) if tokens.ndim == 3 else embedded

    def features(self, embedded: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """The final features (B, N, C) of tokens that are already embedded; positions are added here.

        ``key_padding_mask`` (B, N) is True where a token is padding.
        """
        length, device = embedded.shape[1], embedded.device
        if self.position is not None:
            x = embedded + self.position(torch.arange(length, device=device))
        else:  # a sine has the RMS 1/√2
            x = embedded + self.std * 2**0.5 * sinusoids(length, embedded.shape[-1], device)
        for block in self.blocks:
            x = block(x, key_padding_mask=key_padding_mask)
        return self.norm(x)
