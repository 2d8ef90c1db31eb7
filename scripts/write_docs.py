"""Write the pages of docs/ that are derived from the code, so that nothing is said twice.

Run as `python scripts/write_docs.py`; `--check` only compares (tests/test_docs.py does).
"""

from __future__ import annotations

import importlib
import inspect
import statistics
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from attnbench.impls.spec import Spec
from attnbench.results import schema, scoring
from attnbench.results.flags import FLAG_MEANING
from attnbench.results.read import rows
from attnbench.results.rows import Row
from attnbench.results.schema import COLUMNS, GROUPS, STATUS_MEANING
from attnbench.results.table import Column, Table, table, to_markdown
from attnbench.tasks.base import Task

ROOT = Path(__file__).resolve().parent.parent
INTRO = """\
<!-- Written by scripts/write_docs.py from results/schema.py and flags.py: edit there. -->
# Metrics: every column of a result

One row is one planned case in one block (a fresh process). Columns marked **ok only** are filled only where
the status is `ok`: a case that failed never carries a time. Nothing is imputed: an unknown value is null.

## Status

| status | meaning |
|---|---|
"""

FLAGS = """
## Flags

A flag does not change a number, it says what makes it less certain. A row stores each as
`name: observed …, limit …`.

| flag | meaning |
|---|---|
"""


def metrics() -> str:
    """The text of docs/metrics.md: the statuses and flags, then every column by group."""
    text = INTRO + "".join(f"| `{status}` | {meaning} |\n" for status, meaning in STATUS_MEANING.items())
    text += FLAGS + "".join(f"| `{flag}` | {meaning} |\n" for flag, meaning in FLAG_MEANING.items())
    for group, title in GROUPS.items():
        text += f"\n## {title}\n\n| column | type | unit | meaning |\n|---|---|---|---|\n"
        text += "".join(_line(column) for column in COLUMNS if column.group == group)
    return text


def _line(column: schema.Column) -> str:
    ok_only = " **ok only**" if column.performance else ""
    return f"| `{column.name}` | {column.type} | {column.unit or '–'} | {column.doc}{ok_only} |\n"


MECHANISMS_INTRO = """\
<!-- Written by scripts/write_docs.py from the Specs of the mechanisms: edit there. -->
# Mechanisms

{count} mechanisms. *Patterns*: noncausal and causal (N, C), self and cross (S, C). *Hot loop*: the
operation of [kernels](kernels.md) that the time goes into, or what is there instead. *Confidence* says how
firmly the definition is known: `high` from code and paper, `medium` where the paper leaves choices open,
`low` where it was rebuilt from a description; what was decided then is among the deviations.
"""

KERNELS_INTRO = """\
<!-- Written by scripts/write_docs.py from the docstrings of the operations: edit there. -->
# Operations

Mechanisms stand on these. Each is one differentiable function on (B, H, N, D) tensors with a `reference`
that is its definition, a `torch` form in eager PyTorch and `triton` kernels, forward and backward; the
other backends are the libraries that one would pick instead. A backend computes the call or raises
`Unsupported` with the reason; only `backend="auto"` chooses. Tiles are tuned on the GPU at hand and kept on
disk (`ATTNBENCH_TUNING=off|cache|tune`). `attnbench env` shows what runs here, `python -m
attnbench.kernels.aot` the registers, shared memory and spills of every kernel for a GPU that is not here.
"""


def mechanisms() -> str:
    """The text of docs/mechanisms.md: a table by family, then what each Spec declares."""
    from attnbench.impls import registry

    specs = [registry.spec(name) for name in registry.ids()]
    text = MECHANISMS_INTRO.format(count=len(specs))
    for family in registry.FAMILIES:
        found = [spec for spec in specs if spec.family == family]
        text += f"\n## {family} ({len(found)})\n\n"
        text += "| mechanism | patterns | hot loop | cost | paper |\n|---|---|---|---|---|\n"
        text += "".join(_mechanism_line(spec) for spec in found)
        text += "".join(_mechanism_section(spec) for spec in found)
    return text


def _mechanism_line(spec: Spec) -> str:
    ops = sorted({op for pattern in spec.patterns for op in spec.ops_for(pattern)})
    paper = f"[{spec.paper.year}]({spec.paper.url})" if spec.paper.url else f"{spec.paper.year}"
    hot = ", ".join(f"`{op}`" for op in ops) or spec.hot_loop
    return (
        f"| [`{spec.id}`](#{spec.id}) | {' '.join(spec.patterns)} | {hot} | {_cell(spec.cost)} | {paper} |\n"
    )


