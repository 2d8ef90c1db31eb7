"""Getting a data set, on request only: downloads with size and checksum, then unpacking. Never in a run."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError, UsageError
from attnbench.tasks.data.catalogue import DataSet, Download, HubParquet
from attnbench.tasks.data.sources import ROOT_VARIABLE, DataMissing, Source, data_set, loader, places

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 10.0
"""Seconds without an answer after which a server counts as out of reach."""
HUB = "https://huggingface.co"

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a file, the bytes of it that are here, and all its bytes where they are known."""


class DownloadFailed(AttnbenchError):
    """The network or a server failed; what was complete is kept."""


def prepare(name: str, root: Path | str | None = None, progress: Progress | None = None) -> Source:
    """Download the data set ``name`` and return it, verified; at once when all of it is here already.

    It goes to ``root/name``, or else to the first of :func:`places`. Files that are there with the right
    digest are not fetched again. Raises UsageError for an unknown data set, one that only a person may get
    (its licence asks for it) and a machine that is set offline; DownloadFailed for network failures and
    files with another digest.
    """
    entry, kind, looked = data_set(name), loader(name), places(name, root)
    here = next((found for place in looked if (found := kind.locate(place))), None)
    if here is not None and (not entry.downloads or _complete(kind(entry, here))):
        return kind(entry, here)
    _refuse(entry, looked[0])
    _fetch_all(entry, looked[0], progress or (lambda name, done, total: None))
    found = kind.locate(looked[0])
    if found is None:
        raise DownloadFailed(
            f"data set {name}: what was downloaded to {looked[0]} does not have the expected layout "
            f"({'; '.join(entry.layout)}); look at {entry.home}"
        )
    source = kind(entry, found)
    source.verify()
    return source


def _complete(source: Source) -> bool:
    try:
        return all(count.complete for count in source.verify())
    except DataMissing:
        return False


def _refuse(entry: DataSet, folder: Path) -> None:
    if not entry.downloads:
        raise UsageError(
            f"data set {entry.name} cannot be downloaded for you (licence: {entry.licence}). {entry.by_hand} "
            f"({entry.home}), and put it into {folder}: {'; '.join(entry.layout)}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise UsageError(
            f"data set {entry.name}: observed HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']}, expected a "
            f"network. Unset it, or copy the data set ({entry.size}) from {entry.home} to {folder}"
        )


def _fetch_all(entry: DataSet, folder: Path, progress: Progress) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in entry.downloads:
            parts = _hub_files(item) if isinstance(item, HubParquet) else [item]
            for part in parts:
                _fetch(part, folder, progress)
    except OSError as error:
        raise UsageError(
            f"{folder}: {error.strerror or error}; choose another folder with --data-root or {ROOT_VARIABLE}"
        ) from None


def _fetch(item: Download, folder: Path, progress: Progress) -> None:
    """Fetch one file, check it, and unpack it when it is an archive."""
    target = folder / item.path
    if not (target.is_file() and _digest_matches(target, item.digest)):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        _stream(item, part, progress)
        if not _digest_matches(part, item.digest):
            part.unlink()
            raise DownloadFailed(
                f"{item.url}: observed another {item.digest.split(':')[0]} digest than {item.digest}; the "
                "file was removed, try again or look whether its authors changed it"
            )
        part.replace(target)
    if item.unpack:
        unpack(target, folder)
        target.unlink()


def _stream(item: Download, part: Path, progress: Progress) -> None:
    """Copy a file from the network to ``part``, chunk by chunk."""
    with _open(item.url) as response, part.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or item.size_bytes
        done = 0
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            progress(Path(item.path).name, done, total)
    for expected, source in ((total, "its server"), (item.size_bytes, "its authors")):
        if expected is not None and done != expected:
            part.unlink()
            raise DownloadFailed(
                f"{item.url}: observed {done:,} bytes, expected {expected:,} as {source} say; try again"
            )


@contextmanager
def _open(url: str) -> Iterator[Any]:
    """A response of ``url``; every failure of the network is one sentence."""
    request = urllib.request.Request(url, headers={"User-Agent": "attnbench"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise DownloadFailed(f"{url}: the server answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadFailed(
            f"{url}: {reason}. This machine seems to be offline: run the command on one that is not and copy "
            f"the folder, or set {ROOT_VARIABLE} to where the data are"
        ) from None


def _hub_files(copy: HubParquet) -> list[Download]:
    """The files of a Parquet copy, as the hub lists them."""
    address = f"{HUB}/api/datasets/{copy.repository}/parquet"
    with _open(address) as response:
        content = response.read()
    try:
        splits = json.loads(content)[copy.config]
        return [
            Download(url, f"{split}/{number:05d}.parquet")
            for split, urls in splits.items()
            for number, url in enumerate(urls)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DownloadFailed(
            f"{address}: observed {content[:80]!r}, expected the Parquet files of config {copy.config!r}"
        ) from None


def _digest_matches(path: Path, digest: str) -> bool:
    """Whether the file has ``digest``; a file without a published digest is taken as it is."""
    if not digest:
        return True
    algorithm, value = digest.split(":")
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
            == value
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar or .zip, compressed or not. No member is written outside ``folder``."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DownloadFailed(f"{archive}: {_first_line(error)}; remove it and try again") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
