"""cosFormer: relu features re-weighted by the cosine of the distance, which factorises over positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.linear._recurrence import CHUNK, chunked_flops, state_bytes, write_strength
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import kv_reduce, linrec
from attnbench.kernels.features import feature


class CosFormer(Attention):
    """Linear attention with weights relu(q_i)·relu(k_j)·cos(π(i − j)/2m) on one position scale m."""

    spec = Spec(
        id="cosformer",
        name="cosFormer",
        family="linear",
        kind="core",
        paper=Paper(
            "cosFormer: Rethinking Softmax in Attention", 2022, arxiv="2202.08791", venue="ICLR 2022"
        ),
        upstream="https://github.com/OpenNLPLab/cosFormer",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Linear attention with relu features whose weights fall with the cosine of the distance.",
        formula="o_i = Σ_j w_ij v_j / max(Σ_j w_ij, ε), w_ij = relu(q_i)·relu(k_j)·cos(π(i − j)/2m), "
        "m = max(N, M) or a constant; CS: sums over j ≤ i",
        cost="4·H·(N + M)·D² FLOPs and 2·H·D·(D + 1)·4 bytes; CS: H·N·(6·L·D + 8·D²) FLOPs with chunks of L",
        row_sum="at_most_one",
        permutation_invariant=False,
        ops={
            Pattern.NS: ("kv_reduce",),
            Pattern.CS: ("linrec",),
            Pattern.NC: ("kv_reduce",),
            Pattern.CC: ("kv_reduce",),
        },
        hyper=(
            Hyper("eps", 1e-6, "lower bound of the denominator; a query with relu(q) = 0 gives 0"),
            Hyper("act", "relu", "feature map before the cosine", choices=("relu", "elu1")),
            Hyper("max_len", None, "position scale m; None: max(N, M), not available in the causal patterns"),
        ),
        deviations=(
            "CS and CC need a constant m (max_len): with m = max(N, M) one more token changes past outputs.",
            "Padded keys are removed; upstream ignores the key padding mask.",
            "The activation elu + 1 is available; upstream's spelling of it raises.",
        ),
        flops_backend="torch",
        test_hyper={"max_len": 64},
    )

    def setup(self) -> None:
        """Check that a causal pattern has its constant position scale."""
        if self.pattern.causal and self.hp.max_len is None:
            raise UsageError(
                f"cosformer under {self.pattern}: observed no max_len, expected the largest length: "
                "the cosine needs a position scale that does not change with the length"
            )

    @classmethod
    def for_length(cls, n: int, m: int) -> dict[str, Any]:
        """The position scale of the definition, max(N, M)."""
        return {"max_len": max(n, m)}

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
        """Linear attention on the features [φ sin θ ; φ cos θ], θ_i = πi/2m; UsageError beyond max_len."""
        longest = max(q.shape[2], k.shape[2])
        scale = longest if self.hp.max_len is None else self.hp.max_len
        if longest > scale:
            raise UsageError(
                f"cosformer: observed length {longest}, expected at most max_len={scale}: "
                "beyond it the cosine is negative"
            )
        fq, fk = self._features(q, scale), self._features(k, scale)
        if self.pattern is Pattern.CS:
            beta = write_strength(key_padding_mask, k)
            o, _ = linrec(
                fq,
                fk,
                v,
                beta=beta,
                normalize=True,
                eps=self.hp.eps,
                eps_mode="max",
                chunk=CHUNK,
                backend=self.backend,
            )
            return o
        return kv_reduce(
            fq, fk, v, eps=self.hp.eps, eps_mode="max", key_mask=key_padding_mask, backend=self.backend
        )

    def _features(self, u: Tensor, scale: int) -> Tensor:
        """Features (B, H, N, 2D) of u (B, H, N, D), in the dtype of u; positions count from 1."""
        wide = torch.promote_types(u.dtype, torch.float32)
        position = torch.arange(1, u.shape[2] + 1, device=u.device, dtype=wide)
        theta = (0.5 * math.pi / scale * position).unsqueeze(-1)
        phi = feature(u, self.hp.act)
        return torch.cat((phi * theta.sin(), phi * theta.cos()), -1).to(u.dtype)

    def flops(self, n: int, m: int) -> int:
        """Those of linear attention with 2D features."""
        d = self.head_dim
        if self.pattern is Pattern.CS:
            return self.num_heads * chunked_flops(n, 2 * d, d)
        return 4 * self.num_heads * (n + m) * d * d

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The features and the fp32 sums; under CS one sum per chunk."""
        d = self.head_dim
        features = 2 * (n + m) * d * itemsize
        sums = state_bytes(n, 2 * d, d + 1) if self.pattern is Pattern.CS else 2 * d * (d + 1) * 4
        return self.num_heads * (features + sums)
