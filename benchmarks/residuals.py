"""How exactly each aggregator solves its own problem, on random Jacobians: a table.

Every residual is computed from the rows with formulas of its own, in float64, and is relative: to
the norms of the rows in question and to the size of the terms that cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def _imtl(name: str, jacobian: Tensor) -> float:
    """Equal projections of the scaled rows' combination on the unit rows, for other factors."""
    j = jacobian.numpy()
    method = gradbal.create(name, guard=False)
    factors = torch.linspace(-3, 3, len(j), dtype=torch.float64)
    method.prepare(len(j), jacobian)
    method.parameters()[0].data = factors.clone()
    w = method.weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    n, gw, size = _products(j, w)
    of_scaled = w / factors.exp().numpy()
    total = abs(of_scaled.sum() - 1) / np.abs(of_scaled).sum()
    return float(max(np.ptp(gw / n) / (size / n).max(), total))


def _imtl_l(name: str, jacobian: Tensor) -> float:
    """`e^{s_i}` for factors that are not one."""
    method = gradbal.create(name)
    method.prepare(len(jacobian), jacobian)
    s = torch.linspace(-3, 3, len(jacobian), dtype=torch.float64)
    method.parameters()[0].data = s.clone()
    w = method.loss_weights(torch.ones_like(s))  # type: ignore[attr-defined]
    return float((w / torch.exp(s) - 1).abs().max())


def _nearest_on_simplex(v: Array) -> Array:
    """Projection on the simplex by bisection of its multiplier."""
    low, high = v.min() - 1.0, v.max()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.asarray(np.maximum(v - 0.5 * (low + high), 0))


def _modo(name: str, jacobian: Tensor) -> float:
    """Two projected steps on independent Jacobians, with the projection found by bisection."""
    j = jacobian.numpy() / np.linalg.norm(jacobian.numpy())
    other = j[:, ::-1] + j
    method = gradbal.create(name, gamma=0.5, rho=0.1)
    v, w = np.full(len(j), 1 / len(j)), torch.empty(0)
    for a in (j @ other.T, other @ j.T):
        v = _nearest_on_simplex(v - 0.5 * (a @ v + 0.1 * v))
        w = method.step(torch.from_numpy(a))  # type: ignore[attr-defined]
    return float(np.abs(w.numpy() - v).max())


def _sdmgrad(name: str, jacobian: Tensor) -> float:
    """Projected steps with momentum on independent Jacobians, projections found by bisection.

    With a step that contracts: the default one amplifies rounding errors from step to step.
    """
    j = jacobian.numpy()
    j = j / np.linalg.norm(j, axis=1, keepdims=True)
    a = j @ (j + 0.1 * j[:, ::-1]).T
    scaled = a / np.sqrt(np.maximum(np.diagonal(a), 0)).mean() ** 2
    p = np.full(len(j), 1 / len(j))
    w, velocity = p, np.zeros_like(p)
    for _ in range(5):
        velocity = 0.5 * velocity + scaled @ (w + 0.3 * p)
        w = _nearest_on_simplex(w - 0.2 * velocity)
    method = gradbal.create(name, lam=0.3, lr=0.2, n_iter=5)
    found = method.step(torch.from_numpy(a)).numpy()  # type: ignore[attr-defined]
    return float(np.abs(found - (w + 0.3 * p) / 1.3).max())


def _uw(name: str, jacobian: Tensor) -> float:
    """`½ e^{−s_i}` for log-variances that are not zero."""
    method = gradbal.create(name)
    n_tasks = len(jacobian)
    method.prepare(n_tasks, jacobian)
    s = torch.linspace(-3, 3, n_tasks, dtype=torch.float64)
    method.parameters()[0].data = s.clone()
    w = method.loss_weights(torch.ones(n_tasks, dtype=torch.float64))  # type: ignore[attr-defined]
    return float((w / (0.5 * torch.exp(-s)) - 1).abs().max())


def _with_losses(
    name: str,
    jacobian: Tensor,
    wanted: Callable[[Array], Array],
    earlier: Sequence[Array] = (),
    **hyperparameters: Any,
) -> float:
    """d against the rows with the weights that losses between 0.01 and 100 should have."""
    l = np.geomspace(0.01, 100, len(jacobian))
    method = gradbal.create(name, **hyperparameters)
    for losses in earlier:
        method.observe(torch.from_numpy(losses))
    d = method.direction(jacobian, torch.from_numpy(l)).numpy()  # type: ignore[attr-defined]
    j, w = jacobian.numpy(), wanted(l)
    size = np.abs(w) @ np.linalg.norm(j, axis=1)
    return float(np.linalg.norm(d - w @ j) / size)


def _dwa(name: str, jacobian: Tensor) -> float:
    """`w_i = T/Σ_j exp((r_j − r_i)/τ)`, r the ratios of two epochs' losses."""
    last = np.linspace(0.5, 3, len(jacobian))
    r = last / last[::-1]

    def wanted(l: Array) -> Array:
        return np.asarray(len(l) / np.exp((r[None] - r[:, None]) / 2).sum(1))

    return _with_losses(name, jacobian, wanted, [last[::-1].copy(), last], window=1)


def _gls(name: str, jacobian: Tensor) -> float:
    """`w_i = (Π ℓ_j)^{1/T}/(T ℓ_i)`, from the product itself."""
    return _with_losses(name, jacobian, lambda l: np.prod(l) ** (1 / len(l)) / len(l) / l)


