"""Mixture-of-Head attention: heads are experts, each token reads a few of them and weighs their outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import flash, padding_bias
from attnbench.kernels.flash import Mask


class Routing(NamedTuple):
    """What the router says: gates (B, N, H), 0 where a head is off; probabilities and choice (B, N, Hr)."""

    gates: Tensor
    probability: Tensor | None
    chosen: Tensor | None


class MixtureOfHead(Attention):
    """y_i = Σ_h g_ih o^h_i W_O^h: H_s shared heads for every token, k of the other heads by a router."""

    spec = Spec(
        id="moh",
        name="Mixture-of-Head attention (MoH)",
        family="dense",
        kind="mixer",
        paper=Paper(
            "MoH: Multi-Head Attention as Mixture-of-Head Attention",
            2024,
            arxiv="2410.11842",
            venue="ICML 2025",
        ),
        upstream="https://github.com/SkyworkAI/MoH",
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC, Pattern.CC),
        summary="Treats heads as experts: some work for every token, the others for those tokens that a "
        "router sends to them, and a weighted sum replaces the plain one.",
        formula="y_i = Σ_h g_ih·o^h_i W_O^h; routed g = b_2·k·a_h/Σ_T a for the k largest a = softmax(x "
        "W_r), shared g = b_1·H_s·softmax(x W_s), b = 2·softmax(x W_b)",
        cost="4·N·M·(H_s + k)·D + 2·N·C·(H + 2) FLOPs and the projections, 4·H·N + 4·N·C·e bytes",
        row_sum="free",
        linear_in_v=False,
        grouped_kv=True,
        ops=("flash",),
        hyper=(
            Hyper("shared", None, "heads H_s that are always on, the first ones; ⌊H/4⌋ when None"),
            Hyper("active", None, "routed heads k that are on for a token; ⌈H/2⌉ when None"),
            Hyper(
                "router",
                "learned",
                "learned: weights by projections of x; query_norm: without parameters, from the norms of the "
                "routed heads' queries, and gates are 0 or 1",
                choices=("learned", "query_norm"),
            ),
        ),
        deviations=(
            "The Triton backend sorts the queries of a head by whether it is on for them and computes no "
            "tile that is off; the others compute every head and multiply, as the release does.",
            "The published models have from 50 to 90 % of the heads on for a token; the defaults about 75 %.",
            "Straight-through gradients of query_norm, in training, reach the heads that are on: their gate "
            "is 1 + a − sg(a). The release has its inference alone.",
            "The head mixture stands on plain softmax attention; the vision release has a cosine attention.",
            "The balance loss is a method, balance_loss, with the weight left to the training loop.",
        ),
    )

    def setup(self) -> None:
        """Create the projections and the router, which has no bias."""
        hp, h, c = self.hp, self.num_heads, self.embed_dim
        self.shared = h // 4 if hp.shared is None else hp.shared
        self.routed = h - self.shared
        self.active = -(-h // 2) if hp.active is None else hp.active
        if self.shared < 0 or not 0 <= self.active <= self.routed or self.shared + self.active < 1:
            raise UsageError(
                f"moh: observed shared={self.shared}, active={self.active} of {h} heads, expected at least "
                "one head on for a token, and no more active heads than are routed"
            )
        kv = self.num_kv_heads * self.head_dim
        self.q_proj, self.out_proj = (nn.Linear(c, c, bias=self.bias) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(c, kv, bias=self.bias) for _ in range(2))
        self.to_routed: nn.Linear | None = None
        self.to_shared: nn.Linear | None = None
        self.to_balance: nn.Linear | None = None
        if hp.router == "query_norm":
            return
        if self.active:
            self.to_routed = nn.Linear(c, self.routed, bias=False)
        if self.shared > 1:
            self.to_shared = nn.Linear(c, self.shared, bias=False)
        if self.active and self.shared:
            self.to_balance = nn.Linear(c, 2, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from x (B, N, C), which alone is routed, to itself or the context (B, M, C)."""
        tokens = self.source(x, context)
        q = self.split(self.q_proj(x), self.num_heads)
        k = self.split(self.k_proj(tokens), self.num_kv_heads)
        v = self.split(self.v_proj(tokens), self.num_kv_heads)
        gates = self.route(x, q).gates
        bias = padding_bias(key_padding_mask)
        if self.backend == "triton" or (self.backend == "auto" and q.is_cuda):
            o = self._attend_where_on(q, k, v, gates, bias)
        else:
            causal = self.pattern is Pattern.CS
            o, _ = flash(q, k, v, causal=causal, key_bias=bias, need_lse=False, backend=self.backend)
        mixed = o.transpose(1, 2) * gates.unsqueeze(-1).to(o.dtype)
        result: Tensor = self.out_proj(mixed.flatten(-2))
        return result

    def route(self, x: Tensor, q: Tensor) -> Routing:
        """Gates of x (B, N, C), with its queries q (B, H, N, D); differentiable, except in what is chosen."""
        on = x.new_ones(*x.shape[:-1], self.shared)
        if self.to_shared is not None:
            on = self.shared * self.to_shared(x).softmax(-1)
        if not self.active:
            off = x.new_zeros(*x.shape[:-1], self.routed)
            return Routing(torch.cat((on, off), -1), None, None)
        probability = self._logits(x, q).softmax(-1)
        chosen = torch.zeros_like(probability, dtype=torch.bool)
        chosen.scatter_(-1, probability.detach().topk(self.active, dim=-1).indices, True)
        kept = probability * chosen
        if self.hp.router == "query_norm":
            hard = chosen.to(x.dtype)
            routed = hard + (kept - kept.detach()) if self.training else hard
        else:
            total = kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)
            routed = self.active * kept / total
        if self.to_balance is not None:
            balance = 2 * self.to_balance(x).softmax(-1)
            on, routed = balance[..., :1] * on, balance[..., 1:] * routed
        return Routing(torch.cat((on, routed), -1), probability, chosen)

    def _logits(self, x: Tensor, q: Tensor) -> Tensor:
        """Scores of the routed heads, (B, N, Hr)."""
        if self.to_routed is not None:
            scores: Tensor = self.to_routed(x)
            return scores
        norms = torch.linalg.vector_norm(q[:, self.shared :], dim=-1).transpose(1, 2)
        if self.routed == 1:  # a single norm has no deviation, and nothing to choose from
            return norms
        return norms / norms.std(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)

    def _attend_where_on(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax attention o (B, H, N, Dv), 0 where the gate is, without the tiles that are off.

        The queries of each head are sorted, those that are on first; their places go along in a mask.
        """
        n, m = q.shape[2], k.shape[2]
        on = gates.detach().transpose(1, 2) != 0
        order = (~on).to(torch.uint8).sort(dim=-1, stable=True).indices
        place = torch.arange(n, device=q.device).expand_as(order)
        last = order + (m - n) if self.pattern is Pattern.CS else torch.full_like(order, m - 1)
        last = torch.where(on.gather(-1, order), last, -1)
        keys = torch.arange(m, device=q.device)
        first = q.gather(2, order.unsqueeze(-1).expand_as(q))
        o, _ = flash(
            first,
            k,
            v,
            mask=Mask.between(keys.new_zeros(1), last, keys),
            key_bias=bias,
            need_lse=False,
            backend=self.backend,
        )
        back = torch.empty_like(order).scatter_(-1, order, place)
        return o.gather(2, back.unsqueeze(-1).expand_as(o))

    def balance_loss(self, x: Tensor) -> Tensor:
        """H_r²·mean_h(mean probability of head h · share of the tokens that chose it) over x (B, N, C).

        1 where the load is even and all is random; the paper adds 0.01 of it, averaged over layers, to the
        loss. 0 where nothing is routed.
        """
        routing = self.route(x, self.split(self.q_proj(x), self.num_heads))
        if routing.probability is None or routing.chosen is None:
            return x.new_zeros(())
        share = routing.chosen.to(x.dtype).mean((0, 1))
        return self.routed**2 * (routing.probability.mean((0, 1)) * share).mean()

    def flops(self, n: int, m: int) -> int:
        """4·D for every visible pair of the heads that are on, the router and the projections."""
        pairs = n * m
        if self.pattern is Pattern.CS:
            pairs = n * m - n * (n - 1) // 2 if m >= n else m * (m + 1) // 2
        return 4 * (self.shared + self.active) * pairs * self.head_dim + self._linear_flops(n, m)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair of every head."""
        return 4 * n * m * self.embed_dim + self._linear_flops(n, m)

    def _linear_flops(self, n: int, m: int) -> int:
        routers = (self.to_routed, self.to_shared, self.to_balance)
        outputs = sum(router.out_features for router in routers if router is not None)
        kv = self.num_kv_heads * self.head_dim
        return 4 * n * self.embed_dim**2 + 4 * m * self.embed_dim * kv + 2 * n * self.embed_dim * outputs

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Sorted queries, outputs in both orders and their weighted sum; the log-sum-exp, fp32."""
        return 4 * n * self.embed_dim * itemsize + 4 * self.num_heads * n
