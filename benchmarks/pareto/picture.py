"""Pictures of `run pareto`: learned fronts, and trajectories on the quadratics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.files import write_whole
from benchmarks.pareto.problems import PROBLEMS
from benchmarks.pareto.quadratics import QUADRATICS
from benchmarks.pareto.records import Record

__all__ = ["write_pictures"]

# Okabe & Ito's colours.
_METHODS = {
    "constant": ("#D55E00", "v"),
    "tchebycheff": ("#0072B2", "s"),
    "stch_scalar": ("#009E73", "o"),
}
_STARTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def write_pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """`pareto`, the fronts of the lowest seed, and `ewq` and `cqf`; each as PNG and SVG.

    Returns:
        The files.
    """
    figures = {}
    learned = [r for r in records if r.problem in PROBLEMS]
    if learned:
        figures["pareto"] = _fronts(learned)
    for name in QUADRATICS:
        mine = [r for r in records if r.problem == name]
        if mine:
            figures[name] = _trajectories(name, mine)
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            write_whole(path, lambda target, f=figure, k=kind: f.savefig(target, format=k))  # type: ignore[misc]
            written.append(path)
    return written


def _grid(n: int, columns: int, side: float) -> tuple[Figure, list[Axes]]:
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(max(side * columns, 6.0), side * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[n:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:n])


def _fronts(records: Sequence[Record]) -> Figure:
    names = list(dict.fromkeys(r.problem for r in records))
    figure, panels = _grid(len(names), 4, 2.6)
    for axes, name in zip(panels, names, strict=True):
        front = PROBLEMS[name].front
        if front is not None:
            f1 = torch.linspace(0.0, 1.0, 201)
            axes.plot(f1, front(f1), color="black", linewidth=1.2, zorder=1)
        mine = [r for r in records if r.problem == name]
        lowest = min(r.number for r in mine)
        for record in mine:
            if record.number == lowest:
                colour, marker = _METHODS[record.method]
                points = np.clip(np.array(record.points).reshape(-1, 2), -0.05, 1.4)
                axes.plot(
                    *points.T,
                    marker,
                    color=colour,
                    markersize=3,
                    markerfacecolor="none",
                    markeredgewidth=0.7,
                )
        axes.set(xlim=(-0.07, 1.45), ylim=(-0.07, 1.45), title=name)
        axes.set_xlabel("f1 (normalized)", fontsize=8)
        axes.set_ylabel("f2 (normalized)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color="black", linewidth=1.2, label="Pareto front")]
    handles += [
        Line2D([], [], color=c, marker=m, markerfacecolor="none", linestyle="none", label=method)
        for method, (c, m) in _METHODS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _trajectories(name: str, records: Sequence[Record]) -> Figure:
    quadratic = QUADRATICS[name]
    methods = list(dict.fromkeys(r.method for r in records))
    figure, panels = _grid(len(methods), 4, 2.4)
    everything = np.array([p for r in records for p in r.points])
    low, high = everything.min(0), everything.max(0)
    room = 0.06 * (high - low).max()
    sides = [np.linspace(a - room, b + room, 120) for a, b in zip(low, high, strict=True)]
    x1, x2 = np.meshgrid(*sides)
    losses = quadratic.objectives(torch.from_numpy(np.stack([x1, x2], -1))).numpy()
    front = quadratic.front.numpy()
    for axes, method in zip(panels, methods, strict=True):
        for k, style in enumerate(("solid", "dashed")):
            axes.contour(
                x1, x2, losses[..., k], levels=8, colors="0.8", linewidths=0.5, linestyles=style
            )
        marker = "o" if len(front) == 1 else ""
        axes.plot(*front.T, color="black", linewidth=1.6, marker=marker, markersize=3, zorder=2)
        for record in records:
            if record.method != method:
                continue
            path, colour = np.array(record.points), _STARTS[record.number]
            axes.plot(*path.T, color=colour, linewidth=0.9, zorder=3)
            axes.plot(*path[0], "o", color=colour, markerfacecolor="white", markersize=4, zorder=4)
            axes.plot(
                *path[-1], "D", color=colour, markeredgecolor="white", markersize=4.5, zorder=5
            )
        axes.set_title(method, fontsize=9)
        axes.tick_params(labelsize=7)
    handles = [
        Line2D([], [], color="black", linewidth=1.6, label="Pareto set"),
        Line2D([], [], color="0.7", linewidth=0.8, label="contours of f1"),
        Line2D([], [], color="0.7", linewidth=0.8, linestyle="dashed", label="of f2"),
        Line2D([], [], color="0.35", marker="o", markerfacecolor="white", ls="none", label="start"),
        Line2D([], [], color="0.35", marker="D", linestyle="none", label="end"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure
