"""The Triton backend of :func:`attnbench.kernels.window`: checks, autograd and cases to compile.

One program serves a tile of the queries of a window and reads its keys where they lie. The same kernels
serve every interval map, so :func:`attend` is the backend of neighborhoods, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import MAX_STRIDE, capability, check_tensors, empty
from attnbench.kernels.aot import AotCase
from attnbench.kernels.window._launch import Bias, Call
from attnbench.kernels.window._maps import GridMap
from attnbench.kernels.window.partition import Partition

Axes = tuple[int, ...]


def window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    grid: Axes,
    grid_kv: Axes,
    bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse without a partitioned copy; once differentiable in q, k, v and both biases.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. The gradient of ``bias`` takes up to
    64 MiB of scratch. Raises Unsupported for another dtype or D or Dv beyond 256.
    """
    shift = None if bias is None else partition.bias_shift
    return attend(
        "window", q, k, v, partition.on(grid, grid_kv), bias=bias, bias_shift=shift, key_bias=key_bias,
        causal=causal, scale=scale,
    )  # fmt: skip


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: GridMap,
    *,
    bias: Tensor | None,
    bias_shift: Axes | None,
    key_bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of a grid map; ``op`` names the operation to the tuner and in errors."""
    check_tensors(op, {"q": q, "k": k, "v": v})
    groups = q.shape[1] // k.shape[1]
    if key_bias is not None and groups > 1 and key_bias.requires_grad and key_bias.shape[-2:-1] > (1,):
        # the kernel sums the gradient of the key bias over a group of heads, here it is wanted per head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    options = (op, pairs, bias_shift, causal, scale)
    return _Window.apply(_near(q), _near(k), _near(v), bias, key_bias, options)


class _Window(torch.autograd.Function):
    """o and lse from q, k, v, bias, key_bias and options, and the gradients of the first five."""

    @staticmethod
    def forward(ctx, q, k, v, bias, key_bias, options):
        call = _call(q, k, v, bias, key_bias, options)
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            call.forward(o, lse, lse_log2).run()
        ctx.save_for_backward(q, k, v, bias, key_bias, o, lse_log2)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        q, k, v, bias, key_bias, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 6
        do = o.new_zeros(()).expand(o.shape) if do is None else _near(do)
        call = _call(q, k, v, bias, key_bias, ctx.options)
        needs_q, needs_k, needs_v, needs_bias, needs_key_bias = ctx.needs_input_grad[:5]
        delta = torch.empty_like(lse_log2)
        dq = dk = dv = d_bias = d_key_bias = None
        with torch.cuda.device_of(q):
            call.row_terms(do, o, d_lse, lse_log2, delta).run()
            if needs_q:
                dq = empty(q, q.shape[3])
                call.backward_q(do, lse_log2, delta, dq).run()
            if needs_k or needs_v or needs_key_bias:
                dk, dv = empty(k, k.shape[3]), empty(v, v.shape[3])
                if needs_key_bias:
                    d_key_bias = torch.empty(k.shape[:3], device=q.device, dtype=torch.float32)
                call.backward_kv(do, lse_log2, delta, dk, dv, d_key_bias).run()
            if needs_bias:
                gradient = call.backward_bias(do, lse_log2, delta)
                gradient.launch.run()
                d_bias = gradient.table().view(bias.shape).to(bias.dtype)
        if d_key_bias is not None:
            d_key_bias = d_key_bias.sum_to_size(_kept(key_bias, d_key_bias)).view(key_bias.shape)
            d_key_bias = d_key_bias.to(key_bias.dtype)
        return dq, dk, dv, d_bias, d_key_bias, None


def _kept(key_bias: Tensor, gradient: Tensor) -> Axes:
    """Shape of the key bias with the dimensions it lacks; one head where its gradient has several."""
    shape = (1,) * (3 - key_bias.dim()) + tuple(key_bias.shape)
    return tuple(g if s == g else 1 for s, g in zip(shape, gradient.shape, strict=True))


def _call(q, k, v, bias, key_bias, options) -> Call:
    op, pairs, shift, causal, scale = options
    made = None
    if bias is not None:
        front = 3 - len(shift)
        sizes = (1,) * front + tuple(bias.shape[1:])
        made = Bias(bias.detach().flatten(1).contiguous(), sizes, (0,) * front + tuple(shift))
    if key_bias is not None:
        key_bias = key_bias.expand(*q.shape[:2], k.shape[2])
    return Call(op, q, k, v, made, key_bias, pairs, causal, scale, capability(q.device))


def _near(x: Tensor) -> Tensor:
    """Return x, or a copy where column offsets would not be 32-bit numbers."""
    return x if x.stride(3) <= MAX_STRIDE else x.contiguous()


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel as a call would launch it: windows of images at the usual sizes, and every option."""
    swin = Partition.block((7, 7), shift=(3, 3))
    pairs = swin.on((56, 56), (56, 56))
    found = []
    for dtype, d in ((torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128),
                     (torch.bfloat16, 256), (torch.float32, 64)):  # fmt: skip
        found += kernels_of("window", pairs, capability, dtype, d, d, shift=swin.bias_shift, table=swin.table)
    halo = Partition.block((16, 16), halo=(4, 4))
    found += kernels_of("window", halo.on((64, 60), (64, 60)), capability, torch.bfloat16, 64, 64)
    video = Partition.block((8, 7, 7), shift=(4, 3, 3), dilation=(1, 2, 1))
    found += kernels_of(
        "window", video.on((16, 30, 28), (16, 30, 28)), capability, torch.float16, 40, 48, causal=True,
        shift=video.bias_shift, table=video.table,
    )  # fmt: skip
    return found


def kernels_of(
    op: str,
    pairs: GridMap,
    capability: int,
    dtype: torch.dtype,
    d: int,
    dv: int,
    *,
    causal: bool = False,
    shift: Axes | None = None,
    table: Axes | None = None,
) -> list[AotCase]:
    """The kernels of one call with grouped heads; with a table also its gradient and a bias of keys."""
    b, h, kv_heads, n, m = 1, 2, 1, math.prod(pairs.grid), math.prod(pairs.grid_kv)
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, kv_heads, m, d, dtype=dtype)
    v, o = torch.empty(b, kv_heads, m, dv, dtype=dtype), torch.empty(b, h, n, dv, dtype=dtype)
    bias = None if table is None else torch.empty(h, *table)
    key_bias = torch.empty(b, 1, m) if table is not None and d != dv else None
    call = _call(q, k, v, bias, key_bias, (op, pairs, shift, causal, 0.1))
    call = Call(**{**vars(call), "capability": capability})
    rows = torch.empty(b, h, n)
    d_keys = None if key_bias is None else torch.empty(b, kv_heads, m)
    launches = [
        call.forward(o, rows, rows),
        call.row_terms(o, o, rows, rows, rows),
        call.backward_q(o, rows, rows, q),
        call.backward_kv(o, rows, rows, k, v, d_keys),
    ]
    if bias is not None:
        launches.append(call.backward_bias(o, rows, rows).launch)
    name = f"{'x'.join(map(str, pairs.grid[3 - pairs.rank :]))} Dv={dv}"
    return [AotCase(name, each.kernel, each.args, each.constants | {"grid": (1,)}) for each in launches]
