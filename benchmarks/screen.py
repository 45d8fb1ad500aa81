"""What is shown while runs are made: on a terminal a live table, elsewhere a line a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table

from benchmarks.plan import Plan, Schedule
from benchmarks.results import Record, Run
from benchmarks.tuning import Row

__all__ = ["Screen"]


class Screen:
    """Shows how far the runs are.

    On a terminal: a table of the methods, with how many of their runs are through on each
    benchmark; the runs that are being made; and the time that is left.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._schedule: Schedule | None = None
        self._live: Live | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            TimeLeft(),
            console=console,
        )
        self._all: TaskID | None = None
        self._running: dict[tuple[int, Run], float] = {}
        self._costs: dict[tuple[int, Row], float] = {}
        self._ended = 0
        self._total = 0
        self._through = 0.0

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and not self.console.quiet

    def found(
        self, plans: Sequence[Plan], records: Sequence[Record], unreadable: int, path: Path
    ) -> None:
        """Say what is in the results file already."""
        if unreadable:
            self._say(f"{unreadable} unreadable lines in {path} are left out")
        if not records:
            return
        schedule = Schedule(plans, records)
        total = sum(plan.size for plan in plans)
        there = total - len(schedule.left)
        marks = {mark for plan in plans for mark in plan.fingerprints.values()}
        others = sum(record.fingerprint not in marks for record in records)
        beside = f"; {others} runs with other settings or versions left aside" if others else ""
        self._say(f"{there} of {total} runs found in {path}{beside}")

    @contextlib.contextmanager
    def measuring(self, plan: Plan, rounds: int) -> Iterator[Callable[[], None]]:
        """While step times are measured; what is yielded is called after each round."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(
            *columns, console=self.console, disable=not self._is_live, transient=True
        ) as progress:
            bar = progress.add_task(f"{plan.benchmark.name}: measuring step times", total=rounds)
            yield lambda: progress.advance(bar)

    def start(self, schedule: Schedule, costs: Sequence[float]) -> None:
        """Begin to show runs.

        Args:
            schedule: knows what is through.
            costs: of each run that is left, in seconds or what stands for them.
        """
        self._schedule = schedule
        self._total = len(costs)
        self._costs = dict(zip(schedule.left, costs, strict=True))
        self._all = self._bars.add_task("all runs", total=sum(costs), left="time left")
        if self._is_live:
            self._live = Live(
                get_renderable=self._picture, console=self.console, refresh_per_second=2
            )
            self._live.start()

    def begin(self, number: int, run: Run) -> None:
        """A run begins."""
        self._running[number, run] = 0.0

    def advance(self, number: int, run: Run, cost: float) -> None:
        """A part of it is made."""
        self._running[number, run] += cost
        self._show_through()

    def end(self, number: int, record: Record) -> None:
        """A run is through."""
        schedule, run = self._schedule, record.run
        assert schedule is not None
        self._running.pop((number, run), None)
        # A failed run has made fewer steps than were planned.
        self._through += self._costs.get((number, (run.method, run.architecture)), 0.0)
        self._ended += 1
        self._show_through()
        if not self._is_live or record.error is not None:
            what = f"run {self._ended} of {self._total}: {self._label(number, run)}"
            self._say(f"{what}: {record.error or f'{record.train_seconds:.1f} s'}")

    def stop(self) -> None:
        """End the live table, with what is through."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _label(self, number: int, run: Run) -> str:
        assert self._schedule is not None
        plans = self._schedule.plans
        plan = plans[number]
        where = f"{plan.benchmark.name}, " if len(plans) > 1 else ""
        trial = ""
        if plan.tuning is not None:
            trial = f", lr {run.trial.lr:g}"
            if run.trial.weight_decay or run.trial.dropout:
                trial += f", decay {run.trial.weight_decay:g}, dropout {run.trial.dropout:g}"
        return f"{where}{plan.label(run.method, run.architecture)}, seed {run.seed}{trial}"

    def _show_through(self) -> None:
        if self._all is not None:
            done = self._through + sum(self._running.values())
            self._bars.update(self._all, completed=done)

    def _picture(self) -> Group:
        """The live table."""
        assert self._schedule is not None
        plans = self._schedule.plans
        table = Table(box=None, pad_edge=False)
        table.add_column("method")
        for plan in plans:
            table.add_column(plan.benchmark.name, justify="right")
        rows = dict.fromkeys(row for plan in plans for row in plan.rows)
        lines: dict[str, list[str]] = {}
        for method, architecture in rows:
            for number, plan in enumerate(plans):
                if (method, architecture) in plan.rows:
                    cells = lines.setdefault(plan.label(method, architecture), [""] * len(plans))
                    cells[number] = self._cell(number, (method, architecture))
        for label, cells in lines.items():
            table.add_row(label, *cells)
        now = [f"  {self._label(number, run)}" for number, run in self._running]
        return Group(table, "running:", *now, self._bars)

    def _cell(self, number: int, row: Row) -> str:
        schedule = self._schedule
        assert schedule is not None
        records = schedule.found(number).items()
        failed = sum(
            (r.method, r.architecture) == row and of.error is not None for r, of in records
        )
        through = f"{schedule.done(number, row)}/{schedule.plans[number].runs_of(row)}"
        return f"[red]{failed} failed[/red] {through}" if failed else through

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
