"""Serving a built site on this machine, and the command that builds one."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path

import pytest

from attnbench.errors import UsageError
from attnbench.site.serve import serve


def test_serving_a_folder_without_a_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"index\.html"):
        serve(tmp_path, 0, print)


def test_serve_answers_on_the_loopback_interface(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<h1>here</h1>")
    said: list[str] = []
    ready = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        ready.set()

    threading.Thread(target=serve, args=(tmp_path, 0, say), daemon=True).start()
    assert ready.wait(10)
    address = said[0].split()[0]
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        assert b"<h1>" in answer.read()


def test_a_taken_port_is_a_usage_error(tmp_path: Path) -> None:
    import socket

    (tmp_path / "index.html").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another --port"):
            serve(tmp_path, taken.getsockname()[1], print)


def test_what_the_command_knows_of_mechanisms_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue that the command line hands to the site: Specs as values that JSON can hold."""
    import json

    from attnbench.harness import catalogue
    from attnbench.impls import registry
    from attnbench.tasks import registry as tasks

    monkeypatch.setattr(registry, "ids", lambda: ["softmax", "performer"])
    monkeypatch.setattr(tasks, "ids", lambda: ["lm"])
    found = catalogue.catalogue()
    assert json.loads(json.dumps(found)) == found
    assert set(found["mechanisms"]) == {"softmax", "performer"}
    performer = found["mechanisms"]["performer"]
    assert performer["exact"] is False
    assert performer["paper"]["url"] == "https://arxiv.org/abs/2009.14794"
    assert {"name", "default", "meaning", "choices"} == set(performer["hyper"][0])
    assert found["devices"]["h100-sxm"]["tflops"]["bf16"] == 989.4
    assert found["tasks"]["lm"]["presets"]["tiny"]["n"] > 0
    assert "n_fixed" in next(iter(found["workloads"].values()))
