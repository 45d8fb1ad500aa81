"""The small convex problems behind the aggregators: `[T, T]` matrices, float64, on the host.

Every problem is posed on the cosine matrix `C = N⁻¹ G N⁻¹` (`N = diag(n)`, `n_i = √G_ii`), whose
diagonal is one, so that neither the scale of the whole Gramian nor a spread of the row norms costs
accuracy, and no threshold is absolute. A solver returns a `Solution` with the residual that it
reached; `checked` warns when that is worse than `RESIDUAL`.

NumPy is used because at these sizes (T up to about 100) a call costs a fifth of torch's.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RESIDUAL",
    "Solution",
    "SolverWarning",
    "barrier_newton",
    "checked",
    "cosine_matrix",
    "fair_newton",
    "graded_eigh",
    "least_norm_above",
    "nonnegative_qp",
    "nonnegative_qps",
    "positive_part",
    "project_simplex",
    "simplex_qp",
    "symmetric_pinv",
    "without_ridge",
]

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

RESIDUAL = 1e-8
"""Relative residual of the optimality conditions that every solve has to reach."""

ZERO_ROW = 1e-12
"""A row whose norm is at most this part of the largest is taken as zero: its task is inactive."""

_EPS = float(np.finfo(np.float64).eps)
_RIDGE = 1e-13


class SolverWarning(RuntimeWarning):
    """A small problem was not solved to `RESIDUAL`; the message has the numbers."""


class Solution(NamedTuple):
    """What a solver returns.

    x: the minimiser, `[T]`. residual: relative violation of the optimality conditions.
    iterations: how many linear systems were solved.
    """

    x: Array
    residual: float
    iterations: int


def checked(solution: Solution, problem: str) -> Array:
    """The solution's `x`; warns if its residual is above `RESIDUAL` (the best iterate is used)."""
    if not solution.residual <= RESIDUAL:
        warnings.warn(
            f"{problem}: residual {solution.residual:.1e} after {solution.iterations} iterations, "
            f"wanted {RESIDUAL:.0e}; the best iterate is used",
            SolverWarning,
            stacklevel=3,
        )
    return solution.x


def cosine_matrix(gramian: Array, zero: float = ZERO_ROW) -> tuple[Array, Array, Indices]:
    """Cosines and norms of the rows that are not zero.

    Args:
        gramian: `[T, T]`, positive semi-definite.
        zero: a row whose norm is at most this part of the largest is taken as zero.

    Returns:
        `C [k, k]`, `n [k]` and the indices `[k]` of the k active rows.
    """
    norms = np.sqrt(np.maximum(np.diagonal(gramian), 0.0))
    largest = norms.max(initial=0.0)
    active = np.flatnonzero(norms > zero * largest)
    n = norms[active]
    c: Array = gramian[np.ix_(active, active)] / n[:, None] / n
    c = 0.5 * (c + c.T)
    np.fill_diagonal(c, 1.0)
    return c, n, active


def positive_part(c: Array) -> Array:
    """`c` without its negative eigenvalues, which only rounding can have put there."""
    values, vectors = np.linalg.eigh(c)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)


def _solve(matrix: Array, rhs: Array) -> Array:
    """A symmetric system whose matrix may be singular but is consistent: ridge and refinement."""
    size = len(rhs)
    shifted = matrix.copy()
    shifted.flat[:: size + 1] += _RIDGE
    try:
        x = np.linalg.solve(shifted, rhs)
        for _ in range(2):
            x = x + np.linalg.solve(shifted, rhs - matrix @ x)
    except np.linalg.LinAlgError:
        x = np.linalg.lstsq(matrix, rhs, rcond=None)[0]
    return x


def _step_to_boundary(y: Array, s: Array) -> tuple[Array, NDArray[np.bool_]]:
    """From feasible `y` towards `s` until the first entry vanishes; which entries stay positive."""
    falling = s <= 0.0
    step = np.min(y[falling] / np.maximum(y[falling] - s[falling], np.finfo(float).tiny))
    moved = y + step * (s - y)
    keep = moved > _EPS * np.max(np.abs(moved), initial=0.0)
    first = np.flatnonzero(falling)[np.argmin(y[falling] / (y[falling] - s[falling]))]
    keep[first] = False
    return moved, keep


