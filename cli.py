"""The command line: one thin function a command; imports no torch before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from attnbench import __version__
from attnbench.errors import AttnbenchError, UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnbench.harness.config import RunConfig
    from attnbench.results.comparison import Comparison

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
    gpu: Annotated[str, typer.Option(help="A device name, auto, or cpu.")] = "auto",
    suite: Annotated[str, typer.Option(help="Named set of workloads.")] = "ops",
    task: Annotated[
        str, typer.Option(help="Train and evaluate on these tasks instead of timing operations.")
    ] = "",
    workload: Annotated[str, typer.Option(help="Workloads by name, instead of a suite.")] = "",
    pattern: Annotated[str, typer.Option(help="NS, CS, NC, CC; comma-separated. Default: all.")] = "",
    seqlen: Annotated[str, typer.Option(help="Lengths: 1024, 256,512 or 1024..65536 (powers of two).")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; comma-separated.")] = "",
    direction: Annotated[str, typer.Option(help="fwd, fwd_bwd; comma-separated.")] = "",
    preset: Annotated[str, typer.Option(help="tiny, small or paper.")] = "tiny",
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
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which a case is a timeout; 0: 120, a task 1800.")
    ] = 0.0,
    threads: Annotated[
        int, typer.Option(help="CPU threads of a worker; 0: the preset's, tiny 1, else one per core.")
    ] = 0,
    infer: Annotated[
        bool, typer.Option(help="Skip lengths beyond one that ran out of memory or time.")
    ] = True,
    engine: Annotated[str, typer.Option(help="Where workers run.")] = "local",
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
        engine=engine,
    )
    if dry_run:
        _show_plan(request, as_json)
        return
    from attnbench.harness import run as driver
    from attnbench.harness.progress import listener

    with listener(quiet=quiet or as_json) as shown:
        done = driver.resume(resume, shown) if resume else driver.run(request, out, shown)
    if as_json:
        typer.echo(
            json.dumps({"path": str(done.path), "rows": len(done.rows), "by_status": done.by_status()})
        )
        return
    counts = ", ".join(f"{count} {status}" for status, count in done.by_status().items())
    typer.echo(f"{len(done.rows)} rows ({counts}) in {done.path}\nNext: attnbench report {done.path}")


def _show_plan(request: RunConfig, as_json: bool) -> None:
    from attnbench.harness.plan import series_of
    from attnbench.harness.run import prepare

    resolved, planned = prepare(request)
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
        typer.echo(json.dumps({"device": resolved.device, "cases": cases}, indent=2))
        return
    for item in planned:
        note = f"  unsupported: {item.unsupported}" if item.unsupported else ""
        typer.echo(f"{item.case.key()}  {item.case.label()}{note}")
    blocked = sum(bool(p.unsupported) for p in planned)
    typer.echo(
        f"{len(planned)} cases on {resolved.device}, {blocked} of them unsupported here, "
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
    fail_on: Annotated[str, typer.Option(help="slower, uncertain or never: what exits with 1.")] = "slower",
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

    if fail_on not in comparison.FAIL_ON:
        raise unknown_name("--fail-on", fail_on, comparison.FAIL_ON)
    rule = noise.load(calibration).rule() if calibration else DEFAULT
    found = turns.compare(
        base, head, context.args, pairs=pairs, max_pairs=max_pairs, rule=rule, announce=_announcer(as_json)
    )
    _print_comparison(found, markdown, as_json)
    if found.failed(fail_on):
        raise typer.Exit(EXIT_FAILED)
    if not any(case.decision.pairs for case in found.cases):
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
) -> None:
    """Write the leaderboard as static pages."""
    from attnbench.site.build import build

    pages = build(results, out)
    typer.echo(f"{pages} pages in {out}: open {out / 'index.html'}")


@site_app.command("serve")
def site_serve(
    folder: Annotated[Path, typer.Argument(help="Folder that `attnbench site build` wrote.")] = Path("_site"),
    port: Annotated[int, typer.Option(help="Port on the loopback interface; 0 picks a free one.")] = 8000,
) -> None:
    """Serve a built site on this machine only, until Ctrl-C."""
    from attnbench.site.serve import serve

    serve(folder, port, typer.echo)


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
