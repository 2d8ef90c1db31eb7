"""Documentation as pages: every link leads somewhere, every column has its anchor, text stays text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnbench.results.schema import COLUMNS, Status
from attnbench.site.build import write
from attnbench.site.page import site_data
from attnbench.site.pages import charts, docs
from attnbench.site.views.prose import anchor_of, render, target_of

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://example.org/source"


class _Anchors(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(values["id"] or "")
        for name in ("href", "src"):
            if tag in ("a", "img", "link", "script") and values.get(name):
                self.targets.append(values[name] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write(site_data([], repository=REPOSITORY), folder, [docs, charts])
    return folder


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, _Anchors]:
    return {path: _Anchors(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_text_is_a_page(site: Path) -> None:
    for text in (ROOT / "docs").glob("*.md"):
        at_root = text.stem in ("method", "metrics")
        assert (site / ("" if at_root else "docs") / f"{text.stem}.html").is_file()


def test_links_and_anchors_resolve(site: Path, parsed: dict[Path, _Anchors]) -> None:
    elsewhere = {"index.html", "data.html"}  # written by other modules
    broken = []
    for path, page in parsed.items():
        for target in page.targets:
            if target.startswith(("http:", "https:")):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path.resolve()
            if there.name in elsewhere and there.parent == site.resolve():
                continue
            if not there.is_file() or (anchor and anchor not in parsed[there].ids):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def test_ids_are_unique(parsed: dict[Path, _Anchors]) -> None:
    for path, page in parsed.items():
        assert len(page.ids) == len(set(page.ids)), path.name


def test_every_column_and_status_has_its_anchor(site: Path, parsed: dict[Path, _Anchors]) -> None:
    ids = parsed[site / "metrics.html"].ids
    assert {column.name for column in COLUMNS} <= set(ids)
    assert {f"status-{status}" for status in Status} <= set(ids)


def test_nothing_is_asked_for_elsewhere(parsed: dict[Path, _Anchors]) -> None:
    for page in parsed.values():
        foreign = [t for t in page.targets if t.startswith(("http:", "https:", "//"))]
        assert all(not t.endswith((".js", ".css", ".png", ".svg")) for t in foreign)


def test_images_are_copied(site: Path) -> None:
    for image in (ROOT / "docs/images").iterdir():
        assert (site / "docs/images" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("href", "expected"),
    [
        ("metrics.md#status", "../metrics.html#status"),
        ("faq.md", "faq.html"),
        ("images/a.png", "images/a.png"),
        ("#here", "#here"),
        ("https://arxiv.org", "https://arxiv.org"),
        ("../CONTRIBUTING.md#x", f"{REPOSITORY}/blob/main/CONTRIBUTING.md#x"),
    ],
)
def test_targets(href: str, expected: str) -> None:
    assert target_of(href, "docs/ci.md", "docs/ci.html", REPOSITORY) == expected


def test_a_page_at_the_root_links_into_docs() -> None:
    assert target_of("ci.md", "docs/method.md", "method.html", "") == "docs/ci.html"


def test_a_link_to_nowhere_becomes_its_text() -> None:
    found = render("# T\n\nSee [this *file*](../LICENSE) and [that](b.md).\n", "docs/a.md", "docs/a.html")
    assert "See this <em>file</em> and" in found.html
    assert '<a href="b.html">that</a>' in found.html


def test_markup_in_a_text_is_text_and_comments_are_left_out() -> None:
    found = render("<!-- hidden -->\n# T\n\n<script>alert(1)</script> `<b>`\n", "docs/a.md", "docs/a.html")
    assert "hidden" not in found.html
    assert "<script>" not in found.html
    assert "&lt;script&gt;" in found.html
    assert found.title == "T"


def test_headings_have_the_anchors_of_code_hosts() -> None:
    found = render("# T\n## What `x` *is*?\n## What x is\n", "docs/a.md", "docs/a.html")
    assert [anchor for anchor, _ in found.headings] == ["what-x-is", "what-x-is-1"]
    assert anchor_of("Time, µs (cold)") == "time-µs-cold"
