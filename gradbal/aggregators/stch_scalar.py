"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._scalar import ReferenceMixin, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["STCHScalar", "stch_scalar"]


@register(
    "stch_scalar",
    title="Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    venue="ICML",
    year=2024,
    url="https://arxiv.org/abs/2402.19078",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0 / t, linear_row_scaling=True
    ),
)
class STCHScalar(ReferenceMixin, Scalarizer):
    """A smooth maximum of the losses above an ideal point, weighted by a preference.

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024,
    https://arxiv.org/abs/2402.19078. With `y_i = p_i(ℓ_i − z_i)` the objective is
    `μ log Σ_i exp(y_i/μ)`, which lies between `max y` and `max y + μ log T`; the weights are
    `w_i = p_i softmax(y/μ)_i`. μ → 0 is `tchebycheff`; for large μ the direction is that of the
    fixed weights p.

    Args:
        mu: μ > 0; the paper's are between 0.01 and 1. It is on the losses' scale.
        pref: p, non-negative, one entry for each task, as it is; None is 1/T each.
        ideal: z, the least values that the losses can have; None is zeros. Losses may be below.

    Raises:
        ValueError: an argument out of range, or of another length than the losses.

    Note:
        The weights sum to at most `max p`, 1/T by default: the learning rate has to make up for it.
        `stch` is what the authors run for multi-task learning.

    Example:
        >>> import torch
        >>> STCHScalar(mu=0.5).loss_weights(torch.tensor([1.0, 2.0]))
        tensor([0.1345, 0.3655])
    """

    def __init__(
        self,
        mu: float = 1.0,
        pref: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
    ) -> None:
        in_range("mu", mu, 0, bounds="(]")
        self._refer(pref, ideal)
        self.mu = mu

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`μ log Σ_i exp(p_i(ℓ_i − z_i)/μ)` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: not one preference or ideal value for each task.
        """
        p, z = self.preferred(losses, tasks), self.least(losses, tasks)
        return stch_scalar(losses, p, z, self.mu)


def stch_scalar(
    losses: Tensor, pref: Tensor, ideal: Tensor | float = 0.0, mu: float = 1.0
) -> Tensor:
    """`μ log Σ_i exp(p_i(ℓ_i − z_i)/μ)`, by log-sum-exp.

    Args:
        losses: `ℓ [T]`.
        pref: `p [T]`.
        ideal: `z [T]`, or one number for all.
        mu: μ.

    Returns:
        0-dim.
    """
    y = pref * (precise(losses) - ideal)
    return (mu * torch.logsumexp(y / mu, 0)).to(losses.dtype)
