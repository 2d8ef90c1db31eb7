"""transformer_ls against a dense joint softmax with explicit masks, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError

BACKENDS = ("reference", "torch")
C, H, D = 12, 2, 6


def tokens(n: int, *, b: int = 2) -> Tensor:
    return torch.randn(b, n, C, dtype=torch.float64)


def module(pattern: str, backend: str = "reference", **hyper: object) -> torch.nn.Module:
    hyper = {"rank": 3, "segment": 4, "window": 5, "chunk": 4, "chunk_rank": 2, **hyper}
    built = attnbench.build("transformer_ls", C, H, pattern=pattern, backend=backend, **hyper).double()
    for norm in (built.norm_window, built.norm_compressed):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return built


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def joint(q: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """One softmax of q (B, N, C) over near and far keys (B, ·, C), where ``mask`` (N, ·) is True."""
    k, v = (split(torch.cat(pair, 1)) for pair in zip(near, far, strict=True))
    s = (D**-0.5 * split(q) @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def compressed(ls: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """LN(softmax over the tokens of x (B, L, C) · y), head by head: (B, r, C)."""
    weights = ls.compress(x).unflatten(-1, (H, -1)).softmax(1)  # (B, L, H, r)
    pooled = torch.einsum("blhr,blhd->brhd", weights, y.unflatten(-1, (H, D)))
    return ls.norm_compressed(pooled.flatten(-2))


def noncausal_mask(ls: torch.nn.Module, n: int) -> Tensor:
    """Visible tokens and, after them, visible compressed keys of each query."""
    w = ls.hp.segment
    e = max(w // 2, 1)
    mask = torch.zeros(n, n + ls.hp.rank, dtype=torch.bool)
    mask[:, n:] = True
    for i in range(n):
        first = i // w * w
        mask[i, max(0, first - e) : min(n, first + w + e)] = True
    return mask


def causal_mask(ls: torch.nn.Module, n: int, memory: int = 0) -> Tensor:
    """Visible tokens and, after them, visible compressed keys of each query."""
    c, r, length = ls.hp.chunk, ls.hp.chunk_rank, n + memory
    mask = torch.zeros(n, length + (length - 1) // c * r, dtype=torch.bool)
    for i in range(n):
        at = i + memory
        mask[i, max(0, at - ls.hp.window + 1) : at + 1] = True
        mask[i, length : length + at // c * r] = True
    return mask


def noncausal(ls: torch.nn.Module, x: Tensor) -> Tensor:
    k, v = ls.norm_window(ls.k_proj(x)), ls.norm_window(ls.v_proj(x))
    far = (compressed(ls, x, k), compressed(ls, x, v))
    return ls.out_proj(joint(ls.q_proj(x), (k, v), far, noncausal_mask(ls, x.shape[1])))


def causal(ls: torch.nn.Module, x: Tensor, memory: int = 0) -> Tensor:
    c = ls.hp.chunk
    whole = F.pad(x, (0, 0, memory, 0))
    k, v = ls.k_proj(whole), ls.v_proj(whole)
    chunks = range((whole.shape[1] - 1) // c)
    far = tuple(
        torch.cat(
            [
                y[:, :0],
                *(compressed(ls, whole[:, t * c : t * c + c], y[:, t * c : t * c + c]) for t in chunks),
            ],
            1,
        )
        for y in (k, v)
    )
    near = (ls.norm_window(k), ls.norm_window(v))
    return ls.out_proj(joint(ls.q_proj(x), near, far, causal_mask(ls, x.shape[1], memory)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 7, 12, 22])
@pytest.mark.parametrize("segment", [1, 4, 5])
def test_noncausal_equals_the_definition(segment: int, n: int, backend: str) -> None:
    ls, x = module("NS", backend, segment=segment), tokens(n)
    torch.testing.assert_close(ls(x), noncausal(ls, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 4, 5, 22])
@pytest.mark.parametrize(("window", "chunk", "chunk_rank"), [(5, 4, 1), (1, 3, 2), (50, 4, 3)])
def test_causal_equals_the_definition(window: int, chunk: int, chunk_rank: int, n: int, backend: str) -> None:
    ls, x = module("CS", backend, window=window, chunk=chunk, chunk_rank=chunk_rank), tokens(n)
    torch.testing.assert_close(ls(x), causal(ls, x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pattern", "reach"), [("NS", "segment"), ("CS", "window")])
def test_no_compressed_keys_and_a_wide_window_give_softmax_attention(
    pattern: str, reach: str, backend: str
) -> None:
    ls, x = module(pattern, backend, rank=0, chunk=30, **{reach: 20}), tokens(20)
    q, k, v = ls.q_proj(x), ls.norm_window(ls.k_proj(x)), ls.norm_window(ls.v_proj(x))
    o = attnbench.attention(split(q), split(k), split(v), "softmax", pattern, "reference")
    torch.testing.assert_close(ls(x), ls.out_proj(o.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_compression_weights_give_the_normalised_mean(backend: str) -> None:
    ls, x = module("NS", backend, rank=1, segment=2), tokens(9)
    torch.nn.init.zeros_(ls.compress.weight)
    expected = noncausal(ls, x)
    k = ls.norm_window(ls.k_proj(x))
    torch.testing.assert_close(compressed(ls, x, k), ls.norm_compressed(k.mean(1, keepdim=True)))
    torch.testing.assert_close(ls(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_constant_values_without_norms_are_returned(pattern: str, backend: str) -> None:
    ls, x = module(pattern, backend), tokens(22)
    ls.norm_window, ls.norm_compressed = torch.nn.Identity(), torch.nn.Identity()
    torch.nn.init.zeros_(ls.v_proj.weight)
    torch.testing.assert_close(ls(x), ls.out_proj(ls.v_proj.bias).expand_as(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_chunk_is_a_sliding_window(backend: str) -> None:
    ls, x = module("CS", backend, chunk=9, window=3), tokens(9)
    q, k, v = ls.q_proj(x), ls.norm_window(ls.k_proj(x)), ls.norm_window(ls.v_proj(x))
    o = attnbench.attention(split(q), split(k), split(v), "local_window", "CS", "reference", window=3)
    torch.testing.assert_close(ls(x), ls.out_proj(o.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_matter(backend: str) -> None:
    ls, x = module("CS", backend), tokens(22)
    before = ls(x)
    for i in range(21):
        other = torch.cat((x[:, : i + 1], 5 * tokens(21 - i)), 1)
        torch.testing.assert_close(ls(other)[:, : i + 1], before[:, : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_far_tokens_leaves_an_output_alone(backend: str) -> None:
    ls, x = module("NS", backend), tokens(20)
    order = torch.arange(20)
    order[6:] = torch.randperm(14) + 6  # the window of tokens 0 to 3 ends at 5
    torch.testing.assert_close(ls(x[:, order])[:, :4], ls(x)[:, :4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_padding_at_the_end_equals_dropping_it(pattern: str, backend: str) -> None:
    ls, x = module(pattern, backend), tokens(22)
    padded = torch.zeros(2, 22, dtype=torch.bool)
    padded[:, 13:] = True
    loud = x.masked_fill(padded.unsqueeze(-1), 40.0)
    torch.testing.assert_close(ls(loud, key_padding_mask=padded)[:, :13], ls(x[:, :13]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_inside_removes_keys_and_whole_chunks(backend: str) -> None:
    """Token 6 and the chunk 8..11 are gone: their noise must not reach any output."""
    ls, x = module("CS", backend), tokens(22)
    padded = torch.zeros(2, 22, dtype=torch.bool)
    padded[:, [6, 8, 9, 10, 11]] = True
    loud = x.masked_fill(padded.unsqueeze(-1), 40.0)
    kept = ~padded[0]
    before, after = (ls(u, key_padding_mask=padded)[:, kept] for u in (x, loud))
    torch.testing.assert_close(after, before)
    # with a window of one token, the last queries see the chunks 0, 1, 3 and 4 and themselves
    narrow = module("CS", backend, window=1)
    parts = [x[:, a:b][:, kept[a:b]] for a, b in ((0, 4), (4, 8), (12, 16), (16, 20))]
    k, v = narrow.k_proj, narrow.v_proj
    far = tuple(torch.cat([compressed(narrow, u, y(u)) for u in parts], 1) for y in (k, v))
    near = tuple(narrow.norm_window(y(x[:, 21:])) for y in (k, v))
    mask = torch.ones(1, 1 + far[0].shape[1], dtype=torch.bool)
    expected = narrow.out_proj(joint(narrow.q_proj(x[:, 21:]), near, far, mask))
    torch.testing.assert_close(narrow(x, key_padding_mask=padded)[:, 21:], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_without_a_token_the_heads_are_zero_and_gradients_finite(pattern: str, backend: str) -> None:
    ls, x = module(pattern, backend), tokens(10).requires_grad_()
    padded = torch.zeros(2, 10, dtype=torch.bool)
    padded[0] = True
    y = ls(x, key_padding_mask=padded)
    torch.testing.assert_close(y[0], ls.out_proj.bias.expand_as(y[0]))
    y.square().sum().backward()
    for leaf in (x, *ls.parameters()):
        assert leaf.grad.isfinite().all()


def test_cab_variant_sees_a_memory_of_zero_tokens() -> None:
    ls, x = module("CS", variant="cab", mem_len=10), tokens(11)
    torch.testing.assert_close(ls(x), causal(ls, x, memory=10))
    plain = module("CS")
    plain.load_state_dict(ls.state_dict())
    assert not torch.allclose(ls(x), plain(x))


@pytest.mark.parametrize("n", [1, 4, 22])
@pytest.mark.parametrize(("pattern", "memory"), [("NS", 0), ("CS", 0), ("CS", 10)])
def test_flops_count_what_the_masks_leave(pattern: str, memory: int, n: int) -> None:
    ls = module(pattern, variant="cab" if memory else "paper", mem_len=memory)
    mask = noncausal_mask(ls, n) if pattern == "NS" else causal_mask(ls, n, memory)
    hidden = ls.counted_flops(n, n) - ls.flops(n, n)
    assert hidden == 4 * C * int((~mask).sum())


@pytest.mark.parametrize(("pattern", "name"), [("NS", "segment"), ("CS", "window"), ("CS", "chunk")])
def test_lengths_without_a_token_are_refused(pattern: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"observed {name}=0"):
        module(pattern, **{name: 0})


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_gradients(pattern: str) -> None:
    ls, x = module(pattern), tokens(9, b=1).requires_grad_()
    torch.autograd.gradcheck(ls, (x,))


def test_a_context_is_refused() -> None:
    with pytest.raises(UsageError, match="context"):
        module("NS")(tokens(4), tokens(4))


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    ls, x = module(pattern, "triton"), tokens(40, b=1)
    exact = noncausal(ls, x) if pattern == "NS" else causal(ls, x)
    torch.testing.assert_close(ls.float()(x.float()).double(), exact, rtol=1e-4, atol=1e-4)
