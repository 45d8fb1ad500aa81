"""The picture of a two-task table: one task's measure against the other's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.benchmark import SINGLE_TASK
from benchmarks.plan import Plan
from benchmarks.report import Row, Stat, write_whole

__all__ = ["COLOURS", "MARKERS", "Point", "labelled_points", "write_plot"]

# Okabe & Ito's colours without the yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")


class Point(NamedTuple):
    """A marker with its name and, maybe, error bars; without a colour it gets the next one."""

    label: str
    x: float
    y: float
    x_spread: float | None = None
    y_spread: float | None = None
    colour: str | None = None
    marker: str | None = None


def write_plot(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """Draw the first measure of the first two tasks as a PNG.

    One marker a method with error bars of one sample standard deviation over the seeds; dashed
    lines where single-task training ends up.
    """
    tasks = plan.benchmark.tasks[:2]
    measures = [task.measures[0] for task in tasks]
    keys = [(task.name, measure.name) for task, measure in zip(tasks, measures, strict=True)]
    scales = [100 if measure.percent else 1 for measure in measures]

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points: list[Point] = []
    for row in rows:
        x, y = (_scaled(row.test[key], scale) for key, scale in zip(keys, scales, strict=True))
        if x is None or y is None:
            continue
        if row.method == SINGLE_TASK:
            axes.axvline(x.mean, color="0.5", linestyle="--", linewidth=1, zorder=0)
            axes.axhline(y.mean, color="0.5", linestyle="--", linewidth=1, zorder=0)
        else:
            label = plan.label(row.method, row.architecture)
            points.append(Point(label, x.mean, y.mean, x.spread, y.spread))
    labelled_points(axes, points)
    units = [" (%)" if measure.percent else "" for measure in measures]
    labels = [
        f"{task.name.replace('_', ' ')} test {measure.name}{unit}"
        for task, measure, unit in zip(tasks, measures, units, strict=True)
    ]
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, bars: ± 1 sample std"
    axes.set_title(f"{plan.benchmark.name} ({seeds}; dashed: single-task)")
    axes.spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda target: figure.savefig(target, format="png"))


def labelled_points(axes: Axes, points: Sequence[Point]) -> None:
    """Draw points with their names in a column beside the axes, joined to them by lines.

    The names are in the order of the points' heights, so no two can overlap.
    """
    for number, point in enumerate(sorted(points, key=lambda point: point.y)):
        colour = point.colour or COLOURS[number % len(COLOURS)]
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.x_spread,
            yerr=point.y_spread,
            fmt=point.marker or MARKERS[number % len(MARKERS)],
            color=colour,
            markersize=7,
            elinewidth=0.8,
            capsize=2,
        )
        axes.annotate(
            point.label,
            xy=(point.x, point.y),
            xytext=(1.06, (number + 0.5) / len(points)),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _scaled(stat: Stat | None, scale: float) -> Stat | None:
    if stat is None:
        return None
    return Stat(stat.mean * scale, None if stat.spread is None else stat.spread * scale)
