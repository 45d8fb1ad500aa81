"""One primary task, and secondary tasks that must not suffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gradbal.aggregators.base import GramianAggregator, in_range, integer, solve_active
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, least_norm_above

__all__ = ["Primary", "primary"]


@register(
    "primary",
    title="多任务学习漫谈（三）：分主次之序",
    venue="kexue.fm",
    year=2022,
    url="https://kexue.fm/archives/8907",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0 + a.secondary_weight * (t - 1),
        non_conflicting=True,
        permutation_invariant=False,
    ),
)
class Primary(GramianAggregator):
    """Descends on one primary loss as long as no secondary loss rises for it.

    Su, "多任务学习漫谈（三）：分主次之序" (Notes on multi-task learning, 3: primary and secondary),
    2022, https://kexue.fm/archives/8907. d is the nearest direction to the primary gradient g_0
    among those with `⟨d, g_i⟩ ≥ 0` for the secondary ones: `d = g_0 + Σ λ_i g_i`, `λ ≥ 0` of least
    norm |d|. `⟨d, g_0⟩ = |d|² ≥ 0` as well, and scaling a secondary loss changes nothing.

    Args:
        primary: index of the primary task, in the order in which the losses come.
        secondary_weight: β ≥ 0; the projection starts from `g_0 + β Σ g_i`. 0 as in the source.

    Raises:
        ValueError: an argument out of range, or no task with the index `primary`.

    Note:
        With a single secondary task this is the projection of A-GEM (Chaudhry et al., ICLR 2019).
        Where the primary task sits a step out, its gradient counts as zero.

    Example:
        >>> import torch
        >>> Primary().direction(torch.tensor([[1.0, 0.0], [-2.0, 2.0]]))
        tensor([0.5000, 0.5000])
    """

    per_task_state = True

    def __init__(self, primary: int = 0, secondary_weight: float = 0.0) -> None:
        integer("primary", primary)
        in_range("secondary_weight", secondary_weight, 0)
        self.primary = primary
        self.secondary_weight = secondary_weight

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there is a task `primary`.

        Raises:
            ValueError: there is not.
        """
        if self.primary >= n_tasks:
            raise ValueError(
                f"`primary` must be the index of one of {n_tasks} tasks, found {self.primary}"
            )

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`.

        Args:
            gramian: `[T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: there is no task `primary`.
        """
        if tasks is None:
            self.prepare(len(gramian), gramian)
            tasks = range(len(gramian))
        start = [1.0 if i == self.primary else float(self.secondary_weight) for i in tasks]
        return primary(gramian, np.asarray(start), np.asarray(tasks) != self.primary)


def primary(gramian: Tensor, start: Array, secondary: Array) -> Tensor:
    """`w = argmin {wᵀGw : w ≥ u}`, with `w_i = u_i` for a task that is not secondary.

    Args:
        gramian: `[T, T]`.
        start: `u [T]`: 1 for the primary task, β for the others.
        secondary: `[T]`, booleans.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1 everywhere if all are zero.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        n = n / n.max()
        u = start[active] * n
        free = np.flatnonzero(secondary[active])
        v = checked(least_norm_above(c, u, free), "the projection of the primary gradient")
        return np.where(v > u, v / n, start[active])

    return solve_active(gramian, 1.0, solve)
