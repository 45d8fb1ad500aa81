"""Impartial multi-task learning, loss balance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._learned import LearnedMixin
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["IMTLL", "imtl_l"]


@register(
    "imtl_l",
    title="Towards Impartial Multi-task Learning",
    venue="ICLR",
    year=2021,
    url="https://openreview.net/forum?id=IMPnRXEWpvr",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: t * float(torch.tensor(float(a.init)).exp()),
        linear_row_scaling=True,
    ),
)
class IMTLL(LearnedMixin, Scalarizer):
    """Learned factors that bring all losses to the same scale.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
    https://openreview.net/forum?id=IMPnRXEWpvr. The objective is `Σ e^{s_i} ℓ_i − s_i`, in the
    parameters and in s. For a frozen loss the optimum is `s_i = −log ℓ_i`, where every scaled loss
    is 1. With s_i = −log σ_i² it is twice that of uncertainty weighting for regression.

    The log-factors `s [T]` join the wrapped optimizer as a param group of their own.

    Args:
        init: the first s_i, in [-10, 10].
        lr: learning rate of s; None takes the wrapped optimizer's.
        weight_decay: of s; 0, since decay would pull every factor to one.
        clamp: s is kept in [-clamp, clamp], or None. A loss that stays at or below zero would
            otherwise drive its factor to infinity; this bound is gradbal's, not the paper's.

    Raises:
        ValueError: an argument out of range.

    Note:
        LibMTL trains s with the main optimizer's weight decay; here s has none.

    Example:
        >>> import torch
        >>> IMTLL().loss_weights(torch.tensor([1.0, 5.0]))
        tensor([1., 1.])
    """

    linear = True

    def __init__(
        self,
        init: float = 0.0,
        lr: float | None = None,
        weight_decay: float = 0.0,
        clamp: float | None = 20.0,
    ) -> None:
        self._learn(init, lr, weight_decay, clamp)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ e^{s_i} ℓ_i − s_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: another number of tasks than before.
        """
        if tasks is None:
            self.prepare(len(losses), losses)
            return imtl_l(losses, self.clamped())
        return imtl_l(losses, self.clamped()[list(tasks)])


def imtl_l(losses: Tensor, log_factor: Tensor) -> Tensor:
    """`Σ e^{s_i} ℓ_i − s_i`.

    Args:
        losses: `[T]`.
        log_factor: `s [T]`.

    Returns:
        0-dim.
    """
    return (torch.exp(log_factor) * losses - log_factor).sum()
