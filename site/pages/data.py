"""The data to download, and where they come from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnbench.results.rows import Row
from attnbench.results.schema import COLUMNS, GROUPS, SCHEMA_VERSION
from attnbench.results.store import write_parquet
from attnbench.site.page import Asset, Page, SiteData
from attnbench.site.views import provenance
from attnbench.site.views.run import runs
from attnbench.site.views.summary import summary_csv


@dataclass(frozen=True)
class Download:
    """A file to download: what it is, its size in words and its checksum."""

    path: str
    what: str
    size: str
    sha256: str


def pages(data: SiteData) -> Iterator[Page | Asset]:
    """``data.html`` and the files that it offers."""
    parquet = Asset("data/results.parquet", parquet_bytes(data.rows))
    csv = Asset("data/summary.csv", summary_csv(data.entries, data.tasks).encode())
    yield parquet
    yield csv
    downloads = [
        _download(parquet, "every row with every sample"),
        _download(csv, "one line an impl and case: medians over blocks, intervals, ranks, status and reason"),
    ]
    context = {
        "downloads": downloads,
        "slices": [
            Download(
                s.path,
                f"{s.device}, {s.dtype}, {s.direction}: {s.rows} summaries",
                _size(s.text.encode()),
                hashlib.sha256(s.text.encode()).hexdigest(),
            )
            for s in data.slices
        ],
        "schema_version": SCHEMA_VERSION,
        "columns": {title: [c for c in COLUMNS if c.group == group] for group, title in GROUPS.items()},
        "environments": provenance.environments(data.rows),
        "runs": runs(data.rows),
        "flags": provenance.flag_counts(data.rows),
        "newest": data.facts.newest,
        "older": len(data.older),
    }
    yield Page("data.html", "Data and provenance", "data.html", context, "data.html")


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """Rows as the bytes of a Parquet file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.parquet"
        write_parquet(list(rows), path)
        return path.read_bytes()


def _download(asset: Asset, what: str) -> Download:
    return Download(asset.path, what, _size(asset.content), hashlib.sha256(asset.content).hexdigest())


def _size(content: bytes) -> str:
    kib = len(content) / 1024
    return f"{kib:.0f} KiB" if kib < 10_000 else f"{kib / 1024:.1f} MiB"
