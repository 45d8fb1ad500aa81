"""Fair allocation of gains between tasks."""

from __future__ import annotations

from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators.nash_mtl import NashMTL
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, checked, fair_newton

__all__ = ["FairGrad", "fairgrad"]


def _gain(aggregator: FairGrad, n_tasks: int, norm: float) -> float:
    a = aggregator.alpha
    gain = n_tasks * float((n_tasks * norm**2) ** (-a / (1 + a)))
    return min(gain, aggregator.max_norm / norm) if aggregator.max_norm else gain


@register(
    "fairgrad",
    title="Fair Resource Allocation in Multi-Task Learning",
    venue="ICML",
    year=2024,
    url="https://arxiv.org/abs/2402.15638",
    promises=Promises(
        heads="own", degree=0, gain=_gain, non_conflicting=True, row_scale_invariant=True
    ),
)
class FairGrad(NashMTL):
    """The α-fair allocation of the gains `⟨d, g_i⟩`, of which Nash's is the case α = 1.

    Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024,
    https://arxiv.org/abs/2402.15638. `d = Jᵀw` with `w > 0` and `(Gw)_i = w_i^{−1/α}`, so that
    `w_i = ⟨d, g_i⟩^{−α}`: the minimiser of the strictly convex `½wᵀGw − Σ φ(w_i)`,
    `φ'(t) = t^{−1/α}`. α → 0 is the sum of the gradients, α → ∞ gives all tasks the same gain, in
    the direction of `mgda`. Under `J → kJ` d scales by `k^{(1−α)/(1+α)}`.

    For α > 1, d grows as the gradients shrink, and for no α does it vanish near a Pareto-stationary
    point: with a constant learning rate the steps stay long. Use `max_norm=1`, and a learning rate
    that decays.

    Args:
        alpha: α in (0, 10]; the paper's experiments use 1 and 2.
        max_norm: d is scaled down to this norm; 0 (the paper) is off.
        ridge: added to the cosine matrix; keeps w finite at Pareto-stationary points, where the
            problem has no solution. Elsewhere the result is polished without.
        max_weight: bound of `w_i G_ii^{α/(1+α)}`, which is 1 for a task that is orthogonal to the
            others, for the weights on task-specific parameters under `heads="weighted"`.

    Raises:
        ValueError: an argument out of range.

    Note:
        The official code runs scipy's `least_squares` on the Gramian as it is, which stops early
        for small and for large gradients, and multiplies the shared gradient by T. LibMTL does so
        without the T, and weights task-specific gradients as well. gradbal solves by Newton's
        method on the cosine matrix, does not multiply, and leaves task-specific gradients as they
        are, as the official code does.

    Example:
        >>> import torch
        >>> FairGrad(alpha=2.0).direction(torch.tensor([[8.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        alpha: float = 1.0,
        max_norm: float = 0.0,
        ridge: float = 1e-10,
        max_weight: float = 100.0,
    ) -> None:
        in_range("alpha", alpha, 0, 10, bounds="(]")
        super().__init__(max_norm, ridge, max_weight)
        self.alpha = alpha

    def _bargain(self, gramian: Tensor) -> Tensor:
        return fairgrad(gramian, alpha=self.alpha, ridge=self.ridge)

    def _largest(self, norms: Tensor) -> Tensor:
        return self.max_weight * norms ** (-2 * self.alpha / (1 + self.alpha))


def fairgrad(gramian: Tensor, *, alpha: float = 1.0, ridge: float = 1e-10) -> Tensor:
    """The `w > 0` with `(Gw)_i = w_i^{−1/α}`, by damped Newton on the cosine matrix.

    Args:
        gramian: `[T, T]`.
        alpha: in (0, 10].
        ridge: added to the diagonal of the cosine matrix.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1 everywhere if all are zero.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        return checked(fair_newton(c, n, alpha, ridge), "FairGrad's Newton solve") / n

    return solve_active(gramian, 1.0, solve)
