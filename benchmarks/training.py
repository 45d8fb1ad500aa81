"""Training and judging one network, by a method or by the plain sum of its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.utils._pytree import tree_map_only

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
    "Probed",
    "batches",
    "evaluate",
    "judge",
    "step_clock",
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
        adam = Adam(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
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

    @property
    def weights(self) -> Tensor | None:
        """The tasks' weights in the last step `[T]`; None where the method has none."""
        return self.optimizer.weights if isinstance(self.optimizer, MultiTaskOptimizer) else None

    def step(self, batch: Split, held_out: Split) -> Tensor:
        """Make one training step and return the losses before it `[T]`, NaN for a missing task.

        Args:
            batch: what is trained on, by all processes together; a method that samples several
                independent batches gets equal parts of it.
            held_out: a validation batch, for the methods that look at one.
        """
        if all(_is_missing(batch, task) for task in self.tasks):
            return torch.full((len(self.tasks),), math.nan)  # There is nothing to learn from it.
        optimizer = self.optimizer
        if not isinstance(optimizer, MultiTaskOptimizer):
            optimizer.zero_grad()
            losses = self._weighted_losses(batch)
            total = torch.stack([loss for loss in losses if loss is not None]).sum()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            missing = total.new_tensor(math.nan)
            values = [missing if loss is None else loss.detach() for loss in losses]
            return self.team.mean(torch.stack(values))
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
            closures: list[Callable[[], list[Tensor | None]]] = [
                lambda: self._weighted_losses(batch)
            ]
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

    def probe(self, batch: Split) -> Probed:
        """Compare the tasks' gradients of the parameters that two or more of them reach.

        Nothing is trained, and no random number is taken from the training.
        """
        with torch.random.fork_rng(devices=[]):
            _, losses, _ = self._losses(batch)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        grads = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
            if loss is not None
        ]
        shared = [i for i in range(len(parameters)) if sum(row[i] is not None for row in grads) > 1]
        if not shared:
            return Probed()
        rows = torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(parameters[i]) if row[i] is None else row[i]).flatten()
                        for i in shared
                    ]
                )
                for row in grads
            ]
        ).double()
        lengths = rows.norm(dim=1)
        gramian = rows @ rows.T
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        inner, scale = gramian[first, second], lengths[first] * lengths[second]
        cosines = (inner / scale)[scale > 0]
        if not len(cosines):
            return Probed()
        return Probed(float((cosines < 0).double().mean()), float(cosines.mean()))

    def end_epoch(self) -> None:
        """Tell the method, if it is one that counts epochs."""
        if isinstance(self.optimizer, MultiTaskOptimizer):
            self.optimizer.end_epoch()

    def _losses(self, batch: Split) -> tuple[Any, list[Tensor | None], int]:
        """Features and losses of this process's part of a batch, and how many examples it has.

        A task that is missing from the whole batch has None; one that is missing from this part
        alone, a loss of 0.
        """
        if self._trained is None:
            # Not before `prepare`, which trains the network on its own, and may leave out parts.
            self._trained = self.team.wrap(
                _Trained(self.model, self.settings.dropout), unused=self.model.has_unused()
            )
        index, count = self.team.part(len(batch))
        part = batch if count == len(batch) else take(batch, index)
        features, outputs, extras = self._trained(part.inputs)
        losses: list[Tensor | None] = []
        for task in self.tasks:
            loss = _loss(task, outputs[task.name], part, batch)
            extra = extras.get(task.name)
            losses.append(loss if loss is None or extra is None else loss + extra)
        return features, losses, count

    def _weighted_losses(self, batch: Split) -> list[Tensor | None]:
        """Losses whose mean over the processes is the whole batch's, however uneven the parts.

        For what takes no `batch_size`: DDP, closures, and batches of several sizes in one step.
        """
        _, losses, count = self._losses(batch)
        share = count * self.team.size / len(batch)
        if share == 1:
            return losses
        return [None if loss is None else loss * share for loss in losses]


def _loss(task: Task, output: Tensor, part: Split, batch: Split) -> Tensor | None:
    """A task's loss on a part of a batch, over the examples that have a target.

    Where the part is weighted by its number of examples, the mean over the parts is that over all
    of the batch's targets.
    """
    target, known = part.targets[task.name], part.labelled(task.name)
    if part is batch:
        if known is None:
            return task.loss(output, target)
        return task.loss(output[known], target[known]) if bool(known.any()) else None
    all_known = batch.labelled(task.name)
    if all_known is None:
        return task.loss(output, target)
    if not bool(all_known.any()):
        return None
    here = len(part) if known is None else int(known.sum())
    if here == 0:
        return output.sum() * 0
    share = here / len(part) / (int(all_known.sum()) / len(batch))
    mean = task.loss(output, target) if known is None else task.loss(output[known], target[known])
    return mean * share


