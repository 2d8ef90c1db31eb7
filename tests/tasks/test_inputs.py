"""The input distributions: shapes for every case, structure where structure is claimed, honest fitting."""

import json

import numpy as np
import pytest
import torch

from attnbench.errors import UsageError
from attnbench.tasks.data import inputs, recorded, structured

SHAPES = [(8, 8), (1, 40), (40, 7), (7, 40), (1, 1), (40, 1), (600, 600)]


def made(dist, n=64, m=64, *, b=2, h=4, hkv=2, d=16, dv=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return inputs.make_qkv(dist, b, h, hkv, n, m, d, dv, dtype, "cpu", generator)


def causal_scores(q, k):
    n, m = q.shape[-2], k.shape[-2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)


# ---- all distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", inputs.DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_shapes_for_self_and_cross(dist, n, m):
    q, k, v = made(dist, n, m)
    assert q.shape == (2, 4, n, 16)
    assert k.shape == (2, 2, m, 16)
    assert v.shape == (2, 2, m, 24)
    for x in (q, k, v):
        assert x.is_contiguous()
        assert x.isfinite().all()
        assert x.abs().max() > 0


@pytest.mark.parametrize("dist", inputs.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_sees_the_same_numbers(dist, dtype):
    for fp32, other in zip(made(dist), made(dist, dtype=dtype), strict=True):
        assert other.dtype is dtype
        assert torch.equal(fp32.to(dtype), other)


@pytest.mark.parametrize("dist", inputs.DISTRIBUTIONS)
def test_the_generator_decides(dist):
    first, again, other = made(dist), made(dist), made(dist, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dist", inputs.DISTRIBUTIONS)
def test_batch_elements_differ(dist):
    for x in made(dist):
        assert not torch.equal(x[0], x[1])


def test_an_unknown_distribution_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean structured"):
        made("structred")


@pytest.mark.parametrize(("count", "length"), [(1, 9), (9, 9), (4, 9), (9, 100), (5, 100)])
def test_positions_end_at_the_last_token_and_never_pass_the_causal_diagonal(count, length):
    found = structured.positions(count, length, torch.device("cpu"))
    assert found[-1] == length - 1
    assert (found <= torch.arange(count) + length - count).all()
    assert (found.diff() > 0).all()
    assert count == 1 or found[0] == 0


# ---- structured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [512, 1024])
@pytest.mark.parametrize("d", [32, 64])
def test_structured_rows_hold_90_percent_on_5_to_15_percent_of_the_keys(n, d):
    q, k, _ = made("structured", n, n, b=1, d=d)
    share = structured.keys_for_mass(q @ k.repeat_interleave(2, 1).mT / d**0.5).mean().item()
    assert 0.05 < share < 0.15
    gaussian_q, gaussian_k, _ = made("gaussian", n, n, b=1, h=2, d=d)
    assert structured.keys_for_mass(gaussian_q @ gaussian_k.mT / d**0.5).mean().item() > 0.5


def test_structured_attention_has_a_sink_neighbours_and_heavy_hitters():
    n = 1024
    q, k, _ = made("structured", n, n, b=1, h=4, hkv=4, d=64)
    weights = (q @ k.mT / 8.0).softmax(-1)[0]
    column = weights.mean(-2)
    assert (column[:, 0] > 10 / n).all()
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 16
    assert (weights * near).sum(-1).mean() > 5 * 33 / n
    heaviest = column[:, 1:].sort(-1, descending=True).values[:, : n // 100].sum(-1)
    assert heaviest.mean() > 0.2


def test_structured_heads_of_a_group_differ_but_share_their_keys_of_interest():
    q, k, _ = made("structured", 256, 256, b=1, h=2, hkv=1, d=64)
    first, second = (q @ k.mT / 8.0).softmax(-1)[0]
    assert not torch.allclose(first, second)
    overlap = torch.minimum(first, second).sum(-1).mean()
    assert 0.5 < overlap < 1.0


def test_keys_for_mass_counts_heaviest_first():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert structured.keys_for_mass(scores, 0.5 - 1e-6).item() == 0.25
    assert structured.keys_for_mass(scores, 0.9).item() == 0.75
    assert structured.keys_for_mass(torch.zeros(10), 0.95).item() == 1.0


# ---- recorded ------------------------------------------------------------------------------------------


def test_the_recording_says_what_it_is_and_fits_into_the_package():
    meta = recorded.recording().meta
    assert {"model", "text", "text_sha256", "seed", "sha256", "torch", "python", "metrics"} <= set(meta)
    assert meta["metrics"]["byte_ppl"] < 5.5  # a model that attends: without mixing it is above 9
    assert recorded.PATH.stat().st_size <= 1_500_000


def test_recorded_attention_is_neither_uniform_nor_a_copy():
    source = recorded.recording()
    context = source.meta["context"]
    q, k = source.q[None, :, :context], source.k[None, :, :context]
    weights = causal_scores(q, k).softmax(-1)[0, :, context // 4 :]
    entropy = torch.special.entr(weights).sum(-1).mean(-1)
    assert entropy.min() < 2.0 < entropy.max()
    assert (entropy > 0.3).all()


@pytest.mark.parametrize("d", [32, 64, 128])
def test_fitting_to_a_larger_head_keeps_the_scaled_scores(d):
    source = recorded.recording()
    q, k, v = made("recorded", 300, 300, b=1, h=8, hkv=8, d=d, dv=d, dtype=torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    want = source.q.double()[order, :300] @ source.k.double()[order, :300].mT / 32**0.5
    torch.testing.assert_close(q[0] @ k[0].mT / d**0.5, want, rtol=0, atol=1e-4)
    values = source.v.double()[order, :300]
    torch.testing.assert_close(v[0] @ v[0].mT, values @ values.mT, rtol=0, atol=1e-4)


def test_fitting_to_a_smaller_head_is_the_best_approximation_of_that_rank():
    source, d = recorded.recording(), 8
    total = source.q.shape[1]
    q, k, _ = made("recorded", total, total, b=1, h=8, hkv=8, d=d, dv=d, dtype=torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    want = source.q.double()[order] @ source.k.double()[order].mT / 32**0.5
    got = q[0] @ k[0].mT / d**0.5
    for head in (0, 5):
        tail = torch.linalg.svdvals(want[head])[d:]
        error = (got[head] - want[head]).norm()
        torch.testing.assert_close(error, tail.norm(), rtol=1e-4, atol=1e-3)


def test_longer_than_one_window_runs_on_into_the_next_and_repeats_after_the_last():
    source = recorded.recording()
    total = source.q.shape[1]
    _, k, _ = made("recorded", total + 5, total + 5, b=2, h=1, hkv=1, d=32)
    context = source.meta["context"]
    assert torch.equal(k[0, 0, total:], k[0, 0, :5])
    assert torch.equal(k[1, 0, :5], k[0, 0, context : context + 5])


def test_query_heads_of_a_group_are_the_query_of_their_key_head():
    q, k, _ = made("recorded", 64, 64, h=4, hkv=2)
    full_q, full_k, _ = made("recorded", 64, 64, h=2, hkv=2)
    assert torch.equal(k, full_k)
    assert torch.equal(q, full_q.repeat_interleave(2, 1))


def test_a_changed_file_is_refused(tmp_path):
    with np.load(recorded.PATH) as stored:
        arrays = {name: stored[name].copy() for name in ("q", "k", "v")}
        meta = json.loads(str(stored["meta"]))
    arrays["q"][0, 0, 0, 0, 0] += 1
    path = tmp_path / "changed.npz"
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    with pytest.raises(UsageError, match="SHA-256"):
        recorded.recording(path)
    with pytest.raises(UsageError, match="reinstall"):
        recorded.recording(tmp_path / "absent.npz")
