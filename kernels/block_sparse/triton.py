"""The Triton backend of :func:`attnbench.kernels.block_sparse`: checks, autograd and cases to compile.

FlashAttention-2 in structure, with loops along lists of blocks: the selection's for o and dq, its transpose
for dk and dv.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import capability, check_tensors, empty, near, reduced
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.block_sparse._launch import BlockCall
from attnbench.kernels.selection import Selection


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    key_bias: Tensor | None,
    row_threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the listed blocks alone; once differentiable in q, k, v and the key bias.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. Blocks are tiled one by one: a block
    smaller than 16 pays for 16. Raises Unsupported for another dtype, D or Dv beyond 256, or a selection on
    another device.
    """
    check_tensors("block_sparse", {"q": q, "k": k, "v": v})
    if selection.indices.device != q.device:
        raise Unsupported("block_sparse/triton selection", selection.indices.device, f"{q.device} as q")
    q_pos, k_pos = (None if x is None else x.to(torch.int32) for x in (q_pos, k_pos))
    return _BlockSparse.apply(
        near(q), near(k), near(v), key_bias, row_threshold, q_pos, k_pos, selection, causal, scale
    )


class _BlockSparse(torch.autograd.Function):
    """o and lse of one call, and the gradients of q, k, v and key_bias."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, row_threshold, q_pos, k_pos, selection, causal, scale):
        call = _call(q, k, v, key_bias, row_threshold, q_pos, k_pos, selection, causal, scale)
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            call.forward(o, lse, lse_log2).run()
        ctx.save_for_backward(q, k, v, key_bias, row_threshold, q_pos, k_pos, o, lse_log2)
        ctx.options = selection, causal, scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        *inputs, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 10
        q, k, v, key_bias = inputs[:4]
        do = near(o.new_zeros(()).expand(o.shape) if do is None else do)
        call = _call(*inputs, *ctx.options)
        needs_q, needs_k, needs_v, needs_bias = ctx.needs_input_grad[:4]
        delta = torch.empty_like(lse_log2)
        dq = dk = dv = d_bias = None
        with torch.cuda.device_of(q):
            call.row_terms(do, o, d_lse, lse_log2, delta).run()
            if needs_q:
                dq = empty(q, q.shape[3])
                call.backward_q(do, lse_log2, delta, dq).run()
            if needs_k or needs_v or needs_bias:
                dk, dv = empty(k, k.shape[3]), empty(v, v.shape[3])
                if needs_bias:
                    d_bias = torch.empty(call.key_bias.shape, device=q.device, dtype=torch.float32)
                call.backward_kv(do, lse_log2, delta, dk, dv, d_bias).run()
        return dq, dk, dv, reduced(d_bias, key_bias), *(None,) * 6


def _call(q, k, v, key_bias, row_threshold, q_pos, k_pos, selection, causal, scale) -> BlockCall:
    b, h, n, _ = q.shape
    m = k.shape[2]
    q_pos, row_threshold = (None if x is None else x.expand(b, h, n) for x in (q_pos, row_threshold))
    k_pos, key_bias = (None if x is None else x.expand(b, h, m) for x in (k_pos, key_bias))
    return BlockCall(
        q, k, v, selection, q_pos, k_pos, key_bias, row_threshold, causal, scale, capability(q.device)
    )


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: causal lists at the usual sizes, and every option."""
    sizes = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}
    calls = [_aot_call(capability, dtype, d, d, 128) for dtype, dims in sizes.items() for d in dims]
    calls.append(_aot_call(capability, torch.bfloat16, 128, 128, 64))
    calls.append(_aot_call(capability, torch.bfloat16, 128, 128, 64, every_option=True))
    calls.append(_aot_call(capability, torch.float16, 40, 48, 24, every_option=True))
    return [case for call in calls for case in _aot_kernels(call)]


def _aot_call(
    capability: int, dtype: torch.dtype, d: int, dv: int, block: int, every_option: bool = False
) -> BlockCall:
    """A causal call with grouped heads and lengths that are no multiples of a block."""
    b, h, kv_heads, n = 1, 2, 1, 1000
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, kv_heads, n, d, dtype=dtype)
    v = torch.empty(b, kv_heads, n, dv, dtype=dtype)
    blocks = -(-n // block)
    mask = torch.ones(b, h, blocks, blocks, dtype=torch.bool)
    full = mask if every_option else None
    selection = Selection.from_block_mask(mask, block, block, n, n, full=full)
    rows, positions = torch.empty(b, h, n), torch.zeros(b, h, n, dtype=torch.int32)
    extras = (positions, positions, rows, rows) if every_option else (None,) * 4
    return BlockCall(q, k, v, selection, *extras, True, 0.1, capability)


def _aot_kernels(call: BlockCall) -> list[AotCase]:
    o = torch.empty(*call.q.shape[:3], call.v.shape[3], dtype=call.q.dtype)
    rows = torch.empty(o.shape[:3])
    launches = [
        call.forward(o, rows, rows),
        call.backward_q(o, rows, rows, call.q),
        call.backward_kv(o, rows, rows, call.k, call.v, call.key_bias),
    ]
    options = "" if call.key_bias is None else " every option"
    name = f"causal{options} blocks of {call.selection.block_q} Dv={call.v.shape[3]}"
    return [AotCase(name, each.kernel, each.args, each.constants | {"grid": (1,)}) for each in launches]
