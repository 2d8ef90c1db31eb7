"""Attention of others as backends of :func:`attnbench.kernels.flash`: PyTorch's SDPA kernels and flex.

A peer computes with exactly the kernel that its name says, or raises Unsupported; what it needs besides
the inputs (masks, block masks, compiled code) is built on the first call and kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from attnbench.kernels.backends import Unsupported
from attnbench.kernels.flash._masks import (
    Band,
    MaskCache,
    all_biases,
    band,
    dense_mask,
    sdpa_mask,
    whole_mask,
)
from attnbench.kernels.flash._tile_lists import packed
from attnbench.kernels.flash.mask import Mask, RelativeBias

_REFUSALS = ("No available kernel", "No viable backend")
"""How SDPA says that the one kernel it may use cannot serve the call."""

_MOST_SHAPES = 10_000
"""Calls of one compiled function that differ in shapes, dtypes or options, in one process."""


def _sdpa(
    kernel: SDPBackend,
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
) -> tuple[Tensor, None]:
    """Compute o with one kernel of ``scaled_dot_product_attention``; lse is not to be had from it."""
    name = f"flash/sdpa_{kernel.name.removesuffix('_ATTENTION').lower()}"
    for option, asked in (("softcap", softcap > 0), ("sink", sink is not None), ("lse", need_lse)):
        if asked:
            raise Unsupported(f"{name} {option}", "asked for", "none: SDPA has no such option")
    where = band(q, k, causal, window)
    bias = all_biases(bias, rel_bias)
    attn_mask, is_causal = _sdpa_visibility(kernel, name, where, q_pos, mask, key_bias, bias, q.dtype, scale)
    try:
        with sdpa_kernel(kernel):
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
    except RuntimeError as error:
        if not str(error).startswith(_REFUSALS):
            raise
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} {q.dtype} on {q.device.type}"
        masked = "no mask" if attn_mask is None else "a mask"
        raise Unsupported(name, f"{shapes}, {masked}", "a call that this SDPA kernel serves") from error
    return o, None


def _sdpa_visibility(
    kernel: SDPBackend,
    name: str,
    where: Band,
    q_pos: Tensor | None,
    mask: Mask | None,
    key_bias: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
) -> tuple[Tensor | None, bool]:
    """attn_mask and is_causal. SDPA aligns is_causal to the first key, we to the last: equal where N = M."""
    # with scale 0 the fused kernels multiply the −inf of is_causal by it, which is NaN
    plain = mask is None and key_bias is None and bias is None and scale != 0
    if plain and q_pos is None and where.left is None and where.right == 0:
        if where.n == where.m:
            return None, True
        if kernel is SDPBackend.FLASH_ATTENTION and where.device.type == "cuda" and where.n < where.m:
            return _lower_right(where.n, where.m), False  # this kernel takes no mask, but knows the alignment
    dense = dense_mask(where, q_pos, mask)
    if dense is not None and dense.has_blind_query and kernel is SDPBackend.CUDNN_ATTENTION:
        raise Unsupported(name, "a query that sees no key", "at least one key for every query")
    return sdpa_mask(None if dense is None else dense.visible, key_bias, bias, dtype), False


@lru_cache(maxsize=64)
def _lower_right(n: int, m: int) -> CausalBias:
    return causal_lower_right(n, m)


sdpa_math = partial(_sdpa, SDPBackend.MATH)
sdpa_flash = partial(_sdpa, SDPBackend.FLASH_ATTENTION)
sdpa_efficient = partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)
sdpa_cudnn = partial(_sdpa, SDPBackend.CUDNN_ATTENTION)


def flex(
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
    """Compute with ``flex_attention``: compiled on CUDA, as its eager definition on CPU.

    The mask is a block mask, soft-cap and biases are a score function, the sink is applied to o by lse.
    Raises Unsupported on CPU when a gradient is required: flex has no backward pass there.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    table = None if rel_bias is None else rel_bias.table
    given = [x for x in (q, k, v, key_bias, bias, table, sink) if x is not None]
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise Unsupported("flash/flex on CPU", "inputs that require gradients", "a forward pass, or CUDA")
    where = band(q, k, causal, window)
    lse_wanted = need_lse or sink is not None
    result = flex_function(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(q.shape, k.shape[2], softcap, key_bias, bias, rel_bias),
        block_mask=_flex_mask(where, q_pos, mask),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True) if lse_wanted else None,
    )
    if not lse_wanted:
        return result, None
    o, lse = result[0], result[1].lse
    if sink is not None:
        o = (o * torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)).to(q.dtype)
    return o, lse if need_lse else None


