"""The Triton backend of :func:`attnbench.kernels.flash`: checks, autograd and cases to compile.

FlashAttention-2 in structure: one forward kernel, one backward kernel for dq and one for dk and dv, with
every option of the operation inside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash._configs import MAX_HEAD_DIM
from attnbench.kernels.flash._launch import MAX_STRIDE, Call, Launch, Options, RowTerms, capability
from attnbench.kernels.flash._masks import band

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse without the N×M matrix; once differentiable in q, k, v, both biases and the sink.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. A bias that requires a gradient
    costs B·H·N·M·4 bytes in the backward pass, since its sums over broadcast dimensions are not atomic.
    Raises Unsupported for another dtype or D or Dv beyond 256, ValueError for shapes that do not match.
    """
    _check(q, k, v)
    where = band(q, k, causal, window)
    left, right = (None if side is None else min(side, FAR) for side in (where.left, where.right))
    if where.everything:
        q_pos = None
    elif q_pos is not None:
        if q_pos.shape != (where.n,):
            raise ValueError(f"q_pos: observed {tuple(q_pos.shape)}, expected ({where.n},), one per query")
        q_pos = q_pos.to(torch.int32).contiguous()
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and key_bias is not None and key_bias.requires_grad and key_bias.shape[-2:-1] > (1,):
        # the kernel sums the gradient of the key bias over a group of heads, here it is wanted per head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    o, lse = _Flash.apply(
        _near(q), _near(k), _near(v), key_bias, bias, sink, q_pos, Options(left, right, scale, softcap)
    )
    return o, lse if need_lse else None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise Unsupported(f"flash/triton dtype of {name}", x.dtype, "float16, bfloat16 or float32")
        if x.dtype is not q.dtype or x.device != q.device:
            raise Unsupported(
                f"flash/triton {name}", f"{x.dtype} on {x.device}", f"{q.dtype} on {q.device} as q"
            )
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise Unsupported(f"flash/triton head dim of {name}", x.shape[-1], f"at most {MAX_HEAD_DIM}")
    b, h, _, d = q.shape
    kv_heads, m = k.shape[1:3]
    if k.shape != (b, kv_heads, m, d) or v.shape[:3] != k.shape[:3] or h % kv_heads:
        shapes = " and ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v: observed {shapes}, expected (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv)"
        )


class _Flash(torch.autograd.Function):
    """o and lse from q, k, v, key_bias, bias, sink, q_pos and options, and the gradients of the first six."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, bias, sink, q_pos, options):
        call = _call(q, k, v, key_bias, bias, sink, q_pos, options)
        o = _empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            call.forward(o, lse, lse_log2).run()
        ctx.save_for_backward(q, k, v, key_bias, bias, sink, q_pos, o, lse_log2)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        q, k, v, key_bias, bias, sink, q_pos, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 8
        if do is None:
            do = o.new_zeros(()).expand(o.shape)
        do = _near(do)
        call = _call(q, k, v, key_bias, bias, sink, q_pos, ctx.options)
        needs_q, needs_k, needs_v, needs_key_bias, needs_bias, needs_sink = ctx.needs_input_grad[:6]
        terms = _row_terms(lse_log2, with_sink=sink is not None)
        dq = dk = dv = d_key_bias = d_bias = None
        with torch.cuda.device_of(q):
            call.row_terms(do, o, d_lse, terms).run()
            if needs_q or needs_bias:
                dq = _empty(q, q.shape[3])
                if needs_bias:
                    d_bias = torch.zeros(call.bias.shape, device=q.device, dtype=torch.float32)
                call.backward_q(do, terms, dq, d_bias).run()
            if needs_k or needs_v or needs_key_bias:
                dk, dv = _empty(k, k.shape[3]), _empty(v, v.shape[3])
                if needs_key_bias:
                    d_key_bias = torch.empty(k.shape[:3], device=q.device, dtype=torch.float32)
                call.backward_kv(do, terms, dk, dv, d_key_bias).run()
        d_sink = _reduced(terms.d_sink, sink) if needs_sink else None
        return dq, dk, dv, _reduced(d_key_bias, key_bias), _reduced(d_bias, bias), d_sink, None, None


def _call(q, k, v, key_bias, bias, sink, q_pos, options: Options) -> Call:
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
    )


def _near(x: Tensor) -> Tensor:
    """Return x, or a copy where offsets inside a tile would not be 32-bit numbers."""
    return x if max(x.stride()[2:]) <= MAX_STRIDE else x.contiguous()


def _empty(like: Tensor, d: int) -> Tensor:
    """(B, H, N, d) in the memory order of ``like``, so that (B, N, H, D) callers get their layout back."""
    b, h, n, _ = like.shape
    if like.stride(2) > like.stride(1):
        return torch.empty(b, n, h, d, device=like.device, dtype=like.dtype).transpose(1, 2)
    return torch.empty(b, h, n, d, device=like.device, dtype=like.dtype)


def _row_terms(lse_log2: Tensor, *, with_sink: bool) -> RowTerms:
    """Buffers for what the backward kernels need of a query, besides lse."""
    delta, gate, d_sink = (
        torch.empty_like(lse_log2) if need else None for need in (True, with_sink, with_sink)
    )
    return RowTerms(lse_log2, delta, gate, d_sink)


def _reduced(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    """A gradient of an expanded tensor, summed in fp32 over the dimensions that were expanded."""
    return None if gradient is None else gradient.sum_to_size(of.shape).to(of.dtype)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: plain causal attention at the usual sizes, and every option."""
    sizes = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}
    calls = [_aot_call(capability, dtype, d, d) for dtype, dims in sizes.items() for d in dims]
    calls.append(_aot_call(capability, torch.float16, 40, 48, every_option=True))
    return [case for call in calls for case in _aot_kernels(call)]


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


def _aot_kernels(call: Call) -> list[AotCase]:
    o = torch.empty(*call.q.shape[:3], call.v.shape[3], dtype=call.q.dtype)
    rows = torch.empty(o.shape[:3])
    terms = _row_terms(rows, with_sink=call.sink is not None)
    launches: list[Launch] = [
        call.forward(o, rows, rows),
        call.row_terms(o, o, rows, terms),
        call.backward_q(o, terms, call.q, call.bias),
        call.backward_kv(o, terms, call.k, call.v, call.key_bias),
    ]
    options = "" if call.bias is None else " every option"
    name = f"causal{options} Dv={call.v.shape[3]}"
    return [AotCase(name, each.kernel, each.args, each.constants | {"grid": (1,)}) for each in launches]
