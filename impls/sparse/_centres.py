"""Where a query of one sequence stands on another: the centre of a window in cross attention."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)  # one tensor per length: the masks that backends keep are found by it
@torch.inference_mode(False)
def centres(n: int, m: int, device: torch.device, *, causal: bool) -> Tensor:
    """Position on the key axis of each query, int32, non-decreasing; causal: whatever N is."""
    i = torch.arange(n, device=device)
    if causal:
        return i.clamp(max=m - 1).int()
    if n == 1:
        return torch.full((1,), m - 1, device=device, dtype=torch.int32)
    return ((2 * i * (m - 1) + (n - 1)) // (2 * (n - 1))).int()
