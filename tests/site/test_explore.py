"""Explore: fronts and crossings equal an independent computation, and what is drawn equals the rows."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from attnbench.results.rows import Row, canonical
from attnbench.site.build import write
from attnbench.site.page import Asset, Page, SiteData, site_data
from attnbench.site.pages import explore as pages
from attnbench.site.views import explore
from tests.site.synthetic import HOSTILE, IMPLS, synthetic_rows

LENGTHS = (256, 1024, 4096, 16384, 65536)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return canonical(
        synthetic_rows(IMPLS, LENGTHS, ("bfloat16",), ("NS",), ("fwd",), ("h100-sxm",), runs=1, hostile=True)
    )


@pytest.fixture(scope="module")
def data(rows: list[Row]) -> SiteData:
    return site_data(rows)


@pytest.fixture(scope="module")
def view(data: SiteData) -> explore.View:
    ((sweep, group),) = explore.sweeps(data.current).items()
    return explore.view(sweep, group, data.tasks)


def _medians(rows: list[Row], n: int) -> dict[str, float]:
    """Median over blocks of each impl that is ok in all of them, straight from the rows."""
    found: dict[str, list[float]] = {}
    failed = set()
    for row in rows:
        if row["scope"] == "op" and row["n"] == n:
            window = "window=512" in row["hyper"].replace('"', "").replace(": ", "=")
            label = row["impl"] + (" window=512" if window else "")
            if row["status"] == "ok":
                found.setdefault(label, []).append(row["time_us"])
            else:
                failed.add(label)
    return {label: sorted(times)[1] for label, times in found.items() if label not in failed}


def _errors(rows: list[Row], n: int) -> dict[str, float | None]:
    found = {}
    for row in rows:
        if row["scope"] == "op" and row["n"] == n and row["status"] == "ok":
            suffix = " window=512" if "512" in row["hyper"] else ""
            found[row["impl"] + suffix] = 0.0 if row["exact"] else row["approx_err_recorded"]
    return found


def test_curves_hold_the_medians_of_the_rows(rows: list[Row], view: explore.View) -> None:
    (spec,) = view.curves["time"]
    for n in LENGTHS:
        drawn = {r["s"]: r["y"] for r in spec["datasets"]["points"] if r["x"] == n}
        expected = _medians(rows, n)
        assert drawn == {s: pytest.approx(t, rel=1e-5) for s, t in expected.items()}


@pytest.mark.parametrize("n", LENGTHS)
def test_the_front_is_what_no_other_beats(rows: list[Row], view: explore.View, n: int) -> None:
    times, errors = _medians(rows, n), _errors(rows, n)
    approximate = {s: (times[s], errors[s]) for s in times if errors[s]}
    beaten = {
        a
        for a, b in itertools.permutations(approximate, 2)
        if all(y <= x for x, y in zip(approximate[a], approximate[b], strict=True))
    }
    (spec,) = view.errors["recorded"][str(n)]
    drawn = {r["s"]: r["front"] for r in spec["datasets"]["points"]}
    assert drawn == {s: s not in beaten for s in approximate}
    assert {r["s"] for r in spec["datasets"]["exact"]} == {s for s in times if errors[s] == 0.0}


def test_crossings_are_where_straight_lines_in_log_log_meet(rows: list[Row], view: explore.View) -> None:
    (spec,) = view.crossings
    base = {n: _medians(rows, n)["softmax/sdpa_flash"] for n in LENGTHS}
    for record in spec["datasets"]["points"]:
        curve = {n: times[record["s"]] for n in LENGTHS if record["s"] in (times := _medians(rows, n))}
        lengths = sorted(curve)
        gaps = [math.log(curve[n] / base[n]) for n in lengths]
        last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
        if last is None:
            assert record["side"] == "always"
        elif last == len(lengths) - 1:
            assert record["side"] == "never"
        else:
            a, b = math.log(lengths[last]), math.log(lengths[last + 1])
            expected = math.exp(a + (b - a) * gaps[last] / (gaps[last] - gaps[last + 1]))
            assert record["x"] == pytest.approx(expected, rel=1e-4)
            assert record["lo"] <= record["x"] <= record["hi"]


def test_times_over_the_baseline_are_one_for_the_baseline(rows: list[Row], view: explore.View) -> None:
    (spec,) = view.curves["ratio"]
    found = {(r["s"], r["x"]): r["y"] for r in spec["datasets"]["points"]}
    times = _medians(rows, 4096)
    assert {found["softmax/sdpa_flash", n] for n in LENGTHS} == {1.0}
    expected = times["performer/torch"] / times["softmax/sdpa_flash"]
    assert found["performer/torch", 4096] == pytest.approx(expected, rel=1e-5)


def test_scores_stand_against_times_of_the_same_pattern(view: explore.View) -> None:
    assert set(view.tasks) == {"recall"}  # lm is causal, and only NS was timed
    (spec,) = view.tasks["recall"]["4096"]
    best = max(spec["datasets"]["points"], key=lambda r: r["y"])
    assert best["front"]


def test_the_first_view_is_on_the_page_and_every_other_in_its_file(data: SiteData, tmp_path: Path) -> None:
    write(data, tmp_path, [pages])
    text = (tmp_path / "explore.html").read_text()
    config = json.loads(re.search(r'id="config">(.*?)</script>', text).group(1))  # type: ignore[union-attr]
    assert [s["gpu"] for s in config["sweeps"]] == ["h100-sxm"]
    assert all((tmp_path / s["file"]).is_file() for s in config["sweeps"])
    assert text.count('<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img"') == 3
    assert "<img" not in text
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in text


def test_the_table_on_the_page_has_the_values_of_the_rows(
    rows: list[Row], data: SiteData, tmp_path: Path
) -> None:
    write(data, tmp_path, [pages])
    text = (tmp_path / "explore.html").read_text()
    (line,) = re.findall(
        r'<tr><th scope="row" data-v="performer/torch">.*?</tr>', text.partition("h-tradeoff")[0]
    )
    values = [float(v) for v in re.findall(r'<td class="num" data-v="([^"]+)"', line)]
    assert values == [pytest.approx(_medians(rows, n)["performer/torch"], rel=1e-5) for n in LENGTHS]


def test_files_are_named_by_their_content(data: SiteData) -> None:
    first = {i.path: i.content for i in pages.pages(data) if isinstance(i, Asset)}
    again = {i.path: i.content for i in pages.pages(data) if isinstance(i, Asset)}
    assert first == again
    (path,) = first
    assert first[path].decode().startswith(f'attnbench.receive("{path}",')


@pytest.mark.parametrize("rows", [[], ["task"]])
def test_without_operations_the_page_says_so(rows: list[Any], tmp_path: Path, make_row: Any) -> None:
    made = [make_row(scope="task", direction="train", task="lm", metric_value=1.0) for _ in rows]
    write(site_data(canonical(made)), tmp_path, [pages])
    assert "No rows of operations yet" in (tmp_path / "explore.html").read_text()


def test_one_row_is_drawn(tmp_path: Path, make_row: Any) -> None:
    found = list(pages.pages(site_data(canonical([make_row(tflops=1.0)]))))
    (page,) = [item for item in found if isinstance(item, Page)]
    assert len(page.context["curves"]) == 1
    assert page.context["crossings"] == []
