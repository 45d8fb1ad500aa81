"""Nash bargaining between tasks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, fair_newton

__all__ = ["NashMTL", "nash_mtl"]


def _gain(aggregator: NashMTL, n_tasks: int, norm: float) -> float:
    length = float(np.sqrt(n_tasks))
    return (min(length, aggregator.max_norm) if aggregator.max_norm else length) / norm


@register(
    "nash_mtl",
    title="Multi-Task Learning as a Bargaining Game",
    venue="ICML",
    year=2022,
    url="https://arxiv.org/abs/2202.01017",
    promises=Promises(
        heads="weighted",
        degree=0,
        gain=_gain,
        non_conflicting=True,
        row_scale_invariant=True,
    ),
)
class NashMTL(GramianAggregator):
    """The Nash bargaining solution: the update whose gains have the largest product.

    Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022,
    https://arxiv.org/abs/2202.01017. `d = Jᵀw` with `w > 0` and `Gw = 1/w` elementwise, which is
    the minimiser of the strictly convex `½wᵀGw − Σ log w_i`. Then `⟨d, g_i⟩ = 1/w_i > 0` and
    `|d| = √T`: d does not depend on the scale of any loss, so learning rates are not comparable
    with those of other methods.

    Args:
        max_norm: d is scaled down to this norm, in the loss's unit-free scale; 0 is off, 1 the
            paper's. Since `|d| = √T`, with 1 every step is a unit vector.
        ridge: added to the cosine matrix; keeps w finite at Pareto-stationary points, where the
            problem has no solution and d goes to zero. Elsewhere the result is polished without.
        max_weight: bound of `w_i |g_i|` for the weights on task-specific parameters.

    Raises:
        ValueError: an argument out of range.

    Note:
        The official code, which LibMTL copies, runs a convex-concave procedure with cvxpy and ECOS,
        stops it by a test on another scaling of the Gramian, and keeps the previous weights when a
        solve fails; w is wrong by 20 to 290 % where the gradients' norms differ a hundredfold, a
        single task is an error, and identical or zero rows give w = 1. TorchJD clips the weights,
        and so the heads' as well. In gradbal Newton's method solves the convex problem on the
        cosine matrix. Only the shared gradient is scaled to `max_norm`; task-specific parameters
        get `w_i` times their gradient, as in the official code.

    Example:
        >>> import torch
        >>> NashMTL(max_norm=0.0).direction(torch.tensor([[4.0, 0.0], [0.0, 0.5]]))
        tensor([1., 1.])
    """

    def __init__(
        self, max_norm: float = 1.0, ridge: float = 1e-10, max_weight: float = 100.0
    ) -> None:
        in_range("max_norm", max_norm, 0)
        in_range("ridge", ridge, 0, 1, bounds="(]")
        in_range("max_weight", max_weight, 0, bounds="(]")
        self.max_norm = max_norm
        self.ridge = ridge
        self.max_weight = max_weight
        # One solve serves the weights of a step and those of its heads.
        self._last: tuple[Tensor, Tensor] | None = None

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` of the shared gradient, scaled to `max_norm`, from the Gramian `[T, T]`."""
        w = self._bargain(gramian)
        self._last = gramian, w
        if not self.max_norm:
            return w
        norm = math.sqrt(max(float(w @ gramian @ w), 0.0))
        return w * (self.max_norm / norm) if norm > self.max_norm else w

    def head_weights(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """`w [T]`, not scaled to `max_norm`, up to the bound that `max_weight` sets."""
        norms = torch.diagonal(gramian).sqrt()
        if self._last is not None and self._last[0] is gramian:
            w = self._last[1]
        else:
            w = self._bargain(gramian)
        return torch.minimum(w, torch.where(norms > 0, self._largest(norms), w))

    def _bargain(self, gramian: Tensor) -> Tensor:
        return nash_mtl(gramian, ridge=self.ridge)

    def _largest(self, norms: Tensor) -> Tensor:
        return self.max_weight / norms


def nash_mtl(gramian: Tensor, *, ridge: float = 1e-10) -> Tensor:
    """The `w > 0` with `w_i (Gw)_i = 1`, by damped Newton on the cosine matrix.

    Args:
        gramian: `[T, T]`.
        ridge: added to the diagonal of the cosine matrix.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1 everywhere if all are zero.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        return checked(fair_newton(c, n, 1.0, ridge), "Nash-MTL's Newton solve") / n

    def pair(c: float, n: float, m: float) -> tuple[float, float] | None:
        # In units of the norms neither task is the first: v(v + cv) = 1 for both.
        if 1.0 + c < max(1e-6, 1e4 * ridge):
            return None
        v = 1.0 / math.sqrt(1.0 + c)
        return v / n, v / m

    return solve_active(gramian, 1.0, solve, pair=pair)
