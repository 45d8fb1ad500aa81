"""The numbers of a report: a line for each method of a benchmark, and all benchmarks together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.benchmark import SINGLE_TASK, Benchmark
from benchmarks.metrics import delta_m, delta_p
from benchmarks.report import Row, measures_of, row_of
from benchmarks.reporting.selection import Entry, Selection
from benchmarks.reporting.stats import (
    Friedman,
    Interval,
    average_ranks,
    bootstrap_difference,
    critical_difference,
    friedman,
)
from benchmarks.results import Metrics, Record

__all__ = [
    "PLAIN",
    "Line",
    "Overall",
    "Reached",
    "Summary",
    "compare",
    "flags",
    "matrix",
    "summarise",
    "validation_loss",
]

PLAIN = ("mean", "sum", "ew")
"""Linear scalarisation with equal weights (LS, EW) under its names, the first found is taken."""


class Reached(NamedTuple):
    """When a validation curve is as good as the target: medians over the seeds that get there."""

    epochs: float
    seconds: float
    seeds: int


@dataclass(frozen=True)
class Line:
    """What the report says of one method on one architecture.

    Attributes:
        label: the method's name, with the architecture's where several are compared.
        entry: the records it is made of.
        row: mean and deviation of the metrics, Δm and Δp, and the time of a step.
        interval: of Δm; None for a single seed or without a baseline.
        changes: by task, its mean relative gain over single-task training in percent, higher is
            better; empty without a baseline.
        rank: mean over all metrics of the rank among the benchmark's lines.
        reached: see there; None where no seed got to the target.
        train_seconds: mean wall time of a run; of a single-task run, over its networks.
        peak_bytes: most that a training step held above network and optimizer; None if unknown.
        conflicts, cosine: mean over epochs and seeds; None if there were no probes.
    """

    label: str
    entry: Entry
    row: Row
    interval: Interval | None
    changes: Mapping[str, float]
    rank: float | None
    reached: Reached | None
    train_seconds: float | None
    peak_bytes: int | None
    conflicts: float | None
    cosine: float | None


@dataclass(frozen=True)
class Summary:
    """One benchmark's part of the report.

    Attributes:
        selection: the records.
        lines: single-task first.
        baseline: test metrics of the single-task runs `[S, K]`; None without, or where one of the
            means is not positive, so that nothing can be told relative to it.
        validation_baseline: the mean validation metrics of these, `[K]`.
        target: the Δm on validation that plain averaging ends with; None without.
    """

    selection: Selection
    lines: tuple[Line, ...]
    baseline: NDArray[np.float64] | None
    validation_baseline: NDArray[np.float64] | None
    target: float | None

    @property
    def benchmark(self) -> Benchmark:
        """What was run."""
        return self.selection.benchmark

    def line(self, method: str) -> Line | None:
        """The method's line on the benchmark's own network, if it has a run that ended well."""
        own = self.benchmark.architecture
        for line in self.lines:
            if (line.entry.method, line.entry.architecture) == (method, own) and line.entry.good:
                return line
        return None

    def against(self, line: Line, other: Line) -> Interval | None:
        """The interval of the difference of two lines' Δm; below 0 where the first is better."""
        if self.baseline is None or len(other.entry.good) < 2:
            return None
        return bootstrap_difference(
            matrix(self.benchmark, line.entry.good),
            self.baseline,
            flags(self.benchmark),
            matrix(self.benchmark, other.entry.good),
        )


