"""What is to be run: the tables to be filled, and which run comes next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from benchmarks.benchmark import HPS, SINGLE_TASK, UNITARY, Benchmark, Preset, Settings
from benchmarks.results import Record, Run, Trial, best_by_run, fingerprint
from benchmarks.training import steps_per_run
from benchmarks.tuning import Row, Tuning, chosen_trials

__all__ = ["Plan", "Schedule"]


@dataclass(frozen=True)
class Plan:
    """A table to be filled: a benchmark, the settings, methods, seeds, and maybe architectures.

    The single-task baseline, of the benchmark's own network, belongs to every plan, whether named
    or not, and hard parameter sharing to every plan with architectures. Without any, methods are
    compared on the benchmark's own network. With a tuning, unitary scalarisation belongs to the
    plan too, and each method's trials are made with seed 0, the best one with the other seeds.

    `source` is what `benchmarks.catalog.find` takes; the benchmark's name if left out.
    """

    benchmark: Benchmark
    preset: Preset
    methods: tuple[str, ...]
    seeds: int
    architectures: tuple[str, ...] = ()
    tuning: Tuning | None = None
    source: str = ""

    @property
    def settings(self) -> Settings:
        """What decides the numbers besides method and seed."""
        return self.preset.settings

    @property
    def fingerprint(self) -> str:
        """The mark of the records of the benchmark's own network that belong to this plan."""
        return fingerprint(self.benchmark, self.settings)

    @property
    def compared(self) -> tuple[str, ...]:
        """The architectures that methods are run on."""
        if not self.architectures:
            return (self.benchmark.architecture,)
        return tuple(dict.fromkeys((HPS, *self.architectures)))

    @property
    def fingerprints(self) -> dict[str, str]:
        """By architecture, the mark of its records that belong to this plan."""
        names = (self.benchmark.architecture, *self.compared)
        return {name: fingerprint(self.benchmark, self.settings, name) for name in names}

    @property
    def rows(self) -> list[Row]:
        """The table's lines, single-task first."""
        named = [*self.methods, *([UNITARY] if self.tuning and UNITARY not in self.methods else [])]
        methods = [method for method in dict.fromkeys(named) if method != SINGLE_TASK]
        return [
            (SINGLE_TASK, self.benchmark.architecture),
            *((method, name) for name in self.compared for method in methods),
        ]

    @property
    def size(self) -> int:
        """How many runs there are."""
        return sum(map(self.runs_of, self.rows))

    def runs_of(self, row: Row) -> int:
        """How many runs a line of the table takes."""
        if self.tuning is None:
            return self.seeds
        tried = self.tuning.grid(self.settings)
        more = len(self.tuning.regularised(tried[0])) if row[0] == UNITARY else 0
        return len(tried) + more + self.seeds - 1

    def steps(self, method: str) -> int:
        """Training steps of one run, over all its networks."""
        networks = len(self.benchmark.tasks) if method == SINGLE_TASK else 1
        return networks * steps_per_run(self.settings)

    def wanted(self, records: Mapping[Run, Record], settled: Set[Run]) -> list[Run]:
        """All runs that are known to belong to the plan so far, in the order of running.

        Args:
            records: what is there, one a run.
            settled: the runs that are through, well or not; what follows from a method's trials is
                known once all of them are.
        """
        if self.tuning is None:
            # Seed by seed, so that an interrupted table has whole seeds.
            trial = Trial.of(self.settings)
            return [
                Run(m, seed, name, trial) for seed in range(self.seeds) for m, name in self.rows
            ]
        grid = self.tuning.grid(self.settings)
        tried = {row: [Run(row[0], 0, row[1], trial) for trial in grid] for row in self.rows}
        runs = [run for of_row in tried.values() for run in of_row]
        singles = tried[self.rows[0]]
        if not settled >= set(singles):
            return runs
        later: list[Run] = []
        for row, of_row in tried.items():
            if not settled >= set(of_row):
                continue
            best = self._best(row, [*singles, *of_row], records)
            if row[0] == UNITARY:
                more = [Run(row[0], 0, row[1], t) for t in self.tuning.regularised(best)]
                runs += more
                if not settled >= set(more):
                    continue
                best = self._best(row, [*singles, *of_row, *more], records)
            later += [Run(row[0], seed, row[1], best) for seed in range(1, self.seeds)]
        return [*runs, *later]

    def label(self, method: str, architecture: str) -> str:
        """What a row of the table is called where there is one word for it."""
        compares = self.architectures and method != SINGLE_TASK
        return f"{architecture} {method}" if compares else method

    def all_of(self, records: Iterable[Record]) -> dict[Run, Record]:
        """The records with this plan's marks, one a run, trials that were not chosen too."""
        mine = self.fingerprints
        return best_by_run(r for r in records if mine.get(r.architecture) == r.fingerprint)

    def select(self, records: Iterable[Record]) -> dict[Run, Record]:
        """The records that the table is made of, one a run, in the plan's order."""
        best = self.all_of(records)
        if self.tuning is None:
            return {run: best[run] for run in self.wanted({}, set()) if run in best}
        planned = self.wanted(best, best.keys())
        chosen = chosen_trials(self.benchmark, (best[run] for run in planned if run in best))
        return {
            run: best[run]
            for run in planned
            if run in best
            # Where every trial has failed, all of them are shown.
            and chosen.get((run.method, run.architecture), run.trial) == run.trial
        }

    def _best(self, row: Row, runs: Iterable[Run], records: Mapping[Run, Record]) -> Trial:
        found = chosen_trials(self.benchmark, (records[run] for run in runs if run in records))
        return found.get(row, Trial.of(self.settings))


