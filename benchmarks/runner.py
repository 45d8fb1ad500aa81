"""Runs what is missing of a benchmark's table and appends each run to the results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.benchmark import Benchmark, Preset, Settings, Splits
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.results import (
    Record,
    ResultsFile,
    Run,
    Trial,
    best_by_run,
    fingerprint,
    versions,
)
from benchmarks.timing import Contestant, StepTime, step_times
from benchmarks.training import Learner, evaluate, step_clock, steps_per_run, train

__all__ = ["HPS", "SINGLE_TASK", "Plan", "execute"]

SINGLE_TASK = "single_task"
"""The method name of the baseline: one network a task, each trained on its own."""

HPS = "hps"
"""The architecture that the others are compared with: hard parameter sharing."""


@dataclass(frozen=True)
class Plan:
    """A table to be filled: a benchmark, the settings, methods, seeds, and maybe architectures.

    The single-task baseline, of the benchmark's own network, belongs to every plan, whether named
    or not, and hard parameter sharing to every plan with architectures. Without any, methods are
    compared on the benchmark's own network.
    """

    benchmark: Benchmark
    preset: Preset
    methods: tuple[str, ...]
    seeds: int
    architectures: tuple[str, ...] = ()

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
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an interrupted table has whole seeds."""
        methods = [method for method in dict.fromkeys(self.methods) if method != SINGLE_TASK]
        rows = [(SINGLE_TASK, self.benchmark.architecture)]
        rows += [(method, name) for name in self.compared for method in methods]
        trial = Trial.of(self.settings)
        return [
            Run(method, seed, name, trial) for seed in range(self.seeds) for method, name in rows
        ]

    def label(self, method: str, architecture: str) -> str:
        """What a row of the table is called where there is one word for it."""
        compares = self.architectures and method != SINGLE_TASK
        return f"{architecture} {method}" if compares else method

    def select(self, records: Sequence[Record]) -> dict[Run, Record]:
        """The records of this plan's runs, one a run, in the plan's order."""
        mine = self.fingerprints
        best = best_by_run(r for r in records if mine.get(r.architecture) == r.fingerprint)
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
    found = team.lead(lambda: _missing(plan, results, console, team))
    # As JSON brings them.
    pending = [Run(*run[:3], Trial(*run[3])) for run in found[0]]
    known = {Contestant(*who): StepTime(*lasted) for who, lasted in found[1]}
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
        times = _step_times(plan, known, pending, splits, progress, team)
        # A step counts as much as it lasts, so that the time left is right for slow methods too.
        weights = [each.ratio if (each := times.get(_timed(run))) else 1.0 for run in pending]
        costs = [
            _steps(plan, run.method) * weight for run, weight in zip(pending, weights, strict=True)
        ]
        bar = progress.add_task("training", total=sum(costs))
        for number, run in enumerate(pending, start=1):
            what = f"{plan.label(run.method, run.architecture)}, seed {run.seed}"
            label = f"run {number} of {len(pending)}: {what}"
            progress.update(bar, description=label)
            after_step = partial(progress.advance, bar, weights[number - 1])
            record = _run(plan, run, splits, times.get(_timed(run)), after_step, team)
            if results is not None:
                results.append(record)
            # A failed run has made fewer steps than were planned.
            progress.update(bar, completed=sum(costs[:number]))
            if not console.is_terminal or record.error is not None:
                outcome = record.error or f"{record.train_seconds:.1f} s"
                console.print(f"{label}: {outcome}", soft_wrap=True, markup=False)