class _Trained(nn.Module):
    """All that losses are made of in one forward pass, which DDP can wrap."""

    def __init__(self, network: Network, dropout: float) -> None:
        super().__init__()
        self.network = network
        self.dropout = dropout

    def forward(self, inputs: Tensor) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Features; by task, outputs; and what is added to the losses of some tasks."""
        features = self.network.features(inputs)
        outputs = self.network.outputs(self._dropped(features))
        extras = {task: self.network.regularization_loss(inputs, task) for task in outputs}
        return features, outputs, {t: extra for t, extra in extras.items() if extra is not None}

    def _dropped(self, features: Any) -> Any:
        """Features, one tensor or one for each task, with dropout."""
        if not self.dropout:
            return features
        return tree_map_only(Tensor, lambda z: F.dropout(z, self.dropout, self.training), features)


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


def step_clock(team: Team) -> Callable[[], float]:
    """What training steps are timed with.

    On one thread CPU time is the duration without what other programs took in between; it is
    without the waiting for other processes too, which belongs to a step.
    """
    alone = team.size == 1 and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


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
    probe: bool = False,
) -> tuple[float, list[dict[str, Any]]]:
    """Train for the fixed number of epochs, calling `after_step` after each step.

    Args:
        learner, splits, settings, seed: what is trained on what, and how.
        after_step: called after each step.
        probe: whether the tasks' gradients are compared in the first step of each epoch.

    Returns:
        The time of the steps in seconds, and for each epoch "epoch", 1, 2, …; "seconds", the time
        of all steps up to its end; "losses" `[T]`, the means over its steps; "validation", the
        measures by task at its end; "weights" `[T]`, the means of the method's weights, scaled to
        sum to 1, or None; and from the probe, or None, "conflicts", the share of pairs of tasks
        whose gradients have a negative inner product, and "cosine", the mean over the pairs.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    total, per_epoch = steps_per_run(settings), steps_per_epoch(settings)
    held_out = validation_batches(splits.validation, settings, seed)
    clock = step_clock(learner.team)
    seconds = 0.0
    curve: list[dict[str, Any]] = []
    means = _Means()
    probed = Probed()
    learner.model.train()
    for number, batch in enumerate(batches(splits.train, settings, seed), start=1):
        if probe and number % per_epoch == 1 % per_epoch:
            probed = learner.probe(batch)
        start = clock()
        learner.model.set_progress(number - 1, total)
        losses = learner.step(batch, next(held_out))
        seconds += clock() - start
        for task, loss in zip(learner.tasks, losses.tolist(), strict=True):
            if math.isnan(loss) and _is_missing(batch, task):
                continue
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"losses must be finite, found {loss} for {task.name} in step {number}"
                )
        means.add(losses, learner.weights)
        if number % per_epoch == 0:
            learner.end_epoch()
            curve.append(
                {
                    "epoch": number // per_epoch,
                    "seconds": round(seconds, 4),
                    **means.take(),
                    "validation": evaluate(learner, splits.validation),
                    "conflicts": probed.conflicts,
                    "cosine": probed.cosine,
                }
            )
            learner.model.train()
        after_step()
    return seconds, curve


class Probed(NamedTuple):
    """How the tasks' gradients lie: see `train`."""

    conflicts: float | None = None
    cosine: float | None = None


class _Means:
    """Losses and weights `[T]`, averaged over the steps in which they are known."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, losses: Tensor, weights: Tensor | None) -> None:
        """Take in a step's; weights of other signs than a mean has are none."""
        self._losses.append(losses.double().cpu())
        if weights is not None and bool(weights.sum() > 0):
            self._weights.append((weights / weights.sum()).double().cpu())

    def take(self) -> dict[str, list[float | None] | None]:
        """The means of what was added since the last call."""
        losses = _numbers(torch.stack(self._losses).nanmean(0))
        weights = _numbers(torch.stack(self._weights).mean(0)) if self._weights else None
        self._losses, self._weights = [], []
        return {"losses": losses, "weights": weights}


def _numbers(values: Tensor) -> list[float | None]:
    """As JSON has them: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _is_missing(batch: Split, task: Task) -> bool:
    known = batch.labelled(task.name)
    return known is not None and not bool(known.any())


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
            output, target, known = outputs[task], batch.targets[task], batch.labelled(task)
            if known is not None:
                output, target = output[known], target[known]
            if len(target):
                for meter in by_name.values():
                    meter.update(output, target)
    return {
        task: {name: float(meter.compute()) for name, meter in by_name.items()}
        for task, by_name in meters.items()
    }


def take(split: Split, index: Tensor) -> Split:
    """The examples with these indices."""
    return Split(split.inputs[index], {task: y[index] for task, y in split.targets.items()})
