"""The critical-difference diagram."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.reporting.looks import Looks, Picture
from benchmarks.reporting.stats import cliques
from benchmarks.reporting.summary import Overall
from benchmarks.reporting.svg import INK, draw, style

__all__ = ["critical_difference_diagram"]

_ROW = 0.24
"""Inches between two names."""


def critical_difference_diagram(overall: Overall, found: Mapping[str, Looks]) -> Picture | None:
    """Mean ranks on a line, with bars over groups that are not significantly different.

    The diagram of Demšar, *Statistical Comparisons of Classifiers over Multiple Data Sets*, JMLR 7,
    2006, figure 1. The better half of the methods is named at the left.
    """
    if overall.difference is None:
        return None
    ordered = sorted(zip(overall.mean_ranks, overall.methods, strict=True))
    count = len(ordered)
    groups = cliques(overall.mean_ranks, overall.difference)
    left, right = ordered[: (count + 1) // 2], ordered[(count + 1) // 2 :][::-1]
    # Downwards, in rows: the axis is at 0, then bars, then names.
    bars = [0.45 + 0.4 * number for number in range(len(groups))]
    first = 0.9 + 0.4 * len(groups)
    depth: float = first + max(len(left), len(right))
    with style():
        figure = Figure(figsize=(7.4, _ROW * (depth + 3.2)))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        side = 0.34 * (count - 1)
        axes.set_xlim(1 - side, count + side)
        axes.set_ylim(depth + 0.3, -2.9)
        axes.plot([1, count], [0, 0], color=INK, linewidth=1)
        step = 1 if count <= 16 else 2
        for rank in range(1, count + 1, step):
            axes.plot([rank, rank], [0, -0.22], color=INK, linewidth=1)
            axes.text(rank, -0.3, str(rank), ha="center", va="bottom")
        width = min(overall.difference, count - 1 + 2 * side)
        axes.plot([1, 1 + width], [-1.5, -1.5], color=INK, linewidth=1.5)
        for end in (1, 1 + width):
            axes.plot([end, end], [-1.65, -1.35], color=INK, linewidth=1.5)
        named = f"critical difference {overall.difference:.2f}"
        axes.text(1, -1.75, named, ha="left", va="bottom")
        for (start, end), down in zip(groups, bars, strict=True):
            axes.plot([start - 0.05, end + 0.05], [down, down], color=INK, linewidth=3.5)
        for names, edge, towards, align in (
            (left, 1 - 0.06 * side, -1, "right"),
            (right, count + 0.06 * side, 1, "left"),
        ):
            for place, (mean, method) in enumerate(names):
                height = first + place + 0.5
                colour = found[method].colour
                axes.plot([mean, mean, edge], [0, height, height], color=colour, linewidth=1)
                text = f"{method}  {mean:.2f}" if towards < 0 else f"{mean:.2f}  {method}"
                axes.text(edge + towards * 0.02 * side, height, text, ha=align, va="center")
        title = "Critical-difference diagram"
        svg = draw(figure, "critical-difference", title)
    return Picture(
        title,
        f"Mean rank by Δm over {len(overall.benchmarks)} benchmarks, 1 is best. Bars join methods "
        f"whose mean ranks differ by less than {overall.difference:.2f}: Nemenyi's test at 5 % "
        "(Demšar, JMLR 7, 2006) calls none of them better than another.",
        svg,
    )
