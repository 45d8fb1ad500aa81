"""The benchmarks that are not networks on data: `run NAME` with options of their own."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SPECIAL", "ending", "name_in", "special_command", "wide_console"]

SPECIAL = {
    "toy": "the two-objective toy of CAGrad, Nash-MTL and FAMO, trajectories and table",
    "pareto": "Pareto-set learning on STCH's problems, and UPGrad's convex quadratics",
}
"""What `list` says of them."""


def name_in(args: Sequence[str]) -> str | None:
    """The special benchmark that a command line of `run` names, or None."""
    before = ""
    for arg in args:
        # Behind another option it is that option's value.
        if arg in SPECIAL and (not before.startswith("-") or before == "--quick"):
            return arg
        before = arg
    return None


def special_command(name: str, cls: type[typer.core.TyperCommand]) -> Any:
    """The command that runs it.

    Args:
        name: in `SPECIAL`.
        cls: of the command.
    """
    function: Callable[..., None] = getattr(import_module(f"benchmarks.{name}.command"), name)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=cls)(function)
    return typer.main.get_command(app)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends such a command with one message where it is interrupted or something is wrong."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join([Path(sys.executable).name, "-m", "benchmarks", *sys.argv[1:]])
        typer.echo(f"Interrupted; what is finished is kept. Go on with: {again}", err=True)
        raise typer.Exit(130) from None
    except BenchmarkError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def wide_console() -> Console:
    """The console of their tables."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # A file has room for all columns.
    return console
