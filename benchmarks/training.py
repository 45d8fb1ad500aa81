"""Training and judging one network, by a method or by the plain sum of its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from benchmarks.benchmark import Benchmark, Settings, Split, Splits, Task
from gradbal import (
    BilevelAggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
    MultiTaskOptimizer,
)

__all__ = [
    "Learner",
    "batches",
    "evaluate",
    "judge",
    "steps_per_epoch",
    "steps_per_run",
    "take",
    "train",
    "validation_batches",
]

_EVALUATION_BATCH = 1000


class Learner:
    """A freshly initialised network with its optimizer.

    The seed decides the initial weights and the method's own random numbers, so that all methods
    start from the same network.

    Args:
        benchmark: what to learn.
        settings: gives the learning rate.
        tasks: the tasks that get a head and a loss.
        method: a name of gradbal's registry, taken with its default hyperparameters; None for
            `sum(losses).backward()` without gradbal.
        seed: see above.
        architecture: a name of the benchmark's architectures; its own network if left out.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        settings: Settings,
        tasks: Sequence[Task],
        method: str | None,
        seed: int,
        architecture: str | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.tasks = tasks
        self.settings = settings
        self.seed = seed
        self.architecture = benchmark.of(architecture or benchmark.architecture)
        self.model = self.architecture.build([task.name for task in tasks])
        adam = Adam(self.model.parameters(), lr=settings.lr)
        self.optimizer: Optimizer = adam if method is None else MultiTaskOptimizer(adam, method)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def prepare(self, splits: Splits) -> None:
        """What the architecture does with the data before it is trained, if anything."""
        if self.architecture.prepare is not None:
            self.architecture.prepare(self.model, self.tasks, splits, self.settings, self.seed)

    @property
    def description(self) -> str:
        """The method with its hyperparameters, in words."""
        if isinstance(self.optimizer, MultiTaskOptimizer):
            return repr(self.optimizer.aggregator)
        return "sum(losses).backward()"

    def step(self, batch: Split, held_out: Split) -> list[Tensor]:
        """Make one training step and return the losses before it, 0-dim, one a task.

        Args:
            batch: what is trained on; a method that samples several independent batches gets equal
                parts of it.
            held_out: a validation batch, for the methods that look at one.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, MultiTaskOptimizer):
            optimizer.zero_grad()
            losses = self._losses(batch)[1]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return losses
        method = optimizer.aggregator
        closures: list[Callable[[], list[Tensor]]] = [lambda: self._losses(batch)[1]]
        if isinstance(method, BilevelAggregator):
            closures.append(lambda: self._losses(held_out)[1])
        if isinstance(method, ClosureAggregator) and not isinstance(
            method, DoubleSamplingAggregator
        ):
            return optimizer.step(*closures)  # type: ignore[no-any-return]
        n_parts = method.n_batches if isinstance(method, DoubleSamplingAggregator) else 1
        parts = torch.arange(len(batch)).tensor_split(n_parts)
        (features, losses), *others = [
            self._losses(batch if n_parts == 1 else take(batch, part)) for part in parts
        ]
        optimizer.zero_grad()
        optimizer.backward(
            losses,
            features=features if method.needs_features else None,
            independent=[each for _, each in others],
        )
        optimizer.step()
        return losses

    def end_epoch(self) -> None:
        """Tell the method, if it is one that counts epochs."""
        if isinstance(self.optimizer, MultiTaskOptimizer):
            self.optimizer.end_epoch()

    def _losses(self, batch: Split) -> tuple[Any, list[Tensor]]:
        features = self.model.features(batch.inputs)
        outputs = self.model.outputs(features)
        return features, [self._loss(task, outputs[task.name], batch) for task in self.tasks]

    def _loss(self, task: Task, output: Tensor, batch: Split) -> Tensor:
        loss = task.loss(output, batch.targets[task.name])
        extra = self.model.regularization_loss(batch.inputs, task.name)
        return loss if extra is None else loss + extra


def batches(split: Split, settings: Settings, seed: int) -> Iterator[Split]:
    """The batches of all epochs, shuffled anew in each; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(split), generator=generator)
        for index in torch.split(order, settings.batch_size):
            yield take(split, index)


def validation_batches(split: Split, settings: Settings, seed: int) -> Iterator[Split]:
    """Random validation batches without end; they depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    size = min(settings.batch_size, len(split))
    while True:
        yield take(split, torch.randperm(len(split), generator=generator)[:size])


def steps_per_epoch(settings: Settings) -> int:
    """Number of training steps in one pass over the training data."""
    return math.ceil(settings.train_size / settings.batch_size)


def steps_per_run(settings: Settings) -> int:
    """Number of training steps of one network."""
    return settings.epochs * steps_per_epoch(settings)


def train(
    learner: Learner,
    splits: Splits,
    settings: Settings,
    seed: int,
    after_step: Callable[[], None],
) -> None:
    """Train for the fixed number of epochs, calling `after_step` after each step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    learner.model.train()
    total = steps_per_run(settings)
    held_out = validation_batches(splits.validation, settings, seed)
    for number, batch in enumerate(batches(splits.train, settings, seed), start=1):
        learner.model.set_progress(number - 1, total)
        losses = learner.step(batch, next(held_out))
        for task, loss in zip(learner.tasks, losses, strict=True):
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"losses must be finite, found {loss.item()} for {task.name} in step {number}"
                )
        if number % steps_per_epoch(settings) == 0:
            learner.end_epoch()
        after_step()


def evaluate(learner: Learner, split: Split) -> dict[str, dict[str, float]]:
    """All measures of all the learner's tasks on a split, by task and measure."""
    learner.model.eval()
    return judge(learner.model, learner.tasks, split)


@torch.no_grad()
def judge(
    model: Callable[[Tensor], Mapping[str, Tensor]], tasks: Sequence[Task], split: Split
) -> dict[str, dict[str, float]]:
    """All measures of these tasks on a split, by task and measure, of what `model` gives."""
    meters = {
        task.name: {measure.name: measure.meter() for measure in task.measures} for task in tasks
    }
    for index in torch.split(torch.arange(len(split)), _EVALUATION_BATCH):
        batch = take(split, index)
        outputs = model(batch.inputs)
        for task, by_name in meters.items():
            for meter in by_name.values():
                meter.update(outputs[task], batch.targets[task])
    return {
        task: {name: float(meter.compute()) for name, meter in by_name.items()}
        for task, by_name in meters.items()
    }


def take(split: Split, index: Tensor) -> Split:
    """The examples with these indices."""
    return Split(split.inputs[index], {task: y[index] for task, y in split.targets.items()})
