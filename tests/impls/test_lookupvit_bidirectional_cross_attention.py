"""lookupvit_bidirectional_cross_attention against its steps with the map in memory, and its special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnbench
from attnbench.errors import UsageError

ID = "lookupvit_bidirectional_cross_attention"
BACKENDS = ("reference", "torch")


def build(pattern: str = "NS", backend: str = "reference", **hyper: object) -> nn.Module:
    return attnbench.build(ID, 16, 2, pattern=pattern, backend=backend, **{"side": 2, **hyper}).double()


def tokens(n: int, b: int = 2) -> Tensor:
    return torch.randn(b, n, 16, dtype=torch.float64)


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 8)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


def gathered(m: nn.Module, z: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
    """Gather and refine with plain matrices: the compressed tokens and the map A."""
    read = m.norm_lookup(lookup)
    q, k, v = (m.gather["q"](m.norm_compressed(z)), m.gather["k"](read), m.gather["v"](read))
    a = (by_head(q) @ by_head(k).mT / 8**0.5).softmax(-1)
    z = z + m.gather["out"](merged(a @ by_head(v)))
    own = m.refine_norm(z)
    q, k, v = (by_head(p(own)) for p in (m.refine.q_proj, m.refine.k_proj, m.refine.v_proj))
    z = z + m.refine.out_proj(merged((q @ k.mT / 8**0.5).softmax(-1) @ v))
    return z + m.ffn(m.ffn_norm(z)), a


def direct(m: nn.Module, x: Tensor, grid: tuple[int, ...], *, renorm: bool = False) -> Tensor:
    image = x.transpose(1, 2).unflatten(-1, grid)
    mode = "bilinear" if len(grid) == 2 else "trilinear"
    z = F.interpolate(image, size=(m.hp.side,) * len(grid), mode=mode, align_corners=False)
    z, a = gathered(m, z.flatten(2).transpose(1, 2), x)
    back = a.mT
    if renorm:
        back = back / back.sum(-1, keepdim=True)
    x = x + m.infuse["out"](merged(back @ by_head(m.infuse["v"](m.infuse_norm(z)))))
    return x + m.lookup_ffn(m.lookup_norm(x))


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3), (3, 2, 4)])
def test_self_attention_equals_the_steps(grid: tuple[int, ...], backend: str, renorm: bool) -> None:
    module, x = build("NS", backend, renorm=renorm), tokens(torch.Size(grid).numel())
    torch.testing.assert_close(module(x, grid=grid), direct(module, x, grid, renorm=renorm))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_updates_the_compressed_tokens(backend: str) -> None:
    module, z, lookup = build("NC", backend), tokens(4), tokens(11)
    torch.testing.assert_close(module(z, lookup), gathered(module, z, lookup)[0])
    order = torch.randperm(11)
    torch.testing.assert_close(module(z, lookup[:, order]), module(z, lookup))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_write_back_hands_out_exactly_what_the_compressed_tokens_have(backend: str) -> None:
    module = build("NS", backend)
    q, u, k = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (4, 4, 30))
    lse = (q @ k.mT / 8**0.5).logsumexp(-1)
    back = module._write_back(q, k, u, lse, None)
    torch.testing.assert_close(back.sum(2), u.sum(2))
    a = (q[:, :, :1] @ k.mT / 8**0.5).softmax(-1)
    one = module._write_back(q[:, :, :1], k, u[:, :, :1], lse[:, :, :1], None)
    torch.testing.assert_close(one, a.mT * u[:, :, :1])


def test_without_its_outputs_the_block_leaves_the_lookup_tokens() -> None:
    module, x = build(), tokens(24)
    for linear in (module.infuse["out"], module.lookup_ffn[2]):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    torch.testing.assert_close(module(x, grid=(4, 6)), x, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_left_out_of_resize_gather_and_write_back(backend: str) -> None:
    """Padded columns at the right border, where the grid without them is a grid."""
    module, x = build("NS", backend, side=3), 5 * tokens(24)
    padded = torch.zeros(2, 4, 6, dtype=torch.bool)
    padded[:, :, 3] = True
    padded = padded.flatten(1)
    other = torch.where(padded.unsqueeze(-1), 100 * torch.randn_like(x), x)
    o, same = (module(t, grid=(4, 6), key_padding_mask=padded) for t in (x, other))
    torch.testing.assert_close(same[:, ~padded[0]], o[:, ~padded[0]])
    assert same.isfinite().all()
    cross = build("NC", backend)
    z = tokens(4)
    dropped = cross(z, x[:, ~padded[0]])
    torch.testing.assert_close(cross(z, x, key_padding_mask=padded), dropped)


def test_a_resized_grid_with_padding_averages_what_is_left() -> None:
    module = build("NS", side=1)
    x = tokens(4)
    padded = torch.tensor([[False, True, False, False]]).expand(2, -1)
    left = x[:, [0, 2, 3]].mean(1, keepdim=True)
    torch.testing.assert_close(module.compressed(x, (2, 2), padded), left)


def test_what_is_missing_or_without_a_meaning_is_refused() -> None:
    with pytest.raises(UsageError, match="no grid"):
        build()(tokens(4))
    with pytest.raises(UsageError, match="side=0"):
        build(side=0)


def test_flops_by_hand() -> None:
    """C = 16, a grid of 4 × 6 to 2 × 2, hidden widths 64 and 8."""
    c, few, n = 16, 4, 24
    resize = 2 * 2 * 24 * c + 2 * 2 * (2 * 6) * c
    gather = 2 * (2 * few + 2 * n) * c * c + 4 * few * n * c
    refine = 8 * few * c * c + 4 * few * few * c + 4 * few * c * 64
    infuse = 2 * (few + n) * c * c + 4 * few * n * c + 4 * n * c * 8
    assert build().flops(n, n, grid=(4, 6)) == resize + gather + refine + infuse
    assert build("NC").flops(few, n) == gather + refine


@pytest.mark.parametrize("pattern", ["NS", "NC"])
def test_triton_agrees_with_fp64(pattern: str) -> None:
    truth = build(pattern)
    fast = attnbench.build(ID, 16, 2, pattern=pattern, backend="triton", side=2)
    fast.load_state_dict(truth.state_dict())
    inputs = [tokens(20, b=1).requires_grad_()]
    if pattern == "NC":
        inputs.insert(0, tokens(4, b=1).requires_grad_())
    single = [t.detach().float().requires_grad_() for t in inputs]
    options = {"grid": (4, 5)} if pattern == "NS" else {}
    padded = torch.arange(20).unsqueeze(0) == 7
    expected = truth(*inputs, key_padding_mask=padded, **options)
    got = fast(*single, key_padding_mask=padded, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3)
