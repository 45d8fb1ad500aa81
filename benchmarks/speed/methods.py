"""CPU time of `backward` with each method against `sum(losses).backward()`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD

import gradbal
from benchmarks.speed.models import MODELS
from gradbal import ClosureAggregator, DoubleSamplingAggregator, MultiTaskOptimizer

__all__ = ["PLAIN", "Row", "drivable", "measure"]

PLAIN = "sum(losses).backward()"
"""The plain sum, which is measured against itself too: how far that is from 1 is the noise."""


@dataclass(frozen=True)
class Row:
    """One method, or `PLAIN`.

    ratio: median over the rounds of its CPU time over the plain sum's in the same round.
    """

    method: str
    kind: str
    ratio: float


def drivable(n_tasks: int) -> list[str]:
    """The methods that `backward(losses)` alone can drive, scalarizers first."""
    names = []
    for name in gradbal.list_aggregators():
        made = gradbal.create(name)
        batches = made.n_batches if isinstance(made, DoubleSamplingAggregator) else 1
        closure = isinstance(made, ClosureAggregator) and batches != 1
        if not closure and not made.needs_features and made.promises.min_tasks <= n_tasks:
            names.append(name)
    return sorted(names, key=lambda name: gradbal.info(name).kind != "scalarizer")


def measure(
    methods: Sequence[str], rounds: int, n_tasks: int = 3, model: str = "conv", threads: int = 1
) -> Iterator[Row]:
    """Times every method and the plain sum in turn, on the same batch.

    Args:
        methods: among `drivable(n_tasks)`.
        rounds: measured rounds, at least 1; two more warm up.
        n_tasks: T.
        model: a key of `MODELS`.
        threads: of torch.

    Yields:
        One row for `PLAIN` and one for each method, as soon as it is there.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for method in (PLAIN, *methods):
            kind = "itself" if method == PLAIN else gradbal.info(method).kind
            yield Row(method, kind, _ratio(method, rounds, n_tasks, model))
    finally:
        torch.set_num_threads(before)


def _ratio(method: str, rounds: int, n_tasks: int, model: str) -> float:
    torch.manual_seed(0)
    network = MODELS[model](n_tasks)
    batch = network.example()
    sgd = SGD(network.parameters(), lr=0.0)

    def plain(losses: list[Tensor]) -> None:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def seconds(backward: Callable[[list[Tensor]], None]) -> float:
        sgd.zero_grad()
        _, losses = network.features_and_losses(batch)
        start = time.process_time()
        backward(losses)
        return time.process_time() - start

    ours = plain if method == PLAIN else MultiTaskOptimizer(sgd, method, jacobian="loop").backward
    ratios = []
    for number in range(-2, rounds):
        # Each is the first in every other round.
        if number % 2:
            taken, bare = seconds(ours), seconds(plain)
        else:
            bare, taken = seconds(plain), seconds(ours)
        if number >= 0:
            ratios.append(taken / bare)
    return statistics.median(ratios)
