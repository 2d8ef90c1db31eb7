"""neighborhood: its mask by brute force, every backend against fp64 with gradients, special cases, errors."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Neighborhood, Partition, Unsupported, neighborhood, window
from attnbench.kernels.neighborhood.reference import visible
from attnbench.kernels.window._configs import Config
from attnbench.kernels.window.reference import visible as visible_in_window

CPU = torch.device("cpu")
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like
of = Neighborhood.of


def _keys_of_axis(pattern: Neighborhood, axis: int, length: int) -> list[list[int]]:
    """The keys of each position, in words: list the class, find the group's leader, cut out its window."""
    w, t, d = pattern.window[axis], pattern.stride[axis], pattern.dilation[axis]
    found: list[list[int]] = [[] for _ in range(length)]
    for residue in range(d):
        members = list(range(residue, length, d))
        for start in range(0, len(members), t):
            group = range(start, min(start + t, len(members)))
            for i in group:
                if pattern.causal[axis]:
                    leader = start + t - 1 if start + t <= len(members) else len(members) - 1
                    found[members[i]] = members[max(leader - w + 1, 0) : i + 1]
                else:
                    leader = start + t // 2 if start + t // 2 < len(members) else len(members) - 1
                    first = leader - w // 2
                    while first + w > len(members):
                        first -= 1
                    first = max(first, 0)
                    found[members[i]] = members[first : first + w]
    return found


AXES = [
    (length, w, t, d, causal)
    for length, w, d in [(9, 3, 1), (9, 4, 1), (11, 11, 1), (13, 3, 4), (12, 4, 3), (7, 1, 1), (10, 5, 2)]
    for t in (1, 2, 3, w)
    if t <= w
    for causal in (False, True)
]


@pytest.mark.parametrize(("length", "w", "t", "d", "causal"), AXES)
def test_mask_of_an_axis(length: int, w: int, t: int, d: int, causal: bool) -> None:
    pattern = of((w,), stride=(t,), dilation=(d,), causal=(causal,))
    mask = visible(pattern, (length,), length, CPU)
    assert [row.nonzero().flatten().tolist() for row in mask] == _keys_of_axis(pattern, 0, length)
    assert pattern.on((length,)).pairs() == mask.sum()
    if not causal:
        assert (mask.sum(1) == w).all()


def test_mask_of_a_volume() -> None:
    """A pair is visible iff every axis agrees; causal in time only."""
    pattern = of((2, 3, 2), stride=(2, 1, 2), dilation=(1, 1, 2), causal=(True, False, False))
    grid = 3, 4, 5
    mask = visible(pattern, grid, 60, CPU)
    keys = [_keys_of_axis(pattern, axis, length) for axis, length in enumerate(grid)]
    places = list(itertools.product(*map(range, grid)))
    for i, p in enumerate(places):
        expected = [j for j, r in enumerate(places) if all(r[a] in keys[a][p[a]] for a in range(3))]
        assert mask[i].nonzero().flatten().tolist() == expected


def test_queries_of_a_stride_group_share_their_keys() -> None:
    mask = visible(of((6,), stride=(4,)), (18,), 18, CPU)
    for start in range(0, 18, 4):
        assert (mask[start : start + 4] == mask[start]).all()


def test_stride_of_a_window_makes_blocks() -> None:
    blocks = visible_in_window(Partition.block((4, 3)), (8, 9), (8, 9), 72, 72, CPU)
    assert torch.equal(visible(of((4, 3), stride=(4, 3)), (8, 9), 72, CPU), blocks)


def test_full_dilation_makes_strided_groups() -> None:
    groups = visible_in_window(Partition.strided((8, 9), (4, 3)), (8, 9), (8, 9), 72, 72, CPU)
    assert torch.equal(visible(of((4, 3), dilation=(2, 3)), (8, 9), 72, CPU), groups)


