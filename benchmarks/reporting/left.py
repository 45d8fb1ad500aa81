"""Pictures and tables that other commands have left in the folder."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.report import words
from benchmarks.reporting.document import Cell, Fact, Part, Table
from benchmarks.reporting.looks import Picture
from benchmarks.reporting.svg import UnreadablePicture, read

__all__ = ["left_by_others"]

# Name of the part, its title, the pictures with their titles, the table with its caption.
_FILES = (
    (
        "toy",
        "The two-objective toy problem",
        {
            "trajectories.svg": "Trajectories over the contours and the Pareto front",
            "losses.svg": "Where the trajectories end, in the plane of the two losses",
        },
        ("toy.csv", "Where each method ends from each start."),
    ),
    (
        "pareto",
        "Pareto fronts with known shapes",
        {"pareto.svg": "What the methods find of the Pareto fronts"},
        ("pareto.csv", "Results by problem and method."),
    ),
)


def left_by_others(folder: Path) -> list[Part]:
    """A part for each of `run toy` and `run pareto` that has left a picture or a table."""
    parts = []
    for name, title, drawn, (table, caption) in _FILES:
        pictures, tables, facts = [], [], []
        for picture, shows in drawn.items():
            if not (folder / picture).is_file():
                continue
            try:
                svg = read(folder / picture, f"{name}-{picture.removesuffix('.svg')}", shows)
                pictures.append(Picture(shows, f"From {picture}.", svg, plain=True))
            except UnreadablePicture as error:
                facts.append(Fact("Left out", f"{picture}: {error}"))
        if (folder / table).is_file():
            found = _table(folder / table, f"{name}-table", caption)
            if found is None:
                facts.append(Fact("Left out", f"{table}: no table with a heading"))
            else:
                tables.append(found)
        if pictures or tables or facts:
            parts.append(Part(name, title, tuple(facts), tuple(tables), tuple(pictures)))
    return parts


def _table(path: Path, name: str, caption: str) -> Table | None:
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if len(rows) < 2:
        return None
    width = len(rows[0])
    # A file cut short has a shorter last row.
    cells = [tuple(_cell(text) for text in [*row, *[""] * width][:width]) for row in rows[1:]]
    return Table(name, caption, tuple(map(words, rows[0])), tuple(cells), wide=True)


def _cell(text: str) -> Cell:
    try:
        value = float(text)
    except ValueError:
        return Cell(text)
    # Results files have all digits; a reader wants some of them.
    return Cell(text if len(text) <= 6 else f"{value:.5g}", value)
