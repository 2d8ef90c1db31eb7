"""Selective scan of Mamba-1: a small diagonal state per channel, with gates, scan orders and a local reverse.

A scan order is a permutation that is applied where tokens are read and written, never to a copy of them;
scans in several directions are one call.
"""

from __future__ import annotations

from torch import Tensor

from attnbench.kernels.backends import Op

OP = Op(
    "selective_scan",
    {
        "reference": "attnbench.kernels.selective_scan.reference:selective_scan",
        "torch": "attnbench.kernels.selective_scan.torch:selective_scan",
        "triton": "attnbench.kernels.selective_scan.triton:selective_scan",
        "mamba_ssm": "attnbench.kernels.selective_scan.peers:mamba_ssm",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    order: Tensor | None = None,
    reverse: bool = False,
    segment: int = 1,
    initial_state: Tensor | None = None,
    need_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Scan tokens: h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t u_t b_tᵀ, y_t = h_t c_t + skip ∘ u_t, then y ∘ silu(z).

    Any of u, delta, b, c and z may have a dimension K of directions after the batch, any parameter and the
    order one in front: then K scans run in one call, and what has no such dimension is shared by them.

    Args:
        u: (B, N, E) or (B, K, N, E), fp16, bf16, fp32 (``reference`` and ``torch`` also fp64). Any strides.
        delta: step sizes Δ, as u. Δ = delta + delta_bias, through a softplus if ``delta_softplus``.
        a: (E, Ns) or (K, E, Ns), real: the rates A, ≤ 0 where Δ ≥ 0, or the state grows without bound.
        b: (B, N, Ns) or (B, K, N, Ns): what a token writes.
        c: as b: what a token reads.
        skip: (E,) or (K, E).
        z: as u; multiplies the output by silu(z).
        delta_bias: (E,) or (K, E).
        delta_softplus: Δ = log(1 + exp(delta + delta_bias)).
        order: (N,) or (K, N) integers, a permutation of 0..N−1 that is not checked: step t reads and writes
            token order[t] of every tensor.
        reverse: step t is at order[N − 1 − t].
        segment: with m > 1, steps also receive, inside aligned segments of m steps, what later steps write:
            h_t += a_t x_{t+1}, with x_t = a_t x_{t+1} + Δ_t u_t b_t, a_t = exp(Δ_t A), and x = 0 after the
            last step of a segment.
        initial_state: (B, E, Ns) or (B, K, E, Ns), the state before the first step, 0 by default.
        need_state: return the state after the last step, too (without what segments add).
        backend: ``auto``, or one of ``OPS["selective_scan"].backends``.

    Returns:
        y, (B, K, N, E) if anything but the initial state has directions and (B, N, E) otherwise, in the dtype
        of u; and the final state (B, [K,] E, Ns) in fp32 (fp64 for fp64 inputs), or None. Differentiable in
        every tensor but ``order``.

    Raises:
        ValueError: shapes that do not match, complex rates, or a segment below 1.
        Unsupported: the backend cannot serve a shape, a dtype or an option.

    Cost: 9·B·K·N·E·Ns FLOPs forward; the states are fp32 and never stored per token.
    Source: Gu and Dao, Mamba (arXiv 2312.00752); local reverse: Zhang et al., LBMamba (arXiv 2506.15976).
    """
    tensors = {"u": u, "delta": delta, "b": b, "c": c, "z": z}
    parameters = {"a": a, "skip": skip, "delta_bias": delta_bias, "order": order}
    directed = [x.shape[1] for x in tensors.values() if x is not None and x.dim() == 4]
    directed += [
        x.shape[0] for name, x in parameters.items() if x is not None and x.dim() == (3 if name == "a" else 2)
    ]
    k = max(directed, default=1)
    batch, n, e = u.shape[0], u.shape[-2], u.shape[-1]
    ns = a.shape[-1]
    if a.is_complex():
        raise ValueError(f"a: observed {a.dtype}, expected real rates")
    if segment < 1:
        raise ValueError(f"segment: observed {segment}, expected at least 1")
    y, state = OP.run(
        backend,
        _shaped("u", u, (batch, k, n, e), 1),
        _shaped("delta", delta, (batch, k, n, e), 1),
        _shaped("a", a, (k, e, ns), 0),
        _shaped("b", b, (batch, k, n, ns), 1),
        _shaped("c", c, (batch, k, n, ns), 1),
        skip=_shaped("skip", skip, (k, e), 0),
        z=_shaped("z", z, (batch, k, n, e), 1),
        delta_bias=_shaped("delta_bias", delta_bias, (k, e), 0),
        delta_softplus=delta_softplus,
        order=_shaped("order", order, (k, n), 0),
        reverse=reverse,
        segment=segment,
        initial_state=_shaped("initial_state", initial_state, (batch, k, e, ns), 1),
        need_state=need_state,
    )
    return (y, state) if directed else (y.squeeze(1), None if state is None else state.squeeze(1))


def _shaped(name: str, x: Tensor | None, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """The tensor with its dimension of directions at ``axis``, expanded where it has none."""
    if x is None:
        return None
    alone = shape[:axis] + shape[axis + 1 :]
    if tuple(x.shape) == alone:
        return x.unsqueeze(axis).expand(shape)
    if tuple(x.shape) == (*shape[:axis], 1, *shape[axis + 1 :]) or tuple(x.shape) == shape:
        return x.expand(shape)
    raise ValueError(
        f"{name}: observed {tuple(x.shape)}, expected {alone}, or {shape} for {shape[axis]} scans"
    )
