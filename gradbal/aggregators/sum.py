"""Sum of the losses."""

from __future__ import annotations

from torch import Tensor

from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["Sum"]


@register(
    "sum",
    title="Linear scalarisation with unit weights",
    venue="folklore",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t), linear_row_scaling=True
    ),
)
class Sum(Scalarizer):
    """Sum of the losses: every weight is 1.

    The gradient is T times that of `mean`, and so is the effective learning rate of plain SGD. It
    is what most papers call "EW" or "LS".

    Note:
        LibMTL's EW is this sum, although its documentation says 1/T, and so is nash-mtl's "ls".

    Example:
        >>> import torch
        >>> Sum().direction(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([2., 4.])
    """

    linear = True

    def scalarize(self, losses: Tensor) -> Tensor:
        """`Σ ℓ_i` from losses `[T]`."""
        return losses.sum()
