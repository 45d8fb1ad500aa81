"""CPU time of `backward` against T bare `autograd.grad` passes and against TorchJD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD

from benchmarks.errors import MissingExtra
from benchmarks.speed.models import MODELS, Heads
from gradbal import MultiTaskOptimizer

__all__ = ["COLUMNS", "Row", "measure"]

COLUMNS = {
    "plain": "sum(losses).backward()",
    "gradbal": "MultiTaskOptimizer.backward",
    "torchjd": "TorchJD mtl_backward + jac_to_grad",
    "torchjd_chunk1": "the same with parallel_chunk_size=1",
}
"""What is timed, each as a ratio to T bare passes whose results are thrown away."""

Variant = Callable[[Tensor, list[Tensor]], None]


@dataclass(frozen=True)
class Row:
    """Medians over the rounds of the CPU time over that of the T bare passes in the same round."""

    model: str
    n_tasks: int
    n_shared: int
    ratios: dict[str, float]


def _variants(model: Heads, aggregator: str) -> dict[str, Variant]:
    try:
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError as error:
        raise MissingExtra("torchjd", "python -m benchmarks speed") from error
    parameters = list(model.parameters())
    shared = list(model.trunk.parameters())
    optimizer = MultiTaskOptimizer(SGD(parameters, lr=0.0), aggregator)

    def bare(features: Tensor, losses: list[Tensor]) -> None:
        for i, loss in enumerate(losses):
            torch.autograd.grad(
                loss, parameters, retain_graph=i < len(losses) - 1, allow_unused=True
            )

    def plain(features: Tensor, losses: list[Tensor]) -> None:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def ours(features: Tensor, losses: list[Tensor]) -> None:
        optimizer.backward(losses)

    def theirs(chunk: int | None) -> Variant:
        upgrad = UPGrad()

        def backward(features: Tensor, losses: list[Tensor]) -> None:
            mtl_backward(losses, features=features, parallel_chunk_size=chunk)
            jac_to_grad(shared, upgrad)

        return backward

    return {
        "bare": bare,
        "plain": plain,
        "gradbal": ours,
        "torchjd": theirs(None),
        "torchjd_chunk1": theirs(1),
    }


def measure(
    models: Sequence[str],
    task_counts: Sequence[int],
    rounds: int,
    threads: int = 1,
    aggregator: str = "upgrad",
) -> Iterator[Row]:
    """Times every variant in turn on the same batch, round after round.

    Args:
        models: keys of `MODELS`.
        task_counts: values of T.
        rounds: measured rounds, at least 1; two more warm up.
        threads: of torch.
        aggregator: gradbal's method; TorchJD runs UPGrad.

    Yields:
        One row for each model and T, as soon as it is there.

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in models:
            for n_tasks in task_counts:
                yield _measure(name, n_tasks, rounds, aggregator)
    finally:
        torch.set_num_threads(before)


def _measure(name: str, n_tasks: int, rounds: int, aggregator: str) -> Row:
    torch.manual_seed(0)
    model = MODELS[name](n_tasks)
    variants = _variants(model, aggregator)
    batch = model.example()
    ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
    names = list(variants)
    for number in range(-2, rounds):
        turn = number % len(names)
        seconds = {}
        for variant in names[turn:] + names[:turn]:
            for p in model.parameters():
                p.grad = None
            features, losses = model.features_and_losses(batch)
            start = time.process_time()
            variants[variant](features, losses)
            seconds[variant] = time.process_time() - start
        if number >= 0:
            for column, values in ratios.items():
                values.append(seconds[column] / seconds["bare"])
    n_shared = sum(p.numel() for p in model.trunk.parameters())
    return Row(name, n_tasks, n_shared, {c: statistics.median(v) for c, v in ratios.items()})
