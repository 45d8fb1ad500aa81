"""How exactly each aggregator solves its own problem, on random Jacobians: a table.

Every residual is computed from the rows with formulas of its own, in float64, and is relative: to
the norms of the rows in question and to the size of the terms that cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gradbal
from gradbal.aggregators.aligned_mtl import aligned_mtl
from gradbal.aggregators.cagrad import cagrad
from gradbal.aggregators.pcgrad import pcgrad, random_orders
from gradbal.aggregators.upgrad import upgrad

__all__ = ["RESIDUALS", "random_jacobian", "worst_residuals"]

Array = NDArray[np.float64]


def random_jacobian(rng: np.random.Generator, spread: float, scale: float) -> Tensor:
    """A Gaussian Jacobian `[T, P]`, T in 2..10 and P in T..200, with rescaled rows.

    Args:
        rng: draws shape, entries and row scales.
        spread: largest over smallest row scale; the scales are log-uniform between.
        scale: what everything is multiplied by.

    Returns:
        `[T, P]`, float64.
    """
    n_tasks = int(rng.integers(2, 11))
    width = int(rng.integers(n_tasks, 201))
    rows = rng.standard_normal((n_tasks, width))
    rows *= spread ** rng.uniform(-0.5, 0.5, (n_tasks, 1)) * scale
    return torch.from_numpy(rows)


def _products(j: Array, w: Array) -> tuple[Array, Array, Array]:
    """The row norms, `Gw` and the size of the terms in `(Gw)_i`."""
    n = np.linalg.norm(j, axis=1)
    return n, j @ (j.T @ w), n * (np.abs(w) @ n)


def _combination(expected: Callable[[Array], Array]) -> Callable[[str, Tensor], float]:
    def residual(name: str, jacobian: Tensor) -> float:
        d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
        j = jacobian.numpy()
        return float(np.abs(d - expected(j)).max() / np.abs(j).max())

    return residual


def _unit_rows(name: str, jacobian: Tensor) -> float:
    """d is the sum of the unit rows."""
    d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
    j = jacobian.numpy()
    return float(np.abs(d - (j / np.linalg.norm(j, axis=1, keepdims=True)).sum(0)).max())


def _rlw(name: str, jacobian: Tensor) -> float:
    """The weights, recovered from d by least squares, are on the simplex."""
    d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
    j = jacobian.numpy()
    n = np.linalg.norm(j, axis=1)
    w = np.linalg.lstsq((j / n[:, None]).T, d, rcond=None)[0] / n
    # A row 1e6 times smaller than the largest is recovered 1e6 times less accurately.
    return float(max(-w.min(), abs(w.sum() - 1)) * n.min() / n.max())


def _primary(name: str, jacobian: Tensor) -> float:
    """`⟨d, g_i⟩ ≥ 0` and `λ_i ≥ 0` for the secondary tasks, and not both positive."""
    j = jacobian.numpy()
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    n, gw, _ = _products(j, w)
    gains = (gw / n / (np.abs(w) @ n))[1:]
    violation = np.where(w[1:] > 0, np.abs(gains), np.maximum(-gains, 0))
    return float(max(violation.max(), -w[1:].min(), abs(w[0] - 1)))


def _pcgrad(name: str, jacobian: Tensor) -> float:
    """The same projections in the same order, on the vectors themselves."""
    j = jacobian.numpy()
    orders = random_orders(len(j), torch.Generator().manual_seed(0))
    w = pcgrad(jacobian @ jacobian.T, orders).numpy()
    total, size = np.zeros(j.shape[1]), 0.0
    for i, order in enumerate(orders.numpy()):
        v = j[i].copy()
        for k in order:
            s = v @ j[k]
            if s < 0:
                v -= s / (j[k] @ j[k]) * j[k]
        total += v
        size = max(size, float(np.linalg.norm(v)))
    return float(np.linalg.norm(w @ j - total) / size)


def _mgda(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i ≥ wᵀGw`, with equality where w_i > 0, on the simplex."""
    j = jacobian.numpy()
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    _, gw, size = _products(j, w)
    gap = gw - w @ gw
    violation = np.where(w > 0, np.abs(gap), np.maximum(-gap, 0)) / size
    return float(max(violation.max(), -w.min(), abs(w.sum() - 1)))


