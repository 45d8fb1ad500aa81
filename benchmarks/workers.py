"""Processes that make runs beside each other, one at a time each.

What happens to one, be it out of memory, costs its run and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from benchmarks.benchmark import Settings, Splits
from benchmarks.catalog import find
from benchmarks.errors import one_line
from benchmarks.results import Record, Run
from benchmarks.runs import failed_run, make_run
from benchmarks.timing import StepTime

__all__ = ["Job", "Workers"]

_TELL_SECONDS = 0.3


@dataclass(frozen=True)
class Job:
    """A run, in a form that another process can read.

    Attributes:
        benchmark: its name, as `benchmarks.catalog.find` takes it.
        settings: those of its plan.
        run: which one.
        step_time: what a step takes, for the record.
    """

    benchmark: str
    settings: Settings
    run: Run
    step_time: StepTime | None


class Workers:
    """Up to `count` processes, started as they are needed; a context manager that ends them.

    Args:
        count: at least 1.
        threads: of PyTorch, in each.
        data_root: the folder for downloads.
    """

    def __init__(self, count: int, threads: int, data_root: Path | None) -> None:
        self.count = count
        self._arguments = (threads, data_root)
        # Forked processes would inherit PyTorch's threads in whatever state they are.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    @property
    def has_room(self) -> bool:
        """Whether one of the processes has nothing to do."""
        return len(self._workers) < self.count or any(w.job is None for w in self._workers)

    @property
    def is_idle(self) -> bool:
        """Whether none of them has anything to do."""
        return all(worker.job is None for worker in self._workers)

    def start(self, job: Job) -> None:
        """Give a run to a process that has none."""
        worker = next((w for w in self._workers if w.job is None), None)
        if worker is None:
            worker = _Worker(self._context, self._arguments)
            self._workers.append(worker)
        worker.take(job)

    def poll(
        self, seconds: float, after_steps: Callable[[Job, int], None]
    ) -> list[tuple[Job, Record]]:
        """What ended within `seconds`; `after_steps` hears of the steps made since it last did."""
        busy = [worker for worker in self._workers if worker.job is not None]
        ended = []
        for found in wait([worker.connection for worker in busy], timeout=seconds):
            worker = next(each for each in busy if each.connection is found)
            job = worker.job
            assert job is not None
            try:
                said = worker.connection.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                error = f"WorkerDied: {_death(worker.end())}"
                ended.append((job, _failed(job, error)))
                continue
            if isinstance(said, int):
                after_steps(job, said)
            else:
                worker.job = None
                ended.append((job, said))
        return ended

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process and the job it has."""

    def __init__(
        self, context: multiprocessing.context.SpawnContext, arguments: tuple[int, Path | None]
    ) -> None:
        self.connection, theirs = context.Pipe()
        self.job: Job | None = None
        self._process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def take(self, job: Job) -> None:
        """Begin with a run."""
        self.job = job
        with contextlib.suppress(OSError):  # That it is gone is noticed by who polls.
            self.connection.send(job)

    def end(self) -> int | None:
        """Stop the process if it runs; its exit code."""
        self.connection.close()
        if self.job is not None:
            self._process.join(timeout=0.5)
            self._process.terminate()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _failed(job: Job, error: str) -> Record:
    return failed_run(find(job.benchmark), job.settings, job.run, error)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {code}"


def _work(connection: Connection, threads: int, data_root: Path | None) -> None:
    """What a worker does until its connection is closed."""
    # Ctrl-C reaches all processes of a terminal; the one that talks to the user ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    loaded: tuple[str, Settings] | None = None
    splits: Splits | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            job: Job = connection.recv()
            benchmark = find(job.benchmark)
            try:
                if loaded != (job.benchmark, job.settings):
                    splits = None  # Two sets of data may be more than fits.
                    splits = benchmark.load(job.settings, data_root)
                    loaded = (job.benchmark, job.settings)
            except Exception as exception:
                connection.send(_failed(job, one_line(exception)))
                continue
            assert splits is not None
            tell = _Teller(connection)
            record = make_run(
                benchmark, job.settings, job.run, splits, job.step_time, tell.after_step
            )
            connection.send(record)


class _Teller:
    """Tells how many steps were made, now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._steps = 0
        self._last = time.monotonic()

    def after_step(self) -> None:
        """One more."""
        self._steps += 1
        now = time.monotonic()
        if now - self._last > _TELL_SECONDS:
            self._connection.send(self._steps)
            self._steps, self._last = 0, now
