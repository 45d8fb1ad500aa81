"""Pictures of how well the methods do on a benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.benchmark import SINGLE_TASK
from benchmarks.plot import Point, labelled_points
from benchmarks.report import words
from benchmarks.reporting.looks import COLUMNS, GREY, Drawn, Looks
from benchmarks.reporting.stats import relative_loss
from benchmarks.reporting.summary import Line, Summary, flags, matrix

__all__ = ["change_per_task", "cost", "delta_m_with_intervals", "task_against_task"]

_MOST_RADARS = 16


def delta_m_with_intervals(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """A line a method, the best on top."""
    lines = [line for line in summary.lines if line.row.delta_m is not None]
    if not lines:
        return None
    lines.sort(key=_mean_delta_m, reverse=True)
    figure = Figure(figsize=(7.4, 0.9 + 0.24 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1, zorder=0)
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
    return Drawn(figure, "Δm with intervals", caption.strip())


def task_against_task(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """Two tasks' measures, or of more tasks the mean gain against the worst."""
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
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("mean over the tasks of the gain over single-task, percent")
    axes.set_ylabel("the worst task's gain, percent")
    return Drawn(
        figure,
        "Mean against worst task",
        "Gain over single-task training (dashed) of the test measures, mean over seeds: up and to "
        "the right is better. A method that serves some tasks at the cost of others is low.",
    )


def _pareto_of_two(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
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
        axes.axvline(single[0], color=GREY, linestyle="--", linewidth=1, zorder=0)
        axes.axhline(single[1], color=GREY, linestyle="--", linewidth=1, zorder=0)
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
    return Drawn(
        figure,
        "One task against the other",
        f"Test measures, mean over seeds, bars ± 1 sample standard deviation; dashed: single-task "
        f"training. Better is {' and '.join(better)}.",
    )


def change_per_task(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """A radar a method, for three tasks or more."""
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
    rows = math.ceil(len(lines) / COLUMNS)
    figure = Figure(figsize=(7.4, 1.95 * rows), layout="constrained")
    for number, line in enumerate(lines):
        axes = figure.add_subplot(rows, COLUMNS, number + 1, projection="polar")
        look = found[line.label]
        gains = np.clip([line.changes[task] for task in tasks], low, high)
        gains = np.append(gains, gains[0])
        axes.plot(ring, np.zeros_like(ring), color=GREY, linestyle="--", linewidth=0.9)
        axes.plot(ring, gains, color=look.colour, marker=".", markersize=4)
        axes.fill(ring, gains, color=look.colour, alpha=0.15)
        axes.set_ylim(low - margin, high)
        axes.set_xticks(angles, [str(place) for place in range(1, len(tasks) + 1)], fontsize=7)
        axes.tick_params(axis="x", pad=-2)
        axes.set_yticks([])
        axes.grid(color=GREY, alpha=0.3)
        axes.spines["polar"].set(color=GREY, alpha=0.4)
        axes.set_title(line.label, pad=8)
    key = ", ".join(f"{n} {words(task)}" for n, task in enumerate(tasks, start=1))
    return Drawn(
        figure,
        "Change per task",
        f"Gain over single-task training (dashed ring) of each task's test measures: outside the "
        f"ring is better. The axis goes from {low - margin:.1f} % in the centre to {high:.1f} %, "
        f"what is below {low:.1f} % is drawn there. Tasks: {key}.",
    )


def cost(summary: Summary, found: Mapping[str, Looks]) -> Drawn | None:
    """Δm against the time of a step."""
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
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("time of a training step over the plain sum's")
    axes.set_ylabel("Δm in percent")
    return Drawn(
        figure,
        "Δm against the time of a step",
        "Lower is better on both axes; dashed: single-task training.",
    )


def _scatter(points: Sequence[Point]) -> Figure:
    height = max(3.4, 0.22 * len(points) + 0.8)
    figure = Figure(figsize=(7.4, height), layout="constrained")
    labelled_points(figure.add_subplot(), points)
    return figure


def _each_delta_m(summary: Summary, line: Line) -> list[float]:
    """Δm of each seed."""
    if summary.baseline is None:
        return []
    values = matrix(summary.benchmark, line.entry.good)
    baseline = summary.baseline.mean(0)
    return [float(v) for v in relative_loss(values, baseline, flags(summary.benchmark))]


def _mean_delta_m(line: Line) -> float:
    return math.inf if line.row.delta_m is None else line.row.delta_m.mean
