"""The command line: one thin function a command; imports no torch before a command needs it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from attnbench import __version__
from attnbench.errors import AttnbenchError, UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnbench.harness.plan import Planned
    from attnbench.results.comparison import Comparison
    from attnbench.results.table import Table
    from attnbench.tasks.data.prepare import Progress
    from attnbench.tasks.data.sources import State

EXIT_FAILED, EXIT_USAGE = 1, 2

app = typer.Typer(
    name="attnbench",
    help="Benchmark attention mechanisms: latency, memory, FLOPs, numerical error and accuracy on tasks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
site_app = typer.Typer(
    help="Build or serve the static leaderboard.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(site_app, name="site")
data_app = typer.Typer(
    help="Find or download the real data sets of the tasks.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Results = Annotated[list[Path], typer.Argument(help="Run folders, Parquet files or journals.")]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"attnbench {__version__}")
        raise typer.Exit


@app.command()
def run(
    impl: Annotated[
        str, typer.Option(help="Ids, id/backend, globs, family:NAME, all, file.py:Class; comma-separated.")
    ] = "all",
    gpu: Annotated[
        str, typer.Option(help="A device name, auto, or cpu; several with --engine ray or slurm: a100,h100.")
    ] = "auto",
    suite: Annotated[str, typer.Option(help="Named set of workloads.")] = "ops",
    task: Annotated[
        str, typer.Option(help="Train and evaluate on these tasks instead of timing operations.")
    ] = "",
    workload: Annotated[str, typer.Option(help="Workloads by name, instead of a suite.")] = "",
    pattern: Annotated[str, typer.Option(help="NS, CS, NC, CC; comma-separated. Default: all.")] = "",
    seqlen: Annotated[str, typer.Option(help="Lengths: 1024, 256,512 or 1024..65536 (powers of two).")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; comma-separated.")] = "",
    direction: Annotated[str, typer.Option(help="fwd, fwd_bwd; comma-separated.")] = "",
    preset: Annotated[
        str,
        typer.Option(help="How large, and how long it is measured: tiny, small, paper; or a task's variant."),
    ] = "tiny",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter: performer.num_features=64. Repeatable."),
    ] = None,
    density: Annotated[
        float, typer.Option(help="Share of the pairs that sparse mechanisms keep; 0: their own choice.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of inputs, weights and order.")] = 0,
    blocks: Annotated[int, typer.Option(help="Fresh processes that measure each case.")] = 1,
    publish: Annotated[bool, typer.Option(help="Measure three blocks, as published rows need.")] = False,
    shard: Annotated[str, typer.Option(help="Measure part i of n: i/n.")] = "1/1",
    ranks: Annotated[
        str, typer.Option(help="Processes that share one call, with --suite context_parallel: 1,2,4.")
    ] = "",
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which a case is a timeout; 0: 120, a task 1800.")
    ] = 0.0,
    threads: Annotated[
        int, typer.Option(help="CPU threads of a worker; 0: the preset's, tiny 1, else one per core.")
    ] = 0,
    infer: Annotated[
        bool, typer.Option(help="Skip lengths beyond one that ran out of memory or time.")
    ] = True,
    engine: Annotated[str, typer.Option(help="Where workers run: local, ray or slurm.")] = "local",
    address: Annotated[
        str, typer.Option(help="Ray cluster; default: RAY_ADDRESS, one on this machine, or a new one.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Slurm jobs that share the work, for each --gpu.")] = 1,
    slurm: Annotated[
        list[str] | None, typer.Option(help="A parameter of the Slurm jobs: partition=gpu. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and measure nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Json = False,
) -> None:
    """Measure impls: plan the cases, run each in a worker process, write one row for every case."""
    from attnbench.harness import config as cfg

    request = cfg.RunConfig(
        impl=_list(impl),
        gpu=gpu,
        suite=suite,
        task=_list(task),
        workload=_list(workload),
        pattern=_list(pattern),
        seqlen=cfg.parse_lengths(seqlen) if seqlen else (),
        dtype=_list(dtype),
        direction=_list(direction),
        preset=preset,
        seed=seed,
        blocks=3 if publish else blocks,
        shard=cfg.parse_shard(shard),
        time_limit_s=time_limit,
        threads=threads,
        infer=infer,
        hyper=tuple(cfg.parse_hyper(text) for text in setting or ()),
        density=density,
        ranks=cfg.parse_ranks(ranks) if ranks else (),
        engine=engine,
        jobs=jobs,
    )
    from attnbench.harness import engines
    from attnbench.harness import run as driver
    from attnbench.harness.progress import listener

    where = driver.stored(resume)[1].engine if resume else cfg.check_engine(engine)
    options = engines.Options(address, dict(cfg.parse_parameter(text) for text in slurm or ()))
    with engines.opened(where, options) as opened:
        if dry_run:
            _show_plan(opened.plan(request), as_json)
            return
        with listener(quiet=quiet or as_json) as shown:
            done = (
                driver.resume(resume, shown, opened, request.impl)
                if resume
                else driver.run(request, out, shown, opened)
            )
    if as_json:
        typer.echo(
            json.dumps({"path": str(done.path), "rows": len(done.rows), "by_status": done.by_status()})
        )
        return
    counts = ", ".join(f"{count} {status}" for status, count in done.by_status().items())
    typer.echo(f"{len(done.rows)} rows ({counts}) in {done.path}\nNext: attnbench report {done.path}")


def _show_plan(planned: list[Planned], as_json: bool) -> None:
    from attnbench.harness.plan import series_of

    devices = ", ".join(dict.fromkeys(item.case.device for item in planned))
    if as_json:
        cases = [
            {
                "case_key": p.case.key(),
                "block": p.block,
                "label": p.case.label(),
                "unsupported": p.unsupported,
            }
            for p in planned
        ]
        typer.echo(json.dumps({"device": devices, "cases": cases}, indent=2))
        return
    for item in planned:
        note = f"  unsupported: {item.unsupported}" if item.unsupported else ""
        typer.echo(f"{item.case.key()}  {item.case.label()}{note}")
    blocked = sum(bool(p.unsupported) for p in planned)
    typer.echo(
        f"{len(planned)} cases on {devices}, {blocked} of them unsupported here, "
        f"in {series_of(planned)} worker processes"
    )


@app.command("list")
def list_command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms with this pattern.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="List tasks instead.")] = False,
    workloads: Annotated[bool, typer.Option("--workloads", help="List workloads instead.")] = False,
    as_json: Json = False,
) -> None:
    """List mechanisms (or tasks, or workloads) with what they declare."""
    from attnbench.harness import listing

    if tasks:
        table = listing.tasks()
    elif workloads:
        table = listing.workloads()
    else:
        table = listing.mechanisms(family, pattern)
    _print_table(table, as_json)


@app.command()
def check(
    impl: Annotated[str, typer.Argument(help="Mechanism id, or path/to/file.py:Class.")],
    pattern: Annotated[str, typer.Option(help="Only these patterns.")] = "",
    backend: Annotated[str, typer.Option(help="Only these backends.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show passed checks too.")] = False,
    as_json: Json = False,
) -> None:
    """Run the contract kit on one mechanism: what passed, what failed and why."""
    from attnbench.harness import listing

    table, failed = listing.contract_table(impl, _list(pattern), _list(backend), verbose)
    _print_table(table, as_json)
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def estimate(
    gpu: Annotated[str, typer.Option(help="GPU to model, by name or family: b200, rtx-5090.")] = "h100-sxm",
    impl: Annotated[str, typer.Option(help="As for run; backends share one bound.")] = "softmax",
    suite: Annotated[str, typer.Option(help="Named set of workloads.")] = "ops",
    workload: Annotated[str, typer.Option(help="Workloads by name, instead of a suite.")] = "",
    pattern: Annotated[str, typer.Option(help="NS, CS, NC, CC; comma-separated. Default: all.")] = "",
    seqlen: Annotated[str, typer.Option(help="Lengths: 1024, 256,512 or 1024..65536 (powers of two).")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; comma-separated.")] = "",
    direction: Annotated[str, typer.Option(help="fwd, fwd_bwd; comma-separated.")] = "fwd",
    preset: Annotated[str, typer.Option(help="tiny, small or paper: lengths without --seqlen.")] = "small",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter: local_window.window=64. Repeatable."),
    ] = None,
    grid: Annotated[str, typer.Option(help="Instead: tiles of a neighborhood on this grid: 30,48,80.")] = "",
    window: Annotated[str, typer.Option(help="Its window, for all axes or for each.")] = "",
    stride: Annotated[str, typer.Option(help="Its stride.")] = "1",
    dilation: Annotated[str, typer.Option(help="Its dilation.")] = "1",
    tile: Annotated[str, typer.Option(help="Tile of the kernel, 16,8; or of queries/keys, 4,8/2,8.")] = "",
    causal: Annotated[bool, typer.Option("--causal", help="Causal along every axis.")] = False,
    as_json: Json = False,
) -> None:
    """Model bounds for a GPU that need not be here: roofline, memory and tiles. Nothing is measured."""
    if grid or window:
        from attnbench.harness.estimate import neighborhoods

        record = neighborhoods.simulate(grid, window, stride, dilation, tile, causal)
        if as_json:
            typer.echo(neighborhoods.to_json(record))
        else:
            _print_table(neighborhoods.to_table(record), False)
        return
    from attnbench.harness import config as cfg
    from attnbench.harness.estimate import model, show

    request = cfg.RunConfig(
        impl=_list(impl),
        suite=suite,
        workload=_list(workload),
        pattern=_list(pattern),
        seqlen=cfg.parse_lengths(seqlen) if seqlen else (),
        dtype=_list(dtype),
        direction=_list(direction),
        preset=preset,
        hyper=tuple(cfg.parse_hyper(text) for text in setting or ()),
    )
    found = model.estimates(request, gpu)
    if as_json:
        typer.echo(json.dumps(show.estimate_json(found), indent=2))
        return
    _print_table(show.estimate_table(found), False)


@app.command()
def pick(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Results to pick from. Default: the published ones.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="NS, CS, NC or CC.")] = "NS",
    seqlen: Annotated[int, typer.Option(help="Queries N.")] = 4096,
    keys: Annotated[int, typer.Option(help="Keys M; 0: as many as queries.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    gpu: Annotated[str, typer.Option(help="Device of the rows; may be left out where they have one.")] = "",
    direction: Annotated[str, typer.Option(help="fwd or fwd_bwd.")] = "fwd",
    scope: Annotated[str, typer.Option(help="op or layer.")] = "op",
    workload: Annotated[str, typer.Option(help="Only this workload.")] = "",
    max_error: Annotated[
        float, typer.Option(help="Largest RMS distance to exact softmax attention; 0: exact only.")
    ] = float("inf"),
    inputs: Annotated[
        str, typer.Option(help="Inputs of that distance: recorded, structured or gaussian.")
    ] = "recorded",
    as_json: Json = False,
) -> None:
    """Pick an impl for a case from measured rows: the fastest within an error, the runner-up, and why.

    Exits with 1 where the data cannot tell; nothing is extrapolated.
    """
    from attnbench.results import pick as picking

    if inputs not in picking.INPUTS:
        raise unknown_name("--inputs", inputs, picking.INPUTS)
    question = picking.Question(
        pattern=pattern,
        n=seqlen,
        m=keys,
        dtype=dtype,
        device=gpu,
        direction=direction,
        scope=scope,
        workload=workload,
        max_error=max_error,
        inputs=inputs,
    )
    answers = picking.pick(_rows(results or [_published()]), question)
    if as_json:
        typer.echo(json.dumps([answer.plain() for answer in answers], indent=2))
    else:
        for answer in answers:
            _print_table(picking.to_table(answer, question), False)
    if not any(answer.best for answer in answers):
        raise typer.Exit(EXIT_FAILED)


def _published() -> Path:
    folder = Path(__file__).parent / "results/published"
    if not any(folder.glob("**/*.parquet")):
        raise UsageError(f"{folder} holds no published results; name run folders or Parquet files")
    return folder


@app.command()
def report(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="Also write tables (CSV) and figures here.")] = None,
    baseline: Annotated[str, typer.Option(help="Impl that times are compared with.")] = "softmax/sdpa_flash",
    figure_format: Annotated[str, typer.Option("--format", help="Figures as png, pdf or svg.")] = "png",
    as_json: Json = False,
) -> None:
    """Print tables of results; with --out also write them as CSV, with figures."""
    from attnbench.results import report as reports

    rows = _rows(results)
    built = reports.build(rows, baseline)
    if as_json:
        typer.echo(json.dumps([dict(record) for t in built.tables for record in t.records], default=str))
    else:
        for table in built.tables:
            _print_table(table, False)
        for note in built.notes:
            typer.echo(note)
    if out is not None:
        _write_report(built, rows, out, figure_format, baseline)


def _write_report(built: Any, rows: list[dict[str, Any]], out: Path, suffix: str, baseline: str) -> None:
    from attnbench.results import figures, table

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, tables in (("cases", built.cases), ("tasks", built.tasks), ("statuses", built.statuses)):
            if tables:
                (out / f"{name}.csv").write_text(table.to_csv(tables), encoding="utf-8")
                typer.echo(f"wrote {out / name}.csv")
        (out / "report.md").write_text(table.to_markdown(built.tables), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    for path in figures.draw(rows, out, (suffix,), baseline):
        typer.echo(f"wrote {path}")


@app.command()
def score(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="Folder for scores.parquet, CSV and Markdown.")] = None,
    min_pool: Annotated[
        int, typer.Option(help="Fewest mechanisms whose spread may define an index.", min=2)
    ] = 6,
    scales: Annotated[
        Path | None, typer.Option(help="Frozen scales of the indices, a file of --freeze.")
    ] = None,
    freeze: Annotated[
        Path | None, typer.Option(help="Keep the scales of the indices in this file, for later runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what scores mean together: benefit of attention, positions, indices, correlations, lengths."""
    from attnbench.results import frozen, scoring

    kept = None if scales is None else frozen.load(scales)
    found = scoring.score(_rows(results), min_pool, kept)
    if as_json:
        typer.echo(json.dumps([dict(record) for t in found.tables for record in t.records], default=str))
    else:
        for table in found.tables:
            _print_table(table, False)
        for note in found.notes:
            typer.echo(note)
    if out is not None:
        for path in scoring.write(found, out):
            typer.echo(f"wrote {path}")
    if freeze is not None:
        typer.echo(f"{scoring.freeze(found, freeze)} scales in {freeze}")


