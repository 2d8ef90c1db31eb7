"""Broken mechanisms, each in one way, with the checks that must catch it and no other.

``ZOO`` names for every one the pattern and backend it is checked on and the checks that it must fail.
"""

import itertools
import math
from dataclasses import replace

import torch
from torch import nn

from attnbench.impls.spec import Hyper, Input, Pattern
from tests.harness.contract_toys import (
    SPEC,
    SameRowOfTheGrid,
    ScalesQueries,
    SelectsKeysGlobally,
    Sharpened,
    Toy,
    toy_spec,
)


class LeaksFuture(Toy):
    spec = toy_spec()

    def hidden(self, q, k, **inputs):
        return torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)


class LeaksOneTokenAtMultiplesOf16(Toy):
    spec = toy_spec()

    def hidden(self, q, k, **inputs):
        hidden = super().hidden(q, k).clone()
        for i in range(16, min(hidden.shape) - 1, 16):
            hidden[i, i + 1] = False
        return hidden


class ReadsOnlyItsOwnToken(Toy):
    spec = toy_spec()

    def hidden(self, q, k, **inputs):
        return ~torch.eye(q.shape[-2], k.shape[-2], dtype=torch.bool)


class DeclaresSelectionStrict(SelectsKeysGlobally):
    spec = toy_spec(permutation_invariant=False, padding="toy")


class IgnoresTheFrozenSelection(SelectsKeysGlobally):
    spec = SelectsKeysGlobally.spec

    def hidden(self, q, k, padded=None, selection=None):
        return super().hidden(q, k, padded)


class MasksTheContext(Toy):
    """CAB's test passes it: with top-left alignment every prefix is right."""

    spec = toy_spec(permutation_invariant=False)

    def hidden(self, q, k, **inputs):
        return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)


