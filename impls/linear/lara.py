"""LARA: randomized attention whose samples come from R landmark proposals, combined by importance weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.linear._segments import segment_means
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import flash

SMALLEST_WEIGHT = 1e-8
"""Lower bound of a combination weight before its logarithm, as upstream has it."""


class _Samples(NamedTuple):
    """Landmarks of a call: proposal means μ, samples w, query means q̄ (B, H, R, D); live (B, R) or None."""

    mu: Tensor
    w: Tensor
    mean_q: Tensor
    live: Tensor | None


class Lara(Attention):
    """R landmarks attend to the keys, the queries attend to the landmarks with importance weights.

    With l(u, w) = s w·u − s|u|²/2 and s = 1/√D, landmark r has mean μ_r = q̄_r + k̄_r and sample
    w_r = μ_r (+ N(0, I) in training). It reads κ_r = Σ_j softmax_j(l(k_j, w_r)) v_j with mass
    Z_r = logsumexp_j l(k_j, w_r); query i weights it by softmax_r(a_ir + s w_r·q_i + Z_r − d_r).
    """

    spec = Spec(
        id="lara",
        name="LARA",
        family="linear",
        kind="core",
        paper=Paper(
            "Linear Complexity Randomized Self-attention Mechanism",
            2022,
            arxiv="2204.04667",
            venue="ICML 2022",
        ),
        upstream="https://github.com/HKUNLP/efficient-attention",
        patterns=(Pattern.NS, Pattern.NC),
        summary="Importance sampling of randomized attention with one Gaussian proposal per landmark.",
        formula="o_i = Σ_r softmax_r(a_ir + l(q_i, w_r) + Z_r − d_r) κ_r, "
        "κ_r = Σ_j softmax_j(l(k_j, w_r)) v_j",
        cost="about 4·H·(N + M)·R·D FLOPs, 2·H·N·R·D more with mis_opt, and H·R·(2·D + 2·N)·4 bytes",
        stochastic=True,
        query_separable=False,
        permutation_invariant=False,
        grid_ranks=(1, 2),
        ops=("flash",),
        hyper=(
            Hyper("num_landmarks", 16, "landmarks R; a square number for the pooled proposals", cab=16),
            Hyper(
                "proposal",
                "adaptive_1d",
                "landmarks: seg_means, means of segments; adaptive_1d, the same of Linear + LayerNorm of the "
                "tokens; pool, Linear + LayerNorm of a √R×√R average pool of the grid; pool_mixed, then "
                "softmax-mixed keys",
                choices=("seg_means", "adaptive_1d", "pool", "pool_mixed"),
                cab="seg_means",
            ),
            Hyper(
                "weighting",
                "mis_opt",
                "combination weights: mis_opt, optimal multiple importance sampling; mis_bh, balance "
                "heuristic",
                choices=("mis_opt", "mis_bh"),
            ),
            Hyper("alpha", 1.0, "strength of the query-dependent correction of mis_opt"),
            Hyper("antithetic", False, "in training, two samples μ ± noise per landmark"),
            Hyper("seed", 0, "seed of the noise in training"),
            Hyper(
                "variant",
                "paper",
                "cab: a_ir = s μ_r·q_i and d_r = l(μ_r, w_r) in place of the multiple importance weights",
                choices=("paper", "cab"),
            ),
        ),
        deviations=(
            "Cross attention: queries and keys are pooled to the same number of landmarks; upstream has self "
            "attention only.",
            "The noise is N(0, I), as upstream has it; with the scale s inside l the variance that makes the "
            "estimator consistent would be 1/s.",
            "The default proposal is upstream's for sequences; upstream's for images is pool.",
            "Padding is left out of the landmarks and of the softmax over queries; upstream averages zeros "
            "in.",
        ),
        test_hyper={"num_landmarks": 4},
        confidence="medium",
    )

    def setup(self) -> None:
        """Create the landmark projections, shared by the heads, of the proposals that have them."""
        self.draws = 0
        if self._pools:
            if self.pattern.cross:
                raise UsageError(
                    f"lara under NC: observed proposal={self.hp.proposal!r}, expected seg_means or "
                    "adaptive_1d: the keys of another sequence have no grid"
                )
            if math.isqrt(self.hp.num_landmarks) ** 2 != self.hp.num_landmarks:
                raise UsageError(
                    f"lara: observed num_landmarks={self.hp.num_landmarks}, expected a square number "
                    f"for proposal={self.hp.proposal!r}"
                )
        if self.hp.proposal != "seg_means":
            d = self.head_dim
            self.landmark_q = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))
            self.landmark_k = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))

    @property
    def scale(self) -> float:
        """Multiplier of the scores, s = 1/√D."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def _pools(self) -> bool:
        return bool(self.hp.proposal.startswith("pool"))

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
        """Landmark attention of q (B, H, N, D) over k, v (B, H, M, ·); ``grid`` for the pooled proposals."""
        marks = self._sample(*self._landmarks(q, k, grid, key_padding_mask))
        kappa, mass = self._read_keys(marks.w, k, v, key_padding_mask)
        keys, density, bias = self._weighting(q, marks, key_padding_mask)
        key_bias = mass - density
        if marks.live is not None:
            key_bias = key_bias.masked_fill(~marks.live.unsqueeze(1), -torch.inf)
        o, _ = flash(
            q,
            keys,
            kappa,
            scale=self.scale,
            key_bias=key_bias,
            bias=bias,
            need_lse=False,
            backend=self.backend,
        )
        return o

    def _read_keys(self, w: Tensor, k: Tensor, v: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """κ (B, H, R, Dv) and Z (B, H, R): the samples as queries, −s|k_j|²/2 as the bias of key j."""
        wide = torch.promote_types(k.dtype, torch.float32)
        key_bias = -0.5 * self.scale * k.to(wide).square().sum(-1)
        if padded is not None:
            key_bias = key_bias.masked_fill(padded.unsqueeze(1), -torch.inf)
        kappa, mass = flash(w, k, v, scale=self.scale, key_bias=key_bias, backend=self.backend)
        assert mass is not None  # need_lse is True
        return kappa, mass

    # ---- landmarks -------------------------------------------------------------------------------------

    def _landmarks(
        self, q: Tensor, k: Tensor, grid: Grid, padded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q̄ and k̄ (B, H, R, D), and which landmarks have a token (B, R) when there is padding."""
        if self._pools:
            return self._pooled_landmarks(q, k, grid, padded)
        count = min(self.hp.num_landmarks, q.shape[2], k.shape[2])
        if self.hp.proposal == "adaptive_1d":
            q, k = self.landmark_q(q), self.landmark_k(k)
        mean_q, _ = segment_means(q, count, None if self.pattern.cross else padded)
        mean_k, live = segment_means(k, count, padded)
        return mean_q, mean_k, live

    def _pooled_landmarks(
        self, q: Tensor, k: Tensor, grid: Grid, padded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if grid is None or len(grid) != 2 or math.prod(grid) != q.shape[2]:
            raise UsageError(
                f"lara: proposal={self.hp.proposal!r} observed grid {grid} for {q.shape[2]} tokens, "
                "expected (Gh, Gw) with Gh·Gw tokens; use adaptive_1d for a sequence"
            )
        side = math.isqrt(self.hp.num_landmarks)
        shape = (min(side, grid[0]), min(side, grid[1]))
        mean_q, live = _pool(q, (grid[0], grid[1]), shape, padded)
        mean_k, _ = _pool(k, (grid[0], grid[1]), shape, padded)
        mean_q, mean_k = self.landmark_q(mean_q), self.landmark_k(mean_k)
        if self.hp.proposal == "pool_mixed":
            scores = self.scale * mean_k @ mean_k.transpose(-1, -2)
            mean_k = _without_dead(scores, live).softmax(-1) @ mean_k
        return mean_q, mean_k, live

    def _sample(self, mean_q: Tensor, mean_k: Tensor, live: Tensor | None) -> _Samples:
        """One sample per landmark: w = μ in evaluation, μ + noise in training; two when antithetic."""
        mu = mean_q + mean_k
        if not self.training:
            return _Samples(mu, mu, mean_q, live)
        generator = torch.Generator(mu.device).manual_seed(self.hp.seed + self.draws)
        self.draws += 1
        noise = torch.randn(mu.shape, generator=generator, device=mu.device).to(mu.dtype)
        if not self.hp.antithetic:
            return _Samples(mu, mu + noise, mean_q, live)
        return _Samples(
            mu=torch.cat((mu, mu), 2),
            w=torch.cat((mu + noise, mu - noise), 2),
            mean_q=torch.cat((mean_q, mean_q), 2),
            live=None if live is None else torch.cat((live, live), 1),
        )

    # ---- importance weights ----------------------------------------------------------------------------

    def _weighting(
        self, q: Tensor, marks: _Samples, padded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Landmark keys whose products with q are the linear part, d (B, H, R), and a (B, H, N, R) if any.

        The terms −s|q_i|²/2 of l(q_i, w_r) are left out: they cancel in the softmax over r.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        mu, w = marks.mu.to(wide), marks.w.to(wide)
        norms = mu.square().sum(-1).unsqueeze(-2)
        # log-density of sample r (rows) under proposal r' (columns), l(μ_r', w_r)
        proposals = self.scale * (w @ mu.transpose(-1, -2) - 0.5 * norms)
        own = proposals.diagonal(dim1=-2, dim2=-1)
        if self.hp.variant == "cab":
            return marks.w + marks.mu, own, None
        mixture = _without_dead(proposals, marks.live).logsumexp(-1)
        if self.hp.weighting == "mis_bh":
            return marks.w, mixture, None
        # own ≤ mixture, except for a landmark without a token, which is removed later but must stay finite
        balance = torch.exp((own - mixture).clamp_max(0.0))
        bias = self._log_weights(q, marks, balance, None if self.pattern.cross else padded)
        return marks.w, own, bias

    def _log_weights(self, q: Tensor, marks: _Samples, balance: Tensor, padded: Tensor | None) -> Tensor:
        """Logarithm of the combination weights of mis_opt, (B, H, N, R), at least in fp32.

        The balance heuristic (B, H, R), corrected by how much more than the average landmark each one is
        preferred by a query: t_ir = softmax over the queries i of s q̄_r·q_i.
        """
        scores = (self.scale * q @ marks.mean_q.transpose(-1, -2)).to(balance.dtype)
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, :, None], torch.finfo(scores.dtype).min)
        preference = scores.softmax(-2)
        if marks.live is None:
            average = preference.mean(-1, keepdim=True)
        else:
            alive = marks.live[:, None, None, :]
            total = preference.masked_fill(~alive, 0.0).sum(-1, keepdim=True)
            average = total / alive.sum(-1, keepdim=True).clamp_min(1)
        weights = balance.unsqueeze(-2) + self.hp.alpha * (preference - average)
        return weights.clamp_min(SMALLEST_WEIGHT).log()

    # ---- cost ------------------------------------------------------------------------------------------

    def flops(self, n: int, m: int) -> int:
        """In evaluation: the landmarks, their attention to the keys, the weights, the queries' attention."""
        d = self.head_dim
        r = min(self.hp.num_landmarks, n, m)
        per_head = 4 * (n + m) * r * d + 2 * r * r * d
        if self.hp.variant == "paper" and self.hp.weighting == "mis_opt":
            per_head += 2 * n * r * d
        if self.hp.proposal == "adaptive_1d":
            per_head += 2 * (n + m) * d * d
        elif self._pools:
            per_head += 4 * r * d * d + (4 * r * r * d if self.hp.proposal == "pool_mixed" else 0)
        return self.num_heads * per_head

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Landmarks and, with mis_opt, the fp32 weights of every query and their logarithms."""
        r = min(self.hp.num_landmarks, n, m)
        weighted = self.hp.variant == "paper" and self.hp.weighting == "mis_opt"
        return self.num_heads * r * (4 * self.head_dim * itemsize + (2 * n * 4 if weighted else 0))


def _without_dead(scores: Tensor, live: Tensor | None) -> Tensor:
    """Scores (B, H, R, R) without the columns of landmarks that have no token."""
    if live is None:
        return scores
    return scores.masked_fill(~live[:, None, None, :], torch.finfo(scores.dtype).min)


def _pool(
    u: Tensor, grid: tuple[int, int], shape: tuple[int, int], padded: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Adaptive average pool of u (B, H, N, D) on its grid to (B, H, R, D), over the tokens not padded."""
    b, h, _, d = u.shape
    kept = u if padded is None else u.masked_fill(padded[:, None, :, None], 0.0)
    planes = kept.transpose(-1, -2).reshape(b, h * d, *grid)
    means = F.adaptive_avg_pool2d(planes, shape).reshape(b, h, d, -1).transpose(-1, -2)
    if padded is None:
        return means, None
    present = (~padded).to(means.dtype).reshape(b, 1, *grid)
    share = F.adaptive_avg_pool2d(present, shape).reshape(b, 1, -1, 1)
    return means / share.clamp_min(torch.finfo(share.dtype).tiny), share.reshape(b, -1) > 0
