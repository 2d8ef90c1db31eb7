"""Every backend of kv_reduce against the definition in fp64, forward and every gradient.

The rule: the error against fp64 is at most twice (gradients: three times) that of the dense N×M form
computed in the same dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, kv_reduce, linrec
from attnbench.kernels._tiles import Target
from attnbench.kernels.features import feature, guarded

ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 5e-4}
BACKENDS = ["torch", "triton"]


@dataclass(frozen=True)
class Case:
    """One call; ``mask`` removes a third of the keys."""

    n: int = 70
    m: int = 90
    d: int = 12
    dv: int = 20
    b: int = 2
    h: int = 2
    feature_map: str = "elu1"
    normalize: bool = True
    eps: float = 0.1
    eps_mode: str = "add"
    scale: float = 0.5
    mask: bool = False

    def __str__(self) -> str:
        kind = f"{self.eps_mode}{self.eps:g}" if self.normalize else "plain"
        return f"{self.n}x{self.m}-{self.d}x{self.dv}-{self.feature_map}-{kind}{'-mask' if self.mask else ''}"

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of o."""
        shapes = ((self.n, self.d), (self.m, self.d), (self.m, self.dv), (self.n, self.dv))
        return [torch.randn(self.b, self.h, *shape, dtype=dtype) for shape in shapes]

    def key_mask(self) -> Tensor | None:
        """(B, M), the same at every call; never all keys."""
        if not self.mask:
            return None
        mask = torch.rand(self.b, self.m, generator=torch.Generator().manual_seed(2)) < 1 / 3
        mask[:, 0] = False
        return mask

    def options(self) -> dict[str, Any]:
        names = ("feature_map", "normalize", "eps", "eps_mode", "scale")
        return {name: getattr(self, name) for name in names} | {"key_mask": self.key_mask()}


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str, normalize: bool, eps: float, eps_mode: str,
    scale: float, key_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """The N×M form with every step rounded to the input dtype."""
    weights = feature(q, feature_map) @ feature(k, feature_map).mT
    if key_mask is not None:
        weights = weights.masked_fill(key_mask[:, None, None, :], 0.0)
    if normalize:
        return weights @ v / guarded(weights.sum(-1, keepdim=True), eps, eps_mode)
    return scale * (weights @ v)


