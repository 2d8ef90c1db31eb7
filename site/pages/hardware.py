"""The devices: one page each, and one that lists them."""

from __future__ import annotations

from collections.abc import Iterator

from attnbench.results.format import number
from attnbench.site.page import Page, SiteData
from attnbench.site.views.hardware import device, percent
from attnbench.site.views.links import device_page
from attnbench.site.views.words import STATUS_ORDER


def pages(data: SiteData) -> Iterator[Page]:
    """``hardware.html`` and ``gpu/<device>.html`` for every device with a row."""
    found = [
        device(name, data.catalogue.devices.get(name, {}), data.rows, data.current) for name in data.devices
    ]
    yield Page(
        "hardware.html", "Hardware", "hardware.html", {"devices": found, "number": number}, "hardware.html"
    )
    for view in found:
        context = {"view": view, "statuses": STATUS_ORDER, "number": number, "percent": percent}
        yield Page(device_page(view.name), view.title, "gpu.html", context, "hardware.html")
