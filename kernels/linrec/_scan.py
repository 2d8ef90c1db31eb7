"""States at the chunk boundaries from what every chunk writes, for the eager form of the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbench.kernels.linrec._decays import between

FAN = 16
"""Chunks, or groups of chunks, that one product joins: log_FAN(NT) levels of 2·FAN·Dk·Dv FLOPs a chunk."""


def scan(writes: Tensor, gates: Tensor | None, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """State before every chunk, in the order of time, and after the last: (…, NT, Dk, X) and (…, Dk, X).

    ``writes`` (…, NT, Dk, X) is what each chunk adds; ``gates`` the log-decay over each, (…, NT), or None for
    no decay; ``initial`` (…, Dk, X) the state before the first. ``reverse`` begins with the last chunk.
    """
    flat, start = writes.flatten(-2), initial.flatten(-2)
    if reverse:
        flat = flat.flip(-2)
        gates = None if gates is None else gates.flip(-1)
    if gates is None:
        states = torch.cat((start.unsqueeze(-2), flat), -2).cumsum(-2)
        before, final = states[..., :-1, :], states[..., -1, :]
    else:
        before, final = _levels(flat, gates.expand(flat.shape[:-1]), start)
    if reverse:
        before = before.flip(-2)
    shape = writes.shape[-2:]
    return before.unflatten(-1, shape), final.unflatten(-1, shape)


def _levels(writes: Tensor, gates: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The scan over (…, NT, E): inside groups of FAN by one product, over the groups by itself."""
    n = writes.shape[-2]
    if n == 1:
        final = gates.exp() * initial + writes.squeeze(-2)
        return initial.unsqueeze(-2), final
    if n <= FAN:
        states = between(gates).mT @ torch.cat((initial.unsqueeze(-2), writes), -2)
        return states[..., :-1, :], states[..., -1, :]
    grouped = F.pad(writes, (0, 0, 0, -n % FAN)).unflatten(-2, (-1, FAN))
    decay = between(F.pad(gates, (0, -n % FAN)).unflatten(-1, (-1, FAN)))
    inside = decay[..., 1:, :].mT @ grouped
    group_gates = F.pad(gates, (0, -n % FAN)).unflatten(-1, (-1, FAN)).sum(-1)
    starts, final = _levels(inside[..., -1, :], group_gates, initial)
    states = inside[..., :-1, :] + decay[..., 0, :-1].unsqueeze(-1) * starts.unsqueeze(-2)
    return states.flatten(-3, -2)[..., :n, :], final


def scan_by_steps(writes: Tensor, factors: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As :func:`scan`, with decay ``factors`` broadcastable to (…, NT, Dk, X): one chunk after another."""
    n = writes.shape[-3]
    factors = factors.expand(*factors.shape[:-3], n, *factors.shape[-2:])
    state = initial
    before = [state] * n
    for c in reversed(range(n)) if reverse else range(n):
        before[c] = state
        state = factors[..., c, :, :] * state + writes[..., c, :, :]
    return torch.stack(before, -3), state


def delta_scan(
    u: Tensor, w: Tensor, k: Tensor, factors: Tensor | None, initial: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Under the delta rule, states S before every chunk, what each writes, u − w S, and the final state.

    u (…, NT, L, Dv); w and k, the keys decayed to the end of their chunk, (…, NT, L, Dk); decay ``factors``
    (…, NT, 1 or Dk, 1) or None.
    """
    n = u.shape[-3]
    if factors is not None:
        factors = factors.expand(*factors.shape[:-3], n, *factors.shape[-2:])
    state = initial.expand(*torch.broadcast_shapes(initial.shape[:-2], u.shape[:-3]), *initial.shape[-2:])
    before, written = [state] * n, [state] * n
    for c in reversed(range(n)) if reverse else range(n):
        before[c] = state
        written[c] = u[..., c, :, :] - w[..., c, :, :] @ state
        update = k[..., c, :, :].mT @ written[c]
        state = update + (state if factors is None else factors[..., c, :, :] * state)
    return torch.stack(before, -3), torch.stack(written, -3), state
