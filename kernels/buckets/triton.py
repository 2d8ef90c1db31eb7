"""The Triton backend of :func:`attnbench.kernels.buckets`: checks, autograd and cases to compile.

Rows are gathered inside the kernels, so no sorted copy of q, k or v exists. Where tokens stand in several
entries, a second kernel merges their outputs, and sums their gradients, in the order of the lists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import capability, check_tensors, empty, near, reduced
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.buckets._launch import BucketCall, Terms
from attnbench.kernels.buckets.layout import Buckets


def buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Buckets,
    *,
    causal: bool,
    self_score: float | None,
    combine: str,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse; once differentiable in q, k, v and the key bias.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. Buckets are tiled one by one: a bucket
    smaller than 16 pays for 16. Raises Unsupported for another dtype, D or Dv beyond 256, or lists on
    another device.
    """
    check_tensors("buckets", {"q": q, "k": k, "v": v})
    if lists.queries.device != q.device or lists.keys.device != q.device:
        raise Unsupported("buckets/triton lists", lists.queries.device, f"{q.device} as q")
    mean = combine == "mean" and not lists.distinct  # of one entry at most, both are the same
    return _Buckets.apply(near(q), near(k), near(v), key_bias, lists, causal, self_score, scale, mean)


class _Buckets(torch.autograd.Function):
    """o and lse of one call, and the gradients of q, k, v and key_bias."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, lists, causal, self_score, scale, mean):
        call = _call(q, k, v, key_bias, lists, causal, self_score, scale)
        b, h, n, _ = q.shape
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(b, h, n, device=q.device, dtype=torch.float32) for _ in range(2))
        entries_o = entries_lse = None
        with torch.cuda.device_of(q):
            if lists.distinct:  # a token may stand in no entry at all
                o.zero_(), lse.fill_(-math.inf), lse_log2.fill_(math.inf)
                call.forward(o, lse, lse_log2).run()
            else:
                entries_o = _parts(call, "query", v.shape[3])
                entries_lse = entries_o.new_empty(entries_o.shape[:3])
                call.forward(entries_o, None, entries_lse).run()
                call.combine(entries_o, entries_lse, o, lse, lse_log2, mean).run()
        ctx.save_for_backward(
            q, k, v, key_bias, o, lse_log2, *((entries_o, entries_lse) if mean else (None, None))
        )
        ctx.options = lists, causal, self_score, scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        q, k, v, key_bias, o, lse_log2, entries_o, entries_lse = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 9
        do = near(o.new_zeros(()).expand(o.shape) if do is None else do)
        call = _call(q, k, v, key_bias, *ctx.options)
        needs_q, needs_k, needs_v, needs_bias = ctx.needs_input_grad[:4]
        dq = dk = dv = d_bias = None
        with torch.cuda.device_of(q):
            terms = _terms(call, do, o, d_lse, lse_log2, entries_o, entries_lse)
            if needs_q:
                dq = _gradient_q(call, do, terms)
            if needs_k or needs_v or needs_bias:
                dk, dv, d_bias = _gradients_kv(call, do, terms, needs_bias)
        return dq, dk, dv, reduced(d_bias, key_bias), *(None,) * 5


def _call(q, k, v, key_bias, lists, causal, self_score, scale) -> BucketCall:
    b, h, m = q.shape[0], q.shape[1], k.shape[2]
    bias = None if key_bias is None else key_bias.expand(b, h, m)
    return BucketCall(q, k, v, lists, bias, causal, self_score, scale, capability(q.device))


def _terms(call: BucketCall, do, o, d_lse, lse_log2, entries_o, entries_lse) -> Terms:
    if entries_o is None:
        terms = Terms(lse_log2, torch.empty_like(lse_log2))
        call.row_terms(do, o, d_lse, terms).run()
        return terms
    terms = Terms(*(torch.empty_like(entries_lse) for _ in range(3)))
    call.entry_terms(do, entries_o, entries_lse, d_lse, lse_log2, terms).run()
    return terms


def _gradient_q(call: BucketCall, do: Tensor, terms: Terms) -> Tensor:
    dq = empty(call.q, call.q.shape[3])
    if call.lists.distinct:
        call.backward_q(do, terms, dq.zero_()).run()
        return dq
    parts = _parts(call, "query", call.q.shape[3])
    call.backward_q(do, terms, parts).run()
    call.sum_entries(parts, dq, "query").run()
    return dq


def _gradients_kv(
    call: BucketCall, do: Tensor, terms: Terms, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and, if needed, the gradient (B, H, M) of the key bias in fp32."""
    b, h, m = call.q.shape[0], call.q.shape[1], call.k.shape[2]
    dk, dv = empty(call.k, call.k.shape[3]), empty(call.v, call.v.shape[3])
    d_bias = torch.empty(b, h, m, 1, device=dk.device, dtype=torch.float32) if needs_bias else None
    outputs = (dk, dv, d_bias)
    if call.key_rows_are_tokens:
        for x in outputs:
            if x is not None:
                x.zero_()
        call.backward_kv(do, terms, dk, dv, d_bias).run()
    else:
        parts = [None if x is None else _parts(call, "key", x.shape[3]) for x in outputs]
        call.backward_kv(do, terms, *parts).run()
        for part, x in zip(parts, outputs, strict=True):
            if x is not None:
                call.sum_entries(part, x, "key").run()
    return dk, dv, None if d_bias is None else d_bias.squeeze(3)


