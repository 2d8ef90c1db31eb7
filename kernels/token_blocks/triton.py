"""The Triton backend of :func:`attnbench.kernels.token_blocks`: checks, autograd and cases to compile.

Two walks of the lists, chosen by shape: query by query, where enough heads share a list, or key block by key
block with a merge of the parts. dk and dv always go by key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import capability, check_tensors, empty, near, reduced
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.token_blocks._configs import ORDERS, Order
from attnbench.kernels.token_blocks._launch import Launches, TokenCall
from attnbench.kernels.token_selection import TokenBlocks


def token_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenBlocks,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
    order: Order | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse from the listed blocks alone; once differentiable in q, k, v and the key bias.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. ``order`` forces a walk, by "query" or
    by "key". By key it holds an fp32 part of Dv numbers per entry of the lists and query head, of D backward;
    dk and dv hold up to 1.5·M·(D + Dv) of them per heads that share a list. Raises Unsupported for another
    dtype, D or Dv beyond 256, or a selection on another device.
    """
    check_tensors("token_blocks", {"q": q, "k": k, "v": v})
    if selection.indices.device != q.device:
        raise Unsupported("token_blocks/triton selection", selection.indices.device, f"{q.device} as q")
    return _TokenBlocks.apply(near(q), near(k), near(v), key_bias, selection, causal, scale, order)


class _TokenBlocks(torch.autograd.Function):
    """o and lse of one call, and the gradients of q, k, v and key_bias."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, selection, causal, scale, order):
        call = TokenCall(q, k, v, selection, key_bias, causal, scale, capability(q.device), order)
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            _run(call.forward(o, lse, lse_log2))
        ctx.save_for_backward(q, k, v, key_bias, o, lse_log2)
        ctx.options = selection, causal, scale, order
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        q, k, v, key_bias, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 8
        do = near(o.new_zeros(()).expand(o.shape) if do is None else do)
        selection, causal, scale, order = ctx.options
        call = TokenCall(q, k, v, selection, key_bias, causal, scale, capability(q.device), order)
        needs_q, needs_k, needs_v, needs_bias = ctx.needs_input_grad[:4]
        delta = torch.empty_like(lse_log2)
        dq = dk = dv = d_bias = None
        with torch.cuda.device_of(q):
            _run(call.row_terms(do, o, d_lse, lse_log2, delta))
            if needs_q:
                dq = empty(q, q.shape[3])
                _run(call.backward_q(do, lse_log2, delta, dq))
            if needs_k or needs_v or needs_bias:
                dk, dv = empty(k, k.shape[3]), empty(v, v.shape[3])
                if needs_bias:
                    d_bias = torch.empty(call.bias.shape, device=q.device, dtype=torch.float32)
                _run(call.backward_kv(do, lse_log2, delta, dk, dv, d_bias))
        return dq, dk, dv, reduced(d_bias, key_bias), *(None,) * 4


def _run(launches: Launches) -> None:
    for launch in launches:
        launch.run()


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it, in both walks: grouped heads, lists per head, a bias."""
    sizes = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}
    shapes = [(dtype, d, d) for dtype, dims in sizes.items() for d in dims]
    calls = [aot_call(capability, *shape, 64, 16, "query") for shape in shapes]
    calls += [aot_call(capability, *shape, 256, 1, "key") for shape in shapes]
    calls.append(aot_call(capability, torch.bfloat16, 128, 128, 64, 64, "query"))
    calls += [aot_call(capability, torch.float16, 40, 48, 24, 4, walk, with_bias=True) for walk in ORDERS]
    return aot_kernels(calls)


def aot_call(
    capability: int,
    dtype: torch.dtype,
    d: int,
    dv: int,
    block_k: int,
    rows: int,
    order: Order,
    with_bias: bool = False,
) -> TokenCall:
    """A causal call of ``rows`` heads per list and lengths that are no multiples of a block, to compile."""
    b, kv_heads, n = 1, 2, 300
    q = torch.empty(b, kv_heads * rows, n, d, dtype=dtype)
    k, v = (torch.empty(b, kv_heads, n, x, dtype=dtype) for x in (d, dv))
    indices = torch.zeros(b, kv_heads, n, 4, dtype=torch.int32)
    selection = TokenBlocks(torch.ones(b, kv_heads, n, dtype=torch.int32), indices, block_k, n)
    bias = torch.empty(b, 1, n) if with_bias else None
    return TokenCall(q, k, v, selection, bias, True, 0.1, capability, order)


def aot_kernels(calls: list[TokenCall]) -> list[AotCase]:
    """The kernels of these calls, each once: what merges and sums, and dk and dv, are common to the walks."""
    found: dict[tuple, AotCase] = {}
    for call in calls:
        o = torch.empty(*call.q.shape[:3], call.v.shape[3], dtype=call.q.dtype)
        rows = torch.empty(o.shape[:3])
        launches = [
            *call.forward(o, rows, rows),
            *call.backward_q(o, rows, rows, call.q),
            *call.backward_kv(o, rows, rows, call.k, call.v, call.bias),
        ]
        options = "" if call.key_bias is None else " with a bias"
        name = f"by {call.walk}, blocks of {call.selection.block_k}, {call.units.rows} rows{options}"
        for each in launches:
            case = AotCase(name, each.kernel, each.args, each.constants | {"grid": (1,)})
            key = each.kernel.fn.__name__, call.q.dtype, *sorted(each.constants.items())
            found.setdefault(key, case)
    return list(found.values())
