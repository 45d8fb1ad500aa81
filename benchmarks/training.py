"""Training and judging one network, by a method or by the plain sum of its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.benchmark import Benchmark, Network, Settings, Split, Splits, Task
from benchmarks.processes import ALONE, Team
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
        team: the processes that train it together.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        settings: Settings,
        tasks: Sequence[Task],
        method: str | None,
        seed: int,
        architecture: str | None = None,
        team: Team = ALONE,
    ) -> None:
        torch.manual_seed(seed)
        self.tasks = tasks
        self.settings = settings
        self.seed = seed
        self.team = team
        self.architecture = benchmark.of(architecture or benchmark.architecture)
        self.model = self.architecture.build([task.name for task in tasks])
        self._trained: nn.Module | None = None
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

    def step(self, batch: Split, held_out: Split) -> Tensor:
        """Make one training step and return the losses before it `[T]`.

        Args:
            batch: what is trained on, by all processes together; a method that samples several
                independent batches gets equal parts of it.
            held_out: a validation batch, for the methods that look at one.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, MultiTaskOptimizer):
            optimizer.zero_grad()
            values = torch.stack(self._weighted_losses(batch))
            values.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return self.team.mean(values.detach())
        method = optimizer.aggregator
        if isinstance(method, DoubleSamplingAggregator):
            if len(batch) < method.n_batches:
                raise ValueError(
                    f"a batch must have an example for each of {method.n_batches} parts, found "
                    f"{len(batch)}"
                )
            parts = torch.arange(len(batch)).tensor_split(method.n_batches)
            losses, *others = [self._weighted_losses(take(batch, part)) for part in parts]
            optimizer.zero_grad()
            optimizer.backward(losses, independent=others)
            optimizer.step()
        elif isinstance(method, ClosureAggregator):
            closures: list[Callable[[], list[Tensor]]] = [lambda: self._weighted_losses(batch)]
            if isinstance(method, BilevelAggregator):
                closures.append(lambda: self._weighted_losses(held_out))
            optimizer.step(*closures)
        else:
            features, losses, count = self._losses(batch)
            optimizer.zero_grad()
            optimizer.backward(
                losses, features=features if method.needs_features else None, batch_size=count
            )
            optimizer.step()
        assert optimizer.losses is not None
        return optimizer.losses

    def end_epoch(self) -> None:
        """Tell the method, if it is one that counts epochs."""
        if isinstance(self.optimizer, MultiTaskOptimizer):
            self.optimizer.end_epoch()

    def _losses(self, batch: Split) -> tuple[Any, list[Tensor], int]:
        """Features and losses of this process's part of a batch, and how many examples it has."""
        if self._trained is None:
            # Not before `prepare`, which trains the network on its own, and may leave out parts.
            self._trained = self.team.wrap(_Trained(self.model), unused=self.model.has_unused())
        index, count = self.team.part(len(batch))
        part = batch if count == len(batch) else take(batch, index)
        features, outputs, extras = self._trained(part.inputs)
        losses = []
        for task in self.tasks:
            loss = task.loss(outputs[task.name], part.targets[task.name])
            losses.append(loss + extras[task.name] if task.name in extras else loss)
        return features, losses, count

    def _weighted_losses(self, batch: Split) -> list[Tensor]:
        """Losses whose mean over the processes is the whole batch's, however uneven the parts.

        For what takes no `batch_size`: DDP, closures, and batches of several sizes in one step.
        """
        _, losses, count = self._losses(batch)
        share = count * self.team.size / len(batch)
        return losses if share == 1 else [loss * share for loss in losses]


class _Trained(nn.Module):
    """All that losses are made of in one forward pass, which DDP can wrap."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Features; by task, outputs; and what is added to the losses of some tasks."""
        features = self.network.features(inputs)
        outputs = self.network.outputs(features)
        extras = {task: self.network.regularization_loss(inputs, task) for task in outputs}
        return features, outputs, {t: extra for t, extra in extras.items() if extra is not None}


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
        losses = learner.step(batch, next(held_out)).tolist()
        for task, loss in zip(learner.tasks, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"losses must be finite, found {loss} for {task.name} in step {number}"
                )
        if number % steps_per_epoch(settings) == 0:
            learner.end_epoch()
        after_step()


def evaluate(learner: Learner, split: Split) -> dict[str, dict[str, float]]:
    """All measures of all the learner's tasks on a split, by task and measure."""
    learner.model.eval()
    return judge(learner.model, learner.tasks, split, learner.team)


@torch.no_grad()
def judge(
    model: Callable[[Tensor], Mapping[str, Tensor]],
    tasks: Sequence[Task],
    split: Split,
    team: Team = ALONE,
) -> dict[str, dict[str, float]]:
    """All measures of these tasks on a split, by task and measure, of what `model` gives.

    Every process of the team judges its part of the split; torchmetrics adds the parts up. Where
    each judges the whole, the sum is of equal parts.
    """
    meters = {
        task.name: {measure.name: measure.meter() for measure in task.measures} for task in tasks
    }
    mine = torch.arange(len(split)).tensor_split(team.size)[team.rank]
    for index in torch.split(mine, _EVALUATION_BATCH):
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
