"""Runs what is missing of a benchmark's table and appends each run to the results file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.benchmark import Benchmark, Preset, Settings, Splits
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.results import Record, ResultsFile, best_by_run, fingerprint, versions
from benchmarks.timing import step_time_ratios
from benchmarks.training import Learner, evaluate, steps_per_run, train

__all__ = ["SINGLE_TASK", "Plan", "execute"]

SINGLE_TASK = "single_task"
"""The method name of the baseline: one network a task, each trained on its own."""


@dataclass(frozen=True)
class Plan:
    """A table to be filled: a benchmark, the settings, and all pairs of a method and a seed.

    The single-task baseline belongs to every plan, whether named or not.
    """

    benchmark: Benchmark
    preset: Preset
    methods: tuple[str, ...]
    seeds: int

    @property
    def settings(self) -> Settings:
        """What decides the numbers besides method and seed."""
        return self.preset.settings

    @property
    def fingerprint(self) -> str:
        """The mark of the records that belong to this plan."""
        return fingerprint(self.benchmark, self.settings)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All (method, seed), seed by seed, so that an interrupted table has whole seeds."""
        methods = dict.fromkeys((SINGLE_TASK, *self.methods))
        return [(method, seed) for seed in range(self.seeds) for method in methods]

    def select(self, records: Sequence[Record]) -> dict[tuple[str, int], Record]:
        """The records of this plan's runs, one a run, in the plan's order."""
        mine = self.fingerprint
        best = best_by_run(record for record in records if record.fingerprint == mine)
        return {run: best[run] for run in self.runs if run in best}


def execute(
    plan: Plan,
    results: ResultsFile | None,
    data_root: Path | None,
    console: Console,
    team: Team = ALONE,
) -> None:
    """Make the plan's runs that are not in the results file, or failed, and append them to it.

    A run that raises or diverges is recorded with its error and does not stop the others.
    `KeyboardInterrupt` passes through; what was finished by then is in the file.

    Args:
        plan: the table to be filled.
        results: the file, in the process that leads.
        data_root: the folder for downloads.
        console: where progress is shown.
        team: the processes that make every run together.

    Raises:
        BenchmarkError: there are no data, or one of the processes failed on its own.
    """
    pending, ratios = team.lead(lambda: _missing(plan, results, console, team))
    pending = [(method, seed) for method, seed in pending]
    if not pending:
        return

    splits = team.after_lead(lambda: plan.benchmark.load(plan.settings, data_root))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=console.quiet or not console.is_terminal
    ) as progress:
        ratios.update(_step_times(plan, ratios, pending, splits, progress, team))
        # A step counts as much as it lasts, so that the time left is right for slow methods too.
        costs = [_steps(plan, method) * ratios.get(method, 1.0) for method, _ in pending]
        bar = progress.add_task("training", total=sum(costs))
        for number, (method, seed) in enumerate(pending, start=1):
            label = f"run {number} of {len(pending)}: {method}, seed {seed}"
            progress.update(bar, description=label)
            after_step = partial(progress.advance, bar, ratios.get(method, 1.0))
            record = _run(plan, method, seed, splits, ratios.get(method), after_step, team)
            if results is not None:
                results.append(record)
            # A failed run has made fewer steps than were planned.
            progress.update(bar, completed=sum(costs[:number]))
            if not console.is_terminal or record.error is not None:
                outcome = record.error or f"{record.train_seconds:.1f} s"
                console.print(f"{label}: {outcome}", soft_wrap=True, markup=False)


def _missing(
    plan: Plan, results: ResultsFile | None, console: Console, team: Team
) -> tuple[list[tuple[str, int]], dict[str, float]]:
    """The runs that are to be made, and the step-time ratios on record."""
    assert results is not None
    records, unreadable = results.read()
    if unreadable:
        console.print(f"{unreadable} unreadable lines in {results.path} are left out", markup=False)
    known = plan.select(records)
    pending = [run for run in plan.runs if run not in known or known[run].error is not None]
    if records:
        found, total = len(plan.runs) - len(pending), len(plan.runs)
        mine = plan.fingerprint
        others = sum(record.fingerprint != mine for record in records)
        beside = f"; {others} runs with other settings or versions left aside" if others else ""
        found_here = f"{found} of {total} runs found in {results.path}{beside}"
        console.print(found_here, soft_wrap=True, markup=False)
    ratios = {
        record.method: record.step_time
        for record in known.values()
        if record.step_time is not None and record.processes == team.size
    }
    return pending, ratios


def _steps(plan: Plan, method: str) -> int:
    """Training steps of one run, over all its networks."""
    networks = len(plan.benchmark.tasks) if method == SINGLE_TASK else 1
    return networks * steps_per_run(plan.settings)


def _step_times(
    plan: Plan,
    known: Mapping[str, float],
    pending: Sequence[tuple[str, int]],
    splits: Splits,
    progress: Progress,
    team: Team,
) -> dict[str, float]:
    """Step-time ratios, measured now, of the methods that none is known of."""
    measured: dict[str, float] = {}
    methods = {method for method, _ in pending} - {SINGLE_TASK} - known.keys()
    if methods:
        bar = progress.add_task("measuring step times", total=plan.preset.timing_rounds)
        measured = step_time_ratios(
            plan.benchmark,
            plan.settings,
            splits.train,
            sorted(methods),
            plan.preset.timing_rounds,
            lambda: progress.advance(bar),
            team,
        )
        progress.remove_task(bar)
    return measured


def _run(
    plan: Plan,
    method: str,
    seed: int,
    splits: Splits,
    step_time: float | None,
    after_step: Callable[[], None],
    team: Team,
) -> Record:
    """Train and evaluate one method with one seed; an exception ends up in the record."""
    benchmark = plan.benchmark
    single = method == SINGLE_TASK
    groups = [(task,) for task in benchmark.tasks] if single else [benchmark.tasks]
    test: dict[str, dict[str, float]] = {}
    validation: dict[str, dict[str, float]] = {}
    error: str | None = None
    description = ""
    start = time.perf_counter()
    seconds = 0.0
    try:
        for tasks in groups:
            name = None if single else method
            learner = Learner(benchmark, plan.settings, tasks, name, seed, team)
            description = learner.description
            start = time.perf_counter()
            train(learner, splits, plan.settings, seed, after_step)
            seconds += time.perf_counter() - start
            test.update(evaluate(learner, splits.test))
            validation.update(evaluate(learner, splits.validation))
    except Exception as exception:
        error = one_line(exception)
        test, validation = {}, {}
    error = team.settle(error)
    return Record(
        benchmark=benchmark.name,
        method=method,
        architecture=benchmark.architecture,
        seed=seed,
        fingerprint=plan.fingerprint,
        error=error,
        test=test,
        validation=validation,
        aggregator=description,
        step_time=step_time,
        train_seconds=round(seconds, 3),
        settings=asdict(plan.settings),
        versions=versions(),
        processes=team.size,
    )
