"""flash on a GPU at real sizes: Triton and the peers against fp64, bitwise determinism, long offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Mask, RelativeBias, Unsupported, flash

pytestmark = pytest.mark.gpu

SIZES = [(1024, 1024, 64), (4096, 4096, 128), (1000, 3000, 128), (2048, 2048, 80)]
PEERS = (
    "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex",
    "flash_attn", "flash_attn3", "flash_attn4", "xformers",
)  # fmt: skip


def _inputs(n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the gradient of o that is sent back."""
    shapes = ((1, 4, n, d), (1, 2, m, d), (1, 2, m, d), (1, 4, n, d))
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def _run(inputs: list[Tensor], backend: str, need_lse: bool, **options: Any) -> list[Tensor]:
    *leaves, do = [x.detach().requires_grad_() for x in inputs]
    o, lse = flash(*leaves, **options, need_lse=need_lse, backend=backend)
    gradients = torch.autograd.grad(o, leaves, do.detach())
    return [o.detach(), *([lse.detach()] if need_lse else []), *gradients]


def _assert_close(inputs: list[Tensor], backend: str, need_lse: bool = True, **options: Any) -> None:
    truth = _run([x.double() for x in inputs], "reference", need_lse, **options)
    naive = _run(inputs, "reference", need_lse, **options)
    actual = _run(inputs, backend, need_lse, **options)
    for x, y, t in zip(actual, naive, truth, strict=True):
        allowed = 3 * (y.double() - t).abs().max() + 1e-5
        assert (x.double() - t).abs().max() <= allowed


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton(n: int, m: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    _assert_close(_inputs(n, m, d, dtype), "triton", causal=causal)


def test_every_option_of_triton() -> None:
    n, m = 1500, 2000
    options = {
        "causal": True,
        "window": (700, -1),
        "q_pos": torch.randint(0, m, (n,), device="cuda").sort().values.int(),
        "softcap": 20.0,
        "key_bias": torch.randn(1, 1, m, device="cuda"),
        "bias": torch.randn(4, n, m, device="cuda"),
        "sink": torch.randn(4, 1, device="cuda"),
    }
    _assert_close(_inputs(n, m, 64), "triton", **options)


@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize(("n", "m"), [(1024, 1024), (512, 1024)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (100, 0)}], ids=["all", "causal", "window"]
)
def test_peers(backend: str, n: int, m: int, options: dict[str, Any]) -> None:
    try:
        _assert_close(_inputs(n, m, 64), backend, need_lse=backend == "flex", **options)
    except Unsupported as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_masks(backend: str) -> None:
    n = 3000
    position = torch.arange(n, device="cuda")
    document = position // 700
    mask = Mask.upto(position) & (
        Mask.same(document) | Mask.keys(document == 0) | Mask.queries(document == 4)
    )
    _assert_close(_inputs(n, n, 64), backend, mask=mask)


def test_a_mask_costs_what_is_seen() -> None:
    """NaN in the keys and queries of hidden tiles reaches nothing: they are not read."""
    n = 4096
    segment = torch.arange(n, device="cuda") // 1024
    segment[1024:2048] = -1
    inputs = _inputs(n, n, 128)
    for x in inputs[:3]:
        x[:, :, 1024:2048] = torch.nan
    for x in _run(inputs, "triton", False, mask=Mask.same(segment)):
        assert torch.isfinite(torch.cat([x[:, :, :1024], x[:, :, 2048:]], 2)).all()


def test_gradients_of_tables_are_bitwise_reproducible() -> None:
    n, inputs = 2048, _inputs(2048, 2048, 64)
    table = torch.zeros(4, 2 * n - 1, device="cuda", requires_grad=True)
    position = torch.arange(n, device="cuda")

    def gradient(backend: str, tensors: list[Tensor]) -> Tensor:
        bias = RelativeBias(table.to(tensors[0].dtype), position + n - 1, position)
        o, _ = flash(*tensors[:3], rel_bias=bias, causal=True, backend=backend)
        return torch.autograd.grad(o, table, tensors[3])[0]

    first = gradient("triton", inputs)
    assert torch.equal(first, gradient("triton", inputs))
    truth = gradient("reference", [x.double() for x in inputs])
    assert (first - truth).abs().max() <= 2e-2 * truth.abs().max()


def test_bitwise_determinism() -> None:
    inputs = _inputs(4096, 4096, 128)
    first, second = (_run(inputs, "triton", True, causal=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """The last head of 2³¹ + elements is the same as when it is alone."""
    n, d = 128, 64
    heads = 2**31 // (n * d) + 8
    q = torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16)
    o, lse = flash(q, q, q, backend="triton")
    alone, alone_lse = flash(*(q[:, -1:],) * 3, backend="triton")
    assert torch.equal(o[:, -1:], alone)
    assert torch.equal(lse[:, -1:], alone_lse)
