"""The kit passes a right mechanism and catches every broken one by exactly the checks named beside it."""

import sys

import pytest
import torch

from attnbench.errors import UsageError
from attnbench.harness.contract import Outcome, checks, run_kit, summary, targets
from attnbench.impls import registry
from attnbench.kernels.backends import interpreting
from tests.harness.contract_toys import (
    ClaimsTriton,
    Grid2d,
    LeakyMixer,
    Mixer,
    NeedsGpu,
    RefusesEverything,
    RefusesLongQueries,
    SameRowOfTheGrid,
    ScalesQueries,
    Sharpened,
    Toy,
    WantsLabels,
    WantsTheUnknown,
    WrongTestHyper,
    toy_spec,
)
from tests.harness.contract_zoo import ZOO, AcceptsAnyPattern, LeaksFuture, RaisesOnPadding


def target_of(kind, pattern="NS", backend="reference"):
    found = [t for t in targets(kind) if (t.pattern, t.backend) == (pattern, backend)]
    assert len(found) == 1
    return found[0]


def failed(outcomes):
    return {o.check for o in outcomes if o.status == "failed"}


@pytest.mark.parametrize(("kind", "pattern", "backend", "caught_by"), ZOO)
def test_each_toy_fails_exactly_the_named_checks(kind, pattern, backend, caught_by):
    outcomes = run_kit(target_of(kind, pattern, backend))
    assert failed(outcomes) == caught_by, [o for o in outcomes if o.status == "failed"]


def test_every_check_is_failed_by_some_toy():
    named = set().union(*(caught for *_, caught in ZOO))
    assert {c.name for c in checks()} - named == {"select_needs_no_host"}  # shows on a GPU only: see below


@pytest.mark.parametrize("target", targets(Toy), ids=lambda t: t.label)
def test_the_right_toy_passes_everything_that_applies(target):
    outcomes = run_kit(target)
    assert failed(outcomes) == set(), outcomes
    assert [o.check for o in outcomes] == [c.name for c in checks()]
    assert summary(outcomes).verdict == "passed"


def test_outcomes_say_what_was_observed_and_where():
    outcomes = {o.check: o for o in run_kit(target_of(LeaksFuture, "CS"))}
    assert "outputs 0..0 after changing tokens 1..36" in outcomes["strict_causality"].detail
    assert "expected at most" in outcomes["strict_causality"].detail
    assert outcomes["frozen_selection_causality"].status == "not applicable"
    assert "Spec.causality" in outcomes["frozen_selection_causality"].detail
    raised = {o.check: o for o in run_kit(target_of(RaisesOnPadding))}["all_keys_padded"]
    assert raised.detail.startswith("IndexError: no padding here (contract_zoo.py:")


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    run_kit(target_of(Toy))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_runs_the_named_checks_and_rejects_unknown_names():
    assert [o.check for o in run_kit(target_of(Toy), only=["row_sums"])] == ["row_sums"]
    with pytest.raises(UsageError, match="unknown check 'row_sum'"):
        run_kit(target_of(Toy), only=["row_sum"])


def test_every_check_has_a_sentence_and_a_name_of_its_own():
    assert all(c.sentence.endswith(".") for c in checks())
    assert len({c.name for c in checks()}) == len(checks())


# ---- what cannot be checked is seen --------------------------------------------------------------------


def test_an_absent_backend_is_one_outcome_with_the_reason():
    if torch.cuda.is_available():
        pytest.skip("sdpa_cudnn runs here")
    outcomes = run_kit(target_of(NeedsGpu, "NS", "sdpa_cudnn"))
    assert [(o.check, o.status) for o in outcomes] == [("available", "not applicable")]
    assert "observed device cpu" in outcomes[0].detail
    assert summary(outcomes).verdict == "nothing computed"
    assert "observed device cpu" in summary(outcomes).text


def test_a_target_that_serves_nothing_is_not_a_pass():
    outcomes = run_kit(target_of(RefusesEverything, "NS", "torch"))
    assert summary(outcomes).verdict == "nothing computed"
    assert summary(outcomes).failed == 0
    assert summary(outcomes).reason == "toy: observed anything, expected nothing"


def test_the_reference_may_refuse_nothing():
    assert "output_shape" in failed(run_kit(target_of(RefusesEverything, "NS", "reference")))
    assert "output_shape" in failed(run_kit(target_of(RefusesLongQueries, "NC", "reference")))


