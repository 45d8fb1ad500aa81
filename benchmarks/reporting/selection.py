"""Which records make the tables: the newest settings, and of each method the trial it is given."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.benchmark import SINGLE_TASK, UNITARY, Benchmark
from benchmarks.results import Record, Run, Trial, best_by_run
from benchmarks.tuning import Row, chosen_trials

__all__ = ["Entry", "Selection", "select"]


@dataclass(frozen=True)
class Entry:
    """What there is of one method on one architecture.

    Attributes:
        method, architecture: names.
        trial: the one chosen on validation with the lowest seed.
        good, failed: the runs of that trial, by seed.
        tried, trials: how many trials of the grid were run with the lowest seed, and its size as
            far as the file tells.
        missing_seeds: how many of the table's seeds this trial has not been run with.
    """

    method: str
    architecture: str
    trial: Trial
    good: tuple[Record, ...]
    failed: tuple[Record, ...]
    tried: int
    trials: int
    missing_seeds: int

    @property
    def finished(self) -> bool:
        """Whether nothing of the grid and no seed is missing."""
        return self.tried == self.trials and not self.missing_seeds


@dataclass(frozen=True)
class Selection:
    """The records of one benchmark that are compared.

    Attributes:
        benchmark: what was run.
        entries: one for each method and architecture, single-task first.
        records: all of them, tuning included, one a run.
        seeds: those of any run; the first is the one that methods are tuned with.
        left_aside: how many runs there are with other settings or versions.
        left_seconds: what these took.
    """

    benchmark: Benchmark
    entries: tuple[Entry, ...]
    records: tuple[Record, ...]
    seeds: tuple[int, ...]
    left_aside: int
    left_seconds: float

    @property
    def grid(self) -> tuple[Trial, ...]:
        """All trials with the lowest seed, of any method."""
        return tuple(sorted({r.trial for r in self.records if r.seed == self.seeds[0]}))


def select(
    records: Sequence[Record], benchmarks: Mapping[str, Benchmark]
) -> tuple[list[Selection], Counter[str]]:
    """The records that make the tables, and how many there are of benchmarks that are not known.

    Of a benchmark's records those count that were run with the settings, but for the trial, and the
    versions of the last one in the file.
    """
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.benchmark, []).append(record)
    unknown = Counter({name: len(r) for name, r in by_name.items() if name not in benchmarks})
    # In the catalogue's order, whatever was run first.
    known = [name for name in benchmarks if name in by_name]
    return [_selection(benchmarks[name], by_name[name]) for name in known], unknown


def _conditions(record: Record) -> tuple[object, ...]:
    """Everything that must agree between runs that are compared; architectures may differ."""
    settings = {k: v for k, v in record.settings.items() if k not in Trial._fields}
    versions = {k: v for k, v in record.versions.items() if k != "python"}
    return sorted(settings.items()), sorted(versions.items())


def _selection(benchmark: Benchmark, records: Sequence[Record]) -> Selection:
    newest = _conditions(records[-1])
    agreeing = [record for record in records if _conditions(record) == newest]
    # The same settings and versions may still stand for a benchmark that has changed since.
    marks = {record.architecture: record.fingerprint for record in agreeing}
    current = [record for record in agreeing if record.fingerprint == marks[record.architecture]]
    left = [record for record in records if record not in current]
    best = best_by_run(current)
    kept = tuple(best.values())
    seeds = tuple(sorted({record.seed for record in kept}))
    chosen = chosen_trials(benchmark, kept)
    entries = [_entry(row, chosen.get(row), best, seeds) for row in _rows(benchmark, kept)]
    return Selection(
        benchmark=benchmark,
        entries=tuple(entries),
        records=kept,
        seeds=seeds,
        left_aside=len(left),
        left_seconds=math.fsum(record.train_seconds for record in left),
    )


def _rows(benchmark: Benchmark, records: Iterable[Record]) -> list[Row]:
    """Single-task, the plain sums, then methods as the benchmark and the file name them."""
    first = (SINGLE_TASK, UNITARY, *benchmark.methods)
    found = dict.fromkeys((record.method, record.architecture) for record in records)
    places = {method: place for place, method in reversed(list(enumerate(first)))}
    return sorted(found, key=lambda row: places.get(row[0], len(first)))


def _entry(
    row: Row, trial: Trial | None, best: Mapping[Run, Record], seeds: Sequence[int]
) -> Entry:
    mine = [r for r in best.values() if (r.method, r.architecture) == row]
    mine.sort(key=lambda r: r.seed)
    if trial is None:
        # No run with the lowest seed has ended well.
        trial = min(r.trial for r in mine)
    at_trial = [r for r in mine if r.trial == trial]
    tried = {r.trial for r in mine if r.seed == seeds[0]}
    return Entry(
        method=row[0],
        architecture=row[1],
        trial=trial,
        good=tuple(r for r in at_trial if r.error is None),
        failed=tuple(r for r in at_trial if r.error is not None),
        tried=len(tried),
        trials=len(_grid_of(best.values(), seeds[0]) | tried),
        missing_seeds=len(set(seeds) - {r.seed for r in at_trial}),
    )


def _grid_of(records: Iterable[Record], seed: int) -> set[Trial]:
    """The trials that a method should have: every learning rate that any of them has.

    Unitary scalarisation has more, at its best learning rate.
    """
    return {Trial(r.trial.lr, 0.0, 0.0) for r in records if r.seed == seed}
