"""The aggregators' convex problems, stated as their papers do and given to cvxpy in float64."""

from __future__ import annotations

import cvxpy
import numpy as np


def least_norm(j: np.ndarray) -> np.ndarray:
    """The point of least norm in the convex hull of the rows of J, `[P]`."""
    w = cvxpy.Variable(len(j))
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(j.T @ w)), [w >= 0, cvxpy.sum(w) == 1])
    _solve(problem)
    return w.value @ j


def project_on_dual_cone(j: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The nearest point to `x [P]` among those with `Jd ≥ 0`."""
    d = cvxpy.Variable(len(x))
    # Rows of unit length: the same cone, and one the solver's tolerances suit.
    units = j / np.linalg.norm(j, axis=1, keepdims=True)
    _solve(cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(d - x)), [units @ d >= 0]))
    return d.value


def best_worst_gain(j: np.ndarray, c: float) -> float:
    """`max min_i ⟨d, g_i⟩` over the ball of radius `c|g_0|` around the mean g_0."""
    mean = j.mean(0)
    d, gain = cvxpy.Variable(len(mean)), cvxpy.Variable()
    ball = cvxpy.norm(d - mean) <= c * np.linalg.norm(mean)
    _solve(cvxpy.Problem(cvxpy.Maximize(gain), [ball, j @ d >= gain]))
    return float(gain.value)


def bargain(j: np.ndarray) -> np.ndarray:
    """The d of norm √T that maximises `Σ log ⟨d, g_i⟩`, `[P]`."""
    d = cvxpy.Variable(j.shape[1])
    problem = cvxpy.Problem(
        cvxpy.Maximize(cvxpy.sum(cvxpy.log(j @ d))), [cvxpy.norm(d) <= np.sqrt(len(j))]
    )
    _solve(problem)
    return d.value


def fair(j: np.ndarray, alpha: float) -> np.ndarray:
    """The d that minimises `½|d|² − Σ u(⟨d, g_i⟩)`, `u'(t) = t^{−α}`, `[P]`."""
    d = cvxpy.Variable(j.shape[1])
    gains = j @ d
    if alpha == 1:
        utility = cvxpy.sum(cvxpy.log(gains))
    else:
        utility = cvxpy.sum(cvxpy.power(gains, 1 - alpha, approx=False)) / (1 - alpha)
    _solve(cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(d) - utility)))
    return d.value


def _solve(problem: cvxpy.Problem) -> None:
    problem.solve(
        solver=cvxpy.CLARABEL,
        tol_gap_abs=1e-10,
        tol_gap_rel=1e-10,
        tol_feas=1e-10,
    )
    assert problem.status == "optimal"
