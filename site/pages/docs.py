"""The documentation as pages: the method, every column, and all else below ``docs/``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from attnbench.results.schema import COLUMNS, GROUPS, STATUS_MEANING
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.views.prose import MOVED, Prose, anchor_of, render

FIRST: Final = (
    *("quickstart", "concepts", "reading-the-leaderboard", "method", "metrics", "ci", "faq"),
    *("add-your-own", "analysis", "estimate", "mechanisms", "kernels"),
)
"""Pages in reading order; others follow by name."""

COLUMN_NAMES: Final = frozenset(column.name for column in COLUMNS)


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``method.html``, ``metrics.html``, ``docs/index.html``, a page for every text of ``docs/``, images."""
    folder = files("attnbench") / "docs"
    texts = _texts(folder)
    made = {
        name: render(text, f"docs/{name}.md", _path(name), data.repository) for name, text in texts.items()
    }
    menu = [(_path(name), made[name].title) for name in made]
    for name, prose in made.items():
        if name != "metrics":
            yield _page(name, prose, menu)
    yield _metrics(menu)
    yield Page(
        "docs/index.html", "Documentation", "docs.html", {"menu": menu, "prose": None}, "docs/index.html"
    )
    images = folder / "images"
    if images.is_dir():
        for image in sorted(images.iterdir(), key=lambda entry: entry.name):
            if image.is_file():
                yield Asset(f"docs/images/{image.name}", image.read_bytes())


def _texts(folder: Traversable) -> dict[str, str]:
    """Every Markdown file by name, in reading order; none where the package came without them."""
    if not folder.is_dir():
        return {}
    names = {entry.name.removesuffix(".md") for entry in folder.iterdir() if entry.name.endswith(".md")}
    order = [name for name in FIRST if name in names] + sorted(names - set(FIRST))
    return {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in order}


def _path(name: str) -> str:
    return MOVED.get(f"docs/{name}.md", f"docs/{name}.html")


def _page(name: str, prose: Prose, menu: list[tuple[str, str]]) -> Page:
    path = _path(name)
    nav = path if path == "method.html" else "docs/index.html"
    return Page(path, prose.title, "docs.html", {"menu": menu, "prose": prose}, nav)


def _metrics(menu: list[tuple[str, str]]) -> Page:
    """One anchor for every column; headings stand aside where a column has their name."""
    groups = []
    for group, title in GROUPS.items():
        anchor = anchor_of(title)
        inside = [column for column in COLUMNS if column.group == group]
        groups.append((f"group-{anchor}" if anchor in COLUMN_NAMES else anchor, title, inside))
    context = {
        "menu": menu,
        "groups": groups,
        "statuses": [(str(s), text) for s, text in STATUS_MEANING.items()],
    }
    return Page(
        "metrics.html", "Metrics: every column of a result", "metrics.html", context, "docs/index.html"
    )
