"""Figures: what is drawn equals the series, in files that a paper can take."""

import subprocess
import sys

import pytest

from attnbench import UsageError
from attnbench.results import figures
from attnbench.results import series as data
from attnbench.results.aggregate import summarise


@pytest.fixture
def rows(make_row):
    found = []
    for pattern in ("NS", "CS"):
        for n in (256, 512, 1024):
            found += [make_row(pattern=pattern, n=n, block=b, time_us=n * (1 + b / 50)) for b in range(3)]
            found.append(
                make_row(
                    pattern=pattern,
                    n=n,
                    mechanism="performer",
                    backend="torch",
                    exact=False,
                    approx_err_gaussian=0.2,
                )
            )
    found.append(make_row(n=512, backend="reference", status="oom"))
    found.append(make_row(n=256, backend="reference", time_us=3000.0))
    found.append(make_row(n=256, backend="flex", status="unsupported", pattern="CS"))
    return found


def drawn(rows, **options):
    (figure,) = data.scaling(summarise(rows))
    return figures.scaling_figure(figure, figures.looks_of([figure]), **options)


def test_every_format_is_written_and_says_what_it_is(tmp_path, rows):
    files = figures.draw(rows, tmp_path / "figures", figures.FORMATS)
    assert len(files) == 9
    starts = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}
    for file in files:
        assert file.read_bytes().startswith(starts[file.suffix[1:]])


def test_equal_rows_give_equal_files(tmp_path, rows):
    for first, second in zip(
        figures.draw(rows, tmp_path / "a", figures.FORMATS),
        figures.draw(rows, tmp_path / "b", figures.FORMATS),
        strict=True,
    ):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_points_lie_where_the_summaries_say(rows):
    canvas = drawn(rows)
    axis = canvas.axes[2]  # rails first, then the main axes
    lines = {line.get_color(): line for line in axis.get_lines() if line.get_marker() != "None"}
    baseline = lines[figures.BLACK]
    assert list(baseline.get_xdata()) == [256, 512, 1024]
    assert list(baseline.get_ydata()) == pytest.approx([256 * 1.02, 512 * 1.02, 1024 * 1.02])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_memory_that_ran_out_is_marked_at_its_length(rows):
    canvas = drawn(rows)
    rail = canvas.axes[0]
    (mark,) = rail.get_lines()
    assert (list(mark.get_xdata()), mark.get_marker()) == ([512], "x")
    legend = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert "out of memory" in legend


def test_what_is_not_drawn_is_said(rows):
    canvas = drawn(rows)
    texts = [text.get_text() for axis in canvas.axes for text in axis.texts]
    assert texts == ["not drawn: 1 unsupported"]


def test_the_legend_names_every_series_once(rows):
    legend = [text.get_text() for text in drawn(rows).legends[0].get_texts()]
    assert sorted(legend[:3]) == ["performer/torch", "softmax/reference", "softmax/sdpa_flash"]
    assert len(legend) == len(set(legend))


def test_too_many_series_stay_visible_in_grey(make_row):
    many = [make_row(n=n, mechanism=f"m{i:02}", time_us=float(n + i)) for n in (256, 512) for i in range(30)]
    canvas = drawn(many)
    (figure,) = data.scaling(summarise(many))
    axis = canvas.axes[1]
    grey = [line for line in axis.get_lines() if line.get_color() == figures.GREY]
    assert len(grey) == 30 - figures.HIGHLIGHTED
    assert len(figure.panels[0].series) == 30
    assert "18 more" in [text.get_text() for text in canvas.legends[0].get_texts()]


def test_looks_differ_and_the_baseline_is_black(make_row):
    many = [make_row(mechanism=f"m{i:02}", time_us=100.0 + i) for i in range(76)] + [make_row()]
    looks = figures.looks_of(data.scaling(summarise(many)))
    assert len({(look.colour, look.marker) for look in looks.values()}) == 77
    assert looks["softmax/sdpa_flash"].colour == figures.BLACK
    assert next(iter(looks)) == "softmax/sdpa_flash"


def test_an_impl_looks_the_same_in_time_and_memory(rows):
    summaries = summarise(rows)
    times, memory = data.scaling(summaries), data.scaling(summaries, "mem_peak_bytes")
    looks = figures.looks_of([*times, *memory])
    colours = []
    for figure, column in ((times[0], "time_us"), (memory[0], "mem_peak_bytes")):
        legend = figures.scaling_figure(figure, looks, column).legends[0]
        colours.append(
            {
                t.get_text(): h.get_color()
                for t, h in zip(legend.get_texts(), legend.legend_handles, strict=True)
            }
        )
    assert colours[0].items() >= {(k, v) for k, v in colours[1].items()}


def test_exact_mechanisms_stand_in_their_own_strip(rows):
    (figure,) = data.fidelity(summarise(rows))
    canvas = figures.fidelity_figure(figure, figures.looks_of([figure]))
    main, strip = canvas.axes[0], canvas.axes[2]
    marked = [line for line in main.get_lines() if line.get_marker() not in ("None", None)]
    assert [list(line.get_ydata()) for line in marked] == [[0.2]]
    assert [list(line.get_ydata()) for line in strip.get_lines() if line.get_marker() == "o"] == [[0.0]]


def test_an_unknown_format_is_a_usage_error_before_anything_is_drawn(tmp_path, rows):
    with pytest.raises(UsageError, match="figure format 'gif'; expected one of pdf, png, svg"):
        figures.draw(rows, tmp_path / "figures", ("pdf", "gif"))
    assert not (tmp_path / "figures").exists()
    with pytest.raises(UsageError, match="figure format 'bmp'"):
        figures.save(drawn(rows), tmp_path / "a.bmp")


def test_rows_without_operations_give_no_figure(tmp_path):
    assert figures.draw([], tmp_path) == []


def test_importing_results_loads_neither_torch_nor_matplotlib_nor_pandas():
    code = (
        "import sys, pkgutil, importlib, attnbench.results as r\n"
        "for m in pkgutil.iter_modules(r.__path__): importlib.import_module('attnbench.results.' + m.name)\n"
        "print([m for m in ('torch', 'triton', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
