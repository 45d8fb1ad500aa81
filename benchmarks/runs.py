"""One run: a network trained by a method with a seed, and the record of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.benchmark import SINGLE_TASK, UNITARY, Benchmark, Settings, Splits
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.results import Metrics, Record, Run, fingerprint, versions
from benchmarks.timing import StepTime
from benchmarks.training import Learner, evaluate, step_clock, train

__all__ = ["failed_run", "make_run"]


def make_run(
    benchmark: Benchmark,
    settings: Settings,
    run: Run,
    splits: Splits,
    step_time: StepTime | None,
    after_step: Callable[[], None],
    team: Team = ALONE,
) -> Record:
    """Train and evaluate one method with one seed; an exception ends up in the record.

    Args:
        benchmark: what to learn.
        settings: those of the plan, whatever the trial.
        run: method, seed, architecture and trial.
        splits: the data.
        step_time: what a step takes, for the record.
        after_step: called after each training step.
        team: the processes that make the run together.
    """
    tuned = run.trial.within(settings)
    single = run.method == SINGLE_TASK
    method = None if run.method in (SINGLE_TASK, UNITARY) else run.method
    groups = [(task,) for task in benchmark.tasks] if single else [benchmark.tasks]
    # Of one network that all tasks share, and alone: gradients are those of the whole batch.
    probe = not single and run.architecture == benchmark.architecture and team.size == 1
    test: dict[str, dict[str, float]] = {}
    validation: dict[str, dict[str, float]] = {}
    curve: list[dict[str, Any]] = []
    error: str | None = None
    description = ""
    seconds = 0.0
    parameters = 0
    clock = step_clock(team)
    try:
        for tasks in groups:
            learner = Learner(benchmark, tuned, tasks, method, run.seed, run.architecture, team)
            description = learner.description
            parameters += learner.parameters
            start = clock()
            learner.prepare(splits)
            seconds += clock() - start
            lasted, curve = train(learner, splits, tuned, run.seed, after_step, probe)
            seconds += lasted
            test.update(evaluate(learner, splits.test))
            validation.update(evaluate(learner, splits.validation))
    except Exception as exception:
        error = one_line(exception)
        test, validation, curve = {}, {}, []
    return _record(
        benchmark,
        settings,
        run,
        team.settle(error),
        test=test,
        validation=validation,
        aggregator=description,
        step_time=step_time.ratio if step_time else None,
        train_seconds=round(seconds, 3),
        parameters=parameters,
        step_seconds=step_time.seconds if step_time else None,
        processes=team.size,
        curve=[] if single else curve,
        peak_bytes=step_time.peak_bytes if step_time else None,
        threads=torch.get_num_threads(),
    )


def failed_run(benchmark: Benchmark, settings: Settings, run: Run, error: str) -> Record:
    """The record of a run of which nothing is left but what went wrong."""
    return _record(
        benchmark,
        settings,
        run,
        error,
        test={},
        validation={},
        aggregator="",
        step_time=None,
        train_seconds=0.0,
    )


def _record(
    benchmark: Benchmark,
    settings: Settings,
    run: Run,
    error: str | None,
    *,
    test: Metrics,
    validation: Metrics,
    **found: Any,
) -> Record:
    return Record(
        benchmark=benchmark.name,
        method=run.method,
        architecture=run.architecture,
        seed=run.seed,
        fingerprint=fingerprint(benchmark, settings, run.architecture),
        error=error,
        test=test,
        validation=validation,
        settings=asdict(run.trial.within(settings)),
        versions=versions(),
        **found,
    )
