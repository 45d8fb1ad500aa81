"""The small convex problems behind the aggregators: `[T, T]` matrices, float64, on the host.

Every problem is posed on the cosine matrix `C = N⁻¹ G N⁻¹` (`N = diag(n)`, `n_i = √G_ii`), whose
diagonal is one, so that neither the scale of the whole Gramian nor a spread of the row norms costs
accuracy, and no threshold is absolute. A solver returns a `Solution` with the residual that it
reached; `checked` warns when that is worse than `RESIDUAL`.

NumPy is used because at these sizes (T up to about 100) a call costs a fifth of torch's.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RESIDUAL",
    "Solution",
    "SolverWarning",
    "active_rows",
    "checked",
    "cosine_matrix",
    "fair_newton",
    "graded_eigh",
    "least_norm",
    "least_norm_above",
    "nonnegative_qp",
    "nonnegative_qps",
    "pinv_times",
    "positive_part",
    "project_simplex",
    "simplex_qp",
]

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

RESIDUAL = 1e-8
"""Relative residual of the optimality conditions that every solve has to reach."""

ZERO_ROW = 1e-12
"""A row whose norm is at most this part of the largest is taken as zero: its task is inactive."""

_EPS = float(np.finfo(np.float64).eps)
_RIDGE = 1e-13
_MODERATE = 1e4
"""Where h is singular a far larger z than b may fulfil the conditions within its own rounding."""
_SHORT = 1e-3
"""A step of Newton's method, relative to where it starts, that nearly squares with the next."""


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


def active_rows(gramian: Array, zero: float = ZERO_ROW) -> tuple[Array, Indices]:
    """The norms `[T]` of all rows, and the indices of those that are not zero.

    Args:
        gramian: `[T, T]`.
        zero: a row whose norm is at most this part of the largest is taken as zero.
    """
    n = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    return n, (n > zero * n.max()).nonzero()[0]


def cosine_matrix(gramian: Array, zero: float = ZERO_ROW) -> tuple[Array, Array, Indices]:
    """Cosines and norms of the rows that are not zero.

    Args:
        gramian: `[T, T]`, symmetric, positive semi-definite.
        zero: a row whose norm is at most this part of the largest is taken as zero.

    Returns:
        `C [k, k]`, `n [k]` and the indices `[k]` of the k active rows.
    """
    n, active = active_rows(gramian, zero)
    if len(active) < len(n):
        gramian, n = gramian[np.ix_(active, active)], n[active]
    # A product of two norms leaves float64's range no earlier than the entry that it divides.
    c: Array = gramian / (n[:, None] * n)
    c.flat[:: len(n) + 1] = 1.0
    return c, n, active


def positive_part(c: Array) -> Array:
    """`c` without its negative eigenvalues, which only rounding can have put there."""
    with contextlib.suppress(np.linalg.LinAlgError):
        np.linalg.cholesky(c)  # a tenth of the work, and it ends only where there are none
        return c
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
    """`argmin_{z ≥ 0} ½ zᵀHz − bᵀz`.

    Block principal pivoting, as in `nonnegative_qps`, mostly ends after one to three solves; where
    it does not settle, as with a singular `h`, Lawson and Hanson's active set does.

    Args:
        h: `[T, T]`, positive semi-definite, unit diagonal; singular is allowed if `b` is in its
            range.
        b: `[T]`.
        size_b: of the terms that `b` was computed from, where they are larger than its entries.

    Returns:
        The minimiser and the largest of `max(r, 0)` and `|r_i| where z_i > 0`, `r = b − Hz`,
        relative to `Σ z + max |b|`, since entries of H and b are known to rounding of one.
    """
    size_b = max(size_b, float(np.abs(b).max(initial=np.finfo(float).tiny)))
    found = _block_pivoting(h, b, size_b)
    if found is not None and found.x.sum() <= _MODERATE * size_b:
        return found
    return _active_set(h, b, size_b)


