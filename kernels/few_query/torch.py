"""The torch backend of :func:`attnbench.kernels.few_query`: the dense one, whose products cuBLAS splits."""

from __future__ import annotations

from torch import Tensor

from attnbench.kernels.flash import flash


def few_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse with two batched products, or SDPA where only o is wanted; autograd does the rest."""
    return flash(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        key_bias=key_bias,
        bias=bias,
        need_lse=need_lse,
        backend="torch",
    )
