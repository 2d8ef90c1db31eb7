"""Vision Mamba: one gated block around two selective scans, in reading order and against it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.linear._selective import SelectiveTerms, scan_bytes, scan_flops
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import selective_scan


class Vim(Attention):
    """y = (F(u₀, z) + F'(u₀, z)) W_out/2, F the scan of Mamba and F' one with other weights from the end."""

    spec = Spec(
        id="vim",
        name="Vision Mamba (Vim)",
        family="linear",
        kind="mixer",
        paper=Paper(
            "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
            2024,
            arxiv="2401.09417",
            venue="ICML 2024",
        ),
        upstream="https://github.com/hustvl/Vim",
        patterns=(Pattern.NS,),
        summary="Two selective scans over the tokens in raster order, one in each direction, then averaged.",
        formula="[u₀, z] = x W_in, y = ((F(u₀) + F'(u₀)) ∘ silu(z)) W_out/2; F: conv₄, silu, selective scan "
        "with skip; F' the same from the last token to the first, with its own weights",
        cost="18·N·E·Ns + 2·N·(3·C·E + 2·E·(2·rank + 2·Ns)) FLOPs with E = 2C; states of chunks 2·E·Ns·4 "
        "bytes",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        ops=("selective_scan",),
        backends=("reference", "torch", "triton"),
        hyper=(
            Hyper("state", 16, "state size Ns of a channel"),
            Hyper("expand", 2, "channels E, in multiples of C"),
            Hyper("conv_size", 4, "tokens that the short convolutions see"),
            Hyper("dt_rank", None, "rank of the step sizes; None: ⌈C/16⌉"),
            Hyper(
                "divide",
                True,
                "average the two directions, as all released models; False: add them",
                choices=(True, False),
            ),
        ),
        deviations=(
            "No class token, which upstream puts in the middle of the sequence.",
            "A padded token makes no step; to the convolutions it is 0.",
        ),
        flops_note="The counter sees the projections and the convolutions; the scans are elementwise.",
        test_hyper={"state": 4},
    )

    def setup(self) -> None:
        """Create the shared projections, and convolution and state space of both directions."""
        c = self.embed_dim
        self.width = self.hp.expand * c
        rank = self.hp.dt_rank or math.ceil(c / 16)
        self.in_proj = nn.Linear(c, 2 * self.width, bias=False)
        self.forward_terms = SelectiveTerms(self.width, self.hp.state, rank, self.hp.conv_size)
        self.backward_terms = SelectiveTerms(self.width, self.hp.state, rank, self.hp.conv_size)
        self.out_proj = nn.Linear(self.width, c, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The block on x (B, N, C), without its residual."""
        x = self.source(x, context)
        inner, z = self.in_proj(x).chunk(2, -1)
        pairs = (
            self.forward_terms(inner, key_padding_mask),
            self.backward_terms(inner, key_padding_mask, reverse=True),
        )
        u, delta, b, c = (torch.stack(both, 1) for both in zip(*pairs, strict=True))
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = [x.parameters_of_scan(wide) for x in (self.forward_terms, self.backward_terms)]
        rates, skip, bias = (torch.stack(both) for both in zip(*parameters, strict=True))
        y, _ = selective_scan(
            u,
            delta,
            rates,
            b,
            c,
            skip=skip,
            z=z,
            delta_bias=bias,
            delta_softplus=True,
            order=_both_ways(x.shape[1], x.device),
            backend=self.backend,
        )
        return self.out_proj(y.mean(1) if self.hp.divide else y.sum(1))

    def flops(self, n: int, m: int) -> int:
        """Projections, convolutions and scans."""
        return self.counted_flops(n, m) + 2 * scan_flops(n, self.width, self.hp.state)

    def counted_flops(self, n: int, m: int) -> int:
        """Without the scans, which are elementwise."""
        directions = self.forward_terms.flops(n) + self.backward_terms.flops(n)
        return 6 * n * self.embed_dim * self.width + directions

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Inner activations u, Δ, y of both directions and z, and the states of the chunks."""
        return 7 * n * self.width * itemsize + 2 * scan_bytes(n, self.width, self.hp.state)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _both_ways(n: int, device: torch.device) -> Tensor:
    """Orders (2, N): first to last and last to first."""
    order = torch.arange(n, device=device, dtype=torch.int32)
    return torch.stack((order, order.flip(0)))
