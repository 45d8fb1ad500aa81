"""How long a training step takes, against one with the plain sum of the losses."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.benchmark import Benchmark, Settings, Split
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.speed.counting import Allocations
from benchmarks.training import Learner, batches, step_clock
from gradbal import MultiTaskOptimizer

__all__ = ["Contestant", "StepTime", "step_times"]

_WARM_UP_ROUNDS = 2


class Contestant(NamedTuple):
    """A method of gradbal's registry on an architecture, or no method: `sum(losses).backward()`."""

    method: str | None
    architecture: str


class StepTime(NamedTuple):
    """What a step takes.

    Attributes:
        ratio: its duration over that of the plain sum on the benchmark's own network.
        seconds: its duration.
        peak_bytes: most tensor memory at once, above the parameters and the optimizer's state.
    """

    ratio: float
    seconds: float | None
    peak_bytes: int | None


def step_times(
    benchmark: Benchmark,
    settings: Settings,
    train_split: Split,
    contestants: Sequence[Contestant],
    rounds: int,
    after_round: Callable[[], None],
    team: Team = ALONE,
) -> dict[Contestant, StepTime]:
    """Duration of a step (forward, backward, update) of each contestant.

    Machines slow down and speed up from one second to the next, so the contestants take turns: in
    each round the plain sum on the benchmark's own network and every contestant make one step on
    the same batch, in rotating order, and are compared within the round. The medians over the
    rounds are returned. A contestant that raises has none.

    Args:
        benchmark, settings: what is trained.
        train_split: its first shuffled batch is used.
        contestants: who takes part, besides the plain sum.
        rounds: measured rounds, at least 1; some unmeasured ones come first.
        after_round: called after each measured round.
        team: the processes that make the steps together; messages between them are part of a step.
    """
    clock = step_clock(team)
    batch = next(batches(train_split, settings, seed=0))
    plain = Contestant(None, benchmark.architecture)
    learners: dict[Contestant, Learner] = {}
    for contestant in dict.fromkeys((plain, *contestants)):
        method, architecture = contestant
        error: str | None = None
        try:
            learner = Learner(benchmark, settings, benchmark.tasks, method, 0, architecture, team)
            for _ in range(_WARM_UP_ROUNDS):
                learner.step(batch, batch)
        except Exception as exception:
            if contestant == plain:
                raise
            error = one_line(exception)
        # The training run meets the same error and records it.
        if team.settle(error) is None:
            learners[contestant] = learner
    seconds: dict[Contestant, list[float]] = {contestant: [] for contestant in learners}
    names = list(learners)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            learners[name].step(batch, batch)
            seconds[name].append(clock() - start)
        after_round()
    peaks = {name: None if team.size > 1 else _peak(learners[name], batch) for name in names}
    return {
        contestant: StepTime(
            statistics.median(a / b for a, b in zip(found, seconds[plain], strict=True)),
            statistics.median(found),
            peaks[contestant],
        )
        for contestant, found in seconds.items()
        if contestant in contestants
    }


def _peak(learner: Learner, batch: Split) -> int:
    """Bytes at the peak of a step, with what is otherwise kept from step to step."""
    optimizer = learner.optimizer
    if isinstance(optimizer, MultiTaskOptimizer):
        optimizer.zero_grad(free_buffers=True)
    else:
        optimizer.zero_grad()
    with Allocations(torch.device("cpu")) as memory, memory.watched():
        learner.step(batch, batch)
    return memory.peak
