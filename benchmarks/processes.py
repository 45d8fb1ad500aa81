"""The processes that torchrun started, which train every network together.

Each takes its part of every batch, in the order in which one process would take the batches, so
that results depend on the number of processes by rounding alone. The first one leads: it alone
reads and writes results and talks to the user. What is not training goes through the store in which
the processes found each other: nobody has to be at a certain point for it, and a process that died
or hangs is noticed.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import launch
from benchmarks.errors import BenchmarkError, EndedElsewhere

__all__ = ["ALONE", "Team", "team"]

TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others in the middle of their work."""

GRACE = timedelta(seconds=10)
"""How much later than this process the others may fail in the same way."""

_LEAD_ALONE = timedelta(minutes=30)
"""How long the leading process may work on its own; it may be a download."""

_POLL_SECONDS = 0.02

_SAID = "benchmarks said"
"""The key under which processes count who has said why all of them end."""

_HEARD = "benchmarks heard"
"""The key under which those are counted who end for that reason."""

_PARTING = timedelta(seconds=2)
"""How long the process that keeps the store waits for the others to hear why all of them end."""

T = TypeVar("T")


class Team:
    """One process on its own: nobody to wait for.

    Attributes:
        size: N, the number of processes. rank: of this one; 0 leads.
    """

    size = 1
    rank = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    def part(self, count: int) -> tuple[Tensor, int]:
        """Indices of this process's part of `count` examples, and how many of them count.

        With fewer examples than processes some get one that does not count, so that they have a
        loss to take part with.
        """
        mine = torch.arange(count).tensor_split(self.size)[self.rank]
        return (mine, len(mine)) if len(mine) else (torch.zeros(1, dtype=torch.int64), 0)

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """The module as all processes train it together.

        BatchNorm would take the statistics of each process's part of the batch.

        Args:
            module: what is trained.
            unused: whether it may have parameters that its output does not depend on.
        """
        return module

    def mean(self, values: Tensor) -> Tensor:
        """Entry by entry, over the processes."""
        return values

    def lead(self, action: Callable[[], T]) -> T:
        """What the leading process's `action` returns, which JSON can express."""
        return action()

    def after_lead(self, action: Callable[[], T]) -> T:
        """Each process's own `action`, once the leading one is through with it."""
        return action()

    def settle(self, error: str | None) -> str | None:
        """How a piece of common work went, if it went the same way everywhere.

        Args:
            error: what went wrong in this process.

        Raises:
            BenchmarkError: it went wrong in some of the processes, or differently. They are then
                not at the same point, and cannot go on.
        """
        return error

    def speaks(self) -> bool:
        """Whether it is for this process to say why all of them end; yes only once in all."""
        return True


ALONE = Team()


class _Launched(Team):
    """Processes that have found each other, with gradients averaged by DDP."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._posts = 0

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        return DistributedDataParallel(module, find_unused_parameters=unused)

    def mean(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values.div_(self.size)

    def lead(self, action: Callable[[], T]) -> T:
        post = self._next_post()
        if self.leads:
            result = action()
            self._store.set(post, json.dumps(result))
            return result
        found: T = json.loads(self._from_lead(post))
        return found

    def after_lead(self, action: Callable[[], T]) -> T:
        post = self._next_post()
        if not self.leads:
            self._from_lead(post)
        result = action()
        if self.leads:
            self._store.set(post, "done")
        return result

    def settle(self, error: str | None) -> str | None:
        post = self._next_post()
        with contextlib.suppress(RuntimeError):  # The store went with the process that had it.
            self._store.set(f"{post}/{self.rank}", json.dumps(error))
        # Where this process failed, the others may wait for its part of their step forever.
        deadline = time.monotonic() + (GRACE if error else TIMEOUT).total_seconds()
        found = {self.rank: error}
        silent: list[int] = []
        for rank in range(self.size):
            if rank == self.rank:
                continue
            text = self._wait(f"{post}/{rank}", deadline)
            if text is None:
                silent.append(rank)
            else:
                found[rank] = json.loads(text)
        if not silent and len(set(found.values())) == 1:
            return error
        failed = [f"rank {rank} failed with {text}" for rank, text in found.items() if text]
        failed += [f"rank {rank} waits or is gone" for rank in silent]
        raise BenchmarkError(
            f"all {self.size} processes must get through a run together, found that "
            f"{', '.join(failed)}; all of them end, and the same command goes on"
        )

    def speaks(self) -> bool:
        try:
            return bool(self._store.add(_SAID, 1) == 1)
        except RuntimeError:  # The store went with the process that had it.
            return True

    def take_leave(self) -> None:
        """Where all end for a reason that was said, let the others hear it: the store goes too."""
        if not self.leads:
            return
        deadline = time.monotonic() + _PARTING.total_seconds()
        with contextlib.suppress(RuntimeError):
            while self._store.check([_SAID]) and time.monotonic() < deadline:
                if self._store.add(_HEARD, 0) >= self.size - 1:
                    return
                time.sleep(_POLL_SECONDS)

    def _from_lead(self, post: str) -> str:
        text = self._wait(post, time.monotonic() + _LEAD_ALONE.total_seconds())
        if text is None:
            raise BenchmarkError(f"rank 0 must answer within {_LEAD_ALONE}, found no answer")
        return text

    def _wait(self, key: str, deadline: float) -> str | None:
        """What is posted there, None if nothing is by then; Ctrl-C is heard meanwhile.

        Raises:
            EndedElsewhere: somebody has said why all of them end.
        """
        try:
            while not self._store.check([key]):
                if self._store.check([_SAID]):
                    self._store.add(_HEARD, 1)
                    raise EndedElsewhere("another process ended")
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
            return str(self._store.get(key), "utf-8")
        except RuntimeError:  # The store went with the process that had it.
            return None

    def _next_post(self) -> str:
        """The key of the next message, the same everywhere as all work in the same order."""
        self._posts += 1
        return f"benchmarks post {self._posts}"


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The processes that torchrun started, as long as they are connected.

    Raises:
        BenchmarkError: they do not find each other.
    """
    if launch.size() == 1:
        yield ALONE
        return
    # Not every build of torch has it.
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise BenchmarkError(f"the processes must find each other, found: {error}") from error
    try:
        with warnings.catch_warnings():
            # Of a layer with one channel, whose stride means nothing.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            launched = _Launched(store, rank, size)
            try:
                yield launched
            finally:
                launched.take_leave()
    finally:
        dist.destroy_process_group()
