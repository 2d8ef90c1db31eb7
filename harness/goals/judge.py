"""From rows of races to verdicts on the goals and a report. Pure: rows in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attnbench.results import stats
from attnbench.results.rows import Row

SAVING_LEAST_DENSITY: Final = 0.1


@dataclass(frozen=True)
class Race:
    """The rows of one setting by backend. ``ours`` is the backend whose goal it is."""

    op: str
    name: str
    head_dim: int
    n: int
    direction: str
    ours: str
    rows: Mapping[str, Row]

    @property
    def label(self) -> str:
        """One line."""
        return f"{self.name} D={self.head_dim} N={self.n} {self.direction}"

    def ok(self, backend: str) -> Row | None:
        """The row of a backend that ran and was right."""
        row = self.rows.get(backend)
        return row if row is not None and row["status"] == "ok" else None

    def speed(self, peer: str) -> float | None:
        """Time of the peer by ours, median over the rounds: above 1 we are faster."""
        our_row, peer_row = self.ok(self.ours), self.ok(peer)
        if our_row is None or peer_row is None:
            return None
        pairs = zip(peer_row["samples_us"], our_row["samples_us"], strict=True)
        return stats.quantile([a / b for a, b in pairs], 0.5)

    def speed_of_best(self, peers: Sequence[str]) -> float | None:
        """Against the fastest of those peers that ran."""
        found = [speed for speed in map(self.speed, peers) if speed is not None]
        return min(found) if found else None


@dataclass(frozen=True)
class Point:
    """What a goal says of one race. Points of a ``group`` are one setting at several sizes."""

    label: str
    value: float
    group: str = ""


@dataclass(frozen=True)
class Goal:
    """``points`` reads the races of ``op``; the median must reach ``least``, in every group if ``each``."""

    op: str
    words: str
    least: float
    peers: tuple[str, ...]
    points: Callable[[Sequence[Race]], list[Point]]
    each: bool = False


@dataclass(frozen=True)
class Verdict:
    """``median`` and the worst points of a goal; both None when nothing was measured, with the reason."""

    goal: Goal
    points: tuple[Point, ...]
    reason: str = ""
    groups: Mapping[str, float] = field(default_factory=dict)

    @property
    def decisive(self) -> float | None:
        """The number that is compared: the median, or the smallest of the medians of the groups."""
        if not self.points:
            return None
        return min(self.groups.values()) if self.goal.each else _median(self.points)

    @property
    def met(self) -> bool | None:
        """None when nothing was measured."""
        return None if self.decisive is None else self.decisive >= self.goal.least


def _against(peers: Sequence[str]) -> Callable[[Sequence[Race]], list[Point]]:
    def points(races: Sequence[Race]) -> list[Point]:
        speeds = ((race, race.speed_of_best(peers)) for race in races)
        return [Point(race.label, speed, race.name) for race, speed in speeds if speed is not None]

    return points


def _saving(races: Sequence[Race]) -> list[Point]:
    """Share of the time of the full mask that is saved, by the share that an ideal kernel would save."""
    full: dict[tuple[object, ...], float] = {}
    for race in races:
        row = race.ok(race.ours)
        if row is not None and _density(race) == 1.0:
            full[race.head_dim, race.n, race.direction] = row["time_us"]
    points = []
    for race in races:
        row, density = race.ok(race.ours), _density(race)
        whole = full.get((race.head_dim, race.n, race.direction))
        if row is not None and whole is not None and SAVING_LEAST_DENSITY <= density < 1.0:
            points.append(Point(race.label, (1 - row["time_us"] / whole) / (1 - density), race.name))
    return points


def _density(race: Race) -> float:
    return float(race.name.removeprefix("density "))


def _copy_share(races: Sequence[Race]) -> list[Point]:
    points = []
    for race in races:
        row = race.ok(race.ours)
        if row is not None and row["peak_gbps_measured"]:
            points.append(Point(race.label, row["gbps_min"] / row["peak_gbps_measured"]))
    return points


def _race_goal(op: str, least: float, *peers: str, each: bool = False) -> Goal:
    words = f"≥ {least:g} × the best of {', '.join(peers)}" + (", each setting" if each else "")
    return Goal(op, words, least, peers, _against(peers), each)


GOALS: Final = (
    _race_goal("flash", 1.0, "sdpa_flash", "flex"),
    _race_goal("flash", 0.85, "sdpa_cudnn"),
    _race_goal("linrec", 1.0, "fla", each=True),
    _race_goal("block_sparse", 1.0, "flex"),
    Goal("block_sparse", "≥ 85 % of the ideal saving, to a density of 10 %", 0.85, (), _saving),
    _race_goal("neighborhood", 1.0, "natten"),
    _race_goal("neighborhood", 1.0, "flex"),
    _race_goal("window", 1.5, "torch"),
    _race_goal("selective_scan", 1.0, "mamba_ssm"),
    Goal("kv_reduce", "≥ 80 % of the bandwidth of a copy", 0.8, (), _copy_share),
)


def races(rows: Iterable[Row], ours: str) -> list[Race]:
    """Rows grouped by setting, in the order of their first row."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["mechanism"], row["hyper"], row["head_dim"], row["n"], row["direction"])
        groups.setdefault(key, {})[row["backend"]] = row
    return [
        Race(mechanism.removeprefix("op:"), json.loads(hyper)["setting"], d, n, direction, ours, found)
        for (mechanism, hyper, d, n, direction), found in groups.items()
    ]


