"""Pictures of the toy: a panel for each method, in the plane and in the plane of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from benchmarks.files import write_whole
from benchmarks.toy.records import Record
from benchmarks.toy.settings import Setting

__all__ = ["write_pictures"]

# Okabe & Ito's colours; one for each starting point.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_REACH = 10.5
"""The plane is shown from −10.5 to 10.5."""


def write_pictures(setting: Setting, records: Sequence[Record], folder: Path) -> list[Path]:
    """`trajectories` over the contours of the mean loss, and `losses`, where they end; each as PNG
    and SVG.

    Methods that gave no number from any start have no panel.

    Returns:
        The files.
    """
    by_label: dict[str, list[Record]] = {}
    for record in records:
        by_label.setdefault(record.label, []).append(record)
    shown = {label: mine for label, mine in by_label.items() if any(r.failed_at != 0 for r in mine)}
    if not shown:
        return []
    written = []
    pictures: dict[str, Callable[[Axes, Sequence[Record]], None]] = {
        "trajectories": lambda axes, mine: _plane(axes, setting, mine),
        "losses": lambda axes, mine: _losses(axes, setting, mine),
    }
    names = {"trajectories": ("x1", "x2"), "losses": ("L1", "L2")}
    for name, draw in pictures.items():
        figure = _panels(setting, shown, draw, names[name])
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            write_whole(path, lambda target, f=figure, k=kind: f.savefig(target, format=k))  # type: ignore[misc]
            written.append(path)
    return written


def _panels(
    setting: Setting,
    shown: dict[str, list[Record]],
    draw: Callable[[Axes, Sequence[Record]], None],
    names: tuple[str, str],
) -> Figure:
    columns = min(len(shown), max(4, round(1.3 * math.sqrt(len(shown)))))
    rows = math.ceil(len(shown) / columns)
    legend = 0.62  # inches
    height = 1.95 * rows + legend
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - legend / height))
    figure = Figure(figsize=(max(1.75 * columns, 8.5), height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for k, axes in enumerate(grid.flat):
        if k >= len(shown):
            axes.set_axis_off()
            # The panel above has the tick labels then.
            grid.flat[k - columns].tick_params(labelbottom=True)
    for axes, (label, mine) in zip(grid.flat, shown.items(), strict=False):
        draw(axes, mine)
        reached = sum(record.reached for record in mine)
        axes.set_title(f"{label}  {reached}/{len(mine)}", fontsize=7.5, pad=3)
        axes.tick_params(labelsize=6, length=2)
    marks: list[dict[str, Any]] = [
        {"marker": "o", "markerfacecolor": "white", "label": "start"},
        {"marker": "D", "label": "end, on the front"},
        {"marker": "X", "label": "end, not on the front"},
        {"marker": "1", "label": "no number from here on"},
    ]
    signs = [Line2D([], [], color="black", linewidth=2.2, label="Pareto front")]
    signs += [Line2D([], [], color="0.35", linestyle="none", markersize=5, **m) for m in marks]
    starts = [
        Line2D([], [], color=colour, linewidth=1.6, label=f"from ({x1:g}, {x2:g})")
        for colour, (x1, x2) in zip(_COLOURS, setting.starts, strict=False)
    ]
    # Columns are filled one after another: signs above, starts below.
    starts += [Line2D([], [], linestyle="none", label=" ")] * (len(signs) - len(starts))
    handles = [handle for pair in zip(signs, starts, strict=True) for handle in pair]
    figure.legend(handles=handles, loc="upper center", ncols=5, fontsize=7.5, frameon=False)
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    return figure


def _plane(axes: Axes, setting: Setting, mine: Sequence[Record]) -> None:
    side = np.linspace(-_REACH, _REACH, 150)
    x1, x2 = np.meshgrid(side, side)
    losses = setting.toy.evaluate(np.stack([x1.ravel(), x2.ravel()], 1))[0]
    mean = losses.mean(1).reshape(x1.shape)
    contour = axes.contour(
        x1, x2, mean, levels=14, colors="0.75", linewidths=0.4, linestyles="solid"
    )
    contour.set_rasterized(True)
    axes.plot(*setting.toy.front.points.T, color="black", linewidth=1.8, zorder=2)
    for record in mine:
        path = np.array(record.trajectory)[:, 1:]
        colour = _COLOURS[record.start]
        axes.plot(*path.T, color=colour, linewidth=0.9, zorder=3)
        axes.plot(*record.first, **_start(colour))
        # What has left the panel is at its edge.
        axes.plot(*np.clip(record.end, -_REACH, _REACH), **_end(record, colour))
    axes.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH), xticks=(-8, 0, 8), yticks=(-8, 0, 8))
    axes.set_aspect("equal")


def _losses(axes: Axes, setting: Setting, mine: Sequence[Record]) -> None:
    """L1 and L2 where the trajectories end; what is outside of the panel is at its edge."""
    scaled = setting.toy.front.unscaled * [setting.scale, 1.0]
    axes.plot(*scaled.T, color="black", linewidth=1.8, zorder=2)
    limits = np.array([[-21.5, 10.0], [-21.5, 10.0]]) * [[setting.scale], [1.0]]
    for record in mine:
        end = np.clip(record.losses, *limits.T)
        axes.plot(*end, **_end(record, _COLOURS[record.start]))
    axes.set(xlim=limits[0], ylim=limits[1], yticks=(-20, -10, 0, 10))
    axes.set_xticks([round(setting.scale * tick, 2) for tick in (-20, -10, 0, 10)])
    axes.spines[["top", "right"]].set_visible(False)


def _start(colour: str) -> dict[str, Any]:
    return {
        "marker": "o",
        "markersize": 3.6,
        "color": colour,
        "markerfacecolor": "white",
        "markeredgewidth": 0.9,
        "linestyle": "none",
        "zorder": 4,
    }


def _end(record: Record, colour: str) -> dict[str, Any]:
    marker = "1" if record.error is not None else "D" if record.reached else "X"
    return {
        "marker": marker,
        "markersize": 5.5 if marker == "1" else 4.2,
        "color": colour,
        "markeredgecolor": colour if marker == "1" else "white",
        "markeredgewidth": 1.0 if marker == "1" else 0.5,
        "linestyle": "none",
        "zorder": 5,
        "clip_on": False,
    }
