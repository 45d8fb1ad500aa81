"""The commands that measure gradbal itself: `speed` and `residuals`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.architecture_commands import add_architecture_commands
from benchmarks.engine_commands import add_engine_commands
from benchmarks.errors import BadInput, BenchmarkError
from benchmarks.options import read_counts, stop
from benchmarks.overhead_command import add_overhead_command

if TYPE_CHECKING:
    pass

__all__ = ["add_commands"]

speed = typer.Typer(help="Ratios of CPU time, interleaved, medians.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    """Adds `speed` and `residuals` to the command line."""
    add_engine_commands(speed)
    add_architecture_commands(speed)
    add_overhead_command(speed)
    app.add_typer(speed, name="speed")
    app.command()(residuals)


@speed.callback()
def _speed() -> None:
    """Ratios of CPU time, interleaved, medians."""


@speed.command()
def solvers(
    tasks: Annotated[str, typer.Option(help="Values of T, comma-separated.")] = "3,11,40",
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 21,
) -> None:
    """`direction(J)` against TorchJD's, and against the Gramian and combination it needs."""
    import torch

    import gradbal
    from benchmarks.speed.solvers import Row, measure_against_floor, measure_against_torchjd

    counts = read_counts(tasks)
    if rounds < 1:
        stop(BadInput(f"`--rounds` must be positive, found {rounds}"))
    console = Console(highlight=False)
    methods, threads = gradbal.list_aggregators(), torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {
        "CPU time of direction(J) at P = 2,000 over TorchJD's": measure_against_torchjd,
        "... at P = 1,000,000 over the blocked Gramian and one combination": measure_against_floor,
    }
    try:
        for title, measure in parts.items():
            found: dict[str, list[Row]] = {}
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("measuring", total=None)
                for row in measure(methods, counts, rounds):
                    found.setdefault(row.method, []).append(row)
                    progress.advance(task)
            table = Table(title=title)
            table.add_column("method \\ T")
            for count in counts:
                table.add_column(str(count), justify="right")
            for method, rows in found.items():
                table.add_row(method, *("–" if r.ratio is None else f"{r.ratio:.3f}" for r in rows))
            console.print(table)
            for row in (r for rows in found.values() for r in rows if r.reason):
                console.print(f"{row.method}, T = {row.n_tasks}: TorchJD said {row.reason}")
    except BenchmarkError as error:
        stop(error)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Median ratios of {rounds} interleaved rounds, one thread, float32.")


def _print_growth(console: Console, counts: list[int], rounds: int) -> None:
    """Passes and CPU time of a step as tasks are added: MARIGOLD and FAMO beside MGDA."""
    from benchmarks.speed.scaling import METHODS, Row, measure

    found: dict[str, list[Row]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(METHODS) * len(counts))
        for row in measure(counts, rounds):
            found.setdefault(row.method, []).append(row)
            progress.advance(task)
    cells: dict[str, Callable[[Row], str]] = {
        "Backward + forward passes through the trunk in one step": (
            lambda row: f"{row.backwards} + {row.forwards}"
        ),
        "CPU time of a step over one with sum(losses).backward()": lambda row: f"{row.ratio:.2f}",
    }
    for title, cell in cells.items():
        table = Table(title=title)
        table.add_column("method \\ T")
        for count in counts:
            table.add_column(str(count), justify="right")
        for method, rows in found.items():
            table.add_row(method, *map(cell, rows))
        console.print(table)
    console.print(
        f"Median ratios of {rounds} interleaved rounds, one thread: a perceptron 256-512-512-256 "
        "with T linear heads, batch 64, SGD."
    )


