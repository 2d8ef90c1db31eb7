"""What attention must satisfy whatever the numbers: special cases, merges, strides, blind queries, errors."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from attnbench.kernels import Unsupported, _attention, available, flash, merge, padding_bias
from attnbench.kernels._attention import MAX_HEAD_DIM
from attnbench.kernels.backends import OWN
from attnbench.kernels.flash._configs import Config, choose
from attnbench.kernels.flash.reference import visible_pairs

every_backend = pytest.mark.parametrize("backend", OWN)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("attnbench.kernels.flash._launch")
    monkeypatch.setattr(launch, "choose", lambda *args: Config(32, 16, 4, 2))


def _qkv(
    n: int = 33, m: int = 40, h: int = 2, kv_heads: int = 2, d: int = 16, dv: int = 16, b: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, h, n, d), torch.randn(b, kv_heads, m, d), torch.randn(b, kv_heads, m, dv)


def _close(x: Tensor, y: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- special cases -----------------------------------------------------------------------------------------


@every_backend
def test_constant_values_are_returned(backend: str) -> None:
    q, k, v = _qkv()
    o, _ = flash(q, k, v[:, :, :1].expand_as(v), causal=True, backend=backend)
    _close(o, v[:, :, :1].expand_as(o))


@every_backend
def test_one_key_is_copied(backend: str) -> None:
    q, k, v = _qkv(m=1)
    _close(flash(q, k, v, backend=backend)[0], v.expand(1, 2, 33, 16))


@every_backend
def test_scale_zero_is_the_mean_of_the_visible_values(backend: str) -> None:
    q, k, v = _qkv(n=40)
    o, lse = flash(q, k, v, scale=0.0, causal=True, backend=backend)
    count = torch.arange(1.0, 41.0)
    _close(o, v.cumsum(2) / count[:, None])
    _close(lse, count.log().expand(1, 2, 40))


@every_backend
def test_order_of_the_keys_does_not_matter(backend: str) -> None:
    q, k, v = _qkv()
    key_bias, order = torch.randn(40), torch.randperm(40)
    o, lse = flash(q, k, v, key_bias=key_bias, backend=backend)
    same = flash(q, k[:, :, order], v[:, :, order], key_bias=key_bias[order], backend=backend)
    _close(o, same[0])
    _close(lse, same[1])


@every_backend
def test_grouped_heads_are_repeated_heads(backend: str) -> None:
    q, k, v = _qkv(h=4)
    o, lse = flash(q, k, v, backend=backend)
    same = flash(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), backend=backend)
    _close(o, same[0])
    _close(lse, same[1])


@every_backend
def test_sinks(backend: str) -> None:
    q, k, v = _qkv()
    o, lse = flash(q, k, v, causal=True, backend=backend)

    def with_sink(sink: Tensor) -> Tensor:
        out, same_lse = flash(q, k, v, causal=True, sink=sink, backend=backend)
        assert torch.equal(lse, same_lse), "lse must not contain the sink"
        return out

    _close(with_sink(torch.full((2, 1), -math.inf)), o)
    off_by_one = with_sink(torch.zeros(2, 1))
    _close(off_by_one, o * torch.sigmoid(lse).unsqueeze(-1))
    # the same as one more key and value of zeros, which every query sees: position −1 of 41
    zero_k, zero_v = (torch.cat([torch.zeros(1, 2, 1, 16), x], 2) for x in (k, v))
    _close(off_by_one, flash(q, zero_k, zero_v, causal=True, backend=backend)[0])


@every_backend
def test_the_future_does_not_change_the_past(backend: str) -> None:
    q, k, v = _qkv(n=40)
    o, lse = flash(q, k, v, causal=True, backend=backend)
    for x in (q, k, v):
        x[:, :, 25:] += 1.0
    changed, changed_lse = flash(q, k, v, causal=True, backend=backend)
    assert torch.equal(o[:, :, :25], changed[:, :, :25])
    assert torch.equal(lse[:, :, :25], changed_lse[:, :, :25])
    assert not torch.equal(o[:, :, 25:], changed[:, :, 25:])


@every_backend
def test_padding_bias_drops_the_keys(backend: str) -> None:
    q, k, v = _qkv(b=2)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[:, 30:] = True
    o, lse = flash(q, k, v, key_bias=padding_bias(padding), backend=backend)
    same = flash(q, k[:, :, :30], v[:, :, :30], backend=backend)
    _close(o, same[0])
    _close(lse, same[1])


@every_backend
def test_parts_merge_into_the_whole_with_gradients(backend: str) -> None:
    inputs = [x.double().requires_grad_() if backend == "reference" else x.requires_grad_() for x in _qkv()]
    q, k, v = inputs
    weight, lse_weight = torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33)

    def gradients(o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((o * weight).sum() + (lse * lse_weight).sum(), inputs)

    # queries 0..7 see no key of the last part, so that one of two sets is empty for them
    late = torch.arange(33) + (40 - 33)
    whole = flash(q, k, v, causal=True, backend=backend)
    first = flash(q, k[:, :, :5], v[:, :, :5], backend=backend)
    rest = flash(q, k[:, :, 5:15], v[:, :, 5:15], causal=True, q_pos=(late - 5).int(), backend=backend)
    last = flash(q, k[:, :, 15:], v[:, :, 15:], causal=True, q_pos=(late - 15).int(), backend=backend)
    merged = merge(*merge(*first, *rest), *last)
    tolerance = 1e-12 if backend == "reference" else 5e-6
    _close(merged[0], whole[0], tolerance)
    _close(merged[1], whole[1], tolerance)
    for x, y in zip(gradients(*merged), gradients(*whole), strict=True):
        _close(x, y, tolerance)


# ---- gradients ---------------------------------------------------------------------------------------------


@every_backend
def test_blind_queries_give_zeros_whatever_is_sent_back(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(n=40, m=17))
    sink = torch.randn(2, 1, requires_grad=True)
    o, lse = flash(q, k, v, causal=True, sink=sink, backend=backend)
    assert not o[:, :, :23].any()
    assert torch.isneginf(lse[:, :, :23]).all()
    d_lse = torch.zeros(1, 2, 40)
    d_lse[:, :, :23] = math.nan
    dq, *others = torch.autograd.grad([o, lse], [q, k, v, sink], [torch.ones_like(o), d_lse])
    assert not dq[:, :, :23].any()
    assert all(torch.isfinite(x).all() for x in (dq, *others))
    seen = torch.autograd.grad(
        flash(q[:, :, 23:], k, v, causal=True, sink=sink, backend=backend)[0].sum(), [k, v, sink]
    )
    for x, y in zip(others, seen, strict=True):
        _close(x, y)


@every_backend
def test_merging_two_empty_sets_gives_zeros_with_finite_gradients(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(n=40, m=17))
    o, lse = merge(
        *flash(q, k, v, causal=True, backend=backend), *flash(q, k, v, causal=True, backend=backend)
    )
    assert not o[:, :, :23].any()
    assert torch.isneginf(lse[:, :, :23]).all()
    gradients = torch.autograd.grad(o.sum() + lse[:, :, 23:].sum(), [q, k, v])
    assert all(torch.isfinite(x).all() for x in gradients)


@every_backend
def test_the_gradient_of_lse_alone_is_the_softmax(backend: str) -> None:
    q, k, v = _qkv(n=3, m=20)
    key_bias = torch.zeros(1, 2, 20, requires_grad=True)
    _, lse = flash(q, k, v, key_bias=key_bias, backend=backend)
    softmax = torch.softmax(q @ k.mT / 4, -1)
    _close(torch.autograd.grad(lse[:, :, 1].sum(), key_bias)[0], softmax[:, :, 1])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "key_bias", "bias", "sink"])
def test_each_gradient_alone_equals_that_of_all(wanted: str) -> None:
    q, k, v = _qkv(h=4)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "key_bias": torch.randn(40),
        "bias": torch.randn(33, 1),
        "sink": torch.zeros(4, 1),
    }

    def gradient(*names: str) -> Tensor:
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
        o, lse = flash(**leaves, backend="triton")
        (o.square().sum() + lse.sum()).backward()
        assert all((x.grad is not None) == (name in names) for name, x in leaves.items())
        return leaves[wanted].grad

    assert torch.equal(gradient(wanted), gradient(*inputs))


def test_gradcheck_of_the_definition() -> None:
    torch.manual_seed(1)
    q, k, v = (x.double().requires_grad_() for x in _qkv(n=4, m=3, h=2, kv_heads=1, d=3, dv=2))
    key_bias = torch.randn(1, 2, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    sink = torch.randn(2, 1, dtype=torch.double, requires_grad=True)
    q_pos = torch.tensor([-1, 0, 1, 4], dtype=torch.int32)

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, key_bias, bias, sink = x
        o, lse = flash(
            q, k, v, causal=True, window=(2, -1), q_pos=q_pos, softcap=2.0, key_bias=key_bias, bias=bias,
            sink=sink, backend="reference",
        )  # fmt: skip
        return o, lse[:, :, 1:3]  # the first query sees nothing, the last one nothing but key 2

    assert torch.autograd.gradcheck(function, (q, k, v, key_bias, bias, sink))


# ---- memory ------------------------------------------------------------------------------------------------


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers with (B, N, H, D) in memory, with D before N, and with every other element skipped."""
    spaced = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan)[..., ::2]
    return {
        "BNHD": x.transpose(1, 2).contiguous().transpose(1, 2),
        "BHDN": x.mT.contiguous().mT,
        "spaced": spaced.copy_(x),
    }


