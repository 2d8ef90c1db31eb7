"""Longformer: a dilated sliding window, and a few tokens that see and are seen by all."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.spec import Hyper, Input, Paper
from attnbench.impls.synthetic import Dims
from attnbench.kernels import flash, padding_bias
from attnbench.kernels.flash import Mask


def _first_is_global(
    dims: Dims, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Tensor:
    """Token 0, as for classification."""
    flags = torch.zeros(shape, dtype=torch.bool, device=device)
    flags[..., :1] = True
    return flags


class Longformer(Attention):
    """Windowed softmax attention with global tokens, which have projections of their own."""

    spec = Spec(
        id="longformer",
        name="Longformer",
        family="sparse",
        kind="mixer",
        paper=Paper("Longformer: The Long-Document Transformer", 2020, arxiv="2004.05150"),
        upstream="https://github.com/allenai/longformer",
        patterns=(Pattern.NS, Pattern.CS),
        summary="A sliding window, dilated in some heads, and a few global tokens that exchange with "
        "everybody.",
        formula="i ∉ G: softmax over {|i − j| ≤ w·d_h, d_h | i − j} ∪ G of q_i·k_j / √D; "
        "i ∈ G: softmax over all j of q'_i·k'_j / √D, values v'",
        cost="4·H·D·(N·(2w + 1 + |G|) + |G|·N) FLOPs and projections",
        permutation_invariant=False,
        linear_in_v=False,
        ops=("flash",),
        hyper=(
            Hyper(
                "window", 256, "keys w on each side, in steps of the dilation; CS: past keys besides its own"
            ),
            Hyper("dilation", 1, "step d between the keys of a window: one number, or one for each head"),
            Hyper("max_global", 16, "most global tokens of a sequence; more are an error"),
            Hyper("share_global", False, "global tokens use the projections of the others"),
        ),
        inputs=(
            Input(
                "global_tokens",
                "True for a token that sees and is seen by all; none without. NS only",
                "(B, N)",
                _first_is_global,
            ),
        ),
        test_hyper={"window": 2, "dilation": 2, "max_global": 2},
        padding="windows are counted in positions, which dropping a token shifts",
        deviations=(
            "CS has windows alone: a global token would show the future.",
            "Masked scores are −∞, not −10000, and a padded query outputs the bias of the output projection.",
            "Global tokens beyond max_global stop the call; on a GPU asynchronously.",
        ),
    )

    def setup(self) -> None:
        """Create the projections; those of global tokens start as copies."""
        hp = self.hp
        steps = self._dilations()
        if hp.window < 0 or min(steps) < 1 or hp.max_global < 1:
            raise UsageError(
                f"longformer: observed window={hp.window}, dilation={hp.dilation}, "
                f"max_global={hp.max_global}, expected a window ≥ 0 and positive numbers"
            )
        c = self.embed_dim
        self.qkv = nn.Linear(c, 3 * c, bias=self.bias)
        self.out_proj = nn.Linear(c, c, bias=self.bias)
        self.global_qkv: nn.Linear | None = None
        if not hp.share_global and self.pattern is Pattern.NS:
            self.global_qkv = nn.Linear(c, 3 * c, bias=self.bias)
            self.global_qkv.load_state_dict(self.qkv.state_dict())

    def _dilations(self) -> tuple[int, ...]:
        given = self.hp.dilation
        steps = tuple(given) if isinstance(given, list | tuple) else (given,) * self.num_heads
        if len(steps) != self.num_heads:
            raise UsageError(
                f"longformer: observed {len(steps)} dilations, expected one or one for each of "
                f"{self.num_heads} heads"
            )
        return steps

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        global_tokens: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend within x (B, N, C); ``global_tokens`` (B, N) bool marks the global ones."""
        self.source(x, context)
        q, k, v = (self.split(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        mask = _window(self.pattern, x.shape[1], self.hp.window, self._dilations(), x.device)
        flags = global_tokens if self.pattern is Pattern.NS else None
        if flags is not None:
            mask = mask | Mask.keys(flags.unsqueeze(1))
        bias = padding_bias(key_padding_mask)
        o, _ = flash(q, k, v, mask=mask, key_bias=bias, need_lse=False, backend=self.backend)
        if flags is not None:
            o = self._with_global_rows(x, (q, k, v), o, flags, bias)
        return self.out_proj(self.join(o))

    def _with_global_rows(
        self,
        x: Tensor,
        local: tuple[Tensor, Tensor, Tensor],
        o: Tensor,
        flags: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The output with the rows of global tokens replaced by full attention with their projections."""
        n = x.shape[1]
        most = min(self.hp.max_global, n)
        torch._assert_async(
            (flags.sum(-1) <= most).all(), f"longformer: a sequence has more than {most} global tokens"
        )
        rows = flags.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
        if self.global_qkv is None:
            q, k, v = local
            chosen = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1]))
        else:
            tokens = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            chosen, k, v = (self._global(source, part) for part, source in enumerate((tokens, x, x)))
        full, _ = flash(chosen, k, v, key_bias=bias, need_lse=False, backend=self.backend)
        live = flags.gather(1, rows)[:, None, :, None]
        index = rows[:, None, :, None].expand(full.shape)
        return o.scatter(2, index, torch.where(live, full, o.gather(2, index)).to(o.dtype))

    def _global(self, source: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2) of global tokens, (B, H, ·, D)."""
        assert self.global_qkv is not None
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        offset = self.global_qkv.bias[rows] if self.bias else None
        return self.split(nn.functional.linear(source, self.global_qkv.weight[rows], offset), self.num_heads)

    def flops(self, n: int, m: int) -> int:
        """Projections, the window with one column for each global token, and their rows."""
        globals_ = min(self.hp.max_global, n) if self.pattern is Pattern.NS else 0
        pairs = self._window_pairs(n) + 2 * self.num_heads * globals_ * n
        return self._projections(n, globals_) + 4 * self.head_dim * pairs

    def _projections(self, n: int, globals_: int) -> int:
        c = self.embed_dim
        own = 0 if not globals_ or self.hp.share_global else 2 * c * c * (2 * n + globals_)
        return 8 * n * c * c + own

    def _window_pairs(self, n: int) -> int:
        """Pairs inside the windows of all heads, exactly."""
        total = 0
        for step in self._dilations():
            for distance in range(0, min(self.hp.window * step, n - 1) + 1, step):
                sides = 1 if distance == 0 or self.pattern is Pattern.CS else 2
                total += sides * (n - distance)
        return total

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair and masks."""
        globals_ = min(self.hp.max_global, n) if self.pattern is Pattern.NS else 0
        return self._projections(n, globals_) + 4 * self.embed_dim * n * (n + globals_)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """q, k, v of all tokens, again for global ones, and the log-sum-exp, fp32."""
        triples = 2 if self.global_qkv is not None else 1
        return 3 * triples * n * self.embed_dim * itemsize + 4 * self.num_heads * n


@lru_cache(maxsize=32)  # one mask per length: what backends derive from a mask is kept with it
@torch.inference_mode(False)
def _window(pattern: Pattern, n: int, window: int, steps: tuple[int, ...], device: torch.device) -> Mask:
    """Keys within ``window`` steps on each side, only past ones under CS; every head has its step."""
    position = torch.arange(n, device=device)
    step = torch.tensor(steps, device=device).unsqueeze(-1)
    reach = window * step
    ahead = torch.zeros_like(reach) if pattern is Pattern.CS else reach
    mask = Mask.between(position - reach, position + ahead, position)
    return mask if max(steps) == 1 else mask & Mask.same(position % step)
