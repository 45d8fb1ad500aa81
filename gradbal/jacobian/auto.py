"""`jacobian="auto"`: a rule picks the engine, and the clock may overrule it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from gradbal.jacobian.engines import Engine
from gradbal.jacobian.layerwise import Layerwise
from gradbal.jacobian.loop import Loop
from gradbal.jacobian.vmap import VMap

__all__ = ["Auto", "Case", "Rule", "Stopwatch"]

N_WARM_UP = 1
"""Steps of each engine that are not timed: the first makes buffers."""

N_TIMED = 3
"""Steps of each engine that are."""

MARGIN = 0.9
"""Another engine takes the place of the rule's when its median is below this part of that one's."""


class Case(NamedTuple):
    """What the rule looks at.

    device: where the losses are. n_tasks: T. n_scalars: of all trained parameters. rows: whether
    the method needs the rows of J themselves. narrow: whether J is kept in half precision.
    """

    device: torch.device
    n_tasks: int
    n_scalars: int
    rows: bool
    narrow: bool = False


SMALL = 1 << 15
"""With fewer scalars than this there is nothing to gain, and runs repeat bit for bit."""

BATCHED = 1 << 22
"""Up to this many entries of J the gradients of all losses at once are worth a try on the CPU."""

BATCHED_ON_DEVICE = 1 << 26
"""The same on an accelerator, which waits for launches rather than for memory."""


class Rule:
    """gradbal's own rule: which engines are worth a try, and which comes first.

    Args:
        chunk_size: for "vmap", how many losses go together at most.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self._loop, self._layerwise = Loop(), Layerwise()
        # A graph that is kept lives until its losses go, but no later hook can spoil a step.
        self._vmap = VMap(chunk_size, keeps_graph=True)

    def __call__(self, case: Case) -> Sequence[Engine]:
        """The engines that are worth a try in a case, the rule's own choice first."""
        engines: list[Engine] = [self._loop]
        if case.n_tasks < 2 or case.n_scalars < SMALL:
            return engines
        if not case.rows and not case.narrow:
            engines.append(self._layerwise)
        limit = BATCHED if case.device.type == "cpu" else BATCHED_ON_DEVICE
        if case.n_tasks > 2 and case.n_tasks * case.n_scalars <= limit:
            engines.append(self._vmap)
        return engines


class Timer(Protocol):
    """Measures from when it is made until `stop`."""

    def stop(self) -> None: ...

    def seconds(self) -> float | None:
        """None as long as the device is still at it."""
        ...


class Stopwatch:
    """Times work on a device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._events[0].record()
        self._times = [time.perf_counter()]

    def stop(self) -> None:
        """Ends the measurement."""
        if self._events:
            self._events[1].record()
        self._times.append(time.perf_counter())

    def seconds(self) -> float | None:
        """How long it took, None as long as the device is still at it."""
        if not self._events:
            return self._times[1] - self._times[0]
        if not self._events[1].query():  # type: ignore[no-untyped-call]
            return None
        return float(self._events[0].elapsed_time(self._events[1])) / 1000.0


class Auto:
    """Picks the engine of each step.

    The engines that the rule finds worth a try take turns in the first steps; after one step that
    is not timed and three that are, the one with the least median stays, and the rule's own unless
    another is faster by a tenth. Where the rule names one engine alone there is no trial, and under
    `torch.use_deterministic_algorithms(True)` its first one is taken: engines agree up to rounding,
    so that only then two runs are the same bit for bit.

    Args:
        rule: the engines worth a try in a case, its own choice first; None for gradbal's.
        stopwatch: what measures.
    """

    def __init__(
        self,
        rule: Callable[[Case], Sequence[Engine]] | None = None,
        stopwatch: Callable[[torch.device], Timer] = Stopwatch,
    ) -> None:
        self._rule = Rule() if rule is None else rule
        self._stopwatch = stopwatch
        self._case: Case | None = None
        self._engines: list[Engine] = []
        self._timers: dict[str, list[Timer]] = {}
        self._n_steps = 0
        self._settled: str | None = None
        self._last: Engine | None = None

    @property
    def name(self) -> str:
        """The engine of the last step, or "auto" before the first."""
        return "auto" if self._last is None else self._last.name

    @property
    def settled(self) -> bool:
        """Whether the trial is over."""
        return self._settled is not None

    @property
    def engines(self) -> list[Engine]:
        """Those that were worth a try in the last step."""
        return list(self._engines)

    def settled_on(self, case: Case) -> Engine | None:
        """The engine of this step where the trial of such steps is over."""
        if self._settled is None or case != self._case:
            return None
        self._last = engine = self._engine()
        return engine

    @contextlib.contextmanager
    def engine_of_step(self, case: Case) -> Iterator[Engine]:
        """The engine to use within, timed if there is a trial. A step that fails does not count."""
        if case != self._case:
            if self._case is not None:
                self._settled, self._n_steps = None, 0
            self._case, self._engines = case, list(self._rule(case))
            self._timers = {engine.name: [] for engine in self._engines}
        if self._settled is None:
            self._settle()
        engine = self._engine()
        if self._settled is not None:
            self._last = engine
            yield engine
            return
        timer = self._stopwatch(case.device)
        yield engine
        timer.stop()
        self._last = engine
        if self._n_steps >= N_WARM_UP * len(self._engines):
            self._timers[engine.name].append(timer)
        self._n_steps += 1

    def _engine(self) -> Engine:
        if self._settled is None:
            return self._engines[self._n_steps % len(self._engines)]
        return next((e for e in self._engines if e.name == self._settled), self._engines[0])

    def _settle(self) -> None:
        own = self._engines[0].name
        if len(self._engines) == 1 or torch.are_deterministic_algorithms_enabled():
            self._settled = own
            return
        if self._n_steps < (N_WARM_UP + N_TIMED) * len(self._engines):
            return
        medians = {}
        for name, timers in self._timers.items():
            seconds = [timer.seconds() for timer in timers]
            if None in seconds:
                return
            # A run that was resumed in its trial may lack some.
            medians[name] = statistics.median([s for s in seconds if s is not None] or [math.inf])
        best = min(medians, key=lambda name: medians[name])
        self._settled = best if medians[best] < MARGIN * medians[own] else own
        self._timers = {}

    def state_dict(self) -> dict[str, Any]:
        """How far the trial is, and what it found."""
        return {"steps": self._n_steps, "settled": self._settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`."""
        self._n_steps, self._settled = state["steps"], state["settled"]
        self._case = None
