"""What a user can type: parsed, or refused in one line that says what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnbench.errors import UsageError
from attnbench.harness.config import (
    PRESETS,
    RunConfig,
    check_engine,
    parse_hyper,
    parse_lengths,
    parse_parameter,
    parse_shard,
    resolve,
)
from attnbench.harness.plan import plan


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1024", (1024,)),
        ("256, 512", (256, 512)),
        ("1024..65536", tuple(2**i for i in range(10, 17))),
        ("100..500", (100, 200, 400)),
        ("7,7,3", (3, 7)),
    ],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "-4", "8..4", "a", "1..b", "1...4", "1,,2", "1e3"])
def test_bad_lengths_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected lengths such as"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_bad_shards_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected i/n"):
        parse_shard(text)


def test_hyper_parameters_are_json_or_text() -> None:
    assert parse_hyper("performer.m=64") == ("performer", "m", 64)
    assert parse_hyper("abc.variant=cab") == ("abc", "variant", "cab")
    with pytest.raises(UsageError, match=r"mechanism\.name=value"):
        parse_hyper("m=64")


def test_a_config_survives_json() -> None:
    import json

    config = RunConfig(impl=("a", "b"), seqlen=(1, 2), hyper=(("a", "m", 4),), shard=(2, 3))
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_config_of_another_version_is_refused() -> None:
    with pytest.raises(UsageError, match="another version"):
        RunConfig.from_json({"impl": ["all"], "colour": "red"})


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("pattern", ("XX",), "pattern"),
        ("dtype", ("int8",), "dtype"),
        ("direction", ("bwd",), "direction"),
        ("preset", "huge", "preset"),
        ("engine", "cloud", "engine"),
        ("blocks", 0, "positive"),
    ],
)
def test_values_that_mean_nothing_are_usage_errors(field: str, value: object, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        resolve(RunConfig(**{field: value}), "cpu")  # type: ignore[arg-type]


def test_a_variant_of_a_preset_is_a_preset_of_tasks() -> None:
    request = RunConfig(task=("lstf",), preset="paper_etth1_s")
    assert resolve(request, "cpu").preset is PRESETS["paper"]
    planned = plan(resolve(replace(request, pattern=("NC",)), "cpu"))
    assert {(p.case.n, p.case.m) for p in planned} == {(888, 84)}
    with pytest.raises(UsageError, match="preset 'paper_etth1_s'"):
        resolve(replace(request, task=()), "cpu")
    with pytest.raises(UsageError, match="preset of task lstf 'paper_etth9_s'"):
        plan(resolve(replace(request, preset="paper_etth9_s"), "cpu"))


def test_parameters_of_slurm_have_a_name_and_a_value() -> None:
    assert parse_parameter("partition = gpu") == ("partition", "gpu")
    assert parse_parameter("comment=a=b") == ("comment", "a=b")
    for text in ("partition", "=gpu", ""):
        with pytest.raises(UsageError, match="--slurm"):
            parse_parameter(text)


def test_engines_are_known_by_name() -> None:
    assert [check_engine(name) for name in ("local", "ray", "slurm")] == ["local", "ray", "slurm"]
    with pytest.raises(UsageError, match="did you mean slurm"):
        check_engine("slurn")


def test_an_array_has_at_least_one_job() -> None:
    with pytest.raises(UsageError, match="0 jobs"):
        resolve(RunConfig(jobs=0), "cpu")
