"""Makes what is missing of the tables, and appends each run to the results file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path

import torch

from benchmarks.benchmark import SINGLE_TASK, UNITARY, Splits
from benchmarks.plan import Plan, Schedule
from benchmarks.processes import ALONE, Team
from benchmarks.results import Record, ResultsFile, Run, Trial
from benchmarks.runs import make_run
from benchmarks.screen import Screen
from benchmarks.timing import Contestant, StepTime, step_times
from benchmarks.tuning import Row
from benchmarks.workers import Job, Workers

__all__ = ["execute"]

_POLL_SECONDS = 0.5

_NO_TRIAL = Trial(0.0, 0.0, 0.0)

Times = Mapping[Contestant, StepTime]


def execute(
    plans: Sequence[Plan],
    results: ResultsFile | None,
    data_root: Path | None,
    screen: Screen,
    team: Team = ALONE,
    workers: int = 0,
) -> None:
    """Make the plans' runs that are not in the results file, or failed, and append them to it.

    A run that raises or diverges is recorded with its error and does not stop the others.
    `KeyboardInterrupt` passes through; what was finished by then is in the file.

    Args:
        plans: the tables to be filled.
        results: the file, in the process that leads.
        data_root: the folder for downloads.
        screen: where progress is shown.
        team: the processes that make every run together.
        workers: how many processes make runs beside each other; with 0 this one makes them. A team
            of several has none.

    Raises:
        BenchmarkError: there are no data, or one of the processes failed on its own.
    """
    schedule: Schedule | None = None
    if results is not None:
        records, unreadable = results.read()
        screen.found(plans, records, unreadable, results.path)
        schedule = Schedule(plans, records)
    # As JSON brings it, from the process that leads.
    left = team.lead(lambda: _left(schedule))
    if not left:
        return
    threads = torch.get_num_threads()
    if workers:
        workers = min(workers, len(left))
        threads = max(1, threads // workers)
    data = _Data(plans, data_root, team)
    with _threads(threads):
        known = team.lead(lambda: _known_times(schedule, team.size, threads))
        times = []
        for number, plan in enumerate(plans):
            rows = [(row[0], row[1]) for of, row in left if of == number]
            before = {Contestant(*who): StepTime(*lasted) for who, lasted in known[number]}
            if rows:
                before.update(_step_times(plan, before.keys(), rows, data.of(number), screen, team))
            times.append(before)
        if schedule is not None:
            screen.start(schedule, [_cost(plans[of], row, times[of]) for of, row in schedule.left])
        try:
            if workers == 0:
                _in_turn(plans, times, schedule, results, data, screen, team)
            else:
                assert schedule is not None
                assert results is not None
                data.forget()
                with Workers(workers, threads, data_root) as processes:
                    _beside(plans, times, schedule, results, processes, screen)
        finally:
            screen.stop()


class _Data:
    """The data of the plans, one at a time: two sets may be more than fits."""

    def __init__(self, plans: Sequence[Plan], data_root: Path | None, team: Team) -> None:
        self._plans = plans
        self._root = data_root
        self._team = team
        self._number: int | None = None
        self._splits: Splits | None = None

    def of(self, number: int) -> Splits:
        """Those of one plan."""
        if self._number != number or self._splits is None:
            self.forget()
            plan = self._plans[number]
            load = partial(plan.benchmark.load, plan.settings, self._root)
            self._number, self._splits = number, self._team.after_lead(load)
        return self._splits

    def forget(self) -> None:
        """Give the memory back."""
        self._number = self._splits = None


def _in_turn(
    plans: Sequence[Plan],
    times: Sequence[Times],
    schedule: Schedule | None,
    results: ResultsFile | None,
    data: _Data,
    screen: Screen,
    team: Team,
) -> None:
    """Make run after run in this process, with the team."""
    while (found := team.lead(lambda: None if schedule is None else schedule.next())) is not None:
        number, run = int(found[0]), _run(found[1])
        plan, timed = plans[number], times[number]
        screen.begin(number, run)
        after_step = partial(screen.advance, number, run, _cost_of_step(run, timed))
        record = make_run(
            plan.benchmark,
            plan.settings,
            run,
            data.of(number),
            timed.get(_timed(run)),
            after_step,
            team,
        )
        if results is not None and schedule is not None:
            _settle(schedule, results, screen, number, record)


def _beside(
    plans: Sequence[Plan],
    times: Sequence[Times],
    schedule: Schedule,
    results: ResultsFile,
    workers: Workers,
    screen: Screen,
) -> None:
    """Let workers make the runs beside each other."""
    numbers: dict[Job, int] = {}

    def after_steps(job: Job, steps: int) -> None:
        number = numbers[job]
        screen.advance(number, job.run, steps * _cost_of_step(job.run, times[number]))

    while True:
        while workers.has_room and (found := schedule.next()) is not None:
            number, run = found
            plan = plans[number]
            source = plan.source or plan.benchmark.name
            job = Job(source, plan.settings, run, times[number].get(_timed(run)))
            numbers[job] = number
            screen.begin(number, run)
            workers.start(job)
        if workers.is_idle:
            return
        for job, record in workers.poll(_POLL_SECONDS, after_steps):
            _settle(schedule, results, screen, numbers.pop(job), record)


def _settle(
    schedule: Schedule, results: ResultsFile, screen: Screen, number: int, record: Record
) -> None:
    results.append(record)
    schedule.settle(number, record)
    screen.end(number, record)


def _left(schedule: Schedule | None) -> list[tuple[int, Row]]:
    assert schedule is not None
    return schedule.left


def _run(found: Sequence[object]) -> Run:
    """A run as JSON brings it."""
    method, seed, architecture, trial = found
    assert isinstance(trial, (list, tuple))
    return Run(str(method), int(str(seed)), str(architecture), Trial(*trial))


def _timed(run: Run) -> Contestant:
    method = None if run.method == UNITARY else run.method
    return Contestant(method, run.architecture)


def _known_times(
    schedule: Schedule | None, processes: int, threads: int
) -> list[list[tuple[Contestant, StepTime]]]:
    """By plan, the step times on record of as many processes and threads."""
    assert schedule is not None
    return [
        [
            (_timed(run), StepTime(record.step_time, record.step_seconds, record.peak_bytes))
            for run, record in schedule.found(number).items()
            if record.step_time is not None
            and (record.processes, record.threads) == (processes, threads)
        ]
        for number in range(len(schedule.plans))
    ]


def _step_times(
    plan: Plan,
    known: Set[Contestant],
    rows: Sequence[Row],
    splits: Splits,
    screen: Screen,
    team: Team,
) -> Times:
    """Step times by method and architecture, of the rows whose time is not known."""
    wanted = {_timed(Run(row[0], 0, row[1], _NO_TRIAL)) for row in rows if row[0] != SINGLE_TASK}
    missing = wanted - known
    if not missing:
        return {}
    with screen.measuring(plan, plan.preset.timing_rounds) as advance:
        return step_times(
            plan.benchmark,
            plan.settings,
            splits.train,
            sorted(missing, key=str),
            plan.preset.timing_rounds,
            advance,
            team,
        )


def _cost(plan: Plan, row: Row, times: Times) -> float:
    """What a run counts for in the time left: its steps, each as much as it lasts."""
    return plan.steps(row[0]) * _cost_of_step(Run(row[0], 0, row[1], _NO_TRIAL), times)


def _cost_of_step(run: Run, times: Times) -> float:
    known = times.get(_timed(run))
    return (known.seconds or known.ratio) if known else 1.0


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