def _block_pivoting(h: Array, b: Array, size_b: float) -> Solution | None:
    noise = 8 * len(b) * _EPS
    passive = b > 0.0
    for iterations in range(1, 9):
        p = np.flatnonzero(passive)
        z = np.zeros(len(b))
        try:
            if len(p) == len(b):
                z[:] = np.linalg.solve(h, b)
            elif len(p):
                z[p] = np.linalg.solve(h[np.ix_(p, p)], b[p])
        except np.linalg.LinAlgError:
            return None
        r = b - h @ z
        scale = float(np.abs(z).sum()) + size_b
        wrong = np.where(passive, z <= 0.0, r > noise * scale)
        if not wrong.any():
            violation = float(np.where(passive, np.abs(r), r).max(initial=0.0)) / scale
            return Solution(z, violation, iterations) if violation <= RESIDUAL * 1e-3 else None
        passive ^= wrong
    return None


def _active_set(h: Array, b: Array, size_b: float) -> Solution:
    size = len(b)
    z = np.zeros(size)
    passive: list[int] = []
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
    # Two steps of projected gradient cost less than a round, and mostly save one.
    moved = rhs
    for _ in range(2):
        clipped = np.maximum(moved, 0.0)
        moved = clipped + rhs - clipped @ h
    passive = moved > 0.0
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
        settled &= np.abs(s).sum(1) <= _MODERATE * size_b[open_]
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
    b = -(c @ (u / size_u))
    # Cu may cancel: its entries are known to rounding of u's.
    if free is None:
        solution = nonnegative_qp(c, b, 1.0)
        return solution._replace(x=u + size_u * solution.x)
    solution = nonnegative_qp(c[np.ix_(free, free)], b[free], 1.0)
    v = u.copy()
    v[free] += size_u * solution.x
    return solution._replace(x=v)


def least_norm(h: Array, a: Array) -> Solution:
    """`argmin ½ yᵀHy` over `{y ≥ 0, aᵀy = 1}`.

    y is `argmin_{z ≥ 0} ½ zᵀHz − aᵀz` times a number; where that has no solution, or one that is
    hard to find, `simplex_qp` finds y.

    Args:
        h: `[T, T]`, positive semi-definite, unit diagonal.
        a: `[T]`, positive.

    Returns:
        The minimiser and its residual, or a bound of it, as from `simplex_qp` with `c = 0`.
    """
    found = _block_pivoting(h, a / a.max(), 1.0)
    if found is None:
        return simplex_qp(h, np.zeros_like(a), a)
    # Where a is largest `(Hz)_i ≥ 1`, so that Σz ≥ 1: relative to that alone a violation is at most
    # twice what it is relative to Σz + 1.
    return Solution(found.x / (a @ found.x), 2.0 * found.residual, found.iterations)


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


