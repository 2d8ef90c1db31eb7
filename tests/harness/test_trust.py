"""Nothing is executed, imported or unpickled that the user did not name: plug-ins, run folders, results."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from attnbench.cli import app
from attnbench.errors import UsageError
from attnbench.harness.config import RunConfig
from attnbench.harness.run import CONFIG, prepare, resume, stored
from attnbench.harness.select import foreign, select
from attnbench.impls import registry
from attnbench.results import schema
from attnbench.results.read import rows as read_rows
from attnbench.results.rows import to_table
from attnbench.results.store import write_parquet

REQUEST = {
    "gpu": "cpu",
    "workload": ["tiny"],
    "pattern": ["NS"],
    "seqlen": [16],
    "dtype": [],
    "direction": ["fwd"],
}


class Trap:
    """A Python file and a plug-in that leave a mark when they are run."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "sprung"
        self.file = folder / "evil_plugin.py"
        self.file.write_text(f"open({str(self.mark)!r}, 'w').close()\nraise SystemExit(0)\n")
        self.impl = f"{self.file}:Evil"

    @property
    def sprung(self) -> bool:
        return self.mark.exists()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    found = Trap(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("evil", "evil_plugin:Evil", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.delitem(sys.modules, "evil_plugin", raising=False)
    return found


def run_folder(folder: Path, **changes: Any) -> Path:
    """A run folder as one might be sent."""
    config = {**RunConfig().to_json(), **REQUEST, **changes}
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"run_id": "run-a", "config": config}))
    return folder


# ---- plug-ins ------------------------------------------------------------------------------------------


def test_a_plug_in_is_loaded_only_when_it_is_named(trap: Trap) -> None:
    for selectors in (["all"], ["softmax", "nystromformer/torch"], ["*"], ["family:linear"]):
        select(selectors)
    with pytest.raises(UsageError, match="matches nothing"):
        select(["?vil*"])
    assert "evil" not in registry.ids()
    assert "evil" not in registry.list_impls(family="dense")
    prepare(RunConfig(impl=("softmax",), gpu="cpu", workload=("tiny",), seqlen=(16,)))
    assert not trap.sprung
    with pytest.raises(UsageError, match="cannot be loaded: SystemExit"):
        select(["evil"])
    assert trap.sprung


def test_the_name_of_a_plug_in_is_offered_without_loading_it(trap: Trap) -> None:
    with pytest.raises(UsageError, match="did you mean evil"):
        select(["evill"])
    assert not trap.sprung


def test_a_plug_in_cannot_take_the_name_of_a_mechanism(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("softmax", "evil_plugin:Evil", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert registry.mechanism("softmax").__module__ == "attnbench.impls.dense.softmax"
    assert not trap.sprung


def test_only_files_and_plug_ins_are_foreign() -> None:
    own = ["all", "family:linear", "softmax", "softmax/torch", "nystrom*", "*", "no_mixing"]
    assert foreign([*own, "a/b.py:C", "b.py:C/torch", "evil", "evil/torch"]) == [
        "a/b.py:C",
        "b.py:C/torch",
        "evil",
        "evil/torch",
    ]


def test_a_file_of_a_user_that_cannot_be_loaded_is_an_error_of_usage(tmp_path: Path) -> None:
    for text in ("1/0\n", "def f(:\n", "import no_such_module_at_all\n", "raise SystemExit(3)\n", "x = 1\n"):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UsageError, match=r"mine\.py"):
            select([f"{tmp_path}/mine.py:Mine"])


# ---- run folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "plug-in"])
def test_a_run_folder_cannot_have_code_loaded_that_was_not_named(
    trap: Trap, tmp_path: Path, name: str
) -> None:
    impl = trap.impl if name == "file" else "evil"
    folder = run_folder(tmp_path / "run", impl=["softmax/torch", impl])
    done = CliRunner().invoke(app, ["run", "--resume", str(folder), "--quiet"])
    assert isinstance(done.exception, UsageError)
    assert "expected it named by you" in str(done.exception)
    assert not trap.sprung
    assert not (folder / "journal.jsonl").exists()
    with pytest.raises(UsageError, match="cannot be loaded"):
        resume(folder, named=(impl,))
    assert trap.sprung


HOSTILE = [
    {"impl": "softmax"},
    {"impl": [["a"]]},
    {"impl": [1]},
    {"blocks": "3"},
    {"blocks": True},
    {"blocks": -1},
    {"blocks": 10**12},
    {"seqlen": ["16"]},
    {"seqlen": 16},
    {"shard": [3]},
    {"shard": [0, 0]},
    {"shard": [5, 2]},
    {"time_limit_s": "1"},
    {"time_limit_s": float("nan")},
    {"threads": 1.5},
    {"seed": 10**40},
    {"density": []},
    {"hyper": 5},
    {"hyper": [["a", "b"]]},
    {"hyper": [["softmax", "x", {"__reduce__": "os.system"}]]},
    {"preset": {"a": 1}},
    {"suite": "../../etc"},
    {"task": ["os.system"]},
    {"workload": ["../../../etc/passwd"]},
    {"gpu": "__import__('os')"},
    {"pattern": ["NS; rm"]},
    {"unknown_field": 1},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: str(changes)[:40])
def test_a_run_folder_with_hostile_fields_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = run_folder(tmp_path / "run", **{"impl": ["softmax/torch"], **changes})
    with pytest.raises(UsageError):
        resume(folder)
    assert not (folder / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"run_id": 1}', '{"run_id": "a", "config": []}', "[" * 50_000, "\x00\xff"],
)
def test_a_run_folder_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"cannot be read as a run's configuration|another version"):
        stored(tmp_path)


