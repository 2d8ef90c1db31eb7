"""agent_attention against its steps with PyTorch's pooling and resizing, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.cross._resize import linear_matrix, on_axes, pooling_matrix

ID = "agent_attention"
BACKENDS = ("reference", "torch")
PLAIN = {"positions": False, "conv": False}


def build(pattern: str = "NS", backend: str = "reference", **hyper: object) -> nn.Module:
    hyper = {"num_agents": 4, "table_side": 5, **hyper}
    module = attnbench.build(ID, 16, 2, pattern=pattern, backend=backend, **hyper).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def heads(n: int) -> Tensor:
    return torch.randn(2, 2, n, 8, dtype=torch.float64)


def image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, N, D) → (B, H·D, rows, columns)."""
    return x.transpose(-1, -2).flatten(1, 2).unflatten(-1, grid)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).unflatten(1, (2, 8)).transpose(-1, -2)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def table(tables: nn.ParameterDict, grid: tuple[int, int]) -> Tensor:
    """The bias (H, n, ∏grid) from the three tables."""
    total = resized(tables["square"], grid)
    total = total + resized(tables["row"].unsqueeze(-1), (grid[0], 1))
    return (total + resized(tables["column"].unsqueeze(-2), (1, grid[1]))).flatten(-2)


def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
    """Softmax attention, one row at a time."""
    b, h, n, d = q.shape
    bias = torch.as_tensor(bias, dtype=q.dtype).expand(h, n, k.shape[2])
    o = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for e, g, i in ((e, g, i) for e in range(b) for g in range(h) for i in range(n)):
        scores = k[e, g] @ q[e, g, i] / math.sqrt(d) + bias[g, i]
        weights = scores.exp() / scores.exp().sum()
        o[e, g, i] = weights @ v[e, g]
    return o


