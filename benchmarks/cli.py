"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from benchmarks import launch
from benchmarks.errors import BadInput, BenchmarkError, EndedElsewhere, one_line
from benchmarks.measurements import add_commands
from benchmarks.options import stop
from benchmarks.special import SPECIAL, name_in, special_command

if TYPE_CHECKING:
    from benchmarks.plan import Plan
    from benchmarks.processes import Team

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


class RunCommand(ManyValues):
    """`run`; the benchmarks that are not networks on data have options of their own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        name = name_in(args)
        if name is None:
            return super().make_context(info_name, args, parent, **extra)
        rest = [*args[: args.index(name)], *args[args.index(name) + 1 :]]
        command = special_command(name, ManyValues)
        return command.make_context(f"{info_name} {name}", rest, parent, **extra)


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
    for special, summary in SPECIAL.items():
        typer.echo(f"  {special:<{width}}{summary}")
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


@app.command(cls=RunCommand)
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME…",
            help="The benchmarks, one or several; see `list`. `package.module:ATTRIBUTE` is one of "
            "your own.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Methods to compare, one or several after the option; the benchmark's own "
            "selection if left out. Single-task training always runs, as the baseline of Δm. "
            "`unitary` is the plain sum without gradbal.",
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
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Try learning rates for every method with seed 0, and weight decay and dropout "
            "for unitary scalarisation; the best on validation data is run with the other seeds.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the results; results/NAME or results/study if left out."
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of downloaded data; $GRADBAL_DATA or ~/.cache/gradbal if left out.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that make runs beside each other, one for each core if left out; "
            "with 0 this process makes them.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A TOML file with all of this; the command line has precedence."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and what is there already.")
    ] = False,
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
    again = _command(
        names or [],
        {"--methods": methods, "--architectures": architectures},
        {
            "--seeds": seeds,
            "--epochs": epochs,
            "--out": out,
            "--data-root": data_root,
            "--workers": workers,
            "--config": config,
        },
        {"--tune": tune, "--quick": quick, "--full": full},
    )
    # What is wrong with the command line is so in every process.
    with _ending(again, lambda: launch.rank() == 0):
        if quick and full:
            raise BadInput("`--quick` and `--full` exclude each other, found both")
        if workers is not None and (workers < 0 or (workers > 0 and launch.size() > 1)):
            required = "at least 0, and 0 under torchrun"
            raise BadInput(f"`--workers` must be {required}, found {workers}")

        from benchmarks.study import Study, read_study
        from benchmarks.tuning import Tuning

        study, rest = read_study(config) if config else (Study(()), {})
        given: dict[str, Any] = {
            "benchmarks": tuple(names or ()),
            "methods": tuple(methods or ()),
            "architectures": tuple(architectures or ()),
            "seeds": seeds,
            "epochs": epochs,
            "preset": "quick" if quick else "full" if full else "",
            "tuning": Tuning() if tune and study.tuning is None else None,
        }
        empty = (None, (), "")
        given = {name: value for name, value in given.items() if value not in empty}
        study = replace(study, **given)
        if names:
            known = {name: study.settings[name] for name in names if name in study.settings}
            study = replace(study, settings=known)
        plans = study.plans()
        folder = out or Path(rest.get("out", _folder(study.benchmarks, config)))
        if dry_run:
            _show(plans, folder)
            return
        if workers is None:
            workers = 0 if launch.size() > 1 else rest.get("workers", os.cpu_count() or 1)

        from benchmarks.processes import team

        with team() as together, _ending(again, together.speaks):
            failed = _execute_and_report(plans, folder, data_root, together, workers)
    if launch.rank() == 0:
        if config is not None:
            from benchmarks.report import write_whole

            text = config.read_bytes()
            write_whole(folder / "config.toml", lambda target: target.write_bytes(text))
        launcher = shlex.join(launch.launcher())
        if study.preset != "full" and not study.settings and len(plans) == 1:
            typer.echo(
                f"Full table, with all the data: {launcher} -m benchmarks run "
                f"{study.benchmarks[0]} --full "
                + (f"--architectures {' '.join(study.architectures)} " if architectures else "")
                + f"--seeds {plans[0].benchmark.presets['full'].seeds}"
            )
    if failed:
        raise typer.Exit(1)


def _folder(names: Sequence[str], config: Path | None) -> Path:
    """Where results go if nothing is said."""
    if config is not None:
        return Path("results") / config.stem
    return Path("results") / (names[0].rpartition(":")[2] if len(names) == 1 else "study")


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
    names: Sequence[str],
    lists: Mapping[str, Sequence[str] | None],
    values: Mapping[str, object | None],
    flags: Mapping[str, bool],
) -> str:
    """The command line that says the same again, quoted for the shell."""
    words = [*launch.launcher(), "-m", "benchmarks", "run", *names]
    for option, found in lists.items():
        if found:
            words += [option, *found]
    for option, value in values.items():
        if value is not None:
            words += [option, str(value)]
    words += [flag for flag, is_given in flags.items() if is_given]
    return shlex.join(words)


def _show(plans: Sequence[Plan], folder: Path) -> None:
    """Say what would be run."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.plan import Schedule
    from benchmarks.results import ResultsFile

    records = ResultsFile(folder).read()[0] if (folder / "results.jsonl").is_file() else []
    left = Schedule(plans, records).left
    table = Table(title=f"Runs for {folder / 'results.jsonl'}")
    table.add_column("benchmark")
    for column in ("methods", "trials", "seeds", "runs", "there", "steps a run"):
        table.add_column(column, justify="right")
    for number, plan in enumerate(plans):
        missing = sum(of == number for of, _ in left)
        trials = 1 if plan.tuning is None else len(plan.tuning.grid(plan.settings))
        cells = (len(plan.rows), trials, plan.seeds, plan.size, plan.size - missing)
        steps = plan.steps(plan.rows[-1][0])
        table.add_row(plan.benchmark.name, *map(str, cells), f"{steps:,}")
    Console(highlight=False).print(table)
    typer.echo(f"{len(left)} of {sum(plan.size for plan in plans)} runs to be made.")


