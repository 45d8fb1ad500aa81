"""How exactly each aggregator solves its own problem, on random Jacobians: a table.

Every residual is computed from the rows with formulas of its own, in float64, and is relative: to
the norms of the rows in question and to the size of the terms that cancel. Rows that are zero, up
to 1e-12 of the largest, belong to tasks that take no part: their weights must be zero, and the
condition is that of the other rows. NaN says that a method's condition is not defined for the
Jacobian; a NaN that a method returns counts as inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import gradbal
from gradbal.aggregators.aligned_mtl import aligned_mtl
from gradbal.aggregators.cagrad import cagrad
from gradbal.aggregators.pcgrad import pcgrad, random_orders
from gradbal.aggregators.upgrad import upgrad

__all__ = ["RESIDUALS", "worst_residuals"]

Array = NDArray[np.float64]


def _norms(j: Array) -> Array:
    return np.asarray(np.linalg.norm(j, axis=1))


def _active(j: Array) -> NDArray[np.bool_]:
    n = _norms(j)
    return np.asarray(n > 1e-12 * n.max())


def _worst(*gaps: ArrayLike) -> float:
    """The largest of all entries; inf where one is NaN, which must not pass for "not defined"."""
    return max(float(np.max(np.nan_to_num(gap, nan=np.inf, posinf=np.inf))) for gap in gaps)


def _relative(gap: ArrayLike, size: ArrayLike) -> Array:
    """`|gap|/size`, and 0 for 0/0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(np.equal(gap, 0), 0.0, np.abs(gap) / np.asarray(size)))


def _solved(method: Any, jacobian: Tensor) -> tuple[Array, Array]:
    """The rows that are not zero and their weights: NaN if a zero row has a weight."""
    j, w = jacobian.numpy(), method.weights(jacobian @ jacobian.T).numpy()
    active = _active(j)
    return j[active], w[active] if not w[~active].any() else np.full(active.sum(), np.nan)


def _products(j: Array, w: Array) -> tuple[Array, Array, Array]:
    """The row norms, `Gw` and the size of the terms in `(Gw)_i`."""
    n = _norms(j)
    return n, j @ (w @ j), n * (np.abs(w) @ n)


def _combination(expected: Callable[[Array], Array]) -> Callable[[str, Tensor], float]:
    def residual(name: str, jacobian: Tensor) -> float:
        d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
        j = jacobian.numpy()
        return _worst(np.abs(d - expected(j)) / np.abs(j).max())

    return residual


def _unit_rows(name: str, jacobian: Tensor) -> float:
    """d is the sum of the unit rows."""
    d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
    j = jacobian.numpy()[_active(jacobian.numpy())]
    return _worst(np.abs(d - (j / np.linalg.norm(j, axis=1, keepdims=True)).sum(0)))


