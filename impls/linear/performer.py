"""Performer: positive orthogonal random features (FAVOR+) that estimate the softmax kernel without bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, state_bytes, write_strength
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import kv_reduce, linrec

RELU_OFFSET = 1e-3
"""Added to relu features, so that no query loses all its keys."""


def random_rows(heads: int, count: int, dim: int, generator: torch.Generator, *, ortho: bool) -> Tensor:
    """Random directions W (heads, count, dim) in fp32, each row distributed as N(0, I).

    With ``ortho`` the rows of every block of ``dim`` are orthogonal: rows of a Haar-distributed matrix,
    each scaled by the norm of an independent Gaussian vector. Lies on the device of ``generator``.
    """
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    rows = torch.randn(heads, count, dim, **options)
    if not ortho:
        return rows
    blocks = -(-count // dim)
    basis, upper = torch.linalg.qr(torch.randn(heads, blocks, dim, dim, **options))
    # without the signs of R's diagonal Q is not Haar-distributed, and the estimate of the kernel is biased
    basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return basis.transpose(-1, -2).flatten(1, 2)[:, :count] * rows.norm(dim=-1, keepdim=True)


class Performer(Attention):
    """Linear attention with features exp(W u − |u|²/2) whose products average to exp(q·k/√D)."""

    spec = Spec(
        id="performer",
        name="Performer (FAVOR+)",
        family="linear",
        kind="core",
        paper=Paper("Rethinking Attention with Performers", 2021, arxiv="2009.14794", venue="ICLR 2021"),
        upstream="https://github.com/google-research/google-research/tree/master/performer",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Estimates softmax attention with m positive random features per query and key.",
        formula="o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / max(φ(q_i)·Σ_j φ(k_j), δ), "
        "φ(u) = m^-½ (exp(W ũ − |ũ|²/2 − c) + ε), ũ = D^-¼ u; CS: sums over j ≤ i",
        cost="4·H·(N + M)·m·D FLOPs and H·m·(D + 1)·4 bytes beside the features",
        ops={
            Pattern.NS: ("kv_reduce",),
            Pattern.CS: ("linrec",),
            Pattern.NC: ("kv_reduce",),
            Pattern.CC: ("kv_reduce",),
        },
        hyper=(
            Hyper("num_features", 256, "random features m", cab=16),
            Hyper("eps", 1e-6, "ε, added to every feature; 0 under CS"),
            Hyper("delta", 1e-30, "δ, lower bound of the denominator"),
            Hyper("ortho", True, "orthogonal blocks of rows in W instead of independent rows"),
            Hyper(
                "redraw",
                "never",
                "when W is drawn anew: in training, before every forward, or never",
                choices=("never", "every_forward"),
            ),
            Hyper(
                "features",
                "softmax",
                "softmax: FAVOR+; relu: m^-½ relu(W ũ) + 1e-3, the generalised attention of the paper",
                choices=("softmax", "relu"),
            ),
            Hyper("seed", 0, "seed of W"),
            Hyper(
                "variant",
                "paper",
                "cab: c without the norm term, ε 1e-4, δ 0.1, W of independent rows redrawn at every "
                "training forward; no CS",
                choices=("paper", "cab"),
            ),
        ),
        deviations=(
            "The stabiliser c is the maximum of the whole exponent W ũ − |ũ|²/2 (per query; per head over "
            "all keys), so that the largest feature is 1; upstream leaves the norm out, and the features of "
            "long vectors vanish in ε.",
            "CS: c of the keys is a running maximum that rescales the sums as a gate, and ε = 0: a maximum "
            "over all keys would let the future into past outputs.",
            "δ = 1e-30 guards only against 0/0: a larger bound biases rows whose features are all small.",
            "Q of the QR decomposition is multiplied by the signs of R's diagonal: without them the rows are "
            "not uniform directions.",
        ),
        flops_backend="torch",
        test_hyper={"num_features": 12},
    )

    def setup(self) -> None:
        """Draw W and keep it in the checkpoint, so that a reloaded model computes the same function."""
        if self.hp.variant == "cab":
            if self.pattern is Pattern.CS:
                raise UsageError(
                    "performer under CS: observed variant='cab', expected 'paper': "
                    "CAB has no causal self form"
                )
            self.hp.eps, self.hp.delta, self.hp.redraw = 1e-4, 0.1, "every_forward"
        generator = torch.Generator().manual_seed(self.hp.seed)
        self.draws = 0
        self.directions: Tensor
        self.register_buffer("directions", self._draw(generator, ortho=self.hp.ortho))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Linear attention on random features of q (B, H, N, D) and k (B, H, M, D)."""
        w = self._current_directions(q.device)
        gate = None
        if self.hp.features == "relu":
            fq, fk = self._relu_features(q, w), self._relu_features(k, w)
        elif self.pattern is Pattern.CS:
            fq = self._softmax_features(q, w, (-1,), eps=0.0)
            fk, gate = self._running_features(k, w, key_padding_mask)
        else:
            fq = self._softmax_features(q, w, (-1,), eps=self.hp.eps)
            fk = self._softmax_features(k, w, (-2, -1), eps=self.hp.eps, padded=key_padding_mask)
        # fp16 has not the range of an exponential feature
        work = torch.float32 if q.dtype is torch.float16 else q.dtype
        fq, fk, values = fq.to(work), fk.to(work), v.to(work)
        if self.pattern is Pattern.CS:
            o, _ = linrec(
                fq,
                fk,
                values,
                g=gate,
                beta=write_strength(key_padding_mask, fk),
                normalize=True,
                eps=self.hp.delta,
                eps_mode="max",
                chunk=CHUNK,
                backend=self.backend,
            )
        else:
            o = kv_reduce(
                fq,
                fk,
                values,
                eps=self.hp.delta,
                eps_mode="max",
                key_mask=key_padding_mask,
                backend=self.backend,
            )
        return o.to(q.dtype)

    # ---- features --------------------------------------------------------------------------------------

    def _draw(self, generator: torch.Generator, *, ortho: bool) -> Tensor:
        return random_rows(self.num_heads, self.hp.num_features, self.head_dim, generator, ortho=ortho)

    def _current_directions(self, device: torch.device) -> Tensor:
        """W of this forward: the buffer, or a fresh draw in training under ``redraw``."""
        if not self.training or self.hp.redraw == "never":
            return self.directions
        self.draws += 1
        generator = torch.Generator(device).manual_seed(self.hp.seed + self.draws)
        return self._draw(generator, ortho=self.hp.ortho and self.hp.variant == "paper")

    def _projected(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """W ũ (B, H, N, m) and |ũ|²/2 (B, H, N, 1), at least in fp32."""
        wide = torch.promote_types(u.dtype, torch.float32)
        scaled = u.to(wide) * self.head_dim**-0.25
        return scaled @ w.to(wide).transpose(-1, -2), scaled.square().sum(-1, keepdim=True) / 2

    def _relu_features(self, u: Tensor, w: Tensor) -> Tensor:
        return self._projected(u, w)[0].relu() * self.hp.num_features**-0.5 + RELU_OFFSET

    def _softmax_features(
        self, u: Tensor, w: Tensor, over: tuple[int, ...], *, eps: float, padded: Tensor | None = None
    ) -> Tensor:
        """FAVOR+ features stabilised by a maximum over the dimensions ``over``, a constant for autograd."""
        projected, norm = self._projected(u, w)
        if padded is not None:
            projected = projected.masked_fill(padded[:, None, :, None], torch.finfo(projected.dtype).min / 2)
        exponent = projected - norm
        largest = projected if self.hp.variant == "cab" else exponent
        shift = largest.detach().amax(over, keepdim=True)
        return (torch.exp(exponent - shift) + eps) * self.hp.num_features**-0.5

    def _running_features(self, k: Tensor, w: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Key features exp(l_j − c_j) with c_j = max over the keys up to j, and the gate c_(j−1) − c_j.

        The gate (B, H, N) rescales the sums from the old maximum to the new one: no feature overflows, none
        depends on a later key, and o is what it is with c = 0.
        """
        projected, norm = self._projected(k, w)
        exponent = projected - norm
        if padded is not None:
            exponent = exponent.masked_fill(padded[:, None, :, None], -torch.inf)
        running = exponent.detach().amax(-1).cummax(-1).values
        unseen = running.isneginf()  # only padding so far: the sums are 0 and need no rescaling
        running = running.masked_fill(unseen, 0.0)
        steps = (running[..., :-1] - running[..., 1:]).masked_fill(unseen[..., :-1], 0.0)
        gate = torch.nn.functional.pad(steps, (1, 0))
        return torch.exp(exponent - running.unsqueeze(-1)) * self.hp.num_features**-0.5, gate

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """The projections on W, then linear attention with m features."""
        features, d = self.hp.num_features, self.head_dim
        projections = 2 * (n + m) * features * d
        if self.pattern is Pattern.CS:
            return self.num_heads * (projections + chunked_flops(n, features, d))
        return self.num_heads * (projections + 2 * (n + m) * features * d)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The fp32 features and the fp32 sums; under CS one sum per chunk."""
        features, d = self.hp.num_features, self.head_dim
        causal = self.pattern is Pattern.CS
        sums = state_bytes(n, features, d + 1) if causal else features * (d + 1) * 4
        return self.num_heads * ((n + m) * features * 4 + sums)