@pytest.mark.parametrize(
    ("grid", "w", "t", "tile", "efficiency"),
    [
        ((32768,), (2048,), (256,), 128, 1.0),
        ((256, 256), (80, 80), (16, 16), 128, 1.0),
        ((256, 256), (80, 80), (1, 1), 128, 0.75),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), 128, 1.0),
    ],
)
def test_boxes_hold_what_is_seen(
    grid: tuple[int, ...], w: tuple[int, ...], t: tuple[int, ...], tile: int, efficiency: float
) -> None:
    """With the strides that the paper calls perfectly block-sparse, a tile sees all of its box."""
    pairs = of(w, stride=t).on(grid)
    shape = pairs.choose(tile, 128)
    tiles = pairs.tiles(shape)
    held = math.prod(int((each.table[2].astype(int) * each.table[4]).sum()) for each in tiles)
    assert pairs.pairs() >= efficiency * held
    assert all(each.even for each in tiles) == (efficiency == 1.0)


@dataclass(frozen=True)
class Case:
    """One call: a pattern, a grid and how many tokens it lacks, and which biases there are."""

    name: str
    pattern: Neighborhood
    grid: tuple[int, ...]
    lacks: int = 0
    d: int = 16
    dv: int = 16
    h: int = 1
    kv_heads: int = 1
    bias: bool = False
    removed: int = 0  # keys at the end
    tile: tuple[int, int] | None = (16, 16)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("2-D", of((3, 3)), (4, 5), d=24, dv=40, h=2, kv_heads=2),
    Case("2-D, bias", of((3, 2)), (4, 4), lacks=1, h=2, bias=True),
    Case("1-D, strided, default tiles", of((8,), stride=(4,)), (30,), tile=None),
    Case("1-D, causal, strided", of((6,), stride=(3,), causal=(True,)), (20,)),
    Case("dilated, bias", of((3,), dilation=(3,), stride=(2,)), (16,), bias=True),
    Case("3-D, causal in time", of((2, 2, 2), stride=(1, 2, 1), causal=(True, False, False)), (2, 3, 4)),
    Case("removed keys leave queries empty", of((3,)), (20,), removed=9),
    Case("one token", of((1, 1)), (1, 1), bias=True),
]
FLEX = {"2-D", "2-D, bias", "dilated, bias", "removed keys leave queries empty"}
HALF = {"2-D", "dilated, bias"}


def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(sum(map(ord, case.name)))
    n = math.prod(case.grid) - case.lacks
    shapes = {
        "q": (case.h, case.d),
        "k": (case.kv_heads, case.d),
        "v": (case.kv_heads, case.dv),
        "do": (case.h, case.dv),
    }
    found = {name: torch.randn(1, h, n, width).to(dtype) for name, (h, width) in shapes.items()}
    found["d_lse"] = torch.randn(1, case.h, n)
    if case.bias:
        found["bias"] = torch.randn(case.h, *case.pattern.table)
    if case.removed:
        found["key_bias"] = torch.randn(1, n).masked_fill(torch.arange(n) >= n - case.removed, -math.inf)
    return found


def _results(case: Case, dtype: torch.dtype, backend: str, wide: bool = False, train: bool = True) -> dict:
    inputs = {name: x.double() if wide else x for name, x in _inputs(case, dtype).items()}
    do, d_lse = inputs.pop("do"), inputs.pop("d_lse")
    inputs = {name: x.clone().requires_grad_(train) for name, x in inputs.items()}
    q, k, v = (inputs[name] for name in "qkv")
    others = {name: x for name, x in inputs.items() if name.endswith("bias")}
    o, lse = neighborhood(q, k, v, case.pattern, grid=case.grid, **others, backend=backend)
    found = {"o": o.detach(), "lse": lse.detach()}
    if train:
        gradients = torch.autograd.grad([o, lse], list(inputs.values()), [do, d_lse])
        found |= {f"d_{name}": x for name, x in zip(inputs, gradients, strict=True)}
    return found


