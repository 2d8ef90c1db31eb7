"""What the tests do with a page, and what they read from it. Every wait is for a condition."""

from __future__ import annotations

from typing import Any, Final

from playwright.sync_api import Page

TABLE: Final = """() => Array.from(document.querySelectorAll("#cases tbody tr[data-impl]"), tr => ({
  impl: tr.dataset.impl, status: tr.dataset.status, kind: tr.className,
  reason: (tr.querySelector(".reason") || {textContent: ""}).textContent.trim(),
  cells: Object.fromEntries(Array.from(tr.querySelectorAll("[data-key]"), cell => [cell.dataset.key,
    {v: cell.dataset.v, text: cell.firstChild ? cell.firstChild.textContent.trim() : ""}])),
}))"""

SELECTS: Final = """() => Object.fromEntries(Array.from(document.querySelectorAll("main select"),
  select => [select.name, select.value]))"""


def table(page: Page) -> list[dict[str, Any]]:
    """The lines of the table of a case, in their order."""
    found: list[dict[str, Any]] = page.evaluate(TABLE)
    return found


def impls(page: Page) -> list[str]:
    return [line["impl"] for line in table(page)]


def selects(page: Page) -> dict[str, str]:
    """Every selector of the page by its name."""
    found: dict[str, str] = page.evaluate(SELECTS)
    return found


def open_cases(page: Page, url: str) -> None:
    """Open a page with the table of a case, and wait until its script has drawn it."""
    page.goto(url)
    page.locator("#cases button.more").first.wait_for(state="attached")


def choose(page: Page, fragment: str) -> None:
    """Go to another address of the same page, and wait until its script has answered."""
    page.evaluate(
        """fragment => {
          document.querySelectorAll("#cases tbody tr").forEach(row => { row.dataset.stale = ""; });
          document.getElementById("none").hidden = true;
          location.hash = fragment;
        }""",
        fragment,
    )
    answered(page)


def answered(page: Page) -> None:
    page.wait_for_function(
        "!document.querySelector('#cases [data-stale]') || !document.getElementById('none').hidden"
    )


def pick(page: Page, name: str, value: str) -> None:
    """Choose an option as a visitor does, and wait until the script has answered."""
    page.evaluate("""() => {
      document.querySelectorAll("#cases tbody tr").forEach(row => { row.dataset.stale = ""; });
      document.getElementById("none").hidden = true;
    }""")
    page.locator(f"main select[name={name}]").select_option(value)
    answered(page)
