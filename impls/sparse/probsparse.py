"""ProbSparse attention: only the queries whose scores look peaked attend, the others output a mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.base import Attention, Grid, Pattern, Spec
from attnbench.impls.spec import Hyper, Paper
from attnbench.kernels import flash, padding_bias

QUERIES_AT_ONCE = 1024
"""Queries whose sampled keys are gathered at a time: bounds the memory of the measure."""


class ProbSparse(Attention):
    """Softmax attention for the u queries with the largest sparsity measure, the mean of v for the rest."""

    spec = Spec(
        id="probsparse",
        name="ProbSparse attention",
        family="sparse",
        kind="core",
        paper=Paper(
            "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
            2021,
            arxiv="2012.07436",
            venue="AAAI 2021",
        ),
        patterns=(Pattern.NS, Pattern.CS, Pattern.NC),
        summary="The u queries that look most peaked on sampled keys attend; the others output a mean of v.",
        formula="m_i = max_t q_i·k_t − (1/M) Σ_t q_i·k_t over U sampled keys; softmax for the top u",
        cost="O(N·U·D + u·M·D), U = c⌈ln M⌉, u = c⌈ln N⌉",
        upstream="zhouhaoyi/Informer2020 models/attn.py; Shark-NLP/CAB probsparse.py",
        causality="selection_leaky",
        row_sum="free",
        stochastic=True,
        query_separable=False,
        permutation_invariant=False,
        ops=("flash",),
        hyper=(
            Hyper("factor", 5, "c of the numbers of sampled keys and of active queries", cab=5),
            Hyper("seed", 0, "seed of the table of sampled keys"),
            Hyper("redraw", False, "draw a new table at every call, as the released code does"),
            Hyper(
                "inactive",
                "sum",
                "what inactive queries output under CS: the sum of the values so far, or their mean",
                choices=("sum", "prefix_mean"),
            ),
        ),
        test_hyper={"factor": 1},
        padding="the table of sampled keys and its divisor depend on M",
        deviations=(
            "The table of sampled keys is drawn once per (N, M) from a seed, so that results repeat; "
            "redraw=True draws at every call, in training and evaluation alike, as the released code does.",
            "The measure divides the sum over the sampled keys by M, as the released code does.",
            "CS is Informer's form: the choice of the active queries looks at all tokens, so it is causal "
            "only with the selection frozen. Inactive queries output the prefix sum there, as the "
            "released code does; inactive='prefix_mean' keeps rows that sum to one.",
            "A padded query is never active and a padded key never sampled; upstream has no padding.",
            "CAB's option 'mix', which transposes before heads are split, is left out.",
        ),
    )

    def setup(self) -> None:
        """Prepare the store of the tables of sampled keys."""
        self.draws = 0
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}

    def select(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """The active queries, int64 (B, H, u): those with the largest sparsity measure.

        Ties are broken by the lower index. No gradient and no host synchronisation.
        """
        n = q.shape[2]
        active = min(n, self._share(n))
        if active == n:
            return torch.arange(n, device=q.device).expand(*q.shape[:2], n)
        with torch.no_grad():
            measure = self._measure(q, k, key_padding_mask)
            if key_padding_mask is not None and not self.pattern.cross:
                measure = measure.masked_fill(key_padding_mask.unsqueeze(1), -math.inf)
            return measure.sort(dim=-1, descending=True, stable=True).indices[..., :active]

    def _measure(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The sparsity measure of every query, (B, H, N), at least in fp32."""
        n, m = q.shape[2], k.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        measures = []
        tables = self._table(n, m, q.device).split(QUERIES_AT_ONCE)
        for queries, table in zip(q.split(QUERIES_AT_ONCE, 2), tables, strict=True):
            scores = (k[:, :, table].to(wide) @ queries.to(wide).unsqueeze(-1)).squeeze(-1)  # (B, H, ·, U)
            largest, total = scores, scores
            if key_padding_mask is not None:
                hidden = key_padding_mask[:, table].unsqueeze(1)
                largest, total = scores.masked_fill(hidden, -math.inf), scores.masked_fill(hidden, 0.0)
            measures.append(largest.amax(-1) - total.sum(-1) / m)
        return torch.cat(measures, -1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        selection: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend with the active queries; ``selection`` (B, H, u) freezes which those are."""
        rows = self.select(q, k, key_padding_mask) if selection is None else selection
        index = rows.unsqueeze(-1)
        chosen = q.gather(2, index.expand(*rows.shape, q.shape[-1]))
        o, _ = flash(
            chosen,
            k,
            v,
            key_bias=padding_bias(key_padding_mask),
            bias=self._future(rows, q.shape[2], k.shape[2]),
            need_lse=False,
            backend=self.backend,
        )
        rest = self._inactive(v, q.shape[2], key_padding_mask)
        return rest.scatter(2, index.expand(*rows.shape, v.shape[-1]), o.to(rest.dtype))

    def _future(self, rows: Tensor, n: int, m: int) -> Tensor | None:
        """Under CS the additive mask (B, H, u, M) of the active queries, −inf after each one's position."""
        if self.pattern is not Pattern.CS:
            return None
        late = torch.arange(m, device=rows.device) > (rows + (m - n)).unsqueeze(-1)
        return torch.zeros(late.shape, device=rows.device).masked_fill(late, -math.inf)

    def _inactive(self, v: Tensor, n: int, key_padding_mask: Tensor | None) -> Tensor:
        """What an inactive query outputs, (B, H, N, Dv) in the dtype of v."""
        values = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        kept = torch.ones(v.shape[0], 1, v.shape[2], 1, dtype=values.dtype, device=v.device)
        if key_padding_mask is not None:
            kept = kept.masked_fill(key_padding_mask[:, None, :, None], 0.0)
            values = values.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        if self.pattern is not Pattern.CS:
            mean = values.sum(2, keepdim=True) / kept.sum(2, keepdim=True).clamp_min(1.0)
            return mean.expand(-1, -1, n, -1).to(v.dtype)
        total, count = values.cumsum(2), kept.cumsum(2).clamp_min(1.0)
        return (total if self.hp.inactive == "sum" else total / count).to(v.dtype)

    def _table(self, n: int, m: int, device: torch.device) -> Tensor:
        """Sampled keys of each query, int64 (N, U), i.i.d. with replacement, shared by batch and heads."""
        if self.hp.redraw:
            self.draws += 1
            return self._draw(n, m, device)
        if (n, m, device) not in self._tables:
            self._tables[n, m, device] = self._draw(n, m, device)
        return self._tables[n, m, device]

    def _draw(self, n: int, m: int, device: torch.device) -> Tensor:
        """A table from the seed and the number of draws, the same one on every device."""
        generator = torch.Generator().manual_seed(self.hp.seed + self.draws)
        return torch.randint(m, (n, min(m, self._share(m))), generator=generator).to(device)

    def _share(self, length: int) -> int:
        """c·⌈ln length⌉, at least 1: as many keys are sampled and as many queries are active."""
        return max(1, self.hp.factor * math.ceil(math.log(length)))

    def flops(self, n: int, m: int) -> int:
        """2·N·U·D for the sampled scores and 4·u·M·D for the active queries, per head; CS: half of the M."""
        pairs = min(n, self._share(n)) * m
        if self.pattern is Pattern.CS:  # the expectation: any query may be active
            pairs = pairs * (m + 1) // (2 * m)
        return self._flops(n, m, pairs)

    def counted_flops(self, n: int, m: int) -> int:
        """The reference computes every pair of the active queries and masks."""
        return self._flops(n, m, min(n, self._share(n)) * m)

    def _flops(self, n: int, m: int, pairs: int) -> int:
        measured = 0 if self._share(n) >= n else 2 * n * min(m, self._share(m))
        return self.num_heads * self.head_dim * (measured + 4 * pairs)

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Keys gathered for the sampled scores, fp32, and the table itself."""
        sampled = min(m, self._share(m))
        return 4 * self.num_heads * min(n, QUERIES_AT_ONCE) * sampled * self.head_dim + 8 * n * sampled
