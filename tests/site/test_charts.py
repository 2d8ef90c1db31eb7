"""Charts: every number is where it belongs, colour is never alone, and equal input gives equal bytes."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import altair
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.results import history
from attnbench.results.efficiency import Crossing
from attnbench.results.schema import Status
from attnbench.results.seeds import Score, scores
from attnbench.results.series import Panel, Point, Series
from attnbench.site import charts, draw, palette
from attnbench.site.figure import figure, inline, table_of

HOSTILE = "<img src=x onerror=alert(1)>"
LENGTHS = (256, 1024, 4096)
PANEL = Panel(
    "NS",
    (
        Series("softmax/flash", tuple(Point(n, n * n / 1000, n * n / 1001, n * n / 999) for n in LENGTHS)),
        Series("linear/torch", tuple(Point(n, 50 + n / 10) for n in LENGTHS)),
        Series("map/torch", (Point(256, 90.0), Point(1024, 1200.0)), (4096, Status.OOM)),
        Series(HOSTILE, (Point(256, 70.0), Point(1024, 80.0), Point(4096, 90.0))),
        Series("never/torch", (), (256, Status.OOM)),
    ),
    (("unsupported", 2),),
)
LOOKS = palette.looks([s.label for s in PANEL.series], "softmax/flash")


EXACT = {"exact/a": (40.0, 0.0), "exact/b": (60.0, 0.0)}
POINTS = {**EXACT, "p": (10.0, 0.5), "q": (20.0, 0.2), "r": (30.0, 0.4)}
ERROR_LOOKS = palette.looks(POINTS, "exact/a")


def _error_panel() -> Panel:
    return Panel(
        "NS", tuple(Series(s, (Point(x, y, x * 0.99, x * 1.01),)) for s, (x, y) in POINTS.items()), ()
    )


def _scores(make_row: Callable[..., dict[str, Any]]) -> list[Score]:
    from attnbench.results.aggregate import summarise

    rows = [
        make_row(
            scope="task", task="lm", suite="lm", direction="train", metric="ppl", metric_better="lower",
            metric_value=value + seed / 10, seed=seed, mechanism=name, backend="torch",
            control=name == "uniform",
        )
        for name, value in (("softmax", 4.0), ("lara", 5.0), ("uniform", 8.0))
        for seed in range(3)
    ]  # fmt: skip
    (table,) = scores(summarise(rows))
    return table


@pytest.fixture
def every_chart(make_row: Callable[..., dict[str, Any]]) -> dict[str, charts.Spec]:
    values = [100.0, 101.0, 99.5, 112.0, 111.0, 113.0]
    dates = [f"2026-11-0{day}T10:00:00+00:00" for day in range(1, 7)]
    found = {"linear/torch": Crossing("crosses", 900.0, 800.0, math.inf), HOSTILE: Crossing("always", 256.0)}
    task = _scores(make_row)
    line = ("x", "x", "x", "y", "y", "y")
    return {
        **{m.name: charts.scaling(PANEL, LOOKS, m, title=m.title) for m in charts.METRICS},
        "tradeoff": charts.tradeoff(_error_panel(), ERROR_LOOKS, title="errors"),
        "score": charts.tradeoff(_error_panel(), ERROR_LOOKS, higher=True, log=False, title="scores"),
        "profile": charts.performance_profile(
            {"a": [(1.0, 0.5), (2.0, 1.0)], "b": [(1.5, 0.5)]}, 2, palette.looks("ab", "a"), ["a"], "profile"
        ),
        "coverage": charts.coverage({"a": {"ok": 3, "oom": 1}, HOSTILE: {"error": 2}}, "coverage"),
        "crossings": charts.crossings(found, LENGTHS, LOOKS, "softmax/flash", "crossings"),
        "seeds": charts.seeds(task, palette.looks([s.label for s in task], "softmax/torch"), "seeds"),
        "timeline": charts.timeline(
            dates, values, line, history.levels(values), history.changes(values), title="time"
        ),
        "sparkline": charts.timeline(dates, values, line, [], [], title="time", small=True),
    }


def test_controls_stand_on_two_lines_and_a_score_of_zero_is_one(
    make_row: Callable[..., dict[str, Any]],
) -> None:
    table = [replace(s, value=0.0) if s.control else s for s in _scores(make_row)]
    spec = charts.seeds(
        [*table, replace(table[-1], label="no_mixing/torch", value=1.0)],
        palette.looks([s.label for s in table], "softmax/torch"),
        "seeds",
    )
    assert spec["datasets"]["controls"] == [
        {"s": "uniform/torch", "x": 0.0, "line": 0},
        {"s": "no_mixing/torch", "x": 1.0, "line": 1},
    ]


# ---- palette -------------------------------------------------------------------------------------------


def _linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted(
        (sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), _linear(x), strict=True)) for x in (a, b)),
        reverse=True,
    )
    return (light + 0.05) / (dark + 0.05)


SIGHT = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.01182, 0.04294, 0.968881),
    ),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.3039),
    ),
}
"""Linear RGB as seen: Machado, Oliveira and Fernandes 2009, severity 1."""


def _lab(colour: str, sight: str) -> list[float]:
    rgb = [
        min(1.0, max(0.0, sum(w * c for w, c in zip(row, _linear(colour), strict=True))))
        for row in SIGHT[sight]
    ]
    to_xyz = (
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.072175),
        (0.0193339, 0.119192, 0.9503041),
    )
    xyz = [
        sum(w * c for w, c in zip(row, rgb, strict=True)) / white
        for row, white in zip(to_xyz, (0.95047, 1.0, 1.08883), strict=True)
    ]
    f = [x ** (1 / 3) if x > 216 / 24389 else (24389 / 27 * x + 16) / 116 for x in xyz]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_series_stand_out_from_the_paper_and_text_is_readable(theme: dict[str, str]) -> None:
    assert all(_contrast(theme[str(i)], theme["paper"]) >= 3.0 for i in range(1, 8))
    assert _contrast(theme["ink"], theme["paper"]) >= 7.0
    assert _contrast(theme["dim"], theme["paper"]) >= 4.5


@pytest.mark.parametrize("sight", list(SIGHT))
@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_series_stay_apart_for_every_kind_of_sight(theme: dict[str, str], sight: str) -> None:
    colours = [_lab(theme[str(i)], sight) for i in range(1, 8)]
    nearest = min(math.dist(a, b) for a, b in itertools.combinations(colours, 2))
    assert nearest >= 13.0


def test_77_series_differ_in_colour_or_shape_and_the_baseline_from_all() -> None:
    found = palette.looks([f"s{i}" for i in range(78)], "s5")
    assert len(set(found.values())) == 78
    assert found["s5"].colour == palette.INK
    assert sum(look.colour == palette.INK for look in found.values()) == 1


def test_both_themes_define_every_colour() -> None:
    text = palette.css()
    for name in palette.LIGHT:
        assert text.count(f"--chart-{name}:{palette.DARK[name]};") == 2
        assert f"--light-{name}:{palette.LIGHT[name]};" in text


# ---- specs ---------------------------------------------------------------------------------------------


def test_every_spec_is_valid_vega_lite(every_chart: dict[str, charts.Spec]) -> None:
    kinds = ("time", "tradeoff", "profile", "coverage", "crossings", "seeds", "timeline")
    for kind in kinds:
        altair.LayerChart.from_dict(every_chart[kind])  # raises on a spec that the schema refuses
    assert all(json.dumps(spec, allow_nan=False) for spec in every_chart.values())


def test_a_curve_has_every_point_and_its_interval() -> None:
    data = charts.scaling(PANEL, LOOKS, charts.METRIC["time"])["datasets"]
    drawn = [(r["s"], r["x"], r["y"]) for r in data["points"]]
    assert drawn == [(s.label, p.x, pytest.approx(p.y, rel=1e-5)) for s in PANEL.series for p in s.points]
    assert [(r["lo"], r["hi"]) for r in data["points"] if "lo" in r] == [
        (pytest.approx(n * n / 1001, rel=1e-5), pytest.approx(n * n / 999, rel=1e-5)) for n in LENGTHS
    ]


def test_out_of_memory_is_marked_at_the_last_length_reached() -> None:
    ends = charts.scaling(PANEL, LOOKS, charts.METRIC["time"])["datasets"]["ends"]
    assert ends == [{"s": "map/torch", "x": 1024, "y": 1200.0, "why": "map/torch: out of memory at 4k"}]


def test_guides_have_slopes_one_and_two() -> None:
    lines = charts.scaling(PANEL, LOOKS, charts.METRIC["time"])["datasets"]["guides"]
    for name, slope in (("N¹", 1.0), ("N²", 2.0)):
        a, b = (r for r in lines if r["g"] == name)
        assert math.log(b["y"] / a["y"]) / math.log(b["x"] / a["x"]) == pytest.approx(slope, rel=1e-4)
    assert charts.scaling(PANEL, LOOKS, charts.METRIC["error"])["datasets"]["guides"] == []


def test_the_baseline_and_what_reaches_furthest_is_in_colour() -> None:
    assert charts.highlighted(PANEL, LOOKS, limit=2) == ["softmax/flash", HOSTILE, "linear/torch"]


def test_the_front_is_named_and_exact_ones_stand_apart() -> None:
    data = charts.tradeoff(_error_panel(), ERROR_LOOKS, title="t")["datasets"]
    assert {r["s"]: r["front"] for r in data["points"]} == {"p": True, "q": True, "r": False}
    assert [r["s"] for r in data["exact"]] == ["exact/a", "exact/b"]
    assert [(r["lo"], r["hi"]) for r in data["band"]] == [(39.6, 40.4)]
    assert sorted(r["s"] for r in data["labels"]) == ["p", "q"]


def test_the_front_of_a_score_prefers_higher_values() -> None:
    points = (("a", 1, 0.5), ("b", 2, 0.9), ("c", 3, 0.7))
    panel = Panel("NS", tuple(Series(s, (Point(x, y),)) for s, x, y in points), ())
    data = charts.tradeoff(panel, palette.looks("abc", ""), higher=True, log=False)["datasets"]
    assert [r["s"] for r in data["points"] if r["front"]] == ["a", "b"]


def test_bars_of_a_status_add_up() -> None:
    records = charts.coverage({"a": {"ok": 3, "oom": 1}})["datasets"]["points"]
    assert [(r["status"], r["x"], r["x2"]) for r in records] == [("ok", 0, 3), ("oom", 3, 4)]


def test_rules_stand_where_the_software_changes(every_chart: dict[str, charts.Spec]) -> None:
    data = every_chart["timeline"]["datasets"]
    assert data["rules"] == [{"x": 2.5, "software": "x → y"}]
    assert [(r["x"], r["sign"]) for r in data["changes"]] == [(3, "▲")]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 200), max_size=14).map(sorted))
def test_labels_do_not_overlap_and_stay_inside_where_they_fit(places: list[float]) -> None:
    found = charts.spread(places, 13.0, 0.0, 200.0)
    assert all(b - a >= 13.0 - 1e-9 for a, b in itertools.pairwise(found))
    assert all(-1e-9 <= place <= 200.0 + 1e-9 for place in found)


def test_labels_that_need_no_room_are_not_moved() -> None:
    assert charts.spread([0.0, 50.0, 100.0], 13.0, 0.0, 100.0) == [0.0, 50.0, 100.0]


@pytest.mark.parametrize(("low", "high", "base"), [(10, 1e5, 10), (90, 130, 10), (1, 2**40, 2), (3, 4, 10)])
def test_ticks_lie_inside_and_are_few(low: float, high: float, base: int) -> None:
    found = charts.ticks(low, high, base)
    assert len(found) <= 8
    assert all(low <= tick <= high for tick in found)


# ---- drawings ------------------------------------------------------------------------------------------


def test_a_drawing_is_named_themed_and_the_same_twice(every_chart: dict[str, charts.Spec]) -> None:
    for name in ("time", "tradeoff", "coverage", "crossings"):
        spec = every_chart[name]
        text = draw.svg(spec, f"id-{name}")
        assert text == draw.svg(spec, f"id-{name}")
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        assert root[0].text == spec["title"]
        assert root[1].text == spec["description"]
        assert "var(--chart-" in text
        assert not re.search(r'(?:fill|stroke)="(?:#|black)', text), "a colour that no theme can change"
        assert all(i.startswith(f"id-{name}-") for i in re.findall(r'\bid="([^"]+)"', text))


def test_names_from_data_are_text_in_a_drawing() -> None:
    text = draw.svg(charts.scaling(PANEL, LOOKS, charts.METRIC["time"], title=HOSTILE), "x")
    assert "<img" not in text
    assert HOSTILE in "".join(ET.fromstring(text).itertext())


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    draw._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"vl-convert-python.*attnbench\[site\]"):
        draw.svg({"title": "", "description": ""}, "x")
    draw._library.cache_clear()


# ---- tables --------------------------------------------------------------------------------------------


def test_the_table_under_a_curve_has_the_values_of_the_chart() -> None:
    spec = charts.scaling(PANEL, LOOKS, charts.METRIC["time"], title="t")
    table = table_of(spec)
    assert table.head == ("impl (time of a call, µs)", "N = 256", "N = 1024", "N = 4096")
    shown = {line[0].value: [cell.value for cell in line[1:]] for line in table.lines}
    assert shown["map/torch"] == [90.0, 1200.0, ""]
    assert shown["linear/torch"] == [pytest.approx(50 + n / 10, rel=1e-5) for n in LENGTHS]


def test_the_table_under_points_says_what_is_on_the_front() -> None:
    table = table_of(charts.tradeoff(_error_panel(), ERROR_LOOKS, title="t"))
    lines = [[cell.text for cell in line] for line in table.lines]
    assert table.head[-1] == "on the front"
    assert lines == [
        ["p", "10.00", "0.5000", "yes"],
        ["q", "20.00", "0.2000", "yes"],
        ["r", "30.00", "0.4000", "no"],
    ]


def test_a_spec_cannot_leave_its_script_element() -> None:
    found = figure(charts.scaling(PANEL, LOOKS, charts.METRIC["time"], title="</script><b>"), "x")
    assert not set("<>&") & set(found.spec)
    assert json.loads(found.spec)["title"] == "</script><b>"
    assert inline({"a": "<&>"}) == '{"a":"\\u003c\\u0026\\u003e"}'
