"""Random weights on the gradients of the shared parameters."""

from __future__ import annotations

import numpy as np
from torch import Generator, Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._gramians import solve_active
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.aggregators.rlw import DISTRIBUTIONS, rlw
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices

__all__ = ["RGW", "rgw"]


@register(
    "rgw",
    title="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    venue="TMLR",
    year=2022,
    url="https://arxiv.org/abs/2111.10603",
    promises=Promises(
        heads="own", degree=1, gain=lambda a, t, n: 1.0, simplex=True, deterministic=False
    ),
)
class RGW(RandomMixin, GramianAggregator):
    """Random gradient weighting: fresh weights on the simplex, for the shared gradients alone.

    Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022,
    https://arxiv.org/abs/2111.10603. The weights are those of `rlw`, with softmax of normals as the
    paper's default; task-specific parameters get their own gradients. `E[w_i] = 1/T`.

    Args:
        distribution: "normal", "uniform", "dirichlet" or "bernoulli"; see `RLW`.
        generator: a CPU generator; None makes one seeded from `torch.initial_seed()`.

    Raises:
        ValueError: an unknown distribution, or a generator that is not on the CPU.

    Example:
        >>> import torch
        >>> w = RGW().weights(torch.eye(2))
        >>> bool((w >= 0).all() and torch.isclose(w.sum(), torch.tensor(1.0)))
        True
    """

    state_names = ("generator",)

    def __init__(self, distribution: str = "normal", generator: Generator | None = None) -> None:
        one_of("distribution", distribution, DISTRIBUTIONS)
        self.distribution = distribution
        self._own(generator)

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]` on the simplex, drawn for this call; only the Gramian's zero rows matter."""
        return rgw(gramian, self.distribution, self.generator)


def rgw(
    gramian: Tensor, distribution: str = "normal", generator: Generator | None = None
) -> Tensor:
    """One draw of the weights.

    Args:
        gramian: `[T, T]`.
        distribution: see `RLW`.
        generator: a CPU generator; None uses torch's global one.

    Returns:
        `w [T]`, dtype and device of the Gramian, non-negative, sum one; zero for zero rows, 1/T
        everywhere if all are zero.
    """

    def solve(c: Array, n: Array, active: Indices) -> Array:
        return np.asarray(rlw(len(active), distribution, generator).numpy())

    return solve_active(gramian, 1.0 / len(gramian), solve)
