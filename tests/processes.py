"""Processes that run the same function together, connected by gloo on the loopback address."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["PATIENCE", "Workers", "workers"]

PATIENCE = 60
"""Seconds after which a process that waits for another one gives up."""


class Workers:
    """N processes, started once: importing torch takes longer than a test."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        size = self.size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        self.ends, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, store), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each of them returns, by rank; a module's function is called in all of them."""
        for end in self.ends:
            end.send((function, args))
        try:
            found = [self._answer(rank) for rank in range(self.size)]
        except BaseException:
            # One test's failure is not the next one's.
            self.stop()
            self._start()
            raise
        errors = [f"rank {k}:\n{text}" for k, (text, _) in enumerate(found) if text]
        if errors:
            # The others may be in the middle of something.
            self.stop()
            self._start()
        assert not errors, "\n".join(errors)
        return [result for _, result in found]

    def _answer(self, rank: int) -> Any:
        end, process = self.ends[rank], self._processes[rank]
        assert end.poll(2 * PATIENCE), f"rank {rank} does not answer"
        try:
            return end.recv()
        except EOFError:
            process.join()
            raise AssertionError(f"rank {rank} died with exit code {process.exitcode}") from None

    def stop(self) -> None:
        """Ends them, whatever they do."""
        for process in self._processes:
            process.kill()
        for process, end in zip(self._processes, self.ends, strict=True):
            process.join()
            end.close()
        self._folder.cleanup()


@contextmanager
def workers(size: int) -> Iterator[Workers]:
    """N processes for as long as the context is."""
    started = Workers(size)
    try:
        yield started
    finally:
        started.stop()


def _serve(end: Any, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        try:
            end.send(("", function(*args)))
        except BaseException:
            end.send((traceback.format_exc(), None))
