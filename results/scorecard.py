"""What a set of task runs says: which tasks measure attention, where each mechanism stands, how tasks agree.

Puts the pure scores of :mod:`attnbench.results.scores` to work on rows. Nothing is computed across devices,
presets or software: each combination has a card of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from attnbench.results import correlation, stats
from attnbench.results.correlation import Correlation
from attnbench.results.frozen import Fingerprints, Frozen, FrozenScales
from attnbench.results.schema import Status
from attnbench.results.scores import (
    MIN_POOL,
    Benefit,
    Better,
    Constants,
    Index,
    Metric,
    RawScore,
    benefit,
    compositional_index,
    cut_constants,
    learning,
    normalised_position,
)
from attnbench.results.seeds import Score

NO_MIXING: Final = "no_mixing/torch"
EXACT: Final = ("softmax/torch", "softmax/sdpa_flash", "softmax/sdpa_math", "softmax/flex", "softmax/triton")
"""Exact implementations of softmax attention; the first that was run is what others are compared with."""

TASK_OF: Final = {"tts_fastspeech2": "tts", "tts_transformer": "tts"}
"""Backbones that are one task of CAB: their metrics weigh equally within it."""


@dataclass(frozen=True)
class Verdict:
    """Whether one task under one pattern measures attention.

    ``problems`` says why not, in words; empty for a task that discriminates. ``tie`` says whether the exact
    implementations agree within their seeds, None where fewer than two were run three times.
    """

    suite: str
    task: str
    pattern: str
    metric: str
    better: str
    softmax: Score | None
    no_mixing: Score | None
    benefit: Benefit | None
    tie: bool | None
    problems: tuple[str, ...]

    @property
    def discriminates(self) -> bool:
        """Whether scores on it say something about attention."""
        return not self.problems


@dataclass(frozen=True)
class Placed:
    """A score with its position between no mixing (0) and softmax (1), and the word for that position."""

    score: Score
    position: float | None

    @property
    def verdict(self) -> str:
        """``broken``, ``weak``, ``learns`` or ``unknown``."""
        return learning(self.position)


@dataclass(frozen=True)
class Scorecard:
    """All that is said of one device, preset and software.

    ``verdicts`` are in the order of suite, task and pattern. ``indices``, their ``constants`` and the
    ``data`` of the tasks are by suite; ``by_pattern`` and ``by_task`` correlate the indices, without the
    controls: bad everywhere, they would make all tasks alike.
    """

    device: str
    preset: str
    software_key: str
    verdicts: tuple[Verdict, ...]
    placed: tuple[Placed, ...]
    constants: Mapping[str, Constants]
    indices: Mapping[str, tuple[Index, ...]]
    data: Mapping[str, Fingerprints]
    by_pattern: Mapping[tuple[str, str], Correlation]
    by_task: Mapping[tuple[str, str], Correlation]

    def frozen(self) -> list[Frozen]:
        """The scales of the indices, to be kept in a file."""
        return [
            Frozen(self.preset, suite, constants, self.data[suite])
            for suite, constants in self.constants.items()
            if constants.scales
        ]


def scorecards(
    tables: Iterable[Sequence[Score]],
    frozen: FrozenScales | None = None,
    min_pool: int = MIN_POOL,
) -> list[Scorecard]:
    """One card for each device, preset and software among ``tables``.

    ``tables`` are those of :func:`attnbench.results.seeds.scores`. A suite without ``frozen`` scales
    for its preset gets scales cut from the mechanisms at hand, and named after them.
    """
    groups: dict[tuple[str, str, str], list[Sequence[Score]]] = {}
    for table in tables:
        groups.setdefault((table[0].device, table[0].preset, table[0].software_key), []).append(table)
    return [_card(key, groups[key], frozen or {}, min_pool) for key in sorted(groups)]


def _card(
    key: tuple[str, str, str],
    tables: Sequence[Sequence[Score]],
    frozen: FrozenScales,
    min_pool: int,
) -> Scorecard:
    judged = [(table, judge(table)) for table in tables]
    judged.sort(key=lambda pair: (pair[1].suite, pair[1].task, pair[1].pattern))
    scales, indices, data = {}, {}, {}
    for suite in dict.fromkeys(v.suite for _, v in judged):
        mine = [(t, v) for t, v in judged if v.suite == suite]
        kept = frozen.get((key[1], suite))
        data[suite] = _data(mine)
        scales[suite] = kept.on(data[suite]) if kept else _cut(suite, key, mine, min_pool)
        raw = [_raw(s) for table, v in mine for s in table if s.value is not None and not _duplicate(s, v)]
        indices[suite] = tuple(compositional_index(raw, scales[suite]))
    controls = {score.label for table in tables for score in table if score.control}
    counted = {suite: [i for i in found if i.mechanism not in controls] for suite, found in indices.items()}
    return Scorecard(
        *key,
        verdicts=tuple(verdict for _, verdict in judged),
        placed=tuple(p for table, verdict in judged for p in place(table, verdict)),
        constants=scales,
        indices=indices,
        data=data,
        by_pattern=correlation.matrix(_patterns(counted)),
        by_task=correlation.matrix(correlation.by_task([i for found in counted.values() for i in found])),
    )


def _data(mine: Iterable[tuple[Sequence[Score], Verdict]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for table, verdict in mine:
        for score in table:
            found.setdefault(verdict.task, set()).update(text for _, text in score.fingerprints if text)
    return {task: sorted(texts) for task, texts in found.items()}


def _patterns(indices: Mapping[str, Sequence[Index]]) -> dict[str, dict[str, float]]:
    """``suite:pattern`` → mechanism → index: a pattern's index exists within one suite only."""
    return {
        f"{suite}:{pattern}": values
        for suite, found in indices.items()
        for pattern, values in correlation.by_pattern(found).items()
    }


