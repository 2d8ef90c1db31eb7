"""Masks by integers per token, biases by relative position: meaning, what is skipped, gradients."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Mask, RelativeBias, Unsupported, flash
from attnbench.kernels.flash._configs import Config
from attnbench.kernels.flash._tile_lists import tile_lists

N = 24
T = torch.arange(N)
HALF, POS = T // 12, T % 12
FRAME = torch.where((T >= 4) & (T < 19), (T - 4) // 5, -1)
SCENE, VIDEO = torch.tensor([0, 0, 1, 1, 2, 2, *[0] * 6, *[1] * 6, *[2] * 6]), T >= 6
BLOCK, VALID = T // 6, T % 6 >= 2
KEPT = torch.tensor([0, 1, 1, 0] * 6).bool()
GLOBAL = (T == 0) | (T == 9)
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like

Predicate = Callable[[int, int], bool]
MASKS: dict[str, tuple[Mask, Predicate]] = {
    "block diffusion": (
        (Mask.same(torch.where(HALF == 0, POS // 3, -1)))
        | (Mask.queries(HALF == 0) & Mask.keys(HALF == 1) & Mask.upto(POS // 3, strict=True))
        | (Mask.queries(HALF == 1) & Mask.keys(HALF == 1) & Mask.upto(POS // 3)),
        lambda i, j: (
            (i < 12 and j < 12 and i // 3 == j // 3)
            or (i < 12 <= j and j % 12 // 3 < i // 3)
            or (i >= 12 and j >= 12 and j % 12 // 3 <= i % 12 // 3)
        ),
    ),
    "frames in a causal sequence": (
        Mask.upto(T) | Mask.same(FRAME),
        lambda i, j: j <= i or (4 <= i < 19 and 4 <= j < 19 and (i - 4) // 5 == (j - 4) // 5),
    ),
    "images see their question": (
        Mask.upto(T) | (Mask.queries((T >= 3) & (T < 9)) & Mask.keys((T >= 9) & (T < 15))),
        lambda i, j: j <= i or (3 <= i < 9 and 9 <= j < 15),
    ),
    "scenes of a video": (
        (Mask.queries(VIDEO) & Mask.keys(VIDEO)) | Mask.same(SCENE),
        lambda i, j: (i >= 6 and j >= 6) or SCENE[i] == SCENE[j],
    ),
    "documents of a ranking": (
        Mask.queries(VALID) & Mask.keys(VALID) & Mask.upto(T)
        & (Mask.same(BLOCK) | Mask.keys(BLOCK == 0) | Mask.queries(BLOCK == 3)),
        lambda i, j: i % 6 >= 2 and j % 6 >= 2 and j <= i and (j // 6 in (i // 6, 0) or i // 6 == 3),
    ),
    "kept tokens of a row": (
        Mask.same(torch.where(KEPT, T // 8, -1)),
        lambda i, j: bool(KEPT[i] and KEPT[j]) and i // 8 == j // 8,
    ),
    "instances by type": (Mask.same(T % 5), lambda i, j: i % 5 == j % 5),
    "dilated window and globals": (
        (Mask.window(T, left=6, right=6) & Mask.same(T % 2)) | Mask.keys(GLOBAL) | Mask.queries(GLOBAL),
        lambda i, j: i in (0, 9) or j in (0, 9) or (abs(i - j) <= 6 and (i - j) % 2 == 0),
    ),
    "blocks: window, ends": (
        Mask.window(BLOCK, left=1, right=1) | Mask.keys(BLOCK % 3 == 0) | Mask.queries(BLOCK % 3 == 0),
        lambda i, j: abs(i // 6 - j // 6) <= 1 or j // 6 in (0, 3) or i // 6 in (0, 3),
    ),
    "sinks and window": (
        Mask.upto(T) & (Mask.keys(T < 2) | Mask.window(T, left=4)),
        lambda i, j: j <= i and (j < 2 or i - j <= 4),
    ),
    "strided": (
        Mask.window(T, left=3, right=0) | (Mask.upto(T) & Mask.same(T % 4)),
        lambda i, j: j <= i and (i - j < 4 or (i - j) % 4 == 0),
    ),
    "fixed": (
        Mask.upto(T) & (Mask.same(T // 6) | Mask.keys(T % 6 == 5)),
        lambda i, j: j <= i and (i // 6 == j // 6 or j % 6 == 5),
    ),
    "windows of a grid": (
        Mask.same(T // 6 // 2) & Mask.same(T % 6 // 3),
        lambda i, j: i // 12 == j // 12 and i % 6 // 3 == j % 6 // 3,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles; fresh memory is NaN: what a kernel forgets to write is seen."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    launch = importlib.import_module("attnbench.kernels.flash._launch")
    monkeypatch.setattr(launch, "choose", lambda *args: Config(16, 16, 4, 2))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(EMPTY(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(EMPTY_LIKE(*args, **options)))


def _pairs(predicate: Predicate) -> Tensor:
    return torch.tensor([[bool(predicate(i, j)) for j in range(N)] for i in range(N)])


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_mechanisms(name: str) -> None:
    mask, predicate = MASKS[name]
    assert torch.equal(mask.dense(N, N)[0, 0], _pairs(predicate))


@pytest.mark.parametrize("name", MASKS)
def test_lists_cover_what_is_seen_and_test_what_is_not(name: str) -> None:
    mask, _ = MASKS[name]
    dense = mask.dense(N, N)[0, 0]
    for block_m, block_n, along in itertools.product((2, 6, 16), (3, 5, 16), ("keys", "queries")):
        indices, counts = (x[0, 0] for x in tile_lists(mask, N, N, block_m, block_n, along))
        tiles = [rows.split(block_n, 1) for rows in dense.split(block_m)]
        for tile, (whole, seen) in enumerate(counts.tolist()):
            visited = indices[tile, :seen].tolist()
            assert len({*visited}) == seen
            for other in range(indices.shape[1]):
                pairs = tiles[tile][other] if along == "keys" else tiles[other][tile]
                assert other in visited or not pairs.any()
                assert other not in visited[:whole] or pairs.all()


def test_masks_without_residues_visit_only_tiles_that_are_seen() -> None:
    for name in (
        "block diffusion",
        "frames in a causal sequence",
        "documents of a ranking",
        "sinks and window",
    ):
        mask, _ = MASKS[name]
        seen = mask.dense(N, N).unflatten(2, (-1, 3)).unflatten(4, (-1, 3)).any(5).any(3)
        visited = tile_lists(mask, N, N, 3, 3, "keys").counts[..., 1]
        assert torch.equal(visited, seen.sum(-1).int())


def _inputs(
    n: int, m: int, b: int = 1, h: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = ((b, h, n, 16), (b, kv_heads, m, 16), (b, kv_heads, m, 24))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _run(inputs: list[Tensor], backend: str, table: Tensor | None = None, **options: Any) -> list[Tensor]:
    o, lse = flash(*inputs, **options, backend=backend)
    weights = torch.linspace(-1, 1, o.numel(), dtype=torch.double).view(o.shape).sin().to(o.dtype)
    seen = ~lse.isneginf()
    leaves = inputs if table is None else [*inputs, table]
    gradients = torch.autograd.grad([o, lse], leaves, [weights, torch.where(seen, 0.5, 0.0).to(lse.dtype)])
    return [o.detach(), lse.detach().masked_fill(~seen, 0.0), *gradients]


def _agree(inputs: list[Tensor], backend: str = "triton", **options: Any) -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    tolerance = 5e-6 if inputs[0].dtype is torch.float32 else 1e-2
    for x, truth in zip(_run(inputs, backend, **options), _run(wide, "reference", **options), strict=True):
        assert torch.isfinite(x).all()
        assert (x.double() - truth).abs().max() <= tolerance * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "name", ["block diffusion", "documents of a ranking", "kept tokens of a row", "strided"]
)
def test_kernels_see_what_the_mask_says(name: str, backend: str) -> None:
    _agree(_inputs(N, N, kv_heads=1), backend, mask=MASKS[name][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masks_by_batch_and_head_with_unequal_lengths(dtype: torch.dtype) -> None:
    n, m = 20, 37
    group = torch.randint(-1, 3, (2, 1, n)), torch.randint(0, 3, (2, 1, m)).sort(-1).values
    reach = torch.tensor([3, 20]).view(1, 2, 1)
    near = Mask.between(torch.arange(n) - reach, torch.arange(n) + reach, torch.arange(m))
    mask = near & Mask.same(*group)
    assert mask.shape(n, m) == (2, 2)
    _agree(_inputs(n, m, b=2, kv_heads=1, dtype=dtype), mask=mask)


@pytest.mark.parametrize("positioned", [False, True])
def test_a_mask_narrows_the_other_options(positioned: bool) -> None:
    n, m = 20, 34
    options: dict[str, Any] = {"causal": True, "window": (14, -1), "softcap": 4.0}
    options["q_pos"] = torch.randint(-2, m, (n,)).sort().values.int() if positioned else None
    options["key_bias"] = torch.randn(m)
    mask = Mask.same(torch.arange(n) // 10, torch.arange(m) // 20) | Mask.keys(torch.arange(m) < 3)
    _agree(_inputs(n, m, h=1, kv_heads=1), mask=mask, **options)


def test_hidden_tiles_are_not_read() -> None:
    """NaN in keys and queries that are hidden from all, and in whole tiles that are hidden from some."""
    n = 64
    inputs = _inputs(n, n, h=1, kv_heads=1)
    segment = torch.arange(n) // 16
    segment[16:32] = -1
    with torch.no_grad():
        for x in inputs:
            x[:, :, 16:32] = math.nan
    o, lse = flash(*inputs, mask=Mask.same(segment), backend="triton")
    assert not o[:, :, 16:32].any()
    assert torch.isneginf(lse[:, :, 16:32]).all()
    gradients = torch.autograd.grad(o.sum() + lse.nan_to_num(neginf=0.0).sum(), inputs)
    for x in (o, *gradients):
        rest = torch.cat([x[:, :, :16], x[:, :, 32:]], 2)
        assert torch.isfinite(rest).all()
        assert rest.any()


def test_a_mask_is_worked_out_once() -> None:
    mask = Mask.upto(T)
    lists = tile_lists(mask, N, N, 4, 4, "keys")
    assert tile_lists(mask, N, N, 4, 4, "keys") is lists
    ids = torch.zeros(N, dtype=torch.int32)
    copied = Mask.same(ids)
    ids += torch.arange(N)
    assert copied.dense(N, N).all()


@pytest.mark.parametrize("backend", ["sdpa_math", "flex"])
def test_peers_take_masks_and_tables(backend: str) -> None:
    q, k, v = (x.detach() for x in _inputs(N, N))
    bias = RelativeBias(torch.randn(2, 40), T.int() + 20, T.int())
    mask = MASKS["dilated window and globals"][0]
    o, _ = flash(q, k, v, mask=mask, rel_bias=bias, need_lse=False, backend=backend)
    expected, _ = flash(q, k, v, mask=mask, rel_bias=bias, backend="reference")
    torch.testing.assert_close(o, expected, rtol=2e-6, atol=2e-6)


# ---- biases by relative position ---------------------------------------------------------------------------


def _grid(height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def test_tables_are_read_at_the_difference_of_coordinates() -> None:
    table = torch.randn(2, 5, 9)
    q, k = _grid(3, 5), _grid(3, 5)
    dense = RelativeBias.grid(table, q, k, offsets=(2, 4)).dense()
    for i, j in itertools.product(range(15), range(15)):
        (a, b), (c, d) = q[i], k[j]
        assert torch.equal(dense[:, i, j], table[:, a - c + 2, b - d + 4])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("axes", [1, 2])
def test_tables_and_their_gradients(backend: str, heads: int, axes: int) -> None:
    inputs = _inputs(20, 25, kv_heads=1)

    def bias(dtype: torch.dtype) -> tuple[Tensor, RelativeBias]:
        torch.manual_seed(5)
        if axes == 1:  # shorter than the distances: what is outside has no bias
            table = torch.randn(heads, 21).to(dtype).requires_grad_()
            return table, RelativeBias(table, torch.arange(20) + 10, torch.arange(25))
        table = torch.randn(heads, 8, 9).to(dtype).requires_grad_()
        return table, RelativeBias.grid(table, _grid(4, 5), _grid(5, 5), offsets=(4, 4))

    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        table, rel_bias = bias(dtype)
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        results.append(_run(given, name, table, rel_bias=rel_bias, causal=True))
    for x, truth in zip(*results, strict=True):
        assert (x.double() - truth).abs().max() <= 5e-6 * max(1.0, float(truth.abs().max()))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the gradient that is not finite
def test_gradients_of_tables_are_bitwise_reproducible_and_survive_any_magnitude() -> None:
    inputs, table = _inputs(20, 20, h=1, kv_heads=1), torch.zeros(1, 39, requires_grad=True)
    bias = RelativeBias(table, torch.arange(20) + 19, torch.arange(20))

    def gradient(size: float) -> Tensor:
        o, _ = flash(*inputs, rel_bias=bias, backend="triton")
        return torch.autograd.grad((o * size).sum(), table)[0]

    assert torch.equal(gradient(1.0), gradient(1.0))
    for size in (2.0**-40, 2.0**40):
        torch.testing.assert_close(gradient(size) / size, gradient(1.0), rtol=1e-5, atol=1e-7)
    assert not torch.isfinite(gradient(math.inf)).any()


# ---- errors ------------------------------------------------------------------------------------------------


def test_errors() -> None:
    inputs = _inputs(N, N)
    with pytest.raises(ValueError, match="expected integers"):
        Mask.same(torch.randn(N))
    with pytest.raises(ValueError, match="observed 24 queries"):
        Mask.upto(T).dense(20, N)
    with pytest.raises(ValueError, match=r"observed \(B, H\) = \(1, 3\)"):
        flash(*inputs, mask=Mask.same(T.expand(1, 3, N)), backend="triton")
    with pytest.raises(ValueError, match="codes of 24 queries"):
        flash(*inputs, rel_bias=RelativeBias(torch.zeros(2, 9), T[:5], T), backend="triton")
    with pytest.raises(ValueError, match="2 axes"):
        RelativeBias.grid(torch.zeros(2, 9), _grid(2, 2), offsets=(4,))
    with pytest.raises(Unsupported, match="flash_attn"):
        flash(*inputs, mask=Mask.upto(T), backend="flash_attn")
