"""Projecting conflicting gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._gramians import as_weights, symmetric_float64
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, active_rows

__all__ = ["PCGrad", "pcgrad"]

FEW = 12
"""Up to this many tasks are projected one by one."""


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
        The official TensorFlow code drops the result of its shuffle, so that its order is fixed,
        and, like LibMTL, projects a gradient on itself as well. WeiChengTseng's PyTorch port always
        averages; the CAGrad repository averages and multiplies by T. In gradbal the orders are
        independent for each task and leave the task itself out, and d is the sum.

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
    keys.flat[:: n_tasks + 1] = 2.0
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
    active = active_rows(g)[1]
    if len(active) == 0:
        return as_weights(np.ones(size), gramian)
    inactive = np.delete(np.arange(size), active) if len(active) < size else active[:0]
    # Without inner products a row is projected on nothing, and nothing on it.
    g[inactive] = g[:, inactive] = 0.0
    w = (_one_by_one if size <= FEW else _all_together)(g, orders.cpu().numpy())
    w[inactive] = 0.0
    return as_weights(w, gramian)


def _one_by_one(g: Array, orders: Indices) -> Array:
    """In plain floats, which for a few tasks cost less than calls on small arrays."""
    rows: list[list[float]] = g.tolist()
    w = [1.0] * len(rows)
    for order, products in zip(orders.tolist(), rows, strict=True):
        # The inner products of g'_i with all gradients.
        for j in order:
            if products[j] < 0.0:
                shift = -products[j] / rows[j][j]
                w[j] += shift
                products = [p + shift * q for p, q in zip(products, rows[j], strict=True)]
    return np.array(w)


def _all_together(g: Array, orders: Indices) -> Array:
    """All tasks at once, the k-th projection of each in the k-th round."""
    tasks = np.arange(len(g))
    squares = g.diagonal()
    w, products = np.ones(len(g)), g.copy()
    for j in orders.T:
        s = products[tasks, j]
        conflict = (s < 0.0).nonzero()[0]
        if len(conflict):
            k = j[conflict]
            shift = -s[conflict] / squares[k]
            np.add.at(w, k, shift)
            products[conflict] += shift[:, None] * g[k]
    return w
