"""What the commands that measure have in common: lists of numbers, and how they stop."""

from __future__ import annotations

from typing import NoReturn

import typer

from benchmarks.errors import BadInput, BenchmarkError

__all__ = ["read_counts", "stop"]


def read_counts(numbers: str, option: str = "--tasks", least: int = 2) -> list[int]:
    """Numbers from `least` on, comma-separated."""
    found = [int(n) if n.strip().isdigit() else -1 for n in numbers.split(",")]
    if min(found) < least:
        stop(BadInput(f"`{option}` must be numbers from {least} on, found {numbers!r}"))
    return found


def stop(error: BenchmarkError) -> NoReturn:
    """Says what is wrong, and ends the command."""
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(error.exit_code)
