"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from benchmarks import launch
from benchmarks.errors import BadInput, BenchmarkError, EndedElsewhere, one_line
from benchmarks.measurements import add_commands

if TYPE_CHECKING:
    from benchmarks.benchmark import Benchmark
    from benchmarks.processes import Team
    from benchmarks.runner import Plan

# PyTorch and matplotlib take seconds to import: commands import what they need when they run, so
# that `--help` and typing mistakes are answered at once.

__all__ = ["app"]

app = typer.Typer(
    help="Published multi-task benchmarks for gradbal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ManyValues(TyperCommand):
    """`--methods` and `--architectures` take all the words that follow, up to the next option."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for option in ("--methods", "--architectures"):
            args = repeat_option(args, option)
        return super().parse_args(ctx, args)


def repeat_option(args: Iterable[str], option: str) -> list[str]:
    """Turn `--option a b` into `--option a --option b`, which is what typer can read."""
    expanded: list[str] = []
    values_taken: int | None = None  # of the option being read; None outside of it
    for arg in args:
        if arg.startswith("-"):
            values_taken = 0 if arg == option else None
            expanded.append(arg)
        else:
            if values_taken:
                expanded.append(option)
            if values_taken is not None:
                values_taken += 1
            expanded.append(arg)
    return expanded


@app.command(name="list")
def list_command() -> None:
    """List the benchmarks and the methods."""
    import gradbal
    from benchmarks.catalog import BENCHMARKS

    width = max(map(len, [*BENCHMARKS, *gradbal.list_aggregators()])) + 2
    typer.echo("Benchmarks:")
    for benchmark in BENCHMARKS.values():
        typer.echo(f"  {benchmark.name:<{width}}{benchmark.summary}")
    for benchmark in BENCHMARKS.values():
        if benchmark.architectures:
            typer.echo(f"Architectures of {benchmark.name}:")
        for name, architecture in benchmark.architectures.items():
            typer.echo(f"  {name:<{width}}{architecture.summary}")
    typer.echo("Methods:")
    for name in gradbal.list_aggregators():
        entry = gradbal.info(name)
        source = f" ({entry.venue} {entry.year})" if entry.year else ""
        typer.echo(f"  {name:<{width}}{entry.summary}{source}")


_WITH_ARCHITECTURES = ("mean", "upgrad")
"""The methods that architectures are compared with: a plain one, and one of the Gramian."""


@app.command(cls=ManyValues)
def run(
    name: Annotated[str, typer.Argument(help="The benchmark; see `list`.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Methods to compare, one or several after the option; the benchmark's own "
            "selection if left out. Single-task training always runs, as the baseline of Δm.",
        ),
    ] = None,
    architectures: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…|all",
            help="Architectures of gradbal.nn to compare, each with every method (mean and upgrad "
            "if none is named); hps always runs. The benchmark's own network if left out.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Number of seeds: 0, 1, … N−1.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Epochs of training.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; results/NAME if left out."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of downloaded data; $GRADBAL_DATA or ~/.cache/gradbal if left out.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds a method, to see that it works.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All the data and the long training; may download.")
    ] = False,
) -> None:
    """Train all methods and the single-task baseline, and print the table.

    Finished runs are kept: the same command goes on where it was interrupted. Under torchrun all
    processes train each network together, and fill one table.
    """
    again = _command(name, methods, architectures, seeds, epochs, out, data_root, quick, full)
    folder = out if out is not None else Path("results") / name
    # What is wrong with the command line is so in every process.
    with _ending(again, lambda: launch.rank() == 0):
        plan = _plan(name, methods, architectures, seeds, epochs, quick, full)

        from benchmarks.processes import team

        with team() as together, _ending(again, together.speaks):
            failed = _execute_and_report(plan, folder, data_root, together)
    if not full and launch.rank() == 0:
        typer.echo(
            f"Full table, with all the data: {shlex.join(launch.launcher())} -m benchmarks run "
            f"{name} --full "
            + (f"--architectures {' '.join(architectures)} " if architectures else "")
            + f"--seeds {plan.benchmark.presets['full'].seeds}"
        )
    if failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _ending(again: str, speaks: Callable[[], bool]) -> Iterator[None]:
    """Ends the command with one message where something is wrong, from one of the processes."""
    try:
        yield
    except KeyboardInterrupt:
        if launch.size() > 1:
            # torchrun passes on what the terminal has sent to all of them already.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if speaks():
            typer.echo(f"Interrupted. Go on with: {again}", err=True)
        raise typer.Exit(130) from None
    except BenchmarkError as error:
        if not isinstance(error, EndedElsewhere) and speaks():
            typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except Exception as error:
        if launch.size() == 1 or isinstance(error, typer.Exit):
            raise
        if speaks():
            typer.echo(f"Error: rank {launch.rank()} failed with {one_line(error)}", err=True)
        raise typer.Exit(1) from error


def _command(
    name: str,
    methods: list[str] | None,
    architectures: list[str] | None,
    seeds: int | None,
    epochs: int | None,
    out: Path | None,
    data_root: Path | None,
    quick: bool,
    full: bool,
) -> str:
    """The command line that says the same again, quoted for the shell."""
    words = [*launch.launcher(), "-m", "benchmarks", "run", name]
    for option, names in (("--methods", methods), ("--architectures", architectures)):
        if names:
            words += [option, *names]
    options = {"--seeds": seeds, "--epochs": epochs, "--out": out, "--data-root": data_root}
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    words += ["--quick"] * quick + ["--full"] * full
    return shlex.join(words)


def _plan(
    name: str,
    methods: list[str] | None,
    architectures: list[str] | None,
    seeds: int | None,
    epochs: int | None,
    quick: bool,
    full: bool,
) -> Plan:
    """Check the command line, cheapest first, and turn it into a plan."""
    for option, value in (("--seeds", seeds), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise BadInput(f"`{option}` must be at least 1, found {value}")
    if quick and full:
        raise BadInput("`--quick` and `--full` exclude each other, found both")

    import gradbal
    from benchmarks.catalog import BENCHMARKS
    from benchmarks.runner import HPS, SINGLE_TASK, Plan

    _check_known("NAME", name, list(BENCHMARKS))
    benchmark = BENCHMARKS[name]
    named = _architectures(benchmark, architectures)
    chosen = tuple(methods or (_WITH_ARCHITECTURES if named else benchmark.methods))
    for method in chosen:
        _check_known("--methods", method, [*gradbal.list_aggregators(), SINGLE_TASK])
        if set(named) - {HPS} and method != SINGLE_TASK and gradbal.create(method).needs_features:
            raise BadInput(
                f"`--methods` must not name {method} beside architectures other than {HPS}, found "
                f"{' '.join(named)}; it looks at a representation that all tasks share"
            )
    presets = {**benchmark.presets, **(benchmark.architecture_presets if named else {})}
    preset = presets["quick" if quick else "full" if full else "default"]
    if epochs is not None:
        preset = replace(preset, settings=replace(preset.settings, epochs=epochs))
    return Plan(benchmark, preset, chosen, preset.seeds if seeds is None else seeds, named)


def _architectures(benchmark: Benchmark, names: list[str] | None) -> tuple[str, ...]:
    """The architectures that the command line asks for; "all" stands for every one."""
    if not names:
        return ()
    if not benchmark.architectures:
        raise BadInput(
            f"`--architectures` must not be given for {benchmark.name}, which has none, found "
            + " ".join(names)
        )
    for name in names:
        _check_known("--architectures", name, [*benchmark.architectures, "all"])
    return tuple(benchmark.architectures if "all" in names else names)


def _check_known(option: str, found: str, known: list[str]) -> None:
    if found not in known:
        close = difflib.get_close_matches(found, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise BadInput(f"`{option}` must name what `list` shows, found {found!r}; {hint}")


def _execute_and_report(plan: Plan, folder: Path, data_root: Path | None, team: Team) -> int:
    """Fill the table, print it and write it to files; returns the number of failed runs.

    Processes that do not lead have nothing to report, and return 0.
    """
    from rich.console import Console

    from benchmarks.plot import write_plot
    from benchmarks.report import failures, screen_table, summarise, write_csv
    from benchmarks.results import ResultsFile
    from benchmarks.runner import execute

    console = Console(highlight=False, quiet=not team.leads)
    if not team.leads:
        execute(plan, None, data_root, console, team)
        return 0
    if plan.architectures and not console.is_terminal:
        console.width = max(console.width, 120)  # A file has room for all columns.
    results = ResultsFile(folder)
    try:
        execute(plan, results, data_root, console, team)
    except KeyboardInterrupt:
        done = [r for r in plan.select(results.read()[0]).values() if r.error is None]
        typer.echo(f"{len(done)} of {len(plan.runs)} runs are kept in {results.path}", err=True)
        raise
    records, _ = results.read()
    rows = summarise(plan, records)
    console.print(screen_table(plan, rows))
    failed = failures(plan, records)
    for line in failed:
        typer.echo(f"{line}; the same command tries it again")
    measure = plan.benchmark.tasks[0].measures[0].name
    names = ("architectures", "architectures") if plan.architectures else ("summary", measure)
    table, picture = folder / f"{names[0]}.csv", folder / f"{names[1]}.png"
    write_csv(plan, rows, table)
    write_plot(plan, rows, picture)
    typer.echo(f"Written: {results.path}, {table}, {picture}")
    return len(failed)


class ReportFormat(str, Enum):
    """What `report --format` takes."""

    html = "html"
    markdown = "markdown"
    latex = "latex"
    all = "all"


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with results.jsonl, as `run` fills it.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the report; DIR if left out.")
    ] = None,
    format: Annotated[ReportFormat, typer.Option(help="What to write.")] = ReportFormat.all,
) -> None:
    """Report what has been run so far: an HTML page, Markdown, and tables for LaTeX."""
    from benchmarks.catalog import BENCHMARKS
    from benchmarks.reporting.write import FORMATS, write_report

    formats = tuple(FORMATS) if format is ReportFormat.all else (format.value,)
    with _ending("", lambda: True):
        written = write_report(folder, folder if out is None else out, formats, BENCHMARKS)
    typer.echo(f"Written: {', '.join(map(str, written))}")


add_commands(app)
