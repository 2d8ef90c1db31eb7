"""Downloads: from a server on this machine, checked by size and digest, and refused with a clear word."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from attnbench.cli import app
from attnbench.errors import UsageError
from attnbench.tasks.data import catalogue, prepare, sources
from attnbench.tasks.data.prepare import DownloadFailed

FILES: dict[str, bytes] = {}
ASKED: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """Serves ``FILES``; a path that ends in ``?short`` announces more bytes than it sends."""

    def do_GET(self) -> None:
        ASKED.append(self.path)
        content = FILES.get(self.path.removesuffix("?short"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 10 * self.path.endswith("?short")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[str]:
    FILES.clear()
    ASKED.clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("ATTNBENCH_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture
def offer(monkeypatch):
    """Replace the downloads of one data set of the catalogue."""

    def change(name: str, *downloads: object) -> None:
        entry = replace(catalogue.CATALOGUE[name], downloads=downloads)
        monkeypatch.setattr(sources, "CATALOGUE", {**catalogue.CATALOGUE, name: entry})

    return change


def tarball(**files: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


REVIEWS = {
    f"aclImdb__{part}__{label}__0_1.txt": label for part in ("train", "test") for label in ("pos", "neg")
}


def test_an_archive_is_fetched_checked_unpacked_and_verified(server, offer, tmp_path):
    FILES["/imdb.tar.gz"] = tarball(**REVIEWS)
    digest = f"md5:{hashlib.md5(FILES['/imdb.tar.gz']).hexdigest()}"
    offer("imdb", catalogue.Download(f"{server}/imdb.tar.gz", "imdb.tar.gz", digest, unpack=True))
    told = []
    found = prepare.prepare("imdb", tmp_path, lambda *what: told.append(what))
    assert found.root == tmp_path / "imdb" / "aclImdb"
    assert list(found.reviews("test")) == [("neg", 0), ("pos", 1)]
    size = len(FILES["/imdb.tar.gz"])
    assert told[-1] == ("imdb.tar.gz", size, size)
    assert not (tmp_path / "imdb" / "imdb.tar.gz").exists()


def test_the_parquet_copy_of_the_hub_is_listed_and_fetched_once(server, offer, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", server)
    offer("multi_news", catalogue.HubParquet("owner/name", "default"))
    listed: dict[str, list[str]] = {}
    for part in ("train", "validation", "test"):
        stream = io.BytesIO()
        pq.write_table(pa.table({"document": ["a ||||| b"], "summary": [part]}), stream)
        FILES[f"/{part}"] = stream.getvalue()
        listed[part] = [f"{server}/{part}"]
    FILES["/api/datasets/owner/name/parquet"] = json.dumps({"default": listed}).encode()
    found = prepare.prepare("multi_news")
    assert found.root == sources.places("multi_news")[0]
    assert found.sample("validation").summary == "validation"
    ASKED.clear()
    (found.root / "test/00000.parquet").unlink()
    prepare.prepare("multi_news")  # an interrupted download goes on
    assert ASKED == ["/api/datasets/owner/name/parquet", "/test"]


def test_what_is_complete_is_not_fetched_again(server, offer, tmp_path, monkeypatch):
    root = tmp_path / "imdb"
    for name, text in REVIEWS.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    offer("imdb", catalogue.Download(f"{server}/imdb.tar.gz", "imdb.tar.gz"))
    monkeypatch.setattr(sources.loader("imdb"), "published", {"train": 2, "test": 2})
    assert prepare.prepare("imdb", tmp_path).root == root / "aclImdb"
    assert ASKED == []


def test_a_wrong_digest_is_refused_and_the_file_removed(server, offer, tmp_path):
    FILES["/ETTh1.csv"] = b"date\n"
    offer("ett", catalogue.Download(f"{server}/ETTh1.csv", "ETTh1.csv", "sha256:" + "0" * 64))
    with pytest.raises(DownloadFailed, match="observed another sha256 digest"):
        prepare.prepare("ett", tmp_path)
    assert list((tmp_path / "ett").iterdir()) == []


@pytest.mark.parametrize(
    ("query", "size", "words"), [("?short", None, "expected 15"), ("", 9, "expected 9 as its authors")]
)
def test_a_cut_download_is_refused_and_nothing_is_left(server, offer, tmp_path, query, size, words):
    FILES["/ETTh1.csv"] = b"date\n"
    offer("ett", catalogue.Download(f"{server}/ETTh1.csv{query}", "ETTh1.csv", size_bytes=size))
    with pytest.raises(DownloadFailed, match=words):
        prepare.prepare("ett", tmp_path)
    assert list((tmp_path / "ett").iterdir()) == []


def test_an_answer_of_the_server_and_a_broken_archive_are_named(server, offer, tmp_path):
    offer("imdb", catalogue.Download(f"{server}/gone.tar.gz", "imdb.tar.gz", unpack=True))
    with pytest.raises(DownloadFailed, match=r"gone\.tar\.gz: the server answered 404"):
        prepare.prepare("imdb", tmp_path)
    FILES["/gone.tar.gz"] = b"not an archive"
    with pytest.raises(DownloadFailed, match=r"imdb\.tar\.gz: .*remove it"):
        prepare.prepare("imdb", tmp_path)


def test_an_archive_writes_nothing_outside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "bad.tar.gz"
    archive.write_bytes(tarball(**{"..__escaped.txt": "x"}))
    with pytest.raises(DownloadFailed, match=r"bad\.tar\.gz"):
        prepare.unpack(archive, tmp_path / "in")
    assert not (tmp_path / "escaped.txt").exists()


def test_content_that_is_not_the_data_set_is_refused(server, offer, tmp_path):
    FILES["/x"] = b"hello"
    offer("ett", catalogue.Download(f"{server}/x", "README"))
    with pytest.raises(DownloadFailed, match="does not have the expected layout"):
        prepare.prepare("ett", tmp_path)


def test_offline_and_licence_are_usage_errors_that_say_what_to_do(server, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"licence: ShapeNet terms.*Register at shapenet\.org"):
        prepare.prepare("pcn", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="observed HF_HUB_OFFLINE=1"):
        prepare.prepare("pg19", tmp_path)


def test_a_server_out_of_reach_is_one_sentence(server, offer, tmp_path):
    offer("ett", catalogue.Download("http://127.0.0.1:1/ETTh1.csv", "ETTh1.csv"))
    with pytest.raises(DownloadFailed, match="seems to be offline"):
        prepare.prepare("ett", tmp_path)


def test_a_hub_that_answers_something_else_is_named(server, offer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", server)
    offer("pg19", catalogue.HubParquet("owner/name", "default"))
    FILES["/api/datasets/owner/name/parquet"] = b'{"error": "gone"}'
    with pytest.raises(DownloadFailed, match="expected the Parquet files of config 'default'"):
        prepare.prepare("pg19", tmp_path)


def test_an_unwritable_folder_is_a_usage_error(server, offer):
    offer("ett", catalogue.Download(f"{server}/x", "ETTh1.csv"))
    with pytest.raises(UsageError, match=r"/proc/x/ett: .*--data-root"):
        prepare.prepare("ett", "/proc/x")


def test_every_download_of_the_catalogue_is_well_formed():
    for entry in catalogue.CATALOGUE.values():
        assert bool(entry.downloads) != bool(entry.by_hand)
        for item in entry.downloads:
            if isinstance(item, catalogue.Download):
                assert item.url.startswith("https://")
                algorithm, _, value = item.digest.partition(":")
                assert len(value) == {"": 0, "md5": 32, "sha256": 64}[algorithm]


# ---- the command line ----------------------------------------------------------------------------------


def test_status_lists_every_data_set(server, tmp_path):
    done = CliRunner().invoke(app, ["data", "status", "--data-root", str(tmp_path), "--json"])
    assert done.exit_code == 0
    listed = json.loads(done.stdout)
    assert [record["data_set"] for record in listed] == list(catalogue.CATALOGUE)
    assert {record["state"] for record in listed} == {"missing"}
    table = CliRunner().invoke(app, ["data", "status", "--data-root", str(tmp_path)]).stdout
    assert "0 of 15 data sets are here" in table


def test_prepare_tells_what_it_found(server, offer, tmp_path):
    FILES["/imdb.tar.gz"] = tarball(**REVIEWS)
    offer("imdb", catalogue.Download(f"{server}/imdb.tar.gz", "imdb.tar.gz", unpack=True))
    done = CliRunner().invoke(app, ["data", "prepare", "imdb", "--data-root", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"imdb in {tmp_path}/imdb/aclImdb: 2 of 25,000 train, 2 of 25,000 test\n"
    refused = CliRunner().invoke(app, ["data", "prepare", "imdbs"])
    assert isinstance(refused.exception, UsageError)