@speed.command(name="methods")
def methods_command(
    chosen: Annotated[
        str | None, typer.Option("--methods", help="Comma-separated; all if left out.")
    ] = None,
    tasks: Annotated[int, typer.Option(help="T.")] = 3,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 21,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    growth: Annotated[
        str, typer.Option(help="Values of T for the second part, comma-separated; '' for none.")
    ] = "2,5,10,20,40",
) -> None:
    """`backward` with each method against `sum(losses).backward()`, and steps as T grows."""
    from benchmarks.speed.methods import drivable, measure

    if tasks < 2 or rounds < 1 or threads < 1:
        stop(
            BadInput(
                "`--tasks` must be at least 2, `--rounds` and `--threads` positive, found "
                f"{tasks}, {rounds}, {threads}"
            )
        )
    counts = read_counts(growth) if growth else []
    known = drivable(tasks)
    names = known if chosen is None else chosen.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        stop(BadInput(f"`--methods` must be among {', '.join(known)}, found {unknown[0]!r}"))
    console = Console(highlight=False)
    table = Table(title="CPU time of backward over sum(losses).backward() (median ratio)")
    table.add_column("method")
    table.add_column("kind")
    table.add_column("ratio", justify="right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(names) + 1)
        for row in measure(names, rounds, tasks, threads=threads):
            table.add_row(row.method, row.kind, f"{row.ratio:.3f}")
            progress.advance(task)
    console.print(table)
    console.print(
        f"{rounds} interleaved rounds, {threads} thread(s), T = {tasks}, six convolutions with "
        "BatchNorm."
    )
    if counts:
        _print_growth(console, counts, rounds)


def residuals(
    jacobians: Annotated[int, typer.Option(help="Random Jacobians a cell.")] = 1000,
    by: Annotated[str, typer.Option(help="What the columns are: family or scale.")] = "family",
    spread: Annotated[
        float, typer.Option(help="With --by scale: largest over smallest row scale.")
    ] = 1e6,
    seed: Annotated[int, typer.Option(help="Of the Jacobians.")] = 0,
) -> None:
    """How exactly each method solves its own problem: worst relative residual by input family."""
    from benchmarks.jacobians import FAMILIES, SCALES, describe, hard_jacobian, random_jacobian
    from benchmarks.residuals import RESIDUALS, worst_residuals

    if jacobians < 1 or not spread >= 1:
        stop(
            BadInput(
                f"`--jacobians` and `--spread` must be at least 1, found {jacobians}, {spread}"
            )
        )
    if by == "family":
        # A Jacobian of zeros has no size to measure a residual by.
        families = [family for family in FAMILIES if family != "zero"]
        columns = {family: partial(hard_jacobian, family=family) for family in families}
        legend = [f"{family}: {describe(family)}" for family in families]
        title = "each times " + ", ".join(f"{scale:g}" for scale in SCALES[:-1])
        title += f" or {SCALES[-1]:g}"
    elif by == "scale":
        columns = {
            f"{scale:.0e}": partial(random_jacobian, spread=spread, scale=scale) for scale in SCALES
        }
        legend, title = [], f"Gaussian, row norms spread by {spread:.0e}"
    else:
        stop(BadInput(f"`--by` must be family or scale, found {by!r}"))
    console = Console(highlight=False)
    # On fewer columns figures would be cut off.
    console.width = max(console.width, 16 * len(columns))
    table = Table(title=f"Worst residual of {jacobians} random Jacobians, {title}")
    table.add_column(f"method \\ {by}")
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("solving", total=len(RESIDUALS) * len(columns))
        for name in RESIDUALS:
            cells = []
            for draw in columns.values():
                worst = worst_residuals(name, jacobians, draw, seed)[1]
                cells.append("–" if math.isnan(worst) else f"{worst:.0e}")
                progress.advance(task)
            table.add_row(name, *cells)
    console.print(table)
    console.print(
        "Relative to the size of the terms that cancel. Jacobians for which a condition is not "
        "defined are left out; –: defined for none."
    )
    for line in legend:
        console.print(line)
    for name, residual in RESIDUALS.items():
        condition = residual.__doc__ or "The sum of the rows with the method's fixed weights."
        console.print(f"{name}: {' '.join(condition.split())}")
