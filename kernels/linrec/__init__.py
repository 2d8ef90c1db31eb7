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
        "fla": "attnbench.kernels.linrec.peers:fla",
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
    rule: Literal["add", "delta"] = "add",
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
    """Run S_t = S'_t + β_t φ(k_t) w_tᵀ from S'_t = diag(e^g_t) S_{t−1} diag(e^gv_t); o_t = scale·S_tᵀ φ(q_t).

    The rule says what a step writes: ``add`` w_t = v_t, ``delta`` w_t = v_t − S'_tᵀ φ(k_t), which replaces
    what the state holds at k_t. Under ``delta`` the state stays bounded for |φ(k_t)| ≤ 1 and 0 ≤ β_t ≤ 2;
    beyond, the recurrence itself may diverge, and no backend checks it.

    Args:
        q, k: (B, Hg, N, Dk), Hg dividing H: the H/Hg heads of a group share q and k.
        v: (B, H, N, Dv). fp16, bf16 or fp32 (``reference`` and ``torch`` also fp64). Any strides.
        g: log-gate ≤ 0: None, (H,) constant per head (no gradient), (B, H, N) per step, or
            (B, H, N, Dk) per step and key dimension.
        gv: log-gate ≤ 0 over the value dimension, (B, H, N, Dv), or None.
        beta: (B, H, N) multiplier of the write, or None for 1.
        rule: ``add`` or ``delta``.
        feature_map: φ of q and k, as in :func:`attnbench.kernels.kv_reduce`.
        scale: multiplier of the output; cancels, and is ignored, when ``normalize``.
        normalize: divide o_t by den_t = φ(q_t)·z_t, z_t = diag(e^g_t) z_{t−1} + β_t φ(k_t), guarded by
            ``eps`` as ``eps_mode`` says. Needs rule ``add``, gv None and features ≥ 0.
        initial_state: S_0 and z_0; zeros by default. Receives gradients.
        reverse: run t = N..1 instead of 1..N, by index arithmetic.
        chunk: chunk length L of the chunked form; changes rounding only.
        backend: ``auto``, or one of ``OPS["linrec"].backends``.

    Returns:
        o (B, H, N, Dv) in the dtype of v and the final :class:`State` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not belong together, or an unknown ``rule`` or ``eps_mode``.
        Unsupported: the backend cannot serve a gate, a rule, a shape or a dtype; ``normalize`` with ``gv`` or
            with ``delta``.

    Cost: per token and head 2L(Dk + Dv) + 4·Dk·Dv FLOPs forward; ``delta`` adds 2L(Dk + Dv) + 2·Dk·Dv;
    B·H·⌈N/L⌉·Dk·Dv·4 bytes of chunk states.
    Source: Katharopoulos et al. (arXiv 2006.16236); Yang et al., GLA (arXiv 2312.06635), chunked form, and
    DeltaNet (arXiv 2406.06484), chunked delta rule; Gated DeltaNet (arXiv 2412.06464).
    """
    _validate(q, k, v, g, gv, beta, rule, eps_mode, initial_state)
    if normalize and gv is not None:
        raise Unsupported("linrec with normalize", "gv given", "gv None: z has no value dimension to decay")
    if normalize and rule == "delta":
        raise Unsupported(
            "linrec with normalize", "rule 'delta'", "'add': delta writes are not positive sums"
        )
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


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    rule: str,
    eps_mode: str,
    initial_state: State | None,
) -> None:
    """Raise ValueError for shapes and names that define no recurrence."""
    for what, observed, known in (("rule", rule, ("add", "delta")), ("eps_mode", eps_mode, ("add", "max"))):
        if observed not in known:
            raise ValueError(
                f"linrec {what}: observed {observed!r}, expected {' or '.join(map(repr, known))}"
            )
    if v.dim() != 4 or q.dim() != 4:
        raise ValueError(
            f"linrec q, v: observed {q.dim()} and {v.dim()} dimensions, expected 4: (B, H, N, D)"
        )
    b, h, n, dv = v.shape
    dk = q.shape[-1]
    if h % q.shape[1]:
        raise ValueError(f"linrec heads: observed {h} of v and {q.shape[1]} of q, expected q's to divide v's")
    expected: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "q": (q, ((b, q.shape[1], n, dk),)),
        "k": (k, ((b, q.shape[1], n, dk),)),
        "g": (g, ((h,), (b, h, n), (b, h, n, dk))),
        "gv": (gv, ((b, h, n, dv),)),
        "beta": (beta, ((b, h, n),)),
    }
    if initial_state is not None:
        expected |= {"S_0": (initial_state.s, ((b, h, dk, dv),)), "z_0": (initial_state.z, ((b, h, dk),))}
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"linrec {name}: observed shape {tuple(tensor.shape)}, expected {wanted}")
