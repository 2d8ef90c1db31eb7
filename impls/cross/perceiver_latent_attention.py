"""Perceiver IO: learned latents read the context and mix among themselves, the queries read the latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.cross._blocks import (
    Read,
    feed_forward,
    feed_forward_flops,
    read_flops,
)
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import padding_bias

INIT_STD = 0.02
ROUNDS = {"io": 1, "resampler": 8}


class _Block(nn.Module):
    """A read with its norms and residual, then a feed-forward with its own.

    ``joint`` reads the context and the reader's own tokens in one softmax; then the context has the reader's
    width, and the reader's tokens one norm for both roles.
    """

    def __init__(
        self, dim: int, context_dim: int, heads: int, hidden: int, *, bias: bool, joint: bool = False
    ) -> None:
        super().__init__()
        self.joint = joint
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(context_dim)
        self.read = Read(dim, context_dim, heads, bias=bias)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), feed_forward(dim, hidden)

    def forward(
        self, x: Tensor, context: Tensor, padded: Tensor | None, backend: str, *, residual: bool = True
    ) -> Tensor:
        query, keys = self.norm(x), self.context_norm(context)
        if self.joint:
            keys = torch.cat((keys, query), 1)
            padded = None if padded is None else F.pad(padded, (0, x.shape[1]), value=False)
        o = self.read(query, keys, key_bias=padding_bias(padded), backend=backend)
        o = x + o if residual else o
        return o + self.ffn(self.ffn_norm(o))


class _Mix(nn.Module):
    """Self attention with one norm for queries and keys, then a feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(dim), Read(dim, dim, heads, bias=bias)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), feed_forward(dim, hidden)

    def forward(self, z: Tensor, backend: str) -> Tensor:
        tokens = self.norm(z)
        z = z + self.read(tokens, tokens, key_bias=None, backend=backend)
        return z + self.ffn(self.ffn_norm(z))


