"""One primary task, and secondary tasks that must not suffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer, one_of, same_tasks
from gradbal.aggregators._gramians import as_weights, solve_active, symmetric_float64
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, cosine_matrix, least_norm_above

__all__ = ["Primary", "primary", "primary_step"]

Flags = NDArray[np.bool_]


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

    The iterative mode solves nothing. It keeps `ν_i = λ_i|g_i|/|g_0|`, from ν = 0 on, and takes one
    projected-gradient step on ½|d|² at each training step:
    `ν_i ← max(0, ν_i − η/L ⟨d, g_i⟩/(|g_i||g_0|))`, where L is the largest eigenvalue of the
    secondary tasks' cosine matrix; the new ν makes the d that is used. On fixed gradients it
    converges to the exact d for every η below 2; with one secondary task and η = 1 it is there
    after one step. Until then `⟨d, g_i⟩ ≥ 0` may fail.

    Args:
        primary: index of the primary task, in the order in which the losses come.
        secondary_weight: β ≥ 0; the projection starts from `g_0 + β Σ g_i`. 0 as in the source.
        mode: "exact", or "iterative".
        lr: η in (0, 2), for the iterative mode.

    Raises:
        ValueError: an argument out of range, no task with the index `primary`, or another number of
            tasks than ν was kept for.

    Note:
        With a single secondary task the exact mode is the projection of A-GEM (Chaudhry et al.,
        ICLR 2019). Where the primary task sits a step out, its gradient counts as zero, and ν stays
        as it is. `λ ← max(0, λ − η(Gλ + G_{:,0}))`, the same iteration on λ itself, diverges or
        stands still when the losses are scaled, and a batch with a small g_i leaves a λ_i that is
        far too large for the next one. ν has no scale.

    Example:
        >>> import torch
        >>> Primary().direction(torch.tensor([[1.0, 0.0], [-2.0, 2.0]]))
        tensor([0.5000, 0.5000])
    """

    per_task_state = True
    state_names = ("multipliers",)

    def __init__(
        self,
        primary: int = 0,
        secondary_weight: float = 0.0,
        mode: str = "exact",
        lr: float = 1.0,
    ) -> None:
        integer("primary", primary)
        in_range("secondary_weight", secondary_weight, 0)
        one_of("mode", mode, ("exact", "iterative"))
        in_range("lr", lr, 0, 2, bounds="()")
        self.primary = primary
        self.secondary_weight = secondary_weight
        self.mode = mode
        self.lr = lr
        # ν [T], float64 on the host, 0 for the primary task; from the first iterative step on.
        self.multipliers: Tensor | None = None
        self._n_tasks = 0

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there is a task `primary`, and as many as ν was kept for.

        Raises:
            ValueError: there is not, or there are not.
        """
        if self.multipliers is not None:
            same_tasks(self.name, len(self.multipliers), n_tasks)
        if self.primary >= n_tasks:
            raise ValueError(
                f"`primary` must be the index of one of {n_tasks} tasks, found {self.primary}"
            )
        self._n_tasks = n_tasks

    def reset(self) -> None:
        """ν goes back to zero."""
        self.multipliers = None

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
        start = np.full(len(gramian), float(self.secondary_weight))
        secondary = np.asarray(tasks) != self.primary
        start[~secondary] = 1.0
        if self.mode == "exact":
            return primary(gramian, start, secondary)
        kept = self.multipliers
        nu = np.zeros(self._n_tasks) if kept is None else kept.cpu().numpy().copy()
        chosen = list(tasks)
        w, nu[chosen] = primary_step(gramian, start, secondary, nu[chosen], lr=self.lr)
        self.multipliers = torch.from_numpy(nu)
        return w


def primary(gramian: Tensor, start: Array, secondary: Flags) -> Tensor:
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


def primary_step(
    gramian: Tensor, start: Array, secondary: Flags, multipliers: Array, *, lr: float
) -> tuple[Tensor, Array]:
    """One projected-gradient step on ν, and the weights with it.

    `ν_i ← max(0, ν_i − η/L ⟨d, g_i⟩/(|g_i||g_0|))` with the d of the old ν; then
    `w_i = u_i + ν_i|g_0|/|g_i|`.

    Args:
        gramian: `[T, T]`.
        start: `u [T]`: 1 for the primary task, β for the others.
        secondary: `[T]`, booleans.
        multipliers: `ν [T]`, non-negative, 0 for a task that is not secondary.
        lr: η in (0, 2).

    Returns:
        `w [T]` and the new `ν [T]`. w has the Gramian's dtype and device, and is zero for zero
        rows. Where the primary row is zero or missing ν is the old one, and w that of `primary`.
    """
    c, n, active = cosine_matrix(symmetric_float64(gramian))
    is_free = secondary[active]
    if is_free.all():
        return primary(gramian, start, secondary), multipliers
    free, tasks = np.flatnonzero(is_free), active[is_free]
    ratio = n / n[~is_free]
    nu, w = multipliers.copy(), np.zeros(len(start))
    if len(free):
        largest = np.linalg.eigvalsh(c[np.ix_(free, free)])[-1]
        gains = c[free] @ (ratio * start[active] + nu[active])
        nu[tasks] = np.maximum(nu[tasks] - lr / largest * gains, 0.0)
    w[active] = start[active] + nu[active] / ratio
    return as_weights(w, gramian), nu
