"""Multiple-gradient descent: the point of least norm in the convex hull of the gradients."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import ZERO_ROW, Array, Indices, checked, least_norm

__all__ = ["MGDA", "mgda"]

_SOLVERS = ("exact", "frank_wolfe")


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
        solver: "exact" solves the quadratic program to its optimality conditions; "frank_wolfe" is
            Sener and Koltun's algorithm from `w = 1/T` on, which stops early: near the exact w it
            zigzags. It gives what it has, without a warning, and d may then conflict.
        max_iter: Frank-Wolfe's iterations at most, 250 in the official code. Not for "exact".
        tol: Frank-Wolfe ends when a step, the part of w that moves, is below it; 1e-3 in the
            official code. Not for "exact".

    Raises:
        TypeError: `max_iter` is not an integer.
        ValueError: an unknown `norm` or `solver`, or an argument out of range.

    Note:
        The paper's code and TorchJD stop Frank-Wolfe after at most 250 and 100 steps. LibMTL bounds
        the weights of a pair by 0.001 and 0.999, so that a dominated task still counts, combines
        the normalised gradients under `norm`, leaves task-specific gradients unweighted, fails for
        a single task, and gives NaN for a zero row under "l2". nash-mtl multiplies d by T, and its
        solver may never end. gradbal solves the quadratic program to its optimality conditions,
        or runs Frank-Wolfe with exact steps in [0, 1]; as in the official code, `norm` is for the
        weights alone.

    Example:
        >>> import torch
        >>> MGDA().direction(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.4000, 0.8000])
    """

    def __init__(
        self,
        norm: str = "none",
        ignore_zero_rows: bool = False,
        solver: str = "exact",
        max_iter: int = 250,
        tol: float = 1e-3,
    ) -> None:
        one_of("norm", norm, ("none", "l2", "loss", "loss+"))
        one_of("ignore_zero_rows", ignore_zero_rows, (False, True))
        one_of("solver", solver, _SOLVERS)
        if isinstance(max_iter, bool) or not isinstance(max_iter, int):
            raise TypeError(f"`max_iter` must be an integer, found {max_iter!r}")
        in_range("max_iter", max_iter, 1)
        in_range("tol", tol, 0, 1)
        self.norm = norm
        self.ignore_zero_rows = ignore_zero_rows
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol

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
            solver=self.solver,
            max_iter=self.max_iter,
            tol=self.tol,
        )


def mgda(
    gramian: Tensor,
    *,
    unit_rows: bool = False,
    divisors: Array | None = None,
    ignore_zero_rows: bool = False,
    solver: str = "exact",
    max_iter: int = 250,
    tol: float = 1e-3,
) -> Tensor:
    """`argmin wᵀGw` over the probability simplex.

    Args:
        gramian: `[T, T]`.
        unit_rows: divide each row by its norm first.
        divisors: `[T]`, positive: divide each row by these first.
        ignore_zero_rows: give zero rows no weight, rather than all of it.
        solver, max_iter, tol: see `MGDA`.

    Returns:
        `w [T]`, dtype and device of the Gramian.
    """
    size = len(gramian)
    stationary = False

    def solve(c: Array, n: Array, active: Indices) -> Array:
        nonlocal stationary
        if len(active) < size and not ignore_zero_rows:
            stationary = True
            return np.zeros_like(n)
        lengths = np.ones(len(n)) if unit_rows else n / n.min()
        if divisors is not None:
            lengths = lengths / (divisors[active] / divisors[active].min())
        if solver == "frank_wolfe":
            lengths = lengths / lengths.max()
            return _frank_wolfe(lengths[:, None] * c * lengths, max_iter, tol)
        # y_i = lengths_i w_i; the constraint Σ w_i = 1 becomes aᵀy = 1 with a = 1/lengths.
        a = 1.0 / lengths
        y = checked(least_norm(c, a), "MGDA's quadratic program")
        w = a * y
        return np.asarray(w / w.sum())

    def pair(c: float, n: float, m: float) -> tuple[float, float] | None:
        # a as above, times any number; y is (a_1 - c a_2, a_2 - c a_1) where both are positive.
        a, b = (1.0, 1.0) if unit_rows else (min(1.0, m / n), min(1.0, n / m))
        if divisors is not None:
            largest = float(divisors.max())
            a, b = a * float(divisors[0]) / largest, b * float(divisors[1]) / largest
        v, w = a * max(a - c * b, 0.0), b * max(b - c * a, 0.0)
        total = v + w
        return (v / total, w / total) if total > 0.0 else None

    # However small a row is, the answer hangs on it: only ignoring it needs a threshold.
    zero = ZERO_ROW if ignore_zero_rows else 0.0
    closed_form = pair if solver == "exact" else None
    w = solve_active(gramian, 1.0 / size, solve, zero, closed_form)
    if not stationary:
        return w
    zero_rows = gramian.diagonal() <= 0.0
    return zero_rows.to(w) / zero_rows.sum()


def _frank_wolfe(g: Array, max_iter: int, tol: float) -> Array:
    """Steps towards the vertex of steepest descent, each to the least `wᵀGw` on its way."""
    size = len(g)
    w = np.full(size, 1.0 / size)
    gains = g @ w
    for _ in range(max_iter):
        t = int(gains.argmin())
        # The least of |(1 − step)·d + step·g_t|²: by how much the product of d and g_t is below
        # the square of the one, and of the other.
        below, above = float(w @ gains - gains[t]), float(g[t, t] - gains[t])
        if below <= 0.0:
            break
        step = below / (below + above) if above > 0.0 else 1.0
        w *= 1.0 - step
        w[t] += step
        gains = (1.0 - step) * gains + step * g[t]
        if step < tol:
            break
    return w