class Perceiver(Attention):
    """Encode: L latents read c. Process: latents read latents. Decode: every x_i reads the latents."""

    spec = Spec(
        id="perceiver_latent_attention",
        name="Perceiver latent attention",
        family="cross",
        kind="mixer",
        paper=Paper(
            "Perceiver IO: A General Architecture for Structured Inputs & Outputs",
            2022,
            arxiv="2107.14795",
            venue="ICLR 2022",
        ),
        upstream="https://github.com/krasserm/perceiver-io; resampler: "
        "https://github.com/tencent-ailab/IP-Adapter",
        patterns=(Pattern.NS, Pattern.NC, Pattern.CC),
        summary="A fixed number of latents stands between context and queries, so that cost is linear in "
        "both.",
        formula="z ← z₀ + MHA(LN z₀; LN c), z ← z + FFN(LN z); p times z ← z + MHA(LN z; LN z), "
        "z ← z + FFN(LN z); o = x + MHA(LN x; LN z), o ← o + FFN(LN o)",
        cost="4·L·(M + N)·C + p·4·L²·C FLOPs and projections of 4·(M + N)·C²; L·C·e bytes",
        row_sum="free",
        linear_in_v=False,
        ops=("few_query",),
        hyper=(
            Hyper("num_latents", 256, "latents L"),
            Hyper("latent_dim", None, "width C_z of the latents; None: the model width"),
            Hyper("self_layers", 1, "self attentions p of the latents after each read of the context"),
            Hyper(
                "rounds",
                None,
                "reads of the context, each followed by the self attentions; None: 1, of the resampler 8",
            ),
            Hyper("cross_heads", None, "heads with which latents read the context; None: the model's"),
            Hyper("widening", 1, "hidden width of the feed-forwards, in widths of their tokens"),
            Hyper("decode_residual", True, "whether x is added to what it reads"),
            Hyper(
                "variant",
                "io",
                "resampler: latents read context and latents in one softmax, in rounds with weights of "
                "their own, without self attention",
                choices=("io", "resampler"),
            ),
        ),
        deviations=(
            "One self attention and L = 256 by default; the papers have 6 to 26 and up to 512.",
            "The variant resampler is decoded by x like the other; its own output is latents().",
            "Perceiver AR, in which the last L tokens are the latents and only those have outputs, is not "
            "the form of CS: it maps N tokens to L.",
        ),
        test_hyper={"num_latents": 4},
    )

    def setup(self) -> None:
        """Create latents, the reads of the context, the self attentions and the decoder."""
        hp, c, bias = self.hp, self.embed_dim, self.bias
        self.rounds = ROUNDS[hp.variant] if hp.rounds is None else hp.rounds
        self.width = c if hp.latent_dim is None else hp.latent_dim
        heads = self.num_heads if hp.cross_heads is None else hp.cross_heads
        self._check(heads)
        width, hidden = self.width, self.width * hp.widening
        self.latent = nn.Parameter(torch.empty(hp.num_latents, width).normal_(std=INIT_STD))
        if hp.variant == "resampler":
            self.enter = nn.Linear(c, width)
            joint = [_Block(width, width, heads, hidden, bias=bias, joint=True) for _ in range(self.rounds)]
            self.encoders, self.mixers = nn.ModuleList(joint), nn.ModuleList()
        else:  # the first read has weights of its own, all others share theirs, as do the self attentions
            reads = [_Block(width, c, heads, hidden, bias=bias) for _ in range(min(self.rounds, 2))]
            mixes = [_Mix(width, self.num_heads, hidden, bias=bias) for _ in range(hp.self_layers)]
            self.encoders, self.mixers = nn.ModuleList(reads), nn.ModuleList(mixes)
        self.decoder = _Block(c, width, self.num_heads, c * hp.widening, bias=bias)

    def _check(self, heads: int) -> None:
        hp = self.hp
        if min(hp.num_latents, self.rounds, hp.widening, heads) < 1 or hp.self_layers < 0:
            raise UsageError(
                f"perceiver_latent_attention: observed num_latents={hp.num_latents}, rounds={self.rounds}, "
                f"widening={hp.widening}, cross_heads={heads}, self_layers={hp.self_layers}, "
                "expected positive numbers, and self_layers of at least 0"
            )
        if self.width % heads or self.width % self.num_heads:
            raise UsageError(
                f"perceiver_latent_attention: observed latent_dim={self.width}, "
                f"expected a multiple of the {heads} and {self.num_heads} heads"
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
        """Every token of x (B, N, C) reads the latents of the context (B, M, C), under NS of x itself."""
        z = self.latents(self.source(x, context), key_padding_mask)
        o: Tensor = self.decoder(x, z, None, self.backend, residual=self.hp.decode_residual)
        return o

    def latents(self, context: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """What the latents know of the context (B, M, C): (B, L, C_z). All that decoding needs of it."""
        z = self.latent.repeat(
            context.shape[0], 1, 1
        )  # no view: FLOP counters cannot follow one of a parameter
        if self.hp.variant == "resampler":
            context = self.enter(context)
        for step in range(self.rounds):
            encoder = self.encoders[min(step, len(self.encoders) - 1)]
            z = encoder(z, context, key_padding_mask, self.backend)
            for mixer in self.mixers:
                z = mixer(z, self.backend)
        return z

    def flops(self, n: int, m: int) -> int:
        """Reads, self attentions and feed-forwards of all rounds, and the decoder."""
        c, width, count = self.embed_dim, self.width, self.hp.num_latents
        ffn = feed_forward_flops(count, width, width * self.hp.widening)
        decode = read_flops(n, count, c, width) + feed_forward_flops(n, c, c * self.hp.widening)
        if self.hp.variant == "resampler":
            read = read_flops(count, m + count, width, width)
            return 2 * m * c * width + self.rounds * (read + ffn) + decode
        mix = read_flops(count, count, width, width) + ffn
        return self.rounds * (read_flops(count, m, width, c) + ffn + self.hp.self_layers * mix) + decode

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Keys and values of the context and of the latents, queries and what they read, and the latents."""
        return itemsize * (2 * m * self.width + 3 * self.hp.num_latents * self.width + 2 * n * self.embed_dim)
