"""Multi-objective gradient descent with double sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._simplex import SimplexStateMixin
from gradbal.aggregators.base import DoubleSamplingAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, project_simplex

__all__ = ["MoDo", "modo"]


@register(
    "modo",
    title="Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and "
    "Conflict-Avoidance",
    venue="NeurIPS",
    year=2023,
    url="https://arxiv.org/abs/2305.20057",
    consumes="Jacobians of 2 or 3 independent batches",
    cost="2 or 3 times T backwards",
    promises=Promises(
        heads="own",
        gain=lambda a, t, n: 1.0,
        simplex=True,
        zero_rows_inactive=False,
    ),
)
class MoDo(SimplexStateMixin, DoubleSamplingAggregator):
    """Stochastic MGDA whose weights take one step a batch, on an unbiased estimate.

    Chen et al., "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance", NeurIPS 2023, https://arxiv.org/abs/2305.20057. With Jacobians J₁, J₂ of
    independent batches, `λ ← Π(λ − γ(J₁J₂ᵀλ + ρλ))`, Π the projection on the probability simplex,
    and `d = ½(J₁ + J₂)ᵀλ` with the new λ. `E[J₁J₂ᵀ] = E[J]E[J]ᵀ`, which `JJᵀ` of one batch is not.

    Call `backward(losses, independent=(losses_b,))`, or with two more batches for `batches=3`.

    Args:
        gamma: γ ≥ 0, the step of λ; it has to be small against the inverse of the Gramian's largest
            eigenvalue. 0 is the mean of the gradients.
        rho: ρ ≥ 0, pulls λ towards equal weights.
        batches: 2, or 3: then `d = J₃ᵀλ`.
        scale_free: divide `J₁J₂ᵀ` by the mean of the absolute values on its diagonal, so that γ
            does not depend on the scale of the losses. This is gradbal's.

    Raises:
        ValueError: an argument out of range.

    Note:
        The official code moves by the sum of both batches' gradients, LibMTL by those of a third;
        here by their mean, or the third's with `batches=3`. Task-specific parameters get the mean
        over all batches of their own gradients.

    Example:
        >>> import torch
        >>> MoDo().step(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.4250, 0.5750])
    """

    def __init__(
        self, gamma: float = 0.1, rho: float = 0.1, batches: int = 2, scale_free: bool = False
    ) -> None:
        in_range("gamma", gamma, 0)
        in_range("rho", rho, 0)
        one_of("batches", batches, (2, 3))
        one_of("scale_free", scale_free, (False, True))
        self.gamma = gamma
        self.rho = rho
        self.batches = batches
        self.scale_free = scale_free
        self.simplex_weights = None

    @property
    def n_batches(self) -> int:
        """2 or 3."""
        return self.batches

    @property
    def shares(self) -> tuple[float, ...]:
        """½ and ½, or all of the third."""
        return (0.5, 0.5) if self.batches == 2 else (0.0, 0.0, 1.0)

    def step(self, products: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """One step of λ; returns it, `[T]`.

        Args:
            products: `J₁J₂ᵀ [T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all. The others keep their weights.

        Raises:
            ValueError: another number of tasks than before.
        """
        before = self.taking_part(len(products), tasks)
        after = modo(before, products, self.gamma, self.rho, scale_free=self.scale_free)
        self.keep(after, tasks)
        return after.to(products.device, products.dtype)


def modo(
    weights: Tensor,
    products: Tensor,
    gamma: float = 0.1,
    rho: float = 0.1,
    *,
    scale_free: bool = False,
) -> Tensor:
    """`Π(λ − γ(Aλ + ρλ))`.

    Args:
        weights: `λ [T]` on the simplex.
        products: `A [T, T]`.
        gamma, rho, scale_free: see `MoDo`.

    Returns:
        `λ [T]`, dtype and device of `weights`.
    """
    a = products.detach().to("cpu", torch.float64).numpy()
    v = weights.detach().to("cpu", torch.float64).numpy()
    if scale_free:
        size = float(np.abs(np.diagonal(a)).mean())
        a = a / size if size > 0.0 else a
    moved: Array = v - gamma * (a @ v + rho * v)
    return as_weights(project_simplex(moved), weights)
