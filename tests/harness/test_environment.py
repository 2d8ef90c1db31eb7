"""What a row records of its environment: plain values, nothing personal, and a key of what changes a time."""

import getpass
import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import attnbench
from attnbench.harness import environment
from attnbench.harness.environment import capture, commit_of, peers, physical_cores, software_key
from attnbench.harness.timing import Host
from attnbench.kernels.backends import OWN, REQUIREMENTS, Requirement


def test_capture_is_json_and_tells_the_versions():
    facts = capture("cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__
    assert facts["attnbench"] == attnbench.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu_cores"] >= physical_cores() >= 1


def test_nothing_personal_is_recorded(monkeypatch):
    for name in ("TRITON_CACHE_DIR", "CUDA_HOME", "TORCH_HOME", "SECRET_TOKEN", "HF_TOKEN", "LD_PRELOAD"):
        monkeypatch.setenv(name, "/home/jane/secret")
    facts = capture("cpu")
    facts.pop("cpu_model")  # the one value in which a slash would be no part of a path
    text = json.dumps([facts, peers()])
    for private in ("/", "jane", "secret", f'"{getpass.getuser()}"', f'"{socket.gethostname()}"'):
        assert private not in text


def test_allow_listed_variables_are_recorded_and_others_are_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_SOMETHING_NEW", "1")
    assert capture("cpu")["env"]["OMP_NUM_THREADS"] == "3"
    assert "CUDA_SOMETHING_NEW" not in capture("cpu")["env"]


def test_software_key_changes_with_what_changes_a_time_only():
    facts = {
        "torch": "2.13.0",
        "threads": 2,
        "load_1m": 0.5,
        "commit": "abc",
        "libraries": {"fla": "0.6"},
        "env": {},
    }
    key = software_key(facts)
    assert len(key) == 16
    assert software_key(dict(reversed(facts.items()))) == key
    for unrelated in ({"load_1m": 3.0}, {"commit": "def+dirty"}, {"libraries": {}}, {"attnbench": "9"}):
        assert software_key({**facts, **unrelated}) == key
    for relevant in (
        {"torch": "2.14.0"},
        {"threads": 1},
        {"env": {"OMP_NUM_THREADS": "1"}},
        {"gpu_driver": "580"},
    ):
        assert software_key({**facts, **relevant}) != key


def test_key_of_this_machine_is_stable():
    assert software_key(capture("cpu")) == software_key(capture("cpu"))


def test_everything_left_out_of_the_key_is_captured():
    captured = {*capture("cpu"), "gpu_uuid_hash"}
    assert set(environment.NOT_IN_KEY) <= captured


def test_peers_are_a_version_or_a_reason():
    found = peers()
    assert set(found) == set(REQUIREMENTS) - set(OWN)
    for name, state in found.items():
        library = REQUIREMENTS[name].library
        absent = library is not None and importlib.util.find_spec(library) is None
        assert state.startswith("absent: ") == absent
    assert found["flex"] == f"torch {torch.__version__}"


def test_a_peer_without_its_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers()["sdpa_cudnn"].endswith("; needs cuda, which is not here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peers()["sdpa_cudnn"] == f"torch {torch.__version__}"


def test_a_peer_is_found_by_the_name_it_is_installed_under(monkeypatch):
    needs = {"sage": Requirement(library="sageattention"), "odd": Requirement(library="json")}
    monkeypatch.setattr(environment, "REQUIREMENTS", needs)
    monkeypatch.setattr(environment, "_version", lambda name: "2.2.0" if name == "sageattention" else None)
    assert peers() == {"sage": "sageattention 2.2.0", "odd": "json of unknown version"}


def test_peers_are_not_imported():
    program = (
        "import sys\n"
        "from attnbench.harness import environment\n"
        "environment.peers()\n"
        "print(sorted(set(environment.PEERS) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the machine, laid out in files --------------------------------------------------------------------


def machine(root, **files):
    for path, text in files.items():
        target = root / path.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return Host(root, allowed=lambda: frozenset({0}))


@pytest.mark.parametrize(
    ("files", "name", "value"),
    [
        ({"proc__cpuinfo": "processor : 0\nmodel name\t: EPYC 9654\n"}, "cpu_model", "EPYC 9654"),
        (
            {"sys__devices__system__cpu__cpu0__cpufreq__scaling_governor": "performance\n"},
            "cpu_governor",
            "performance",
        ),
        ({"sys__devices__system__cpu__cpufreq__boost": "1\n"}, "cpu_turbo", True),
        ({"sys__devices__system__cpu__intel_pstate__no_turbo": "1\n"}, "cpu_turbo", False),
        ({}, "cpu_turbo", None),
        ({}, "cpu_governor", None),
        ({"proc__loadavg": "0.25 0.1 0.1 1/2 3"}, "load_1m", 0.25),
        ({".dockerenv": ""}, "container", "docker"),
        ({"proc__1__cgroup": "0::/lxc/box"}, "container", "lxc"),
        ({}, "container", None),
    ],
)
def test_facts_of_a_machine(tmp_path, monkeypatch, files, name, value):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert capture("cpu", machine(tmp_path, **files))[name] == value


# ---- commit --------------------------------------------------------------------------------------------


def git(folder, *arguments):
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        cwd=folder,
        check=True,
        env=env,
        capture_output=True,
    )


def test_commit_of_a_checkout_says_when_it_is_dirty(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "new.py").write_text("a file that git does not track changes nothing that was measured")
    assert commit_of(tmp_path) == clean
    (tmp_path / "a.py").write_text("2")
    assert commit_of(tmp_path) == f"{clean}+dirty"


def test_a_repository_around_an_installed_package_is_not_ours(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's work")
    package = tmp_path / "venv" / "attnbench"
    package.mkdir(parents=True)
    assert commit_of(package) is None


# ---- GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_facts():
    facts = capture("h200")
    assert facts["gpu_memory_bytes"] > 1 << 30
    assert facts["gpu_capability"]
    assert facts["cuda_runtime"] or facts["hip_runtime"]
    json.dumps(facts, allow_nan=False)
