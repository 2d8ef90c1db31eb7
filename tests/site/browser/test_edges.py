"""What may go wrong with little data, slow scripts and drawings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Browser, Page, Route

from attnbench.results.rows import canonical
from attnbench.site.build import write
from attnbench.site.page import site_data
from attnbench.site.pages import MODULES, docs
from tests.conftest import MakeRow
from tests.site.browser.conftest import Site, Watch, opened, served
from tests.site.browser.drive import selects
from tests.site.browser.oracle import Case, Line

pytestmark = pytest.mark.xdist_group("browser")

Tables = Mapping[Case, Mapping[str, Line]]
TOP: Final = ("index", "leaderboard", "explore", "compare", "status", "hardware", "history", "data")
MOST_SHIFT: Final = 0.1

SHIFT: Final = """() => new Promise(done => {
  let sum = 0;
  new PerformanceObserver(list => {
    for (const shift of list.getEntries()) if (!shift.hadRecentInput) sum += shift.value;
  }).observe({ type: "layout-shift", buffered: true });
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => done(sum), 0)));
})"""


@pytest.mark.parametrize("name", ["index", "leaderboard", "explore", "compare", "history"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_jumps_when_the_scripts_come_late(
    browser: Browser, site: Site, name: str, width: int
) -> None:
    """The scripts are held back until the page has been painted without them."""
    context = opened(browser, viewport={"width": width, "height": 800})
    page = context.new_page()
    held: list[Route] = []
    late: list[bool] = []

    def hold(route: Route) -> None:
        if late or route.request.url.endswith("theme.js"):
            route.continue_()
        else:
            held.append(route)

    page.route("**/*.js", hold)
    page.goto(site.url(f"{name}.html"), wait_until="commit")
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
    late.append(True)
    for route in held:
        route.continue_()
    page.wait_for_load_state("load")
    assert held
    shift = page.evaluate(SHIFT)
    context.close()
    assert shift <= MOST_SHIFT, f"layout shift {shift:.3f}"


@pytest.mark.parametrize("kind", ["none", "one", "failed"])
def test_with_hardly_any_rows_every_page_still_stands(
    browser: Browser, make_row: MakeRow, tmp_path: Path, kind: str
) -> None:
    made = {"none": [], "one": [make_row()], "failed": [make_row(status="crashed", reason="signal 11")]}
    with served(tmp_path / "site") as site:
        write(site_data(canonical(made[kind])), site.folder, [m for m in MODULES if m is not docs])
        context, watch = opened(browser), Watch(site.address)
        watch.attach(context)
        page = context.new_page()
        for name in TOP:
            page.goto(site.url(f"{name}.html"))
            text = page.locator("main").inner_text()
            assert len(text) > 100, name
            assert not {"undefined", "NaN"} & set(text.split()), name
        assert page.locator("h1").count() == 1
        page.goto(site.url("leaderboard.html"))
        said = {"none": "No measured operation", "one": "1 of 1 impls", "failed": "signal 11"}
        assert said[kind] in page.locator("main").inner_text()
        context.close()
        assert not watch.noise, watch.noise


def test_a_chart_that_is_drawn_again_keeps_its_name_and_its_numbers(
    page: Page, site: Site, expected: Tables
) -> None:
    page.goto(site.url("explore.html"))
    page.locator("#curves figure").first.wait_for()
    read = """figures => figures.map(figure => Array.from(figure.querySelectorAll("tbody [data-v]"),
      cell => cell.tagName === "TD" && cell.dataset.v ? String(Number(cell.dataset.v)) : cell.dataset.v))"""
    before = page.locator("#curves figure").evaluate_all(read)
    page.locator("#live").click()
    figures = page.locator("#curves figure.live")
    page.wait_for_function("!document.querySelector('#curves figure:not(.live)')")
    after = figures.evaluate_all(read)
    assert after == before
    for svg in figures.locator("svg").all():
        assert svg.get_attribute("role") == "img"
        assert svg.get_attribute("aria-label")
    here = selects(page)
    pattern = "NS" if "(NS)" in figures.first.inner_text() else "CS"
    cells = iter(after[0])
    lengths = ("1024", "65536")
    told = {name: [next(cells) for _ in lengths] for name in cells}
    for label, values in told.items():
        for n, shown in zip(lengths, values, strict=True):
            case = Case(
                *(here[k] for k in ("gpu", "dtype", "dir")), pattern, here["workload"], n,
                here["scope"], here["sw"], "0",
            )  # fmt: skip
            value = expected[case][label].values["time_us"]
            assert (float(shown) if shown else None) == (value and pytest.approx(value, rel=1e-5)), (label, n)
