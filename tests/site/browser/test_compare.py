"""The comparisons of the page end in the verdicts of ``attnbench compare``, for runs, impls and devices."""

from __future__ import annotations

from typing import Any, Final

import pytest
from playwright.sync_api import Page

from attnbench.results.comparison import Comparison, compare_rows
from attnbench.results.format import number
from attnbench.results.rows import Row
from attnbench.site.views.compare import between
from tests.site.browser.conftest import Site

pytestmark = pytest.mark.xdist_group("browser")

LINES: Final = """() => Array.from(document.querySelectorAll("#comparison tbody tr[data-verdict]"), row => ({
  verdict: row.dataset.verdict, word: row.cells[0].textContent, case: row.cells[1].textContent,
  a: row.cells[2].textContent, b: row.cells[3].textContent, pairs: Number(row.cells[6].textContent),
  reason: row.cells[7].textContent }))"""
SIGNS: Final = {"slower": "▲ slower", "faster": "▼ faster", "same": "≈ same", "uncertain": "? undecided"}


def shown(page: Page, site: Site, by: str, a: str, b: str, gpu: str = "b200") -> list[dict[str, Any]]:
    page.goto("about:blank")
    page.goto(site.url("compare.html", f"by={by}&gpu={gpu}&a={a}&b={b}"))
    page.wait_for_function(
        "([a, b]) => { const said = document.querySelector('#comparison .setting').textContent;"
        "return said.includes(a) && said.includes(b); }",
        arg=[a, b],
    )
    found: list[dict[str, Any]] = page.evaluate(LINES)
    return found


def counted(page: Page) -> dict[str, int]:
    texts = page.locator("#comparison ul.counts li").all_inner_texts()
    return {text.rsplit(" ", 1)[0]: int(text.rsplit(" ", 1)[1]) for text in texts}


def outcome(found: Comparison) -> list[tuple[str, str, int, str]]:
    """Verdict, pairs, reason and both times of every case, in any order of the cases."""
    return sorted(
        (
            str(case.decision.verdict),
            case.decision.reason,
            case.decision.pairs,
            f"{number(case.base_us, digits=4)} {number(case.head_us, digits=4)}",
        )
        for case in found.cases
    )


def told(lines: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    assert all(line["word"] == SIGNS[line["verdict"]] for line in lines)
    return sorted((x["verdict"], x["reason"], x["pairs"], f"{x['a']} {x['b']}") for x in lines)


def test_pairs_of_runs(page: Page, site: Site, rows: list[Row]) -> None:
    runs = sorted({row["run_id"] for row in rows if row["device"] == "b200"})
    seen = set()
    for a, b in ((runs[2], runs[3]), (runs[3], runs[4]), (runs[4], runs[5]), (runs[5], runs[2])):
        command = compare_rows(
            [row for row in rows if row["run_id"] == a],
            [row for row in rows if row["run_id"] == b],
            interleaved=False,
        )
        lines = shown(page, site, "run", a, b)
        assert told(lines) == outcome(command), (a, b)
        assert {line["case"] for line in lines} == {case.label for case in command.cases}
        assert counted(page) == {SIGNS[name]: count for name, count in command.counts.items()}
        notes = page.locator("#comparison .banner").all_inner_texts()
        assert notes == list(command.notes)
        seen |= {line["verdict"] for line in lines}
    assert {"slower", "faster", "same"} <= seen


def test_too_few_blocks_stay_undecided(page: Page, site: Site, rows: list[Row]) -> None:
    runs = sorted({row["run_id"] for row in rows if row["device"] == "h100-sxm"})
    found = [[row for row in rows if row["run_id"] == run and row["scope"] != "task"] for run in runs]
    command = compare_rows(*found, interleaved=False)
    lines = shown(page, site, "run", *runs, gpu="h100-sxm")
    assert told(lines) == outcome(command)
    assert {line["verdict"] for line in lines} == {"uncertain"}


def test_two_impls_and_two_devices(page: Page, site: Site, rows: list[Row]) -> None:
    a, b = "softmax/sdpa_flash", "performer/torch"
    lines = shown(page, site, "impl", a, b)
    assert told(lines) == outcome(between(rows, "impl", a, b, "b200"))
    assert {line["verdict"] for line in lines} >= {"slower"}
    lines = shown(page, site, "gpu", "b200", "a100-sxm")
    assert told(lines) == outcome(between(rows, "gpu", "b200", "a100-sxm"))
    assert len(lines) > 4
