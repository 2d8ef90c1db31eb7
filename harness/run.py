"""The driver: plan, engine, journal, Parquet. What ``attnbench run`` does.

The driver imports an impl only to read its Spec; everything that could crash runs in a worker. Each finished
case is in the journal before its worker starts the next one, so a kill at any moment loses no finished case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.harness import devices, engines
from attnbench.harness.config import Resolved, RunConfig, resolve
from attnbench.harness.engines import Engine, Job
from attnbench.harness.listener import Listener, Silent
from attnbench.harness.plan import Planned, plan
from attnbench.harness.select import foreign
from attnbench.results.journal import Journal
from attnbench.results.store import write_parquet

CONFIG, JOURNAL, RESULTS = "run.json", "journal.jsonl", "results.parquet"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its rows."""

    path: Path
    rows: tuple[dict[str, Any], ...]

    def by_status(self) -> dict[str, int]:
        """Number of rows of each status that occurs, most frequent first."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def run(
    config: RunConfig,
    out: str | Path | None = None,
    listener: Listener | None = None,
    engine: Engine | None = None,
) -> Run:
    """Measure what ``config`` asks for into the folder ``out`` (default ``runs/<time>``).

    ``engine`` is the one that ``config`` names, connected as its defaults say, unless it is given. Raises
    UsageError for a request that means nothing, hardware that the engine does not reach, or a folder that
    already holds a run or cannot be written; nothing is measured then.
    """
    path = Path(out) if out is not None else Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with ExitStack() as stack:
        where = engine or stack.enter_context(engines.opened(config.engine))
        planned = where.plan(config)
        run_id = create(path, config)
        return _execute(path, run_id, config, planned, listener or Silent(), where)


def resume(
    path: str | Path,
    listener: Listener | None = None,
    engine: Engine | None = None,
    named: Collection[str] | None = None,
) -> Run:
    """Go on with the run in the folder ``path``: finished cases stay, the others are measured.

    With ``named``, what the user named, a folder from elsewhere can have no other code loaded: UsageError for
    an impl of the run that is a file or a plug-in and is not among them.
    """
    folder = Path(path)
    run_id, config = stored(folder)
    unnamed = [impl for impl in foreign(config.impl) if named is not None and impl not in named]
    if unnamed:
        raise UsageError(
            f"{folder / CONFIG} asks for code from outside attnbench: observed {', '.join(unnamed)}; "
            f"expected it named by you before it is run: add --impl {','.join(unnamed)}"
        )
    with ExitStack() as stack:
        where = engine or stack.enter_context(engines.opened(config.engine))
        return _execute(folder, run_id, config, where.plan(config), listener or Silent(), where)


def prepare(config: RunConfig) -> tuple[Resolved, list[Planned]]:
    """The resolved request and its plan for this machine, without measuring anything."""
    resolved = resolve(config, devices.resolve(config.gpu))
    return resolved, plan(resolved)


def create(path: Path, config: RunConfig, run_id: str = "") -> str:
    """Make the folder of a run that has measured nothing yet, for :func:`resume`; returns the run's id.

    Raises UsageError for a folder that already holds a run or cannot be written.
    """
    if (path / CONFIG).exists():
        raise UsageError(
            f"{path} already holds a run: use --resume {path} to go on with it, or another --out"
        )
    run_id = run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).write_text(
            json.dumps({"run_id": run_id, "config": config.to_json()}, indent=2) + "\n"
        )
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another --out") from None
    return run_id


def stored(path: Path) -> tuple[str, RunConfig]:
    """Id and request of the run in a folder. Raises UsageError where there is none that can be read."""
    try:
        found = json.loads((path / CONFIG).read_text())
        if not isinstance(found["config"], dict):
            raise TypeError(f"observed a config {found['config']!r:.40}, expected an object")
        return str(found["run_id"]), RunConfig.from_json(found["config"])
    except FileNotFoundError:
        raise UsageError(
            f"{path} holds no run: observed no {CONFIG}; expected a folder made by attnbench run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path / CONFIG} cannot be read as a run's configuration: {error}") from None


# ---- execution -----------------------------------------------------------------------------------------


def _execute(
    path: Path,
    run_id: str,
    config: RunConfig,
    planned: Sequence[Planned],
    listener: Listener,
    engine: Engine,
) -> Run:
    with Journal.open(path / JOURNAL, run_id=run_id, config=config.to_json()) as journal:
        job = Job(run_id, path, config, tuple(planned), tuple(journal.rows()), listener)
        finished = job.finished
        listener.planned(len(planned), sum(item.key in finished for item in planned))
        with closing(engine.rows(job)) as rows:
            for row in rows:
                journal.append(row)
                listener.finished(row)
        measured = tuple(journal.rows())
    write_parquet(measured, path / RESULTS)
    return Run(path, measured)


__all__ = ["Listener", "Run", "Silent", "create", "prepare", "resume", "run", "stored"]
