"""What ``attnbench score`` does: from rows to scorecards, efficiency lengths, tables and files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attnbench.errors import UsageError
from attnbench.results import dials, frozen, score_report
from attnbench.results.aggregate import newest, summarise
from attnbench.results.lengths import efficiency_lengths, length_tables
from attnbench.results.rows import Row
from attnbench.results.scorecard import Scorecard, scorecards
from attnbench.results.scores import MIN_POOL
from attnbench.results.seeds import mixed_data, scores
from attnbench.results.table import Table, to_csv, to_markdown


@dataclass(frozen=True)
class Scored:
    """Cards and tables in reading order; ``notes`` say what was not, or could not be, computed."""

    cards: tuple[Scorecard, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def score(rows: Iterable[Row], min_pool: int = MIN_POOL, scales: frozen.FrozenScales | None = None) -> Scored:
    """Everything that can be said of ``rows``, of each case the newest version only.

    ``scales`` are frozen ones, for the suites and presets that they are for.
    """
    current, older = newest(summarise(rows))
    found = scores(current)
    cards = scorecards(found, scales, min_pool)
    lengths = efficiency_lengths(current)
    notes = [
        f"{table[0].task} {table[0].pattern}: seeds {', '.join(map(str, seeds))} were run on different data; "
        "do not compare them"
        for table in found
        if (seeds := mixed_data(table))
    ]
    unused = set(scales or {}) - {(card.preset, suite) for card in cards for suite in card.constants}
    notes += [f"frozen scales for {suite} {preset}: nothing here to use them on" for preset, suite in unused]
    if older:
        notes.append(f"older summaries of the same cases left out: {len(older)}")
    if not found:
        notes.append("no task was run: `attnbench run --task all` trains and evaluates on tasks")
    if not lengths:
        notes.append(
            "no efficiency length: it needs softmax/torch or softmax/sdpa_flash and another impl at three "
            "common lengths (`attnbench run --seqlen 256..4096`)"
        )
    tables = [*score_report.tables(cards, dials.curves(found)), *length_tables(lengths)]
    return Scored(tuple(cards), tuple(tables), tuple(notes))


def write(found: Scored, out: Path) -> list[Path]:
    """Write ``scores.parquet``, ``scores.csv`` and ``scores.md`` into ``out``.

    Raises UsageError for a folder that cannot be written.
    """
    paths = [out / f"scores.{suffix}" for suffix in ("parquet", "csv", "md")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        score_report.write(found.cards, paths[0])
        paths[1].write_text(to_csv(found.tables), encoding="utf-8")
        paths[2].write_text(to_markdown(found.tables), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    return paths


def freeze(found: Scored, path: Path) -> int:
    """Keep the scales of the indices in ``path``; returns how many. Raises UsageError without any."""
    scales = [one for card in found.cards for one in card.frozen()]
    if not scales:
        raise UsageError(
            "observed no scale of an index, expected tasks that measure attention, each run with as many "
            "mechanisms as --min-pool says"
        )
    return frozen.save(scales, path)
