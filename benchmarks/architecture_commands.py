"""The commands that measure the architectures of `gradbal.nn`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.errors import BadInput
from benchmarks.options import read_counts, stop

__all__ = ["add_architecture_commands"]


def add_architecture_commands(speed: typer.Typer) -> None:
    """Adds `experts` to `speed`."""
    speed.command()(experts)


def experts(
    numbers: Annotated[
        str, typer.Option("--experts", help="Numbers of experts, comma-separated.")
    ] = "4,16",
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 21,
) -> None:
    """Experts that run as one (batched=True) against one after another."""
    from benchmarks.speed.experts import MODELS, measure

    counts = read_counts(numbers, "--experts")
    if rounds < 1:
        stop(BadInput(f"`--rounds` must be positive, found {rounds}"))
    console = Console(highlight=False)
    table = Table(title="CPU time of experts run as one over one after another (median ratio)")
    for heading in ("expert", "n", "forward", "forward + backward"):
        table.add_column(heading, justify="left" if heading == "expert" else "right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(MODELS) * len(counts))
        for row in measure(list(MODELS), counts, rounds):
            ratios = (f"{row.forward:.2f}", f"{row.step:.2f}")
            table.add_row(row.model, str(row.n_experts), *ratios)
            progress.advance(task)
    console.print(table)
    console.print(f"{rounds} interleaved rounds, one thread, float32.")
