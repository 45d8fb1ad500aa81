"""How long a training step takes, against one with the plain sum of the losses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.benchmark import Benchmark, Settings, Split
from benchmarks.errors import one_line
from benchmarks.processes import ALONE, Team
from benchmarks.training import Learner, batches

__all__ = ["step_time_ratios"]

_WARM_UP_ROUNDS = 2


def step_time_ratios(
    benchmark: Benchmark,
    settings: Settings,
    train_split: Split,
    methods: Sequence[str],
    rounds: int,
    after_round: Callable[[], None],
    team: Team = ALONE,
) -> dict[str, float]:
    """Duration of a step (forward, backward, update) with each method over that with the sum.

    Machines slow down and speed up from one second to the next, so the methods take turns: in each
    round the plain sum and every method make one step on the same batch, in rotating order, and are
    compared within the round. The median over the rounds is returned. A method that raises has no
    ratio.

    Args:
        benchmark, settings: what is trained.
        train_split: its first shuffled batch is used.
        methods: names of gradbal's registry.
        rounds: measured rounds, at least 1; some unmeasured ones come first.
        after_round: called after each measured round.
        team: the processes that make the steps together; messages between them are part of a step.
    """
    batch = next(batches(train_split, settings, seed=0))
    learners: dict[str | None, Learner] = {}
    for method in (None, *methods):
        error: str | None = None
        try:
            learner = Learner(benchmark, settings, benchmark.tasks, method, 0, team)
            for _ in range(_WARM_UP_ROUNDS):
                learner.step(batch, batch)
        except Exception as exception:
            if method is None:
                raise
            error = one_line(exception)
        # The training run meets the same error and records it.
        if team.settle(error) is None:
            learners[method] = learner
    ratios: dict[str, list[float]] = {method: [] for method in learners if method is not None}
    names = list(learners)
    for number in range(rounds):
        turn = number % len(names)
        seconds = {}
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            learners[name].step(batch, batch)
            seconds[name] = time.perf_counter() - start
        for method, values in ratios.items():
            values.append(seconds[method] / seconds[None])
        after_round()
    return {method: statistics.median(values) for method, values in ratios.items()}
