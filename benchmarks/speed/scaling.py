"""What a step of the methods with one backward pass costs as tasks are added, beside MGDA's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.speed.models import Heads
from gradbal import MultiTaskOptimizer

__all__ = ["METHODS", "Row", "measure"]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mgda": ("mgda", {}),
    "marigold central": ("marigold", {}),
    "marigold forward": ("marigold", {"estimator": "forward"}),
    "marigold free": ("marigold", {"estimator": "free"}),
    "famo": ("famo", {}),
}
"""Label → a method's name and options."""


@dataclass(frozen=True)
class Row:
    """One method at one T.

    forwards, backwards: passes through the trunk in one step, counted. ratio: median over the
    rounds of the CPU time of a step over that of one with `sum(losses).backward()`.
    """

    method: str
    n_tasks: int
    forwards: int
    backwards: int
    ratio: float


class _Counter:
    forwards = backwards = 0


class _Count(torch.autograd.Function):
    """The identity; adds up how often it is passed, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: _Counter) -> Tensor:
        ctx.counter = counter
        counter.forwards += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.counter.backwards += 1
        return grad, None


class _CountedTrunk(nn.Module):
    """A perceptron 256-512-512-256 that counts its passes."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter
        layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(512, 256), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Count.apply(self.layers(x), self.counter)
        return out


def _learner(method: str | None, n_tasks: int) -> tuple[Callable[[], None], _Counter]:
    """One training step on a fixed batch, and the counter of its passes."""
    torch.manual_seed(0)
    counter = _Counter()
    model = Heads(_CountedTrunk(counter), 256, n_tasks, lambda: torch.randn(64, 256))
    batch, sgd = model.example(), SGD(model.parameters(), lr=1e-3)
    if method is None:

        def plain() -> None:
            sgd.zero_grad()
            losses = model.features_and_losses(batch)[1]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            sgd.step()

        return plain, counter
    name, options = METHODS[method]
    optimizer = MultiTaskOptimizer(sgd, name, jacobian="loop", **options)

    def balanced() -> None:
        optimizer.step(lambda: model.features_and_losses(batch)[1])

    return balanced, counter


def measure(
    task_counts: Sequence[int], rounds: int, methods: Sequence[str] = tuple(METHODS)
) -> Iterator[Row]:
    """Lets every method take a step in turn, round after round, on one thread.

    Args:
        task_counts: values of T.
        rounds: measured rounds, at least 1; two more warm up.
        methods: keys of `METHODS`.

    Yields:
        One row for each T and method, as soon as those of a T are there.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n_tasks in task_counts:
            yield from _measure(n_tasks, rounds, methods)
    finally:
        torch.set_num_threads(before)


def _measure(n_tasks: int, rounds: int, methods: Sequence[str]) -> Iterator[Row]:
    names: list[str | None] = [None, *methods]
    learners = {name: _learner(name, n_tasks) for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(-2, rounds):
        turn = number % len(names)
        seconds = {}
        for name in names[turn:] + names[:turn]:
            step, counter = learners[name]
            counter.forwards = counter.backwards = 0
            start = time.process_time()
            step()
            seconds[name] = time.process_time() - start
        if number >= 0:
            for method, values in ratios.items():
                values.append(seconds[method] / seconds[None])
    for method in methods:
        counter = learners[method][1]
        ratio = statistics.median(ratios[method])
        yield Row(method, n_tasks, counter.forwards, counter.backwards, ratio)
