"""What the causal linear mechanisms share around :func:`attnbench.kernels.linrec`: padding and cost."""

from __future__ import annotations

from torch import Tensor

CHUNK = 64
"""Chunk length L of the chunked recurrence."""


def write_strength(key_padding_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """β (B, H, N) of the recurrence, 0 where a key is padding, which makes that step an identity.

    The features cannot be zeroed before the feature map, because φ(0) need not be 0.
    """
    if key_padding_mask is None:
        return None
    return (~key_padding_mask).to(k.dtype).unsqueeze(1).expand(k.shape[:3])


def chunked_flops(n: int, dk: int, dv: int) -> int:
    """FLOPs of the ``add`` recurrence over n steps of one head: 2L(Dk + Dv) + 4·Dk·Dv a step.

    L is n or :data:`CHUNK` if that is less; the last chunk is computed whole.
    """
    length = min(CHUNK, n)
    steps = -(-n // length) * length
    return steps * (2 * length * (dk + dv) + 4 * dk * dv)


def state_bytes(n: int, dk: int, dv: int) -> int:
    """Bytes of the fp32 states of one head at the starts of its chunks."""
    return -(-n // CHUNK) * dk * dv * 4
