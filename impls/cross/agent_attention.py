"""Agent attention: a few agents read all keys, every query reads the agents: softmax attention of rank n."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.errors import UsageError
from attnbench.impls.base import Attention, Grid
from attnbench.impls.cross._resize import linear_matrix, on_axes, on_axes_flops, pooling_matrix
from attnbench.impls.spec import Hyper, Paper, Pattern, Spec
from attnbench.kernels import few_query, padding_bias

INIT_STD = 0.02
TABLE = 7
"""Side of the table that is resized to the grid for every agent and head."""

Plane = tuple[int, int]


class AgentAttention(Attention):
    """o = softmax(q Aᵀ/√D + B₂) (softmax(A kᵀ/√D + B₁) v) + DWC(v), A the pooled queries."""

    spec = Spec(
        id="agent_attention",
        name="Agent Attention",
        family="cross",
        kind="core",
        paper=Paper(
            "Agent Attention: On the Integration of Softmax and Linear Attention",
            2023,
            arxiv="2312.08874",
            venue="ECCV 2024",
        ),
        upstream="https://github.com/LeapLabTHU/Agent-Attention",
        patterns=(Pattern.NS, Pattern.NC, Pattern.CC),
        summary="Agents pooled from the queries gather from the keys and hand on to the queries, by two "
        "softmaxes.",
        formula="A = pool(q) on √n × √n; V_A = softmax(A kᵀ/√D + B₁) v; o = softmax(q Aᵀ/√D + B₂) V_A + "
        "DWC(v)",
        cost="4·n·(N + M)·C + 18·N·C FLOPs; n·C·e and H·n·(N + M)·e bytes, the latter for the biases",
        row_sum="free",
        query_separable=False,
        permutation_invariant=False,
        linear_in_v=False,
        padding="pools, tables and the convolution count positions, which dropping a key shifts",
        square_heads="the depthwise convolution has one filter for each of the H·D channels",
        grid_ranks=(1, 2),
        grid_kv=True,
        ops=("few_query",),
        hyper=(
            Hyper("num_agents", 49, "agents n, a square; along a sequence n, on a plane √n × √n"),
            Hyper(
                "agents",
                None,
                "what agents are: pooled queries, pooled keys (context), parameters (learned); "
                "None: query, under CC context",
                choices=(None, "query", "context", "learned"),
            ),
            Hyper("positions", True, "the position biases B₁ and B₂"),
            Hyper("table_side", 14, "side of the grid that the row and column tables are made for"),
            Hyper("conv", True, "the depthwise convolution of the values"),
        ),
        deviations=(
            "A sequence is a plane of one row: agents, tables and convolution work along it.",
            "Row and column tables are resized like the square one where the grid has another side.",
            "CC is ours: agents do not come from the queries, and B₂ and the convolution, which know the "
            "grid of the queries, are off.",
            "NC: values on another grid than the queries are resized linearly before the convolution.",
            "Padding is left out of the pools. No class token.",
        ),
        test_hyper={"num_agents": 4, "table_side": 4},
    )

    def setup(self) -> None:
        """Create tables, filters and learned agents."""
        hp, h = self.hp, self.num_heads
        n = hp.num_agents
        if n < 1 or math.isqrt(n) ** 2 != n or hp.table_side < 1:
            raise UsageError(
                f"agent_attention: observed num_agents={n}, table_side={hp.table_side}, "
                "expected a square number of agents and a positive side"
            )
        causal = self.pattern is Pattern.CC
        self.origin = hp.agents or ("context" if causal else "query")
        if causal and self.origin == "query":
            raise UsageError(
                "agent_attention under CC: observed agents='query', expected 'context' or 'learned': "
                "pooled queries know the later ones"
            )
        if self.origin == "learned":
            self.agent = nn.Parameter(_drawn(h, n, self.head_dim))
        self.key_tables = _tables(h, n, hp.table_side) if hp.positions else None
        self.query_tables = _tables(h, n, hp.table_side) if hp.positions and not causal else None
        c = self.embed_dim
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c) if hp.conv and not causal else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Grid = None,
        key_padding_mask: Tensor | None = None,
        grid_kv: Grid = None,
        **inputs: Any,
    ) -> Tensor:
        """Attend from q (B, H, N, D) on ``grid`` to k, v (B, H, M, D) on ``grid_kv``; None is a sequence."""
        queries, keys = self._planes(q.shape[2], k.shape[2], grid, grid_kv)
        agents, live = self._agents(q, k, queries, keys, key_padding_mask)
        summary = self._read(agents, k, v, _positions(self.key_tables, keys), padding_bias(key_padding_mask))
        to_agents = _positions(self.query_tables, queries)
        dead = None if live is None else padding_bias(~live)
        o = self._read(q, agents, summary, None if to_agents is None else to_agents.mT, dead)
        if self.conv is None:
            return o
        return o + self._convolved(self.conv, v, queries, keys, key_padding_mask)

    def _planes(self, n: int, m: int, grid: Grid, grid_kv: Grid) -> tuple[Plane, Plane]:
        """The grids of queries and keys, a sequence as one row."""
        given = (grid, grid_kv if self.pattern.cross else grid)
        queries, keys = (
            (1, count) if sides is None or len(sides) == 1 else (sides[0], sides[1])
            for sides, count in zip(given, (n, m), strict=True)
        )
        return queries, keys

    def _agents(
        self, q: Tensor, k: Tensor, queries: Plane, keys: Plane, padded: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The agents (B, H, n, D), and which of them pool any token, (B, n), where there is padding."""
        if self.origin == "learned":
            return self.agent.expand(q.shape[0], -1, -1, -1), None
        tokens, plane = (q, queries) if self.origin == "query" else (k, keys)
        sizes = self._pooled(plane)
        if padded is None or (self.origin == "query" and self.pattern.cross):
            return on_axes(tokens, plane, sizes, pooling_matrix), None
        kept = (~padded).unsqueeze(-1).to(tokens.dtype)
        share = on_axes(kept, plane, sizes, pooling_matrix)
        total = on_axes(tokens.masked_fill(padded[:, None, :, None], 0.0), plane, sizes, pooling_matrix)
        live = share.squeeze(-1) > 0
        return total / share.masked_fill(share == 0, 1.0).unsqueeze(1), live

    def _pooled(self, plane: Plane) -> Plane:
        n = self.hp.num_agents
        return (1, n) if plane[0] == 1 else (math.isqrt(n), math.isqrt(n))

    def _read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None) -> Tensor:
        o, _ = few_query(q, k, v, bias=bias, key_bias=key_bias, need_lse=False, backend=self.backend)
        return o

    def _convolved(
        self, conv: nn.Conv2d, v: Tensor, queries: Plane, keys: Plane, padded: Tensor | None
    ) -> Tensor:
        """The values on the queries' grid, each channel with its neighbourhood: (B, H, N, D)."""
        if padded is not None:
            v = v.masked_fill(padded[:, None, :, None], 0.0)
        v = on_axes(v, keys, queries, linear_matrix)
        image = v.transpose(-1, -2).flatten(1, 2).unflatten(-1, queries)
        mixed: Tensor = conv(image)
        return mixed.flatten(-2).unflatten(1, (self.num_heads, -1)).transpose(-1, -2)

    def flops(self, n: int, m: int, *, grid: Grid = None, grid_kv: Grid = None) -> int:
        """The pool, two attentions over n agents, the resized tables, the convolution."""
        queries, keys = self._planes(n, m, grid, grid_kv)
        c, few = self.embed_dim, self.hp.num_agents
        total = 4 * few * (n + m) * c
        if self.origin != "learned":
            pooled = queries if self.origin == "query" else keys
            total += on_axes_flops(pooled, self._pooled(pooled), c)
        for tables, plane in ((self.key_tables, keys), (self.query_tables, queries)):
            if tables is not None:
                total += self.num_heads * few * _positions_flops(plane, self.hp.table_side)
        if self.conv is not None:
            total += on_axes_flops(keys, queries, c) + 18 * n * c
        return total

    def extra_bytes(self, n: int, m: int, itemsize: int) -> int:
        """Agents and what they read; the biases, which a batch shares, count in full."""
        few = self.hp.num_agents
        tables = sum(count for count, t in ((m, self.key_tables), (n, self.query_tables)) if t is not None)
        return itemsize * few * (2 * self.embed_dim + self.num_heads * tables)


