"""What a visitor does: without JavaScript, from disk, by keyboard, in the dark, with the clipboard."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping
from xml.etree import ElementTree as ET

import pytest
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from tests.site.browser.conftest import Site, Watch, opened
from tests.site.browser.drive import impls, open_cases, table
from tests.site.browser.oracle import Case, Line

pytestmark = pytest.mark.xdist_group("browser")

Tables = Mapping[Case, Mapping[str, Line]]
FOCUS = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  const head = element.closest("th");
  return { tag: element.tagName, name: element.name || "", value: element.value || "",
    key: element.classList.contains("sort") && head ? head.dataset.key : "",
    seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 &&
      box.bottom > 0 && box.top < innerHeight && box.width > 0, html: element.outerHTML.slice(0, 120) };
}"""
MOST_STOPS = 120


def test_without_javascript_the_first_pages_can_be_read(browser: Browser, site: Site) -> None:
    context, watch = opened(browser, java_script_enabled=False), Watch(site.address)
    watch.attach(context)
    page = context.new_page()
    for name in ("index.html", "leaderboard.html"):
        page.goto(site.url(name))
        rows = page.locator("#cases tbody tr")
        assert rows.count() > 5
        assert rows.first.is_visible()
        assert rows.locator("td[data-key=time_us] a").first.is_visible()
        assert page.locator("main noscript .notice").inner_text()
        dead = page.locator("button:visible, select:visible, input:visible").all_inner_texts()
        assert not dead, f"controls that do nothing: {dead}"
    page.goto(site.url("method.html"))
    assert len(page.locator("main").inner_text()) > 2000
    page.goto(site.url("compare.html"))
    assert page.locator("#comparison tbody tr").count() > 0
    page.goto(site.url("explore.html"))
    assert page.locator("#curves svg").first.is_visible()
    context.close()
    assert not watch.noise


def test_from_disk_the_pages_work_too(browser: Browser, site: Site, expected: Tables) -> None:
    context = opened(browser)
    noise: list[str] = []
    context.on("console", lambda message: noise.append(message.text))
    context.on("weberror", lambda error: noise.append(str(error.error)))
    page = context.new_page()
    open_cases(page, (site.folder / "index.html").as_uri())
    case = next(c for c in expected if c.gpu == "a100-sxm")
    page.goto((site.folder / "index.html").as_uri() + f"#{case.fragment}")
    page.wait_for_function("document.querySelector('#cases caption').textContent.includes('a100-sxm')")
    assert set(impls(page)) == set(expected[case]), "a slice must come without fetch"
    page.locator("#cases td[data-key=time_us] a").first.click()
    assert page.locator("tbody:target tr.head").is_visible()
    context.close()
    assert not noise, noise


def test_the_leaderboard_by_keyboard_alone(page: Page, site: Site) -> None:
    open_cases(page, site.url("leaderboard.html"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    filtered = False
    for _ in range(MOST_STOPS):
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUS)
        assert stop["seen"], f"focus cannot be seen on {stop['html']}"
        if (stop["name"], stop["value"]) == ("softmax", "exact"):
            page.keyboard.press("Space")
            again = page.evaluate(FOCUS)
            assert (again["name"], again["value"]) == ("softmax", "exact"), (
                "focus is lost when a filter is set"
            )
            filtered = True
        if stop["key"] == "time_us":
            break
    else:
        pytest.fail(f"no sort button within {MOST_STOPS} stops")
    assert filtered
    assert {line["impl"].split("/")[0] for line in table(page)} == {"softmax"}
    head = page.locator("#cases th[data-key=time_us]")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    up = impls(page)
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    timed = [line["impl"] for line in table(page) if line["status"] == "ok"]
    assert timed == [name for name in reversed(up) if name in timed]
    assert page.evaluate(FOCUS)["key"] == "time_us", "focus stays on the heading"


def test_the_matrix_is_one_stop_and_arrows_move_in_it(page: Page, site: Site) -> None:
    page.goto(site.url("status/h100-sxm-fp32.html"))
    matrix = page.locator("table[data-roving]").first
    assert matrix.locator("tbody a[tabindex='0']").count() == 1
    matrix.locator("tbody a[tabindex='0']").focus()
    where = """() => {
      const cell = document.activeElement.closest("td,th");
      return [cell.parentNode.rowIndex, cell.cellIndex];
    }"""
    row, column = page.evaluate(where)
    for key, step in (
        ("ArrowRight", (0, 1)),
        ("ArrowDown", (1, 1)),
        ("ArrowLeft", (1, 0)),
        ("ArrowUp", (0, 0)),
    ):
        page.keyboard.press(key)
        assert page.evaluate(where) == [row + step[0], column + step[1]], key


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, site: Site) -> None:
    context = opened(browser, color_scheme="dark")
    context.add_init_script("""new MutationObserver(() => {
      if (document.body && !window.first) window.first = document.documentElement.dataset.theme || "none";
    }).observe(document, { childList: true, subtree: true });""")
    page = context.new_page()
    paper = "getComputedStyle(document.body).backgroundColor"
    page.goto(site.url("index.html"))
    dark = page.evaluate(paper)
    page.locator("#theme select").select_option("light")
    light = page.evaluate(paper)
    assert light != dark
    page.goto(site.url("run/") + sorted(site.folder.glob("run/*.html"))[0].name)
    assert page.evaluate(paper) == light
    assert page.evaluate("window.first") == "light", "the theme must be set before anything is painted"
    assert page.locator("#theme select").input_value() == "light"
    page.locator("#theme select").select_option("auto")
    assert page.evaluate(paper) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) == light
    context.close()


