"""The Triton backend of :func:`attnbench.kernels.flash`: checks, autograd and cases to compile.

FlashAttention-2 in structure: one forward kernel, one backward kernel for dq and one for dk and dv, with
every option of the operation inside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import capability, check_shapes, check_tensors, empty, near, reduced
from attnbench.kernels.aot import AotCase
from attnbench.kernels.flash._launch import Call, Launch, Options, RowTerms
from attnbench.kernels.flash._masks import band, whole_mask
from attnbench.kernels.flash._table import summed, table_sums
from attnbench.kernels.flash._tile_lists import packed
from attnbench.kernels.flash.mask import Mask, RelativeBias

FAR = 2**30
"""Wider than any sequence, and small enough that position ± window stays a 32-bit number."""


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_pos: Tensor | None,
    mask: Mask | None,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    rel_bias: RelativeBias | None,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse without the N×M matrix; once differentiable in q, k, v, both biases and the sink.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. A bias that requires a gradient
    costs B·H·N·M·4 bytes in the backward pass, since its sums over broadcast dimensions are not atomic.
    A table of relative biases that requires one costs an integer atomic addition per visible pair.
    Raises Unsupported for another dtype or D or Dv beyond 256, ValueError for shapes that do not match.
    """
    check_tensors("flash", {"q": q, "k": k, "v": v})
    check_shapes(q, k, v)
    where = band(q, k, causal, window)
    left, right = (None if side is None else min(side, FAR) for side in (where.left, where.right))
    if where.everything:
        q_pos = None
    elif q_pos is not None:
        if q_pos.shape != (where.n,):
            raise ValueError(f"q_pos: observed {tuple(q_pos.shape)}, expected ({where.n},), one per query")
        q_pos = q_pos.to(torch.int32).contiguous()
    if mask is not None:
        _check_mask(mask, q, k)
        mask = whole_mask(where, q_pos, mask)
        left = right = q_pos = None
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and key_bias is not None and key_bias.requires_grad and key_bias.shape[-2:-1] > (1,):
        # the kernel sums the gradient of the key bias over a group of heads, here it is wanted per head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    table = None
    if rel_bias is not None:
        rel_bias = _checked(rel_bias, q, k)
        table = rel_bias.table
    options = Options(left, right, scale, softcap)
    o, lse = _Flash.apply(
        near(q), near(k), near(v), key_bias, bias, sink, table, q_pos, options, mask, rel_bias
    )
    return o, lse if need_lse else None


def _check_mask(mask: Mask, q: Tensor, k: Tensor) -> None:
    b, h, n, _ = q.shape
    code = packed(mask, n, k.shape[2]).code
    if code.shape[1] not in (1, b) or code.shape[2] not in (1, h):
        observed = tuple(code.shape[1:3])
        raise ValueError(f"mask: observed (B, H) = {observed}, expected ({b}, {h}) or 1 in either")
    if code.device != q.device:
        raise ValueError(f"mask: observed metadata on {code.device}, expected {q.device} as q")


def _checked(rel_bias: RelativeBias, q: Tensor, k: Tensor) -> RelativeBias:
    """The relative bias as the kernels read it: a table in fp32 with rows together, codes in 32 bits."""
    heads, codes = rel_bias.table.shape[0], (rel_bias.q_code.shape, rel_bias.k_code.shape)
    if heads not in (1, q.shape[1]) or codes != (q.shape[2:3], k.shape[2:3]):
        raise ValueError(
            f"rel_bias: observed a table of {heads} heads, codes {tuple(map(tuple, codes))}, "
            f"expected 1 or {q.shape[1]} heads, codes of {q.shape[2]} queries and {k.shape[2]} keys"
        )
    q_code, k_code = (x.to(torch.int32).contiguous() for x in (rel_bias.q_code, rel_bias.k_code))
    return RelativeBias(rel_bias.table.float().contiguous(), q_code, k_code)


