"""Pages of documentation: Markdown to HTML, with an anchor at every heading and links that lead to pages."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any, Final

MOVED: Final = {"docs/method.md": "method.html", "docs/metrics.md": "metrics.html"}
"""Pages of documentation that stand at the root of the site."""

_COMMENT: Final = re.compile(r"<!--.*?-->\s*", re.DOTALL)
_SCHEME: Final = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Prose:
    """One page: its title, its HTML, and the headings below the first as (anchor, text)."""

    title: str
    html: str
    headings: tuple[tuple[str, str], ...]


def render(text: str, source: str, page: str, repository: str = "") -> Prose:
    """Render the Markdown file ``source`` (a path in the repository) as the site's ``page``.

    Links to other pages of documentation lead to their pages, links to other files to the repository; without
    a repository these become plain text. HTML in the text is shown as text.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(_COMMENT.sub("", text))
    title, headings = source, []
    used: dict[str, int] = {}
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            words = _plain(tokens[at + 1])
            anchor = _unique(anchor_of(words), used)
            token.attrSet("id", anchor)
            if token.tag == "h1" and title == source:
                title = words
            else:
                headings.append((anchor, words))
        if token.type == "table_open":
            token.attrSet("tabindex", "0")  # what may scroll can be scrolled by keyboard
        for child in token.children or ():
            _retarget(child, source, page, repository)
        token.children = _without_dead_links(token.children) if token.children else token.children
    html = str(parser.renderer.render(tokens, parser.options, {})).replace("<pre>", '<pre tabindex="0">')
    return Prose(title, html, tuple(headings))


def target_of(href: str, source: str, page: str, repository: str) -> str:
    """Where a link in ``source`` leads from ``page``; empty where it leads nowhere on the site."""
    if _SCHEME.match(href) or href.startswith(("#", "//")):
        return href
    path, mark, anchor = href.partition("#")
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if inside.startswith("docs/"):
        if inside.endswith(".md"):
            inside = MOVED.get(inside, inside.removesuffix(".md") + ".html")
        return posixpath.relpath(inside, posixpath.dirname(page) or ".") + mark + anchor
    return f"{repository}/blob/main/{inside}{mark}{anchor}" if repository else ""


def anchor_of(words: str) -> str:
    """The anchor of a heading, as code hosts make it: lower case, hyphens, no punctuation."""
    return re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-") or "section"


# ---- inside --------------------------------------------------------------------------------------------


def _plain(token: Any) -> str:
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


def _unique(anchor: str, used: dict[str, int]) -> str:
    used[anchor] = used.get(anchor, 0) + 1
    return anchor if used[anchor] == 1 else f"{anchor}-{used[anchor] - 1}"


def _retarget(token: Any, source: str, page: str, repository: str) -> None:
    if token.type == "link_open":
        token.attrSet("href", target_of(str(token.attrGet("href")), source, page, repository))
    elif token.type == "image":
        token.attrSet("src", target_of(str(token.attrGet("src")), source, page, repository))
        token.attrSet("loading", "lazy")


def _without_dead_links(children: list[Any]) -> list[Any]:
    """Links that lead nowhere become their text."""
    kept, dead = [], []
    for child in children:
        if child.type == "link_open":
            dead.append(not child.attrGet("href"))
        drop = child.type in ("link_open", "link_close") and dead[-1]
        if child.type == "link_close":
            dead.pop()
        if not drop:
            kept.append(child)
    return kept