def test_on_a_phone_a_row_unfolds_what_does_not_fit(page: Page, site: Site) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    open_cases(page, site.url("index.html"))
    first = page.locator("#cases tbody tr").first
    assert first.locator("td[data-key=tflops_effective]").is_hidden()
    value = first.locator("td[data-key=tflops_effective]").text_content()
    first.locator("button.more").click()
    assert first.locator("button.more").get_attribute("aria-expanded") == "true"
    assert value in page.locator("tr.detail dd").all_inner_texts()
    first.locator("button.more").click()
    assert page.locator("tr.detail").count() == 0


# ---- clipboard and commands ----------------------------------------------------------------------------


def pasted(page: Page) -> str:
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def test_buttons_copy_what_they_say(page: Page, site: Site, expected: Tables) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    case = next(c for c in expected if c.dtype == "float32" and c.pattern == "NS" and c.n == "1024")
    open_cases(page, site.url("index.html", case.fragment))
    page.locator("#copy-link").click()
    page.locator("#copy-link:text('Copied')").wait_for()
    assert pasted(page) == page.url
    page.locator("button[data-as=markdown]").click()
    page.locator("button[data-as=markdown]:text('Copied')").wait_for()
    lines = pasted(page).strip().splitlines()
    assert "cab_efficiency" in lines[0]
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(expected[case])
    assert len({line.replace("\\|", "").count("|") for line in lines[2:]}) == 1, "every line has every cell"
    page.locator("button[data-as=csv]").click()
    page.locator("button[data-as=csv]:text('Copied')").wait_for()
    found = {line["impl"]: line for line in csv.DictReader(io.StringIO(pasted(page)))}
    assert set(found) == set(expected[case])
    for label, wanted in expected[case].items():
        line, time = found[label], wanted.values["time_us"]
        assert (line["status"], line["reason"]) == (wanted.status, wanted.reason)
        assert (float(line["time_us"]) if line["time_us"] else None) == (
            time and pytest.approx(time, rel=1e-5)
        )


def test_the_command_that_repeats_a_case_is_one_that_attnbench_takes(page: Page, site: Site) -> None:
    from attnbench.cli import app

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    path = sorted(site.folder.glob("run/*/performer.html"))[0].relative_to(site.folder).as_posix()
    page.goto(site.url(path))
    page.locator("tr.head summary").first.click()
    block = page.locator("tr.head .copyable").first
    block.locator("button").click()
    block.locator("button:text('Copied')").wait_for()
    text = pasted(page)
    assert text == block.locator("code").inner_text()
    words = shlex.split(text)
    assert words[:2] == ["attnbench", "run"]
    device = words.index("--gpu") + 1
    words[device] = "cpu"  # what is here
    done = CliRunner().invoke(app, [*words[1:], "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    labels = {case["label"] for case in json.loads(done.stdout)["cases"]}
    assert len(labels) == 1
    assert labels.pop().startswith("performer/torch")


def test_the_feed_names_steps_that_are_on_the_page(page: Page, site: Site) -> None:
    page.goto(site.url("history.html"))
    link = page.locator("link[rel=alternate]").evaluate("link => link.href")
    answer = page.request.get(link)
    assert answer.ok
    atom = "{http://www.w3.org/2005/Atom}"
    entries = ET.fromstring(answer.body()).findall(f"{atom}entry")
    assert entries
    for entry in entries:
        found = entry.find(f"{atom}link")
        assert found is not None
        address, _, anchor = found.attrib["href"].partition("#")
        assert address == site.url("history.html")
        assert page.locator(f"[id='{anchor}']").count() == 1
