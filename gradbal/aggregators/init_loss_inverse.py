"""Weights inverse to the first losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import integer
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._means import MeansMixin
from gradbal.aggregators._scalar import (
    check_length,
    check_losses,
    of_tasks,
    positive_numbers,
    precise,
)
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["InitLossInverse", "init_loss_inverse"]


@register(
    "init_loss_inverse",
    title="多任务学习漫谈（一）：以损失之名",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8870",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t), linear_row_scaling=True
    ),
)
class InitLossInverse(MeansMixin, Scalarizer):
    """Every task is weighted by the inverse of its loss at the start of training.

    Su, "多任务学习漫谈（一）：以损失之名" (Notes on multi-task learning, 1: losses), 2022,
    https://kexue.fm/archives/8870. `w_i = 1/L_i`, with L_i the mean of the task's first n losses,
    or a number that is known beforehand. Multiplying a loss by a constant changes nothing; adding
    one does.

    Args:
        warmup: n ≥ 1. Until a task has had n losses, L_i is the mean of those that it has had, the
            present one among them.
        initial: L, one positive number for each task, in place of a warm-up: log K for the
            cross-entropy of K classes, `E|y|²` for a regression whose outputs start at zero.

    Raises:
        ValueError: an argument out of range, not one initial loss for each task, or a loss of the
            warm-up that is not positive.

    Example:
        >>> import torch
        >>> method = InitLossInverse()
        >>> method.observe(torch.tensor([2.0, 0.1]))
        >>> method.loss_weights(torch.tensor([1.0, 0.09]))
        tensor([ 0.5000, 10.0000])
    """

    def __init__(self, warmup: int = 1, initial: Sequence[float] | None = None) -> None:
        integer("warmup", warmup, 1)
        self.warmup = warmup
        self.initial = None if initial is None else positive_numbers("initial", initial)

    @property
    def linear(self) -> bool:
        """Whether the warm-up is over."""
        return self.initial is not None or (
            self.count is not None and min(self.count) >= self.warmup
        )

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Brings the state to where the losses are, once T was checked.

        Raises:
            ValueError: T differs from before, or from the number of initial losses.
        """
        check_length("initial", self.initial, n_tasks)
        super().prepare(n_tasks, like)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ ℓ_i/L_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss of the warm-up is not positive, or T differs from before.
        """
        if tasks is None:
            self.prepare(len(losses), losses)
        if self.initial is not None:
            like = precise(losses.detach())
            return init_loss_inverse(losses, of_tasks("initial", self.initial, like, tasks))
        named = range(len(losses)) if tasks is None else tasks
        known = [0 if self.count is None else self.count[i] for i in named]
        open_ = [i for i, n in enumerate(known) if n < self.warmup]
        if open_:
            part = losses if len(open_) == len(losses) else losses[open_]
            check_losses(self.name, part, [named[i] for i in open_])
        if self.total is None:
            return init_loss_inverse(losses, losses.detach())
        total = self.total if tasks is None else self.total[list(tasks)]
        if not open_:
            return init_loss_inverse(losses, total / self.warmup)
        counts = as_weights(np.asarray(known, dtype=np.float64), total)
        values = torch.where(counts < self.warmup, precise(losses.detach()), 0.0)
        return init_loss_inverse(losses, (total + values) / (counts + 1).clamp_max(self.warmup))

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Adds the losses `[T]` of tasks in their warm-up.

        Raises:
            ValueError: one of them is not positive.
        """
        if self.linear:
            return
        count = self.count or [0] * len(losses)
        named = range(len(losses)) if tasks is None else tasks
        open_ = [i for i in named if count[i] < self.warmup]
        if open_:
            check_losses(self.name, losses if len(open_) == len(losses) else losses[open_], open_)
            self.add(losses, open_)


def init_loss_inverse(losses: Tensor, initial: Tensor) -> Tensor:
    """`Σ ℓ_i/L_i`.

    Args:
        losses: `ℓ [T]`.
        initial: `L [T]`, positive.

    Returns:
        0-dim.
    """
    return (precise(losses) / initial).sum().to(losses.dtype)
