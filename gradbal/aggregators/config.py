"""Conflict-free training by equal angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of, preference
from gradbal.aggregators._gramians import relative_cutoff, solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, pinv_times

__all__ = ["ConFIG", "config"]

_LENGTHS = ("projection", "norm of mean")


def _gain(aggregator: ConFIG, n_tasks: int, norm: float) -> float:
    if isinstance(aggregator.length, str):
        return float(n_tasks) if aggregator.length == "projection" else 1.0
    return aggregator.length / norm


@register(
    "config",
    title="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    venue="ICLR",
    year=2025,
    url="https://arxiv.org/abs/2408.11104",
    promises=Promises(heads="own", degree=1, gain=_gain, continuous=False),
)
class ConFIG(GramianAggregator):
    """The direction at the same angle to all the gradients, as long as their projections on it.

    Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks", ICLR 2025, https://arxiv.org/abs/2408.11104. With the unit gradients `u_i = g_i/n_i`
    in the rows of U, `x = U⁺a/|U⁺a|` has `⟨x, u_i⟩` proportional to `a_i`; `d = Lx`,
    `L = Σ ⟨g_i, x⟩`. In terms of the cosine matrix C: `y = C⁺a`, `w = L N⁻¹y/√(yᵀCy)`. Where J has
    full row rank d conflicts with no task, and its direction does not depend on the scale of any
    loss. Else x is a least-squares solution, and d may conflict.

    Args:
        a: positive, one entry for each task; None is ones, equal cosines.
        length: L: the sum of the "projection" of all gradients (the paper), the "norm of mean" of
            the gradients, or a positive number.

    Raises:
        ValueError: `a` is not positive, or has not one entry for each task; an unknown `length`.

    Note:
        The official code calls `lstsq`, whose driver on GPUs assumes full rank; TorchJD takes the
        pseudo-inverse of the unit rows. gradbal takes that of the cosine matrix, `[T, T]` and of
        any rank. The variant with separate momenta, M-ConFIG, is a method of its own.

    Example:
        >>> import torch
        >>> ConFIG().direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([2., 2.])
    """

    per_task_state = True

    def __init__(
        self, a: Sequence[float] | None = None, length: str | float = "projection"
    ) -> None:
        if a is not None:
            a = preference("a", a, None, 1.0).tolist()
            if not all(x > 0 for x in a):
                raise ValueError(f"`a` must be positive, found {a}")
        if isinstance(length, str):
            one_of("length", length, _LENGTHS)
        else:
            in_range("length", length, 0, bounds="(]")
        self.a = a
        self.length = length

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that `a` has T entries.

        Raises:
            ValueError: it has not.
        """
        preference("a", self.a, n_tasks, 1.0)

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
        """
        a: Any = self.a
        if a is not None and tasks is not None:
            a = [a[i] for i in tasks]
        return config(gramian, preference("a", a, len(gramian), 1.0), length=self.length)


def config(gramian: Tensor, a: Array, *, length: str | float = "projection") -> Tensor:
    """`w = L N⁻¹y/√(yᵀCy)`, `y = C⁺a`.

    Eigenvalues of the cosine matrix up to 1e-12 of the largest count as zero, up to `10·T·eps` for
    a Gramian that is not in float64.

    Args:
        gramian: `[T, T]`.
        a: `[T]`, positive.
        length: see `ConFIG`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows and where no direction has
        the wanted angles at all (opposite rows), 1 everywhere if all rows are zero.
    """
    rtol = relative_cutoff(gramian)

    def solve(c: Array, n: Array, active: Indices) -> Array:
        target = a[active]
        y = pinv_times(c, target, rtol)
        # C C⁺ a is what the range of C has of a; nothing for opposite rows.
        reached = c @ y
        # yᵀCy = aᵀC⁺a, of which the right side has the smaller rounding errors.
        square = float(y @ target)
        if square <= 0.0 or reached @ reached <= (100 * rtol) ** 2 * (target @ target):
            return np.zeros_like(n)
        size = math.sqrt(square)
        if length == "projection":
            total = float(n @ reached) / size
        elif isinstance(length, str):
            total = math.sqrt(max(float(n @ c @ n), 0.0)) / len(gramian)
        else:
            total = length
        return np.asarray(total / size * y / n)

    return solve_active(gramian, 1.0, solve)
