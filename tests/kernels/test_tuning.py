"""Configurations are tuned only when asked, remembered per GPU, and never at the price of a wrong result."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

from attnbench.kernels import tuning
from attnbench.kernels.tuning import Gpu, Tuner, fastest, pick, picked, set_mode

GPU = Gpu("NVIDIA H200", (9, 0), "3.7.1")
CUDA = torch.device("cuda", 0)
KEY = (90, torch.float16, 64, "n<=4096", True)


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int = 4


CANDIDATES = (Config(64), Config(128), Config(128, 8))


class TooBig(Exception):
    """What a kernel raises that asks for more than a block has."""


class Timer:
    """Times launches by a table of blocks and warps, in place of a GPU."""

    def __init__(self, times_us):
        self.times_us, self.calls = times_us, []

    def __call__(self, launch):
        config = launch()
        self.calls.append(config)
        time_us = self.times_us[config]
        if isinstance(time_us, Exception):
            raise time_us
        return time_us


def launch(config):
    return lambda: config


@pytest.fixture
def timer():
    return Timer({CANDIDATES[0]: 10.0, CANDIDATES[1]: 5.0, CANDIDATES[2]: 7.0})


@pytest.fixture
def gpu(monkeypatch, tmp_path, timer):
    """A GPU that is not here: :func:`pick` finds a tuner whose bench is ``timer``."""
    tuners = {}

    def tuner_of(index, folder):
        return tuners.setdefault(index, Tuner(GPU, folder, timer, (TooBig,)))

    tuner_of.cache_clear = tuners.clear
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "tuner_of", tuner_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.forget()
    yield tmp_path / "attnbench" / "tuning" / "nvidia-h200-9.0.json"
    tuning.forget()


def choose(candidates=CANDIDATES, key=KEY, device=CUDA, **options):
    return pick("flash", "forward", key, candidates, launch, device, **options)


def tuned():
    with set_mode("tune"):
        return choose()


def test_the_default_mode_times_nothing(gpu, timer):
    assert choose() == CANDIDATES[0]
    assert not timer.calls
    assert not gpu.exists()


def test_tune_times_each_candidate_once_and_remembers(gpu, timer):
    assert tuned() == tuned() == choose() == CANDIDATES[1]
    assert timer.calls == list(CANDIDATES)


def test_a_miss_in_cache_mode_does_not_stop_later_tuning(gpu, timer):
    assert choose() == CANDIDATES[0]
    assert tuned() == CANDIDATES[1]


def test_another_process_finds_the_winner(gpu, timer):
    tuned()
    tuning.forget()
    with picked() as choices:
        assert choose() == CANDIDATES[1]
    assert choices[0].source == "cache"
    assert timer.calls == list(CANDIDATES)


def test_off_ignores_the_cache(gpu, timer, monkeypatch):
    tuned()
    with set_mode("off"):
        assert choose() == CANDIDATES[0]
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert choose() == CANDIDATES[0]


def test_compile_launches_every_candidate_and_times_and_stores_nothing(gpu, timer):
    launched = []

    def launching(config):
        if config == CANDIDATES[1]:
            raise TooBig
        return lambda: launched.append(config)

    with set_mode("compile"):
        assert pick("flash", "forward", KEY, CANDIDATES, launching, CUDA) == CANDIDATES[0]
    assert launched == [CANDIDATES[0], CANDIDATES[2]]
    assert not timer.calls
    assert not gpu.exists()
    assert tuned() == CANDIDATES[1]


def test_the_variable_turns_tuning_on_and_is_checked(gpu, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "tune")
    assert choose() == CANDIDATES[1]
    monkeypatch.setenv(tuning.VARIABLE, "always")
    with pytest.raises(ValueError, match=r"ATTNBENCH_TUNING: observed 'always', expected one of off, cache"):
        choose(key=("other",))
    with pytest.raises(ValueError, match="mode of tuning: observed 'on'"), set_mode("on"):
        pass


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_get_the_default(gpu, timer, device):
    with set_mode("tune"):
        assert choose(device=torch.device(device)) == CANDIDATES[0]
    assert not timer.calls


def test_the_interpreter_gets_the_default(gpu, timer, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuned() == CANDIDATES[0]
    assert not timer.calls


def test_deterministic_algorithms_get_the_default_where_sums_are_reordered(gpu):
    tuned()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose() == CANDIDATES[0]
        assert choose(reorders=False) == CANDIDATES[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose() == CANDIDATES[1]


def test_nothing_is_timed_while_a_graph_is_captured(gpu, timer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned() == CANDIDATES[0]
    assert not timer.calls


def test_candidates_without_resources_are_dropped_and_recorded(gpu, timer):
    timer.times_us[CANDIDATES[1]] = TooBig("shared memory: 300000 > 232448")
    assert tuned() == CANDIDATES[2]
    (entry,) = json.loads(gpu.read_text())["entries"].values()
    assert entry["dropped"] == {"1": "TooBig: shared memory: 300000 > 232448"}
    assert entry["times_us"] == [10.0, None, 7.0]
    assert entry["winner"] == {"block": 128, "num_warps": 8}


def test_when_every_candidate_fails_the_default_is_left_to_say_why(gpu, timer):
    timer.times_us = dict.fromkeys(CANDIDATES, TooBig("no"))
    assert tuned() == CANDIDATES[0]
    assert not gpu.exists()


def test_an_error_that_is_not_about_resources_is_not_swallowed(gpu, timer):
    timer.times_us[CANDIDATES[2]] = RuntimeError("illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuned()


@pytest.mark.parametrize(
    ("times_us", "winner"),
    [
        ([10.0, 9.95, 12.0], 0),  # within the noise
        ([10.0, 9.0, 8.0], 2),
        ([None, 9.0, 8.9], 2),
        ([None, None], None),
        ([10.0], 0),
    ],
)
def test_the_default_is_left_only_for_a_real_gain(times_us, winner):
    assert fastest(times_us) == winner


@pytest.mark.parametrize(
    "other",
    [
        {"op": "linrec"},
        {"kernel": "backward"},
        {"key": (80, torch.float16)},
        {"candidates": CANDIDATES[:2]},
        {"candidates": CANDIDATES[::-1]},
        {"gpu": Gpu("NVIDIA H200", (9, 0), "3.8.0")},
    ],
)
def test_a_winner_holds_for_nothing_else(tmp_path, timer, other):
    asked = {"op": "flash", "kernel": "forward", "key": KEY, "candidates": CANDIDATES, "gpu": GPU}
    first = Tuner(GPU, tmp_path, timer)
    first.tune("flash", "forward", KEY, CANDIDATES, launch)
    changed = asked | other
    second = Tuner(changed.pop("gpu"), tmp_path, timer)
    assert second.known(first.identity("flash", "forward", KEY, CANDIDATES), CANDIDATES) == CANDIDATES[1]
    assert second.known(second.identity(**changed), changed["candidates"]) is None


def test_gpus_have_files_of_their_own(tmp_path, timer):
    paths = {
        Tuner(gpu, tmp_path, timer).path.name
        for gpu in (GPU, Gpu("NVIDIA H100 80GB HBM3", (9, 0), "3.7.1"), Gpu("NVIDIA H200", (10, 0), "3.7.1"))
    }
    assert paths == {"nvidia-h200-9.0.json", "nvidia-h100-80gb-hbm3-9.0.json", "nvidia-h200-10.0.json"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"version": 0, "entries": {"a": 1}}', b'{"version": 1, "entries": 3}'],
)
def test_a_file_that_cannot_be_read_is_rebuilt_in_silence(gpu, content, recwarn):
    gpu.parent.mkdir(parents=True)
    gpu.write_bytes(content)
    assert choose() == CANDIDATES[0]
    assert tuned() == CANDIDATES[1]
    written = json.loads(gpu.read_text())
    assert written["version"] == tuning.CACHE_VERSION
    assert len(written["entries"]) == 1
    assert not recwarn.list


def test_an_entry_of_another_shape_counts_as_absent(gpu):
    tuned()
    content = json.loads(gpu.read_text())
    content["entries"] = dict.fromkeys(content["entries"], 7)
    gpu.write_text(json.dumps(content))
    tuning.forget()
    assert choose() == CANDIDATES[0]


def test_a_folder_that_cannot_be_written_costs_nothing(gpu, tmp_path, timer):
    (tmp_path / "attnbench").write_text("a file where the folder should be")
    assert tuned() == choose() == CANDIDATES[1]
    assert timer.calls == list(CANDIDATES)


def test_tuners_that_write_at_once_lose_nothing(tmp_path):
    """Eight tuners, as eight processes, each with winners of its own; no file is ever torn."""

    def work(number):
        tuner = Tuner(GPU, tmp_path, Timer(dict.fromkeys(CANDIDATES, 1.0)))
        for step in range(5):
            tuner.tune("flash", "forward", (number, step), CANDIDATES, launch)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["entries"]) == 40
    assert not list(tmp_path.glob("*.tmp"))


def test_picked_collects_nested_and_from_other_threads(gpu):
    with picked() as outer:
        choose()
        with picked() as inner, set_mode("tune"):
            thread = threading.Thread(target=choose)  # autograd launches backward kernels from its own
            thread.start()
            thread.join()
        choose()
    assert [choice.source for choice in outer] == ["default", "tuned", "tuned"]
    assert [choice.plain() for choice in inner] == [
        {"op": "flash", "kernel": "forward", "config": {"block": 128, "num_warps": 4}, "source": "tuned"}
    ]
    choose()
    assert len(outer) == 3


def test_modes_nest_and_unwind_on_errors(gpu):
    with set_mode("tune"):
        with set_mode("off"):
            assert tuning.mode() == "off"
        with pytest.raises(KeyError), set_mode("off"):
            raise KeyError
        assert tuning.mode() == "tune"
    assert tuning.mode() == "cache"


def test_no_candidates_is_an_error(gpu):
    with pytest.raises(ValueError, match="flash/forward: observed no candidates"):
        choose(candidates=())


def test_configurations_may_be_mappings(tmp_path):
    candidates = ({"BLOCK": 16}, {"BLOCK": 32})
    tuner = Tuner(GPU, tmp_path, lambda run: 1.0 / run()["BLOCK"])
    assert tuner.tune("linrec", "states", (), candidates, launch) == {"BLOCK": 32}
    again = Tuner(GPU, tmp_path, lambda run: 0.0)
    assert again.known(again.identity("linrec", "states", (), candidates), candidates) == {"BLOCK": 32}


def test_the_module_needs_no_triton_until_it_tunes():
    code = "import sys, attnbench.kernels.tuning; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