def run(case: Case, tensors: list[Tensor], backend: str) -> dict[str, Tensor]:
    """o, dq, dk, dv in fp64."""
    *leaves, do = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    if backend == "naive":
        o = dense(*leaves, **case.options())
    else:
        o = kv_reduce(*leaves, **case.options(), backend=backend)
    results = [o, *torch.autograd.grad(o, leaves, do)]
    return {name: x.detach().double() for name, x in zip(("o", "dq", "dk", "dv"), results, strict=True)}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Assert the rule of this file for one case."""
    tensors = case.tensors(dtype)
    truth = run(case, [x.double() for x in tensors], "reference")
    naive, actual = run(case, tensors, "naive"), run(case, tensors, backend)
    for name, t in truth.items():
        size = t.abs().max().item()
        error, allowed = ((y[name] - t).abs().max().item() / size for y in (actual, naive))
        limit = (2 if name == "o" else 3) * allowed + ROUNDING[dtype]
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


CASES = [
    Case(),
    Case(n=1, m=1),
    Case(n=17, m=64, eps_mode="max", eps=600.0, mask=True),
    Case(n=130, m=130, d=20, dv=8, feature_map="relu", eps_mode="max", eps=400.0),
    Case(n=64, m=17, feature_map="squared_relu", mask=True),
    Case(n=33, m=300, feature_map="exp", b=1),
    Case(n=40, m=70, feature_map="identity", normalize=False, mask=True),
    Case(n=40, m=70, feature_map="elu1", normalize=False, mask=True),
    Case(n=20, m=40, d=80, dv=136, b=1, h=1),
    Case(n=20, m=40, d=1, dv=1, mask=True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_fp32(case: Case, backend: str) -> None:
    check(case, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_fp16(case: Case, backend: str) -> None:
    check(case, backend, torch.float16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_in_fp64(case: Case) -> None:
    check(case, "torch", torch.float64)


def test_gradcheck_of_the_definition() -> None:
    for case in (
        Case(n=3, m=4, d=2, dv=3, b=1, mask=True),
        Case(n=3, m=4, d=2, dv=3, b=1, normalize=False, feature_map="exp"),
    ):
        inputs = [x.requires_grad_() for x in case.tensors(torch.float64)[:3]]
        for backend in ("reference", "torch"):
            options = case.options() | {"backend": backend}
            assert torch.autograd.gradcheck(lambda *x, options=options: kv_reduce(*x, **options), inputs)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh allocation with NaN: what a kernel leaves unwritten and reads shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def fill(make: Any) -> Any:
        def filled(*args: Any, **options: Any) -> Tensor:
            x = make(*args, **options)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return filled

    with (
        mock.patch.object(torch, "empty", fill(empty)),
        mock.patch.object(torch, "empty_like", fill(empty_like)),
        mock.patch.object(Tensor, "new_empty", fill(new_empty)),
    ):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(n=33, m=70, mask=True), Case(normalize=False)], ids=str)
def test_any_strides_and_no_read_of_fresh_memory(case: Case, backend: str) -> None:
    tensors = case.tensors(torch.float32)
    expected = run(case, tensors, backend)
    strided = []
    for x in tensors:
        padded = torch.full((2 * x.shape[-1] + 1, *x.shape[:-1]), math.nan)
        view = padded.movedim(0, -1)[..., 1::2]
        strided.append(view.copy_(x))
        assert not view.is_contiguous()
    with poisoned():
        actual = run(case, strided, backend)
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=2e-6, atol=2e-6, msg=name)


def test_triton_takes_a_strided_mask_and_an_expanded_gradient() -> None:
    case = Case(n=33, m=70, mask=True)
    q, k, v, _ = case.tensors(torch.float32)
    mask = case.key_mask()
    wide = torch.zeros(mask.shape[1], 2 * mask.shape[0], dtype=torch.bool)
    wide[:, ::2] = mask.T
    results = []
    for key_mask in (mask, wide[:, ::2].T):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = kv_reduce(*leaves, **case.options() | {"key_mask": key_mask}, backend="triton")
        results.append([o.detach(), *torch.autograd.grad(o.sum(), leaves)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("processors", [1, 4, 64])
def test_triton_splits_of_the_keys_change_rounding_only(processors: int) -> None:
    case = Case(n=70, m=64 * 21 - 7, d=4, dv=3, b=1, h=1, mask=True)
    triton = importlib.import_module("attnbench.kernels.kv_reduce.triton")
    with mock.patch.object(triton, "target", return_value=Target(90, processors)):
        check(case, "triton", torch.float32)


def test_candidates_are_few_and_the_default_is_first() -> None:
    config = importlib.import_module("attnbench.kernels.kv_reduce._config")
    for kernel in ("sums", "read", "feature_gradient"):
        for d, itemsize in ((1, 2), (64, 2), (256, 2), (128, 4)):
            found = config.candidates(kernel, d, d, itemsize)
            assert found[0] == config.config(kernel, d, d, itemsize)
            assert len(set(found)) == len(found) <= 8
            assert all(min(each.block_n, each.block_k, each.block_v) >= 16 for each in found)


def test_triton_with_half_of_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tuning does: every candidate is launched on memory of its own, then one is chosen."""
    launch = importlib.import_module("attnbench.kernels.kv_reduce._launch")

    def choose(*, candidates: Any, launch: Any, **_: Any) -> Any:
        halves = [each for each in candidates if each.block_v < candidates[0].block_v]
        launch(halves[0])()
        return halves[0]

    monkeypatch.setattr(launch, "pick", choose)
    check(Case(n=20, m=70, d=33, dv=40, b=1, h=1, mask=True), "triton", torch.float32)


