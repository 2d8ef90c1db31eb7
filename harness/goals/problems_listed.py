"""Problems of the operations without a goal: those over lists of keys, lopsided or third-order ones.

They are raced beside eager PyTorch, so that a slow kernel shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbench.harness.goals.problem import Problem, Source, attention_flops
from attnbench.harness.goals.settings import Setting
from attnbench.kernels.block_mass import block_mass
from attnbench.kernels.buckets import Buckets, buckets
from attnbench.kernels.few_query import few_query
from attnbench.kernels.flash import flash
from attnbench.kernels.flash_int8 import flash_int8
from attnbench.kernels.gather import gather
from attnbench.kernels.query_softmax import query_softmax
from attnbench.kernels.tensor3 import tensor3
from attnbench.kernels.token_blocks import token_blocks
from attnbench.kernels.token_selection import TokenBlocks, TokenKeys


def _few_query(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(setting.m), draw.heads(setting.m)

    def forward(backend: str) -> Tensor:
        return few_query(q, k, v, need_lse=False, backend=backend)[0]

    return draw.problem((q, k, v), forward, attention_flops(setting, setting.n * setting.m), q)


def _gather(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    lists = TokenKeys.from_indices(_choices(draw, setting.n, setting.kept), setting.n)

    def forward(backend: str) -> Tensor:
        return gather(q, k, v, lists, backend=backend)[0]

    return draw.problem((q, k, v), forward, attention_flops(setting, setting.n * setting.kept), v)


def _token_blocks(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    chosen = _choices(draw, -(-setting.n // setting.block), setting.kept)
    lists = TokenBlocks.from_indices(chosen, setting.block, setting.n)

    def forward(backend: str) -> Tensor:
        return token_blocks(q, k, v, lists, backend=backend)[0]

    pairs = setting.n * min(setting.n, setting.kept * setting.block)
    return draw.problem((q, k, v), forward, attention_flops(setting, pairs), v)


def _choices(draw: Source, among: int, kept: int) -> Tensor:
    """(1, 1, N, kept): as many distinct entries for every query, at random."""
    shape = (1, 1, draw.setting.n, among)
    return torch.rand(shape, generator=draw.generator, device=draw.generator.device).topk(kept).indices


def _buckets(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()
    shape = (1, setting.heads, setting.n)
    order = torch.rand(shape, generator=draw.generator, device=q.device).argsort(-1)
    lists = Buckets.chunks(order, setting.block, setting.n, look_back=1, distinct=True)

    def forward(backend: str) -> Tensor:
        return buckets(q, k, v, lists, backend=backend)[0]

    return draw.problem((q, k, v), forward, attention_flops(setting, setting.n * 2 * setting.block), v)


def _block_mass(setting: Setting, draw: Source) -> Problem:
    q, k = draw.heads(), draw.heads()
    with torch.no_grad():
        lse = flash(q, k, k, causal=True)[1]
    assert lse is not None
    b = setting.block

    def forward(backend: str) -> Tensor:
        return block_mass(q, k, lse, block_q=b, block_k=b, causal=True, backend=backend)

    blocks = -(-setting.n // b)
    like = q.new_empty(setting.batch, setting.heads, blocks, blocks)
    pairs = setting.n * (setting.n + 1) // 2
    return draw.problem((q, k), forward, attention_flops(setting, pairs) // 2, like)


def _query_softmax(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(setting.m), draw.heads(setting.m)

    def forward(backend: str) -> Tensor:
        o = query_softmax(q, k, v, normalize=True, eps=1e-6, backend=backend).o
        assert o is not None  # it is where values are given
        return o

    return draw.problem((q, k, v), forward, attention_flops(setting, setting.n * setting.m), q)


def _flash_int8(setting: Setting, draw: Source) -> Problem:
    q, k, v = draw.heads(), draw.heads(), draw.heads()

    def forward(backend: str) -> Tensor:
        return flash_int8(q, k, v, causal=True, need_lse=False, backend=backend)[0]

    pairs = setting.n * (setting.n + 1) // 2
    return draw.problem((q, k, v), forward, attention_flops(setting, pairs), v)


def _tensor3(setting: Setting, draw: Source) -> Problem:
    q, k1, k2, v1, v2 = (draw.heads() for _ in range(5))

    def forward(backend: str) -> Tensor:
        return tensor3(q, k1, k2, v1, v2, backend=backend)[0]

    return draw.problem((q, k1, k2, v1, v2), forward, attention_flops(setting, setting.n**3), q)


BUILDERS: dict[str, Callable[[Setting, Source], Problem]] = {
    "few_query": _few_query,
    "gather": _gather,
    "token_blocks": _token_blocks,
    "buckets": _buckets,
    "block_mass": _block_mass,
    "query_softmax": _query_softmax,
    "flash_int8": _flash_int8,
    "tensor3": _tensor3,
}
