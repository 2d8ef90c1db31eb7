"""perceiver_latent_attention against its steps written out, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.errors import UsageError

ID = "perceiver_latent_attention"
BACKENDS = ("reference", "torch")


def build(
    pattern: str = "NC", backend: str = "reference", num_latents: int = 3, **hyper: object
) -> nn.Module:
    module = attnbench.build(ID, 16, 2, pattern=pattern, backend=backend, num_latents=num_latents, **hyper)
    nn.init.normal_(module.latent)
    return module.double()


def tokens(n: int, b: int = 2) -> Tensor:
    return torch.randn(b, n, 16, dtype=torch.float64)


def mha(read: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """Multi-head attention of x (N, ·) over c (M, ·), one score at a time."""
    q, k, v = read.q_proj(x), read.k_proj(c), read.v_proj(c)
    d = q.shape[-1] // read.heads
    rows = []
    for i in range(x.shape[0]):
        parts = []
        for h in range(read.heads):
            part = slice(h * d, (h + 1) * d)
            weights = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(d)) for j in range(c.shape[0])]
            parts.append(sum(w * v[j, part] for j, w in enumerate(weights)) / sum(weights))
        rows.append(torch.cat(parts))
    return read.out_proj(torch.stack(rows))


def block(b: nn.Module, x: Tensor, c: Tensor, *, residual: bool = True) -> Tensor:
    o = mha(b.read, b.norm(x), b.context_norm(c))
    o = x + o if residual else o
    return o + b.ffn(b.ffn_norm(o))


def latents(m: nn.Module, c: Tensor) -> Tensor:
    z = m.latent
    for step in range(m.rounds):
        z = block(m.encoders[0] if step == 0 else m.encoders[1], z, c)
        for mixer in m.mixers:
            z = z + mha(mixer.read, mixer.norm(z), mixer.norm(z))
            z = z + mixer.ffn(mixer.ffn_norm(z))
    return z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pattern", "hyper"),
    [
        ("NS", {}),
        ("NC", {"self_layers": 2, "rounds": 3}),
        ("CC", {"latent_dim": 24, "cross_heads": 1, "widening": 2, "self_layers": 0}),
        ("NC", {"decode_residual": False}),
    ],
)
@torch.no_grad()
def test_equals_the_steps(pattern: str, backend: str, hyper: dict[str, object]) -> None:
    module, x, c = build(pattern, backend, **hyper), tokens(4), tokens(6)
    o = module(x) if pattern == "NS" else module(x, c)
    source = x if pattern == "NS" else c
    for b in range(2):
        residual = hyper.get("decode_residual", True)
        expected = block(module.decoder, x[b], latents(module, source[b]), residual=bool(residual))
        torch.testing.assert_close(o[b], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_resampler_reads_context_and_latents_in_one_softmax(backend: str) -> None:
    module = build("NC", backend, variant="resampler", rounds=2, latent_dim=8)
    c = tokens(5, b=1)
    z = module.latent
    for b in module.encoders:
        normed = b.norm(z)
        z = z + mha(b.read, normed, torch.cat((b.context_norm(module.enter(c[0])), normed)))
        z = z + b.ffn(b.ffn_norm(z))
    torch.testing.assert_close(module.latents(c)[0], z)
    padded = torch.tensor([[True, False, False, True, False]])
    torch.testing.assert_close(module.latents(c, padded), module.latents(c[:, ~padded[0]]))


def test_rounds_share_weights_after_the_first_read() -> None:
    sizes = [sum(p.numel() for p in build(rounds=r).parameters()) for r in (1, 2, 5)]
    assert sizes[0] < sizes[1] == sizes[2]
    own = [len(build(variant="resampler", rounds=r).encoders) for r in (1, 4)]
    assert own == [1, 4]
    assert build(variant="resampler").rounds == 8


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_special_cases(backend: str) -> None:
    module, x, c = build("NC", backend), tokens(4), tokens(6)
    o = module(x, c)
    torch.testing.assert_close(module(x, torch.cat((c, c), 1)), o)  # every row twice
    alike = c[:, :1]
    torch.testing.assert_close(module(x, alike.expand(-1, 9, -1)), module(x, alike))
    module.latent.copy_(module.latent.flip(0))
    torch.testing.assert_close(module(x, c), o)


@torch.no_grad()
def test_one_latent_adds_one_vector_to_every_row() -> None:
    module, x, c = build("NC", num_latents=1, self_layers=0), tokens(4), tokens(6)
    for parameter in module.decoder.ffn[2].parameters():
        parameter.zero_()
    added = module(x, c) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(added))


@torch.no_grad()
def test_the_latents_are_all_that_decoding_needs() -> None:
    """One query at a time, with the latents computed once."""
    module, x, c = build("CC"), tokens(5), tokens(6)
    z = module.latents(c)
    rows = [module.decoder(x[:, i : i + 1], z, None, "reference") for i in range(5)]
    torch.testing.assert_close(torch.cat(rows, 1), module(x, c))


@torch.no_grad()
def test_padding_equals_dropping_the_tokens() -> None:
    module, x, c = build("NC"), tokens(4), tokens(6)
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[:, [1, 4]] = True
    torch.testing.assert_close(module(x, c, key_padding_mask=padded), module(x, c[:, ~padded[0]]))


@pytest.mark.parametrize(
    "hyper", [{"num_latents": 0}, {"rounds": 0}, {"latent_dim": 9}, {"cross_heads": 3}, {"self_layers": -1}]
)
def test_sizes_without_a_meaning_are_refused(hyper: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=ID):
        build(**hyper)


def test_flops_by_hand() -> None:
    """C = 16, 3 latents of width 8, 5 queries, 7 keys, 2 rounds of 1 self attention, widening 2."""

    def read(n: int, m: int, dim: int, context_dim: int) -> int:
        return 2 * (2 * n * dim * dim + 2 * m * context_dim * dim) + 2 * 2 * n * m * dim

    module = build(latent_dim=8, rounds=2, widening=2)
    ffn = 2 * 2 * 3 * 8 * 16
    encode, process = read(3, 7, 8, 16) + ffn, read(3, 3, 8, 8) + ffn
    decode = read(5, 3, 16, 8) + 2 * 2 * 5 * 16 * 32
    assert module.flops(5, 7) == 2 * (encode + process) + decode
    resampler = build(variant="resampler", latent_dim=8, rounds=2, widening=2)
    assert resampler.flops(5, 7) == 2 * 7 * 16 * 8 + 2 * (read(3, 10, 8, 8) + ffn) + decode


@pytest.mark.parametrize("variant", ["io", "resampler"])
def test_triton_agrees_with_fp64(variant: str) -> None:
    hyper = {"num_latents": 3, "variant": variant, "rounds": 1}
    truth = build(**hyper)
    fast = attnbench.build(ID, 16, 2, pattern="NC", backend="triton", **hyper)
    fast.load_state_dict(truth.state_dict())
    x, c = tokens(5, b=1).requires_grad_(), tokens(20, b=1).requires_grad_()
    single = [t.detach().float().requires_grad_() for t in (x, c)]
    expected, got = truth(x, c), fast(*single)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), (x, c))
    for g, w in zip(torch.autograd.grad(got.square().sum(), single), wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4)
