"""The compare page says what ``attnbench compare`` says, in Python and in the script of the page."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attnbench.results.compare import DEFAULT, Pair, decide_all
from attnbench.results.comparison import compare_rows
from attnbench.results.rows import Row, canonical
from attnbench.site.build import write
from attnbench.site.page import site_data
from attnbench.site.pages import compare as page
from attnbench.site.views import compare
from tests.site.synthetic import IMPLS, synthetic_rows

STATIC = Path(page.__file__).parents[1] / "static"
CHOSEN = tuple(i for i in IMPLS if i.mechanism in ("softmax", "nystromformer", "performer"))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return canonical(
        synthetic_rows(CHOSEN, (1024, 65536), ("bfloat16",), ("NS",), ("fwd",), ("h100-sxm",), blocks=8)
    )


def _runs(rows: list[Row]) -> tuple[str, str]:
    a, b = sorted({row["run_id"] for row in rows})
    return a, b


def test_two_runs_get_the_verdicts_of_the_command(rows: list[Row]) -> None:
    a, b = _runs(rows)
    ops = [row for row in rows if row["scope"] == "op"]
    command = compare_rows(
        [r for r in ops if r["run_id"] == a], [r for r in ops if r["run_id"] == b], interleaved=False
    )
    found = compare.result(compare.between(rows, "run", a, b), "run", a, b)
    assert {(line.case, line.verdict, line.reason) for line in found.lines} == {
        (case.label, str(case.decision.verdict), case.decision.reason) for case in command.cases
    }
    assert {name: count for name, _, _, count in found.counts} == command.counts
    assert command.counts["slower"] == 2  # nystromformer, twice
    assert command.counts["faster"] == 2  # performer


def test_decided_changes_come_first_and_by_size(rows: list[Row]) -> None:
    found = compare.result(compare.between(rows, "run", *_runs(rows)), "run", *_runs(rows))
    assert [line.word for line in found.lines[:4]] == ["slower", "slower", "faster", "faster"]
    assert any("different environment" in note for note in found.notes)


def test_two_impls_meet_on_equal_cases_of_one_run(rows: list[Row]) -> None:
    found = compare.between(rows, "impl", "softmax/sdpa_flash", "performer/torch", "h100-sxm")
    newest = _runs(rows)[1]
    for case in found.cases:
        times = {
            name: sorted(
                r["time_us"]
                for r in rows
                if r["impl"] == name and r["run_id"] == newest and f"N={r['n']} " in f"{case.label} "
            )
            for name in ("softmax/sdpa_flash", "performer/torch")
        }
        assert case.base_us == times["softmax/sdpa_flash"][4]
        assert case.head_us == times["performer/torch"][4]
        assert case.decision.pairs + case.decision.dropped == 8
    assert [str(c.decision.verdict) for c in found.cases] == ["slower", "faster"]


def test_two_devices_meet_on_equal_impls() -> None:
    rows = canonical(
        synthetic_rows(
            CHOSEN[:1], (4096,), ("bfloat16",), ("NS",), ("fwd",), ("h100-sxm", "a100-sxm"), blocks=6
        )
    )
    found = compare.between(rows, "gpu", "h100-sxm", "a100-sxm")
    assert [str(case.decision.verdict) for case in found.cases] == ["slower"]
    assert any("different environment" in note for note in found.notes)


def test_the_newest_two_runs_are_compared_first(rows: list[Row]) -> None:
    assert compare.default_pair(rows) == _runs(rows)
    assert compare.default_pair([r for r in rows if r["run_id"] == _runs(rows)[0]]) is None


def test_the_page_shows_verdict_by_sign_and_word(rows: list[Row], tmp_path: Path) -> None:
    write(site_data(rows), tmp_path, [page])
    text = (tmp_path / "compare.html").read_text()
    assert text.count('<tr data-verdict="slower">') == 2
    assert '<span class="verdict v-slower">▲ slower</span>' in text
    assert '<span class="verdict v-uncertain">? undecided</span>' in text
    assert "different environment" in text


def test_without_a_pair_the_page_says_so(tmp_path: Path) -> None:
    write(site_data([]), tmp_path, [page])
    assert "No rows of operations yet" in (tmp_path / "compare.html").read_text()


# ---- the script ----------------------------------------------------------------------------------------

NODE = shutil.which("node")
DRIVER = """
const fs = require("fs");
global.window = {};
require(process.argv[1]);
const input = JSON.parse(fs.readFileSync(0, "utf8"));
console.log(JSON.stringify(window.attnbench.verdict.decideAll(input.cases, input.rule)));
"""


def _in_script(cases: list[list[tuple[float, float, bool]]]) -> list[dict[str, object]]:
    command = [str(NODE), "-e", DRIVER, str(STATIC / "verdict.js")]
    text = json.dumps({"cases": cases, "rule": compare.rule()})
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(NODE is None, reason="needs node to run the script of the page")
def test_the_script_decides_as_the_rule_does() -> None:
    draw = random.Random(1)
    families = [
        [
            (100.0, 100.0 * (1 + shift) * draw.lognormvariate(0, noise), draw.random() < 0.05)
            for _ in range(draw.choice((3, 6, 7, 8, 16, 33)))
        ]
        for shift in (-0.1, -0.012, 0.0, 0.005, 0.011, 0.014, 0.03, 0.3)
        for noise in (0.0, 0.001, 0.004, 0.02)
        for _ in range(6)
    ]
    flag = frozenset({"drift"})
    cases = {
        str(i): [Pair(a, b, flag if lopsided else frozenset()) for a, b, lopsided in family]
        for i, family in enumerate(families)
    }
    expected = list(decide_all(cases, DEFAULT).values())
    found = _in_script(families)
    assert [f["verdict"] for f in found] == [str(d.verdict) for d in expected]
    assert {str(d.verdict) for d in expected} == {"slower", "faster", "same", "uncertain"}
    for f, d in zip(found, expected, strict=True):
        assert (f["pairs"], f["dropped"]) == (d.pairs, d.dropped)
        for name in ("ratio", "lo", "hi"):
            expected_value = getattr(d, name)
            assert f[name] == (expected_value and pytest.approx(expected_value, rel=1e-9))
        if "alone" not in d.reason:
            assert f["reason"] == d.reason


def test_the_rows_of_the_script_keep_every_digit(rows: list[Row]) -> None:
    found = compare.content([row for row in rows if row["scope"] == "op"])
    again = json.loads(json.dumps(found))
    assert again["columns"]["us"] == [row["time_us"] for row in rows if row["scope"] == "op"]
    at = again["columns"]["case"][0]
    assert dict(zip(found["fields"], again["cases"][at], strict=True))["n"] == rows[0]["n"]


def test_the_signs_of_the_script_are_those_of_the_page() -> None:
    text = (STATIC / "compare.js").read_text()
    assert not re.search(r'"(▲|▼|≈)', text), "signs belong into the settings that Python writes"
