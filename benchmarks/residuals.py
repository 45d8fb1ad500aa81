"""How exactly each aggregator solves its own problem, on random Jacobians: a table.

Every residual is computed from the rows with formulas of its own, in float64, and is relative: to
the norms of the rows in question and to the size of the terms that cancel.
"""

from __future__ import annotations

from collections.abc import Callable

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


def _gradvac(name: str, jacobian: Tensor) -> float:
    """Two steps with the same orders, on the vectors themselves."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    method = gradbal.create(name, beta=0.5, generator=generators[0])
    targets = np.zeros((len(jacobian), len(jacobian)))
    worst = 0.0
    # Stretched columns give the second step other cosines than the first.
    for stretch in (1.0, torch.linspace(0.1, 2, jacobian.shape[1], dtype=torch.float64)):
        rows = jacobian * stretch
        d = method.direction(rows).numpy()  # type: ignore[attr-defined]
        j = rows.numpy()
        n = np.linalg.norm(j, axis=1)
        total, size = np.zeros(j.shape[1]), 0.0
        for i, order in enumerate(random_orders(len(j), generators[1]).numpy()):
            v = j[i].copy()
            for k in order:
                length, wanted = np.linalg.norm(v), targets[i, k]
                cosine = v @ j[k] / length / n[k]
                targets[i, k] = 0.5 * wanted + 0.5 * cosine
                if cosine < wanted:
                    v += (
                        length
                        * np.sin(np.arccos(cosine) - np.arccos(wanted))
                        / (n[k] * np.sin(np.arccos(wanted)))
                        * j[k]
                    )
            total += v
            size = max(size, float(np.linalg.norm(v)))
        worst = max(worst, float(np.linalg.norm(d - total) / size))
    return worst


def _gradnorm(name: str, jacobian: Tensor) -> float:
    """Four steps of the recurrence with α = 1.5, in its plain form."""
    method, j = gradbal.create(name), jacobian.numpy()
    n = np.linalg.norm(j, axis=1)
    losses = np.random.default_rng(len(n)).uniform(0.5, 2.0, (4, len(n)))
    w, first, second = np.ones_like(n), np.zeros_like(n), np.zeros_like(n)
    worst = 0.0
    for k, values in enumerate(losses, 1):
        d = method.direction(jacobian, torch.from_numpy(values)).numpy()  # type: ignore[attr-defined]
        worst = max(worst, float(np.linalg.norm(d - w @ j) / (w @ n)))
        rates = values / losses[0]
        gradient = np.sign(w * n - (w @ n) / len(n) * (rates / rates.mean()) ** 1.5) * n
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        w -= 0.025 * first / (1 - 0.9**k) / np.sqrt(second / (1 - 0.999**k))
        w = np.maximum(w, 1e-6)
        w *= len(n) / w.sum()
    return worst


def _mgda(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i ≥ wᵀGw`, with equality where w_i > 0, on the simplex."""
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    return _least_norm(jacobian.numpy(), w)


def _cr_mogm(name: str, jacobian: Tensor) -> float:
    """The second step's weights are halfway between two that are MGDA's."""
    method = gradbal.create(name, a=0.5)
    other = jacobian * torch.linspace(0.1, 2, jacobian.shape[1], dtype=torch.float64)
    first, second = (method.weights(j @ j.T).numpy() for j in (jacobian, other))  # type: ignore[attr-defined]
    fresh = gradbal.create("mgda").weights(other @ other.T).numpy()  # type: ignore[attr-defined]
    gap = float(np.abs(second - (first + fresh) / 2).max())
    return max(gap, _least_norm(jacobian.numpy(), first), _least_norm(other.numpy(), fresh))


def _least_norm(j: Array, w: Array) -> float:
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
    "gradnorm": _gradnorm,
    "pcgrad": _pcgrad,
    "gradvac": _gradvac,
    "mgda": _mgda,
    "cr_mogm": _cr_mogm,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "cagrad": _cagrad,
    "nash_mtl": _nash,
    "fairgrad": _fairgrad,
    "imtl_g": _imtl_g,
    "aligned_mtl": _aligned_mtl,
    "config": _config,
    "primary": _primary,
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
