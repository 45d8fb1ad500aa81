"""The tables of `run pareto`, with others' numbers beside ours."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence

from rich.table import Table

from benchmarks.pareto.problems import PROBLEMS
from benchmarks.pareto.published import NOTES, ends, volumes
from benchmarks.pareto.quadratics import QUADRATICS
from benchmarks.pareto.records import Record

__all__ = ["remarks", "screen_tables", "to_csv", "to_markdown"]

_APART = 1e-3
"""End points further apart than this are remarked on."""

_STEPS = 2000
"""Those of the published hypervolumes."""


def screen_tables(records: Sequence[Record]) -> list[Table]:
    """Hypervolumes, and end points on the quadratics."""
    found = []
    for title, header, rows in _tables(records):
        table = Table(title=title)
        for k, name in enumerate(header):
            table.add_column(name, justify="left" if k < 2 else "right")
        for row in rows:
            table.add_row(*row, style="dim" if row[1] not in ("", "gradbal") else None)
        found.append(table)
    return found


def to_markdown(records: Sequence[Record]) -> str:
    """The same tables, and the remarks."""
    lines = ["# Pareto fronts", ""]
    for title, header, rows in _tables(records):
        rule = [":--" if k < 2 else "--:" for k in range(len(header))]
        lines += [f"## {title}", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
        lines.append("")
    lines += [f"- {remark}" for remark in remarks(records)]
    return "\n".join(lines) + "\n"


def to_csv(records: Sequence[Record]) -> str:
    """A row for each run, with others' numbers beside ours."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = ["hypervolume", "x1", "x2", "stationarity"]
    writer.writerow(
        ["problem", "method", "number", "steps", *ours]
        + [f"official_{name}" for name in ("hypervolume_mean", "hypervolume_std")]
        + [f"torchjd_{name}" for name in ours[1:]]
    )
    known, points = volumes(), ends()
    for r in records:
        volume = known.get((r.problem, r.method)) if r.steps == _STEPS else None
        end = points.get((r.problem, r.method, r.number))
        last: list[object] = [None, None] if r.stationarity is None else [*r.points[-1]]
        writer.writerow(
            [r.problem, r.method, r.number, r.steps, r.hypervolume, *last, r.stationarity]
            + ([None, None] if volume is None else [*volume])
            + ([None, None, None] if end is None else [*end])
        )
    return text.getvalue()


def remarks(records: Sequence[Record]) -> list[str]:
    """Which trajectories end elsewhere than TorchJD's, and why."""
    known = ends()
    apart: dict[str, list[str]] = {}
    for r in records:
        end = known.get((r.problem, r.method, r.number))
        if end is not None and math.dist(r.points[-1], end[:2]) > _APART:
            apart.setdefault(r.method, []).append(f"{r.problem} from {_point(r.points[0])}")
    return [
        f"{method} ends elsewhere than TorchJD's on {', '.join(where)}. {NOTES.get(method, '')}"
        for method, where in apart.items()
    ]


def _tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    learned = [r for r in records if r.problem in PROBLEMS]
    found = []
    if learned:
        steps = learned[0].steps
        title = f"Hypervolume of the learned front after {steps:,} steps, mean ± std over the seeds"
        found.append((title, *_volumes(learned, steps)))
    for name, quadratic in QUADRATICS.items():
        mine = [r for r in records if r.problem == name]
        if mine:
            title = f"{name}: {quadratic.summary}, end points after {quadratic.steps} steps"
            found.append((title, *_ends(mine)))
    return found


def _volumes(records: Sequence[Record], steps: int) -> tuple[list[str], list[list[str]]]:
    methods = list(dict.fromkeys(r.method for r in records))
    header = ["problem", "code", *methods, "the front itself"]
    known = volumes() if steps == _STEPS else {}
    rows = []
    for name in dict.fromkeys(r.problem for r in records):
        cells, theirs = [], []
        for method in methods:
            found = [
                r.hypervolume
                for r in records
                if (r.problem, r.method) == (name, method) and r.hypervolume is not None
            ]
            spread = statistics.stdev(found) if len(found) > 1 else None
            cells.append(_cell(statistics.fmean(found), spread) if found else "–")
            volume = known.get((name, method))
            theirs.append("" if volume is None else _cell(*volume))
        rows.append([name, "gradbal", *cells, f"{PROBLEMS[name].best:.4f}"])
        if any(theirs):
            rows.append(["", "official", *theirs, ""])
    return header, rows


def _ends(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    numbers = sorted({r.number for r in records})
    starts = QUADRATICS[records[0].problem].starts
    header = ["method", "code", *(f"from {_point(starts[k])}" for k in numbers)]
    known = ends()
    rows = []
    for method in dict.fromkeys(r.method for r in records):
        mine = {r.number: r for r in records if r.method == method}
        rows.append([method, "gradbal", *(_point(mine[k].points[-1]) for k in numbers)])
        theirs = [known.get((records[0].problem, method, k)) for k in numbers]
        rows.append(["", "TorchJD", *("" if e is None else _point(e[:2]) for e in theirs)])
    return header, rows


def _cell(mean: float, spread: float | None) -> str:
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _point(point: Sequence[float]) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"({round(point[0], 4) + 0.0:g}, {round(point[1], 4) + 0.0:g})".replace("-", "−")
