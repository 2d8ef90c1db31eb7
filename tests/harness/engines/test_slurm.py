"""The Slurm engine: its plan, its shards, and a whole run through submitit's executor for one machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.errors import AttnbenchError, UsageError
from attnbench.harness.config import RunConfig
from attnbench.harness.engines import Job, Options, opened
from attnbench.harness.engines.slurm import SHARDS, SlurmEngine, _shards, _told
from attnbench.harness.listener import Silent
from attnbench.harness.run import prepare, resume, run, stored
from attnbench.results.read import rows

CONFIG = RunConfig(
    impl=("softmax/torch",),
    gpu="cpu",
    workload=("tiny",),
    pattern=("NS",),
    seqlen=(16, 32, 40),
    direction=("fwd",),
    threads=1,
    engine="slurm",
    jobs=2,
)

HERE = SlurmEngine({"cluster": "local"}, poll_s=0.2)


def _job(config: RunConfig, folder: Path) -> Job:
    return Job("run-a", folder, config, (), (), Silent())


def test_every_device_has_every_shard(tmp_path: Path) -> None:
    shards = _shards(_job(replace(CONFIG, gpu="a100,h100"), tmp_path))
    assert [shard.name for shard in shards] == ["a100-1-of-2", "a100-2-of-2", "h100-1-of-2", "h100-2-of-2"]
    assert {shard.run_id for shard in shards} == {"run-a"}
    assert [shard.request.shard for shard in shards] == [(1, 2), (2, 2)] * 2
    assert {(shard.request.engine, shard.request.gpu) for shard in shards} == {
        ("local", "a100"),
        ("local", "h100"),
    }


def test_the_plan_needs_no_gpu_here() -> None:
    pytest.importorskip("submitit")
    planned = HERE.plan(replace(CONFIG, gpu="h100,a100"))
    assert len(planned) == 6
    assert len({item.case.device for item in planned}) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "auto"}, ["--gpu auto", "--engine slurm", "h100"]),
        ({"gpu": "voodoo2"}, ["voodoo2"]),
        ({"gpu": ","}, ["--gpu", "no name"]),
        ({"shard": (1, 2)}, ["--shard", "--jobs"]),
        ({"impl": ("softmacks",)}, ["softmax"]),
    ],
)
def test_requests_that_mean_nothing_are_refused_before_anything_is_queued(
    changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        HERE.plan(replace(CONFIG, **changes))  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words)


def test_options_of_another_engine_are_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"--slurm: observed --engine local, expected --engine slurm"),
        opened("local", Options(slurm={"partition": "gpu"})),
    ):
        pass
    with pytest.raises(UsageError, match="--address"), opened("slurm", Options(address="head:6379")):
        pass


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_jobs_are_slurms(engine: str) -> None:
    from attnbench.harness.engines.local import LocalEngine
    from attnbench.harness.engines.ray import RayEngine

    kind = LocalEngine if engine == "local" else RayEngine
    with pytest.raises(UsageError, match="--jobs 2"):
        kind().plan(replace(CONFIG, engine=engine))


def test_several_names_need_an_engine() -> None:
    with pytest.raises(UsageError, match="observed 2 names with --engine local, expected one"):
        run(replace(CONFIG, engine="local", jobs=1, gpu="a100,h100"), Path("nowhere"))


def test_without_a_cluster_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="no srun"):
        run(CONFIG, tmp_path / "run", engine=SlurmEngine({}))
    assert not (tmp_path / "run").exists()


def test_parameters_that_submitit_does_not_know_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    engine = SlurmEngine({"cluster": "local", "tasks_per_nodes": "2"})
    with pytest.raises(UsageError, match="--slurm"):
        next(engine.rows(_job(CONFIG, tmp_path)))


def test_the_error_of_a_job_is_found_in_what_submitit_says() -> None:
    trace = (
        "Job (task=0) failed during processing with trace:\n----------\nTraceback (most recent call last):\n"
        '  File "x.py", line 1\nValueError: no such thing\n\n----------\nYou can check full logs with '
        "'job.stderr(0)' or at paths:\n  - /a/b.err\n"
    )
    assert _told(trace) == "ValueError: no such thing"
    assert _told("Job 7 has not produced any output (state: TIMEOUT)\nNo stream") == (
        "Job 7 has not produced any output (state: TIMEOUT)"
    )
    assert _told("") == ""


@pytest.mark.slow
def test_an_array_on_this_machine_is_one_run_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'attnbench[slurm]'")
    out = tmp_path / "run"
    planned = sorted(item.key for item in HERE.plan(CONFIG))
    done = run(CONFIG, out, engine=HERE)
    assert sorted((row["case_key"], row["block"]) for row in done.rows) == planned
    assert {row["run_id"] for row in done.rows} == {stored(out)[0]}
    assert {row["status"] for row in done.rows} == {"ok"}
    assert sorted(path.name for path in (out / SHARDS).iterdir()) == ["cpu-1-of-2", "cpu-2-of-2"]

    # the driver's journal is lost; what the shards have measured is not measured again
    (out / "journal.jsonl").unlink()
    (out / "results.parquet").unlink()
    assert sorted((row["case_key"], row["block"]) for row in resume(out, engine=HERE).rows) == planned
    assert len(rows([out / "results.parquet"])) == len(planned)


@pytest.mark.slow
def test_a_job_that_fails_says_so_and_keeps_what_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'attnbench[slurm]'")
    out = tmp_path / "run"
    blocked = out / SHARDS / "cpu-2-of-2"
    blocked.mkdir(parents=True)
    (blocked / "run.json").write_text(json.dumps({"run_id": "x", "config": {"colour": "blue"}}))
    with pytest.raises(AttnbenchError, match=r"cpu-2-of-2: the jobs ended before .*another version"):
        run(CONFIG, out, engine=HERE)
    kept = sorted(row["case_key"] for row in rows([out / "journal.jsonl"]))
    _, first = prepare(replace(CONFIG, engine="local", jobs=1, shard=(1, 2)))
    assert kept == sorted(item.key[0] for item in first)
    assert 0 < len(kept) < len(HERE.plan(CONFIG))
