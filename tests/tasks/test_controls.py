"""The controls: what they compute, and that tasks find them although no registry has them."""

import pytest
import torch

from attnbench.errors import UsageError
from attnbench.impls import registry
from attnbench.tasks import controls

B, N, M, C, H = 2, 7, 5, 8, 2
PATTERNS = ("NS", "CS", "NC", "CC")


def built(name, pattern):
    module = controls.build_attention(name, C, H, pattern=pattern, n=N, m=M)
    return module.double()


def inputs(pattern):
    x = torch.randn(B, N, C, dtype=torch.float64)
    return (x, torch.randn(B, M, C, dtype=torch.float64)) if pattern in ("NC", "CC") else (x,)


def test_controls_are_not_mechanisms():
    assert not set(controls.NAMES) & set(registry.ids())


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_no_mixing_is_output_of_value_of_the_same_token(pattern):
    module, (x,) = built("no_mixing", pattern), inputs(pattern)
    torch.testing.assert_close(module(x), module.out_proj(module.v_proj(x)))


@pytest.mark.parametrize("pattern", ["NC", "CC"])
def test_no_mixing_does_not_read_the_context(pattern):
    module, (x, context) = built("no_mixing", pattern), inputs(pattern)
    torch.testing.assert_close(module(x, context), module.out_proj.bias.expand(B, N, C))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
def test_uniform_is_the_mean_of_the_visible_values(pattern, padded):
    module, given = built("uniform", pattern), inputs(pattern)
    source = given[-1]
    mask = torch.zeros(B, source.shape[1], dtype=torch.bool)
    if padded:
        mask[0, 1] = mask[1, -2:] = True
    weights = (~mask)[:, None].double().expand(B, N, -1)
    if pattern == "CS":
        weights = weights.tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = module.out_proj(weights @ module.v_proj(source))
    got = module(*given, key_padding_mask=mask if padded else None)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", controls.NAMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dtype_and_shape_are_those_of_the_queries(name, pattern):
    module = built(name, pattern)
    q = torch.randn(B, H, N, 4, dtype=torch.float16)
    keys = M if pattern in ("NC", "CC") else N
    k, v = torch.randn(B, H, keys, 4).half(), torch.randn(B, H, keys, 6).half()
    o = module.attend(q, k, v)
    assert (o.shape, o.dtype) == ((B, H, N, 6), torch.float16)


def test_a_name_that_is_neither_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown mechanism"):
        controls.build_attention("no_such", C, H, pattern="CS", n=N, m=N)


def test_hyper_parameters_that_the_length_determines_are_filled_in():
    module = controls.build_attention("linformer", C, H, pattern="NS", n=24, m=24)
    assert module.hp.max_len == 24