def _rlw(name: str, jacobian: Tensor) -> float:
    """The weights are on the simplex, and d is the rows' combination with them."""
    method: Any
    method, again = (
        gradbal.create(name, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    d, j = again.direction(jacobian).numpy(), jacobian.numpy()  # type: ignore[attr-defined]
    if method.category == "gramian":
        w = method.weights(jacobian @ jacobian.T).numpy()
    else:
        w = method.loss_weights(torch.ones(len(j), dtype=torch.float64)).numpy()
    gap = np.abs(d - w @ j) / (np.abs(w) @ _norms(j))
    return _worst(gap, -w.min(), abs(w.sum() - 1))


def _primary(name: str, jacobian: Tensor) -> float:
    """`⟨d, g_i⟩ ≥ 0` and `λ_i ≥ 0` for the secondary tasks, and not both positive.

    d = 0 where the primary row is zero.
    """
    j, w = _solved(gradbal.create(name), jacobian)
    if not _active(jacobian.numpy())[0]:
        return _worst(np.abs(w))
    _, gw, size = _products(j, w)
    gains, above = _relative(gw, size)[1:] * np.sign(gw[1:]), w[1:]
    violation = np.where(above > 0, np.abs(gains), np.maximum(-gains, 0))
    return _worst(np.append(violation, 0), -above.min(initial=0), abs(w[0] - 1))


def _pcgrad(name: str, jacobian: Tensor) -> float:
    """The same projections in the same order, on the vectors themselves."""
    j = jacobian.numpy()
    active = _active(j)
    orders = random_orders(len(j), torch.Generator().manual_seed(0))
    w = pcgrad(jacobian @ jacobian.T, orders).numpy()
    total = np.zeros(j.shape[1])
    for i in np.flatnonzero(active):
        v = j[i].copy()
        for k in orders[i].numpy():
            s = v @ j[k]
            if active[k] and s < 0:
                v -= s / (j[k] @ j[k]) * j[k]
        total += v
    return _worst(np.linalg.norm(w @ j - total) / (w @ _norms(j)), np.abs(w[~active]).sum())


def _gradvac(name: str, jacobian: Tensor) -> float:
    """Two steps with the same orders, on the vectors themselves.

    Not defined where a projected gradient all but vanishes: the next cosine is rounding.
    """
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    method = gradbal.create(name, beta=0.5, generator=generators[0])
    active = _active(jacobian.numpy())
    targets = np.zeros((len(jacobian), len(jacobian)))
    worst = 0.0
    # Stretched columns give the second step other cosines than the first.
    for stretch in (1.0, torch.linspace(0.1, 2, jacobian.shape[1], dtype=torch.float64)):
        rows = jacobian * stretch
        d = method.direction(rows).numpy()  # type: ignore[attr-defined]
        j, n = rows.numpy(), _norms(rows.numpy())
        total, size = np.zeros(j.shape[1]), 0.0
        for i, order in enumerate(random_orders(len(j), generators[1]).numpy()):
            v, terms = j[i].copy(), n[i]
            for k in order[active[order]] if active[i] else ():
                length, wanted = np.linalg.norm(v), targets[i, k]
                if length < 1e-6 * terms:
                    return float("nan")
                cosine = np.clip(v @ j[k] / length / n[k], -1, 1)
                targets[i, k] = 0.5 * wanted + 0.5 * cosine
                if cosine < wanted:
                    sine = max(np.sin(np.arccos(wanted)), 1e-4)
                    part = length * np.sin(np.arccos(cosine) - np.arccos(wanted)) / (n[k] * sine)
                    v += part * j[k]
                    terms = max(terms, abs(part) * n[k])
            total += v
            size += terms
        worst = max(worst, _worst(_relative(np.linalg.norm(d - total), size)))
    return worst


def _gradnorm(name: str, jacobian: Tensor) -> float:
    """Four steps of the recurrence with α = 1.5, in its plain form."""
    method, j = gradbal.create(name), jacobian.numpy()
    n = _norms(j)
    losses = np.random.default_rng(len(n)).uniform(0.5, 2.0, (4, len(n)))
    w, first, second = np.ones_like(n), np.zeros_like(n), np.zeros_like(n)
    worst = 0.0
    for k, values in enumerate(losses, 1):
        d = method.direction(jacobian, torch.from_numpy(values)).numpy()  # type: ignore[attr-defined]
        worst = max(worst, _worst(_relative(np.linalg.norm(d - w @ j), w @ n)))
        rates = values / losses[0]
        wanted = (w @ n) / len(n) * (rates / rates.mean()) ** 1.5
        # Equal norms at the first step are equal but for rounding.
        gap = np.where(np.abs(w * n - wanted) > 1e-12 * wanted, w * n - wanted, 0)
        first = 0.9 * first + 0.1 * np.sign(gap) * n
        second = 0.999 * second + 0.001 * (np.sign(gap) * n) ** 2
        step = first / (1 - 0.9**k) / np.sqrt(np.where(second > 0, second, 1) / (1 - 0.999**k))
        w = np.maximum(w - 0.025 * step, 1e-6)
        w *= len(n) / w.sum()
    return worst


def _mgda(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i ≥ wᵀGw`, with equality where w_i > 0, on the simplex; so d = 0 with a zero row."""
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
    gap = gw - (w @ j) @ (w @ j)
    violation = np.where(w > 0, np.abs(gap), np.maximum(-gap, 0))
    return _worst(_relative(violation, size), -w.min(), abs(w.sum() - 1))


def _upgrad(name: str, jacobian: Tensor) -> float:
    """Every projection fulfils its KKT conditions, and they add up to the method's weights."""
    j, w = _solved(gradbal.create(name), jacobian)
    gramian = torch.from_numpy(j @ j.T)
    total, worst = np.zeros(len(j)), 0.0
    for i in range(len(j)):
        unit = np.eye(len(j))[i]
        v = upgrad(gramian, unit).numpy()
        n, gv, size = _products(j, v)
        z = v - unit
        violation = np.where(z > 0, np.abs(gv), np.maximum(-gv, 0)) / size
        worst = _worst(worst, violation, -z * n / n[i])
        total += v / len(jacobian)
    return _worst(worst, np.abs((w - total) @ j) / (w @ n))


def _dualproj(name: str, jacobian: Tensor) -> float:
    """`Gw ≥ 0` and `w ≥ 1/T`, and no weight above that where `(Gw)_i > 0`."""
    j, w = _solved(gradbal.create(name), jacobian)
    _, gw, size = _products(j, w)
    above = w - 1 / len(jacobian)
    violation = np.where(above > 0, np.abs(gw), np.maximum(-gw, 0)) / size
    return _worst(violation, -above.min())


def _cagrad(name: str, jacobian: Tensor) -> float:
    """`|d − g_0| = c|g_0|`, and no gain is below the bound by w, where w_i > 0 none above it.

    d = g_0 where no worst gain above 0 can be had, at Pareto-stationary points: there the rows have
    a convex combination that vanishes, and a point of the ball conflicts with none of them.
    """
    c = 0.5
    gramian, mean = jacobian @ jacobian.T, jacobian.numpy().mean(0)
    active = _active(jacobian.numpy())
    j, w = jacobian.numpy()[active], cagrad(gramian, c).numpy()
    radius, n = c * float(np.linalg.norm(mean)), _norms(j)
    if w[~active].any():
        return math.inf
    w, uniform = w[active], 1 / len(w)
    if (w == uniform).all():
        x, y = (
            gradbal.create(other, **keywords).weights(gramian).numpy()[active]  # type: ignore[attr-defined]
            for other, keywords in (("dualproj", {}), ("mgda", {"ignore_zero_rows": True}))
        )
        inside = np.maximum(-(j @ (x @ j)) / (n * (x @ n)), 0)
        beyond = max(float(np.linalg.norm(x @ j - mean)) - radius, 0.0) / (uniform * n.sum())
        return _worst(inside, beyond, np.linalg.norm(y @ j) / (y @ n))
    step = w @ j - mean
    v = (w - uniform) / (w - uniform).sum()
    combined = v @ j
    bound = combined @ mean + radius * np.linalg.norm(combined)
    gap = j @ (mean + step) - bound
    gap = np.where(v > 0, np.abs(gap), np.maximum(-gap, 0))
    size = (n + np.abs(v) @ n) * (np.linalg.norm(mean) + radius)
    return _worst(abs(np.linalg.norm(step) / radius - 1), gap / size, -v * n / (np.abs(v) @ n))


def _allocation(method: Any, jacobian: Tensor, alpha: float) -> float:
    """`(Gw)_i = w_i^{−1/α}`; or that with the ridge's term on the left, where that matters."""
    j, w = _solved(method, jacobian)
    n, gw, size = _products(j, w)
    target, ridge = w ** (-1 / alpha), method.ridge * n**2 * w
    size = np.maximum(size, target)
    found = _worst(np.abs(gw - target) / size)
    if (ridge > 1e-4 * target).any():
        found = min(found, _worst(np.abs(gw + ridge - target) / size))
    return found


def _nash(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i = 1/w_i`.

    Where no w has that or one far away, at and near Pareto-stationary points, the same of G with a
    ridge of 1e-10 on the cosine matrix.
    """
    return _allocation(gradbal.create(name, max_norm=0.0), jacobian, 1.0)


def _fairgrad(name: str, jacobian: Tensor) -> float:
    """`(Gw)_i = w_i^{−1/α}` for α below, at and above one; near stationary points as for Nash."""
    alphas = (0.5, 1.0, 2.0)
    return _worst([_allocation(gradbal.create(name, alpha=a), jacobian, a) for a in alphas])


def _aligned_mtl(name: str, jacobian: Tensor) -> float:
    """`|d|² = s|p|²`, and with one task preferred at a time the d are orthogonal.

    s is the least eigenvalue of G, from the inverse of the cosine matrix, where it is the largest;
    the cut-off is at zero, so that no direction is left out. Where the rows are linearly dependent:
    these d are the rows of `√s VWᵀ`, from the singular vectors of J itself with squared singular
    values above 1e-12 of the largest; not defined where one is within a factor of two of that.
    """
    active = _active(jacobian.numpy())
    j = jacobian.numpy()[active]
    n, size = _norms(j), len(j)
    u = j / n[:, None]
    independent = np.linalg.eigvalsh(u @ u.T)[0] > 1e-9
    method = gradbal.create(name, rtol=0.0 if independent else None)
    w = _solved(method, jacobian)[1]
    gramian, rtol = torch.from_numpy(j @ j.T), method.rtol  # type: ignore[attr-defined]
    b = np.stack([aligned_mtl(gramian, e, rtol=rtol).numpy() for e in np.eye(size)])
    terms = np.abs(b) @ n
    aligned = b @ j
    gap = np.abs(w @ j - aligned.sum(0) / len(jacobian)) / terms.mean()
    if independent:
        s = 1 / np.linalg.eigvalsh(np.linalg.inv(u @ u.T) / n[:, None] / n).max()
        return _worst(gap, np.abs(aligned @ aligned.T - s * np.eye(size)) / terms.max() ** 2)
    left, values, right = np.linalg.svd(j, full_matrices=False)
    relative = (values / values[0]) ** 2
    if ((relative > 0.5e-12) & (relative < 2e-12)).any():
        return math.nan
    keep = relative > 1e-12
    wanted = values[keep].min() * left[:, keep] @ right[keep]
    return _worst(gap, np.abs(aligned - wanted) / terms.max())


def _projections(j: Array, w: Array) -> float:
    """How far the projections of d on the unit rows are from equal.

    Where the rows are linearly dependent: how far a multiple of d is from the least-squares
    solution of that, and d from zero if there is no such direction.
    """
    n, gw, size = _products(j, w)
    u = j / n[:, None]
    projections, terms = gw / n, float((size / n).max())
    values = np.linalg.svd(u, compute_uv=False)
    if values[-1] > 1e-5 * values[0]:
        return _worst(_relative(np.ptp(projections), terms))
    if np.linalg.norm(u.sum(0)) <= 1e-9 * len(n):
        return _worst(_relative(np.linalg.norm(w @ j), terms))
    multiple = projections @ projections / projections.sum()
    return _worst(_relative((multiple - projections) @ u, len(n) * terms))


def _three_rows(jacobian: Tensor) -> Tensor:
    """The rows, and the first one again where there are only two."""
    return jacobian if len(jacobian) > 2 else torch.cat([jacobian, jacobian[:1]])


def _krum(name: str, jacobian: Tensor) -> float:
    """No row has a smaller sum of squared distances to its neighbours than the chosen ones."""
    jacobian = _three_rows(jacobian)
    j, size = jacobian.numpy(), len(jacobian)
    w = gradbal.create(name).weights(jacobian @ jacobian.T).numpy()  # type: ignore[attr-defined]
    squares, n = ((j[:, None] - j) ** 2).sum(2), (j**2).sum(1)
    np.fill_diagonal(squares, np.inf)
    nearest = np.argsort(squares, 1)[:, : size - 2]
    scores = np.take_along_axis(squares, nearest, 1).sum(1)
    # Of the products that the distances are differences of.
    products = (n[:, None] + n[nearest]).sum(1)
    gap = _relative(scores - scores.min(), products)[w > 0]
    return _worst(gap, abs(w.sum() - 1), abs(w.max() - 1))


def _trimmed_mean(name: str, jacobian: Tensor) -> float:
    """Every entry is the mean of what its column has between its largest and smallest value."""
    jacobian = _three_rows(jacobian)
    d = gradbal.create(name).direction(jacobian).numpy()  # type: ignore[attr-defined]
    between = np.sort(jacobian.numpy(), 0)[1:-1]
    return _worst(_relative(d - between.mean(0), np.abs(between).max(0)))


def _graddrop(name: str, jacobian: Tensor) -> float:
    """Every entry is the sum of the positive parts of its column, or that of the negative ones, as
    its draw says."""
    u = torch.rand(jacobian.shape[1], generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    method = gradbal.create(name, generator=generator)
    d = method.direction(jacobian).numpy()  # type: ignore[attr-defined]
    j = jacobian.numpy()
    up, down = np.where(j > 0, j, 0).sum(0), np.where(j < 0, j, 0).sum(0)
    purity = up / (up - down)
    wanted = np.where(purity > u.numpy(), up, down)
    return float((np.abs(d - wanted) / (up - down)).max())


def _config(name: str, jacobian: Tensor) -> float:
    """Equal cosines with all rows, and `|d| = Σ ⟨g_i, d⟩/|d|`.

    Where the rows are linearly dependent: the least-squares solution of equal cosines, and d = 0
    where the unit rows add up to zero.
    """
    j, w = _solved(gradbal.create(name), jacobian)
    _, gw, size = _products(j, w)
    length = float(np.linalg.norm(w @ j))
    return _worst(_projections(j, w), _relative(length**2 - gw.sum(), size.sum()))


def _imtl_g(name: str, jacobian: Tensor) -> float:
    """Equal projections on the unit rows, and weights that sum to one, without the guard.

    Where the rows are linearly dependent: as for ConFIG.
    """
    j, w = _solved(gradbal.create(name, guard=False), jacobian)
    return _worst(_projections(j, w), abs(w.sum() - 1) / np.abs(w).sum())


def _imtl(name: str, jacobian: Tensor) -> float:
    """Equal projections on the unit rows, for factors that are not one.

    Where the rows are linearly dependent: as for ConFIG.
    """
    method: Any = gradbal.create(name, guard=False)
    factors = torch.linspace(-3, 3, len(jacobian), dtype=torch.float64)
    method.prepare(len(jacobian), jacobian)
    method.parameters()[0].data = factors.clone()
    j, w = _solved(method, jacobian)
    of_scaled = w / factors.exp().numpy()[_active(jacobian.numpy())]
    return _worst(_projections(j, w), abs(of_scaled.sum() - 1) / np.abs(of_scaled).sum())


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
    j = jacobian.numpy()[_active(jacobian.numpy())]
    u = j / np.linalg.norm(j, axis=1, keepdims=True)
    # Two batches' products are not symmetric.
    a = u @ u.T
    a = a + 0.1 * (np.triu(a, 1) - np.tril(a, -1))
    p, step = np.full(len(a), 1 / len(a)), 0.2 / len(a)
    w, velocity = p, np.zeros_like(p)
    for _ in range(5):
        velocity = 0.5 * velocity + a @ (w + 0.3 * p)
        w = _nearest_on_simplex(w - step * velocity)
    method: Any = gradbal.create(name, lam=0.3, lr=step, n_iter=5)
    found = method.step(torch.from_numpy(a)).numpy()
    return _worst(np.abs(found - (w + 0.3 * p) / 1.3))


def _uw(name: str, jacobian: Tensor) -> float:
    """`½ e^{−s_i}` for log-variances that are not zero."""
    method = gradbal.create(name)
    n_tasks = len(jacobian)
    method.prepare(n_tasks, jacobian)
    s = torch.linspace(-3, 3, n_tasks, dtype=torch.float64)
    method.parameters()[0].data = s.clone()
    w = method.loss_weights(torch.ones(n_tasks, dtype=torch.float64))  # type: ignore[attr-defined]
    return float((w / (0.5 * torch.exp(-s)) - 1).abs().max())


def _famo(name: str, jacobian: Tensor) -> float:
    """`w_i ∝ z_i/D_i` for logits and losses far from equal."""
    method = gradbal.create(name, min_losses=0.5)
    losses = torch.logspace(0, 3, len(jacobian), dtype=torch.float64)
    method.prepare(len(losses), losses)
    method.logits = torch.linspace(-2, 2, len(losses), dtype=torch.float64)  # type: ignore[attr-defined]
    w = method.loss_weights(losses).numpy()  # type: ignore[attr-defined]
    wanted = np.exp(np.linspace(-2, 2, len(w))) / (losses.numpy() - 0.5)
    return float(np.abs(w / (wanted / wanted.sum()) - 1).max())


def _marigold(name: str, jacobian: Tensor) -> float:
    """Two steps with given q, the projection on the simplex found by bisection."""
    q = jacobian.numpy()[:, 0]
    method = gradbal.create(name, gamma=0.3, rho=0.1)
    v, scale, w = np.full(len(q), 1 / len(q)), 0.0, torch.empty(0)
    for each in (q, q[::-1].copy()):
        scale = max(scale, float(np.abs(each).max()))
        v = _nearest_on_simplex(v - 0.3 * (each / scale + 0.1 * v))
        w = method.step(torch.from_numpy(each))  # type: ignore[attr-defined]
    return float(np.abs(w.numpy() - v).max())


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
    "graddrop": _graddrop,
    "krum": _krum,
    "trimmed_mean": _trimmed_mean,
    "primary": _primary,
    "mgda_ub": _mgda,
    "aligned_mtl_ub": _aligned_mtl,
    "imtl": _imtl,
    "imtl_l": _imtl_l,
    "modo": _modo,
    "sdmgrad": _sdmgrad,
    "famo": _famo,
    "marigold": _marigold,
    "moco": _moco,
    "excess_mtl": _excess_mtl,
    "db_mtl": _db_mtl,
    "m_config": _m_config,
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
    name: str,
    n_jacobians: int,
    draw: Callable[[np.random.Generator], Tensor],
    seed: int = 0,
) -> tuple[float, float]:
    """Median and worst residual of a method over random Jacobians.

    Args:
        name: a key of `RESIDUALS`.
        n_jacobians: how many.
        draw: makes one, as `hard_jacobian` and `random_jacobian` do.
        seed: of the Jacobians.

    Returns:
        Median and maximum of those where the condition is defined; NaN if there are none.
    """
    rng = np.random.default_rng(seed)
    found = np.array([RESIDUALS[name](name, draw(rng)) for _ in range(n_jacobians)])
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    return float(np.median(found)), float(found.max())