# ---- does the task measure attention -------------------------------------------------------------------


def judge(table: Sequence[Score]) -> Verdict:
    """The verdict on one task, pattern, preset, device and software from all its scores."""
    by_label = {score.label: score for score in table}
    exact = [by_label[name] for name in EXACT if name in by_label and by_label[name].value is not None]
    softmax, control = (exact[0] if exact else None), by_label.get(NO_MIXING)
    known = next((s for s in table if s.metric), table[0])
    gain = None
    if softmax and control and softmax.values and control.values:
        gain = benefit(_metric(known), _better(known), softmax.values, control.values)
    tie = _tie(exact)
    return Verdict(
        suite=known.suite,
        task=known.task,
        pattern=known.pattern,
        metric=known.metric,
        better=known.better,
        softmax=softmax,
        no_mixing=control,
        benefit=gain,
        tie=tie,
        problems=tuple(_problems(known, softmax, control, gain, tie)),
    )


def _tie(exact: Sequence[Score]) -> bool | None:
    """Whether two implementations of one function score alike: their difference's interval holds 0."""
    if len(exact) < 2 or min(len(s.values) for s in exact) < 3:
        return None
    pairs = [(exact[0].values, other.values) for other in exact[1:]]
    return all(_alike(a, b) for a, b in pairs)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    if statistics.fmean(a) == statistics.fmean(b):
        return True
    around = stats.difference_interval(a, b)
    return around is not None and around[0] <= 0.0 <= around[1]


def _problems(
    known: Score, softmax: Score | None, control: Score | None, gain: Benefit | None, tie: bool | None
) -> Iterable[str]:
    if softmax is None:
        yield "no score of softmax attention"
    if control is None or control.value is None:
        yield "no score without mixing"
    if known.check_softmax is None or known.check_no_mixing is None:
        yield "the preset states no limits under this pattern"
    elif gain is not None:
        yield from _limits(known, cast(Score, softmax), cast(Score, control))
    if gain is not None and gain.units is not None and not gain.discriminates:
        yield f"benefit of attention {gain.value:.3g}: {gain.units:.1f} noise units, expected 2 or more"
    if tie is False:
        yield "two exact implementations of softmax differ beyond their seeds"


def _limits(known: Score, softmax: Score, control: Score) -> Iterable[str]:
    """The worst seed on either side must keep its limit."""
    sign = 1.0 if known.better == "lower" else -1.0
    beyond = "below" if known.better == "lower" else "above"
    assert known.check_softmax is not None
    assert known.check_no_mixing is not None
    worst = sign * max(sign * v for v in softmax.values)
    if sign * worst >= sign * known.check_softmax:
        yield f"softmax reached {worst:.4g}, expected {beyond} {known.check_softmax:g}"
    best = sign * min(sign * v for v in control.values)
    if sign * best <= sign * known.check_no_mixing:
        yield f"no_mixing reached {best:.4g}: {beyond} {known.check_no_mixing:g} is a leak"


def place(table: Sequence[Score], verdict: Verdict) -> list[Placed]:
    """Every score of a task with its position between the verdict's two ends, in the order given.

    Ends that noise does not tell apart give no position: it would be noise over noise.
    """
    top = verdict.softmax.value if verdict.softmax else None
    bottom = verdict.no_mixing.value if verdict.no_mixing else None
    apart = verdict.benefit is None or verdict.benefit.discriminates is not False

    def position(score: Score) -> float | None:
        if score.value is None or top is None or bottom is None or not apart:
            return None
        return normalised_position(score.value, top, bottom)

    return [Placed(score, position(score)) for score in table]


# ---- indices -------------------------------------------------------------------------------------------


def _cut(
    suite: str,
    key: tuple[str, str, str],
    mine: Sequence[tuple[Sequence[Score], Verdict]],
    min_pool: int,
) -> Constants:
    """Scales from the mechanisms at hand; tasks that do not measure attention have none."""
    members = sorted({s.label for table, v in mine for s in table if not s.control and not _duplicate(s, v)})
    usable = [(table, v) for table, v in mine if v.discriminates]
    directions = {_metric(table[0]): v.better for table, v in mine}
    noise = {
        _metric(table[0]): v.softmax.sd
        for table, v in usable
        if v.softmax is not None and v.softmax.sd is not None
    }
    found = cut_constants(
        f"{suite} {key[1]} on {key[0]}, {len(members)} mechanisms",
        [_raw(s) for table, _ in usable for s in table if s.value is not None],
        members,
        lambda metric: cast(Better, directions[metric]),
        noise=noise,
        log=lambda metric: directions[metric] == "lower",
        min_pool=min_pool,
    )
    silent = {_metric(t[0]): f"not discriminating: {v.problems[0]}" for t, v in mine if v.problems}
    return Constants(found.name, found.scales, {**found.left_out, **silent})


def _duplicate(score: Score, verdict: Verdict) -> bool:
    """Whether the score is of a second implementation of softmax: one function counts once in a pool."""
    return score.label in EXACT and verdict.softmax is not None and score.label != verdict.softmax.label


def _metric(score: Score) -> Metric:
    return Metric(score.pattern, TASK_OF.get(score.task, score.task), score.task, score.metric)


def _raw(score: Score) -> RawScore:
    assert score.value is not None
    return RawScore(_metric(score), score.label, score.value)


def _better(score: Score) -> Better:
    assert score.status == Status.OK or score.better, "a direction is known once a seed was scored"
    return cast(Better, score.better)
