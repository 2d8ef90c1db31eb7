"""Attention sinks and a sliding window: the first keys stay visible to every query. StreamingLLM's mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbench.errors import UsageError
from attnbench.impls.base import MaskAttention, Pattern, Spec
from attnbench.impls.sparse._centres import centres
from attnbench.impls.sparse._density import keys_at
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels.flash import Mask


class SinkWindow(MaskAttention):
    """Softmax attention over the first ``num_sinks`` keys and a window around the query."""

    spec = Spec(
        id="sink_window",
        name="Attention sinks and sliding window",
        family="sparse",
        kind="mask",
        paper=Paper(
            "Efficient Streaming Language Models with Attention Sinks",
            2023,
            arxiv="2309.17453",
            venue="ICLR 2024",
        ),
        upstream="https://github.com/mit-han-lab/streaming-llm",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="A sliding window that never loses the first keys, on which trained models put spare mass.",
        formula="o_i = softmax over Ω_i of q_i·k_j / √D, Ω_i = {j ≤ i : j < n_sink or i − j < w}",
        cost="4·H·N·(w + n_sink)·D FLOPs, 4·H·N bytes",
        permutation_invariant=False,
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper("window", 512, "past keys with the query's own (CS), or keys on each side (NS, NC, CC)"),
            Hyper("num_sinks", 4, "first keys that every query sees"),
        ),
        test_hyper={"window": 5, "num_sinks": 2},
        padding="windows and sinks are counted in positions, which dropping a key shifts",
        deviations=(
            "NS, NC and CC are ours: |i − j| ≤ w or j < n_sink, around the centre that local_window uses "
            "in cross attention.",
            "Positions are those of the sequence. The release assigns rotary positions by place in its "
            "cache, which belongs to a model with rotary embeddings.",
            "The sinks are keys of the sequence; a learned sink, a logit without a value, is an option of "
            "softmax.",
        ),
    )

    def setup(self) -> None:
        """Refuse a window that shows a query nothing."""
        least = 1 if self.pattern is Pattern.CS else 0
        if self.hp.window < least or self.hp.num_sinks < 0:
            raise UsageError(
                f"sink_window under {self.pattern}: observed window={self.hp.window}, "
                f"num_sinks={self.hp.num_sinks}, expected at least {least} and 0"
            )

    @classmethod
    def at_density(cls, density: float, n: int, m: int, pattern: Pattern) -> Mapping[str, Any]:
        """The usual sinks, and a window of the other keys that the density gives a query."""
        sinks = int(cls.spec.default("num_sinks"))
        kept = max(1, keys_at(density, n, m, pattern) - sinks)
        return {"window": kept if pattern is Pattern.CS else kept // 2}

    def mask_options(self, n: int, m: int, device: torch.device) -> Mapping[str, Any]:
        """Two intervals of key positions for each query."""
        return {"mask": _mask(self.pattern, n, m, self.hp.window, self.hp.num_sinks, device)}

    def visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """The mask, bool (N, M)."""
        return _mask(self.pattern, n, m, self.hp.window, self.hp.num_sinks, device).dense(n, m)[0, 0]

    def pairs(self, n: int, m: int) -> int:
        """Visible pairs, counted row by row from the ends of the window and of the sinks."""
        low, high, last_sink = _bounds(
            self.pattern, n, m, self.hp.window, self.hp.num_sinks, torch.device("cpu")
        )
        low, high = low.clamp(min=0), high.clamp(max=m - 1)
        inside = (high - low + 1).clamp(min=0)
        last_sink = last_sink.clamp(max=m - 1)
        both = (torch.minimum(high, last_sink) - low + 1).clamp(min=0)
        return int((inside + (last_sink + 1).clamp(min=0) - both).sum())

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """The log-sum-exp, fp32, kept for the backward."""
        return 4 * self.num_heads * n


def _bounds(
    pattern: Pattern, n: int, m: int, window: int, sinks: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last key of each query's window, and the last sink that it sees, as (N,) integers."""
    if pattern is Pattern.CS:
        position = torch.arange(n, device=device) + (m - n)
        return position - (window - 1), position, position.clamp(max=sinks - 1)
    if pattern is Pattern.NS:
        centre = torch.arange(n, device=device)
    else:
        centre = centres(n, m, device, causal=pattern is Pattern.CC)
    return centre - window, centre + window, torch.full_like(centre, sinks - 1)


@lru_cache(maxsize=32)  # one mask per length: what backends derive from a mask is kept with it
@torch.inference_mode(False)
def _mask(pattern: Pattern, n: int, m: int, window: int, sinks: int, device: torch.device) -> Mask:
    low, high, last_sink = _bounds(pattern, n, m, window, sinks, device)
    keys = torch.arange(m, device=device)
    return Mask.between(low, high, keys) | Mask.between(torch.zeros_like(last_sink), last_sink, keys)
