"""All pictures of one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.reporting.comparisons import (
    change_per_task,
    cost,
    delta_m_with_intervals,
    task_against_task,
)
from benchmarks.reporting.curves import (
    conflicts_over_time,
    training_curves,
    validation_curves,
    weights_over_time,
)
from benchmarks.reporting.looks import Drawn, Looks, Picture
from benchmarks.reporting.summary import Summary
from benchmarks.reporting.svg import draw, style

__all__ = ["pictures"]


def pictures(summary: Summary, found: Mapping[str, Looks]) -> list[Picture]:
    """All pictures that the benchmark's records have the numbers for."""
    makers: list[tuple[str, Callable[[Summary, Mapping[str, Looks]], Drawn | None]]] = [
        ("delta-m", delta_m_with_intervals),
        ("pareto", task_against_task),
        ("radar", change_per_task),
        ("cost", cost),
        ("validation", validation_curves),
        ("losses", training_curves),
        ("weights", weights_over_time),
        ("conflicts", conflicts_over_time),
    ]
    made = []
    with style():
        for name, make in makers:
            drawn = make(summary, found)
            if drawn is not None:
                # A name of letters, digits and dashes, as ids need.
                where = summary.benchmark.name.replace("_", "-")
                svg = draw(drawn.figure, f"{where}-{name}", f"{drawn.title}, {where}")
                made.append(Picture(drawn.title, drawn.caption, svg))
    return made
