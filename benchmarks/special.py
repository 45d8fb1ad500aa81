"""The benchmarks that are not networks on data: `run NAME` with options of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import typer

__all__ = ["SPECIAL", "name_in", "special_command"]

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
