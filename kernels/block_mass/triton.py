"""The Triton backend of :func:`attnbench.kernels.block_mass`: one number per pair of tiles, then per blocks.

One program per tile of queries walks the keys that it sees, as the forward pass of attention does, without
values; tiles divide blocks, and what is left to reduce has the size of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnbench.kernels._attention import capability, check_tensors, near
from attnbench.kernels.aot import AotCase
from attnbench.kernels.backends import Unsupported
from attnbench.kernels.block_sparse._configs import choose
from attnbench.kernels.flash._device import LOG2E, head_pointer, load_tile
from attnbench.kernels.flash._launch import LOG2E as LOG2E_FLOAT
from attnbench.kernels.flash._launch import Launch, view


@triton.jit
def mass(
    q, k, lse, out, inner, n, m, block_q, block_k, heads, group, tiles, tiles_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_TILES: tl.constexpr, K_TILES: tl.constexpr, CAUSAL: tl.constexpr, MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the mass of one tile of queries and each tile of keys that it sees to out (B·H, tiles, tiles_k).

    A block of queries makes Q_TILES tiles, a block of keys K_TILES.
    """
    tile = tiles - 1 - tl.program_id(0) % tiles  # under causality the long rows come last: start with them
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    block = tile // Q_TILES
    start_q = block * block_q + tile % Q_TILES * BLOCK_M
    end_q = tl.minimum((block + 1) * block_q, n)
    i = start_q + tl.arange(0, BLOCK_M)
    q_tile = load_tile(head_pointer(q, b, h), q, start_q, end_q, D, BLOCK_M, BLOCK_D, True)
    row_lse = tl.load(head_pointer(lse, b, h) + i.to(tl.int64) * lse.n, mask=i < end_q, other=-float("inf"))
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse.to(tl.float32) * LOG2E)
    k_head = head_pointer(k, b, h // group)
    target = out + (bh.to(tl.int64) * tiles + tile) * tiles_k
    hi = tiles_k
    if CAUSAL:
        seen = tl.minimum(tl.maximum(end_q + (m - n), 0), m)
        hi = tl.cdiv(seen, block_k) * K_TILES
    for step in range(0, hi):
        key_block = step // K_TILES
        start = key_block * block_k + step % K_TILES * BLOCK_N
        end = tl.minimum((key_block + 1) * block_k, m)
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, k, start, end, D, BLOCK_N, BLOCK_D, True)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * inner
        live = (j < end)[None, :]
        if CAUSAL:
            live = live & (j[None, :] <= i[:, None] + (m - n))
        p = tl.where(live, tl.exp2(s - row_lse[:, None]), 0.0)
        # both axes in one reduction: Triton 3.7 fails to lay out one after the other on tcgen05
        if MAX:
            total = tl.max(p)
        else:
            total = tl.sum(p)
        tl.store(target + step, total)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool,
    reduce: str,
) -> Tensor:
    """Compute the blocks without the N×M map, forward only.

    Raises Unsupported for a gradient, another dtype, D beyond 256 or tensors on different devices.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, lse)):
        raise Unsupported("block_mass/triton", "inputs that require gradients", "a forward pass, or torch")
    check_tensors("block_mass", {"q": q, "k": k})
    if q.device != lse.device:
        raise Unsupported("block_mass/triton", f"lse on {lse.device}", f"{q.device} as q")
    launch, out = _launch(near(q), near(k), lse, block_q, block_k, scale, causal, reduce)
    with torch.cuda.device_of(q):
        launch.run()
    return out.amax((3, 5)) if reduce == "max" else out.sum((3, 5))


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool,
    reduce: str,
    arch: int | None = None,
) -> tuple[Launch, Tensor]:
    """The launch, and its output (B, H, Tq, Q_TILES, Tk, K_TILES), 0 where no key is visible."""
    b, h, n, d = q.shape
    m = k.shape[2]
    arch = capability(q.device) if arch is None else arch
    config = choose("forward", arch, d, q.dtype, block_q, block_k, False)
    shape = (
        triton.cdiv(n, block_q),
        triton.cdiv(block_q, config.block_m),
        triton.cdiv(m, block_k),
        triton.cdiv(block_k, config.block_n),
    )
    out = torch.zeros(b, h, *shape, device=q.device, dtype=torch.float32)
    tiles, tiles_k = shape[0] * shape[1], shape[2] * shape[3]
    args = (view(q), view(k), view(lse), out, scale * LOG2E_FLOAT)
    args += (n, m, block_q, block_k, h, h // k.shape[1], tiles, tiles_k)
    constants = {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "Q_TILES": shape[1],
        "K_TILES": shape[3],
        "CAUSAL": causal,
        "MAX": reduce == "max",
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(mass, tiles * b * h, args, constants), out


def aot_cases(capability: int) -> list[AotCase]:
    """The kernel at the usual sizes, causal, with both reductions."""
    cases = []
    sizes = [(torch.bfloat16, d, 128, "sum") for d in (64, 128, 256)]
    for dtype, d, block, reduce in [*sizes, (torch.float32, 128, 128, "sum"), (torch.float16, 40, 24, "max")]:
        q, k = torch.empty(1, 2, 1000, d, dtype=dtype), torch.empty(1, 1, 1000, d, dtype=dtype)
        launch, _ = _launch(q, k, torch.empty(1, 2, 1000), block, block, 0.1, True, reduce, capability)
        name = f"causal {reduce} blocks of {block}"
        cases.append(AotCase(name, launch.kernel, launch.args, launch.constants | {"grid": (1,)}))
    return cases