def _parts(call: BucketCall, side: str, width: int) -> Tensor:
    """Rows of the entries of a list, in fp32."""
    entries = call.lists.queries if side == "query" else call.lists.keys
    shape = (*call.q.shape[:2], entries.shape[-1], width)
    return torch.empty(shape, device=call.q.device, dtype=torch.float32)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: hashing with look-back, ragged buckets, and every option."""
    sizes = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}
    calls = [_aot_call(capability, dtype, d, d) for dtype, dims in sizes.items() for d in dims]
    calls.append(_aot_call(capability, torch.bfloat16, 128, 128, ragged=True))
    calls.append(_aot_call(capability, torch.float16, 40, 48, every_option=True))
    return [case for call in calls for case in _aot_kernels(call)]


def _aot_call(
    capability: int, dtype: torch.dtype, d: int, dv: int, ragged: bool = False, every_option: bool = False
) -> BucketCall:
    """A causal call of two rounds with look-back, or of ragged buckets; grouped heads."""
    b, h, kv_heads, n, chunk = 1, 2, 1, 1024, 64
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, kv_heads, n, d, dtype=dtype)
    v = torch.empty(b, kv_heads, n, dv, dtype=dtype)
    ids = torch.zeros(b, h, n, dtype=torch.int32)
    if ragged:
        lists = Buckets.by_id(ids, ids, 16)
    else:
        order = torch.cat([ids, ids], -1)
        lists = Buckets.chunks(order, chunk, n, look_back=1, labels=order if every_option else None)
    bias = torch.empty(b, h, n) if every_option else None
    return BucketCall(q, k, v, lists, bias, True, None if ragged else -5e4, 0.1, capability)


def _aot_kernels(call: BucketCall) -> list[AotCase]:
    b, h, n, _ = call.q.shape
    o = torch.empty(b, h, n, call.v.shape[3], dtype=call.q.dtype)
    rows, parts = torch.empty(b, h, n), torch.empty(o.shape)
    d_bias = None if call.key_bias is None else torch.empty(b, h, n, 1)
    means = call.key_bias is not None
    terms = Terms(rows, rows, rows if means else None)
    launches = [
        call.forward(o if call.lists.distinct else parts, rows if call.lists.distinct else None, rows),
        call.backward_q(o, terms, call.q if call.lists.distinct else parts),
        call.backward_kv(o, terms, parts, parts, d_bias),
    ]
    if means:
        launches += [
            call.combine(parts, rows, o, rows, rows, True),
            call.row_terms(o, o, rows, terms),
            call.entry_terms(o, parts, rows, rows, rows, terms),
            call.sum_entries(parts, call.k, "key"),
        ]
    name = f"{'ragged' if call.lists.query_chunk == 0 else 'chunks'}{' every option' if means else ''}"
    return [
        AotCase(f"{name} Dv={call.v.shape[3]}", each.kernel, each.args, each.constants | {"grid": (1,)})
        for each in launches
    ]
