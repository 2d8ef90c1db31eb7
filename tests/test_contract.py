"""Every mechanism holds the contract under every declared pattern and on every backend that runs here.

One test per mechanism × pattern × backend; a failure lists each failed check with observed and expected.
Without a GPU the eager backends are checked; ATTNBENCH_KIT=all adds Triton in its interpreter and the
libraries that run on a CPU, half an hour more. (FlexAttention may fail there: torch's dispatch modes break it
for the rest of a process.)
"""

import os

import pytest
import torch

from attnbench.harness.contract import run_kit, summary, targets
from attnbench.impls import registry

ALWAYS = ("reference", "torch")
"""Backends that compute every mechanism on every machine; another one may be absent or declare a limit."""

EVERYTHING = torch.cuda.is_available() or os.environ.get("ATTNBENCH_KIT") == "all"

TARGETS = [target for name in registry.ids() for target in targets(registry.mechanism(name))]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.mechanism.spec.id}-{t.pattern}-{t.backend}")
def test_contract(target):
    if target.backend not in ALWAYS and not EVERYTHING:
        pytest.skip(f"{target.label}: checked on a GPU, or with ATTNBENCH_KIT=all")
    found = summary(run_kit(target))
    if found.failures:
        lines = [f"{outcome.check}: {outcome.detail}" for outcome in found.failures]
        pytest.fail(f"{target.label}: {found.text}\n" + "\n".join(lines), pytrace=False)
    if found.verdict == "nothing computed":
        assert target.backend not in ALWAYS, f"{target.label} computes nothing: {found.reason}"
        pytest.skip(f"{target.label}: {found.reason}")
