"""Geometric loss strategy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradbal.aggregators._arguments import in_range, preference
from gradbal.aggregators._scalar import check_length, check_losses, of_tasks, precise, some_positive
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["GLS", "gls"]


@register(
    "gls",
    title="MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task "
    "Learning",
    venue="CVPR Workshops",
    year=2019,
    url="https://arxiv.org/abs/1904.08492",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, linear_row_scaling=True
    ),
)
class GLS(Scalarizer):
    """The geometric mean of the losses: scaling one of them does not turn the gradient.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
    Multi-Task Learning", CVPR Workshops 2019, https://arxiv.org/abs/1904.08492. The objective is
    `L = (Π ℓ_i)^{1/T}`, in general `exp(Σ a_i log ℓ_i/Σ a_i)` with focus weights a. The weights
    `w_i = a_i L/(ℓ_i Σ a_j)` fulfil `Σ w_i ℓ_i = L`; equal losses have 1/T each. Multiplying ℓ_i by
    k multiplies d by `k^{1/T}`.

    Args:
        weights: a, non-negative, one for each task; None is ones.
        eps: ε ≥ 0, added to every loss inside the logarithm.

    Raises:
        ValueError: an argument out of range, not one focus weight for each task, or `ℓ_i + ε` is
            not positive.

    Note:
        LibMTL multiplies the losses before it takes the root, which is NaN or zero for ten small
        ones, and reports `ℓ_i/(T Π ℓ_j)` as weights. Here the logarithms are added up.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 4.0])
        >>> GLS().scalarize(losses), GLS().loss_weights(losses)
        (tensor(2.), tensor([1.0000, 0.2500]))
    """

    per_task_state = True
    logarithmic = True

    def __init__(self, weights: Sequence[float] | None = None, eps: float = 0.0) -> None:
        in_range("eps", eps, 0)
        if weights is not None:
            weights = some_positive("weights", preference("weights", weights, None, 0.0).tolist())
        self.weights = weights
        self.eps = eps

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are T focus weights.

        Raises:
            ValueError: there are not.
        """
        check_length("weights", self.weights, n_tasks)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`exp(Σ a_i log ℓ_i/Σ a_i)` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss is not positive, or there is not one focus weight for each task.
        """
        losses = losses + self.eps
        check_losses(self.name, losses, tasks)
        if self.weights is None:
            return gls(losses)
        if tasks is not None:
            some_positive("weights", [self.weights[i] for i in tasks])
        return gls(losses, of_tasks("weights", self.weights, losses, tasks))


def gls(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """`exp(Σ a_i log ℓ_i/Σ a_i)`.

    Args:
        losses: `[T]`, positive.
        weights: `a [T]`, not all zero, or None for ones.

    Returns:
        0-dim.
    """
    logs = precise(losses).log()
    if weights is None:
        return logs.mean().exp().to(losses.dtype)
    share = weights.to(logs) / weights.to(logs).sum()
    return (share * logs).sum().exp().to(losses.dtype)
