"""Steps are found where they were made, and the feed is valid Atom with ids that stay."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from attnbench.results.rows import Row, canonical
from attnbench.site.build import write
from attnbench.site.page import site_data
from attnbench.site.pages import history as page
from attnbench.site.views import history
from attnbench.site.views.feed import feed
from tests.site.synthetic import HOSTILE, IMPLS, Impl, synthetic_rows

ATOM = "{http://www.w3.org/2005/Atom}"
CHOSEN = (IMPLS[0], IMPLS[3], IMPLS[4])
"""softmax/sdpa_flash, and the two whose speed changes."""
LENGTHS = (1024, 16384)


def _rows(runs: int, blocks: int = 3, extra: tuple[Impl, ...] = ()) -> list[Row]:
    return canonical(
        synthetic_rows(
            (*CHOSEN, *extra), LENGTHS, ("bfloat16",), ("NS",), ("fwd",), ("h100-sxm",),
            runs=runs, blocks=blocks, tasks=False,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return _rows(12)


@pytest.fixture(scope="module")
def events(rows: list[Row]) -> list[history.Event]:
    return history.events(history.all_series(rows))


def test_each_step_is_found_once_where_it_was_made(rows: list[Row], events: list[history.Event]) -> None:
    runs = sorted({row["run_id"] for row in rows})
    assert [(e.impl, e.word, e.run_id) for e in events] == [
        ("performer/torch", "faster", runs[9]),
        ("nystromformer/triton", "slower", runs[6]),
    ]
    assert [len(e.steps) for e in events] == [2, 2]
    assert [e.extent for e in events] == ["8 %", "12 %"]
    assert [e.new_software for e in events] == [False, True]


def test_three_blocks_propose_and_eight_confirm() -> None:
    for blocks, confirmed in ((3, 0), (8, 2)):
        found = history.events(history.all_series(_rows(8, blocks)))
        assert [e.confirmed for e in found if e.impl == "nystromformer/triton"] == [confirmed]


def test_too_few_runs_are_no_series() -> None:
    assert history.all_series(_rows(5)) == []
    assert len(history.all_series(_rows(6))) == len(CHOSEN) * len(LENGTHS)


def test_a_run_with_a_failed_block_does_not_count(rows: list[Row]) -> None:
    first = rows[0]
    broken = [
        {**row, "status": "error", "reason": "it broke", "time_us": None} if row is first else row
        for row in rows
    ]
    lengths = {s.case_key: len(s.runs) for s in history.all_series(broken)}
    assert lengths[first["case_key"]] == 11
    assert sorted(lengths.values())[1:] == [12] * (len(lengths) - 1)


def test_the_feed_is_valid_atom(events: list[history.Event]) -> None:
    root = ET.fromstring(feed(events, "2026-11-24T10:00:00+00:00", "https://example.org/bench/"))
    assert root.tag == f"{ATOM}feed"
    for node in (root, *root.findall(f"{ATOM}entry")):
        assert node.findtext(f"{ATOM}title")
        assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", node.findtext(f"{ATOM}id") or "")
        stamp = node.findtext(f"{ATOM}updated") or ""
        assert datetime.fromisoformat(stamp).utcoffset() is not None
        assert all(link.get("href") for link in node.findall(f"{ATOM}link"))
    assert root.findtext(f"{ATOM}author/{ATOM}name")
    assert [link.get("href") for link in root.findall(f"{ATOM}link[@rel='self']")] == [
        "https://example.org/bench/feed.xml"
    ]
    dates = [entry.findtext(f"{ATOM}updated") or "" for entry in root.findall(f"{ATOM}entry")]
    assert dates == sorted(dates, reverse=True)
    assert len({node.text for node in root.iter(f"{ATOM}id")}) == 1 + len(events)


def test_an_entry_leads_to_its_place_on_the_page(rows: list[Row], tmp_path: Path) -> None:
    write(site_data(rows), tmp_path, [page])
    text = (tmp_path / "history.html").read_text()
    root = ET.fromstring((tmp_path / "feed.xml").read_bytes())
    for link in root.findall(f"{ATOM}entry/{ATOM}link"):
        file, _, anchor = (link.get("href") or "").partition("#")
        assert file == "history.html"
        assert f'id="{anchor}"' in text


def test_ids_stay_when_runs_and_cases_are_added(events: list[history.Event], rows: list[Row]) -> None:
    fewer = [row for row in rows if row["n"] == LENGTHS[0]]
    known = {(e.impl, e.word): e.id for e in events}
    assert {(e.impl, e.word): e.id for e in history.events(history.all_series(fewer))} == known
    assert feed(events, "2026-11-24T10:00:00+00:00") == feed(events, "2026-11-24T10:00:00+00:00")


def test_rules_stand_at_changes_of_software_in_the_chart(events: list[history.Event]) -> None:
    spec = page.chart_of(events[1].steps[0].series)
    assert [rule["x"] for rule in spec["datasets"]["rules"]] == [5.5]
    assert [mark["x"] for mark in spec["datasets"]["changes"]] == [6]


def test_a_hostile_name_is_text_in_page_and_feed(tmp_path: Path) -> None:
    hostile = Impl("nystromformer", HOSTILE, "user", 1, 0.2, 60.0, 0.5, ("NS",))
    write(site_data(_rows(8, extra=(hostile,))), tmp_path, [page])
    assert "<img" not in (tmp_path / "history.html").read_text()
    titles = [node.text or "" for node in ET.parse(tmp_path / "feed.xml").iter(f"{ATOM}title")]
    assert any(HOSTILE in title for title in titles)


@pytest.mark.parametrize(("runs", "words"), [(0, "No case was measured"), (2, "No case was measured")])
def test_without_a_history_the_page_says_so(runs: int, words: str, tmp_path: Path) -> None:
    write(site_data(_rows(runs) if runs else []), tmp_path, [page])
    assert words in (tmp_path / "history.html").read_text()
    assert ET.parse(tmp_path / "feed.xml").getroot().findall(f"{ATOM}entry") == []