@pytest.mark.parametrize("layout", ["BNHD", "BHDN", "spaced"])
def test_strides_do_not_matter(layout: str) -> None:
    q, k, v = _qkv(b=2, d=24, dv=40)
    bias, do = torch.randn(2, 2, 33, 40), torch.randn(2, 2, 33, 40)

    def run(*x: Tensor) -> list[Tensor]:
        q, k, v, bias, do = x
        leaves = [each.detach().requires_grad_() for each in (q, k, v, bias)]
        o, lse = flash(*leaves[:3], bias=leaves[3], backend="triton")
        return [o, lse, *torch.autograd.grad(o, leaves, do)]

    strided = [_layouts(x)[layout] for x in (q, k, v, bias, do)]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(run(*strided), run(q, k, v, bias, do), strict=True):
        assert torch.equal(x, y)


def test_expanded_inputs_and_gradients() -> None:
    q, k, v = _qkv()
    many = q.expand(3, 2, 33, 16)
    o, _ = flash(many, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), backend="triton")
    _close(o, flash(q, k, v, backend="torch")[0].expand_as(o))
    q.requires_grad_()
    dq = torch.autograd.grad(flash(q, k, v, backend="triton")[0].sum(), q)[0]  # a gradient of strides 0
    _close(dq, torch.autograd.grad(flash(q, k, v, backend="torch")[0].sum(), q)[0])


