"""Conflict-averse gradient descent."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, least_norm, simplex_qp

__all__ = ["CAGrad", "cagrad"]

# Rounding leaves a sum of unit vectors that should vanish with a square of about 1e-16.
_VANISHING = 1e-7
_NEARLY_STATIONARY = 1e-3


def _rescaling(c: float, rescale: int) -> float:
    return (1.0, 1.0 + c * c, 1.0 + c)[rescale]


@register(
    "cagrad",
    title="Conflict-Averse Gradient Descent for Multi-task Learning",
    venue="NeurIPS",
    year=2021,
    url="https://arxiv.org/abs/2110.14048",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: (1.0 + a.c) / _rescaling(a.c, a.rescale),
    ),
)
class CAGrad(GramianAggregator):
    """The direction near the mean gradient that helps the worst task most.

    Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021,
    https://arxiv.org/abs/2110.14048. With the mean gradient g_0, d maximises `min_i ⟨d, g_i⟩` over
    the ball `|d − g_0| ≤ c|g_0|`: `d = g_0 + c|g_0| g_w/|g_w|`, where `w` minimises
    `⟨g_w, g_0⟩ + c|g_0||g_w|` over the simplex and `g_w = Jᵀw`. c = 0 is the mean.

    Args:
        c: radius of the ball, in [0, 1), where the method converges to a minimum of the mean loss;
            0.5 as in the paper's toy problem (0.4 on NYUv2).
        rescale: divide d by 1 (0), by 1 + c² (1, the official code) or by 1 + c (2).

    Raises:
        ValueError: an argument out of range.

    Note:
        The official code solves for w by SLSQP with absolute terms of 1e-8, which loses precision
        for small gradients, and multiplies d by T "to match the sum loss"; LibMTL does the same
        without the T. TorchJD uses a conic solver, does not rescale, and returns a zero update
        where g_w is small or the Gramian's trace below 1e-4. gradbal solves the problem exactly at
        every scale and does not multiply by T. Where g_w vanishes it returns g_0, rescaled, since
        for c < 1 the mean loss still has to fall.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5).direction(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.6000, 0.6000])
    """

    def __init__(self, c: float = 0.5, rescale: int = 1) -> None:
        in_range("c", c, 0, 1, bounds="[)")
        one_of("rescale", rescale, (0, 1, 2))
        self.c = c
        self.rescale = rescale

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`."""
        return cagrad(gramian, self.c) / _rescaling(self.c, self.rescale)


def cagrad(gramian: Tensor, c: float = 0.5) -> Tensor:
    """Weights of `g_0 + c|g_0| g_w/|g_w|`, before any rescaling.

    Args:
        gramian: `[T, T]`.
        c: non-negative; for c → ∞ the direction is MGDA's.

    Returns:
        `1/T + (c|g_0|/|g_w|) w`, `[T]`, dtype and device of the Gramian.
    """
    size = len(gramian)

    def solve(h: Array, n: Array, active: Indices) -> Array:
        n = n / n.max()
        q = h @ n / size  # ⟨u_i, g_0⟩ for the unit rows
        radius = c * math.sqrt(max(float(n @ q) / size, 0.0))
        uniform = np.full(len(n), 1.0 / size)
        if radius == 0.0:
            return uniform
        y, length = _worst_case(h, q, 1.0 / n, radius)
        return uniform if length == 0.0 else uniform + radius / length * y / n

    return solve_active(gramian, 1.0 / size, solve)


def _worst_case(h: Array, q: Array, a: Array, radius: float) -> tuple[Array, float]:
    """Minimises `qᵀy + radius·|y|_H` over `{y ≥ 0, aᵀy = 1}`; returns y and `|y|_H = √(yᵀHy)`.

    The minimiser also minimises `½yᵀHy + t qᵀy` at the one t > 0 where `|y(t)|_H = radius·t`. On
    one active set both are found in closed form, and mostly the right set is found by exchanging
    all entries on the wrong side at once. Length 0 says that there is no such t: a combination of
    the gradients that vanishes is as good as any.
    """
    return _by_exchange(h, q, a, radius) or _by_bracket(h, q, a, radius)


