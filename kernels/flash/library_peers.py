"""Attention of optional libraries as backends of :func:`attnbench.kernels.flash`, imported when first called.

Each translates layout, scale and alignment exactly, and raises Unsupported for what its library does not
compute: none falls back to anything. Tensors go in as views (B, N, H, D) of ours.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash._masks import Band, band

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Limits:
    """What a library cannot do, for the refusals that all of them share."""

    name: str
    module: str
    head_dim: int
    capability: int = 80
    softcap: bool = True
    unequal_dims: bool = False
    backward: bool = True


def _checked(
    limits: _Limits, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[ModuleType, Band]:
    """The module of a library, and the band of the call; Unsupported for what it cannot compute."""
    d, dv = q.shape[3], v.shape[3]
    asked = band(q, k, options["causal"], options["window"])
    where = _bounded(limits.name, asked)
    given = [name for name in ("mask", "key_bias", "bias", "rel_bias", "sink") if options[name] is not None]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    found = _capability(q.device)
    softcap, scale, need_lse = options["softcap"], options["scale"], options["need_lse"]
    for what, observed, expected, fine in (
        ("options", ", ".join(given), "none of them", not given),
        ("q_pos", "given", "queries at i + M − N", options["q_pos"] is None or asked.everything),
        ("softcap", softcap, "0", softcap <= 0 or limits.softcap),
        ("scale", scale, "a positive one", scale > 0),
        ("dtype", q.dtype, "float16 or bfloat16", q.dtype in HALVES),
        ("head dim", (d, dv), f"at most {limits.head_dim}", max(d, dv) <= limits.head_dim),
        ("head dim", (d, dv), "D = Dv", d == dv or limits.unequal_dims),
        ("head dim", (d, dv), "multiples of 8", d % 8 == dv % 8 == 0),
        ("lengths", (where.n, where.m), "at least one query and one key", where.n > 0 and where.m > 0),
        ("gradients", "required", "a forward pass: it has no backward", limits.backward or not trained),
        ("lse", "with gradients", "no lse: its gradient would be dropped", not (need_lse and trained)),
        ("compute capability", found, f"at least {limits.capability}", found >= limits.capability),
    ):
        if not fine:
            raise Unsupported(f"flash/{limits.name} {what}", observed, expected)
    try:
        return importlib.import_module(limits.module), where
    except ImportError as error:
        raise Unsupported(f"flash/{limits.name}", str(error), f"an importable {limits.module}") from error


def _bounded(name: str, where: Band) -> Band:
    """The band with sides that hide nothing unbounded.

    The libraries drop sides beyond the number of keys themselves, which is wrong to the right of N > M.
    """
    left = None if where.left is None or where.left >= where.m - 1 else where.left
    right = None if where.right is None or where.right >= where.n - 1 else where.right
    if right is not None and right >= where.m:
        raise Unsupported(f"flash/{name} window", f"{right} keys to the right of {where.m}", "fewer than M")
    return Band(where.n, where.m, left, right, where.device)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, N, H, D) views, with the columns together as the libraries want them."""
    views = (x.transpose(1, 2) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in views)


