"""Third-order softmax attention: every query attends over all pairs of keys of two sets."""

from __future__ import annotations

# by name: importing the backend module tensor3.torch rebinds the name `torch` in this package
from torch import Tensor
from torch import bool as bool_dtype

from attnbench.kernels.backends import Op

OP = Op(
    "tensor3",
    {
        "reference": "attnbench.kernels.tensor3.reference:tensor3",
        "torch": "attnbench.kernels.tensor3.torch:tensor3",
        "triton": "attnbench.kernels.tensor3.triton:tensor3",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def tensor3(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend over pairs: s_ijl = scale·Σ_d q_id k1_jd k2_ld, o_i = Σ_jl softmax_jl(s)_ijl · v1_j ∘ v2_l.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        k1: (B, H, M1, D).
        k2: (B, H, M2, D).
        v1: (B, H, M1, Dv); Dv may differ from D.
        v2: (B, H, M2, Dv).
        causal: query i sees the pairs with j ≤ i + M1 − N and l ≤ i + M2 − N.
        scale: multiplier of the scores, 1/D by default.
        mask1: bool, broadcastable to (B, M1); True removes a key of the first set.
        mask2: bool, broadcastable to (B, M2); True removes a key of the second set.
        backend: ``auto``, or one of ``OPS["tensor3"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of q, and lse (B, H, N) in fp32 (fp64 for fp64 inputs), the natural
        log-sum-exp over the visible pairs. A query that sees no pair has o = 0, lse = −inf and zero
        gradients. Both are differentiable in q, k1, k2, v1 and v2.

    Raises:
        ValueError: shapes that do not match, or masks that are not bool.
        Unsupported: the backend cannot serve a shape or a dtype.

    Cost: 2·B·H·N·M1·M2·(D + Dv) FLOPs forward, cubic in the length; ``triton`` holds no N×M1×M2 scores.
    Source: Alman and Song, Generalizing Matrix Softmax Attention to Kronecker Computation (arXiv 2310.04064).
    """
    b, h, _, d = q.shape
    for number, k, v in ((1, k1, v1), (2, k2, v2)):
        if k.shape != (b, h, k.shape[2], d) or v.shape != (*k.shape[:3], v1.shape[3]):
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(
                f"q, k{number}, v{number}: observed {shapes}, expected (B, H, N, D), (B, H, M, D), "
                "(B, H, M, Dv)"
            )
    return OP.run(
        backend,
        q,
        k1,
        k2,
        v1,
        v2,
        causal=causal,
        scale=1.0 / d if scale is None else scale,
        mask1=_expanded("mask1", mask1, b, k1.shape[2]),
        mask2=_expanded("mask2", mask2, b, k2.shape[2]),
    )


def _expanded(name: str, mask: Tensor | None, b: int, m: int) -> Tensor | None:
    if mask is not None and mask.dtype is not bool_dtype:
        raise ValueError(f"{name}: observed {mask.dtype}, expected torch.bool, True for a key to remove")
    return None if mask is None else mask.expand(b, m)
