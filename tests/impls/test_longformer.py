"""longformer against a loop over its rows, and the roles of its global tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError

N, C, H = 14, 16, 2


def module(pattern: str = "NS", **hyper):
    torch.manual_seed(1)
    options = {"window": 2, "dilation": 1, "max_global": 3, **hyper}
    return attnbench.build("longformer", C, H, pattern=pattern, backend="reference", **options).double()


def flags(*tokens: int) -> Tensor:
    found = torch.zeros(1, N, dtype=torch.bool)
    found[0, list(tokens)] = True
    return found


def by_hand(m, x: Tensor, globals_: list[int], steps: tuple[int, ...], pattern: str = "NS") -> Tensor:
    """Row by row, head by head: the definition."""
    q, k, v = (t[0].unflatten(-1, (H, -1)) for t in m.qkv(x).chunk(3, -1))
    other = m.qkv if m.global_qkv is None else m.global_qkv
    gq, gk, gv = (t[0].unflatten(-1, (H, -1)) for t in other(x).chunk(3, -1))
    w, out = m.hp.window, torch.zeros(N, H, C // H, dtype=x.dtype)
    for h in range(H):
        for i in range(N):
            if i in globals_:
                weights = (gk[:, h] @ gq[i, h] / math.sqrt(C // H)).softmax(-1)
                out[i, h] = weights @ gv[:, h]
                continue
            d = steps[h]
            near = {j for j in range(N) if abs(i - j) <= w * d and (i - j) % d == 0}
            if pattern == "CS":
                near = {j for j in near if j <= i}
            keys = sorted(near | set(globals_))
            out[i, h] = (k[keys, h] @ q[i, h] / math.sqrt(C // H)).softmax(-1) @ v[keys, h]
    return m.out_proj(out.flatten(-2))[None]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dilation", [1, (1, 3)])
@pytest.mark.parametrize("tokens", [(), (0,), (0, 5, 13)])
def test_rows_are_those_of_the_definition(share, dilation, tokens):
    m, x = module(share_global=share, dilation=dilation), torch.randn(1, N, C, dtype=torch.float64)
    if m.global_qkv is not None:
        torch.nn.init.normal_(m.global_qkv.weight)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * H
    found = m(x, global_tokens=flags(*tokens))
    torch.testing.assert_close(found, by_hand(m, x, list(tokens), steps))


def test_causal_form_has_windows_alone():
    m, x = module("CS", dilation=(1, 2)), torch.randn(1, N, C, dtype=torch.float64)
    torch.testing.assert_close(m(x, global_tokens=flags(0)), by_hand(m, x, [], (1, 2), "CS"))


def test_global_projections_start_as_copies():
    m, x = module(window=N), torch.randn(1, N, C, dtype=torch.float64)
    plain = module(window=N, share_global=True)
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if "global" not in k})
    torch.testing.assert_close(m(x, global_tokens=flags(3)), plain(x))
    torch.testing.assert_close(m(x, global_tokens=flags(1, 2, 3)), plain(x, global_tokens=flags()))


def test_a_global_token_inside_the_window_counts_once():
    m, x = module(share_global=True), torch.randn(1, N, C, dtype=torch.float64)
    torch.testing.assert_close(m(x, global_tokens=flags(6))[:, 7], by_hand(m, x, [6], (1, 1))[:, 7])


def test_sequences_of_a_batch_may_have_different_global_tokens():
    m, x = module(), torch.randn(2, N, C, dtype=torch.float64)
    both = torch.cat([flags(0), flags(4, 9)])
    found = m(x, global_tokens=both)
    for b, tokens in ((0, [0]), (1, [4, 9])):
        torch.testing.assert_close(found[b : b + 1], by_hand(m, x[b : b + 1], tokens, (1, 1)))


def test_costs():
    m = module(window=2, max_global=1, share_global=True)
    pairs = 2 * (N + 2 * (N - 1) + 2 * (N - 2))
    assert m.flops(N, N) == 8 * N * C * C + 4 * 8 * (pairs + 2 * 2 * N)


def test_refusals():
    with pytest.raises(UsageError, match="one or one for each of 2 heads"):
        module(dilation=(1, 2, 3))
    with pytest.raises(UsageError, match="window ≥ 0"):
        module(window=-1)
    with pytest.raises(RuntimeError, match="more than 3 global tokens"):
        module()(torch.randn(1, N, C, dtype=torch.float64), global_tokens=flags(0, 1, 2, 3))
