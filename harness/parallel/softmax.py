"""Exact softmax attention over a sequence that is split among ranks, forward and backward.

q, k, v are this rank's part, (B, H or Hkv, N/P, D); the result is this rank's part of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.harness.parallel.collectives import Ranks, gathered, rotate, swapped
from attnbench.harness.parallel.layout import positions
from attnbench.kernels.flash import flash, merge

ALL = slice(None)


def ring(q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, *, causal: bool) -> Tensor:
    """Keys and values travel around the ring of ranks; each rank merges the attention over every part.

    Memory a rank: its own part and one that is under way, in the backward too, which computes every part
    again. Under ``causal`` tokens are laid out in zigzag (:mod:`attnbench.harness.parallel.layout`), so that
    each step is half a part for every rank. Source: Liu et al., Ring Attention with Blockwise Transformers
    (arXiv 2310.01889); the layout is that of Brandon et al., Striped Attention (arXiv 2311.09431), by halves.
    """
    return _Ring.apply(q, k, v, ranks, causal)


def all_gather(q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, *, causal: bool) -> Tensor:
    """Every rank gathers all keys and values and attends to them with its own queries.

    One exchange each way, and memory for the keys and values of the whole sequence on every rank. Under
    ``causal`` tokens are laid out in zigzag. Source: the distributed form of standard attention in A Unified
    View of Long-Sequence Models (arXiv 2302.06218).
    """
    if not causal:
        whole_k, whole_v = (_joined(gathered(x, ranks)) for x in (k, v))
        return flash(q, whole_k, whole_v, need_lse=False)[0]
    places = positions(q.shape[2] * ranks.size, ranks.size, "zigzag").to(q.device)
    order = places.flatten().argsort()
    whole_k, whole_v = (_joined(gathered(x, ranks))[:, :, order] for x in (k, v))
    mine = places[ranks.rank].to(torch.int32)
    return flash(q, whole_k, whole_v, causal=True, q_pos=mine, need_lse=False)[0]


def ulysses(q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, *, causal: bool) -> Tensor:
    """Exchange tokens for heads: every rank attends over the whole sequence with H/P of the heads.

    P must divide H and Hkv. Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
    """
    o, _ = flash(*(_by_heads(x, ranks) for x in (q, k, v)), causal=causal, need_lse=False)
    return _by_tokens(o, ranks)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, causal: bool) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        o, lse = torch.empty(0), torch.empty(0)
        kv = [k, v]
        for step in range(ranks.size):
            last = step == ranks.size - 1
            arriving = rotate(kv, ranks) if not last else None
            rows, columns, diagonal = _part(step, ranks, causal, k.shape[2])
            o_part, lse_part = flash(q[:, :, rows], *(x[:, :, columns] for x in kv), causal=diagonal)
            assert lse_part is not None
            if step == 0:
                o, lse = o_part.to(exact), lse_part
            else:
                o[:, :, rows], lse[:, :, rows] = merge(o[:, :, rows], lse[:, :, rows], o_part, lse_part)
            kv = arriving() if arriving is not None else kv
        out = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ranks, ctx.causal = ranks, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        exact = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.zeros_like(q, dtype=exact)
        kv, d_kv = [k, v], [torch.zeros_like(x, dtype=exact) for x in (k, v)]
        for step in range(ranks.size):
            last = step == ranks.size - 1
            arriving = rotate(kv, ranks) if not last else None
            rows, columns, diagonal = _part(step, ranks, ctx.causal, k.shape[2])
            here = (grad[:, :, rows], out[:, :, rows], lse[:, :, rows])
            parts = _part_gradients(
                q[:, :, rows], kv[0][:, :, columns], kv[1][:, :, columns], *here, diagonal
            )
            d_q[:, :, rows] += parts[0]
            for sums, part in zip(d_kv, parts[1:], strict=True):
                sums[:, :, columns] += part
            d_kv = rotate(d_kv, ranks)()  # after the last step they are back where their keys are
            kv = arriving() if arriving is not None else kv
        return d_q.to(q.dtype), d_kv[0].to(k.dtype), d_kv[1].to(v.dtype), None, None


def _part(step: int, ranks: Ranks, causal: bool, length: int) -> tuple[slice, slice, bool]:
    """Queries and keys that meet in a step, and whether the causal diagonal runs through them.

    In zigzag rank r has the parts r and 2P−1−r. All its queries come after the first half of an earlier rank
    and none after its second half; only its second half comes after a later rank, and after both halves.
    """
    source = (ranks.rank - step) % ranks.size
    if not causal or source == ranks.rank:
        return ALL, ALL, causal
    half = length // 2
    return (ALL, slice(half), False) if source < ranks.rank else (slice(half, None), ALL, False)


def _part_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor, diagonal: bool
) -> tuple[Tensor, ...]:
    """Gradients of the whole attention through its part over k, v, with o = Σ w_j o_j, w_j = e^(lse_j − lse).

    They reach the part's output as w_j·do and its lse_j as w_j·(do·o_j − do·o).
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        o_part, lse_part = flash(*leaves, causal=diagonal)
    assert lse_part is not None
    exact = lse.dtype
    weight = (lse_part.detach() - lse).exp()
    change = (grad.to(exact) * (o_part.detach().to(exact) - out.to(exact))).sum(-1)
    upstream = ((weight.unsqueeze(-1) * grad.to(exact)).to(o_part.dtype), weight * change)
    return torch.autograd.grad((o_part, lse_part), leaves, upstream)


def _joined(parts: Tensor) -> Tensor:
    """(P, B, H, N/P, D) → (B, H, N, D), in the order of ranks."""
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _by_heads(x: Tensor, ranks: Ranks) -> Tensor:
    """(B, H, N/P, D) → (B, H/P, N, D)."""
    return _joined(swapped(x.unflatten(1, (ranks.size, -1)).transpose(0, 1), ranks))


def _by_tokens(x: Tensor, ranks: Ranks) -> Tensor:
    """(B, H/P, N, D) → (B, H, N/P, D)."""
    received = swapped(x.unflatten(2, (ranks.size, -1)).permute(2, 0, 1, 3, 4), ranks)
    return received.transpose(0, 1).flatten(1, 2)