def _drawn(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD)


def _tables(heads: int, agents: int, side: int) -> nn.ParameterDict:
    """Per head and agent a square table, a row table and a column table."""
    return nn.ParameterDict(
        {
            "square": nn.Parameter(_drawn(heads, agents, TABLE, TABLE)),
            "row": nn.Parameter(_drawn(heads, agents, side)),
            "column": nn.Parameter(_drawn(heads, agents, side)),
        }
    )


def _positions(tables: nn.ParameterDict | None, plane: Plane) -> Tensor | None:
    """The bias of every agent and place of the grid, (H, n, rows·columns): the tables resized and added."""
    if tables is None:
        return None
    square, row, column = tables["square"], tables["row"], tables["column"]
    at = square.dtype, square.device
    down, across = linear_matrix(TABLE, plane[0], *at), linear_matrix(TABLE, plane[1], *at)
    bias = down @ square @ across.mT
    bias = bias + (row @ linear_matrix(row.shape[-1], plane[0], *at).mT).unsqueeze(-1)
    bias = bias + (column @ linear_matrix(column.shape[-1], plane[1], *at).mT).unsqueeze(-2)
    return bias.flatten(-2)


def _positions_flops(plane: Plane, side: int) -> int:
    """FLOPs of :func:`_positions` for one head and agent."""
    rows, columns = plane
    return 2 * rows * TABLE * (TABLE + columns) + 2 * side * (rows + columns)
