"""The pytest plugin in projects of its own, each with its own pytest process."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ZOO = Path(__file__).parent / "zoo.py"


def test_it_is_registered_under_its_name() -> None:
    (found,) = [e for e in metadata.entry_points(group="pytest11") if e.value.startswith("attnbench.")]
    assert (found.name, found.value) == ("attnbench", "attnbench.harness.pytest_plugin")


def test_unused_it_imports_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_lean(request):
            assert request.config.pluginmanager.hasplugin("attnbench")
            assert not {"torch", "numpy", "attnbench.harness.run"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_without_pytest_benchmark_it_says_what_is_missing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_speed(attnbench_case): attnbench_case('softmax')")
    done = pytester.runpytest_subprocess("-p", "no:benchmark", "-p", "no:cacheprovider")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*expected it: pip install 'attnbench?pytest?'*"])


def test_a_case_is_checked_timed_and_stored(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under xdist pytest-benchmark stores nothing
    pytester.makepyfile(
        f"""
        def test_speed(attnbench_case):
            attnbench_case("softmax/torch", pattern="CS", n=64)

        def test_wrong(attnbench_case):
            attnbench_case("{ZOO}:WrongValues", n=16)

        def test_unsupported(attnbench_case):
            attnbench_case("softmax/sdpa_cudnn", n=16)

        def test_hyper(attnbench_case):
            subject = attnbench_case("local_window", pattern="CS", n=64, hyper={{"window": 8}})
            assert dict(subject.case.hyper) == {{"window": 8}}

        def test_unknown(attnbench_case):
            attnbench_case("softmacks")
        """
    )
    options = ("--benchmark-json=out.json", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1")
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    done.assert_outcomes(passed=2, failed=2, skipped=1)
    done.stdout.fnmatch_lines(["*WrongValues*error*times that of*"])
    done.stdout.fnmatch_lines(["*did you mean softmax*"])
    found = {b["name"]: b for b in json.loads((pytester.path / "out.json").read_text())["benchmarks"]}
    info = found["test_speed"]["extra_info"]
    assert (info["impl"], info["n"], info["pattern"]) == ("softmax/torch", 64, "CS")
    assert found["test_speed"]["stats"]["median"] > 0
    assert set(found) == {"test_speed", "test_hyper"}