def nonnegative_qp(h: Array, b: Array, size_b: float = 0.0) -> Solution:
    """`argmin_{z ≥ 0} ½ zᵀHz − bᵀz` by Lawson and Hanson's active set.

    Args:
        h: `[T, T]`, positive semi-definite, unit diagonal; singular is allowed if `b` is in its
            range.
        b: `[T]`.
        size_b: of the terms that `b` was computed from, where they are larger than its entries.

    Returns:
        The minimiser and the largest of `max(r, 0)` and `|r_i| where z_i > 0`, `r = b − Hz`,
        relative to `Σ z + max |b|`, since entries of H and b are known to rounding of one.
    """
    size = len(b)
    z = np.zeros(size)
    passive: list[int] = []
    size_b = max(size_b, float(np.max(np.abs(b), initial=np.finfo(float).tiny)))
    iterations = 0
    for _ in range(10 * size + 100):
        r = b - h @ z
        noise = 8 * size * _EPS * (z.sum() + size_b)
        candidates = r - noise
        candidates[passive] = -np.inf
        j = int(np.argmax(candidates)) if size else -1
        if j < 0 or candidates[j] <= 0.0:
            break
        passive.append(j)
        while passive:
            p = np.asarray(passive)
            s = _solve(h[np.ix_(p, p)], b[p])
            iterations += 1
            if np.all(s > 0.0):
                z[:] = 0.0
                z[p] = s
                break
            moved, keep = _step_to_boundary(z[p], s)
            z[:] = 0.0
            z[p[keep]] = moved[keep]
            passive = [int(i) for i in p[keep]]
        if j not in passive and not np.any(b - h @ z - noise > 0):
            break
    r = b - h @ z
    violation = np.where(z > 0, np.abs(r), np.maximum(r, 0.0)) / (z.sum() + size_b)
    return Solution(z, float(violation.max(initial=0.0)), iterations)