def _assert_close(case: Case, dtype: torch.dtype, backend: str, train: bool = True) -> None:
    """Within three times the error of the plain definition in the same dtype, and a few roundings."""
    truth = _results(case, dtype, "reference", wide=True)
    naive = _results(case, dtype, "reference")
    for name, x in _results(case, dtype, backend, train=train).items():
        assert x.dtype is naive[name].dtype
        blind = torch.isneginf(truth[name])
        assert torch.equal(torch.isneginf(x), blind), f"{name}: other rows are empty"
        expected, own, plain = (y.double().masked_fill(blind, 0.0) for y in (truth[name], x, naive[name]))
        # an lse is an fp32 sum of exponentials of scores, whose factors were rounded once in the dtype
        roundings = 1 if name == "lse" else 8
        eps = roundings * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
        allowed = 3 * float((plain - expected).abs().max()) + eps * max(1.0, float(expected.abs().max()))
        error = float((own - expected).abs().max())
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
class TestAgainstFp64:
    @pytest.fixture(autouse=True)
    def poisoned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fresh memory is NaN: what a backend forgets to write is seen."""

        def poison(x: Tensor) -> Tensor:
            return x.fill_(math.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, "empty", lambda *a, **options: poison(EMPTY(*a, **options)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **options: poison(EMPTY_LIKE(*a, **options)))

    def test_triton(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        if case.tile is not None:
            launch = importlib.import_module("attnbench.kernels.window._launch")
            monkeypatch.setattr(launch, "candidates", lambda *args: (Config(*case.tile, 4, 1),))
        _assert_close(case, torch.float16 if case.name in HALF else torch.float32, "triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_torch(self, case: Case, dtype: torch.dtype) -> None:
        _assert_close(case, dtype, "torch")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FLEX], ids=str)
def test_flex(case: Case) -> None:
    _assert_close(case, torch.float32, "flex", train=False)


def test_gradcheck() -> None:
    pattern = of((2, 2), stride=(2, 1))
    q, k, v = (torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, t, b=backend: neighborhood(q, k, v, pattern, grid=(3, 3), bias=t, backend=b),
            (q, k, v, bias),
        )


def test_window_of_the_grid_is_dense_attention() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    found = neighborhood(q, k, v, of((3, 4)), grid=(3, 4), backend="torch")
    expected = window(q, k, v, Partition.block((3, 4)), grid=(3, 4), backend="reference")
    torch.testing.assert_close(found, expected)


def test_clipped() -> None:
    assert of((7, 9), stride=(6, 1), dilation=(1, 3)).clipped((5, 20)) == of(
        (5, 6), stride=(5, 1), dilation=(1, 3)
    )
    with pytest.raises(ValueError, match="dilation: observed"):
        of((1,), dilation=(4,)).clipped((3,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of((2,), stride=(3,)), "stride: observed"),
        (lambda: of((0, 1)), "window: observed"),
        (lambda: of((2, 2), causal=(True,)), "causal: observed"),
        (lambda: of((4,), dilation=(3,)).on((11,)), "clipped"),
    ],
)
def test_patterns_that_are_none(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_that_do_not_match() -> None:
    q, k, v = (torch.zeros(1, 2, 12, 8) for _ in range(3))
    with pytest.raises(ValueError, match="hold 12 tokens"):
        neighborhood(q, k, v, of((3,)), grid=(11,))
    with pytest.raises(ValueError, match="expected 1 axes"):
        neighborhood(q, k, v, of((3,)), grid=(3, 4))
    with pytest.raises(ValueError, match=r"expected \(H, \*table\)"):
        neighborhood(q, k, v, of((3,)), grid=(12,), bias=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected \(B, H, N, D\)"):
        neighborhood(q, k[:, :, 1:], v[:, :, 1:], of((3,)), grid=(12,))
    with pytest.raises(Unsupported, match="neighborhood/triton dtype of q"):
        neighborhood(q.double(), k, v, of((3,)), grid=(12,), backend="triton")
