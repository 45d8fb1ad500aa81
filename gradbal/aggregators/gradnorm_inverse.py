"""Weights inverse to the gradients' norms."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices

__all__ = ["GradNormInverse", "gradnorm_inverse"]


@register(
    "gradnorm_inverse",
    title="多任务学习漫谈（二）：行梯度之事",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8896",
    promises=Promises(
        heads="weighted",
        degree=0,
        gain=lambda a, t, n: t / n,
        row_scale_invariant=True,
    ),
)
class GradNormInverse(GramianAggregator):
    """The sum of the unit gradients: every task is weighted by the inverse of its gradient's norm.

    Su, "多任务学习漫谈（二）：行梯度之事" (Notes on multi-task learning, 2: gradients), 2022,
    https://kexue.fm/archives/8896. `w_i = 1/|g_i|`, `d = Σ g_i/|g_i|`. Neither scaling a loss nor
    adding a constant to it changes d. `|d| ≤ T` whatever the losses, so that the learning rate has
    to decay; d may conflict.

    Example:
        >>> import torch
        >>> GradNormInverse().direction(torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
        tensor([0.6000, 1.8000])
    """

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`."""
        return gradnorm_inverse(gramian)


def gradnorm_inverse(gramian: Tensor) -> Tensor:
    """`w_i = 1/√G_ii`.

    Args:
        gramian: `[T, T]`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1 everywhere if all are zero.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        return np.asarray(1.0 / n)

    return solve_active(gramian, 1.0, solve)