@app.command()
def merge(
    results: Results,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
) -> None:
    """Unite the parts of a sharded run."""
    from attnbench.results.merge import merge as unite

    done = unite(results, out)
    typer.echo(f"{done.rows} rows in {out}, {done.duplicates} identical copies left out")


@app.command()
def validate(results: Results, as_json: Json = False) -> None:
    """Check results: schema, statuses, duplicates, ranges. Exits with 1 when something is wrong."""
    from attnbench.results.validate import validate as check_all

    found = check_all(results)
    if as_json:
        typer.echo(json.dumps([vars(p) | {"path": str(p.path)} for p in found], default=str, indent=2))
    else:
        for problem in found:
            typer.echo(str(problem))
        typer.echo(f"{len(found)} problems")
    if any(problem.severity == "error" for problem in found):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def env(as_json: Json = False) -> None:
    """Show this machine: device, software, and which backends and peers can run here, or why not."""
    from attnbench.harness import listing

    if as_json:
        typer.echo(json.dumps(listing.environment_json(), indent=2))
        return
    for table in listing.environment_tables():
        _print_table(table, False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Recorded results, or a version: ., commit, tree, wheel.")],
    head: Annotated[str, typer.Argument(help="The same, what is suspected of being slower.")],
    pairs: Annotated[int, typer.Option(help="Pairs of blocks to measure.")] = 8,
    max_pairs: Annotated[int, typer.Option(help="Pairs in all while a case is uncertain.")] = 16,
    fail_on: Annotated[
        str, typer.Option(help="What exits with 1: slower, uncertain, incorrect, missing; or never.")
    ] = "slower",
    calibration: Annotated[
        Path | None, typer.Option(help="File of `attnbench calibrate`: thresholds from this machine's noise.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables here, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two versions or two recorded results: slower, faster, same or uncertain, case by case.

    Two versions are measured here in turns; further options are those of `attnbench run`.
    """
    from attnbench.harness import calibrate as noise
    from attnbench.harness import compare as turns
    from attnbench.results import comparison
    from attnbench.results.compare import DEFAULT

    known = {str(word): word for word in comparison.FAIL_ON}
    for word in _list(fail_on):
        if word not in known:
            raise unknown_name("--fail-on", word, known)
    reasons = {known[word] for word in _list(fail_on)}
    rule = noise.load(calibration).rule() if calibration else DEFAULT
    found = turns.compare(
        base, head, context.args, pairs=pairs, max_pairs=max_pairs, rule=rule, announce=_announcer(as_json)
    )
    _print_comparison(found, markdown, as_json)
    if any(found.failed(reason) for reason in reasons):
        raise typer.Exit(EXIT_FAILED)
    if reasons & {"slower", "uncertain"} and not any(case.decision.pairs for case in found.cases):
        raise AttnbenchError("no case has enough pairs of times on both sides; see the reasons above")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File for `attnbench compare --calibration`.")],
    pairs: Annotated[int, typer.Option(help="Pairs of blocks of the same version.")] = 8,
    as_json: Json = False,
) -> None:
    """Compare this version with itself: the noise of this machine and the slow-down it can show.

    Further options are those of `attnbench run`.
    """
    from dataclasses import asdict

    from attnbench.harness import calibrate as noise
    from attnbench.harness import compare as turns

    found = turns.compare(".", ".", context.args, pairs=pairs, max_pairs=pairs, announce=_announcer(as_json))
    measured = noise.of_comparison(found)
    noise.save(measured, out)
    if as_json:
        typer.echo(json.dumps(asdict(measured), indent=2))
        return
    typer.echo(
        f"{measured.cases} cases, {measured.pairs} pairs: a pair's ratio varies by {measured.sd:.2%} in "
        f"the median case, {measured.worst_sd:.2%} in the worst; successive pairs correlate by "
        f"{measured.autocorrelation:+.2f}; {measured.false_alarms:.1%} of the cases were called slower or "
        f"faster; smallest slow-down that {measured.pairs} pairs find: {measured.detectable:+.1%}. "
        f"Written to {out}"
    )


def _announcer(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))


def _print_comparison(found: Comparison, markdown: Path | None, as_json: bool) -> None:
    from attnbench.results import comparison
    from attnbench.results.table import to_markdown

    tables = comparison.tables(found)
    if markdown is not None:
        try:
            markdown.write_text(to_markdown(tables), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{markdown} cannot be written: {error.strerror}") from None
    if as_json:
        records = {table.title: [dict(record) for record in table.records] for table in tables}
        typer.echo(json.dumps({"tables": records, "notes": found.notes}, indent=2, default=str))
        return
    for table in tables:
        _print_table(table, False)


@site_app.command("build")
def site_build(
    results: Results,
    out: Annotated[Path, typer.Option(help="Folder of the site.")] = Path("_site"),
    url: Annotated[str, typer.Option(help="Address that the site will have, where links need it.")] = "",
    repository: Annotated[str, typer.Option(help="Address of the source, for links to it.")] = "",
) -> None:
    """Write the leaderboard as static pages."""
    from attnbench.harness import catalogue
    from attnbench.site.build import build

    pages = build(results, out, catalogue.catalogue, url=url, repository=repository)
    typer.echo(f"{pages} pages in {out}: open {out / 'index.html'}")


@site_app.command("serve")
def site_serve(
    folder: Annotated[Path, typer.Argument(help="Folder that `attnbench site build` wrote.")] = Path("_site"),
    port: Annotated[int, typer.Option(help="Port on the loopback interface; 0 picks a free one.")] = 8000,
) -> None:
    """Serve a built site on this machine only, until Ctrl-C."""
    from attnbench.site.serve import serve

    serve(folder, port, typer.echo)


DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of the data sets. Default: $ATTNBENCH_DATA, ~/.cache/attnbench.")
]


@data_app.command("status")
def data_status(
    data_root: DataRoot = None,
    verify: Annotated[bool, typer.Option("--verify", help="Count and sample what is here.")] = False,
    as_json: Json = False,
) -> None:
    """Show which real data sets are here, where, and what the others need."""
    from attnbench.tasks.data import sources

    _print_table(_data_table(list(sources.states(data_root, verify))), as_json)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="Data set, as `attnbench data status` names it.")],
    data_root: DataRoot = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Download a data set and check it. A run never downloads anything."""
    from attnbench.tasks.data.prepare import prepare

    with _download_bar(quiet) as shown:
        source = prepare(name, data_root, shown)
    typer.echo(f"{name} in {source.root}: {', '.join(map(str, source.verify()))}")


def _data_table(states: list[State]) -> Table:
    from operator import itemgetter

    from attnbench.results.table import Column, table

    records = [
        {
            "data_set": state.data_set.name,
            "title": state.data_set.title,
            "folder": str(state.root or "–"),
            "state": state.summary,
            "size": state.data_set.size,
            "licence": state.data_set.licence,
            "get_it": state.data_set.command or state.data_set.home,
        }
        for state in states
    ]
    columns = [Column(name.replace("_", " "), itemgetter(name), False) for name in records[0]]
    here = sum(state.root is not None for state in states)
    return table(f"{here} of {len(records)} data sets are here", columns, records)


@contextlib.contextmanager
def _download_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar for every file that is fetched, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    name_column = TextColumn("{task.description}", markup=False)
    with Bars(name_column, BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bars:
        shown: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in shown:
                shown[name] = bars.add_task(name, total=total)
            bars.update(shown[name], completed=done)

        yield show


# ---- helpers -------------------------------------------------------------------------------------------


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _rows(paths: list[Path]) -> list[dict[str, Any]]:
    from attnbench.results.read import rows

    found = rows(paths)
    if not found:
        raise UsageError(f"{', '.join(map(str, paths))}: observed no rows, expected results of attnbench run")
    return found


def _print_table(table: Any, as_json: bool) -> None:
    """Print a table with rich, or its records as JSON."""
    if as_json:
        typer.echo(json.dumps(table.records, indent=2, default=str))
        return
    from attnbench.harness.terminal import show

    show(table)


def main() -> NoReturn:
    """Entry point: run a command; an error a user can cause is one line and an exit code."""
    verbose = "-v" in sys.argv[1:] or "--verbose" in sys.argv[1:]
    try:
        app(standalone_mode=True)
    except AttnbenchError as error:
        if verbose:
            raise
        typer.echo(f"attnbench: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("\nattnbench: interrupted; finished cases are kept, --resume goes on", err=True)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
