"""Experts that run as one, by `torch.func.vmap`, against the same one after another."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gradbal.nn import MMoE

__all__ = ["MODELS", "Row", "measure"]


@dataclass(frozen=True)
class Model:
    """An expert, a batch for it, and what comes out."""

    expert: Callable[[], nn.Module]
    shape: tuple[int, ...]
    width: int


def _perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers)


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(320, 50), nn.ReLU()),
    )


MODELS: dict[str, Model] = {
    "layer 16-16, batch 32": Model(lambda: _perceptron(16, 16), (32, 16), 16),
    "layer 499-16, batch 256": Model(lambda: _perceptron(499, 16), (256, 499), 16),
    "MLP 128-64-16, batch 256": Model(lambda: _perceptron(128, 64, 16), (256, 128), 16),
    "MLP 512-256-64, batch 64": Model(lambda: _perceptron(512, 256, 64), (64, 512), 64),
    "LeNet, batch 64": Model(_lenet, (64, 1, 28, 28), 50),
}
"""Label → the expert."""


@dataclass(frozen=True)
class Row:
    """One kind of expert, n of them.

    forward, step: CPU time of the batched experts over that of the loop, medians, for a forward
    pass without gradients and for a forward and backward pass.
    """

    model: str
    n_experts: int
    forward: float
    step: float


def measure(models: Sequence[str], counts: Sequence[int], rounds: int) -> Iterator[Row]:
    """Lets an MMoE with batched experts and one with a loop take turns, on one thread.

    Args:
        models: keys of `MODELS`.
        counts: numbers of experts, at least 2.
        rounds: measured rounds, at least 1; two more warm up.

    Yields:
        One row for each kind of expert and number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in models:
            for n_experts in counts:
                yield _measure(name, n_experts, rounds)
    finally:
        torch.set_num_threads(before)


def _measure(name: str, n_experts: int, rounds: int) -> Row:
    model = MODELS[name]
    x = torch.randn(model.shape)

    def mixture(batched: bool) -> MMoE:
        torch.manual_seed(0)
        heads = {"a": nn.Linear(model.width, 1), "b": nn.Linear(model.width, 1)}
        return MMoE(
            ["a", "b"], model.expert, heads, num_experts=n_experts, batched=batched, example=x
        )

    contestants = {batched: mixture(batched).experts for batched in (False, True)}
    repetitions = max(1, round(0.02 / _seconds(partial(_step, contestants[False], x), 3)))
    ratios: dict[Callable[[nn.Module, Tensor], None], list[float]] = {_forward: [], _step: []}
    for number in range(-2, rounds):
        order = (False, True) if number % 2 else (True, False)
        for action, values in ratios.items():
            seconds = {
                batched: _seconds(partial(action, contestants[batched], x), repetitions)
                for batched in order
            }
            if number >= 0:
                values.append(seconds[True] / seconds[False])
    forward, step = (statistics.median(ratios[action]) for action in (_forward, _step))
    return Row(name, n_experts, forward, step)


def _seconds(action: Callable[[], None], repetitions: int) -> float:
    """CPU time of one call."""
    start = time.process_time()
    for _ in range(repetitions):
        action()
    return (time.process_time() - start) / repetitions


def _forward(experts: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        experts(x)


def _step(experts: nn.Module, x: Tensor) -> None:
    experts.zero_grad()
    experts(x).square().sum().backward()
