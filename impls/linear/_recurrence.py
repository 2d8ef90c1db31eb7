"""What the linear mechanisms share around :func:`attnbench.kernels.linrec`: padding and cost."""

from __future__ import annotations

from torch import Tensor

CHUNK = 64
"""Chunk length L of the chunked recurrence."""

SUB = 16
"""Steps of a sub-block of a chunk under a vector gate."""


def write_strength(key_padding_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """β (B, H, N) of the recurrence, 0 where a key is padding, which without a gate makes an identity step.

    The features cannot be zeroed before the feature map, because φ(0) need not be 0.
    """
    if key_padding_mask is None:
        return None
    return (~key_padding_mask).to(k.dtype).unsqueeze(1).expand(k.shape[:3])


def held(g: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The log-gate g, 0 where a key is padding: such a step neither writes (β = 0) nor decays.

    g is (H,), constant, which becomes (B, H, N) with a mask; or (B, H, N) or (B, H, N, Dk).
    """
    if key_padding_mask is None:
        return g
    padded = key_padding_mask.unsqueeze(1)
    if g.dim() == 1:
        return g.view(1, -1, 1).expand(padded.shape[0], -1, padded.shape[-1]).masked_fill(padded, 0.0)
    return g.masked_fill(padded if g.dim() == 3 else padded.unsqueeze(-1), 0.0)


def padded_to_chunks(n: int) -> tuple[int, int]:
    """Steps that the chunks of a sequence of n cover, the last one whole, and their length."""
    length = min(CHUNK, n)
    return -(-n // length) * length, length


def chunked_flops(n: int, dk: int, dv: int) -> int:
    """FLOPs of the ``add`` recurrence over n steps of one head: 2L(Dk + Dv) + 4·Dk·Dv a step.

    L is n or :data:`CHUNK` if that is less; the last chunk is computed whole.
    """
    steps, length = padded_to_chunks(n)
    return steps * (2 * length * (dk + dv) + 4 * dk * dv)


def vector_gate_flops(n: int, dk: int, dv: int) -> int:
    """As :func:`chunked_flops` under a gate over Dk, whose scores are computed by sub-blocks.

    Sub-blocks that lie after the query's are left out, so (L + 16)·Dk a step in place of 2·L·Dk.
    """
    steps, length = padded_to_chunks(n)
    sub = min(SUB, length)
    return steps * ((length + sub) * dk + 2 * length * dv + 4 * dk * dv)


def state_bytes(n: int, dk: int, dv: int) -> int:
    """Bytes of the fp32 states of one head at the starts of its chunks."""
    return -(-n // CHUNK) * dk * dv * 4
