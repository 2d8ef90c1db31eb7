"""The linear recurrence S_t = decay·S_{t−1} + write that causal linear mechanisms share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from attnbench.kernels.backends import Op, Unsupported
from attnbench.kernels.kv_reduce import FeatureMap

OP = Op(
    "linrec",
    {
        "reference": "attnbench.kernels.linrec.reference:linrec",
        "torch": "attnbench.kernels.linrec.torch:linrec",
        "triton": "attnbench.kernels.linrec.triton:linrec",
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
)


class State(NamedTuple):
    """State of the recurrence after the last step: S (B, H, Dk, Dv) and, when normalised, z (B, H, Dk)."""

    s: Tensor
    z: Tensor | None


def linrec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    rule: Literal["add"] = "add",
    feature_map: FeatureMap = "identity",
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    eps_mode: Literal["add", "max"] = "add",
    initial_state: State | None = None,
    reverse: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """Run S_t = diag(e^g_t) S_{t−1} diag(e^gv_t) + β_t φ(k_t) v_tᵀ and read o_t = scale·S_tᵀ φ(q_t).

    Args:
        q, k: (B, Hg, N, Dk), Hg dividing H: the H/Hg heads of a group share q and k.
        v: (B, H, N, Dv). fp16, bf16 or fp32 (``reference`` and ``torch`` also fp64). Any strides.
        g: log-gate ≤ 0: None, (H,) constant per head (no gradient), (B, H, N) per step, or
            (B, H, N, Dk) per step and key dimension.
        gv: log-gate ≤ 0 over the value dimension, (B, H, N, Dv), or None.
        beta: (B, H, N) multiplier of the write, or None for 1.
        rule: ``add``.
        feature_map: φ of q and k, as in :func:`attnbench.kernels.kv_reduce`.
        scale: multiplier of the output; cancels, and is ignored, when ``normalize``.
        normalize: divide o_t by den_t = φ(q_t)·z_t, z_t = diag(e^g_t) z_{t−1} + β_t φ(k_t), guarded by
            ``eps`` as ``eps_mode`` says. Needs gv None and features ≥ 0.
        initial_state: S_0 and z_0; zeros by default. Receives gradients.
        reverse: run t = N..1 instead of 1..N, by index arithmetic.
        chunk: chunk length L of the chunked form; changes rounding only.
        backend: ``auto``, or one of ``OPS["linrec"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of v and the final :class:`State` in fp32 (fp64 for fp64 inputs).

    Raises:
        Unsupported: the backend cannot serve a gate, a shape or a dtype; ``normalize`` with ``gv``.

    Cost: per token and head 2L(Dk + Dv) + 4·Dk·Dv FLOPs forward; B·H·⌈N/L⌉·Dk·Dv·4 bytes of chunk states.
    Source: Katharopoulos et al. (arXiv 2006.16236); Yang et al., GLA (arXiv 2312.06635), chunked form.
    """
    if normalize and gv is not None:
        raise Unsupported("linrec with normalize", "gv given", "gv None: z has no value dimension to decay")
    return OP.run(
        backend,
        q,
        k,
        v,
        g=g,
        gv=gv,
        beta=beta,
        rule=rule,
        feature_map=feature_map,
        scale=scale,
        normalize=normalize,
        eps=eps,
        eps_mode=eps_mode,
        initial_state=initial_state,
        reverse=reverse,
        chunk=chunk,
    )
