"""The toy problem: two losses of a point of the plane, its Pareto front, and the distance to it.

Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021,
https://arxiv.org/abs/2110.14048; with a scale of L1 in Navon et al., "Multi-Task Learning as a
Bargaining Game", ICML 2022, https://arxiv.org/abs/2202.01017, and Liu et al., "FAMO: Fast Adaptive
Multitask Optimization", NeurIPS 2023, https://arxiv.org/abs/2306.03792.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Front", "Toy", "pareto_front"]

Array = NDArray[np.float64]

_LEAST = 5e-6
"""What the logarithms' arguments are clamped to."""


@dataclass(frozen=True)
class Toy:
    """`L1 = s(c1 f1 + c2 g1)` and `L2 = c1 f2 + c2 g2` of `x = (x1, x2)`.

    `f1 = log max(|½(−x1 − 7) − tanh(−x2)|, 5e−6) + 6`,
    `f2 = log max(|½(−x1 + 3) + tanh(−x2) + 2|, 5e−6) + 6`,
    `g1 = ((−x1 + 7)² + 0.1(−x2 − 8)²)/10 − 20`, `g2 = ((−x1 − 7)² + 0.1(−x2 − 8)²)/10 − 20`,
    `c1 = max(tanh(½x2), 0)`, `c2 = max(tanh(−½x2), 0)`.

    The papers' appendices print f2 with a minus before tanh(−x2); this is what their code computes.

    Args:
        scale: s.
    """

    scale: float

    def losses(self, x: Tensor) -> Tensor:
        """`[..., 2]` of points `[..., 2]`, for autograd."""
        x1, x2 = x.unbind(-1)
        t = torch.tanh(-x2)
        f1 = _at_least(_LEAST, (0.5 * (-x1 - 7) - t).abs()).log() + 6
        f2 = _at_least(_LEAST, (0.5 * (-x1 + 3) + t + 2).abs()).log() + 6
        g1 = ((-x1 + 7).square() + 0.1 * (-x2 - 8).square()) / 10 - 20
        g2 = ((-x1 - 7).square() + 0.1 * (-x2 - 8).square()) / 10 - 20
        c1 = _at_least(0.0, torch.tanh(0.5 * x2))
        c2 = _at_least(0.0, torch.tanh(-0.5 * x2))
        return torch.stack([self.scale * (c1 * f1 + c2 * g1), c1 * f2 + c2 * g2], -1)

    def evaluate(self, points: Array) -> tuple[Array, Array]:
        """Losses `[N, 2]` and Jacobians `[N, 2, 2]` of points `[N, 2]`, in closed form.

        At x2 = 0, where both c1 and c2 have a kink, the derivatives are those of `losses`.
        """
        x1, x2 = points.T
        t = np.tanh(x2)
        h = np.tanh(0.5 * x2)
        slope_t, slope_h = 1.0 - t * t, 0.5 * (1.0 - h * h)
        c1, c2 = np.maximum(h, 0.0), np.maximum(-h, 0.0)
        slope_c1, slope_c2 = np.where(h >= 0, slope_h, 0.0), np.where(h <= 0, -slope_h, 0.0)
        a1, a2 = t - 0.5 * (x1 + 7.0), 0.5 * (3.0 - x1) - t + 2.0
        f1 = np.log(np.maximum(np.abs(a1), _LEAST)) + 6.0
        f2 = np.log(np.maximum(np.abs(a2), _LEAST)) + 6.0
        # 1/a, and 0 where the logarithm is clamped.
        r1 = 1.0 / np.where(np.abs(a1) < _LEAST, np.inf, a1)
        r2 = 1.0 / np.where(np.abs(a2) < _LEAST, np.inf, a2)
        bowl = 0.01 * (x2 + 8.0) ** 2 - 20.0
        slope_bowl = 0.02 * (x2 + 8.0)
        g1, g2 = 0.1 * (x1 - 7.0) ** 2 + bowl, 0.1 * (x1 + 7.0) ** 2 + bowl

        losses = np.empty((len(points), 2))
        losses[:, 0] = self.scale * (c1 * f1 + c2 * g1)
        losses[:, 1] = c1 * f2 + c2 * g2
        jacobian = np.empty((len(points), 2, 2))
        jacobian[:, 0, 0] = self.scale * (-0.5 * c1 * r1 + 0.2 * c2 * (x1 - 7.0))
        jacobian[:, 0, 1] = self.scale * (
            slope_c1 * f1 + c1 * r1 * slope_t + slope_c2 * g1 + c2 * slope_bowl
        )
        jacobian[:, 1, 0] = -0.5 * c1 * r2 + 0.2 * c2 * (x1 + 7.0)
        jacobian[:, 1, 1] = slope_c1 * f2 - c1 * r2 * slope_t + slope_c2 * g2 + c2 * slope_bowl
        return losses, jacobian

    def evaluate_one(self, x1: float, x2: float) -> tuple[list[float], list[list[float]]]:
        """The same of a single point, in a tenth of the time: arrays of one number are slow."""
        t, h = math.tanh(x2), math.tanh(0.5 * x2)
        slope_t, slope_h = 1.0 - t * t, 0.5 * (1.0 - h * h)
        c1, slope_c1 = (h, slope_h) if h >= 0 else (0.0, 0.0)
        c2, slope_c2 = (-h, -slope_h) if h <= 0 else (0.0, 0.0)
        a1, a2 = t - 0.5 * (x1 + 7.0), 0.5 * (3.0 - x1) - t + 2.0
        f1 = math.log(max(abs(a1), _LEAST)) + 6.0
        f2 = math.log(max(abs(a2), _LEAST)) + 6.0
        r1 = 0.0 if abs(a1) < _LEAST else 1.0 / a1
        r2 = 0.0 if abs(a2) < _LEAST else 1.0 / a2
        bowl = 0.01 * (x2 + 8.0) ** 2 - 20.0
        slope_bowl = 0.02 * (x2 + 8.0)
        g1, g2 = 0.1 * (x1 - 7.0) ** 2 + bowl, 0.1 * (x1 + 7.0) ** 2 + bowl
        s = self.scale
        row1 = [
            s * (-0.5 * c1 * r1 + 0.2 * c2 * (x1 - 7.0)),
            s * (slope_c1 * f1 + c1 * r1 * slope_t + slope_c2 * g1 + c2 * slope_bowl),
        ]
        row2 = [
            -0.5 * c1 * r2 + 0.2 * c2 * (x1 + 7.0),
            slope_c1 * f2 - c1 * r2 * slope_t + slope_c2 * g2 + c2 * slope_bowl,
        ]
        return [s * (c1 * f1 + c2 * g1), c1 * f2 + c2 * g2], [row1, row2]

    @cached_property
    def front(self) -> Front:
        """Its Pareto front."""
        return pareto_front(self)