def nonnegative_qps(h: Array, b: Array) -> Solution:
    """`argmin_{z ≥ 0} ½ zᵀHz − bᵀz` for every column of `b`, all together.

    Block principal pivoting (Kim and Park, "Fast Nonnegative Matrix Factorization: An
    Active-Set-Like Method and Comparisons", SIAM J. Sci. Comput. 2011,
    https://doi.org/10.1137/110821172): every entry on the wrong side changes sides at once, in all
    columns, which mostly ends after two or three rounds of one batched solve. Columns that do not
    settle, as with a singular `h`, go to `nonnegative_qp`.

    Args:
        h: as for `nonnegative_qp`.
        b: `[T, k]`.

    Returns:
        The minimisers `[T, k]` and the worst of their residuals.
    """
    size, columns = b.shape
    z = np.zeros((columns, size))
    rhs, open_ = b.T, np.arange(columns)
    passive = rhs > 0.0
    size_b = np.maximum(np.abs(rhs).max(1), np.finfo(float).tiny)
    identity = np.eye(size)
    worst, iterations = 0.0, 0
    for _ in range(8):
        iterations += 1
        p = passive[open_]
        matrices = np.where(p[:, :, None] & p[:, None, :], h, identity)
        try:
            s = np.linalg.solve(matrices, np.where(p, rhs[open_], 0.0)[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            break
        r = rhs[open_] - s @ h
        scale = (np.abs(s).sum(1) + size_b[open_])[:, None]
        wrong = np.where(p, s <= 0.0, r > 8 * size * _EPS * scale)
        violation = np.where(p, np.abs(r), np.maximum(r, 0.0)) / scale
        settled = ~wrong.any(1) & (violation.max(1) <= RESIDUAL * 1e-3)
        z[open_[settled]] = s[settled]
        worst = max(worst, float(violation[settled].max(initial=0.0)))
        passive[open_] = p ^ wrong
        open_ = open_[~settled]
        if not len(open_):
            break
    for i in open_:
        alone = nonnegative_qp(h, rhs[i])
        z[i], worst = alone.x, max(worst, alone.residual)
        iterations += alone.iterations
    return Solution(z.T, worst, iterations)


def least_norm_above(c: Array, u: Array, free: Indices | None = None) -> Solution:
    """`argmin {vᵀCv : v ≥ u}`: the projection of `Jᵀu` on the dual cone `{x : Jx ≥ 0}` is `Jᵀv`.

    Args:
        c: `[T, T]`, the cosine matrix.
        u: `[T]`, in units of the row norms.
        free: the rows that make up the cone; `v_i = u_i` for the others. None is all.

    Returns:
        The minimiser and the largest violation of `(Cv)_i ≥ 0`, `(v_i − u_i)(Cv)_i = 0`, relative
        to `Σ (v − u) + max |u|`.
    """
    size_u = float(np.abs(u).max(initial=0.0))
    if size_u == 0.0:
        return Solution(np.zeros_like(u), 0.0, 0)
    if free is None:
        free = np.arange(len(u))
    b = -(c @ (u / size_u))[free]
    # Cu may cancel: its entries are known to rounding of u's.
    solution = nonnegative_qp(c[np.ix_(free, free)], b, 1.0)
    v = u.copy()
    v[free] += size_u * solution.x
    return solution._replace(x=v)


def simplex_qp(h: Array, c: Array, a: Array) -> Solution:
    """`argmin ½ yᵀHy + cᵀy` over `{y ≥ 0, aᵀy = 1}` by a primal active set.

    Args:
        h: `[T, T]`, positive semi-definite, unit diagonal.
        c: `[T]`.
        a: `[T]`, positive.

    Returns:
        The minimiser and the largest violation of `ν = Hy + c − μa ≥ 0`, `ν_i y_i = 0`, relative
        to `Σ y + |c_i| + |μ|a_i`, since entries of H are known to rounding of one.
    """
    size = len(a)
    a_scale = float(a.max())
    # In units of the largest a: the bordered system below is then as well scaled as h.
    a = a / a_scale
    c = c * a_scale
    start = int(np.argmin(0.5 * np.diagonal(h) / a**2 + c / a))
    y = np.zeros(size)
    y[start] = 1.0 / a[start]
    passive = [start]
    iterations = 0

    def multipliers(y: Array, p: list[int]) -> tuple[Array, Array]:
        gradient = h @ y + c
        # μ by least squares on the passive set; exact there when y is optimal for it.
        mu = float(gradient[p] @ a[p]) / float(a[p] @ a[p])
        return gradient - mu * a, y.sum() + np.abs(c) + abs(mu) * a

    for _ in range(10 * size + 100):
        nu, scale = multipliers(y, passive)
        outside = nu + 8 * size * _EPS * scale
        outside[passive] = np.inf
        j = int(np.argmin(outside))
        if iterations and outside[j] >= 0.0:
            break
        entering = -1
        if outside[j] < 0.0:
            passive.append(j)
            entering = j
        while True:
            p = np.asarray(passive)
            k = len(p)
            bordered = np.zeros((k + 1, k + 1))
            bordered[:k, :k] = h[np.ix_(p, p)]
            bordered[:k, k] = bordered[k, :k] = a[p]
            rhs = np.concatenate([-c[p], [1.0]])
            s = _solve_bordered(bordered, rhs)[:k]
            iterations += 1
            if np.all(s > 0.0) or k == 1:
                y[:] = 0.0
                y[p] = s if k > 1 else 1.0 / a[p]
                break
            moved, keep = _step_to_boundary(y[p], s)
            y[:] = 0.0
            y[p[keep]] = moved[keep] / float(a[p[keep]] @ moved[keep])
            passive = [int(i) for i in p[keep]]
        if entering >= 0 and entering not in passive:
            # The entering direction brought nothing: what is left of ν is rounding.
            break
    nu, scale = multipliers(y, passive)
    violation = np.where(y > 0, np.abs(nu), np.maximum(-nu, 0.0)) / scale
    return Solution(y / a_scale, float(violation.max()), iterations)


def _solve_bordered(matrix: Array, rhs: Array) -> Array:
    """The KKT system of one active set; the ridge goes on the Hessian's diagonal alone."""
    size = len(rhs)
    shifted = matrix.copy()
    shifted.flat[: (size - 1) * size : size + 1] += _RIDGE
    try:
        x = np.linalg.solve(shifted, rhs)
        return x + np.linalg.solve(shifted, rhs - matrix @ x)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(matrix, rhs, rcond=None)[0], dtype=np.float64)


def barrier_newton(c: Array, ridge: float) -> Solution:
    """`argmin_{v > 0} ½ vᵀ(C + ridge·I)v − Σ log v_i`, i.e. `(Cv)_i v_i = 1`, by damped Newton.

    The function is self-concordant: with step `1/(1 + λ)` while the Newton decrement λ is at least
    ¼ and full steps after, it converges from `v = 1` without a line search.

    Args:
        c: `[T, T]` cosine matrix.
        ridge: keeps the minimiser finite where `C` is singular with a positive null vector.

    Returns:
        The minimiser and `max |v_i ((C + ridge·I)v)_i − 1|`, relative to the size of the terms.
    """
    size = len(c)
    h = c + ridge * np.eye(size)
    v = np.ones(size)
    iterations, previous = 0, np.inf
    for _ in range(500):
        gradient = h @ v - 1.0 / v
        # In the variables v_i x_i the Hessian is VHV + I: its eigenvalues are at least one.
        scaled = v[:, None] * h * v
        scaled.flat[:: size + 1] += 1.0
        rhs = v * gradient
        step = np.linalg.solve(scaled, rhs)
        iterations += 1
        decrement = math.sqrt(max(float(rhs @ step), 0.0))
        if decrement < 0.25:
            v = v * (1.0 - step)
        else:
            v = v * (1.0 - step / (1.0 + decrement))
            # The best multiple of v in closed form: near a singular point v has far to go.
            v *= math.sqrt(size / float(v @ h @ v))
        # Full steps square the decrement, until it is rounding, which does not shrink.
        if decrement < 1e-12 or (decrement < 0.25 and decrement > 0.5 * previous):
            break
        previous = decrement
    violation = np.abs(v * (h @ v) - 1.0) / np.maximum(v * v.sum(), 1.0)
    return Solution(v, float(violation.max()), iterations)


def without_ridge(c: Array, v: Array) -> Array:
    """A solution of `barrier_newton`, polished on the problem with no ridge where that has one.

    The ridge shifts `v_i (Cv)_i` by `ridge·v_i²`. Near a singular point the problem without ridge
    has no solution, or one far away: there `v` comes back as it is.
    """
    residual = float(np.max(np.abs(v * (c @ v) - 1.0)))
    for _ in range(3):
        if not 4 * _EPS < residual < 1e-3:
            break
        scaled = v[:, None] * c * v
        scaled.flat[:: len(v) + 1] += 1.0
        new = v * (1.0 - np.linalg.solve(scaled, v * (c @ v) - 1.0))
        new_residual = float(np.max(np.abs(new * (c @ new) - 1.0)))
        if new_residual >= residual or not (new > 0.0).all():
            break
        v, residual = new, new_residual
    return v


def fair_newton(c: Array, n: Array, alpha: float, ridge: float) -> Solution:
    """The `v = Nw > 0` with `n_i (Cv)_i = w_i^{−1/α}`, by damped Newton; C gets a ridge.

    v minimises the strictly convex `½vᵀCv − Σ φ(v_i/n_i)` with `φ'(t) = t^{−1/α}`. Everything is
    relative to v, from `v_i = n_i^{(1−α)/(1+α)}` on, the solution for orthogonal rows: a step is
    `v ← v(1 + step)`. At the end come steps on the problem with no ridge, where that has a solution
    nearby.

    Args:
        c: `[T, T]` cosine matrix.
        n: `[T]`, the row norms.
        alpha: in (0, 10].
        ridge: keeps the minimiser finite where `C` is singular with a positive null vector.

    Returns:
        v, and the largest violation of the equations, each relative to the size of its terms.
    """
    a = 1.0 - 1.0 / alpha
    # w is homogeneous in n, so the problem is solved with norms around one.
    unit = math.exp(float(np.log(n).mean()))
    log_n = np.log(n / unit)
    h = c + ridge * np.eye(len(c))

    def value(y: Array) -> float:
        v, log_w = np.exp(y), y - log_n
        utility = log_w if a == 0.0 else np.expm1(a * log_w) / a
        return 0.5 * float(v @ h @ v) - float(utility.sum())

    def newton(y: Array, h: Array) -> tuple[Array, Array]:
        """Gradient in y = log v, and Newton's step relative to v."""
        v, target = np.exp(y), np.exp(a * (y - log_n))
        gradient = v * (h @ v) - target
        m = v[:, None] * h * v
        m.flat[:: len(v) + 1] += target / alpha
        d = np.sqrt(np.diagonal(m))
        return gradient, -np.linalg.solve(m / d[:, None] / d, gradient / d) / d

    def violation(y: Array, h: Array) -> float:
        v, target = np.exp(y), np.exp(a * (y - log_n))
        return float(np.max(np.abs(v * (h @ v) - target) / np.maximum(v * v.sum(), target)))

    y = (1.0 - alpha) / (1.0 + alpha) * log_n
    iterations, previous = 0, np.inf
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(500):
            # The best multiple of v in closed form: near a singular point v has far to go.
            v = np.exp(y)
            total = float(np.exp(a * (y - log_n)).sum())
            y = y + math.log(total / float(v @ h @ v)) / (1.0 + 1.0 / alpha)
            gradient, step = newton(y, h)
            iterations += 1
            size = float(np.abs(step).max())
            # Full steps square it, until it is rounding, which does not shrink.
            if size < 1e-13 or (size < 1e-3 and size > 0.5 * previous):
                break
            previous = size
            if size > 1e-3:
                step *= min(1.0, 0.95 / max(-float(step.min()), 0.5))
                slope = float(gradient @ step)
                # vᵀCv is a sum of terms that may cancel: below their rounding nothing is refused.
                here = value(y) + 8 * _EPS * float(np.exp(y).sum()) ** 2
                while not value(y + np.log1p(step)) <= here + 1e-4 * slope:
                    step, slope = 0.5 * step, 0.5 * slope
                    if np.abs(step).max() < 1e-6:
                        break
            y = y + np.log1p(step)
    residual = violation(y, h)
    for _ in range(3):
        try:
            step = newton(y, c)[1]
        except np.linalg.LinAlgError:
            break
        # A long step says that without ridge the solution is elsewhere, or nowhere.
        if not np.abs(step).max() < 1e-3 or violation(y + step, c) >= violation(y, c):
            break
        y = y + np.log1p(step)
        residual = violation(y, c)
    return Solution(np.exp(y) * unit ** ((1.0 - alpha) / (1.0 + alpha)), residual, iterations)


def symmetric_pinv(c: Array, rtol: float) -> Array:
    """Pseudo-inverse of a positive semi-definite matrix; eigenvalues ≤ rtol·λ_max are dropped."""
    values, vectors = np.linalg.eigh(c)
    keep = values > rtol * values[-1]
    kept = vectors[:, keep]
    return (kept / values[keep]) @ kept.T  # type: ignore[no-any-return]


def graded_eigh(c: Array, n: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of `NCN`, the small as accurate as the large.

    LAPACK's are accurate relative to the largest eigenvalue, which at norms 1e6 apart leaves the
    small ones four digits. Jacobi's rotations of the rows of a factor `NX`, `XXᵀ = C`, keep what C
    has (Demmel and Veselić, "Jacobi's method is more accurate than QR", 1992). In every round the
    rows are paired off, and all pairs are turned at once. Norms within a factor of ten are left to
    LAPACK, which is faster.

    Args:
        c: `[T, T]`, the cosine matrix.
        n: `[T]`, the row norms.

    Returns:
        Eigenvalues `[T]`, in no order and not negative, and eigenvectors in the columns, `[T, T]`.
    """
    size = len(n)
    if n.min() > 0.1 * n.max():
        values, vectors = np.linalg.eigh(n[:, None] * c * n)
        return np.maximum(values, 0.0), vectors
    values, vectors = np.linalg.eigh(c)
    # Rows of `f` become orthogonal, those of `turned` are the rotations' product.
    unit = float(n.max())
    f = (n / unit)[:, None] * vectors * np.sqrt(np.maximum(values, 0.0))
    f, turned = np.append(f, np.zeros((size % 2, size)), 0), np.eye(size + size % 2)
    order = np.arange(len(f))
    half = len(f) // 2
    tolerance = 4 * size * _EPS
    for _ in range(60):
        largest = 0.0
        for _ in range(len(f) - 1):
            p, q = order[:half], order[: half - 1 : -1]
            a, b = (f[p] ** 2).sum(1), (f[q] ** 2).sum(1)
            product = (f[p] * f[q]).sum(1)
            length = np.sqrt(a) * np.sqrt(b)
            # What two rows of an exact zero have left is far below 1e-100 of the largest.
            turn = np.abs(product) > np.maximum(tolerance * length, 1e-100)
            largest = max(largest, float(np.max(np.abs(product[turn]) / length[turn], initial=0.0)))
            if turn.any():
                p, q = p[turn], q[turn]
                zeta = (b - a)[turn] / (2.0 * product[turn])
                t = np.where(zeta < 0, -1.0, 1.0) / (np.abs(zeta) + np.hypot(1.0, zeta))
                cosine = (1.0 / np.hypot(1.0, t))[:, None]
                sine = t[:, None] * cosine
                for m in (f, turned):
                    m[p], m[q] = cosine * m[p] - sine * m[q], sine * m[p] + cosine * m[q]
            order[1:] = np.roll(order[1:], 1)
        if largest == 0.0:
            break
    return unit**2 * (f[:size] ** 2).sum(1), turned[:size, :size].T


def project_simplex(v: Array) -> Array:
    """The nearest point to `v` with non-negative entries that sum to one.

    Args:
        v: `[T]`, finite, of any size: a constant added to all entries changes nothing.

    Returns:
        `max(v − θ, 0) [T]`.
    """
    # Relative to the largest entry, θ is in [−1, 0): what stays positive is known to rounding of 1.
    shifted = v - v.max()
    descending = np.sort(shifted)[::-1]
    thetas = (np.cumsum(descending) - 1.0) / np.arange(1, len(v) + 1)
    theta = thetas[np.flatnonzero(descending > thetas)[-1]]
    return np.asarray(np.maximum(shifted - theta, 0.0))
