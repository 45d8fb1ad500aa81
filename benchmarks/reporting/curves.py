"""Pictures of what happens in the course of the training: a panel a method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.report import words
from benchmarks.reporting.looks import COLUMNS, GREY, Drawn, Looks, looks
from benchmarks.reporting.summary import PLAIN, Summary, validation_loss
from benchmarks.results import Record

__all__ = [
    "conflicts_over_time",
    "training_curves",
    "validation_curves",
    "weights_over_time",
]


def validation_curves(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """Δm on validation by epoch."""
    curves = {}
    for line in summary.lines:
        per_seed = [
            {epoch: loss for epoch, _, loss in curve}
            for record in line.entry.good
            if (curve := validation_loss(summary.benchmark, record, summary.validation_baseline))
        ]
        if per_seed:
            curves[line.label] = _over_seeds(per_seed)
    if not curves:
        return None
    figure = _panels(curves, found, "Δm on validation")
    values = [value for curve in curves.values() for value in curve[1]]
    ends = [curve[1][-1] for curve in curves.values()]
    _limit(figure, values, ends)
    caption = (
        "Δm of the validation metrics against the end of single-task training, by epoch, mean over "
        "seeds; lower is better. Grey: the other methods."
    )
    if summary.target is not None:
        for axes in figure.axes:
            axes.axhline(summary.target, color=GREY, linestyle="--", linewidth=0.9, zorder=0)
        plain = next(m for m in PLAIN if summary.line(m) is not None)
        caption += f" Dashed: where {plain} ends, the target of the table's last columns."
    return Drawn(figure, "Validation curves", caption)


def training_curves(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """The tasks' mean relative loss by epoch."""
    start = _first_losses(summary)
    if start is None:
        return None
    curves = {}
    for line in summary.lines:
        per_seed = []
        for record in line.entry.good:
            relative = {}
            for point in record.curve:
                ratios = [
                    loss / first
                    for loss, first in zip(point["losses"], start, strict=True)
                    if loss is not None and first
                ]
                if ratios:
                    relative[point["epoch"]] = statistics.fmean(ratios)
            if relative:
                per_seed.append(relative)
        if per_seed:
            curves[line.label] = _over_seeds(per_seed)
    if not curves:
        return None
    figure = _panels(curves, found, "relative loss")
    values = [value for curve in curves.values() for value in curve[1]]
    _limit(figure, values, [curve[1][-1] for curve in curves.values()])
    return Drawn(
        figure,
        "Training curves",
        "Mean over the tasks of the training loss over its value in the first epoch (the median "
        "over all runs), by epoch, mean over seeds. Grey: the other methods.",
    )


def _first_losses(summary: Summary) -> list[float | None] | None:
    """By task, the median over all runs of the first epoch's training loss."""
    firsts = [r.curve[0]["losses"] for line in summary.lines for r in line.entry.good if r.curve]
    if not firsts:
        return None
    by_task = zip(*firsts, strict=True)
    known = [[loss for loss in losses if loss is not None] for losses in by_task]
    return [statistics.median(losses) if losses else None for losses in known]


def weights_over_time(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """The tasks' weights by epoch."""
    lines = [line for line in summary.lines if any(_weights_of(r) for r in line.entry.good)]
    if not lines:
        return None
    tasks = [task.name for task in summary.benchmark.tasks]
    of_task = looks(tasks)
    figure, grid = _grid(len(lines), extra=0.5 + 0.18 * math.ceil(len(tasks) / 5))
    for axes, line in zip(grid, lines, strict=False):
        for number, task in enumerate(tasks):
            per_seed = [
                {epoch: weights[number] for epoch, weights in _weights_of(record)}
                for record in line.entry.good
            ]
            epochs, means = _over_seeds([curve for curve in per_seed if curve])
            look = of_task[task]
            axes.plot(
                epochs,
                means,
                color=look.colour,
                linestyle=look.dashes,
                marker="." if len(epochs) < 2 else None,
                label=words(task),
            )
        axes.axhline(1 / len(tasks), color=GREY, linewidth=0.7, zorder=0)
        axes.set_title(line.label)
    highest = max(axes.dataLim.y1 for axes in grid)
    grid[0].set_ylim(0, 1.05 * highest)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(tasks)))
    figure.supylabel("weight", fontsize=9)
    return Drawn(
        figure,
        "Weights over time",
        "The tasks' weights in the update, mean over the steps of an epoch and over seeds, scaled "
        "to sum 1; grey line: equal weights. Methods that have no weights are left out.",
    )


