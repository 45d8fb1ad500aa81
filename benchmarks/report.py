"""The table of a benchmark, on the screen and as CSV, made from the results file's records."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.benchmark import SINGLE_TASK, Benchmark, Measure, Task
from benchmarks.files import write_whole
from benchmarks.metrics import delta_m, delta_p
from benchmarks.plan import Plan
from benchmarks.results import Metrics, Record

__all__ = [
    "Row",
    "Stat",
    "cell",
    "failures",
    "measures_of",
    "row_of",
    "screen_table",
    "summarise",
    "words",
    "write_csv",
    "write_whole",
]


@dataclass(frozen=True)
class Stat:
    """Mean over seeds and sample standard deviation, None for a single seed."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat | None:
        """The statistics of `values`, or None if there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if values[1:] else None)


@dataclass(frozen=True)
class Row:
    """One method's line of the table.

    Attributes:
        method: its name.
        architecture: the network's name.
        seeds, failed: how many runs ended well, and how many did not.
        test: by (task, measure), as in the results file; None without a good run.
        delta_m, delta_p: against the mean of the single-task runs, in percent; None without these.
        step_time: median over the runs of the step's duration over the plain sum's.
        step_seconds: the same of the duration.
        parameters: how many numbers are trained; None if no record says so.
        processes: how many trained together, in any of the runs.
    """

    method: str
    architecture: str
    seeds: int
    failed: int
    test: dict[tuple[str, str], Stat | None]
    delta_m: Stat | None
    delta_p: Stat | None
    step_time: float | None
    step_seconds: float | None
    parameters: int | None
    processes: frozenset[int]


def summarise(plan: Plan, records: Sequence[Record]) -> list[Row]:
    """One row for each method and architecture of the plan with a record, single-task first."""
    by_row: dict[tuple[str, str], list[Record]] = {}
    for record in plan.select(records).values():
        by_row.setdefault((record.method, record.architecture), []).append(record)
    single = by_row.get((SINGLE_TASK, plan.benchmark.architecture), [])
    baseline = [record.test for record in single if record.error is None]
    return [row_of(plan.benchmark, of_row, baseline) for of_row in by_row.values()]


def failures(plan: Plan, records: Sequence[Record]) -> list[str]:
    """A line for each run whose latest attempt failed."""
    return [
        f"{plan.label(record.method, record.architecture)}, seed {record.seed}: failed with "
        f"{record.error}"
        for record in plan.select(records).values()
        if record.error is not None
    ]


def screen_table(plan: Plan, rows: Sequence[Row]) -> Table:
    """The table for the terminal."""
    note = plan.benchmark.note(plan.settings)
    caption = (
        "Δm: mean change against single-task training, lower is better. "
        "Step: time of a training step over one with sum(losses).backward()"
    )
    if plan.architectures:
        caption += f" on {plan.benchmark.architecture}, and its median in milliseconds"
    processes = sorted({count for row in rows for count in row.processes})
    if processes not in ([], [1]):
        caption += f". These are runs of {' and '.join(map(str, processes))} processes"
    table = Table(
        title=f"{plan.benchmark.name}, {note + ', ' if note else ''}test set, {plan.seeds} "
        + ("seed" if plan.seeds == 1 else "seeds: mean ± sample standard deviation"),
        caption=f"{caption}.",
    )
    if plan.architectures:
        table.add_column("architecture")
    table.add_column("method")
    for task, measure in measures_of(plan.benchmark):
        unit = " %" if measure.percent else ""
        table.add_column(f"{words(task.name)}\n{measure.name}{unit}", justify="right")
    table.add_column("Δm %", justify="right")
    table.add_column("step", justify="right")
    if plan.architectures:
        table.add_column("ms", justify="right")
        table.add_column("parameters", justify="right")
    for row in rows:
        cells = [
            cell(row.test[task.name, measure.name], 100 if measure.percent else 1, measure.digits)
            for task, measure in measures_of(plan.benchmark)
        ]
        if row.failed:
            note = (
                "failed" if row.seeds == 0 else f"{row.failed} of {row.seeds + row.failed} failed"
            )
            cells[0] = note if row.seeds == 0 else f"{cells[0]}\n{note}"
        step = "–" if row.step_time is None else f"{row.step_time:.2f}×"
        cells = [row.method, *cells, cell(row.delta_m, 1), step]
        if plan.architectures:
            seconds, parameters = row.step_seconds, row.parameters
            cells.insert(0, row.architecture)
            cells.append("–" if seconds is None else f"{1000 * seconds:.1f}")
            cells.append("–" if parameters is None else f"{parameters:,}")
        table.add_row(*cells)
    return table


def write_csv(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """Write the table as CSV: fractions as in the results file, Δm and Δp in percent.

    A table of architectures has two columns more, seconds a step and parameters.
    """
    header = ["benchmark", "architecture", "fingerprint", "method", "seeds", "failed"]
    names = [f"{task.name}_{measure.name}" for task, measure in measures_of(plan.benchmark)]
    for name in (*names, "delta_m", "delta_p"):
        header += [f"{name}_mean", f"{name}_std"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = ["step_seconds", "parameters"] if plan.architectures else []
    writer.writerow([*header, "step_time", *more])
    marks = plan.fingerprints
    for row in rows:
        stats = [row.test[task.name, measure.name] for task, measure in measures_of(plan.benchmark)]
        numbers: list[float | None] = []
        for stat in (*stats, row.delta_m, row.delta_p):
            numbers += [None, None] if stat is None else [stat.mean, stat.spread]
        fixed = [plan.benchmark.name, row.architecture, marks[row.architecture], row.method]
        size = [row.step_seconds, row.parameters] if more else []
        writer.writerow([*fixed, row.seeds, row.failed, *numbers, row.step_time, *size])
    write_whole(path, lambda target: target.write_text(text.getvalue(), encoding="utf-8"))


def row_of(benchmark: Benchmark, records: Sequence[Record], baseline: Sequence[Metrics]) -> Row:
    """The line of one method on one architecture.

    Args:
        benchmark: what was run.
        records: one a seed, at least one.
        baseline: the test metrics of the single-task runs; without any there is no Δm.
    """
    good = [record.test for record in records if record.error is None]
    times = [record.step_time for record in records if record.step_time is not None]
    seconds = [record.step_seconds for record in records if record.step_seconds is not None]
    # A run that failed may not have come to all its networks.
    sizes = [record.parameters for record in records if record.error is None and record.parameters]
    return Row(
        method=records[0].method,
        architecture=records[0].architecture,
        seeds=len(good),
        failed=len(records) - len(good),
        test={
            (task.name, measure.name): Stat.of([test[task.name][measure.name] for test in good])
            for task, measure in measures_of(benchmark)
        },
        delta_m=Stat.of([_delta_m(benchmark, test, baseline) for test in good] if baseline else []),
        delta_p=Stat.of([_delta_p(benchmark, test, baseline) for test in good] if baseline else []),
        step_time=statistics.median(times) if times else None,
        step_seconds=statistics.median(seconds) if seconds else None,
        parameters=sizes[0] if sizes else None,
        processes=frozenset(record.processes for record in records),
    )


def _delta_m(benchmark: Benchmark, test: Metrics, baseline: Sequence[Metrics]) -> float:
    measures = measures_of(benchmark)
    return delta_m(
        [test[task.name][measure.name] for task, measure in measures],
        [_mean(baseline, task, measure) for task, measure in measures],
        [measure.higher_is_better for _, measure in measures],
    )


def _delta_p(benchmark: Benchmark, test: Metrics, baseline: Sequence[Metrics]) -> float:
    tasks = benchmark.tasks
    return delta_p(
        [[test[task.name][measure.name] for measure in task.measures] for task in tasks],
        [[_mean(baseline, task, measure) for measure in task.measures] for task in tasks],
        [[measure.higher_is_better for measure in task.measures] for task in tasks],
    )


def _mean(metrics: Sequence[Metrics], task: Task, measure: Measure) -> float:
    return statistics.fmean(m[task.name][measure.name] for m in metrics)


def measures_of(benchmark: Benchmark) -> list[tuple[Task, Measure]]:
    """All measures of all tasks, in the order of the table's columns."""
    return [(task, measure) for task in benchmark.tasks for measure in task.measures]


def words(name: str) -> str:
    """A name as it is written in a heading."""
    return name.replace("_", " ")


def cell(stat: Stat | None, scale: float, digits: int = 2) -> str:
    """Mean ± sample standard deviation, or a dash."""
    if stat is None:
        return "–"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    mean = f"{round(stat.mean * scale, digits) + 0.0:.{digits}f}"
    return mean if stat.spread is None else f"{mean} ± {stat.spread * scale:.{digits}f}"