# The exact properties of linear attention.


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_are_absent_keys(backend: str) -> None:
    case = Case(b=1, mask=True)
    tensors = case.tensors(torch.float32)
    mask = case.key_mask()
    actual = run(case, tensors, backend)
    q, k, v, do = tensors
    kept = [q, k[:, :, ~mask[0]], v[:, :, ~mask[0]], do]
    expected = run(Case(b=1), kept, backend)
    for name in ("o", "dq"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("dk", "dv"):
        torch.testing.assert_close(actual[name][:, :, ~mask[0]], expected[name], rtol=1e-5, atol=1e-5)
        assert not actual[name][:, :, mask[0]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_features_give_the_mean_of_v(backend: str) -> None:
    v = torch.randn(1, 2, 128, 8)
    zero = torch.zeros(1, 2, 128, 4)
    o = kv_reduce(zero, zero, v, feature_map="elu1", eps=0.0, backend=backend)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_and_values_changes_nothing(backend: str) -> None:
    q, k, v, _ = Case().tensors(torch.float32)
    order = torch.randperm(k.shape[2])
    o, permuted = (
        kv_reduce(q, x, y, feature_map="elu1", backend=backend)
        for x, y in ((k, v), (k[:, :, order], v[:, :, order]))
    )
    torch.testing.assert_close(o, permuted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_last_row_of_the_causal_form(backend: str) -> None:
    q, k, v = (x[:, :, :48] for x in Case(n=48, m=48).tensors(torch.float32)[:3])
    options = {"feature_map": "elu1", "backend": backend}
    causal, _ = linrec(q, k, v, normalize=True, chunk=16, **options)
    full = kv_reduce(q, k, v, **options)
    torch.testing.assert_close(full[:, :, -1], causal[:, :, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_sums_past_the_range_of_fp16(backend: str) -> None:
    """Σ φ(k) and Σ φ(k) v exceed 65504; dO/den is about 1e-6, of which fp16 keeps one digit."""
    q, k, v, do = Case(n=16, m=1500, d=16, dv=16, b=1, h=1).tensors(torch.float32)
    q, k, v, do = 0.05 * q.abs(), k.abs() + 100, v.abs() + 0.5, 0.1 * do
    tensors, case = [x.half() for x in (q, k, v, do)], Case(b=1, h=1, feature_map="relu")
    truth = run(case, [x.double() for x in tensors], "reference")
    actual = run(case, tensors, backend)
    assert tensors[1].double().sum(2).min() > 65504
    torch.testing.assert_close(actual["o"], truth["o"], rtol=2e-3, atol=1e-3)
    if backend == "triton":  # autograd rounds every intermediate gradient of the torch backend to fp16
        error = (actual["dv"] - truth["dv"]).norm() / truth["dv"].norm()
        assert error < 2e-3


def test_refusals() -> None:
    x = torch.randn(1, 1, 3, 257)
    with pytest.raises(Unsupported, match="head dims"):
        kv_reduce(x, x, x, backend="triton")
    with pytest.raises(Unsupported, match="dtypes"):
        kv_reduce(x[..., :4], x[..., :4], x[..., :4].double(), backend="triton")


# On a GPU, at real sizes.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("normalize", [True, False])
def test_gpu_half_at_4k(dtype: torch.dtype, dim: int, normalize: bool) -> None:
    case = Case(n=4096, m=4001, d=dim, dv=dim, normalize=normalize, scale=1e-2, mask=True)
    tensors = [x.cuda().to(dtype) for x in case.tensors(torch.float32)]
    mask = case.key_mask().cuda()
    with mock.patch.object(Case, "key_mask", return_value=mask):
        truth = run(case, [x.double() for x in tensors], "reference")
        actual, again = run(case, tensors, "triton"), run(case, tensors, "triton")
    for name, t in truth.items():
        error = (actual[name] - t).norm() / t.norm()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        assert torch.equal(actual[name], again[name]), f"{name} differs between two runs"