def _mechanism_section(spec: Spec) -> str:
    where = f"{spec.paper.title}, {spec.paper.year}" + (f" ({spec.paper.venue})" if spec.paper.venue else "")
    link = f"[{where}]({spec.paper.url})" if spec.paper.url else where
    text = f"\n### {spec.id}\n\n{spec.name}: {spec.summary}\n\n`{spec.formula}`\n\n{link}. "
    text += f"Confidence: {spec.confidence}."
    if spec.causality == "selection_leaky":
        text += " Causal only once its selection is frozen."
    text += "\n"
    if spec.hyper:
        text += "\n| hyper-parameter | default | meaning |\n|---|---|---|\n"
        text += "".join(f"| `{h.name}` | {h.default!r} | {_cell(h.meaning)} |\n" for h in spec.hyper)
    if spec.deviations:
        text += "\n" + "".join(f"- {note}\n" for note in spec.deviations)
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def kernels() -> str:
    """The text of docs/kernels.md: every operation with its backends and what its docstring says."""
    from attnbench.kernels import OPS

    text = KERNELS_INTRO + "\n| operation | what it computes | backends |\n|---|---|---|\n"
    functions = {
        name: getattr(importlib.import_module(f"attnbench.kernels.{name}"), name) for name in sorted(OPS)
    }
    for name, function in functions.items():
        what = (inspect.getdoc(function) or "").partition("\n")[0]
        text += f"| [`{name}`](#{name}) | {_cell(what)} | {', '.join(OPS[name].backends)} |\n"
    for name, function in functions.items():
        text += f"\n## {name}\n\n```\n{name}{_signature(function)}\n\n{inspect.getdoc(function)}\n```\n"
    return text


def _signature(function: Callable[..., object]) -> str:
    """Names and defaults, without the annotations, which the text explains."""
    shown = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(shown))


FLOPS_INTRO = """\
<!-- Written by scripts/write_docs.py by counting: edit the formulas in impls/. -->
# FLOPs: stated and counted

Every mechanism states its forward FLOPs as a formula; a multiply-add is 2. The table compares the formula
with what torch's `FlopCounterMode` counts on the named backend for one batch element, 2 heads of 8: the
contract check `flops_match_counter` fails beyond 2 %. The counter sees matrix products and convolutions, not
element-wise work, sorting or scans. Where a backend computes more than the definition needs (a masked dense
product, say), the formula that is compared is the one of the work done (`counted_flops`); the rows of results
carry the work needed.
"""


def flops() -> str:
    """The text of docs/flops.md: stated against counted FLOPs, then the mechanisms that cannot be counted."""
    from attnbench.harness.contract import targets
    from attnbench.harness.contract.flops import count
    from attnbench.harness.contract.probe import Probe
    from attnbench.impls import registry

    text = FLOPS_INTRO + "\n| mechanism | pattern | backend | N × M | stated | counted | stated/counted |\n"
    text += "|---|---|---|---:|---:|---:|---:|\n"
    notes = ""
    for name in registry.ids():
        spec = registry.spec(name)
        if not spec.flops_backend:
            notes += f"| `{name}` | {_cell(spec.flops_note)} |\n"
            continue
        for target in targets(registry.mechanism(name)):
            if target.backend == spec.flops_backend:
                probe = Probe(target)
                n, m = probe.cost_sizes()[-1]
                counted, stated = count(probe, n, m)
                text += f"| `{name}` | {target.pattern} | {target.backend} | {n} × {m} "
                text += f"| {stated:,} | {counted:,} | {stated / counted:.3f} |\n"
    return text + "\n## Not countable\n\n| mechanism | why |\n|---|---|\n" + notes


TASKS_INTRO = """\
<!-- Written by scripts/write_docs.py from the tasks: edit there. -->
# Tasks

{count} tasks. Each trains a small model whose only variable part is the attention of one pattern; all other
attention of the model is softmax. `attnbench run --impl performer --task mqar,suite:cab` runs one or a
suite; beside the mechanisms asked for, every task runs two exact forms of softmax, whose scores must tie, and
two controls: `no_mixing` (no token sees another) and `uniform` (tokens are averaged). The *limits* are what
softmax must reach and no mixing must miss, measured with seeds 0, 1 and 2, for the preset to count as a test
of attention; a task without limits under a pattern is reported and marked as not discriminating.
`attnbench score` puts the scores together; `attnbench data status` says which real data are here.
"""


