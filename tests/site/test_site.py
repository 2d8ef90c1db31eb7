"""The site from rows to pages: values equal the Parquet's, failures stay visible, hostile text is inert."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import UsageError
from attnbench.results.read import rows as read_rows
from attnbench.results.store import write_parquet
from attnbench.site import views
from attnbench.site.build import build
from attnbench.site.serve import serve

MakeRow = Callable[..., dict[str, Any]]
HOSTILE = '<img src=x onerror="alert(1)">'


class _Text(HTMLParser):
    """Tags and text of a page; fails on markup that came from data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> _Text:
    page = _Text()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture
def sweep(make_row: MakeRow) -> list[dict[str, Any]]:
    return [
        make_row(time_us=100.0),
        make_row(backend="torch", impl="softmax/torch", time_us=50.0, flags=["load: observed 3, limit 2"]),
        make_row(mechanism="lara", backend="torch", family="linear", exact=False, time_us=25.0,
                 approx_err_recorded=0.5),
        make_row(mechanism="abc", backend="torch", family="linear", status="oom", reason="no memory here"),
        make_row(n=512, time_us=400.0),
        make_row(scope="task", task="lm", suite="lm", direction="train", metric="byte_ppl", metric_value=4.0,
                 metric_better="lower", seed=0),
        make_row(scope="task", task="lm", suite="lm", direction="train", metric="byte_ppl", metric_value=5.0,
                 metric_better="lower", seed=1),
    ]  # fmt: skip


def test_sections_rank_by_time_and_keep_failures_last(sweep: list[dict[str, Any]]) -> None:
    section = next(s for s in views.sections(sweep) if s.facets["n"] == "256")
    assert [(e.mechanism, e.backend) for e in section.entries] == [
        ("lara", "torch"), ("softmax", "torch"), ("softmax", "sdpa_flash"), ("abc", "torch"),
    ]  # fmt: skip
    assert [e.cells[1].text for e in section.entries[:3]] == ["4.00", "2.00", "1.00"]
    failed = section.entries[-1]
    assert (failed.failed, failed.status, failed.reason, failed.cells) == (
        True,
        "oom",
        "no memory here",
        (),
    )


def test_a_single_block_has_a_place_but_no_rank(sweep: list[dict[str, Any]]) -> None:
    section = next(s for s in views.sections(sweep) if s.facets["n"] == "256")
    assert [e.rank for e in section.entries] == ["~1", "~2", "~3", "–"]
    assert "preliminary" in section.subtitle


def test_three_blocks_with_overlapping_intervals_tie(make_row: MakeRow) -> None:
    times = {
        "torch": (100.0, 101.0, 102.0),
        "sdpa_math": (100.5, 101.5, 102.5),
        "reference": (300.0, 301.0, 302.0),
    }
    rows = [
        make_row(backend=backend, impl=f"softmax/{backend}", block=block, time_us=time)
        for backend, values in times.items()
        for block, time in enumerate(values)
    ]
    assert [e.rank for e in views.sections(rows)[0].entries] == ["1–2", "1–2", "3"]


def test_fidelity_is_shown_for_approximations_only(sweep: list[dict[str, Any]]) -> None:
    cells = {e.mechanism: e.cells[6].text for e in views.sections(sweep)[0].entries if not e.failed}
    assert cells == {"lara": "50.0", "softmax": "–"}


def test_task_table_has_the_mean_over_seeds(sweep: list[dict[str, Any]]) -> None:
    (table,) = views.task_tables(sweep)
    assert (table.metric, table.better) == ("byte_ppl", "lower")
    assert [(e.impl, e.value, e.seeds) for e in table.entries] == [("softmax/sdpa_flash", "4.5", 2)]


def test_matrix_has_one_cell_per_case_and_blanks_elsewhere(sweep: list[dict[str, Any]]) -> None:
    (matrix,) = views.matrices(sweep)
    cells = {row["impl"]: row["cells"] for row in matrix["rows"]}
    assert matrix["columns"] == [256, 512]
    assert [c and c["letter"] for c in cells["softmax/sdpa_flash"]] == ["✓", "✓"]
    assert [c and c["letter"] for c in cells["abc/torch"]] == ["M", None]
    assert "no memory here" in cells["abc/torch"][0]["title"]


def test_the_pages_hold_the_numbers_of_the_parquet(sweep: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(sweep, tmp_path / "in.parquet")
    assert build([tmp_path / "in.parquet"], tmp_path / "site") == 3
    page = parsed(tmp_path / "site/index.html")
    keys = {float(a["data-sort"] or 0) for tag, a in page.tags if tag == "td" and a.get("style")}
    measured = {row["time_us"] for row in read_rows([tmp_path / "in.parquet"]) if row["time_us"] is not None}
    assert keys == measured
    assert "no memory here" in page.text


def test_pages_need_nothing_from_elsewhere(sweep: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(sweep, tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    for path in (tmp_path / "site").glob("*.html"):
        for _, attributes in parsed(path).tags:
            for name in ("href", "src"):
                target = attributes.get(name) or ""
                assert not target.startswith(("http:", "https:", "//")), f"{path.name} asks for {target}"
                if target and not target.startswith("#"):
                    assert (path.parent / target.partition("#")[0]).is_file(), (
                        f"{path.name} links to {target}"
                    )


def test_two_builds_are_byte_identical(sweep: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(sweep, tmp_path / "in.parquet")
    for name in ("a", "b"):
        build([tmp_path / "in.parquet"], tmp_path / name)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_hostile_names_and_reasons_are_text(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [
        make_row(mechanism=HOSTILE, workload=HOSTILE, flags=[f"{HOSTILE}: observed"]),
        make_row(mechanism=HOSTILE, backend="torch", workload=HOSTILE, status="error", reason=HOSTILE),
    ]
    write_parquet(rows, tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    for path in (tmp_path / "site").glob("*.html"):
        assert all(tag != "img" for tag, _ in parsed(path).tags)
    assert HOSTILE in parsed(tmp_path / "site/index.html").text


def test_an_empty_set_builds_and_says_so(tmp_path: Path) -> None:
    write_parquet([], tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    assert "No rows." in parsed(tmp_path / "site/index.html").text


def test_invalid_results_are_refused_and_nothing_is_written(make_row: MakeRow, tmp_path: Path) -> None:
    write_parquet([make_row(), make_row(time_us=9.0)], tmp_path / "in.parquet")  # one key, two times
    with pytest.raises(UsageError, match="problems"):
        build([tmp_path / "in.parquet"], tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_folder_that_is_no_site_is_left_alone(sweep: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(sweep, tmp_path / "in.parquet")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        build([tmp_path / "in.parquet"], tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_serving_a_folder_without_a_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"index\.html"):
        serve(tmp_path, 0, print)


def test_serve_answers_on_the_loopback_interface(sweep: list[dict[str, Any]], tmp_path: Path) -> None:
    write_parquet(sweep, tmp_path / "in.parquet")
    build([tmp_path / "in.parquet"], tmp_path / "site")
    said: list[str] = []
    ready = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        ready.set()

    threading.Thread(target=serve, args=(tmp_path / "site", 0, say), daemon=True).start()
    assert ready.wait(10)
    address = said[0].split()[0]
    with urllib.request.urlopen(address) as answer:
        assert b"<h1>" in answer.read()
