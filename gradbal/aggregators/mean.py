"""Mean of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["Mean", "mean"]


@register(
    "mean",
    title="Linear scalarisation with equal weights",
    venue="folklore",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, simplex=True, linear_row_scaling=True
    ),
)
class Mean(Scalarizer):
    """Mean of the losses: every weight is 1/T.

    The baseline that every other method has to beat (with a tuned learning rate it is a strong one:
    Kurin et al., "In Defense of the Unitary Scalarization for Deep Multi-Task Learning", NeurIPS
    2022, https://arxiv.org/abs/2201.04122).

    Note:
        LibMTL's documentation says that its EW weights by 1/T, its code weights by 1. In gradbal
        `mean` is 1/T, and `sum` and `ew` are 1.

    Example:
        >>> import torch
        >>> Mean().direction(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([1., 2.])
    """

    linear = True

    def scalarize(self, losses: Tensor) -> Tensor:
        """`(1/T) Σ ℓ_i` from losses `[T]`."""
        return mean(losses)

    def loss_weights(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`w [T]`, 1/T each: nothing has to be differentiated."""
        if type(self).scalarize is not Mean.scalarize:
            return super().loss_weights(losses, tasks)
        return torch.full_like(losses, 1.0 / len(losses))


def mean(losses: Tensor) -> Tensor:
    """`(1/T) Σ ℓ_i` from losses `[T]`: 0-dim."""
    return losses.mean()
