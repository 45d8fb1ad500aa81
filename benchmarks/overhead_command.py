"""The command that measures what a step costs beside autograd."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BadInput, BenchmarkError
from benchmarks.options import stop

__all__ = ["add_overhead_command"]

_DTYPES = ("float32", "float64")


def add_overhead_command(speed: typer.Typer) -> None:
    """Adds `overhead` to `speed`."""
    speed.command()(overhead)


def overhead(
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated; some of each kind if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 21,
    steps: Annotated[int, typer.Option(help="Steps of each contestant in a round.")] = 200,
    dtype: Annotated[str, typer.Option(help="Of the parameter: float32 or float64.")] = "float32",
) -> None:
    """Microseconds of a step beyond autograd's, on a problem of two numbers and two losses."""
    import torch

    import gradbal
    from benchmarks.speed.overhead import METHODS, measure

    chosen = METHODS if methods is None else tuple(methods.split(","))
    unknown = [name for name in chosen if name not in gradbal.list_aggregators()]
    if unknown:
        stop(BadInput(f"`--methods` must be registered, found {unknown[0]!r}"))
    if rounds < 1 or steps < 1:
        stop(BadInput(f"`--rounds` and `--steps` must be positive, found {rounds}, {steps}"))
    if dtype not in _DTYPES:
        stop(BadInput(f"`--dtype` must be {' or '.join(_DTYPES)}, found {dtype!r}"))
    table = Table(title="CPU time of a step, microseconds (medians)")
    for heading in ("method", "backward", "forward", "step", "autograd", "beyond", "ratio"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    try:
        for row in measure(chosen, rounds, steps, getattr(torch, dtype)):
            passes = str(row.passes), str(row.forwards)
            figures = [f"{x:.0f}" for x in (row.step, row.plain, row.beyond)]
            table.add_row(row.name, *passes, *figures, f"{row.ratio:.2f}")
    except BenchmarkError as error:
        stop(error)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{rounds} interleaved rounds of {steps} steps, one thread, {dtype}: zero_grad, the two "
        "losses, backward, Adam's step. Autograd: the same with as many passes and no method, as "
        "fast as the machine was then."
    )