class Schedule:
    """Which run comes next, over several plans.

    A run that failed earlier is tried again, once.

    Args:
        plans: in the order of running.
        records: what is there already.
    """

    def __init__(self, plans: Sequence[Plan], records: Sequence[Record]) -> None:
        self.plans = plans
        self._found = [plan.all_of(records) for plan in plans]
        self._settled = [{run for run, r in of.items() if r.error is None} for of in self._found]
        self._running: set[tuple[int, Run]] = set()
        self._planned: dict[int, list[Run]] = {}  # Until another run of that plan is through.

    def next(self) -> tuple[int, Run] | None:
        """The number of a plan and a run of it, which counts as running from now on.

        None if there is nothing to do, or nothing before a running one is through.
        """
        for number in range(len(self.plans)):
            for run in self._wanted(number):
                if run not in self._settled[number] and (number, run) not in self._running:
                    self._running.add((number, run))
                    return number, run
        return None

    def settle(self, number: int, record: Record) -> None:
        """A running run is through."""
        run = record.run
        self._running.discard((number, run))
        self._settled[number].add(run)
        self._planned.pop(number, None)
        if record.error is None or run not in self._found[number]:
            self._found[number][run] = record

    def found(self, number: int) -> Mapping[Run, Record]:
        """The records of a plan, one a run."""
        return self._found[number]

    def done(self, number: int, row: Row) -> int:
        """How many runs of a line of the table are through."""
        settled = self._settled[number]
        return sum((r.method, r.architecture) == row and r in settled for r in self._wanted(number))

    def _wanted(self, number: int) -> list[Run]:
        if number not in self._planned:
            found, settled = self._found[number], self._settled[number]
            self._planned[number] = self.plans[number].wanted(found, settled)
        return self._planned[number]

    @property
    def left(self) -> list[tuple[int, Row]]:
        """A plan's number and a line of its table for each run that is not through."""
        return [
            (number, row)
            for number, plan in enumerate(self.plans)
            for row in plan.rows
            for _ in range(plan.runs_of(row) - self.done(number, row))
        ]
