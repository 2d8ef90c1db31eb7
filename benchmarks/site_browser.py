"""What a browser says of the site of about 40,000 rows: bytes of each first load, and how fast a filter acts.

Run as `python benchmarks/site_browser.py [FOLDER]` from the root of the repository; the rows are made up. A
change is timed in the page: from the event to the frame after the one that shows it.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from playwright.sync_api import Page, Request, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from attnbench.results.store import write_parquet  # noqa: E402
from attnbench.site.build import build  # noqa: E402
from tests.site.synthetic import large  # noqa: E402

PAGES: Final = (
    *("index.html", "leaderboard.html", "explore.html", "compare.html", "status.html", "hardware.html"),
    *("history.html", "data.html", "method.html", "metrics.html", "impl/softmax.html", "gpu/h100-sxm.html"),
    *("status/h100-sxm-bf16.html", "run/*.html", "run/*/softmax.html"),
)
REPEATS: Final = 15

TIMED: Final = """([act, repeats]) => new Promise(done => {
  const times = [], run = new Function("at", act);
  const next = at => {
    if (at === repeats) return done(times);
    const begin = performance.now();
    run(at);
    requestAnimationFrame(() => setTimeout(() => {
      times.push(performance.now() - begin);
      next(at + 1);
    }, 0));
  };
  next(0);
})"""

SELECT: Final = """
  const select = document.querySelector("#selectors select[name=%s]");
  select.selectedIndex = at %% select.options.length;
  select.dispatchEvent(new Event("change", { bubbles: true }));"""

ACTIONS: Final = {
    "a family on or off": "document.querySelector('#filters input[name=family]').click();",
    "a letter typed": """
      const box = document.querySelector("#filters input[type=search]");
      box.value = "softmax".slice(0, at % 7);
      box.dispatchEvent(new Event("input", { bubbles: true }));""",
    "another length": SELECT % "n",
    "another pattern": SELECT % "pattern",
    "sorted by time": "document.querySelector('#cases th[data-key=time_us] button.sort').click();",
}
"""What is done → how, given the number of the repetition."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def first_load(page: Page, address: str, folder: Path, pattern: str) -> tuple[str, int, int]:
    """Path of the page, bytes of what it makes the browser ask for, and those compressed."""
    path = sorted(folder.glob(pattern))[0].relative_to(folder).as_posix()
    asked: set[str] = set()

    def note(request: Request) -> None:
        asked.add(urlsplit(request.url).path.lstrip("/"))

    page.on("request", note)
    page.goto(f"{address}/{path}", wait_until="load")
    page.remove_listener("request", note)
    contents = [(folder / name).read_bytes() for name in sorted(asked)]
    return path, sum(map(len, contents)), sum(len(gzip.compress(text, 9)) for text in contents)


def measure(folder: Path, address: str) -> None:
    """Open every kind of page without a cache, then time changes of the leaderboard."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for pattern in PAGES:
            context = browser.new_context()
            path, size, small = first_load(context.new_page(), address, folder, pattern)
            print(f"{path}: first load {size / 1024:.0f} KiB, {small / 1024:.0f} KiB gz")
            context.close()
        page = browser.new_page(reduced_motion="reduce")
        page.goto(f"{address}/leaderboard.html")
        page.locator("#cases button.more").first.wait_for(state="attached")
        for name, act in ACTIONS.items():
            times = page.evaluate(TIMED, [act, REPEATS])
            print(f"{name}: median {statistics.median(times):.0f} ms, worst of {REPEATS} {max(times):.0f} ms")
        browser.close()


def main(folder: Path) -> None:
    """Build into ``folder`` and print the figures."""
    rows = large()
    write_parquet(rows, folder / "rows.parquet")
    site, begin = folder / "site", time.perf_counter()
    pages = build([folder / "rows.parquet"], site)
    seconds = time.perf_counter() - begin
    total = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"{len(rows)} rows, {pages} pages in {seconds:.1f} s, {total / 2**20:.1f} MiB")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        measure(site, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