def _stch(name: str, jacobian: Tensor) -> float:
    """`w_i = T (ℓ_i/N_i)^{1/μ}/(ℓ_i Σ_j (ℓ_j/N_j)^{1/μ})` for μ = ½ after a step of warm-up."""
    nadir = np.linspace(0.5, 3, len(jacobian))

    def wanted(l: Array) -> Array:
        powers = (l / nadir) ** 2
        return np.asarray(len(l) * powers / powers.sum() / l)

    return _with_losses(name, jacobian, wanted, [nadir], mu=0.5, warmup_steps=1)


def _stch_scalar(name: str, jacobian: Tensor) -> float:
    """`w_i = p_i/Σ_j exp((y_j − y_i)/μ)`, `y = p(ℓ − z)`, for p, z and μ of its own."""
    p, z = np.linspace(0.1, 1, len(jacobian)), np.linspace(-1, 1, len(jacobian))

    def wanted(l: Array) -> Array:
        y = p * (l - z)
        return np.asarray(p / np.exp((y[None] - y[:, None]) / 20).sum(1))

    return _with_losses(name, jacobian, wanted, mu=20.0, pref=p.tolist(), ideal=z.tolist())


def _tchebycheff(name: str, jacobian: Tensor) -> float:
    """`w_i = ρ p_i`, and p_i more for the one with the largest `p_i(ℓ_i − z_i)`."""
    p, z = np.linspace(1, 0.1, len(jacobian)), np.linspace(-1, 1, len(jacobian))

    def wanted(l: Array) -> Array:
        y = p * (l - z)
        return np.asarray(np.where(y == y.max(), 1.1, 0.1) * p)

    return _with_losses(name, jacobian, wanted, augment=0.1, pref=p.tolist(), ideal=z.tolist())


def _pbi(name: str, jacobian: Tensor) -> float:
    """`w = r̂ + θ (f − ⟨f, r̂⟩r̂)/d_2`, with d_2 from the least squares of f on r."""
    r, z = np.linspace(1, 0.1, len(jacobian)), np.linspace(-1, 1, len(jacobian))

    def wanted(l: Array) -> Array:
        factor, square = np.linalg.lstsq(r[:, None], l - z, rcond=None)[:2]
        off = (l - z - factor * r) / np.sqrt(square)
        return np.asarray(r / np.linalg.norm(r) + 5 * off)

    return _with_losses(name, jacobian, wanted, pref=r.tolist(), ideal=z.tolist())


def _cosmos(name: str, jacobian: Tensor) -> float:
    """`w = r − (λ/|ℓ|)(r̂ − cos(r, ℓ) ℓ̂)`."""
    r = np.linspace(1, 0.1, len(jacobian))

    def wanted(l: Array) -> Array:
        size = np.linalg.norm(l)
        towards, along = r / np.linalg.norm(r), l / size
        return np.asarray(r - 2 / size * (towards - (towards @ along) * along))

    return _with_losses(name, jacobian, wanted, pref=r.tolist())


def _init_loss_inverse(name: str, jacobian: Tensor) -> float:
    """`w_i = 1/L_i`, L the mean of two steps' losses."""
    first = np.linspace(0.5, 3, len(jacobian))
    mean = (first + first[::-1]) / 2
    earlier = [first, first[::-1].copy(), 9 * first]
    return _with_losses(name, jacobian, lambda l: 1 / mean, earlier, warmup=2)


def _prior_loss_inverse(name: str, jacobian: Tensor) -> float:
    """`w_i = 1/L_i`, the L that it was given."""
    prior = np.linspace(0.5, 3, len(jacobian))
    return _with_losses(name, jacobian, lambda l: 1 / prior, prior=prior.tolist())


def _realtime_loss_inverse(name: str, jacobian: Tensor) -> float:
    """`w_i = 1/m_i`, m the average of the losses and the ones before, with β = ¼."""
    before = np.linspace(0.5, 3, len(jacobian))
    return _with_losses(name, jacobian, lambda l: 4 / (before + 3 * l), [before], ema=0.25)


def _generalized_mean(name: str, jacobian: Tensor) -> float:
    """`w_i = (ℓ_i/L)^{γ−1}/T`, L from the powers themselves, for γ from −2 to 3."""
    worst = 0.0
    for gamma in (-2.0, 0.5, 1.0, 3.0):

        def wanted(l: Array, gamma: float = gamma) -> Array:
            mean = (l**gamma).mean() ** (1 / gamma)
            return np.asarray((l / mean) ** (gamma - 1) / len(l))

        worst = max(worst, _with_losses(name, jacobian, wanted, gamma=gamma))
    return worst


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
    "mgda_ub": _mgda,
    "aligned_mtl_ub": _aligned_mtl,
    "imtl": _imtl,
    "imtl_l": _imtl_l,
    "modo": _modo,
    "sdmgrad": _sdmgrad,
    "dwa": _dwa,
    "gls": _gls,
    "stch": _stch,
    "stch_scalar": _stch_scalar,
    "tchebycheff": _tchebycheff,
    "pbi": _pbi,
    "cosmos": _cosmos,
    "init_loss_inverse": _init_loss_inverse,
    "prior_loss_inverse": _prior_loss_inverse,
    "realtime_loss_inverse": _realtime_loss_inverse,
    "generalized_mean": _generalized_mean,
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