def _weights_of(record: Record) -> list[tuple[int, list[float]]]:
    found = []
    for point in record.curve:
        weights = point.get("weights")
        if weights is not None and all(weight is not None for weight in weights):
            found.append((point["epoch"], weights))
    return found


def conflicts_over_time(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """How the tasks' gradients lie to each other, by epoch."""
    lines = [line for line in summary.lines if line.conflicts is not None]
    if not lines:
        return None
    figure, grid = _grid(len(lines), extra=0.6)
    both = (
        ("conflicts", "share of conflicting pairs", "#D55E00", "-"),
        ("cosine", "mean cosine", "#0072B2", "--"),
    )
    for axes, line in zip(grid, lines, strict=False):
        for name, label, colour, dashes in both:
            per_seed = [
                {p["epoch"]: p[name] for p in record.curve if p.get(name) is not None}
                for record in line.entry.good
            ]
            epochs, means = _over_seeds([curve for curve in per_seed if curve])
            axes.plot(epochs, means, color=colour, linestyle=dashes, label=label)
        axes.axhline(0, color=GREY, linewidth=0.7, zorder=0)
        axes.set_title(line.label)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return Drawn(
        figure,
        "Conflicts over time",
        "The tasks' gradients of the shared parameters in a batch at the start of each epoch: the "
        "share of pairs of tasks that conflict, that is, have a negative inner product, and the "
        "mean cosine over the pairs. Mean over seeds.",
    )


def _panels(
    curves: Mapping[str, tuple[list[int], list[float]]], found: Mapping[str, Looks], label: str
) -> Figure:
    """One panel a method, with its curve in colour over all others' in grey."""
    figure, grid = _grid(len(curves), extra=0.2)
    for axes, (name, (epochs, values)) in zip(grid, curves.items(), strict=False):
        for other, curve in curves.items():
            if other != name:
                axes.plot(*curve, color=GREY, alpha=0.35, linewidth=0.7)
        colour = found[name].colour
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=2.5)
        axes.set_title(name)
    figure.supylabel(label, fontsize=9)
    return figure


def _grid(count: int, extra: float) -> tuple[Figure, list[Axes]]:
    """Axes of one scale by epoch, `COLUMNS` in a row; labelled at the left and at the bottom."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(7.4, 1.35 * rows + extra), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat: list[Axes] = [axes for row in grid for axes in row]
    for axes in flat[count:]:
        axes.remove()
    for axes in flat[:count]:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    # The lowest panel of a column that ends earlier has the numbers too.
    for axes in flat[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("epoch")
    return figure, flat[:count]


def _limit(figure: Figure, values: Sequence[float], ends: Sequence[float]) -> None:
    """Where all curves end is in sight; a few first epochs far above are cut off."""
    low = min(values)
    high = max([*ends, float(np.quantile(values, 0.75))])
    margin = 0.06 * (high - low) or 1.0
    for axes in figure.axes:
        axes.set_ylim(low - margin, high + margin)


def _over_seeds(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float]]:
    """Epochs and the means over the seeds that have them."""
    epochs = sorted({epoch for curve in curves for epoch in curve})
    return epochs, [
        statistics.fmean(curve[epoch] for curve in curves if epoch in curve) for epoch in epochs
    ]
