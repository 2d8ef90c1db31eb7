"""Every kind of page: loads without a complaint, is small, is accessible, and fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests.site.browser.conftest import Site, Watch, compressed, opened

pytestmark = pytest.mark.xdist_group("browser")

KINDS: Final = {
    "answer": "index.html",
    "leaderboard": "leaderboard.html",
    "explore": "explore.html",
    "compare": "compare.html",
    "status": "status.html",
    "matrix": "status/h100-sxm-fp32.html",
    "hardware": "hardware.html",
    "device": "gpu/h100-sxm.html",
    "history": "history.html",
    "impl": "impl/performer.html",
    "hostile": "impl/img-*.html",
    "task": "task/lm.html",
    "run": "run/*.html",
    "evidence": "run/*/routing_transformer.html",
    "method": "method.html",
    "metrics": "metrics.html",
    "docs": "docs/index.html",
    "prose": "docs/quickstart.html",
    "data": "data.html",
    "missing": "404.html",
}
"""Kind of page → the file that stands for it, the first of those that match."""

FIRST_LOAD_BYTES: Final = 200_000
MINIMUM_WIDTH: Final = 320


@dataclass(frozen=True)
class Visit:
    """One page, open in a browser that had nothing cached."""

    kind: str
    page: Page
    watch: Watch
    folder_bytes: int
    status: int


@pytest.fixture(scope="module", params=KINDS)
def visit(request: pytest.FixtureRequest, browser: Browser, site: Site) -> Iterator[Visit]:
    path = sorted(site.folder.glob(KINDS[request.param]))[0].relative_to(site.folder).as_posix()
    context, watch = opened(browser), Watch(site.address)
    watch.attach(context)
    page = context.new_page()
    answer = page.goto(site.url(path), wait_until="load")
    assert answer is not None
    yield Visit(request.param, page, watch, compressed(site.folder, watch.asked), answer.status)
    context.close()


def test_it_loads_and_nothing_complains(visit: Visit) -> None:
    assert visit.status == 200
    assert visit.page.locator("h1").count() == 1
    assert visit.page.locator("img[src='x'], [onerror]").count() == 0, "a name from the rows became markup"
    assert not visit.watch.noise, visit.watch.noise


def test_the_first_load_is_small(visit: Visit) -> None:
    assert 0 < visit.folder_bytes <= FIRST_LOAD_BYTES, f"{visit.folder_bytes}: {visit.watch.asked}"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, theme: str) -> None:
    visit.page.emulate_media(color_scheme=theme)
    found = Axe().run(visit.page).response["violations"]
    visit.page.emulate_media(color_scheme="light")
    serious = [
        f"{v['id']} ({v['impact']}): {node['html'][:160]} at {node['target']}: {node['failureSummary'][:240]}"
        for v in found
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]
    assert not serious, "\n".join(serious)


def test_every_drawing_has_a_name_and_its_numbers_in_a_table(visit: Visit) -> None:
    bare = visit.page.evaluate("""() => Array.from(document.querySelectorAll("svg"), svg => {
      const name = svg.getAttribute("aria-label") || (svg.querySelector(":scope > title") || {}).textContent;
      const figure = svg.closest("figure");
      const told = figure ? figure.querySelector("details.data tbody tr") : svg.closest("tr");
      return svg.getAttribute("role") === "img" && name && told ? "" : svg.outerHTML.slice(0, 200);
    }).filter(Boolean)""")
    assert not bare, bare
    if visit.kind in ("answer", "explore", "history", "impl", "task", "evidence"):
        assert visit.page.locator("svg").count() > 0


def test_the_body_does_not_scroll_sideways_on_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": MINIMUM_WIDTH, "height": 700})
    wide = visit.page.evaluate("""() => {
      const limit = document.documentElement.clientWidth;
      if (document.documentElement.scrollWidth <= limit) return [];
      const clipped = e => { for (let p = e.parentElement; p; p = p.parentElement)
        if (getComputedStyle(p).overflowX !== "visible") return true; return false; };
      return [document.documentElement.scrollWidth].concat(Array.from(document.body.querySelectorAll("*"))
        .filter(e => e.getBoundingClientRect().right > limit + 0.5 && !clipped(e))
        .slice(0, 5).map(e => e.outerHTML.slice(0, 120)));
    }""")
    visit.page.set_viewport_size({"width": 1280, "height": 800})
    assert not wide, wide


def test_every_folder_of_pages_has_a_kind(site: Site) -> None:
    stood_for = {path for pattern in KINDS.values() for path in site.folder.glob(pattern)}
    for path in site.folder.rglob("*.html"):
        depth = len(path.relative_to(site.folder).parts)
        alike = {
            p for p in stood_for if p.parent == path.parent or (depth == 3 and p.parts[-3] == path.parts[-3])
        }
        assert path in stood_for if depth == 1 else alike, f"{path} is a kind of page that no test opens"