@dataclass(frozen=True)
class Overall:
    """All benchmarks together, for the methods that every one of them has.

    Attributes:
        methods: names.
        benchmarks: names.
        ranks: average ranks by Δm `[N, k]`.
        mean_ranks: of the methods `[k]`.
        friedman: None for fewer than two benchmarks.
        difference: the critical difference of mean ranks; None for fewer than two benchmarks.
        left_out: by name, the benchmarks that a method has no result for.
        benchmarks_left_out: those without a baseline, or with few of the methods.
    """

    methods: tuple[str, ...]
    benchmarks: tuple[str, ...]
    ranks: NDArray[np.float64]
    mean_ranks: tuple[float, ...]
    friedman: Friedman | None
    difference: float | None
    left_out: Mapping[str, tuple[str, ...]]
    benchmarks_left_out: tuple[str, ...]

    def rank(self, method: str) -> float | None:
        """A method's mean rank, if it takes part."""
        found = dict(zip(self.methods, self.mean_ranks, strict=True))
        return found.get(method)


def flags(benchmark: Benchmark) -> list[bool]:
    """Whether higher is better, by measure `[K]`."""
    return [measure.higher_is_better for _, measure in measures_of(benchmark)]


def matrix(benchmark: Benchmark, records: Sequence[Record]) -> NDArray[np.float64]:
    """The records' test metrics `[S, K]`."""
    return np.array([_vector(benchmark, record.test) for record in records])


def summarise(selection: Selection) -> Summary:
    """The numbers of one benchmark."""
    benchmark = selection.benchmark
    single = next(
        (
            e.good
            for e in selection.entries
            if (e.method, e.architecture) == (SINGLE_TASK, benchmark.architecture)
        ),
        (),
    )
    baseline = matrix(benchmark, single) if single else None
    if baseline is not None and not (baseline.mean(0) > 0).all():
        baseline = None
    validation = [
        _vector(benchmark, r.validation) for r in single if _whole(benchmark, r.validation)
    ]
    on_validation = np.mean(validation, axis=0) if validation else None
    if on_validation is not None and not (on_validation > 0).all():
        on_validation = None
    ranks = _ranks(benchmark, selection.entries)
    target = _target(selection, on_validation)
    several = len({e.architecture for e in selection.entries}) > 1
    lines = []
    for entry, rank in zip(selection.entries, ranks, strict=True):
        records = (*entry.good, *entry.failed)
        row = row_of(benchmark, records, [r.test for r in single] if baseline is not None else [])
        lines.append(
            Line(
                label=f"{entry.architecture} {entry.method}"
                if several and entry.method != SINGLE_TASK
                else entry.method,
                entry=entry,
                row=row,
                interval=None
                if baseline is None or not entry.good
                else bootstrap_difference(
                    matrix(benchmark, entry.good), baseline, flags(benchmark)
                ),
                changes=_changes(benchmark, entry.good, baseline),
                rank=rank,
                reached=_reached(benchmark, entry.good, on_validation, target),
                train_seconds=_mean([r.train_seconds for r in entry.good]),
                peak_bytes=max((r.peak_bytes for r in entry.good if r.peak_bytes), default=None),
                conflicts=_mean(_probes(entry.good, "conflicts")),
                cosine=_mean(_probes(entry.good, "cosine")),
            )
        )
    return Summary(selection, tuple(lines), baseline, on_validation, target)


def compare(summaries: Sequence[Summary]) -> Overall:
    """The benchmarks together, by the Δm of the methods on each benchmark's own network.

    Benchmarks with fewer than half as many methods as the fullest are left out, so that one which
    has just begun does not take the others' methods away.
    """
    found = {
        s.benchmark.name: {
            line.entry.method: line.row.delta_m.mean
            for line in s.lines
            if line.row.delta_m is not None and line.entry.architecture == s.benchmark.architecture
        }
        for s in summaries
    }
    fullest = max((len(of) for of in found.values()), default=0)
    taken = {name: of for name, of in found.items() if of and 2 * len(of) >= fullest}
    everyone = list(dict.fromkeys(method for of in taken.values() for method in of))
    methods = tuple(m for m in everyone if all(m in of for of in taken.values()))
    ranks = np.array([average_ranks([of[m] for m in methods]) for of in taken.values()])
    ranks = ranks.reshape(len(taken), len(methods))
    enough = len(taken) >= 2 and len(methods) >= 2
    return Overall(
        methods=methods,
        benchmarks=tuple(taken),
        ranks=ranks,
        mean_ranks=tuple(float(r) for r in ranks.mean(0)) if taken else (),
        friedman=friedman(ranks) if enough else None,
        difference=critical_difference(len(methods), len(taken)) if enough else None,
        left_out={
            m: tuple(name for name, of in taken.items() if m not in of)
            for m in everyone
            if m not in methods
        },
        benchmarks_left_out=tuple(name for name in found if name not in taken),
    )


