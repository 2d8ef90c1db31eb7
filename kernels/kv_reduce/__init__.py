"""Noncausal linear attention: one reduction over the keys, one small product per query."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attnbench.kernels.backends import Op

FeatureMap = Literal["identity", "elu1", "relu", "squared_relu", "exp"]

OP = Op(
    "kv_reduce",
    {
        "reference": "attnbench.kernels.kv_reduce.reference:kv_reduce",
        "torch": "attnbench.kernels.kv_reduce.torch:kv_reduce",
        "triton": "attnbench.kernels.kv_reduce.triton:kv_reduce",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def kv_reduce(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "identity",
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
    eps_mode: Literal["add", "max"] = "add",
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear attention o_i = scale·φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ, divided by the row sum when ``normalize``.

    Args:
        q: (B, H, N, Dk), fp16, bf16 or fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k: (B, H, M, Dk).
        v: (B, H, M, Dv).
        feature_map: φ, elementwise: ``identity``; ``elu1`` u + 1 for u > 0, else e^u; ``relu``;
            ``squared_relu``; ``exp``.
        scale: multiplier of the output; cancels, and is ignored, when ``normalize``.
        normalize: divide by den_i = φ(q_i)·Σ_j φ(k_j): by den + eps (``eps_mode="add"``) or by
            max(den, eps) (``"max"``).
        eps: guard of the denominator.
        key_mask: (B, M) bool, True removes a key: its *feature* is zeroed, since φ(0) need not be 0.
        backend: ``auto``, or one of ``OPS["kv_reduce"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q; sums are accumulated in fp32 (fp64 for fp64 inputs).

    Raises:
        Unsupported: the backend cannot serve a shape or a dtype.

    Cost: 2·B·H·(N + M)·Dk·Dv FLOPs forward; B·H·Dk·(Dv + 1)·4 bytes for the sums.
    Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236).
    """
    return OP.run(
        backend,
        q,
        k,
        v,
        feature_map=feature_map,
        scale=scale,
        normalize=normalize,
        eps=eps,
        eps_mode=eps_mode,
        key_mask=key_mask,
    )
