"""A case made concrete: what is differentiated, here and on the reference."""

import torch

from attnbench.harness.subject import as_reference, build
from attnbench.impls.case import Case, Workload


def test_weights_that_a_mechanism_holds_frozen_stay_frozen_on_the_reference():
    workload = Workload("tiny", batch=1, heads=2, kv_heads=2, head_dim=8)
    case = Case("seer_attention", "torch", "CS", workload, 32, 32, "float32", "fwd_bwd", "cpu")
    subject = build(case)
    reference = as_reference(subject, torch.float64)
    assert any(not p.requires_grad for p in subject.module.parameters())
    assert len(reference.leaves()) == len(subject.leaves())
    assert [x.shape for x in reference.step()] == [x.shape for x in subject.step()]


def test_an_input_that_the_definition_does_not_read_has_a_gradient_of_zero():
    workload = Workload("tiny", batch=1, heads=2, kv_heads=2, head_dim=8)
    case = Case("reformer_lsh", "torch", "NS", workload, 64, 64, "float32", "fwd_bwd", "cpu")
    _, _, of_keys, of_values = build(case).step()
    assert of_keys.count_nonzero() == 0
    assert of_values.count_nonzero() > 0