def validation_loss(
    benchmark: Benchmark, record: Record, baseline: NDArray[np.float64] | None
) -> list[tuple[int, float, float]]:
    """Epoch, training seconds so far and Δm on validation, for every epoch that has it."""
    if baseline is None:
        return []
    return [
        (point["epoch"], point["seconds"], _against(benchmark, point["validation"], baseline))
        for point in record.curve
        if _whole(benchmark, point.get("validation") or {})
    ]


def _against(benchmark: Benchmark, metrics: Metrics, baseline: NDArray[np.float64]) -> float:
    return delta_m(_vector(benchmark, metrics), [float(b) for b in baseline], flags(benchmark))


def _target(selection: Selection, baseline: NDArray[np.float64] | None) -> float | None:
    own = selection.benchmark.architecture
    for name in PLAIN:
        for entry in selection.entries:
            if (entry.method, entry.architecture) == (name, own):
                curves = [validation_loss(selection.benchmark, r, baseline) for r in entry.good]
                ends = [curve[-1][2] for curve in curves if curve]
                if ends:
                    return statistics.fmean(ends)
    return None


def _reached(
    benchmark: Benchmark,
    records: Sequence[Record],
    baseline: NDArray[np.float64] | None,
    target: float | None,
) -> Reached | None:
    if target is None:
        return None
    first = []
    for record in records:
        curve = validation_loss(benchmark, record, baseline)
        first += [(epoch, seconds) for epoch, seconds, loss in curve if loss <= target][:1]
    if not first:
        return None
    epochs, seconds = (statistics.median(column) for column in zip(*first, strict=True))
    return Reached(epochs, seconds, len(first))


def _changes(
    benchmark: Benchmark, records: Sequence[Record], baseline: NDArray[np.float64] | None
) -> dict[str, float]:
    if baseline is None or not records:
        return {}
    means = iter(zip(matrix(benchmark, records).mean(0), baseline.mean(0), strict=True))
    found = {}
    for task in benchmark.tasks:
        pairs = [next(means) for _ in task.measures]
        values, bases = ([float(v) for v in column] for column in zip(*pairs, strict=True))
        found[task.name] = delta_p(
            [values], [bases], [[measure.higher_is_better for measure in task.measures]]
        )
    return found


def _ranks(benchmark: Benchmark, entries: Sequence[Entry]) -> list[float | None]:
    """By entry, the mean over all metrics of its rank by the mean over seeds."""
    good = [entry for entry in entries if entry.good]
    if not good:
        return [None] * len(entries)
    means = np.array([matrix(benchmark, entry.good).mean(0) for entry in good])
    signs = np.where(flags(benchmark), -1.0, 1.0)
    columns = [average_ranks([float(v) for v in column]) for column in (signs * means).T]
    of_good = iter(np.mean(columns, axis=0))
    return [float(next(of_good)) if entry.good else None for entry in entries]


def _vector(benchmark: Benchmark, metrics: Metrics) -> list[float]:
    return [metrics[task.name][measure.name] for task, measure in measures_of(benchmark)]


def _whole(benchmark: Benchmark, metrics: Metrics) -> bool:
    found = (metrics.get(task.name, {}).get(m.name) for task, m in measures_of(benchmark))
    return all(value is not None and math.isfinite(value) for value in found)


def _probes(records: Sequence[Record], name: str) -> list[float]:
    points = (point.get(name) for record in records for point in record.curve)
    return [value for value in points if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
