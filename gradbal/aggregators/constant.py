"""Constant weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import finite_numbers
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._scalar import check_length
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["Constant", "constant"]


@register(
    "constant",
    title="Linear scalarisation with given weights",
    venue="folklore",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: float(t) if a.weights is None else float(sum(a.weights)),
        linear_row_scaling=True,
    ),
)
class Constant(Scalarizer):
    """Weighted sum of the losses with weights that the user gives.

    `Σ w_i ℓ_i`. The weights may have any sign and any sum; they are used as they are.

    Args:
        weights: one finite number for each task; None is ones, which is `sum`.

    Raises:
        ValueError: a weight is not finite, or there is not one for each task.

    Example:
        >>> import torch
        >>> Constant([1.0, -0.5]).direction(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([ 2., -2.])
    """

    linear = True
    per_task_state = True

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self.weights = None if weights is None else finite_numbers("weights", weights).tolist()

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are T weights.

        Raises:
            ValueError: there are not.
        """
        check_length("weights", self.weights, n_tasks)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ w_i ℓ_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: there is not one weight for each task.
        """
        if self.weights is None:
            return losses.sum()
        if tasks is None:
            self.prepare(len(losses), losses)
            tasks = range(len(losses))
        return constant(losses, [self.weights[i] for i in tasks])


def constant(losses: Tensor, w: Sequence[float]) -> Tensor:
    """`Σ w_i ℓ_i` from losses `[T]` and as many weights: 0-dim."""
    return (as_weights(np.asarray(w), losses) * losses).sum()
