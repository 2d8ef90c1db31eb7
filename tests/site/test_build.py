"""The site as files: same bytes for same rows, links resolve, hostile text is inert, sizes are bounded."""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import urllib.parse
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from attnbench.errors import AttnbenchError, UsageError
from attnbench.results.read import rows as read_rows
from attnbench.results.schema import SCHEMA_VERSION
from attnbench.results.store import write_parquet
from attnbench.site.build import build, relative, write
from attnbench.site.page import Page, SiteData, site_data
from attnbench.site.pages import MODULES
from tests.site.synthetic import HOSTILE, IMPLS, synthetic_rows

MakeRow = Callable[..., dict[str, Any]]
CATALOGUE: Mapping[str, Any] = {
    "mechanisms": {
        "performer": {
            "name": "Performer", "family": "linear", "kind": "core",
            "paper": {"title": "Rethinking", "year": 2021, "venue": "", "url": "https://arxiv.org"},
            "upstream": "", "patterns": ["NS", "CS"], "backends": {"NS": ["torch"], "CS": ["torch"]},
            "summary": "Random features.", "formula": "o = φ(q) S", "cost": "linear", "exact": False,
            "row_sum": "one", "causality": "strict", "stochastic": False, "grid_ranks": [1],
            "padding": "", "square_heads": "", "forward_only": "", "deviations": ["none"],
            "lengths": "free", "confidence": "high",
            "hyper": [{"name": "num_features", "default": "256", "meaning": "m", "choices": []}],
            "inputs": [], "module": "attnbench.impls.linear.performer",
        }
    },
    "tasks": {
        "lm": {
            "title": "Language modelling", "suite": "cab", "patterns": ["CS"], "metric": "byte_ppl",
            "better": "lower", "data": "bytes", "source": "arXiv", "presets": {},
        }
    },
}  # fmt: skip


