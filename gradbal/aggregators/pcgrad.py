"""Projecting conflicting gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from gradbal.aggregators.base import (
    GramianAggregator,
    RandomMixin,
    as_weights,
    one_of,
    symmetric_float64,
)
from gradbal.registry import Promises, register
from gradbal.solvers import cosine_matrix

__all__ = ["PCGrad", "pcgrad"]


@register(
    "pcgrad",
    title="Gradient Surgery for Multi-Task Learning",
    venue="NeurIPS",
    year=2020,
    url="https://arxiv.org/abs/2001.06782",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: float(t if a.reduction == "sum" else 1),
        deterministic=False,
    ),
)
class PCGrad(RandomMixin, GramianAggregator):
    """Projects each gradient off the gradients that it conflicts with.

    Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
    https://arxiv.org/abs/2001.06782. For each task i: g'_i = g_i; for every other task j in a fresh
    random order, `g'_i ← g'_i − ⟨g'_i, g_j⟩/|g_j|² g_j` if `⟨g'_i, g_j⟩ < 0`. `d = Σ g'_i`. With
    three or more tasks d can still conflict with some of them.

    Args:
        reduction: "sum" (the paper) or "mean" of the projected gradients.
        generator: a CPU generator for the orders; None makes one seeded from
            `torch.initial_seed()`.

    Raises:
        ValueError: an unknown reduction, or a generator that is not on the CPU.

    Note:
        The published TensorFlow code shuffles a list and drops the result, so its order is fixed,
        and projects a gradient on itself as well. Here the orders are independent for each task and
        leave the task itself out.

    Example:
        >>> import torch
        >>> PCGrad().direction(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    state_names = ("generator",)

    def __init__(self, reduction: str = "sum", generator: Generator | None = None) -> None:
        one_of("reduction", reduction, ("sum", "mean"))
        self.reduction = reduction
        self._own(generator)

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`; every weight is at least 1 (1/T for "mean")."""
        w = pcgrad(gramian, random_orders(len(gramian), self.generator))
        return w / len(w) if self.reduction == "mean" else w


def random_orders(n_tasks: int, generator: Generator | None = None) -> Tensor:
    """For each task an independent random order of the others: `[T, T − 1]` indices."""
    keys = torch.rand(n_tasks, n_tasks, dtype=torch.float64, generator=generator).numpy()
    keys.ravel()[:: n_tasks + 1] = 2.0
    return torch.from_numpy(keys.argsort(1)[:, : n_tasks - 1])


def pcgrad(gramian: Tensor, orders: Tensor) -> Tensor:
    """Weights of the sum of the projected gradients.

    Args:
        gramian: `[T, T]`.
        orders: `[T, T − 1]`; row i lists the other tasks in the order in which i is projected.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1 everywhere if all are zero.
    """
    g = symmetric_float64(gramian)
    size = len(g)
    active = cosine_matrix(g)[2]
    if len(active) == 0:
        return as_weights(np.ones(size), gramian)
    rows = np.arange(size)
    squares = np.diagonal(g)
    # Row i of `a` has the coefficients of g'_i, row i of `products` its inner products with all g.
    a, products = np.eye(size), g.copy()
    for j in orders.cpu().numpy().T:
        s = products[rows, j]
        conflict = np.flatnonzero(s < 0)
        if len(conflict):
            k = j[conflict]
            shift = -s[conflict] / squares[k]
            a[conflict, k] += shift
            products[conflict] += shift[:, None] * g[k]
    inactive = np.setdiff1d(rows, active)
    a[inactive] = a[:, inactive] = 0.0
    return as_weights(a.sum(0), gramian)