def fair_newton(c: Array, n: Array, alpha: float, ridge: float) -> Solution:
    """The `v = Nw > 0` with `n_i (Cv)_i = w_i^{−1/α}`, by damped Newton.

    v minimises the strictly convex `½vᵀCv − Σ φ(v_i/n_i)` with `φ'(t) = t^{−1/α}`. Everything is
    relative to v, from `v_i = n_i^{(1−α)/(1+α)}` on, the solution for orthogonal rows: a step is
    `v ← v(1 + step)`. C gets a ridge until the steps are short; the last ones are on the problem
    with no ridge, where that has a solution nearby.

    Args:
        c: `[T, T]` cosine matrix.
        n: `[T]`, the row norms; of no effect for α = 1.
        alpha: in (0, 10].
        ridge: keeps the minimiser finite where `C` is singular with a positive null vector.

    Returns:
        v, and the largest violation of the equations, each relative to the size of its terms.
    """
    size = len(c)
    power = 1.0 - 1.0 / alpha
    curvature = 1.0 + 1.0 / alpha
    ones = np.ones(size)
    # w is homogeneous in n, so the problem is solved with norms around one.
    unit = 1.0 if power == 0.0 else math.exp(float(np.log(n).mean()))
    n = n / unit
    ridged = c.copy()
    ridged.flat[:: size + 1] += ridge

    def wanted(v: Array) -> Array:
        return ones if power == 0.0 else (v / n) ** power

    def value(v: Array) -> float:
        log_w = np.log(v / n)
        utility = log_w if power == 0.0 else np.expm1(power * log_w) / power
        return 0.5 * float(v @ ridged @ v) - float(utility.sum())

    def newton(v: Array, h: Array, target: Array, gradient: Array) -> tuple[Array, float]:
        """Newton's step relative to v, and its largest entry."""
        bend = target / alpha
        square = 1.0 / (v * v + bend)
        scale = np.sqrt(square)
        scaled = scale * v
        m = scaled[:, None] * h * scaled
        m.flat[:: size + 1] += bend * square
        step = np.asarray(np.linalg.solve(m, scale * gradient) * -scale, dtype=np.float64)
        return step, float(np.abs(step).max())

    def shortened(v: Array, step: Array, gradient: Array) -> Array:
        step = step * min(1.0, 0.95 / max(-float(step.min()), 0.5))
        slope = float(gradient @ step)
        # vᵀCv is a sum of terms that may cancel: below their rounding nothing is refused.
        here = value(v) + 8 * _EPS * float(v.sum()) ** 2
        while not value(v * (1.0 + step)) <= here + 1e-4 * slope:
            step, slope = 0.5 * step, 0.5 * slope
            if np.abs(step).max() < 1e-6:
                break
        return step

    def last_steps(v: Array, h: Array) -> tuple[Array, float, float, int]:
        """Full steps, as long as each is at most half the one before; v, violation, the length of
        the next or last step, number."""
        target, hv = wanted(v), h @ v
        longest, length, number = _SHORT, np.inf, 0
        while number < 20:
            number += 1
            try:
                step, length = newton(v, h, target, v * hv - target)
            except np.linalg.LinAlgError:
                break
            if not length < longest:
                break
            v = v * (1.0 + step)
            target, hv = wanted(v), h @ v
            longest = 0.5 * length
            if curvature * length**2 < _EPS:
                break
        gap = np.abs(v * hv - target) / np.maximum(v * v.sum(), target)
        return v, float(gap.max()), length, number

    v = n ** ((1.0 - alpha) / (1.0 + alpha))
    iterations, previous = 0, np.inf
    with np.errstate(over="ignore", invalid="ignore"):
        while iterations < 500 and not previous < _SHORT:
            # The best multiple of v in closed form: near a singular point v has far to go.
            target, hv = wanted(v), ridged @ v
            multiple = (float(target.sum()) / float(v @ hv)) ** (1.0 / curvature)
            v, hv, target = multiple * v, multiple * hv, multiple**power * target
            gradient = v * hv - target
            step, length = newton(v, ridged, target, gradient)
            iterations += 1
            if curvature * length > 0.5 or length > 0.5 * previous:
                step = shortened(v, step, gradient)
            v = v * (1.0 + step)
            previous = length
        found, residual, length, more = last_steps(v, c)
        iterations += more
        # A long step says that without ridge the solution is elsewhere, or nowhere.
        if not (length < _SHORT**2 and residual <= RESIDUAL * 1e-3):
            found, residual, _, more = last_steps(v, ridged)
            iterations += more
    return Solution(found * unit ** ((1.0 - alpha) / (1.0 + alpha)), residual, iterations)


def pinv_times(c: Array, b: Array, rtol: float) -> Array:
    """`C⁺b`, C positive semi-definite; eigenvalues ≤ rtol·λ_max are dropped.

    It is the solution of `Cy = b`, which costs less, where the inverse shows that no eigenvalue is
    that small: `λ_max ≤ tr C`, `1/|λ_min| ≤ |C⁻¹|`, the Frobenius norm. (Its trace would not do:
    eigenvalues that are rounding errors may be of both signs.) The pseudo-inverse itself is never
    formed: its rounding errors do not cancel.
    """
    with contextlib.suppress(np.linalg.LinAlgError):
        inverse = np.asarray(np.linalg.inv(c), dtype=np.float64)
        if float(c.diagonal().sum()) * math.sqrt(np.vdot(inverse, inverse)) * rtol < 0.1:
            y = inverse @ b
            return np.asarray(y + inverse @ (b - c @ y))
    values, vectors = np.linalg.eigh(c)
    keep = values > rtol * values[-1]
    kept = vectors[:, keep]
    return np.asarray(kept @ ((b @ kept) / values[keep]))


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