class Parsed(HTMLParser):
    """Tags, ids and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        return [a["href"] for tag, a in self.tags if tag == "a" and "href" in a]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "in.parquet"
    rows = synthetic_rows(
        IMPLS[:9], (256, 65536), ("bfloat16", "float32"), ("NS", "CS"), ("fwd",), ("h100-sxm", "mystery"),
        runs=1, blocks=1, hostile=True,
    )  # fmt: skip
    write_parquet(rows, path)
    return path


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "site"
    build([source], folder, lambda: CATALOGUE)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Parsed]:
    return {
        path.relative_to(site).as_posix(): Parsed(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def test_there_is_a_page_for_everything(pages: dict[str, Parsed]) -> None:
    wanted = {
        "index.html", "leaderboard.html", "status.html", "hardware.html", "data.html", "404.html",
        "impl/performer.html", "impl/softmax.html", "task/lm.html", "gpu/h100-sxm.html", "gpu/mystery.html",
    }  # fmt: skip
    assert wanted <= set(pages)
    assert sum(name.startswith("run/") for name in pages) > 2


def test_every_link_and_anchor_resolves(site: Path, pages: dict[str, Parsed]) -> None:
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in page.links():
            if link.startswith(("http:", "https:")):
                continue
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), urllib.parse.unquote(path)))
            target = target if path else name
            if not (site / target).is_file():
                broken.append(f"{name} → {link}")
            known = pages[target].ids if target in pages else [anchor]
            if anchor and "=" not in anchor and urllib.parse.unquote(anchor) not in known:
                broken.append(f"{name} → {link}: no such anchor")
    assert not broken, broken[:10]


def test_ids_are_unique_on_every_page(pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        doubled = {i for i in page.ids if page.ids.count(i) > 1}
        assert not doubled, f"{name}: {doubled}"


def test_nothing_is_asked_of_another_host(pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        for tag, attributes in page.tags:
            for attribute in ("src", "href", "srcset", "action", "data"):
                value = attributes.get(attribute, "")
                if tag == "a" or not value:
                    continue
                assert not value.startswith(("http:", "https:", "//", "/")), f"{name}: {tag} asks for {value}"


def test_every_asset_that_a_page_loads_is_there(site: Path, pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        for tag, attributes in page.tags:
            wanted = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
            if wanted:
                assert (site / posixpath.dirname(name) / wanted).resolve().is_file(), f"{name}: {wanted}"


def test_text_from_rows_is_never_markup(pages: dict[str, Parsed]) -> None:
    assert any(HOSTILE in page.text for page in pages.values())
    for name, page in pages.items():
        assert all(tag != "img" for tag, _ in page.tags), name
        assert not any(a for _, found in page.tags for a in found if a.startswith("on")), name


def test_json_in_a_page_cannot_end_its_script(site: Path, pages: dict[str, Parsed]) -> None:
    for name in pages:
        text = (site / name).read_text(encoding="utf-8")
        for chunk in text.split('<script type="application/json"')[1:]:
            body = chunk.partition(">")[2].partition("</script>")[0]
            assert "<" not in body, name
            json.loads(body)


def test_tables_are_named_and_their_headings_scoped(pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        if name.startswith("docs/") or name == "method.html":
            continue  # prose: Markdown has no captions
        tables = sum(tag == "table" for tag, _ in page.tags)
        assert sum(tag == "caption" for tag, _ in page.tags) == tables, name
        assert all("scope" in found for tag, found in page.tags if tag == "th"), name


def test_every_page_says_what_it_is(pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        tags = [tag for tag, _ in page.tags]
        assert tags.count("h1") == 1, name
        assert tags.count("title") >= 1, name
        assert tags.count("main") == 1, name
        assert ("html", {"lang": "en"}) in page.tags, name


def test_times_on_the_first_page_are_those_of_the_rows(source: Path, pages: dict[str, Parsed]) -> None:
    shown = [
        float(a["data-v"])
        for tag, a in pages["index.html"].tags
        if tag == "td" and a.get("data-key") == "time_us" and a.get("data-v")
    ]
    measured = {row["time_us"] for row in read_rows([source]) if row["time_us"] is not None}
    assert shown == sorted(shown)
    assert len(shown) > 5
    assert set(shown) <= measured


def test_failed_rows_have_a_reason_and_no_time(pages: dict[str, Parsed]) -> None:
    for name in ("index.html", "leaderboard.html"):
        failed = False
        for tag, attributes in pages[name].tags:
            if tag == "tr":
                failed = attributes.get("data-status", "ok") != "ok"
            assert not (failed and attributes.get("data-key") == "time_us"), name
    assert "out of memory" in pages["status/h100-sxm-bf16.html"].text or any(
        "out of memory" in a.get("title", "") for _, a in pages["status/h100-sxm-bf16.html"].tags
    )


def test_an_unknown_device_and_mechanism_get_pages_from_their_rows(pages: dict[str, Parsed]) -> None:
    assert "not in the list of accelerators" in pages["gpu/mystery.html"].text
    assert "not part of the attnbench that built these pages" in pages["impl/softmax.html"].text
    assert "Random features." in pages["impl/performer.html"].text


def test_checksums_and_index_are_those_of_the_files(site: Path, pages: dict[str, Parsed]) -> None:
    text = pages["data.html"].text
    for name in ("data/results.parquet", "data/summary.csv"):
        assert hashlib.sha256((site / name).read_bytes()).hexdigest() in text
    index = json.loads((site / "data/index.json").read_text())
    for entry in index["slices"]:
        content = (site / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"]


def test_the_parquet_of_the_site_is_its_input(site: Path, source: Path) -> None:
    assert read_rows([site / "data/results.parquet"]) == read_rows([source])
    runs = sorted((site / "data/runs").glob("*.parquet"))
    assert sum(len(read_rows([path])) for path in runs) == len(read_rows([source]))


def test_a_first_visit_stays_within_200_kb(site: Path, pages: dict[str, Parsed]) -> None:
    for name in ("index.html", "leaderboard.html", "status.html", "data.html", "impl/softmax.html"):
        wanted = {name}
        for tag, attributes in pages[name].tags:
            asset = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
            if asset:
                wanted.add(posixpath.normpath(posixpath.join(posixpath.dirname(name), asset)))
        size = sum(len(gzip.compress((site / path).read_bytes(), mtime=0)) for path in wanted)
        assert size < 200_000, f"{name} loads {size} bytes compressed: {sorted(wanted)}"


# ---- building ------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_builds_are_byte_identical(make_row: MakeRow, tmp_path: Path) -> None:
    made = [make_row(block=b, n=n, m=n, time_us=t) for b in range(3) for n, t in ((256, 1e2), (512, 4e2))]
    write_parquet(made, tmp_path / "in.parquet")
    for name in ("a", "b"):
        build([tmp_path / "in.parquet"], tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_new_build_removes_what_the_last_one_wrote_and_nothing_else(
    make_row: MakeRow, tmp_path: Path
) -> None:
    write_parquet([make_row(), make_row(mechanism="gone", backend="torch")], tmp_path / "first.parquet")
    write_parquet([make_row(time_us=50.0)], tmp_path / "second.parquet")
    build([tmp_path / "first.parquet"], tmp_path / "site")
    assert (tmp_path / "site/impl/gone.html").is_file()
    (tmp_path / "site/CNAME").write_text("attnbench.example")
    build([tmp_path / "second.parquet"], tmp_path / "site")
    build([tmp_path / "second.parquet"], tmp_path / "fresh")
    again = files(tmp_path / "site")
    assert again.pop("CNAME") == b"attnbench.example"
    assert again == files(tmp_path / "fresh")


def test_an_empty_set_builds_and_says_so(tmp_path: Path) -> None:
    write_parquet([], tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    assert "No measured operation" in (tmp_path / "site/index.html").read_text()
    assert not list((tmp_path / "site").glob("impl/*"))


def test_one_row_that_failed_still_has_its_pages(make_row: MakeRow, tmp_path: Path) -> None:
    write_parquet([make_row(status="crashed", reason="signal 11")], tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    for page in ("index.html", "leaderboard.html", "impl/softmax.html"):
        assert "signal 11" in (tmp_path / "site" / page).read_text(), page


def test_invalid_results_are_refused_with_a_list_and_nothing_is_written(
    make_row: MakeRow, tmp_path: Path
) -> None:
    twice = [make_row(), make_row(time_us=9.0), make_row(environment="{}", block=1)]
    write_parquet(twice, tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="problems, expected none") as caught:
        build([tmp_path / "in.parquet"], tmp_path / "site")
    assert "environment" in str(caught.value)
    assert "the same measurement as" in str(caught.value)
    assert not (tmp_path / "site").exists()


def test_rows_of_a_newer_schema_are_refused(make_row: MakeRow, tmp_path: Path) -> None:
    write_parquet([make_row()], tmp_path / "in.parquet")
    table = pq.read_table(tmp_path / "in.parquet")
    newer = {**table.schema.metadata, b"attnbench_schema_version": str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(table.replace_schema_metadata(newer), tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="1 problem, expected none"):
        build([tmp_path / "in.parquet"], tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_catalogue_is_not_made_for_results_that_are_refused(make_row: MakeRow, tmp_path: Path) -> None:
    write_parquet([make_row(), make_row(time_us=9.0)], tmp_path / "in.parquet")
    asked: list[str] = []

    def catalogue() -> dict[str, Any]:
        asked.append("yes")
        return {}

    with pytest.raises(UsageError):
        build([tmp_path / "in.parquet"], tmp_path / "site", catalogue)
    assert not asked


def test_a_folder_that_is_no_site_is_left_alone(make_row: MakeRow, tmp_path: Path) -> None:
    write_parquet([make_row()], tmp_path / "in.parquet")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        build([tmp_path / "in.parquet"], tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_pages_of_one_name_are_an_error(tmp_path: Path) -> None:
    class Twice:
        def pages(self, data: SiteData) -> list[Page]:
            return [
                Page("404.html", "a", "404.html", {"root": ""}),
                Page("404.HTML", "b", "404.html", {"root": ""}),
            ]

    with pytest.raises(AttnbenchError, match=r"404\.HTML"):
        write(site_data([]), tmp_path, [Twice()])


@pytest.mark.parametrize(
    ("page", "target", "expected"),
    [
        ("index.html", "static/site.css", "static/site.css"),
        ("impl/a.html", "static/site.css", "../static/site.css"),
        ("run/x/a.html", "run/x.html#environment", "../x.html#environment"),
        ("impl/a.html", "#top", "#top"),
    ],
)
def test_urls_are_relative(page: str, target: str, expected: str) -> None:
    assert relative(page, target) == expected


def test_page_modules_are_listed_once() -> None:
    assert len({id(module) for module in MODULES}) == len(MODULES)
