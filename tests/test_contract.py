"""Every mechanism holds the contract under every declared pattern and on every backend that runs here.

One test per mechanism × pattern × backend; a failure lists each failed check with observed and expected.
"""

import pytest

from attnbench.harness.contract import run_kit, summary, targets
from attnbench.impls import registry

ALWAYS = ("reference", "torch")
"""Backends that compute every mechanism on every machine; another one may be absent or declare a limit."""

TARGETS = [target for name in registry.ids() for target in targets(registry.mechanism(name))]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.mechanism.spec.id}-{t.pattern}-{t.backend}")
def test_contract(target):
    found = summary(run_kit(target))
    if found.failures:
        lines = [f"{outcome.check}: {outcome.detail}" for outcome in found.failures]
        pytest.fail(f"{target.label}: {found.text}\n" + "\n".join(lines), pytrace=False)
    if found.verdict == "nothing computed":
        assert target.backend not in ALWAYS, f"{target.label} computes nothing: {found.reason}"
        pytest.skip(f"{target.label}: {found.reason}")
