"""What figures show: points, ends and gaps equal to the rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.results.aggregate import summarise
from attnbench.results.schema import Status
from attnbench.results.series import Point, Series, fidelity, pareto, scaling


def test_curves_ascend_and_carry_their_intervals(make_row):
    rows = [make_row(n=n, block=b, time_us=n + b) for n in (1024, 256) for b in range(3)]
    (figure,) = scaling(summarise(rows))
    ((curve,),) = [panel.series for panel in figure.panels]
    assert [p.x for p in curve.points] == [256, 1024]
    assert [p.y for p in curve.points] == [257.0, 1025.0]
    assert all(p.lo < p.y < p.hi for p in curve.points)
    assert curve.end is None
    assert (figure.x, figure.title) == ("n", "cpu · bert_base · float32 · fwd")


@pytest.mark.parametrize("status", [Status.OOM, Status.TIMEOUT])
def test_a_curve_ends_at_the_first_length_that_failed(make_row, status):
    rows = [
        make_row(n=256),
        make_row(n=1024, status=status),
        make_row(n=512, status=status),
        make_row(n=2048, status="skipped"),
    ]
    (figure,) = scaling(summarise(rows))
    (curve,) = figure.panels[0].series
    assert len(curve.points) == 1
    assert curve.end == (512, status)
    assert figure.panels[0].not_drawn == ()


def test_what_has_no_point_is_counted_by_status(make_row):
    rows = [
        make_row(),
        make_row(backend="a", status="unsupported"),
        make_row(backend="b", status="unsupported"),
        make_row(backend="c", status="incorrect"),
        make_row(backend="d", mem_peak_bytes=0),
    ]
    assert scaling(summarise(rows))[0].panels[0].not_drawn == (("incorrect", 1), ("unsupported", 2))
    memory = scaling(summarise(rows), "mem_peak_bytes")[0].panels[0]
    assert memory.not_drawn == (("incorrect", 1), ("no value", 1), ("unsupported", 2))


def test_a_panel_a_pattern_in_fixed_order_and_a_figure_a_sweep(make_row):
    rows = [make_row(pattern=p) for p in ("CC", "NS", "CS")] + [
        make_row(dtype="bfloat16"),
        make_row(workload="vit"),
    ]
    figures = scaling(summarise(rows))
    assert [[panel.pattern for panel in f.panels] for f in figures] == [["NS"], ["NS", "CS", "CC"], ["NS"]]
    assert len({f.name for f in figures}) == 3


def test_keys_are_the_length_where_queries_are_fixed(make_row):
    (figure,) = scaling(summarise([make_row(n=1, m=m, pattern="NC") for m in (256, 512)]))
    assert figure.x == "m"
    assert [p.x for p in figure.panels[0].series[0].points] == [256, 512]


def test_a_sweep_without_any_value_is_no_figure(make_row):
    assert scaling(summarise([make_row(status="oom")])) == []
    assert scaling([]) == []


def test_names_are_fit_for_files(make_row):
    (figure,) = scaling(summarise([make_row(workload="../a b/ü|")]))
    assert "/" not in figure.name
    assert " " not in figure.name


def approximation(make_row, mechanism, n, error, **columns):
    return make_row(
        mechanism=mechanism, backend="torch", exact=False, n=n, approx_err_gaussian=error, **columns
    )


def test_fidelity_is_taken_where_most_impls_are_and_furthest(make_row):
    rows = [
        *[make_row(n=n) for n in (256, 512)],
        *[approximation(make_row, "a", n, 0.1, time_us=10.0) for n in (256, 512, 1024)],
        *[approximation(make_row, "b", n, 0.2) for n in (256, 512)],
        approximation(make_row, "c", 512, 0.3, direction="fwd_bwd"),
        approximation(make_row, "d", 512, None),
        make_row(mechanism="e", exact=False, n=512, status="oom"),
    ]
    (figure,) = fidelity(summarise(rows))
    assert figure.title.endswith("N=512")
    (panel,) = figure.panels
    assert {s.label: (s.points[0].x, s.points[0].y) for s in panel.series} == {
        "softmax/sdpa_flash": (100.0, 0.0),
        "a/torch": (10.0, 0.1),
        "b/torch": (100.0, 0.2),
    }
    assert panel.not_drawn == (("no value", 1), ("oom", 1))


def test_fidelity_of_a_sweep_over_keys_is_taken_at_one_number_of_keys(make_row):
    rows = [
        approximation(make_row, mechanism, 1, 0.1, m=m, pattern="NC")
        for mechanism in ("a", "b")
        for m in (64, 128)
    ]
    (figure,) = fidelity(summarise(rows))
    assert figure.title.endswith("M=128")
    assert [series.label for series in figure.panels[0].series] == ["a/torch", "b/torch"]


def test_exact_mechanisms_alone_are_no_fidelity_figure(make_row):
    assert fidelity(summarise([make_row()])) == []


def test_pareto_front_by_hand():
    points = [Point(1, 5), Point(2, 6), Point(3, 3), Point(3, 4), Point(4, 3), Point(9, 1)]
    assert pareto(points) == [Point(1, 5), Point(3, 3), Point(9, 1)]


@given(st.lists(st.builds(Point, st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_pareto_front_is_what_no_other_point_beats(points):
    def beats(a, b):
        return a.x <= b.x and a.y <= b.y and (a.x, a.y) != (b.x, b.y)

    front = {(p.x, p.y) for p in pareto(points)}
    assert front == {(p.x, p.y) for p in points if not any(beats(q, p) for q in points)}


def test_series_are_values():
    assert Series("a", (Point(1, 2),)) == Series("a", (Point(1, 2),))
