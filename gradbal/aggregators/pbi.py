"""Penalty-based boundary intersection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._scalar import ReferenceMixin, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["PBI", "pbi"]

_ROUNDINGS = 4


@register(
    "pbi",
    title="MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
    venue="IEEE Transactions on Evolutionary Computation",
    year=2007,
    url="https://doi.org/10.1109/TEVC.2007.892759",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t) ** 0.5, linear_row_scaling=True
    ),
)
class PBI(ReferenceMixin, Scalarizer):
    """Penalty-based boundary intersection: descent along a preferred ray, and back to it.

    Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE
    Transactions on Evolutionary Computation 2007, https://doi.org/10.1109/TEVC.2007.892759. With
    `f = ℓ − z`, `r̂ = r/|r|`, the way along the ray `d_1 = ⟨f, r̂⟩` and the distance from it
    `d_2 = |f − d_1 r̂|` the objective is `d_1 + θ d_2`, and `w = r̂ + θ (f − d_1 r̂)/d_2`. The size of
    r does not matter.

    Weights can be **negative**: a loss that is too small for the preferred ray is made larger.

    Args:
        theta: θ ≥ 0; the paper's is 5. 0 is the fixed weights r̂.
        pref: r, non-negative, one entry for each task; None is equal ones.
        ideal: z, the least values that the losses can have; None is zeros.

    Raises:
        ValueError: an argument out of range, or of another length than the losses.

    Note:
        The paper has `d_1 = |⟨f, r̂⟩|`, which is the same for `f ≥ 0`. d_2 has a kink on the ray:
        where it is within the rounding of the losses, its part of w is zero.

    Example:
        >>> import torch
        >>> method = PBI()
        >>> method.loss_weights(torch.tensor([1.0, 1.0]))
        tensor([0.7071, 0.7071])
        >>> method.loss_weights(torch.tensor([2.0, 1.0]))
        tensor([ 4.2426, -2.8284])
    """

    def __init__(
        self,
        theta: float = 5.0,
        pref: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
    ) -> None:
        in_range("theta", theta, 0)
        self._refer(pref, ideal)
        self.theta = theta

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`d_1 + θ d_2` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: not one preference or ideal value for each task.
        """
        p, z = self.preferred(losses, tasks), self.least(losses, tasks)
        return pbi(losses, p, z, self.theta)


def pbi(losses: Tensor, pref: Tensor, ideal: Tensor | float = 0.0, theta: float = 5.0) -> Tensor:
    """`⟨f, r̂⟩ + θ |f − ⟨f, r̂⟩ r̂|` with `f = ℓ − z`.

    Args:
        losses: `ℓ [T]`.
        pref: `r [T]`, not all zero.
        ideal: `z [T]`, or one number for all.
        theta: θ.

    Returns:
        0-dim.
    """
    f, r = precise(losses) - ideal, precise(pref)
    r = r / r.norm()
    along = f @ r
    off = f - along * r
    square = off @ off
    size = precise(losses.detach()).norm() + f.detach().norm()
    near = square <= (_ROUNDINGS * torch.finfo(losses.dtype).eps * size) ** 2
    # The root of zero has no derivative.
    distance = torch.where(near, 0.0, torch.where(near, 1.0, square).sqrt())
    value: Tensor = along + theta * distance
    return value.to(losses.dtype)
