"""Tensors and calls of a setting: equal inputs for every backend, drawn from a seed.

A call runs the public function of an operation and, with a backward, the gradients of all its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnbench.harness.goals import problems_listed
from attnbench.harness.goals.problem import Problem, Source, attention_flops
from attnbench.harness.goals.settings import Setting
from attnbench.kernels import Selection, block_sparse, flash, kv_reduce, linrec
from attnbench.kernels.neighborhood import Neighborhood, neighborhood
from attnbench.kernels.selective_scan import selective_scan
from attnbench.kernels.window import Partition, window

SEED = 0
STATES = 16
"""State size of the selective scan, Mamba's."""


def build(setting: Setting, device: str) -> Problem:
    """Draw the inputs of ``setting`` on ``device``."""
    generator = torch.Generator(device).manual_seed(SEED)
    return _BUILDERS[setting.op](setting, Source(setting, generator))


def _flash(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()

    def forward(backend: str) -> Tensor:
        return flash(q, k, v, causal=setting.causal, need_lse=False, backend=backend)[0]

    n = setting.n
    pairs = n * (n + 1) // 2 if setting.causal else n * n
    return draw.problem((q, k, v), forward, attention_flops(setting, pairs), v)


def _linrec(setting: Setting, draw: Source) -> Problem:
    b, h, n, d = setting.batch, setting.heads, setting.n, setting.head_dim
    delta = setting.gate in ("delta", "gated_delta")
    q, v = draw.heads(), draw.heads()
    k = draw.unit() if delta else draw.heads()
    per_head = torch.linspace(-0.1, -0.001, h, device=q.device) if setting.gate == "head" else None
    shapes = {"scalar": (b, h, n), "gated_delta": (b, h, n), "vector": (b, h, n, d)}
    gate = draw.gate(*shapes[setting.gate]) if setting.gate in shapes else None
    beta = draw.share(b, h, n) if delta else None
    g = per_head if gate is None else gate

    def forward(backend: str) -> Tensor:
        return linrec(
            q, k, v, g=g, beta=beta, rule="delta" if delta else "add", scale=d**-0.5, backend=backend
        )[0]

    inputs = [x for x in (q, k, v, gate, beta) if x is not None]
    # the recurrence itself: chunks only add to it
    return draw.problem(inputs, forward, 4 * b * h * n * d * d, v, recomputes=False)


def _block_sparse(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    blocks = -(-setting.n // setting.block)
    kept = max(1, round(setting.density * blocks))
    order = torch.rand(blocks, blocks, generator=draw.generator, device=q.device).argsort(-1)
    mask = (order < kept).view(1, 1, blocks, blocks)  # as many blocks in every row, at random places
    selection = Selection.from_block_mask(
        mask, setting.block, setting.block, setting.n, setting.n, k_max=kept
    )

    def forward(backend: str) -> Tensor:
        return block_sparse(q, k, v, selection, backend=backend)[0]

    pairs = min(setting.n, kept * setting.block) * setting.n
    return draw.problem((q, k, v), forward, attention_flops(setting, pairs), v)


def _neighborhood(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    pattern = Neighborhood.of(setting.window, stride=setting.stride)

    def forward(backend: str) -> Tensor:
        return neighborhood(q, k, v, pattern, grid=setting.grid, backend=backend)[0]

    pairs = setting.n * math.prod(setting.window)
    return draw.problem((q, k, v), forward, attention_flops(setting, pairs), v)


def _window(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    partition = Partition.block(setting.window)
    bias = draw.normal(setting.heads, *partition.table)

    def forward(backend: str) -> Tensor:
        return window(q, k, v, partition, grid=setting.grid, bias=bias, backend=backend)[0]

    pairs = setting.n * math.prod(setting.window)
    return draw.problem((q, k, v, bias), forward, attention_flops(setting, pairs), v)


def _selective_scan(setting: Setting, draw: Source) -> Problem:
    b, n, e = setting.batch, setting.n, setting.heads * setting.head_dim
    u, delta, z = (draw.normal(b, n, e) for _ in range(3))
    write, read = draw.normal(b, n, STATES), draw.normal(b, n, STATES)
    a = -torch.arange(1, STATES + 1, device=u.device, dtype=torch.float32).repeat(e, 1)
    skip, shift = torch.ones(e, device=u.device), torch.full((e,), -4.0, device=u.device)

    def forward(backend: str) -> Tensor:
        return selective_scan(
            u,
            delta,
            a,
            write,
            read,
            skip=skip,
            z=z,
            delta_bias=shift,
            delta_softplus=True,
            backend=backend,
        )[0]

    return draw.problem((u, delta, write, read, z), forward, 9 * b * n * e * STATES, u, recomputes=False)


def _kv_reduce(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()

    def forward(backend: str) -> Tensor:
        return kv_reduce(q, k, v, feature_map="elu1", backend=backend)

    flops = 4 * setting.batch * setting.heads * setting.n * setting.head_dim**2
    return draw.problem((q, k, v), forward, flops, v, recomputes=False)


_BUILDERS: dict[str, Callable[[Setting, Source], Problem]] = {
    "flash": _flash,
    "linrec": _linrec,
    "block_sparse": _block_sparse,
    "neighborhood": _neighborhood,
    "window": _window,
    "selective_scan": _selective_scan,
    "kv_reduce": _kv_reduce,
    **problems_listed.BUILDERS,
}
