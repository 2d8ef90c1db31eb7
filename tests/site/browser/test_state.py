"""The address holds the state of a page: it survives a reload, a stranger, the back button and nonsense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, Page

from tests.site.browser.conftest import Site, Watch, opened
from tests.site.browser.drive import impls, open_cases, pick, selects, table
from tests.site.browser.oracle import Case, Line

pytestmark = pytest.mark.xdist_group("browser")

Tables = Mapping[Case, Mapping[str, Line]]
Read = Callable[[Page], Any]
NONSENSE: Final = (
    "gpu=voodoo2&n=-1&bogus=1&dtype=&x=%3Cscript%3Ealert(1)%3C/script%3E&by=%3Cimg%20src=x%20onerror=alert(1)%3E"
    "&y=__proto__&sort=constructor&impl=%3Cimg%20src=x%20onerror=alert(2)%3E&__proto__=1&%E0%A4%A&&="
)


@contextmanager
def stranger(browser: Browser, site: Site, url: str) -> Iterator[Page]:
    """A visitor who has never been here follows a link."""
    context, watch = opened(browser), Watch(site.address)
    watch.attach(context)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()
    assert not watch.noise, watch.noise


def survives(page: Page, browser: Browser, site: Site, ready: Read, read: Read) -> None:
    """The page shows the same after a reload, and to somebody who is given its address."""
    before = read(page)
    page.reload()
    ready(page)
    assert read(page) == before, "after a reload"
    with stranger(browser, site, page.url) as other:
        ready(other)
        assert read(other) == before, "in a fresh browser"


def drawn(page: Page) -> None:
    page.locator("#cases button.more").first.wait_for(state="attached")


def case_view(page: Page) -> Any:
    return selects(page), table(page), page.locator("#cases caption").inner_text()


def test_the_selectors_of_a_case_are_in_the_address(
    page: Page, browser: Browser, site: Site, expected: Tables
) -> None:
    open_cases(page, site.url("index.html"))
    targets = [
        next(c for c in expected if (c.dir, c.pattern, c.n) == ("fwd_bwd", "CC", "1024")),
        next(c for c in expected if c.dtype == "float32" and c.pattern == "CS"),
        next(c for c in expected if c.gpu == "b200"),
    ]
    for target in targets:
        for name, value in target._asdict().items():
            if selects(page)[name] != value and page.locator(f"main select[name={name}]").is_visible():
                pick(page, name, value)
        shown = page.locator("main select:visible").evaluate_all("found => found.map(s => [s.name, s.value])")
        assert dict(shown).items() <= target._asdict().items()
        assert set(impls(page)) == set(expected[target])
        survives(page, browser, site, drawn, case_view)


def test_back_and_forward_walk_through_the_choices(page: Page, site: Site) -> None:
    open_cases(page, site.url("index.html"))
    usual = selects(page)
    other = {"n": next(n for n in ("1024", "65536") if n != usual["n"]), "pattern": "CS"}
    views = [case_view(page)]
    for name, value in other.items():
        pick(page, name, value)
        views.append(case_view(page))
    assert len({str(view) for view in views}) == 3
    for step, at in ((page.go_back, 1), (page.go_back, 0), (page.go_forward, 1), (page.go_forward, 2)):
        step()
        page.wait_for_function(
            "text => document.querySelector('#cases caption').innerText === text", arg=views[at][2]
        )
        assert case_view(page) == views[at]


def test_filters_columns_and_order_are_in_the_address(page: Page, browser: Browser, site: Site) -> None:
    open_cases(page, site.url("leaderboard.html"))
    page.locator("#filters input[type=search]").fill("o")
    page.locator("#filters input[name=family][value=linear]").click()
    page.locator("#filters input[name=family][value=dense]").click()
    page.locator("#filters input[name=group][value=memory]").click()
    page.locator("#filters input[name=over][value=workload]").click()
    page.locator("#cases th[data-key=tflops_effective] button.sort").click()
    for part in ("q=o", "family=dense,linear", "hide=memory", "over=workload", "sort=tflops_effective"):
        assert part in page.url.partition("#")[2].split("&")
    assert page.locator("#cases th[data-key=mem_peak_bytes]").count() == 0

    def view(shown: Page) -> Any:
        pressed = shown.locator("#filters input:checked").evaluate_all(
            "boxes => boxes.map(b => b.name + b.value)"
        )
        typed = shown.locator("#filters input[type=search]").input_value()
        return case_view(shown), pressed, typed, shown.locator("#over-what").inner_text()

    survives(page, browser, site, drawn, view)


def test_the_choices_of_explore_are_in_the_address(page: Page, browser: Browser, site: Site) -> None:
    def ready(shown: Page) -> None:
        shown.locator("#curves figure.live").first.wait_for()

    def view(shown: Page) -> Any:
        boxes = shown.locator("#impls input:checked").evaluate_all("boxes => boxes.map(b => b.value)")
        return selects(shown), boxes, shown.locator("#curves details.data table").all_text_contents()

    page.goto(site.url("explore.html"))
    page.locator("main select[name=dtype]").select_option("float32")
    ready(page)
    page.locator("main select[name=y]").select_option("memory")
    page.locator("main select[name=n]").select_option("1024")
    page.locator("#impls summary").click()
    page.locator("#impls input[value='performer/torch']").click()
    page.wait_for_function("location.hash.includes('impl=')")
    assert {"dtype=float32", "y=memory", "n=1024"} <= set(page.url.partition("#")[2].split("&"))
    ready(page)
    survives(page, browser, site, ready, view)


def test_the_choices_of_compare_are_in_the_address(page: Page, browser: Browser, site: Site) -> None:
    def ready(shown: Page) -> None:
        shown.wait_for_function(
            "document.querySelector('#comparison .setting').textContent.includes('performer/torch') &&"
            "document.querySelector('#comparison tbody tr[data-verdict]')"
        )

    def view(shown: Page) -> Any:
        return selects(shown), shown.locator("#comparison").inner_text()

    page.goto(site.url("compare.html"))
    page.locator("#compare select[name=by]").select_option("impl")
    page.locator("#compare select[name=a]").select_option("softmax/sdpa_flash")
    page.locator("#compare select[name=b]").select_option("performer/torch")
    page.locator("#compare select[name=v]").select_option("slower")
    ready(page)
    survives(page, browser, site, ready, view)


def test_the_filters_of_the_history_are_in_the_address(page: Page, browser: Browser, site: Site) -> None:
    def view(shown: Page) -> Any:
        return selects(shown), shown.locator("ol.steps > li:visible h2").all_inner_texts()

    def ready(shown: Page) -> None:
        shown.locator("#steps-filter").wait_for()

    page.goto(site.url("history.html"))
    before = len(view(page)[1])
    page.locator("main select[name=way]").select_option("slower")
    page.locator("main select[name=impl]").select_option("nystromformer/triton")
    steps = view(page)[1]
    assert 0 < len(steps) < before
    assert all("slower" in step and "nystromformer" in step for step in steps)
    survives(page, browser, site, ready, view)
    page.go_back()
    page.go_back()
    assert len(view(page)[1]) == before


@pytest.mark.parametrize("name", ["index", "leaderboard", "explore", "compare", "history"])
def test_a_bad_or_old_address_is_a_notice_and_inert(page: Page, site: Site, name: str) -> None:
    page.goto(site.url(f"{name}.html", NONSENSE))
    page.locator("#notice").wait_for()
    assert "bogus=1" in page.locator("#notice").inner_text()
    assert page.locator("main table tbody tr").count() > 0
    assert page.locator("img, [onerror], script:not([src]):not([type='application/json'])").count() == 0
    assert page.evaluate("Object.prototype.usual === undefined")
