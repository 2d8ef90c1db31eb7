"""The Triton backend of :func:`attnbench.kernels.flash_int8`: quantisation, then attention on integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbench.kernels import tuning
from attnbench.kernels._attention import capability, check_tensors, near
from attnbench.kernels.aot import AotCase
from attnbench.kernels.flash._device import Lists
from attnbench.kernels.flash._launch import Launch, view
from attnbench.kernels.flash_int8._configs import Config, candidates
from attnbench.kernels.flash_int8._kernels import attend, quantise
from attnbench.kernels.flash_int8._quantise import LOG2E, key_mean


def flash_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    smooth_k: bool,
    block_q: int,
    block_k: int,
    key_padding_mask: Tensor | None,
    blocks: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse; p is rounded to the dtype of v before p v, sums are in fp32.

    Raises Unsupported for another dtype and for D or Dv beyond 256.
    """
    check_tensors("flash_int8", {"q": q, "k": k, "v": v})
    q, k, v = map(near, (q, k, v))
    mean = key_mean(k, key_padding_mask) if smooth_k else None
    removed = None if key_padding_mask is None else key_padding_mask.to(torch.int8).contiguous()
    call = IntCall(
        *quantised(q, None, None, scale * LOG2E, block_q),
        *quantised(k, mean, removed, 1.0, block_k),
        v.half() if v.dtype is torch.float32 else v,
        removed,
        None if blocks is None else block_lists(blocks, *q.shape[:2]),
        block_q,
        block_k,
        causal,
    )
    o = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        call.attend(o, lse).run()
    if not need_lse:
        return o, None
    if mean is not None:
        rows = q.float().reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        lse = lse + scale * (rows @ mean.mT).view(lse.shape)
    return o, lse


def quantised(
    x: Tensor, mean: Tensor | None, removed: Tensor | None, multiplier: float, block: int
) -> tuple[Tensor, Tensor]:
    """(x − mean)·multiplier as int8 of the shape of x and the scale (B, H, blocks) in fp32."""
    b, h, n, _ = x.shape
    ints = torch.empty(x.shape, device=x.device, dtype=torch.int8)
    scale = torch.empty(b, h, triton.cdiv(n, block), device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _quantise_launch(x, mean, removed, ints, scale, multiplier, block).run()
    return ints, scale


def _quantise_launch(
    x: Tensor,
    mean: Tensor | None,
    removed: Tensor | None,
    ints: Tensor,
    scale: Tensor,
    multiplier: float,
    block: int,
) -> Launch:
    b, h, n, d = x.shape
    tiles = scale.shape[2]
    args = (view(x), view(mean), removed, view(ints), scale, multiplier, n, h, tiles)
    constants = {"D": d, "BLOCK_D": _padded(d), "BLOCK": block, "num_warps": 4 if block <= 64 else 8}
    return Launch(quantise, tiles * b * h, args, constants)


def block_lists(blocks: Tensor, b: int, h: int) -> Lists:
    """The chosen blocks of keys of each block of queries, as a list and a length, on the device."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32)
    return Lists(view(indices.contiguous().expand(b, h, -1, -1)), view(counts.expand(b, h, -1)))


def _padded(d: int) -> int:
    """Columns of a tile: a power of two of at least the 32 that an integer product sums at a time."""
    return max(32, triton.next_power_of_2(d))


@dataclass(frozen=True)
class IntCall:
    """The quantised inputs of one call and what it says about visibility."""

    q_ints: Tensor
    q_scale: Tensor
    k_ints: Tensor
    k_scale: Tensor
    v: Tensor
    removed: Tensor | None
    lists: Lists | None
    block_q: int
    block_k: int
    causal: bool

    def attend(self, o: Tensor, lse: Tensor) -> Launch:
        """The launch that writes o and lse, in the configuration that is tuned or the default one."""
        d, dv = self.q_ints.shape[3], self.v.shape[3]
        n_bucket = triton.next_power_of_2(max(self.q_ints.shape[2], self.k_ints.shape[2]))
        config = tuning.pick(
            op="flash_int8",
            kernel="attend",
            key=(
                capability(o.device), str(self.v.dtype), max(_padded(d), _padded(dv)), n_bucket,
                self.block_q, self.block_k, self.causal, self.lists is not None, self.removed is not None,
            ),
            candidates=candidates(max(d, dv), self.block_q, self.block_k),
            launch=lambda config: self._launch(config, o, lse).run,
            device=o.device,
        )  # fmt: skip
        return self._launch(config, o, lse)

    def _launch(self, config: Config, o: Tensor, lse: Tensor) -> Launch:
        b, h, n, d = self.q_ints.shape
        kv_heads, m = self.k_ints.shape[1:3]
        dv = self.v.shape[3]
        tiles = triton.cdiv(n, config.block_m)
        args: tuple[Any, ...] = (view(self.q_ints), view(self.q_scale), view(self.k_ints))
        args += (view(self.k_scale), view(self.v), view(o), lse, self.removed, self.lists)
        args += (n, m, h, h // kv_heads, tiles)
        constants = {
            "D": d,
            "DV": dv,
            "BLOCK_D": _padded(d),
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": self.block_k,
            "BLOCK_Q": self.block_q,
            "CAUSAL": self.causal,
            "UNEVEN": m % self.block_k != 0,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return Launch(attend, tiles * b * h, args, constants)


def aot_cases(capability: int) -> list[AotCase]:
    """Both kernels as calls would launch them, causal and over listed blocks, at the usual sizes."""
    found = []
    for dtype, d, listed in (
        (torch.float16, 64, False),
        (torch.bfloat16, 128, False),
        (torch.float16, 128, True),
        (torch.bfloat16, 256, False),
    ):
        q, k = torch.empty(1, 2, 1000, d, dtype=dtype), torch.empty(1, 1, 1000, d, dtype=dtype)
        ints = [x.to(torch.int8) for x in (q, k)]
        scales = torch.empty(1, 2, 8), torch.empty(1, 1, 16)
        removed = torch.zeros(1, 1000, dtype=torch.int8) if listed else None
        lists = block_lists(torch.ones(1, 1, 8, 16, dtype=torch.bool), 1, 2) if listed else None
        call = IntCall(ints[0], scales[0], ints[1], scales[1], k, removed, lists, 128, 64, not listed)
        mean = torch.empty(1, 1, 1, d)
        launches = (
            _quantise_launch(k, mean, removed, ints[1], scales[1], 1.0, 64),
            call.attend(q, torch.empty(q.shape[:3])),
        )
        name = f"{'listed' if listed else 'causal'} D={d}"
        found += [AotCase(name, x.kernel, x.args, x.constants | {"grid": (1,)}) for x in launches]
    return found
