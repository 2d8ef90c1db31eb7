"""The Triton backend of :func:`attnbench.kernels.few_query`: checks, autograd and cases to compile.

Three regimes, by what fits one tile: all keys, all rows of a key head, or neither. The side that fits stays
in the multiprocessor while the other is walked once; what several programs add to is split and then summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.kernels._attention import check_tensors, empty, near, reduced
from attnbench.kernels._tiles import Target
from attnbench.kernels.aot import AotCase
from attnbench.kernels.few_query._backward import backward_kv, backward_q, row_terms, sum_splits
from attnbench.kernels.few_query._configs import Kernel, resident_keys, resident_rows
from attnbench.kernels.few_query._forward import forward, forward_resident, merge
from attnbench.kernels.few_query._launch import Call, Plan, here, sum_of
from attnbench.kernels.flash._launch import Launch, view

Build = Callable[..., list[Launch]]
"""From a call, a plan and the tensors of one pass to its launches."""


def few_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse without the N×M matrix; once differentiable in q, k, v and both biases.

    fp32 inputs multiply in fp32 unless PyTorch is told to allow TF32. A bias that requires a gradient costs
    B·H·N·M·4 bytes in the backward pass, as does a key bias that differs between the heads of a group.
    Raises Unsupported for another dtype, or D or Dv beyond 256.
    """
    check_tensors("few_query", {"q": q, "k": k, "v": v})
    if key_bias is not None and key_bias.shape[-2:-1] > (1,) and q.shape[1] != k.shape[1]:
        # a tile has rows of all heads of a group: what differs between them is a bias of pairs
        pairs = key_bias.unsqueeze(-2)
        bias, key_bias = pairs if bias is None else bias + pairs, None
    o, lse = _FewQuery.apply(near(q), near(k), near(v), key_bias, bias, causal, scale)
    return o, lse if need_lse else None


