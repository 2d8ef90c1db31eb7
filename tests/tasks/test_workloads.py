"""The file of workloads: what ships is consistent, and what is wrong is named."""

import subprocess
import sys

import pytest

from attnbench.errors import UsageError
from attnbench.impls.case import Case
from attnbench.tasks import workloads

GOOD = {
    "model": '"m"',
    "source": '"s"',
    "batch": "1",
    "heads": "4",
    "kv_heads": "2",
    "head_dim": "8",
    "patterns": '["CS"]',
    "suites": '["ops"]',
    "lengths": "{ tiny = [64, 128] }",
}


def written(tmp_path, **changes):
    fields = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path = tmp_path / "w.toml"
    path.write_text("[one]\n" + "\n".join(f"{name} = {value}" for name, value in fields.items()))
    return path


def test_a_good_table_becomes_an_entry(tmp_path):
    found = workloads.load(written(tmp_path, n_fixed="1"))["one"]
    assert found.workload.kv_heads == 2
    assert found.workload.n_fixed == 1
    assert found.patterns == ("CS",)
    assert found.lengths == {"tiny": (64, 128)}
    assert found.suites == ("ops",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": None}, r"\[one\] heads: observed 'nothing', expected a value"),
        ({"heads": '"4"'}, "heads: observed '4', expected an integer"),
        ({"batch": "true"}, "batch: observed True, expected an integer"),
        ({"kv_heads": "3"}, "kv_heads: observed 3, expected a divisor of heads = 4"),
        ({"head_dim": "0"}, "head_dim: observed 0, expected a positive number"),
        ({"grid_rank": "4"}, "grid_rank: observed 4"),
        ({"patterns": '["XS"]'}, "patterns: observed"),
        ({"patterns": "[]"}, "patterns: observed"),
        ({"suites": "[]"}, "suites: observed"),
        ({"headz": "4"}, "unknown field of .*one.* 'headz': did you mean heads"),
        ({"lengths": "{ tinny = [64] }"}, "unknown preset .* 'tinny': did you mean tiny"),
        ({"lengths": "{ tiny = [128, 64] }"}, r"lengths.tiny: observed \[128, 64\], expected ascending"),
        ({"lengths": "{ tiny = [] }"}, "lengths.tiny"),
        ({"lengths": "{ tiny = [64.0] }"}, "lengths.tiny"),
        ({"m_fixed": "77"}, "m_fixed: observed 77, expected NC or CC"),
        ({"patterns": '["NS"]', "n_fixed": "1"}, "n_fixed: observed 1"),
        ({"patterns": '["NC"]', "n_fixed": "1", "m_fixed": "77"}, "n_fixed"),
    ],
)
def test_a_wrong_table_is_a_usage_error_that_names_the_field(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        workloads.load(written(tmp_path, **changes))


@pytest.mark.parametrize("text", ["one = 1", "[one", ""])
def test_a_file_that_is_no_file_of_workloads(tmp_path, text):
    path = tmp_path / "w.toml"
    path.write_text(text)
    if not text:
        assert workloads.load(path) == {}
        return
    with pytest.raises(UsageError, match=r"w\.toml"):
        workloads.load(path)


def test_what_ships_names_model_and_source_and_has_a_length_in_some_preset():
    found = workloads.entries()
    assert len(found) >= 12
    for entry in found:
        assert entry.workload.model
        assert entry.workload.source
        assert entry.lengths
        assert workloads.entry(entry.workload.name) is entry
    assert {p for entry in found for p in entry.patterns} == {"NS", "CS", "NC", "CC"}
    assert {entry.workload.grid_rank for entry in found} == {1, 2, 3}


def test_the_default_suite_has_lengths_in_every_preset_and_tiny_ones_that_a_cpu_finishes():
    ops = workloads.suite("ops")
    for preset in workloads.PRESETS:
        assert any(preset in entry.lengths for entry in ops)
    for entry in ops:
        for length in entry.lengths.get("tiny", ()):
            assert length * entry.workload.width * entry.workload.batch <= 2**18


def test_suites_partition_by_name():
    for name in workloads.suites():
        assert workloads.suite(name)
        assert all(name in entry.suites for entry in workloads.suite(name))


@pytest.mark.parametrize("call", [workloads.entry, workloads.suite])
def test_unknown_names_are_usage_errors_with_near_spellings(call):
    with pytest.raises(UsageError, match=r"expected one of|did you mean"):
        call("opz")


def test_published_shapes():
    llama = workloads.entry("llama3_8b_prefill").workload
    assert (llama.heads, llama.kv_heads, llama.head_dim, llama.width) == (32, 8, 128, 4096)
    vit = workloads.entry("vit_b16")
    assert vit.workload.width == 768
    assert vit.lengths["small"] == (14 * 14, 24 * 24)
    whisper = workloads.entry("whisper_large_encoder")
    assert (whisper.workload.width, whisper.lengths["small"]) == (1280, (1500,))
    wan = workloads.entry("wan_1b_video")
    assert wan.workload.width == 1536
    assert 21 * 30 * 52 in wan.lengths["paper"]
    assert workloads.entry("sd15_text_cross").workload.width == 320
    assert workloads.entry("sdxl_text_cross").workload.keys(4096, "NC") == 77
    assert workloads.entry("perceiver_latents").workload.n_fixed == 512
    assert workloads.entry("cab_efficiency").workload.width == 512


def test_a_workload_survives_the_trip_to_a_worker():
    workload = workloads.entry("sd15_text_cross").workload
    case = Case("softmax", "torch", "NC", workload, 64, 77, "float32", "fwd", "cpu")
    assert Case.from_json(case.to_json()) == case


def test_listing_tasks_and_workloads_imports_no_torch():
    code = (
        "import sys; from attnbench.tasks import controls, registry, workloads; "
        "registry.ids(); workloads.entries(); controls.NAMES; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
