"""Generalized means of the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._scalar import check_losses, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["GeneralizedMean", "generalized_mean"]

_SMALL = 1e-3


@register(
    "generalized_mean",
    title="多任务学习漫谈（一）：以损失之名",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8870",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, linear_row_scaling=True
    ),
)
class GeneralizedMean(Scalarizer):
    """The power mean of the losses: from the least of them over the geometric mean to the largest.

    Su, "多任务学习漫谈（一）：以损失之名" (Notes on multi-task learning, 1: losses), 2022,
    https://kexue.fm/archives/8870. The objective is `L = ((1/T) Σ ℓ_i^γ)^{1/γ}`, which grows with
    γ: −∞ is the least loss, −1 the harmonic mean, 0 the geometric, 1 the arithmetic, 2 the
    quadratic and ∞ the largest loss. The weights `w_i = (1/T)(ℓ_i/L)^{γ−1}` fulfil `Σ w_i ℓ_i = L`.

    Args:
        gamma: γ, any number, also inf and −inf. At 0 alone scaling a loss does not turn the
            gradient.
        eps: ε ≥ 0, added to every loss.

    Raises:
        ValueError: an argument out of range, or `ℓ_i + ε` is not positive.

    Note:
        At γ = ±∞ several losses that are all the largest or least share the weight.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 4.0])
        >>> [float(GeneralizedMean(g).scalarize(losses)) for g in (-1.0, 0.0, 1.0, float("inf"))]
        [1.600000023841858, 2.0, 2.5, 4.0]
    """

    per_task_state = True
    logarithmic = True

    def __init__(self, gamma: float = 0.0, eps: float = 0.0) -> None:
        if gamma not in (math.inf, -math.inf):
            in_range("gamma", gamma)
        in_range("eps", eps, 0)
        self.gamma = gamma
        self.eps = eps

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`((1/T) Σ ℓ_i^γ)^{1/γ}` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part, T being k then.
            tasks: indices of the tasks that take part, for the message of an error; None for all.

        Raises:
            ValueError: a loss is not positive.
        """
        losses = losses + self.eps
        check_losses(self.name, losses, tasks)
        return generalized_mean(losses, self.gamma)


def generalized_mean(losses: Tensor, gamma: float = 0.0) -> Tensor:
    """`((1/T) Σ ℓ_i^γ)^{1/γ}`, from logarithms.

    Args:
        losses: `ℓ [T]`, positive.
        gamma: γ, also 0, inf and −inf.

    Returns:
        0-dim.
    """
    logs = precise(losses).log()
    if gamma == 0:
        mean = logs.mean()
    elif math.isinf(gamma):
        mean = logs.amax() if gamma > 0 else logs.amin()
    elif abs(gamma) < _SMALL:
        # From the geometric mean on, since log-sum-exp loses what is small against log T.
        centre = logs.mean()
        mean = centre + torch.expm1(gamma * (logs - centre)).mean().log1p() / gamma
    else:
        # Relative to the term that is largest, so that no power overflows.
        first = (logs.amax() if gamma > 0 else logs.amin()).detach()
        sum_of_powers = torch.logsumexp(gamma * (logs - first), 0)
        mean = first + (sum_of_powers - math.log(len(losses))) / gamma
    return mean.exp().to(losses.dtype)