def _execute_and_report(
    plans: Sequence[Plan], folder: Path, data_root: Path | None, team: Team, workers: int
) -> int:
    """Fill the tables, print them and write them to files; returns the number of failed runs.

    Processes that do not lead have nothing to report, and return 0.
    """
    from rich.console import Console

    from benchmarks.plot import write_plot
    from benchmarks.report import failures, screen_table, summarise, write_csv
    from benchmarks.results import ResultsFile
    from benchmarks.runner import execute
    from benchmarks.screen import Screen

    console = Console(highlight=False, quiet=not team.leads)
    if not team.leads:
        execute(plans, None, data_root, Screen(console), team)
        return 0
    if any(plan.architectures for plan in plans) and not console.is_terminal:
        console.width = max(console.width, 120)  # A file has room for all columns.
    results = ResultsFile(folder)
    try:
        execute(plans, results, data_root, Screen(console), team, workers)
    except KeyboardInterrupt:
        from benchmarks.plan import Schedule

        total = sum(plan.size for plan in plans)
        done = total - len(Schedule(plans, results.read()[0]).left)
        typer.echo(f"{done} of {total} runs are kept in {results.path}", err=True)
        raise
    records, _ = results.read()
    failed, written = [], [results.path]
    for plan in plans:
        rows = summarise(plan, records)
        console.print(screen_table(plan, rows))
        failed += failures(plan, records)
        measure = plan.benchmark.tasks[0].measures[0].name
        names = ("architectures", "architectures") if plan.architectures else ("summary", measure)
        prefix = f"{plan.benchmark.name}_" if len(plans) > 1 else ""
        table, picture = folder / f"{prefix}{names[0]}.csv", folder / f"{prefix}{names[1]}.png"
        write_csv(plan, rows, table)
        write_plot(plan, rows, picture)
        written += [table, picture]
    for line in failed:
        typer.echo(f"{line}; the same command tries it again")
    typer.echo(f"Written: {', '.join(map(str, written))}")
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
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            metavar="NAME",
            help="A benchmark of your own among the runs, as `package.module:ATTRIBUTE`; may be "
            "given several times.",
        ),
    ] = None,
) -> None:
    """Report what has been run so far: an HTML page, Markdown, and tables for LaTeX."""
    from benchmarks.catalog import BENCHMARKS, find
    from benchmarks.reporting.write import FORMATS, write_report

    formats = tuple(FORMATS) if format is ReportFormat.all else (format.value,)
    try:
        known = {**BENCHMARKS, **{found.name: found for found in map(find, own or [])}}
        written = write_report(folder, folder if out is None else out, formats, known)
    except BenchmarkError as error:
        stop(error)
    typer.echo(f"Written: {', '.join(map(str, written))}")


add_commands(app)
