"""Multiple-gradient descent: the point of least norm in the convex hull of the gradients."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gradbal.aggregators.base import (
    GramianAggregator,
    as_weights,
    one_of,
    solve_active,
    symmetric_float64,
)
from gradbal.registry import Promises, register
from gradbal.solvers import ZERO_ROW, Array, Indices, checked, least_norm

__all__ = ["MGDA", "mgda"]


@register(
    "mgda",
    title="Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
    venue="Comptes Rendus Mathématique",
    year=2012,
    url="https://arxiv.org/abs/1810.04650",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: 1.0,
        non_conflicting=True,
        simplex=True,
    ),
)
class MGDA(GramianAggregator):
    """The convex combination of the gradients that has the least norm.

    Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes
    Rendus Mathématique 2012, https://doi.org/10.1016/j.crma.2012.03.014; for deep networks Sener
    and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
    https://arxiv.org/abs/1810.04650. `w = argmin wᵀGw` over the probability simplex, `d = Jᵀw`.
    `⟨d, g_i⟩ ≥ |d|²` for every task, and `d = 0` exactly at Pareto-stationary points.

    Args:
        norm: what a row is divided by before solving: "none", "l2" (its norm), "loss" (its loss) or
            "loss+" (both). Only the weights see it: d combines the gradients as they are.
        ignore_zero_rows: leave out tasks whose gradient is zero. A zero row makes the point Pareto
            stationary, so the exact answer is `d = 0`, and training stops as soon as one task is at
            its own optimum.

    Raises:
        ValueError: an unknown `norm`.

    Note:
        Known implementations run Frank-Wolfe for a fixed number of steps; this one solves the
        quadratic program to its optimality conditions.

    Example:
        >>> import torch
        >>> MGDA().direction(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.4000, 0.8000])
    """

    def __init__(self, norm: str = "none", ignore_zero_rows: bool = False) -> None:
        one_of("norm", norm, ("none", "l2", "loss", "loss+"))
        one_of("ignore_zero_rows", ignore_zero_rows, (False, True))
        self.norm = norm
        self.ignore_zero_rows = ignore_zero_rows

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` on the simplex, from the Gramian `[T, T]`.

        Raises:
            ValueError: `norm` needs losses and there are none, or one is not positive.
        """
        divisors = None
        if self.norm in ("loss", "loss+"):
            if losses is None:
                raise ValueError(f"MGDA with norm={self.norm!r} needs the losses, found None")
            divisors = losses.detach().to("cpu").double().numpy()
            if not (divisors > 0).all():
                raise ValueError(
                    f"MGDA with norm={self.norm!r} needs positive losses, found "
                    f"{divisors.tolist()}; add an offset or use norm='l2'"
                )
        return mgda(
            gramian,
            unit_rows=self.norm in ("l2", "loss+"),
            divisors=divisors,
            ignore_zero_rows=self.ignore_zero_rows,
        )


def mgda(
    gramian: Tensor,
    *,
    unit_rows: bool = False,
    divisors: Array | None = None,
    ignore_zero_rows: bool = False,
) -> Tensor:
    """`argmin wᵀGw` over the probability simplex.

    Args:
        gramian: `[T, T]`.
        unit_rows: divide each row by its norm first.
        divisors: `[T]`, positive: divide each row by these first.
        ignore_zero_rows: give zero rows no weight, rather than all of it.

    Returns:
        `w [T]`, dtype and device of the Gramian.
    """
    g = symmetric_float64(gramian)
    size = len(g)
    zero_rows = np.flatnonzero(np.diagonal(g) <= 0.0)
    if len(zero_rows) and not ignore_zero_rows:
        w = np.zeros(size)
        w[zero_rows] = 1.0 / len(zero_rows)
        return as_weights(w, gramian)

    def solve(c: Array, n: Array, active: Indices) -> Array:
        lengths = np.ones_like(n) if unit_rows else n / n.min()
        if divisors is not None:
            lengths = lengths / (divisors[active] / divisors[active].min())
        # y_i = lengths_i w_i; the constraint Σ w_i = 1 becomes aᵀy = 1 with a = 1/lengths.
        a = 1.0 / lengths
        y = checked(least_norm(c, a), "MGDA's quadratic program")
        w = a * y
        return np.asarray(w / w.sum())

    # However small a row is, the answer hangs on it: only ignoring it needs a threshold.
    zero = ZERO_ROW if ignore_zero_rows else 0.0
    return solve_active(gramian, 1.0 / size, solve, zero)
