"""How methods look in the pictures of a report, and what a picture is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plot import COLOURS, MARKERS
from benchmarks.reporting.svg import INK

__all__ = ["COLUMNS", "GREY", "Drawn", "Looks", "Picture", "looks"]

GREY = "#8a8a8a"

COLUMNS = 4
"""Small pictures beside each other."""

_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Picture:
    """A picture for the page, with what is written under it; a `plain` one is black on white."""

    title: str
    caption: str
    svg: str
    plain: bool = False


@dataclass(frozen=True)
class Looks:
    """How a method is drawn in every picture of the report."""

    colour: str
    marker: str
    dashes: Any


def looks(labels: Sequence[str]) -> dict[str, Looks]:
    """A colour, a marker and a line for each; no two have the same three."""
    colours = [c if c != "#000000" else INK for c in COLOURS]
    return {
        label: Looks(
            colours[number % len(colours)],
            MARKERS[number % len(MARKERS)],
            _DASHES[number // len(colours) % len(_DASHES)],
        )
        for number, label in enumerate(dict.fromkeys(labels))
    }


@dataclass(frozen=True)
class Drawn:
    """A picture before it is SVG."""

    figure: Figure
    title: str
    caption: str
