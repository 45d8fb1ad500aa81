"""Shares independent jobs out to worker processes of one thread each."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.errors import BenchmarkError

__all__ = ["progress_of", "share_out"]

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[int], None]


def progress_of(console: Console) -> Progress:
    """A bar with the time left, on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def share_out(
    work: Callable[[Job, Tell], Result],
    jobs: Sequence[Job],
    workers: int,
    after_steps: Tell = lambda n: None,
) -> Iterator[tuple[Job, Result]]:
    """The jobs with their results, as they come in; nothing is left running behind.

    Args:
        work: a function of a module, since processes are spawned; takes a job and a function that
            is to be called now and then with the number of steps done since the last call.
        jobs: what is to be done, the longest first.
        workers: the number of processes; with 1 all is done in this one, in order.
        after_steps: called here with the steps done.

    Raises:
        BenchmarkError: a worker has died.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, work(job, after_steps)
        return
    context = get_context("spawn")
    told, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=_begin, initargs=(told, stop)
    )
    try:
        pending: dict[Future[Result], Job] = {
            pool.submit(partial(_in_worker, work), job): job for job in jobs
        }
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not told.empty():
                after_steps(told.get())
            for future in done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise BenchmarkError(
            "a worker process has died, perhaps for lack of memory; what is finished is kept, and "
            "the same command goes on"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Nobody waits for the result any more."""


_worker: dict[str, Any] = {}
"""In a worker process, what connects it to the one that waits."""


def _begin(told: Any, stop: Any) -> None:
    import torch

    # Interrupts are the parent's to deal with.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker.update(told=told, stop=stop)


def _in_worker(work: Callable[[Job, Tell], Result], job: Job) -> Result:
    def tell(steps: int) -> None:
        if _worker["stop"].is_set():
            raise _Stopped
        _worker["told"].put(steps)

    tell(0)
    return work(job, tell)