def test_output_has_the_layout_of_q() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv(dv=40))
    o, _ = flash(q, k, v, backend="triton")
    assert o.transpose(1, 2).is_contiguous()


def test_strides_beyond_32_bits_inside_a_tile_are_copied() -> None:
    far = torch.empty_strided((1, 1, 2, 1), (1, 1, 2**24, 1), dtype=torch.float16)
    assert _attention.near(far).is_contiguous()
    near = torch.empty(2, 8, 64, 64).transpose(1, 2)
    assert _attention.near(near) is near


def test_two_runs_are_bitwise_equal() -> None:
    inputs = [x.requires_grad_() for x in (*_qkv(h=4), torch.randn(33, 40))]

    def run() -> list[Tensor]:
        o, lse = flash(*inputs[:3], bias=inputs[3], causal=True, backend="triton")
        return [o, lse, *torch.autograd.grad(o.sum() + lse.sum(), inputs)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, 5), (7, None), (0, 0), (9, 4), (40, 3)])
def test_query_ranges_of_positions(left: int | None, right: int | None) -> None:
    """Which queries a key tile computes and which of them without a mask, against the mask itself."""
    launch = importlib.import_module("attnbench.kernels.flash._launch")
    q, k, v = _qkv(n=50, m=45)
    for _ in range(5):
        q_pos = torch.randint(-10, 60, (50,)).sort().values.int()
        options = launch.Options(left, right, 1.0, 0.0)
        call = launch.Call(q, k, v, None, None, None, q_pos, options, capability=80)
        window = tuple(-1 if side is None else side for side in (left, right))
        visible = visible_pairs(50, 45, causal=False, window=window, q_pos=q_pos, device=q.device)
        some_lo, all_lo, all_hi, some_hi = call._query_ranges(8)
        for tile, keys in enumerate(visible.split(8, dim=1)):
            queries = torch.arange(50)
            inside = (queries >= some_lo[tile]) & (queries < some_hi[tile])
            unmasked = (queries >= all_lo[tile]) & (queries < all_hi[tile])
            assert torch.equal(inside, keys.any(1))
            assert torch.equal(unmasked, keys.all(1))


# ---- errors and choices ------------------------------------------------------------------------------------


def test_what_triton_refuses() -> None:
    for x, message in (
        (torch.randn(1, 1, 4, 257), "head dim"),
        (torch.randn(1, 1, 4, 8, dtype=torch.double), "dtype"),
    ):
        with pytest.raises(Unsupported, match=message):
            flash(x, x, x, backend="triton")
    q, k, v = _qkv()
    with pytest.raises(Unsupported, match="as q"):
        flash(q, k.half(), v, backend="triton")
    assert not available("triton", "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[..., :8], v),
        lambda q, k, v: (q, k, v[:, :, :-1]),
        lambda q, k, v: (q[:, :1], k, v),
    ],
    ids=["D", "M", "heads"],
)
def test_shapes_that_do_not_match_are_an_error(change) -> None:
    with pytest.raises(ValueError, match="expected"):
        flash(*change(*_qkv()), backend="triton")


def test_positions_of_another_number_of_queries_are_an_error() -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="one per query"):
        flash(q, k, v, causal=True, q_pos=torch.arange(40, dtype=torch.int32), backend="triton")


def test_every_tile_can_be_launched() -> None:
    dims, lengths = (1, 16, 64, 65, 128, 256), (0, 1, 49, 4096)
    for kernel, capability, d, dtype, n, m, biased in itertools.product(
        ("forward", "backward_q", "backward_kv"), (80, 86, 90, 100, 120), dims,
        (torch.float16, torch.float32), lengths, lengths, (False, True),
    ):  # fmt: skip
        config = choose(kernel, capability, d, dtype, n, m, biased)
        for block, length in ((config.block_m, n), (config.block_n, m)):
            assert 16 <= block <= 128
            assert block & (block - 1) == 0
            assert block < 2 * max(length, 16), "a tile of mostly nothing"
        assert config.num_warps in (4, 8)
    assert max(dims) == MAX_HEAD_DIM
