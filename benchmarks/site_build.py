"""How long the site of about 40,000 rows takes to build, how large it is, and what a first visit loads.

Run as `python benchmarks/site_build.py [FOLDER]` from the root of the repository; the rows are made up.
"""

from __future__ import annotations

import gzip
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from attnbench.results.store import write_parquet  # noqa: E402
from attnbench.site.build import build  # noqa: E402
from tests.site.synthetic import large  # noqa: E402


def first_load(folder: Path, page: str) -> int:
    """Bytes, compressed as a server would, of a page and of every script and style sheet that it names."""
    path = folder / page
    text = path.read_text(encoding="utf-8")
    names = re.findall(r'(?:<script[^>]* src|<link rel="stylesheet" href)="([^"]+)"', text)
    parts = [path, *(path.parent / name for name in dict.fromkeys(names))]
    return sum(len(gzip.compress(part.read_bytes(), 9)) for part in parts)


def main(folder: Path) -> None:
    """Build into ``folder`` and print the figures."""
    rows = large()
    write_parquet(rows, folder / "rows.parquet")
    begin = time.perf_counter()
    pages = build([folder / "rows.parquet"], folder / "site")
    seconds = time.perf_counter() - begin
    files = [path for path in (folder / "site").rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f"{len(rows)} rows, {pages} pages, {len(files)} files in {seconds:.1f} s")
    print(f"all files: {total / 2**20:.1f} MiB")
    for page in ("index.html", "leaderboard.html", "explore.html", "compare.html", "status.html"):
        size = len((folder / "site" / page).read_bytes())
        print(
            f"{page}: {size / 1024:.0f} KiB, first load {first_load(folder / 'site', page) / 1024:.0f} KiB gz"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
