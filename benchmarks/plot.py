"""The picture of a two-task table: one task's measure against the other's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.benchmark import SINGLE_TASK
from benchmarks.plan import Plan
from benchmarks.report import Row, Stat, write_whole

__all__ = ["write_plot"]

# Okabe & Ito's colours without the yellow, which is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")


def write_plot(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """Draw the first measure of the first two tasks as a PNG.

    One marker a method with error bars of one sample standard deviation over the seeds; dashed
    lines where single-task training ends up. The methods' names stand in a column beside the axes,
    in the order of the markers' heights and joined to them by lines, so no two can overlap.
    """
    tasks = plan.benchmark.tasks[:2]
    measures = [task.measures[0] for task in tasks]
    keys = [(task.name, measure.name) for task, measure in zip(tasks, measures, strict=True)]
    scales = [100 if measure.percent else 1 for measure in measures]

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = []
    for row in rows:
        x, y = (_scaled(row.test[key], scale) for key, scale in zip(keys, scales, strict=True))
        if x is None or y is None:
            continue
        if row.method == SINGLE_TASK:
            axes.axvline(x.mean, color="0.5", linestyle="--", linewidth=1, zorder=0)
            axes.axhline(y.mean, color="0.5", linestyle="--", linewidth=1, zorder=0)
        else:
            points.append((y.mean, x, y, plan.label(row.method, row.architecture)))
    points.sort(key=lambda point: point[0])

    for number, (_, x, y, method) in enumerate(points):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.spread,
            yerr=y.spread,
            fmt=_MARKERS[number % len(_MARKERS)],
            color=colour,
            markersize=7,
            elinewidth=0.8,
            capsize=2,
        )
        axes.annotate(
            method,
            xy=(x.mean, y.mean),
            xytext=(1.06, (number + 0.5) / len(points)),
            textcoords="axes fraction",
            color=colour,
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


def _scaled(stat: Stat | None, scale: float) -> Stat | None:
    if stat is None:
        return None
    return Stat(stat.mean * scale, None if stat.spread is None else stat.spread * scale)
