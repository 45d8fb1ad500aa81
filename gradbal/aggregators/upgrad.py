"""Unconflicting projection of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators._mixins import PreferenceMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, nonnegative_qps

__all__ = ["UPGrad", "upgrad"]


@register(
    "upgrad",
    title="Jacobian Descent for Multi-Objective Optimization",
    venue="arXiv",
    year=2024,
    url="https://arxiv.org/abs/2406.16232",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0 if a.pref is None else float(sum(a.pref)),
        non_conflicting=True,
        linear_row_scaling=True,
    ),
)
class UPGrad(PreferenceMixin, GramianAggregator):
    """Projects each gradient on the dual cone of all of them, and averages.

    Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
    https://arxiv.org/abs/2406.16232. `d = Σ p_i π(g_i)`, where π is the projection on
    `{x : Jx ≥ 0}`, the directions that conflict with no task. Each projection is
    `Jᵀv` with `v = argmin {vᵀGv : v ≥ e_i}`. The only method here that never conflicts, is linear
    under scaling of the losses, and is a weighted combination of the gradients.

    Args:
        pref: p, non-negative, one entry for each task; None is 1/T each.

    Raises:
        ValueError: `pref` has a negative entry, or not one for each task.

    Note:
        TorchJD and LibMTL add 1e-4 to the diagonal of the trace-normalised Gramian, which leaves
        conflicts of that order, larger ones with small rows, and take a Gramian of trace below 1e-4
        for zero, where d becomes the plain mean and conflicts appear. In gradbal nothing is added
        and nothing is absolute.

    Example:
        >>> import torch
        >>> UPGrad().direction(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """

    def __init__(self, pref: Sequence[float] | None = None) -> None:
        self._prefer(pref)

    def combination(self, gramian: Tensor, pref: Array) -> Tensor:
        """`w [T]`, `w ≥ p`, from the Gramian `[T, T]` and `p [T]`."""
        return upgrad(gramian, pref)


def upgrad(gramian: Tensor, pref: Array) -> Tensor:
    """`w = Σ p_i argmin {vᵀGv : v ≥ e_i}`.

    Args:
        gramian: `[T, T]`.
        pref: `p [T]`, non-negative.

    Returns:
        `w [T]`, dtype and device of the Gramian.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        # In units of the row norms the problem for each task does not depend on any norm.
        shares = pref[active] * n
        conflicted = np.flatnonzero((shares > 0) & (c < 0).any(0))
        total = shares.copy()
        if len(conflicted):
            found = checked(nonnegative_qps(c, -c[:, conflicted]), "UPGrad's projection")
            total += found @ shares[conflicted]
        return np.asarray(total / n)

    def pair(c: float, n: float, m: float) -> tuple[float, float]:
        # Where they conflict, each is moved by the other until they are at a right angle.
        conflict, (p, q) = max(-c, 0.0), pref.tolist()
        return p + conflict * q * m / n, q + conflict * p * n / m

    return solve_active(gramian, 1.0 / len(gramian), solve, pair=pair)