def compiled_per_shape(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` for static shapes, as many as are asked for: Dynamo's own limit is eight a process.

    ``options`` are passed on. When Dynamo gives up it raises: it never runs the function as it stands.
    """
    compiled = torch.compile(function, dynamic=False, fullgraph=True, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit

        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            # Only now: setting the limits takes 50 µs, which a call of a known shape must not pay.
            with config.patch(recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES):
                return compiled(*args, **kwargs)

    return call


@lru_cache
def flex_function(device: str) -> Callable[..., Any]:
    """``flex_attention`` for a kind of device: compiled on CUDA, elsewhere its eager definition."""
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cuda":
        return compiled_per_shape(flex_attention)

    def eager(*qkv: Tensor, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            # on CPU it refuses leaves that require gradients even where none is recorded
            return flex_attention(*(x.detach() for x in qkv), **options)

    return eager


def _score_mod(
    shape: torch.Size,
    m: int,
    softcap: float,
    key_bias: Tensor | None,
    bias: Tensor | None,
    rel_bias: RelativeBias | None = None,
) -> Callable[..., Tensor] | None:
    if softcap <= 0 and key_bias is None and bias is None and rel_bias is None:
        return None
    b, h, n, _ = shape
    keys = None if key_bias is None else key_bias.expand(b, h, m)
    pairs = None if bias is None else bias.expand(b, h, n, m)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if pairs is not None:
            score = score + pairs[b, h, i, j]
        if keys is not None:
            score = score + keys[b, h, j]
        if rel_bias is not None:
            heads, size = rel_bias.table.shape
            index = rel_bias.q_code[i] - rel_bias.k_code[j]
            found = rel_bias.table[h % heads, index.clamp(0, size - 1)]
            score = score + torch.where((index >= 0) & (index < size), found, 0.0)
        return score

    return score_mod


def _flex_mask(where: Band, q_pos: Tensor | None, mask: Mask | None) -> Any:
    """The block mask of a call, built once; None where every query sees every key."""
    if mask is None:
        return None if where.everything else _BLOCK_MASKS.get(where, q_pos)
    whole = whole_mask(where, q_pos, mask)
    key = ("flex", where.n, where.m)
    if key not in whole.cache:
        with torch.inference_mode(False), torch.no_grad():
            whole.cache[key] = _block_mask_of_tests(whole, where)
    return whole.cache[key]


def _block_mask_of_tests(mask: Mask, where: Band) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    code, low, high, clauses = packed(mask, where.n, where.m)
    batch, heads = code.shape[1:3]
    # tensors, no indices: Dynamo takes a captured integer that it has seen with two values for a variable
    tests = [[(code[t], low[t], high[t]) for t in clause] for clause in clauses]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h = b % batch, h % heads
        seen = j < 0
        for clause in tests:
            inside = j >= 0
            for of_key, least, most in clause:
                found = of_key[b, h, j]
                inside = inside & (found >= least[b, h, i]) & (found <= most[b, h, i])
            seen = seen | inside
        return seen

    shape = batch if batch > 1 else None, heads if heads > 1 else None
    return create_block_mask(visible, *shape, where.n, where.m, device=where.device)


def _block_mask(where: Band, q_pos: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offset = j - (i + (where.m - where.n) if q_pos is None else q_pos[i])
        if where.left is None:
            return offset <= where.right
        if where.right is None:
            return offset >= -where.left
        return (offset >= -where.left) & (offset <= where.right)

    return create_block_mask(visible, None, None, where.n, where.m, device=where.device)


_BLOCK_MASKS = MaskCache(_block_mask, size=64)
