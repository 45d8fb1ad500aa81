"""Weights inverse to the losses of the same step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, same_tasks
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._scalar import check_losses, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["RealtimeLossInverse", "realtime_loss_inverse"]


@register(
    "realtime_loss_inverse",
    title="多任务学习漫谈（一）：以损失之名",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8870",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t), linear_row_scaling=True
    ),
)
class RealtimeLossInverse(Scalarizer):
    """Every task is weighted by the inverse of its present loss, so that all of them count as 1.

    Su, "多任务学习漫谈（一）：以损失之名" (Notes on multi-task learning, 1: losses), 2022,
    https://kexue.fm/archives/8870. The objective is `Σ ℓ_i/m_i` with constants m = ℓ: its value is
    T, its gradient that of `Σ log ℓ_i`, T/L times that of the geometric mean L. Multiplying a loss
    by a constant changes nothing; adding one does.

    Args:
        ema: β in [0, 1). m_i is the moving average `β m_i + (1 − β) ℓ_i`, from the task's first
            loss on; 0, as in the source, is the present loss alone.
        eps: ε ≥ 0, added to every loss that m is made from.

    Raises:
        ValueError: an argument out of range, `ℓ_i + ε` is not positive, or another number of tasks.

    Example:
        >>> import torch
        >>> RealtimeLossInverse().loss_weights(torch.tensor([2.0, 0.1]))
        tensor([ 0.5000, 10.0000])
    """

    per_task_state = True
    logarithmic = True
    state_names = ("average",)

    def __init__(self, ema: float = 0.0, eps: float = 0.0) -> None:
        in_range("ema", ema, 0, 1, bounds="[)")
        in_range("eps", eps, 0)
        self.ema = ema
        self.eps = eps
        # m [T] after the last step; NaN for a task without a loss.
        self.average: Tensor | None = None

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Brings the state to where the losses are, once T was checked.

        Raises:
            ValueError: T differs from before.
        """
        if self.average is None:
            return
        same_tasks(self.name, len(self.average), n_tasks)
        self.average = self.average.to(like.device)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ ℓ_i/m_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss is not positive, or T differs from before.
        """
        if tasks is None:
            self.prepare(len(losses), losses)
        values = precise(losses.detach()) + self.eps
        check_losses(self.name, values, tasks)
        average = self.average
        if average is not None and tasks is not None:
            average = average[list(tasks)]
        return realtime_loss_inverse(losses, self._moved(average, values))

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Moves the averages of the tasks that take part.

        Raises:
            ValueError: a loss is not positive.
        """
        if self.ema == 0.0:
            return
        values = precise(losses.detach()) + self.eps
        check_losses(self.name, values if tasks is None else values[list(tasks)], tasks)
        moved = self._moved(self.average, values)
        if tasks is not None:
            taken = np.zeros(len(values))
            taken[list(tasks)] = 1.0
            kept = torch.full_like(values, torch.nan)
            if self.average is not None:
                kept = self.average.to(values.device)
            moved = torch.where(as_weights(taken, values) > 0, moved, kept)
        self.average = moved

    def _moved(self, average: Tensor | None, values: Tensor) -> Tensor:
        if average is None:
            return values
        average = average.to(values.device)
        moved = self.ema * average + (1 - self.ema) * values
        return torch.where(average.isnan(), values, moved)

    def reset(self) -> None:
        """Forgets the averages."""
        self.average = None


def realtime_loss_inverse(losses: Tensor, average: Tensor | None = None) -> Tensor:
    """`Σ ℓ_i/m_i`.

    Args:
        losses: `ℓ [T]`.
        average: `m [T]`, positive; None takes the losses' values.

    Returns:
        0-dim.
    """
    values = precise(losses)
    m = values.detach() if average is None else average
    return (values / m).sum().to(losses.dtype)