def test_the_id_of_a_run_names_no_path(tmp_path: Path, make_row: Callable[..., dict[str, Any]]) -> None:
    outside = tmp_path / "outside"
    write_parquet([make_row(run_id=f"../../{outside}", workload=f"../{outside}")], tmp_path / "x.parquet")
    for command in (
        ["report", "x.parquet", "--out", "out"],
        ["merge", "x.parquet", "--out", "m.parquet"],
        ["validate", "x.parquet"],
        ["score", "x.parquet"],
    ):
        before = {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents}
        arguments = [str(tmp_path / a) if a in ("x.parquet", "out", "m.parquet") else a for a in command]
        CliRunner().invoke(app, arguments)
        assert {p for p in tmp_path.parent.rglob("*") if tmp_path not in p.parents} == before
    assert not outside.exists()


# ---- results -------------------------------------------------------------------------------------------


def test_results_that_name_code_have_none_of_it_loaded(
    trap: Trap, tmp_path: Path, make_row: Callable[..., dict[str, Any]]
) -> None:
    names = (trap.impl, "evil", "evil_plugin")
    write_parquet(
        [make_row(mechanism=name, n=n) for name in names for n in (64, 128)], tmp_path / "x.parquet"
    )
    path = str(tmp_path / "x.parquet")
    assert len(read_rows([path])) == 6
    for command in (
        ["report", path, "--out", str(tmp_path / "out"), "--baseline", trap.impl],
        ["validate", path],
        ["score", path],
        ["merge", path, "--out", str(tmp_path / "m.parquet")],
        ["compare", path, path],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code in (0, 1, 2), done.output
        assert not trap.sprung, command


class Bomb:
    """Pickled, it runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


def test_pickles_in_parquet_are_not_unpickled(
    tmp_path: Path, make_row: Callable[..., dict[str, Any]]
) -> None:
    """Neither in the file's metadata nor as an extension type, which old versions of Arrow unpickled."""
    mark = tmp_path / "sprung"
    bomb = pickle.dumps(Bomb(mark))
    table = to_table([make_row()])
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    fields = [field.with_metadata({**(field.metadata or {}), **extension}) for field in table.schema]
    metadata = {**table.schema.metadata, b"pickle": bomb, b"pandas": bomb, b"attnbench": bomb}
    path = tmp_path / "x.parquet"
    pq.write_table(table.cast(pa.schema(fields, metadata)), path)
    try:
        found = read_rows([path])
    except UsageError:
        found = []
    assert len(found) <= 1
    assert not mark.exists()
    assert pickle.loads(bomb).name == str(mark)  # it would have gone off
    assert mark.exists()


@pytest.mark.parametrize(
    "line",
    [
        {"__reduce__": ["os.system", ["true"]]},
        {"py/object": "subprocess.Popen", "py/reduce": []},
        {"!!python/object/apply:os.system": ["true"]},
        {"__class__": "os.system", "case_key": "a", "block": 0},
    ],
    ids=lambda line: str(next(iter(line))),
)
def test_a_journal_is_data(tmp_path: Path, line: dict[str, Any]) -> None:
    header = {"journal": 1, "schema_version": schema.SCHEMA_VERSION, "run_id": "r", "config": {}}
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UsageError, match="unknown column"):
        read_rows([path])