def verdicts(found: Sequence[Race], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """One verdict a goal."""
    return [_verdict(goal, [race for race in found if race.op == goal.op]) for goal in goals]


def _verdict(goal: Goal, found: Sequence[Race]) -> Verdict:
    points = goal.points(found)
    if not points:
        return Verdict(goal, (), _why_nothing(goal, found))
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return Verdict(goal, tuple(points), "", {name: _median(group) for name, group in groups.items()})


def _why_nothing(goal: Goal, found: Sequence[Race]) -> str:
    """The reason of a row that the goal would have needed: a peer's before ours, skipped ones last."""
    rows = [race.rows[name] for race in found for name in (*goal.peers, race.ours) if name in race.rows]
    failed = [row for row in rows if row["status"] != "ok"]
    if not failed:
        return "no such race was run"
    row = min(failed, key=lambda row: (row["status"] == "skipped", row["backend"] not in goal.peers))
    return f"{row['backend']}: {row['status']}, {row['reason']}"


def _median(points: Sequence[Point]) -> float:
    return stats.quantile([point.value for point in points], 0.5)


# ---- the report ------------------------------------------------------------------------------------------


def report(found: Sequence[Race], title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown: facts of the run, goals, then every race."""
    text = [f"# {title}\n", *(f"- {name}: {value}" for name, value in facts), "", "## Goals\n"]
    text += ["| op | goal | observed | worst | points | met |", "|---|---|---|---|---|---|"]
    text += [_goal_line(verdict) for verdict in verdicts(found)]
    for op in dict.fromkeys(race.op for race in found):
        text += ["", f"## {op}\n", *_race_table([race for race in found if race.op == op])]
    return "\n".join(text) + "\n"


def _goal_line(verdict: Verdict) -> str:
    goal, observed = verdict.goal, verdict.decisive
    if observed is None:
        return f"| {goal.op} | {goal.words} | – | – | 0 | not measured: {_cell(verdict.reason)} |"
    worst = min(verdict.points, key=lambda point: point.value)
    met = "yes" if verdict.met else "**no**"
    at_worst = f"{worst.value:.2f} ({worst.label})"
    return f"| {goal.op} | {goal.words} | {observed:.2f} | {at_worst} | {len(verdict.points)} | {met} |"


def _race_table(found: Sequence[Race]) -> list[str]:
    peers = [b for b in dict.fromkeys(b for race in found for b in race.rows) if b != race_ours(found)]
    head = ["setting", "D", "N", "direction", "ours µs", "% of measured roofline"]
    head += [f"× {peer}" for peer in peers]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for race in found:
        row = race.rows[race.ours]
        ok = race.ok(race.ours)
        cells = [race.name, str(race.head_dim), str(race.n), race.direction]
        cells += [f"{ok['time_us']:.1f}" if ok else f"{row['status']}: {_cell(row['reason'])}"]
        cells += [f"{ok['roofline_measured_pct']:.0f}" if ok else "–"]
        cells += [_speed_cell(race, peer) for peer in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def race_ours(found: Sequence[Race]) -> str:
    """The backend that is ours in these races."""
    return found[0].ours


def _speed_cell(race: Race, peer: str) -> str:
    speed = race.speed(peer)
    if speed is not None:
        return f"{speed:.2f}"
    row = race.rows.get(peer)
    return "–" if row is None else str(row["status"])


def _cell(text: str) -> str:
    """Text on one line of a table."""
    return " ".join(text.replace("|", "/").split())[:160]