def test_sizes_that_are_not_served_are_named_in_a_passed_outcome():
    outcomes = {o.check: o for o in run_kit(target_of(RefusesLongQueries, "NC", "torch"))}
    assert outcomes["output_shape"].status == "passed"
    assert "not served: N, M (33, 20): toy: observed N = 33" in outcomes["output_shape"].detail


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled here: nothing is reduced")
def test_what_an_interpreted_kernel_skips_is_named():
    outcomes = {o.check: o for o in run_kit(target_of(ClaimsTriton, "CC", "triton"))}
    assert outcomes["cc_prefix"].status == "not applicable"
    assert outcomes["cc_prefix"].detail == "covered by agreement with the reference"
    assert outcomes["agrees_with_reference"].status == "passed"
    assert "interpreted Triton: only N, M" in outcomes["agrees_with_reference"].detail
    assert outcomes["spec_is_filled"].status == "passed"


def test_inputs_that_nothing_can_make_are_named():
    outcomes = {o.check: o for o in run_kit(target_of(WantsTheUnknown), only=["spec_is_filled", "row_sums"])}
    assert "input labels: no synthetic input is called" in outcomes["spec_is_filled"].detail
    assert "unknown synthetic input 'no such generator'" in outcomes["row_sums"].detail


@pytest.mark.parametrize("kind", [WantsLabels, ScalesQueries, SameRowOfTheGrid, Sharpened])
def test_right_toys_with_inputs_grids_selections_and_maps_pass(kind):
    for target in targets(kind):
        if target.backend == "reference":
            assert failed(run_kit(target)) == set(), target.label


def test_every_rank_of_grids_is_run():
    seen = set()

    class Sees(Toy):
        spec = toy_spec(grid_ranks=(1, 2, 3))

        def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
            seen.add(grid)
            return super().attend(q, k, v, key_padding_mask=key_padding_mask)

    assert failed(run_kit(target_of(Sees), only=["output_shape", "linear_in_v"])) == set()
    assert {None, (5, 7), (3, 3, 5), (1, 5), (1, 1, 1)} <= seen


@pytest.mark.gpu
def test_a_selection_that_waits_for_the_device_is_caught():
    class Waits(SameRowOfTheGrid):
        spec = SameRowOfTheGrid.spec

        def select(self, q, k, **options):
            q.sum().item()
            return super().select(q, k, **options)

    for kind, caught in ((SameRowOfTheGrid, set()), (Waits, {"select_needs_no_host"})):
        target = next(t for t in targets(kind, "cuda") if t.backend == "reference")
        assert failed(run_kit(target, only=["select_needs_no_host"])) == caught


def test_a_module_that_cannot_be_built_fails_every_computing_check():
    outcomes = run_kit(target_of(WrongTestHyper))
    assert "Spec.test_hyper: toy: unknown hyper-parameter 'y'" in outcomes[0].detail
    assert {"output_shape", "repeatable"} <= failed(outcomes)


def test_summary_counts():
    outcomes = [Outcome("a", "passed"), Outcome("b", "failed", "x"), Outcome("c", "not applicable", "y")]
    found = summary(outcomes)
    assert (found.passed, found.failed, found.not_applicable) == (1, 1, 1)
    assert found.verdict == "failed"
    assert found.failures == (outcomes[1],)
    assert found.text == "failed: 1 passed, 1 failed, 1 not applicable"


# ---- other kinds and targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_a_right_mixer_passes(pattern):
    assert failed(run_kit(target_of(Mixer, pattern))) == set()


def test_a_leaking_mixer_is_caught_through_forward():
    assert "strict_causality" in failed(run_kit(target_of(LeakyMixer, "CS")))


def test_a_grid_mechanism_is_given_a_grid():
    assert failed(run_kit(target_of(Grid2d))) == set()


def test_targets_are_declared_patterns_times_backends():
    assert [t.label for t in targets(AcceptsAnyPattern)] == ["toy/reference NS", "toy/torch NS"]
    assert len(targets(Toy)) == 8


def test_a_user_file_is_checked_like_any_other(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from attnbench import Attention, Paper, Pattern, Spec\n"
        "class Mine(Attention):\n"
        "    spec = Spec(id='mine', name='Mine', family='user', kind='core', summary='Sum of v.',\n"
        "                paper=Paper('Mine', 2024, venue='here'), patterns=(Pattern.NC, Pattern.CC),\n"
        "                formula='sum v', cost='none', hot_loop='a sum', row_sum='free',\n"
        "                flops_backend='', flops_note='no product')\n"
        "    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):\n"
        "        if key_padding_mask is not None:\n"
        "            v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)\n"
        "        return v.sum(-2, keepdim=True).expand(*q.shape[:-1], v.shape[-1])\n"
        "    def flops(self, n, m):\n"
        "        return m * self.embed_dim\n"
    )
    kind = registry.mechanism(f"{path}:Mine")
    assert kind.__module__ not in sys.modules
    outcomes = run_kit(target_of(kind, "CC"))
    assert failed(outcomes) == {"parameters_learn"}, outcomes  # q and k, and their projections, are dead
    assert {o.check: o.status for o in outcomes}["picklable"] == "not applicable"