def tasks() -> str:
    """The text of docs/tasks.md: a table by suite, then what each task declares."""
    from attnbench.tasks import registry

    found = [registry.task(name) for name in registry.ids()]
    text = TASKS_INTRO.format(count=len(found))
    for suite in registry.SUITES:
        mine = [task for task in found if registry.suite_of(task.id) == suite]
        text += f"\n## {suite} ({len(mine)})\n\n| task | patterns | metric | presets |\n|---|---|---|---|\n"
        for task in mine:
            better = f"`{task.metric}`, {task.better} is better"
            text += f"| [`{task.id}`](#{task.id}) | {' '.join(task.patterns)} | {better} "
            text += f"| {', '.join(task.presets)} |\n"
        text += "".join(_task_section(task) for task in mine)
    return text


def _task_section(task: Task) -> str:
    text = f"\n### {task.id}\n\n{task.title}. {task.data}.\n\nSource: {task.source}\n\n"
    text += "| preset | pattern | N | M | C | heads | steps | batch | softmax reaches | no mixing misses |\n"
    text += "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    for name, preset in task.presets.items():
        for pattern in task.patterns:
            shape, check = task.workload(name, pattern), preset.checks.get(pattern)
            w = shape.workload
            limits = f"{check.softmax:g} | {check.no_mixing:g}" if check else "– | –"
            text += f"| {name} | {pattern} | {shape.n} | {shape.m} | {w.width} | {w.heads} "
            text += f"| {preset.recipe.steps} | {w.batch * preset.recipe.accumulate} | {limits} |\n"
    return text


SCORES_INTRO = """\
<!-- Written by scripts/write_docs.py from results/published: add results there. -->
# Scores of the tasks

What `attnbench score results/published` says of the tasks that were trained so far. The words are explained
in [how it is measured](method.md#tasks), the tasks in [tasks](tasks.md). Every cell rests on all seeds that
were planned: with a seed that failed it shows the status instead.

"""


def scores() -> str:
    """The text of docs/scores.md: the tables of ``attnbench score`` on what is published, and the times."""
    published = ROOT / "results" / "published"
    found = rows([published]) if any(published.rglob("*.parquet")) else []
    trained = [row for row in found if row["scope"] == "task"]
    if not trained:
        return SCORES_INTRO + "Nothing is published yet.\n"
    said = scoring.score(trained)
    tables = [t for t in said.tables if t.rows]
    return SCORES_INTRO + to_markdown([*tables, _cost(trained)])


PLACE = ("device", "preset", "task", "pattern")


def _cost(trained: Sequence[Row]) -> Table:
    """Median wall times of one training and one case, evaluation and start of the model included."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in trained:
        if row["status"] == "ok":
            where = tuple(str(row[name]) for name in PLACE)
            groups.setdefault(where, []).append(row)
    records = [
        {
            **dict(zip(PLACE, where, strict=True)),
            "runs": len(group),
            "steps": group[0]["steps"],
            "train_s": statistics.median(row["train_s"] for row in group),
            "duration_s": statistics.median(row["duration_s"] for row in group),
            "longest_s": max(row["duration_s"] for row in group),
        }
        for where, group in sorted(groups.items())
    ]
    texts = [Column(name, itemgetter(name), numeric=False) for name in PLACE]
    numbers = [
        Column("runs", lambda r: str(r["runs"])),
        Column("steps", lambda r: str(r["steps"])),
        Column("training, median (s)", lambda r: f"{r['train_s']:.1f}"),
        Column("case, median (s)", lambda r: f"{r['duration_s']:.1f}"),
        Column("case, longest (s)", lambda r: f"{r['longest_s']:.1f}"),
    ]
    return table("Wall times", [*texts, *numbers], records)


PAGES = {
    "docs/metrics.md": metrics,
    "docs/mechanisms.md": mechanisms,
    "docs/kernels.md": kernels,
    "docs/flops.md": flops,
    "docs/tasks.md": tasks,
    "docs/scores.md": scores,
}


def main() -> int:
    """Write or compare every page; 1 when a page is out of date."""
    stale = [path for path, page in PAGES.items() if _differs(ROOT / path, page())]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is out of date: run python scripts/write_docs.py")
        return bool(stale)
    for path in stale:
        (ROOT / path).write_text(PAGES[path]())
        print(f"wrote {path}")
    return 0


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text


if __name__ == "__main__":
    sys.exit(main())
