"""nsa: its three branches by loops, the folding of weights into blocks, and its exact special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.errors import UsageError
from attnbench.impls.sparse import nsa as module_under_test

SMALL = {"length": 4, "stride": 2, "block": 4, "top_n": 3, "num_initial": 1, "num_local": 1, "window": 5}
SIZES = {"CS": (21, 21), "NC": (5, 21), "CC": (9, 14)}


def heads(n: int, h: int = 2, d: int = 8) -> Tensor:
    return torch.randn(1, h, n, d, dtype=torch.float64)


def module(pattern: str = "CS", backend: str = "reference", *, h: int = 2, kv: int = 1, **hyper):
    mixer = attnbench.build(
        "nsa", 8 * h, h, pattern=pattern, backend=backend, num_kv_heads=kv, **{**SMALL, **hyper}
    ).double()
    for position in (mixer.k_position, mixer.v_position):
        torch.nn.init.normal_(position, std=0.5)
    return mixer


def plain(pattern: str = "CS", **hyper):
    """Without position codes: compressed tokens are means."""
    mixer = module(pattern, **hyper)
    for position in (mixer.k_position, mixer.v_position):
        torch.nn.init.zeros_(position)
    return mixer


def only(branch: int, h: int, n: int) -> Tensor:
    gates = torch.zeros(1, h, n, 3, dtype=torch.float64)
    gates[..., branch] = 1.0
    return gates


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q / math.sqrt(q.shape[-1])).softmax(-1) @ v


def compressed(x: Tensor, position: Tensor, weight: Tensor | None, hp) -> list[Tensor]:
    """The compressed tokens of one head, one by one."""
    found = []
    for start in range(0, len(x) - hp.length + 1, hp.stride):
        tokens = x[start : start + hp.length] + position
        if hp.compress == "mean":
            found.append(tokens.mean(0))
        elif hp.compress == "weighted":
            found.append(sum(w * t for w, t in zip(weight, tokens, strict=True)))
        else:
            found.append(tokens.flatten() @ weight)
    return found


@torch.no_grad()
def rows(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, mixer, causal: bool) -> tuple[Tensor, list]:
    """The output and the selected blocks by the definition, for one key head."""
    hp, (h, n), m = mixer.hp, q.shape[1:3], k.shape[2]
    weights = [None if w is None else w[0] for w in (mixer.k_compress, mixer.v_compress)]
    kc = compressed(k[0, 0], mixer.k_position[0], weights[0], hp)
    vc = compressed(v[0, 0], mixer.v_position[0], weights[1], hp)
    out, chosen = torch.zeros_like(q), []
    for t in range(n):
        seen = [i for i in range(len(kc)) if not causal or i * hp.stride + hp.length - 1 <= t]
        candidates = list(range(t // hp.block + 1)) if causal else list(range(math.ceil(m / hp.block)))
        score = dict.fromkeys(candidates, 0.0)
        for head in range(h):
            p = (
                (torch.stack([kc[i] for i in seen]) @ q[0, head, t] / math.sqrt(8)).softmax(-1)
                if seen
                else []
            )
            for weight, i in zip(p, seen, strict=True):
                for j in candidates:
                    low, high = (
                        max(i * hp.stride, j * hp.block),
                        min(i * hp.stride + hp.length, (j + 1) * hp.block),
                    )
                    score[j] += max(0, high - low) / hp.stride * float(weight)
        forced = set(candidates[: hp.num_initial]) | (set(candidates[-hp.num_local :]) if causal else set())
        best = sorted(candidates, key=lambda j: (j not in forced, -score[j], j))[: hp.top_n]
        chosen.append(set(best))
        tokens = [j for j in range(m) if j // hp.block in best and (not causal or j <= t)]
        near = [j for j in range(m) if 0 <= t - j < hp.window] if causal else []
        for head in range(h):
            g, query = gates[0, head, t], q[0, head, t]
            if seen:
                out[0, head, t] += g[0] * attended(
                    query, torch.stack([kc[i] for i in seen]), torch.stack([vc[i] for i in seen])
                )
            out[0, head, t] += g[1] * attended(query, k[0, 0, tokens], v[0, 0, tokens])
            if near:
                out[0, head, t] += g[2] * attended(query, k[0, 0, near], v[0, 0, near])
    return out, chosen


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize(
    "hyper", [{}, {"compress": "weighted"}, {"compress": "mean", "length": 8, "block": 6, "top_n": 2}]
)
def test_rows_are_those_of_the_definition(pattern, hyper, backend):
    n, m = SIZES[pattern]
    q, k, v = heads(n), heads(m, 1), heads(m, 1)
    gates = torch.rand(1, 2, n, 3, dtype=torch.float64)
    mixer = module(pattern, backend, **hyper)
    for weight in (mixer.k_compress, mixer.v_compress):
        if weight is not None:
            torch.nn.init.normal_(weight, std=0.3)
    expected, chosen = rows(q, k, v, gates, mixer, pattern == "CS")
    kept = mixer.select(q, k).block_mask[0, 0]
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == chosen
    torch.testing.assert_close(mixer.attend(q, k, v, gates=gates), expected)
    again, _ = mixer.consume(q, k, v, mixer.select(q, k), gates=gates)
    torch.testing.assert_close(again, expected)


def test_single_branches_are_known_mechanisms():
    q, k, v = heads(21), heads(21, 1), heads(21, 1)
    dense = attnbench.attention(q, k, v, "softmax", "CS", "reference")
    window = attnbench.attention(q, k, v, "local_window", "CS", "reference", window=5)
    torch.testing.assert_close(module().attend(q, k, v, gates=only(2, 2, 21)), window)
    torch.testing.assert_close(module(window=21).attend(q, k, v, gates=only(2, 2, 21)), dense)
    torch.testing.assert_close(module(top_n=6).attend(q, k, v, gates=only(1, 2, 21)), dense)
    tokens = plain(compress="mean", length=1, stride=1)
    torch.testing.assert_close(tokens.attend(q, k, v, gates=only(0, 2, 21)), dense)


def test_linear_compression_starts_as_the_mean():
    q, k, v = heads(21), heads(21, 1), heads(21, 1)
    gates = torch.rand(1, 2, 21, 3, dtype=torch.float64)
    outputs = [plain(compress=c).attend(q, k, v, gates=gates) for c in ("linear", "weighted", "mean")]
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])


def test_folded_weights_keep_their_sum():
    mixer = module(length=4, stride=4, block=4)
    weights = torch.rand(2, 5, dtype=torch.float64)
    torch.testing.assert_close(mixer._folded(weights, 5), weights)
    mixer = module(length=6, stride=2, block=8)
    torch.testing.assert_close(mixer._folded(weights, 3).sum(-1), 3 * weights.sum(-1))


def test_constant_values_come_out_times_the_gates_of_branches_that_see_something():
    q, k = heads(21), heads(21, 1)
    gates = torch.rand(1, 2, 21, 3, dtype=torch.float64)
    o = plain(compress="mean").attend(q, k, torch.ones_like(k), gates=gates)
    expected = gates[..., 1] + gates[..., 2]
    expected[..., 3:] += gates[..., 3:, 0]  # the first compressed token ends at 3
    torch.testing.assert_close(o[..., 0], expected)


def test_short_sequences_have_no_compressed_tokens():
    q, k, v = heads(3), heads(3, 1), heads(3, 1)
    o = module().attend(q, k, v, gates=only(1, 2, 3))
    torch.testing.assert_close(o, attnbench.attention(q, k, v, "softmax", "CS", "reference"))
    assert (module().attend(q, k, v, gates=only(0, 2, 3)) == 0).all()


def test_blocks_are_chosen_some_queries_at_a_time(monkeypatch):
    q, k = heads(21), heads(21, 1)
    mixer = module()
    whole = mixer.select(q, k)
    monkeypatch.setattr(module_under_test, "WEIGHTS_AT_ONCE", 100)
    assert torch.equal(mixer.select(q, k).indices, whole.indices)


def test_the_layer_gates_from_x_and_may_project_each_branch():
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    layer = module()
    q = layer.split(layer.q_proj(x), 2)
    k, v = (layer.split(p(x), 1) for p in (layer.k_proj, layer.v_proj))
    gates = layer.gate_proj(x).sigmoid().view(1, 13, 2, 3).transpose(1, 2)
    expected = layer.out_proj(layer.join(layer.attend(q, k, v, gates=gates)))
    torch.testing.assert_close(layer(x), expected)
    apart = module(separate_kv=True)
    rest = {n: p for n, p in layer.state_dict().items() if not n.startswith(("k_proj", "v_proj"))}
    apart.load_state_dict(rest, strict=False)
    for name in ("k_proj", "v_proj"):
        for part in ("weight", "bias"):
            shared = getattr(getattr(layer, name), part).data
            getattr(getattr(apart, name), part).data = shared.repeat(3, *(1,) * (shared.dim() - 1))
    torch.testing.assert_close(apart(x), expected)
    apart.k_proj.weight.data[8:16] += 1.0
    assert not torch.allclose(apart(x), expected)


def test_costs_and_refusals():
    mixer = module(h=4, kv=2)
    keys = (21 - 4) // 2 + 1
    seen = sum(len([i for i in range(keys) if 2 * i + 3 <= t]) for t in range(21))
    blocks = sum(min(2, t // 4) * 4 + t % 4 + 1 for t in range(21))
    near = sum(min(5, t + 1) for t in range(21))
    compression = 2 * 2 * (keys * 4 * 8) * 8 * 2
    assert mixer.flops(21, 21) == compression + 4 * 8 * (6 * seen + 4 * (blocks + near))
    for hyper in ({"stride": 3}, {"block": 5}, {"top_n": 0}, {"num_local": -1}):
        with pytest.raises(UsageError, match="nsa: observed"):
            module(**hyper)
    with pytest.raises(UsageError, match="gates"):
        mixer.attend(heads(5, 4), heads(5, 2), heads(5, 2))


@pytest.mark.parametrize("pattern", SIZES)
def test_triton_agrees(pattern):
    n, m = {"NC": (5, 9), "CC": (9, 6)}.get(pattern, (9, 9))
    given = [x.float().requires_grad_() for x in (heads(n), heads(m, 1), heads(m, 1))]
    gates = torch.rand(1, 2, n, 3)
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        o = module(pattern, backend, top_n=2).float().attend(*given, gates=gates)
        results.append((o, *torch.autograd.grad(o.square().sum(), given)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