class _FewQuery(torch.autograd.Function):
    """o and lse of one call, and the gradients of q, k, v and both biases."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, bias, causal, scale):
        call = _call(q, k, v, key_bias, bias, causal, scale)
        o = empty(q, v.shape[3])
        lse, lse_log2 = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(q):
            _run(call, "forward_resident" if call.keys_resident[0] else "forward", _attend, o, lse, lse_log2)
        ctx.save_for_backward(q, k, v, key_bias, bias, o, lse_log2)
        ctx.options = causal, scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_lse):
        *inputs, o, lse_log2 = ctx.saved_tensors
        if do is None and d_lse is None:
            return (None,) * 7
        q, k, v, key_bias, bias = inputs
        do = near(o.new_zeros(()).expand(o.shape) if do is None else do)
        call = _call(*inputs, *ctx.options)
        needs_q, needs_k, needs_v, needs_key_bias, needs_bias = ctx.needs_input_grad[:5]
        delta = torch.empty_like(lse_log2)
        rows = do, lse_log2, delta
        dq, dk, dv = (empty(x, x.shape[3]) for x in (q, k, v))
        d_keys = d_bias = None
        if needs_key_bias:
            d_keys = torch.empty(*k.shape[:3], 1, device=q.device, dtype=torch.float32)
        if needs_bias:
            d_bias = torch.empty(*q.shape[:3], k.shape[2], device=q.device, dtype=torch.float32)
        with torch.cuda.device_of(q):
            call.row_terms(do, o, d_lse, lse_log2, delta).run()
            if call.keys_resident[1]:
                _run(call, "backward_kv", _gradients_kv, *rows, dk, dv, d_keys, dq, d_bias)
            elif call.rows_resident:
                _run(call, "backward_resident", _gradients, *rows, dq, dk, dv, d_keys, d_bias)
            else:
                if needs_q or needs_bias:
                    _run(call, "backward_q", _gradient_q, *rows, dq, d_bias)
                if needs_k or needs_v or needs_key_bias:
                    _run(call, "backward_kv", _gradients_kv, *rows, dk, dv, d_keys)
        if d_keys is not None:
            d_keys = _per_head(d_keys.squeeze(3), q.shape[1])
        return dq, dk, dv, reduced(d_keys, key_bias), reduced(d_bias, bias), None, None


def _call(q, k, v, key_bias, bias, causal, scale) -> Call:
    b, h, n, _ = q.shape
    m = k.shape[2]
    key_bias = None if key_bias is None else key_bias.expand(b, h, m)
    bias = None if bias is None else bias.expand(b, h, n, m)
    return Call(q, k, v, key_bias, bias, causal, scale, here(q.device))


def _per_head(d_keys: Tensor, heads: int) -> Tensor:
    """Gradients (B, Hkv, M) of sums over groups in a shape that key_bias expands to.

    With grouped heads the bias is the same for all heads, and so is its gradient summed over all.
    """
    return d_keys if d_keys.shape[1] == heads else d_keys.sum(1, keepdim=True)


def _run(call: Call, kernel: Kernel, build: Build, *tensors: Any) -> None:
    """Launch a kernel, and what its splits need after it, by the plan that is picked for it."""

    def planned(plan: Plan) -> Callable[[], None]:
        return lambda: _run_all(build(call, plan, *tensors))

    planned(call.plan(kernel, planned))()


def _run_all(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def _attend(call: Call, plan: Plan, o: Tensor, lse: Tensor, lse_log2: Tensor) -> list[Launch]:
    splits = plan.grid.splits
    if splits == 1 or plan.kernel == "forward_resident":
        return [call.launch(plan, (view(o), lse, lse_log2))]
    parts_o, parts_lse = (_parts(splits, shape, o) for shape in (o.shape, lse.shape))
    return [
        call.launch(plan, (parts_o, None, parts_lse)),
        call.merge(parts_o, parts_lse, o, lse, lse_log2),
    ]


def _gradient_q(
    call: Call, plan: Plan, do: Tensor, lse_log2: Tensor, delta: Tensor, dq: Tensor, d_bias: Tensor | None
) -> list[Launch]:
    """Over splits of the keys: dq and ds."""
    target, sums = _split(plan, dq)
    return [
        call.launch(plan, (view(do), target, view(d_bias), lse_log2, delta), backward=True),
        *sums,
    ]


def _gradients_kv(
    call: Call,
    plan: Plan,
    do: Tensor,
    lse_log2: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_keys: Tensor | None,
    dq: Tensor | None = None,
    d_bias: Tensor | None = None,
) -> list[Launch]:
    """Over splits of the rows: dk, dv and the gradient (B, Hkv, M, 1) of the key bias; dq and ds as well."""
    (to_k, sum_k), (to_v, sum_v), (to_keys, sum_keys) = (_split(plan, x) for x in (dk, dv, d_keys))
    to_keys = d_keys if not sum_keys else to_keys
    outputs = (view(do), view(dq), to_k, to_v, to_keys, view(d_bias), lse_log2, delta)
    return [call.launch(plan, outputs, backward=True), *sum_k, *sum_v, *sum_keys]


def _gradients(
    call: Call,
    plan: Plan,
    do: Tensor,
    lse_log2: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_keys: Tensor | None,
    d_bias: Tensor | None,
) -> list[Launch]:
    """Over splits of the keys, with all rows in one tile: every gradient."""
    target, sums = _split(plan, dq)
    outputs = (view(do), target, view(dk), view(dv), d_keys, view(d_bias), lse_log2, delta)
    return [call.launch(plan, outputs, backward=True), *sums]


def _split(plan: Plan, out: Tensor | None) -> tuple[Any, list[Launch]]:
    """Where a kernel writes what goes to ``out``: there, or to one part a split; and the sum of the parts."""
    if out is None or plan.grid.splits == 1:
        return view(out), []
    parts = _parts(plan.grid.splits, out.shape, out)
    return parts, [sum_of(parts, out)]


def _parts(splits: int, shape: torch.Size, like: Tensor) -> Tensor:
    """One fp32 tensor of this shape for each split."""
    return torch.empty(splits, *shape, device=like.device, dtype=torch.float32)


def aot_cases(capability: int) -> list[AotCase]:
    """Every kernel in the largest tile in which a call would launch it, and with every option."""
    calls = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)]
    found = []
    for dtype, d in calls:
        for name, (n, m) in _aot_lengths(d, dtype, False).items():
            found += _aot_kernels(name, _aot_call(capability, dtype, d, d, n, m))
    for name, (n, m) in _aot_lengths(48, torch.float16, True).items():
        call = _aot_call(capability, torch.float16, 40, 48, n, m, every_option=True)
        found += _aot_kernels(f"{name}, every option", call)
    return found


def _aot_lengths(head_dim: int, dtype: torch.dtype, biased: bool) -> dict[str, tuple[int, int]]:
    """N and M of a call for eight heads per key head: of each regime, the most that one tile holds."""
    lengths = {f"{m} keys": (4096, m) for m in resident_keys(head_dim, dtype, biased)}
    lengths["few queries"] = resident_rows(head_dim, dtype, biased) // 8, 4096
    return lengths | {"neither": (300, 4000)}


def _aot_call(
    capability: int, dtype: torch.dtype, d: int, dv: int, n: int, m: int, every_option: bool = False
) -> Call:
    """A call with grouped heads."""
    b, h, kv_heads = 1, 8, 1
    q, k = torch.empty(b, h, n, d, dtype=dtype), torch.empty(b, kv_heads, m, d, dtype=dtype)
    v = torch.empty(b, kv_heads, m, dv, dtype=dtype)
    key_bias = torch.empty(1).expand(b, h, m) if every_option else None
    bias = torch.empty(1).expand(b, h, n, m) if every_option else None
    return Call(q, k, v, key_bias, bias, every_option, 0.1, Target(capability, 132))


def _aot_kernels(name: str, call: Call) -> list[AotCase]:
    """The kernels that serve a call, with what follows their splits."""
    b, h, n, _ = call.q.shape
    o = torch.empty(b, h, n, call.v.shape[3], dtype=call.q.dtype)
    rows = torch.empty(b, h, n)
    terms = o, rows, rows
    d_keys, d_bias = None, None
    if call.bias is not None:
        d_keys, d_bias = torch.empty(*call.k.shape[:3], 1), call.bias
    builds: list[tuple[Kernel, Build, tuple[Any, ...]]] = [
        ("forward_resident" if call.keys_resident[0] else "forward", _attend, (o, rows, rows))
    ]
    if call.keys_resident[1]:
        builds.append(("backward_kv", _gradients_kv, (*terms, call.k, call.v, d_keys, call.q, d_bias)))
    elif call.rows_resident:
        builds.append(("backward_resident", _gradients, (*terms, call.q, call.k, call.v, d_keys, d_bias)))
    else:
        builds.append(("backward_q", _gradient_q, (*terms, call.q, d_bias)))
        builds.append(("backward_kv", _gradients_kv, (*terms, call.k, call.v, d_keys)))
    launches = [] if call.bias is None else [call.row_terms(o, o, rows, rows, rows)]
    for kernel, build, tensors in builds:
        launches += build(call, call.cut(kernel, call.candidates(kernel)[0]), *tensors)
    # what does not depend on the kind of call, and what another of these calls has in a larger tile
    left_out: tuple[Any, ...] = ()
    if call.bias is None or any((*call.keys_resident, call.rows_resident)):
        left_out += (row_terms, merge, sum_splits)
    if call.rows_resident:
        left_out += (forward,)
    if call.keys_resident == (True, False):
        left_out += (backward_q, backward_kv)
    elif call.keys_resident[1] and call.extent.m < call.most_keys[0]:
        left_out += (forward_resident,)
    return [
        AotCase(f"{name} Dv={o.shape[3]}", each.kernel, each.args, each.constants | {"grid": (1,)})
        for each in launches
        if each.kernel not in left_out
    ]