def _at_least(bound: float, x: Tensor) -> Tensor:
    """`max(bound, x)` with the derivative 1 at the bound.

    That is what `torch.clamp` had when the papers' code was run. In torch 2.14 it is 0, and
    nothing would move from the start (0, 0).
    """
    return torch.where(x < bound, bound, x)


@dataclass(frozen=True)
class Front:
    """The Pareto front, as a curve of n points: `points [n, 2]`, by rising x1, and what the losses
    without the scale are there, `unscaled [n, 2]`."""

    points: Array
    unscaled: Array

    @cached_property
    def span(self) -> float:
        """From the least to the largest loss on the front."""
        return float(np.ptp(self.unscaled[:, 0]))

    def gap(self, unscaled: Array) -> Array:
        """How far losses `[N, 2]` are from the front, in percent; `[N]`.

        The least ε for which a point of the front is nowhere worse than the losses minus ε (the
        additive ε-indicator), in units of the span. Negative is rounding.
        """
        # Points that are ahead of the same one of the front have the same difference of losses.
        along = self.unscaled[:, 0] - self.unscaled[:, 1]
        difference = unscaled[:, 0] - unscaled[:, 1]
        order = slice(None, None, -1)
        at = [np.interp(difference, along[order], each[order]) for each in self.unscaled.T]
        worst: Array = np.maximum(unscaled[:, 0] - at[0], unscaled[:, 1] - at[1])
        return 100.0 * worst / self.span


def pareto_front(toy: Toy, n: int = 4001) -> Front:
    """The points with x1 in [−7, 7] and x2 < 0 where a convex combination of the gradients is zero.

    With weights λ and 1 − λ of the unscaled losses the derivative by x1 is zero for
    `λ = (x1 + 7)/14`; what remains is an equation for x2, solved by bisection.
    """
    x1 = np.linspace(-7.0, 7.0, n)

    def slope(x2: Array) -> Array:
        """Of the weighted loss, by x2."""
        c = np.tanh(-0.5 * x2)
        weighted = (49.0 - x1**2) / 10 + 0.01 * (x2 + 8.0) ** 2 - 20.0
        found: Array = -0.5 * (1.0 - c * c) * weighted + 0.02 * c * (x2 + 8.0)
        return found

    low, high = np.full(n, -12.0), np.full(n, -8.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        falls = slope(middle) < 0
        low, high = np.where(falls, middle, low), np.where(falls, high, middle)
    points = np.stack([x1, 0.5 * (low + high)], 1)
    unscaled = toy.evaluate(points)[0] / [toy.scale, 1.0]
    return Front(points, unscaled)
