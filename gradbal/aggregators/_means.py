"""State of the methods that average losses over steps or epochs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import same_tasks
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._scalar import precise

__all__ = ["EpochsMixin", "MeansMixin", "warn_endless"]

_ENDLESS = 10_000


def warn_endless(name: str, steps: int, remedy: str) -> None:
    """Warns, once, that nobody tells a method of the end of its first epoch.

    Args:
        name: of the method.
        steps: taken in the first epoch.
        remedy: what there is instead of `end_epoch()`.
    """
    if steps == _ENDLESS:
        warnings.warn(
            f"{name!r} changes from epoch to epoch, and end_epoch() was not called in "
            f"{_ENDLESS:,} steps; call it after every epoch, or use {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )


class MeansMixin:
    """For methods that keep, for each task, a sum of losses and how many they are."""

    name: ClassVar[str]
    per_task_state: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("total", "count")
    total: Tensor | None = None
    """`[T]`, where the losses are."""
    count: list[int] | None = None
    """`[T]`, known to the host, which knows who takes part."""

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Brings the state to where the losses are, once T was checked.

        Raises:
            ValueError: T differs from before.
        """
        found = {name: getattr(self, name) for name in self.state_names}
        state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        for value in state.values():
            same_tasks(self.name, len(value), n_tasks)
        for name, value in state.items():
            if value.device != like.device:
                setattr(self, name, value.to(like.device))

    def add(self, losses: Tensor, tasks: Sequence[int] | None) -> None:
        """Adds the losses `[T]` of the tasks that are named; None is all of them."""
        values = precise(losses.detach())
        if self.total is None or self.count is None:
            self.total, self.count = torch.zeros_like(values), [0] * len(values)
        named = range(len(values)) if tasks is None else tasks
        if len(named) < len(values):
            taken = np.zeros(len(values))
            taken[list(named)] = 1.0
            values = torch.where(as_weights(taken, values) > 0, values, 0.0)
        # A checkpoint may have brought it from another device since `prepare`.
        self.total = self.total.to(values.device) + values
        self.count = [n + (i in named) for i, n in enumerate(self.count)]

    def means(self, without: Tensor | float) -> Tensor:
        """The mean losses `[T]`, and `without` for tasks that have none."""
        assert self.total is not None
        assert self.count is not None
        count = as_weights(np.asarray(self.count), self.total)
        return torch.where(count > 0, self.total / count, without)

    def reset(self) -> None:
        """Forgets all losses."""
        self.total = self.count = None


class EpochsMixin(MeansMixin):
    """For methods whose weights change from epoch to epoch.

    An epoch ends with `end_epoch()`, or after a number of steps.
    """

    state_names: ClassVar[tuple[str, ...]] = ("total", "count", "steps", "epoch")
    steps: int = 0
    """Taken in this epoch."""
    epoch: int = 0
    """How many have ended."""

    def count_step(self, length: int | None, remedy: str) -> bool:
        """Counts a step; whether the epoch ends with it.

        Args:
            length: steps in an epoch, or None where only `end_epoch()` ends one.
            remedy: what there is instead of `end_epoch()`, for the warning that nobody calls it.
        """
        self.steps += 1
        if length is None and self.epoch == 0:
            warn_endless(self.name, self.steps, remedy)
        return length is not None and self.steps >= length

    def next_epoch(self) -> None:
        """Starts to count again."""
        MeansMixin.reset(self)
        self.steps = 0
        self.epoch += 1

    def reset(self) -> None:
        """Back to the first step of the first epoch."""
        for name in self.state_names:
            setattr(self, name, 0 if isinstance(getattr(self, name), int) else None)