class _Flash(torch.autograd.Function):
    """o and lse, and the gradients of q, k, v, key_bias, bias, sink and the table of the relative bias.

    The table comes a second time in ``rel_bias``, with its codes.
    """

    @staticmethod
    def forward(ctx, q, k, v, key_bias, bias, sink, table, q_pos, options, mask, rel_bias):
        call = _call(q, k, v, key_bias, bias, sink, q_pos, options, mask, rel_bias)
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            call.forward(o, lse, lse_log2).run()
        codes = (None, None) if rel_bias is None else (rel_bias.q_code, rel_bias.k_code)
        ctx.save_for_backward(q, k, v, key_bias, bias, sink, table, q_pos, *codes, o, lse_log2)
        ctx.options, ctx.mask = options, mask
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        q, k, v, key_bias, bias, sink, table, q_pos, *codes, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 11
        if do is None:
            do = o.new_zeros(()).expand(o.shape)
        do = near(do)
        rel_bias = None if table is None else RelativeBias(table, *codes)
        call = _call(q, k, v, key_bias, bias, sink, q_pos, ctx.options, ctx.mask, rel_bias)
        needs_q, needs_k, needs_v, needs_key_bias, needs_bias, needs_sink, needs_table = ctx.needs_input_grad[
            :7
        ]
        terms = _row_terms(lse_log2, with_sink=sink is not None)
        dq = dk = dv = d_key_bias = d_bias = sums = None
        with torch.cuda.device_of(q):
            call.row_terms(do, o, d_lse, terms).run()
            if needs_q or needs_bias or needs_table:
                dq = empty(q, q.shape[3])
                if needs_bias:
                    d_bias = torch.zeros(call.bias.shape, device=q.device, dtype=torch.float32)
                if needs_table:
                    sums = table_sums(do, v, terms.delta, table.shape[1])
                call.backward_q(do, terms, dq, d_bias, sums).run()
            if needs_k or needs_v or needs_key_bias:
                dk, dv = empty(k, k.shape[3]), empty(v, v.shape[3])
                if needs_key_bias:
                    d_key_bias = torch.empty(k.shape[:3], device=q.device, dtype=torch.float32)
                call.backward_kv(do, terms, dk, dv, d_key_bias).run()
        d_sink = reduced(terms.d_sink, sink) if needs_sink else None
        d_table = None if sums is None else reduced(summed(sums), table)
        d_key_bias, d_bias = reduced(d_key_bias, key_bias), reduced(d_bias, bias)
        return dq, dk, dv, d_key_bias, d_bias, d_sink, d_table, None, None, None, None


def _call(q, k, v, key_bias, bias, sink, q_pos, options: Options, mask, rel_bias) -> Call:
    b, h, n, _ = q.shape
    m = k.shape[2]
    return Call(
        q,
        k,
        v,
        None if key_bias is None else key_bias.expand(b, h, m),
        None if bias is None else bias.expand(b, h, n, m),
        None if sink is None else sink.expand(b, h, n),
        q_pos,
        options,
        capability(q.device),
        mask,
        rel_bias,
    )


def _row_terms(lse_log2: Tensor, *, with_sink: bool) -> RowTerms:
    """Buffers for what the backward kernels need of a query, besides lse."""
    delta, gate, d_sink = (
        torch.empty_like(lse_log2) if need else None for need in (True, with_sink, with_sink)
    )
    return RowTerms(lse_log2, delta, gate, d_sink)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: plain causal attention at the usual sizes, and the options."""
    sizes = [(torch.bfloat16, d) for d in (64, 128, 256)] + [(torch.float32, 128)]
    calls = {
        f"causal D={d}, {dtype.itemsize} bytes": _aot_call(capability, dtype, d, d) for dtype, d in sizes
    }
    calls["every option"] = _aot_call(capability, torch.float16, 40, 48, every_option=True)
    position, segment = torch.arange(1000), torch.arange(1000) // 100
    mask = Mask.upto(position) & (Mask.same(segment) | Mask.keys(segment == 0) | Mask.queries(segment == 9))
    table = RelativeBias(torch.empty(2, 1999), position.int() + 999, position.int())
    for d in (64, 128):
        call = _aot_call(capability, torch.bfloat16, d, d)
        calls[f"mask D={d}"] = replace(call, options=Options(None, None, 0.1, 0.0), mask=mask)
        calls[f"relative bias D={d}"] = replace(call, rel_bias=table)
    return [case for name, call in calls.items() for case in _aot_kernels(name, call)]


def _aot_call(capability: int, dtype: torch.dtype, d: int, dv: int, every_option: bool = False) -> Call:
    """A causal call with grouped heads and lengths that are no multiples of a tile."""
    b, h, kv_heads, n = 1, 2, 1, 1000
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, kv_heads, n, d, dtype=dtype)
    v = torch.empty(b, kv_heads, n, dv, dtype=dtype)
    extras: dict[str, Any] = dict.fromkeys(("key_bias", "bias", "sink", "q_pos"))
    if every_option:
        extras["key_bias"] = extras["sink"] = torch.empty(b, h, n)
        extras["bias"] = torch.empty(b, h, n, n)
        extras["q_pos"] = torch.zeros(n, dtype=torch.int32)
    options = Options(100, 0, 0.1, 30.0) if every_option else Options(None, 0, 0.1, 0.0)
    return Call(q, k, v, **extras, options=options, capability=capability)


def _aot_kernels(name: str, call: Call) -> list[AotCase]:
    o = torch.empty(*call.q.shape[:3], call.v.shape[3], dtype=call.q.dtype)
    rows = torch.empty(o.shape[:3])
    terms = _row_terms(rows, with_sink=call.sink is not None)
    sums = None if call.rel_bias is None else table_sums(o, call.v, rows, call.rel_bias.table.shape[1])
    launches: list[Launch] = [
        call.forward(o, rows, rows),
        call.row_terms(o, o, rows, terms),
        call.backward_q(o, terms, call.q, call.bias, sums),
        call.backward_kv(o, terms, call.k, call.v, call.key_bias),
    ]
    return [AotCase(name, each.kernel, each.args, each.constants | {"grid": (1,)}) for each in launches]