def _result(o: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Output and lse in our layout; a query without keys has lse +∞ in FlashAttention."""
    return o.transpose(1, 2), None if lse is None else lse.masked_fill(torch.isposinf(lse), -math.inf)


def _window(where: Band, unbounded: int | None) -> tuple[Any, Any]:
    """(left, right) with the library's word for an unbounded side."""
    return tuple(unbounded if side is None else side for side in (where.left, where.right))


def flash_attn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with FlashAttention-2, ``flash_attn.flash_attn_func`` (2.6 or later)."""
    library, where = _checked(_Limits("flash_attn", "flash_attn", 256), q, k, v, options)
    result = library.flash_attn_func(
        *_tokens_first(q, k, v),
        softmax_scale=options["scale"],
        causal=where.right == 0,
        window_size=_window(where, -1),
        softcap=max(options["softcap"], 0.0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=options[
            "need_lse"
        ],  # what it calls lse's return; no map is computed without dropout
    )
    return _result(result[0], result[1]) if options["need_lse"] else _result(result, None)


def flash_attn3(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with FlashAttention-3, ``flash_attn_interface.flash_attn_func``, on Hopper."""
    limits = _Limits("flash_attn3", "flash_attn_interface", 256, capability=90)
    library, where = _checked(limits, q, k, v, options)
    if _capability(q.device) >= 100:
        raise Unsupported("flash/flash_attn3 compute capability", _capability(q.device), "90")
    result = library.flash_attn_func(
        *_tokens_first(q, k, v),
        softmax_scale=options["scale"],
        causal=where.right == 0,
        window_size=_window(where, -1),
        softcap=max(options["softcap"], 0.0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=options["need_lse"],
    )
    return _result(result[0], result[1]) if options["need_lse"] else _result(result, None)


def flash_attn4(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with FlashAttention-4, ``flash_attn.cute.flash_attn_func``, on Hopper and Blackwell.

    (D, Dv) = (192, 128) is the one unequal pair that it has, on Blackwell.
    """
    unequal = (q.shape[3], v.shape[3]) == (192, 128)
    limits = _Limits("flash_attn4", "flash_attn.cute", 192 if unequal else 128, 90, unequal_dims=unequal)
    library, where = _checked(limits, q, k, v, options)
    if unequal and _capability(q.device) < 100:
        raise Unsupported("flash/flash_attn4 head dim", (192, 128), "D = Dv on Hopper")
    o, lse = library.flash_attn_func(
        *_tokens_first(q, k, v),
        softmax_scale=options["scale"],
        causal=where.right == 0 and where.left is None,
        window_size=_window(where, None),
        softcap=max(options["softcap"], 0.0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=options["need_lse"],
    )
    return _result(o, lse if options["need_lse"] else None)


def xformers(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with ``xformers.ops.memory_efficient_attention``, which picks one of its own kernels.

    Grouped heads go in as (B, N, Hkv, group, D) with keys expanded, not repeated.
    """
    limits = _Limits("xformers", "xformers.ops", 256, softcap=False, unequal_dims=True)
    library, where = _checked(limits, q, k, v, options)
    if where.n > where.m and not where.everything:
        raise Unsupported(
            "flash/xformers lengths", (where.n, where.m), "N ≤ M with a mask: every query sees a key"
        )
    group = q.shape[1] // k.shape[1]
    inputs = _tokens_first(q, k, v)
    if group > 1:
        q5 = inputs[0].unflatten(2, (-1, group))
        inputs = (q5, *(x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in inputs[1:]))
    arguments = {"attn_bias": _xformers_bias(library, where), "scale": options["scale"]}
    lse = None
    if options["need_lse"]:
        o, lse = library.fmha.memory_efficient_attention_forward_requires_grad(*inputs, **arguments)
        lse = lse.flatten(1, -2)[..., : where.n]  # some of its kernels pad the queries
    else:
        o = library.memory_efficient_attention(*inputs, **arguments)
    return _result(o.flatten(2, -2), lse)


def _xformers_bias(library: ModuleType, where: Band) -> Any:
    if where.everything:
        return None
    biases = library.fmha.attn_bias
    if where.left is None and where.right == 0:
        return biases.LowerTriangularFromBottomRightMask()
    if where.left is None or where.right is None:
        raise Unsupported("flash/xformers window", (where.left, where.right), "two bounded sides, or causal")
    return biases.LocalAttentionFromBottomRightMask(window_left=where.left, window_right=where.right)


def flashinfer(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute with FlashInfer's prefill over ragged batches, of which the plan is made once per shape.

    Forward only. It has a left side of a window only together with causality.
    """
    limits = _Limits("flashinfer", "flashinfer", 256, unequal_dims=True, backward=False)
    library, where = _checked(limits, q, k, v, options)
    if where.right not in (None, 0) or (where.left is not None and where.right is None):
        raise Unsupported(
            "flash/flashinfer window", (where.left, where.right), "causal, with a left side or none"
        )
    if where.n > where.m and not where.everything:
        raise Unsupported("flash/flashinfer lengths", (where.n, where.m), "N ≤ M with a mask")
    b, h, n, d = q.shape
    plan = _flashinfer_plan(
        library,
        b,
        h,
        k.shape[1],
        d,
        v.shape[3],
        where,
        q.dtype,
        options["scale"],
        max(options["softcap"], 0.0),
    )
    flat = [x.contiguous().flatten(0, 1) for x in _tokens_first(q, k, v)]
    result = plan.run(*flat, return_lse=options["need_lse"])
    o, lse = result if options["need_lse"] else (result, None)
    if lse is not None:  # (B·N, H), in log 2
        lse = (lse * math.log(2)).view(b, n, h).transpose(1, 2)
    return _result(o.view(b, n, h, -1), lse)


@lru_cache(maxsize=16)
def _flashinfer_plan(
    library: ModuleType,
    b: int,
    h: int,
    kv_heads: int,
    d: int,
    dv: int,
    where: Band,
    dtype: torch.dtype,
    scale: float,
    softcap: float,
) -> Any:
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=where.device)
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(b + 1, dtype=torch.int32)
    wrapper.plan(
        (starts * where.n).to(where.device),
        (starts * where.m).to(where.device),
        h,
        kv_heads,
        d,
        head_dim_vo=dv,
        causal=where.right == 0,
        window_left=-1 if where.left is None else where.left,
        logits_soft_cap=softcap,
        sm_scale=scale,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    return wrapper