def _missing(
    plan: Plan, results: ResultsFile | None, console: Console, team: Team
) -> tuple[list[Run], list[tuple[Contestant, StepTime]]]:
    """The runs that are to be made, and the step times on record of as many processes."""
    assert results is not None
    records, unreadable = results.read()
    if unreadable:
        console.print(f"{unreadable} unreadable lines in {results.path} are left out", markup=False)
    known = plan.select(records)
    pending = [run for run in plan.runs if run not in known or known[run].error is not None]
    if records:
        found, total = len(plan.runs) - len(pending), len(plan.runs)
        mine = plan.fingerprints
        others = sum(mine.get(r.architecture) != r.fingerprint for r in records)
        beside = f"; {others} runs with other settings or versions left aside" if others else ""
        found_here = f"{found} of {total} runs found in {results.path}{beside}"
        console.print(found_here, soft_wrap=True, markup=False)
    times = [
        (_timed(run), StepTime(record.step_time, record.step_seconds, record.peak_bytes))
        for run, record in known.items()
        if record.step_time is not None and record.processes == team.size
    ]
    return pending, times


def _steps(plan: Plan, method: str) -> int:
    """Training steps of one run, over all its networks."""
    networks = len(plan.benchmark.tasks) if method == SINGLE_TASK else 1
    return networks * steps_per_run(plan.settings)


def _timed(run: Run) -> Contestant:
    return Contestant(run.method, run.architecture)


def _step_times(
    plan: Plan,
    known: Mapping[Contestant, StepTime],
    pending: Sequence[Run],
    splits: Splits,
    progress: Progress,
    team: Team,
) -> dict[Contestant, StepTime]:
    """Step times by method and architecture: the known ones, and the missing ones measured now."""
    times = dict(known)
    missing = {_timed(run) for run in pending if run.method != SINGLE_TASK} - times.keys()
    if missing:
        bar = progress.add_task("measuring step times", total=plan.preset.timing_rounds)
        measured = step_times(
            plan.benchmark,
            plan.settings,
            splits.train,
            sorted(missing),
            plan.preset.timing_rounds,
            lambda: progress.advance(bar),
            team,
        )
        progress.remove_task(bar)
        times.update(measured)
    return times


def _run(
    plan: Plan,
    run: Run,
    splits: Splits,
    step_time: StepTime | None,
    after_step: Callable[[], None],
    team: Team,
) -> Record:
    """Train and evaluate one method with one seed; an exception ends up in the record."""
    benchmark = plan.benchmark
    single = run.method == SINGLE_TASK
    method = None if single else run.method
    groups = [(task,) for task in benchmark.tasks] if single else [benchmark.tasks]
    test: dict[str, dict[str, float]] = {}
    validation: dict[str, dict[str, float]] = {}
    error: str | None = None
    description = ""
    seconds = 0.0
    curve: list[dict[str, Any]] = []
    parameters = 0
    try:
        for tasks in groups:
            learner = Learner(
                benchmark, plan.settings, tasks, method, run.seed, run.architecture, team
            )
            description = learner.description
            parameters += learner.parameters
            clock = step_clock(team)
            start = clock()
            learner.prepare(splits)
            seconds += clock() - start
            probe = not single and run.architecture == benchmark.architecture and team.size == 1
            lasted, curve = train(learner, splits, plan.settings, run.seed, after_step, probe)
            seconds += lasted
            test.update(evaluate(learner, splits.test))
            validation.update(evaluate(learner, splits.validation))
    except Exception as exception:
        error = one_line(exception)
        test, validation, curve = {}, {}, []
    error = team.settle(error)
    return Record(
        benchmark=benchmark.name,
        method=run.method,
        architecture=run.architecture,
        seed=run.seed,
        fingerprint=plan.fingerprints[run.architecture],
        error=error,
        test=test,
        validation=validation,
        aggregator=description,
        step_time=step_time.ratio if step_time else None,
        train_seconds=round(seconds, 3),
        settings=asdict(plan.settings),
        versions=versions(),
        parameters=parameters,
        step_seconds=step_time.seconds if step_time else None,
        processes=team.size,
        curve=[] if single else curve,
        peak_bytes=step_time.peak_bytes if step_time else None,
        threads=torch.get_num_threads(),
    )