class ZeroTimesTheFuture(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return weights @ v + 0.0 * q.sum((-2, -1), keepdim=True)


class GradientFromTheFuture(Toy):
    spec = toy_spec(query_separable=False)

    def output(self, weights, q, k, v):
        pooled = q.sum((-2, -1), keepdim=True)
        return weights @ v + (pooled - pooled.detach())


class PositionOverLength(Toy):
    spec = toy_spec(permutation_invariant=False)

    def scores(self, q, k):
        n, m = q.shape[-2], k.shape[-2]
        distance = torch.arange(n)[:, None] / n - torch.arange(m) / 8.0
        return super().scores(q, k) - distance.abs().to(q.dtype)


class CoupledQueries(Toy):
    spec = toy_spec()

    def scores(self, q, k):
        return super().scores(q - q.mean(-2, keepdim=True), k)


class CoupledBatch(Toy):
    spec = toy_spec(padding="toy")

    def scores(self, q, k):
        return super().scores(q / (1.0 + q.square().mean(0, keepdim=True)), k)


class RowsOfTwo(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return 2.0 * weights @ v


class NotLinear(Toy):
    spec = toy_spec(row_sum="free")

    def output(self, weights, q, k, v):
        return weights @ v.tanh()


class CountsKeys(Toy):
    spec = toy_spec(padding="toy")

    def scores(self, q, k):
        return super().scores(q, k) - 0.1 * torch.arange(k.shape[-2], dtype=q.dtype)


class NotExact(Toy):
    spec = SPEC

    def scores(self, q, k):
        return 1.001 * super().scores(q, k)


class AttendsPadding(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        return super().attend(q, k, v)


class CountsPadding(Toy):
    """Sharpens by the number of keys, padded ones included."""

    spec = toy_spec()

    def scores(self, q, k):
        return super().scores(q, k) * math.log(k.shape[-2] + 1)


class NanWithoutKeys(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        o = super().attend(q, k, v, key_padding_mask=key_padding_mask)
        if key_padding_mask is None:
            return o
        return o.masked_fill(key_padding_mask.all(-1)[:, None, None, None], math.nan)


class RaisesOnPadding(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        if key_padding_mask is not None:
            raise IndexError("no padding\nhere")
        return super().attend(q, k, v)


class Overflows(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        weights = self.scores(q, k).exp()
        if key_padding_mask is not None:
            weights = weights.masked_fill(key_padding_mask[:, None, None, :], 0.0)
        return weights / weights.sum(-1, keepdim=True).clamp_min(1e-9) @ v


class FloatFromHalf(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        o = weights @ v
        return o.float() if q.dtype is torch.float16 else o


class AlwaysDouble(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return (weights @ v).double()


class ValueAsWideAsKey(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return (weights @ v)[..., : q.shape[-1]]


class NeedsUnitStride(Toy):
    spec = toy_spec()

    def scores(self, q, k):
        return super().scores(q if q.stride(-1) == 1 else q.roll(1, -1), k)


class TripsOverAGrid(Toy):
    spec = toy_spec()

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        o = super().attend(q, k, v, key_padding_mask=key_padding_mask, **inputs)
        return o if grid is None else o.unflatten(2, grid).transpose(2, 3).flatten(2, 3)


class MutatesKeys(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        k.data.add_(1.0)  # after use, and softmax does not see a shift of all keys: only the caller does
        return weights @ v


class InfiniteSlopeAtZero(Toy):
    spec = toy_spec()

    def scores(self, q, k):
        return super().scores(q, k) * q.square().sum(-1, keepdim=True).sqrt()


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class WrongGradient(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return weights @ _Halved.apply(v)


class WrongGradientOfOneBackend(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return weights @ (_Halved.apply(v) if self.backend == "torch" else v)


class BackendOff(Toy):
    spec = toy_spec()

    def scores(self, q, k):
        return super().scores(q, k) * (1.01 if self.backend == "torch" else 1.0)


class DeadParameter(Toy):
    spec = toy_spec()

    def setup(self):
        self.unused = nn.Parameter(torch.zeros(3))


class NanGradientOfParameter(Toy):
    spec = toy_spec()

    def setup(self):
        self.gate = nn.Parameter(torch.ones(()))

    def scores(self, q, k):
        return super().scores(q, k) * (2.0 - (self.gate - self.gate.detach()).square().sqrt())


class WrongFlops(Toy):
    spec = toy_spec()

    def flops(self, n, m):
        return 2 * self.num_heads * n * m * self.head_dim


class FractionalFlops(Toy):
    spec = toy_spec(flops_backend="", flops_note="toy")

    def flops(self, n, m):
        return super().flops(n, m) / 2


class UnsavedTable(Toy):
    spec = toy_spec()

    def setup(self):
        self.register_buffer("table", torch.rand(self.num_heads, 1, 1) + 1.0, persistent=False)

    def scores(self, q, k):
        return super().scores(q, k) * self.table


class CountsBuilds(Toy):
    spec = toy_spec()
    builds = itertools.count()

    def setup(self):
        self.factor = 1.0 + 0.1 * next(self.builds)

    def scores(self, q, k):
        return super().scores(q, k) * self.factor


class NeverTheSame(Toy):
    spec = toy_spec()

    def output(self, weights, q, k, v):
        return weights @ v * (1.0 + 1e-14 * torch.rand((), dtype=v.dtype))


class ForgetsItsStateInPickles(Toy):
    spec = toy_spec()
    factor = 2.0

    def setup(self):
        self.factor = 1.5

    def __getstate__(self):
        state = dict(self.__dict__)
        state.pop("factor")
        return state

    def scores(self, q, k):
        return super().scores(q, k) * self.factor


class Silent(Toy):
    spec = toy_spec(summary=" ", hot_loop="", hyper=(Hyper("x", 1, "", choices=(2,)),))


class TakesNoMask(Toy):
    spec = toy_spec(padding="toy")

    def attend(self, q, k, v, *, grid=None, **inputs):
        return super().attend(q, k, v)


class AcceptsAnyPattern(Toy):
    spec = toy_spec(patterns=(Pattern.NS,))

    def _checked_pattern(self, pattern):
        return Pattern(pattern)


class InputFromTheFuture(ScalesQueries):
    spec = ScalesQueries.spec

    def scale_of(self, scale):
        return scale * scale.mean(-1, keepdim=True)


class InputOfPaddedKeys(Toy):
    spec = toy_spec(inputs=(Input("bias", "a number of each key", "(B, M)", "normal", differentiable=True),))

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, bias=None, **inputs):
        sharper = bias.mean(-1).sigmoid()[:, None, None, None]
        return super().attend(q * sharper, k, v, key_padding_mask=key_padding_mask)


class ConsumesEverything(SameRowOfTheGrid):
    spec = SameRowOfTheGrid.spec

    def consume(self, q, k, v, selection, *, grid=None, key_padding_mask=None, **inputs):
        everything = replace(selection, mask=torch.ones_like(selection.mask))
        return super().consume(q, k, v, everything, key_padding_mask=key_padding_mask)


class LseOfOtherScores(SameRowOfTheGrid):
    spec = SameRowOfTheGrid.spec

    def consume(self, q, k, v, selection, **options):
        o, lse = super().consume(q, k, v, selection, **options)
        return o, lse / math.log(2)


class MixesUpTheSides(SameRowOfTheGrid):
    spec = SameRowOfTheGrid.spec

    def width(self, grid):
        return grid[0] if self.backend == "torch" else grid[1]


class ForgetsTheMap(Sharpened):
    spec = Sharpened.spec

    def attend(self, q, k, v, *, grid=None, key_padding_mask=None, **inputs):
        return super().attend(q, k, v, key_padding_mask=key_padding_mask).flip(1)


PADDING = {"padding_is_unseen", "padding_equals_dropping", "all_keys_padded"}
ZOO = [
    (LeaksFuture, "CS", "reference", {"strict_causality"}),
    (LeaksOneTokenAtMultiplesOf16, "CS", "reference", {"strict_causality"}),
    (ReadsOnlyItsOwnToken, "CS", "reference", {"accumulation"}),
    (SelectsKeysGlobally, "CS", "reference", set()),
    (DeclaresSelectionStrict, "CS", "reference", {"strict_causality"}),
    (IgnoresTheFrozenSelection, "CS", "reference", {"frozen_selection_causality"}),
    (MasksTheContext, "CC", "reference", {"cc_completeness"}),
    (ZeroTimesTheFuture, "CC", "reference", {"cc_poison"}),
    (GradientFromTheFuture, "CC", "reference", {"cc_poison", "cc_jacobian", "gradcheck"}),
    (PositionOverLength, "CC", "reference", {"cc_prefix"}),
    (CoupledQueries, "NC", "reference", {"query_separable"}),
    (CoupledQueries, "CC", "reference", {"cc_prefix", "cc_poison", "cc_jacobian", "query_separable"}),
    (CoupledBatch, "NC", "reference", {"batch_independence"}),
    (RowsOfTwo, "NS", "reference", {"row_sums"}),
    (NotLinear, "NC", "reference", {"linear_in_v"}),
    (CountsKeys, "NC", "reference", {"permutation_invariant"}),
    (NotExact, "CS", "reference", {"exactness"}),
    (AttendsPadding, "NS", "reference", {"padding_is_unseen", "padding_equals_dropping"}),
    (AttendsPadding, "CC", "reference", {"padding_is_unseen", "padding_equals_dropping"}),
    (CountsPadding, "NC", "reference", {"padding_equals_dropping"}),
    (NanWithoutKeys, "NC", "reference", {"all_keys_padded"}),
    (RaisesOnPadding, "NC", "reference", PADDING),
    (Overflows, "NC", "reference", {"finite_on_hard_inputs", "finite_gradients"}),
    (AlwaysDouble, "NS", "reference", {"output_shape", "half_precision", "parameters_learn"}),
    (FloatFromHalf, "NC", "reference", {"half_precision"}),
    (ValueAsWideAsKey, "NC", "reference", {"other_widths"}),
    (NeedsUnitStride, "NC", "reference", {"strided_inputs"}),
    (TripsOverAGrid, "NC", "reference", {"ignores_a_grid"}),
    (MutatesKeys, "NC", "reference", {"inputs_not_mutated"}),
    (InfiniteSlopeAtZero, "NC", "reference", {"finite_gradients"}),
    (WrongGradient, "NC", "reference", {"gradcheck"}),
    (WrongGradientOfOneBackend, "NS", "torch", {"gradients_agree"}),
    (BackendOff, "NS", "torch", {"agrees_with_reference", "agrees_in_half", "gradients_agree"}),
    (DeadParameter, "NC", "reference", {"parameters_learn"}),
    (NanGradientOfParameter, "NC", "reference", {"parameters_learn"}),
    (WrongFlops, "NC", "reference", {"flops_match_counter"}),
    (FractionalFlops, "NC", "reference", {"cost_is_stated"}),
    (UnsavedTable, "NC", "reference", {"checkpoint_round_trip"}),
    (CountsBuilds, "NC", "reference", {"same_seed_same_output", "checkpoint_round_trip"}),
    (NeverTheSame, "NC", "reference", {"repeatable", "checkpoint_round_trip", "picklable"}),
    (ForgetsItsStateInPickles, "NC", "reference", {"picklable"}),
    (Silent, "NC", "reference", {"spec_is_filled"}),
    (TakesNoMask, "NC", "reference", {"has_its_methods", "padding_is_unseen"}),
    (AcceptsAnyPattern, "NS", "reference", {"refuses_other_patterns"}),
    (InputFromTheFuture, "CC", "reference", {"cc_prefix", "cc_poison", "cc_jacobian", "query_separable"}),
    (InputOfPaddedKeys, "NC", "reference", {"padding_is_unseen", "padding_equals_dropping"}),
    (ConsumesEverything, "NS", "reference", {"selection_is_attended"}),
    (LseOfOtherScores, "NC", "reference", {"selection_is_attended"}),
    (MixesUpTheSides, "NS", "torch", {"agrees_with_reference", "agrees_in_half", "gradients_agree"}),
    (ForgetsTheMap, "NC", "reference", {"map_is_applied"}),
]
