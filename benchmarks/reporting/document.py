"""What a report says, in whatever format it is written."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.reporting.claims import Finding
from benchmarks.reporting.looks import Picture

__all__ = ["Cell", "Document", "Fact", "Part", "Table"]


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, what it is sorted by, and whether it is the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others are right-aligned if `numeric`.

    `wide` ones are more than a printed page has room for.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    numeric: bool = True
    wide: bool = False


@dataclass(frozen=True)
class Fact:
    """A line of what was run: a word, and what there is to say."""

    name: str
    text: str


@dataclass(frozen=True)
class Part:
    """A section: facts, tables, pictures, and runs that failed."""

    name: str
    title: str
    facts: tuple[Fact, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """The whole report: all benchmarks together, the claims, and a part for each benchmark."""

    title: str
    overall: Part
    findings: tuple[Finding, ...]
    parts: tuple[Part, ...]