def _upgrad(name: str, jacobian: Tensor) -> float:
    """Every projection fulfils its KKT conditions, and they add up to the method's weights."""
    j = jacobian.numpy()
    gramian = jacobian @ jacobian.T
    total, worst = np.zeros(len(j)), 0.0
    for i in range(len(j)):
        unit = np.eye(len(j))[i]
        v = upgrad(gramian, unit).numpy()
        n, gv, size = _products(j, v)
        z = v - unit
        worst = max(worst, float((np.maximum(-gv, 0) / size).max()), float((-z * n).max() / n[i]))
        worst = max(worst, float((np.where(z > 0, np.abs(gv), 0) / size).max()))
        total += v / len(j)
    w = gradbal.create(name).weights(gramian).numpy()  # type: ignore[attr-defined]
    return max(worst, float(np.abs((w - total) / w).max()))


def _dualproj(name: str, jacobian: Tensor) -> float:
    """`Gw ≥ 0` and `w ≥ 1/T`, and no weight above that where `(Gw)_i > 0`."""
    j = jacobian.numpy()
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    n, gw, _ = _products(j, w)
    gains = gw / n / (w @ n)
    above = w - 1 / len(j)
    violation = np.where(above > 0, np.abs(gains), np.maximum(-gains, 0))
    return float(max(violation.max(), -above.min()))


def _cagrad(name: str, jacobian: Tensor) -> float:
    """`|d − g_0| = c|g_0|`, and the worst gain equals the bound by the best w: no duality gap."""
    j, c = jacobian.numpy(), 0.5
    w = cagrad(jacobian @ jacobian.T, c).numpy()
    mean = j.mean(0)
    step = w @ j - mean
    radius = c * float(np.linalg.norm(mean))
    v = (w - 1 / len(j)) / (w - 1 / len(j)).sum()
    combined = v @ j
    bound = combined @ mean + radius * np.linalg.norm(combined)
    worst = (j @ (mean + step)).min()
    # The gains' own size: how far the least of them can move inside the ball.
    size = (np.abs(v) @ np.linalg.norm(j, axis=1)) * (np.linalg.norm(mean) + radius)
    return float(max(abs(np.linalg.norm(step) / radius - 1), abs(bound - worst) / size))


def _nash(name: str, jacobian: Tensor) -> float:
    """`w_i (Gw)_i = 1`."""
    gramian = jacobian @ jacobian.T
    w = gradbal.create(name, max_norm=0.0).weights(gramian).numpy()  # type: ignore[attr-defined]
    return float(np.abs(w * _products(jacobian.numpy(), w)[1] - 1).max())


