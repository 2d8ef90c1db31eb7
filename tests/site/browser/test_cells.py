"""What stands in the tables equals what the rows say, in every case, after every sort and filter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import pytest
from playwright.sync_api import Page

from attnbench.results.format import BYTE_UNITS, TIME_UNITS
from tests.site.browser.conftest import Site
from tests.site.browser.drive import choose, impls, open_cases, pick, selects, table
from tests.site.browser.oracle import Case, Line

pytestmark = pytest.mark.xdist_group("browser")

Tables = Mapping[Case, Mapping[str, Line]]
TEXTS: Final = ("impl", "family", "flags", "date")
SLICE_PRECISION: Final = 5.1e-6
"""Numbers of a slice have six significant digits."""

SCALES: Final = {unit.name: unit.size for unit in (*TIME_UNITS, *BYTE_UNITS)}


def default_case(page: Page) -> Case:
    usual = json.loads(page.locator("#config").text_content() or "")["usual"]
    return Case(**usual)


def differs(line: dict[str, Any], wanted: Line) -> list[str]:
    """What a line of the page says other than the rows do."""
    found = []
    for key, cell in line["cells"].items():
        if key in TEXTS:
            continue
        shown = float(cell["v"]) if cell["v"] else None
        value = wanted.values[key]
        same = shown == value or (
            shown is not None and value is not None and math.isclose(shown, value, rel_tol=SLICE_PRECISION)
        )
        if not same:
            found.append(f"{wanted.label} {key}: observed {shown}, expected {value}")
    if line["status"] != wanted.status:
        found.append(f"{wanted.label}: observed {line['status']}, expected {wanted.status}")
    if line["cells"]["rank"]["text"] != wanted.rank:
        found.append(f"{wanted.label}: rank {line['cells']['rank']['text']}, expected {wanted.rank}")
    return found


def test_the_leaderboard_says_what_the_rows_say_in_every_case(
    page: Page, site: Site, expected: Tables
) -> None:
    open_cases(page, site.url("leaderboard.html"))
    seen, here = set(), default_case(page)
    for case in [here, *(case for case in expected if case != here)]:
        if case != here:
            choose(page, case.fragment)
        lines, wanted = table(page), expected[case]
        assert {line["impl"] for line in lines} == set(wanted), case
        assert not [text for line in lines for text in differs(line, wanted[line["impl"]])], case
        seen |= {line["status"] for line in lines}
    assert seen == {
        *("ok", "incorrect", "unsupported", "oom", "timeout"),
        *("compile_error", "error", "crashed", "skipped"),
    }


def test_the_first_table_is_drawn_twice_alike(page: Page, site: Site) -> None:
    """By Python while building, and by the script when it takes over."""
    for name in ("index.html", "leaderboard.html"):
        page.route("**/static/answer.js", lambda route: route.fulfill(body=""))
        page.route("**/static/board.js", lambda route: route.fulfill(body=""))
        page.goto(site.url(name))
        built, caption = table(page), page.locator("#cases caption").inner_text()
        page.unroute_all()
        open_cases(page, site.url(name) + "?again")
        drawn = table(page)
        assert [line["impl"] for line in drawn] == [line["impl"] for line in built]
        assert page.locator("#cases caption").inner_text() == caption
        for mine, other in zip(drawn, built, strict=True):
            texts = [{key: cell["text"] for key, cell in line["cells"].items()} for line in (mine, other)]
            assert texts[0] == texts[1], mine["impl"]
            assert mine["reason"] == other["reason"]


def test_impls_whose_intervals_overlap_share_a_range_of_ranks(
    page: Page, site: Site, expected: Tables
) -> None:
    tied = next(
        case
        for case, lines in expected.items()
        if case.n == "65536" and "–" in lines["softmax/triton"].rank and lines["softmax/triton"].ok
    )
    open_cases(page, site.url("index.html", tied.fragment))
    ranks = {line["impl"]: line["cells"]["rank"]["text"] for line in table(page)}
    assert ranks == {label: line.rank for label, line in expected[tied].items()}
    assert ranks["softmax/triton"] == ranks["softmax/sdpa_flash"]


def test_what_failed_is_there_and_grey_with_its_reason_and_without_a_time(
    page: Page, site: Site, expected: Tables
) -> None:
    cases = [case for case, lines in expected.items() if not all(line.ok for line in lines.values())]
    open_cases(page, site.url("leaderboard.html"))
    for case in cases:
        choose(page, f"{case.fragment}&sort=time_us")
        failed = [line for line in table(page) if line["status"] != "ok"]
        assert {line["impl"] for line in failed} == {
            label for label, wanted in expected[case].items() if not wanted.ok
        }
        for line in failed:
            wanted = expected[case][line["impl"]]
            assert line["reason"] == f"{wanted.status} {wanted.reason}"
            assert not {"time_us", "ratio", "mem_peak_bytes", "tflops"} & set(line["cells"])
            assert line["cells"]["rank"]["text"] == "–"
            assert line["kind"] == "failed"
    colour = "getComputedStyle(document.querySelector('#cases tbody tr{} td')).color"
    assert page.evaluate(colour.format(".failed")) != page.evaluate(colour.format(":not(.failed)"))


def test_cells_are_in_the_unit_of_their_heading(page: Page, site: Site, expected: Tables) -> None:
    open_cases(page, site.url("leaderboard.html"))
    units = set()
    for case in [case for case in expected if case.gpu == "h100-sxm"]:
        choose(page, f"{case.fragment}&sort=blocks")
        heads: dict[str, str] = page.evaluate("""() => Object.fromEntries(Array.from(
          document.querySelectorAll("#cases thead th"),
          th => [th.dataset.key, (th.querySelector("small") || {textContent: ""}).textContent]))""")
        for line in table(page):
            for key in ("time_us", "e2e_us", "mem_peak_bytes"):
                cell = line["cells"].get(key)
                if cell and cell["v"] and float(cell["v"]):
                    units.add(heads[key])
                    shown = float(cell["text"]) * SCALES[heads[key]]
                    assert math.isclose(shown, float(cell["v"]), rel_tol=0.06), (case, line["impl"], key)
    assert {"µs", "ms"} <= units


# ---- sorting and filtering -----------------------------------------------------------------------------


SORTED: Final = """key => {
  const table = document.getElementById("cases"), value = row => row.querySelector(`[data-key="${key}"]`);
  const read = () => [
    Array.from(table.tBodies[0].rows, row => [row.dataset.impl, value(row) ? value(row).dataset.v : ""]),
    Array.from(table.querySelectorAll("[aria-sort]"), th => [th.dataset.key, th.getAttribute("aria-sort")])];
  const button = table.querySelector(`th[data-key="${key}"] button.sort`), seen = [read()];
  for (let click = 0; click < 2; click++) { button.click(); seen.push(read()); }
  return seen;
}"""
"""Impls with their values, and marked headings: as found, after one click on a heading, and after two."""


def test_every_column_of_numbers_sorts_both_ways_with_gaps_last(page: Page, site: Site) -> None:
    open_cases(page, site.url("leaderboard.html"))
    keys = page.locator("#cases thead th.num").evaluate_all("heads => heads.map(th => th.dataset.key)")
    assert len(keys) > 20
    for key in keys:
        found, *clicked = page.evaluate(SORTED, key)
        order = found[0]
        for (lines, marks), name, sign in zip(clicked, ("ascending", "descending"), (1, -1), strict=True):
            order = sorted(order, key=lambda line: (not line[1], sign * float(line[1] or 0)))
            assert lines == order, f"{key} {name}"
            assert marks == [[key, name]]
        assert f"sort=-{key}" in page.url


STATES: Final = (
    {},
    {"family": ("linear",)},
    {"family": ("linear", "sparse"), "backend": ("triton",)},
    {"softmax": ("exact",), "status": ("ok",)},
    {"status": ("error", "compile_error"), "q": ("er",)},
    {"q": ("SOFT",)},
)


def passing(lines: Mapping[str, Line], state: Mapping[str, tuple[str, ...]], without: str = "") -> set[str]:
    """Impls that a choice of filters leaves, those of one facet left out."""
    text = "".join(state.get("q", ())).lower()
    return {
        label
        for label, line in lines.items()
        if text in label.lower()
        and all(
            name in ("q", without) or not wanted or line.facets[name] in wanted
            for name, wanted in state.items()
        )
    }


@pytest.mark.parametrize("state", STATES, ids=lambda state: ",".join(state) or "none")
def test_filters_leave_the_set_that_the_rows_say(
    page: Page, site: Site, expected: Tables, state: Mapping[str, tuple[str, ...]]
) -> None:
    case = next(
        c for c in expected if (c.gpu, c.dtype, c.pattern, c.n) == ("h100-sxm", "float32", "NS", "1024")
    )
    lines = expected[case]
    open_cases(page, site.url("leaderboard.html", case.fragment))
    for name, values in state.items():
        for value in values:
            if name == "q":
                page.locator("#filters input[type=search]").fill(value)
            else:
                page.locator(f"#filters input[name={name}][value='{value}']").click()
    left = passing(lines, state)
    assert left, "a choice that leaves nothing tests nothing"
    assert set(impls(page)) == left
    measured = sum(lines[label].ok for label in left)
    assert (
        page.locator("#shown").inner_text()
        == f"{len(left)} of {len(lines)} impls, {measured} of them measured on this case."
    )
    chips = page.locator("#filters [data-facet] label.chip").evaluate_all("""chips => chips.map(chip => [
      chip.closest("fieldset").dataset.facet, chip.querySelector("input").value,
      chip.querySelector("small") && Number(chip.querySelector("small").textContent),
      chip.classList.contains("dim")])""")
    counted = [chip for chip in chips if chip[2] is not None]
    assert {chip[0] for chip in counted} == {"family", "softmax", "backend", "status"}
    for name, value, count, dim in counted:
        wanted = sum(lines[label].facets[name] == value for label in passing(lines, state, name))
        assert count == wanted, (name, value)
        assert dim == (wanted == 0 and value not in state.get(name, ())), (name, value)


def test_a_filter_that_leaves_nothing_says_so_and_can_be_cleared(page: Page, site: Site) -> None:
    page.goto(site.url("leaderboard.html", "q=no+such+impl"))
    page.locator("#none").wait_for()
    assert "No impl of this case passes the filters" in page.locator("#none").inner_text()
    page.locator("#none button").click()
    assert page.locator("#none").is_hidden()
    assert impls(page)


def test_options_are_dim_exactly_where_they_lead_to_no_row(page: Page, site: Site, expected: Tables) -> None:
    open_cases(page, site.url("index.html"))
    here = default_case(page)
    found: dict[str, bool] = page.evaluate("""() => Object.fromEntries(Array.from(
      document.querySelectorAll("#selectors option"),
      option => [option.parentNode.name + "=" + option.value, option.classList.contains("dim")]))""")
    for text, dim in found.items():
        name, _, value = text.partition("=")
        asked = here._replace(**{name: value})
        free = (
            {"pattern", "workload", "n", "scope", "sw", "seed"}
            if name in ("gpu", "dtype", "dir")
            else {"sw"} - {name}
        )
        there = any(
            all(getattr(case, key) == getattr(asked, key) for key in Case._fields if key not in free)
            for case in expected
        )
        assert dim is not there, text
    assert any(found.values())


def test_a_choice_without_rows_names_it_and_leads_to_the_nearest(
    page: Page, site: Site, expected: Tables
) -> None:
    open_cases(page, site.url("index.html"))
    pick(page, "gpu", "a100-sxm")
    pick(page, "n", "65536")
    said = page.locator("#none").inner_text()
    assert said.startswith("No rows for a100-sxm")
    assert "N = 65536" in said
    assert page.locator("#frame").is_hidden()
    page.locator("#none a").click()
    page.locator("#frame").wait_for(state="visible")
    case = Case(**selects(page))
    assert case.gpu == "a100-sxm"
    assert set(impls(page)) == set(expected[case])


def test_links_that_the_script_draws_lead_somewhere(page: Page, site: Site, expected: Tables) -> None:
    open_cases(page, site.url("leaderboard.html"))
    links: set[str] = set()
    for case in [
        c for c in expected if c.dtype == "float32" or c.gpu != "h100-sxm" or c.workload == "bert_base"
    ]:
        choose(page, f"{case.fragment}&q=")
        links |= set(page.locator("#cases a").evaluate_all("links => links.map(a => a.href)"))
    assert len(links) > 50
    ids: dict[str, str] = {}
    for link in sorted(links):
        path, _, anchor = link.removeprefix(f"{site.address}/").partition("#")
        text = ids.setdefault(path, (site.folder / path).read_text(encoding="utf-8"))
        assert not anchor or f'id="{anchor}"' in text, link
