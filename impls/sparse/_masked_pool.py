"""Pooling of blocks of keys that leaves padded keys out, in the precision that selection needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.kernels.selection import pool


def block_mean(x: Tensor, block: int, padded: Tensor | None) -> Tensor:
    """Mean of each block of tokens, (B, H, M, D) to (B, H, ⌈M/block⌉, D), in fp32 (fp64 for fp64 inputs).

    ``padded`` (B, M) is True for tokens that do not count; a block of those alone is 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if padded is None:
        return pool(wide, block)
    there = ~padded[:, None, :, None]
    total = pool(wide.masked_fill(~there, 0.0), block)
    share = pool(there.to(wide.dtype), block)
    return total / share.masked_fill(share == 0, 1.0)


def block_extremes(x: Tensor, block: int, padded: Tensor | None) -> Tensor:
    """Maximum and minimum of each block of tokens side by side, (B, H, ⌈M/block⌉, 2·D); as ``block_mean``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if padded is None:
        return torch.cat([pool(wide, block, "max"), pool(wide, block, "min")], -1)
    gone = padded[:, None, :, None]
    high = pool(wide.masked_fill(gone, -torch.inf), block, "max")
    low = pool(wide.masked_fill(gone, torch.inf), block, "min")
    empty = ~occupied(padded, block)[:, None, :, None]
    return torch.cat([high.masked_fill(empty, 0.0), low.masked_fill(empty, 0.0)], -1)


def occupied(padded: Tensor, block: int) -> Tensor:
    """(B, ⌈M/block⌉) bool: blocks with at least one token that is not padded."""
    return F.pad(~padded, (0, -padded.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)
