"""How long a training step takes, against one with the plain sum of the losses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.benchmark import Benchmark, Settings, Split
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.training import Learner, batches

__all__ = ["Contestant", "StepTime", "step_times"]

_WARM_UP_ROUNDS = 2


class Contestant(NamedTuple):
    """A method of gradbal's registry on an architecture, or no method: `sum(losses).backward()`."""

    method: str | None
    architecture: str


class StepTime(NamedTuple):
    """A step's duration over that of the plain sum on the benchmark's own network, and as it is."""

    ratio: float
    seconds: float | None


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
    # On one thread CPU time is the duration without what other programs took in between; it is
    # without the waiting for other processes too, which belongs to a step.
    alone = team.size == 1 and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
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
    return {
        contestant: StepTime(
            statistics.median(a / b for a, b in zip(found, seconds[plain], strict=True)),
            statistics.median(found),
        )
        for contestant, found in seconds.items()
        if contestant in contestants
    }
