"""Krum: the gradients closest to their neighbours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import integer
from gradbal.aggregators._gramians import as_weights, symmetric_float64
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register

__all__ = ["Krum", "krum"]


@register(
    "krum",
    title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    venue="NeurIPS",
    year=2017,
    url="https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0,
        simplex=True,
        continuous=False,
        permutation_invariant=False,
        zero_rows_inactive=False,
        min_tasks=3,
    ),
)
class Krum(GramianAggregator):
    """The mean of the gradients that lie closest to their nearest neighbours.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017,
    https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html.
    The score of g_i is the sum of the `T − f − 2` least `|g_i − g_j|²`, j ≠ i; `d = Jᵀw` with
    `w_i = 1/m` for the m gradients of least score, and 0 for the others. Up to f gradients may be
    arbitrary. Made for copies of one gradient from several workers, it leaves out the tasks that
    differ.

    Args:
        n_byzantine: f ≥ 0, at most `T − 3`. The paper's guarantee needs `2f + 2 < T`.
        n_selected: m in 1..T; 1 is Krum, more is Multi-Krum, T the mean.

    Raises:
        ValueError: an argument out of range, or too few tasks.

    Note:
        Of scores that are equal up to rounding the lower index comes first, so that d depends there
        on the order of the tasks; with three tasks the closest two are always equal. A zero row is
        a gradient like any other. A known implementation adds up distances that are not squared,
        and takes roots of rounding errors, which may be negative; here distances are squared, not
        below zero, and a task is never its own neighbour, not even where others equal it.

    Example:
        >>> import torch
        >>> Krum().direction(torch.tensor([[1.0, 0.0], [9.0, 9.0], [1.0, 0.2]]))
        tensor([1., 0.])
    """

    def __init__(self, n_byzantine: int = 0, n_selected: int = 1) -> None:
        integer("n_byzantine", n_byzantine)
        integer("n_selected", n_selected, 1)
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are enough tasks.

        Raises:
            ValueError: there are fewer than `n_byzantine + 3` or `n_selected`.
        """
        _check(n_tasks, self.n_byzantine, self.n_selected)

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` on the simplex, from the Gramian `[T, T]`.

        Raises:
            ValueError: fewer than `n_byzantine + 3` or `n_selected` tasks.
        """
        return krum(gramian, self.n_byzantine, self.n_selected)


def krum(gramian: Tensor, n_byzantine: int = 0, n_selected: int = 1) -> Tensor:
    """`1/n_selected` for the rows of least score, 0 for the others.

    Args:
        gramian: `[T, T]`.
        n_byzantine: f in 0..T − 3.
        n_selected: m in 1..T.

    Returns:
        `w [T]`, dtype and device of the Gramian; 1/T everywhere if all rows are zero.

    Raises:
        ValueError: an argument out of range for T.
    """
    g = symmetric_float64(gramian)
    size = len(g)
    _check(size, n_byzantine, n_selected)
    squares = np.diagonal(g)
    if not squares.any():
        return as_weights(np.full(size, 1.0 / size), gramian)
    terms = squares[:, None] + squares
    distances = np.maximum(terms - 2.0 * g, 0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, 1)[:, : size - n_byzantine - 2]
    rows = np.arange(size)[:, None]
    scores = distances[rows, nearest].sum(1)
    rounding = 4 * torch.finfo(gramian.dtype).eps * terms[rows, nearest].sum(1)
    w = np.zeros(size)
    for _ in range(n_selected):
        # Equal rows differ in their last digits, which must not decide between them.
        tied = scores - rounding <= np.min(scores + rounding)
        chosen = int(np.argmax(tied))
        w[chosen], scores[chosen] = 1.0 / n_selected, np.inf
    return as_weights(w, gramian)


def _check(n_tasks: int, n_byzantine: int, n_selected: int) -> None:
    for name, value, least in (
        ("n_byzantine", n_byzantine, n_byzantine + 3),
        ("n_selected", n_selected, n_selected),
    ):
        if n_tasks < least:
            raise ValueError(
                f"Krum with {name}={value} needs at least {least} tasks, found {n_tasks}"
            )
