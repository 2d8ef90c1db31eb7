"""linformer against its dense form and its exact special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.linear.linformer import Linformer

BACKENDS = ("reference", "torch")
PATTERNS = ("NS", "NC", "CC")


def heads(n: int, d: int = 4, *, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, h, n, d, dtype=torch.float64)


def module(max_len: int, pattern: str = "NS", backend: str = "reference", **hyper: object) -> Linformer:
    hyper = {"rank": 5, "max_len": max_len, **hyper}
    built = attnbench.build("linformer", 8, 2, pattern=pattern, backend=backend, **hyper).double()
    with torch.no_grad():
        for table in built.parameters():
            if table.shape[-1] == max_len:
                table.normal_()
    return built


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_equals_attention_over_projected_keys(pattern: str, sharing: str, backend: str) -> None:
    q, k, v = heads(9 if pattern == "NS" else 4), heads(9), heads(9, 6)
    linformer = module(12, pattern, backend, sharing=sharing)
    e = linformer.key_table
    f = e if sharing == "key_value" else linformer.value_table
    shape = (2, 5, 12) if sharing == "none" else (5, 12)
    assert e.shape == f.shape == shape
    assert not hasattr(linformer, "value_table") or sharing != "key_value"
    expected = softmax_attention(
        q,
        torch.stack([e.expand(2, 5, 12)[h, :, :9] @ k[:, h] for h in range(2)], 1),
        torch.stack([f.expand(2, 5, 12)[h, :, :9] @ v[:, h] for h in range(2)], 1),
    )
    torch.testing.assert_close(linformer.attend(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_tables_give_softmax_attention(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    linformer = module(7, "NS", backend, rank=7)
    with torch.no_grad():
        linformer.key_table.copy_(torch.eye(7))
        linformer.value_table.copy_(torch.eye(7))
    torch.testing.assert_close(linformer.attend(q, k, v), softmax_attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_key_table_gives_the_mean_projected_value(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    linformer = module(7, "NS", backend)
    torch.nn.init.zeros_(linformer.key_table)
    mean = (linformer.value_table @ v).mean(2, keepdim=True).expand_as(q)
    torch.testing.assert_close(linformer.attend(q, k, v), mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_rows_that_sum_to_one_return_constant_values(backend: str) -> None:
    q, k = heads(7), heads(7)
    v = torch.full_like(q, 3.0)
    linformer = module(7, "NS", backend)
    with torch.no_grad():
        linformer.value_table.copy_(linformer.value_table.softmax(-1))
    torch.testing.assert_close(linformer.attend(q, k, v), v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_with_the_columns_of_the_tables_changes_nothing(backend: str) -> None:
    q, k, v = heads(7), heads(7), heads(7)
    linformer = module(7, "NS", backend)
    o = linformer.attend(q, k, v)
    order = torch.randperm(7)
    with torch.no_grad():
        linformer.key_table.copy_(linformer.key_table[:, order].clone())
        linformer.value_table.copy_(linformer.value_table[:, order].clone())
    torch.testing.assert_close(linformer.attend(q, k[:, :, order], v[:, :, order]), o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_keys_equal_zero_keys_and_padding_at_the_end(backend: str) -> None:
    q, k, v = heads(4), heads(9), heads(9)
    linformer = module(9, "NC", backend)
    short = linformer.attend(q, k[:, :, :6], v[:, :, :6])
    zeros = torch.zeros(2, 9, dtype=torch.bool)
    zeros[:, 6:] = True
    cleared = [u.masked_fill(zeros[:, None, :, None], 0.0) for u in (k, v)]
    torch.testing.assert_close(linformer.attend(q, *cleared), short)
    torch.testing.assert_close(linformer.attend(q, k, v, key_padding_mask=zeros), short)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_key_heads_equal_repeated_ones(backend: str) -> None:
    q, k, v = heads(5, h=4), heads(5, h=2), heads(5, h=2)
    linformer = attnbench.build(
        "linformer", 16, 4, num_kv_heads=2, backend=backend, rank=3, max_len=5
    ).double()
    repeated = linformer.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(linformer.attend(q, k, v), repeated)


def test_lengths_without_a_column_are_refused() -> None:
    with pytest.raises(UsageError, match="max_len"):
        attnbench.build("linformer", 8, 2)
    with pytest.raises(UsageError, match="observed 8 keys, expected at most max_len=7"):
        module(7).attend(heads(8), heads(8), heads(8))
    assert Linformer.for_length(3, 8) == {"max_len": 8}


def test_triton_agrees_with_fp64() -> None:
    q, k, v = heads(40, b=1), heads(40, b=1), heads(40, b=1)
    exact, single = module(40, "NS", "reference"), module(40, "NS", "triton")
    single.load_state_dict(exact.state_dict())
    o = single.float().attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(o.double(), exact.attend(q, k, v), rtol=1e-4, atol=1e-4)
