"""Checks of what a module remembers: seeds, repeated calls, checkpoints and copies."""

from __future__ import annotations

import io
import pickle
import sys
from dataclasses import replace

import torch
from torch import Tensor

from attnbench.harness.contract.instance import Instance, Shape
from attnbench.harness.contract.outcome import CheckFailed, NotApplicable
from attnbench.harness.contract.probe import Probe


def _layer(probe: Probe, seed: int = 0) -> Instance:
    """The layer with projections: all that a checkpoint holds."""
    n, m = probe.sizes()[1]
    return probe.build(Shape(n, m, batch=2), face="forward", seed=seed)


def _equal(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        difference = (got - want).abs().max().item()
        raise CheckFailed(f"{what}: difference {difference:.3g}", "bitwise equal outputs")


def same_seed_same_output(probe: Probe) -> None:
    """Two builds with one seed compute the same output, bit by bit."""
    _equal(_layer(probe)(), _layer(probe)(), "two builds with one seed")


def repeatable(probe: Probe) -> None:
    """Two calls of one module in eval mode return the same output, bit by bit."""
    instance = _layer(probe)
    _equal(instance(), instance(), "two calls")


def checkpoint_round_trip(probe: Probe) -> None:
    """A state_dict loaded into a module built with another seed makes it compute the same function."""
    instance = _layer(probe)
    file = io.BytesIO()
    torch.save(instance.module.state_dict(), file)
    file.seek(0)
    other = _layer(probe, seed=1)
    other.module.load_state_dict(torch.load(file, weights_only=True))
    _equal(other(*instance.inputs), instance(), "output after loading the state_dict")


def picklable(probe: Probe) -> NotApplicable | None:
    """A pickled and unpickled module computes the same output."""
    kind = probe.target.mechanism
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return NotApplicable(f"{kind.__name__} was loaded from a file: pickle cannot find it by name")
    instance = _layer(probe)
    copy = pickle.loads(pickle.dumps(instance.module))
    _equal(replace(instance, module=copy)(), instance(), "output of the copy")
    return None


CHECKS = (same_seed_same_output, repeatable, checkpoint_round_trip, picklable)
