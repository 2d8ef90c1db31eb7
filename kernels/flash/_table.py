"""The gradient of a table of relative biases: sums that land anywhere in it, yet bitwise reproducible.

Additions of integers commute, those of floats do not: the kernel adds ds in fixed point, with atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.kernels.flash._device import TableSums

_COPIES = 64
"""Programs that add to the same entry queue up: so many copies of a small table spread them."""

_MOST_ENTRIES = 2**22
"""Of all copies together: 32 MiB."""


def table_sums(do: Tensor, v: Tensor, delta: Tensor, size: int) -> TableSums:
    """Zeros to add to, and a unit small enough for 31 bits below the largest sum and large enough for it.

    From do (B, H, N, Dv), v (B, Hkv, M, Dv) and delta (B, H, N): Σ_j |ds_ij| ≤ ‖do_i‖·max‖v‖ + |delta_i|,
    summed over all queries, bounds the sum of any entry. Nothing waits for the device.
    """
    heads = do.shape[1]
    most = do.float().norm(dim=-1) * v.float().norm(dim=-1).amax() + delta.abs()
    total = most.sum()
    exponent = 61.0 - torch.log2(total.clamp(min=2.0**-60)).ceil()
    unit = torch.where(torch.isfinite(total), torch.exp2(exponent.clamp(-120.0, 120.0)), torch.nan)
    copies = max(1, min(_COPIES, _MOST_ENTRIES // (heads * size)))
    return TableSums(torch.zeros(copies, heads, size, device=do.device, dtype=torch.int64), copies, unit)


def summed(sums: TableSums) -> Tensor:
    """The gradient (H, size) in fp32; NaN where the gradients that it comes from are not finite."""
    return (sums.sums.sum(0).double() / sums.unit).float()
