"""The Ray engine: what its names mean, and a cluster of two nodes of which one is killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnbench.errors import AttnbenchWarning, UsageError
from attnbench.harness.engines import opened
from attnbench.harness.engines.ray import _first_sentence, _is_variant, type_of

TYPES = ["A100", "A100-40G", "AMD-Instinct-MI300X-OAM", "GeForce-RTX-5090", "H100"]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("h100", "H100"),
        ("H100", "H100"),
        ("h100-sxm", "H100"),
        ("a100", "A100"),
        ("a100-40g", "A100-40G"),
        ("mi300x", "AMD-Instinct-MI300X-OAM"),
        ("rtx-5090", "GeForce-RTX-5090"),
    ],
)
def test_a_device_means_an_accelerator_type_of_the_cluster(asked: str, meant: str) -> None:
    assert type_of(asked, TYPES) == meant


def test_hardware_that_the_cluster_has_not_is_refused_with_what_it_has() -> None:
    with pytest.raises(UsageError, match=r"--gpu b200: observed A100, .*H100 on the Ray cluster"):
        type_of("b200", TYPES)
    with pytest.raises(UsageError, match="observed no accelerator"):
        type_of("h100", [])


def test_second_names_of_a_type_are_not_further_devices() -> None:
    assert [kind for kind in TYPES if _is_variant(kind)] == ["A100-40G"]


def test_a_missing_library_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"attnbench\[ray\]"), opened("ray"):
        pass


def test_a_loss_is_told_without_the_addresses_of_machines() -> None:
    error = RuntimeError("Task failed because its node is dead. Node IP: 192.0.2.2, ID: 11c6.\nLogs: /tmp/x")
    assert _first_sentence(error) == "RuntimeError: Task failed because its node is dead"
    assert _first_sentence(RuntimeError()) == "RuntimeError: RuntimeError"


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_node_that_is_killed_loses_no_case(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'attnbench[ray]'")
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    try:
        from ray_two_nodes import demonstrate
    finally:
        del sys.path[0]
    with pytest.warns(AttnbenchWarning, match="was lost"):
        shown = demonstrate(tmp_path / "run", seqlens=(16, 24, 32))
    assert shown.planned == shown.rows == shown.ok
    assert shown.before < shown.planned
    assert shown.resumed == 0