def direct(
    m: nn.Module, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], grid_kv: tuple[int, int]
) -> Tensor:
    source, plane = (q, grid) if m.origin == "query" else (k, grid_kv)
    pooled = (2, 2) if plane[0] > 1 else (1, 4)
    agents = tokens(F.adaptive_avg_pool2d(image(source, plane), pooled))
    if m.origin == "learned":
        agents = m.agent.expand(2, -1, -1, -1)
    b1 = 0.0 if m.key_tables is None else table(m.key_tables, grid_kv)
    b2 = 0.0 if m.query_tables is None else table(m.query_tables, grid).mT
    o = read(q, agents, read(agents, k, v, b1), b2)
    if m.conv is not None:
        o = o + tokens(m.conv(resized(image(v, grid_kv), grid)))
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hyper", [{}, PLAIN, {"agents": "context"}, {"agents": "learned"}])
@torch.no_grad()
def test_equals_the_steps_on_a_plane(backend: str, hyper: dict[str, object]) -> None:
    module = build("NS", backend, **hyper)
    q, k, v = heads(20), heads(20), heads(20)
    torch.testing.assert_close(module.attend(q, k, v, grid=(4, 5)), direct(module, q, k, v, (4, 5), (4, 5)))
    module = build("NC", backend, **hyper)
    k, v = heads(18), heads(18)
    o = module.attend(q, k, v, grid=(4, 5), grid_kv=(3, 6))
    torch.testing.assert_close(o, direct(module, q, k, v, (4, 5), (3, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "NC", "CC"])
@torch.no_grad()
def test_a_sequence_is_a_plane_of_one_row(pattern: str, backend: str) -> None:
    module, n, m = build(pattern, backend), 9, 9 if pattern == "NS" else 14
    q, k, v = heads(n), heads(m), heads(m)
    torch.testing.assert_close(module.attend(q, k, v), direct(module, q, k, v, (1, n), (1, m)))


@pytest.mark.parametrize(("source", "target"), [(1, 4), (3, 7), (7, 3), (9, 9), (14, 4), (5, 1)])
def test_axes_are_resized_and_pooled_as_pytorch_does(source: int, target: int) -> None:
    x = torch.randn(2, 3, source, dtype=torch.float64)
    at = (source, target, x.dtype, x.device)
    expected = F.interpolate(x, size=target, mode="linear", align_corners=False)
    torch.testing.assert_close(x @ linear_matrix(*at).mT, expected)
    torch.testing.assert_close(x @ pooling_matrix(*at).mT, F.adaptive_avg_pool1d(x, target))


def test_three_axes_are_resized_one_by_one() -> None:
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = F.interpolate(x, size=(2, 5, 7), mode="trilinear", align_corners=False)
    got = on_axes(x.flatten(2).transpose(1, 2), (4, 5, 6), (2, 5, 7), linear_matrix)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_agent_reads_for_every_query(backend: str) -> None:
    q, k, v = heads(9), heads(9), heads(9)
    o = attnbench.attention(q, k, v, ID, "NS", backend, num_agents=1, **PLAIN)
    expected = read(q.mean(2, keepdim=True), k, v, 0.0)
    torch.testing.assert_close(o, expected.expand_as(o))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_positions_it_is_stochastic_and_knows_no_order_of_the_keys(backend: str) -> None:
    q, k, v = heads(9), heads(12), heads(12)
    o = attnbench.attention(q, k, v, ID, "NC", backend, num_agents=4, **PLAIN)
    order = torch.randperm(12)
    permuted = attnbench.attention(
        q, k[:, :, order], v[:, :, order], ID, "NC", backend, num_agents=4, **PLAIN
    )
    torch.testing.assert_close(permuted, o)
    ones = attnbench.attention(q, k, torch.ones_like(v), ID, "NC", backend, num_agents=4, **PLAIN)
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_the_map_has_the_rank_of_the_agents() -> None:
    q, k = heads(20), heads(20)
    v = torch.eye(20, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = attnbench.attention(q, k, v, ID, "NS", "reference", num_agents=4, **PLAIN)
    assert int(torch.linalg.matrix_rank(weights[0, 0])) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hyper", [{}, {"agents": "context"}])
@torch.no_grad()
def test_padding_is_in_no_pool_no_softmax_and_no_neighbourhood(
    backend: str, hyper: dict[str, object]
) -> None:
    module = build("NS", backend, **hyper)
    q, k, v = heads(20), heads(20), heads(20)
    padded = torch.zeros(2, 20, dtype=torch.bool)
    padded[0, 3:11] = True
    padded[1, :10] = True  # the upper agents pool nothing
    hidden = padded[:, None, :, None]
    options = {"grid": (4, 5), "key_padding_mask": padded}
    o = module.attend(q, k, v, **options)
    other = [torch.where(hidden, 100 * torch.randn_like(t), t) for t in (q, k, v)]
    changed = module.attend(*other, **options).masked_fill(hidden, 0.0)
    torch.testing.assert_close(changed, o.masked_fill(hidden, 0.0))


def test_causal_cross_attention_needs_agents_that_do_not_come_from_the_queries() -> None:
    assert build("CC").origin == "context"
    assert build("CC").query_tables is None
    assert build("CC").conv is None
    with pytest.raises(UsageError, match="agents='query'"):
        build("CC", agents="query")


@pytest.mark.parametrize("hyper", [{"num_agents": 8}, {"num_agents": 0}, {"table_side": 0}])
def test_sizes_without_a_meaning_are_refused(hyper: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="agent_attention"):
        build(**hyper)


def test_flops_by_hand() -> None:
    """C = 16, H = 2, four agents, 20 queries on 4 × 5, 18 keys on 3 × 6, tables of 7 × 7 and 5."""
    pool = 2 * 2 * 20 * 16 + 2 * 2 * (2 * 5) * 16
    reads = 2 * 2 * 4 * (20 + 18) * 16
    keys = 2 * 4 * (2 * 3 * 7 * 7 + 2 * 3 * 7 * 6 + 2 * 5 * (3 + 6))
    queries = 2 * 4 * (2 * 4 * 7 * 7 + 2 * 4 * 7 * 5 + 2 * 5 * (4 + 5))
    conv = 2 * 9 * 20 * 16 + 2 * 4 * 18 * 16 + 2 * 5 * (4 * 6) * 16
    sizes = {"grid": (4, 5), "grid_kv": (3, 6)}
    assert build("NC").flops(20, 18, **sizes) == pool + reads + keys + queries + conv
    assert build("NC", **PLAIN).flops(20, 18, **sizes) == pool + reads
    assert build("NC", agents="learned", **PLAIN).flops(20, 18, **sizes) == reads


@pytest.mark.parametrize("pattern", ["NS", "NC", "CC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    truth = build(pattern)
    fast = attnbench.build(ID, 16, 2, pattern=pattern, backend="triton", num_agents=4, table_side=5)
    fast.load_state_dict(truth.state_dict())
    grids = {"grid": (4, 5)} if pattern == "NS" else {"grid": (2, 4), "grid_kv": (4, 5)}
    n = 20 if pattern == "NS" else 8
    inputs = [heads(c)[:1].requires_grad_() for c in (n, 20, 20)]
    single = [t.detach().float().requires_grad_() for t in inputs]
    expected, got = truth.attend(*inputs, **grids), fast.attend(*single, **grids)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3)
