"""The Atom feed of steps (RFC 4287): newest first, with ids that stay when the site is built again."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from xml.etree import ElementTree as ET

from attnbench.site.views.history import NAMESPACE, Event

ATOM: Final = "http://www.w3.org/2005/Atom"
LATEST: Final = 100
"""Entries in the feed; the page has all."""

EPOCH: Final = "1970-01-01T00:00:00Z"


def feed(events: Sequence[Event], newest: str, url: str = "") -> bytes:
    """The feed as XML. ``newest`` is the time of the newest row, ``url`` the address of the site, if known.

    Without an address, links are relative to the feed.
    """
    ET.register_namespace("", ATOM)
    root = ET.Element(f"{{{ATOM}}}feed", {"{http://www.w3.org/XML/1998/namespace}lang": "en"})
    prefix = f"{url.rstrip('/')}/" if url else ""
    _text(root, "title", "attnbench: what became slower or faster")
    _text(root, "id", uuid.uuid5(NAMESPACE, "feed").urn)
    _text(root, "updated", _utc(newest) if newest else EPOCH)
    _text(ET.SubElement(root, f"{{{ATOM}}}author"), "name", "attnbench")
    _link(root, f"{prefix}feed.xml", "self", "application/atom+xml")
    _link(root, f"{prefix}history.html", "alternate", "text/html")
    for event in events[:LATEST]:
        entry = ET.SubElement(root, f"{{{ATOM}}}entry")
        _text(entry, "title", event.title)
        _text(entry, "id", uuid.UUID(event.id).urn)
        _text(entry, "updated", _utc(event.date))
        _link(entry, f"{prefix}history.html#step-{event.id}", "alternate", "text/html")
        _text(entry, "summary", _summary(event))
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _summary(event: Event) -> str:
    step = event.steps[0]
    text = [
        f"Largest step: {step.series.case}, from {step.change.before:.4g} to {step.change.after:.4g} µs "
        f"since run {event.run_id}.",
        f"Confirmed by pairs of blocks: {event.confirmed} of {len(event.steps)}.",
    ]
    if event.new_software:
        text.append("Hardware or software changed at the same run.")
    return " ".join(text)


def _text(parent: ET.Element, name: str, text: str) -> None:
    ET.SubElement(parent, f"{{{ATOM}}}{name}").text = text


def _link(parent: ET.Element, href: str, rel: str, kind: str) -> None:
    ET.SubElement(parent, f"{{{ATOM}}}link", {"href": href, "rel": rel, "type": kind})


def _utc(stamp: str) -> str:
    """A time of the rows as RFC 3339 wants it."""
    return datetime.fromisoformat(stamp).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