def _fairgrad(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i = w_i^{−1/α}` for α below, at and above one."""
    worst = 0.0
    for alpha in (0.5, 1.0, 2.0):
        method = gradbal.create(name, alpha=alpha)
        w = method.weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
        _, gw, size = _products(jacobian.numpy(), w)
        gap = np.abs(gw - w ** (-1 / alpha)) / np.maximum(size, w ** (-1 / alpha))
        worst = max(worst, float(gap.max()))
    return worst


def _aligned_mtl(name: str, jacobian: Tensor) -> float:
    """`|d|² = s|p|²`, and with one task preferred at a time the d are orthogonal.

    s is the least eigenvalue of G, from the inverse of the cosine matrix, where it is the largest;
    the cut-off is below it, so that no direction is left out.
    """
    j = jacobian.numpy()
    gramian, size = jacobian @ jacobian.T, len(j)
    n = np.linalg.norm(j, axis=1)
    u = j / n[:, None]
    s = 1 / np.linalg.eigvalsh(np.linalg.inv(u @ u.T) / n[:, None] / n).max()
    b = np.stack([aligned_mtl(gramian, e, rtol=1e-20).numpy() for e in np.eye(size)])
    aligned = b @ j
    gap = aligned @ aligned.T / s - np.eye(size)
    method = gradbal.create(name, rtol=1e-20)
    d = method.direction(jacobian).numpy()  # type: ignore[attr-defined]
    return float(max(np.abs(gap).max(), np.abs(d - aligned.mean(0)).max() / np.sqrt(s)))


def _config(name: str, jacobian: Tensor) -> float:
    """Equal cosines with all rows, and `|d| = Σ ⟨g_i, d⟩/|d|`."""
    j = jacobian.numpy()
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    n, gw, size = _products(j, w)
    norm = float(np.linalg.norm(w @ j))
    projections = gw / n
    gaps = (np.ptp(projections), abs(norm - gw.sum() / norm))
    return float(max(gaps) / (size / n).max())


def _imtl_g(name: str, jacobian: Tensor) -> float:
    """Equal projections on the unit rows, and weights that sum to one."""
    j = jacobian.numpy()
    method = gradbal.create(name, guard=False)
    w = method.weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    n, gw, size = _products(j, w)
    projections = gw / n
    return float(max(np.ptp(projections) / (size / n).max(), abs(w.sum() - 1) / np.abs(w).sum()))


def _uw(name: str, jacobian: Tensor) -> float:
    """`½ e^{−s_i}` for log-variances that are not zero."""
    method = gradbal.create(name)
    n_tasks = len(jacobian)
    method.prepare(n_tasks, jacobian)
    s = torch.linspace(-3, 3, n_tasks, dtype=torch.float64)
    method.parameters()[0].data = s.clone()
    w = method.loss_weights(torch.ones(n_tasks, dtype=torch.float64))  # type: ignore[attr-defined]
    return float((w / (0.5 * torch.exp(-s)) - 1).abs().max())


def _moco(name: str, jacobian: Tensor) -> float:
    """Each λ is the nearest point of the simplex to `λ − γ_k YYᵀλ` of before, over three steps."""
    method: Any = gradbal.create(name)
    j = jacobian.numpy()
    y, w, worst = np.zeros_like(j), np.full(len(j), 1 / len(j)), 0.0
    for k in range(1, 4):
        d = method.direction(jacobian).numpy()
        y += 0.5 / np.sqrt(k) * (j - y)
        new = method.last_weights.numpy()
        n, gw, size = _products(y, w)
        gap = w - 0.1 / np.sqrt(k) * gw - new
        theta = gap[new > 0].mean()
        violation = np.where(new > 0, np.abs(gap - theta), np.maximum(gap - theta, 0))
        terms = 1 + 0.1 / np.sqrt(k) * (size + size[new > 0].max())
        worst = max(worst, float((violation / terms).max()), -new.min(), abs(new.sum() - 1))
        worst = max(worst, _relative_gap(d, new @ y, new @ n))
        w = new
    return worst


def _excess_mtl(name: str, jacobian: Tensor) -> float:
    """`w_i` in proportion to `exp(η Σ E_i/E⁰_i)`, over three Jacobians; zero rows keep 1/T."""
    method: Any = gradbal.create(name, step_size=0.5)
    j, squares, total, first = jacobian.numpy(), 0.0, 0.0, 1.0
    active = np.abs(j).max(1) > 0
    for k in range(3):
        rows = j[active] * np.cos(k + np.arange(j.shape[1]))
        d = method.direction(jacobian * torch.cos(k + torch.arange(j.shape[1]).double())).numpy()
        squares = squares + rows**2
        excess = (rows**2 / np.sqrt(np.where(squares > 0, squares, 1))).sum(1)
        first, total = (excess, 0 * excess) if k == 0 else (first, total + excess / first)
    w = np.full(len(j), 1 / len(j))
    w[active] = np.exp(0.5 * total) / np.exp(0.5 * total).sum() * active.mean()
    gap = np.abs(method.last_weights.numpy() - w).max()
    terms = w[active] @ np.linalg.norm(rows, axis=1)
    return float(max(gap, _relative_gap(d, w[active] @ rows, terms)))


def _db_mtl(name: str, jacobian: Tensor) -> float:
    """All tasks' parts of d have the norm of the largest average, for losses that are not one."""
    method: Any = gradbal.create(name)
    losses = np.linspace(0.5, 2, len(jacobian))
    m = np.zeros(jacobian.shape)
    for sign in (1.0, -0.5):
        d = method.direction(sign * jacobian, torch.from_numpy(losses)).numpy()
        m = 0.9 * m + 0.1 * sign * jacobian.numpy() / losses[:, None]
    n = np.linalg.norm(m, axis=1)
    units = m[n > 1e-12 * n.max()] / n[n > 1e-12 * n.max(), None]
    return _relative_gap(d, n.max() * units.sum(0), n.max() * len(units))


def _m_config(name: str, jacobian: Tensor) -> float:
    """The formulas on the vectors, ConFIG's direction from the pseudo-inverse of the units."""
    method: Any = gradbal.create(name)
    size, momentum = len(jacobian), np.zeros(jacobian.shape)
    turns, before, squares = np.zeros(size), np.zeros_like(momentum[0]), np.zeros_like(momentum[0])
    for k in range(2 * size):
        now = jacobian * torch.cos(k + torch.arange(jacobian.shape[1]).double())
        d = method.direction(now).numpy()
        momentum[k % size] += 0.1 * (now[k % size].numpy() - momentum[k % size])
        turns[k % size] += 1
        t = k + 2 - size
        if t > 0:
            unscaled, terms = _equal_angles(momentum / (1 - 0.9**turns)[:, None])
            after = unscaled * (1 - 0.9**t)
            squares = 0.999 * squares + 0.001 * ((after - 0.9 * before) / 0.1) ** 2
            before = after
    root = np.sqrt(squares / (1 - 0.999**t)) + 1e-8
    return _relative_gap(d * root, unscaled, terms)


def _equal_angles(j: Array) -> tuple[Array, float]:
    """ConFIG's direction of the rows that are not zero, and the size of its terms."""
    n = np.linalg.norm(j, axis=1)
    rows, n = j[n > 1e-12 * n.max()], n[n > 1e-12 * n.max()]
    inverse = np.linalg.pinv(rows / n[:, None], rcond=1e-6)
    x = inverse.sum(1)
    square = float(x @ x)
    if square <= 1e-12:
        return np.zeros(j.shape[1]), float(n.sum())
    return (rows @ x).sum() / square * x, float(np.abs(inverse.T @ x).sum() / square * n.sum())


def _relative_gap(found: Array, wanted: Array, size: float) -> float:
    """`|found − wanted|` relative to the size of the terms; 0 for 0/0."""
    gap = float(np.linalg.norm(found - wanted))
    return gap / size if gap > 0 else 0.0


RESIDUALS: dict[str, Callable[[str, Tensor], float]] = {
    "mean": _combination(lambda j: j.mean(0)),
    "sum": _combination(lambda j: j.sum(0)),
    "ew": _combination(lambda j: j.sum(0)),
    "constant": _combination(lambda j: j.sum(0)),
    "gradnorm_inverse": _unit_rows,
    "rlw": _rlw,
    "random": _rlw,
    "rgw": _rlw,
    "uw": _uw,
    "pcgrad": _pcgrad,
    "mgda": _mgda,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "cagrad": _cagrad,
    "nash_mtl": _nash,
    "fairgrad": _fairgrad,
    "imtl_g": _imtl_g,
    "aligned_mtl": _aligned_mtl,
    "config": _config,
    "primary": _primary,
    "moco": _moco,
    "excess_mtl": _excess_mtl,
    "db_mtl": _db_mtl,
    "m_config": _m_config,
}
"""For each method the residual of its own optimality condition; 0 is exact."""


def worst_residuals(
    name: str, n_jacobians: int, spread: float, scale: float, seed: int = 0
) -> tuple[float, float]:
    """Median and worst residual of a method over random Jacobians.

    Args:
        name: a key of `RESIDUALS`.
        n_jacobians: how many.
        spread, scale: see `random_jacobian`.
        seed: of the Jacobians.

    Returns:
        Median and maximum.
    """
    rng = np.random.default_rng(seed)
    found = [RESIDUALS[name](name, random_jacobian(rng, spread, scale)) for _ in range(n_jacobians)]
    return float(np.median(found)), float(np.max(found))
