"""Projection of the mean gradient on the dual cone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators._mixins import PreferenceMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, least_norm_above

__all__ = ["DualProj", "dualproj"]


@register(
    "dualproj",
    title="Gradient Episodic Memory for Continual Learning",
    venue="NeurIPS",
    year=2017,
    url="https://arxiv.org/abs/1706.08840",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0 if a.pref is None else float(sum(a.pref)),
        non_conflicting=True,
    ),
)
class DualProj(PreferenceMixin, GramianAggregator):
    """The nearest direction to the mean gradient that conflicts with no task.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
    https://arxiv.org/abs/1706.08840; for several losses Quinton and Rey, "Jacobian Descent for
    Multi-Objective Optimization", 2024, https://arxiv.org/abs/2406.16232. d is the projection of
    `Jᵀp` on the dual cone `{x : Jx ≥ 0}`: `d = Jᵀw`, `w = argmin {wᵀGw : w ≥ p}`. Without
    conflicts `d = Jᵀp`. Unlike `upgrad`, d is not linear under scaling of the losses.

    Args:
        pref: p, non-negative, one entry for each task; None is 1/T each.

    Raises:
        ValueError: `pref` has a negative entry, or not one for each task.

    Note:
        The paper projects the gradient of the current task alone, which is `pref` with a single
        one. TorchJD and LibMTL add 1e-4 to the diagonal of the trace-normalised Gramian, which
        leaves conflicts of that order, larger ones with small rows, and take a Gramian of trace
        below 1e-4 for zero, where d becomes the plain mean. In gradbal nothing is added and nothing
        is absolute.

    Example:
        >>> import torch
        >>> DualProj().direction(torch.tensor([[1.0, 0.0], [-3.0, 1.0]]))
        tensor([0.0000, 0.5000])
    """

    def __init__(self, pref: Sequence[float] | None = None) -> None:
        self._prefer(pref)

    def combination(self, gramian: Tensor, pref: Array) -> Tensor:
        """`w [T]`, `w ≥ p`, from the Gramian `[T, T]` and `p [T]`."""
        return dualproj(gramian, pref)


def dualproj(gramian: Tensor, pref: Array) -> Tensor:
    """`w = argmin {wᵀGw : w ≥ p}`.

    Args:
        gramian: `[T, T]`.
        pref: `p [T]`, non-negative.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1/T everywhere if all are.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        n = n / n.max()
        u = pref[active] * n
        v = checked(least_norm_above(c, u), "DualProj's projection")
        return np.where(v > u, v / n, pref[active])

    return solve_active(gramian, 1.0 / len(gramian), solve)
