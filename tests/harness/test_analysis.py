"""Maps and the functions of maps, against values worked out by hand."""

import math

import pytest
import torch

import attnbench
from attnbench.errors import UsageError
from attnbench.harness import analysis

EYE = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
UNIFORM = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)


def qk(n=7, m=9, d=4):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, x, d, generator=generator, dtype=torch.float64) for x in (n, m))
    return q, k


def test_the_map_of_softmax_is_its_softmax():
    q, k = qk()
    found = attnbench.attention_map("softmax", q, k, pattern="NC")
    torch.testing.assert_close(found, (q @ k.transpose(-1, -2) / 2.0).softmax(-1), rtol=0, atol=1e-12)


def test_the_map_reproduces_the_output_of_a_linear_mechanism():
    q, k = qk(8, 8)
    v = k.flip(-1)
    module = attnbench.build("linear_transformer", 8, 2, pattern="CS", backend="reference").double().eval()
    found = attnbench.attention_map(module, q, k)
    torch.testing.assert_close(found @ v, module.attend(q, k, v), rtol=0, atol=1e-12)
    assert (found.triu(1) == 0).all()


def test_maps_that_do_not_exist_are_refused():
    q, k = qk()
    with pytest.raises(UsageError, match="is a mixer: it has no attention map"):
        analysis.attention_map("s4d", q, k)
    with pytest.raises(UsageError, match="expected at most"):
        analysis.attention_map("softmax", torch.zeros(1, 1, 2**14, 2), torch.zeros(1, 1, 2**14, 2))


def test_entropy():
    assert analysis.entropy(EYE).abs().max() == 0
    torch.testing.assert_close(analysis.entropy(UNIFORM)[0, 0, 0].item(), math.log(4))


def test_sink_mass():
    assert analysis.sink_mass(UNIFORM, sinks=2).tolist() == [[0.5, 0.5]]
    assert analysis.sink_mass(EYE).tolist() == [[0.25, 0.25]]


def test_distances():
    profile = analysis.distance_profile(UNIFORM, edges=(1, 2))
    assert profile[0, 0].tolist() == pytest.approx([4 / 16, 6 / 16, 6 / 16])
    assert analysis.mean_distance(EYE).tolist() == [[0.0, 0.0]]
    assert analysis.mean_distance(UNIFORM)[0, 0].item() == pytest.approx(20 / 16)
    last_keys = EYE[..., 2:, :]  # two queries that are the last of four positions
    assert analysis.mean_distance(last_keys).tolist() == [[0.0, 0.0]]


def test_ranks():
    assert analysis.numerical_rank(EYE).tolist() == [[4, 4]]
    assert analysis.numerical_rank(UNIFORM).tolist() == [[1, 1]]
    assert analysis.numerical_rank(torch.zeros(1, 1, 3, 3)).tolist() == [[0]]
    assert analysis.effective_rank(EYE)[0, 0].item() == pytest.approx(4.0)
    assert analysis.effective_rank(UNIFORM)[0, 0].item() == pytest.approx(1.0, abs=1e-6)


def test_retrieval_score():
    queries, needles = torch.tensor([1, 3]), torch.tensor([1, 0])
    assert analysis.retrieval_score(EYE, queries, needles).tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="expected the same length"):
        analysis.retrieval_score(EYE, queries, needles[:1])