def _by_exchange(h: Array, q: Array, a: Array, radius: float) -> tuple[Array, float] | None:
    """`_worst_case` away from stationary points, or None where the active set does not settle."""
    noise = 8 * len(q) * np.finfo(np.float64).eps
    passive = np.ones(len(q), dtype=bool)
    for _ in range(8):
        p = passive.nonzero()[0]
        block, a_p, q_p = (h, a, q) if len(p) == len(q) else (h[np.ix_(p, p)], a[p], q[p])
        try:
            by_a, by_q = np.linalg.solve(block, np.array([a_p, q_p]).T).T
        except np.linalg.LinAlgError:
            return None
        # y(t) = start + t·slope, with startᵀH slope = 0 and |start|²_H = 1/(aᵀH⁻¹a).
        square, mixed = float(a_p @ by_a), float(a_p @ by_q)
        if not square > 0.0:
            return None
        slope = mixed / square * by_a - by_q
        room = radius**2 - float(slope @ block @ slope)
        if not room > 0.0:
            # Without signs the minimum would be at t → ∞, where these entries are negative.
            passive[p[slope <= 0.0]] = False
            continue
        t = 1.0 / math.sqrt(square * room)
        mu = (1.0 + t * mixed) / square
        y = np.zeros(len(q))
        y[p] = by_a / square + t * slope
        nu = h @ y + t * q - mu * a
        scale = np.abs(y).sum() + t * np.abs(q) + abs(mu) * a
        wrong = np.where(passive, y <= 0.0, nu < -noise * scale)
        if not wrong.any():
            length = _length(h, y)
            exact = np.abs(nu[p] / scale[p]).max() < 1e-13 and abs(length / radius / t - 1) < 1e-12
            return (y, length) if exact and length > _NEARLY_STATIONARY * y.sum() else None
        passive ^= wrong
    return None


def _by_bracket(h: Array, q: Array, a: Array, radius: float) -> tuple[Array, float]:
    """`_worst_case` in any case: `|y(t)|_H / t` falls with t, and a bracket holds its root."""
    low = 0.0
    least = least_norm(h, a).x
    size = float(least.sum())
    if _length(h, least) <= _VANISHING * size:
        # Stationary: whether |y(t)|_H / t starts above the radius, seen well above rounding.
        low = 1e3 * _VANISHING * size / radius
        y = simplex_qp(h, low * q, a).x
        if _length(h, y) <= radius * low:
            return y, 0.0
    high = 1.1 / (radius * float(a.min()))
    t = high
    for _ in range(100):
        solution = simplex_qp(h, t * q, a)
        y, length = solution.x, _length(h, solution.x)
        ratio = length / (radius * t)
        if abs(ratio - 1.0) < 1e-13:
            break
        low, high = (t, high) if ratio > 1.0 else (low, t)
        new = _root_on_active_set(h, q, a, np.flatnonzero(y > 0), radius)
        if new is None or not low < new < high:
            new = math.sqrt(low * high) if low > 0.0 else 1e-3 * high
        if abs(new - t) <= 4e-16 * t:
            break
        t = new
    return checked(solution, "CAGrad's quadratic program"), length


def _length(h: Array, y: Array) -> float:
    return math.sqrt(max(float(y @ h @ y), 0.0))


def _root_on_active_set(h: Array, q: Array, a: Array, p: Indices, radius: float) -> float | None:
    """The t > 0 with `|y(t)|_H = radius·t`, y restricted to the passive set p; None if none."""
    k = len(p)
    bordered = np.zeros((k + 1, k + 1))
    bordered[:k, :k] = h[np.ix_(p, p)]
    bordered[:k, k] = bordered[k, :k] = a[p]
    rhs = np.zeros((k + 1, 2))
    rhs[k, 0] = 1.0
    rhs[:k, 1] = -q[p]
    try:
        constant, slope = np.linalg.solve(bordered, rhs)[:k].T
    except np.linalg.LinAlgError:
        return None
    block = h[np.ix_(p, p)]
    a0, a1 = constant @ block @ constant, constant @ block @ slope
    a2 = slope @ block @ slope - radius**2
    discriminant = a1 * a1 - a0 * a2
    if discriminant < 0.0:
        return None
    # a0 ≥ 0: written so that nothing cancels.
    root = np.sqrt(discriminant)
    for t in (a0 / (-a1 + root) if -a1 + root != 0 else -1.0, (-a1 - root) / a2 if a2 else -1.0):
        if t > 0.0:
            return float(t)
    return None
