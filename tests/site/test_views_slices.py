"""What the scripts load: every summary, to six digits, with links that lead to where it was recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from attnbench.results.aggregate import newest, summarise
from attnbench.site.views.case import Case, Entry, by_case, entries, ranked
from attnbench.site.views.links import evidence, slug
from attnbench.site.views.slices import Slice, slices
from tests.site.synthetic import HOSTILE, synthetic_rows

MakeRow = Callable[..., dict[str, Any]]


def of(rows: list[dict[str, Any]]) -> dict[Case, list[Entry]]:
    return ranked(by_case(newest(summarise(rows))[0]))


def content(found: Slice) -> dict[str, Any]:
    """The JSON inside of ``attnbench.receive("…",{…});``."""
    text = found.text.removeprefix(f'attnbench.receive("{found.path}",').removesuffix(");\n")
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def unpacked(found: Slice) -> list[dict[str, Any]]:
    """Rows of a slice, as the script of the pages makes them."""
    held = content(found)
    texts = {name: [t["words"][at] for at in t["at"]] for name, t in held["texts"].items()}
    columns = {**texts, **held["numbers"]}
    return [{name: values[i] for name, values in columns.items()} for i in range(held["rows"])]


def link(row: dict[str, Any], held: dict[str, Any]) -> str:
    """The address that cases.js gives a time."""
    about, slugs = held["impls"][row["impl"]], held["slugs"]
    parts = (about["slug"], slugs["device"], held["slugged"][row["workload"]], row["pattern"], row["scope"])
    rest = (slugs["dtype"], slugs["direction"], row["size"], f"s{row['seed']}")
    return f"run/{held['runs'][row['run']]}/{about['file']}#" + "_".join((*parts, *rest))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return synthetic_rows(
        lengths=(256, 65536), dtypes=("bfloat16", "float32"), gpus=("cpu",), runs=1, tasks=False, hostile=True
    )


def test_every_summary_is_in_one_slice_to_six_digits(rows: list[dict[str, Any]]) -> None:
    cases = by_case(newest(summarise(rows))[0])
    found = slices(ranked(cases))
    assert sorted((s.dtype, s.direction) for s in found) == [
        ("bfloat16", "fwd"), ("bfloat16", "fwd_bwd"), ("float32", "fwd"), ("float32", "fwd_bwd"),
    ]  # fmt: skip
    there = {(s.dtype, s.direction, r["pattern"], r["n"], r["impl"]): r for s in found for r in unpacked(s)}
    everything = [s for group in cases.values() for s in group]
    assert len(there) == len(everything) == sum(s.rows for s in found)
    for s in everything:
        row = there[s.get("dtype"), s.get("direction"), s.get("pattern"), s.get("n"), s.label]
        assert (row["status"], row["reason"]) == (s.status, s.reason)
        if s.ok:
            assert row["time_us"] == pytest.approx(s.time_us, rel=5e-6)
            assert row["mem_peak_bytes"] == pytest.approx(s.get("mem_peak_bytes"), rel=5e-6)
        else:
            assert [row[name] for name in ("time_us", "ratio", "mem_peak_bytes", "position")] == [None] * 4


def test_ranks_are_those_of_the_tables(rows: list[dict[str, Any]]) -> None:
    cases = by_case(newest(summarise(rows))[0])
    case, group = next(iter(cases.items()))
    (own,) = [s for s in slices(ranked(cases)) if (s.dtype, s.direction) == (case.dtype, case.direction)]
    there = {r["impl"]: r for r in unpacked(own) if (r["pattern"], r["n"]) == (case.pattern, case.n)}
    for entry in entries(group):
        row = there[entry.summary.label]
        assert (row["position"], row["best"], row["last"]) == (entry.position, entry.best, entry.last)


def test_links_made_by_the_script_are_those_made_here(rows: list[dict[str, Any]]) -> None:
    cases = by_case(newest(summarise(rows))[0])
    wanted = {evidence(s) for group in cases.values() for s in group}
    found = slices(ranked(cases))
    assert {link(row, content(s)) for s in found for row in unpacked(s)} == wanted


def test_the_name_of_a_slice_follows_from_its_content(make_row: MakeRow) -> None:
    def path(**changes: Any) -> str:
        return slices(of([make_row(**changes)]))[0].path

    assert path() == path()
    assert path() != path(time_us=101.0)


def test_a_column_that_nobody_has_takes_no_room(make_row: MakeRow) -> None:
    (found,) = slices(of([make_row()]))
    assert "density" not in content(found)["numbers"]


@pytest.mark.parametrize("name", ["softmax", "flash_attn-3", "NS", "20261126T131544-ee06c1", "v1.2"])
def test_safe_names_are_their_own_slugs(name: str) -> None:
    assert slug(name) == name


@pytest.mark.parametrize("name", [HOSTILE, "a/b", "../x", "a b", "", ".", "ü", "x" * 99, "-a", "a\nb"])
def test_other_names_become_safe_and_stay_apart(name: str) -> None:
    found = slug(name)
    assert found
    assert all(c.isascii() and (c.isalnum() or c in "-_.") for c in found)
    assert found[0] not in "-."
    assert found != slug(name + "x")
