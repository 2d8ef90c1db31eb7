"""The charts that stand beside tables: curves of one setting, error against time, outcomes by family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from attnbench.results import series
from attnbench.results.aggregate import Summary
from attnbench.results.seeds import Score
from attnbench.site import charts, palette
from attnbench.site.charts import METRIC, Spec
from attnbench.site.views.case import Case
from attnbench.site.views.explore import baseline_of, looks_of
from attnbench.site.views.profile import same_setting
from attnbench.site.views.words import DIRECTION_WORDS, pattern_words

Cases = Mapping[Case, Sequence[Summary]]


def setting_words(case: Case) -> str:
    """What the curves of a setting share."""
    words = (case.device, case.dtype_words, case.workload, pattern_words(case.pattern))
    return " · ".join((*words, DIRECTION_WORDS.get(case.direction, case.direction), case.scope))


def scaling(cases: Cases, chosen: Case, mechanism: str = "") -> Spec | None:
    """Time over the length in the setting of ``chosen``; None with fewer than two lengths.

    With ``mechanism``, its impls and the baseline are the ones in colour.
    """
    inside = same_setting(cases, chosen, all_workloads=False)
    group = [s for case in inside for s in cases[case]]
    figure = next(iter(series.scaling(group)), None)
    if figure is None or len(inside) < 2:
        return None
    baseline = baseline_of(group)
    looks = looks_of(group, baseline)
    (panel,) = figure.panels
    shown = None
    if mechanism:
        own = {s.label for s in group if s.get("mechanism") == mechanism}
        if not any(found.points for found in panel.series if found.label in own):
            return None
        shown = [label for label in looks if label in own or label == baseline]
    title = f"Time over the length, {pattern_words(chosen.pattern)}"
    return charts.scaling(panel, looks, METRIC["time"], x=figure.x, shown=shown, title=title)


def tradeoff(cases: Cases, chosen: Case) -> Spec | None:
    """Distance to softmax attention against time on ``chosen``.

    None where no approximation was measured, and for a backward pass, which says nothing of the distance.
    """
    group = list(cases[chosen])
    looks = looks_of(group, baseline_of(group))
    for column, inputs in (("approx_err_recorded", "recorded"), ("approx_err_gaussian", "gaussian")):
        figure = next(iter(series.fidelity(group, column)), None)
        if figure is not None and any(p.y > 0 for s in figure.panels[0].series for p in s.points):
            title = f"Distance to softmax and time, {chosen.size} tokens"
            y_title = f"RMS error against softmax, {inputs} inputs"
            return charts.tradeoff(figure.panels[0], looks, y_title=y_title, title=title)
    return None


def outcomes(summaries: Iterable[Summary]) -> Spec | None:
    """How the cases of each family ended; None without a case."""
    counts: dict[str, Counter[str]] = {}
    for s in summaries:
        counts.setdefault(str(s.get("family")), Counter())[str(s.status)] += 1
    ordered = {family: counts[family] for family in sorted(counts)}
    return charts.coverage(ordered, title="How the planned cases ended, by family") if ordered else None


def seeds(found: Sequence[Score]) -> Spec | None:
    """Scores of one task table with their seeds; None where nothing was scored."""
    if not any(score.value is not None for score in found):
        return None
    labels = sorted({score.label for score in found if not score.control})
    return charts.seeds(found, palette.looks(labels, ""), title="Score of every seed, mean and 95 % interval")
