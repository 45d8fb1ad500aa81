"""The pictures of one benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.benchmark import SINGLE_TASK
from benchmarks.plot import COLOURS, MARKERS, Point, labelled_points
from benchmarks.report import words
from benchmarks.reporting.stats import relative_loss
from benchmarks.reporting.summary import PLAIN, Line, Summary, flags, matrix, validation_loss
from benchmarks.reporting.svg import INK, draw, style
from benchmarks.results import Record

__all__ = ["Looks", "Picture", "looks", "pictures"]

_GREY = "#8a8a8a"
_COLUMNS = 4
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
_MOST_RADARS = 16


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


def pictures(summary: Summary, found: Mapping[str, Looks]) -> list[Picture]:
    """All pictures that the benchmark's records have the numbers for."""
    makers: list[tuple[str, Callable[[Summary, Mapping[str, Looks]], _Drawn | None]]] = [
        ("delta-m", _delta_m),
        ("pareto", _pareto),
        ("radar", _radar),
        ("cost", _cost),
        ("validation", _validation),
        ("losses", _losses),
        ("weights", _weights),
        ("conflicts", _conflicts),
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


@dataclass(frozen=True)
class _Drawn:
    figure: Figure
    title: str
    caption: str


def _delta_m(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
    lines = [line for line in summary.lines if line.row.delta_m is not None]
    if not lines:
        return None
    lines.sort(key=_mean_delta_m, reverse=True)
    figure = Figure(figsize=(7.4, 0.9 + 0.24 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=_GREY, linestyle="--", linewidth=1, zorder=0)
    for height, line in enumerate(lines):
        look, mean = found[line.label], _mean_delta_m(line)
        if line.interval is not None:
            axes.plot(line.interval, [height] * 2, color=look.colour, linewidth=1.6)
        for value in _each_delta_m(summary, line):
            axes.plot(value, height, "|", color=look.colour, markersize=6, alpha=0.8)
        axes.plot(mean, height, look.marker, color=look.colour, markersize=6)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Δm in percent, lower is better")
    seeds = max(line.row.seeds for line in lines)
    caption = "Change against single-task training (0), mean over all metrics of the test set. "
    if seeds > 1:
        caption += (
            "Line: 95 % bootstrap interval over the seeds of the method and of the baseline, rough "
            f"with {seeds}; ticks: the seeds."
        )
    return _Drawn(figure, "Δm with intervals", caption.strip())


def _pareto(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
    if len(summary.benchmark.tasks) == 2:
        return _pareto_of_two(summary, found)
    lines = [line for line in summary.lines if line.changes]
    points = [
        Point(
            line.label,
            statistics.fmean(line.changes.values()),
            min(line.changes.values()),
            colour=found[line.label].colour,
            marker=found[line.label].marker,
        )
        for line in lines
        if line.entry.method != SINGLE_TASK
    ]
    if not points or len(summary.benchmark.tasks) == 1:
        return None
    figure = _scatter(points)
    axes = figure.axes[0]
    axes.axvline(0, color=_GREY, linestyle="--", linewidth=1, zorder=0)
    axes.axhline(0, color=_GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("mean over the tasks of the gain over single-task, percent")
    axes.set_ylabel("the worst task's gain, percent")
    return _Drawn(
        figure,
        "Mean against worst task",
        "Gain over single-task training (dashed) of the test measures, mean over seeds: up and to "
        "the right is better. A method that serves some tasks at the cost of others is low.",
    )


def _pareto_of_two(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
    tasks = summary.benchmark.tasks
    measures = [task.measures[0] for task in tasks]
    points = []
    single = None
    for line in summary.lines:
        stats = [line.row.test[task.name, m.name] for task, m in zip(tasks, measures, strict=True)]
        x, y = stats
        if x is None or y is None:
            continue
        scales = [100 if measure.percent else 1 for measure in measures]
        if line.entry.method == SINGLE_TASK:
            single = (x.mean * scales[0], y.mean * scales[1])
            continue
        look = found[line.label]
        points.append(
            Point(
                line.label,
                x.mean * scales[0],
                y.mean * scales[1],
                None if x.spread is None else x.spread * scales[0],
                None if y.spread is None else y.spread * scales[1],
                look.colour,
                look.marker,
            )
        )
    if not points:
        return None
    figure = _scatter(points)
    axes = figure.axes[0]
    if single is not None:
        axes.axvline(single[0], color=_GREY, linestyle="--", linewidth=1, zorder=0)
        axes.axhline(single[1], color=_GREY, linestyle="--", linewidth=1, zorder=0)
    names = [
        f"{words(task.name)}: {measure.name}{' (%)' if measure.percent else ''}"
        for task, measure in zip(tasks, measures, strict=True)
    ]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    better = [
        f"{words(task.name)} {'higher' if measure.higher_is_better else 'lower'}"
        for task, measure in zip(tasks, measures, strict=True)
    ]
    return _Drawn(
        figure,
        "One task against the other",
        f"Test measures, mean over seeds, bars ± 1 sample standard deviation; dashed: single-task "
        f"training. Better is {' and '.join(better)}.",
    )


def _radar(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
    tasks = [task.name for task in summary.benchmark.tasks]
    lines = [line for line in summary.lines if line.changes and line.entry.method != SINGLE_TASK]
    if len(tasks) < 3 or not lines:
        return None
    lines = sorted(lines, key=_mean_delta_m)[:_MOST_RADARS]
    angles = np.arange(len(tasks)) * 2 * math.pi / len(tasks)
    ring = np.append(angles, 0.0)
    values = [change for line in lines for change in line.changes.values()]
    # One method that fails must not press all others together.
    low = min(-2.0, float(np.quantile(values, 0.05)))
    high = max(2.0, max(values))
    margin = 0.15 * (high - low)
    rows = math.ceil(len(lines) / _COLUMNS)
    figure = Figure(figsize=(7.4, 1.95 * rows), layout="constrained")
    for number, line in enumerate(lines):
        axes = figure.add_subplot(rows, _COLUMNS, number + 1, projection="polar")
        look = found[line.label]
        gains = np.clip([line.changes[task] for task in tasks], low, high)
        gains = np.append(gains, gains[0])
        axes.plot(ring, np.zeros_like(ring), color=_GREY, linestyle="--", linewidth=0.9)
        axes.plot(ring, gains, color=look.colour, marker=".", markersize=4)
        axes.fill(ring, gains, color=look.colour, alpha=0.15)
        axes.set_ylim(low - margin, high)
        axes.set_xticks(angles, [str(place) for place in range(1, len(tasks) + 1)], fontsize=7)
        axes.tick_params(axis="x", pad=-2)
        axes.set_yticks([])
        axes.grid(color=_GREY, alpha=0.3)
        axes.spines["polar"].set(color=_GREY, alpha=0.4)
        axes.set_title(line.label, pad=8)
    key = ", ".join(f"{n} {words(task)}" for n, task in enumerate(tasks, start=1))
    return _Drawn(
        figure,
        "Change per task",
        f"Gain over single-task training (dashed ring) of each task's test measures: outside the "
        f"ring is better. The axis goes from {low - margin:.1f} % in the centre to {high:.1f} %, "
        f"what is below {low:.1f} % is drawn there. Tasks: {key}.",
    )


def _cost(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
    points = [
        Point(
            line.label,
            line.row.step_time,
            _mean_delta_m(line),
            colour=found[line.label].colour,
            marker=found[line.label].marker,
        )
        for line in summary.lines
        if line.row.step_time is not None and line.row.delta_m is not None
    ]
    if not points:
        return None
    figure = _scatter(points)
    axes = figure.axes[0]
    axes.axhline(0, color=_GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("time of a training step over the plain sum's")
    axes.set_ylabel("Δm in percent")
    return _Drawn(
        figure,
        "Δm against the time of a step",
        "Lower is better on both axes; dashed: single-task training.",
    )


def _validation(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
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
            axes.axhline(summary.target, color=_GREY, linestyle="--", linewidth=0.9, zorder=0)
        plain = next(m for m in PLAIN if summary.line(m) is not None)
        caption += f" Dashed: where {plain} ends, the target of the table's last columns."
    return _Drawn(figure, "Validation curves", caption)


def _losses(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
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
    return _Drawn(
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


def _weights(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
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
        axes.axhline(1 / len(tasks), color=_GREY, linewidth=0.7, zorder=0)
        axes.set_title(line.label)
    highest = max(axes.dataLim.y1 for axes in grid)
    grid[0].set_ylim(0, 1.05 * highest)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(tasks)))
    figure.supylabel("weight", fontsize=9)
    return _Drawn(
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


def _conflicts(summary: Summary, found: Mapping[str, Looks]) -> _Drawn | None:
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
        axes.axhline(0, color=_GREY, linewidth=0.7, zorder=0)
        axes.set_title(line.label)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return _Drawn(
        figure,
        "Conflicts over time",
        "The tasks' gradients of the shared parameters in a batch at the start of each epoch: the "
        "share of pairs of tasks that conflict, that is, have a negative inner product, and the "
        "mean cosine over the pairs. Mean over seeds.",
    )


def _scatter(points: Sequence[Point]) -> Figure:
    height = max(3.4, 0.22 * len(points) + 0.8)
    figure = Figure(figsize=(7.4, height), layout="constrained")
    labelled_points(figure.add_subplot(), points)
    return figure


def _panels(
    curves: Mapping[str, tuple[list[int], list[float]]], found: Mapping[str, Looks], label: str
) -> Figure:
    """One panel a method, with its curve in colour over all others' in grey."""
    figure, grid = _grid(len(curves), extra=0.2)
    for axes, (name, (epochs, values)) in zip(grid, curves.items(), strict=False):
        for other, curve in curves.items():
            if other != name:
                axes.plot(*curve, color=_GREY, alpha=0.35, linewidth=0.7)
        colour = found[name].colour
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=2.5)
        axes.set_title(name)
    figure.supylabel(label, fontsize=9)
    return figure


def _grid(count: int, extra: float) -> tuple[Figure, list[Axes]]:
    """Axes of one scale by epoch, `_COLUMNS` in a row; labelled at the left and at the bottom."""
    columns = min(_COLUMNS, count)
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


def _each_delta_m(summary: Summary, line: Line) -> list[float]:
    """Δm of each seed."""
    if summary.baseline is None:
        return []
    values = matrix(summary.benchmark, line.entry.good)
    baseline = summary.baseline.mean(0)
    return [float(v) for v in relative_loss(values, baseline, flags(summary.benchmark))]


def _mean_delta_m(line: Line) -> float:
    return math.inf if line.row.delta_m is None else line.row.delta_m.mean
