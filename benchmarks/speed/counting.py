"""What no clock shows: bytes at the peak, operators dispatched, and reads by the host."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accelerator import Accelerator
from benchmarks.speed.contestants import Contestant
from benchmarks.speed.models import Heads

__all__ = ["Allocations", "Operators", "host_reads"]

_SETTLED, _BEGIN, _END = "gradbal: settled", "gradbal: begin", "gradbal: end"


class Allocations:
    """Every byte that tensors and operators take on one device, temporary ones too.

    On the CPU they are read from the profiler, which sees each call of the allocator; on a GPU from
    the caching allocator's own count. What was there before counts as nothing.

    Attributes (after the context):
        held: bytes that were live when `settle` was called.
        peak: most bytes that were live at once within `watched`.

    Example:
        >>> with Allocations(torch.device("cpu")) as memory:
        ...     kept = torch.empty(1000)
        ...     memory.settle()
        ...     with memory.watched():
        ...         kept = torch.empty(3000)
        >>> memory.held, memory.peak
        (4000, 16000)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held = self.peak = 0
        self._profile: Any = None
        self._before = 0

    def __enter__(self) -> Allocations:
        gc.collect()
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            # Kineto reports on stderr that there is no driver, and every start and stop.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def settle(self) -> None:
        """What is live now is kept from one step to the next."""
        gc.collect()
        if self._profile is None:
            self.held = torch.cuda.memory_allocated(self.device) - self._before
        else:
            self._mark(_SETTLED)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """The peak is taken within."""
        if self._profile is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._mark(_BEGIN)
            yield
            self._mark(_END)

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        live, is_watched = 0, False
        for event in sorted(events, key=lambda event: int(event.start_ns())):
            name = event.name()
            if name == "[memory]":
                live += event.nbytes()
            elif name == _SETTLED:
                self.held = live
            elif name in (_BEGIN, _END):
                is_watched = name == _BEGIN
                if is_watched:
                    self.peak = live
            if is_watched:
                self.peak = max(self.peak, live)

    @staticmethod
    def _mark(name: str) -> None:
        with record_function(name):
            pass


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are dispatched, all but views, which compute nothing.

    Example:
        >>> with Operators() as operators:
        ...     y = (torch.ones(2, 2).T + 1).exp()
        >>> operators.count
        3
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def host_reads(make: Callable[[Heads], Contestant], model: Heads, batch: Tensor) -> int:
    """How often the host would wait for an accelerator in one call, once warmed up.

    It is counted on a pretended one, since on CPU tensors a read is nothing that can be seen.
    """
    with Accelerator() as accelerator:
        there = copy.deepcopy(model).cpu()
        accelerator.put(there)
        on_device = accelerator.put(batch.cpu())
        made = make(there)
        made.warm_up(on_device)
        prepared = made.prepare(on_device)
        with accelerator.watched() as seen:
            made.call(*prepared)
    return len(seen.waits)
