"""A small site with everything in it, served below a sub-path, and a browser that reports every complaint."""

from __future__ import annotations

import gzip
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    Response,
    sync_playwright,
)

from attnbench.results.rows import Row, canonical
from attnbench.results.store import write_parquet
from attnbench.site.build import build
from tests.site.browser.oracle import Case, Line, tables
from tests.site.synthetic import IMPLS, synthetic_rows

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
PREFIX: Final = "/attnbench"
NUMBERS: Final = (
    *("e2e_us", "launch_us", "tflops_effective", "tflops", "roofline_pct", "roofline_measured_pct"),
    *("mem_peak_bytes", "mem_saved_bytes", "mem_workspace_bytes", "err_ratio"),
    *("approx_err_recorded", "approx_err_structured", "approx_err_gaussian"),
    *("density", "recall_mean", "selector_share"),
)
"""Columns of the schema that a table of cases shows."""


@dataclass(frozen=True)
class Site:
    """A built site: its folder and its address, which ends in the prefix without a slash."""

    folder: Path
    address: str

    def url(self, path: str, fragment: str = "") -> str:
        return f"{self.address}/{path}" + (f"#{fragment}" if fragment else "")


@dataclass
class Watch:
    """What a context complained of, and the files of the site that it asked for."""

    address: str
    noise: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def attach(self, context: BrowserContext) -> None:
        context.on("console", self._said)
        context.on("weberror", lambda error: self.noise.append(f"error: {error.error}"))
        context.on(
            "dialog", lambda dialog: (self.noise.append(f"dialog: {dialog.message}"), dialog.dismiss())
        )
        context.on("request", self._asked)
        context.on("response", self._answered)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.noise.append(f"console {message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        if request.url.startswith(f"{self.address}/"):
            self.asked.append(request.url.removeprefix(f"{self.address}/").partition("#")[0])
        elif not request.url.startswith(("data:", "blob:")):
            self.noise.append(f"asked for {request.url}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self.noise.append(f"{response.status}: {response.url}")


class _Below(SimpleHTTPRequestHandler):
    """Serves a folder below :data:`PREFIX` and nothing beside it."""

    def translate_path(self, path: str) -> str:
        if path.startswith(f"{PREFIX}/"):
            return super().translate_path(path.removeprefix(PREFIX))
        return str(Path(self.directory) / "nothing-here")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def rows_of_the_site() -> list[Row]:
    """All statuses, ties, a hostile name and two tasks on one device; others for selectors and history."""
    steady = [impl for impl in IMPLS if impl.mechanism in ("softmax", "nystromformer", "performer")]
    few = [IMPLS[0], IMPLS[2], IMPLS[4]]
    both = ("bfloat16", "float32")
    found = synthetic_rows(IMPLS, (1024, 65536), both, ("NS", "CS"), ("fwd",), ("h100-sxm",), hostile=True)
    found += synthetic_rows(
        few, (1024, 4096), both[:1], ("NS", "CC"), ("fwd", "fwd_bwd"), ("h100-sxm",),
        runs=1, workload="bert_base", tasks=False,
    )  # fmt: skip
    for gpu, runs in (("b200", 6), ("a100-sxm", 1)):
        found += synthetic_rows(
            steady, (1024, 4096), both[:1], ("NS",), ("fwd",), (gpu,), runs=runs, blocks=8, tasks=False
        )
    return canonical(found)


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return rows_of_the_site()


@pytest.fixture(scope="session")
def expected(rows: list[Row]) -> dict[Case, dict[str, Line]]:
    """Every table of the site, computed without it."""
    return tables(rows, NUMBERS)


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    """What the command would say of some mechanisms and a task; importing all of them takes too long."""
    from attnbench.harness.catalogue import catalogue
    from attnbench.impls import registry
    from attnbench.tasks import registry as tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "ids", lambda: ["softmax", "performer", "local_window"])
        patch.setattr(tasks, "ids", lambda: ["lm"])
        return catalogue()


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    """Serve ``folder``, which may still be empty, on the loopback interface."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Below, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(folder, f"http://127.0.0.1:{server.server_address[1]}{PREFIX}")
        server.shutdown()


@pytest.fixture(scope="session")
def site(
    browser: Browser, rows: list[Row], known: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The site of :func:`rows_of_the_site`; built only where there is a browser to look at it."""
    root = tmp_path_factory.mktemp("browser")
    write_parquet(rows, root / "rows.parquet")
    with served(root / "site") as found:
        build([root / "rows.parquet"], found.folder, lambda: known, found.address, "https://example.org/code")
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for the whole session."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        reason = f"no browser: observed none of {', '.join(BROWSERS)} on PATH, expected one; install chromium"
        if os.environ.get("ATTNBENCH_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def opened(browser: Browser, **options: Any) -> BrowserContext:
    """A new visitor: nothing stored, nothing cached, no animation."""
    settings = {
        "viewport": {"width": 1280, "height": 800},
        "reduced_motion": "reduce",
        "color_scheme": "light",
    }
    return browser.new_context(**{**settings, **options})


@pytest.fixture
def watch(site: Site) -> Watch:
    return Watch(site.address)


@pytest.fixture
def page(browser: Browser, watch: Watch) -> Iterator[Page]:
    """A page of a new visitor; the test fails when the browser complained of anything."""
    context = opened(browser)
    watch.attach(context)
    yield context.new_page()
    context.close()
    assert not watch.noise, watch.noise


def compressed(folder: Path, names: Sequence[str]) -> int:
    """Bytes of files of the site as a server would send them."""
    return sum(len(gzip.compress((folder / name).read_bytes(), 9, mtime=0)) for name in dict.fromkeys(names))
